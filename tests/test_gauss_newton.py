"""The transform ``gauss_newton`` against dense answers, under optax's wrappers and under JAX's transformations."""

import functools
import inspect

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import optax
import pytest

import gn_linear as gnl
from tests.oracles_transforms import (
    affine,
    affine_params,
    batch,
    bits,
    cross_entropy,
    dense,
    distance,
    eps,
    flat,
    half_mean_square,
    kinds,
    mlp,
    mlp_params,
    tolerance,
)

DAMPING = 0.3
EXACT = gnl.solvers.CG(max_steps=60, rtol=eps(), progress=0.0)
SQUARED = gnl.losses.squared_error
X, Y = batch()
SIZE = 15  # parameters of the network
LABELS = jnp.array([0, 1, 1, 0, 1, 0])
ONE_HOT = jax.nn.one_hot(LABELS, 2, dtype=jnp.float64)
COUNTS = jnp.array([[0, 3], [1, 2], [4, 0], [1, 1], [0, 0], [2, 5]])
WEIGHTS = jnp.array([1.0, 0.0, 2.0, 0.5, 1.0, 3.0])
TARGETS_FAR = Y.at[2].add(50.0)


def huber(outputs, targets):
    size = jnp.abs(outputs - targets)
    return jnp.sum(jnp.where(size <= 0.7, size**2 / 2, 0.7 * (size - 0.35))) / outputs.shape[0]


# loss, its targets, and an independent value of the outputs alone
LOSSES = {
    "squared": (SQUARED, Y, lambda o: half_mean_square(o, Y)),
    "squared, no targets": (SQUARED, None, lambda o: half_mean_square(o, 0.0)),
    "softmax": (gnl.losses.softmax_cross_entropy, LABELS, lambda o: cross_entropy(o, ONE_HOT)),
    "softmax, one-hot": (gnl.losses.softmax_cross_entropy, ONE_HOT, lambda o: cross_entropy(o, ONE_HOT)),
    "sigmoid": (
        gnl.losses.sigmoid_binary_cross_entropy,
        ONE_HOT,
        lambda o: jnp.sum(jnp.logaddexp(0.0, o) - ONE_HOT * o) / 6,
    ),
    "poisson": (gnl.losses.poisson, COUNTS, lambda o: jnp.sum(jnp.exp(o) - COUNTS * o) / 6),
    "huber": (gnl.losses.huber(0.7), TARGETS_FAR, lambda o: huber(o, TARGETS_FAR)),
    "weighted": (
        gnl.losses.weighted(SQUARED),
        (Y, WEIGHTS),
        lambda o: jnp.sum(WEIGHTS[:, None] * (o - Y) ** 2) / 12,
    ),
    "scalar callable": (half_mean_square, Y, lambda o: half_mean_square(o, Y)),
    "callable, one value per example": (
        optax.losses.softmax_cross_entropy,
        ONE_HOT,
        lambda o: cross_entropy(o, ONE_HOT),
    ),
}
STEPS = [
    *((name, "none") for name in LOSSES),
    *((name, l2) for name in ("squared", "poisson") for l2 in ("scalar", "pytree")),
]
L2S = {"none": 0.0, "scalar": 0.2, "pytree": {"w1": 0.1, "b1": 0.0, "w2": 0.5}}


def jitted(optimiser):
    """One jitted update; keyword arguments are the batch."""
    return jax.jit(lambda grads, state, params, **extra: optimiser.update(grads, state, params, **extra))


def gradient(predict, value, params, inputs):
    return jax.grad(lambda p: value(predict(p, inputs)))(params)


@functools.cache
def default_step():
    """The default optimiser on the network with the squared error: state at the start, compiled update."""
    optimiser = gnl.gauss_newton(mlp, SQUARED)
    return optimiser.init(mlp_params()), jitted(optimiser)


def network_gradient(params, inputs=X, targets=Y):
    return _network_gradient(params, inputs, targets)


_network_gradient = jax.jit(jax.grad(lambda p, x, y: half_mean_square(mlp(p, x), y)))


# ---- the step is the dense step


@pytest.mark.parametrize(("name", "l2"), STEPS)
def test_step_is_the_dense_damped_step(name, l2):
    loss, targets, value = LOSSES[name]
    params = mlp_params()
    oracle = dense(mlp, value, params, X, L2S[l2])
    penalty = jax.tree.map(lambda p: 0.0 * p, params)
    if l2 == "scalar":
        penalty = jax.tree.map(lambda p: L2S[l2] * p, params)
    if l2 == "pytree":
        penalty = jax.tree.map(lambda w, p: w * p, L2S[l2], params)
    grads = jax.tree.map(jnp.add, gradient(mlp, value, params, X), penalty)
    optimiser = gnl.gauss_newton(mlp, loss, solver=EXACT, damping=DAMPING, l2=L2S[l2])
    updates, state = jitted(optimiser)(grads, optimiser.init(params), params, inputs=X, targets=targets)
    bound = tolerance(condition=oracle.condition(DAMPING), operations=SIZE)
    assert distance(updates, oracle.damped_step(DAMPING)) <= bound
    assert state.info.accepted
    predicted = -(oracle.gradient @ flat(updates) + flat(updates) @ oracle.ggn @ flat(updates) / 2)
    assert abs(state.info.predicted_reduction - predicted) <= bound * abs(oracle.gradient) @ abs(flat(updates))
    assert state.info.damping == DAMPING
    assert (
        abs(state.info.step_norm - np.linalg.norm(flat(updates))) <= tolerance(operations=SIZE) * state.info.step_norm
    )


