"""The price of a product, in gradients: linearisation, curvature product, CG iteration, period-1 step.

Softmax cross-entropy on random data, float32. A loop of products is timed at two lengths: the slope is the price of a
product, the intercept that of the linearisation. "Rebuilt" products run the forward pass anew in every product
(`jax.jvp`, then `jax.vjp`), as packages do that do not keep the linearisation. "Gradient in a loop" is what a plain
gradient costs inside `fori_loop`, where XLA may compile it otherwise.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import gn_linear as gnl
from benchmarks import figures, networks, tables
from benchmarks.settings import Settings
from benchmarks.suites import Results
from benchmarks.tables import Row
from gn_linear.curvature import linearised_problem

X64 = False

REPEATS, QUICK_REPEATS = 15, 2  # for each seed
SHORT, LONG = 2, 12  # products in a loop
CHANNELS = 16
GOALS = {"product": 1.5, "CG iteration": 1.5, "linearisation": 1.5, "period 1 on Adam / Adam": 1.15}

loss = gnl.losses.softmax_cross_entropy


class Case(NamedTuple):
    """A network and a batch."""

    name: str
    predict: Callable[..., jax.Array]
    params: Any
    inputs: jax.Array
    targets: jax.Array


def cases(seed: int, quick: bool) -> list[Case]:
    """Draws networks and data.

    Args:
        seed: of parameters and data.
        quick: whether to keep only the first case.

    Returns:
        The perceptron at two batch sizes, and a small convolutional network.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    widths = (784, 512, 512, 10)
    dense = networks.init_mlp(keys[0], widths, networks.LECUN)
    images = jax.random.normal(keys[1], (512, 28, 28, 1))
    labels = jax.random.randint(keys[2], (512,), 0, 10)
    flat = images.reshape(512, -1)
    found = [
        Case(f"MLP 784-512-512-10, batch {n}", networks.mlp(jnp.tanh), dense, flat[:n], labels[:n]) for n in (64, 512)
    ]
    found.append(Case("convolutional, batch 64", convolutional, init_convolutional(keys[3]), images[:64], labels[:64]))
    return found[:1] if quick else found


def init_convolutional(key: jax.Array) -> dict[str, jax.Array]:
    """Draws the parameters of two 3 x 3 convolutions of stride 2 and a dense layer, 28 x 28 images to 10 classes.

    Args:
        key: a random key.

    Returns:
        The parameters.
    """
    keys = jax.random.split(key, 3)
    return {
        "first": jax.random.normal(keys[0], (3, 3, 1, CHANNELS)) / 3.0,
        "second": jax.random.normal(keys[1], (3, 3, CHANNELS, 2 * CHANNELS)) / (9 * CHANNELS) ** 0.5,
        "dense": jax.random.normal(keys[2], (7 * 7 * 2 * CHANNELS, 10)) / (49 * 2 * CHANNELS) ** 0.5,
    }


