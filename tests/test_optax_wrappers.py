"""Both transforms inside optax's wrappers, each run against the same run by hand in NumPy.

The model is a sum of two exponentials with its Jacobian written out, and ``Hand`` takes the steps of the transforms
with it; what a wrapper adds (an average, a mask, an interpolation) is a few lines of NumPy in its test.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gn_linear as gnl
from tests.support import assert_bit_equal, flat, tolerance

DAMPING = 0.1
RATE = 0.1
EXACT = gnl.solvers.CG(max_steps=30, rtol=float(jnp.finfo(jnp.float64).eps), progress=0.0)
LANCZOS = gnl.solvers.Lanczos(4, rtol=0.0, in_outputs=True)
SQUARED = gnl.losses.squared_error
GAUSS_NEWTON, PATH, BLOCKS = "gauss_newton", "lanczos, path", "first order"
FACTORS, LEAST = (0.5, 1.0, 4.0), 0.5
LINEARISED = ("linearised_sgd", "linearised_adam")
TRANSFORMS = (GAUSS_NEWTON, *LINEARISED)

rng = np.random.default_rng(5)
# Each batch holds times and values; a batch is a tuple of inputs and targets.
BATCHES = [(np.sort(rng.uniform(0, 2, 5)), rng.normal(1, 0.5, 5)) for _ in range(6)]
WHOLE = tuple(np.concatenate(parts) for parts in zip(*BATCHES[:3], strict=True))
BROKEN = (np.full(5, np.nan), BATCHES[0][1])
START = {"a": jnp.array([1.0, 0.5]), "k": jnp.array([0.5, 2.0])}
ALL = np.ones(4, bool)
ONLY_A = np.array([True, True, False, False])
TRAIN_A = {"a": True, "k": False}
PART_LABELS = {"a": "train", "k": "rest"}


def predict(params, t):
    return jnp.exp(-t[:, None] * params["k"]) @ params["a"]


# --- the same by hand ------------------------------------------------------------------------------------------------


def outputs(theta, t):
    return np.exp(-np.outer(t, theta[2:])) @ theta[:2]


def jacobian(theta, t):
    decay = np.exp(-np.outer(t, theta[2:]))
    return np.hstack([decay, -t[:, None] * decay * theta[:2]])


def value(theta, batch):
    t, y = batch
    return np.mean((outputs(theta, t) - y) ** 2) / 2


def gradient(theta, batch):
    t, y = batch
    return jacobian(theta, t).T @ (outputs(theta, t) - y) / len(t)


class Hand:
    """The steps of a transform, in NumPy, with its memory; only the entries that are ``free`` move."""

    def __init__(self, name, free=ALL, period=2, damping=DAMPING, l2=0.0):
        self.name, self.free, self.period, self.damping = name, free, period, damping
        self.l2 = np.broadcast_to(l2, 4)
        self.count, self.anchor, self.moments = 0, None, (0.0, 0.0)
        self.trace, self.centre, self.scale = 0.0, 1.0, None

    def __call__(self, theta, batch, rhs=None, curvature=None):
        step = np.zeros_like(theta)
        if self.name not in LINEARISED:
            j = jacobian(theta, (curvature or batch)[0])[:, self.free]
            b = (gradient(theta, batch) if rhs is None else rhs)[self.free]
            if not np.all(np.isfinite(b)):
                self.centre *= max(FACTORS)
                return step
            ggn = j.T @ j / len(j) + np.diag(self.l2[self.free])
            if self.name == GAUSS_NEWTON:
                step[self.free] = -np.linalg.solve(ggn + self.damping * np.eye(len(b)), b)
            elif self.name == BLOCKS:
                step[self.free] = self.block(ggn, b)
            else:
                step[self.free] = self.best(ggn, b, theta, batch)
            return step
        step[self.free] = self.inner((self.linearised_gradient(theta, batch) + self.l2 * theta)[self.free])
        return step

    def block(self, ggn, b):
        """Three steps of gradient descent with momentum."""
        d = np.zeros_like(b)
        for _ in range(3):
            self.trace = 0.5 * self.trace + b + ggn @ d
            d = d - RATE * self.trace
        return d

    def best(self, ggn, b, theta, batch):
        """The step of the path after which the objective is lowest."""

        def objective(d):
            point = theta.copy()
            point[self.free] += d
            return value(point, batch) + self.l2[self.free] @ point[self.free] ** 2 / 2

        none = np.zeros_like(b)
        if self.scale is None:
            self.scale = max(b @ ggn @ b / (b @ b), b @ b / (2 * objective(none)))
        multiples = np.maximum(np.array(FACTORS) * self.centre, LEAST)
        assert LEAST * self.scale >= DAMPING  # what the tolerances count on
        steps = [-np.linalg.solve(ggn + multiple * self.scale * np.eye(len(b)), b) for multiple in multiples]
        rest = b - (gradient(theta, batch) + self.l2 * theta)[self.free]
        gains = [objective(none) - objective(d) - rest @ d for d in steps]
        chosen = np.argmax(gains)
        assert gains[chosen] > 0  # else it would be halved
        self.centre = multiples[chosen]
        return steps[chosen]

    def linearised_gradient(self, theta, batch):
        t, y = batch
        if self.count % self.period == 0:
            self.anchor = theta
        self.count += 1
        j = jacobian(self.anchor, t)
        return j.T @ (outputs(self.anchor, t) + j @ (theta - self.anchor) - y) / len(t)

    def inner(self, g):
        if self.name == "linearised_sgd":
            return -RATE * g
        m, v = 0.9 * self.moments[0] + 0.1 * g, 0.999 * self.moments[1] + 0.001 * g**2
        self.moments = m, v
        return -RATE * (m / (1 - 0.9**self.count)) / (np.sqrt(v / (1 - 0.999**self.count)) + 1e-8)


def hand_run(name, batches, **options):
    """The parameters after each batch."""
    theta, take, path = flat(START), Hand(name, **options), []
    for batch in batches:
        theta = theta + take(theta, batch)
        path.append(theta)
    return path


# --- the same by the package -----------------------------------------------------------------------------------------


def path_of_dampings(initial=1.0):
    return gnl.damping.Path(FACTORS, initial=initial, minimum=LEAST)


def blocks(**options):
    return gnl.solvers.FirstOrder(optax.sgd(RATE, momentum=0.5), 3, **options)


NEWTON = {
    GAUSS_NEWTON: {"solver": EXACT, "damping": DAMPING},
    PATH: {"solver": LANCZOS, "damping": path_of_dampings()},
    BLOCKS: {"solver": blocks(), "damping": 0.0},
}


def make(name, **options):
    if name not in LINEARISED:
        return gnl.gauss_newton(predict, SQUARED, **{**NEWTON[name], **options})
    inner = optax.sgd(RATE) if name == "linearised_sgd" else optax.adam(RATE)
    return optax.chain(gnl.iterative_linearisation(predict, SQUARED, **{"period": 2, **options}), inner)


def stepper(optimiser, full_params=False):
    """One jitted step on a batch: new parameters, state, update, incoming gradient."""

    @jax.jit
    def step(params, state, batch, **extra):
        x, y = batch
        grads = jax.grad(lambda p: SQUARED(predict(p, x), y))(params)
        if full_params:
            extra["full_params"] = params
        updates, state = optimiser.update(grads, state, params, inputs=x, targets=y, **extra)
        return optax.apply_updates(params, updates), state, updates, grads

    return step


def start(optimiser, **options):
    return START, optimiser.init(START), stepper(optimiser, **options)


def run(optimiser, batches, *, extra=None, **options):
    """The parameters after each batch, and the last state."""
    params, state, step = start(optimiser, **options)
    path = []
    for batch in batches:
        params, state, _, _ = step(params, state, batch, **(extra or {}))
        path.append(params)
    return path, state


def assert_near(got, want, steps=1, dtype=np.float64):
    """Entries of size 1, some steps each a solve of a condition below the largest one that the damping allows."""
    bound = steps * tolerance(dtype, size=4, condition=1 + 4 * max(1, np.max(np.abs(want))) ** 2 / DAMPING)
    error = np.max(np.abs(flat(got) - np.asarray(want)))
    assert error <= bound, f"{error:.2e} > {bound:.2e}: {flat(got)} against {want}"
    assert bound < 1e-8 or dtype != np.float64


def assert_path(path, want):
    for t, (got, expected) in enumerate(zip(path, want, strict=True)):
        assert_near(got, expected, t + 1)
    assert np.max(np.abs(want[-1] - flat(START))) > 1e-3  # the run went somewhere


def test_gradient_by_hand():
    """The oracle itself, against JAX."""
    x, y = BATCHES[0]
    assert_near(jax.grad(lambda p: SQUARED(predict(p, x), y))(START), gradient(flat(START), BATCHES[0]))


# --- wrappers that change nothing ------------------------------------------------------------------------------------


def injected(name):
    """The transform made by inject_hyperparams; the optimiser behind it stays outside."""
    if name == GAUSS_NEWTON:
        factory = optax.inject_hyperparams(gnl.gauss_newton, static_args=("predict", "loss"))
        return factory(predict, SQUARED, solver=EXACT, damping=DAMPING)
    if name == PATH:
        return optax.inject_hyperparams(lambda initial: make(name, damping=path_of_dampings(initial)))(initial=1.0)
    if name == BLOCKS:
        return optax.inject_hyperparams(lambda proximal: make(name, solver=blocks(proximal=proximal)))(proximal=0.0)
    factory = optax.inject_hyperparams(gnl.iterative_linearisation, static_args=("predict", "loss"))
    return optax.chain(factory(predict, SQUARED, period=2), optax.sgd(RATE) if "sgd" in name else optax.adam(RATE))


def observed(transform):
    return optax.chain(optax.named_chain(("ours", transform), ("size", optax.monitor({"size": optax.tree.norm}))))


CHAIN = "chain, named_chain, monitor"
TRANSPARENT = {
    CHAIN: lambda name: observed(make(name)),
    "MultiSteps of 1": lambda name: optax.MultiSteps(make(name), 1, accumulator_dtype=jnp.float64),
    "inject_hyperparams": injected,
    "flatten": lambda name: optax.flatten(make(name)),
}


PAIRS = [(wrapper, name) for wrapper in TRANSPARENT for name in (GAUSS_NEWTON, "linearised_adam")]
PAIRS += [(wrapper, name) for wrapper in (CHAIN, "inject_hyperparams") for name in (PATH, BLOCKS)]


@pytest.mark.parametrize(("wrapper", "name"), PAIRS)
def test_wrapper_changes_nothing(wrapper, name):
    path, state = run(TRANSPARENT[wrapper](name), BATCHES, full_params=wrapper == "flatten")
    assert_path(path, hand_run(name, BATCHES))
    if name in NEWTON:
        assert gnl.info(state).accepted
        return
    assert gnl.info(state).feature_updates == 3
    assert_bit_equal(gnl.anchor(state, full_params=START), path[3])


@pytest.mark.parametrize("name", [GAUSS_NEWTON, "linearised_sgd"])
def test_flatten_without_full_params_says_so(name):
    """The model is called on a vector; what it makes of that is its own error, with a note."""
    optimiser, (x, y) = optax.flatten(make(name)), BATCHES[0]
    with pytest.raises(TypeError, match="string indexing") as error:
        optimiser.update(START, optimiser.init(START), START, inputs=x, targets=y)
    assert any("full_params=params" in note for note in getattr(error.value, "__notes__", []))
    part = optax.partition({"train": optax.flatten(make(name)), "rest": optax.set_to_zero()}, PART_LABELS)
    with pytest.raises(TypeError, match="string indexing"):  # there nothing says which part the vector is
        part.update(START, part.init(START), START, inputs=x, targets=y, full_params=START)


def test_transforms_take_extra_arguments():
    for transform in (make(GAUSS_NEWTON), gnl.iterative_linearisation(predict, SQUARED, period=2)):
        assert optax.with_extra_args_support(transform) is transform


# --- a part of the parameters ----------------------------------------------------------------------------------------

PARTS = {
    "partition": lambda t: optax.partition({"train": t, "rest": optax.set_to_zero()}, PART_LABELS),
    "selective_transform": lambda t: optax.selective_transform(t, freeze_mask={"a": False, "k": True}),
    "masked": lambda t: optax.chain(optax.masked(t, TRAIN_A), optax.freeze({"a": False, "k": True})),
}


@pytest.mark.parametrize(
    ("wrapper", "name"),
    [
        ("partition", GAUSS_NEWTON),
        ("partition", "linearised_adam"),
        ("partition", PATH),
        ("partition", BLOCKS),
        ("masked", GAUSS_NEWTON),
        ("masked", PATH),
        ("masked", BLOCKS),
        ("masked", "linearised_adam"),
        ("selective_transform", "linearised_adam"),
    ],
)
def test_part_of_the_parameters(wrapper, name):
    optimiser = PARTS[wrapper](make(name, l2={"a": 0.2, "k": 7.0}))
    path, state = run(optimiser, BATCHES, full_params=True)
    assert_path(path, hand_run(name, BATCHES, free=ONLY_A, l2=[0.2, 0.2, 7.0, 7.0]))
    assert_bit_equal(path[-1]["k"], START["k"])
    x, y = BATCHES[0]
    with pytest.raises(ValueError, match=r"full_params is missing: params come without \['k'\]"):
        optimiser.update(START, optimiser.init(START), START, inputs=x, targets=y)
    if name in LINEARISED:  # six steps at period 2: the anchor is where the fifth step started
        assert isinstance(gnl.anchor(state)["k"], optax.MaskedNode)
        anchor = gnl.anchor(state, full_params=path[-1])
        assert_bit_equal(anchor, {"a": path[3]["a"], "k": START["k"]})
        jax.eval_shape(gnl.linearised(predict, anchor), path[-1], x)


@pytest.mark.parametrize("name", [GAUSS_NEWTON, "linearised_sgd"])
def test_full_params_must_be_whole(name):
    """With ``mask_compatible_extra_args`` optax masks them too."""
    optimiser = optax.masked(make(name), TRAIN_A, mask_compatible_extra_args=True)
    x, y = BATCHES[0]
    with pytest.raises(ValueError, match=r"full_params.*\['k'\].*mask_compatible_extra_args"):
        optimiser.update(START, optimiser.init(START), START, inputs=x, targets=y, full_params=START)


def test_masked_hands_on_the_gradient_of_the_rest():
    """What is masked out comes back as it went in, and a gradient is no descent step."""
    params, state, step = start(optax.masked(make("linearised_sgd"), TRAIN_A), full_params=True)
    _, _, updates, grads = step(params, state, BATCHES[0])
    assert_bit_equal(updates["k"], grads["k"])
    assert_near(updates["a"], Hand("linearised_sgd", free=ONLY_A)(flat(START), BATCHES[0])[:2])


def test_two_parts_have_a_transform_each():
    """Both see the same parameters, so that the steps are those of a block-diagonal method."""
    labels = {"a": "first", "k": "second"}
    optimiser = optax.partition({"first": make(GAUSS_NEWTON), "second": make("linearised_adam")}, labels)
    path, state = run(optimiser, BATCHES, full_params=True)
    theta, first, second = flat(START), Hand(GAUSS_NEWTON, free=ONLY_A), Hand("linearised_adam", free=~ONLY_A)
    want = []
    for batch in BATCHES:
        # the linearised model is frozen in a, which moves beside it: it is linearised in k alone
        want.append(theta + first(theta, batch) + block_step(second, theta, batch))
        theta = want[-1]
    assert_path(path, want)
    with pytest.raises(ValueError, match="several"):
        gnl.info(state)
    assert gnl.info(state.inner_states["first"]).accepted
    assert gnl.info(state.inner_states["second"]).feature_updates == 3


def block_step(hand, theta, batch):
    """A linearised step of k alone, the anchor's a being the present one."""
    t, y = batch
    if hand.count % hand.period == 0:
        hand.anchor = theta
    hand.count += 1
    at = np.where(hand.free, hand.anchor, theta)
    j = jacobian(at, t)
    step = np.zeros_like(theta)
    step[hand.free] = hand.inner((j.T @ (outputs(at, t) + j @ (theta - at) - y) / len(t))[hand.free])
    return step