def test_any_gradient_is_the_right_hand_side():
    params, other = mlp_params(), mlp_params(7)
    oracle = dense(mlp, lambda o: half_mean_square(o, Y), params, X)
    optimiser = gnl.gauss_newton(mlp, SQUARED, solver=EXACT, damping=DAMPING)
    updates, _ = jitted(optimiser)(other, optimiser.init(params), params, inputs=X, targets=Y)
    bound = tolerance(condition=oracle.condition(DAMPING), operations=SIZE)
    assert distance(updates, oracle.damped_step(DAMPING, other)) <= bound


def test_curvature_batch_gives_the_matrix_and_the_batch_gives_the_reduction():
    params, (x, y) = mlp_params(), batch(5)
    curved = dense(mlp, lambda o: half_mean_square(o, y), params, x)
    oracle = dense(mlp, lambda o: half_mean_square(o, Y), params, X)
    optimiser = gnl.gauss_newton(mlp, SQUARED, solver=EXACT, damping=DAMPING)
    updates, state = jitted(optimiser)(
        network_gradient(params), optimiser.init(params), params,
        inputs=X, targets=Y, curvature_inputs=x, curvature_targets=y,
    )  # fmt: skip
    bound = tolerance(condition=curved.condition(DAMPING), operations=SIZE)
    assert distance(updates, curved.damped_step(DAMPING, oracle.gradient)) <= bound
    moved = optax.apply_updates(params, updates)
    actual = half_mean_square(mlp(params, X), Y) - half_mean_square(mlp(moved, X), Y)
    assert abs(state.info.actual_reduction - actual) <= tolerance(operations=SIZE) * state.info.loss


def test_step_of_jaxopt():
    """Undamped, on a curve with more data than parameters."""
    x = jnp.linspace(0.0, 2.0, 12)
    y = 1.5 * jnp.exp(-0.8 * x) + 0.1 * jnp.sin(5 * x)
    params = jnp.array([1.0, 0.5])

    def predict(p, x):
        return p[0] * jnp.exp(-p[1] * x)

    peer = jaxopt.GaussNewton(lambda p: predict(p, x) - y, maxiter=1, tol=0.0)
    want = peer.run(params).params - params
    oracle = dense(predict, lambda o: half_mean_square(o, y), params, x)
    optimiser = gnl.gauss_newton(predict, SQUARED, solver=EXACT, damping=0.0)
    grads = gradient(predict, lambda o: half_mean_square(o, y), params, x)
    updates, _ = optimiser.update(grads, optimiser.init(params), params, inputs=x, targets=y)
    # jaxopt solves by CG to its own relative residual of 1e-5 at the best; the dense step is the arbiter
    bound = tolerance(condition=oracle.condition(), operations=len(x))
    assert distance(updates, oracle.damped_step(0.0)) <= bound
    assert distance(want, oracle.damped_step(0.0)) <= jnp.sqrt(eps()) * oracle.condition()
    assert distance(updates, want) <= jnp.sqrt(eps()) * oracle.condition()


