"""K optimiser steps as an inner solver: the same run as iterative linearisation, and literal loops in NumPy."""

import contextlib
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gn_linear as gnl
from gn_linear.curvature import linearised_problem
from gn_linear.solvers import FirstOrder, Status
from gn_linear.solvers.first_order import FACTORS
from tests.oracles_transforms import kinds
from tests.support import (
    PROBLEMS,
    affine,
    assert_bit_equal,
    assert_close,
    condition,
    damped_step,
    dense,
    dense_jacobian,
    flat,
    l2_diagonal,
    network,
    one_hot,
    tolerance,
    unflatten_like,
)

SQUARED, SOFTMAX = gnl.losses.squared_error, gnl.losses.softmax_cross_entropy
RATE = 0.1
OPTIMISERS = {"sgd": optax.sgd(RATE), "momentum": optax.sgd(RATE, momentum=0.9), "adam": optax.adam(0.05)}
NAMES = ("squared_error", "softmax_labels")
BLOCKS = 4
# Compiling takes most of the time of these tests, so the code is not optimised further than it has to be.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def newton(solver, name="squared_error", damping=0.0, **options):
    problem = PROBLEMS[name]
    return gnl.gauss_newton(problem.predict, problem.loss, solver=solver, damping=damping, **options)


def chained(inner, period, name, **options):
    problem = PROBLEMS[name]
    return optax.chain(gnl.iterative_linearisation(problem.predict, problem.loss, period=period, **options), inner)


def training(optimiser, name, gradient=None):
    """A jitted function that trains on a stack of batches, from a given start."""
    problem = PROBLEMS[name]

    def value(p, x, y):
        return problem.loss(problem.predict(p, x), y)

    def step(carry, batch):
        p, s = carry
        grads = jax.grad(gradient or value)(p, *batch)
        updates, s = optimiser.update(grads, s, p, inputs=batch[0], targets=batch[1])
        return (optax.apply_updates(p, updates), s), None

    return jit(lambda carry, batches: jax.lax.scan(step, carry, batches)[0])


def repeated(name, times):
    problem = PROBLEMS[name]
    return jax.tree.map(lambda x: jnp.repeat(x[None], times, axis=0), (problem.inputs, problem.targets))


def assert_same_run(got, want, name, steps):
    """Parameters, and how far they moved, to the rounding of so many steps of so many terms."""
    start = flat(PROBLEMS[name].params)
    moved, expected = flat(got) - start, flat(want) - start
    assert np.linalg.norm(expected) > np.sqrt(np.finfo(np.float64).eps)
    assert_close(moved, expected, size=steps * start.size, scale=np.max(np.abs(flat(want))))


# ---- the same run as iterative linearisation


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("inner", OPTIMISERS)
@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_iterative_linearisation(name, inner, steps):
    """Each block of K steps is one step here; the optimiser's state runs on in both."""
    params, optimiser = PROBLEMS[name].params, OPTIMISERS[inner]
    blocks, single = newton(FirstOrder(optimiser, steps), name), chained(optimiser, steps, name)
    got, state = training(blocks, name)((params, blocks.init(params)), repeated(name, BLOCKS))
    want, other = training(single, name)((params, single.init(params)), repeated(name, BLOCKS * steps))
    assert_same_run(got, want, name, BLOCKS * steps)
    assert jax.tree.structure(state.solver.optimiser) == jax.tree.structure(other[1])
    scale = max(1.0, np.max(np.abs(flat(other[1])), initial=0.0))
    assert_close(state.solver.optimiser, other[1], size=BLOCKS * steps * flat(params).size, scale=scale)
    assert (int(state.info.solver_steps), int(state.info.solver_status)) == (steps, Status.COMPLETED)
    assert bool(state.info.accepted)


def test_blocks_differ_from_plain_training():
    """The tests above could not fail if five steps of the linearised model were five steps of the model."""
    name, optimiser = "softmax_labels", OPTIMISERS["sgd"]
    params, batches = PROBLEMS[name].params, repeated(name, BLOCKS * 5)
    ends = [
        training(chained(optimiser, k, name), name)((params, chained(optimiser, k, name).init(params)), batches)[0]
        for k in (1, 5)
    ]
    assert np.max(np.abs(flat(ends[0]) - flat(ends[1]))) > 1e-3


def fresh(name, steps, blocks, weights=False):
    """Batches of four examples: a tree for each step of a run, stacked."""
    rng = np.random.default_rng(steps)
    x = jnp.asarray(rng.normal(size=(blocks * steps, 4, 3)))
    y = rng.integers(0, 3, (blocks * steps, 4)) if name != "squared_error" else rng.normal(size=x.shape)
    y = jnp.asarray(y)
    return x, (y, jnp.asarray(rng.uniform(0.5, 2.0, y.shape))) if weights else y


def grouped(batches, steps):
    return jax.tree.map(lambda x: x.reshape(-1, steps, *x.shape[1:]), batches)


