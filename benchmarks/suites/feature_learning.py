"""Sparse feature updates: sweeps over period, learning rate and damping, and the paper's four claims tested.

Iterative linearisation with full-batch gradient descent and softmax cross-entropy on XOR of two of 30 signs, 8 x 8
digits, MNIST, MNIST-1D and, if `--data` names its folder, CIFAR-10; Gauss-Newton and prox-linear beside it on the
common axis of the damping, mu = 1 / (eta K). f is the network, f_lin the network linearised at its last anchor. A run
that was killed goes on where it was, since every finished cell is kept in the folder `--out`.

Learning rates were chosen at K = 1 on seed 0, and the range of the dampings on seeds 100 and 101, so that enough of
them fit the training data; the thresholds of the claims stood before either. The study takes the seeds from 200 on.
The wide perceptron and the convolutions cost most of the time: they run for fewer steps, at fewer periods.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import gn_linear as gnl
from benchmarks import claims, data, networks, schedules
from benchmarks.data import Split
from benchmarks.feature_tables import figure, table
from benchmarks.settings import Settings
from benchmarks.suites import Results
from benchmarks.tables import Row
from gn_linear.experiments import Problem, Records

X64 = False
SEEDS, QUICK_SEEDS = 5, 2
__all__ = ["QUICK_SEEDS", "SEEDS", "X64", "figure", "keep", "run", "table"]

FIRST_SEED = 200
MEASUREMENTS, PROBED = 12, 200
LARGER = (40, claims.UPDATES, 2)
"""Feature updates of the sweep at learning rates beyond the first."""


class Plan(NamedTuple):
    """What is run on a data set.

    Attributes:
        swept: feature updates of the sweep, between an update at every step and a single one at the start.
        damped: those of Gauss-Newton: with T steps of learning rate eta, mu = 1 / (eta K) at K = T / updates.
        errors: bounds of the linearisation error that trigger an update.
        drifts: bounds of the kernel's drift that do.
        fewest: whether the fewest updates are searched for.
    """

    swept: tuple[int, ...]
    damped: tuple[int, ...]
    errors: tuple[float, ...]
    drifts: tuple[float, ...]
    fewest: bool


FULL = Plan((200, 40, 20, claims.UPDATES, 5, 2), (1000, 400, 200, 100, 20), (0.5, 0.2), (0.002,), fewest=True)
COSTLY = Plan((40, claims.UPDATES, 5, 2), (200, 100, 50, 20), (0.5,), (), fewest=False)
QUICK = Plan((100, claims.UPDATES, 2), (500, 200, 100, 50, 10), (0.5,), (), fewest=True)


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
        plan: what is run.
    """

    name: str
    split: Callable[[int], Split]
    fresh: bool
    predict: Callable[[Any, jax.Array], jax.Array]
    init: Callable[[jax.Array], Any]
    steps: int
    rates: tuple[float, ...]
    plan: Plan = FULL


def cases(settings: Settings) -> list[Case]:
    """Lists the data sets; CIFAR-10 only where its folder is given, and XOR and digits alone in a quick run.

    Args:
        settings: what the command line asked for.

    Returns:
        The cases.
    """
    relu, convolutional = networks.mlp(jax.nn.relu), networks.convolutional(jax.nn.relu)
    signs = Case("XOR", data.xor, True, relu, perceptron(data.SIGNS, 128, 2), 4000, (0.1, 1.0))
    digits = Case("digits", lambda _: data.digits(500), False, relu, perceptron(64, 128, 10), 4000, (0.1, 1.0))
    if settings.quick:
        return [case._replace(steps=2000, plan=QUICK) for case in (signs, digits)]

    def sequential(params: Any, inputs: jax.Array) -> jax.Array:
        return convolutional(params, inputs[..., None])

    one_axis = layers((5, 1, 16), (3, 16, 16), (3, 16, 16), (80, 10))
    two_axes = layers((2, 2, 3, 16), (3, 3, 16, 16), (3, 3, 16, 16), (256, 10))
    wide = perceptron(784, 128, 64, 10)
    found = [
        signs,
        digits,
        Case("MNIST", lambda _: data.mnist(500), False, relu, wide, 1000, (0.1,), COSTLY),
        Case("MNIST-1D", lambda _: data.mnist1d(1000), False, sequential, one_axis, 1000, (0.3,), COSTLY),
    ]
    if settings.data is not None:
        images = data.cifar10(settings.data, train=1000)  # read now: what is wrong with the files is said at once
        found.append(Case("CIFAR-10", lambda _: images, False, convolutional, two_axes, 1000, (0.03,), COSTLY))
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


