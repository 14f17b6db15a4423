"""Sparse feature updates: sweeps over period, learning rate and damping, and the paper's four claims tested.

Iterative linearisation with full-batch gradient descent and softmax cross-entropy on XOR of two of 30 signs, 8 x 8
digits, MNIST, MNIST-1D and, if `--data` names its folder, CIFAR-10; Gauss-Newton and prox-linear beside it on the
common axis of the damping, mu = 1 / (eta K). f is the network, f_lin the network linearised at its last anchor. A run
that was killed goes on where it was, since every finished cell is kept in the folder `--out`.

Learning rates were chosen at K = 1 on seed 0, and the range of the dampings on seeds 100 and 101, so that enough of
them fit the training data; the thresholds of the claims stood before either. The study takes the seeds from 200 on.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

import gn_linear as gnl
from benchmarks import claims, data, figures, networks, tables
from benchmarks.data import Split
from benchmarks.settings import Settings
from benchmarks.suites import Results
from benchmarks.tables import Row

X64 = False
SEEDS, QUICK_SEEDS = 5, 2

FIRST_SEED = 200
MEASUREMENTS, PROBED = 12, 200
SWEPT = (200, 40, 20, claims.UPDATES, 5, 2)
"""Feature updates of the sweep, between an update at every step and a single one at the start."""
DAMPED = (1000, 500, 200, 100, 50, 20, 5)
"""Feature updates of Gauss-Newton: with T steps of learning rate eta, mu = 1 / (eta K) at K = T / updates."""
QUICK_SWEPT, QUICK_DAMPED = (100, claims.UPDATES, 2), (500, 200, 100, 50, 10)


class Case(NamedTuple):
    """A data set with its network.

    Attributes:
        name: how the tables call it.
        split: draws or loads the data of a seed.
        fresh: whether every seed has data of its own; else the seeds differ in their parameters alone.
        predict: the network.
        init: draws its parameters.
        steps: T, the steps of a run.
        rates: learning rates; the claims are tested at the first.
    """

    name: str
    split: Callable[[int], Split]
    fresh: bool
    predict: Callable[[Any, jax.Array], jax.Array]
    init: Callable[[jax.Array], Any]
    steps: int
    rates: tuple[float, ...]


def cases(settings: Settings) -> list[Case]:
    """Lists the data sets; CIFAR-10 only where its folder is given, and XOR and digits alone in a quick run.

    Args:
        settings: what the command line asked for.

    Returns:
        The cases.
    """
    relu, convolutional = networks.mlp(jax.nn.relu), networks.convolutional(jax.nn.relu)
    signs = Case("XOR", data.xor, True, relu, perceptron(data.SIGNS, 128, 2), 10_000, (0.1, 0.3, 1.0))
    digits = Case("digits", lambda _: data.digits(500), False, relu, perceptron(64, 128, 10), 10_000, (0.1, 0.3, 1.0))
    if settings.quick:
        return [case._replace(steps=2000, rates=(0.1, 1.0)) for case in (signs, digits)]

    def sequential(params: Any, inputs: jax.Array) -> jax.Array:
        return convolutional(params, inputs[..., None])

    one_axis = layers((5, 1, 16), (3, 16, 16), (3, 16, 16), (80, 10))
    two_axes = layers((2, 2, 3, 16), (3, 3, 16, 16), (3, 3, 16, 16), (256, 10))
    found = [
        signs,
        digits,
        Case("MNIST", lambda _: data.mnist(1000), False, relu, perceptron(784, 128, 64, 10), 2000, (0.1, 0.3)),
        Case("MNIST-1D", lambda _: data.mnist1d(1000), False, sequential, one_axis, 2000, (0.1, 0.3)),
    ]
    if settings.data is not None:
        images = data.cifar10(settings.data, train=1000)  # read now: what is wrong with the files is said at once
        found.append(Case("CIFAR-10", lambda _: images, False, convolutional, two_axes, 1000, (0.03, 0.1)))
    return found


def perceptron(*widths: int) -> Callable[[jax.Array], Any]:
    """Makes a function from a key to the parameters of a perceptron with relu.

    Args:
        *widths: its widths.

    Returns:
        The function.
    """
    return lambda key: networks.init_mlp(key, widths, networks.HE)


def layers(*shapes: tuple[int, ...]) -> Callable[[jax.Array], Any]:
    """Makes a function from a key to the parameters of layers with relu between them.

    Args:
        *shapes: of the weights.

    Returns:
        The function.
    """
    return lambda key: networks.init_layers(key, shapes, networks.HE)


def problems(case: Case, seeds: list[int]) -> Iterator[tuple[gnl.experiments.Problem, list[int], str]]:
    """Poses the problems of a case: one for all seeds, or one for each where data are fresh.

    Args:
        case: the data set.
        seeds: the seeds.

    Yields:
        A problem, the seeds that run on it side by side, and the name of its folder.
    """
    for group in [[seed] for seed in seeds] if case.fresh else [seeds]:
        split = case.split(group[0])
        problem = gnl.experiments.Problem(
            case.predict,
            case.init,
            gnl.losses.softmax_cross_entropy,
            split.train_inputs,
            split.train_targets,
            test_inputs=split.test_inputs,
            test_targets=split.test_targets,
            probe_inputs=split.train_inputs[:PROBED],
            probe_targets=split.train_targets[:PROBED],
        )
        yield problem, group, f"seed-{group[0]}" if case.fresh else "all-seeds"


def run(settings: Settings) -> Results:
    """Runs the sweeps on every data set and tests the claims.

    Args:
        settings: what the command line asked for.

    Returns:
        "runs": what `gn_linear.experiments` records of each run, and the data set; "claims": a row for each data set
        and claim; "skipped": data sets that were not given.
    """
    seeds = list(range(FIRST_SEED, FIRST_SEED + settings.seeds))
    results: Results = {"runs": [], "claims": [], "skipped": []}
    if settings.quick:
        results["skipped"].append({"data": "MNIST, MNIST-1D and CIFAR-10", "why": "this is a quick run"})
    elif settings.data is None:
        results["skipped"].append({"data": "CIFAR-10", "why": "no folder was given by --data"})
    for case in cases(settings):
        rows = []
        for problem, group, folder in problems(case, seeds):
            rows += experiments(case, problem, group, settings.out / slug(case.name) / folder, settings.quick)
        results["runs"] += [{"data": case.name} | row for row in rows]
        results["claims"] += judge(case.name, rows, case.rates[0])
    return results


def judge(name: str, rows: list[Row], rate: float) -> list[Row]:
    """Tests the claims on the runs of one data set.

    Args:
        name: of the data set.
        rows: its runs.
        rate: the learning rate at which the claims are tested.

    Returns:
        A row for each claim.
    """
    sweep = [row for row in rows if row["experiment"] == "period_sweep" and row["learning_rate"] == rate]
    dampings = [row for row in rows if row["experiment"] == "side_by_side" and row["method"] == "gauss-newton"]
    found = claims.verdicts(sweep, dampings)
    return [{"data": name, "learning_rate": rate, "claim": key} | found[key]._asdict() for key in claims.CLAIMS]


def slug(name: str) -> str:
    """Turns a data set's name into that of a folder.

    Args:
        name: such as "MNIST-1D".

    Returns:
        Such as "mnist-1d".
    """
    return name.lower().replace(" ", "-")


def experiments(case: Case, problem: gnl.experiments.Problem, seeds: list[int], folder: Path, quick: bool) -> list[Row]:
    """Runs all experiments on one problem.

    Args:
        case: the data set.
        problem: the problem.
        seeds: the seeds.
        folder: where their records are kept.
        quick: whether to take few periods.

    Returns:
        The rows of the runs; those of the search for the fewest updates have the answer in the column `fewest`.
    """
    swept, damped = (QUICK_SWEPT, QUICK_DAMPED) if quick else (SWEPT, DAMPED)
    rows = []
    for rate in case.rates:
        records = gnl.experiments.period_sweep(
            problem,
            optax.sgd(rate),
            [1, *(case.steps // updates for updates in swept), None],
            steps=case.steps,
            seeds=seeds,
            folder=folder / f"periods-{rate:g}",
            measurements=MEASUREMENTS,
        )
        rows += [row | {"learning_rate": rate} for row in records.runs]
    rows += gnl.experiments.side_by_side(
        problem,
        learning_rate=case.rates[0],
        periods=[case.steps // updates for updates in damped],
        steps=case.steps,
        seeds=seeds,
        folder=folder / "dampings",
        measurements=MEASUREMENTS,
    ).runs
    if not all(row["finite"] for row in rows if row["period"] == 1 and row["learning_rate"] == case.rates[0]):
        return rows  # nothing to be on par with
    fewest = gnl.experiments.fewest_updates(
        problem,
        optax.sgd(case.rates[0]),
        steps=case.steps,
        seeds=seeds,
        tolerance=claims.PAR_POINTS,
        folder=folder / "fewest",
    )
    return rows + [row | {"learning_rate": case.rates[0], "fewest": fewest.updates} for row in fewest.records.runs]


def table(results: Results) -> str:
    """Writes the sweeps, the dampings, the fewest updates, and which claims pass.

    Args:
        results: what `run` returned.

    Returns:
        The tables with what they show.
    """
    runs = results["runs"]
    seeds = len({row["seed"] for row in runs})
    return "\n".join(
        [
            "Iterative linearisation",
            "",
            tables.text_table(lines(of(runs, "period_sweep"), "learning_rate", "rule")),
            "",
            "Side by side at mu = 1 / (eta K)",
            "",
            tables.text_table(lines(of(runs, "side_by_side"), "damping", "method")),
            "",
            f"The fewest feature updates whose test accuracy of f is at most {claims.PAR_POINTS:g} points below K = 1",
            "",
            tables.text_table(fewest_lines(of(runs, "fewest_updates"))),
            "",
            "Claims",
            "",
            tables.text_table([claim_line(row) for row in results["claims"]]),
            *([""] if results["skipped"] else []),
            *(f"{row['data']}: skipped, {row['why']}." for row in results["skipped"]),
            "",
            f"Means and standard deviations over {seeds} seeds, of losses and kernels means alone; standard errors in",
            "the claims, whose thresholds were fixed before any run. f is the network, f_lin the network linearised at",
            "its last anchor. CKA and distance are of the kernel at the end to that at the start, alignment is that",
            "with the targets at the start and at the end. Jump is the largest rise of the training loss as the model",
            "is linearised anew.",
        ]
    )


def of(runs: list[Row], experiment: str) -> list[Row]:
    """Picks the runs of one experiment.

    Args:
        runs: the runs.
        experiment: its name.

    Returns:
        Those runs.
    """
    return [row for row in runs if row["experiment"] == experiment]


def lines(runs: list[Row], *keys: str) -> list[Row]:
    """Writes a line for each cell.

    Args:
        runs: the runs of one experiment.
        *keys: the columns that tell its cells apart, besides the data set.

    Returns:
        The lines.
    """
    found = []
    for values, rows in tables.group(runs, "data", *keys).items():
        cell = {"data": values[0]}
        for key, value in zip(keys, values[1:], strict=True):
            cell[key.replace("_", " ")] = "-" if value is None else value if isinstance(value, str) else f"{value:.3g}"
        cell["updates"] = str(rows[0]["feature_updates"])
        cell["f %"] = tables.mean_spread([row["test_accuracy_f"] for row in rows], ".2f")
        cell["f_lin %"] = tables.mean_spread([row["test_accuracy_f_lin"] for row in rows], ".2f")
        cell["train loss f"] = mean(rows, "train_loss_f", ".2g")
        cell["train f %"] = mean(rows, "train_accuracy_f", ".1f")
        cell["CKA"] = mean(rows, "cka", ".3f")
        cell["distance"] = mean(rows, "kernel_distance", ".3f")
        cell["alignment"] = f"{mean(rows, 'target_alignment_start', '.3f')} to {mean(rows, 'target_alignment', '.3f')}"
        cell["jump"] = mean(rows, "largest_jump", ".2g")
        found.append(cell)
    return found


def mean(rows: list[Row], column: str, form: str) -> str:
    """Writes the mean of a column.

    Args:
        rows: the rows.
        column: the column.
        form: how to write a number.

    Returns:
        The mean, or "not finite" if a value is missing.
    """
    values = [row[column] for row in rows]
    return "not finite" if None in values else format(float(np.mean(values)), form)


def fewest_lines(runs: list[Row]) -> list[Row]:
    """Writes what the search for the fewest updates found.

    Args:
        runs: its runs.

    Returns:
        A line for each data set.
    """
    found = []
    for (name,), rows in tables.group(runs, "data").items():
        answers = [seed_rows[0]["fewest"] for seed_rows in tables.group(rows, "seed").values()]
        same = len(set(answers)) == 1
        found.append({"data": name, "updates": str(answers[0]) if same else tables.median_range(answers, ".0f")})
    return found


def claim_line(row: Row) -> Row:
    """Writes one claim's line.

    Args:
        row: the claim's row.

    Returns:
        The line.
    """
    verdict = {True: "pass", False: "FAIL", None: "not decided"}[row["passed"]]
    return {
        "data": row["data"],
        "claim": f"({row['claim']}) {claims.CLAIMS[row['claim']]}",
        "verdict": verdict,
        "measured": row["measured"],
    }


def figure(results: Results) -> Figure:
    """Draws accuracies and the kernel's alignment against feature updates, and accuracy against damping.

    Args:
        results: what `run` returned.

    Returns:
        The figure, at the learning rate of the claims.
    """
    drawing, panels = figures.panels(4, "Sparse feature updates", shared=False)
    rates = {row["data"]: row["learning_rate"] for row in results["claims"]}
    sweep = [row for row in of(results["runs"], "period_sweep") if row["learning_rate"] == rates[row["data"]]]
    newton = [row for row in of(results["runs"], "side_by_side") if row["method"] == "gauss-newton"]
    drawn = (
        (sweep, "feature_updates", "test_accuracy_f", "test accuracy of f, %"),
        (sweep, "feature_updates", "test_accuracy_f_lin", "test accuracy of f_lin, %"),
        (sweep, "feature_updates", "rise", "rise of the kernel's alignment with the targets"),
        (newton, "damping", "test_accuracy_f", "test accuracy of f, Gauss-Newton, %"),
    )
    for panel, (runs, x, y, label) in zip(panels, drawn, strict=True):
        rows = [row | {"step": row[x], "rise": rise(row)} for row in runs]
        figures.draw_curves(panel, sorted(rows, key=lambda row: row[x]), x, y, label="data")
        panel.set_xscale("log")
        panel.set_xlabel(x.replace("_", " "))
        panel.set_ylabel(label)
    figures.shared_legend(drawing, panels[0])
    return drawing


def rise(row: Row) -> float | None:
    """Takes how much the alignment of the kernel with the targets rose in a run.

    Args:
        row: the run.

    Returns:
        The rise, or None if it was not measured.
    """
    start, end = row["target_alignment_start"], row["target_alignment"]
    return None if start is None or end is None else end - start
