"""The detours around XLA's CPU compiler change nothing but what is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr

import gn_linear as gnl
from gn_linear import _xla_cpu
from tests.support import assert_bit_equal, assert_close

EDGES = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_fence_is_the_identity_to_the_bit(dtype):
    limits = jnp.finfo(dtype)
    values = jnp.asarray(
        [*EDGES, limits.max, limits.min, limits.tiny, limits.smallest_subnormal, 1 + limits.eps], dtype
    )
    tree = {"outputs": values, "labels": jnp.arange(3), "none": None}
    assert_bit_equal(jax.jit(_xla_cpu.fence)(tree), tree)
    tangents, back = (transform(_xla_cpu.fence, values) for transform in (jax.linearize, jax.vjp))
    assert_bit_equal(tangents[1](values), values)
    assert_bit_equal(back[1](values)[0], values)


def equations(closed: ClosedJaxpr):
    """All equations, those of jitted functions inside too."""
    for eqn in closed.jaxpr.eqns:
        yield eqn
        if "jaxpr" in eqn.params and isinstance(eqn.params["jaxpr"], ClosedJaxpr):
            yield from equations(eqn.params["jaxpr"])


def names(function, *arguments):
    return [eqn.primitive.name for eqn in equations(jax.make_jaxpr(function)(*arguments))]


def dense(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def test_products_are_fenced_at_the_outputs(monkeypatch):
    """Without the fence a sum over the outputs drags the matrix products in front of it into its own fusion."""
    params, x = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((5, 3))
    linear = gnl.linearise(dense, params, x)
    assert names(linear.jvp, params)[-1] == "reduce_precision"
    assert names(linear.vjp, linear.outputs)[0] == "reduce_precision"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    elsewhere = gnl.linearise(dense, params, x)
    assert "reduce_precision" not in names(elsewhere.jvp, params)
    assert_bit_equal(elsewhere.jvp(params), linear.jvp(params))


# dimension numbers, shapes of data and kernel, other arguments
CONVOLUTIONS = {
    "NHWC, stride 2": (("NHWC", "HWIO", "NHWC"), (2, 7, 6, 3), (3, 2, 3, 4), {"window_strides": (2, 2)}),
    "NCHW": (("NCHW", "OIHW", "NCHW"), (2, 3, 7, 6), (4, 3, 3, 2), {"window_strides": (1, 2)}),
    "HWNC to NHWC": (("HWNC", "HWOI", "NHWC"), (7, 6, 2, 3), (3, 2, 4, 3), {"window_strides": (1, 1)}),
    "width before height": (("NWHC", "WHIO", "NWHC"), (2, 6, 7, 3), (2, 3, 3, 4), {"window_strides": (1, 1)}),
    "dilated": (
        ("NHWC", "HWIO", "NHWC"),
        (2, 9, 8, 3),
        (3, 2, 3, 4),
        {"window_strides": (1, 1), "rhs_dilation": (2, 3), "lhs_dilation": (1, 2), "padding": [(1, 2), (2, 0)]},
    ),
    "groups": (
        ("NHWC", "HWIO", "NHWC"),
        (2, 7, 6, 4),
        (3, 2, 2, 4),
        {"window_strides": (1, 1), "feature_group_count": 2},
    ),
    "one dimension": (("NCW", "OIW", "NCW"), (2, 3, 9), (4, 3, 3), {"window_strides": (2,)}),
    "three dimensions": (("NCDHW", "OIDHW", "NCDHW"), (2, 2, 4, 5, 3), (3, 2, 2, 3, 2), {"window_strides": (1, 1, 1)}),
}


def convolutional(name):
    layout, data, kernel, options = CONVOLUTIONS[name]
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"k": jax.random.normal(keys[0], kernel), "scale": jax.random.normal(keys[1], ())}

    @jax.jit
    def layer(k, x):
        return jax.lax.conv_general_dilated(x, k, dimension_numbers=layout, **{"padding": "SAME", **options})

    def predict(params, x):
        return jnp.sin(layer(params["k"], params["scale"] * x))

    return predict, params, jax.random.normal(keys[2], data)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_products_of_convolutions(name, monkeypatch):
    """Every convolution of a product is in the plain layout, and the products are those of the untouched model."""
    predict, params, x = convolutional(name)
    tangent = jax.tree.map(jnp.cos, params)

    def products(p, t):
        linear = gnl.linearise(predict, p, x)
        return linear.jvp(t), linear.vjp(jnp.cos(linear.outputs))

    found = list(equations(jax.make_jaxpr(products)(params, tangent)))
    layouts = [eqn.params["dimension_numbers"] for eqn in found if eqn.primitive.name == "conv_general_dilated"]
    assert len(layouts) >= 4
    assert all(layout == _xla_cpu._plain_layout(x.ndim) for layout in layouts[1:])  # the first is the model's own pass
    got = jax.jit(products)(params, tangent)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert_close(got, jax.jit(lambda *a: products(*a))(params, tangent), size=x.size)


def laplacian(params, points):
    """Its derivatives by the points are sums over a few directions, as XLA sees them."""
    one = lambda point: jnp.tanh(point @ params["a"] + params["c"]) @ params["b"]  # noqa: E731
    return jax.vmap(lambda point: jnp.trace(jax.hessian(one)(point)))(points)


def test_short_sums_are_written_out(monkeypatch):
    """Sums over the two directions of the plane become additions; sums over all points stay what they are."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"a": (2, 5), "b": (5,), "c": (5,)}
    params = {name: jax.random.normal(k, shape, "f4") for k, (name, shape) in zip(keys, shapes.items(), strict=False)}
    points = jax.random.normal(keys[3], (11, 2), "f4")

    def pulled(p):
        linear = gnl.linearise(laplacian, p, points)
        return linear.vjp(jnp.cos(linear.outputs))

    def sums():
        linear = gnl.linearise(laplacian, params, points)
        found = [e for e in equations(jax.make_jaxpr(linear.vjp)(linear.outputs)) if e.primitive.name == "reduce_sum"]
        return [tuple(e.invars[0].aval.shape[axis] for axis in e.params["axes"]) for e in found]

    got, left = jax.jit(pulled)(params), sums()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert any(np.prod(lengths) <= 8 for lengths in sums())
    assert left and all(np.prod(lengths) > 8 for lengths in left)
    assert_close(got, jax.jit(lambda p: pulled(p))(params), size=points.size)


