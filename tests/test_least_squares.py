"""`least_squares` against published minima, certified values, scipy and closed forms."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import gn_linear as gnl
from benchmarks import mgh
from gn_linear._least_squares import choose
from tests.support import assert_close, flat, tolerance

T = np.linspace(0.0, 4.0, 30)
Y = 2 * np.exp(-1.3 * T) + 0.05 * np.random.default_rng(8).normal(size=30)
START = {"a": 1.0, "k": 1.0}
ROOT = tolerance(np.float64) ** 0.5
"""The relative accuracy of parameters at the defaults, in units of the columns; that of the cost is its square."""


def decay(p: Any) -> Any:
    return p["a"] * jnp.exp(-p["k"] * T) - Y


@functools.cache
def fitted() -> gnl.Solution:
    return gnl.least_squares(decay, START)


@functools.cache
def error(power: int = 1) -> float:
    """The relative error to expect of this fit's parameters, and of their covariance at the second power."""
    columns = fitted().jacobian / jnp.linalg.norm(fitted().jacobian, axis=0)
    return ROOT * float(np.linalg.cond(columns)) ** power


def peer_fit(y: Any, **settings: Any) -> Any:
    """Parameters and covariance by scipy, without rounding to speak of."""
    return scipy.optimize.curve_fit(
        lambda t, a, k: a * np.exp(-k * t),
        T,
        y,
        [1.0, 1.0],
        jac=lambda t, a, k: np.stack([np.exp(-k * t), -a * t * np.exp(-k * t)], axis=1),
        **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15),
        **settings,
    )


@functools.cache
def peer() -> Any:
    return peer_fit(Y)


# --- the problems of Moré, Garbow and Hillstrom ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> list[tuple[mgh.Problem, float, float, np.ndarray, float]]:
    """Every problem from every start at the defaults: costs before and after, parameters. One compilation for all."""

    @jax.jit
    def solve(start: Any, index: Any) -> Any:
        return gnl.least_squares(mgh.any_residuals, start, args=(index,)).params  # the rest is not compiled

    cost = jax.jit(lambda x, index: 0.5 * jnp.sum(mgh.any_residuals(x, index) ** 2))
    rows = []
    for index, problem in enumerate(mgh.PROBLEMS):
        for factor in mgh.FACTORS:
            start = mgh.padded_start(problem, factor)
            found = solve(start, index)
            rows.append((problem, factor, float(cost(start, index)), np.asarray(found), float(cost(found, index))))
    return rows


def test_known_minima_are_reached_from_most_starts(table):
    solved = [p.solved(cost) for p, *_, cost in table]
    assert len(table) >= 3 * 20
    # Optimistix, the best of the peers of `python -m benchmarks run curves`, solves 87 at tight tolerances.
    assert sum(solved) >= 90, f"{sum(solved)} of {len(solved)}"
    assert all(p.solved(cost, lowest=False) for p, factor, *_, cost in table if factor == 1)


def test_no_fit_ends_worse_than_it_started_or_not_finite(table):
    for problem, factor, before, params, cost in table:
        assert np.all(np.isfinite(params)), (problem.name, factor)
        assert cost <= before, (problem.name, factor)


# --- statistics ------------------------------------------------------------------------------------------------------


def test_standard_errors_are_those_of_scipy():
    (a, k), covariance = peer()
    solution = fitted()
    assert solution.success
    np.testing.assert_allclose([solution.params["a"], solution.params["k"]], [a, k], rtol=error())
    errors = solution.standard_errors()
    np.testing.assert_allclose([errors["a"], errors["k"]], np.sqrt(np.diag(covariance)), rtol=error(2))
    np.testing.assert_allclose(solution.covariance(), covariance, rtol=error(2))
    low, high = solution.confidence_intervals(0.9)
    from scipy import stats

    half = stats.t.ppf(0.95, len(T) - 2) * np.sqrt(covariance[1, 1])
    np.testing.assert_allclose([low["k"], high["k"]], [k - half, k + half], rtol=error(2))


