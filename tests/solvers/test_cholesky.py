"""Cholesky against steps in 50 digits, in both spaces, at the edges of the number range, and inside the transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gn_linear as gnl
from gn_linear.curvature import linearised_problem
from gn_linear.solvers import CG, Cholesky
from tests import oracles_dense as checks
from tests.support import PROBLEMS, assert_close, condition, dense, flat, tolerance, unflatten_like

SPACES = pytest.mark.parametrize("in_outputs", [False, True])


@SPACES
@pytest.mark.parametrize("name", PROBLEMS)
def test_step_is_as_near_as_rounding_lets_it_be(name, in_outputs):
    for l2 in (0.0, 0.03):
        checks.check_steps(Cholesky(in_outputs), name, l2)


@pytest.mark.parametrize("name", ["softmax_labels", "two_heads_huber", "from_convex"])
def test_penalty_by_leaves(name):
    checks.check_steps(Cholesky(in_outputs=True), name, "tree")  # it works in the parameters anyway


@SPACES
def test_scale_of_the_right_hand_side_does_not_matter(in_outputs):
    checks.check_scale(Cholesky(in_outputs))


@SPACES
def test_what_is_not_finite_gives_no_step(in_outputs):
    checks.check_what_is_not_finite(Cholesky(in_outputs))


@SPACES
def test_right_hand_side_of_zero_is_solved(in_outputs):
    checks.check_zero(Cholesky(in_outputs))


@SPACES
def test_huber_with_outliers_alone(in_outputs):
    checks.check_outliers_alone(Cholesky(in_outputs))


@SPACES
def test_saturated_softmax_in_float32(in_outputs):
    checks.check_saturated_softmax(Cholesky(in_outputs))


@SPACES
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_conflicting_examples_at_small_damping(in_outputs, dtype):
    checks.check_conflicting_examples(Cholesky(in_outputs), dtype)


def test_idle_parameters_stay():
    checks.check_idle_parameters(Cholesky(in_outputs=False))


@pytest.mark.parametrize(("dtype", "in_outputs"), [(jnp.bfloat16, False), (jnp.float16, True)])
def test_narrow_parameters_are_solved_in_float32(dtype, in_outputs):
    checks.check_narrow_parameters(Cholesky(in_outputs), dtype)


def test_nothing_to_solve():
    checks.check_nothing_to_solve(Cholesky())


@SPACES
def test_leaves_of_several_dtypes(in_outputs):
    checks.check_several_dtypes(Cholesky(in_outputs))


@pytest.mark.parametrize(
    ("policy", "in_outputs"),
    [(gnl.damping.LevenbergMarquardt(), True), (gnl.damping.Path(), False)],
    ids=["lm", "path"],
)
def test_it_fits_a_curve(policy, in_outputs):
    checks.check_fit(Cholesky(in_outputs), policy)


def test_refused_step_is_solved_again_with_more_damping():
    checks.check_retries(Cholesky(in_outputs=False))


@SPACES
def test_another_damping_needs_no_jacobian(in_outputs):
    checks.check_another_damping_needs_no_jacobian(Cholesky(in_outputs))


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


@pytest.mark.parametrize("solver", [gnl.solvers.Cholesky(), gnl.solvers.QR()], ids=["Cholesky", "QR"])
def test_model_that_mixes_examples_is_refused(solver):
    def centred(p, x):
        return jnp.tanh((x - jnp.mean(x, 0)) @ p)

    x, y, params = jnp.arange(12.0).reshape(4, 3) / 12, jnp.ones(4), jnp.ones(3)
    optimiser = gnl.gauss_newton(centred, gnl.losses.squared_error, solver=solver)
    grads = jax.grad(lambda p: gnl.losses.squared_error(centred(p, x), y))(params)
    updates, state = jax.jit(optimiser.update)(grads, optimiser.init(params), params, inputs=x, targets=y)
    assert state.info.refusal == gnl.Refusal.SOLVER
    assert not np.any(updates)
