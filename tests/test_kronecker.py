"""Kronecker factors against explicit Jacobians, and the preconditioner that is made of them."""

import functools
import itertools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import gn_linear as gnl
from gn_linear import _kronecker, curvature
from gn_linear.preconditioners import Kronecker
from gn_linear.preconditioners.kronecker import _inverted_sketches
from gn_linear.solvers import CG, Status
from tests.support import assert_bit_equal, assert_close, condition, dense_jacobian, flat, tolerance, unflatten_like

SQUARED = gnl.losses.squared_error
RNG = np.random.default_rng(91)
N = 6
WHOLE = _kronecker.Form(widest=64, rank=1)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def network(params, x):
    """Two layers, a gain that is in no matrix product, and a leaf that is no array."""
    hidden = jnp.tanh(x @ params["w"] + params["b"]) * params["gain"]
    return hidden @ params["v"]


PARAMS = {"w": draw(3, 4), "b": draw(4), "gain": draw(4), "v": draw(4, 2), "absent": None}
ONE = {**PARAMS, "v": draw(4, 1)}
X, Y = draw(N, 3), draw(N, 2)
B, GAIN, V, W = range(4)  # leaves in tree order


def problem(params=ONE, x=X, y=None, loss=SQUARED, l2=0.0, predict=network):
    y = jnp.zeros_like(predict(params, x)) if y is None else y
    return curvature.linearised_problem(predict, loss, params, x, targets=y, l2=l2)


@functools.partial(jax.jit, static_argnames="form")
def moments(params, x, seed, form=WHOLE):
    return problem(params, x).moments(seed, 1, form)


@jax.jit
def refresh(kronecker, state, x=X, params=ONE):
    return kronecker.refresh(problem(params, x), state)


@jax.jit
def inverse_matrix(kronecker, params, x, damping, l2=0.0):
    """The preconditioner of a first step as a matrix, and its state."""
    linear = problem(params, x, l2=l2)
    apply, state = kronecker.inverse(linear, kronecker.refresh(linear, kronecker.init(params)), damping)
    vector, unravel = ravel_pytree(params)
    rows = jax.vmap(lambda unit: ravel_pytree(apply(unravel(unit)))[0])(jnp.eye(vector.size, dtype=vector.dtype))
    return rows, state


# --- the factors -----------------------------------------------------------------------------------------------------


def explicit(params):
    """Inputs of both layers, and by the results of each the Jacobian of each example, divided by sqrt(n)."""
    hidden = np.tanh(X @ params["w"] + params["b"])
    late = np.broadcast_to(np.eye(params["v"].shape[1]), (N, *2 * params["v"].shape[1:])) / np.sqrt(N)
    early = late @ (np.asarray(params["v"]).T * np.asarray(params["gain"]))
    early = early * np.asarray(1 - hidden**2)[:, None, :]
    extended = np.concatenate([X, np.ones((N, 1))], axis=1)
    return {W: (extended, early), V: (np.asarray(hidden * params["gain"]), late)}


def expected_factors(params):
    found = {}
    for k, (a, b) in explicit(params).items():
        left, right = a.T @ a / N, np.einsum("nki,nkj->ij", b, b)
        found[k] = (left if k == W else np.pad(left, ((0, 1), (0, 1))), np.pad(right, ((0, 1), (0, 1))))
    return found


inverted_sketches = jax.jit(_inverted_sketches, static_argnums=2)


def sketch(side, form):
    """What is kept of a wide factor."""
    return np.concatenate([np.diag(side)[:, None], side @ np.asarray(form.directions(jnp.asarray(side)))], axis=1)


