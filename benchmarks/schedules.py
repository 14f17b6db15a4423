"""Rules of re-linearisation for the study of feature learning, and what they gain over updates at equal distances."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

import gn_linear as gnl
from benchmarks.tables import Row, group

UNIFORM = "uniform"
PROBED, PROBES = 50, 4
"""Training inputs on which the drift of the kernel is estimated at every step, and the random signs that do it."""


def planned(steps: int, updates: int) -> dict[str, gnl.periods.Rule]:
    """Makes rules that spend the same number of feature updates, an even one, in other places than `every` does.

    Args:
        steps: T, the steps of the run.
        updates: how many times they linearise, at least 4; ten times as many steps or more.

    Returns:
        From names to rules. "early-dense": half of them in the first tenth of the run; "logarithmic": at 0, and from
        the hundredth part of the run on at equal ratios; "stop after T/4": all of them in the first quarter.
    """
    half, tenth, quarter = updates // 2, steps // 10, steps // 4
    dense = tenth // half
    last = (half - 1) * dense
    sparse = -(-(steps - last) // (half + 1))
    spread = np.geomspace(max(1, steps // 100), steps, updates)[:-1]
    # Steps that round alike would be one update.
    places = [int(place) for place in np.maximum(np.ceil(spread), np.arange(1, updates))]
    return {
        "early-dense": gnl.periods.early_then_sparse(dense, last + 1, sparse),
        "logarithmic": gnl.periods.at(places),
        "stop after T/4": gnl.periods.stop_after(quarter - 1, gnl.periods.every(-(-quarter // updates))),
    }


def triggered(errors: Sequence[float], drifts: Sequence[float], inputs: Any) -> dict[str, gnl.periods.Rule]:
    """Makes rules whose number of feature updates is what comes out.

    Args:
        errors: bounds of the linearisation error.
        drifts: bounds of the distance of the kernel to that at the anchor.
        inputs: of training, (n, ...), of which the first measure the drift.

    Returns:
        From names to rules.
    """
    probe = np.asarray(inputs[:PROBED])
    found: dict[str, gnl.periods.Rule] = {
        f"error above {bound:g}": gnl.periods.when_linearisation_error(bound) for bound in errors
    }
    for bound in drifts:
        found[f"drift above {bound:g}"] = gnl.periods.when_kernel_drifts(bound, probe, probes=PROBES)
    return found


def compared(runs: Sequence[Row], updates: int) -> list[Row]:
    """Compares every schedule with the uniform one of about as many feature updates, seed by seed.

    Args:
        runs: of one data set: those of "schedules" and of "period_sweep".
        updates: that the planned rules spend; the uniform run of so many has the first line.

    Returns:
        A row for each rule: its updates, mean over the seeds; test accuracies of f and f_lin; the run of the sweep
        whose updates are nearest, by their ratio, and the gain over it in points of f with its standard error. Where
        a run is not finite, accuracies and gains are None.
    """
    found = []
    scheduled = [row for row in runs if row["experiment"] == "schedules"]
    rates = {row["learning_rate"] for row in scheduled}
    uniform = [row for row in runs if row["experiment"] == "period_sweep" and row["learning_rate"] in rates]
    first = [row | {"rule": UNIFORM} for row in uniform if row["feature_updates"] == updates]
    for (name,), rows in group([*first, *scheduled], "rule").items():
        spent = statistics.fmean(row["feature_updates"] for row in rows)
        nearest = min((row["feature_updates"] for row in uniform), key=lambda count: abs(math.log(count / spent)))
        others = {row["seed"]: row["test_accuracy_f"] for row in uniform if row["feature_updates"] == nearest}
        pairs = [(row["test_accuracy_f"], others[row["seed"]]) for row in rows]
        gains = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
        whole = len(gains) == len(rows)
        found.append(
            {
                "learning_rate": rows[0]["learning_rate"],
                "rule": name,
                "updates": spent,
                **{column: _mean(rows, column) for column in ("test_accuracy_f", "test_accuracy_f_lin")},
                "nearest": nearest,
                "gain": statistics.fmean(gains) if whole else None,
                "error": statistics.stdev(gains) / math.sqrt(len(gains)) if whole and len(gains) > 1 else None,
            }
        )
    return found


def _mean(rows: Sequence[Row], column: str) -> float | None:
    """The mean of a column, or None if a value is missing."""
    values = [row[column] for row in rows]
    return None if None in values else statistics.fmean(values)