def test_standard_errors_of_the_readme_are_those_of_scipy():
    y = 2.0 * np.exp(-1.3 * T) + 0.05 * np.asarray(jax.random.normal(jax.random.key(2), T.shape))
    found = gnl.least_squares(lambda p: p["a"] * jnp.exp(-p["k"] * T) - y, START).standard_errors()
    _, covariance = peer_fit(y)
    np.testing.assert_allclose([found["a"], found["k"]], np.sqrt(np.diag(covariance)), rtol=error(2))


def test_report_says_what_happened():
    report = fitted().report()
    for part in ("['a']", "['k']", "+-", "cost", "steps", "converged", "QR, chosen for 30 residuals and 2 parameters"):
        assert part in report
    assert "frozen" not in report


def test_result_as_scipy_returns_it():
    found = fitted().as_scipy()
    expected = scipy.optimize.least_squares(
        lambda p: np.asarray(decay(dict(zip("ak", p, strict=True)))), [1.0, 1.0], xtol=1e-15, ftol=1e-15, gtol=1e-15
    )
    assert set(expected) <= set(found)
    np.testing.assert_allclose(found.x, expected.x, rtol=error())
    assert_close(found.cost, expected.cost, condition=len(T))
    np.testing.assert_allclose(found.jac, expected.jac, atol=error() * np.abs(found.jac).max())
    assert found.success and found.message == fitted().message


def test_curve_fit_weighs_by_sigma():
    sigma = 0.05 * (1 + T)
    solution = gnl.curve_fit(lambda t, p: p[0] * jnp.exp(-p[1] * t), T, Y, np.ones(2), sigma=sigma)
    for absolute in (False, True):
        found, covariance = peer_fit(Y, sigma=sigma, absolute_sigma=absolute)
        np.testing.assert_allclose(solution.params, found, rtol=error())
        np.testing.assert_allclose(solution.covariance(absolute=absolute), covariance, rtol=error(2))


class Certified(NamedTuple):
    """One of NIST's Statistical Reference Datasets: certified parameters, their standard deviations, the squares."""

    model: Callable[[Any, Any], Any]
    x: str
    y: str
    starts: list[list[float]]
    params: list[float]
    errors: list[float]
    squares: float