@pytest.mark.parametrize("gap", [40.0, 200.0])
def test_saturated_softmax_gives_the_dense_answer(gap):
    params = affine_params(dtype=jnp.float32)
    params = jax.tree.map(jnp.zeros_like, params)
    params["w"] = jnp.asarray([[gap, 0.0], [0.0, 0.0]], jnp.float32)
    x = jnp.asarray([[1.0, 0.5], [1.0, -1.0], [0.01, 2.0], [0.0, 1.0], [-1.0, 0.3], [0.02, -0.4]], jnp.float32)
    wide = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    x64 = x.astype(jnp.float64)
    oracle = dense(affine, lambda o: cross_entropy(o, ONE_HOT), wide, x64)
    logits = np.asarray(affine(wide, x64))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    blocks = np.zeros((12, 12))
    for i in range(6):
        blocks[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = (np.diag(p[i]) - np.outer(p[i], p[i])) / 6
    ggn = oracle.jacobian.T @ blocks @ oracle.jacobian
    rhs = oracle.jacobian.T @ ((p - np.asarray(ONE_HOT)) / 6).ravel()
    mu = 1e-2
    want = -np.linalg.solve(ggn + mu * np.eye(6), rhs)
    solver = gnl.solvers.CG(max_steps=30, rtol=eps(jnp.float32), progress=0.0)
    optimiser = gnl.gauss_newton(affine, gnl.losses.softmax_cross_entropy, solver=solver, damping=mu)
    grads = gradient(affine, lambda o: gnl.losses.softmax_cross_entropy(o, LABELS), params, x)
    updates, state = optimiser.update(grads, optimiser.init(params), params, inputs=x, targets=LABELS)
    assert state.info.accepted
    bound = tolerance(jnp.float32, condition=np.linalg.cond(ggn + mu * np.eye(6)), operations=12)
    assert distance(updates, want) <= bound


# ---- the gain ratio is 1 on quadratics


def decayed(gn):
    return optax.chain(optax.add_decayed_weights(0.35), gn)


QUADRATICS = {
    "nothing": (lambda gn: gn, {}),
    "clipping": (lambda gn: optax.chain(optax.clip_by_global_norm(0.1), gn), {}),
    "weight decay": (decayed, {}),
    "l2": (lambda gn: gn, {"l2": 0.35}),
    "l2 of a pytree": (lambda gn: gn, {"l2": {"w": 0.35, "b": 0.0}}),
    "momentum": (lambda gn: optax.chain(optax.trace(0.9), gn), {}),
    "learning rate": (lambda gn: gn, {"learning_rate": 0.5}),
    "curvature batch": (lambda gn: gn, {}),
    "accumulation": (lambda gn: optax.MultiSteps(gn, 2), {}),
    "wrong sign": (lambda gn: optax.chain(optax.scale(-1.0), gn), {}),
}


@pytest.mark.parametrize("name", QUADRATICS)
def test_gain_ratio_is_one_on_quadratics(name):
    wrap, options = QUADRATICS[name]
    optimiser = wrap(gnl.gauss_newton(affine, SQUARED, **options))
    l2 = options.get("l2", 0.0)
    params = affine_params()
    weights = l2 if isinstance(l2, dict) else {"w": l2, "b": l2}
    state, extra = optimiser.init(params), {}
    update = jitted(optimiser)
    for t in range(4):
        x, y = batch(t)
        if name == "curvature batch":
            extra = dict(zip(("curvature_inputs", "curvature_targets"), batch(t + 100), strict=True))
        grads = gradient(affine, lambda o, y=y: half_mean_square(o, y), params, x)
        grads = jax.tree.map(lambda g, w, p: g + w * p, grads, weights, params)
        updates, state = update(grads, state, params, inputs=x, targets=y, **extra)
        info = gnl.info(state)
        if name == "accumulation" and t % 2 == 0:
            continue
        # rounding of the objective, as seen by the ratio
        after = abs(info.loss) + abs(info.actual_reduction) + np.linalg.norm(flat(grads)) * info.step_norm
        bound = tolerance(operations=12) * after / abs(info.predicted_reduction)
        assert info.step_norm > 0
        assert abs(info.gain_ratio - 1) <= bound
        assert info.accepted == (info.actual_reduction >= 0)  # another batch's curvature may overshoot
        assert info.accepted or name == "curvature batch"
        params = optax.apply_updates(params, updates)


def test_gain_ratio_is_not_one_on_the_network():
    """The test above could pass with a ratio that is always 1."""
    params = mlp_params()
    state, update = default_step()
    _, state = update(network_gradient(params), state, params, inputs=X, targets=Y)
    assert abs(state.info.gain_ratio - 1) > jnp.sqrt(eps())


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_trial_point_is_the_point_that_the_user_goes_to(dtype):
    params = mlp_params(dtype=dtype)
    seen = []

    def predict(p, x):
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(p)):
            seen.append(p)
        return mlp(p, x)

    x, y = batch(dtype=dtype)
    optimiser = gnl.gauss_newton(predict, SQUARED)
    updates, _ = optimiser.update(network_gradient(params, x, y), optimiser.init(params), params, inputs=x, targets=y)
    assert bits(seen[-1]) == bits(optax.apply_updates(params, updates))
    assert bits(seen[-1]) != bits(params)


# ---- refusal


def exponential(params, inputs):
    return jnp.exp(inputs @ params["w"])


BAD_X = jnp.array([[1.0, 0.5], [0.5, 1.0], [1.5, -0.5]])
GOOD_Y = jnp.array([1.2, 0.9, 1.6])
START = {"w": jnp.array([-0.0, 0.3]), "idle": jnp.array([-0.0, 0.0]), "more": jnp.array([[-0.0], [1e-3]])}


def exponential_gradient(x, y):
    return jax.grad(lambda p: half_mean_square(exponential(p, x), y))(START)


def bad_steps():
    good = exponential_gradient(BAD_X, GOOD_Y)
    x_nan = BAD_X.at[1, 0].set(jnp.nan)
    inf_y, huge_y, high_y = GOOD_Y.at[0].set(jnp.inf), GOOD_Y + 1e6, GOOD_Y + 300.0
    return {
        "NaN batch": (exponential_gradient(x_nan, GOOD_Y), x_nan, GOOD_Y),
        "NaN batch, sound gradient": (good, x_nan, GOOD_Y),
        "infinite target": (exponential_gradient(BAD_X, inf_y), BAD_X, inf_y),
        "infinite target, sound gradient": (good, BAD_X, inf_y),
        "NaN in one gradient leaf": ({**good, "idle": jnp.array([0.0, jnp.nan])}, BAD_X, GOOD_Y),
        "infinite gradient": ({**good, "w": jnp.array([jnp.inf, 0.0])}, BAD_X, GOOD_Y),
        "infinite trial loss": (exponential_gradient(BAD_X, huge_y), BAD_X, huge_y),
        "higher trial loss": (exponential_gradient(BAD_X, high_y), BAD_X, high_y),
    }


BAD_STEPS = bad_steps()


