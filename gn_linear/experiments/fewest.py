"""The fewest feature updates that do as well as ordinary training."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import optax

from gn_linear._typing import check_number, shown
from gn_linear.experiments._engine import Cell, Engine
from gn_linear.experiments._methods import iterative
from gn_linear.experiments._setup import Bar, Progress, make_engine, run_cells, settings
from gn_linear.experiments.problem import Problem
from gn_linear.experiments.records import ACCURACIES, LOSSES, Records, Store, joined
from gn_linear.experiments.sweeps import cell_of_period


class FewestUpdates(NamedTuple):
    """What ``fewest_updates`` found.

    Attributes:
        updates: the fewest feature updates of a run whose metric is within the tolerance.
        period: the shortest period that gives so many.
        value: the metric there, the mean over the seeds.
        reference: the metric at K = 1.
        probed: all that were run, as (updates, period, value), by updates; the value is None if a seed diverged.
        monotone: whether no probed value is worse, by more than the tolerance, than one with fewer updates. If not, the
            search, which takes it for granted, may have missed fewer updates.
        records: of all runs.
    """

    updates: int
    period: int
    value: float
    reference: float
    probed: tuple[tuple[int, int, float | None], ...]
    monotone: bool
    records: Records


def fewest_updates(
    problem: Problem,
    optimiser: optax.GradientTransformation,
    *,
    steps: int,
    seeds: int | Sequence[int],
    tolerance: float,
    metric: str = "test_accuracy_f",
    folder: Any = None,
    progress: Progress = True,
) -> FewestUpdates:
    r"""The fewest feature updates whose metric is as good as at K = 1, up to a tolerance, by bisection.

    .. math:: \min \, \lceil T / K \rceil \quad \text{such that} \quad m(K) \ge m(1) - \text{tolerance}

    for an accuracy, and :math:`m(K) \le m(1) + \text{tolerance}` for a loss, with the mean m over the seeds. More
    feature updates are assumed not to do worse; the result says what was probed and whether that held there.

    Args:
        problem: the model, the loss and the data.
        optimiser: any optax transform; ``gn_linear.iterative_linearisation`` is put in front of it.
        steps: T, the optimiser's steps in each run.
        seeds: how many, or which.
        tolerance: in units of the metric, not negative; accuracies are in per cent.
        metric: a column of losses or accuracies of the runs, such as ``"test_accuracy_f"`` or ``"train_loss_f"``.
        folder: as in :func:`period_sweep`.
        progress: as in :func:`period_sweep`; the number of all steps is that of as many runs as may be needed.

    Returns:
        The fewest updates, with all that was probed.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, the metric is no such column or was not measured, K = 1 diverged, or the
            folder belongs to other settings.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import gn_linear as gnl
        >>> x = jnp.linspace(-1.0, 1.0, 16)[:, None]
        >>> problem = gnl.experiments.Problem(
        ...     predict=lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"],
        ...     init=lambda key: {"in": jax.random.normal(key, (1, 4)), "out": jnp.ones((4, 1))},
        ...     loss=gnl.losses.squared_error,
        ...     inputs=x,
        ...     targets=x,
        ... )
        >>> found = gnl.experiments.fewest_updates(
        ...     problem, optax.sgd(0.1), steps=8, seeds=1, tolerance=100.0, metric="train_loss_f"
        ... )
        >>> print(found.updates, found.period, [updates for updates, _, _ in found.probed])
        1 8 [1, 8]

    References:
        Goldwaser and Ge (2022), Understanding sparse feature updates in deep networks using iterative linearisation.
    """
    check_number(tolerance, "tolerance")
    if metric not in (*LOSSES, *ACCURACIES):
        names = ", ".join((*LOSSES, *ACCURACIES))
        raise ValueError(f"metric must be one of {names}, but is {shown(metric)}.")
    engine = make_engine(problem, optimiser, seeds, 2, [steps])
    store = Store(folder, settings(engine, optimiser, "fewest_updates", [steps]), len(engine.seeds))
    choices = achievable(steps)
    method = iterative(problem, optimiser)
    with Bar(progress, steps * (2 + len(choices).bit_length()), "fewest_updates") as bar:
        engine.bar = bar
        search = _Search(engine, store, bar, metric, tolerance, choices)
        probes = search.run(lambda period: cell_of_period("fewest_updates", method, period, [steps]))
    records = joined(found for _, found in probes.values())
    store.finish(records)
    return search.result(probes, records)


def achievable(steps: int) -> list[tuple[int, int]]:
    """The numbers of feature updates that some period gives, ascending, each with its shortest period."""
    found: dict[int, int] = {}
    for period in range(1, steps + 1):
        found.setdefault(-(-steps // period), period)
    return sorted(found.items())


class _Search(NamedTuple):
    """A bisection over the numbers of feature updates."""

    engine: Engine
    store: Store
    bar: Bar
    metric: str
    tolerance: float
    choices: list[tuple[int, int]]

    def run(self, cell: Any) -> dict[int, tuple[float | None, Records]]:
        """All probes, by their place among the choices, in the order in which they were made."""
        last = len(self.choices) - 1
        probes = {last: self._probe(cell(1))}
        if probes[last][0] is None:
            raise ValueError(
                f"metric {self.metric} has no value at period 1: it was not measured, or a seed diverged. Pass test "
                "data, an accuracy, or a smaller learning rate, or use another metric."
            )
        low, high = -1, last
        place = 0
        while low + 1 < high:
            probes[place] = self._probe(cell(self.choices[place][1]))
            low, high = (low, place) if self.good(probes[place][0], probes[last][0]) else (place, high)
            place = (low + high) // 2
        return probes

    def _probe(self, cell: Cell) -> tuple[float | None, Records]:
        records = run_cells(self.engine, [cell], self.store, self.bar)
        values = [row[self.metric] for row in records.runs]
        return None if None in values else statistics.fmean(values), records

    def good(self, value: float | None, reference: Any) -> bool:
        """Whether a value is as good as the reference, up to the tolerance."""
        if value is None:
            return False
        worse = reference - value if self.metric in ACCURACIES else value - reference
        return worse <= self.tolerance

    def result(self, probes: dict[int, tuple[float | None, Records]], records: Records) -> FewestUpdates:
        """The best of the probes."""
        values = {place: probes[place][0] for place in sorted(probes)}
        reference: Any = values[len(self.choices) - 1]
        best = min(place for place, value in values.items() if self.good(value, reference))
        pairs = [(a, b) for i, a in enumerate(values.values()) for b in list(values.values())[i + 1 :] if a is not None]
        monotone = all(self.good(more, fewer) for fewer, more in pairs)
        probed = tuple((*self.choices[place], value) for place, value in values.items())
        value: Any = values[best]
        return FewestUpdates(*self.choices[best], value, reference, probed, monotone, records)