MISRA_X = "77.6 114.9 141.1 190.8 239.9 289.0 332.8 378.4 434.8 477.3 536.8 593.1 689.1 760.0"
MISRA_Y = "10.07 14.73 17.94 23.93 29.61 35.18 40.02 44.82 50.76 55.05 61.01 66.40 75.47 81.78"
FAR = [500.0, 1e-4]
CERTIFIED = {
    "Misra1a": Certified(
        lambda x, b: b[0] * (1 - jnp.exp(-b[1] * x)),
        MISRA_X,
        MISRA_Y,
        [FAR, [250, 5e-4]],
        [2.3894212918e2, 5.5015643181e-4],
        [2.7070075241, 7.2668688436e-6],
        1.2455138894e-1,
    ),
    "Misra1b": Certified(
        lambda x, b: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
        MISRA_X,
        MISRA_Y,
        [FAR, [300, 2e-4]],
        [3.3799746163e2, 3.9039091287e-4],
        [3.1643950207, 4.2547321834e-6],
        7.5464681533e-2,
    ),
    "Misra1c": Certified(
        lambda x, b: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
        MISRA_X,
        MISRA_Y,
        [FAR, [600, 2e-4]],
        [6.3642725809e2, 2.0813627256e-4],
        [4.6638326572, 1.7728423155e-6],
        4.0966836971e-2,
    ),
    "Misra1d": Certified(
        lambda x, b: b[0] * b[1] * x / (1 + b[1] * x),
        MISRA_X,
        MISRA_Y,
        [FAR, [450, 3e-4]],
        [4.3736970754e2, 3.0227324449e-4],
        [3.6489174345, 2.9334354479e-6],
        5.6419295283e-2,
    ),
    # Those of higher difficulty whose data are short.
    "BoxBOD": Certified(
        lambda x, b: b[0] * (1 - jnp.exp(-b[1] * x)),
        "1 2 3 5 7 10",
        "109 149 149 191 213 224",
        [[1, 1], [100, 0.75]],
        [2.1380940889e2, 5.4723748542e-1],
        [1.2354515176e1, 1.0455993237e-1],
        1.1680088766e3,
    ),
    "MGH09": Certified(
        lambda x, b: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
        "4 2 1 0.5 0.25 0.167 0.125 0.1 0.0833 0.0714 0.0625",
        "0.1957 0.1947 0.1735 0.16 0.0844 0.0627 0.0456 0.0342 0.0323 0.0235 0.0246",
        [[25, 39, 41.5, 39], [0.25, 0.39, 0.415, 0.39]],
        [1.9280693458e-1, 1.9128232873e-1, 1.2305650693e-1, 1.3606233068e-1],
        [1.1435312227e-2, 1.9633220911e-1, 8.0842031232e-2, 9.0025542308e-2],
        3.0750560385e-4,
    ),
    "Rat42": Certified(
        lambda x, b: b[0] / (1 + jnp.exp(b[1] - b[2] * x)),
        "9 14 21 28 42 57 63 70 79",
        "8.93 10.8 18.59 22.33 39.35 56.11 61.73 64.62 67.08",
        [[100, 1, 0.1], [75, 2.5, 0.07]],
        [7.2462237576e1, 2.6180768402, 6.7359200066e-2],
        [1.7340283401, 8.8295217536e-2, 3.4465663377e-3],
        8.0565229338,
    ),
    "Rat43": Certified(
        lambda x, b: b[0] / (1 + jnp.exp(b[1] - b[2] * x)) ** (1 / b[3]),
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15",
        "16.08 33.83 65.80 97.20 191.55 326.20 386.87 520.53 590.03 651.92 724.93 699.56 689.96 637.56 717.41",
        [[100, 10, 1, 1], [700, 5, 0.75, 1.3]],
        [6.9964151270e2, 5.2771253025, 7.5962938329e-1, 1.2792483859],
        [1.6302297817e1, 2.0828735829, 1.9566123451e-1, 6.8761936385e-1],
        8.7864049080e3,
    ),
    # From its other start, a hundred times as far as this one, max_steps is reached in a narrow valley.
    "MGH10": Certified(
        lambda x, b: b[0] * jnp.exp(b[1] / (x + b[2])),
        "50 55 60 65 70 75 80 85 90 95 100 105 110 115 120 125",
        "34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872",
        [[0.02, 4000, 250]],
        [5.6096364710e-3, 6.1813463463e3, 3.4522363462e2],
        [1.5687892471e-4, 2.3309021107e1, 7.8486103508e-1],
        8.7945855171e1,
    ),
}


def test_certified_values_are_met_from_certified_starts():
    """All in one compilation, padded to 16 points and four parameters."""
    models = [fit.model for fit in CERTIFIED.values()]

    @jax.jit
    def solve(start: Any, index: Any, x: Any, y: Any, given: Any) -> Any:
        def residuals(b: Any) -> Any:
            return jnp.where(given, jax.lax.switch(index, models, x, b) - y, 0.0)

        found = gnl.least_squares(residuals, start)
        return found.params, jnp.sqrt(jnp.diag(found.covariance(absolute=True))), 2 * found.cost

    digits = 1e-6  # six of them are asked for
    for index, (name, fit) in enumerate(CERTIFIED.items()):
        x, y = mgh.numbers(fit.x), mgh.numbers(fit.y)
        count, size = len(x), len(fit.params)
        # Points beyond the data are the first one again, and weigh nothing.
        padded_x, padded_y = (np.concatenate([a, np.full(16 - count, a[0])]) for a in (x, y))
        for start in fit.starts:
            padded_start = jnp.array([*start, 1.0, 1.0][:4], float)
            params, errors, squares = solve(padded_start, index, padded_x, padded_y, np.arange(16) < count)
            spread = np.sqrt(squares / (count - size)) * errors
            np.testing.assert_allclose(params[:size], fit.params, rtol=digits, err_msg=name)
            np.testing.assert_allclose(spread[:size], fit.errors, rtol=digits, err_msg=name)
            np.testing.assert_allclose(squares, fit.squares, rtol=digits, err_msg=name)


# --- degenerate problems ---------------------------------------------------------------------------------------------

LINE = np.stack([T, np.ones_like(T)], axis=1)
PRECISIONS = (jnp.float32, jnp.float64)


