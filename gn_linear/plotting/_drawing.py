"""How figures look: the style of curves, bands, marks, axes and legends."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gn_linear._typing import shown
from gn_linear.plotting._tables import Point

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours that the colour-blind can tell apart."""

LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
"""Of unlike number to the colours, so that the pairs repeat late."""

MARKERS = ("o", "s", "^", "D", "v", "X", "P", "*")
"""Of unlike number to the colours, too."""

LABELS = {
    "cka": "CKA with the kernel at the start",
    "kernel_distance": "kernel distance from the start",
    "kernel_velocity": "kernel velocity (1 / step)",
    "gain_ratio": "gain ratio",
}
"""What axes say of a column, where its name does not speak for itself."""


def curve_style(number: int) -> dict[str, Any]:
    """Colour, line style and marker of a curve, as keywords of ``axes.plot``.

    Args:
        number: the curve's, from 0; up to 280 curves differ.

    Returns:
        The keywords ``color``, ``linestyle`` and ``marker``.

    Example:
        >>> import gn_linear as gnl
        >>> print(gnl.plotting.curve_style(1))
        {'color': '#D55E00', 'linestyle': '--', 'marker': 's'}

    References:
        Okabe and Ito (2008), Color universal design.
    """
    return {
        "color": OKABE_ITO[number % len(OKABE_ITO)],
        "linestyle": LINE_STYLES[number % len(LINE_STYLES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def panels_for(axes: Any, count: int) -> list[Any]:
    """The axes to draw on: those given, or those of a new figure."""
    try:
        import matplotlib.axes
    except ImportError as error:
        raise ImportError(
            f"gn_linear.plotting needs matplotlib, which did not load ({error}); run: pip install 'gn_linear[plot]'."
        ) from error
    if axes is None:
        import matplotlib.pyplot as plt

        return list(plt.subplots(1, count, figsize=(6.4 * count, 4.4), layout="constrained", squeeze=False)[1][0])
    panels = list(np.ravel(axes))
    if len(panels) != count or not all(isinstance(panel, matplotlib.axes.Axes) for panel in panels):
        needed = "axes of matplotlib" if count == 1 else f"a list of {count} axes of matplotlib"
        raise TypeError(f"axes must be {needed}, such as figure.subplots(1, {count}) makes, but is {shown(axes)}.")
    return panels


def draw_curve(panel: Any, points: list[Point], look: dict[str, Any], label: str) -> None:
    """A curve of means, broken where there is none, and the band of its range."""
    if not any(point.kept for point in points):
        return
    x, mean, low, high = np.array([point[:4] for point in points]).T
    panel.plot(x, mean, **look, linewidth=1.8, markersize=5, label=label)
    if any(point.kept > 1 for point in points):
        if len(points) > 1:
            panel.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        else:
            panel.vlines(x, low, high, color=look["color"], linewidth=1)


def mark_broken(panel: Any, points: list[Point], number: int, name: str) -> None:
    """Crosses where runs of a curve were not finite."""
    broken, runs = sum(point.broken for point in points), sum(point.broken + point.kept for point in points)
    draw_crosses(panel, [p.x for p in points if p.broken], number, f"{name}: {broken} of {runs} not finite")


def draw_crosses(panel: Any, x: Any, number: int, label: str) -> None:
    """Crosses at the bottom, those of further curves a little higher."""
    if len(x):
        height = np.full(len(x), 0.03 * (1 + number % 8))
        look = {"color": curve_style(number)["color"], "linestyle": "none", "marker": "x", "markeredgewidth": 2}
        panel.plot(x, height, **look, transform=panel.get_xaxis_transform(), label=label)


def set_log_scale(panel: Any, axis: str, values: Any) -> None:
    """A logarithmic axis, linear up to the smallest size if not all values are positive."""
    finite = np.asarray(values, np.float64)[np.isfinite(values)]
    if finite.size:  # matplotlib cannot draw a logarithmic axis of nothing
        sizes = np.abs(finite[finite != 0])
        linear = {"linthresh": np.min(sizes, initial=np.inf if sizes.size else 1.0)}
        scale, options = ("log", {}) if np.all(finite > 0) else ("symlog", linear)
        getattr(panel, f"set_{axis}scale")(scale, **options)


def axis_label(column: str) -> str:
    """What an axis says of a column."""
    evaluator = next((name for name in ("f_lin", "f") if column.endswith(f"_{name}")), None)
    words = LABELS.get(column, column.removesuffix(f"_{evaluator}").replace("_", " "))
    return words + (f" of {evaluator}" if evaluator else "") + (" (%)" if "accuracy" in column else "")


def draw_legend(panel: Any, points: Sequence[Point] = ()) -> None:
    """What the curves are, and over how many seeds they are means."""
    seeds = max((point.kept for point in points), default=1)
    title = f"mean and range over {seeds} seeds" if seeds > 1 else None
    if panel.get_legend_handles_labels()[0]:
        panel.legend(title=title, fontsize="small", title_fontsize="small", frameon=False)
