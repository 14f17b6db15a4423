"""Tables of runs and measurements: their check, the curves that they hold, and the points of a curve."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypeAlias, TypeGuard

from gn_linear._typing import shown

Row: TypeAlias = Mapping[str, Any]
"""One run or one measurement: from the name of a column to a text, a number or None."""

CELL = ("experiment", "method", "rule", "period", "steps", "damping", "learning_rate", "step")
"""Columns that say what was run, or where it was measured: rows that agree in all of them differ by their seed only."""

NUMBERS = ("feature_updates", "period", "steps", "damping", "learning_rate", "step")
"""Columns that must hold numbers, or None, where they are there."""

WORDS = {"steps": "T = {:,}", "learning_rate": "learning rate {:g}", "damping": "damping {:g}"}
"""How labels write a column, where its value does not speak for itself."""


class Point(NamedTuple):
    """What is drawn of the runs that differ by their seed only."""

    x: float
    mean: float
    low: float
    high: float
    kept: int
    broken: int


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_rows(rows: Any, argument: str, *columns: str) -> None:
    if isinstance(rows, (str, Mapping)) or not isinstance(rows, Sequence):
        raise TypeError(f"{argument} must be a list of rows, each of them a flat dict, but is {shown(rows)}.")
    if not rows:
        raise ValueError(f"{argument} must hold at least one row, but is empty: {shown(rows)}.")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(
                f"{argument}[{index}] must be a row, which is a flat dict, but is {shown(row)}. Of records, pass "
                f"records.{argument}."
            )
        missing = [column for column in columns if column not in row]
        if missing:
            raise ValueError(
                f"{argument}[{index}] must have the column {missing[0]!r}, but has {', '.join(map(str, row))}."
            )
        for column in NUMBERS:
            value = row.get(column)
            needed = column in columns and column not in ("period", "damping")
            if (value is not None or needed) and not (_is_number(value) and math.isfinite(value)):
                raise TypeError(
                    f"{argument}[{index}][{column!r}] must be a finite number{'' if needed else ' or None'}, but is "
                    f"{shown(value)}; convert what was read as text."
                )


def measured_columns(rows: Sequence[Row]) -> list[str]:
    """The columns that hold a measured number somewhere, or lost it with a run, and nothing but numbers and None."""
    settings = {*CELL, "seed", "finite"}
    columns = dict.fromkeys(column for row in rows for column in row if column not in settings)
    values = {column: [row[column] for row in rows if row.get(column) is not None] for column in columns}
    lost = any(is_broken(row, "finite") for row in rows)
    return [column for column, found in values.items() if (found or lost) and all(map(_is_number, found))]


def check_metrics(metrics: Sequence[str], argument: str, known: Sequence[str]) -> None:
    unknown = [metric for metric in metrics if metric not in known]
    if unknown or not metrics:
        there_are = ", ".join(dict.fromkeys(known)) or "nothing that was measured"
        raise ValueError(
            f"{argument} must name what was measured, but is {shown(unknown[0] if unknown else metrics)}; these rows "
            f"have {there_are}."
        )


def _setting(row: Row, column: str) -> Any:
    """What a row has in a column that tells curves apart; None if that only restates the place on the curve."""
    if column == "schedule":
        rule = row.get("rule")
        return None if rule in ("never", f"every {row.get('period')}") else rule
    if column == "damping" and row.get("learning_rate") is not None:
        return None  # it is 1/(eta K)
    return row.get(column)


def grouped(rows: Sequence[Row], key: Callable[[Row], tuple[Any, ...]]) -> list[list[Row]]:
    """The rows of equal keys, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def curves(rows: Sequence[Row], always: Sequence[str], others: Sequence[str]) -> list[tuple[str, list[Row]]]:
    """The label and the rows of each curve; of ``others``, labels say what differs between curves."""
    columns = (*always, *others)
    groups = grouped(rows, lambda row: tuple(_setting(row, column) for column in columns))
    told = [c for c in columns if c in always or len({_setting(group[0], c) for group in groups}) > 1]
    labels = []
    for group in groups:
        parts = {column: _setting(group[0], column) for column in told}
        labels.append(", ".join(WORDS.get(c, "{}").format(value) for c, value in parts.items() if value is not None))
    return [(label or "runs", group) for label, group in zip(labels, groups, strict=True)]


def is_broken(row: Row, column: str) -> bool:
    value, finite = row.get(column), row.get("finite")
    return (finite is not None and not finite) or (value is not None and not math.isfinite(value))


def make_point(rows: Sequence[Row], x: str, y: str) -> Point:
    """The mean and the range of rows that differ by their seed only."""
    kept = [float(row[y]) for row in rows if row.get(y) is not None and not is_broken(row, y)]
    mean, low, high = (statistics.fmean(kept), min(kept), max(kept)) if kept else (math.nan, math.nan, math.nan)
    places = {float(row[x]) for row in rows}
    place = statistics.fmean(row[x] for row in rows) if len(places) > 1 else places.pop()
    return Point(place, mean, low, high, len(kept), sum(is_broken(row, y) for row in rows))


def points_of(rows: Sequence[Row], x: str, y: str) -> list[Point]:
    """The points of a curve from left to right, without what was not measured."""

    def cell(row: Row) -> tuple[Any, ...]:
        # Seeds of a rule that is triggered have different places and are one point.
        named = row.get("rule") is not None or row.get("period") is not None
        return *(row.get(column) for column in CELL), None if named else row[x]

    points = [make_point(members, x, y) for members in grouped(rows, cell)]
    return sorted((point for point in points if point.kept or point.broken), key=lambda point: point.x)


def with_lost(rows: Sequence[Row], measure: str) -> list[Row]:
    """The rows, with NaN where a run has no number any more."""
    result = []
    for run in grouped(rows, lambda row: (row.get("seed"), *(row.get(column) for column in CELL[:-1]))):
        started = False
        for row in sorted(run, key=lambda row: row["step"]):
            lost = started and row.get(measure) is None
            started |= row.get(measure) is not None
            result.append({**row, measure: math.nan} if lost else row)
    return result


def comparable(rows: list[Row]) -> list[list[Row]]:
    """All rows, if the seeds were measured at the same steps; otherwise those of each seed."""
    seeds = grouped(rows, lambda row: (row.get("seed"),))
    return [rows] if len({frozenset(row["step"] for row in seed) for seed in seeds}) == 1 else seeds
