"""The two forms of the model of a small fit against numpy, and what becomes of a fit that the squares lose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gn_linear as gnl
from gn_linear._small_models import BORNE, UNROLLED, Squares, Triangle, Units, forms
from tests.support import tolerance

RNG = np.random.default_rng(8)
ROWS = 20
DTYPES = [np.float32, np.float64]
FORMS = {"squares": Squares(), "triangle": Triangle(), "alone": Triangle(alone=True)}

solve = jax.jit(
    lambda columns, metric, size, damping, form: FORMS[form].solved(
        FORMS[form].of(columns), Units(1 / metric, size), damping
    ),
    static_argnames="form",
)
promise = jax.jit(
    lambda columns, metric, size, step, form: FORMS[form].reduction(
        FORMS[form].of(columns), Units(1 / metric, size), step
    ),
    static_argnames="form",
)


def problem(parameters, condition, dtype):
    """``[J r]^T``, units in which the condition of J is this one, and the norm of r."""
    basis = np.linalg.qr(RNG.normal(size=(ROWS, parameters)))[0]
    turn = np.linalg.qr(RNG.normal(size=(parameters, parameters)))[0]
    metric = np.geomspace(1, 100, parameters)
    jacobian = (basis * np.geomspace(1 / condition, 1, parameters)) @ turn * metric
    residuals = 3 * RNG.normal(size=ROWS)
    columns = np.concatenate([jacobian.T, residuals[None]]).astype(dtype)
    return columns, metric.astype(dtype), np.linalg.norm(columns[-1]).astype(dtype)


def dense(columns, metric, size, damping):
    """The damped step and its reduction by numpy's least squares in double precision."""
    columns, metric, size, damping = (np.asarray(x, np.float64) for x in (columns, metric, size, damping))
    a, c = columns[:-1].T / metric, columns[-1] / size
    stacked = np.concatenate([a, np.sqrt(damping) * np.eye(len(metric))])
    step = -np.linalg.lstsq(stacked, np.concatenate([c, np.zeros(len(metric))]))[0]
    return step, 0.5 * (c @ c - np.sum((a @ step + c) ** 2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", [1, UNROLLED, UNROLLED + 2])
def test_steps_are_as_near_as_the_condition_lets_them_be(form, dtype, parameters):
    for condition, damping in ((1.0, 0.0), (10.0, 1e-4), (10.0, 1.0)):
        columns, metric, size = problem(parameters, condition, dtype)
        step, predicted = solve(columns, metric, size, dtype(damping), form)
        expected, reduction = dense(columns, metric, size, dtype(damping))
        bound = tolerance(dtype, ROWS, condition**2)
        assert np.linalg.norm(step - expected) <= bound * max(np.linalg.norm(expected), 1)
        assert abs(predicted - reduction) <= bound
        # Of any other step, too, without the damping.
        other = RNG.normal(size=parameters).astype(dtype)
        image = columns[:-1].T.astype(np.float64) / metric @ other
        exact = -image @ (columns[-1] / size + 0.5 * image)
        assert abs(promise(columns, metric, size, other, form) - exact) <= tolerance(dtype, ROWS) * max(abs(exact), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", [2, UNROLLED + 2])
def test_squares_have_no_step_where_they_would_lose_it(dtype, parameters):
    eps = float(np.finfo(dtype).eps)
    for power, kept in ((0.25 * BORNE, True), (0.75 * BORNE, False), (1.0, False)):
        columns, metric, size = problem(parameters, eps**-power, dtype)
        step, predicted = solve(columns, metric, size, dtype(0), "squares")
        assert np.isfinite(predicted) == kept, power
        if kept:
            expected, _ = dense(columns, metric, size, 0)
            assert np.linalg.norm(step - expected) <= tolerance(dtype, ROWS, eps ** (-2 * power)) * max(
                np.linalg.norm(expected), 1
            )
        # The same with enough damping.
        assert np.isfinite(solve(columns, metric, size, dtype(1), "squares")[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["column", "residuals"])
def test_squares_that_under_or_overflow_are_refused_and_triangles_bear_them(dtype, part):
    columns, metric, size = problem(3, 2.0, dtype)
    for factor in (np.finfo(dtype).tiny ** 0.5, np.finfo(dtype).max ** 0.75):
        scaled = columns.copy()
        scaled[0 if part == "column" else -1] *= dtype(factor)
        units = metric * (dtype([factor, 1, 1]) if part == "column" else 1), size * (1 if part == "column" else factor)
        assert np.isnan(solve(scaled, *map(dtype, units), dtype(1), "squares")[1])
        step, predicted = solve(scaled, *map(dtype, units), dtype(1), "triangle")
        expected, reduction = dense(columns, metric, size, 1)
        np.testing.assert_allclose(step, expected, rtol=0, atol=tolerance(dtype, ROWS, 4.0))
        np.testing.assert_allclose(predicted, reduction, rtol=tolerance(dtype, ROWS, 4.0))


def test_few_rows_are_a_triangle_already():
    assert [type(form) for form in forms(4, 3)] == [Triangle]
    assert [type(form) for form in forms(5, 3)] == [Squares, Triangle]


@pytest.mark.parametrize("mapped", [False, True])
def test_fits_of_every_condition_end_where_qr_leads_them(mapped):
    """Lines through two points that nearly coincide: the squares serve some of the fits, and not others."""
    gaps = np.array([1.0, 1e-3, 1e-5, 1e-7])
    t = 1 + gaps[:, None] * np.linspace(-1, 1, 12)
    y = 2 * t + 1 + 0.1 * gaps[:, None] * np.cos(7 * np.arange(12))

    def fit(t, y, solver):
        found = gnl.least_squares(lambda p: p[0] * t + p[1] - y, jnp.zeros(2), solver=solver)
        return found.params, found.status, found.steps

    ends = []
    for solver in (None, gnl.solvers.QR(corrections=1)):
        alone = jax.jit(lambda t, y, solver=solver: fit(t, y, solver))
        if mapped:
            ends.append(jax.vmap(alone)(t, y))
        else:
            ends.append(list(map(np.stack, zip(*(alone(*one) for one in zip(t, y, strict=True)), strict=True))))
    (ours, status, steps), (expected, *others) = ends
    np.testing.assert_array_equal((status, steps), others)
    np.testing.assert_allclose(ours, expected, rtol=np.finfo(np.float64).eps ** 0.5)