@pytest.mark.parametrize("name", [GAUSS_NEWTON, "linearised_sgd"])
def test_freeze_behind_cuts_the_whole_step(name):
    """For Gauss-Newton that is not the step of the free part: the frozen part was counted on to move too."""
    params, state, step = start(optax.chain(make(name), optax.freeze({"a": False, "k": True})))
    new, _, updates, _ = step(params, state, BATCHES[0])
    assert_bit_equal(new["k"], START["k"])
    whole, part = (Hand(name, free=free)(flat(START), BATCHES[0])[:2] for free in (ALL, ONLY_A))
    assert_near(updates["a"], whole)
    gap = np.max(np.abs(whole - part))
    assert gap > 1e-2 if name == GAUSS_NEWTON else gap == 0


def test_freeze_in_front_freezes_nothing():
    """A zero gradient of k is another right-hand side for gauss_newton, and is replaced by the linearised one."""
    for name in (GAUSS_NEWTON, "linearised_sgd"):
        params, state, step = start(optax.chain(optax.freeze({"a": False, "k": True}), make(name)))
        new, _, updates, _ = step(params, state, BATCHES[0])
        rhs = np.where(ONLY_A, gradient(flat(START), BATCHES[0]), 0.0)
        assert_near(updates, Hand(name)(flat(START), BATCHES[0], rhs=rhs))
        assert np.all(np.abs(flat(new["k"]) - flat(START["k"])) > 1e-4)


