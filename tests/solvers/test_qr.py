"""QR against steps in 50 digits, in both spaces, where Cholesky loses its digits, and inside the transform."""

import jax.numpy as jnp
import numpy as np
import pytest

import gn_linear as gnl
from gn_linear.solvers import QR, Cholesky, Status
from tests import oracles_dense as checks
from tests.support import PROBLEMS, assert_close

SPACES = pytest.mark.parametrize("in_outputs", [False, True])


@SPACES
@pytest.mark.parametrize("name", PROBLEMS)
def test_step_is_as_near_as_rounding_lets_it_be(name, in_outputs):
    for l2 in (0.0, 0.03):
        checks.check_steps(QR(in_outputs), name, l2)


@pytest.mark.parametrize("name", ["softmax_labels", "two_heads_huber", "from_convex"])
def test_penalty_by_leaves(name):
    checks.check_steps(QR(in_outputs=True), name, "tree")  # it works in the parameters anyway


@SPACES
def test_scale_of_the_right_hand_side_does_not_matter(in_outputs):
    checks.check_scale(QR(in_outputs))


@SPACES
def test_what_is_not_finite_gives_no_step(in_outputs):
    checks.check_what_is_not_finite(QR(in_outputs))


@SPACES
def test_right_hand_side_of_zero_is_solved(in_outputs):
    checks.check_zero(QR(in_outputs))


@SPACES
def test_huber_with_outliers_alone(in_outputs):
    checks.check_outliers_alone(QR(in_outputs))


@SPACES
def test_saturated_softmax_in_float32(in_outputs):
    checks.check_saturated_softmax(QR(in_outputs))


@SPACES
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_conflicting_examples_at_small_damping(in_outputs, dtype):
    checks.check_conflicting_examples(QR(in_outputs), dtype)


@SPACES
def test_idle_parameters_stay(in_outputs):
    checks.check_idle_parameters(QR(in_outputs))


@pytest.mark.parametrize(("dtype", "in_outputs"), [(jnp.bfloat16, False), (jnp.float16, True)])
def test_narrow_parameters_are_solved_in_float32(dtype, in_outputs):
    checks.check_narrow_parameters(QR(in_outputs), dtype)


def test_nothing_to_solve():
    checks.check_nothing_to_solve(QR())


@SPACES
def test_leaves_of_several_dtypes(in_outputs):
    checks.check_several_dtypes(QR(in_outputs))


@pytest.mark.parametrize(
    ("policy", "in_outputs"),
    [(gnl.damping.LevenbergMarquardt(), True), (gnl.damping.Path(), False)],
    ids=["lm", "path"],
)
def test_it_fits_a_curve(policy, in_outputs):
    checks.check_fit(QR(in_outputs), policy)


def test_refused_step_is_solved_again_with_more_damping():
    checks.check_retries(QR(in_outputs=False))


@SPACES
def test_another_damping_needs_no_jacobian(in_outputs):
    checks.check_another_damping_needs_no_jacobian(QR(in_outputs))


def of_condition(shape, number):
    """A matrix with singular values from 1 down to one over the condition number, and a vector that it nearly fits."""
    rng, k = np.random.default_rng(11), min(shape)
    left = np.linalg.qr(rng.normal(size=(shape[0], k)))[0]
    right = np.linalg.qr(rng.normal(size=(shape[1], k)))[0]
    x = 10 * (left * np.geomspace(1.0, 1.0 / number, k)) @ right.T
    return x, x @ rng.normal(size=shape[1]) + 1e-9 * rng.normal(size=shape[0])


@pytest.mark.parametrize("shape", [(16, 6), (16, 20)], ids=["parameters", "outputs"])
@pytest.mark.parametrize("damping", [0.0, 1e-18])
def test_condition_number_is_not_squared(shape, damping):
    """Condition 1e8 without damping, where that of G is one over a rounding: Cholesky is lost, QR has half its digits.

    Data are exact in float64: outputs of zero, sixteen examples, so that H and its root divide by powers of two.
    """
    x, y = of_condition(shape, 1e8)
    with checks.decimal.localcontext(checks.decimal.Context(prec=60)):
        # By the dual of the problem, of the size of the outputs where these are fewer: it has a limit without damping.
        j, target = checks.exact(x), checks.exact(y)
        wide = shape[0] < shape[1]
        square = j @ j.T if wide else j.T @ j
        square = square + np.diag(checks.exact(np.full(len(square), 16 * damping)))
        step = j.T @ checks.exact_solve(square, target) if wide else checks.exact_solve(square, j.T @ target)
    result = checks.affine_solve(QR(), x, y, np.float64(damping))
    assert int(result.status) == Status.CONVERGED
    assert_close(result.step, step.astype(np.float64), size=1, condition=1e8)
    other = checks.affine_solve(Cholesky(), x, y, np.float64(damping))
    with pytest.raises(AssertionError, match="error"):
        assert_close(other.step, step.astype(np.float64), size=1000, condition=1e8)


@SPACES
def test_negative_damping_is_seen_only_where_there_is_a_slope(in_outputs):
    """In the space of the outputs the directions without curvature are left alone, as Lanczos leaves them."""
    x, y = checks.draw(6, 4, 6)
    own = checks.affine_solve(QR(in_outputs), x, y, np.float64(-1e-3))
    other = checks.affine_solve(QR(in_outputs), x, y, np.float64(-1e-3), np.ones(6))
    assert int(own.status) == (Status.CONVERGED if in_outputs else Status.NON_POSITIVE_CURVATURE)
    assert int(other.status) == Status.NON_POSITIVE_CURVATURE