def test_linear_maps_without_slow_forms_are_left_alone():
    def function(x):
        return 2.0 * x

    assert _xla_cpu.in_fast_forms(function, jnp.ones(3)) is function


def test_rewritten_products_in_loops_and_batches():
    predict, params, x = convolutional("NCHW")
    linear = gnl.linearise(predict, params, x)
    tangents = jax.tree.map(lambda p: jnp.stack([jnp.cos(p), jnp.sin(p)]), params)
    mapped = jax.jit(jax.vmap(linear.jvp))(tangents)
    looped = jax.jit(lambda t: jax.lax.map(linear.jvp, t))(tangents)
    single = jnp.stack([linear.jvp(jax.tree.map(lambda t, i=i: t[i], tangents)) for i in range(2)])
    assert_close(mapped, single, size=x.size)
    assert_close(looped, single, size=x.size)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 256])
def test_rows_folded_by_halves_are_those_added_one_by_one(count):
    rows = np.abs(np.random.default_rng(count).normal(size=(count, _xla_cpu._LONG)))
    np.testing.assert_array_equal(_xla_cpu.folded(jnp.maximum, jnp.asarray(rows)), rows.max(axis=0, initial=0.0))
    exact = np.rint(1000 * rows)  # sums of whole numbers do not round
    np.testing.assert_array_equal(_xla_cpu.folded(jnp.add, jnp.asarray(exact)), exact.sum(axis=0))