# --- inject_hyperparams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [EXACT, LANCZOS])
def test_injected_numbers_change_without_a_new_trace(solver):
    factory = optax.inject_hyperparams(gnl.gauss_newton, static_args=("predict", "loss"))
    optimiser = factory(predict, SQUARED, solver=solver, damping=DAMPING, learning_rate=0.5, l2=0.2)
    params, state, step = start(optimiser)
    assert set(state.hyperparams) == {"damping", "learning_rate", "l2"}
    for damping, rate, l2 in ((DAMPING, 0.5, 0.2), (0.7, 1.0, 0.0), (0.4, 0.25, 3.0)):
        for key, number in (("damping", damping), ("learning_rate", rate), ("l2", l2)):
            state.hyperparams[key] = jnp.asarray(number)
        theta = flat(params)
        j = jacobian(theta, BATCHES[0][0])
        matrix = j.T @ j / len(j) + (l2 + damping) * np.eye(4)
        want = theta - rate * np.linalg.solve(matrix, gradient(theta, BATCHES[0]))
        params, state, _, _ = step(params, state, BATCHES[0])
        assert_near(params, want)
        assert gnl.info(state).damping == damping
    assert step._cache_size() == 1
    with pytest.raises(ValueError, match=r"state\.damping\.multiple is nothing"):  # it sets the policy's state as well
        step(params, optax.tree_utils.tree_set(state, damping=jnp.asarray(0.1)), BATCHES[0])


