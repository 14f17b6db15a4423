"""The Gram matrix from factors is that of the dense Jacobian, and it is known which leaves are taken apart."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from gn_linear import _capture

CONVOLVED = "conv_general_dilated"
TIED = "matrix products contract different axes of it, as tied weights do"
rng = np.random.default_rng(20)


def draw(*shape):
    return jnp.asarray(rng.normal(size=shape))


def dense_gram(predict, params, inputs, others=None):
    """J J^T from the Jacobian of each example by itself."""
    vector, unravel = ravel_pytree(params)

    def outputs(v, example):
        single = predict(unravel(v), jax.tree.map(lambda leaf: leaf[None], example))
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(single)])

    jacobian = jax.jit(jax.vmap(jax.jacrev(outputs), (None, 0)))
    left, right = (np.asarray(jacobian(vector, x)) for x in (inputs, inputs if others is None else others))
    return np.einsum("ncp,mdp->ncmd", left, right)


def captured(predict, params, inputs):
    """The factors and their Gram matrix, in one compilation."""

    @jax.jit
    def both(params, inputs):
        factors = _capture.capture(predict, params, inputs)
        return factors, _capture.gram(factors)

    return both(params, inputs)


def assert_same(actual, desired):
    actual = np.asarray(actual)
    assert actual.shape == desired.shape
    assert np.max(np.abs(actual - desired), initial=0.0) <= 1e-12 * np.max(np.abs(desired), initial=0.0)


class Case(NamedTuple):
    """``found`` gives for each leaf its kind, or the reason why it is differentiated as it is."""

    predict: Callable[[Any, Any], Any]
    params: Any
    inputs: Any
    found: dict[str, str]


CASES: dict[str, Callable[[], Case]] = {}


def case(make):
    CASES[make.__name__.replace("_", " ").strip()] = make
    return make


def kinds(leaves):
    return {leaf.path: leaf.reason or leaf.kind for leaf in leaves}


def mlp(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] + params["c"]


MLP = {"w": draw(3, 4), "b": draw(4), "v": draw(4, 2), "c": draw(2)}
MLP_FOUND = {"['b']": "bias", "['c']": "bias", "['v']": "product", "['w']": "product"}
X = draw(4, 3)
SEQUENCES = draw(3, 5, 4)  # examples, positions, features


# --- dense layers ----------------------------------------------------------------------------------------------------


@case
def perceptron():
    return Case(mlp, MLP, X, MLP_FOUND)


@case
def nested_jit():
    layer = jax.jit(lambda w, b, x: jax.jit(lambda x: jnp.tanh(x @ w))(x) + b)

    @jax.jit
    def predict(p, x):
        return layer(p["v"], p["c"], layer(p["w"], p["b"], x))

    return Case(predict, MLP, X, MLP_FOUND)


@case
def one_jitted_layer_called_for_two_weights():
    layer = jax.jit(lambda w, x: jnp.sin(x @ w))
    return Case(
        lambda p, x: layer(p[1], layer(p[0], x)), [draw(3, 3), draw(3, 3)], X, {"[0]": "product", "[1]": "product"}
    )


@case
def same_layer_twice():
    def predict(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["w"] - p["b"])

    return Case(predict, {"w": draw(3, 3), "b": draw(3)}, X, {"['w']": "product", "['b']": "bias"})


@case
def same_layer_in_two_layouts():
    """The same axes of the leaf are contracted, in another order of rows and columns."""

    def predict(p, x):
        flipped = p[::-1].reshape(3, 2, 2).transpose(1, 2, 0)  # columns in two axes, rows reversed
        return jnp.tanh(x @ p) + jnp.tensordot(x[:, ::-1], flipped, axes=(1, 2)).reshape(-1, 4)

    return Case(predict, draw(3, 4), X, {"": "product"})


@case
def shared_by_different_numbers_of_positions():
    return Case(lambda p, x: jnp.tanh(x @ p).sum(1) + x[:, 0] @ p, draw(4, 2), SEQUENCES, {"": "product"})


@case
def remat():
    @jax.checkpoint
    def hidden(w, b, x):
        return jnp.tanh(x @ w + b)

    return Case(lambda p, x: hidden(p["w"], p["b"], x) @ p["v"] + p["c"], MLP, X, MLP_FOUND)


@case
def vmapped_inside():
    return Case(jax.vmap(mlp, (None, 0)), MLP, X, MLP_FOUND)


@case
def einsum_orders():
    def predict(p, x):
        h = jnp.einsum("nti,ijk->nkjt", x, p[0])
        h = jnp.tanh(jnp.einsum("ojk,nkjt->ont", p[1], h))
        return jnp.einsum("ont,oq->nqt", h, p[2]).sum(-1)

    params = [draw(4, 2, 3), draw(5, 2, 3), draw(5, 2)]
    return Case(predict, params, SEQUENCES, dict.fromkeys(["[0]", "[1]", "[2]"], "product"))


@case
def attention():
    def predict(p, x):
        q, k, v = (jnp.einsum("nti,ihd->nthd", x, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("nthd,nshd->nhts", q, k) / np.sqrt(2), axis=-1)
        mixed = jnp.einsum("nhts,nshd->nthd", weights, v)
        return (jnp.einsum("nthd,hdo->nto", mixed, p["o"]) + p["b"])[:, -1]

    params = {**{name: draw(4, 3, 2) for name in "qkv"}, "o": draw(3, 2, 2), "b": draw(2)}
    return Case(predict, params, SEQUENCES, {**{f"['{n}']": "product" for n in "qkvo"}, "['b']": "bias"})


@case
def layouts_on_the_way():
    def predict(p, x):
        w = jax.lax.optimization_barrier(jnp.copy(p.reshape(4, 3, 1).squeeze(2)).T[:, None])[:, 0]
        w = jax.lax.reduce_precision(w, 11, 52)
        return jnp.tanh(x @ jnp.flip(w, 0))

    return Case(predict, draw(12), X, {"": "product"})


@case
def biases_in_many_shapes():
    def predict(p, x):
        h = p["last"] + x - p["scalar"]
        h = jnp.sin(h + p["middle"][:, None])
        return jnp.cos(h - p["all"].T) * 2 + p["first"].reshape(1, 1, 4)

    params = {"last": draw(4), "scalar": draw(), "middle": draw(5), "all": draw(4, 5), "first": draw(2, 2)}
    return Case(predict, params, SEQUENCES, {f"['{name}']": "bias" for name in params})


@case
def wide_in_positions():
    """So many positions and so small a weight that the gradients are cheaper than the pairs."""
    return Case(lambda p, x: jnp.sin(x @ p).sum(1), draw(2, 2), draw(3, 9, 2), {"": "product"})


# --- convolutions ----------------------------------------------------------------------------------------------------


def convolution(layout, data, kernel, **options):
    params = {"k": draw(*kernel), "b": draw()}

    def predict(p, x):
        y = jax.lax.conv_general_dilated(x, p["k"], dimension_numbers=layout, **options)
        return jnp.tanh(y + p["b"])

    return lambda: Case(predict, params, draw(2, *data), {"['k']": "product", "['b']": "bias"})


NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
CASES |= {
    "conv same": convolution(NHWC, (4, 5, 2), (3, 2, 2, 3), window_strides=(1, 1), padding="SAME"),
    "conv strided": convolution(NHWC, (6, 5, 2), (3, 2, 2, 3), window_strides=(2, 3), padding="VALID"),
    "conv dilated": convolution(
        NCHW, (2, 6, 7), (3, 2, 2, 3), window_strides=(1, 2), padding="SAME", rhs_dilation=(2, 1)
    ),
    "conv transposed": convolution(
        NCHW, (2, 3, 4), (2, 2, 3, 2), window_strides=(2, 1), padding=[(1, -1), (2, 0)], lhs_dilation=(2, 3)
    ),
    "conv width first": convolution(
        ("NWHC", "WHOI", "NHWC"), (4, 5, 2), (3, 2, 3, 2), window_strides=(2, 1), padding="SAME"
    ),
    "conv one dimension": convolution(("NCW", "OIW", "NWC"), (2, 7), (3, 2, 3), window_strides=(2,), padding="SAME"),
}


@case
def network_of_convolutions():
    def predict(p, x):
        h = jax.nn.relu(jax.lax.conv(x, p["k"], (2, 2), "SAME") + p["b"][:, None, None])
        h = jax.lax.conv(jnp.tanh(h), p["k2"], (1, 1), "VALID")
        return h.mean((2, 3)) @ p["w"]

    params = {"k": draw(3, 1, 3, 3), "b": draw(3), "k2": draw(2, 3, 2, 2), "w": draw(2, 2)}
    found = {"['k']": "product", "['b']": "bias", "['k2']": "product", "['w']": "product"}
    return Case(predict, params, draw(3, 1, 6, 6), found)


@case
def depthwise():
    def predict(p, x):
        h = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=2)
        return jnp.tanh(h).mean((1, 2)) @ p["w"]

    found = {"['k']": f"{CONVOLVED} with groups", "['w']": "product"}
    return Case(predict, {"k": draw(2, 2, 1, 4), "w": draw(4, 2)}, draw(3, 4, 4, 2), found)


@case
def parameter_as_data_of_a_convolution():
    def predict(p, x):
        return jax.vmap(lambda kernel: jax.lax.conv(p, kernel, (1, 1), "VALID"))(x).sum((1, 3))

    return Case(predict, draw(1, 1, 4, 4), draw(2, 1, 1, 3, 3), {"": f"{CONVOLVED} of a parameter as data"})


# --- frameworks ------------------------------------------------------------------------------------------------------

FLAX = {"kernel": "product", "bias": "bias"}


@case
def flax_linen():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(3, (3, 3), strides=2, param_dtype=jnp.float64)(x))
            return nn.Dense(2, param_dtype=jnp.float64)(x.reshape(x.shape[0], -1))

    model, x = Network(), draw(3, 4, 4, 2)
    found = {f"['params']['{layer}_0']['{leaf}']": kind for layer in ("Conv", "Dense") for leaf, kind in FLAX.items()}
    return Case(model.apply, model.init(jax.random.key(0), x), x, found)


@case
def flax_nnx():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 3, (2, 2), padding="VALID", param_dtype=jnp.float64, rngs=rngs)
            self.out = nnx.Linear(3, 2, param_dtype=jnp.float64, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.gelu(self.conv(x)).mean((1, 2)))

    graph, params = nnx.split(Network(nnx.Rngs(0)), nnx.Param)[:2]
    found = {f"['{m}']['{leaf}'].value": kind for m in ("conv", "out") for leaf, kind in FLAX.items()}
    return Case(lambda p, x: nnx.merge(graph, p)(x), params, draw(3, 4, 4, 2), found)


@case
def flax_attention():
    model = nn.MultiHeadDotProductAttention(num_heads=2, param_dtype=jnp.float64)
    params = model.init(jax.random.key(1), SEQUENCES)
    found = {
        f"['params']['{layer}']['{leaf}']": kind
        for layer in ("query", "key", "value", "out")
        for leaf, kind in FLAX.items()
    }
    return Case(lambda p, x: model.apply(p, x)[:, 0, :2], params, SEQUENCES, found)


@case
def equinox_mlp():
    params, static = eqx.partition(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0), dtype=jnp.float64), eqx.is_array)
    found = {f".layers[{k}].{leaf}": kind for k in (0, 1) for leaf, kind in (("weight", "product"), ("bias", "bias"))}
    return Case(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, X, found)


# --- leaves that are differentiated as they are ----------------------------------------------------------------------


@case
def tied_weights():
    return Case(lambda p, x: jnp.tanh(x @ p) @ p.T, draw(3, 3), X, {"": TIED})


@case
def tied_and_rectangular():
    return Case(lambda p, x: jnp.tanh(x @ p) @ p.T, draw(3, 2), X, {"": TIED})


@case
def scanned_layers():
    def predict(p, x):
        hidden = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]
        return hidden @ p["out"]

    return Case(predict, {"layers": draw(3, 3, 3), "out": draw(3, 2)}, X, {"['layers']": "scan", "['out']": "product"})


@case
def carried_by_loops_and_branches():
    def predict(p, x):
        h = jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ p["scan"]), x)
        return jax.lax.cond(x.sum() > 0, lambda h: h @ p["cond"], lambda h: h * 2, h)

    return Case(predict, {"scan": draw(3, 3), "cond": draw(3, 3)}, X, {"['scan']": "scan", "['cond']": "cond"})


@case
def layer_norm():
    def predict(p, x):
        h = x @ p["w"]
        h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-3)
        return h * p["scale"] + p["shift"]

    params = {"w": draw(3, 4), "scale": draw(4), "shift": draw(4)}
    return Case(predict, params, X, {"['w']": "product", "['scale']": "mul", "['shift']": "bias"})


@case
def embedding_of_integers():
    ids = jnp.asarray(rng.integers(0, 5, (4, 3)))
    found = {"['table']": "gather", "['w']": "product"}
    return Case(
        lambda p, i: jnp.tanh(p["table"][i]).sum(1) @ p["w"], {"table": draw(5, 2), "w": draw(2, 3)}, ids, found
    )


@case
def embedding_and_output_tied():
    ids = jnp.asarray(rng.integers(0, 5, (4, 3)))
    return Case(lambda p, i: jnp.tanh(p[i].sum(1)) @ p.T, draw(5, 2), ids, {"": "gather"})


@case
def weight_norm():
    def predict(p, x):
        return jnp.tanh(x @ (p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0)) + p["b"])

    params = {"g": draw(2), "v": draw(3, 2), "b": draw(2)}
    return Case(predict, params, X, {"['g']": "mul", "['v']": "mul", "['b']": "bias"})


@case
def weight_and_penalty():
    def predict(p, x):
        return jnp.concatenate([x @ p["w"], jnp.sum(p["w"] ** 2) + x[:, :1] * jnp.sum(jnp.abs(p["b"]))], 1) + p["b"]

    return Case(predict, {"w": draw(3, 2), "b": draw(3)}, X, {"['w']": "integer_pow", "['b']": "abs"})


@case
def added_and_multiplied():
    return Case(lambda p, x: jnp.sin(x + p[0]) @ p, draw(3, 3), X, {"": "slice"})


@case
def added_and_multiplied_whole():
    return Case(lambda p, x: jnp.sin(x + p) @ p, draw(5, 5), draw(2, 5, 5), {"": "it is both added and multiplied"})


@case
def product_of_two_parameters():
    reason = "dot_general of two parameters"
    params = [draw(3, 2), draw(2, 3)]
    return Case(lambda p, x: jnp.tanh(x @ (p[0] @ p[1])), params, X, {"[0]": reason, "[1]": reason})


@case
def batched_product():
    reason = "dot_general with batch dimensions"
    return Case(lambda p, x: jnp.einsum("nhd,hdo->nho", x, p), draw(5, 4, 2), SEQUENCES, {"": reason})


@case
def parameter_as_output():
    def predict(p, x):
        return {"y": x @ p["w"], "p": jnp.broadcast_to(p["b"], (len(x), 2))}

    found = {"['w']": "product", "['b']": "it is an output"}
    return Case(predict, {"w": draw(3, 2), "b": draw(2)}, X, found)


@case
def repeated_weights():
    def predict(p, x):
        return jnp.tanh(x @ jnp.broadcast_to(p["w"], (3, 2)) + jnp.broadcast_to(p["b"], (4, 1, 2))[0])

    found = {"['w']": "dot_general after broadcast_in_dim", "['b']": "slice"}
    return Case(predict, {"w": draw(2), "b": draw(2)}, X, found)


@case
def tiled_bias():
    def predict(p, x):
        return jnp.sin(x + jnp.tile(p["tiled"], 2) + jnp.broadcast_to(p["repeated"], (2, 2)).reshape(4))

    found = {"['tiled']": "tile", "['repeated']": "add after broadcast_in_dim and reshape"}
    return Case(predict, {"tiled": draw(2), "repeated": draw(2)}, draw(3, 4), found)


@case
def complex_products():
    def predict(p, x):
        return jnp.abs(jnp.fft.fft(x) @ p["w"].astype(complex)) + jnp.real(1j * x[:, :2] + p["b"])

    found = dict.fromkeys(["['w']", "['b']"], "convert_element_type")
    return Case(predict, {"w": draw(3, 2), "b": draw(2)}, X, found)


# --- derivatives of its own ------------------------------------------------------------------------------------------


def activated(function):
    """With an activation of exactly zero, where only the custom rule says what the derivative is."""

    def make():
        params = {"w": draw(3, 2), "b": jnp.asarray([0.0, 0.7]), "v": draw(2, 2)}
        found = {"['w']": "product", "['b']": "bias", "['v']": "product"}
        return Case(lambda p, x: function(x @ p["w"] + p["b"]) @ p["v"], params, X.at[0].set(0.0), found)

    return make


CASES |= {
    f"activation {function.__name__}": activated(function)
    for function in (jax.nn.relu, jax.nn.gelu, jax.nn.silu, jax.nn.softplus, jax.nn.relu6, jax.nn.elu)
}


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (3 * g,))


@jax.custom_vjp
def own_layer(w, x):
    return x @ w


own_layer.defvjp(lambda w, x: (own_layer(w, x), (w, x)), lambda saved, g: (2 * saved[1].T @ g, g @ saved[0].T))


@case
def custom_rules_are_kept():
    """Rules that are not the derivative: looking inside would find another one."""

    def predict(p, x):
        return own_layer(p["own"], straight_through(x @ p["w"] + p["b"]))

    params = {"own": draw(2, 2), "w": draw(3, 2), "b": draw(2)}
    return Case(predict, params, X, {"['own']": "custom_vjp_call", "['w']": "product", "['b']": "bias"})


@case
def custom_jvp_of_a_parameter():
    return Case(lambda p, x: x @ jax.nn.softplus(p) + jax.nn.relu(p[0]), draw(3, 2), X, {"": "custom_jvp_call"})


@case
def stopped_gradients():
    def predict(p, x):
        return jnp.tanh(x @ jax.lax.stop_gradient(p["frozen"])) @ p["w"] + jax.lax.stop_gradient(x @ p["w"])

    return Case(predict, {"frozen": draw(3, 3), "w": draw(3, 3)}, X, {"['frozen']": "none", "['w']": "product"})


@case
def derivatives_by_inputs_forwards():
    """A Laplacian by two forward passes for each coordinate uses each weight six times, always in one layout."""

    def predict(p, x):
        def second(e):
            def slope(z):
                return jax.jvp(lambda z: mlp(p, z), (z,), (jnp.broadcast_to(e, z.shape),))[1]

            return jax.jvp(slope, (x,), (jnp.broadcast_to(e, x.shape),))[1]

        return sum(second(e) for e in jnp.eye(3)[:2])

    return Case(predict, MLP, X, {**MLP_FOUND, "['c']": "none"})


@case
def derivatives_by_inputs_backwards():
    """A gradient multiplies by the transposed weights; the last one is then used in this way only."""

    def predict(p, x):
        return jax.vmap(jax.grad(lambda z: mlp(p, z).sum()))(x)

    return Case(predict, MLP, X, {"['b']": "bias", "['c']": "none", "['v']": "product", "['w']": TIED})


# --- trees and shapes ------------------------------------------------------------------------------------------------


@case
def trees_without_and_with_influence():
    def predict(p, x):
        unneeded = jnp.sum(p["dead"] ** 2)  # noqa: F841
        return {"a": jnp.tanh(x["x"] @ p["w"])[:, :, None] * p["scalar"], "b": (x["z"][0] @ p["w"][:, :1])[:, 0]}

    params = {"w": draw(3, 2), "scalar": draw(), "unused": draw(2), "dead": draw(2), "none": None, "empty": draw(0, 2)}
    found = {"['w']": "slice", "['scalar']": "mul", **dict.fromkeys(["['unused']", "['dead']", "['empty']"], "none")}
    return Case(predict, params, {"x": X, "z": (draw(4, 3), None), "seed": jnp.arange(4)}, found)


@case
def outputs_without_parameters():
    return Case(lambda p, x: jnp.sin(x), {"w": draw(2)}, X, {"['w']": "none"})


@case
def constant_outputs():
    return Case(lambda p, x: {"a": jnp.ones((1, 2)), "b": x @ p}, draw(3, 2), X, {"": "product"})


@case
def outputs_of_rank_one():
    return Case(lambda p, x: jnp.tanh(x @ p), draw(3), X, {"": "product"})


@case
def outputs_of_rank_three():
    return Case(
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"]),
        {"w": draw(4, 2), "b": draw(2)},
        SEQUENCES,
        {"['w']": "product", "['b']": "bias"},
    )


# --- the matrix ------------------------------------------------------------------------------------------------------

KINDS = ("product", "bias", "none")


@pytest.mark.parametrize("name", CASES)
def test_gram_is_that_of_the_dense_jacobian(name):
    predict, params, inputs, found = CASES[name]()
    factors, gram = captured(predict, params, inputs)
    assert kinds(factors.leaves) == found
    assert factors.reasons == {leaf: reason for leaf, reason in found.items() if reason not in KINDS}
    assert_same(gram, dense_gram(predict, params, inputs))


class Layer(NamedTuple):
    weight: int
    bias: int | None
    activation: str
    transposed: bool
    mixes: bool


ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "gelu": jax.nn.gelu, "none": lambda x: x, "sin": jnp.sin}
LAYERS = st.builds(
    Layer,
    st.integers(0, 2),
    st.none() | st.integers(0, 1),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=20, deadline=None)
@given(
    layers=st.lists(LAYERS, min_size=1, max_size=4),
    width=st.integers(1, 4),
    positions=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    seed=st.integers(0, 2**16),
)
def test_random_networks(layers, width, positions, sizes, seed):
    """Layers draw from three weights, two biases, so that any may be shared, transposed, or both."""
    features, examples, outputs = sizes
    values = np.random.default_rng(seed)
    shapes = {"in": (features, width), "out": (width, outputs), "w": (3, width, width), "b": (2, width)}
    params = {name: jnp.asarray(values.normal(size=shape)) for name, shape in shapes.items()}
    params = {**params, "w": list(params["w"]), "b": list(params["b"])}
    used = {(layer.weight, layer.transposed) for layer in layers}

    def predict(p, x):
        h = x @ p["in"]
        for layer in layers:
            weight = p["w"][layer.weight]
            h = h @ (weight.T if layer.transposed else weight)
            h = h if layer.bias is None else h + p["b"][layer.bias]
            h = ACTIVATIONS[layer.activation](jnp.cumsum(h, axis=1) if layer.mixes else h)
        return h.sum(1) @ p["out"]

    x = jnp.asarray(values.normal(size=(examples, positions, features)))
    factors, gram = captured(predict, params, x)
    for k in range(3):
        ways = [transposed for weight, transposed in used if weight == k]
        # A single entry has no axes to confuse.
        expected = "none" if not ways else TIED if len(ways) == 2 and width > 1 else "product"
        assert kinds(factors.leaves)[f"['w'][{k}]"] == expected
    assert_same(gram, dense_gram(predict, params, x))


@pytest.mark.parametrize("largest", [1, 288, 2**25])
@pytest.mark.parametrize("route", ["_by_pairs", "_by_gradients"])
def test_every_route_gives_the_same_matrix(route, largest, monkeypatch):
    """In blocks of one, in blocks of which the last is shorter, and whole; the others have other positions."""
    monkeypatch.setattr(_capture, "_LARGEST", largest)
    a, b, other_a, other_b = draw(5, 3, 10), draw(5, 2, 3, 4), draw(4, 2, 10), draw(4, 2, 2, 4)
    left, right = (np.einsum("nti,ncto->ncio", x, y) for x, y in ((a, b), (other_a, other_b)))
    assert_same(getattr(_capture, route)(a, b, other_a, other_b), np.einsum("ncio,mdio->ncmd", left, right))


def test_the_cheaper_route_is_taken(monkeypatch):
    """Few positions and a large weight go by pairs, many positions and a small weight through gradients."""
    taken = []
    for route in ("_by_pairs", "_by_gradients"):
        original = getattr(_capture, route)
        monkeypatch.setattr(_capture, route, lambda *a, name=route, call=original: taken.append(name) or call(*a))
    _capture._product(*2 * (draw(2, 3, 8), draw(2, 2, 3, 8)))
    _capture._product(*2 * (draw(2, 30, 2), draw(2, 2, 30, 2)))
    assert taken == ["_by_pairs", "_by_gradients"]


def test_blocks_of_one_structure():
    predict, params, inputs, _ = CASES["attention"]()
    structure = _capture.trace_structure(predict, params, jax.ShapeDtypeStruct(inputs.shape, inputs.dtype))
    factors = jax.jit(functools.partial(_capture.factors, structure))
    first, rest = factors(params, inputs[:1]), factors(params, inputs[1:])
    gram = jax.jit(_capture.gram)
    assert_same(gram(first, rest), dense_gram(predict, params, inputs[:1], inputs[1:]))
    assert_same(gram(rest), dense_gram(predict, params, inputs[1:]))
    other = jax.tree.map(lambda p: 2 * p, params)
    assert_same(gram(factors(other, inputs)), dense_gram(predict, other, inputs))


def test_under_transformations():
    """Under vmap and grad over the parameters, in a scan, and of a model that closes over traced arrays."""

    def trace_of_gram(params, scale, x):
        found = _capture.capture(lambda p, x: mlp(p, scale * x), params, x)
        return jnp.einsum("ncnc", _capture.gram(found))

    def reference(params, scale, x):
        rows = jax.jacrev(lambda p: jax.vmap(lambda e: mlp(p, scale * e[None])[0])(x))(params)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(rows))

    scales = jnp.asarray([0.5, 2.0])
    for transformed in (
        lambda f: jax.vmap(f, (None, 0, None))(MLP, scales, X),
        lambda f: jax.lax.map(lambda scale: f(MLP, scale, X), scales),
        lambda f: ravel_pytree(jax.grad(f)(MLP, scales[0], X))[0],
    ):
        got, want = jax.jit(lambda apply=transformed: (apply(trace_of_gram), apply(reference)))()
        assert_same(got, np.asarray(want))


def test_no_array_has_the_size_of_a_jacobian():
    """The largest intermediate of a wide layer is far below a gradient for each example and output."""
    params, x = {"w": jnp.ones((50, 60)), "v": jnp.ones((60, 3))}, jnp.ones((7, 4, 50))

    def predict(p, x):
        return (jnp.tanh(x @ p["w"]) @ p["v"]).sum(1)

    traced = jax.make_jaxpr(lambda p, x: _capture.gram(_capture.capture(predict, p, x)))(params, x)
    sizes = [var.aval.size for eqn in traced.eqns for var in eqn.outvars]
    assert max(sizes) < 7 * 3 * 50 * 60


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_narrow_dtypes_are_summed_in_float32(dtype):
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (MLP, X))
    found = jax.jit(lambda p, x: _capture.gram(_capture.capture(mlp, p, x)))(params, x)
    assert found.dtype == jnp.float32
    wide = dense_gram(mlp, *jax.tree.map(lambda leaf: leaf.astype(float), (params, x)))
    assert np.max(np.abs(found - wide)) <= 16 * float(jnp.finfo(dtype).eps) * np.max(np.abs(wide))


def test_mixed_precision():
    """Weights that are cast on the way, as flax and equinox do for computations in half precision."""

    def predict(p, x):
        h = jnp.tanh(x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16) + p["b"].astype(jnp.bfloat16))
        return h.astype(jnp.float32) @ p["v"] + p["c"]

    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), MLP)
    factors, gram = captured(predict, params, X)
    assert kinds(factors.leaves) == MLP_FOUND
    wide = dense_gram(mlp, MLP, X)
    assert np.max(np.abs(gram - wide)) <= 16 * float(jnp.finfo(jnp.bfloat16).eps) * np.max(wide)


def test_examples_with_keys_of_their_own():
    keys = jax.random.split(jax.random.key(0), 4)

    def predict(p, inputs):
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (4,)))(inputs["key"])
        return jnp.where(keep, jnp.tanh(inputs["x"] @ p["w"]), 0.0) @ p["v"]

    inputs = {"x": X, "key": keys}
    params = {"w": MLP["w"], "v": MLP["v"]}
    factors, gram = captured(predict, params, inputs)
    assert kinds(factors.leaves) == {"['v']": "product", "['w']": "product"}
    assert_same(gram, dense_gram(predict, params, inputs))


def test_factors_give_the_gradients():
    """Activations and cotangents in the order of the leaf; a bias in the leaf's own."""
    factors, _ = captured(mlp, MLP, X)
    jacobian = jax.jit(jax.vmap(jax.jacrev(lambda p, x: mlp(p, x[None])[0]), (None, 0)))(MLP, X)
    for a, b, exact in zip(factors.activations, factors.cotangents, jax.tree.leaves(jacobian), strict=True):
        rows = b if a is None else jnp.einsum("nti,ncto->ncio", a, b)
        assert_same(rows.reshape(exact.shape), np.asarray(exact))


