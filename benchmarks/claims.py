"""What Goldwaser and Ge (2022) claim of sparse feature updates, as tests that runs pass or fail.

The thresholds were fixed before the first run on the seeds of the study. No accuracy here is one of the paper. Each
function takes the rows of one data set and one learning rate as `gn_linear.experiments` records them, and returns a
verdict: True, False, or None where the runs decide nothing, with what was measured in words.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from scipy import stats

from benchmarks.tables import Row, group

UPDATES = 10
"""Feature updates of the run that is compared with updating at every step."""
PAR_POINTS = 2.0
"""On par: the mean test accuracy of f is at most so many points below that of K = 1."""
CLEAR_POINTS = 5.0
"""Clearly worse: the better of f and f_lin is on average at least so many points below f of K = 1."""
TURNED, ALIGNED = 0.1, 0.1
"""A lot: 1 - CKA to the kernel at the start, a turn by 26 degrees, or the rise of the alignment with the targets."""
MONOTONE = 0.8
"""Controls: the mean over the seeds of Spearman's rank correlation is at least so far from 0."""
FITTED, DAMPINGS = 95.0, 4
"""Generalisation is compared between runs of this training accuracy in per cent, at so many dampings at least."""

CLAIMS = {
    "i": f"{UPDATES} feature updates are on par with K = 1",
    "ii": "K = infinity is clearly worse",
    "iii": "the kernel changes a lot",
    "iv": "damping controls feature learning and generalisation",
}


class Verdict(NamedTuple):
    """Whether a claim holds (None: not decided), and what was measured."""

    passed: bool | None
    measured: str


def verdicts(sweep: Sequence[Row], dampings: Sequence[Row]) -> dict[str, Verdict]:
    """Tests all claims on one data set.

    Args:
        sweep: the runs of the sweep over periods, at one learning rate.
        dampings: those of Gauss-Newton at several dampings.

    Returns:
        From the keys of `CLAIMS` to the verdicts.
    """
    return {"i": on_par(sweep), "ii": lazy_is_worse(sweep), "iii": kernel_changes(sweep), "iv": damping_rules(dampings)}


def on_par(sweep: Sequence[Row]) -> Verdict:
    """Claim (i): accuracy of f at K = 1 less that at ten updates, at most `PAR_POINTS` in the mean.

    Args:
        sweep: the runs of the sweep.

    Returns:
        The verdict; where K = 1 is finite and ten updates are not, they are not on par.
    """
    dense, sparse = _dense(sweep), [row for row in sweep if row["feature_updates"] == UPDATES]
    gaps = _gaps(dense, sparse, ("test_accuracy_f",))
    if dense and all(row["finite"] for row in dense) and any(not row["finite"] for row in sparse):
        return Verdict(False, "not finite on some seed")
    return _points(gaps, lambda mean: mean <= PAR_POINTS, f"{{}} points below K = 1, at most {PAR_POINTS:g}")


def lazy_is_worse(sweep: Sequence[Row]) -> Verdict:
    """Claim (ii): accuracy of f at K = 1 less the better of f and f_lin at K = infinity, at least `CLEAR_POINTS`.

    With f alone the claim would hold wherever the parameters have left the region in which f is near f_lin, however
    well the linearised model generalises.

    Args:
        sweep: the runs of the sweep.

    Returns:
        The verdict.
    """
    lazy = [row for row in sweep if row["feature_updates"] == 1]
    gaps = _gaps(_dense(sweep), lazy, ("test_accuracy_f", "test_accuracy_f_lin"))
    return _points(gaps, lambda mean: mean >= CLEAR_POINTS, f"{{}} points below K = 1, at least {CLEAR_POINTS:g}")


def kernel_changes(sweep: Sequence[Row]) -> Verdict:
    """Claim (iii): at K = 1 the mean of 1 - CKA is at least `TURNED`, or that of the alignment's rise `ALIGNED`.

    Args:
        sweep: the runs of the sweep.

    Returns:
        The verdict.
    """
    rows = _dense(sweep)
    columns = ("cka", "target_alignment", "target_alignment_start")
    if not rows or any(row[column] is None for row in rows for column in columns):
        return Verdict(None, "not measured on all seeds")
    turn = statistics.fmean(1 - row["cka"] for row in rows)
    rise = statistics.fmean(row["target_alignment"] - row["target_alignment_start"] for row in rows)
    measured = f"1 - CKA {turn:.3f}, at least {TURNED:g}, or alignment {rise:+.3f}, at least {ALIGNED:+g}"
    return Verdict(turn >= TURNED or rise >= ALIGNED, measured)


