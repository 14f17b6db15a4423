"""QR against steps in 60 digits, where Cholesky loses its digits."""

import numpy as np
import pytest

from gn_linear.solvers import QR, Cholesky, Status
from tests import oracles_dense as checks
from tests.support import assert_close


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


@pytest.mark.parametrize("in_outputs", [False, True])
def test_negative_damping_is_seen_only_where_there_is_a_slope(in_outputs):
    """In the space of the outputs the directions without curvature are left alone, as Lanczos leaves them."""
    x, y = checks.draw(6, 4, 6)
    own = checks.affine_solve(QR(in_outputs), x, y, np.float64(-1e-3))
    other = checks.affine_solve(QR(in_outputs), x, y, np.float64(-1e-3), np.ones(6))
    assert int(own.status) == (Status.CONVERGED if in_outputs else Status.NON_POSITIVE_CURVATURE)
    assert int(other.status) == Status.NON_POSITIVE_CURVATURE