# --- what is refused -------------------------------------------------------------------------------------------------


def centred(params, x):
    h = mlp(params, x)
    return h - h.mean(0)


def test_examples_that_mix_are_refused():
    with pytest.raises(ValueError, match=r"mixes the examples of a batch: its output.*Batch normalisation in training"):
        _capture.check_independent(centred, MLP, X)
    with pytest.raises(ValueError, match=r"mixes the examples of a batch: leaf \['b'\]"):
        _capture.check_independent(lambda p, x: {"a": mlp(p, x), "b": centred(p, x)}, MLP, X)
    with pytest.raises(ValueError, match="mixes the examples"):
        _capture.check_independent(lambda p, x: mlp(p, x)[:, :, None] * jnp.ones(len(x)), MLP, X)
    jax.jit(functools.partial(_capture.check_independent, centred))(MLP, X)  # values are not known: nothing to compare


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_independent_examples_pass(dtype):
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (MLP, X))
    _capture.check_independent(mlp, params, x)
    _capture.check_independent(lambda p, x: {"nan": mlp(p, x) * jnp.nan, "inf": mlp(p, x) / 0}, params, x)


def test_normalisation_of_a_batch_is_refused():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train, param_dtype=jnp.float64)(nn.Dense(2)(x))

    state = Network().init(jax.random.key(0), X, train=False)

    def predict(p, x, train):
        return Network().apply({**state, "params": p}, x, train=train, mutable=["batch_stats"])[0]

    _capture.check_independent(functools.partial(predict, train=False), state["params"], X)
    with pytest.raises(ValueError, match="mixes the examples of a batch"):
        _capture.check_independent(functools.partial(predict, train=True), state["params"], X)