@functools.cache
def refusing(adaptive):
    damping = gnl.damping.LevenbergMarquardt() if adaptive else gnl.damping.Constant(1e-3)
    optimiser = gnl.gauss_newton(exponential, SQUARED, damping=damping)
    return optimiser.init(START), jitted(optimiser)


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_step_is_refused(name):
    grads, x, y = BAD_STEPS[name]
    state, update = refusing(True)
    multiples = [state.damping.multiple]
    for refused in (1, 2):
        updates, state = update(grads, state, START, inputs=x, targets=y)
        assert not state.info.accepted
        assert (state.info.skipped, state.info.refused_in_a_row) == (refused, refused)
        assert all(np.all(np.asarray(u) == 0) for u in jax.tree.leaves(updates))
        assert bits(optax.apply_updates(START, updates)) == bits(START)
        multiples.append(state.damping.multiple)
    assert multiples[0] < multiples[1] < multiples[2]
    updates, state = update(BAD_STEPS_GOOD, state, START, inputs=BAD_X, targets=GOOD_Y)
    assert state.info.accepted
    assert (state.info.skipped, state.info.refused_in_a_row) == (2, 0)
    assert np.any(np.asarray(updates["w"]) != 0)
    assert np.all(np.isfinite(flat(updates)))
    assert state.damping.multiple < multiples[2]
    moved = optax.apply_updates(START, updates)
    assert half_mean_square(exponential(moved, BAD_X), GOOD_Y) < half_mean_square(exponential(START, BAD_X), GOOD_Y)


BAD_STEPS_GOOD = exponential_gradient(BAD_X, GOOD_Y)


def test_nan_at_the_trial_point_is_refused():
    params = jnp.array(1.0)
    optimiser = gnl.gauss_newton(lambda p, x: jnp.log(p) * x, SQUARED)
    x, y = jnp.array([1.0, 2.0]), jnp.array([-500.0, -1000.0])
    grads = jax.grad(lambda p: half_mean_square(jnp.log(p) * x, y))(params)
    updates, state = optimiser.update(grads, optimiser.init(params), params, inputs=x, targets=y)
    assert params + state.info.step_norm * -jnp.sign(grads) < 0  # the logarithm was NaN there
    assert (not state.info.accepted, state.info.skipped, updates) == (True, 1, 0.0)


def test_step_that_is_too_long_is_halved():
    params = jnp.array(1.0)
    x, y = jnp.array([1.0, 2.0]), jnp.array([-5.0, -10.0])
    grads = jax.grad(lambda p: half_mean_square(jnp.log(p) * x, y))(params)
    adaptive = gnl.gauss_newton(lambda p, x: jnp.log(p) * x, SQUARED)
    updates, state = adaptive.update(grads, adaptive.init(params), params, inputs=x, targets=y)
    fixed = gnl.gauss_newton(lambda p, x: jnp.log(p) * x, SQUARED, damping=float(state.info.damping))
    _, refused = fixed.update(grads, fixed.init(params), params, inputs=x, targets=y)
    assert not refused.info.accepted  # the whole step leaves the logarithm's domain
    assert updates == -refused.info.step_norm / 8  # 1 - 5, 1 - 2.5 and 1 - 1.25 are negative, 1 - 0.625 is not
    assert state.info.accepted
    assert (state.info.skipped, state.info.step_norm) == (0, -updates)
    assert state.damping.multiple > adaptive.init(params).damping.multiple
    assert half_mean_square(jnp.log(params + updates) * x, y) < half_mean_square(jnp.log(params) * x, y)


def test_change_below_rounding_teaches_nothing():
    """Close to a minimum with a large residual, a refusal is an accident of rounding: no halving, the same damping."""
    x, y = jnp.arange(1.0, 6.0), jnp.array([3.0, -1.0, 4.0, -1.0, 5.0])
    curvature = float(jnp.mean(x**2))
    best = float(jnp.mean(x * y)) / curvature
    optimiser = gnl.gauss_newton(lambda p, x: p * x, SQUARED)
    start, update = optimiser.init(jnp.float64(0.0)), jitted(optimiser)
    refused = 0
    for offset in np.linspace(1e-9, 4e-9, 24):
        params = jnp.float64(best + offset)
        grads = jax.grad(lambda p: half_mean_square(p * x, y))(params)
        _, state = update(grads, start, params, inputs=x, targets=y)
        refused += not state.info.accepted
        assert state.info.predicted_reduction < eps() * state.info.loss
        assert state.damping.multiple == start.damping.multiple
        whole = abs(float(grads)) / (curvature + float(state.info.damping))
        assert abs(float(state.info.step_norm) - whole) <= tolerance(operations=20) * whole
    assert 0 < refused < 24


def test_nan_in_the_curvature_batch_is_refused():
    state, update = refusing(True)
    x_nan = BAD_X.at[1, 0].set(jnp.nan)
    updates, after = update(
        BAD_STEPS_GOOD, state, START, inputs=BAD_X, targets=GOOD_Y, curvature_inputs=x_nan, curvature_targets=GOOD_Y
    )
    assert (after.info.accepted, after.info.skipped) == (False, 1)
    assert after.damping.multiple > state.damping.multiple
    assert bits(optax.apply_updates(START, updates)) == bits(START)


