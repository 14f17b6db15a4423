"""Figures that can be read without colour: Okabe and Ito's palette with a line style and a marker to each curve."""

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tables import Row, group
from gn_linear.plotting import curve_style


def panels(count: int, title: str, *, shared: bool = True) -> tuple[Figure, list[Axes]]:
    """Makes a figure of panels side by side.

    Args:
        count: number of panels.
        title: the figure's title.
        shared: whether they share their vertical axis.

    Returns:
        The figure and its panels.
    """
    figure = Figure(figsize=(5.2 * count, 4.6), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, count, sharey=shared, squeeze=False)[0]
    for panel in axes:
        panel.grid(visible=True, which="major", alpha=0.3)
    return figure, list(axes)


def draw_curves(panel: Axes, rows: Sequence[Row], x: str, y: str, label: str = "method") -> None:
    """Draws each label's median over seeds with markers, and each seed as a thin line.

    Args:
        panel: where to draw.
        rows: rows with the columns `seed`, `step`, `label`, `x` and `y`; values None are left out.
        x: the column on the horizontal axis; give a logarithmic one `nonpositive="mask"`, or 0 is drawn at its edge.
        y: the column on the vertical axis.
        label: the column that tells the curves apart.
    """
    for number, ((name,), curve) in enumerate(group(rows, label).items()):
        style = curve_style(number)
        finite = [row for row in curve if row[y] is not None]
        for seed_rows in group(finite, "seed").values():
            points = [(row[x], row[y]) for row in seed_rows]
            panel.plot(*zip(*points, strict=True), color=style["color"], linewidth=0.6, alpha=0.4)
        medians = [
            tuple(statistics.median(row[column] for row in at_step) for column in (x, y))
            for at_step in group(finite, "step").values()
        ]
        panel.plot(
            *zip(*medians, strict=True),
            **style,
            linewidth=1.8,
            markersize=4.5,
            markevery=max(1, len(medians) // 8),
            label=name,
        )


def shared_legend(figure: Figure, panel: Axes, columns: int = 3) -> None:
    """Puts one legend below all panels.

    Args:
        figure: the figure.
        panel: a panel that shows every curve.
        columns: columns of the legend.
    """
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