def convolutional(params: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    """Applies the network of `init_convolutional`.

    Args:
        params: its parameters.
        inputs: images (n, 28, 28, 1).

    Returns:
        Logits (n, 10).
    """
    for name in ("first", "second"):
        inputs = jax.lax.conv_general_dilated(
            inputs, params[name], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        inputs = jax.nn.relu(inputs)
    return inputs.reshape(inputs.shape[0], -1) @ params["dense"]


def timed_functions(case: Case) -> dict[str, Callable[[], Any]]:
    """Compiles what is timed.

    Args:
        case: a network and a batch.

    Returns:
        From a name to a function without arguments that runs it.
    """
    params, x, y = case.params, case.inputs, case.targets

    def objective(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return loss(case.predict(p, x), y)

    def kept(p: Any, count: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        problem = linearised_problem(case.predict, loss, p, x, targets=y)
        return jax.lax.fori_loop(0, count, lambda _, v: problem.product(v), p)

    def gradients(p: Any, count: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, q: jax.grad(objective)(q, x, y), p)

    def rebuilt(p: Any, count: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        def product(_: jax.Array, v: Any) -> Any:
            outputs, tangent = jax.jvp(lambda q: case.predict(q, x), (p,), (v,))
            curved = loss.hessian_product(outputs, y, tangent)
            return jax.vjp(lambda q: case.predict(q, x), p)[1](curved)[0]

        return jax.lax.fori_loop(0, count, product, p)

    def cg(steps: int) -> Callable[..., Any]:
        solver = gnl.solvers.CG(max_steps=steps, rtol=0.0, progress=0.0)

        def solve(p: Any, x: jax.Array, y: jax.Array) -> Any:
            problem = linearised_problem(case.predict, loss, p, x, targets=y)
            # A fixed right-hand side, so that no gradient is timed with the solve.
            return solver.solve(solver.prepare(problem, p, solver.init(p)), jnp.float32(1.0)).step

        return solve

    def training_step(optimiser: optax.GradientTransformation) -> tuple[Callable[..., Any], Any]:
        def step(p: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
            grads = jax.grad(objective)(p, x, y)
            updates, state = optimiser.update(grads, state, p, inputs=x, targets=y)
            return optax.apply_updates(p, updates), state

        return step, optimiser.init(params)

    adam = optax.with_extra_args_support(optax.adam(1e-3))
    period_1 = optax.chain(gnl.iterative_linearisation(case.predict, loss, period=1), optax.adam(1e-3))
    plain_step, plain_state = training_step(adam)
    linearised_step, linearised_state = training_step(period_1)
    short, long = jnp.int32(SHORT), jnp.int32(LONG)
    return {
        "gradient": bound(jax.grad(objective), params, x, y),
        "gradients short": bound(gradients, params, short, x, y),
        "gradients long": bound(gradients, params, long, x, y),
        "kept short": bound(kept, params, short, x, y),
        "kept long": bound(kept, params, long, x, y),
        "rebuilt short": bound(rebuilt, params, short, x, y),
        "rebuilt long": bound(rebuilt, params, long, x, y),
        "CG short": bound(cg(SHORT), params, x, y),
        "CG long": bound(cg(LONG), params, x, y),
        "Adam": bound(plain_step, params, plain_state, x, y),
        "period 1": bound(linearised_step, params, linearised_state, x, y),
    }


def bound(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Compiles a function and fixes its arguments.

    Args:
        function: what to compile.
        *arguments: its arguments.

    Returns:
        A function without arguments that runs it and waits for the result.
    """
    compiled = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def run(settings: Settings) -> Results:
    """Times everything in turn, round after round.

    Args:
        settings: what the command line asked for.

    Returns:
        "calls": the median seconds of a call for each case, seed and function; "prices": what follows from them.
    """
    repeats = QUICK_REPEATS if settings.quick else REPEATS
    results: Results = {"calls": [], "prices": []}
    count = len(cases(0, settings.quick))
    with tqdm(total=settings.seeds * count * repeats, unit="round", desc="products") as bar:
        for seed in range(settings.seeds):
            for case in cases(seed, settings.quick):
                functions = timed_functions(case)
                seconds: dict[str, list[float]] = {name: [] for name in functions}
                for call in functions.values():
                    call()
                for _ in range(repeats):
                    for name, call in functions.items():
                        start = time.perf_counter()
                        call()
                        seconds[name].append(time.perf_counter() - start)
                    bar.update()
                medians = {name: statistics.median(values) for name, values in seconds.items()}
                where = {"case": case.name, "seed": seed}
                results["calls"] += [where | {"call": name, "seconds": value} for name, value in medians.items()]
                results["prices"].append(where | prices(medians))
    return results


def prices(seconds: dict[str, float]) -> Row:
    """Derives the prices from the medians of the calls.

    Args:
        seconds: of each call of `timed_functions`.

    Returns:
        The milliseconds of a gradient, and prices in gradients (the last one in Adam steps).
    """
    gradient = seconds["gradient"]

    def slope(name: str) -> float:
        return (seconds[f"{name} long"] - seconds[f"{name} short"]) / (LONG - SHORT)

    return {
        "gradient ms": 1000 * gradient,
        "gradient in a loop": slope("gradients") / gradient,
        "linearisation": (seconds["kept short"] - SHORT * slope("kept")) / gradient,
        "product": slope("kept") / gradient,
        "rebuilt product": slope("rebuilt") / gradient,
        "CG iteration": slope("CG") / gradient,
        "period 1 on Adam / Adam": seconds["period 1"] / seconds["Adam"],
    }


def table(results: Results) -> str:
    """Writes the prices.

    Args:
        results: what `run` returned.

    Returns:
        The table, and which goals were missed.
    """
    rows, missed = [], []
    for (case,), seeds in tables.group(results["prices"], "case").items():
        columns = [key for key in seeds[0] if key not in ("case", "seed")]
        rows.append({"case": case} | {key: tables.median_range([row[key] for row in seeds], ".2f") for key in columns})
        for key, goal in GOALS.items():
            median = statistics.median(row[key] for row in seeds)
            if median > goal:
                missed.append(f"{key} at {case}: {median:.2f}, goal {goal}")
    return "\n".join(
        [
            tables.text_table(rows),
            "",
            f"In gradients of the same batch; medians and ranges over {len(seeds)} seeds.",
            *(f"Missed: {line}." for line in missed or ["nothing"]),
        ]
    )


def figure(results: Results) -> Figure:
    """Draws the prices of each case as bars.

    Args:
        results: what `run` returned.

    Returns:
        The figure.
    """
    drawing, (panel,) = figures.panels(1, "Prices in gradients")
    drawing.set_size_inches(9, 4.6)
    names = ["linearisation", "product", "rebuilt product", "CG iteration"]
    groups = tables.group(results["prices"], "case")
    for number, ((case,), seeds) in enumerate(groups.items()):
        heights = [statistics.median(row[name] for row in seeds) for name in names]
        places = [index + 0.25 * (number - 1) for index in range(len(names))]
        panel.bar(
            places,
            heights,
            width=0.23,
            label=case,
            color=gnl.plotting.curve_style(number)["color"],
            hatch=("", "//", "..")[number],
        )
    panel.set_xticks(range(len(names)), names)
    panel.set_ylabel("gradients of the same batch")
    figures.shared_legend(drawing, panel)
    return drawing