def line(p: Any, columns: Any, size: Any) -> Any:
    """A straight line that can be fitted exactly, in any units of its columns and residuals."""
    return size * (LINE.astype(p.dtype) @ (p * columns - jnp.array([3.0, -2.0], p.dtype)))


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_scales_of_columns_and_residuals_do_not_matter(dtype):
    far = 1e120 if dtype == jnp.float64 else 1e20
    columns = jnp.array([[1.0, 1.0], [1e8, 1e-8], [1e-8, 1e8], [1e4, 1e-4]], dtype)
    sizes = jnp.array([1.0, 1 / far, far], dtype)

    def fit(columns: Any, size: Any) -> Any:
        found = gnl.least_squares(line, jnp.zeros(2, dtype), args=(columns, size))
        return found.params * columns, found.success

    # In single precision a residual of the size of one and a column of 1e-28 have a product that is zero.
    many = jax.vmap(jax.vmap(fit, (None, 0)), (0, None)) if dtype == jnp.float64 else jax.vmap(fit, (0, None))
    found, success = jax.jit(many)(columns, sizes if dtype == jnp.float64 else sizes[0])
    assert np.all(success)
    expected = np.broadcast_to([3.0, -2.0], found.shape)
    assert_close(found, expected, condition=np.linalg.cond(LINE), dtype=dtype)


@jax.custom_jvp
def reversed_line(p: Any) -> Any:
    return LINE[:3].astype(p.dtype) @ p - jnp.asarray(Y[:3], p.dtype)


@reversed_line.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return reversed_line(*primals), -LINE[:3].astype(tangents[0].dtype) @ tangents[0]


def padded(r: Any) -> Any:
    return jnp.concatenate([r, jnp.zeros(3 - r.size, r.dtype)])


RAMP = np.arange(3)
CONVERGED = {outcome for outcome in gnl.Outcome if outcome > 0}
UNTOUCHED = {gnl.Outcome.GRADIENT, gnl.Outcome.NON_FINITE, gnl.Outcome.STALLED}
# The residuals, the start, the cost where it ends, and how.
DEGENERATE = {
    "fewer residuals than parameters": (lambda p: padded(p[:1] + p[1:2] - 3.0), [0.0, 0.0], 0.0, CONVERGED),
    "rank deficient": (lambda p: (p[0] + p[1] - 2) * RAMP, [0.0, 0.0], 0.0, CONVERGED),
    "dead column": (lambda p: (p[0] - 2) * RAMP + 0 * p[1], [0.0, 5.0], 0.0, CONVERGED),
    "independent of the parameters": (lambda p: jnp.ones(3) + 0 * p[0], [1.0, 2.0], 1.5, {gnl.Outcome.GRADIENT}),
    "already solved": (lambda p: padded(p - 2.0), [2.0, 2.0], 0.0, {gnl.Outcome.GRADIENT}),
    "half-space without values": (lambda p: padded(jnp.sqrt(p - 1.0) - 0.1), [9.0, 100.0], 0.0, CONVERGED),
    "start without values": (lambda p: padded(jnp.log(p)), [-1.0, 1.0], np.nan, {gnl.Outcome.NON_FINITE}),
    "minimum at infinity": (lambda p: padded(jnp.exp(-p)), [0.0, 1.0], 0.0, {gnl.Outcome.UNBOUNDED, gnl.Outcome.STEP}),
    "wrong derivative": (reversed_line, [5.0, 5.0], None, {gnl.Outcome.STALLED}),
}


