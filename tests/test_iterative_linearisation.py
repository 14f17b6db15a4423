"""The transform ``iterative_linearisation``: its identities, its bookkeeping, and its place in a chain."""

import functools
import inspect

import jax
import jax.numpy as jnp
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

SQUARED = gnl.losses.squared_error
X, Y = batch()
LABELS = jnp.array([0, 1, 1, 0, 1, 0])
ONE_HOT = jax.nn.one_hot(LABELS, 2, dtype=jnp.float64)
SIZE = 15  # parameters of the network
INNER = {"sgd": optax.sgd(0.1), "momentum": optax.sgd(0.1, momentum=0.9), "adam": optax.adam(0.05)}


def stepper(optimiser):
    """One jitted update and the new parameters; the incoming gradient says only whether the batch is finite."""

    @jax.jit
    def step(params, state, *, inputs, targets, **extra):
        grads = jax.tree.map(lambda p: jnp.full_like(p, 0 * jnp.sum(inputs)), params)
        updates, state = optimiser.update(grads, state, params, inputs=inputs, targets=targets, **extra)
        return optax.apply_updates(params, updates), state, updates

    return step


def linearising(inner, predict=mlp, loss=SQUARED, **options):
    return optax.chain(gnl.iterative_linearisation(predict, loss, **options), inner)


@functools.partial(jax.jit, static_argnames=("steps", "rate"))
def gradient_run(params, period, steps, rate=0.1, inputs=X, targets=Y):
    """Plain gradient steps of the linearised network on the full batch: the end, its state, the path of age."""
    optimiser = linearising(optax.sgd(rate), period=period)

    def step(carry, _):
        p, s = carry
        updates, s = optimiser.update(p, s, p, inputs=inputs, targets=targets)
        return (optax.apply_updates(p, updates), s), gnl.info(s)

    (end, state), infos = jax.lax.scan(step, (params, optimiser.init(params)), None, steps)
    return end, state, infos


# ---- period 1 is the inner optimiser