def test_injected_schedules_of_learning_rate_and_damping():
    """A schedule of ``damping`` is absolute here; ``gnl.damping.Schedule`` counts in multiples of the curvature."""
    factory = optax.inject_hyperparams(gnl.gauss_newton, static_args=("predict", "loss"))
    rates, dampings = optax.linear_schedule(1.0, 0.0, 4), optax.exponential_decay(1.0, 1, 0.5)
    optimiser = factory(predict, SQUARED, solver=EXACT, damping=dampings, learning_rate=rates)
    path, state = run(optimiser, BATCHES[:4])
    theta, want = flat(START), []
    for t, batch in enumerate(BATCHES[:4]):
        theta = theta + (1 - t / 4) * Hand(GAUSS_NEWTON, damping=0.5**t)(theta, batch)
        want.append(theta)
    assert_path(path, want)
    assert state.hyperparams["learning_rate"] == 0.25


def test_injected_period_changes_without_a_new_trace():
    params, state, step = start(injected("linearised_sgd"))
    ages = []
    for t in range(8):
        if t == 4:
            state = optax.tree_utils.tree_set(state, period=jnp.asarray(3))
        params, state, _, _ = step(params, state, BATCHES[0])
        ages.append(int(gnl.info(state).age))
    assert ages == [0, 1, 0, 1, 2, 0, 1, 2]
    assert step._cache_size() == 1