def mean_loss(name):
    """The mean of the losses of a stack of batches, written out."""
    problem = PROBLEMS[name]

    def value(p, x, y):
        return jnp.mean(jax.vmap(lambda x, y: problem.loss(problem.predict(p, x), y))(x, y))

    return value


@pytest.mark.parametrize(
    ("name", "inner", "steps"),
    [
        ("squared_error", "sgd", 3),
        ("squared_error", "momentum", 1),
        ("squared_error", "adam", 3),
        ("softmax_labels", "momentum", 3),
        ("weighted_softmax", "adam", 3),
    ],
)
def test_fresh_batches_are_iterative_linearisation_on_a_batch_a_step(name, inner, steps):
    params, optimiser = PROBLEMS[name].params, OPTIMISERS[inner]
    batches = fresh(name, steps, BLOCKS, weights=name.startswith("weighted"))
    blocks, single = newton(FirstOrder(optimiser, steps, fresh_batches=True), name, l2=0.05), None
    got, state = training(blocks, name, _with_penalty(mean_loss(name)))(
        (params, blocks.init(params)), grouped(batches, steps)
    )
    single = chained(optimiser, steps, name, l2=0.05)
    want, _ = training(single, name)((params, single.init(params)), batches)
    assert_same_run(got, want, name, BLOCKS * steps)
    assert (int(state.info.solver_steps), int(state.info.solver_status)) == (steps, Status.COMPLETED)


def _with_penalty(value):
    return lambda p, x, y: value(p, x, y) + 0.025 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))


# ---- the block itself, at any right-hand side


def solving(name, l2=0.0):
    """A compiled block for any solver, right-hand side, damping and state."""
    problem = PROBLEMS[name]

    @jit
    def run(solver, rhs, damping, state=None):
        linear = linearised_problem(
            problem.predict, problem.loss, problem.params, problem.inputs, targets=problem.targets, l2=l2
        )
        state = solver.init(problem.params) if state is None else state
        return solver.solve(solver.prepare(linear, rhs, state), damping)

    return run


NONE = jnp.float64(0.0)
TREE = {"in": {"w": 0.1, "b": 0.0}, "out": 1.0, "absent": None}


@functools.cache
def of_outputs(name):
    """Value, gradient and Hessian of the formula by a vector of outputs, for any targets."""
    problem = PROBLEMS[name]
    outputs = problem.predict(problem.params, problem.inputs)

    def value(vector, targets):
        columns = vector.reshape(-1, *outputs.shape[1:])
        return problem.formula(columns, targets)

    derivatives = jit(lambda v, y: (value(v, y), jax.grad(value)(v, y), jax.hessian(value)(v, y)))

    def of(vector, targets):
        labels = jnp.issubdtype(targets.dtype, jnp.integer)
        return tuple(map(np.asarray, derivatives(vector, one_hot(targets, 3) if labels else targets)))

    return of


def shortening(ggn, rhs, objective, shift):
    """The factor of damped gradients, with the curvature along the right-hand side."""
    curvature = max(rhs @ ggn @ rhs / (rhs @ rhs), 0.5 * (rhs @ rhs) / objective)
    return curvature / (curvature + shift)


def literal(name, rhs, steps, *, momentum=0.0, l2=0.0, shift=0.0, quadratic=False, start=None):
    """Gradient steps with momentum on the inner problem, from dense matrices, in NumPy."""
    oracle, problem = dense(name), PROBLEMS[name]
    diagonal = l2_diagonal(l2, problem.params)
    objective = oracle.value + 0.5 * np.sum(diagonal * oracle.params**2)
    share = shortening(oracle.ggn + np.diag(diagonal), rhs, objective, shift)
    d, velocity = np.zeros_like(rhs) if start is None else start, np.zeros_like(rhs)
    for _ in range(steps):
        if quadratic:
            change = oracle.ggn @ d
        else:
            moved = oracle.outputs + oracle.jacobian @ d
            slope = of_outputs(name)(moved, problem.targets)[1]
            change = oracle.jacobian.T @ (slope - oracle.output_gradient)
        velocity = momentum * velocity + share * (rhs + change + diagonal * d + shift * d)
        d = d - RATE * velocity
    return d


@pytest.mark.parametrize("l2", [0.0, 0.3, TREE], ids=["none", "scalar", "tree"])
@pytest.mark.parametrize("quadratic", [False, True])
def test_block_is_the_literal_loop(quadratic, l2):
    """Damping, a proximal term, a penalty, and a right-hand side that is not this batch's gradient."""
    name, steps = "softmax_labels", 4
    oracle = dense(name)
    solver = FirstOrder(OPTIMISERS["momentum"], steps, quadratic=quadratic, proximal=0.2)
    solve = solving(name, l2)
    for rhs in (oracle.gradient, np.random.default_rng(3).normal(size=oracle.params.size)):
        result = solve(solver, unflatten_like(rhs, PROBLEMS[name].params), jnp.float64(0.5))
        want = literal(name, rhs, steps, momentum=0.9, l2=l2, shift=0.7, quadratic=quadratic)
        assert_close(result.step, want, size=steps * oracle.jacobian.size)
        assert jax.tree.structure(result.step) == jax.tree.structure(PROBLEMS[name].params)


