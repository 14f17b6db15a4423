"""When runs reached a target, and how many times the seconds of others that took."""

import math
import statistics
from collections.abc import Sequence

from benchmarks.tables import Row, median_range


def first(curve: Sequence[Row], column: str, target: float) -> Row | None:
    """Finds when a run reached a target.

    Args:
        curve: the rows of one run, in order.
        column: the column that falls to the target.
        target: the target.

    Returns:
        The first row at or below it, or None.
    """
    return next((row for row in curve if row[column] <= target), None)


def or_infinity(value: float | None) -> float:
    """Reads what was not reached, or is not finite, as infinity: greater than all that was.

    Args:
        value: seconds or a loss.

    Returns:
        The value, or infinity.
    """
    return value if value is not None and math.isfinite(value) else math.inf


def describe(seconds: Sequence[float | None], form: str = ".3f") -> str:
    """Writes the seconds to a target.

    Args:
        seconds: of each seed; None where it was not reached.
        form: how to write a number.

    Returns:
        Their median and range, how many seeds reached it if not all did, or "not reached".
    """
    reached = [value for value in seconds if value is not None]
    if not reached:
        return "not reached"
    share = "" if len(reached) == len(seconds) else f", {len(reached)} of {len(seconds)} seeds"
    return median_range(reached, form) + share


def median_ratio(seconds: Sequence[float | None], reference: Sequence[float | None]) -> float | None:
    """Divides seconds by those of a reference, seed by seed.

    Args:
        seconds: of each seed; None where the target was not reached.
        reference: the same of the reference, in the same order of seeds.

    Returns:
        The median over the seeds where both reached the target, or None where there is none.
    """
    pairs = zip(seconds, reference, strict=True)
    ratios = [mine / other for mine, other in pairs if mine is not None and other is not None]
    return statistics.median(ratios) if ratios else None
