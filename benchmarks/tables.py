"""Tables of tidy rows: grouping, mean and spread, text."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import tabulate

Row = dict[str, Any]


def group(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Groups rows by some of their columns.

    Args:
        rows: the rows.
        *keys: the columns to group by.

    Returns:
        From the values of those columns, in order of first appearance, to the rows that have them.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def mean_spread(values: Sequence[float | None], form: str) -> str:
    """Writes a mean and, for several values, their sample standard deviation.

    Args:
        values: at least one value; None is one that was not finite.
        form: how to write a number, such as ".3f".

    Returns:
        Such as "0.123 ± 0.004", "0.123" for one value, or "not finite" if one was not.
    """
    if None in values:
        return "not finite"
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"


def median_range(values: Sequence[float | None], form: str) -> str:
    """Writes a median and, for several values, their least and greatest.

    Args:
        values: at least one value; None is one that was not finite.
        form: how to write a number, such as ".3f".

    Returns:
        Such as "0.123 (0.119 to 0.127)", "0.123" for one value, or "not finite" if one was not.
    """
    if None in values:
        return "not finite"
    median = format(statistics.median(values), form)
    return median if len(values) == 1 else f"{median} ({min(values):{form}} to {max(values):{form}})"


def text_table(rows: Sequence[Row]) -> str:
    """Writes rows as a table of text that is also a table in Markdown.

    Args:
        rows: rows with the same columns; a column's name is its heading.

    Returns:
        The table; strings stay as they were formatted.
    """
    return tabulate.tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
