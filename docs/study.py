"""The record of the benchmark `feature-learning`, as the pages on it read it."""

import json
import statistics
from pathlib import Path

from IPython.display import Markdown

RECORD = json.loads((Path(__file__).parent / "_static" / "feature_learning.json").read_text(encoding="utf-8"))
STUDIED = ("XOR", "digits", "MNIST", "MNIST-1D", "CIFAR-10")
VERDICTS = {True: "pass", False: "FAIL", None: "not decided"}


def rows(name, **where):
    """The rows of a table of the record whose columns have these values."""
    columns = RECORD["results"][name]
    found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [row for row in found if all(row[column] == value for column, value in where.items())]


def distinct(found, column):
    """The values of a column, in order of appearance."""
    return list(dict.fromkeys(row[column] for row in found))


CLAIMS = rows("claims")
DATA = distinct(CLAIMS, "data")
RATES = {row["data"]: row["learning_rate"] for row in CLAIMS}
"""The learning rate at which the claims are tested on each data set."""


def sweep(data, **where):
    """The runs of the sweep on a data set at the learning rate of the claims."""
    return rows("runs", data=data, experiment="period_sweep", learning_rate=RATES[data], **where)


def mean(found, column, form=".2f"):
    """The mean over seeds, in words."""
    values = [row[column] for row in found]
    return "not finite" if None in values else format(statistics.fmean(values), form)


def spread(found, column, form=".2f"):
    """Mean and standard deviation over seeds, in words."""
    values = [row[column] for row in found]
    if None in values or len(values) < 2:
        return mean(found, column, form)
    return f"{mean(found, column, form)} ± {statistics.stdev(values):{form}}"


def table(lines):
    """A table in Markdown, of dicts with the same keys."""
    cells = [list(lines[0]), ["---"] * len(lines[0]), *(map(str, line.values()) for line in lines)]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in cells))


def verdicts(claim):
    """The verdicts on one claim."""
    found = rows("claims", claim=claim)
    return table([{"data": r["data"], "verdict": VERDICTS[r["passed"]], "measured": r["measured"]} for r in found])


def where(claim, passed):
    """The data sets on which a claim has a verdict, in words."""
    return ", ".join(row["data"] for row in rows("claims", claim=claim, passed=passed)) or "none"


def about():
    """What was run, in words."""
    runs = rows("runs")
    lengths = [f"{data} (T = {sweep(data)[0]['steps']:,}, learning rate {RATES[data]:g})" for data in DATA]
    seeds = len(distinct(runs, "seed"))
    versions = RECORD["versions"]
    absent = [data for data in STUDIED if data not in DATA]
    return Markdown(
        f"{len(runs):,} runs on {', '.join(lengths)}; {seeds} seeds; jax {versions['jax']}, float32, "
        f"{RECORD['machine']['device']}; recorded on {RECORD['date'][:10]}"
        f"{' by a quick run, a smoke test' if RECORD['arguments']['quick'] else ''}."
        + (f" Of the study, this record lacks {', '.join(absent)}." if absent else "")
    )
