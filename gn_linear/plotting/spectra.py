"""Figures of spectra and of spectral filters."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gn_linear._typing import check_number, shown
from gn_linear.diagnostics import Spectrum
from gn_linear.filters import Filter
from gn_linear.plotting import _drawing

if TYPE_CHECKING:
    import matplotlib.axes  # loaded where it is needed: it is optional, and slow

WIDTH = 0.02
"""Of the Gaussian that smooths a density, as a share of the largest node."""


def spectrum(
    spectrum: Spectrum, points: Any = None, width: float | None = None, axes: Any = None
) -> "matplotlib.axes.Axes":
    r"""The density of the eigenvalues of the Gauss-Newton matrix, with the largest of them marked.

    Triangles mark the eigenvalues from the largest down to the first whose error bound reaches into that of the next.
    The logarithmic axis of the density ends at a tenth of the peak of a single eigenvalue.

    Args:
        spectrum: what :func:`gn_linear.diagnostics.spectrum` returned.
        points: where the density is drawn, a vector; None takes 500 that cover the spectrum.
        width: standard deviation of the Gaussian that smooths the density; None takes a fiftieth of the largest
            eigenvalue.
        axes: where to draw; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: ``spectrum``, ``width`` or ``axes`` is something else.
        ValueError: the spectrum is not that of one matrix, or not finite, or ``width`` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> found = gnl.diagnostics.spectrum(lambda p, x: x @ p, jnp.zeros(2), x, rank=2, key=jax.random.key(0))
        >>> axes = gnl.plotting.spectrum(found)
        >>> print(axes.get_lines()[1].get_label())
        2 largest eigenvalues

    References:
        Ghorbani, Krishnan and Xiao (2019), An investigation into neural net optimization via Hessian eigenvalue
        density.
    """
    if not isinstance(spectrum, Spectrum):
        raise TypeError(f"spectrum must be what gn_linear.diagnostics.spectrum returned, but is {shown(spectrum)}.")
    nodes = np.asarray(spectrum.nodes, np.float64)
    if nodes.ndim != 2 or not np.all(np.isfinite(nodes)):
        raise ValueError(
            f"spectrum must be finite and of one matrix, but has nodes of shape {nodes.shape}, of which "
            f"{np.sum(~np.isfinite(nodes))} are not finite; draw one at a time, of parameters with finite products."
        )
    nodes = nodes[np.asarray(spectrum.weights) > 0]
    if width is None:
        width = WIDTH * (float(np.max(np.abs(nodes))) or 1.0)
    check_number(width, "width", positive=True)
    if points is None:
        points = np.linspace(np.min(nodes) - 4 * width, np.max(nodes) + 4 * width, 500)
    (panel,) = _drawing.panels_for(axes, 1)
    probes = len(spectrum.nodes)
    density = np.asarray(spectrum.density(points, width), np.float64)
    look = _drawing.curve_style(0)
    panel.plot(points, density, color=look["color"], label=f"density from {probes} probes, width {width:.2g}")
    largest = _resolved(spectrum)
    marks = {"marker": "v", "linestyle": "none", "markerfacecolor": "white", "color": _drawing.curve_style(1)["color"]}
    panel.plot(
        largest,
        np.full(len(largest), 0.04),
        **marks,
        transform=panel.get_xaxis_transform(),
        label=f"{len(largest)} largest eigenvalues",
    )
    panel.set_yscale("log")
    lowest = 0.1 / (int(spectrum.parameters) * width * math.sqrt(2 * math.pi))
    panel.set_ylim(lowest, 2 * max(panel.dataLim.y1, lowest))
    panel.set(xlabel="eigenvalue of the Gauss-Newton matrix", ylabel="density (1 / eigenvalue)")
    _drawing.draw_legend(panel)
    return panel


def _resolved(spectrum: Spectrum) -> np.ndarray:
    """The eigenvalues from the largest down to the first that cannot be told from the next."""
    values, bounds = (np.asarray(x, np.float64) for x in (spectrum.eigenvalues, spectrum.error_bounds))
    values, bounds = values[np.isfinite(bounds)], bounds[np.isfinite(bounds)]
    apart = values - bounds > np.append((values + bounds)[1:], -np.inf)
    return values[np.cumprod(apart).astype(bool)]


def filters(filters: Any, eigenvalues: Any, axes: Any = None) -> "matplotlib.axes.Axes":
    r"""Which share of the way to the minimum of the linearised problem each filter goes along an eigenvector.

    .. math:: \lambda \, \varphi(\lambda)

    Gradient steps that are not stable at an eigenvalue have no line there, and the legend says from where on.

    Args:
        filters: one of ``gn_linear.filters``, a list of them, or a dictionary from their names.
        eigenvalues: where, a vector of positive numbers in any order.
        axes: where to draw; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: a filter or ``axes`` is something else.
        ValueError: there is no filter, or the eigenvalues are not a vector of positive finite numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> axes = gnl.plotting.filters(gnl.filters.Tikhonov(1.0), jnp.array([1.0, 3.0]))
        >>> print(axes.get_lines()[0].get_xydata().tolist(), axes.get_lines()[0].get_label())
        [[1.0, 0.5], [3.0, 0.75]] Tikhonov(damping=1)
    """
    listed = filters if isinstance(filters, (list, tuple)) else [filters]
    named = list(filters.items()) if isinstance(filters, Mapping) else [(None, phi) for phi in listed]
    if not named:
        raise ValueError(f"filters must hold at least one of gn_linear.filters, but is empty: {shown(filters)}.")
    for index, (name, phi) in enumerate(named):
        if not isinstance(phi, Filter):
            place = f"[{index if name is None else repr(name)}]" if phi is not filters else ""
            raise TypeError(f"filters{place} must be one of gn_linear.filters, but is {shown(phi)}.")
    values = np.asarray(eigenvalues)
    real = values.ndim == 1 and values.size > 0 and jnp.issubdtype(values.dtype, np.number)
    if not real or not np.all((values > 0) & np.isfinite(values)):
        raise ValueError(
            "eigenvalues must be a vector of positive finite numbers, since their axis is logarithmic, but are "
            f"{shown(eigenvalues)}; leave out those that are not positive."
        )
    (panel,) = _drawing.panels_for(axes, 1)
    at = jnp.sort(jnp.asarray(values, float))
    for number, (name, phi) in enumerate(named):
        stable = np.asarray(jax.vmap(phi.stable)(at))
        share = np.where(stable, np.asarray(at * phi(at), np.float64), np.nan)
        label = _filter_name(phi) if name is None else str(name)
        label += "" if stable.all() else f" (unstable from {at[np.argmin(stable)]:.3g})"
        # The markers of different curves stand at different places, so that none hides another.
        every = (number * len(at) // (8 * len(named)), max(1, len(at) // 8))
        panel.plot(np.asarray(at), share, **_drawing.curve_style(number), markersize=5, markevery=every, label=label)
    panel.set_xscale("log")
    panel.set(xlabel=r"eigenvalue $\lambda$", ylabel=r"share of the way $\lambda \, \varphi(\lambda)$")
    _drawing.draw_legend(panel)
    return panel


def _filter_name(chosen: Filter) -> str:
    fields = dataclasses.fields(chosen) if dataclasses.is_dataclass(chosen) else ()
    return f"{type(chosen).__name__}({', '.join(f'{f.name}={float(getattr(chosen, f.name)):g}' for f in fields)})"