def test_quadratic_is_another_problem_unless_the_loss_is_one():
    for name, same in (("softmax_labels", False), ("squared_error", True)):
        rhs = unflatten_like(dense(name).gradient, PROBLEMS[name].params)
        true, model = (
            solving(name)(FirstOrder(optax.sgd(1.0), 3, quadratic=flag), rhs, NONE).step for flag in (False, True)
        )
        if same:
            assert_close(model, true, size=3 * dense(name).jacobian.size, condition=10.0)
        else:
            assert np.max(np.abs(flat(true) - flat(model))) > 1e-3


@pytest.mark.parametrize("steps", [1, 7, 200])
@pytest.mark.parametrize("name", ["squared_error", "two_heads", "affine"])
def test_gradient_steps_are_the_closed_form_filter(name, steps):
    oracle = dense(name)
    values, vectors = np.linalg.eigh(oracle.ggn)
    rate = 1.0 / values[-1]
    filter_ = gnl.filters.GradientDescent(rate, steps)
    phi = np.asarray(filter_(jnp.asarray(np.maximum(values, 0.0))))
    rhs = unflatten_like(oracle.gradient, PROBLEMS[name].params)
    result = solving(name)(FirstOrder(optax.sgd(rate), steps), rhs, NONE)
    want = -vectors @ (phi * (vectors.T @ oracle.gradient))
    assert_close(result.step, want, size=steps * oracle.params.size)


@pytest.mark.parametrize("quadratic", [False, True])
def test_first_gradient_is_the_right_hand_side_to_the_bit(quadratic):
    name = "softmax_labels"
    rhs = unflatten_like(np.random.default_rng(4).normal(size=dense(name).params.size), PROBLEMS[name].params)
    result = solving(name, 0.3)(FirstOrder(optax.sgd(1.0), 1, quadratic=quadratic), rhs, NONE)
    assert_bit_equal(result.step, jax.tree.map(jnp.negative, rhs))


@pytest.mark.parametrize("steps", [1, 50])
def test_gradient_steps_bear_every_damping(steps):
    """They follow the closed form, so they never diverge, and shrink like one over a large damping."""
    name = "squared_error"
    oracle = dense(name)
    values, vectors = np.linalg.eigh(oracle.ggn)
    rate, values = 1.0 / values[-1], np.maximum(values, 0.0)
    rhs, solve = unflatten_like(oracle.gradient, PROBLEMS[name].params), solving(name)
    for mu in values[-1] * 10.0 ** np.arange(-8.0, 13.0, 4.0):
        share = shortening(oracle.ggn, oracle.gradient, oracle.value, mu)
        phi = -np.expm1(steps * np.log1p(-rate * share * (values + mu) * (1 - np.finfo(float).eps))) / (values + mu)
        result = solve(FirstOrder(optax.sgd(rate), steps), rhs, jnp.asarray(mu))
        assert result.status == Status.COMPLETED
        want = -vectors @ (phi * (vectors.T @ oracle.gradient))
        assert_close(result.step, want, size=steps * oracle.params.size)
        assert np.linalg.norm(want) <= np.linalg.norm(oracle.gradient) / mu


def test_damping_that_is_too_negative_takes_no_step():
    name = "squared_error"
    oracle = dense(name)
    rhs, top = unflatten_like(oracle.gradient, PROBLEMS[name].params), np.linalg.norm(oracle.ggn, 2)
    solver = FirstOrder(optax.sgd(1 / top), 3)
    result = solving(name)(solver, rhs, jnp.float64(-top))
    assert (int(result.status), int(result.solver_steps)) == (Status.NON_POSITIVE_CURVATURE, 0)
    assert np.all(flat(result.step) == 0)
    for damping in (np.nan, np.inf):
        result = solving(name)(solver, rhs, jnp.float64(damping))
        assert (int(result.status), int(result.solver_steps)) == (Status.NON_FINITE, 0)


def test_clipping_in_front_composes():
    name, params = "squared_error", PROBLEMS["squared_error"].params
    optimiser = optax.chain(optax.clip_by_global_norm(0.01), newton(FirstOrder(optax.sgd(RATE), 3)))
    (end, _) = training(optimiser, name)((params, optimiser.init(params)), repeated(name, 1))
    gradient = dense(name).gradient
    rhs = gradient * 0.01 / np.linalg.norm(gradient)
    want = literal(name, rhs, 3)
    assert_close(flat(end) - flat(params), want, size=dense(name).jacobian.size, scale=np.max(np.abs(flat(params))))