def test_injected_period_schedule():
    factory = optax.inject_hyperparams(gnl.iterative_linearisation, static_args=("predict", "loss"))
    first = factory(predict, SQUARED, period=lambda count: jnp.where(count < 3, 1, 3))
    params, state, step = start(optax.chain(first, optax.sgd(RATE)))
    theta, take = flat(START), Hand("linearised_sgd")
    ages = []
    for t, batch in enumerate([*BATCHES, *BATCHES[:2]]):
        if t in (0, 1, 2, 5):  # three steps of period 1, and the block that the third began lasts three steps
            take.count = 0
        take.period = 100
        theta = theta + take(theta, batch)
        params, state, _, _ = step(params, state, batch)
        assert_near(params, theta, t + 1)
        ages.append(int(gnl.info(state).age))
    assert ages == [0, 0, 0, 1, 2, 0, 1, 2]


def test_injected_period_schedule_of_floats_is_an_error():
    """Checked under jit, where optax evaluates the schedule on a traced count."""
    factory = optax.inject_hyperparams(inspect.unwrap(gnl.iterative_linearisation), static_args=("predict", "loss"))
    transform = factory(predict, SQUARED, period=optax.linear_schedule(1, 8, 4))
    with pytest.raises(TypeError, match=r"period must be an int.*schedule must return integers"):
        transform.init(START)
    x, y = BATCHES[0]
    sound = factory(predict, SQUARED, period=3).init(START)
    state = sound._replace(hyperparams_states={"period": optax.WrappedSchedule(lambda t: t).init()})
    with pytest.raises(TypeError, match=r"period must be an int.*schedule must return integers"):
        jax.jit(transform.update)(START, state, START, inputs=x, targets=y)


# --- MultiSteps ------------------------------------------------------------------------------------------------------


@functools.cache
def accumulating(name, period=2):
    inner = make(name) if name == GAUSS_NEWTON else make(name, period=period)
    return start(optax.MultiSteps(inner, 3, accumulator_dtype=jnp.float64))


def mean_gradient(theta, batches):
    return np.mean([gradient(theta, batch) for batch in batches], axis=0)


def emissions(name, batches, extra=lambda t: {}):
    """Parameters and info after each emission; checks that nothing moves in between."""
    params, state, step = accumulating(name)
    for t, batch in enumerate(batches):
        new, after, updates, _ = step(params, state, batch, **extra(t))
        if t % 3 < 2:
            assert_bit_equal(new, params)
            assert not np.any(flat(updates))
            assert_bit_equal(after.inner_opt_state, state.inner_opt_state)
        else:
            assert after.gradient_step == state.gradient_step + 1
            yield new, gnl.info(after)
        params, state = new, after


def test_multi_steps_averages_the_gradient_and_takes_the_curvature_of_the_last_batch():
    """So is the gain ratio, of the objective on the last batch plus the inner product that the gradient adds."""
    theta = flat(START)
    for block, (params, info) in enumerate(emissions(GAUSS_NEWTON, BATCHES)):
        batches = BATCHES[3 * block : 3 * block + 3]
        mean = mean_gradient(theta, batches)
        step = Hand(GAUSS_NEWTON)(theta, batches[-1], rhs=mean)
        before, after = value(theta, batches[-1]), value(theta + step, batches[-1])
        j = jacobian(theta, batches[-1][0])
        assert_near(params, theta + step, block + 1)
        assert_near(info.loss, before, block + 1)
        actual = before - after - (mean - gradient(theta, batches[-1])) @ step
        assert_near(info.actual_reduction, actual, block + 1)
        assert_near(info.predicted_reduction, -mean @ step - step @ j.T @ j @ step / (2 * len(j)), block + 1)
        theta = flat(params)
    assert block == 1


@pytest.mark.parametrize("keywords", [("inputs", "targets"), ("curvature_inputs", "curvature_targets")])
def test_multi_steps_with_the_whole_batch(keywords):
    """As ``curvature_inputs`` it makes the step the full-batch step; as ``inputs`` the judgement too."""
    theta = flat(START)
    optimiser = optax.MultiSteps(make(GAUSS_NEWTON), 3, accumulator_dtype=jnp.float64)

    @jax.jit
    def update(grads, state, params, batch):
        extra = {"inputs": batch[0], "targets": batch[1], **dict(zip(keywords, WHOLE, strict=True))}
        return optimiser.update(grads, state, params, **extra)

    state = optimiser.init(START)
    for x, y in BATCHES[:3]:
        grads = jax.grad(lambda p, x=x, y=y: SQUARED(predict(p, x), y))(START)
        updates, state = update(grads, state, START, (x, y))
    want = Hand(GAUSS_NEWTON)(theta, WHOLE)
    assert_near(updates, want)
    judged = WHOLE if keywords[0] == "inputs" else BATCHES[2]
    assert_near(gnl.info(state).loss, value(theta, judged))
    whole = value(theta, WHOLE) - value(theta + want, WHOLE)
    assert (abs(gnl.info(state).actual_reduction - whole) < tolerance(np.float64)) == (keywords[0] == "inputs")


