"""Figures of the measures of a kernel."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gn_linear.plotting import _drawing, _tables


def kernel_measures(
    measurements: Sequence[_tables.Row],
    measures: Sequence[str] = ("kernel_distance", "cka", "target_alignment"),
    axes: Any = None,
) -> np.ndarray:
    """Measures of the kernel against the step, a panel for each and a curve for each rule of re-linearisation.

    Where methods, numbers of steps, learning rates, dampings (of methods without a learning rate) or experiments
    differ, they have curves of their own. If seeds were measured at different steps, as under rules that are triggered,
    each of them has its line instead of a mean with a band. A value that is missing behind others of the same run is
    one that was not finite.

    Args:
        measurements: rows with the columns ``rule`` and ``step``, and of the others that tell runs apart (``seed``,
            ``method``, ``period``, ``steps``, ``damping``, ``learning_rate``, ``experiment``) those that there are.
        measures: the columns that are drawn, one a panel; other columns of measurements will do as well.
        axes: where to draw, an array or a list of as many axes; None makes a new figure.

    Returns:
        The array of axes.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: ``measurements`` is not a list of rows, a column does not hold numbers, or ``axes`` is not an array
            of as many axes.
        ValueError: there is no row, a column is missing, or a measure was not taken.

    Example:
        >>> import gn_linear as gnl
        >>> measurements = [
        ...     {"rule": "every 10", "step": step, "seed": 0, "cka": value}
        ...     for step, value in [(0, 1.0), (10, 0.9), (100, 0.7)]
        ... ]
        >>> axes = gnl.plotting.kernel_measures(measurements, measures=["cka"])
        >>> print(axes.shape, axes[0].get_ylabel())
        (1,) CKA with the kernel at the start

    References:
        Fort et al. (2020), Deep learning versus kernel learning: an empirical study of loss landscape geometry and the
        time evolution of the neural tangent kernel.
    """
    _tables.check_rows(measurements, "measurements", "rule", "step")
    measures = [measures] if isinstance(measures, str) else list(measures)
    _tables.check_metrics(measures, "measures", _tables.measured_columns(measurements))
    panels = _drawing.panels_for(axes, len(measures))
    others = ("method", "steps", "learning_rate", "damping", "experiment")
    for panel, measure in zip(panels, measures, strict=True):
        drawn = []
        for number, (name, rows) in enumerate(_tables.curves(measurements, ("rule",), others)):
            lines = [
                _tables.points_of(part, "step", measure)
                for part in _tables.comparable(_tables.with_lost(rows, measure))
            ]
            for index, points in enumerate(lines):
                label = f"{name}, each seed" if index == 0 else "_another seed"
                _drawing.draw_curve(panel, points, _drawing.curve_style(number), label if len(lines) > 1 else name)
                drawn += points
            _drawing.mark_broken(panel, [point for points in lines for point in points], number, name)
        _drawing.set_log_scale(panel, "x", [row["step"] for row in measurements])
        if "loss" in measure:
            _drawing.set_log_scale(panel, "y", [point.low for point in drawn])
        panel.set(xlabel="step", ylabel=_drawing.axis_label(measure))
        _drawing.draw_legend(panel, drawn)
    return np.array(panels)