@pytest.mark.parametrize("name", BAD_STEPS)
def test_constant_damping_refuses_only_what_is_not_finite(name):
    grads, x, y = BAD_STEPS[name]
    state, update = refusing(False)
    updates, state = update(grads, state, START, inputs=x, targets=y)
    if name == "higher trial loss":
        assert state.info.accepted
        assert state.info.actual_reduction < 0
        assert state.info.skipped == 0
    else:
        assert not state.info.accepted
        assert state.info.skipped == 1
        assert bits(optax.apply_updates(START, updates)) == bits(START)


def test_subnormal_parameters_survive_a_refusal():
    tiny = {**START, "idle": jnp.array([5e-324, -5e-324])}
    grads, x, y = BAD_STEPS["NaN batch"]
    state, update = refusing(True)
    updates, _ = update(grads, state, tiny, inputs=x, targets=y)
    assert bits(updates) == bits(jax.tree.map(lambda p: jnp.full_like(p, -0.0), tiny))


@pytest.mark.parametrize("damping", [gnl.damping.LevenbergMarquardt(), 1e-3], ids=["adaptive", "constant"])
def test_stays_at_a_converged_point(damping):
    params = affine_params()
    design = np.column_stack([X, np.ones(6)])
    best = np.linalg.lstsq(design, np.asarray(Y), rcond=None)[0]
    params = {"w": jnp.asarray(best[:2]), "b": jnp.asarray(best[2])}
    optimiser = gnl.gauss_newton(affine, SQUARED, damping=damping)

    def step(carry, _):
        p, s = carry
        grads = jax.grad(lambda q: half_mean_square(affine(q, X), Y))(p)
        updates, s = optimiser.update(grads, s, p, inputs=X, targets=Y)
        return (optax.apply_updates(p, updates), s), (s.info.damping, s.info.step_norm)

    (end, state), (dampings, _) = jax.jit(lambda c: jax.lax.scan(step, c, None, 200))((params, optimiser.init(params)))
    bound = tolerance(condition=np.linalg.cond(design) ** 2, operations=12)
    assert distance(end, params) <= bound
    assert np.all(np.isfinite(dampings))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_zero_gradient_at_an_exact_fit():
    params = mlp_params()
    state, update = default_step()
    y = mlp(params, X)
    for _ in range(3):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params, inputs=X, targets=y)
        assert bits(optax.apply_updates(params, updates)) == bits(params)
        assert state.info.accepted
        assert state.info.gain_ratio == 1
        assert state.damping.multiple == default_step()[0].damping.multiple


def test_scale_of_the_residuals_does_not_matter():
    @jax.jit
    def run(size):
        def predict(p, x):
            return size * jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]

        optimiser = gnl.gauss_newton(predict, SQUARED)

        def step(carry, _):
            p, s = carry
            grads = jax.grad(lambda q: half_mean_square(predict(q, X), size * 5 * Y))(p)
            updates, s = optimiser.update(grads, s, p, inputs=X, targets=size * 5 * Y)
            return (optax.apply_updates(p, updates), s), s.info

        return jax.lax.scan(step, (mlp_params(), optimiser.init(mlp_params())), None, 12)[1]

    want = run(jnp.float64(1.0))
    assert np.any(np.diff(want.damping) > 0)  # a run that also meets steps that are too long
    assert np.any(np.diff(want.damping) < 0)
    for size in (2.0**-66, 2.0**34):  # powers of two add no rounding of their own
        got = run(jnp.float64(size))
        np.testing.assert_array_equal(got.accepted, want.accepted)
        np.testing.assert_array_equal(got.solver_steps, want.solver_steps)
        # rounding grows along the run as the steps depend on each other; half of the digits must survive
        np.testing.assert_allclose(got.gain_ratio, want.gain_ratio, rtol=np.sqrt(eps()))
        np.testing.assert_allclose(got.damping / size**2, want.damping, rtol=np.sqrt(eps()))
        np.testing.assert_allclose(got.loss / size**2, want.loss, rtol=np.sqrt(eps()))


def test_leaves_a_region_without_curvature():
    """Huber's loss with nothing but outliers has the Hessian zero: the damping alone must find the size of the step."""
    targets = 10 * X[:, :1] + 20
    loss = gnl.losses.huber(1.0)
    params = {"w": jnp.zeros((2, 1)), "b": jnp.zeros(1)}
    assert np.all(np.abs(targets) > 1)
    optimiser = gnl.gauss_newton(affine, loss)
    state, update = optimiser.init(params), jitted(optimiser)
    for _ in range(40):
        grads = gradient(affine, lambda o: loss(o, targets), params, X)
        updates, state = update(grads, state, params, inputs=X, targets=targets)
        params = optax.apply_updates(params, updates)
    assert state.info.loss < np.sqrt(eps())


# ---- hyperparameters


