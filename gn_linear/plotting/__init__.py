r"""Figures of runs, kernel measures, spectra, filters and training, readable in print and without colour.

They need matplotlib: ``pip install 'gn_linear[plot]'``. Each function draws on ``axes``, or on a new figure of pyplot,
and returns the axes: ``axes.figure.savefig("figure.pdf")`` keeps the figure, ``matplotlib.pyplot.show()`` shows it.
Settings of matplotlib are left alone. Curves differ in colour, by the palette of Okabe and Ito, and in marker or line
style.

Runs and measurements are tables: lists of rows, which are flat dicts such as ``gn_linear.experiments`` returns or
``json.loads`` reads from each line of its files. Values are means over seeds, and bands reach from the least to the
greatest. None is what was not measured. Runs that are not finite are left out of means and marked by a cross at the
bottom. A run is not finite if its column ``finite``, where it has one, says so, or if the value itself is not.
"""

from gn_linear.plotting._drawing import curve_style
from gn_linear.plotting.histories import training
from gn_linear.plotting.kernels import kernel_measures
from gn_linear.plotting.runs import feature_updates, phase_diagram, side_by_side
from gn_linear.plotting.spectra import filters, spectrum

__all__ = [
    "curve_style",
    "feature_updates",
    "filters",
    "kernel_measures",
    "phase_diagram",
    "side_by_side",
    "spectrum",
    "training",
]
