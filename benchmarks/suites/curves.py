"""Curve fits in float64: least_squares against scipy, jaxopt and Optimistix, one at a time and 1,000 at once.

Two Gaussians and a baseline, Rosenbrock's function, Osborne's second problem and a sum of two exponentials, each from
several starts; and the number of starts of Moré, Garbow and Hillstrom's problems from which each method reaches the
known minimum. All methods are compiled before the clock starts, take turns, and run off the clock before each turn.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from matplotlib.figure import Figure
from tqdm import tqdm

import gn_linear as gnl
from benchmarks import figures, mgh, tables
from benchmarks.settings import Settings
from benchmarks.suites import Results
from benchmarks.tables import Row

X64 = True

MANY, QUICK_MANY = 1000, 20
ROUNDS, QUICK_ROUNDS = 7, 2
CALLS, TURNS = 50, 3
"""How many single fits are timed together, and how many times as often, since their times vary most."""
SHARE = 1.0
"""A method that has taken so many seconds on a curve is not timed again."""
WARM_UP = 0.1
"""So many seconds a method runs off the clock before each turn, since what ran before leaves the machine slow."""
SERIAL = 50
"""Of many fits those who make one after another are given so many, and their time is multiplied."""
TOLERANCE = 1e-8
TIGHT = 1e-14
CAP, TIMED_CAP = 2000, 200
"""The steps that the others may take to see how far they get, and on the clock: batched fits wait for the slowest."""
OURS = "gn_linear"
SCIPY = ("scipy lm", "scipy trf")
UNPADDED = "optimistix Dogleg"


class Curve(NamedTuple):
    """A fit: residuals of a parameter vector and of its data, and what draws a start and data."""

    name: str
    residuals: Callable[[Any, Any], Any]
    draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


GRID = np.linspace(0.0, 10.0, 100)
PEAKS = np.array([3.0, 3.0, 0.7, 2.0, 6.0, 1.2, 0.5])
RATES = np.array([2.0, 0.3, 1.0, 1.5])


def two_gaussians(p: Any, t: Any) -> Any:
    """Two peaks of height, place and width, and a baseline.

    Args:
        p: the parameters, shape (7,).
        t: where, shape (n,).

    Returns:
        The curve, shape (n,).
    """
    peaks = [p[i] * jnp.exp(-0.5 * ((t - p[i + 1]) / p[i + 2]) ** 2) for i in (0, 3)]
    return peaks[0] + peaks[1] + p[6]


def exponentials(p: Any, t: Any) -> Any:
    """Two decays of height and rate.

    Args:
        p: the parameters, shape (4,).
        t: where, shape (n,).

    Returns:
        The curve, shape (n,).
    """
    return p[0] * jnp.exp(-p[1] * t) + p[2] * jnp.exp(-p[3] * t)


def curves() -> list[Curve]:
    """Returns the fits of the table."""

    def noisy(model: Callable[[Any, Any], Any], truth: np.ndarray) -> Callable[..., Any]:
        def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
            data = np.asarray(model(truth, GRID)) + 0.05 * rng.normal(size=GRID.size)
            return truth * (1 + 0.15 * rng.uniform(-1, 1, truth.size)), data

        return draw

    def near(start: Any, spread: float) -> Callable[..., Any]:
        return lambda rng: (np.asarray(start) * (1 + spread * rng.uniform(-1, 1, len(start))), np.zeros(1))

    return [
        Curve("two Gaussians", lambda p, y: two_gaussians(p, GRID) - y, noisy(two_gaussians, PEAKS)),
        Curve("exponentials", lambda p, y: exponentials(p, GRID) - y, noisy(exponentials, RATES)),
        Curve("Rosenbrock", lambda p, _: mgh.rosenbrock_1(p), near([-1.2, 1.0], 0.5)),
        Curve("Osborne 2", lambda p, _: mgh.osborne_19(p), near(mgh.OSBORNE_2_START, 0.05)),
    ]


def solvers(residuals: Callable[[Any, Any], Any], tight: bool) -> dict[str, Callable[[Any, Any], Any]]:
    """The JAX methods: ours at its defaults, the others with these tolerances.

    Args:
        residuals: of parameters and data.
        tight: whether the others are asked for all digits, to see how far they get.

    Returns:
        For each name ``solve(start, data) -> parameters``, to be jitted.
    """
    import jaxopt
    import optimistix

    tolerance, cap = (TIGHT, CAP) if tight else (TOLERANCE, TIMED_CAP)

    def ours(start: Any, data: Any) -> Any:
        return gnl.least_squares(residuals, start, args=(data,)).params

    def of_jaxopt(start: Any, data: Any) -> Any:
        solver = jaxopt.LevenbergMarquardt(
            residuals, maxiter=cap, tol=tolerance, xtol=tolerance, gtol=tolerance, solver="cholesky",
            materialize_jac=True,
        )  # fmt: skip
        return solver.run(start, data).params

    def of_optimistix(solver: Any) -> Callable[[Any, Any], Any]:
        return lambda start, data: (
            optimistix.least_squares(residuals, solver, start, args=data, max_steps=cap, throw=False).value
        )

    settings = {"rtol": tolerance, "atol": tolerance}
    return {
        OURS: ours,
        "optimistix LM": of_optimistix(optimistix.LevenbergMarquardt(**settings)),
        "optimistix Dogleg": of_optimistix(optimistix.Dogleg(**settings)),
        "jaxopt LM": of_jaxopt,
    }


def by_scipy(name: str, residuals: Callable[[Any, Any], Any], tight: bool) -> Callable[[Any, Any], Any]:
    """A method of scipy with compiled residuals and derivatives.

    Args:
        name: one of ``SCIPY``.
        residuals: of parameters and data.
        tight: as for `solvers`.

    Returns:
        ``solve(start, data) -> parameters``.
    """
    value, jacobian = jax.jit(residuals), jax.jit(jax.jacfwd(residuals))
    tolerance = TIGHT if tight else TOLERANCE

    def solve(start: Any, data: Any) -> Any:
        found = scipy.optimize.least_squares(
            lambda p: np.asarray(value(p, data)),
            start,
            jac=lambda p: np.asarray(jacobian(p, data)),
            method=name.split()[1],
            ftol=tolerance,
            xtol=tolerance,
            gtol=tolerance,
            max_nfev=CAP if tight else TIMED_CAP,
        )
        return found.x

    return solve


def run(settings: Settings) -> Results:
    """Fits every curve by every method, and counts the starts from which each is solved.

    Args:
        settings: what the command line asked for.

    Returns:
        "times": a row for each curve, batch and method; "starts": a row for each start of the table and method.
    """
    many, rounds = (QUICK_MANY, QUICK_ROUNDS) if settings.quick else (MANY, ROUNDS)
    results: Results = {"times": [], "starts": []}
    for curve in tqdm(curves()[: 2 if settings.quick else None], desc="curves", mininterval=0.5):
        for count in (1, many):
            results["times"] += measure(curve, count, rounds)
    results["starts"] = reached(mgh.PROBLEMS[:3] if settings.quick else mgh.PROBLEMS)
    return results


def measure(curve: Curve, count: int, rounds: int) -> list[Row]:
    """Times all methods on one curve, in turns.

    Args:
        curve: the fit.
        count: how many fits at once.
        rounds: how often each is timed.

    Returns:
        A row for each method: the median seconds, those to compile, and the share of fits whose cost is within four
        digits of the lowest that any method found.
    """
    rng = np.random.default_rng(0)
    starts, data = map(np.stack, zip(*(curve.draw(rng) for _ in range(count)), strict=True))
    runners: dict[str, Callable[[], Any]] = {}
    few = min(count, SERIAL)
    shares: dict[str, float] = dict.fromkeys(SCIPY, few / count)
    compiling: dict[str, float] = {}
    for name, solve in solvers(curve.residuals, tight=False).items():
        batched = jax.jit(jax.vmap(solve) if count > 1 else lambda s, d, solve=solve: solve(s[0], d[0])[None])
        begin = time.perf_counter()
        compiled = batched.lower(starts, data).compile()
        compiling[name] = time.perf_counter() - begin
        runners[name] = lambda compiled=compiled: jax.block_until_ready(compiled(starts, data))
    for name in SCIPY:
        solve = by_scipy(name, curve.residuals, tight=False)
        begin = time.perf_counter()
        solve(starts[0], data[0])
        compiling[name] = time.perf_counter() - begin
        runners[name] = lambda solve=solve: np.stack([solve(starts[i], data[i]) for i in range(few)])
    found, seconds = in_turns(runners, *((rounds, 1) if count > 1 else (TURNS * rounds, CALLS)))
    cost = jax.jit(jax.vmap(lambda p, d: 0.5 * jnp.sum(curve.residuals(p, d) ** 2)))
    costs = {name: np.nan_to_num(cost(params, data[: len(params)]), nan=np.inf) for name, params in found.items()}
    best = np.min([[*row, *np.full(count - len(row), np.inf)] for row in costs.values()], axis=0)
    return [
        {
            "curve": curve.name,
            "fits": count,
            "method": name,
            "seconds": statistics.median(seconds[name]) / shares.get(name, 1.0),
            "compile_seconds": compiling[name],
            "solved": float(np.mean(costs[name] <= best[: len(costs[name])] * (1 + 1e-4) + 1e-12)),
        }
        for name in runners
    ]


def in_turns(
    runners: dict[str, Callable[[], Any]], rounds: int, calls: int
) -> tuple[dict[str, np.ndarray], dict[str, list[float]]]:
    """Times compiled methods in turns; one that has used up its share of seconds waits for the others.

    Args:
        runners: the methods.
        rounds: how often each is timed at most.
        calls: how many calls a turn has.

    Returns:
        What each found, and its seconds for a call, turn by turn.
    """
    names, found = list(runners), {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            if calls * sum(seconds[name]) > SHARE:
                continue
            begin = time.perf_counter()
            while time.perf_counter() < begin + WARM_UP:
                runners[name]()
            begin = time.perf_counter()
            for _ in range(calls):
                found[name] = np.asarray(runners[name]())
            seconds[name].append((time.perf_counter() - begin) / calls)
    return found, seconds


def reached(problems: list[mgh.Problem]) -> list[Row]:
    """Asks from which starts of the table each method reaches the known minimum; the others at tight tolerances.

    Args:
        problems: those of the table to try.

    Returns:
        A row for each problem, start and method.
    """
    together = functools.partial(mgh.any_residuals, problems=problems)
    methods = {name: jax.jit(solve) for name, solve in solvers(together, tight=True).items()}
    methods |= {name: by_scipy(name, together, tight=True) for name in SCIPY}
    cost = jax.jit(lambda p, index: 0.5 * jnp.sum(together(p, index) ** 2))
    rows = []
    sizes = {size: by_size(problems, size) for size in {len(problem.start) for problem in problems}}
    for number, problem in enumerate(tqdm(problems, desc="starts", mininterval=0.5)):
        methods[UNPADDED] = sizes[len(problem.start)]
        index = jnp.asarray(number)
        for factor in mgh.FACTORS:
            start = jnp.asarray(mgh.padded_start(problem, factor))
            for name, solve in methods.items():
                try:
                    params = solve(start, index)
                except ValueError:  # scipy's, where residuals are not finite
                    params = start
                value = float(cost(params, index))
                row = {"problem": problem.name, "factor": factor, "method": name, "cost": value}
                lowest, listed = problem.solved(value), problem.solved(value, lowest=False)
                rows.append(row | {"lowest": lowest, "listed": listed, "finite": bool(np.isfinite(value))})
    return rows


def by_size(problems: list[mgh.Problem], size: int) -> Callable[[Any, Any], Any]:
    """The method that solves undamped equations, which do not determine the unused parameters of a padded problem.

    Args:
        problems: of the table.
        size: the number of parameters of those that it is for.

    Returns:
        ``solve(start, number of the problem) -> parameters``, padded.
    """
    own = [problem for problem in problems if len(problem.start) == size]
    places = jnp.asarray([own.index(problem) if problem in own else 0 for problem in problems])
    together = functools.partial(mgh.any_residuals, problems=own)
    solve = jax.jit(solvers(together, tight=True)[UNPADDED])
    return lambda start, number: jnp.pad(solve(start[:size], places[number]), (0, len(start) - size))


def table(results: Results) -> str:
    """Writes both tables.

    Args:
        results: what `run` returned.

    Returns:
        The tables and what their columns mean.
    """
    rows = []
    for (curve, fits), group in tables.group(results["times"], "curve", "fits").items():
        ours = next(row["seconds"] for row in group if row["method"] == OURS)
        rows += [
            {
                "curve": curve,
                "fits": fits,
                "method": row["method"],
                "ms": format(1e3 * row["seconds"], ".3g"),
                "to ours": format(row["seconds"] / ours, ".2f"),
                "compile s": format(row["compile_seconds"], ".1f"),
                "solved %": format(100 * row["solved"], ".1f"),
            }
            for row in group
        ]
    counts = [
        {
            "method": method,
            "starts": len(group),
            "lowest minimum": sum(row["lowest"] for row in group),
            "a known minimum": sum(row["listed"] for row in group),
            "not finite": sum(not row["finite"] for row in group),
        }
        for (method,), group in tables.group(results["starts"], "method").items()
    ]
    return "\n".join(
        [
            tables.text_table(rows),
            "",
            tables.text_table(counts),
            "",
            "ms: median of one call that makes all fits. Ours at its defaults, the others at 1e-8, at most 200 steps.",
            f"Scipy makes one fit after another: of many the first {SERIAL}, its time multiplied.",
            "Starts: the standard ones of each problem, and 10 and 100 times them; the others at 1e-14, 2,000 steps.",
        ]
    )


def figure(results: Results) -> Figure:
    """Draws the seconds of each method on each curve.

    Args:
        results: what `run` returned.

    Returns:
        The figure.
    """
    counts = sorted({row["fits"] for row in results["times"]})
    drawing, axes = figures.panels(len(counts), "Curve fits, float64")
    for axis, count in zip(np.ravel(axes), counts, strict=True):
        rows = [row for row in results["times"] if row["fits"] == count]
        names = list(dict.fromkeys(row["curve"] for row in rows))
        for method in dict.fromkeys(row["method"] for row in rows):
            seconds = [row["seconds"] for row in rows if row["method"] == method]
            axis.plot(names, seconds, "o", label=method)
        axis.set_yscale("log")
        axis.set_ylabel(f"seconds for {count} fits" if count > 1 else "seconds for a fit")
    np.ravel(axes)[0].legend()
    return drawing
