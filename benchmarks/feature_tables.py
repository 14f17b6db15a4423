"""Tables and the figure of the study of feature learning, from its rows."""

import numpy as np
from matplotlib.figure import Figure

from benchmarks import claims, figures, tables
from benchmarks.suites import Results
from benchmarks.tables import Row


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
            f"Schedules against updates at equal distances, test accuracies; {claims.UPDATES} updates where planned",
            "",
            tables.text_table([schedule_line(row) for row in results["schedules"]]),
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
            "is linearised anew. The gain of a schedule is that of f over the run of the sweep whose feature updates",
            "are nearest, seed by seed.",
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


def schedule_line(row: Row) -> Row:
    """Writes the line of one schedule.

    Args:
        row: the schedule's row.

    Returns:
        The line.
    """
    gain = "not finite" if row["gain"] is None else f"{row['gain']:+.2f}"
    return {
        "data": row["data"],
        "rule": row["rule"],
        "updates": f"{row['updates']:.4g}",
        "f %": mean([row], "test_accuracy_f", ".2f"),
        "f_lin %": mean([row], "test_accuracy_f_lin", ".2f"),
        "sweep at": str(row["nearest"]),
        "gain of f, points": gain if row["error"] is None else f"{gain} ± {row['error']:.2f}",
    }


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