@pytest.mark.parametrize("loss_name", ["squared", "cross-entropy"])
@pytest.mark.parametrize("inner", INNER)
def test_period_one_is_the_inner_optimiser_to_the_bit(inner, loss_name):
    loss, targets = (SQUARED, Y) if loss_name == "squared" else (gnl.losses.softmax_cross_entropy, LABELS)
    optimiser = INNER[inner]

    @jax.jit
    def plain(params, state):
        grads = jax.grad(lambda p: loss(mlp(p, X), targets))(params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    linear = stepper(linearising(optimiser, loss=loss, period=1))

    @jax.jit
    def traced(params, state, period):
        transform = linearising(optimiser, loss=loss, period=period)
        updates, state = transform.update(params, state, params, inputs=X, targets=targets)
        return optax.apply_updates(params, updates), state

    want, want_state = mlp_params(), optimiser.init(mlp_params())
    got, state = mlp_params(), linearising(optimiser, period=1).init(mlp_params())
    other, other_state = got, state
    for t in range(12):
        want, want_state = plain(want, want_state)
        before = got
        got, state, _ = linear(got, state, inputs=X, targets=targets)
        other, other_state = traced(other, other_state, jnp.asarray(1))
        assert bits(got) == bits(want), f"step {t}"
        assert bits(state[1]) == bits(want_state)
        assert bits(other) == bits(want), f"step {t}, traced period"
        assert bits(gnl.anchor(state)) == bits(before) == bits(gnl.anchor(other_state))
    assert bits(want) != bits(mlp_params())
    assert (gnl.info(state).feature_updates, gnl.info(state).age) == (12, 0)
    assert np.isnan(gnl.info(state).linearisation_error)
    assert np.isnan(gnl.info(other_state).linearisation_error)


@pytest.mark.parametrize(("period", "passes"), [(1, 4), (jnp.asarray(1), 4), (4, 4)], ids=["int", "array", "4"])
def test_each_step_runs_the_model_once(period, passes):
    """With period 1 a step costs one plain gradient, and within a block as much and one forward-mode pass."""
    runs = []

    def predict(p, x):
        jax.debug.callback(lambda: runs.append(1))
        return mlp(p, x)

    params, optimiser = mlp_params(), linearising(optax.sgd(0.1), predict=predict, period=period)
    state, step = optimiser.init(params), stepper(optimiser)
    for _ in range(4):
        params, state, _ = step(params, state, inputs=X, targets=Y)
    jax.effects_barrier()
    assert len(runs) == passes


# ---- K steps are a filter


@functools.cache
def oracle():
    return dense(mlp, lambda o: half_mean_square(o, Y), mlp_params(), X)


@pytest.mark.parametrize("steps", [1, 2, 7, 300])
def test_gradient_steps_are_the_closed_form_filter(steps):
    rate = 0.1

    def phi(values):
        safe = np.where(values > 0, values, 1.0)
        return np.where(values > 0, -np.expm1(steps * np.log1p(-rate * values)) / safe, rate * steps)

    assert rate * np.linalg.norm(oracle().ggn, 2) < 1
    end, state, _ = gradient_run(mlp_params(), steps, steps, rate)
    moved = flat(end) - flat(mlp_params())
    # each step rounds parameters of size 1; none amplifies, as rate * lambda < 1
    bound = tolerance(operations=SIZE * steps) * (1 + np.linalg.norm(flat(mlp_params())) / np.linalg.norm(moved))
    assert distance(moved, oracle().filtered_step(phi)) <= bound
    assert gnl.info(state).feature_updates == 1


def test_many_steps_reach_the_minimum_norm_step():
    """Two examples, so that the linearised model can fit them and the least positive eigenvalue is not tiny."""
    x, y, params = X[:2], Y[:2], mlp_params()
    local = dense(mlp, lambda o: half_mean_square(o, y), params, x)
    values = np.linalg.eigvalsh(local.ggn)[-4:]
    rate, steps = 0.1, 20_000
    left = (1 - rate * values[0]) ** steps
    assert rate < 2 / values[-1]
    assert left < eps()
    end, _, _ = gradient_run(params, steps, steps, rate, x, y)
    want = -np.linalg.pinv(local.jacobian) @ (flat(mlp(params, x)) - flat(y))
    # the fixed point is as exact as the outputs are; what the steps round away along the null space is not pulled back
    bound = tolerance(condition=values[-1] / values[0], operations=SIZE) + tolerance(operations=steps)
    assert distance(flat(end) - flat(params), want) <= bound


def test_affine_model_gives_the_same_run_for_every_period():
    @jax.jit
    def run(period):
        optimiser = linearising(optax.adam(0.05), predict=affine, period=period)
        params = affine_params()

        def step(carry, data):
            p, s = carry
            updates, s = optimiser.update(p, s, p, inputs=data[0], targets=data[1])
            return (optax.apply_updates(p, updates), s), p

        batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[batch(t) for t in range(20)])
        (_, state), path = jax.lax.scan(step, (params, optimiser.init(params)), batches)
        return path, gnl.info(state).feature_updates

    want, updates = run(1)
    assert updates == 20
    for period, count in ((3, 7), (100, 1)):
        got, updates = run(period)
        assert updates == count
        np.testing.assert_allclose(flat(got), flat(want), rtol=0, atol=tolerance(operations=20 * 12))


# ---- the gradient of each step


LOSSES = {
    "squared": (SQUARED, Y, lambda o: half_mean_square(o, Y)),
    "cross-entropy": (gnl.losses.softmax_cross_entropy, LABELS, lambda o: cross_entropy(o, ONE_HOT)),
    "plain callable": (optax.losses.softmax_cross_entropy, ONE_HOT, lambda o: cross_entropy(o, ONE_HOT)),
}