def test_many_proximal_steps_solve_the_damped_problem():
    name, rho, mu = "squared_error", 0.3, 0.2
    oracle = dense(name)
    rhs = unflatten_like(oracle.gradient, PROBLEMS[name].params)
    rate = 1.0 / (np.linalg.norm(oracle.ggn, 2) + rho + mu)
    steps = int(np.log(np.finfo(float).eps) / np.log(1 - rate * (rho + mu)))
    solver = FirstOrder(optax.sgd(rate), steps, proximal=rho)
    result = solving(name)(solver, rhs, jnp.float64(mu))
    want = damped_step(oracle.ggn, oracle.gradient, rho + mu)
    assert_close(result.step, want, size=oracle.jacobian.size, condition=condition(oracle.ggn, rho + mu))


def test_warm_start_begins_at_a_multiple_of_the_previous_solution():
    name = "softmax_labels"
    rhs, solve = dense(name).gradient, solving(name)
    tree, size = unflatten_like(rhs, PROBLEMS[name].params), 2 * dense(name).jacobian.size
    solver = FirstOrder(optax.sgd(RATE), 2, warm_start=0.5)
    first = solve(solver, tree, NONE)
    want = literal(name, rhs, 2)
    assert_close(first.step, want, size=size)
    assert_bit_equal(first.state.previous, first.step)
    second = solve(solver, tree, NONE, first.state)
    assert_close(second.step, literal(name, rhs, 2, start=0.5 * want), size=size)
    assert solve(FirstOrder(optax.sgd(RATE), 2), tree, NONE).state.previous is None


# ---- the line search


@pytest.mark.parametrize(
    ("name", "extra", "rates"),
    [
        ("softmax_labels", 0.0, (0.3, 3.0, 10.0, 30.0)),
        ("squared_error", 0.5, (0.1, 0.3, 1.0)),
        ("poisson", 0.0, (0.1, 0.3, 30.0)),
    ],
)
def test_line_search_takes_the_best_multiple(name, extra, rates):
    """Never worse than the whole step, also for a gradient that holds more than this batch's; steps that overflow."""
    problem, chosen = PROBLEMS[name], set()

    @jit
    def run(rate, rhs):
        linear = linearised_problem(
            problem.predict, problem.loss, problem.params, problem.inputs, targets=problem.targets
        )
        solvers = [FirstOrder(optax.sgd(rate), 3, line_search=flag) for flag in (False, True)]
        return [s.solve(s.prepare(linear, rhs, s.init(problem.params)), NONE).step for s in solvers]

    @jit
    def objective(step):
        value = problem.formula(problem.predict(optax.apply_updates(problem.params, step), problem.inputs), targets)
        return value + extra * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(step))

    targets = one_hot(problem.targets, 3) if name == "softmax_labels" else problem.targets
    for rate in rates:
        whole, best = run(rate, unflatten_like(dense(name).gradient + extra, problem.params))
        values = np.array([objective(jax.tree.map(lambda u, c=c: c * u, whole)) for c in FACTORS])
        factor = FACTORS[int(np.argmin(np.where(np.isfinite(values), values, np.inf)))]
        assert_close(best, factor * flat(whole))
        rounding = tolerance(np.float64, dense(name).params.size) * (abs(values[0]) + dense(name).value)
        assert not objective(best) > values[0] + rounding
        chosen.add(factor)
    assert len(chosen) > 1


# ---- fresh batches


@pytest.mark.parametrize("quadratic", [False, True])
def test_fresh_batches_are_the_literal_loop(quadratic):
    """A right-hand side that is not the mean gradient, a penalty and damping."""
    name, steps, mu, l2 = "softmax_labels", 3, 0.5, 0.2
    problem, oracle = PROBLEMS[name], dense(name)
    xs, ys = fresh(name, steps, 1)
    rhs = np.random.default_rng(5).normal(size=oracle.params.size)
    solver = FirstOrder(optax.sgd(RATE), steps, fresh_batches=True, quadratic=quadratic)
    optimiser, params = newton(solver, name, mu, l2=l2), problem.params
    updates, state = jit(optimiser.update)(
        unflatten_like(rhs, params), optimiser.init(params), params, inputs=xs, targets=ys
    )
    outputs = np.stack([flat(problem.predict(params, x)) for x in xs])
    jacobians = dense_jacobian(jax.vmap(problem.predict, (None, 0)), params, xs).reshape(*outputs.shape, -1)
    local = [of_outputs(name)(f, y) for f, y in zip(outputs, ys, strict=True)]
    mean = np.mean([j.T @ slope for j, (_, slope, _) in zip(jacobians, local, strict=True)], axis=0)
    mean += l2 * oracle.params
    value = np.mean([value for value, _, _ in local]) + l2 / 2 * np.sum(oracle.params**2)
    ggn = np.mean([j.T @ h @ j for j, (_, _, h) in zip(jacobians, local, strict=True)], axis=0)
    share = shortening(ggn + l2 * np.eye(rhs.size), rhs, value, mu)
    d = np.zeros_like(rhs)
    for f, jacobian, y, (_, slope, hessian) in zip(outputs, jacobians, ys, local, strict=True):
        if quadratic:
            pulled = jacobian.T @ (slope + hessian @ jacobian @ d)
        else:
            pulled = jacobian.T @ of_outputs(name)(f + jacobian @ d, y)[1]
        d = d - RATE * share * (pulled + l2 * (oracle.params + d) + rhs - mean + mu * d)
    assert_close(updates, d, size=steps * oracle.jacobian.size)
    assert_close(state.info.loss, value, size=steps * oracle.outputs.size)


