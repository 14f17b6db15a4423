"""Lanczos against dense matrix functions, in both spaces, and inside the transform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gn_linear as gnl
from gn_linear.curvature import linearised_problem
from tests.support import PROBLEMS, assert_close, dense, dense_jacobian, flat, l2_diagonal, unflatten_like

RANK = 32
FILTERS = {
    "tikhonov": gnl.filters.Tikhonov(0.05),
    "descent": gnl.filters.GradientDescent(0.01, 500),
    "flow": gnl.filters.GradientFlow(20.0),
    "proximal": gnl.filters.Proximal(4.0, 5),
}
NAMES = [name for name in PROBLEMS if name != "from_convex"]


def exact(filter_, matrix, rhs):
    """The step of a filter from the eigenvalues of a dense symmetric matrix."""
    values, vectors = np.linalg.eigh(matrix)
    phi = np.asarray(filter_(jnp.asarray(np.maximum(values, 0.0))))
    return -vectors @ (phi * (vectors.T @ rhs))


def solving(name, solver, l2=0.0):
    """A compiled solve for any right-hand side and damping."""
    problem = PROBLEMS[name]

    @jax.jit
    def run(rhs, damping):
        linear = linearised_problem(
            problem.predict, problem.loss, problem.params, problem.inputs, targets=problem.targets, l2=l2
        )
        result = solver.solve(solver.prepare(linear, rhs, solver.init(problem.params)), damping)
        return result.step, result.solver_steps, result.status

    return run


CASES = [(name, kind) for name, kind in zip(NAMES, list(FILTERS) * len(NAMES), strict=False)]
CASES += [("softmax_soft", kind) for kind in FILTERS if ("softmax_soft", kind) not in CASES]


@pytest.mark.parametrize("in_outputs", [False, True])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_step_is_the_filter_of_the_dense_matrix(name, kind, in_outputs):
    """The batch's own gradient, and one that is not: both spaces give the same step."""
    oracle, chosen = dense(name), FILTERS[kind]
    rng = np.random.default_rng(1)
    solver = gnl.solvers.Lanczos(RANK, chosen, rtol=0.0, in_outputs=in_outputs)
    mu, solve = float(chosen.equivalent_damping()), solving(name, solver)
    for vector in (oracle.gradient, oracle.gradient + rng.normal(size=oracle.params.size)):
        rhs = unflatten_like(vector, PROBLEMS[name].params)
        step, count, _ = solve(rhs, jnp.asarray(mu))
        scale = float(np.max(np.abs(vector))) / mu  # the filter's largest value; nothing smaller can be promised
        assert_close(step, exact(chosen, oracle.ggn, vector), size=RANK * oracle.params.size, scale=scale)
        assert count <= 2 * RANK


@pytest.mark.parametrize("l2", [0.3, {"in": {"w": 0.1, "b": 0.0}, "out": 1.0, "absent": None}])
def test_penalty_shifts_the_spectrum(l2):
    name = "softmax_labels"
    oracle, params = dense(name), PROBLEMS[name].params
    matrix = oracle.ggn + np.diag(l2_diagonal(l2, params))
    vector = oracle.gradient + l2_diagonal(l2, params) * oracle.params
    for kind in ("tikhonov", "descent"):
        chosen = FILTERS[kind]
        mu = float(chosen.equivalent_damping())
        solver = gnl.solvers.Lanczos(RANK, chosen, rtol=0.0, in_outputs=True)  # a pytree works in the parameters anyway
        step, _, _ = solving(name, solver, l2)(unflatten_like(vector, params), jnp.asarray(mu))
        scale = float(np.max(np.abs(vector))) / mu
        assert_close(step, exact(chosen, matrix, vector), size=RANK * oracle.params.size, scale=scale)


def test_saturated_softmax_in_float32():
    """Logits 80 apart: H is all but zero, and nothing divides by it."""
    x = jnp.asarray([[1.0], [1.0], [-1.0]], jnp.float32)

    def predict(params, x):
        return jnp.concatenate([x * params["w"], jnp.zeros_like(x)], axis=1)

    params, y = {"w": jnp.float32(80.0)}, jnp.array([0, 1, 1])
    solver = gnl.solvers.Lanczos(4, in_outputs=True, rtol=0.0)
    loss = gnl.losses.softmax_cross_entropy

    @jax.jit
    def solve(params, damping):
        problem = linearised_problem(predict, loss, params, x, targets=y)
        rhs = jax.grad(lambda p: loss(predict(p, x), y))(params)
        return rhs, solver.solve(solver.prepare(problem, rhs, solver.init(params)), damping)

    rhs, result = solve(params, jnp.float32(0.5))
    assert_close(result.step["w"], -rhs["w"] / 0.5)  # G vanishes, so damping alone is left
    assert result.status == gnl.solvers.Status.CONVERGED


# ---- inside the transform

X = jnp.linspace(-1.0, 1.0, 12)[:, None]
Y = jnp.sin(3.0 * X)