@pytest.mark.parametrize("name", LINEARISED)
def test_multi_steps_around_a_linearisation_keeps_only_the_last_batch(name):
    """The incoming gradient is replaced, its average too; the period counts emissions."""
    want = hand_run(name, [BATCHES[2], BATCHES[5], BATCHES[1]])
    runs = list(emissions(name, [*BATCHES, *BATCHES[3:5], BATCHES[1]]))
    assert_path([params for params, _ in runs], want)
    assert [int(info.age) for _, info in runs] == [0, 1, 0]


def test_multi_steps_behind_a_linearisation_averages_its_gradients():
    """The way to accumulate: equal batches give the full-batch step. The period counts micro-batches."""
    behind = optax.MultiSteps(optax.sgd(RATE), 3, accumulator_dtype=jnp.float64)
    optimiser = optax.chain(gnl.iterative_linearisation(predict, SQUARED, period=6), behind)
    path, _ = run(optimiser, [*BATCHES[:3], *BATCHES[:3], *BATCHES[:3]])
    assert_path(path[2::3], hand_run("linearised_sgd", [WHOLE] * 3, period=2))
    for t in (0, 1, 3, 4):
        assert_bit_equal(path[t], path[t - 1] if t else START)


def test_multi_steps_updates_the_inner_transform_at_every_micro_batch():
    """What it does not emit it throws away: accumulating saves memory, not time."""
    runs = []

    def counted(params, t):
        jax.debug.callback(lambda: runs.append(1))
        return predict(params, t)

    optimiser = optax.MultiSteps(gnl.gauss_newton(counted, SQUARED, solver=EXACT, damping=DAMPING), 3)
    state, update = optimiser.init(START), jax.jit(optimiser.update)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.acc_grads)} == {np.dtype(np.float32)}  # its default
    counts = []
    for x, y in BATCHES[:3]:
        _, state = update(START, state, START, inputs=x, targets=y)
        jax.effects_barrier()
        counts.append(len(runs))
    assert counts[0] > 0
    assert counts == [counts[0], 2 * counts[0], 3 * counts[0]]


@pytest.mark.parametrize("name", [*NEWTON, "linearised_sgd"])
def test_multi_steps_skips_what_is_not_finite(name):
    wrapped = optax.MultiSteps(
        make(name), 2, should_skip_update_fn=optax.skip_not_finite, accumulator_dtype=jnp.float64
    )
    path, state = run(wrapped, [BATCHES[0], BROKEN, BATCHES[1]])
    assert_bit_equal(path[1], START)
    take = Hand(name)
    assert_near(path[2], flat(START) + take(flat(START), BATCHES[1], rhs=mean_gradient(flat(START), BATCHES[:2])))
    assert not state.skip_state["should_skip"]
    if name in NEWTON:
        assert gnl.info(state).skipped == 0


def test_multi_steps_without_the_guard_never_recovers():
    """One NaN stays in its running mean (zero times NaN); ``gauss_newton`` refuses each emission and says so."""
    runs = list(emissions(GAUSS_NEWTON, [BATCHES[0], BROKEN, BATCHES[2], *BATCHES[3:]]))
    for block, (params, info) in enumerate(runs):
        assert_bit_equal(params, START)
        assert (info.accepted, info.skipped) == (False, block + 1)


def test_gradient_transformation_of_multi_steps_drops_the_batch():
    wrapped = optax.MultiSteps(make(GAUSS_NEWTON), 1, accumulator_dtype=jnp.float64)
    x, y = BATCHES[0]
    chain = optax.chain(wrapped.gradient_transformation())
    with pytest.raises(TypeError, match=r"inputs is missing.*with_batch"):
        chain.update(START, chain.init(START), START, inputs=x, targets=y)
    path, _ = run(optax.chain(optax.GradientTransformationExtraArgs(wrapped.init, wrapped.update)), BATCHES[:1])
    assert_path(path, hand_run(GAUSS_NEWTON, BATCHES[:1]))


# --- conditions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEWTON)
def test_apply_if_finite_and_refusal_of_gauss_newton(name):
    """A NaN gradient is kept from the transform, until it gives up; then the transform refuses by itself."""
    params, state, step = start(optax.apply_if_finite(make(name), max_consecutive_errors=2))
    for bad in range(1, 4):
        before = state
        params, state, _, _ = step(params, state, BROKEN)
        assert_bit_equal(params, START)
        assert state.total_notfinite == bad
        if bad < 3:
            assert_bit_equal(state.inner_state, before.inner_state)
    assert (gnl.info(state).skipped, gnl.info(state).accepted) == (1, False)
    params, state, _, _ = step(params, state, BATCHES[0])
    assert_near(params, hand_run(name, [BROKEN, BATCHES[0]])[1])
    assert (gnl.info(state).accepted, state.notfinite_count) == (True, 0)


