"""What optax asks of contributed optimisers, asked of both transforms: its common test, in the words of least squares.

The targets are sums of squares, so that the loss lies in outputs and ``predict`` is the residual without its constant.
"""

import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gn_linear as gnl
from tests.support import assert_bit_equal, assert_close, flat, tolerance

SQUARED = gnl.losses.squared_error
DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64]
NEWTON = {
    "gauss_newton": {},
    "lanczos, path": {"solver": gnl.solvers.Lanczos(4, in_outputs=True), "damping": gnl.damping.Path()},
    # a rate of 1 where the curvature is 1/2
    "first order": {"solver": gnl.solvers.FirstOrder(optax.sgd(1.0, momentum=0.1), 3), "damping": 0.0},
}
NAMES = ["gauss_newton", "linearised_sgd", "linearised_adam"]


class Target(NamedTuple):
    """A sum of squares with a known minimum, and the condition number of the curvature there."""

    predict: Any
    start: Any
    minimum: Any
    targets: Any
    condition: float


def identity(params, inputs):
    del inputs
    return params


def rosenbrock(params, inputs):
    """The residuals ``1 - p0`` and ``10 (p1 - p0^2)`` up to sign and constant."""
    del inputs
    return jnp.stack([params[0], 10 * (params[1] - params[0] ** 2)])


def parabola(start, minimum):
    return Target(identity, start, minimum, minimum, 1.0)


VALLEY = np.array([[1.0, 0.0], [-20.0, 10.0]])  # the Jacobian of rosenbrock at its minimum
MIXED = (jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]]))
TARGETS = {
    "parabola": parabola(jnp.array([-1.0, 10.0, 1.0]), jnp.array([1.0, -1.0, 1.0])),
    "rosenbrock": Target(
        rosenbrock, jnp.zeros(2), jnp.ones(2), jnp.array([1.0, 0.0]), float(np.linalg.cond(VALLEY.T @ VALLEY))
    ),
    "matrix parabola": parabola(jnp.zeros((2, 2)), jnp.array([[3.0, -2.0], [1.0, 4.0]])),
    "mixed": parabola(jax.tree.map(jnp.zeros_like, MIXED), MIXED),
}


def make(name, predict, period: Any = 5, rate=0.1, **options):
    if name in NEWTON:
        return gnl.gauss_newton(predict, SQUARED, **NEWTON[name], **options)
    inner = (
        optax.sgd(rate) if name == "linearised_sgd" else optax.adam(rate, eps=1e-4)
    )  # its default eps is 0 in float16
    return optax.chain(gnl.iterative_linearisation(predict, SQUARED, period=period, **options), inner)


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def gradient(target, params, targets):
    return jax.grad(lambda p: SQUARED(target.predict(p, None), targets))(params)


def stepper(optimiser, target, **extra):
    @jax.jit
    def step(params, state, targets):
        grads = gradient(target, params, targets)
        updates, state = optimiser.update(grads, state, params, inputs=None, targets=targets, **extra)
        return optax.apply_updates(params, updates), state

    return step


# --- they optimise ---------------------------------------------------------------------------------------------------


def reached(optimiser, target, steps):
    """The end of a run in float32, begun from a state that ``tree_map_params`` has rebuilt."""
    params, targets = cast(target.start, jnp.float32), cast(target.targets, jnp.float32)
    state = optax.tree_utils.tree_map_params(optimiser, lambda leaf: leaf, optimiser.init(params))
    step = stepper(optimiser, target)
    return jax.jit(lambda p, s: jax.lax.scan(lambda carry, _: (step(*carry, targets), None), (p, s), length=steps)[0])(
        params, state
    )