def test_factors_of_one_output_are_exact():
    found, squares = moments(ONE, X, jnp.uint32(3))
    assert {k: m.rows for k, m in found.items()} == {W: N, V: N}
    for k, expected in expected_factors(ONE).items():
        assert_close((found[k].left, found[k].right), expected, size=N * 8)
    assert not np.any(flat([squares[k] for k in (W, B, V)]))
    assert np.all(squares[GAIN] > 0)
    form = _kronecker.Form(widest=3, rank=2)
    narrow, _ = moments(ONE, X, jnp.uint32(3), form)
    for k, (left, right) in expected_factors(ONE).items():
        sides = [sketch(side, form) if len(side) > 4 else side for side in (left, right)]
        assert_close((narrow[k].left, narrow[k].right), sides, size=N * 8)


def test_factors_of_several_outputs_are_exact_in_the_mean():
    seeds = jnp.arange(600, dtype=jnp.uint32)
    found, squares = jax.jit(jax.vmap(lambda seed: problem(PARAMS).moments(seed, 1, WHOLE)))(seeds)
    gain = dense_jacobian(lambda g, x: network({**PARAMS, "gain": g}, x), PARAMS["gain"], X)
    expected = expected_factors(PARAMS)
    pairs = [(found[k].right, expected[k][1]) for k in (W, V)]
    for samples, mean in [*pairs, (squares[GAIN], np.sum(gain**2, axis=0) / N)]:
        spread = np.std(samples, axis=0) / np.sqrt(len(seeds))
        # Six standard errors; entries without any spread are exact to rounding.
        assert np.all(np.abs(np.mean(samples, axis=0) - mean) <= 6 * spread + tolerance(np.float64, N * 8))
        assert np.max(spread) > 0
    assert_close(found[W].left[0], expected[W][0], size=N * 8)


def test_signs_are_independent():
    drawn = np.concatenate([_kronecker.signs((4, 500), jnp.uint32(seed)) for seed in range(8)]).astype(float)
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    deviations = np.sqrt(drawn.shape[1])
    products = drawn @ drawn.T - drawn.shape[1] * np.eye(len(drawn))
    assert max(np.max(np.abs(products)), np.max(np.abs(drawn.sum(axis=1)))) < 5 * deviations


# --- where a weight and its bias are found ---------------------------------------------------------------------------