@pytest.mark.parametrize("l2", [0.0, 0.3, {"w1": 0.1, "b1": 0.0, "w2": 0.5}], ids=["none", "scalar", "pytree"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_the_linearised_model(name, l2):
    """At every step the dense J(anchor)^T u(f_lin), and right after a re-linearisation the true gradient."""
    loss, targets, value = LOSSES[name]
    params, transform = mlp_params(), gnl.iterative_linearisation(mlp, loss, period=3, l2=l2)
    step = stepper(optax.chain(transform, optax.scale(-0.2)))
    state = optax.chain(transform, optax.scale(-0.2)).init(params)
    weights = l2 if isinstance(l2, dict) else jax.tree.map(lambda _: l2, params)
    anchor = params
    for t in range(7):
        if t % 3 == 0:
            anchor = params
        start = np.asarray(mlp(anchor, X))
        jacobian = dense(mlp, value, anchor, X).jacobian
        outputs = start + (jacobian @ (flat(params) - flat(anchor))).reshape(start.shape)
        penalty = flat(jax.tree.map(lambda w, p: w * p, weights, params))
        want = jacobian.T @ np.asarray(jax.jacfwd(value)(jnp.asarray(outputs))).ravel() + penalty
        new, state, updates = step(params, state, inputs=X, targets=targets)
        assert distance(flat(updates) / -0.2, want) <= tolerance(operations=10 * SIZE)
        true = flat(jax.grad(lambda p: value(mlp(p, X)))(params)) + penalty
        if t % 3 == 0:
            assert distance(flat(updates) / -0.2, true) <= tolerance(operations=10 * SIZE)
        else:
            assert distance(flat(updates) / -0.2, true) > np.sqrt(eps())
        params = new


def test_minibatches_change_within_a_block():
    params = mlp_params()
    optimiser = linearising(optax.sgd(0.2), period=4)
    step, state, anchor = stepper(optimiser), optimiser.init(params), params
    for t in range(6):
        x, y = batch(t)
        if t % 4 == 0:
            anchor = params
        start, tangent = mlp(anchor, x), jax.tree.map(jnp.subtract, params, anchor)
        local = dense(mlp, lambda o, y=y: half_mean_square(o, y), anchor, x)
        outputs = np.asarray(start).ravel() + local.jacobian @ flat(tangent)
        want = -0.2 * local.jacobian.T @ (outputs - np.asarray(y).ravel()) / 6
        params, state, updates = step(params, state, inputs=x, targets=y)
        assert distance(updates, want) <= tolerance(operations=10 * SIZE)


def test_what_stands_in_front_is_dropped():
    params = mlp_params()
    ours = gnl.iterative_linearisation(mlp, SQUARED, period=2)
    plain = optax.chain(ours, optax.sgd(0.1))
    fronted = optax.chain(optax.add_decayed_weights(3.0), optax.scale(100.0), ours, optax.sgd(0.1))
    ends = []
    for optimiser, incoming in ((plain, 0.0), (fronted, 1.0), (plain, jnp.nan)):
        p, state, update = params, optimiser.init(params), jax.jit(optimiser.update)
        for _ in range(3):
            grads = jax.tree.map(lambda leaf, value=incoming: jnp.full_like(leaf, value), p)
            updates, state = update(grads, state, p, inputs=X, targets=Y)
            p = optax.apply_updates(p, updates)
        ends.append(p)
    assert bits(ends[0]) == bits(ends[1]) == bits(ends[2]) != bits(params)


# ---- anchor and info


@pytest.mark.parametrize("period", [2, 3, 7, 100])
def test_feature_updates_and_age(period):
    steps = 9
    _, state, infos = gradient_run(mlp_params(), period, steps)
    assert gnl.info(state).feature_updates == -(-steps // period)
    np.testing.assert_array_equal(infos.age, np.arange(steps) % period)
    np.testing.assert_array_equal(infos.feature_updates, np.arange(steps) // period + 1)


def test_anchor_is_the_parameters_of_the_last_feature_update():
    params, optimiser = mlp_params(), linearising(optax.sgd(0.1), period=3)
    step, state = stepper(optimiser), optimiser.init(params)
    assert bits(gnl.anchor(state)) == bits(params)
    for t in range(8):
        if t % 3 == 0:
            anchor = params
        params, state, _ = step(params, state, inputs=X, targets=Y)
        assert bits(gnl.anchor(state)) == bits(anchor)
        got = gnl.linearised(mlp, gnl.anchor(state))(params, X)
        local = dense(mlp, lambda o: half_mean_square(o, Y), anchor, X)
        want = np.asarray(mlp(anchor, X)).ravel() + local.jacobian @ (flat(params) - flat(anchor))
        assert distance(got, want) <= tolerance(operations=SIZE)


def test_linearisation_error_by_hand():
    params, optimiser = mlp_params(), linearising(optax.sgd(0.3), period=3)
    step, state = stepper(optimiser), optimiser.init(params)
    want, start = np.nan, None
    for t in range(8):
        x, y = batch(t)
        if t % 3 == 0:
            if t:
                moved = flat(params) - flat(start)
                before, after = flat(mlp(start, x)), flat(mlp(params, x))
                missed = after - before - dense(mlp, lambda o: jnp.sum(o), start, x).jacobian @ moved
                want = np.linalg.norm(missed) / np.linalg.norm(after - before)
            start = params
        params, state, _ = step(params, state, inputs=x, targets=y)
        np.testing.assert_allclose(
            gnl.info(state).linearisation_error,
            want,
            rtol=tolerance(operations=10 * SIZE) / np.nan_to_num(want, nan=1.0),
        )
    assert want > np.sqrt(eps())


def test_linearisation_error_of_an_affine_model_is_rounding():
    params, optimiser = affine_params(), linearising(optax.sgd(0.3), predict=affine, period=2)
    step, state = stepper(optimiser), optimiser.init(params)
    for _ in range(3):
        params, state, _ = step(params, state, inputs=X, targets=Y)
    assert gnl.info(state).linearisation_error <= tolerance(operations=4 * SIZE)


# ---- period as a value


def test_traced_and_vmapped_period():
    periods = jnp.array([1, 3, 10])
    many, states, _ = jax.vmap(lambda k: gradient_run(mlp_params(), k, 9))(periods)
    for i, period in enumerate((1, 3, 10)):
        one, _, _ = gradient_run(mlp_params(), period, 9)
        literal, optimiser = mlp_params(), linearising(optax.sgd(0.1), period=period)
        state, step = optimiser.init(literal), stepper(optimiser)
        for _ in range(9):
            literal, state, _ = step(literal, state, inputs=X, targets=Y)
        bound = tolerance(operations=9 * SIZE)
        assert distance(jax.tree.map(lambda leaf, i=i: leaf[i], many), literal) <= bound
        assert distance(one, literal) <= bound
        assert gnl.info(jax.tree.map(lambda leaf, i=i: leaf[i], states)).feature_updates == -(-9 // period)
    ends = np.stack([flat(jax.tree.map(lambda leaf, i=i: leaf[i], many)) for i in range(3)])
    assert np.linalg.norm(ends[0] - ends[1]) > np.sqrt(eps())
    assert np.linalg.norm(ends[1] - ends[2]) > np.sqrt(eps())


@pytest.mark.parametrize(
    ("period", "error"),
    [
        (0, ValueError),
        (-3, ValueError),
        (np.int64(0), ValueError),
        (jnp.asarray(0), ValueError),
        (1.5, TypeError),
        (2.0, TypeError),
        (True, TypeError),
        (np.True_, TypeError),
        (None, TypeError),
        ("ten", TypeError),
        (jnp.array([1, 2]), TypeError),
        ((1, 2), TypeError),
        (jnp.asarray(2.0), TypeError),
    ],
    ids=repr,
)
def test_wrong_period(period, error):
    make = inspect.unwrap(gnl.iterative_linearisation)  # the message of the package, not of the type checker
    with pytest.raises(error, match="period must be"):
        make(mlp, SQUARED, period=period)


# ---- JAX's transformations and types


def test_vmap_over_seeds_is_the_loop():
    starts = [mlp_params(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    many, states, _ = jax.vmap(lambda p: gradient_run(p, 3, 9))(stacked)
    optimiser = linearising(optax.sgd(0.1), period=3)
    step = stepper(optimiser)
    for i, start in enumerate(starts):
        want, state = start, optimiser.init(start)
        for _ in range(9):
            want, state, _ = step(want, state, inputs=X, targets=Y)
        assert distance(jax.tree.map(lambda leaf, i=i: leaf[i], many), want) <= tolerance(operations=9 * SIZE)
        got = gnl.info(jax.tree.map(lambda leaf, i=i: leaf[i], states))
        error = gnl.info(state).linearisation_error
        assert abs(got.linearisation_error - error) <= tolerance(operations=9 * SIZE)


def test_eager_is_the_same_as_jit():
    params, optimiser = mlp_params(), linearising(optax.sgd(0.1), period=2)
    state = optimiser.init(params)
    for _ in range(3):
        updates, state = optimiser.update(params, state, params, inputs=X, targets=Y)
        params = optax.apply_updates(params, updates)
    assert distance(params, gradient_run(mlp_params(), 2, 3)[0]) <= tolerance(operations=3 * SIZE)


@pytest.mark.parametrize("period", [1, 3])
def test_one_trace_serves_every_call(period):
    traces = []

    def predict(p, x):
        traces.append(1)
        return mlp(p, x)

    params, optimiser = mlp_params(), linearising(optax.adam(0.1), predict=predict, period=period)
    state, step = optimiser.init(params), stepper(optimiser)
    params, state, _ = step(params, state, inputs=X, targets=Y)
    first = len(traces)
    assert 0 < first <= 4
    for _ in range(5):
        params, state, _ = step(params, state, inputs=X, targets=Y)
    assert len(traces) == first
    assert step._cache_size() == 1


DTYPES = {
    "float64": (jnp.float64,) * 3,
    "float32": (jnp.float32,) * 3,
    "bfloat16": (jnp.bfloat16,) * 3,
    "float16": (jnp.float16,) * 3,
    "mixed": (jnp.float32, jnp.bfloat16, jnp.float64),
}


@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("period", [1, 3, "traced"])
@pytest.mark.parametrize("name", DTYPES)
def test_state_and_updates_keep_their_types(name, period, l2):
    params = {key: leaf.astype(dtype) for (key, leaf), dtype in zip(mlp_params().items(), DTYPES[name], strict=True)}
    state = gnl.iterative_linearisation(mlp, SQUARED, period=2).init(params)

    def update(p, s, traced, traced_l2):
        k, weight = (traced, traced_l2) if period == "traced" else (period, l2)
        transform = gnl.iterative_linearisation(mlp, SQUARED, period=k, l2=weight)
        return transform.update(p, s, p, inputs=X, targets=Y)

    updates, after = jax.eval_shape(update, params, state, jnp.asarray(3), jnp.asarray(l2))
    assert kinds(after) == kinds(state)
    assert kinds(updates) == kinds(jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params))


@pytest.mark.parametrize("period", [1, 3])
def test_state_keeps_its_types_from_weakly_typed_parameters(period):
    params = {"w": jnp.asarray(1.0), "b": 0.5}
    assert params["w"].weak_type
    transform = gnl.iterative_linearisation(lambda p, x: p["w"] * x + p["b"], SQUARED, period=period)
    state, x = transform.init(params), jnp.arange(3.0)
    _, after = jax.eval_shape(lambda p, s: transform.update(p, s, p, inputs=x, targets=x), params, state)
    assert kinds(after) == kinds(state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_narrow_parameters_with_double_precision_on(dtype):
    x, y = batch(dtype=dtype)
    optimiser = linearising(optax.sgd(0.2), period=3)
    params = mlp_params(dtype=dtype)
    state, step = optimiser.init(params), stepper(optimiser)
    before = half_mean_square(mlp(params, x), y)
    for _ in range(6):
        params, state, updates = step(params, state, inputs=x, targets=y)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, updates))} == {jnp.dtype(dtype)}
    assert half_mean_square(mlp(params, x), y) < before


def test_donated_buffers():
    """Init copies the parameters, so that parameters and state can both be donated."""
    optimiser = linearising(optax.sgd(0.1), period=1)
    params = mlp_params()
    state = optimiser.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(p, s):
        updates, s = optimiser.update(p, s, p, inputs=X, targets=Y)
        return optax.apply_updates(p, updates), s

    for _ in range(3):
        params, state = step(params, state)
    assert distance(params, gradient_run(mlp_params(), 1, 3)[0]) <= tolerance(operations=3 * SIZE)


# ---- wrappers and errors


def test_apply_if_finite_around_the_chain_refuses():
    params = mlp_params()
    inner = linearising(optax.adam(0.1), period=3)
    optimiser = optax.apply_if_finite(inner, max_consecutive_errors=5)
    state, step = optimiser.init(params), stepper(optimiser)
    bad = X.at[0, 0].set(jnp.nan)
    kept, state, _ = step(params, state, inputs=bad, targets=Y)
    assert bits(kept) == bits(params)
    assert (gnl.info(state).feature_updates, gnl.info(state).age) == (0, 0)
    params, state, _ = step(params, state, inputs=X, targets=Y)
    before = gnl.info(state)
    kept, state, _ = step(params, state, inputs=bad, targets=Y)
    assert bits(kept) == bits(params)
    assert (gnl.info(state).feature_updates, gnl.info(state).age) == (before.feature_updates, before.age) == (1, 0)
    params, state, _ = step(params, state, inputs=X, targets=Y)
    assert (gnl.info(state).feature_updates, gnl.info(state).age) == (1, 1)
    want = gradientless(inner, 2)
    assert distance(params, want) <= tolerance(operations=2 * SIZE)


def gradientless(optimiser, steps):
    params = mlp_params()
    state, step = optimiser.init(params), stepper(optimiser)
    for _ in range(steps):
        params, state, _ = step(params, state, inputs=X, targets=Y)
    return params


def test_without_a_guard_a_bad_batch_passes_through():
    params, optimiser = mlp_params(), linearising(optax.sgd(0.1), period=3)
    _, _, updates = stepper(optimiser)(params, optimiser.init(params), inputs=X * jnp.nan, targets=Y)
    assert np.any(np.isnan(flat(updates)))


def test_clipping_goes_behind():
    params, transform = mlp_params(), gnl.iterative_linearisation(mlp, SQUARED, period=2)
    optimiser = optax.chain(transform, optax.clip_by_global_norm(0.01))
    _, _, updates = stepper(optimiser)(params, optimiser.init(params), inputs=X, targets=Y)
    assert abs(np.linalg.norm(flat(updates)) - 0.01) <= tolerance(operations=SIZE)


def test_multi_steps_and_none_leaves():
    params = {**mlp_params(), "off": None}
    transform = optax.MultiSteps(linearising(optax.sgd(0.1), period=2), 2)
    state, step = transform.init(params), stepper(transform)
    first, state, _ = step(params, state, inputs=X, targets=Y)
    assert bits(first) == bits(params)
    second, state, _ = step(first, state, inputs=X, targets=Y)
    want = gradientless(linearising(optax.sgd(0.1), period=2), 1)
    assert distance(second, want) <= tolerance(operations=SIZE)
    assert gnl.info(state).feature_updates == 1


def test_wrong_arguments():
    params = mlp_params()
    with pytest.raises(TypeError, match="predict"):
        gnl.iterative_linearisation(None, SQUARED, period=1)
    with pytest.raises(TypeError, match="loss"):
        gnl.iterative_linearisation(mlp, "mse", period=1)
    with pytest.raises(TypeError, match="period"):
        gnl.iterative_linearisation(mlp, SQUARED)
    with pytest.raises(ValueError, match="l2"):
        gnl.iterative_linearisation(mlp, SQUARED, period=1, l2=-1.0)
    transform = gnl.iterative_linearisation(mlp, SQUARED, period=2)
    state = transform.init(params)
    with pytest.raises(TypeError, match="inputs is missing"):
        transform.update(params, state, params)
    with pytest.raises(ValueError, match="params is None"):
        transform.update(params, state, inputs=X, targets=Y)
    with pytest.raises(ValueError, match=r"updates: leaf \['b1'\] has shape \(4,\)"):
        transform.update({**params, "b1": jnp.ones(4)}, state, params, inputs=X, targets=Y)
    other = {**params, "b1": jnp.ones((1, 3))}
    with pytest.raises(ValueError, match=r"^state\.anchor\['b1'\] is a float64 array of shape \(3,\)"):
        transform.update(other, state, other, inputs=X, targets=Y)
    with pytest.raises(ValueError, match=r"\(6, 1\).*\(6, 2\)"):
        transform.update(params, state, params, inputs=X, targets=Y[:, :1])
    for dtype in (jnp.int32, jnp.complex64):
        with pytest.raises(TypeError, match=r"params: leaf \['b1'\] has dtype"):
            transform.init({**params, "b1": jnp.ones(3, dtype)})
    with pytest.raises(ValueError, match="l2 must be a number or a pytree"):
        bad = gnl.iterative_linearisation(mlp, SQUARED, period=2, l2={"w1": 1.0})
        bad.update(params, state, params, inputs=X, targets=Y)
