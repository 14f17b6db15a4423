"""Digits: Gauss-Newton, Adam and iterative linearisation train one small network.

5,000 real MNIST images, 4,000 to train and 1,000 to test; a perceptron 784-128-64-10 with tanh; softmax
cross-entropy on minibatches of 500. On each seed all methods start from the same parameters and see the same batches.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import gn_linear as gnl
from benchmarks import data, figures, networks, tables, timing
from benchmarks.settings import Settings
from benchmarks.suites import Results
from benchmarks.tables import Row

X64 = False

WIDTHS = (784, 128, 64, 10)
BATCH_SIZE = 500
STEPS, QUICK_STEPS = 200, 20
CHUNK = 10
ADAM_RATES = (1e-3, 3e-3, 1e-2)
PERIOD, INNER_RATE = 100, 1e-3
NETWORK, LINEARISED = "f", "f_lin"

predict = networks.mlp(jnp.tanh)
loss = gnl.losses.softmax_cross_entropy


class Method(NamedTuple):
    """An optimiser, the models that its parameters are judged by, and what to keep of its state at each step."""

    name: str
    optimiser: optax.GradientTransformation
    evaluators: tuple[str, ...] = (NETWORK,)
    measure: Callable[[Any], Any] = lambda state: None


def methods() -> list[Method]:
    """Returns the methods in the order of the table."""
    iterative = optax.chain(gnl.iterative_linearisation(predict, loss, period=PERIOD), optax.adam(INNER_RATE))
    return [
        Method("Gauss-Newton (defaults)", gnl.gauss_newton(predict, loss), measure=gnl.info),
        *(Method(f"Adam {rate:g}", optax.adam(rate)) for rate in ADAM_RATES),
        Method(f"linearised every {PERIOD}, Adam {INNER_RATE:g}", iterative, (NETWORK, LINEARISED)),
    ]


def run(settings: Settings) -> Results:
    """Trains the network by every method on every seed.

    Args:
        settings: what the command line asked for.

    Returns:
        "curve": a row for each method, evaluator, seed and evaluated step; "runs": a row for each at its end.
    """
    steps = QUICK_STEPS if settings.quick else STEPS
    digits = jax.tree.map(jnp.asarray, data.mnist())
    evaluate = make_evaluate(digits)
    contenders = {method.name: (method, make_step(method)) for method in methods()}
    warm = [make_runner(method, step, digits, 1, seed=0) for method, step in contenders.values()]
    compile_seconds = {runner.name: timing.warm_up(runner.step, runner.state) for runner in warm}
    results: Results = {"curve": [], "runs": []}
    with tqdm(total=settings.seeds * len(contenders) * steps, unit="step", desc="demo", mininterval=0.5) as bar:
        for seed in range(settings.seeds):
            bar.set_postfix_str(f"seed {seed + 1} of {settings.seeds}")
            runners = [make_runner(method, step, digits, steps, seed) for method, step in contenders.values()]
            for runner, taken in timing.race(runners, steps, CHUNK, bar.update):
                for evaluator in contenders[runner.name][0].evaluators:
                    row = describe(runner, evaluator, seed, taken) | evaluate(evaluator, runner.state)
                    results["curve"].append(row)
                    if taken == steps:
                        cost = {"compile_seconds": compile_seconds[runner.name]}
                        results["runs"].append(row | cost | summarise_steps(runner.measured))
    order = list(contenders)
    return {name: sorted(rows, key=lambda row: order.index(row["method"])) for name, rows in results.items()}


def make_step(method: Method) -> Callable[..., tuple[Any, Any]]:
    """Makes the jitted training step of a method.

    Args:
        method: the method.

    Returns:
        step((params, state), indices, inputs, targets) -> ((params, state), measured), on the minibatch at `indices`.
    """
    optimiser = optax.with_extra_args_support(method.optimiser)

    @jax.jit
    def step(carry: Any, indices: jax.Array, inputs: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
        params, state = carry
        x, y = inputs[indices], targets[indices]
        grads = jax.grad(lambda p: loss(predict(p, x), y))(params)
        updates, state = optimiser.update(grads, state, params, inputs=x, targets=y)
        return (optax.apply_updates(params, updates), state), method.measure(state)

    return step


def make_runner(
    method: Method, step: Callable[..., tuple[Any, Any]], digits: data.Split, steps: int, seed: int
) -> timing.Runner:
    """Puts a method at the start of a seed: the same parameters and batches for every method.

    Args:
        method: the method.
        step: its step of `make_step`.
        digits: the data.
        steps: steps that will be taken.
        seed: the seed of the parameters and of the batches.

    Returns:
        The runner.
    """
    params = networks.init_mlp(jax.random.key(seed), WIDTHS, networks.LECUN)
    batches = list(jnp.asarray(data.batch_order(len(digits.train_targets), BATCH_SIZE, steps, seed)))

    def on_batch(carry: Any, index: int) -> tuple[Any, Any]:
        return step(carry, batches[index], digits.train_inputs, digits.train_targets)

    return timing.Runner(method.name, on_batch, (params, method.optimiser.init(params)))


def make_evaluate(digits: data.Split) -> Callable[[str, Any], Row]:
    """Makes the judge of a method's parameters.

    Args:
        digits: the data.

    Returns:
        evaluate(evaluator, (params, state)) -> the loss on all training images and the accuracy on all test images.
    """

    def judge(model: Callable[..., jax.Array], params: Any, split: data.Split) -> tuple[jax.Array, jax.Array]:
        right = jnp.argmax(model(params, split.test_inputs), axis=-1) == split.test_targets
        return loss(model(params, split.train_inputs), split.train_targets), jnp.mean(right)

    network = jax.jit(lambda params, split: judge(predict, params, split))
    linearised = jax.jit(lambda params, anchor, split: judge(gnl.linearised(predict, anchor), params, split))

    def evaluate(evaluator: str, carry: Any) -> Row:
        params, state = carry
        if evaluator == LINEARISED:
            train_loss, accuracy = linearised(params, gnl.anchor(state), digits)
        else:
            train_loss, accuracy = network(params, digits)
        return {"train_loss": float(train_loss), "test_accuracy": float(accuracy)}

    return evaluate


def describe(runner: timing.Runner, evaluator: str, seed: int, step: int) -> Row:
    """Says which point of which run a row is about, and what it had cost by then.

    Args:
        runner: the method's runner.
        evaluator: `NETWORK` or `LINEARISED`.
        seed: the run's seed.
        step: steps taken.

    Returns:
        The first columns of a row.
    """
    cost = {"seconds": runner.seconds, "cpu_seconds": runner.cpu_seconds}
    return {"method": runner.name, "evaluator": evaluator, "seed": seed, "step": step} | cost


def summarise_steps(measured: list[Any]) -> Row:
    """Summarises what Gauss-Newton said of itself at each step.

    Args:
        measured: `gnl.info` of each step, or None of each for another method.

    Returns:
        Columns of a row; None for another method.
    """
    if measured[-1] is None:
        return {"median_solver_steps": None, "skipped": None, "damping": None}
    solver_steps = statistics.median(int(info.solver_steps) for info in measured)
    last = measured[-1]
    return {"median_solver_steps": solver_steps, "skipped": int(last.skipped), "damping": float(last.damping)}


def table(results: Results) -> str:
    """Writes the table of the ends of the runs.

    Args:
        results: what `run` returned.

    Returns:
        The table and what its columns mean.
    """
    runs = results["runs"]
    adam = statistics.median(row["seconds"] for row in runs if row["method"].startswith("Adam"))
    rows = []
    for (method, evaluator), seeds in tables.group(runs, "method", "evaluator").items():
        column = {key: [row[key] for row in seeds] for key in seeds[0]}
        rows.append(
            {
                "method": method,
                "evaluator": evaluator,
                "train loss": tables.mean_spread(column["train_loss"], ".2g"),
                "test accuracy %": tables.mean_spread([100 * value for value in column["test_accuracy"]], ".2f"),
                "steps": seeds[0]["step"],
                "seconds": tables.mean_spread(column["seconds"], ".2f"),
                "compile s": format(seeds[0]["compile_seconds"], ".2f"),
                "seconds / Adam": format(statistics.median(column["seconds"]) / adam, ".2f"),
            }
        )
    return "\n".join([tables.text_table(rows), "", *notes(runs)])


def notes(runs: list[Row]) -> list[str]:
    """Writes the lines under the table.

    Args:
        runs: the rows of the ends of the runs.

    Returns:
        The lines.
    """
    gauss_newton = [row for row in runs if row["skipped"] is not None]
    solver_steps = statistics.median(row["median_solver_steps"] for row in gauss_newton)
    refused = ", ".join(str(row["skipped"]) for row in gauss_newton)
    return [
        "Train loss: on all 4,000 training images. f: the network; f_lin: the network linearised at its last anchor.",
        "Seconds: of training, without compiling and evaluating; seconds / Adam: to the median of all Adam runs.",
        f"Seeds: {len(gauss_newton)}; mean ± sample standard deviation where there are several.",
        f"Gauss-Newton: {solver_steps:g} conjugate gradient steps in a median step; steps refused by seed: {refused}.",
    ]


def figure(results: Results) -> Figure:
    """Draws the training loss against steps and against seconds.

    Args:
        results: what `run` returned.

    Returns:
        The figure.
    """
    several = {row["method"] for row in results["runs"] if row["evaluator"] == LINEARISED}
    curve = [
        row | {"label": row["method"] + (f": {row['evaluator']}" if row["method"] in several else "")}
        for row in results["curve"]
    ]
    drawing, (by_step, by_second) = figures.panels(
        2, "5,000 MNIST digits, perceptron 784-128-64-10, minibatches of 500"
    )
    for panel, x in ((by_step, "step"), (by_second, "seconds")):
        figures.draw_curves(panel, curve, x, "train_loss", label="label")
        panel.set_yscale("log")
    by_step.set_xlabel("steps")
    by_second.set_xlabel("seconds of training, without compiling")
    by_second.set_xscale("log", nonpositive="mask")
    by_step.set_ylabel("loss on the 4,000 training images")
    figures.shared_legend(drawing, by_step)
    return drawing