@pytest.mark.parametrize("fresh", [0.0, 0.5])
def test_damping_follows_what_the_next_batch_says_of_the_last_step(fresh):
    policy = gnl.damping.LevenbergMarquardt(initial=0.01, fresh=fresh)
    update = jitted(gnl.gauss_newton(mlp, SQUARED, damping=policy))
    first, second = (X[:3], Y[:3]), (X[3:], Y[3:])
    dampings = {}
    for name, following in (("another batch", second), ("the same batch", first)):
        params, state = mlp_params(), gnl.gauss_newton(mlp, SQUARED, damping=policy).init(mlp_params())
        for x, y in (first, following):
            before, info = params, state.info
            updates, state = update(network_gradient(params, x, y), state, params, inputs=x, targets=y)
            params = optax.apply_updates(params, updates)
        dampings[name] = float(state.info.damping)
        assert bool(info.accepted)
    start, own, other = (
        half_mean_square(mlp(p, x), y)
        for p, (x, y) in zip((mlp_params(), before, before), (first, first, second), strict=True)
    )
    for name, reached in (("another batch", (1 - fresh) * own + fresh * other), ("the same batch", own)):
        ratio = np.clip(min(info.gain_ratio, 1.0) - (reached - own) / info.predicted_reduction, 0.0, 1.0)
        wanted = info.damping * max(1 / 3, 1 - (2 * ratio - 1) ** 3)
        np.testing.assert_allclose(dampings[name], wanted, rtol=1e3 * eps() * float(start / info.predicted_reduction))
    assert (dampings["another batch"] == dampings["the same batch"]) == (fresh == 0)


def test_learning_rate_schedule_and_number():
    params, grads = mlp_params(), network_gradient(mlp_params())

    def with_rate(rate):
        optimiser = gnl.gauss_newton(mlp, SQUARED, learning_rate=rate, damping=DAMPING)
        return optimiser.init(params), jitted(optimiser)

    state, update = with_rate(1.0)
    whole, _ = update(grads, state, params, inputs=X, targets=Y)
    state, update = with_rate(optax.linear_schedule(1.0, 0.0, 4))
    for t in range(5):
        assert state.count == t
        updates, state = update(grads, state, params, inputs=X, targets=Y)
        want = jax.tree.map(lambda u, t=t: (1 - t / 4) * u, whole)
        assert np.max(np.abs(flat(updates) - flat(want))) <= tolerance(operations=SIZE) * np.max(np.abs(flat(whole)))


def test_damping_schedule_is_in_multiples_of_the_first_curvature():
    params, grads = mlp_params(), network_gradient(mlp_params())
    schedule = optax.exponential_decay(2.0, 1, 0.5)
    optimiser = gnl.gauss_newton(mlp, SQUARED, damping=gnl.damping.Schedule(schedule))
    state, update = optimiser.init(params), jitted(optimiser)
    oracle = dense(mlp, lambda o: half_mean_square(o, Y), params, X)
    scale = oracle.gradient @ oracle.ggn @ oracle.gradient / (oracle.gradient @ oracle.gradient)
    for t in range(3):
        _, state = update(grads, state, params, inputs=X, targets=Y)
        assert abs(state.info.damping - 2.0 * 0.5**t * scale) <= tolerance(operations=SIZE) * scale


# ---- JAX's transformations


def loop(params, x, y, steps, update, state):
    for _ in range(steps):
        updates, state = update(network_gradient(params, x, y), state, params, inputs=x, targets=y)
        params = optax.apply_updates(params, updates)
    return params, state


def scanned(params, x, y, steps=4):
    optimiser = gnl.gauss_newton(mlp, SQUARED)

    def step(carry, _):
        p, s = carry
        updates, s = optimiser.update(_network_gradient(p, x, y), s, p, inputs=x, targets=y)
        return (optax.apply_updates(p, updates), s), None

    return jax.lax.scan(step, (params, optimiser.init(params)), None, steps)[0]


def test_jit_scan_and_vmap_give_the_same_run():
    seeds = range(3)
    starts = [mlp_params(seed) for seed in seeds]
    init, update = default_step()
    eager = gnl.gauss_newton(mlp, SQUARED)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    many, many_states = jax.jit(jax.vmap(scanned, in_axes=(0, None, None)))(stacked, X, Y)
    # half of the digits: four steps of an inner solver that stops early, summed in another order
    bound = np.sqrt(eps())
    for i, start in enumerate(starts):
        want, state = loop(start, X, Y, 4, update, init)
        assert distance(jax.tree.map(lambda leaf, i=i: leaf[i], many), want) <= bound
        vmapped = jax.tree.map(lambda leaf, i=i: leaf[i], many_states)
        assert distance(vmapped.info.damping, state.info.damping) <= bound
        assert vmapped.info.solver_steps == state.info.solver_steps
        assert vmapped.info.skipped == state.info.skipped
    once, _ = jax.jit(scanned)(starts[0], X, Y)
    want, _ = loop(starts[0], X, Y, 4, update, init)
    assert distance(once, want) <= bound
    plain, _ = loop(starts[0], X, Y, 2, eager.update, eager.init(starts[0]))
    want, _ = loop(starts[0], X, Y, 2, update, init)
    assert distance(plain, want) <= bound


def test_one_trace_serves_every_call():
    traces = []

    def predict(p, x):
        traces.append(1)
        return mlp(p, x)

    optimiser = gnl.gauss_newton(predict, SQUARED, solver=gnl.solvers.CG(warm_start=0.95))
    params = mlp_params()
    state, update = optimiser.init(params), jitted(optimiser)
    updates, state = update(network_gradient(params), state, params, inputs=X, targets=Y)
    first = len(traces)
    assert first <= 3  # the linearisation, the trial and a halved trial
    for _ in range(3):
        params = optax.apply_updates(params, updates)
        updates, state = update(network_gradient(params), state, params, inputs=X, targets=Y)
    assert len(traces) == first
    assert update._cache_size() == 1


