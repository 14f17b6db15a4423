"""What the dense solvers share: steps next to those in 50 digits, in both spaces, at the edges of the number range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gn_linear as gnl
from gn_linear.curvature import linearised_problem
from gn_linear.solvers import QR, Cholesky
from tests import oracles_dense as checks
from tests.support import PROBLEMS, assert_close, condition

SOLVERS = {"Cholesky": Cholesky, "QR": QR}
SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
EITHER = pytest.mark.parametrize(
    "solver",
    [make(in_outputs) for make in SOLVERS.values() for in_outputs in (False, True)],
    ids=[f"{name} in the {space}" for name in SOLVERS for space in ("parameters", "outputs")],
)


@EITHER
@pytest.mark.parametrize("name", PROBLEMS)
def test_step_is_as_near_as_rounding_lets_it_be(name, solver):
    for l2 in (0.0, 0.03):
        checks.check_steps(solver, name, l2)


@SOLVER
@pytest.mark.parametrize("name", ["softmax_labels", "two_heads_huber", "from_convex"])
def test_penalty_by_leaves(name, solver):
    checks.check_steps(solver(in_outputs=True), name, "tree")  # it works in the parameters anyway


@EITHER
def test_scale_of_the_right_hand_side_does_not_matter(solver):
    checks.check_scale(solver)


@EITHER
def test_what_is_not_finite_gives_no_step(solver):
    checks.check_what_is_not_finite(solver)


@EITHER
def test_right_hand_side_of_zero_is_solved(solver):
    checks.check_zero(solver)


@EITHER
def test_huber_with_outliers_alone(solver):
    checks.check_outliers_alone(solver)


@EITHER
def test_saturated_softmax_in_float32(solver):
    checks.check_saturated_softmax(solver)


@EITHER
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_conflicting_examples_at_small_damping(solver, dtype):
    checks.check_conflicting_examples(solver, dtype)


@pytest.mark.parametrize("solver", [Cholesky(False), QR(False), QR(True)])
def test_idle_parameters_stay(solver):
    checks.check_idle_parameters(solver)


@SOLVER
@pytest.mark.parametrize(("dtype", "in_outputs"), [(jnp.bfloat16, False), (jnp.float16, True)])
def test_narrow_parameters_are_solved_in_float32(dtype, in_outputs, solver):
    checks.check_narrow_parameters(solver(in_outputs), dtype)


@SOLVER
def test_nothing_to_solve(solver):
    checks.check_nothing_to_solve(solver())


@EITHER
def test_leaves_of_several_dtypes(solver):
    checks.check_several_dtypes(solver)


@SOLVER
@pytest.mark.parametrize(
    ("policy", "in_outputs"),
    [(gnl.damping.LevenbergMarquardt(), True), (gnl.damping.Path(), False)],
    ids=["lm", "path"],
)
def test_it_fits_a_curve(policy, in_outputs, solver):
    checks.check_fit(solver(in_outputs), policy)


@SOLVER
def test_refused_step_is_solved_again_with_more_damping(solver):
    checks.check_retries(solver(in_outputs=False))


@EITHER
def test_another_damping_needs_no_jacobian(solver):
    checks.check_another_damping_needs_no_jacobian(solver)


@SOLVER
def test_model_that_mixes_examples_is_refused(solver):
    def centred(p, x):
        return jnp.tanh((x - jnp.mean(x, 0)) @ p)

    x, y, params = jnp.arange(12.0).reshape(4, 3) / 12, jnp.ones(4), jnp.ones(3)
    optimiser = gnl.gauss_newton(centred, gnl.losses.squared_error, solver=solver())
    grads = jax.grad(lambda p: gnl.losses.squared_error(centred(p, x), y))(params)
    updates, state = jax.jit(optimiser.update)(grads, optimiser.init(params), params, inputs=x, targets=y)
    assert state.info.refusal == gnl.Refusal.SOLVER
    assert not np.any(updates)


@EITHER
@pytest.mark.parametrize("size", [1e-3, 1e4, 1e8])
def test_gradient_that_was_clipped_far_down(solver, size):
    """In float32, by a clip that leaves one part in up to 1e8: the step is that of the clipped gradient."""
    x, y = (a.astype(np.float32) for a in checks.draw(14, 6, 9))
    y = y * np.float32(size)
    gradient = -x.T.astype(np.float64) @ y.astype(np.float64) / 6
    clipped = gradient / np.linalg.norm(gradient)
    result = checks.affine_solve(solver, x, y, np.float32(0.1), clipped.astype(np.float32))
    matrix = x.T.astype(np.float64) @ x.astype(np.float64) / 6
    expected = -np.linalg.solve(matrix + 0.1 * np.eye(9), clipped)
    assert_close(result.step, expected, size=54, condition=condition(matrix, 0.1))


@EITHER
def test_model_that_computes_in_half_precision(solver):
    """Parameters, inputs and outputs in float32, products in bfloat16: examples do not mix, whatever rounding says."""
    x, y = (jnp.asarray(a, jnp.float32) for a in checks.draw(15, 12, 3))
    params = jnp.ones((3, 4), jnp.float32)

    def predict(p, x):
        return jnp.tanh(x.astype(jnp.bfloat16) @ p.astype(jnp.bfloat16)).astype(jnp.float32).sum(1)

    loss = gnl.losses.squared_error
    optimiser = gnl.gauss_newton(predict, loss, solver=solver)
    grads = jax.grad(lambda p: loss(predict(p, x), y))(params)
    updates, state = jax.jit(optimiser.update)(grads, optimiser.init(params), params, inputs=x, targets=y)
    assert bool(state.info.accepted)
    assert np.any(updates)


def test_models_that_refuse_one_example_are_taken_whole():
    def predict(p, x):
        assert x.shape[0] == 4
        return x @ p

    x, y = checks.draw(16, 4, 3)
    problem = linearised_problem(predict, gnl.losses.squared_error, jnp.zeros(3), jnp.asarray(x), targets=y)
    assert_close(problem.jacobian(), x, size=3)


@pytest.mark.parametrize("solver", [Cholesky(False), Cholesky(True), QR(True)])
def test_small_slope_without_curvature_gives_no_step_without_damping(solver):
    """More parameters than outputs, and a decay of a thousandth of the gradient that no output sees."""
    x, y = (a.astype(np.float32) for a in checks.draw(6, 4, 6))
    own = -x.T @ y / 4
    decay = 1e-3 * np.linalg.norm(own) * np.ones(6, np.float32) / np.sqrt(np.float32(6))
    result = checks.affine_solve(solver, x, y, np.float32(0.0), own + decay)
    assert int(result.status) == gnl.solvers.Status.NON_POSITIVE_CURVATURE
    assert not np.any(result.step)
