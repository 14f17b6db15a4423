"""Both transforms in every precision: narrow, mixed, strictly promoted, without double precision, on empty trees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gn_linear as gnl
from tests.oracles_transforms import kinds
from tests.support import (
    affine,
    assert_bit_equal,
    assert_close,
    condition,
    damped_step,
    dense_jacobian,
    flat,
    narrowest,
    tolerance,
)

SQUARED, SOFTMAX = gnl.losses.squared_error, gnl.losses.softmax_cross_entropy
CG, JACOBI = gnl.solvers.CG, gnl.preconditioners.Jacobi
LANCZOS, FIRST_ORDER = gnl.solvers.Lanczos, gnl.solvers.FirstOrder
RATE, STEPS = 0.4, 3
# optax's adam does not bear strict promotion
RMSPROP = FIRST_ORDER(optax.rmsprop(0.1, momentum=0.5), STEPS, warm_start=0.5, proximal=0.1, line_search=True)
NEWTON = {
    "cg": {},
    "jacobi": {"solver": CG(preconditioner=JACOBI())},
    "kronecker": {"solver": CG(3, preconditioner=gnl.preconditioners.Kronecker(every=2), momentum=True)},
    "warm": {"solver": CG(warm_start=0.95)},
    "lanczos": {"solver": LANCZOS(12, in_outputs=False)},
    "path": {"solver": LANCZOS(12, in_outputs=True), "damping": gnl.damping.Path(initial=1.0, minimum=0.5)},
    "cholesky": {"solver": gnl.solvers.Cholesky(in_outputs=True, momentum=0.5)},
    "qr": {"solver": gnl.solvers.QR(in_outputs=False)},
    "first order": {"solver": FIRST_ORDER(optax.sgd(RATE), STEPS), "damping": 0.0},
    "rmsprop": {"solver": RMSPROP, "damping": 0.0},
}
PERIODS = {"period 1": 1, "period 3": 3}
TRANSFORMS = [*(which for which in NEWTON if which != "first order"), *PERIODS]
DTYPES = {
    "bfloat16": (jnp.bfloat16,) * 3,
    "float16": (jnp.float16,) * 3,
    "float32": (jnp.float32,) * 3,
    "float64": (jnp.float64,) * 3,
    "mixed": (jnp.float32, jnp.bfloat16, jnp.float64),
}
X64 = {"double": True, "single": False}
STATUS = gnl.solvers.Status


def make(which, predict, loss=SQUARED, rate=None, **options):
    """The transform; with a learning rate, an optimiser that trains with it."""
    if which in NEWTON:
        return gnl.gauss_newton(predict, loss, **{**NEWTON[which], **options})
    linearising = gnl.iterative_linearisation(predict, loss, period=PERIODS[which], l2=options.get("l2", 0.0))
    return linearising if rate is None else optax.chain(linearising, optax.scale(-rate))


def model(params, x):
    """A small network that computes in the dtype of its inputs, whatever its parameters are stored in."""
    w, b, v, shift = (params[name].astype(x.dtype) for name in ("w", "b", "v", "shift"))
    return jnp.tanh(x @ w + b) @ v + shift


def model_params(name):
    """Matrices, a vector and a scalar; None and leaves without entries besides."""
    rng = np.random.default_rng(3)
    one, two, three = DTYPES[name]
    return {
        "w": jnp.asarray(rng.normal(size=(2, 3)), one),
        "b": jnp.asarray(rng.normal(size=3), two),
        "v": jnp.asarray(rng.normal(size=(3, 2)), three),
        "shift": jnp.asarray(0.25, two),
        "absent": None,
        "empty": (jnp.zeros(0, one), jnp.zeros((0, 3), two)),
    }


def compute_dtype(name):
    """The dtype of the batch: that of the parameters, float32 for mixed ones."""
    return jnp.float32 if name == "mixed" else DTYPES[name][0]


def model_batch(dtype, seed=4):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(6, 2)), dtype), jnp.asarray(rng.normal(size=(6, 2)), dtype)


def shapes_and_dtypes(tree):
    structure, leaves = kinds(tree)
    return structure, [(shape, dtype) for shape, dtype, _ in leaves]


# ---- types


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, "double") for name in DTYPES] + [(name, "single") for name in DTYPES if name != "float64"],
)
@pytest.mark.parametrize("which", TRANSFORMS)
def test_types_under_strict_promotion_and_without_double_precision(which, name, precision):
    """Strict promotion refuses what standard promotion does; where it refuses nothing, both give the same types."""
    with jax.enable_x64(X64[precision]), jax.numpy_dtype_promotion("strict"):
        params = model_params("float32" if name == "mixed" else name)
        if name == "mixed":
            third = jnp.float64 if X64[precision] else jnp.float16
            params |= {"b": params["b"].astype(jnp.bfloat16), "v": params["v"].astype(third)}
        x, y = model_batch(compute_dtype(name))
        transform = make(which, model, l2=0.1)
        state = transform.init(params)
        updates, after = jax.eval_shape(
            lambda g, s, p: transform.update(g, s, p, inputs=x, targets=y), params, state, params
        )
        assert kinds(after) == kinds(state)
        assert shapes_and_dtypes(updates) == shapes_and_dtypes(params)
        if not X64[precision]:
            assert not [leaf for leaf in jax.tree.leaves(state) if leaf.dtype in (jnp.float64, jnp.int64)]


def quadratic_params(name):
    """Those of an affine model, away from its solution."""
    one, two, _ = DTYPES[name]
    return {"w": jnp.asarray([[1.0, -0.5], [0.0, 2.0], [0.75, 1.0]], one), "b": jnp.zeros(2, two), "absent": None}


def quadratic_batch(dtype):
    """A batch that an affine model fits exactly, exact in every dtype; the eigenvalues of J^T J / n are 1 and 1/4."""
    signs = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], np.float64)
    x = signs[:, 1:] * [1.0, 0.5, 1.0]
    y = x @ np.array([[0.5, -1.0], [1.0, 0.25], [-0.5, 1.5]]) + [0.25, -0.5]
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype)


def train(which, name, steps):
    """A run on the quadratic: batch, parameters, the types of all states, and how often the model was traced."""
    traces = []

    def predict(params, x):
        traces.append(1)
        return affine(jax.tree.map(lambda p: p.astype(x.dtype), params), x)

    params, (x, y) = quadratic_params(name), quadratic_batch(compute_dtype(name))
    optimiser = make(which, predict, rate=1.0)
    state = optimiser.init(params)
    types, counts = [kinds((params, state))], []

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: SQUARED(predict(p, x), y))(params)
        updates, state = optimiser.update(grads, state, params, inputs=x, targets=y)
        return optax.apply_updates(params, updates), state, updates

    for _ in range(steps):
        params, state, updates = step(params, state)
        types.append(kinds((params, state)))
        counts.append(len(traces))
    assert shapes_and_dtypes(updates) == shapes_and_dtypes(params)
    return (x, y), params, state, types, counts


# Compiling takes seconds, so the other combinations of the types are only traced, above.
RUNS = [(which, name) for which in ("jacobi", "period 3") for name in DTYPES]
RUNS += [("warm", name) for name in ("bfloat16", "float16", "float32")]
RUNS += [("first order", name) for name in ("float32", "mixed")]
RUNS += [(which, name) for which in ("cg", "period 1") for name in ("float64", "mixed")]


@functools.cache
def trained(which, name):
    """A run that is long enough for every digit of float64 at the slowest rate, 3/4 a step."""
    return train(which, name, 130)


@pytest.mark.parametrize(("which", "name"), RUNS)
def test_the_second_step_is_not_traced_again(which, name):
    _, _, _, types, counts = trained(which, name)
    assert types[1:] == types[:-1]
    assert counts[0] > 0
    assert counts[-1] == counts[0]


@pytest.mark.parametrize(("which", "name"), RUNS)
def test_training_reaches_the_last_digits(which, name):
    (x, y), params, _, _, _ = trained(which, name)
    outputs = affine(jax.tree.map(lambda p: p.astype(jnp.float64), params), x.astype(jnp.float64))
    assert_close(outputs, y, dtype=narrowest(params, x), size=1, condition=4.0)


@pytest.mark.parametrize("which", ["jacobi", "warm", "first order", "period 3"])
def test_single_precision_runs_the_same_without_double_precision(which):
    """Nothing in a run of float32 depends on whether float64 exists."""
    _, params, state, _, _ = trained(which, "float32")
    with jax.enable_x64(False):
        _, single, single_state, types, counts = train(which, "float32", 130)
    assert types[1:] == types[:-1]
    assert counts[-1] == counts[0]
    assert_bit_equal((single, single_state), (params, state))


@pytest.mark.parametrize(
    ("which", "precision"),
    [
        ("warm", "double"),
        ("warm", "single"),
        ("path", "double"),
        ("first order", "single"),
        ("period 3", "double"),
        ("period 3", "single"),
    ],
)
def test_python_floats_and_numpy_arrays_are_parameters(which, precision):
    """Leaves become arrays of the default float with the first step; the state has its types from the start."""
    with jax.enable_x64(X64[precision]):
        x = jnp.arange(4.0)
        params = {"slope": 1.0, "offset": np.zeros(()), "absent": None}
        optimiser = make(which, lambda p, x: p["slope"] * x + p["offset"], rate=0.2)
        state = optimiser.init(params)
        before, wide = kinds(state), jax.dtypes.canonicalize_dtype(jnp.float64)

        @jax.jit
        def step(params, state):
            loss, grads = jax.value_and_grad(lambda p: SQUARED(p["slope"] * x + p["offset"], 3 * x + 1))(params)
            return loss, *optimiser.update(grads, state, params, inputs=x, targets=3 * x + 1)

        losses = []
        for _ in range(4):
            loss, updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
            losses.append(loss)
            assert kinds(state) == before
            assert {leaf.dtype for leaf in jax.tree.leaves((updates, params))} == {wide}
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] / 2


# ---- the step is the dense step of float64


def wide(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def dense_model(params, x, y):
    """Jacobian, outputs and parameters of the network in float64, at the rounded values."""
    params, x = wide(params), wide(x)
    return dense_jacobian(model, params, x), flat(model(params, x)), flat(params), flat(y)


def exact(which, dtype, damping):
    """Options with which a solver leaves nothing out; the damping where the entry has none of its own."""
    solver, eps = NEWTON[which].get("solver", CG()), float(jnp.finfo(dtype).eps)
    if isinstance(solver, CG):
        solver = dataclasses.replace(solver, max_steps=60, rtol=eps, progress=0.0)
    elif isinstance(solver, LANCZOS):
        solver = dataclasses.replace(solver, rank=60, rtol=eps)
    return {"solver": solver, "damping": NEWTON[which].get("damping", damping)}


def used_damping(options, state):
    """What a constant policy was told; an adaptive one reports it."""
    constant = isinstance(options["damping"], float)
    return options["damping"] if constant else float(state.info.damping)


def desired_step(which, ggn, gradient, damping):
    """The damped step, or the sum of the steps of gradient descent, and how much it enlarges errors."""
    if which != "first order":
        return damped_step(ggn, gradient, damping), condition(ggn, damping)
    powers = [np.linalg.matrix_power(np.eye(len(ggn)) - RATE * ggn, k) for k in range(STEPS)]
    growth = STEPS * max(np.linalg.norm(power, 2) for power in powers)
    return -RATE * sum(powers) @ gradient, growth


@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("jacobi", "bfloat16"),
        ("warm", "float16"),
        ("warm", "mixed"),
        ("lanczos", "bfloat16"),
        ("first order", "bfloat16"),
    ],
)
def test_step_is_the_dense_step(which, name):
    """The second step of a run, so that a warm start has something to start from."""
    dtype = narrowest(model_params(name))
    first, (x, y) = model_params(name), model_batch(compute_dtype(name))
    jacobian, outputs, _, targets = dense_model(first, x, y)
    ggn = jacobian.T @ jacobian / len(x)
    damping = float(np.linalg.eigvalsh(ggn)[-1])  # a condition number of at most 2
    options = exact(which, dtype, damping)
    optimiser = make(which, model, **options)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: SQUARED(model(p, x), y))(params)
        return optimiser.update(grads, state, params, inputs=x, targets=y)

    params, state = first, optimiser.init(first)
    for _ in range(2):
        jacobian, outputs, _, targets = dense_model(params, x, y)
        ggn = jacobian.T @ jacobian / len(x)
        updates, state = step(params, state)
        gradient = jacobian.T @ (outputs - targets) / len(x)
        desired, conditioning = desired_step(which, ggn, gradient, used_damping(options, state))
        assert tolerance(dtype, condition=conditioning) < 1  # else a zero step would do
        assert_close(updates, desired, dtype=dtype, size=1, condition=conditioning)
        assert state.info.accepted
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("which", PERIODS)
def test_gradient_is_that_of_the_linearised_model(which, name):
    """At the last step of a block, where the parameters are far from the anchor."""
    anchor, (x, y) = model_params(name), model_batch(compute_dtype(name))
    transform = make(which, model)
    params, state = anchor, transform.init(anchor)
    update = jax.jit(lambda p, s: transform.update(p, s, p, inputs=x, targets=y))
    for _ in range(PERIODS[which]):
        updates, state = update(params, state)
        last, params = params, jax.tree.map(lambda p: (p + 0.25).astype(p.dtype), params)
    jacobian, outputs, start, targets = dense_model(anchor, x, y)
    residual = outputs + jacobian @ (flat(last) - start) - targets
    desired = jacobian.T @ residual / len(x)
    # Terms of either sign are summed, so the rounding is relative to the sum of their sizes.
    scale = float(np.max(np.abs(jacobian).T @ np.abs(residual)) / len(x))
    assert_close(updates, desired, dtype=narrowest(anchor), size=1, scale=scale)
    assert tolerance(narrowest(anchor)) * scale < np.max(np.abs(desired))


# ---- the narrow range of float16


def classifier(params, x):
    return x @ params["w"]


def confident(gain):
    """Parameters, 512 examples and labels of a ten-class softmax that is right, the surer the larger the gain."""
    rng = np.random.default_rng(8)
    x = jnp.asarray(rng.normal(size=(512, 6)), jnp.float16)
    w = jnp.asarray(gain * rng.normal(size=(6, 10)), jnp.float16)
    labels = jnp.argmax(x.astype(jnp.float32) @ w.astype(jnp.float32), axis=-1)
    return {"w": w}, x, labels


def dense_classifier(params, x, labels):
    """GGN, gradient and its cotangents in float64, example by example."""
    w, x = np.asarray(params["w"], np.float64), np.asarray(x, np.float64)
    p = np.exp(x @ w - np.max(x @ w, axis=1, keepdims=True))
    p /= np.sum(p, axis=1, keepdims=True)
    cotangents = (p - np.eye(10)[np.asarray(labels)]) / len(x)
    blocks = (np.eye(10) * p[:, :, None] - p[:, :, None] * p[:, None, :]) / len(x)
    ggn = np.einsum("na,nb,nij->aibj", x, x, blocks).reshape(w.size, w.size)
    return ggn, (x.T @ cotangents).ravel(), cotangents


@pytest.mark.parametrize(("which", "gain"), [("cg", 1.0), ("jacobi", 3.0), ("warm", 3.0), ("path", 1.0)])
def test_float16_keeps_the_step_of_a_large_batch(gain, which):
    """With 512 examples in the mean, most cotangents are below what float16 holds to full precision."""
    params, x, labels = confident(gain)
    ggn, gradient, cotangents = dense_classifier(params, x, labels)
    assert np.median(np.abs(cotangents)) < jnp.finfo(jnp.float16).tiny
    damping = float(np.linalg.eigvalsh(ggn)[-1])  # a condition number of at most 2
    options = exact(which, jnp.float16, damping)
    optimiser = make(which, classifier, SOFTMAX, **options)
    grads = jax.jit(jax.grad(lambda q: SOFTMAX(classifier(q, x), labels)))(params)
    update = jax.jit(lambda g, s, p: optimiser.update(g, s, p, inputs=x, targets=labels))
    updates, state = update(grads, optimiser.init(params), params)
    desired, conditioning = desired_step(which, ggn, gradient, used_damping(options, state))
    assert tolerance(jnp.float16, condition=conditioning) < 1
    assert_close(updates, desired, size=1, condition=conditioning)
    assert state.info.accepted


@pytest.mark.parametrize("which", PERIODS)
@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_float16_keeps_the_gradient_of_a_large_batch(gain, which):
    params, x, labels = confident(gain)
    transform = make(which, classifier, SOFTMAX)
    updates, _ = jax.jit(lambda s, p: transform.update(p, s, p, inputs=x, targets=labels))(
        transform.init(params), params
    )
    assert_close(updates, dense_classifier(params, x, labels)[1], size=1)


def linear(params, x):
    """One output an example, linear in the parameters."""
    return x @ params["w"]


BEYOND = {
    "residual": (jnp.full(4, 20000.0), jnp.full((4, 4), 0.5), jnp.full(4, -30000.0)),
    "curvature": (jnp.ones(1), jnp.full((1, 1), 300.0), jnp.full(1, 250.0)),
}


@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("jacobi", "residual"),
        ("warm", "residual"),
        ("lanczos", "curvature"),
        ("path", "residual"),
        ("path", "curvature"),
        ("first order", "residual"),
    ],
)
def test_what_is_beyond_float16(which, name):
    """Outputs of 40000 against targets of -30000: the residual overflows float16, the step and gradient do not.

    A curvature of 90000 does so as well, but only its root occurs in a bidiagonalisation.
    """
    w, x, y = (part.astype(jnp.float16) for part in BEYOND[name])
    params = {"w": w}
    options = exact(which, jnp.float16, 1.0)
    optimiser = make(which, linear, **options)
    grads = jax.grad(lambda p: SQUARED(linear(p, x), y))(params)
    update = jax.jit(lambda g, s, p: optimiser.update(g, s, p, inputs=x, targets=y))
    updates, state = update(grads, optimiser.init(params), params)
    matrix, residual = np.asarray(x, np.float64), np.asarray(x, np.float64) @ flat(w) - flat(y)
    ggn, gradient = matrix.T @ matrix / len(x), matrix.T @ residual / len(x)
    desired, conditioning = desired_step(which, ggn, gradient, used_damping(options, state))
    assert tolerance(jnp.float16, condition=conditioning) < 1
    assert_close(updates, desired, size=1, condition=conditioning)
    assert state.info.accepted
    assert_close(state.info.loss, np.mean(residual**2) / 2, dtype=jnp.float32)


OVERFLOWS = {
    "gradient": (jnp.float16(20.0), jnp.float16(-20000.0)),
    "curvature": (jnp.float16(300.0), jnp.float16(250.0)),
}


@pytest.mark.parametrize(
    ("which", "name", "damping"),
    [
        ("cg", "gradient", gnl.damping.LevenbergMarquardt()),
        ("jacobi", "gradient", 0.1),
        ("path", "gradient", gnl.damping.Path()),
        ("first order", "gradient", 0.0),
        ("first order", "curvature", 0.0),
    ],
)
def test_overflow_of_float16_is_refused_and_forgotten(which, name, damping):
    """What overflows changes no bit of the parameters; the next batch that fits trains as if nothing had been."""
    size, target = OVERFLOWS[name]
    params = {"w": jnp.ones(1, jnp.float16)}
    optimiser = make(which, linear, damping=damping)

    @jax.jit
    def step(params, state, x, y):
        loss, grads = jax.value_and_grad(lambda p: SQUARED(linear(p, x), y))(params)
        updates, state = optimiser.update(grads, state, params, inputs=x, targets=y)
        return loss, grads, optax.apply_updates(params, updates), state

    x, y = jnp.full((1, 1), size), jnp.full(1, target)
    _, grads, after, state = step(params, optimiser.init(params), x, y)
    product = jax.vjp(lambda p: linear(p, x), params)[1](linear({"w": jnp.ones(1, jnp.float16)}, x))[0]
    assert not np.isfinite(flat(grads if name == "gradient" else product)).all()
    assert np.isfinite(flat(grads)).all() == (name == "curvature")
    assert_bit_equal(after, params)
    assert not state.info.accepted
    assert (state.info.skipped, state.info.solver_status) == (1, STATUS.NON_FINITE)
    x, y = jnp.full((1, 1), jnp.float16(2.0)), jnp.full(1, jnp.float16(8.0))
    first, _, after, state = step(after, state, x, y)
    assert state.info.accepted
    assert (state.info.skipped, state.info.refused_in_a_row) == (1, 0)
    assert SQUARED(linear(after, x), y) < first


@pytest.mark.parametrize("which", ["cg", "warm"])
def test_a_step_serves_where_the_product_of_its_direction_would_overflow(which):
    """The curvature 9e4 does not fit into float16, but the images of a direction and the product of a step do."""
    size, target = OVERFLOWS["curvature"]
    params = {"w": jnp.ones(1, jnp.float16)}
    optimiser = make(which, linear, damping=0.1)
    x, y = jnp.full((1, 1), size), jnp.full(1, target)
    grads = jax.grad(lambda p: SQUARED(linear(p, x), y))(params)
    updates, state = optimiser.update(grads, optimiser.init(params), params, inputs=x, targets=y)
    assert state.info.accepted
    assert (state.info.solver_steps, state.info.solver_status) == (1, STATUS.CONVERGED)
    assert_close(optax.apply_updates(params, updates), [target / size], dtype=jnp.float16, size=1)


# ---- nothing to train, nothing to train on

EMPTY = {
    "no leaves": {},
    "None alone": {"a": None, "b": (None, None)},
    "no entries": {"a": jnp.zeros(0, jnp.float32), "b": jnp.zeros((0, 3), jnp.bfloat16)},
    "all masked": {"a": optax.MaskedNode(), "b": (optax.MaskedNode(), None)},
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("which", ["jacobi", "warm", "path", "first order", *PERIODS])
def test_parameters_without_entries(which, name):
    params, x, y = EMPTY[name], jnp.ones((4, 3)), jnp.full((4, 3), 3.0)
    transform = make(which, lambda p, x: 2 * x, l2=0.1)
    state = transform.init(params)
    before = state
    full = {"a": jnp.ones(2), "b": (jnp.ones(2), None)} if name == "all masked" else None
    update = jax.jit(lambda s, p: transform.update(p, s, p, inputs=x, targets=y, full_params=full))
    for _ in range(3):
        updates, state = update(state, params)
    assert_bit_equal(updates, params)
    assert kinds(state) == kinds(before)
    assert state.count == 3
    if which in PERIODS:
        assert state.info.feature_updates == 3 // PERIODS[which]
        assert np.isnan(state.info.linearisation_error)  # no block of two steps is over
        assert_bit_equal(state.anchor, params)
        return
    info = state.info
    solved = (STEPS, STATUS.COMPLETED) if which == "first order" else (0, STATUS.CONVERGED)
    assert (info.loss, info.solver_steps, info.solver_status) == (1.5, *solved)
    assert (info.accepted, info.skipped, info.step_norm) == (True, 0, 0.0)
    assert (info.actual_reduction, info.predicted_reduction, info.gain_ratio) == (0.0, 0.0, 1.0)
    assert_bit_equal(state.damping, before.damping)  # nothing was learnt
    assert info.damping == state.scale == 0.0


def mean_square(outputs, targets):
    return 0.5 * jnp.sum((outputs - targets) ** 2, axis=-1)


WEIGHTED = gnl.losses.weighted(SQUARED)


@pytest.mark.parametrize(
    ("which", "loss", "y", "finite"),
    [
        ("cg", SQUARED, jnp.zeros((0, 2)), True),
        ("jacobi", SOFTMAX, jnp.zeros(0, jnp.int32), True),
        ("warm", WEIGHTED, (jnp.zeros((0, 2)), jnp.zeros(0)), True),
        ("cg", mean_square, jnp.zeros((0, 2)), False),
        ("jacobi", mean_square, jnp.zeros((0, 2)), False),
        ("path", SQUARED, jnp.zeros((0, 2)), True),
        ("first order", SOFTMAX, jnp.zeros(0, jnp.int32), True),
        ("period 1", SOFTMAX, jnp.zeros(0, jnp.int32), True),
        ("period 3", mean_square, jnp.zeros((0, 2)), True),
    ],
)
def test_batch_without_examples_changes_nothing(which, loss, y, finite):
    """The package's losses are 0 there; the mean of a callable is NaN, and a step on NaN is refused."""
    params, x = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}, jnp.zeros((0, 3))
    transform = make(which, affine, loss)
    before = transform.init(params)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, state = jax.jit(lambda g, s, p: transform.update(g, s, p, inputs=x, targets=y))(grads, before, params)
    assert_bit_equal(optax.apply_updates(params, updates), params)
    assert kinds(state) == kinds(before)
    if which in PERIODS:
        assert not flat(updates).any()
        return
    steps = STEPS if which == "first order" else 0
    assert (state.scale, state.info.solver_steps, state.info.step_norm) == (0.0, steps, 0.0)
    assert (bool(state.info.accepted), int(state.info.skipped)) == ((True, 0) if finite else (False, 1))
    assert np.isfinite(state.info.loss) == finite
    if finite:
        assert_bit_equal(state.damping, before.damping)