DTYPES = {
    "float64": (jnp.float64,) * 3,
    "float32": (jnp.float32,) * 3,
    "bfloat16": (jnp.bfloat16,) * 3,
    "float16": (jnp.float16,) * 3,
    "mixed": (jnp.float32, jnp.bfloat16, jnp.float64),
}
SOLVERS = {
    "plain": gnl.solvers.CG(),
    "warm, jacobi": gnl.solvers.CG(warm_start=0.95, preconditioner=gnl.preconditioners.Jacobi()),
    "kronecker": gnl.solvers.CG(momentum=True, preconditioner=gnl.preconditioners.Kronecker()),
}


def params_of(name):
    return {key: leaf.astype(dtype) for (key, leaf), dtype in zip(mlp_params().items(), DTYPES[name], strict=True)}


@pytest.mark.parametrize("gradient_dtype", [None, jnp.float32, jnp.float64], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", DTYPES)
def test_state_and_updates_keep_their_types(name, solver, gradient_dtype):
    params = params_of(name)
    grads = params if gradient_dtype is None else jax.tree.map(lambda p: p.astype(gradient_dtype), params)
    optimiser = gnl.gauss_newton(mlp, SQUARED, solver=SOLVERS[solver], l2=0.1)
    state = optimiser.init(params)
    updates, after = jax.eval_shape(
        lambda g, s, p: optimiser.update(g, s, p, inputs=X, targets=Y), grads, state, params
    )
    assert kinds(after) == kinds(state)
    assert kinds(updates) == kinds(jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params))


def test_state_keeps_its_types_from_weakly_typed_parameters():
    params = {"w": jax.eval_shape(lambda: jnp.asarray(1.0)), "b": 0.5}
    params["w"] = jnp.asarray(1.0)
    assert params["w"].weak_type
    optimiser = gnl.gauss_newton(lambda p, x: p["w"] * x + p["b"], SQUARED)
    state = optimiser.init(params)
    x = jnp.arange(3.0)
    grads = {"w": jnp.asarray(1.0), "b": jnp.asarray(1.0)}
    _, after = jax.eval_shape(lambda g, s, p: optimiser.update(g, s, p, inputs=x, targets=x), grads, state, params)
    assert kinds(after) == kinds(state)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "mixed"])
def test_narrow_parameters_take_the_wide_step(name):
    params = params_of(name)
    wide = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    coarsest = max(jax.tree.leaves(params), key=lambda p: eps(p.dtype)).dtype
    x, y = X, Y
    if name != "mixed":
        x, y = X.astype(coarsest), Y.astype(coarsest)
    x64, y64 = x.astype(jnp.float64), y.astype(jnp.float64)
    oracle = dense(mlp, lambda o: half_mean_square(o, y64), wide, x64)
    solver = gnl.solvers.CG(max_steps=60, rtol=float(eps(coarsest)), progress=0.0)
    optimiser = gnl.gauss_newton(mlp, SQUARED, solver=solver, damping=DAMPING)
    grads = network_gradient(params, x, y)
    updates, state = jitted(optimiser)(grads, optimiser.init(params), params, inputs=x, targets=y)
    bound = tolerance(coarsest, condition=oracle.condition(DAMPING), operations=4)
    assert distance(updates, oracle.damped_step(DAMPING)) <= bound < 1  # a bound of 1 would pass a zero step
    assert state.info.accepted
    assert state.info.loss.dtype == (jnp.float64 if name == "mixed" else jnp.float32)


# ---- pytrees and optax's wrappers


def test_none_leaves_and_nested_containers():
    flat_params = mlp_params()
    params = {"layers": [(flat_params["w1"], None), {"b": flat_params["b1"], "off": None}], "out": flat_params["w2"]}

    def predict(p, x):
        return mlp({"w1": p["layers"][0][0], "b1": p["layers"][1]["b"], "w2": p["out"]}, x)

    optimiser = gnl.gauss_newton(predict, SQUARED)
    grads = jax.grad(lambda p: half_mean_square(predict(p, X), Y))(params)
    updates, _ = jitted(optimiser)(grads, optimiser.init(params), params, inputs=X, targets=Y)
    assert updates["layers"][1]["off"] is None
    init, update = default_step()
    want, _ = update(network_gradient(flat_params), init, flat_params, inputs=X, targets=Y)
    got = {"w1": updates["layers"][0][0], "b1": updates["layers"][1]["b"], "w2": updates["out"]}
    assert distance(got, want) <= tolerance(condition=SIZE, operations=SIZE)


def test_two_lines_swapped_train_the_network():
    params, state = mlp_params(), default_step()[0]
    end, state = loop(params, X, Y, 15, default_step()[1], state)
    assert half_mean_square(mlp(end, X), Y) < half_mean_square(mlp(params, X), Y) / 10
    assert state.count == 15


# ---- errors


def update_with(params=None, grads=None, loss=SQUARED, predict=affine, **extra):
    params = affine_params() if params is None else params
    good = affine_params()
    optimiser = gnl.gauss_newton(predict, loss)
    return optimiser.update(grads or params, optimiser.init(good), params, **extra)