def damping_rules(dampings: Sequence[Row]) -> Verdict:
    """Claim (iv): 1 - CKA, and the test accuracy of f, rise or fall with the damping, either way.

    Ranks say nothing about sizes, so the words give the ranges, too.

    Args:
        dampings: the runs of Gauss-Newton. Of a seed those count that fit the training data: the others say nothing
            about generalisation.

    Returns:
        The verdict; None if a seed has too few dampings that count.
    """
    fitted = [row for row in dampings if row["finite"] and (row["train_accuracy_f"] or 0) >= FITTED]
    seeds = group(fitted, "seed").values()
    counts = [len({row["damping"] for row in rows}) for rows in seeds]
    if len(counts) < len({row["seed"] for row in dampings}) or not counts or min(counts) < DAMPINGS:
        least = min(counts, default=0)
        return Verdict(None, f"only {least} dampings fit the training data on some seed, {DAMPINGS} are needed")
    turn = statistics.fmean(rank_correlation(rows, "cka", -1) for rows in seeds)
    accuracy = statistics.fmean(rank_correlation(rows, "test_accuracy_f") for rows in seeds)
    words = (
        f"rank correlation {turn:+.2f} with 1 - CKA, {accuracy:+.2f} with accuracy, both {MONOTONE:g} from 0; means: "
    )
    means = [
        (statistics.fmean(1 - row["cka"] for row in rows), statistics.fmean(row["test_accuracy_f"] for row in rows))
        for rows in group(fitted, "damping").values()
    ]
    turns, accuracies = zip(*means, strict=True)
    words += f"1 - CKA {min(turns):.3f} to {max(turns):.3f}, accuracy {min(accuracies):.2f} to {max(accuracies):.2f}"
    return Verdict(min(abs(turn), abs(accuracy)) >= MONOTONE, words)


def rank_correlation(rows: Sequence[Row], column: str, sign: int = 1) -> float:
    """Takes Spearman's rank correlation of the damping with a column.

    Args:
        rows: the runs of one seed.
        column: the column.
        sign: -1 turns it around.

    Returns:
        The correlation; 0 for a column that is the same everywhere.
    """
    values = [row[column] for row in rows]
    if len(set(values)) == 1:
        return 0.0
    correlation: Any = stats.spearmanr([row["damping"] for row in rows], values)[0]
    return sign * float(correlation)


def _dense(sweep: Sequence[Row]) -> list[Row]:
    """The runs that update at every step."""
    return [row for row in sweep if row["feature_updates"] == row["steps"]]


def _gaps(reference: Sequence[Row], rows: Sequence[Row], columns: Sequence[str]) -> list[float | None]:
    """The accuracy of f of the reference less the best of some columns, for each seed; None if a run is not finite."""
    others = {row["seed"]: row for row in rows}
    gaps: list[float | None] = []
    for row in reference:
        other = others.get(row["seed"])
        best = [] if other is None else [other[column] for column in columns if other[column] is not None]
        missing = row["test_accuracy_f"] is None or not best
        gaps.append(None if missing else row["test_accuracy_f"] - max(best))
    return gaps


def _points(gaps: Sequence[float | None], holds: Callable[[float], bool], words: str) -> Verdict:
    """Judges the mean of the gaps, with its standard error in words."""
    finite = [gap for gap in gaps if gap is not None]
    if not finite or len(finite) < len(gaps):
        return Verdict(None, f"{len(gaps) - len(finite)} of {len(gaps)} seeds lack a finite run")
    mean = statistics.fmean(finite)
    text = f"{mean:.2f}"
    if len(finite) > 1:
        text += f" ± {statistics.stdev(finite) / math.sqrt(len(finite)):.2f}"
    return Verdict(holds(mean), words.format(text))