class FlaxNetwork(nn.Module):
    """One position, so that factors are exact."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (2, 2), padding="VALID", param_dtype=jnp.float64)(x))
        return nn.Dense(1, param_dtype=jnp.float64)(x.reshape(x.shape[0], -1))


class EquinoxNetwork(eqx.Module):
    conv: eqx.nn.Conv2d
    linear: eqx.nn.Linear

    def __call__(self, x):
        return self.linear(jax.nn.softplus(self.conv(x)).ravel())


def affine(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


FLAT = {"w": draw(3, 4), "b": draw(4), "v": draw(4, 1)}
CONV = EquinoxNetwork(
    eqx.nn.Conv2d(3, 5, 2, key=jax.random.key(0), dtype=jnp.float64),
    eqx.nn.Linear(5, 1, key=jax.random.key(1), dtype=jnp.float64),
)
ARRAYS, STATIC = eqx.partition(CONV, eqx.is_array)
IMAGE = draw(1, 2, 2, 3)
PAIR, DENSE = {"['w']": "['b']", "['v']": None}, {"['w']": None, "['v']": None}
LAYERS = {
    "added": (affine, FLAT, X[:1], PAIR),
    "subtracted": (lambda p, x: jnp.tanh(x @ p["w"] - p["b"]) @ p["v"], FLAT, X[:1], PAIR),
    "subtracted from": (lambda p, x: jnp.tanh(p["b"] - jnp.einsum("ij,ni->nj", p["w"], x)) @ p["v"], FLAT, X[:1], PAIR),
    "negated": (lambda p, x: affine({**p, "b": -p["b"]}, x), FLAT, X[:1], DENSE),
    "used twice": (lambda p, x: jnp.concatenate([affine(p, x), affine(p, 1 * x)]), FLAT, X[:1], PAIR),
    "flax": (
        FlaxNetwork().apply,
        FlaxNetwork().init(jax.random.key(0), IMAGE),
        IMAGE,
        {f"['params']['{layer}']['kernel']": f"['params']['{layer}']['bias']" for layer in ("Conv_0", "Dense_0")},
    ),
    "equinox": (
        lambda p, x: jax.vmap(eqx.combine(p, STATIC))(x),
        ARRAYS,
        jnp.transpose(IMAGE, (0, 3, 1, 2)),
        {f".{layer}.weight": f".{layer}.bias" for layer in ("conv", "linear")},
    ),
}


def paths_of(params):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def pairs(predict, params, x):
    """From the paths of the weights that have factors to those of their biases."""
    paths = paths_of(params)
    blocks = _kronecker.layers(predict, params, x).blocks
    return {paths[block.weight]: None if block.bias is None else paths[block.bias] for block in blocks}


@pytest.mark.parametrize("name", LAYERS)
def test_block_of_one_row_is_exact(name):
    """The factors of one example and one output are those of the outer product of its gradient, whatever the layout."""
    predict, params, x, expected = LAYERS[name]
    assert pairs(predict, params, x) == expected
    linear = problem(params, x, predict=predict)
    found, _ = jax.jit(lambda seed: linear.moments(seed, 1, WHOLE))(jnp.uint32(0))
    # Equal outputs of two uses have the block of one, for the loss is a mean.
    gradients = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.grad(lambda p: jnp.mean(predict(p, x)))(params))]
    for block in linear.layers.blocks:
        rows, columns = (len(side) - 1 for side in found[block.weight][:2])
        whole = np.pad(gradients[block.weight].reshape(rows, columns), ((0, 1), (0, 1)))
        if block.bias is not None:
            place = (slice(0, -1), -1) if block.transposed else (-1, slice(0, -1))
            whole[place] = gradients[block.bias].ravel()
        kron = np.kron(found[block.weight].left, found[block.weight].right)
        assert_close(kron, np.outer(whole, whole), size=whole.size)


# --- models with more than layers ------------------------------------------------------------------------------------


def everything(params, inputs):
    """A scaled embedding, scanned layers, a layer norm, a matrix that is used both ways and a dense layer."""
    tokens, x = inputs
    hidden = 2 * params["embedding"][tokens] + x
    hidden = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), hidden, params["scanned"])[0]
    hidden = params["gain"] * (hidden - hidden.mean(-1, keepdims=True)) / jnp.sqrt(hidden.var(-1, keepdims=True) + 0.1)
    hidden = jnp.tanh(hidden @ params["tied"]) @ params["tied"].T
    return hidden @ params["out"]["w"] + params["out"]["b"]


MANY = {
    "embedding": draw(4, 3),
    "scanned": draw(2, 3, 3),
    "gain": jnp.ones(3),
    "tied": draw(3, 2),
    "out": {"w": draw(3, 1), "b": draw(1)},
}


def physics(mode, params, points):
    """``u'' + u`` inside, by derivatives of derivatives, and u on the boundary, in other numbers."""

    def u(x):
        return affine(params, x[None])[0, 0]

    def derivative(f):
        along = jnp.array([1.0, 0.0, 0.0])
        return {"forward": lambda x: jax.jvp(f, (x,), (along,))[1], "reverse": lambda x: jax.grad(f)(x)[0]}[mode]

    inside = jax.vmap(lambda x: derivative(derivative(u))(x) + u(x))(points["inside"])
    return {"boundary": jax.vmap(u)(points["boundary"]), "inside": inside}


POINTS = {"boundary": X[:2], "inside": X[2:]}
SOLVER = CG(max_steps=3, rtol=0.0, preconditioner=Kronecker(), momentum=True)


def training(predict, x, y, solver=SOLVER, **options):
    """An optimiser, and a step of it that returns the loss before."""
    optimiser = gnl.gauss_newton(predict, SQUARED, solver=solver, **options)

    def step(carry, factor=1.0):
        params, state = carry
        scaled = jax.tree.map(lambda leaf: leaf * factor if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, x)
        value, grads = jax.value_and_grad(lambda p: SQUARED(predict(p, scaled), y))(params)
        updates, state = optimiser.update(grads, state, params, inputs=scaled, targets=y)
        return (optax.apply_updates(params, updates), state), value

    return optimiser, step


def losses(predict, params, x, y, steps, **options):
    optimiser, step = training(predict, x, y, **options)
    run = jax.jit(lambda carry: jax.lax.scan(lambda c, _: step(c), carry, None, length=steps))
    (_, state), values = run((params, optimiser.init(params)))
    return np.asarray(values), state


def test_leaves_without_factors_have_a_diagonal():
    inputs = (jnp.array([0, 1, 2, 3, 1, 0]), X)
    assert pairs(everything, MANY, inputs) == {"['out']['w']": "['out']['b']", "['tied']": None}
    values, state = losses(everything, MANY, inputs, Y[:, :1], 6)
    assert values[-1] < values[0] / 4
    diagonal = state.solver.preconditioner.diagonal
    for name in ("embedding", "scanned", "gain"):
        assert np.all(np.any(np.asarray(diagonal[name]) > 0, axis=-1)), name
    assert not np.any(flat((diagonal["out"], diagonal["tied"])))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_derivatives_by_inputs_are_uses_like_any_other(mode):
    predict = functools.partial(physics, mode)
    params = {**FLAT, "b": 0 * FLAT["b"]}
    assert pairs(predict, params, POINTS) == PAIR
    blocks = {block.weight: block for block in _kronecker.layers(predict, params, POINTS).blocks}
    weight = blocks[2]
    # Values at both kinds of points have a bias, derivatives by inputs have none.
    assert sum(weight.biased) >= 2
    assert 0 in weight.biased
    y = {"boundary": jnp.ones(2), "inside": jnp.ones(N - 2)}
    values, _ = losses(predict, params, POINTS, y, 8)
    assert values[-1] < values[0] / 100


# --- the preconditioner ----------------------------------------------------------------------------------------------


def damped_inverse(factors, damping):
    """Both factors with their shares of the damping, inverted, in numpy."""
    left, right = factors
    sizes = [len(side) - 1 for side in (left, right)]
    pi = np.sqrt((np.trace(left) / sizes[0]) / (np.trace(right) / sizes[1]))
    shares = (pi * np.sqrt(damping), np.sqrt(damping) / pi)
    return [np.linalg.inv(side + share * np.eye(len(side))) for side, share in zip((left, right), shares, strict=True)]


@pytest.mark.parametrize(
    "l2", [0.2, {"w": 0.2, "b": 0.1, "gain": 0.3, "v": 0.4, "absent": None}], ids=["number", "tree"]
)
def test_inverse_is_that_of_the_damped_factors(l2):
    matrix, state = inverse_matrix(Kronecker(), ONE, X, jnp.float64(0.05), l2)
    vector = RNG.normal(size=matrix.shape[0])
    residual, found = unflatten_like(vector, ONE), unflatten_like(matrix @ vector, ONE)
    factors = expected_factors(ONE)
    penalty = dict.fromkeys(ONE, l2) if isinstance(l2, float) else l2
    left, right = damped_inverse(factors[W], 0.05 + penalty["w"])
    stacked = np.pad(np.vstack([residual["w"], residual["b"][None]]), ((0, 0), (0, 1)))
    solved = left @ stacked @ right
    assert_close((found["w"], found["b"]), (solved[:-1, :-1], solved[-1, :-1]), size=matrix.size)
    left, right = damped_inverse(factors[V], 0.05 + penalty["v"])
    assert_close(found["v"], (left @ np.pad(residual["v"], ((0, 1), (0, 1))) @ right)[:-1, :-1], size=matrix.size)
    diagonal = np.asarray(state.diagonal["gain"]) + 0.05 + penalty["gain"]
    assert_close(found["gain"], residual["gain"] / diagonal, size=N)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("relative", [1e-2, 1e-6, 1e-10])
@pytest.mark.parametrize(("rank", "decay"), [(3, 0.0), (40, 0.0), (40, 2.0)])
def test_sketched_inverse_is_definite_and_never_far_off(dtype, relative, rank, decay):
    """All eigenvalues of M^-1 (A + s) are positive; they are 1 where the sketch holds the whole of A."""
    form, n = _kronecker.Form(widest=20, rank=8), 41
    rows = RNG.normal(size=(100, rank)) @ (np.arange(1.0, rank + 1) ** -decay * RNG.normal(size=(n, rank))).T
    factor = (rows.T @ rows / 100).astype(dtype)
    shift = relative * np.trace(factor)
    (found,) = inverted_sketches([jnp.asarray(sketch(factor, form))], [jnp.asarray(shift, dtype)], form)
    found = np.asarray(found, np.float64)
    approximate = np.diag(found[:, 0]) - found[:, 1:] @ found[:, 1:].T
    assert np.linalg.eigvalsh(approximate)[0] > 0
    least = 2 * np.finfo(dtype).eps ** (2 / 3) * np.trace(factor)
    values = np.linalg.eigvals(approximate @ (factor.astype(float) + (shift + least) * np.eye(n))).real
    assert np.min(values) > 0
    assert np.max(values) < 2 * n / form.rank
    # Lifted by the root of rounding, a matrix of lower rank is seen to that accuracy, relative to the damping.
    bound = 4 * np.sqrt(form.rank * np.finfo(dtype).eps) / relative
    if rank < form.rank and bound < 1:
        assert np.max(np.abs(values - 1)) < bound


def test_wide_layers_train():
    """Inputs, hidden and outputs wider than what is kept as matrices."""
    solver = CG(max_steps=2, rtol=0.0, preconditioner=Kronecker(widest=2, rank=2), momentum=True)
    values, state = losses(network, PARAMS, X, Y, 25, solver=solver)
    assert values[-1] < values[0] / 20
    assert state.solver.preconditioner.factors[W].left.shape == (4, 3)
    whole, _ = losses(network, PARAMS, X, Y, 25, solver=CG(2, rtol=0.0, preconditioner=Kronecker(), momentum=True))
    assert values[-1] != whole[-1]


def test_linear_layer_is_solved_in_one_step():
    def predict(params, x):
        return x @ params["w"] + params["b"]

    params = {"w": draw(3, 1), "b": draw(1)}
    solver = CG(max_steps=5, rtol=1e-10, preconditioner=Kronecker())
    optimiser, step = training(predict, X, Y[:, :1], solver=solver, damping=0.0)
    (fitted, state), _ = jax.jit(step)((params, optimiser.init(params)))
    extended = np.concatenate([X, np.ones((N, 1))], axis=1)
    expected = np.linalg.lstsq(extended, Y[:, 0])[0]
    assert_close((fitted["w"], fitted["b"]), expected, size=N * 4, condition=condition(extended.T @ extended))
    assert (int(state.info.solver_steps), int(state.info.solver_status)) == (1, Status.CONVERGED)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scales=st.tuples(*[st.integers(-6, 6)] * 3),
    dead=st.sets(st.integers(0, 2)),
    silent=st.booleans(),
    equal=st.booleans(),
    damping=st.sampled_from([0.0, 1e-12, 1e-3, 1e3]),
    widest=st.sampled_from([0, 3, 64]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_inverse_is_symmetric_and_positive(seed, scales, dead, silent, equal, damping, widest, dtype):
    """With inputs that are zero or all alike, with cotangents of zero, at any scale and nearly without damping."""
    rng = np.random.default_rng(seed)
    x, w, v = (
        np.asarray(rng.normal(size=shape)) * 10.0**k for shape, k in zip([(N, 3), (3, 4), (4, 1)], scales, strict=True)
    )
    x[:, list(dead)] = 0
    x[:] = x[:1] if equal else x
    params = {**ONE, "w": w, "v": 0 * v if silent else v}
    params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, x))
    matrix, _ = inverse_matrix(Kronecker(widest=widest), params, x, jnp.asarray(damping, dtype))
    matrix = np.asarray(matrix)
    assert matrix.dtype == dtype
    assert np.all(np.isfinite(matrix))
    assert_close(matrix, matrix.T, size=matrix.size)
    assert np.all(np.diag(matrix) > 0)
    scale = 1 / np.sqrt(np.diag(matrix).astype(np.float64))
    assert np.linalg.eigvalsh(matrix * scale[:, None] * scale)[0] > -tolerance(dtype, len(matrix))


# --- the state -------------------------------------------------------------------------------------------------------


def test_memory_weighs_the_rows_of_a_batch():
    kronecker = Kronecker(memory=2.0, every=1)
    first = refresh(kronecker, kronecker.init(ONE))
    both = refresh(kronecker, first, 2 * X)
    alone = refresh(Kronecker(memory=0.0, every=1), first, 2 * X)
    for k in (W, V):
        for a, b, c in zip(first.factors[k], alone.factors[k], both.factors[k], strict=True):
            weight = N / (N + 2.0 * (len(a) - 1))
            assert_close(c, a + weight * (b - a), size=N)
    fresh = moments(ONE, 2 * X, jnp.uint32(0))[0]
    assert_close(alone.factors[W], fresh[W][:2], size=N)
    gain = [state.diagonal["gain"] for state in (first, alone, both)]
    assert_close(gain[2], gain[0] + (gain[1] - gain[0]) / 21, size=N)


def test_batch_that_is_not_finite_is_left_out():
    kronecker = Kronecker(every=1)
    never = refresh(kronecker, kronecker.init(ONE), X * jnp.nan)
    assert_bit_equal(refresh(kronecker, never), refresh(kronecker, kronecker.init(ONE)))
    good = refresh(kronecker, kronecker.init(ONE))
    assert_bit_equal(refresh(kronecker, good, X * jnp.inf), good)


@pytest.mark.parametrize("every", [1, 3, None])
def test_refreshes_are_more_frequent_at_first(every):
    kronecker = Kronecker(every=every)
    period = kronecker._period(problem())

    @jax.jit
    def run(state):
        def one(state, factor):
            after = kronecker.refresh(problem(ONE, X * factor), state)
            return after, (after.age, after.factors[W].left[0, 0])

        return jax.lax.scan(one, state, jnp.arange(1.0, 17.0))

    state, (ages, entries) = run(kronecker.init(ONE))
    expected, age = [], 0
    for count in range(16):
        age = 0 if age >= min(period - 1, count // 4) else age + 1
        expected.append(age)
    assert ages.tolist() == expected
    assert [bool(b == a) for a, b in itertools.pairwise(entries.tolist())] == [age > 0 for age in expected[1:]]
    assert int(state.count) == 16
    assert 1 <= period <= 20
    assert every in (None, period)


def test_inverses_wait_for_new_factors():
    kronecker = Kronecker(every=3)
    apply = jax.jit(lambda state, damping: kronecker.inverse(problem(), state, damping)[1].inverses)
    fresh = refresh(kronecker, kronecker.init(ONE))
    inverses = apply(fresh, jnp.float64(0.1))
    aged = fresh._replace(age=jnp.int32(1), inverses=inverses)
    assert_bit_equal(apply(aged, jnp.float64(0.7)), inverses)
    assert np.max(np.abs(flat(apply(fresh, jnp.float64(0.7))) - flat(inverses))) > 0


# --- in training -----------------------------------------------------------------------------------------------------


def test_transformations_of_a_step_agree():
    """Step by step, and all steps of several seeds at once."""
    optimiser, step = training(network, X, Y)
    carries = [(jax.tree.map(lambda p, k=k: p + 0.1 * k, PARAMS), optimiser.init(PARAMS)) for k in range(2)]
    compiled = jax.jit(step)
    twice = [compiled(compiled(carry)[0])[0] for carry in carries]
    assert jax.tree.map(jnp.shape, twice[0]) == jax.tree.map(jnp.shape, carries[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *carries)
    together = jax.jit(lambda c: jax.lax.scan(lambda c, _: jax.vmap(step)(c), c, None, length=2)[0])(stacked)
    for k in range(2):
        assert_close(jax.tree.map(lambda leaf, k=k: leaf[k], together[0]), twice[k][0], size=10**3)


def test_refresh_that_is_not_compiled_is_the_same():
    kronecker = Kronecker(every=1)
    state = kronecker.init(ONE)
    assert_close(kronecker.refresh(problem(), state), refresh(kronecker, state), size=N)


def test_masked_parameters():
    """Only two leaves are trained; a mask cuts the others out of the state."""
    mask = {"w": True, "b": True, "gain": False, "v": False, "absent": False}
    optimiser = optax.masked(gnl.gauss_newton(network, SQUARED, solver=SOLVER), mask)
    state = optimiser.init(PARAMS)
    grads = jax.grad(lambda p: SQUARED(network(p, X), Y))(PARAMS)
    updates, state = jax.jit(optimiser.update)(grads, state, PARAMS, inputs=X, targets=Y, full_params=PARAMS)

    def part(params, x):
        return network({**PARAMS, **params}, x)

    trained = {name: PARAMS[name] for name in ("w", "b")}
    alone = gnl.gauss_newton(part, SQUARED, solver=SOLVER)
    own = {name: grads[name] for name in trained}
    expected, _ = jax.jit(alone.update)(own, alone.init(trained), trained, inputs=X, targets=Y)
    assert_close({name: updates[name] for name in trained}, expected, size=10**3)


def test_quadratic_has_the_gain_ratio_one():
    def predict(params, x):
        return x @ params["w"] + params["b"]

    optimiser, step = training(predict, X, Y, damping=0.3, l2=0.1)
    carry = ({"w": draw(3, 2), "b": draw(2)}, optimiser.init({"w": draw(3, 2), "b": draw(2)}))
    compiled = jax.jit(step)
    for _ in range(3):
        carry, _ = compiled(carry)
        info = carry[1].info
        assert_close(info.gain_ratio, 1.0, size=N * 8, condition=float(info.loss / info.actual_reduction))


def test_regression_in_fewer_products_than_plain_iterations():
    def deep(params, x):
        return jnp.tanh(affine(params, x)) @ params["u"] + params["c"]

    x = jnp.linspace(-1.0, 1.0, 24)[:, None]
    rng = np.random.default_rng(4)
    shapes = {"w": (1, 8), "b": (8,), "v": (8, 8), "u": (8, 1), "c": (1,)}
    params = {name: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0])) for name, shape in shapes.items()}
    steps = 40
    ours, _ = losses(deep, params, x, jnp.sin(6 * x), steps)
    plain, _ = losses(deep, params, x, jnp.sin(6 * x), steps, solver=CG(max_steps=4, rtol=0.0))
    assert ours[-1] < plain[-1] / 20


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"samples": 0}, ValueError, "samples must be at least 1"),
        ({"memory": -1.0}, ValueError, "memory must be a finite number that is not negative"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"every": 1.5}, TypeError, "every must be an int"),
        ({"widest": -1}, ValueError, "widest must be at least 0"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
    ],
)
def test_arguments_are_checked(arguments, error, says):
    with pytest.raises(error, match=says):
        Kronecker(**arguments)