@pytest.mark.parametrize(
    ("name", "which"),
    [
        *(("gauss_newton", which) for which in TARGETS),
        ("lanczos, path", "rosenbrock"),
        ("first order", "mixed"),
    ],
)
def test_gauss_newton_reaches_the_minimum(name, which):
    """All of its digits: where a residual vanishes it has them to the rounding of the outputs."""
    target = TARGETS[which]
    end, state = reached(make(name, target.predict), target, 100)
    # an error of the outputs passes to the parameters by the root of the condition of the curvature
    assert_close(end, target.minimum, condition=np.sqrt(target.condition), scale=10.0)
    assert gnl.info(state).loss <= tolerance(jnp.float32) ** 2 * 10.0**2


# rate and steps of each inner optimiser; the squared error divides by 3, 2 and 2 examples
FIRST_ORDER = {
    ("linearised_sgd", "parabola"): (0.5, 300),
    ("linearised_adam", "parabola"): (0.05, 4000),
    ("linearised_adam", "rosenbrock"): (0.01, 20000),
    ("linearised_sgd", "matrix parabola"): (0.5, 300),
    ("linearised_adam", "mixed"): (0.05, 4000),
}


@pytest.mark.parametrize("period", [1, 7])
@pytest.mark.parametrize(("name", "which"), FIRST_ORDER)
def test_linearisation_with_an_inner_optimiser_reaches_the_minimum(name, which, period):
    """To the 3% that optax asks for; every parabola is its own linearisation."""
    target = TARGETS[which]
    rate, steps = FIRST_ORDER[name, which]
    end, state = reached(make(name, target.predict, period=period, rate=rate), target, steps)
    assert np.max(np.abs(flat(end) - flat(target.minimum))) <= 3e-2
    assert gnl.info(state).feature_updates == -(-steps // period)


# --- extra arguments, compilation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_unknown_extra_arguments_are_let_through(name):
    """And a second run from a fresh state compiles nothing."""
    target = TARGETS["rosenbrock"]
    optimiser = make(name, target.predict)
    ends = []
    for extra in ({}, {"value": 1.0, "an_argument_that_nobody_expects": "at all"}):
        step = stepper(optimiser, target, **extra)
        for _ in range(2):
            params, state = target.start, optimiser.init(target.start)
            for _ in range(2):
                params, state = step(params, state, target.targets)
            ends.append(params)
        assert step._cache_size() == 1
    for end in ends[1:]:
        assert_bit_equal(end, ends[0])
    assert np.any(flat(ends[0]) != flat(target.start))


@pytest.mark.parametrize("name", [*NEWTON, "linearised_sgd"])
def test_jit_eager_and_vmap_agree(name):
    target = TARGETS["mixed"]
    optimiser, targets = make(name, target.predict, period=1, rate=0.5), target.targets
    compiled = stepper(optimiser, target)
    params, state = compiled(target.start, optimiser.init(target.start), targets)
    other_start = jax.tree.map(lambda leaf: leaf + 1, target.start)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), target.start, other_start)
    mapped, _ = jax.jit(jax.vmap(lambda p: compiled(p, optimiser.init(p), targets)))(stacked)
    for index, start in enumerate((target.start, other_start)):
        alone, _ = compiled(start, optimiser.init(start), targets)
        assert_close(jax.tree.map(lambda leaf, index=index: leaf[index], mapped), alone)
    grads = gradient(target, target.start, targets)
    updates, other = optimiser.update(grads, optimiser.init(target.start), target.start, inputs=None, targets=targets)
    assert_close(optax.apply_updates(target.start, updates), params)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)