def test_missing_inputs_and_params():
    with pytest.raises(TypeError, match=r"inputs is missing.*inputs=x, targets=y"):
        update_with()
    optimiser = gnl.gauss_newton(affine, SQUARED)
    with pytest.raises(ValueError, match="params is None"):
        optimiser.update(affine_params(), optimiser.init(affine_params()), inputs=X, targets=Y)


def test_inputs_may_be_none():
    params = jnp.array([1.0, 2.0])
    optimiser = gnl.gauss_newton(lambda p, _: p**2, SQUARED)
    _, state = optimiser.update(2 * params**3 / 2, optimiser.init(params), params, inputs=None)
    assert state.info.accepted


def test_wrong_shapes():
    params = affine_params()
    with pytest.raises(ValueError, match=r"updates: leaf \['w'\] has shape \(3, 2\).*params has shape \(2, 2\)"):
        update_with(grads={**params, "w": jnp.ones((3, 2))}, inputs=X, targets=Y)
    with pytest.raises(ValueError, match="updates and params must have the same tree structure"):
        update_with(grads={"w": params["w"]}, inputs=X, targets=Y)
    with pytest.raises(ValueError, match=r"targets: the array has shape \(6, 3\).*\(6, 2\)"):
        update_with(inputs=X, targets=jnp.ones((6, 3)))
    with pytest.raises(ValueError, match="targets is None"):
        update_with(inputs=X, loss=gnl.losses.softmax_cross_entropy)
    with pytest.raises(ValueError, match="leading axis"):
        update_with(predict=lambda p, x: jnp.sum(affine(p, x)), inputs=X, targets=jnp.ones(()))


@pytest.mark.parametrize("loss", [SQUARED, gnl.losses.huber(), optax.losses.squared_error, optax.losses.log_cosh])
@pytest.mark.parametrize("columns", [True, False])
def test_column_against_vector(loss, columns):
    column = jnp.ones((6, 1))

    def predict(p, x):
        outputs = (x @ p["w"] + p["b"])[:, :1]
        return outputs if columns else outputs[:, 0]

    with pytest.raises(ValueError, match=r"\(6, 1\)|\(6, 6\)"):
        update_with(predict=predict, loss=loss, inputs=X, targets=column[:, 0] if columns else column)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex128, bool])
def test_leaves_that_are_not_real_floats(dtype):
    bad = {"w": affine_params()["w"], "b": jnp.ones(2, dtype)}
    optimiser = gnl.gauss_newton(affine, SQUARED)
    with pytest.raises(TypeError, match=r"params: leaf \['b'\] has dtype"):
        optimiser.init(bad)
    with pytest.raises(TypeError, match=r"params: leaf \['b'\] has dtype"):
        update_with(params=bad, grads=affine_params(), inputs=X, targets=Y)
    with pytest.raises(TypeError, match=r"updates: leaf \['b'\] has dtype"):
        update_with(grads=bad, inputs=X, targets=Y)
    with pytest.raises(TypeError, match="outputs of predict"):
        update_with(predict=lambda p, x: affine(p, x).astype(dtype), inputs=X, targets=Y)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"damping": -1.0}, ValueError, "damping"),
        ({"damping": float("nan")}, ValueError, "damping"),
        ({"damping": jnp.array(-1.0)}, ValueError, "damping"),
        ({"damping": "lm"}, TypeError, "damping"),
        ({"damping": None}, TypeError, "damping"),
        ({"damping": gnl.damping.LevenbergMarquardt}, TypeError, "damping"),
        ({"solver": "cg"}, TypeError, "solver"),
        ({"solver": gnl.solvers.CG}, TypeError, "solver"),
        ({"learning_rate": -0.1}, ValueError, "learning_rate"),
        ({"learning_rate": None}, TypeError, "learning_rate"),
        ({"l2": -0.1}, ValueError, "l2"),
        ({"l2": float("inf")}, ValueError, "l2"),
        ({"l2": {"w": -1.0, "b": 0.0}}, ValueError, r"l2\['w'\]"),
        ({"dampening": 0.1}, TypeError, "dampening"),
    ],
)
def test_wrong_options(options, error, match):
    make = inspect.unwrap(gnl.gauss_newton)  # the message of the package, not of the type checker
    with pytest.raises(error, match=match):
        make(affine, SQUARED, **options)


def test_wrong_predict_loss_and_l2_structure():
    with pytest.raises(TypeError, match="predict"):
        gnl.gauss_newton(None, SQUARED)
    with pytest.raises(TypeError, match="loss"):
        gnl.gauss_newton(affine, "mse")
    optimiser = gnl.gauss_newton(affine, SQUARED, l2={"w": 0.1})
    with pytest.raises(ValueError, match="l2 must be a number or a pytree"):
        optimiser.update(affine_params(), optimiser.init(affine_params()), affine_params(), inputs=X, targets=Y)


def test_donated_buffers():
    """No two leaves of the first state share a buffer, so that parameters and state can both be donated."""
    optimiser = gnl.gauss_newton(mlp, SQUARED, solver=gnl.solvers.CG(warm_start=0.95))
    params = mlp_params()
    state = optimiser.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(p, s):
        updates, s = optimiser.update(jax.grad(lambda q: half_mean_square(mlp(q, X), Y))(p), s, p, inputs=X, targets=Y)
        return optax.apply_updates(p, updates), s

    for _ in range(2):
        params, state = step(params, state)
    assert state.count == 2
