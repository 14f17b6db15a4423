"""Figures of training, step after step."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from gn_linear._gauss_newton import GaussNewtonInfo
from gn_linear._typing import shown
from gn_linear.plotting import _drawing

if TYPE_CHECKING:
    import matplotlib.axes  # loaded where it is needed: it is optional, and slow


def training(histories: Mapping[str, Any], quantity: str = "loss", axes: Any = None) -> "matplotlib.axes.Axes":
    """The loss against the step, or the damping, or the gain ratio.

    Loss and damping have a logarithmic axis. That of the gain ratio is linear between -1 and 1 and logarithmic beyond,
    and a thin line says where the quadratic model was exact. Values that are not finite are marked by a cross at the
    bottom.

    Args:
        histories: from the name of each run to its values step after step, the first one at step 0: numbers, or what
            :func:`gn_linear.info` returned of ``gauss_newton``, as a list or stacked by ``jax.lax.scan``.
        quantity: ``"loss"``, ``"damping"`` or ``"gain_ratio"``.
        axes: where to draw; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: ``histories`` is not a dictionary, a history holds no numbers, or ``axes`` is something else.
        ValueError: there is no history, or the quantity is another one.

    Example:
        >>> import gn_linear as gnl
        >>> axes = gnl.plotting.training({"Adam": [1.0, 0.5, 0.3], "Gauss-Newton": [1.0, 0.1, 0.001]})
        >>> print(axes.get_ylabel(), axes.get_yscale(), axes.get_lines()[1].get_ydata())
        loss log [1.    0.1   0.001]
    """
    if not isinstance(histories, Mapping):
        raise TypeError(f"histories must be a dict from names to numbers, but is {shown(histories)}.")
    if not histories:
        raise ValueError("histories must hold at least one run, but is empty: {}.")
    if quantity not in ("loss", "damping", "gain_ratio"):
        raise ValueError(f"quantity must be 'loss', 'damping' or 'gain_ratio', but is {shown(quantity)}.")
    values = {name: _history(history, quantity, name) for name, history in histories.items()}
    (panel,) = _drawing.panels_for(axes, 1)
    for number, (name, history) in enumerate(values.items()):
        steps, finite = np.arange(len(history)), np.isfinite(history)
        every = (number * len(steps) // (8 * len(values)), max(1, len(steps) // 8))
        look = _drawing.curve_style(number) | {"markersize": 5, "markevery": every, "label": str(name)}
        panel.plot(steps, np.where(finite, history, np.nan), **look)
        _drawing.draw_crosses(panel, steps[~finite], number, f"{name}: not finite")
    if quantity == "gain_ratio":
        panel.axhline(1.0, color="#666666", linewidth=0.8)
        panel.set_yscale("symlog", linthresh=1.0)
    else:
        _drawing.set_log_scale(panel, "y", np.concatenate(list(values.values())))
    panel.set(xlabel="step", ylabel=_drawing.axis_label(quantity))
    _drawing.draw_legend(panel)
    return panel


def _history(history: Any, quantity: str, name: Any) -> np.ndarray:
    """The numbers of one run."""
    if isinstance(history, GaussNewtonInfo):
        history = getattr(history, quantity)
    elif isinstance(history, (list, tuple)) and all(isinstance(entry, GaussNewtonInfo) for entry in history):
        history = [getattr(entry, quantity) for entry in history]
    values = np.asarray(history) if np.ndim(history) == 1 else np.zeros([])
    if values.ndim != 1 or not values.size or not jnp.issubdtype(values.dtype, np.number):
        raise TypeError(f"histories[{name!r}] must be a vector of numbers, one for each step, but is {shown(history)}.")
    return values.astype(np.float64)