# --- inject_hyperparams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gauss_newton", "gauss_newton, adaptive", "iterative_linearisation"])
def test_inject_hyperparams_gives_the_same_update_and_state(name):
    target = TARGETS["mixed"]
    factory, options = {
        "gauss_newton": (gnl.gauss_newton, {"damping": 0.1, "learning_rate": 0.5, "l2": 0.2}),
        "gauss_newton, adaptive": (gnl.gauss_newton, {"learning_rate": 0.5, "l2": 0.2}),
        "iterative_linearisation": (gnl.iterative_linearisation, {"period": 3, "l2": 0.2}),
    }[name]
    plain = factory(target.predict, SQUARED, **options)
    injected = optax.inject_hyperparams(factory, static_args=("predict", "loss"))(target.predict, SQUARED, **options)
    grads = gradient(target, target.start, target.targets)
    results = []
    for optimiser in (plain, injected):
        state = jax.jit(optimiser.init)(target.start)
        update = jax.jit(optimiser.update)
        results.append(update(grads, state, target.start, inputs=None, targets=target.targets))
    (want, want_state), (got, got_state) = results
    assert_close(got, want, condition=10.0)
    assert jax.tree.structure(got_state.inner_state) == jax.tree.structure(want_state)
    for a, b in zip(jax.tree.leaves(got_state.inner_state), jax.tree.leaves(want_state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance(jnp.float64, condition=100.0))
    assert set(options) == set(got_state.hyperparams)
    assert np.any(flat(got) != 0)


def test_learning_rate_may_be_a_schedule():
    target = TARGETS["parabola"]
    ends = []
    for rate in (0.25, optax.constant_schedule(0.25)):
        optimiser = make("gauss_newton", target.predict, learning_rate=rate)
        params, state, step = target.start, optimiser.init(target.start), stepper(optimiser, target)
        for _ in range(10):
            params, state = step(params, state, target.targets)
        ends.append(params)
    assert_close(ends[0], ends[1])
    # each step leaves three quarters of the way, and a little more for the damping
    left = np.abs(flat(ends[0]) - flat(target.minimum))[:2] / np.abs(flat(target.start) - flat(target.minimum))[:2]
    assert np.all((left > 0.75**10) & (left < 0.76**10))


# --- dtypes, accumulation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("gauss_newton", jnp.bfloat16),
        ("gauss_newton", jnp.float32),
        ("linearised_sgd", jnp.bfloat16),
        ("linearised_sgd", jnp.float64),
        ("linearised_adam", jnp.float16),
    ],
    ids=str,
)
def test_accumulating_equal_batches_is_the_step_on_one(name, dtype):
    """The dtype is kept, the first emissions are zeros of it, and the mean of equal gradients is that gradient."""
    target = TARGETS["parabola"]
    params, targets = cast(target.start, dtype), cast(target.targets, dtype)
    optimiser = make(name, target.predict)
    wrapped = optax.MultiSteps(optimiser, 2, accumulator_dtype=jnp.promote_types(dtype, jnp.float32))
    want, want_state = stepper(optimiser, target)(params, jax.jit(optimiser.init)(params), targets)
    step, state = stepper(wrapped, target), jax.jit(wrapped.init)(params)
    first, state = step(params, state, targets)
    assert_bit_equal(first, params)
    got, state = step(first, state, targets)
    assert (got.dtype, want.dtype) == (dtype, dtype)
    assert_close(got, want, scale=10.0)
    kinds = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(want_state)]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state.inner_opt_state)] == kinds
    assert np.any(flat(want) != flat(params))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*NEWTON, "linearised_sgd", "linearised_adam"])
def test_a_branch_may_take_the_update_or_leave_it(name, dtype):
    """Both sides of a ``cond`` must have the same types, so shapes, dtypes and weak types are stable."""
    target = TARGETS["parabola"]
    params, targets = cast(target.start, dtype), cast(target.targets, dtype)
    options = {"solver": gnl.solvers.CG(warm_start=0.9)} if name == "gauss_newton" else {}
    optimiser = make(name, target.predict, **options)

    def step(take, params, state):
        grads = gradient(target, params, targets)
        return jax.lax.cond(
            take,
            lambda: optimiser.update(grads, state, params, inputs=None, targets=targets),
            lambda: (params, state),
        )

    state = optimiser.init(params)
    updates, after = jax.eval_shape(step, True, params, state)
    assert updates.dtype == dtype
    again = jax.eval_shape(step, True, params, after)
    assert jax.tree.leaves(again) == jax.tree.leaves((updates, after))


# --- shardings -------------------------------------------------------------------------------------------------------