def test_gain_ratio_of_fresh_batches_is_one_on_a_quadratic():
    """Objective, model and trial are those of all batches together."""
    params = PROBLEMS["affine"].params
    rng = np.random.default_rng(6)
    x, y = jnp.asarray(rng.normal(size=(3, 4, 3))), jnp.asarray(rng.normal(size=(3, 4, 2)))
    solver = FirstOrder(optax.sgd(RATE), 3, fresh_batches=True, line_search=True, warm_start=0.5)
    optimiser = gnl.gauss_newton(affine, SQUARED, solver=solver)
    step = jit(optimiser.update)
    state = optimiser.init(params)
    for _ in range(3):
        grads = jax.grad(mean_loss("affine"))(params, x, y)
        updates, state = step(grads, state, params, inputs=x, targets=y)
        before, params = params, optax.apply_updates(params, updates)
        drop = mean_loss("affine")(before, x, y) - mean_loss("affine")(params, x, y)
        assert_close(state.info.actual_reduction, drop, scale=float(state.info.loss), size=24)
        assert_close(state.info.gain_ratio, 1.0, size=24, condition=float(state.info.loss / drop))
    assert bool(state.info.accepted)


def test_fresh_batches_of_pytrees_of_inputs_and_targets():
    """Two heads with different numbers of examples, against the chain."""
    name, steps = "two_heads", 2
    problem, rng = PROBLEMS[name], np.random.default_rng(7)
    x, y = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=(steps, *leaf.shape))), (problem.inputs, problem.targets)
    )
    blocks = newton(FirstOrder(OPTIMISERS["momentum"], steps, fresh_batches=True), name)
    params = problem.params
    grads = jax.grad(mean_loss(name))(params, x, y)
    updates, _ = jit(blocks.update)(grads, blocks.init(params), params, inputs=x, targets=y)
    single = chained(OPTIMISERS["momentum"], steps, name)
    end, _ = training(single, name)((params, single.init(params)), (x, y))
    assert_same_run(optax.apply_updates(params, updates), end, name, steps)


# ---- types


DTYPES = {
    "bfloat16": (jnp.bfloat16,) * 3,
    "float16": (jnp.float16,) * 3,
    "float32": (jnp.float32,) * 3,
    "float64": (jnp.float64,) * 3,
    "mixed": (jnp.float32, jnp.bfloat16, jnp.float64),
}
VARIANTS = {
    "prox-linear": {"line_search": True, "warm_start": 0.5, "proximal": 0.1},
    "quadratic": {"quadratic": True},
    "fresh": {"fresh_batches": True, "line_search": True, "warm_start": 0.5, "proximal": 0.1},
}


def narrow(params, x):
    """A small network that computes in the dtype of its inputs."""
    w, b, v = (params[name].astype(x.dtype) for name in ("w", "b", "v"))
    return jnp.tanh(x @ w + b) @ v


def narrow_params(name):
    rng = np.random.default_rng(8)
    shapes = {"w": (2, 3), "b": (3,), "v": (3, 2)}
    pairs = zip(shapes.items(), DTYPES[name], strict=True)
    return {key: jnp.asarray(rng.normal(size=shape), dtype) for (key, shape), dtype in pairs} | {"absent": None}


def narrow_batch(name, stacked):
    rng = np.random.default_rng(9)
    dtype = jnp.float32 if name == "mixed" else DTYPES[name][0]
    shape = (3, 5, 2) if stacked else (5, 2)
    return jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(rng.normal(size=shape), dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("name", "strict"), [(name, True) for name in DTYPES] + [("mixed", False)])
