"""Figures of runs: against the number of feature updates, over steps and period, against damping."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gn_linear.plotting import _drawing, _tables

if TYPE_CHECKING:
    import matplotlib.axes  # loaded where it is needed: it is optional, and slow


def feature_updates(
    runs: Sequence[_tables.Row], metric: str = "test_accuracy", axes: Any = None
) -> "matplotlib.axes.Axes":
    """A metric against the number of feature updates T/K, of the network f and of the linearised model f_lin.

    There is a curve for each method and number of steps T, and one for each rule but ``every K`` and ``never``; where
    learning rates, dampings (of methods without a learning rate) or experiments differ, they have curves of their own.
    Lines are solid for f, and dashed with hollow markers for f_lin. The axis of a loss is logarithmic.

    Args:
        runs: rows with the columns ``method``, ``steps`` and ``feature_updates``, and of the others that tell runs
            apart (``rule``, ``period``, ``damping``, ``learning_rate``, ``experiment``) those that there are.
        metric: what is drawn, without the evaluator: its columns are ``{metric}_f`` and ``{metric}_f_lin``.
        axes: where to draw; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: ``runs`` is not a list of rows, a column does not hold numbers, or ``axes`` is something else.
        ValueError: there is no row, a column is missing, or the metric was not measured.

    Example:
        >>> import gn_linear as gnl
        >>> accuracies = {1: (67.0, 72.0), 10: (94.0, 94.5), 100: (99.0, 99.0)}
        >>> runs = [
        ...     {"method": "iterative linearisation", "steps": 100, "feature_updates": updates, "seed": 0}
        ...     | {"test_accuracy_f": f, "test_accuracy_f_lin": f_lin}
        ...     for updates, (f, f_lin) in accuracies.items()
        ... ]
        >>> axes = gnl.plotting.feature_updates(runs)
        >>> for line in axes.get_lines():
        ...     print(line.get_label(), line.get_ydata())
        iterative linearisation, T = 100: f [67. 94. 99.]
        iterative linearisation, T = 100: f_lin [72.  94.5 99. ]
    """
    _tables.check_rows(runs, "runs", "method", "steps", "feature_updates")
    evaluated = [name for name in _tables.measured_columns(runs) if name.endswith(("_f", "_f_lin"))]
    _tables.check_metrics([metric], "metric", [name.removesuffix("_f_lin").removesuffix("_f") for name in evaluated])
    (panel,) = _drawing.panels_for(axes, 1)
    looks = {"f": {"linestyle": "-"}, "f_lin": {"linestyle": "--", "markerfacecolor": "white"}}
    drawn = []
    columns = ("method", "steps", "schedule"), ("learning_rate", "damping", "experiment")
    for number, (name, rows) in enumerate(_tables.curves(runs, *columns)):
        rows = [{**row, "finite": not any(_tables.is_broken(row, f"{metric}_{e}") for e in looks)} for row in rows]
        points = {e: _tables.points_of(rows, "feature_updates", f"{metric}_{e}") for e in looks}
        for evaluator, look in looks.items():
            _drawing.draw_curve(panel, points[evaluator], _drawing.curve_style(number) | look, f"{name}: {evaluator}")
            drawn += points[evaluator]
        _drawing.mark_broken(panel, points["f"] or points["f_lin"], number, name)
    _drawing.set_log_scale(panel, "x", [point.x for point in drawn])
    if "loss" in metric:
        _drawing.set_log_scale(panel, "y", [point.low for point in drawn])
    panel.set(xlabel="feature updates T/K", ylabel=_drawing.axis_label(metric))
    _drawing.draw_legend(panel, drawn)
    return panel


def phase_diagram(
    runs: Sequence[_tables.Row], metric: str = "test_accuracy_f", axes: Any = None
) -> "matplotlib.axes.Axes":
    """A heat map of a metric over the steps T and the period K.

    The mean over seeds is written into each cell. Cells without a run are hatched, those whose runs were all not finite
    are hatched crosswise, and a star says that some were not. Schedules without a plain period, such as never to update
    the features, are columns of their own on the right.

    Args:
        runs: rows of one method with the columns ``steps`` and ``period``, and of the others that tell runs apart
            (``method``, ``rule``, ``damping``, ``learning_rate``) those that there are.
        metric: the column that is drawn; colours of a loss are logarithmic.
        axes: where to draw; None makes a new figure.

    Returns:
        The axes; the colour bar takes some of their room.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: ``runs`` is not a list of rows, a column does not hold numbers, or ``axes`` is something else.
        ValueError: there is no row, a column is missing, the metric was not measured, or runs differ in more than T,
            K and seed.

    Example:
        >>> import gn_linear as gnl
        >>> runs = [
        ...     {"method": "iterative linearisation", "steps": steps, "period": period, "test_accuracy_f": value}
        ...     for steps, period, value in [(100, 1, 98.5), (100, 10, 96.0), (1000, 1, 99.5)]
        ... ]
        >>> axes = gnl.plotting.phase_diagram(runs)
        >>> print([text.get_text() for text in axes.texts])
        ['98.5', '96', '99.5']
    """
    _tables.check_rows(runs, "runs", "steps", "period")
    _tables.check_metrics([metric], "metric", _tables.measured_columns(runs))
    settings = [name for name, _ in _tables.curves(runs, ("method",), ("learning_rate", "damping"))]
    if len(settings) > 1:
        raise ValueError(
            f"runs must differ in steps, period and seed only, but there are {len(settings)} settings, "
            f"{'; '.join(settings[:3])}{'; ...' * (len(settings) > 3)}. Pass the runs of one of them."
        )
    (panel,) = _drawing.panels_for(axes, 1)
    heights = sorted({row["steps"] for row in runs})
    columns = sorted({row["period"] for row in runs if row["period"] is not None})
    columns += dict.fromkeys(_column(row) for row in runs if row["period"] is None)
    cells = {}
    for row in runs:
        cells.setdefault((heights.index(row["steps"]), columns.index(_column(row))), []).append(row)
    points = {place: _tables.make_point(members, "steps", metric) for place, members in cells.items()}
    means = np.full((len(heights), len(columns)), np.nan)
    for place, point in points.items():
        means[place] = point.mean
    known = means[np.isfinite(means)]
    norm = "log" if "loss" in metric and np.all(known > 0) else "linear"
    limits = {} if known.size else {"vmin": 1, "vmax": 2}
    image = panel.imshow(
        np.ma.masked_invalid(means), cmap="viridis", norm=norm, origin="lower", aspect="auto", **limits
    )
    _write_cells(panel, image, means, points)
    panel.figure.colorbar(image, ax=panel, label=_drawing.axis_label(metric))
    labels = [column if isinstance(column, str) else f"{column:,}" for column in columns]
    slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, labels)) > 6 else {}
    panel.set_xticks(range(len(columns)), labels=labels, **slant)
    panel.set_yticks(range(len(heights)), labels=[f"{height:,}" for height in heights])
    panel.set(xlabel="period K (steps per feature update)", ylabel="steps T")
    return panel


def _column(row: _tables.Row) -> Any:
    """The column of a phase diagram."""
    return row["period"] if row["period"] is not None else str(row.get("rule"))


def _write_cells(panel: Any, image: Any, means: np.ndarray, points: dict[tuple[int, int], _tables.Point]) -> None:
    """The values of a phase diagram, the hatches of cells without one, and what they mean."""
    from matplotlib.patches import Rectangle

    hatches, starred = {}, False
    for (row, column), mean in np.ndenumerate(means):
        point = points.get((row, column))
        if math.isfinite(mean) and point is not None:
            red, green, blue, _ = image.cmap(image.norm(mean))
            ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            text = f"{mean:.3g}{'*' * bool(point.broken)}"
            panel.text(column, row, text, ha="center", va="center", color=ink, fontsize="small")
            starred |= point.broken > 0
        else:
            meaning, hatch = ("not finite", "xxx") if point is not None and point.broken else ("not measured", "//")
            look = {"fill": False, "hatch": hatch, "edgecolor": "#666666", "linewidth": 0}
            hatches[meaning] = panel.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **look, label=meaning))
    if starred:
        hatches["star"] = panel.plot([], [], color="black", marker="*", linestyle="none", label="some not finite")[0]
    if hatches:
        panel.legend(handles=list(hatches.values()), loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)


def side_by_side(runs: Sequence[_tables.Row], metric: str = "train_loss_f", axes: Any = None) -> "matplotlib.axes.Axes":
    r"""Gauss-Newton, prox-linear and iterative linearisation on the common axis of damping.

    .. math:: \mu = \frac{1}{\eta K}

    There is a curve for each method; where learning rates or experiments differ, they have curves of their own, and so
    have numbers of steps where a curve would hold several at one damping. Runs without a damping, or with 0, have no
    place on the axis: their mean is a horizontal line.

    Args:
        runs: rows with the columns ``method`` and ``damping``, and of the others that tell runs apart (``steps``,
            ``rule``, ``period``, ``learning_rate``, ``experiment``) those that there are.
        metric: the column that is drawn; a loss has a logarithmic axis.
        axes: where to draw; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: ``runs`` is not a list of rows, a column does not hold numbers, or ``axes`` is something else.
        ValueError: there is no row, a column is missing, or the metric was not measured.

    Example:
        >>> import gn_linear as gnl
        >>> runs = [
        ...     {"method": method, "damping": damping, "seed": 0, "train_loss_f": loss}
        ...     for method, damping, loss in [("gauss-newton", 0.1, 0.02), ("gauss-newton", 1.0, 0.3)]
        ... ]
        >>> axes = gnl.plotting.side_by_side(runs)
        >>> print(axes.get_lines()[0].get_xydata().tolist())
        [[0.1, 0.02], [1.0, 0.3]]

    References:
        Goldwaser and Ge (2022), Understanding sparse feature updates in deep networks using iterative linearisation.
    """
    _tables.check_rows(runs, "runs", "method", "damping")
    _tables.check_metrics([metric], "metric", _tables.measured_columns(runs))
    (panel,) = _drawing.panels_for(axes, 1)
    placed = [row for row in runs if row["damping"]]
    others = ("learning_rate", "experiment")
    places = _tables.grouped(placed, lambda row: (row["damping"], *(row.get(column) for column in ("method", *others))))
    if any(len({row.get("steps") for row in place}) > 1 for place in places):
        others += ("steps",)
    drawn = []
    for number, (name, rows) in enumerate(_tables.curves(runs, ("method",), others)):
        points = _tables.points_of([row for row in rows if row["damping"]], "damping", metric)
        _drawing.draw_curve(panel, points, _drawing.curve_style(number), name)
        _drawing.mark_broken(panel, points, number, name)
        drawn += points
        for point in _tables.points_of(
            [{**row, "damping": 0} for row in rows if not row["damping"]], "damping", metric
        ):
            without = f"{name}, without damping" + ": not finite" * (not point.kept)
            panel.axhline(point.mean, **_drawing.curve_style(number) | {"marker": ""}, label=without)
    _drawing.set_log_scale(panel, "x", [point.x for point in drawn])
    if "loss" in metric:
        _drawing.set_log_scale(panel, "y", [point.low for point in drawn])
    panel.set(xlabel=r"damping $\mu = 1 / (\eta K)$", ylabel=_drawing.axis_label(metric))
    _drawing.draw_legend(panel, drawn)
    return panel