@pytest.mark.parametrize(("dtype", "mapped"), [(jnp.float32, True), (jnp.float64, False)], ids=["vmap", "jit"])
def test_degenerate_problems_end_well(dtype, mapped):
    functions = [lambda p, fn=fn: fn(p).astype(dtype) for fn, *_ in DEGENERATE.values()]

    def fit(start: Any, index: Any) -> Any:
        found = gnl.least_squares(lambda p, i: jax.lax.switch(i, functions, p), start, args=(index,))
        return found.params, found.cost, found.status, jnp.diag(found.covariance(absolute=True))

    starts = jnp.array([start for _, start, *_ in DEGENERATE.values()], dtype)
    if mapped:
        ends = jax.jit(jax.vmap(fit))(starts, jnp.arange(len(starts)))
    else:
        one = jax.jit(fit)
        ends = [np.stack(part) for part in zip(*(one(start, i) for i, start in enumerate(starts)), strict=True)]
    for i, (name, (_, start, least, outcomes)) in enumerate(DEGENERATE.items()):
        params, cost, status, variances = (np.asarray(part)[i] for part in ends)
        assert gnl.Outcome(int(status)) in outcomes, (name, gnl.Outcome(int(status)))
        assert np.all(np.isfinite(params)), name
        before = 0.5 * np.sum(np.asarray(functions[i](starts[i])) ** 2)
        if np.isfinite(before):
            assert cost <= before, name
        if outcomes <= UNTOUCHED:
            assert np.array_equal(params, np.asarray(start, dtype)), name
        elif least is not None:
            assert abs(cost - least) <= tolerance(dtype) * before, name
        if name in {"rank deficient", "dead column"}:
            assert np.array_equal(np.isfinite(variances), [name == "dead column", False])


def test_more_parameters_than_residuals_need_no_square():
    found = gnl.least_squares(lambda p: p[:1] + 2 * p[1:2] - 3.0, jnp.zeros(2, jnp.float32))
    assert found.success
    assert_close(found.params, [0.6, 1.2])  # nearest to the start
    assert np.all(np.isinf(found.standard_errors(absolute=True)))


# --- options ---------------------------------------------------------------------------------------------------------

OUTLIERS = Y + np.where(np.arange(len(T)) % 7 == 3, 3.0, 0.0)


def outlying(p: Any) -> Any:
    return p[0] * (jnp if isinstance(p, jax.Array) else np).exp(-p[1] * T) - OUTLIERS


@jax.jit
def jitted(loss: Any, lower: Any) -> gnl.Solution:
    options = gnl.Options(loss=loss, lower=lower, upper=10.0)
    return gnl.least_squares(outlying, jnp.array([2.0, 1.5]), options=options)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("huber", gnl.losses.huber(0.1)),
        ("soft_l1", gnl.robust.soft_l1(0.1)),
        ("cauchy", gnl.robust.cauchy(0.1)),
        ("arctan", gnl.robust.arctan(0.1)),
    ],
)
def test_robust_losses_and_bounds_are_those_of_scipy(name, loss, bounded):
    lower = [0.0, 1.35 if bounded else 0.0]
    found = jitted(loss, jnp.array(lower))
    expected = scipy.optimize.least_squares(
        outlying,
        [2.0, 1.5],
        jac=lambda p: np.stack([np.exp(-p[1] * T), -p[0] * T * np.exp(-p[1] * T)], axis=1),
        bounds=(lower, [10.0, 10.0]),
        loss=name,
        f_scale=0.1,
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
    )
    # To the digits of scipy, whose active bounds keep a distance.
    np.testing.assert_allclose(found.cost, expected.cost, rtol=ROOT)
    np.testing.assert_allclose(found.params, expected.x, rtol=ROOT**0.5)
    assert found.success
    np.testing.assert_array_equal(found.at_bounds, [False, bounded])


def test_frozen_parameters_stay_and_weights_of_zero_leave_out():
    weights = np.where(np.arange(len(T)) < 5, 0.0, 2.0)
    options = gnl.Options(frozen={"a": True, "k": False}, weights=weights)
    solution = gnl.least_squares(lambda p: jnp.where(T[5] > T, jnp.nan, 1.0) * decay(p), START, options=options)
    expected = scipy.optimize.least_squares(lambda k: np.exp(-k * T[5:]) - Y[5:], [1.0], xtol=1e-15, ftol=1e-15)
    assert float(solution.params["a"]) == 1.0
    np.testing.assert_allclose(solution.params["k"], expected.x[0], rtol=ROOT)
    assert_close(solution.cost, 2 * expected.cost, size=len(T))
    assert float(solution.standard_errors()["a"]) == 0.0
    assert "frozen" in solution.report()


