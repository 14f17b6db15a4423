"""Cholesky next to conjugate gradients, the space that it takes, and its momentum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gn_linear as gnl
from gn_linear.curvature import linearised_problem
from gn_linear.solvers import CG, Cholesky
from tests import oracles_dense as checks
from tests.support import PROBLEMS, assert_bit_equal, assert_close, condition, dense, flat, tolerance, unflatten_like

SPACES = pytest.mark.parametrize("in_outputs", [False, True])


@pytest.mark.parametrize("name", ["squared_error", "poisson"])
def test_agrees_with_converged_conjugate_gradients(name):
    oracle, mu, l2 = dense(name), jnp.float64(0.1), jnp.float64(0.1)
    rhs = unflatten_like(oracle.gradient + np.arange(oracle.params.size), PROBLEMS[name].params)
    theirs = checks.compiled(name, CG(max_steps=200, rtol=tolerance(np.float64), progress=0.0))(rhs, mu, l2)
    ours = checks.compiled(name, Cholesky())(rhs, mu, l2)
    assert_close(ours.step, theirs.step, size=oracle.jacobian.size, condition=condition(oracle.ggn, 0.2))


def test_same_run_as_converged_conjugate_gradients():
    exact = CG(max_steps=300, rtol=tolerance(np.float64), progress=0.0)
    (theirs, _), _ = checks.run(3, solver=exact, damping=0.1)
    (ours, _), _ = checks.run(3, solver=Cholesky(), damping=0.1)
    vector, matrix = flat(checks.start()), np.zeros((15, 15))
    jacobian = jax.jacfwd(lambda v: checks.wave(unflatten(v), checks.X).ravel())(jnp.asarray(vector))
    matrix = np.asarray(jacobian.T @ jacobian) / 12
    assert_close(ours, theirs, size=3 * jacobian.size, condition=condition(matrix, 0.1))


def unflatten(vector):
    return unflatten_like(vector, checks.start())


def test_outputs_of_a_callable_that_are_a_tree():
    """Its Hessian has no blocks that could be told, so it is decomposed whole."""
    problem, name, mu = PROBLEMS["two_heads"], "two_heads", jnp.float64(0.1)
    rhs = unflatten_like(dense(name).gradient, problem.params)

    @jax.jit
    def solve(rhs, damping):
        linear = linearised_problem(
            problem.predict,
            gnl.losses.from_convex(problem.formula),
            problem.params,
            problem.inputs,
            targets=problem.targets,
        )
        return Cholesky().solve(Cholesky().prepare(linear, rhs, ()), damping).step

    expected = checks.compiled(name, Cholesky())(rhs, mu, jnp.float64(0.0)).step
    assert_close(solve(rhs, mu), expected, size=dense(name).jacobian.size, condition=condition(dense(name).ggn, 0.1))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_the_smaller_matrix_is_factorised(shape):
    x, y = checks.draw(0, *shape)
    rhs = jax.ShapeDtypeStruct((shape[1],), np.float64)
    matrix = jax.eval_shape(lambda b: Cholesky().prepare(checks.affine_problem(jnp.asarray(x), y), b, ()).matrix, rhs)
    assert matrix.shape == (min(shape),) * 2


def test_negative_damping_has_no_step_in_the_space_of_the_outputs():
    """There G has more zero eigenvalues than can be seen."""
    x, y = checks.draw(6, 4, 6)
    result = checks.affine_solve(Cholesky(), x, y, np.float64(-1e-3), np.ones(6))
    assert int(result.status) == gnl.solvers.Status.NON_POSITIVE_CURVATURE


def test_vmap_and_no_second_compilation():
    traces, problem = [], PROBLEMS["softmax_soft"]
    oracle = dense("softmax_soft")

    @jax.jit
    def step(solver, rhs, damping):
        traces.append(None)
        linear = linearised_problem(
            problem.predict, problem.loss, problem.params, problem.inputs, targets=problem.targets
        )
        prepared = solver.prepare(linear, rhs, ())
        return solver.solve(prepared, damping[0]).step, jax.vmap(lambda mu: solver.solve(prepared, mu).step)(damping)

    rhs = unflatten_like(oracle.gradient, problem.params)
    for dampings in ([0.1, 3.0], [2.0, 1e-3]):
        alone, together = step(Cholesky(), rhs, jnp.asarray(dampings))
        first = jax.tree.map(lambda x: x[0], together)
        assert_close(first, alone, size=oracle.jacobian.size, condition=condition(oracle.ggn, dampings[0]))
    assert len(traces) == 1


# ---- momentum


@SPACES
def test_momentum_draws_the_step_towards_the_last_one(in_outputs):
    """Three batches against the minimum of the quadratic model plus mu/2 |d - beta p|^2."""
    (x, y), mu, beta = checks.draw(11, 3, 5), 0.3, 0.8
    solver = Cholesky(in_outputs, momentum=beta)
    last = np.zeros(5)
    state = solver.init(jnp.zeros(5))
    for shift in range(3):
        a, b = x + shift, np.roll(y, shift)
        matrix, gradient = a.T @ a / 3 + mu * np.eye(5), -a.T @ b / 3
        result = checks.affine_solve(solver, a, b, np.float64(mu), state=state)
        expected = np.linalg.solve(matrix, mu * beta * last - gradient)
        assert_close(result.step, expected, size=15, condition=condition(a.T @ a / 3, mu))
        last, state = np.asarray(result.step), result.state
        assert_close(state.damping, mu)


@SPACES
def test_momentum_of_zero_is_none(in_outputs):
    x, y = checks.draw(12, 4, 6)
    solver = Cholesky(in_outputs, momentum=0.0)
    state = gnl.solvers.CholeskyState(jnp.ones(6), jnp.float64(2.0))
    drawn = checks.affine_solve(solver, x, y, np.float64(0.1), state=state).step
    assert_bit_equal(drawn, checks.affine_solve(Cholesky(in_outputs), x, y, np.float64(0.1)).step)


def test_momentum_never_turns_the_gradient_round():
    """The pull is that of the damping of its own step, and at most half of the gradient against the gradient."""
    x, y = checks.draw(13, 4, 6)
    gradient = -x.T @ y / 4
    for size, share in ((1e-3, None), (1e3, 0.5)):
        state = gnl.solvers.CholeskyState(jnp.asarray(size * gradient), jnp.float64(2.0))
        step = checks.affine_solve(Cholesky(momentum=0.5), x, y, np.float64(2.0**70), state=state).step
        left = 1 - size if share is None else share
        assert_close(step * 2.0**70, -left * gradient, size=24)


def test_refused_step_keeps_the_momentum():
    optimiser = gnl.gauss_newton(checks.wave, gnl.losses.squared_error, solver=Cholesky(momentum=0.9))
    params = checks.start()
    update = jax.jit(optimiser.update)
    grads = jax.grad(lambda p: gnl.losses.squared_error(checks.wave(p, checks.X), checks.Y))(params)
    updates, state = update(grads, optimiser.init(params), params, inputs=checks.X, targets=checks.Y)
    assert bool(state.info.accepted)
    assert_bit_equal(state.solver.step, updates)
    broken = jax.tree.map(lambda g: g * jnp.nan, grads)
    _, after = update(broken, state, params, inputs=checks.X, targets=checks.Y)
    assert not bool(after.info.accepted)
    assert_bit_equal(after.solver, state.solver)


def test_momentum_helps_where_batches_are_small():
    """Four of 40 noisy equations at a time: nearer to the least-squares fit than any learning rate without it."""

    def predict(p, x):
        return x @ p

    def distance(momentum, learning_rate, key):
        keys, loss = jax.random.split(key, 3), gnl.losses.squared_error
        x = jax.random.normal(keys[0], (40, 20)) * jnp.logspace(0, -1, 20)
        y = x @ jnp.ones(20) + 0.1 * jax.random.normal(keys[1], (40,))
        solver = Cholesky(momentum=momentum)
        optimiser = gnl.gauss_newton(predict, loss, solver=solver, damping=1e-2, learning_rate=learning_rate)

        def step(carry, key):
            p, state = carry
            chosen = jax.random.choice(key, 40, (4,), replace=False)
            inputs, targets = x[chosen], y[chosen]
            grads = jax.grad(lambda p: loss(predict(p, inputs), targets))(p)
            updates, state = optimiser.update(grads, state, p, inputs=inputs, targets=targets)
            return (p + updates, state), jnp.linalg.norm(x @ (p + updates - best))

        best, start = jnp.linalg.lstsq(x, y)[0], jnp.zeros(20)
        _, found = jax.lax.scan(step, (start, optimiser.init(start)), jax.random.split(keys[2], 300))
        return found[-50:].mean()

    ways = jnp.asarray([[0.0, 1.0], [0.0, 0.3], [0.0, 0.1], [0.97, 0.03]])
    seeds = jax.random.split(jax.random.key(0), 8)
    found = jax.jit(jax.vmap(lambda way: jax.vmap(lambda key: distance(*way, key))(seeds)))(ways)
    assert np.sum(np.asarray(found[3] < found[:3].min(0))) >= 7


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Cholesky(momentum=-0.1), ValueError, "momentum must be .* not negative"),
        (lambda: Cholesky(momentum=1.5), ValueError, r"momentum must be at most 1, but is 1\.5"),
        (lambda: Cholesky(momentum="much"), TypeError, "momentum must be a finite number"),
        (lambda: Cholesky("outputs"), TypeError, "in_outputs must be True, False, or None"),
        (lambda: gnl.solvers.QR(1), TypeError, "in_outputs must be True, False, or None"),
    ],
)
def test_what_does_not_fit_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