def wanted(step, *, wanted, inputs, **others):
    """A condition on the step, on an argument of its own, and on the batch."""
    del others
    return wanted & (step != 2) & jnp.all(inputs >= 0)


@pytest.mark.parametrize("name", [GAUSS_NEWTON, "linearised_adam"])
@pytest.mark.parametrize("wrapper", [optax.conditionally_mask, optax.conditionally_transform])
def test_conditions_see_the_batch(wrapper, name):
    """Where the condition fails the state stays; the update is zero, or with transform the gradient itself."""
    params, state, step = start(wrapper(make(name), wanted, forward_extra_args=True))
    theta, take = flat(START), Hand(name)
    for t, (batch, flag) in enumerate(zip(BATCHES, (True, False, True, True, True, True), strict=True)):
        batch = (-batch[0], batch[1]) if t == 4 else batch
        before = state
        new, state, updates, grads = step(params, state, batch, wanted=jnp.asarray(flag))
        if t in (1, 2, 4):
            assert_bit_equal(state.inner_state, before.inner_state)
            zeros = jax.tree.map(jnp.zeros_like, grads)
            assert_bit_equal(updates, zeros if wrapper is optax.conditionally_mask else grads)
        else:
            theta = flat(params) + take(flat(params), batch)
            assert_near(new, theta, t + 1)
            params = new  # what a rejected step does to the parameters is not followed here


# --- schedule_free, mechanize ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TRANSFORMS, BLOCKS])
def test_schedule_free(name):
    """Its params are where gradients are taken; the average to evaluate is apart. Steps start from z, not from them."""
    b1 = 0.8
    optimiser = optax.contrib.schedule_free(make(name), learning_rate=1.0, b1=b1)
    params, state, step = start(optimiser)
    x = z = y = flat(START)
    take = Hand(name)
    for t, batch in enumerate(BATCHES):
        z = z + take(y, batch)
        x = x + (z - x) / (t + 1)
        y = b1 * x + (1 - b1) * z
        params, state, _, _ = step(params, state, batch)
        assert_near(params, y, t + 1)
        assert_near(state.z, z, t + 1)
        assert_near(optax.contrib.schedule_free_eval_params(state, params), x, (t + 1) / b1)
    assert np.max(np.abs(x - y)) > 1e-4
    if name in LINEARISED:
        assert_near(gnl.anchor(state), take.anchor, 6)


@pytest.mark.parametrize("name", [GAUSS_NEWTON, "linearised_sgd"])
def test_mechanize(name):
    """The distance from the start is the sum of the transform's steps, times a scale that it learns."""
    path, _ = run(optax.contrib.mechanize(make(name), s_init=0.1, num_betas=2), BATCHES[:4])
    eps, s_init = 1e-8, 0.1
    betas = np.array([0.9, 0.99])
    r = v = m = np.zeros(2)
    s = np.full(2, s_init)
    first = theta = flat(START)
    take, total, want = Hand(name), np.zeros(4), []
    for batch in BATCHES[:4]:
        g, before = gradient(theta, batch), (first - theta) / (s.sum() + eps)
        g = g + 0.01 * s.sum() * np.linalg.norm(g) / (np.linalg.norm(theta) + eps) * theta
        total = before - take(theta, batch)
        h = g @ before
        clipped = np.clip(h, -m, m)
        m, v = np.maximum(betas * m, abs(h) + eps), betas**2 * v + h**2
        r = betas * r + clipped * s
        s = (s_init / 2 * m + np.maximum(0, r)) / (np.sqrt(v) + eps)
        theta = first - s.sum() * total
        want.append(theta)
    assert_path(path, want)


# --- what stands behind ----------------------------------------------------------------------------------------------


def test_transforms_behind_act_on_a_refused_step_too():
    """The refused update is zero; decay and averages of earlier updates still move the parameters."""
    optimisers = {
        "decay": optax.add_decayed_weights(-0.1),  # behind the sign of the step is turned already
        "ema": optax.ema(0.5, debias=False),
    }
    for behind, transform in optimisers.items():
        path, state = run(optax.chain(make(GAUSS_NEWTON), transform), [BATCHES[0], BROKEN])
        theta = flat(START)
        step = Hand(GAUSS_NEWTON)(theta, BATCHES[0])
        first, rest = {
            "decay": lambda s: (s - 0.1 * flat(START), None),
            "ema": lambda s: (0.5 * s, 0.25 * s),
        }[behind](step)
        rest = -0.1 * (theta + first) if rest is None else rest
        assert (gnl.info(state).accepted, gnl.info(state).skipped) == (False, 1)
        assert_near(path[0], theta + first)
        assert_near(path[1], theta + first + rest)
        assert np.max(np.abs(rest)) > 1e-3