def test_chunks_give_the_answer_of_one_piece():
    def residuals(p: Any, chunk: Any) -> Any:
        t, y = chunk
        return p["a"] * jnp.exp(-p["k"] * t) - y

    weights = 1 / (1 + T) ** 2

    def cut(array: Any) -> Any:
        return array.reshape(5, 6)

    for settings in ({}, {"weights": weights, "acceleration": True, "loss": gnl.robust.cauchy(0.1)}):
        whole = gnl.least_squares(decay, START, options=gnl.Options(**settings)) if settings else fitted()
        chunks = {**settings, "chunks": (cut(T), cut(Y))} | ({"weights": cut(weights)} if settings else {})
        for solver in (None, gnl.solvers.CG(rtol=1e-10))[: 1 + bool(settings)]:
            solution = gnl.least_squares(residuals, START, solver=solver, options=gnl.Options(**chunks))
            assert_close(solution.cost, whole.cost, size=len(T))
            np.testing.assert_allclose(flat(solution.params), flat(whole.params), rtol=error())
            if solver is None:
                np.testing.assert_allclose(solution.covariance(), whole.covariance(), rtol=error(2))


@pytest.mark.parametrize("setting", [{"scaling": True}, {"acceleration": True}], ids=str)
def test_other_settings_find_the_same_minimum(setting):
    solution = gnl.least_squares(mgh.rosenbrock_1, jnp.array([-1.2, 1.0]), options=gnl.Options(**setting))
    jacobian = np.array([[-20.0, 10.0], [-1.0, 0.0]])
    np.testing.assert_allclose(solution.params, [1.0, 1.0], rtol=ROOT * np.linalg.cond(jacobian))


@pytest.mark.parametrize("kind", [gnl.robust.soft_l1, gnl.robust.cauchy, gnl.robust.arctan])
def test_robust_slopes_and_curvatures_are_derivatives_of_scipys_values(kind):
    delta = 0.7
    values = {
        gnl.robust.soft_l1: lambda z: 2 * ((1 + z) ** 0.5 - 1),
        gnl.robust.cauchy: lambda z: jnp.log1p(z),
        gnl.robust.arctan: lambda z: jnp.arctan(z),
    }

    def value(r: Any) -> Any:
        return 0.5 * delta**2 * values[kind]((r / delta) ** 2)

    loss = kind(delta)
    for r in (0.0, 0.3, -0.6, 0.9, 5.0, 1e3):
        residual = jnp.array([[r]])
        size = max(abs(r / delta), 1.0) ** 4  # of what cancels in the derivatives of these formulas
        assert_close(loss(residual), value(r), scale=max(float(value(r)), delta**2))
        assert_close(loss.gradient(residual)[0], jax.grad(value)(r), scale=max(abs(r), delta))
        hessian = loss.hessian(residual)
        one = jnp.ones_like(residual)
        # Where the loss is not convex its curvature counts as hardly any.
        expected = max(float(jax.hessian(value)(r)), float(jnp.finfo(jnp.float64).eps))
        assert_close(hessian.product(one), expected, scale=1.0, size=int(size) if r < 10 else 1)
        assert_close(hessian.root(hessian.root_transpose(one)), hessian.product(one), scale=1.0)
        assert float(hessian.product(one)[0, 0]) > 0


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_ill_conditioned_problems_are_solved_as_well_as_by_numpy_in_double_precision(dtype):
    points = np.linspace(0.0, 1.0, 24)
    power = 4 if dtype == jnp.float32 else 8
    rng = np.random.default_rng(3)
    orthogonal = np.linalg.qr(rng.normal(size=(24, 8)))[0]
    matrices = np.stack(
        [
            np.vander(points, 8),
            1 / (np.arange(24)[:, None] + np.arange(8) + 1),
            orthogonal * np.logspace(-8, 8, 8),
            orthogonal @ np.diag(np.logspace(0, -power, 8)) @ np.linalg.qr(rng.normal(size=(8, 8)))[0],
        ]
    ).astype(dtype)
    targets = (matrices.sum(2) / np.abs(matrices).max((1, 2))[:, None]).astype(dtype)

    @jax.jit
    @jax.vmap
    def fit(matrix: Any, targets: Any) -> Any:
        found = gnl.least_squares(lambda p: matrix @ p - targets, jnp.zeros(8, dtype))
        return found.params, found.status

    found, status = fit(matrices, targets)
    assert np.all(status > 0)
    for matrix, target, params in zip(matrices.astype(float), targets.astype(float), np.asarray(found), strict=True):
        norms = np.linalg.norm(matrix, axis=0)
        best = np.linalg.lstsq(matrix / norms, target, rcond=None)[0] / norms
        # What the parameters are for: the fitted values, to the root of rounding, whatever the condition number.
        apart = np.linalg.norm(matrix @ (params - best))
        assert apart <= tolerance(dtype) ** 0.5 * np.linalg.norm(target)


