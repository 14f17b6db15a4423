"""The two forms of the model of a small fit against numpy, and what becomes of a fit that the squares lose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gn_linear as gnl
from gn_linear._small_models import UNROLLED, Squares, Triangle, forms
from tests.support import tolerance

RNG = np.random.default_rng(8)
ROWS = 20
DTYPES = [np.float32, np.float64]
FORMS = {"squares": Squares(), "triangle": Triangle(), "alone": Triangle(alone=True)}


@functools.partial(jax.jit, static_argnames="form")
def solve(columns, metric, size, damping, form):
    units = jnp.append(1 / metric, 1 / size)
    return FORMS[form].solved(FORMS[form].of(columns), units, damping)


@functools.partial(jax.jit, static_argnames="form")
def promise(columns, metric, size, step, form):
    units = jnp.append(1 / metric, 1 / size)
    return FORMS[form].reduction(FORMS[form].of(columns), units, step)


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
    columns, metric, size = problem(parameters, 1.0, np.float64)
    basis = np.linalg.qr(columns[:-1].T)[0]
    for power, kept in ((0.4, True), (0.6, False), (1.5, False)):
        # All but this part of the square of the last column lies in the span of the others.
        part, turn = eps**power, np.eye(parameters)
        turn[:, -1] = [*[((1 - part) / (parameters - 1)) ** 0.5] * (parameters - 1), part**0.5]
        near = np.concatenate([metric[:, None] * (basis @ turn).T, columns[-1:]]).astype(dtype)
        step, predicted = solve(near, metric.astype(dtype), dtype(size), dtype(0), "squares")
        assert np.isfinite(predicted) == kept, power
        if kept:
            expected, _ = dense(near, metric.astype(dtype), dtype(size), 0)
            assert np.linalg.norm(step - expected) <= tolerance(dtype, ROWS, 1 / part) * np.linalg.norm(expected)
        # Damping bounds what is lost: by far enough, or too little.
        for damping, enough in ((1.0, True), (eps**0.5, True), (eps**2 * part, kept)):
            assert np.isfinite(solve(near, metric.astype(dtype), dtype(size), dtype(damping), "squares")[1]) == enough


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
def test_fits_of_every_condition_end_where_dense_solves_do(mapped):
    """The same polynomials in a good basis, a worse and a bad one, which the squares do not serve to the end."""
    t = np.linspace(-1, 1, 30)
    y = np.exp(-3 * t) + np.cos(40 * t)
    good, worse, bad = np.polynomial.chebyshev.chebvander(t, 12), np.vander(t, 13), np.vander(t + 1, 13)
    assert np.linalg.cond(good) < 10 < np.linalg.cond(worse) < 1e6 < 1e8 < np.linalg.cond(bad)

    def fit(basis, solver=None):
        found = gnl.least_squares(lambda p: basis @ p - y, jnp.zeros(13), solver=solver)
        return found.cost, found.status, found.steps

    def all_fits(bases):
        qr = jax.lax.map(lambda basis: fit(basis, gnl.solvers.QR(corrections=1)), bases)
        return (jax.vmap(fit) if mapped else lambda all_: jax.lax.map(fit, all_))(bases), qr

    (cost, status, steps), (_, _, others) = jax.jit(all_fits)(np.stack([good, worse, bad]))
    assert np.all(status > 0)
    assert np.all(steps <= 2 * others)
    least = 0.5 * np.sum((good @ np.linalg.lstsq(good, y)[0] - y) ** 2)
    np.testing.assert_allclose(cost, [least] * 3, rtol=np.finfo(np.float64).eps ** 0.5)
