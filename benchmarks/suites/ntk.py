"""The empirical neural tangent kernel: from the factors of each layer, and from per-example Jacobians.

The kernel (n, n, c, c), and (n, n) averaged over the outputs, under `jit` in float32. The Jacobian route is the plain
one: the Jacobian of each example by `vmap(jacrev)`, its leaves side by side, then one matrix product. Memory is what
the compiled module takes beyond its arguments: temporary buffers and the kernel. A difference is the largest between
two entries, relative to the largest entry. On the second perceptron the Jacobian route takes minutes and 14 GB.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import gn_linear as gnl
from benchmarks import data, figures, networks, tables
from benchmarks.settings import Settings
from benchmarks.suites import Results
from benchmarks.tables import Row

X64 = False

QUICK_EXAMPLES = 8
QUICK_TURNS = {"structured": 2, "Jacobian": 1}
SHALLOW, WIDE = (2, 64, 64, 1), (784, 512, 512, 10)
LENET = ((5, 5, 1, 6), (5, 5, 6, 16), (400, 120), (120, 84), (84, 10))
POOLED = ((3, 3, 1, 16), (3, 3, 16, 32), (3, 3, 32, 32), (32, 10))
EXACT = "perceptron 2-64-64-1"  # whose Jacobian is small enough for float64
GOALS = {"perceptron 2-64-64-1": 10, "perceptron 784-512-512-10": 300, "LeNet-5": 5}  # times faster, each output

Network = Callable[[Any, jax.Array], jax.Array]


class Case(NamedTuple):
    """A network, a batch, and how many turns each method gets on it.

    Attributes:
        name: how the tables call it.
        predict: the network.
        init: draws its parameters.
        inputs: the batch.
        turns: the number of turns of each method.
    """

    name: str
    predict: Network
    init: Callable[[jax.Array], Any]
    inputs: jax.Array
    turns: dict[str, int]


class Compiled(NamedTuple):
    """A compiled function with its arguments, the seconds that compiling took, and the bytes that it allocates."""

    call: Callable[[], jax.Array]
    seconds: float
    size: int


def cases(quick: bool) -> list[Case]:
    """Lists the networks, from the one that gains most by its structure to the one that gains least.

    Args:
        quick: whether to cut the batches and the turns.

    Returns:
        Two perceptrons, LeNet-5, and convolutions with a mean over all positions.
    """
    points = jnp.asarray(data.smooth_function(1000, seed=0)[0], jnp.float32)
    pixels = jnp.asarray(data.mnist(256).train_inputs)
    images = pixels.reshape(-1, 28, 28, 1)
    perceptron = networks.mlp(jnp.tanh)
    found = [
        Case(EXACT, perceptron, init_perceptron(SHALLOW), points, {"structured": 20, "Jacobian": 20}),
        Case("perceptron 784-512-512-10", perceptron, init_perceptron(WIDE), pixels, {"structured": 10, "Jacobian": 1}),
        Case("LeNet-5", lenet, init_layers(LENET), images, {"structured": 10, "Jacobian": 3}),
        Case("convolutions and a mean", pooled, init_layers(POOLED), images[:128], {"structured": 10, "Jacobian": 10}),
    ]
    if quick:
        return [case._replace(inputs=case.inputs[:QUICK_EXAMPLES], turns=QUICK_TURNS) for case in found]
    return found


def init_perceptron(widths: tuple[int, ...]) -> Callable[[jax.Array], Any]:
    """Makes a function from a key to the parameters of a perceptron.

    Args:
        widths: its widths.

    Returns:
        The function.
    """
    return lambda key: networks.init_mlp(key, widths, networks.LECUN)


def init_layers(shapes: tuple[tuple[int, ...], ...]) -> Callable[[jax.Array], Any]:
    """Makes a function from a key to the parameters of layers: weights normal with variance 1 / fan-in, biases zero.

    Args:
        shapes: of the weights; all axes but the last are the fan-in.

    Returns:
        The function.
    """
    return lambda key: networks.init_layers(key, shapes, networks.LECUN)


def lenet(params: Any, images: jax.Array) -> jax.Array:
    """LeNet-5 with tanh: two convolutions, each with average pooling, and three dense layers.

    Args:
        params: its five layers.
        images: images (n, 28, 28, 1).

    Returns:
        Logits (n, 10).
    """
    hidden = images
    for layer, padding in zip(params[:2], ("SAME", "VALID"), strict=True):
        hidden = jnp.tanh(convolution(hidden, layer, 1, padding))
        n, height, width, channels = hidden.shape
        hidden = hidden.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    return networks.mlp(jnp.tanh)(params[2:], hidden.reshape(len(hidden), -1))


def pooled(params: Any, images: jax.Array) -> jax.Array:
    """Three convolutions with relu, the mean over all positions, and a dense layer: 14,378 parameters.

    Args:
        params: its four layers.
        images: images (n, 28, 28, 1).

    Returns:
        Logits (n, 10).
    """
    hidden = images
    for layer, stride in zip(params[:3], (2, 2, 1), strict=True):
        hidden = jax.nn.relu(convolution(hidden, layer, stride, "SAME"))
    return hidden.mean((1, 2)) @ params[3]["w"] + params[3]["b"]


def convolution(images: jax.Array, layer: Any, stride: int, padding: str) -> jax.Array:
    """A convolution with a bias.

    Args:
        images: images (n, height, width, channels).
        layer: its weight and bias.
        stride: in both directions.
        padding: "SAME" or "VALID".

    Returns:
        Images again.
    """
    return (
        jax.lax.conv_general_dilated(
            images, layer["w"], (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        + layer["b"]
    )


def structured_kernel(predict: Network, averaged: bool) -> Network:
    """Makes our function of parameters and inputs.

    Args:
        predict: the network.
        averaged: whether to average over the outputs.

    Returns:
        A function that returns the kernel.
    """
    return lambda params, inputs: gnl.diagnostics.empirical_ntk(predict, params, inputs, trace=averaged)


def jacobian_kernel(predict: Network, averaged: bool) -> Network:
    """Makes the Jacobian route's function of parameters and inputs.

    Args:
        predict: the network.
        averaged: whether to average over the outputs.

    Returns:
        A function that returns the kernel.
    """

    def kernel(params: Any, inputs: jax.Array) -> jax.Array:
        def of_one(example: jax.Array) -> Any:
            return jax.jacrev(lambda p: predict(p, example[None])[0])(params)

        leaves = jax.tree.leaves(jax.vmap(of_one)(inputs))
        n, c = leaves[0].shape[:2]
        jacobian = jnp.concatenate([leaf.reshape(n, c, -1) for leaf in leaves], axis=2)
        rows = jacobian.reshape(n, -1) if averaged else jacobian.reshape(n * c, -1)
        gram = rows @ rows.T
        return gram / c if averaged else gram.reshape(n, c, n, c).swapaxes(1, 2)

    return kernel


METHODS = {"structured": structured_kernel, "Jacobian": jacobian_kernel}


def exact_kernel(params: Any, inputs: jax.Array) -> np.ndarray:
    """The kernel of a tanh perceptron from its Jacobian in float64, by numpy alone.

    Args:
        params: its layers.
        inputs: the batch (n, inputs).

    Returns:
        The kernel (n, n, c, c).
    """
    layers = [(np.asarray(layer["w"], np.float64), np.asarray(layer["b"], np.float64)) for layer in params]
    hidden = [np.asarray(inputs, np.float64)]
    for weight, bias in layers[:-1]:
        hidden.append(np.tanh(hidden[-1] @ weight + bias))
    n, c = len(inputs), layers[-1][0].shape[-1]
    cotangent = np.broadcast_to(np.eye(c), (n, c, c))
    rows = []
    for (weight, _), below in zip(layers[::-1], hidden[::-1], strict=True):
        rows += [cotangent, (below[:, None, :, None] * cotangent[:, :, None, :]).reshape(n, c, -1)]
        cotangent = (cotangent @ weight.T) * (1 - below[:, None, :] ** 2)
    jacobian = np.concatenate(rows, axis=2).reshape(n * c, -1)
    return (jacobian @ jacobian.T).reshape(n, c, n, c).swapaxes(1, 2)


def compiled(function: Network, *arguments: Any) -> Compiled:
    """Compiles a function.

    Args:
        function: what to compile.
        *arguments: its arguments.

    Returns:
        The function, waiting for its result, with what compiling it told.

    Raises:
        RuntimeError: if this platform's compiler does not tell the memory.
    """
    start = time.perf_counter()
    call = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = call.memory_analysis()
    if memory is None:
        raise RuntimeError(f"the compiler for {jax.default_backend()} does not tell how much memory a module takes")
    size = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return Compiled(lambda: jax.block_until_ready(call(*arguments)), seconds, size)


def difference(kernel: Any, other: Any) -> float:
    """The largest difference of two kernels.

    Args:
        kernel: a kernel.
        other: another of the same shape.

    Returns:
        The difference relative to the largest entry of the other.
    """
    other = np.asarray(other, np.float64)
    return float(np.max(np.abs(np.asarray(kernel, np.float64) - other)) / np.max(np.abs(other)))


def run(settings: Settings) -> Results:
    """Lets the methods take turns on each network.

    Args:
        settings: what the command line asked for.

    Returns:
        "runs": for each network, seed, kernel and method the median seconds of a call, the seconds of compiling, and
        the bytes; "kernels": for each network, seed and kernel the ratios and the differences.
    """
    results: Results = {"runs": [], "kernels": []}
    found = cases(settings.quick)
    with tqdm(total=settings.seeds * len(found), unit="network", desc="ntk", mininterval=0.5) as bar:
        for seed in range(settings.seeds):
            for case in found:
                for name, rows in measure(case, seed).items():
                    results[name] += rows
                bar.update()
    return results


def measure(case: Case, seed: int) -> Results:
    """Measures one network.

    Args:
        case: the network and the batch.
        seed: of the parameters.

    Returns:
        The rows.
    """
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), case.init(jax.random.key(seed)))
    functions = {
        (outputs, method): compiled(make(case.predict, outputs == "averaged"), params, case.inputs)
        for outputs in ("each", "averaged")
        for method, make in METHODS.items()
    }
    seconds, kernels = take_turns(case, functions)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    where = {"network": case.name, "examples": len(case.inputs), "seed": seed}
    exact = exact_kernel(params, case.inputs) if case.name == EXACT else None
    found: Results = {"runs": [], "kernels": []}
    for (outputs, method), function in functions.items():
        about = {"outputs": outputs, "method": method, "seconds": medians[outputs, method]}
        about |= {"turns": case.turns[method], "compile_seconds": function.seconds, "bytes": function.size}
        found["runs"].append(where | about)
    for outputs in ("each", "averaged"):
        ours, theirs = (outputs, "structured"), (outputs, "Jacobian")
        row = where | {"outputs": outputs, "speedup": medians[theirs] / medians[ours]}
        row |= {"memory_ratio": functions[ours].size / functions[theirs].size}
        row |= {"difference": difference(kernels[ours], kernels[theirs])}
        row |= {"structured_error": None, "jacobian_error": None}
        if exact is not None:
            wanted = exact if outputs == "each" else np.einsum("nmcc->nm", exact) / exact.shape[2]
            errors = [difference(kernels[key], wanted) for key in (ours, theirs)]
            row |= dict(zip(("structured_error", "jacobian_error"), errors, strict=True))
        found["kernels"].append(row)
    return found


def take_turns(case: Case, functions: dict[tuple[str, str], Compiled]) -> tuple[dict[Any, list[float]], dict[Any, Any]]:
    """Calls the functions in turns; the one that begins a round changes from round to round.

    A method with fewer turns than there are rounds takes them evenly spread; if it has a single one, being slow, it is
    not called once off the clock before.

    Args:
        case: the network and the batch.
        functions: what to call.

    Returns:
        The seconds of each call, and the last kernel, of each function.
    """
    seconds: dict[Any, list[float]] = {key: [] for key in functions}
    kernels = {key: function.call() for key, function in functions.items() if case.turns[key[1]] > 1}
    rounds = max(case.turns.values())
    keys = list(functions)
    for number in range(rounds):
        first = number % len(keys)
        for key in [*keys[first:], *keys[:first]]:
            count = case.turns[key[1]]
            if number not in {(2 * turn + 1) * rounds // (2 * count) for turn in range(count)}:
                continue
            start = time.perf_counter()
            kernels[key] = functions[key].call()
            seconds[key].append(time.perf_counter() - start)
    return seconds, kernels


def table(results: Results) -> str:
    """Writes seconds, memory and differences, and which goals were reached.

    Args:
        results: what `run` returned.

    Returns:
        The table; the errors against float64; the goals.
    """
    runs = tables.group(results["runs"], "network", "outputs", "method")
    kernels = tables.group(results["kernels"], "network", "outputs")
    lines, errors = [], []
    for (network, outputs), rows in kernels.items():
        ours, theirs = (runs[network, outputs, method] for method in METHODS)
        lines.append(
            {
                "network": network,
                "examples": rows[0]["examples"],
                "outputs": outputs,
                "structured s": format(median(ours, "seconds"), ".3g"),
                "Jacobian s": format(median(theirs, "seconds"), ".3g"),
                "times faster": tables.median_range([row["speedup"] for row in rows], ".1f"),
                "structured MB": megabytes(median(ours, "bytes")),
                "Jacobian MB": megabytes(median(theirs, "bytes")),
                "memory": format(median(rows, "memory_ratio"), ".2g"),
                "difference": format(median(rows, "difference"), ".1e"),
                "compile s": " / ".join(format(median(side, "compile_seconds"), ".1f") for side in (ours, theirs)),
            }
        )
        if rows[0]["structured_error"] is not None:
            exact = [format(median(rows, f"{name}_error"), ".1e") for name in ("structured", "jacobian")]
            errors.append(f"Against float64 on {network}, {outputs}: structured {exact[0]}, Jacobian {exact[1]}.")
    seeds = len({row["seed"] for row in results["runs"]})
    return "\n".join(
        [
            tables.text_table(lines),
            "",
            f"Medians over {seeds} seeds, of the times faster with their range. Outputs: the kernel of each pair of",
            "outputs, or averaged. Memory: temporary buffers and kernel, and the ratio of both. Compile s: of both.",
            *errors,
            *goal_lines(results),
        ]
    )


def megabytes(size: float) -> str:
    """Writes a size.

    Args:
        size: in bytes.

    Returns:
        Megabytes, to three digits below 100 and whole from there.
    """
    return format(size / 1e6, ".3g" if size < 1e8 else ",.0f")


def median(rows: list[Row], column: str) -> float:
    """Takes the median of a column.

    Args:
        rows: the rows.
        column: the column.

    Returns:
        Its median.
    """
    return statistics.median(row[column] for row in rows)


def goal_lines(results: Results) -> list[str]:
    """Compares with the goals, which are for the kernel of each pair of outputs.

    Args:
        results: what `run` returned.

    Returns:
        A line for each network.
    """
    lines = []
    for (network, outputs), rows in tables.group(results["kernels"], "network", "outputs").items():
        if outputs == "averaged":
            continue
        speedup, memory = median(rows, "speedup"), median(rows, "memory_ratio")
        goal = GOALS.get(network)
        faster = f"{speedup:.1f} times faster"
        if goal is not None:
            faster += f" (goal {goal}: {'reached' if speedup >= goal else 'MISSED'})"
        below = "reached" if memory < 1 else "MISSED"
        lines.append(f"{network}: {faster}, memory {memory:.2g} of the Jacobian's (goal below 1: {below}).")
    return lines


def figure(results: Results) -> Figure:
    """Draws seconds and memory of both methods as bars.

    Args:
        results: what `run` returned.

    Returns:
        The figure.
    """
    drawing, panels = figures.panels(2, "The empirical neural tangent kernel", shared=False)
    names = [name for (name,) in tables.group(results["runs"], "network")]
    series = tables.group(results["runs"], "outputs", "method")
    for panel, column, unit in zip(panels, ("seconds", "bytes"), (1, 1e6), strict=True):
        for number, ((outputs, method), rows) in enumerate(series.items()):
            by_network = tables.group(rows, "network")
            heights = [median(by_network[name,], column) / unit for name in names]
            places = [index + 0.2 * (number - 1.5) for index in range(len(names))]
            colour, hatch = gnl.plotting.curve_style(number)["color"], ("", "//", "..", "xx")[number]
            panel.bar(places, heights, width=0.18, label=f"{method}, outputs {outputs}", color=colour, hatch=hatch)
        panel.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names], fontsize=8)
        panel.set_yscale("log")
        panel.set_ylabel("seconds" if column == "seconds" else "memory, MB")
    figures.shared_legend(drawing, panels[0], columns=4)
    return drawing