def test_types_are_stable(name, variant, strict):
    """After a step the state has the types that init gave it, and the optimiser works in those of the solve."""
    with jax.numpy_dtype_promotion("strict") if strict else contextlib.nullcontext():
        solver = FirstOrder(OPTIMISERS["momentum"], 3, **VARIANTS[variant])
        optimiser = gnl.gauss_newton(narrow, SQUARED, solver=solver, l2=0.1)
        params = narrow_params(name)
        x, y = narrow_batch(name, solver.fresh_batches)
        state = optimiser.init(params)
        updates, after = jax.eval_shape(
            lambda g, s, p: optimiser.update(g, s, p, inputs=x, targets=y), params, state, params
        )
        assert kinds(after) == kinds(state)
        assert [u.dtype for u in jax.tree.leaves(updates)] == [p.dtype for p in jax.tree.leaves(params)]
        assert all(leaf.dtype in (jnp.float32, jnp.float64) for leaf in jax.tree.leaves(state.solver.optimiser))


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_narrow_step_is_the_wide_one_rounded(name):
    ends = {}
    for dtype in (name, "float64"):
        params = jax.tree.map(lambda p, d=dtype: p.astype(DTYPES[d][0]), narrow_params(name))
        x, y = (z.astype(DTYPES[dtype][0]) for z in narrow_batch(name, False))
        optimiser = gnl.gauss_newton(narrow, SQUARED, solver=FirstOrder(optax.sgd(RATE), 3), damping=0.0)
        grads = jax.grad(lambda p, x=x, y=y: SQUARED(narrow(p, x), y))(params)
        ends[dtype], _ = jit(optimiser.update)(grads, optimiser.init(params), params, inputs=x, targets=y)
    assert_close(ends[name], ends["float64"], size=15)


def test_optimisers_of_every_kind_of_state():
    """Schedules, decay towards zero, random keys, labels: what they hold survives the loop."""
    name, params = "squared_error", PROBLEMS["squared_error"].params
    labels = {"in": "a", "out": "b", "absent": None}
    # optax computes schedules in float32: these rates are exact there, others round as the compiler fuses them.
    rates = optax.linear_schedule(0.125, 0.0625, 8)
    inner = optax.chain(
        optax.add_noise(0.01, 0.5, jax.random.key(0)),
        optax.partition({"a": optax.adamw(rates, weight_decay=0.1), "b": optax.sgd(RATE)}, labels),
    )
    blocks, single = newton(FirstOrder(inner, 2)), chained(inner, 2, name)
    got, state = training(blocks, name)((params, blocks.init(params)), repeated(name, 3))
    want, other = training(single, name)((params, single.init(params)), repeated(name, 6))
    assert_same_run(got, want, name, 6)
    assert jax.tree.structure(state.solver.optimiser) == jax.tree.structure(other[1])


# ---- transformations


def test_no_second_trace_and_vmap():
    """Numbers are leaves of the solver; an ensemble is a vmap over parameters and numbers."""
    problem, traces = PROBLEMS["squared_error"], []

    def step(solver, params):
        traces.append(None)
        optimiser = newton(solver)
        grads = jax.grad(lambda p: problem.loss(problem.predict(p, problem.inputs), problem.targets))(params)
        updates, state = optimiser.update(
            grads, optimiser.init(params), params, inputs=problem.inputs, targets=problem.targets
        )
        return updates, state.info.solver_status

    def solver(rho):
        return FirstOrder(OPTIMISERS["momentum"], 3, proximal=rho)

    jitted = jit(step)
    one, two = (jitted(solver(rho), problem.params) for rho in (0.1, 2.0))
    assert len(traces) == 1
    pair = jax.tree.map(lambda p: jnp.stack([p, p]), problem.params)
    both, status = jit(jax.vmap(lambda rho, p: step(solver(rho), p)))(jnp.array([0.1, 2.0]), pair)
    for i, single in enumerate((one, two)):
        assert_close(jax.tree.map(lambda u, i=i: u[i], both), single[0], size=3 * dense("squared_error").jacobian.size)
    assert np.all(status == Status.COMPLETED)


def test_block_has_a_derivative_by_the_learning_rate():
    """The loop is one that reverse mode goes through."""
    problem = PROBLEMS["squared_error"]
    x, y = problem.inputs, problem.targets

    def value(rate):
        optimiser = newton(FirstOrder(optax.sgd(rate), 3))
        grads = jax.grad(lambda p: SQUARED(network(p, x), y))(problem.params)
        updates, _ = optimiser.update(grads, optimiser.init(problem.params), problem.params, inputs=x, targets=y)
        return SQUARED(network(optax.apply_updates(problem.params, updates), x), y)

    reached, width = jit(value), np.cbrt(np.finfo(float).eps)
    slope = jit(jax.grad(value))(RATE)
    want = (reached(RATE + width) - reached(RATE - width)) / (2 * width)
    np.testing.assert_allclose(slope, want, atol=width**2 / RATE**3 * float(reached(0.0)), rtol=0)


# ---- what is not finite, and refusal


def poison(at):
    """A transform that turns gradients into NaN at one count."""

    def update(updates, count, params=None):
        return jax.tree.map(lambda g: jnp.where(count == at, jnp.nan, g), updates), count + 1

    return optax.GradientTransformation(lambda _: jnp.zeros([], jnp.int32), update)