def wave(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def start():
    keys = jax.random.split(jax.random.key(2), 3)
    return {"w": 3 * jax.random.normal(keys[0], (1, 5)), "b": jax.random.normal(keys[1], (5,)), "v": jnp.ones((5, 1))}


@functools.cache
def dense_wave():
    """The Jacobian and the residual at the start."""
    return dense_jacobian(wave, start(), X), flat(wave(start(), X) - Y)


def run(optimiser, steps, params=None):
    params = start() if params is None else params

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(lambda p: gnl.losses.squared_error(wave(p, X), Y))(params)
        updates, state = optimiser.update(grads, state, params, inputs=X, targets=Y)
        return (optax.apply_updates(params, updates), state), (value, state.info)

    return jax.jit(lambda p: jax.lax.scan(step, (p, optimiser.init(p)), length=steps))(params)


@pytest.mark.parametrize("kind", FILTERS)
def test_damping_sets_the_filter(kind):
    """With damping = 1 / (eta K), 1 / t or 1 / (h m) the transform takes exactly that filter's step."""
    chosen = FILTERS[kind]
    solver = gnl.solvers.Lanczos(20, chosen, rtol=0.0)
    (params, _), _ = run(
        gnl.gauss_newton(wave, gnl.losses.squared_error, solver=solver, damping=chosen.equivalent_damping()), 1
    )
    jacobian, residual = dense_wave()
    gradient = jacobian.T @ residual / len(X)
    want = exact(chosen, jacobian.T @ jacobian / len(X), gradient)
    moved = flat(params) - flat(start())
    scale = float(np.max(np.abs(gradient)) * chosen(jnp.zeros(())))
    assert_close(moved, want, size=20 * moved.size, scale=scale)


@pytest.mark.parametrize("policy", [gnl.damping.LevenbergMarquardt(), gnl.damping.Path()])
@pytest.mark.parametrize("kind", FILTERS)
def test_every_filter_fits_the_curve(kind, policy):
    solver = gnl.solvers.Lanczos(20, FILTERS[kind], rtol=1e-6)
    _, (values, _) = run(gnl.gauss_newton(wave, gnl.losses.squared_error, solver=solver, damping=policy), 30)
    assert values[-1] < 1e-2 * values[0]
    assert np.all(np.diff(values) <= 0)  # a refused step leaves the loss as it is


def test_refused_step_is_solved_again_with_more_damping():
    """One basis a step: as many products as without retries, and a smaller step after them."""
    tiny = gnl.damping.LevenbergMarquardt(initial=1e-6)
    solver = gnl.solvers.Lanczos(20, rtol=0.0)
    _, (values, info) = run(gnl.gauss_newton(wave, gnl.losses.squared_error, solver=solver, damping=tiny), 6)
    assert np.all(info.solver_steps <= 12 + 1)  # outputs, and a vector of rounding errors
    used = np.asarray(info.damping)
    assert used[0] > 2e-6  # the first damping was too small, and was raised within the step
    assert np.all(info.accepted)
    assert np.all(np.diff(values) < 0)


def test_path_takes_the_lowest_objective():
    factors = (0.01, 1.0, 100.0)
    solver = gnl.solvers.Lanczos(20, rtol=0.0)
    path = gnl.gauss_newton(
        wave, gnl.losses.squared_error, solver=solver, damping=gnl.damping.Path(factors, initial=1e-2)
    )
    (params, state), _ = run(path, 1)
    reached = gnl.losses.squared_error(wave(params, X), Y)
    unit = float(state.scale) * 1e-2
    ends = []
    for factor in factors:
        (end, _), _ = run(gnl.gauss_newton(wave, gnl.losses.squared_error, solver=solver, damping=factor * unit), 1)
        ends.append(float(gnl.losses.squared_error(wave(end, X), Y)))
    assert_close(reached, np.min(ends), size=20 * 16)
    best = factors[int(np.argmin(ends))]
    assert_close(state.info.damping, best * unit)
    assert_close(state.damping.multiple, best * 1e-2)


@pytest.mark.parametrize("solver", [gnl.solvers.Lanczos(20), gnl.solvers.CG()], ids=["Lanczos", "CG"])
def test_path_that_raises_the_objective_is_halved(solver):
    """All dampings are far too small, and still no step is lost."""
    policy = gnl.damping.Path((1.0, 2.0), initial=1e-8)
    _, (values, info) = run(gnl.gauss_newton(wave, gnl.losses.squared_error, solver=solver, damping=policy), 6)
    assert np.all(info.accepted)
    assert np.all(np.diff(values) < 0)
    assert np.any(np.diff(info.damping) > 0)  # where the step had to be halved


def test_minimum_norm_has_no_damping_to_adapt():
    solver = gnl.solvers.Lanczos(12, gnl.filters.MinimumNorm(1e-10), rtol=0.0)
    with pytest.raises(TypeError, match=r"damping must be 0\.0"):
        gnl.gauss_newton(wave, gnl.losses.squared_error, solver=solver)
    (params, _), _ = run(gnl.gauss_newton(wave, gnl.losses.squared_error, solver=solver, damping=0.0), 1)
    want = -np.linalg.lstsq(*dense_wave(), rcond=1e-5)[0]
    assert_close(flat(params) - flat(start()), want, condition=1e10)


def test_converged_filter_stops_the_basis():
    """From the second step on the basis ends where the filter needs no more."""
    loose = gnl.solvers.Lanczos(12, rtol=0.3)
    _, (_, info) = run(gnl.gauss_newton(wave, gnl.losses.squared_error, solver=loose, damping=10.0), 3)
    assert int(info.solver_steps[0]) > int(info.solver_steps[1])
    assert np.all(info.solver_status == gnl.solvers.Status.CONVERGED)
