"""The rules of ``gn_linear.periods``: each against steps decided by hand, in every way that JAX can run them."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gn_linear as gnl
from gn_linear import periods
from tests.oracles_transforms import affine, affine_params, batch, bits, distance, flat, kinds, mlp, mlp_params
from tests.support import assert_bit_equal, assert_close, dense_jacobian, tolerance

SQUARED = gnl.losses.squared_error
STEPS, RATE, SIZE = 12, 0.3, 15
START = mlp_params()
BATCHES = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[batch(t) for t in range(STEPS)])
PROBE = batch(50, n=3)[0]  # six output entries, fewer than the vectors of the rule
MANY = batch(51, n=40)[0]  # eighty
ROUNDING = tolerance(jnp.float64, size=STEPS * SIZE)


def linearising(period, predict=mlp, **options):
    return optax.chain(gnl.iterative_linearisation(predict, SQUARED, period=period, **options), optax.sgd(RATE))


def scanned(period, start=START, predict=mlp, batches=BATCHES):
    """Steps over changing batches: the parameters before each, and what happened at each."""
    optimiser = linearising(period, predict)

    def step(carry, data):
        params, state = carry
        updates, state = optimiser.update(params, state, params, inputs=data[0], targets=data[1])
        return (optax.apply_updates(params, updates), state), (params, gnl.info(state), gnl.anchor(state))

    return jax.lax.scan(step, (start, optimiser.init(start)), batches)[1]


run = jax.jit(scanned, static_argnames="predict")  # the numbers of a rule are traced, its kind is not


def happened(infos):
    """The steps at which the anchor moved, read from the counter."""
    return np.flatnonzero(np.diff(np.asarray(infos.feature_updates), prepend=0)).tolist()


@functools.cache
def dense_model():
    """Outputs and Jacobian of the network, compiled once for a shape of the batch."""
    unravel = jax.flatten_util.ravel_pytree(START)[1]
    outputs = lambda vector, x: mlp(unravel(vector), x).ravel()  # noqa: E731
    return jax.jit(lambda vector, x: (outputs(vector, x), jax.jacfwd(outputs)(vector, x)))


def by_hand(decide):
    """A literal loop in NumPy: the steps at which ``decide`` moved the anchor, and the parameters before each step."""
    theta = flat(START)
    anchor, moved, path = theta, [], []
    for t in range(STEPS):
        x, y = BATCHES[0][t], flat(BATCHES[1][t])
        path.append(theta)
        if t == 0 or decide(t, theta, anchor, x):
            anchor = theta
            moved.append(t)
        start, jacobian = map(np.asarray, dense_model()(anchor, x))
        theta = theta - RATE * jacobian.T @ (start + jacobian @ (theta - anchor) - y) / len(x)
    return moved, np.stack(path)


def hand_error(theta, anchor, x):
    (after, _), (before, jacobian) = dense_model()(theta, x), dense_model()(anchor, x)
    missed = after - before - jacobian @ (theta - anchor)
    return np.linalg.norm(missed) / np.linalg.norm(after - before)


def hand_kernels(theta, anchor, x):
    here, there = np.asarray(dense_model()(theta, x)[1]), np.asarray(dense_model()(anchor, x)[1])
    return here @ here.T, there @ there.T


def hand_distance(theta, anchor, x):
    a, b = hand_kernels(theta, anchor, x)
    return 1 - np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))


def assert_follows(result, moved, path):
    """The run moved its anchor at these steps, and went where the literal loop went."""
    params, infos, anchors = result
    assert happened(infos) == moved
    last = np.array([max(s for s in moved if s <= t) for t in range(STEPS)])
    np.testing.assert_array_equal(infos.age, np.arange(STEPS) - last)
    for found, want in ((params, path), (anchors, path[last])):
        rows = np.concatenate([np.asarray(leaf).reshape(STEPS, -1) for leaf in jax.tree.leaves(found)], axis=1)
        assert np.max(np.linalg.norm(rows - want, axis=1) / np.linalg.norm(want, axis=1)) <= ROUNDING


def at_step(tree, t):
    return jax.tree.map(lambda leaf: leaf[t], tree)


def odd_steps(context):
    return context.count % 4 == 1


def never(context):
    return False


def moved_far(context):
    motion = context.predict(context.params, context.inputs) - context.predict(context.anchor, context.inputs)
    return jnp.linalg.norm(motion) > 2.5


# ---- steps that are known beforehand

KNOWN = {
    "every 1": (periods.every(1), list(range(12))),
    "every 3": (periods.every(3), [0, 3, 6, 9]),
    "every 100": (periods.every(100), [0]),
    "at": (periods.at([7, 2, 3]), [0, 2, 3, 7]),
    "at 0 and beyond": (periods.at((0, 11, 500)), [0, 11]),
    "at an array": (periods.at(np.array([5, 6])), [0, 5, 6]),
    "at none": (periods.at([]), [0]),
    "early 1, sparse 3": (periods.early_then_sparse(1, 4, 3), [0, 1, 2, 3, 6, 9]),
    "early 2, sparse 4": (periods.early_then_sparse(2, 5, 4), [0, 2, 4, 8]),
    "sparse at once": (periods.early_then_sparse(1, 0, 5), [0, 5, 10]),
    "late dense": (periods.early_then_sparse(4, 6, 1), [0, 4, 6, 7, 8, 9, 10, 11]),
    "stop after 6": (periods.stop_after(6, periods.every(2)), [0, 2, 4, 6]),
    "stop after 5": (periods.stop_after(5, periods.every(2)), [0, 2, 4]),
    "stop after 0": (periods.stop_after(0, periods.every(1)), [0]),
    "stop twice": (periods.stop_after(9, periods.stop_after(3, periods.every(1))), [0, 1, 2, 3]),
    "stop a function": (periods.stop_after(6, odd_steps), [0, 1, 5]),
    "a function": (odd_steps, [0, 1, 5, 9]),
    "a function of Python": (never, [0]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_steps(name):
    rule, moved = KNOWN[name]
    result = scanned(rule) if inspect.isfunction(rule) else run(rule)
    want, path = by_hand(lambda t, *_: t in moved)
    assert want == moved
    assert_follows(result, moved, path)


def test_a_rule_may_use_the_model():
    def far(t, theta, anchor, x):
        return np.linalg.norm(dense_model()(theta, x)[0] - dense_model()(anchor, x)[0]) > 2.5

    moved, path = by_hand(far)
    assert 2 < len(moved) < STEPS
    assert_follows(scanned(moved_far), moved, path)


STACKS = {
    "every": ([periods.every(k) for k in (1, 2, 5)], [list(range(12)), [0, 2, 4, 6, 8, 10], [0, 5, 10]]),
    "at": ([periods.at(steps) for steps in ([1, 2], [4, 8], [3, 3])], [[0, 1, 2], [0, 4, 8], [0, 3]]),
    "early": (
        [periods.early_then_sparse(*numbers) for numbers in ((1, 3, 4), (2, 8, 3), (5, 0, 6))],
        [[0, 1, 2, 6, 10], [0, 2, 4, 6, 9], [0, 6]],
    ),
    "stop": (
        [periods.stop_after(t, periods.every(k)) for t, k in ((3, 1), (8, 3), (100, 4))],
        [[0, 1, 2, 3], [0, 3, 6], [0, 4, 8]],
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_vmap_over_the_numbers(name):
    rules, steps = STACKS[name]
    stacked = jax.tree.map(lambda *numbers: jnp.stack([jnp.asarray(n) for n in numbers]), *rules)
    results = jax.jit(jax.vmap(scanned))(stacked)
    for i, moved in enumerate(steps):
        _, path = by_hand(lambda t, *_, moved=moved: t in moved)
        assert_follows(at_step(results, i), moved, path)


def test_traced_numbers_without_vmap():
    """Numbers made inside jit pass the constructors, in a list as well."""

    @jax.jit
    def steps(k):
        early = periods.stop_after(2 * k, periods.early_then_sparse(k, k, k))
        rules = [early, periods.at([k, 2 * k]), periods.at(jnp.stack([k])), periods.when_linearisation_error(1.0 * k)]
        return jax.vmap(lambda i: scanned(lambda c: jnp.stack([periods.ask(r, c) for r in rules])[i])[1])(jnp.arange(4))

    infos = steps(5)
    assert [happened(at_step(infos, i)) for i in range(4)] == [[0, 5, 10], [0, 5, 10], [0, 5], [0]]


def test_eager_and_one_jitted_step_are_the_scan():
    rule = periods.stop_after(3, lambda context: context.age >= 2)
    optimiser = linearising(rule)
    ends = []
    for update in (optimiser.update, jax.jit(optimiser.update)):
        params, state, seen = START, optimiser.init(START), []
        for t in range(3):
            updates, state = update(params, state, params, inputs=BATCHES[0][t], targets=BATCHES[1][t])
            params = optax.apply_updates(params, updates)
            seen.append(int(gnl.info(state).feature_updates))
        assert seen == [1, 1, 2]
        ends.append(params)
    want = at_step(scanned(rule)[0], 3)
    assert max(distance(end, want) for end in ends) <= ROUNDING


@pytest.mark.parametrize("k", [1, 3])
def test_every_is_the_plain_period_to_the_bit(k):
    def result(period):
        optimiser = linearising(period)
        step = jax.jit(lambda p, s, x, y: optimiser.update(p, s, p, inputs=x, targets=y))
        params, state = START, optimiser.init(START)
        for t in range(7):
            updates, state = step(params, state, BATCHES[0][t], BATCHES[1][t])
            params = optax.apply_updates(params, updates)
        return params, state

    want = result(k)
    for period in (periods.every(k), periods.every(np.int32(k)), lambda context: context.age >= k):
        assert_bit_equal(result(period), want)


def test_every_one_runs_the_model_once():
    """With ``every(1)`` a step costs one plain gradient, as with period 1."""
    runs = []

    def predict(p, x):
        runs.append(1)
        return mlp(p, x)

    for period in (1, periods.every(1)):
        optimiser, before = linearising(period, predict), len(runs)
        state = optimiser.init(START)
        text = jax.make_jaxpr(lambda s, o=optimiser: o.update(START, s, START, inputs=PROBE, targets=PROBE))(state)
        assert "cond" not in str(text)
        assert len(runs) - before == 1


# ---- the error of linearisation


@pytest.mark.parametrize(
    ("bound", "steps"),
    [(0.0, list(range(12))), (0.08, [0, 4, 6, 7, 8, 11]), (0.4, [0, 8]), (1e6, [0])],
)
def test_linearisation_error_by_hand(bound, steps):
    errors = []

    def decide(t, theta, anchor, x):
        errors.append(hand_error(theta, anchor, x))
        return errors[-1] > bound

    moved, path = by_hand(decide)
    assert moved == steps
    assert min(abs(error - bound) for error in errors) > np.sqrt(ROUNDING)  # no decision by rounding
    assert_follows(run(periods.when_linearisation_error(bound)), moved, path)


def test_vmap_over_the_bounds():
    bounds = jnp.array([0.0, 0.08, 0.4])
    infos = jax.jit(jax.vmap(lambda bound: scanned(periods.when_linearisation_error(bound))[1]))(bounds)
    assert [happened(at_step(infos, i)) for i in range(3)] == [list(range(12)), [0, 4, 6, 7, 8, 11], [0, 8]]


def test_error_that_is_not_a_number_is_no():
    x = BATCHES[0].at[3].set(jnp.nan)
    batches = (jnp.concatenate([x[:1], x[:1] * 0, x[2:4]]), BATCHES[1][:4] * 0)
    still = {**START, "w2": START["w2"] * 0}  # the outputs are the targets, and do not move
    _, infos, _ = run(periods.when_linearisation_error(0.0), still, batches=batches)
    assert happened(infos) == [0]


# ---- the drift of the kernel


def flip(rule_of, context):
    """The bound at which a rule turns from yes to no, by bisection."""
    due = jax.jit(lambda bound: rule_of(bound)(context))
    low, high = 0.0, 2.0
    assert due(low)
    assert not due(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if due(middle) else (low, middle)
    return low


FAR = mlp_params(seed=3)
CONTEXT = periods.Context(jnp.asarray(4), jnp.asarray(4), FAR, START, None, mlp)


@pytest.mark.parametrize("probes", [6, 16])
def test_exact_kernel_distance(probes):
    found = flip(lambda bound: periods.when_kernel_drifts(bound, PROBE, probes=probes), CONTEXT)
    want = hand_distance(flat(FAR), flat(START), PROBE)
    assert 0.01 < want < 1
    assert_close(found, want, scale=1.0, size=SIZE + 6, dtype=jnp.float64)


@pytest.mark.parametrize("probes", [1, 4, 16, 64])
def test_estimated_kernel_distance_is_within_three_standard_errors(probes):
    found = flip(lambda bound: periods.when_kernel_drifts(bound, MANY, probes=probes), CONTEXT)
    a, b = hand_kernels(flat(FAR), flat(START), MANY)
    cosine = np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))
    # to first order the estimate is z^T M z averaged over the signs, whose variance is twice the off-diagonal squares
    first = cosine * (a @ b / np.sum(a * b) - a @ a / (2 * np.sum(a * a)) - b @ b / (2 * np.sum(b * b)))
    off = (first + first.T) / 2
    variance = 2 * (np.sum(off**2) - np.sum(np.diag(off) ** 2))
    error = abs(found - (1 - cosine))
    assert ROUNDING < error <= 3 * np.sqrt(variance / probes)


def test_equal_kernels_do_not_drift():
    """An affine model has one kernel; what two compilations of it round differently is squared in the distance."""
    batches = at_step(BATCHES, slice(5))
    for rule in (periods.when_kernel_drifts(ROUNDING**2, MANY, probes=3), periods.when_kernel_drifts(0.0, PROBE)):
        assert not rule(CONTEXT._replace(params=START))
    rule = periods.when_kernel_drifts(ROUNDING**2, MANY, probes=6)
    assert happened(run(rule, affine_params(), predict=affine, batches=batches)[1]) == [0]


@pytest.mark.parametrize(("bound", "steps"), [(0.02, [0, 2, 7, 8]), (0.04, [0, 7, 9])])
def test_kernel_drift_by_hand(bound, steps):
    distances = []

    def decide(t, theta, anchor, x):
        distances.append(hand_distance(theta, anchor, PROBE))
        return distances[-1] > bound

    moved, path = by_hand(decide)
    assert moved == steps
    assert min(abs(value - bound) for value in distances) > np.sqrt(ROUNDING)
    assert_follows(run(periods.when_kernel_drifts(bound, PROBE)), moved, path)


def test_kernel_of_several_outputs_and_no_kernel():
    """Outputs of different shapes count together; a kernel that is 0 is no reason to move."""

    def two(p, x):
        return {"a": mlp(p, x), "b": mlp(p, x[:2])[:, 0]}

    found = flip(lambda bound: periods.when_kernel_drifts(bound, PROBE), CONTEXT._replace(predict=two))
    here, there = (
        dense_jacobian(lambda p, x: jnp.concatenate([mlp(p, x).ravel(), mlp(p, x[:2])[:, 0]]), p, PROBE)
        for p in (FAR, START)
    )
    a, b = here @ here.T, there @ there.T
    want = 1 - np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))
    assert_close(found, want, scale=1.0, size=SIZE + 8, dtype=jnp.float64)
    constant = CONTEXT._replace(predict=lambda p, x: 0.0 * mlp(p, x))
    assert not periods.when_kernel_drifts(0.0, PROBE)(constant)


# ---- wrappers, types, errors


def test_injected_number_changes_without_a_new_trace():
    make = optax.inject_hyperparams(lambda k: gnl.iterative_linearisation(mlp, SQUARED, period=periods.every(k)))
    transform = make(k=4)
    state, update, ages = transform.init(START), jax.jit(transform.update), []
    for t in range(9):
        if t == 5:
            state.hyperparams["k"] = state.hyperparams["k"] - 2
        _, state = update(START, state, START, inputs=PROBE, targets=PROBE)
        ages.append(int(gnl.info(state).age))
    assert ages == [0, 1, 2, 3, 0, 1, 0, 1, 0]
    assert update._cache_size() == 1


@pytest.mark.parametrize("period", [periods.every(2), odd_steps], ids=["rule", "plain"])
def test_inject_hyperparams_hands_a_static_rule_on(period):
    make = optax.inject_hyperparams(gnl.iterative_linearisation, static_args=("predict", "loss", "period"))
    transform = make(mlp, SQUARED, period=period)
    state, update, moved = transform.init(START), jax.jit(transform.update), []
    for _ in range(6):
        _, state = update(START, state, START, inputs=PROBE, targets=PROBE)
        moved.append(int(gnl.info(state).age) == 0)
    assert np.flatnonzero(moved).tolist() == ([0, 2, 4] if period is not odd_steps else [0, 1, 5])


def all_rules(context):
    rules = [periods.every(3), periods.at([1]), periods.early_then_sparse(1, 2, 3), periods.stop_after(4, moved_far)]
    rules += [periods.when_linearisation_error(0.1), periods.when_kernel_drifts(0.1, context.inputs, probes=4)]
    return functools.reduce(jnp.logical_or, [periods.ask(periods.as_rule(rule, "rule"), context) for rule in rules])


@pytest.mark.parametrize("promotion", ["standard", "strict"])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_state_keeps_its_types(dtype, promotion):
    params, (x, y) = mlp_params(dtype=dtype), batch(dtype=dtype)
    transform = gnl.iterative_linearisation(mlp, SQUARED, period=all_rules)
    state = transform.init(params)
    with jax.numpy_dtype_promotion(promotion):
        updates, after = jax.eval_shape(lambda p, s: transform.update(p, s, p, inputs=x, targets=y), params, state)
    assert kinds(after) == kinds(state)
    assert kinds(updates) == kinds(params)


def test_one_trace_serves_every_step():
    traces = []

    def predict(p, x):
        traces.append(1)
        return mlp(p, x)

    optimiser = linearising(all_rules, predict)
    params, state, first = START, optimiser.init(START), None
    update = jax.jit(optimiser.update)
    for t in range(4):
        updates, state = update(params, state, params, inputs=BATCHES[0][t], targets=BATCHES[1][t])
        params = optax.apply_updates(params, updates)
        first = first or len(traces)
    assert len(traces) == first > 0
    assert update._cache_size() == 1


WHOLE_MODEL = {
    "error": periods.when_linearisation_error(0.1),
    "kernel": periods.when_kernel_drifts(0.01, PROBE),
    "function": moved_far,
}


@pytest.mark.parametrize(
    ("wrapper", "name"), [("partition", "error"), ("partition", "kernel"), ("masked", "function"), ("masked", "kernel")]
)
def test_rules_see_the_completed_model(wrapper, name):
    """With part of the parameters the steps are those of the model on that part."""
    rule = WHOLE_MODEL[name]
    if wrapper == "partition":
        labels = {"w1": "train", "b1": "keep", "w2": "train"}
        optimiser = optax.partition({"train": linearising(rule), "keep": optax.set_to_zero()}, labels)
    else:
        mask = {"w1": True, "b1": False, "w2": True}
        frozen = optax.masked(optax.set_to_zero(), jax.tree.map(lambda train: not train, mask))
        optimiser = optax.chain(optax.masked(linearising(rule), mask), frozen)
    other = linearising(rule, lambda p, x: mlp({**p, "b1": START["b1"]}, x))
    params, part = START, {key: START[key] for key in ("w1", "w2")}
    update, other_update = jax.jit(optimiser.update), jax.jit(other.update)
    state, other_state, counts = optimiser.init(params), other.init(part), []
    for t in range(6):
        data = {"inputs": BATCHES[0][t], "targets": BATCHES[1][t]}
        updates, state = update(params, state, params, **data, full_params=params)
        params = optax.apply_updates(params, updates)
        updates, other_state = other_update(part, other_state, part, **data)
        part = optax.apply_updates(part, updates)
        counts.append((int(gnl.info(state).feature_updates), int(gnl.info(other_state).feature_updates)))
    assert all(one == another for one, another in counts)
    assert 1 < counts[-1][0] < 6
    assert bits(params["b1"]) == bits(START["b1"])
    assert distance({key: params[key] for key in part}, part) <= ROUNDING


@pytest.mark.parametrize(
    "answer",
    [1, 1.0, None, "yes", jnp.asarray(1), jnp.ones(1, bool), np.ones((1, 1), bool), [True], never],
    ids=["1", "1.0", "None", "yes", "integer", "vector", "matrix", "list", "function"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_wrong_answer(answer, nested):
    def rule(context):
        return answer

    optimiser = linearising(periods.stop_after(5, rule) if nested else rule)
    state = optimiser.init(START)
    with pytest.raises(TypeError, match="period must be a rule that returns a boolean array of shape"):
        jax.eval_shape(lambda s: optimiser.update(START, s, START, inputs=PROBE, targets=PROBE), state)


def test_wrong_answer_of_a_rule_and_a_schedule():
    class Broken(periods.Rule):
        __call__ = inspect.unwrap(lambda self, context: context.age)

    for period, match in ((Broken(), "Broken"), (lambda count: 8 // (count + 1), "concatenate|unsupported")):
        optimiser = linearising(period)
        state = optimiser.init(START)
        with pytest.raises(TypeError, match=match) as caught:
            optimiser.update(START, state, START, inputs=PROBE, targets=PROBE)
    assert "period was called as a rule" in caught.value.__notes__[-1]
    assert "optax.inject_hyperparams" in caught.value.__notes__[-1]


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: periods.every(0), ValueError, "k must be"),
        (lambda: periods.every(2**31), ValueError, "k must be"),
        (lambda: periods.every(2.0), TypeError, "k must be"),
        (lambda: periods.every(True), TypeError, "k must be"),
        (lambda: periods.every(jnp.array([1])), TypeError, "k must be"),
        (lambda: periods.at([3, -1]), ValueError, r"steps\[1\] must be"),
        (lambda: periods.at(jnp.array([3, -1])), ValueError, "steps must be"),
        (lambda: periods.at(np.array([3, 2**31])), ValueError, "steps must be"),
        (lambda: periods.at([0.5]), TypeError, r"steps\[0\] must be"),
        (lambda: periods.at(3), TypeError, "steps must be"),
        (lambda: periods.at(jnp.ones((1, 1), int)), TypeError, "steps must be"),
        (lambda: periods.at("12"), TypeError, "steps must be"),
        (lambda: periods.early_then_sparse(0, 1, 1), ValueError, "dense must be"),
        (lambda: periods.early_then_sparse(1, -1, 1), ValueError, "until must be"),
        (lambda: periods.early_then_sparse(1, 1, 0), ValueError, "sparse must be"),
        (lambda: periods.stop_after(-1, never), ValueError, "t must be"),
        (lambda: periods.stop_after(1.5, never), TypeError, "t must be"),
        (lambda: periods.stop_after(3, 10), TypeError, "rule must be"),
        (lambda: periods.stop_after(3, periods.every), TypeError, "rule must be"),
        (lambda: periods.when_linearisation_error(-0.1), ValueError, "bound must be"),
        (lambda: periods.when_linearisation_error(float("nan")), ValueError, "bound must be"),
        (lambda: periods.when_linearisation_error("0.1"), TypeError, "bound must be"),
        (lambda: periods.when_kernel_drifts(-0.1, PROBE), ValueError, "bound must be"),
        (lambda: periods.when_kernel_drifts(0.1, PROBE, probes=0), ValueError, "probes must be"),
        (lambda: periods.when_kernel_drifts(0.1, PROBE, probes=2.0), TypeError, "probes must be"),
        (lambda: linearising(periods.every), TypeError, "period must be a rule"),
    ],
)
def test_wrong_arguments(make, error, name):
    with pytest.raises(error, match=name):
        make()
