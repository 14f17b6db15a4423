"""Tables and figure of contests, from their rows alone."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks import figures, reach, tables
from benchmarks.suites import Results
from benchmarks.tables import Row

PREFIX = "gn_linear"
SECONDS_FORM = ".3g"


class Goal(NamedTuple):
    """What a contest is meant to show at a target.

    Attributes:
        contest: its name.
        target: the target.
        ratio: the best peer's seconds divided by ours; None where reaching the target is the goal.
        fewest_steps: whether ours shall take fewer steps than every peer, too.
    """

    contest: str
    target: float
    ratio: float | None
    fewest_steps: bool = False


def table(results: Results, goals: Sequence[Goal], metrics: dict[str, str]) -> str:
    """Writes a table for each contest, who did not take part, and the goals.

    Args:
        results: what `benchmarks.contest.run` returned.
        goals: the goals.
        metrics: from the contests' names to what they measure.

    Returns:
        Tables that are also tables in Markdown.
    """
    parts = []
    for (name,), rows in tables.group(results["runs"], "contest").items():
        seeds = len({row["seed"] for row in rows})
        head = f"{name}: {metrics[name]}; medians and ranges over {seeds} seeds, processor seconds without compiling"
        parts += [head, "", tables.text_table(method_rows(rows)), ""]
        parts += [f"Skipped: {row['method']}, {row['why']}." for row in results["skipped"] if row["contest"] == name]
    parts += ["Seconds of the best peer divided by ours, above 1 ours is faster:", ""]
    return "\n".join([*parts, tables.text_table(goal_rows(results["runs"], goals))])


def method_rows(rows: Sequence[Row]) -> list[Row]:
    """Sums up a contest, a row for each method.

    Args:
        rows: the runs of one contest.

    Returns:
        The rows of its table.
    """
    lines = []
    for (method,), mine in tables.group(rows, "method").items():
        line: Row = {"method": method, "setting": mine[0]["setting"]}
        by_target = {target: of_target for (target,), of_target in tables.group(mine, "target").items()}
        for target, at in by_target.items():
            line[f"s to {target:g}"] = reach.describe([row["cpu_seconds"] for row in at], SECONDS_FORM)
        last = [row for row in mine if row["target"] == list(by_target)[-1]]
        line["wall s"] = " / ".join(middle(at, "seconds", SECONDS_FORM) for at in by_target.values())
        line["steps"] = " / ".join(middle(at, "step", ".0f") for at in by_target.values())
        line["gradients"] = " / ".join(middle(at, "gradients", ".0f") for at in by_target.values())
        line["lowest"] = tables.median_range([row["lowest"] for row in last], ".1e").partition(" (")[0]
        line["compile s"] = format(last[0]["compile_seconds"], ".1f")
        lines.append(line)
    return lines


def middle(rows: Sequence[Row], column: str, form: str) -> str:
    """Writes the median of a column over the seeds, "-" where most did not reach the target.

    Args:
        rows: the runs of one method to one target.
        column: the column.
        form: how to write a number.

    Returns:
        The median.
    """
    value = median(rows, column)
    return "-" if value is None else format(value, form)


def median(rows: Sequence[Row], column: str = "cpu_seconds") -> float | None:
    """Takes a median over the seeds, in which a target that was not reached counts as infinitely far.

    Args:
        rows: the runs of one method to one target.
        column: the column.

    Returns:
        The median, or None if it is not finite.
    """
    value = statistics.median(reach.or_infinity(row[column]) for row in rows)
    return value if value < math.inf else None


def goal_rows(runs: Sequence[Row], goals: Sequence[Goal]) -> list[Row]:
    """Compares each of ours with the best peer at each target.

    Args:
        runs: the runs of all contests.
        goals: the goals; targets without one are compared, too.

    Returns:
        A row for each contest, target and method of ours: the ratio of the medians, the range over the seeds of the
        ratio to the same peer, and whether the goal is reached.
    """
    wanted = {(goal.contest, goal.target): goal for goal in goals}
    lines = []
    for (contest, target), rows in tables.group(runs, "contest", "target").items():
        methods = {name: mine for (name,), mine in tables.group(rows, "method").items()}
        peers = {name: mine for name, mine in methods.items() if not name.startswith(PREFIX)}
        for name, mine in methods.items():
            if name.startswith(PREFIX):
                line = {"contest": contest, "target": format(target, "g"), "ours": name}
                lines.append(line | compare(mine, peers, wanted.get((contest, target))))
    return lines


def compare(mine: Sequence[Row], peers: Mapping[str, Sequence[Row]], goal: Goal | None) -> Row:
    """Compares a method of ours with the peer of the least median seconds.

    Args:
        mine: its runs to one target.
        peers: the peers' runs to it.
        goal: the goal, if there is one.

    Returns:
        The columns of the comparison.
    """
    seconds = {name: value for name, rows in peers.items() if (value := median(rows)) is not None}
    steps = [value for rows in peers.values() if (value := median(rows, "step")) is not None]
    ours, our_steps = median(mine), median(mine, "step")
    best = min(seconds, key=seconds.__getitem__, default=None)
    ratio = None if ours is None or best is None else seconds[best] / ours
    reached = ours is not None
    if goal is not None and goal.ratio is not None:
        reached = reached and (ratio is None or ratio >= goal.ratio)
    if goal is not None and goal.fewest_steps:
        reached = reached and reach.or_infinity(our_steps) <= min(steps, default=math.inf)
    spread = ratios(peers[best], mine) if best else []
    return {
        "goal": "" if goal is None else described(goal),
        "best peer": best or "none reached it",
        "its s": "-" if best is None else format(seconds[best], SECONDS_FORM),
        "our s": "-" if ours is None else format(ours, SECONDS_FORM),
        "ratio": "-" if ratio is None else format(ratio, ".2f"),
        "over seeds": f"{min(spread):.2f} to {max(spread):.2f}" if spread else "-",
        "steps, fewest of peers / ours": f"{least(steps)} / {least([] if our_steps is None else [our_steps])}",
        "": "" if goal is None else ("reached" if reached else "MISSED"),
    }


def ratios(theirs: Sequence[Row], mine: Sequence[Row]) -> list[float]:
    """Divides seconds seed by seed.

    Args:
        theirs: runs of the peer.
        mine: runs of ours.

    Returns:
        The ratios where both reached the target.
    """
    ours = {row["seed"]: row["cpu_seconds"] for row in mine}
    pairs = [(row["cpu_seconds"], ours[row["seed"]]) for row in theirs]
    return [their / our for their, our in pairs if their is not None and our is not None]


def described(goal: Goal) -> str:
    """Writes a goal in words."""
    words = "reached" if goal.ratio is None else f"{goal.ratio:g}"
    return words + (", fewest steps" if goal.fewest_steps else "")


def least(values: Sequence[float]) -> str:
    """Writes the least of some numbers of steps, "-" if there is none."""
    return format(min(values), ".0f") if values else "-"


def figure(results: Results, title: str, metrics: dict[str, str]) -> Figure:
    """Draws what each contest measures against processor seconds.

    Args:
        results: what `benchmarks.contest.run` returned.
        title: the figure's title.
        metrics: from the contests' names to what they measure.

    Returns:
        The figure.
    """
    contests: dict[tuple[Any, ...], list[Row]] = tables.group(results["curve"], "contest")
    drawing, panels = figures.panels(len(contests), title, shared=False)
    for panel, ((name,), rows) in zip(panels, contests.items(), strict=True):
        figures.draw_curves(panel, rows, "cpu_seconds", "value")
        panel.set_xscale("log", nonpositive="mask")
        panel.set_yscale("log", nonpositive="mask")
        panel.set_title(name)
        panel.set_xlabel("processor seconds, without compiling")
        panel.set_ylabel(metrics[name])
    figures.shared_legend(drawing, panels[0], columns=4)
    return drawing