# --- transformations -------------------------------------------------------------------------------------------------


def test_many_fits_at_once_and_their_derivatives():
    def fit(y: Any) -> gnl.Solution:
        return gnl.least_squares(lambda p, y: p["a"] * jnp.exp(-p["k"] * T) - y, START, args=(y,))

    def rate(y: Any) -> Any:
        return fit(y).params["k"]

    data = jnp.stack([Y, 2 * Y, Y + 0.1 * np.sin(T)])
    many = jax.jit(
        jax.vmap(lambda y: (rate(y), fit(y).standard_errors()["k"], jax.grad(rate)(y), jax.jvp(rate, (y,), (T,))[1]))
    )
    rates, errors, gradients, slopes = many(data)
    np.testing.assert_allclose(rates[:2], 2 * [fitted().params["k"]], rtol=error())
    np.testing.assert_allclose(errors[0], fitted().standard_errors()["k"], rtol=error(2))
    assert_close(slopes, gradients @ T, size=len(T), condition=error(2) / ROOT)
    # The residuals do not vanish here, so that the second term of the Hessian counts.
    step = tolerance(np.float64) ** 0.25
    again = jax.jit(jax.vmap(rate))(jnp.stack([data[2] + step * T, data[2] - step * T]))
    np.testing.assert_allclose((again[0] - again[1]) / (2 * step), slopes[2], rtol=step)


def test_the_loop_on_small_matrices_takes_the_steps_of_the_one_on_jacobians():
    """Chunks with weights, bounds, units far apart, and steps that are refused."""

    def residuals(p: Any, chunk: Any) -> Any:
        t, y = chunk
        return 1e9 * p[0] * jnp.exp(-p[1] * t) - y

    def cut(array: Any) -> Any:
        return array.reshape(5, 6)

    options = gnl.Options(chunks=(cut(T), cut(Y)), weights=cut(1 / (1 + T)), upper=jnp.array([1.7e-9, jnp.inf]))
    start, kinds = jnp.array([-1e-8, 4.0]), (None, gnl.solvers.QR(corrections=1))
    ours, general = (gnl.least_squares(residuals, start, options=options, solver=kind) for kind in kinds)
    np.testing.assert_allclose(ours.params, general.params, rtol=ROOT)
    assert (ours.steps, ours.evaluations, ours.status) == (general.steps, general.evaluations, general.status)
    assert ours.evaluations > ours.steps + 1 and np.array_equal(ours.at_bounds, [True, False])


def test_a_start_whose_cost_overflows_still_leads_to_the_minimum():
    problem = next(p for p in mgh.PROBLEMS if p.name == "jennrich_sampson_6")
    start = jnp.asarray(problem.started(100.0))
    assert np.isinf(jnp.sum(problem.residuals(start) ** 2)) and jnp.all(jnp.isfinite(problem.residuals(start)))
    fit = gnl.least_squares(problem.residuals, start)
    assert fit.success and problem.solved(float(fit.cost))


def test_large_problems_take_other_solvers():
    double, single = jnp.float64, jnp.float32
    assert isinstance(choose(256, 17_000, double)[0], gnl.solvers.Cholesky)
    assert isinstance(choose(256, 17_000, single)[0], gnl.solvers.QR)
    assert isinstance(choose(256, 16_000, double)[0], gnl.solvers.QR)
    assert isinstance(choose(17_000, 256, double)[0], gnl.solvers.QR)
    assert isinstance(choose(2560, 17_000, double)[0], gnl.solvers.Cholesky)
    assert isinstance(choose(2560, 17_000, single)[0], gnl.solvers.QR)
    assert isinstance(choose(10_000, 17_000, single)[0], gnl.solvers.CG)
    assert isinstance(choose(300_000, 1000, double)[0], gnl.solvers.CG)