def problems(case: Case, seeds: list[int]) -> Iterator[tuple[Problem, list[int], str]]:
    """Poses the problems of a case: one for all seeds, or one for each where data are fresh.

    Args:
        case: the data set.
        seeds: the seeds.

    Yields:
        A problem, the seeds that run on it side by side, and the name of its folder.
    """
    for group in [[seed] for seed in seeds] if case.fresh else [seeds]:
        split = case.split(group[0])
        problem = Problem(
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
        "runs": what `gn_linear.experiments` records of each run, and the data set; "histories": what it measured on
        the way of the runs at K = 1, ten updates and none; "claims": a row for each data set and claim; "schedules": a
        row for each data set and schedule; "skipped": data sets that were not given.
    """
    seeds = list(range(FIRST_SEED, FIRST_SEED + settings.seeds))
    results: Results = {"runs": [], "histories": [], "claims": [], "schedules": [], "skipped": []}
    if settings.quick:
        results["skipped"].append({"data": "MNIST, MNIST-1D and CIFAR-10", "why": "this is a quick run"})
    elif settings.data is None:
        results["skipped"].append({"data": "CIFAR-10", "why": "no folder was given by --data"})
    for case in cases(settings):
        rows, histories = [], []
        for problem, group, folder in problems(case, seeds):
            found = experiments(case, problem, group, settings.out / slug(case.name) / folder)
            rows, histories = rows + found.runs, histories + found.measurements
        results["runs"] += [{"data": case.name} | row for row in rows]
        results["histories"] += [{"data": case.name} | row for row in histories]
        results["claims"] += judge(case.name, rows, case.rates[0])
        results["schedules"] += [{"data": case.name} | row for row in schedules.compared(rows, claims.UPDATES)]
    return results


def keep(results: Results) -> Results:
    """Picks what the pages of the documentation read: all but seconds, which depend on the machine.

    Args:
        results: what `run` returned.

    Returns:
        The same tables without those columns.
    """
    return {name: [{k: v for k, v in row.items() if k != "seconds"} for row in rows] for name, rows in results.items()}


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


def experiments(case: Case, problem: Problem, seeds: list[int], folder: Path) -> Records:
    """Runs all experiments on one problem.

    Args:
        case: the data set.
        problem: the problem.
        seeds: the seeds.
        folder: where their records are kept.

    Returns:
        The rows of the runs, those of the search for the fewest updates with the answer in the column `fewest`; and
        the measurements of the sweep at its first learning rate, with K = 1, ten updates, and none.
    """
    steps, plan, first = case.steps, case.plan, case.rates[0]
    shared: dict[str, Any] = {"steps": steps, "seeds": seeds}
    rows, histories = [], []
    for rate in case.rates:
        swept = plan.swept if rate == first else LARGER
        records = gnl.experiments.period_sweep(
            problem,
            optax.sgd(rate),
            [1, *(steps // updates for updates in swept), None],
            folder=folder / f"periods-{rate:g}",
            measurements=MEASUREMENTS,
            **shared,
        )
        rows += [row | {"learning_rate": rate} for row in records.runs]
        if rate == first:
            drawn = (1, steps // claims.UPDATES, None)
            histories = [row | {"learning_rate": rate} for row in records.measurements if row["period"] in drawn]
    rows += gnl.experiments.side_by_side(
        problem,
        learning_rate=first,
        periods=[steps // updates for updates in plan.damped],
        folder=folder / "dampings",
        measurements=MEASUREMENTS,
        **shared,
    ).runs
    rules = schedules.planned(steps, claims.UPDATES)
    rules |= schedules.triggered(plan.errors, plan.drifts, problem.inputs)
    records = gnl.experiments.schedules(
        problem, optax.sgd(first), rules, folder=folder / "schedules", measurements=MEASUREMENTS, **shared
    )
    rows += [row | {"learning_rate": first} for row in records.runs]
    dense = [row for row in rows if row["period"] == 1 and row["learning_rate"] == first]
    if plan.fewest and all(row["finite"] for row in dense):  # otherwise there is nothing to be on par with
        fewest = gnl.experiments.fewest_updates(
            problem, optax.sgd(first), tolerance=claims.PAR_POINTS, folder=folder / "fewest", **shared
        )
        rows += [row | {"learning_rate": first, "fewest": fewest.updates} for row in fewest.records.runs]
    return Records(rows, histories)
