"""Every period at once: K gradient steps on the linearised model, one by one and from a single Krylov basis.

500 images, one-hot targets, squared error, full batch, learning rate 1 / (largest eigenvalue). The loop linearises once
and keeps the residuals; each of its steps is one Jacobian-vector and one vector-Jacobian product. The basis
(`gnl.filtered_steps`) gives the steps of all periods together. Both are held against the spectral formula in float64,
from the eigenvectors of the tangent kernel: errors are those of the parameters' step, relative to the exact one.

The loop is run as far as it is affordable, in turns with the bases. Its seconds are those of the median step times the
number of steps, which is an extrapolation beyond the steps that were run.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from matplotlib.figure import Figure
from tqdm import tqdm

import gn_linear as gnl
from benchmarks import data, figures, networks, reach, tables
from benchmarks.settings import Settings
from benchmarks.suites import Results
from benchmarks.tables import Row
from gn_linear import _krylov
from gn_linear.curvature import linearised_problem

X64 = True  # the exact answer is in float64; what is timed in float32 is given float32 arrays

IMAGES, QUICK_IMAGES = 500, 100
CLASSES = 10
REPEATS, QUICK_REPEATS = 7, 2  # of each basis, between the loop's turns
LOOP_STEPS, QUICK_LOOP_STEPS = {"float32": 10_000, "float64": 1_000}, {"float32": 100, "float64": 10}
TURNS = 10
PERIODS = tuple(10**exponent for exponent in range(7))
LARGEST_RANK = 256
SMALL_ERROR = 1e-2  # what the growth of the products with the period is measured at

predict = networks.mlp(jnp.tanh)
loss = gnl.losses.squared_error


class Basis(NamedTuple):
    """What is asked of one basis: all periods up to the largest, that many times faster, with at most that error."""

    dtype: str
    rank: int
    largest: int
    speedup: float | None = None
    error: float | None = None

    @property
    def name(self) -> str:
        """How the tables call it."""
        return f"basis, {self.dtype}, rank {self.rank}, to {self.largest:,}"

    @property
    def periods(self) -> tuple[int, ...]:
        """All periods that it gives the steps of."""
        return tuple(period for period in PERIODS if period <= self.largest)


BASES = (
    Basis("float32", 96, 10_000, 50.0, 1e-3),
    Basis("float32", 256, 100_000, 200.0, 2e-2),
    Basis("float32", 256, 1_000_000, 500.0, 1e-2),
    Basis("float32", 512, 1_000_000, 500.0, 1e-2),
    Basis("float64", 256, 1_000_000, 500.0, 1e-2),
)


class Problem(NamedTuple):
    """A network and a batch, float32."""

    name: str
    params: Any
    inputs: jax.Array
    targets: jax.Array

    def at(self, dtype: str) -> tuple[Any, jax.Array, jax.Array]:
        """Parameters, inputs and targets, the same numbers in another dtype."""
        return jax.tree.map(lambda leaf: leaf.astype(dtype), (self.params, self.inputs, self.targets))


class Exact(NamedTuple):
    """The eigenproblem of the tangent kernel over the number of images, and the output gradient in it; float64."""

    values: np.ndarray
    vectors: np.ndarray
    gradient: np.ndarray
    rate: float
    seconds: float

    def coordinates(self, period: int) -> np.ndarray:
        """The output vector whose pullback is the exact step, in the eigenvectors."""
        return -gradient_descent(self.values, self.rate, period) * self.gradient


class Timed(NamedTuple):
    """A compiled function, and how long that took."""

    call: Callable[..., Any]
    compile_seconds: float


def problems(seed: int, quick: bool) -> list[Problem]:
    """Draws the networks and loads the images.

    Args:
        seed: of the parameters; the images are the same for all.
        quick: whether to keep only the first problem, with fewer images.

    Returns:
        8 x 8 digits with a perceptron 64-256-256-10, MNIST with a perceptron 784-128-64-10.
    """
    images = QUICK_IMAGES if quick else IMAGES
    found = []
    for name, load, widths in (
        ("digits", data.digits, (64, 256, 256, 10)),
        ("MNIST", data.mnist, (784, 128, 64, 10)),
    )[: 1 if quick else 2]:
        params = networks.init_mlp(jax.random.key(seed), widths, networks.LECUN)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        inputs, labels, *_ = load(images)
        targets = jax.nn.one_hot(labels, CLASSES, dtype=jnp.float32)
        found.append(Problem(f"{name} {'-'.join(map(str, widths))}", params, jnp.asarray(inputs), targets))
    return found


def gradient_descent(values: np.ndarray, rate: float, period: int) -> np.ndarray:
    """What K gradient steps do to each eigenvalue, written anew so that the package is not its own judge.

    Args:
        values: eigenvalues; those that rounding has made negative count as 0.
        rate: the learning rate, below 1 / (largest eigenvalue).
        period: K.

    Returns:
        (1 - (1 - rate * value)^K) / value.
    """
    kept = np.maximum(values, np.finfo(values.dtype).tiny)
    return -np.expm1(period * np.log1p(-rate * kept)) / kept


@jax.jit
def kernel(params: Any, inputs: jax.Array) -> jax.Array:
    """The tangent kernel over the number of images, from the Jacobian of each image by itself.

    Args:
        params: the parameters.
        inputs: the images.

    Returns:
        A matrix (outputs of the batch, outputs of the batch).
    """
    _, jvp = jax.linearize(lambda p: predict(p, inputs), params)

    def rows(image: jax.Array) -> jax.Array:
        jacobian = jax.jacrev(lambda p: predict(p, image[None])[0])(params)
        return jax.vmap(jvp)(jacobian).reshape(CLASSES, -1)

    size = len(inputs) * CLASSES
    return jax.lax.map(rows, inputs, batch_size=5).reshape(size, size) / len(inputs)


def exact_answer(problem: Problem) -> Exact:
    """Solves the eigenproblem of the tangent kernel.

    Args:
        problem: the network and the batch.

    Returns:
        The answer, with the learning rate of all methods, which is a float32 number.
    """
    start = time.perf_counter()
    params, inputs, targets = problem.at("float64")
    gram = np.asarray(kernel(params, inputs))
    values, vectors = scipy.linalg.eigh((gram + gram.T) / 2, overwrite_a=True, check_finite=False)
    output_gradient = np.asarray(predict(params, inputs) - targets).ravel() / len(inputs)
    rate = np.nextafter(np.float32(1 / values[-1]), np.float32(0))
    return Exact(values, vectors, vectors.T @ output_gradient, float(rate), time.perf_counter() - start)


@jax.jit
def pull_back(params: Any, inputs: jax.Array, vector: jax.Array) -> Any:
    """The vector-Jacobian product.

    Args:
        params: the parameters.
        inputs: the images.
        vector: like the outputs of the batch, flat.

    Returns:
        A pytree like the parameters.
    """
    outputs, transpose = jax.vjp(lambda p: predict(p, inputs), params)
    return transpose(vector.reshape(outputs.shape))[0]


def relative_error(step: Any, exact: Any) -> float:
    """The distance of a step from the exact one, relative to it.

    Args:
        step: a pytree like the parameters.
        exact: the same, in float64.

    Returns:
        The ratio of the norms.
    """
    difference = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b), step, exact)
    lengths = [sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(tree)) for tree in (difference, exact)]
    return math.sqrt(lengths[0] / lengths[1])


def compiled(function: Callable[..., Any], *arguments: Any) -> Timed:
    """Compiles a function and calls it once.

    Args:
        function: what to compile.
        *arguments: arguments like those to come.

    Returns:
        The compiled function, and the seconds to trace and compile it.
    """
    start = time.perf_counter()
    call = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    jax.block_until_ready(call(*arguments))
    return Timed(call, seconds)


def descend(step: Any, count: jax.Array, rate: jax.Array, params: Any, inputs: jax.Array, targets: jax.Array) -> Any:
    """The literal loop: gradient steps on the linearised model.

    Args:
        step: where it has come to, as a difference to the parameters.
        count: gradient steps to take.
        rate: the learning rate.
        params: where the model is linearised.
        inputs: the images.
        targets: their targets.

    Returns:
        Where it comes to.
    """
    linearisation = gnl.linearise(predict, params, inputs)
    scale = rate / len(inputs)
    start = scale * (linearisation.outputs - targets)

    def one(_: jax.Array, step: Any) -> Any:
        return jax.tree.map(jnp.subtract, step, linearisation.vjp(start + scale * linearisation.jvp(step)))

    return jax.lax.fori_loop(0, count, one, step)


def from_basis(basis: Basis) -> Callable[..., Any]:
    """Makes the function that gives the steps of all periods of a basis.

    Args:
        basis: what is asked of it.

    Returns:
        A function of the rate and the problem that returns what `gnl.filtered_steps` does.
    """

    def steps(rate: jax.Array, params: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        descents = [gnl.filters.GradientDescent(rate, period) for period in basis.periods]
        return gnl.filtered_steps(predict, params, inputs, targets, descents, rank=basis.rank, loss=loss)

    return steps


class Loop:
    """The literal loop on one problem in one dtype, taken in turns.

    Attributes:
        dtype: its dtype.
        marks: the numbers of steps after which a turn ends.
        seconds: of each turn so far.
        reached: where it was after each of the turns that end at a period.
        compile_seconds: what it took to compile.
    """

    def __init__(self, problem: Problem, dtype: str, rate: float, steps: int) -> None:
        turns = {steps * turn // TURNS for turn in range(1, TURNS + 1)}
        self.dtype = dtype
        self.marks = sorted(turns.union(period for period in PERIODS if period <= steps))
        self.seconds: list[float] = []
        self.reached: dict[int, Any] = {}
        self._fixed = (jnp.asarray(rate, dtype), *problem.at(dtype))
        self._step = jax.tree.map(jnp.zeros_like, problem.at(dtype)[0])
        self._call, self.compile_seconds = compiled(descend, self._step, jnp.int32(1), *self._fixed)

    @property
    def done(self) -> int:
        """Steps taken so far."""
        return self.marks[len(self.seconds) - 1] if self.seconds else 0

    def turn(self) -> None:
        """Takes the steps of the next turn on the clock, if there is one."""
        if self.done == self.marks[-1]:
            return
        count = jnp.int32(self.marks[len(self.seconds)] - self.done)
        start = time.perf_counter()
        self._step = jax.block_until_ready(self._call(self._step, count, *self._fixed))
        self.seconds.append(time.perf_counter() - start)
        if self.done in PERIODS:
            self.reached[self.done] = self._step

    def seconds_for(self, period: int) -> float:
        """The seconds of that many steps, by the median step of the long turns."""
        steps = np.diff([0, *self.marks])
        long = [spent / count for spent, count in zip(self.seconds, steps, strict=True) if 2 * count >= max(steps)]
        return statistics.median(long) * period


def run(settings: Settings) -> Results:
    """Lets the loops and the bases take turns, and measures their steps against the exact ones.

    Args:
        settings: what the command line asked for.

    Returns:
        "problems": a row for each problem and seed; "runs": each basis and loop on each of them; "errors": each of
        these at each period; "growth": the rank that each period takes.
    """
    results: Results = {"problems": [], "runs": [], "errors": [], "growth": []}
    count = len(problems(0, settings.quick))
    with tqdm(total=settings.seeds * count, unit="problem", desc="periods", mininterval=0.5) as bar:
        for seed, number in itertools.product(range(settings.seeds), range(count)):
            found = measure(problems(seed, settings.quick)[number], settings.quick)
            for name, rows in found.items():
                results[name] += [{"seed": seed} | row for row in rows]
            bar.update()
    return results


def measure(problem: Problem, quick: bool) -> Results:
    """Measures one problem.

    Args:
        problem: the network and the batch.
        quick: whether to cut the loops and the repeats.

    Returns:
        The rows, without their seed.
    """
    exact = exact_answer(problem)
    params, inputs, _ = problem.at("float64")
    exact_steps = {
        period: pull_back(params, inputs, jnp.asarray(exact.vectors @ exact.coordinates(period))) for period in PERIODS
    }
    steps, repeats = (QUICK_LOOP_STEPS, QUICK_REPEATS) if quick else (LOOP_STEPS, REPEATS)
    loops = {dtype: Loop(problem, dtype, exact.rate, count) for dtype, count in steps.items()}
    arguments = {dtype: (jnp.asarray(exact.rate, dtype), *problem.at(dtype)) for dtype in steps}
    timed = {basis: compiled(from_basis(basis), *arguments[basis.dtype]) for basis in BASES}
    seconds: dict[Basis, list[float]] = {basis: [] for basis in BASES}
    given: dict[Basis, Any] = {}
    turns = max(len(loop.marks) for loop in loops.values())
    for turn in range(turns):
        for loop in loops.values():
            loop.turn()
        if turn < turns - repeats:
            continue
        for basis in BASES:
            start = time.perf_counter()
            given[basis] = jax.block_until_ready(timed[basis].call(*arguments[basis.dtype]))
            seconds[basis].append(time.perf_counter() - start)
    found: Results = {"problems": [], "runs": [], "errors": [], "growth": growth(problem, exact)}
    found["problems"].append(
        {"problem": problem.name, "largest_eigenvalue": exact.values[-1], "exact_seconds": exact.seconds}
    )
    for dtype, loop in loops.items():
        about = {"problem": problem.name, "method": f"loop, {dtype}"}
        found["runs"].append(
            about
            | {"dtype": dtype, "rank": None, "largest": loop.done, "products": loop.done}
            | {"seconds": sum(loop.seconds), "compile_seconds": loop.compile_seconds}
            | {"loop_seconds": loop.seconds_for(loop.done), "loop_measured": True, "ratio": None}
        )
        for period, step in loop.reached.items():
            error = relative_error(step, exact_steps[period])
            found["errors"].append(about | {"period": period, "error": error, "error_bound": None})
    for basis, (given_steps, info) in given.items():
        about = {"problem": problem.name, "method": basis.name}
        loop, median = loops[basis.dtype], statistics.median(seconds[basis])
        loop_seconds = loop.seconds_for(basis.largest)
        found["runs"].append(
            about
            | {"dtype": basis.dtype, "rank": basis.rank, "largest": basis.largest, "products": int(info.products)}
            | {"seconds": median, "compile_seconds": timed[basis].compile_seconds}
            | {"loop_seconds": loop_seconds, "loop_measured": basis.largest <= loop.done}
            | {"ratio": loop_seconds / median}
        )
        for index, period in enumerate(basis.periods):
            step = jax.tree.map(lambda leaf, index=index: leaf[index], given_steps)
            error, bound = relative_error(step, exact_steps[period]), float(info.error_bound[index])
            found["errors"].append(about | {"period": period, "error": error, "error_bound": bound})
    return found


@jax.jit
def whole_basis(params: Any, inputs: jax.Array, targets: jax.Array) -> _krylov.KrylovBasis:
    """The largest basis, in the outputs.

    Args:
        params: the parameters.
        inputs: the images.
        targets: their targets.

    Returns:
        The basis, which holds those of all smaller ranks.
    """
    problem = linearised_problem(predict, loss, params, inputs, targets=targets)
    return _krylov.krylov_basis(_krylov.sample_space(problem), problem.output_gradient, LARGEST_RANK)


def growth(problem: Problem, exact: Exact) -> list[Row]:
    """Finds how many products each period takes, by cutting one float64 basis down to every smaller rank.

    Args:
        problem: the network and the batch.
        exact: the exact answer.

    Returns:
        A row for each period: the smallest rank with an error of at most `SMALL_ERROR`, None if there is none.
    """
    basis = whole_basis(*problem.at("float64"))
    size = int(basis.size)
    roots = np.sqrt(np.maximum(exact.values, 0.0))  # of the inner product, so that the columns are orthonormal
    columns = roots[:, None] * (exact.vectors.T @ np.asarray(basis.vectors[:size]).reshape(size, -1).T)
    alpha, beta = np.asarray(basis.diagonal), np.asarray(basis.above)
    diagonal, off_diagonal = alpha**2 + np.concatenate([[0.0], beta[:-1] ** 2]), alpha * beta
    targets = {period: roots * exact.coordinates(period) for period in PERIODS}
    smallest: dict[int, int | None] = dict.fromkeys(PERIODS)
    for rank in range(1, size + 1):
        values, vectors = scipy.linalg.eigh_tridiagonal(diagonal[:rank], off_diagonal[: rank - 1])
        for period in (period for period, found in smallest.items() if found is None):
            filtered = vectors @ (gradient_descent(values, exact.rate, period) * vectors[0])
            error = columns[:, :rank] @ (-float(basis.norm) * filtered) - targets[period]
            if np.linalg.norm(error) <= SMALL_ERROR * np.linalg.norm(targets[period]):
                smallest[period] = rank
    return [{"problem": problem.name, "period": p, "products": found} for p, found in smallest.items()]


def table(results: Results) -> str:
    """Writes the tables, and which goals were met.

    Args:
        results: what `run` returned.

    Returns:
        For each problem the seconds, the errors and the products; then the goals.
    """
    parts = []
    for (problem,), rows in tables.group(results["runs"], "problem").items():
        errors = [row for row in results["errors"] if row["problem"] == problem]
        products = [row for row in results["growth"] if row["problem"] == problem]
        parts += [f"{problem}: seconds", "", tables.text_table(seconds_lines(rows)), ""]
        parts += [f"{problem}: relative error of the step at each period, and error_bound", ""]
        parts += [tables.text_table(error_lines(errors)), ""]
        parts += [
            f"{problem}: products for an error of {SMALL_ERROR:g}",
            "",
            tables.text_table(growth_lines(products)),
            "",
        ]
    seeds = len({row["seed"] for row in results["runs"]})
    return "\n".join(
        [
            *parts,
            f"Medians and ranges over {seeds} seeds.",
            "Seconds: of one call for all periods; of the loop, of all its steps. None of them with compiling.",
            "Seconds of the loop: of as many steps as the largest period, in the same dtype, by the median step;",
            "* not all of these steps were taken.",
            *goal_lines(results),
        ]
    )


def seconds_lines(runs: list[Row]) -> list[Row]:
    """Writes the table of seconds.

    Args:
        runs: the runs on one problem.

    Returns:
        A line for each method.
    """
    lines = []
    for (method,), rows in tables.group(runs, "method").items():
        first = rows[0]
        star = "" if first["loop_measured"] else " *"
        lines.append(
            {
                "method": method.partition(",")[0],
                "dtype": first["dtype"],
                "rank": "-" if first["rank"] is None else first["rank"],
                "largest period": f"{first['largest']:,}",
                "products": f"{statistics.median(row['products'] for row in rows):,.0f}",
                "seconds": tables.median_range([row["seconds"] for row in rows], ".3g"),
                "compile s": format(first["compile_seconds"], ".2f"),
                "seconds of the loop": tables.median_range([row["loop_seconds"] for row in rows], ".3g") + star,
                "loop / basis": "-"
                if first["rank"] is None
                else tables.median_range([r["ratio"] for r in rows], ".0f"),
            }
        )
    return lines


def error_lines(errors: list[Row]) -> list[Row]:
    """Writes the table of errors.

    Args:
        errors: the errors on one problem.

    Returns:
        A line for the errors of each method, and one below it for the error bounds of a basis.
    """
    lines = []
    for (method,), rows in tables.group(errors, "method").items():
        periods = {period: found for (period,), found in tables.group(rows, "period").items()}
        for column, label in (("error", method), ("error_bound", f"{method}: error_bound")):
            if column == "error_bound" and method.startswith("loop"):
                continue
            line: Row = {"method": label}
            for period in PERIODS:
                values = [row[column] for row in periods.get(period, [])]
                line[f"{period:,}"] = tables.median_range(values, ".1e") if values else "-"
            lines.append(line)
    return lines


def growth_lines(growth: list[Row]) -> list[Row]:
    """Writes the table of products.

    Args:
        growth: the rows of one problem.

    Returns:
        A line for the products, and one for the square roots of the periods.
    """
    products: Row = {"period": "products"}
    roots: Row = {"period": "square root"}
    for (period,), rows in tables.group(growth, "period").items():
        ranks = [row["products"] for row in rows]
        products[f"{period:,}"] = f"more than {LARGEST_RANK}" if None in ranks else tables.median_range(ranks, ".0f")
        roots[f"{period:,}"] = format(math.sqrt(period), ".0f")
    return [products, roots]


def goal_lines(results: Results) -> list[str]:
    """Compares with the goals, on each problem by the medians over seeds.

    Args:
        results: what `run` returned.

    Returns:
        A line for each goal and problem, which says whether it was met.
    """
    lines = []
    runs, errors = (tables.group(results[name], "problem", "method") for name in ("runs", "errors"))
    for basis, (problem,) in itertools.product(BASES, tables.group(results["runs"], "problem")):
        if basis.speedup is None or basis.error is None:
            continue
        ratio = statistics.median(row["ratio"] for row in runs[problem, basis.name])
        by_period = tables.group(errors[problem, basis.name], "period").values()
        error = max(statistics.median(reach.or_infinity(row["error"]) for row in rows) for rows in by_period)
        met = ratio >= basis.speedup and error <= basis.error
        lines.append(
            f"{'Met' if met else 'MISSED'} on {problem.partition(' ')[0]} by the {basis.name}: {ratio:.0f} times "
            f"faster (goal {basis.speedup:.0f}), largest error {error:.1e} (goal {basis.error:g})."
        )
    return lines


def figure(results: Results) -> Figure:
    """Draws errors against the period for each problem, and the products.

    Args:
        results: what `run` returned.

    Returns:
        The figure.
    """
    names = [name for (name,) in tables.group(results["errors"], "problem")]
    drawing, panels = figures.panels(len(names) + 1, "K gradient steps on the linearised model", shared=False)
    for panel, name in zip(panels, names, strict=False):
        rows = [row | {"step": row["period"]} for row in results["errors"] if row["problem"] == name]
        figures.draw_curves(panel, rows, "period", "error")
        panel.set_title(name, fontsize=10)
        panel.set_ylabel("relative error of the step")
    products = panels[-1]
    rows = [row | {"step": row["period"]} for row in results["growth"]]
    figures.draw_curves(products, rows, "period", "products", label="problem")
    products.plot(PERIODS, [math.sqrt(period) for period in PERIODS], color="#666666", linewidth=1, label="square root")
    products.set_title(f"products for an error of {SMALL_ERROR:g}", fontsize=10)
    products.set_ylabel("products")
    products.legend(fontsize=9)
    for panel in panels:
        panel.set_xlabel("period K")
        panel.set_xscale("log")
        panel.set_yscale("log")
    figures.shared_legend(drawing, panels[0])
    return drawing