def test_step_that_is_not_finite_ends_the_block_before_it():
    """With the optimiser's state at that step; an optimiser that mends its gradients goes on."""
    name = "softmax_labels"
    rhs, solve = unflatten_like(dense(name).gradient, PROBLEMS[name].params), solving(name)
    broken = solve(FirstOrder(optax.chain(poison(3), optax.sgd(RATE)), 6), rhs, NONE)
    assert (int(broken.status), int(broken.solver_steps), int(broken.state.optimiser[0])) == (Status.NON_FINITE, 3, 3)
    assert_close(broken.step, literal(name, flat(rhs), 3), size=dense(name).jacobian.size)
    at_once = solve(FirstOrder(optax.chain(poison(0), optax.sgd(RATE)), 6), rhs, NONE)
    assert (int(at_once.status), int(at_once.solver_steps)) == (Status.NON_FINITE, 0)
    assert not np.any(flat(at_once.step))
    mended = solve(FirstOrder(optax.chain(poison(3), optax.zero_nans(), optax.sgd(RATE)), 4), rhs, NONE)
    assert (int(mended.status), int(mended.solver_steps)) == (Status.COMPLETED, 4)
    assert_close(mended.step, literal(name, flat(rhs), 3), size=dense(name).jacobian.size)


def test_divergence_stops_at_the_last_finite_step():
    """Poisson with a rate far too large: the linearised loss overflows."""
    name = "poisson"
    rhs = unflatten_like(dense(name).gradient, PROBLEMS[name].params)
    result = solving(name)(FirstOrder(optax.sgd(100.0), 50), rhs, NONE)
    assert int(result.status) == Status.NON_FINITE
    assert 0 < int(result.solver_steps) < 50
    assert np.all(np.isfinite(flat(result.step)))


REFUSALS = {
    "gradient": (gnl.Refusal.GRADIENT, 1.0, jnp.nan),
    "batch": (gnl.Refusal.OBJECTIVE, jnp.nan, 1.0),
    "trial": (gnl.Refusal.TRIAL, 1.0, 1e5),
}


@functools.cache
def exponential():
    """A model that overflows beyond a large step, trained with momentum and a warm start; two steps of it."""
    solver = FirstOrder(OPTIMISERS["momentum"], 3, warm_start=0.5)
    optimiser = gnl.gauss_newton(lambda p, x: jnp.exp(p * x), gnl.losses.huber(1.0), solver=solver, damping=0.0)
    return optimiser, jit(optimiser.update)


@pytest.mark.parametrize("kind", REFUSALS)
def test_refused_block_leaves_no_trace(kind):
    """Parameters, momentum and the previous solution stay to the bit, and the next block is as if it had not been."""
    code, in_batch, in_gradient = REFUSALS[kind]
    optimiser, update = exponential()
    params, x = jnp.asarray([0.1, -0.2]), jnp.ones((4, 2))
    y = jnp.full((4, 2), 1.5)

    def block(params, state, factor=1.0, by=1.0):
        grads = jax.grad(lambda p: gnl.losses.huber(1.0)(jnp.exp(p * x), y))(params)
        return update(grads * by, state, params, inputs=factor * x, targets=y)

    updates, before = block(params, optimiser.init(params))
    params = optax.apply_updates(params, updates)
    assert np.all(flat(before.solver.optimiser))
    updates, after = block(params, before, in_batch, in_gradient)
    assert (int(after.info.refusal), bool(after.info.accepted)) == (code, False)
    assert_bit_equal(optax.apply_updates(params, updates), params)
    assert_bit_equal(after.solver, before.solver)
    again, clean = block(params, after), block(params, before)
    assert_bit_equal(again[0], clean[0])
    assert_bit_equal(again[1].solver, clean[1].solver)


def test_halved_block_keeps_the_state_of_the_whole_one():
    """Under an adaptive policy a block that overshoots is shortened; its momentum is that of the whole block."""
    name = "squared_error"
    problem, inner = PROBLEMS[name], optax.sgd(0.34, momentum=0.9)
    optimiser = newton(FirstOrder(inner, 3), name, gnl.damping.LevenbergMarquardt())
    grads = jax.grad(lambda p: problem.loss(network(p, problem.inputs), problem.targets))(problem.params)
    updates, state = jit(optimiser.update)(
        grads, optimiser.init(problem.params), problem.params, inputs=problem.inputs, targets=problem.targets
    )
    whole = solving(name)(FirstOrder(inner, 3), grads, state.info.damping)
    ratio = np.linalg.norm(flat(updates)) / np.linalg.norm(flat(whole.step))
    assert bool(state.info.accepted)
    assert 1 < round(1 / ratio) <= 32
    assert_close(updates, ratio * flat(whole.step), size=dense(name).jacobian.size)
    assert_close(state.solver.optimiser, whole.state.optimiser, size=dense(name).jacobian.size)