@pytest.mark.parametrize("name", [GAUSS_NEWTON, "linearised_sgd"])
def test_reduce_on_plateau_behind(name):
    """It takes the ``value`` that ours ignore; Gauss-Newton judges the step before it is scaled."""
    optimiser = optax.chain(make(name), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    params, state, step = start(optimiser)
    theta, take = flat(START), Hand(name)
    values, scales = (5.0, 4.0, 4.0, 3.0, 3.0, 3.0), (1, 1, 0.5, 0.5, 0.25, 0.125)
    for t, (batch, given, scale) in enumerate(zip(BATCHES, values, scales, strict=True)):
        whole = take(theta, batch)
        theta = theta + scale * whole
        params, state, _, _ = step(params, state, batch, value=given)
        assert_near(params, theta, t + 1)
        if name == GAUSS_NEWTON:
            assert_near(gnl.info(state).step_norm, np.linalg.norm(whole), t + 1)


# --- a wrapper that takes no extra arguments --------------------------------------------------------------------------


def pair_predict(params, t):
    """The exponentials again: amplitudes as the real, rates as the imaginary parts of a complex array."""
    return jnp.exp(-t[:, None] * params.imaginary) @ params.real


@pytest.mark.parametrize("name", [GAUSS_NEWTON, "linearised_sgd"])
def test_split_real_and_imaginary(name):
    """It hands no batch on, so it goes around ``with_batch``; complex gradients of JAX are to be conjugated."""
    if name == GAUSS_NEWTON:
        inner = gnl.gauss_newton(pair_predict, SQUARED, solver=EXACT, damping=DAMPING)
    else:
        inner = optax.chain(gnl.iterative_linearisation(pair_predict, SQUARED, period=2), optax.sgd(RATE))

    @jax.jit
    def step(params, state, batch):
        x, y = batch
        optimiser = optax.contrib.split_real_and_imaginary(gnl.wrappers.with_batch(inner, inputs=x, targets=y))
        grads = jax.grad(lambda p: SQUARED(jnp.exp(-x[:, None] * p.imag) @ p.real, y))(params)
        updates, state = optimiser.update(grads.conj(), state, params)
        return optax.apply_updates(params, updates), state

    params = START["a"] + 1j * START["k"]
    state, path = optax.contrib.split_real_and_imaginary(inner).init(params), []
    for batch in BATCHES:
        params, state = step(params, state, batch)
        path.append({"a": params.real, "k": params.imag})
    assert params.dtype == np.complex128
    assert_path(path, hand_run(name, BATCHES))


# --- reading and mapping states --------------------------------------------------------------------------------------


def warm(name):
    solvers = {GAUSS_NEWTON: gnl.solvers.CG(warm_start=0.9), BLOCKS: blocks(warm_start=0.9)}
    return make(name, solver=solvers[name]) if name in solvers else make(name)


LIKE_PARAMS = {GAUSS_NEWTON: 1, PATH: 0, BLOCKS: 2, "linearised_adam": 3}


@pytest.mark.parametrize("name", LIKE_PARAMS)
def test_tree_map_params_finds_what_is_like_the_parameters(name):
    """The warm start, the anchor and what inner optimisers keep, and nothing of the rest."""
    optimiser = warm(name)
    state = optimiser.init(START)
    specs = {"a": "spec of a", "k": "spec of k"}
    mapped = optax.tree_utils.tree_map_params(
        optimiser, lambda leaf, spec: spec, state, specs, transform_non_params=lambda leaf: "other"
    )
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    found = [leaf for leaf in jax.tree.leaves(mapped) if leaf != "other"]
    assert found == ["spec of a", "spec of k"] * LIKE_PARAMS[name]
    if name == "linearised_adam":
        assert gnl.anchor(mapped) == specs
    assert_bit_equal(optax.tree_utils.tree_map_params(optimiser, lambda leaf: leaf, state), state)


@pytest.mark.parametrize("name", LIKE_PARAMS)
def test_tree_map_params_inside_partition(name):
    optimiser = PARTS["partition"](warm(name))
    specs = {"a": "spec of a", "k": "spec of k"}
    mapped = optax.tree_utils.tree_map_params(
        optimiser,
        lambda leaf, spec: leaf if isinstance(leaf, optax.MaskedNode) else spec,
        optimiser.init(START),
        specs,
        transform_non_params=lambda leaf: "other",
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    found = [leaf for leaf in jax.tree.leaves(mapped) if leaf != "other"]
    assert found == ["spec of a"] * LIKE_PARAMS[name]


def test_tree_get():
    get = optax.tree_utils.tree_get
    state = optax.chain(optax.clip(1.0), make(GAUSS_NEWTON)).init(START)
    assert get(state, "info") is gnl.info(state)
    assert get(state, "GaussNewtonState") is state[1]
    assert get(state, "gain_ratio") is gnl.info(state).gain_ratio
    with pytest.raises(KeyError, match="multiple values"):  # the policy's state and what info reports
        get(state, "damping")
    ours = get(state, "damping", filtering=lambda path, _: path[-1].tuple_name == "GaussNewtonInfo")
    assert ours is gnl.info(state).damping
    state = make("linearised_adam").init(START)
    assert get(state, "anchor") is gnl.anchor(state)
    assert get(state, "linearisation_error") is gnl.info(state).linearisation_error
    with pytest.raises(KeyError, match="multiple values"):  # Adam counts too
        get(state, "count")
    count = get(state, "count", filtering=lambda path, _: path[-1].tuple_name == "IterativeLinearisationState")
    assert count == 0
