"""Linearisation: the adjoint dot test, the dense Jacobian, and the messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gn_linear as gnl
from tests.support import PROBLEMS, assert_bit_equal, assert_close, dense, flat, unflatten_like

MODELS = ["squared_error", "two_heads", "decay", "affine"]


@functools.cache
def compiled(name):
    """The outputs and both products of a model of the table, as one compiled function."""
    problem = PROBLEMS[name]

    @jax.jit
    def products(params, inputs, d, u):
        f = gnl.linearise(problem.predict, params, inputs)
        return f.outputs, f.jvp(d), f.vjp(u)

    return functools.partial(products, problem.params, problem.inputs)


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_dense_jacobian(name):
    problem, oracle = PROBLEMS[name], dense(name)
    rng = np.random.default_rng(1)
    d, u = rng.normal(size=oracle.params.size), rng.normal(size=oracle.outputs.size)
    like = problem.predict(problem.params, problem.inputs)
    outputs, jd, ju = compiled(name)(unflatten_like(d, problem.params), unflatten_like(u, like))
    assert_close(outputs, oracle.outputs)
    assert_close(jd, oracle.jacobian @ d)
    assert_close(ju, oracle.jacobian.T @ u)
    assert jax.tree.structure(ju) == jax.tree.structure(problem.params)
    assert jax.tree.structure(jd) == jax.tree.structure(outputs) == jax.tree.structure(like)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(MODELS))
def test_adjoint(seed, name):
    problem, oracle, rng = PROBLEMS[name], dense(name), np.random.default_rng(seed)
    d, u = rng.normal(size=oracle.params.size), rng.normal(size=oracle.outputs.size)
    like = problem.predict(problem.params, problem.inputs)
    _, jd, ju = compiled(name)(unflatten_like(d, problem.params), unflatten_like(u, like))
    scale = np.abs(u) @ np.abs(oracle.jacobian) @ np.abs(d)
    assert_close(u @ flat(jd), flat(ju) @ d, scale=float(scale), size=oracle.jacobian.size)


def test_products_are_computed_from_one_trace_of_the_model():
    calls = []

    def predict(params, x):
        calls.append(None)
        return jnp.sin(params * x)

    f = gnl.linearise(predict, jnp.float64(0.3), jnp.arange(3.0))
    traced = len(calls)
    for _ in range(3):
        f.vjp(f.jvp(jnp.float64(1.0)))
    assert len(calls) == traced == 1


@pytest.mark.parametrize("name", MODELS)
def test_linearised_is_outputs_plus_change(name):
    problem, oracle = PROBLEMS[name], dense(name)
    d = np.random.default_rng(2).normal(size=oracle.params.size)
    moved = unflatten_like(oracle.params + d, problem.params)
    predict_lin = gnl.linearised(problem.predict, problem.params)
    assert_close(predict_lin(moved, problem.inputs), oracle.outputs + oracle.jacobian @ d)
    assert_bit_equal(predict_lin(problem.params, problem.inputs), problem.predict(problem.params, problem.inputs))


def test_affine_model_is_its_own_linearisation():
    problem = PROBLEMS["affine"]
    moved = jax.tree.map(lambda p: 3 * p + 1, problem.params)
    predict_lin = gnl.linearised(problem.predict, problem.params)
    assert_close(predict_lin(moved, problem.inputs), problem.predict(moved, problem.inputs))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_those_of_the_model(dtype):
    problem = PROBLEMS["squared_error"]
    params, x = jax.tree.map(lambda p: p.astype(dtype), (problem.params, problem.inputs))

    def everything_of(params, x):
        f = gnl.linearise(problem.predict, params, x)
        return f.outputs, f.jvp(params), f.vjp(f.outputs), gnl.linearised(problem.predict, params)(params, x)

    everything = jax.eval_shape(everything_of, params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(everything)} == {jnp.dtype(dtype)}


def test_vmap_and_scan_over_linearisations():
    x, anchors = jnp.linspace(0.0, 1.0, 4), jnp.asarray([0.5, 1.5, -1.0])

    def slope(anchor):
        f = gnl.linearise(lambda p, t: jnp.sin(p * t), anchor, x)
        return f.vjp(f.jvp(jnp.ones_like(anchor)))

    expected = [np.sum((np.asarray(x) * np.cos(a * np.asarray(x))) ** 2) for a in np.asarray(anchors)]
    assert_close(jax.vmap(slope)(anchors), expected)
    assert_close(jax.lax.scan(lambda c, a: (c, slope(a)), 0, anchors)[1], expected)


@pytest.mark.parametrize(
    ("leaf", "says"),
    [(jnp.arange(2), "int64"), (jnp.ones(2, complex), "complex128"), ("relu", "'relu'")],
)
def test_leaf_of_params_that_is_not_real_is_named(leaf, says):
    good, bad = {"a": [jnp.ones(2), jnp.ones(2)]}, {"a": [jnp.ones(2), leaf]}

    def predict(params, x):
        return params["a"][0] * x

    message = rf"leaf \['a'\]\[1\] .*{says}"
    with pytest.raises(TypeError, match="^params: " + message):
        gnl.linearise(predict, bad, jnp.ones(2))
    with pytest.raises(TypeError, match="^anchor: " + message):
        gnl.linearised(predict, bad)(good, jnp.ones(2))
    with pytest.raises(TypeError, match="^params: " + message):
        gnl.linearised(predict, good)(bad, jnp.ones(2))


def test_linearised_compares_shapes():
    predict_lin = gnl.linearised(lambda p, x: p["w"] * x, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"params: leaf \['w'\] has shape \(3,\).*anchor has shape \(2,\)"):
        predict_lin({"w": jnp.ones(3)}, jnp.ones(2))
    with pytest.raises(ValueError, match="params and anchor must have the same tree structure"):
        predict_lin(jnp.ones(2), jnp.ones(2))


@pytest.mark.parametrize(
    ("output", "error", "says"),
    [
        (jnp.sum, ValueError, r"leaf \['out'\] is a scalar"),
        (lambda v: (v > 0).astype(int), TypeError, r"leaf \['out'\] has dtype int64"),
        (lambda v: v + 1j, TypeError, r"leaf \['out'\] has dtype complex128"),
    ],
)
def test_output_that_is_no_float_array_of_examples_is_named(output, error, says):
    def predict(params, x):
        return {"fine": params * x, "out": output(params * x)}

    with pytest.raises(error, match="the outputs of predict: " + says):
        gnl.linearise(predict, jnp.float64(1.0), jnp.ones(3))
    with pytest.raises(error, match="the outputs of predict: " + says):
        gnl.linearised(predict, jnp.float64(1.0))(jnp.float64(2.0), jnp.ones(3))
