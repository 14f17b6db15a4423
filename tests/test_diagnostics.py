"""The empirical neural tangent kernel against dense Jacobians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import gn_linear as gnl
from gn_linear import _capture
from gn_linear.diagnostics import ntk as ntk_module
from tests.support import assert_close, tolerance

N, M = 7, 5


def attention(p, x):
    q, k, v = (jnp.einsum("nti,io->nto", x, p[name]) for name in ("q", "k", "v"))
    mixed = jax.nn.softmax(jnp.einsum("nto,nso->nts", q, k)) @ v
    return {"a": (mixed * p["gain"]).sum(1), "b": jnp.tanh(mixed @ p["out"])[:, 0]}


def perceptron(p, x):
    return jnp.tanh(x.reshape(len(x), -1) @ p["w"] + p["b"]) @ p["v"]


def make(seed, shapes):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


MODELS = {
    "perceptron": (perceptron, make(0, {"w": (6, 4), "b": (4,), "v": (4, 3)})),
    "attention": (attention, make(1, {"q": (2, 4), "k": (2, 4), "v": (2, 4), "gain": (4,), "out": (4, 2)})),
}
X = make(2, {"x": (N, 3, 2), "y": (M, 3, 2)})


@functools.cache
def dense(name, batch="x", keep=None):
    """(n, c, parameters) by reverse mode over the whole batch."""
    predict, params = MODELS[name]
    x = X[batch]
    kept = {key: value for key, value in params.items() if keep is None or key in keep}
    vector, unravel = ravel_pytree(kept)

    def flat(v):
        outputs = predict({**params, **unravel(v)}, x)
        return jnp.concatenate([leaf.reshape(len(x), -1) for leaf in jax.tree.leaves(outputs)], axis=1)

    return np.asarray(jax.jit(jax.jacrev(flat))(vector))


@pytest.mark.parametrize("block_size", [None, 1, 3, N])
@pytest.mark.parametrize("name", MODELS)
def test_kernel_is_that_of_the_jacobian(name, block_size):
    predict, params = MODELS[name]
    ntk = functools.partial(gnl.diagnostics.empirical_ntk, predict, params, block_size=block_size)

    @jax.jit
    def kernels(x, y):
        return (ntk(x), ntk(x, y)), (ntk(x, trace=True), ntk(x, y, trace=True)), ntk(x, y, output=2)

    full, averaged, of_one = kernels(X["x"], X["y"])
    j, k = dense(name), dense(name, "y")
    size = j.shape[2]
    for got, other in zip(full, (j, k), strict=True):
        assert_close(got, np.einsum("icp,jdp->ijcd", j, other), size=size)
    for got, other in zip(averaged, (j, k), strict=True):
        assert_close(got, np.einsum("icp,jcp->ij", j, other) / j.shape[1], size=size)
    assert_close(of_one, np.einsum("ip,jp->ij", j[:, 2], k[:, 2]), size=size)


@pytest.mark.parametrize("keep", [frozenset({"w"}), frozenset({"b", "v"})])
def test_mask_takes_the_leaves_that_count(keep):
    predict, params = MODELS["perceptron"]
    j = dense("perceptron", keep=keep)
    want = np.einsum("icp,jcp->ij", j, j) / 3
    flags = {name: name in keep for name in params}
    for mask in (flags, lambda _: flags):
        ntk = functools.partial(gnl.diagnostics.empirical_ntk, predict, trace=True, mask=mask)
        got = jax.jit(ntk)(params, X["x"])
        assert_close(got, want, size=j.shape[2])


def test_mask_may_be_a_prefix():
    predict, params = MODELS["perceptron"]

    def nested(p, x):
        return predict(p["net"], x) + p["shift"]

    tree = {"net": params, "shift": jnp.zeros(3)}
    mask = {"net": True, "shift": False}
    got = jax.jit(functools.partial(gnl.diagnostics.empirical_ntk, nested, trace=True, mask=mask))(tree, X["x"])
    j = dense("perceptron")
    assert_close(got, np.einsum("icp,jcp->ij", j, j) / 3, size=j.shape[2])


def test_under_jit_and_in_float32():
    predict, params = MODELS["attention"]
    j = dense("attention")
    exact = np.einsum("icp,jcp->ij", j, j) / j.shape[1]
    narrow, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, X["x"]))
    got = jax.jit(lambda p, x: gnl.diagnostics.empirical_ntk(predict, p, x, trace=True, block_size=3))(narrow, x)
    assert got.dtype == jnp.float32
    assert_close(got, exact, size=40, dtype=jnp.float32)


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize("name", MODELS)
def test_shares_of_the_leaves_and_the_diagonal(name, block_size):
    predict, params = MODELS[name]
    by_leaf, diagonal = (
        functools.partial(function, predict, params, block_size=block_size)
        for function in (gnl.diagnostics.ntk_by_leaf, gnl.diagnostics.ntk_diagonal)
    )

    @jax.jit
    def measured(x, y):
        kernels = [(by_leaf(x, *others), by_leaf(x, *others, trace=True)) for others in ((), (y,))]
        return kernels, diagonal(x), diagonal(x, trace=True)

    kernels, each, mean = measured(X["x"], X["y"])
    for others, (shares, averaged) in zip(((), (X["y"],)), kernels, strict=True):
        for key in params:
            j, k = (dense(name, batch, frozenset({key})) for batch in ("x", "y" if others else "x"))
            expected = np.einsum("icp,jdp->ijcd", j, k)
            assert_close(shares[key], expected, size=j.shape[2])
            assert_close(averaged[key], np.einsum("ijcc->ij", expected) / j.shape[1], size=j.shape[1] * j.shape[2])
    j = dense(name)
    expected = np.einsum("icp,idp->icd", j, j)
    assert_close(each, expected, size=j.shape[2])
    assert_close(mean, np.einsum("icc->i", expected) / j.shape[1], size=j.shape[1] * j.shape[2])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", MODELS)
def test_every_dtype_gives_a_positive_semidefinite_kernel(name, dtype):
    """In at least float32: inner products of rounded gradients are inner products all the same."""
    predict, params = MODELS[name]
    narrow, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, X["x"]))
    kernel = jax.jit(functools.partial(gnl.diagnostics.empirical_ntk, predict))(narrow, x)
    assert kernel.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    j = dense(name)
    assert_close(kernel, np.einsum("icp,jdp->ijcd", j, j), size=40, dtype=dtype, condition=4)
    size = N * kernel.shape[2]
    matrix = np.asarray(kernel.transpose(0, 2, 1, 3), np.float64).reshape(size, size)
    assert np.linalg.eigvalsh(matrix)[0] >= -tolerance(kernel.dtype, size) * np.linalg.norm(matrix, 2)


@pytest.mark.parametrize("block_size", [None, 1, 3, N, "bounded"])
@pytest.mark.parametrize("name", MODELS)
def test_product_is_that_of_the_kernel(name, block_size, monkeypatch):
    predict, params = MODELS[name]
    if block_size == "bounded":
        one = _capture.numbers_computed(predict, params, X["x"][:1])
        monkeypatch.setattr(ntk_module, "LARGEST", 2 * one)
        block_size = None
    vector = jax.tree.map(
        lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape), predict(params, X["y"])
    )
    flat = np.concatenate([np.reshape(leaf, (M, -1)) for leaf in jax.tree.leaves(vector)], axis=1)
    product = functools.partial(gnl.diagnostics.ntk_vector_product, predict, params, block_size=block_size)
    got = jax.jit(product)(X["x"], vector, X["y"])
    got = np.concatenate([np.reshape(leaf, (N, -1)) for leaf in jax.tree.leaves(got)], axis=1)
    j, k = dense(name), dense(name, "y")
    assert_close(got, np.einsum("icp,jdp,jd->ic", j, k, flat), size=j.shape[2] * flat.size)


def test_product_of_a_large_batch_needs_the_memory_of_a_block(monkeypatch):
    """By default, once one evaluation computes more than the limit."""
    predict, params = MODELS["perceptron"]
    monkeypatch.setattr(ntk_module, "LARGEST", 3000)

    def temporary(n):
        x, v = jnp.ones((n, 3, 2)), jnp.ones((n, 3))
        compiled = jax.jit(functools.partial(gnl.diagnostics.ntk_vector_product, predict, params)).lower(x, v).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # The inputs and the vector are cut into blocks, which may copy them; what is computed from them is not kept.
    assert temporary(3200) - temporary(1600) <= 1600 * 8 * 2 * (6 + 3)


def test_product_of_a_model_that_mixes_examples():
    """In one piece it is that of the whole batch; in blocks it is refused."""
    predict, params = MODELS["perceptron"]

    def centred(p, x):
        return predict(p, x - x.mean(0))

    vector = jnp.ones((N, 3))
    _, pull = jax.vjp(lambda p: centred(p, X["x"]), params)
    _, expected = jax.jvp(lambda p: centred(p, X["x"]), (params,), pull(vector))
    product = functools.partial(gnl.diagnostics.ntk_vector_product, centred, params, X["x"], vector)
    assert_close(product(), expected, size=6 * N)
    with pytest.raises(ValueError, match="predict mixes the examples"):
        product(block_size=2)


def test_report_names_what_falls_back():
    predict, params = MODELS["attention"]
    report = gnl.diagnostics.structure_report(predict, params, X["x"])
    kinds = {leaf.path: leaf.kind for leaf in report.leaves}
    assert kinds == {"['gain']": "gradient", **{f"['{name}']": "product" for name in ("k", "out", "q", "v")}}
    assert not report.structured
    assert str(report).splitlines()[0] == "['gain']  gradient  gradients  mul"
    assert report.routes == ("gradients",) * 5
    report = gnl.diagnostics.structure_report(*MODELS["perceptron"], X["x"])
    assert report.structured
    assert report.routes == ("gradients", "factors", "factors")
    wide = {name: jnp.ones((2, 40)) for name in "qkv"} | {"gain": jnp.ones(40), "out": jnp.ones((40, 2))}
    route = dict(zip(sorted(wide), gnl.diagnostics.structure_report(predict, wide, X["x"]).routes, strict=True))
    assert route == {name: "pairs of positions" if name == "out" else "gradients" for name in wide}


def test_bad_input():
    predict, params = MODELS["perceptron"]

    def mixing(p, x):
        return predict(p, x - x.mean(0))

    ntk = gnl.diagnostics.empirical_ntk
    for function in (ntk, gnl.diagnostics.structure_report):
        with pytest.raises(ValueError, match="predict mixes the examples"):
            function(mixing, params, X["x"])
    with pytest.raises(ValueError, match="block_size"):
        ntk(predict, params, X["x"], block_size=0)
    with pytest.raises(ValueError, match="output must be a number from 0 to 2"):
        ntk(predict, params, X["x"], output=3)
    with pytest.raises(ValueError, match="mask must have the structure of params"):
        ntk(predict, params, X["x"], mask={"w": True})
    with pytest.raises(ValueError, match="mask leaves no parameter"):
        ntk(predict, params, X["x"], mask=False)
    with pytest.raises(ValueError, match="vector"):
        gnl.diagnostics.ntk_vector_product(predict, params, X["x"], jnp.ones((N, 2)))