SCRIPT = """
import functools
import jax, jax.numpy as jnp, numpy as np, optax, sys
import gn_linear as gnl
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

jax.config.update("jax_enable_x64", True)
kind, which = sys.argv[1:]
assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("model",), axis_types=(getattr(AxisType, kind),))
rng = np.random.default_rng(0)
start = {"w": rng.normal(size=(4, 2)), "c": rng.normal(size=(4, 2))}
targets = rng.normal(size=(4, 2))

def predict(p, x):
    return jnp.tanh(p["w"]) * p["c"]  # entry by entry, so that every placement is legal

loss = gnl.losses.squared_error
FAST = {
    "xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
cg = gnl.solvers.CG(rtol=1e-14, progress=0.0, warm_start=0.9)
blocks = gnl.solvers.FirstOrder(optax.adam(0.1), 3, warm_start=0.9)
optimisers = {
    "gauss_newton": [
        gnl.gauss_newton(predict, loss, solver=cg, damping=0.1),
        gnl.gauss_newton(predict, loss, solver=blocks, damping=0.0),
    ],
    "iterative_linearisation": [
        optax.chain(gnl.iterative_linearisation(predict, loss, period=2), optax.adam(0.1)),
    ],
}[which]

def update(optimiser, p, s, y):
    grads = jax.grad(lambda q: loss(predict(q, None), y))(p)
    return optimiser.update(grads, s, p, inputs=None, targets=y)

def guarded(optimiser, take, p, s, y):
    # with explicit axes a sharding is part of the type, so both sides must agree on it
    skipped = jax.tree.map(jnp.zeros_like, p), s
    updates, s = jax.lax.cond(take, lambda: update(optimiser, p, s, y), lambda: skipped)
    return optax.apply_updates(p, updates), s

def run(number, place):
    optimiser = optimisers[number]
    # the first is compiled as users compile where it is sharded, all others fast
    options = None if number == 0 and getattr(place, "spec", P()) == P("model") else FAST
    step = jax.jit(functools.partial(guarded, optimiser), compiler_options=options)
    p = jax.tree.map(lambda leaf: jax.device_put(leaf, place), start)
    y = jax.device_put(targets, place)
    s = optimiser.init(p)
    first = [leaf.sharding for leaf in jax.tree.leaves(s)]
    for t in range(4):
        p, s = step(t != 1, p, s, y)
        if t == 0:
            settled = [leaf.sharding for leaf in jax.tree.leaves(s)]
    for leaf, before, at_init in zip(jax.tree.leaves(s), settled, first):
        assert leaf.sharding.is_equivalent_to(before, leaf.ndim), (leaf.shape, leaf.sharding, before)
        if leaf.ndim:  # like a parameter: placed like it from the start, and ever after
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim), (leaf.shape, leaf.sharding)
            assert at_init.is_equivalent_to(place, leaf.ndim), (leaf.shape, at_init)
    if not isinstance(place, jax.sharding.SingleDeviceSharding):
        assert all(leaf.sharding.is_equivalent_to(place, 2) for leaf in p.values()), p["w"].sharding
    return p

for number in range(len(optimisers)):
    want = run(number, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    for spec in (P("model"), P()):
        with jax.set_mesh(mesh):
            got = run(number, NamedSharding(mesh, spec))
            assert len(got["w"].sharding.device_set) == 2
        for name in want:
            error = np.max(np.abs(np.asarray(got[name]) - np.asarray(want[name])))
            # three steps, each a solve of condition below 100 whose sums come in another order
            bound = 3 * 100 * 16 * np.finfo(np.float64).eps * np.max(np.abs(np.asarray(want[name])))
            assert error < bound, (number, error)
print("same")
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("which", ["gauss_newton", "iterative_linearisation"])
def test_shardings_are_stable(which, kind, monkeypatch):
    """Parameters, anchor, warm start and moments stay as they were put, sharded or replicated, over four updates."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, which],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "same"), done.stderr