@pytest.mark.parametrize(
    ("predict", "params", "inputs", "error", "message"),
    [
        (mlp, {}, X, ValueError, "params must have at least one float leaf, but is a dict without keys"),
        (mlp, {**MLP, "w": jnp.ones((3, 4), int)}, X, TypeError, r"params: leaf \['w'\] has dtype int"),
        (mlp, MLP, {"x": 1.0}, ValueError, r"inputs: leaf \['x'\] is a scalar"),
        (mlp, MLP, {}, ValueError, "same number of examples on its leading axis; got no leaves"),
        (mlp, MLP, {"x": X, "y": X[:2]}, ValueError, r"got 4 \(leaf \['x'\]\) and 2 \(leaf \['y'\]\)"),
        (lambda p, x: mlp(p, x).squeeze(), MLP, X, ValueError, r"shape \(2,\) on a batch of one example"),
        (lambda p, x: mlp(p, x).sum(), MLP, X, ValueError, r"shape \(\) on a batch of one example"),
        (lambda p, x: mlp(p, x).argmax(1), MLP, X, TypeError, "the outputs of predict: the array has dtype int"),
    ],
)
def test_what_does_not_fit_is_named(predict, params, inputs, error, message):
    with pytest.raises(error, match=message):
        _capture.capture(predict, params, inputs)


def test_parameters_and_factors_of_another_structure():
    structure = _capture.trace_structure(mlp, MLP, X)
    with pytest.raises(ValueError, match=r"params: leaf \['b'\] has shape \(3,\)"):
        _capture.factors(structure, {**MLP, "b": draw(3)}, X)
    with pytest.raises(ValueError, match=r"from one structure, but are of the leaves .* and the array"):
        _capture.gram(_capture.factors(structure, MLP, X), _capture.capture(lambda p, x: x @ p, draw(3, 2), X))
