"""Conjugate gradients against dense solves, a textbook loop in numpy and jaxopt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import gn_linear as gnl
from gn_linear import _tree, curvature
from gn_linear._linearise import Linearisation
from gn_linear.solvers import CG, Status
from tests import oracles_dense
from tests.support import (
    PROBLEMS,
    assert_bit_equal,
    assert_close,
    condition,
    damped_step,
    dense,
    flat,
    tolerance,
)

N = 24
RNG = np.random.default_rng(15)
BASIS = np.linalg.qr(RNG.normal(size=(N, N)))[0]
RHS = RNG.normal(size=N)


def symmetric(eigenvalues):
    return (BASIS * eigenvalues) @ BASIS.T


EASY = symmetric(np.linspace(1.0, 10.0, N))
HARD = symmetric(np.geomspace(1e-2, 1.0, N))
INDEFINITE = symmetric(np.concatenate([np.linspace(1.0, 10.0, N - 1), [-0.5]]))


class Operator(curvature.LinearisedProblem):
    """A linearised problem that is no more than a product."""

    def __init__(self, params, product):
        object.__setattr__(self, "params", params)
        object.__setattr__(self, "apply", product)
        object.__setattr__(self, "linearisation", Linearisation(params, product, product))

    def image(self, vector):
        return self.apply(vector)

    def pulled(self, vector, image):
        return image

    def inner(self, vector, image, other, other_image):
        return _tree.dot(vector, other_image)


def matrix_product(matrix):
    """A matrix that acts on pytrees."""

    def product(vector):
        v, unravel = ravel_pytree(vector)
        return unravel(matrix @ v)

    return product


@jax.jit
def solve(solver, matrix, rhs, damping, state=None):
    """One solve with a dense matrix; compiled once for each static part of the solver."""
    state = solver.init(rhs) if state is None else state
    return solver.solve(solver.prepare(Operator(rhs, matrix_product(matrix)), rhs, state), damping)


def textbook(matrix, rhs, *, steps, rtol=0.0, progress=0.0):
    """Hestenes and Stiefel's loop with the three tests of the documentation, from zero, in numpy."""
    x, r = np.zeros_like(rhs), -rhs
    p, models = r, [0.0]
    for i in range(1, steps + 1):
        curved = p @ matrix @ p
        if curved <= 0:
            return x, i - 1, Status.NON_POSITIVE_CURVATURE
        alpha = (r @ r) / curved
        x, new = x + alpha * p, r - alpha * matrix @ p
        models.append(rhs @ x + x @ matrix @ x / 2)
        k = max(10, i // 10)
        if np.linalg.norm(new) <= rtol * np.linalg.norm(rhs):
            return x, i, Status.CONVERGED
        if i > k and models[i] < 0 and (models[i] - models[i - k]) / models[i] < k * progress:
            return x, i, Status.PROGRESS
        p, r = new + (new @ new) / (r @ r) * p, new
    return x, steps, Status.MAX_STEPS


NONE = jnp.float64(0.0)
EXACT = CG(max_steps=N, rtol=0.0, progress=0.0)


def test_n_steps_are_a_cholesky_solve():
    result = solve(EXACT, EASY, RHS, jnp.float64(0.5))
    lower = np.linalg.cholesky(EASY + 0.5 * np.eye(N))
    expected = -np.linalg.solve(lower.T, np.linalg.solve(lower, RHS))
    assert_close(result.step, expected, size=N * N, condition=condition(EASY, 0.5))
    assert int(result.solver_steps) == N


@pytest.mark.parametrize("name", ["softmax_labels", "two_heads", "huber", "decay"])
def test_damped_step_of_a_model(name):
    problem, oracle, mu, l2 = PROBLEMS[name], dense(name), 0.1, 0.05

    @jax.jit
    def step(damping):
        linear = curvature.linearised_problem(
            problem.predict, problem.loss, problem.params, problem.inputs, targets=problem.targets, l2=l2
        )
        solver = CG(max_steps=3 * oracle.params.size, rtol=tolerance(np.float64), progress=0.0)
        rhs = unflatten_like_traced(oracle.gradient + l2 * oracle.params, problem.params)
        return solver.solve(solver.prepare(linear, rhs, solver.init(problem.params)), damping)

    result = step(jnp.float64(mu))
    expected = damped_step(oracle.ggn, oracle.gradient + l2 * oracle.params, mu + l2)
    assert_close(result.step, expected, size=oracle.jacobian.size, condition=condition(oracle.ggn, mu + l2))
    assert jax.tree.structure(result.step) == jax.tree.structure(problem.params)
    assert int(result.status) == Status.CONVERGED


def unflatten_like_traced(vector, tree):
    return ravel_pytree(tree)[1](jnp.asarray(vector))


def test_agrees_with_jaxopt():
    from jaxopt.linear_solve import solve_cg

    rtol = tolerance(np.float64)
    theirs = solve_cg(lambda v: EASY @ v, -jnp.asarray(RHS), ridge=0.5, tol=rtol, maxiter=2 * N)
    ours = solve(CG(max_steps=2 * N, rtol=rtol, progress=0.0), EASY, RHS, jnp.float64(0.5))
    assert_close(ours.step, theirs, size=N * N, condition=condition(EASY, 0.5))


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_each_iterate_is_the_textbooks(steps):
    expected, count, status = textbook(EASY, RHS, steps=steps)
    result = solve(CG(max_steps=steps, rtol=0.0, progress=0.0), EASY, RHS, NONE)
    assert_close(result.step, expected, size=N * N, condition=condition(EASY))
    assert (int(result.solver_steps), int(result.status)) == (count, status) == (steps, Status.MAX_STEPS)


def test_pytree_is_flat():
    tree = {"a": jnp.asarray(RHS[:6]).reshape(2, 3), "b": [jnp.asarray(RHS[6]), None, jnp.asarray(RHS[7:])]}
    whole, parts = solve(EXACT, EASY, RHS, NONE), solve(EXACT, EASY, tree, NONE)
    assert jax.tree.structure(parts.step) == jax.tree.structure(tree)
    assert_close(parts.step, whole.step, size=N * N, condition=condition(EASY))
    assert int(parts.solver_steps) == int(whole.solver_steps)


@pytest.mark.parametrize(("dtype", "power"), [(np.float32, 100), (np.float64, 500)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_scale_of_the_right_hand_side_does_not_matter(dtype, power, sign):
    """By powers of two, from 1e-30 to 1e30 and from 1e-150 to 1e150: the same to the bit."""
    solver, matrix, rhs = CG(max_steps=N, rtol=1e-3), EASY.astype(dtype), RHS.astype(dtype)
    factor = dtype(2.0) ** (sign * power)
    one, other = solve(solver, matrix, rhs, dtype(0)), solve(solver, matrix, rhs * factor, dtype(0))
    assert_bit_equal(other.step, one.step * factor)
    assert (int(other.solver_steps), int(other.status)) == (int(one.solver_steps), int(one.status))
    assert int(one.status) == Status.CONVERGED


def test_converged_means_the_relative_residual():
    for rtol in (1e-1, 1e-4, 1e-8):
        result = solve(CG(max_steps=N, rtol=rtol, progress=0.0), EASY, RHS, NONE)
        expected, count, _ = textbook(EASY, RHS, steps=N, rtol=rtol)
        assert int(result.status) == Status.CONVERGED
        assert int(result.solver_steps) == count
        assert_close(result.step, expected, size=N * N, condition=condition(EASY))
        assert np.linalg.norm(EASY @ flat(result.step) + RHS) <= rtol * np.linalg.norm(RHS) * (1 + rtol)


@pytest.mark.parametrize("progress", [1e-2, 5e-2])
def test_progress_is_martens_test(progress):
    expected, count, status = textbook(HARD, RHS, steps=N, progress=progress)
    result = solve(CG(max_steps=N, rtol=0.0, progress=progress), HARD, RHS, NONE)
    assert status == int(result.status) == Status.PROGRESS
    assert 10 < int(result.solver_steps) == count < N
    # Lanczos' loss of orthogonality: rounding is amplified once more than in a solve.
    assert_close(result.step, expected, size=N * N, condition=condition(HARD) ** 2)


def test_non_positive_curvature_keeps_the_last_good_iterate():
    expected, count, status = textbook(INDEFINITE, RHS, steps=N)
    result = solve(EXACT, INDEFINITE, RHS, NONE)
    assert status == int(result.status) == Status.NON_POSITIVE_CURVATURE
    assert 0 < int(result.solver_steps) == count < N
    assert_close(result.step, expected, size=N * N, condition=condition(INDEFINITE))


@pytest.mark.parametrize("matrix", [-EASY, 0 * EASY], ids=["negative", "zero"])
def test_no_positive_curvature_at_all_gives_no_step(matrix):
    result = solve(EXACT, matrix, RHS, NONE)
    assert (int(result.status), int(result.solver_steps)) == (Status.NON_POSITIVE_CURVATURE, 0)
    assert not np.any(result.step)


def test_damping_mends_an_indefinite_matrix():
    result = solve(EXACT, INDEFINITE, RHS, jnp.float64(2.0))
    assert_close(result.step, damped_step(INDEFINITE, RHS, 2.0), size=N * N, condition=condition(INDEFINITE, 2.0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_product_that_is_not_finite_keeps_the_last_good_iterate(bad):
    matrix = np.diag(np.linspace(1.0, 2.0, 6)) + np.diag(np.full(5, 0.3), 1) + np.diag(np.full(5, 0.3), -1)

    def product(v):  # the third direction is the first with a third entry
        return jnp.where(v[2] != 0, bad, matrix @ v)

    rhs = jnp.eye(6)[0]
    result = EXACT.solve(EXACT.prepare(Operator(rhs, product), rhs, EXACT.init(rhs)), NONE)
    expected, _, _ = textbook(matrix, np.eye(6)[0], steps=2)
    assert (int(result.status), int(result.solver_steps)) == (Status.NON_FINITE, 2)
    assert_close(result.step, expected, size=36, condition=condition(matrix))
    first = solve(EXACT, np.full((N, N), bad), RHS, NONE)
    assert (int(first.status), int(first.solver_steps)) == (Status.NON_FINITE, 0)
    assert not np.any(first.step)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_right_hand_side_that_is_not_finite_gives_no_step(bad):
    rhs = RHS.copy()
    rhs[3] = bad
    result = solve(EXACT, EASY, rhs, NONE)
    assert (int(result.status), int(result.solver_steps)) == (Status.NON_FINITE, 0)
    assert_bit_equal(np.abs(np.asarray(result.step)), np.zeros(N))


def test_right_hand_side_of_zero_is_solved():
    for solver in (EXACT, CG(max_steps=N)):
        result = solve(solver, EASY, 0 * RHS, NONE)
        assert (int(result.status), int(result.solver_steps)) == (Status.CONVERGED, 0)
        assert not np.any(result.step)


WARM = CG(max_steps=N, rtol=1e-6, progress=0.0, warm_start=1.0)


def test_warm_start_takes_fewer_steps():
    first = solve(WARM, EASY, RHS, NONE)
    near = RHS * (1 + 1e-5 * np.arange(N))
    cold, warm = solve(WARM, EASY, near, NONE), solve(WARM, EASY, near, NONE, first.state)
    assert int(warm.status) == int(cold.status) == Status.CONVERGED
    assert int(warm.solver_steps) < int(cold.solver_steps)
    residual = np.linalg.norm(EASY @ flat(warm.step) + near)
    assert residual <= 1e-6 * np.linalg.norm(near) * (1 + 1e-6)
    again = solve(WARM, EASY, RHS, NONE, first.state)
    assert int(again.solver_steps) == 0
    assert_close(again.step, first.step)


def test_warm_start_begins_at_the_decayed_solution():
    solver = CG(max_steps=1, rtol=0.0, progress=0.0, warm_start=0.95)
    previous = -np.linalg.solve(EASY, RHS)
    state = solver.init(jnp.asarray(RHS))._replace(previous=jnp.asarray(previous))
    start = 0.95 * previous
    residual = -RHS - EASY @ start
    expected = start + residual * (residual @ residual) / (residual @ EASY @ residual)
    assert_close(solve(solver, EASY, RHS, NONE, state).step, expected, size=N * N, condition=condition(EASY))


@pytest.mark.parametrize("previous", [RHS, np.full(N, np.nan), np.full(N, np.inf), np.zeros(N)])
def test_warm_start_that_is_worse_than_zero_is_dropped(previous):
    """Uphill, where the model is positive, and from a solution that was not finite."""
    state = WARM.init(jnp.asarray(RHS))._replace(previous=jnp.asarray(previous))
    cold, dropped = solve(WARM, EASY, RHS, NONE), solve(WARM, EASY, RHS, NONE, state)
    assert_bit_equal(dropped.step, cold.step)
    assert int(dropped.solver_steps) == int(cold.solver_steps)


def test_warm_start_keeps_the_solution_in_the_state():
    result = solve(WARM, EASY, RHS, NONE)
    assert_bit_equal(result.state.previous, result.step)
    assert solve(EXACT, EASY, RHS, NONE).state.previous is None


PREVIOUS = np.random.default_rng(19).normal(size=N)


def moving(steps, **options):
    return CG(max_steps=steps, **{"rtol": 0.0, "progress": 0.0, "momentum": True, **options})


def after(previous):
    return moving(1).init(jnp.asarray(RHS))._replace(previous=jnp.asarray(previous))


def value(step):
    step = flat(step)
    return RHS @ step + step @ EASY @ step / 2


def test_momentum_goes_to_the_minimum_over_a_plane():
    plane = np.stack([RHS, PREVIOUS], axis=1)
    small = plane.T @ EASY @ plane
    expected = -plane @ np.linalg.solve(small, plane.T @ RHS)
    result = solve(moving(1), EASY, RHS, NONE, after(PREVIOUS))
    assert_close(result.step, expected, size=N * N, condition=condition(small))
    assert_bit_equal(result.state.previous, result.step)
    assert_close(result.image, EASY @ expected, size=N * N, condition=condition(small))


def test_momentum_never_raises_the_model_and_arrives():
    values = [value(solve(moving(steps), EASY, RHS, NONE, after(PREVIOUS)).step) for steps in (1, 2, 3)]
    arrived = solve(moving(4 * N, rtol=1e-10), EASY, RHS, NONE, after(PREVIOUS))
    exact = -np.linalg.solve(EASY, RHS)
    assert values == sorted(values, reverse=True)
    assert values[-1] > value(exact)
    assert int(arrived.status) == Status.CONVERGED
    residual = np.linalg.norm(EASY @ flat(arrived.step) + RHS)
    assert residual <= (1e-10 + tolerance(np.float64, N, condition(EASY))) * np.linalg.norm(RHS)


@pytest.mark.parametrize("steps", [3, N])
@pytest.mark.parametrize(
    "previous", [0 * RHS, RHS, -2 * RHS, np.full(N, np.nan), np.full(N, np.inf)], ids=["0", "b", "-2 b", "nan", "inf"]
)
def test_momentum_without_a_plane_is_plain(previous, steps):
    """Without a last solution, with one along the gradient, and with one that is not finite."""
    plain = solve(CG(max_steps=steps, rtol=0.0, progress=0.0), EASY, RHS, NONE)
    result = solve(moving(steps), EASY, RHS, NONE, after(previous))
    assert_close(result.step, plain.step, size=N * N, condition=condition(EASY))
    assert (int(result.status), int(result.solver_steps)) == (int(plain.status), steps)


def test_momentum_with_one_parameter():
    """There the gradient is along the last solution at every step."""
    for previous in (2.0, -1e-3):
        state = moving(3).init(jnp.ones(1))._replace(previous=jnp.asarray([previous]))
        result = solve(moving(3), np.array([[3.0]]), np.array([6.0]), NONE, state)
        assert_close(result.step, [-2.0])


def test_jacobi_on_a_badly_scaled_problem():
    scales = np.geomspace(1e-2, 1e2, 20)
    x = np.random.default_rng(16).normal(size=(30, 20)) * scales

    @functools.partial(jax.jit, static_argnames="precondition")
    def step(damping, *, precondition):
        jacobi = gnl.preconditioners.Jacobi() if precondition else None
        solver = CG(max_steps=400, rtol=1e-10, progress=0.0, preconditioner=jacobi)
        linear = curvature.linearised_problem(lambda p, x: x @ p, gnl.losses.squared_error, jnp.zeros(20), x)
        rhs = jnp.asarray(scales)
        return solver.solve(solver.prepare(linear, rhs, solver.init(rhs)), damping)

    plain, with_jacobi = (step(jnp.float64(1e-3), precondition=flag) for flag in (False, True))
    ggn = x.T @ x / 30
    expected = damped_step(ggn, scales, 1e-3)
    assert int(with_jacobi.status) == int(plain.status) == Status.CONVERGED
    assert 2 * int(with_jacobi.solver_steps) < int(plain.solver_steps)
    for result in (plain, with_jacobi):
        residual = (ggn + 1e-3 * np.eye(20)) @ flat(result.step) + scales
        slack = tolerance(np.float64, 400, condition(ggn, 1e-3) ** 0.5)
        assert np.linalg.norm(residual) <= (1e-10 + slack) * np.linalg.norm(scales)
        relative = 1e-10 * condition(ggn, 1e-3)
        assert np.linalg.norm(flat(result.step) - expected) <= relative * np.linalg.norm(expected)


def test_another_damping_reuses_what_was_prepared():
    products = []

    def product(v):
        products.append(None)
        return EASY @ v

    prepared = EXACT.prepare(Operator(RHS, product), jnp.asarray(RHS), EXACT.init(jnp.asarray(RHS)))
    assert not products
    for mu in (0.0, 3.0):
        result = EXACT.solve(prepared, jnp.float64(mu))
        assert_close(result.step, damped_step(EASY, RHS, mu), size=N * N, condition=condition(EASY, mu))


def test_vmap_and_no_second_compilation():
    traces = []

    @jax.jit
    def step(solver, rhs, damping):
        traces.append(None)
        return solve(solver, EASY, rhs, damping).step

    batch = jnp.stack([jnp.asarray(RHS), jnp.flip(jnp.asarray(RHS))])
    dampings = jnp.asarray([0.1, 5.0])
    together = jax.vmap(lambda b, mu: solve(EXACT, EASY, b, mu).step)(batch, dampings)
    for rhs, mu, got in zip(batch, dampings, together, strict=True):
        assert_close(got, damped_step(EASY, np.asarray(rhs), float(mu)), size=N * N, condition=condition(EASY))
        step(CG(max_steps=N, rtol=float(mu) / 100), rhs, mu)
    assert len(traces) == 1


def test_float32_stays_float32():
    result = solve(EXACT, EASY.astype(np.float32), RHS.astype(np.float32), np.float32(0.5))
    assert result.step.dtype == jnp.float32
    assert_close(result.step, damped_step(EASY, RHS, 0.5), size=N * N, condition=condition(EASY, 0.5))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1"),
        ({"max_steps": 2.0}, TypeError, "max_steps must be an int"),
        ({"max_steps": True}, TypeError, "max_steps must be an int"),
        ({"rtol": -0.1}, ValueError, "rtol must be a finite number that is not negative"),
        ({"rtol": float("nan")}, ValueError, "rtol must be"),
        ({"progress": -1.0}, ValueError, "progress must be"),
        ({"warm_start": float("inf")}, ValueError, "warm_start must be"),
        ({"momentum": 0.9}, TypeError, "momentum must be True or False"),
        ({"momentum": True, "warm_start": 0.9}, ValueError, "warm_start must be None"),
        ({"preconditioner": "jacobi"}, TypeError, "preconditioner must be one of gn_linear.preconditioners or None"),
    ],
)
def test_arguments_are_checked(arguments, error, says):
    with pytest.raises(error, match=says):
        CG(**arguments)


@pytest.mark.parametrize("name", PROBLEMS)
def test_step_at_every_damping(name):
    """From 1e-10 to 1e10 of the largest eigenvalue, as the dense solvers: to the accuracy that products allow."""
    oracle = dense(name)
    converged = CG(max_steps=20 * oracle.params.size, rtol=tolerance(np.float64), progress=0.0)
    solve = oracles_dense.compiled(name, converged)
    for rhs, damping, step, _ in oracles_dense.cases(name):
        result = solve(rhs, damping, jnp.float64(0.0))
        assert_close(result.step, step, size=oracle.params.size, condition=condition(oracle.ggn, float(damping)))