@pytest.mark.parametrize(
    ("inner", "policy"),
    [("adam", gnl.damping.Path()), ("sgd", gnl.damping.LevenbergMarquardt())],
    ids=["adam", "sgd"],
)
def test_adaptive_damping_never_raises_the_objective(inner, policy):
    name, params = "softmax_labels", PROBLEMS["softmax_labels"].params
    rate = 1.0 / np.linalg.norm(dense(name).ggn, 2)
    optimiser = newton(FirstOrder(optax.sgd(rate) if inner == "sgd" else OPTIMISERS[inner], 5), name, policy)
    problem = PROBLEMS[name]

    def step(carry, _):
        p, s = carry
        value, grads = jax.value_and_grad(lambda p: problem.loss(network(p, problem.inputs), problem.targets))(p)
        updates, s = optimiser.update(grads, s, p, inputs=problem.inputs, targets=problem.targets)
        return (optax.apply_updates(p, updates), s), value

    _, values = jit(lambda c: jax.lax.scan(step, c, length=15))((params, optimiser.init(params)))
    assert np.all(np.diff(values) <= 0)
    assert values[-1] < 0.1 * values[0]


# ---- storage


def test_resumed_run_is_the_unbroken_run():
    """Stored by pickle between two blocks and continued by a fresh optimiser object, to the bit."""
    name, params = "softmax_labels", PROBLEMS["softmax_labels"].params

    def fresh_run():
        optimiser = newton(FirstOrder(optax.adam(0.05), 3, warm_start=0.3, line_search=True), name)
        return optimiser, training(optimiser, name)

    optimiser, run = fresh_run()
    start, batches = (params, optimiser.init(params)), repeated(name, 2)
    half = run(start, batches)
    end = run(half, batches)
    stored = pickle.loads(pickle.dumps(jax.device_get(half)))
    assert_bit_equal(fresh_run()[1](stored, batches), end)
    forgotten = run((half[0], optimiser.init(params)), batches)
    assert np.any(flat(forgotten[0]) != flat(end[0]))


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"optimiser": optax.adam}, TypeError, r"optimiser must be an optax transform.*the function adam"),
        ({"optimiser": None}, TypeError, "optimiser must be an optax transform"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": 2.0}, TypeError, "steps must be an int"),
        ({"warm_start": -1.0}, ValueError, "warm_start must be"),
        ({"proximal": float("nan")}, ValueError, "proximal must be"),
    ],
)
def test_arguments_are_checked(arguments, error, says):
    with pytest.raises(error, match=says):
        FirstOrder(**{"optimiser": optax.sgd(RATE), "steps": 3, **arguments})


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        ((2, 4, 3), (3, 4, 3), r"inputs: the array has shape \(2, 4, 3\).* length 3"),
        ((3, 4, 3), (4, 3), r"targets: the array has shape \(4, 3\).* length 3"),
        ((3, 4, 3), (3,), r"targets: the array has shape \(3,\)"),
        ((), (3, 4, 3), r"inputs: the array has shape \(\)"),
    ],
)
def test_stack_of_batches_is_checked(x, y, says):
    params = PROBLEMS["squared_error"].params
    optimiser = newton(FirstOrder(optax.sgd(RATE), 3, fresh_batches=True))
    with pytest.raises(ValueError, match=says):
        optimiser.update(params, optimiser.init(params), params, inputs=jnp.ones(x), targets=jnp.ones(y))


def test_leaf_of_a_stack_is_named():
    params, solver = PROBLEMS["two_heads"].params, FirstOrder(optax.sgd(RATE), 2, fresh_batches=True)
    x = {"inside": jnp.ones((2, 7, 3)), "edge": jnp.ones((3, 3, 3))}
    y = {"inside": jnp.ones((2, 7)), "edge": jnp.ones((2, 3, 2))}
    optimiser = newton(solver, "two_heads")
    with pytest.raises(ValueError, match=r"inputs: leaf \['edge'\] has shape \(3, 3, 3\)"):
        optimiser.update(params, optimiser.init(params), params, inputs=x, targets=y)
    batch = {"inputs": {**x, "edge": jnp.ones((2, 3, 3))}, "targets": y}
    with pytest.raises(ValueError, match="curvature_inputs are given, but FirstOrder takes 2 fresh batches"):
        optimiser.update(
            params, optimiser.init(params), params, **batch, curvature_inputs=x["inside"], curvature_targets=y
        )


def test_outputs_of_a_stack_are_checked_as_those_of_a_batch():
    """A model that returns a scalar for each batch would otherwise pass for one with an example a batch."""
    solver = FirstOrder(optax.sgd(RATE), 3, fresh_batches=True)
    optimiser = gnl.gauss_newton(lambda p, x: jnp.sum(p * x), SQUARED, solver=solver)
    with pytest.raises(ValueError, match="the outputs of predict: the array is a scalar"):
        optimiser.update(
            jnp.ones(2), optimiser.init(jnp.ones(2)), jnp.ones(2), inputs=jnp.ones((3, 2)), targets=jnp.ones((3, 1))
        )
