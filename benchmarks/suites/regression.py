"""Small regression in float64: Gauss-Newton against jaxopt's GaussNewton and LevenbergMarquardt.

200 points of a smooth function of two variables, full batch; a perceptron 2-16-16-1 with tanh, 337 parameters. The
loss is 1/2 the mean of the squared residuals for all; jaxopt minimises 1/2 their sum, which is 200 times that.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from tqdm import tqdm

import gn_linear as gnl
from benchmarks import data, figures, networks, reach, tables, timing
from benchmarks.settings import Settings
from benchmarks.suites import Results
from benchmarks.tables import Row

X64 = True

WIDTHS = (2, 16, 16, 1)
POINTS = 200
STEPS, QUICK_STEPS = 100, 10
TARGETS = (1e-4, 1e-6)
PREFIX = "gn_linear"
OURS = f"{PREFIX}, defaults"

predict = networks.mlp(jnp.tanh)
loss = gnl.losses.squared_error


class Method(NamedTuple):
    """A least-squares method: its first state, its step, and where the parameters are in its state."""

    name: str
    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], Any]
    params: Callable[[Any], Any] = lambda carry: carry[0]


def methods(template: Any) -> list[Method]:
    """Returns the methods: ours with two settings, jaxopt's with three.

    The second of ours solves each step as exactly as jaxopt's conjugate gradients do: relative residual 1e-5, at most
    ten steps for each parameter. LevenbergMarquardt with QR takes the steps of Cholesky at three times its seconds.

    Args:
        template: parameters whose structure all seeds share.

    Returns:
        The methods in the order of the table.
    """
    import jaxopt

    flat, unravel = ravel_pytree(template)
    exact = gnl.solvers.CG(max_steps=10 * flat.size, rtol=1e-5, progress=0.0)

    def residuals(vector: jax.Array, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        return (predict(unravel(vector), inputs) - targets).ravel()

    cholesky = jaxopt.LevenbergMarquardt(residuals, materialize_jac=True, solver="cholesky")
    return [
        ours(OURS, gnl.gauss_newton(predict, loss)),
        ours(f"{PREFIX}, CG to 1e-5", gnl.gauss_newton(predict, loss, solver=exact)),
        peer("jaxopt GaussNewton", jaxopt.GaussNewton(residuals), unravel),
        peer("jaxopt LevenbergMarquardt (CG to 1e-5)", jaxopt.LevenbergMarquardt(residuals), unravel),
        peer("jaxopt LevenbergMarquardt, Cholesky", cholesky, unravel),
    ]


def ours(name: str, optimiser: optax.GradientTransformationExtraArgs) -> Method:
    """Makes a method of one of our transforms.

    Args:
        name: the method's name.
        optimiser: the transform.

    Returns:
        The method, whose state is (params, optimiser state).
    """

    def step(carry: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        params, state = carry
        grads = jax.grad(lambda p: loss(predict(p, inputs), targets))(params)
        updates, state = optimiser.update(grads, state, params, inputs=inputs, targets=targets)
        return optax.apply_updates(params, updates), state

    return Method(name, lambda params, *batch: (params, optimiser.init(params)), jax.jit(step))


def peer(name: str, solver: Any, unravel: Callable[[jax.Array], Any]) -> Method:
    """Makes a method of a jaxopt solver, on flat parameters since its LevenbergMarquardt takes no pytrees.

    Its own stopping rule is not used: like ours, it takes the given number of steps.

    Args:
        name: the method's name.
        solver: the solver.
        unravel: from flat parameters to the network's.

    Returns:
        The method, whose state is (flat parameters, solver state).
    """

    def init(params: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        flat = ravel_pytree(params)[0]
        return flat, solver.init_state(flat, inputs, targets)

    def step(carry: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        return tuple(solver.update(*carry, inputs, targets))

    return Method(name, init, jax.jit(step), lambda carry: unravel(carry[0]))


def run(settings: Settings) -> Results:
    """Fits the function by every method on every seed.

    Args:
        settings: what the command line asked for.

    Returns:
        "curve": a row for each method, seed and step; "runs": a row for each at its end, with the seconds to each
        target (None where it was not reached).
    """
    steps = QUICK_STEPS if settings.quick else STEPS
    template = networks.init_mlp(jax.random.key(0), WIDTHS, networks.LECUN)
    contenders = {method.name: method for method in methods(template)}
    value = jax.jit(lambda params, inputs, targets: loss(predict(params, inputs), targets))
    compile_seconds: dict[str, float] = {}
    results: Results = {"curve": [], "runs": []}
    with tqdm(total=settings.seeds * len(contenders) * steps, unit="step", desc="regression", mininterval=0.5) as bar:
        for seed in range(settings.seeds):
            bar.set_postfix_str(f"seed {seed + 1} of {settings.seeds}")
            batch = tuple(map(jnp.asarray, data.smooth_function(POINTS, seed)))
            runners = [make_runner(method, batch, seed) for method in contenders.values()]
            if not compile_seconds:
                compile_seconds = {runner.name: timing.warm_up(runner.step, runner.state) for runner in runners}
            for runner, taken in timing.race(runners, steps, 1, bar.update):
                reached = float(value(contenders[runner.name].params(runner.state), *batch))
                results["curve"].append(
                    {
                        "method": runner.name,
                        "seed": seed,
                        "step": taken,
                        "seconds": runner.seconds,
                        "cpu_seconds": runner.cpu_seconds,
                        "loss": reached,
                    }
                )
    for (name, _), curve in tables.group(results["curve"], "method", "seed").items():
        results["runs"].append(summarise(curve) | {"compile_seconds": compile_seconds[name]})
    return results


def make_runner(method: Method, batch: tuple[jax.Array, jax.Array], seed: int) -> timing.Runner:
    """Puts a method at the start of a seed.

    Args:
        method: the method.
        batch: inputs and targets.
        seed: the seed of the parameters.

    Returns:
        The runner.
    """
    params = networks.init_mlp(jax.random.key(seed), WIDTHS, networks.LECUN)

    def on_batch(carry: Any, index: int) -> tuple[Any, None]:
        del index
        return method.step(carry, *batch), None

    return timing.Runner(method.name, on_batch, method.init(params, *batch))


def summarise(curve: list[Row]) -> Row:
    """Says where a run ended and when it reached the targets.

    Args:
        curve: the rows of one method on one seed, in order.

    Returns:
        The run's row.
    """
    row = dict(curve[-1])
    for target in TARGETS:
        reached = reach.first(curve, "loss", target)
        row[seconds_to(target)] = reached["seconds"] if reached else None
        row[f"steps_to_{target:g}"] = reached["step"] if reached else None
    return row


def seconds_to(target: float) -> str:
    """Names the column of the seconds to a target.

    Args:
        target: the target.

    Returns:
        The name.
    """
    return f"seconds_to_{target:g}"


def table(results: Results) -> str:
    """Writes the table of the ends of the runs, and says who was best at what.

    Args:
        results: what `run` returned.

    Returns:
        The table and the lines under it.
    """
    runs = {name: rows for (name,), rows in tables.group(results["runs"], "method").items()}
    steps = results["runs"][0]["step"]
    seconds = {
        target: {name: [row[seconds_to(target)] for row in rows] for name, rows in runs.items()} for target in TARGETS
    }
    lines = []
    for name, rows in runs.items():
        line = {"method": name, f"loss after {steps} steps": tables.median_range([row["loss"] for row in rows], ".1e")}
        for target in TARGETS:
            ratio = reach.median_ratio(seconds[target][name], best_of_ours(seconds[target]))
            line[f"seconds to {target:g}"] = reach.describe(seconds[target][name])
            line[f"x ours to {target:g}"] = "-" if ratio is None else format(ratio, ".2f")
        line["ms / step"] = format(statistics.median(1000 * row["seconds"] / steps for row in rows), ".2f")
        line["compile s"] = format(rows[0]["compile_seconds"], ".2f")
        lines.append(line)
    losses = {name: [row["loss"] for row in rows] for name, rows in runs.items()}
    return "\n".join(
        [
            tables.text_table(lines),
            "",
            f"Loss: 1/2 mean squared residual. Median and range, {len(runs[OURS])} seeds. Seconds: without compiling.",
            "x ours: seconds divided by our faster setting's on the same seed, median; below 1 the peer is faster.",
            f"Lowest loss after {steps} steps: {least(losses)}.",
            *(f"Fastest to {target:g}: {least(seconds[target])}." for target in TARGETS),
        ]
    )


def best_of_ours(seconds: dict[str, list[float | None]]) -> list[float | None]:
    """Picks our faster setting on each seed.

    Args:
        seconds: of each method and seed to a target; None where it was not reached.

    Returns:
        The seconds of each seed, None where none of ours reached it.
    """
    ours_only = [values for name, values in seconds.items() if name.startswith(PREFIX)]
    best = [min(map(reach.or_infinity, values)) for values in zip(*ours_only, strict=True)]
    return [value if math.isfinite(value) else None for value in best]


def least(values: dict[str, list[float | None]]) -> str:
    """Finds the method with the least median.

    Args:
        values: of each method and seed.

    Returns:
        Its name, or "none on most seeds" where no median is finite.
    """
    medians = {name: statistics.median(map(reach.or_infinity, seeds)) for name, seeds in values.items()}
    best = min(medians, key=medians.__getitem__)
    return best if math.isfinite(medians[best]) else "none on most seeds"


def figure(results: Results) -> Figure:
    """Draws the loss against steps and against seconds.

    Args:
        results: what `run` returned.

    Returns:
        The figure.
    """
    drawing, (by_step, by_second) = figures.panels(2, "200 points of a smooth function, perceptron 2-16-16-1, float64")
    for panel, x in ((by_step, "step"), (by_second, "seconds")):
        figures.draw_curves(panel, results["curve"], x, "loss")
        panel.set_yscale("log")
    by_step.set_xlabel("steps")
    by_second.set_xlabel("seconds, without compiling")
    by_second.set_xscale("log", nonpositive="mask")
    by_step.set_ylabel("1/2 mean squared residual (axis cut at 10)")
    by_step.set_ylim(top=10)
    figures.shared_legend(drawing, by_step, columns=2)
    return drawing
