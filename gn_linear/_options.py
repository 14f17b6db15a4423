"""What `least_squares` can be told besides the problem itself."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gn_linear import _tree
from gn_linear._loss import Loss
from gn_linear._typing import Params, shown


@dataclasses.dataclass(frozen=True)
class Options:
    r"""Options of :func:`gn_linear.least_squares`.

    A tree of options may be cut short: a number or an array stands for the whole subtree below it, so ``lower=0.0``
    keeps every parameter positive, and ``{"a": 0.0, "b": -jnp.inf}`` all of ``params["a"]`` however nested it is.

    Attributes:
        lower: lower bounds, a tree like the parameters; None for none. A start outside is moved onto the bounds.
        upper: upper bounds, likewise.
        loss: a robust loss of each residual, :func:`gn_linear.losses.huber` or one of :mod:`gn_linear.robust`; None is
            the square. Its ``delta`` is scipy's ``f_scale``.
        weights: :math:`w` in the cost :math:`\frac12 \sum_i w_i r_i^2`, a tree like the residuals that broadcasts
            against them; usually :math:`1/\sigma_i^2`. A weight of zero leaves out its residual, whatever it is.
        frozen: a tree of bools, or of boolean arrays, like the parameters; where it is true a parameter stays at its
            start and counts as known.
        scaling: whether the damping is in units of the columns of the Jacobian, by Moré's running maximum (True), the
            same for all columns (False), or the one and then the other until neither lowers the cost (None).
        acceleration: whether steps are bent along the geodesic, by a second derivative of the residuals in the
            direction of the step.
        chunks: a tree of arrays with one leading axis, that of the chunks of the data; ``residuals`` is then called as
            ``residuals(params, chunk, *args)``, one chunk after another; weights and residuals have that axis, too.
            None for data in one piece.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> t = jnp.array([0.0, 1.0, 2.0])
        >>> y = jnp.array([1.0, 3.0, 90.0])
        >>> options = gnl.Options(lower={"slope": 0.0, "offset": -1.0}, loss=gnl.robust.cauchy(0.1))
        >>> residuals = lambda p: p["slope"] * t + p["offset"] - y
        >>> fit = gnl.least_squares(residuals, {"slope": 1.0, "offset": 0.0}, options=options)
        >>> print(f"{fit.params['slope']:.2f} {fit.params['offset']:.2f}")
        2.00 1.00

    References:
        Triggs et al. (2000), Bundle adjustment: a modern synthesis, section 4.3; Moré (1978), The Levenberg-Marquardt
        algorithm: implementation and theory; Transtrum and Sethna (2012), Improvements to the Levenberg-Marquardt
        algorithm for nonlinear least-squares minimization.
    """

    lower: Any = None
    upper: Any = None
    loss: Loss | None = None
    weights: Any = None
    frozen: Any = None
    scaling: bool | None = None
    acceleration: bool = False
    chunks: Any = None

    def __post_init__(self) -> None:
        if self.loss is not None and not (isinstance(self.loss, Loss) and hasattr(self.loss, "delta")):
            raise TypeError(
                "loss must be gn_linear.losses.huber(delta), one of gn_linear.robust such as soft_l1(delta), or None "
                f"for the square, but is {shown(self.loss)}."
            )
        if self.scaling is not None and not isinstance(self.scaling, bool):
            raise TypeError(f"scaling must be True, False, or None for both in turn, but is {shown(self.scaling)}.")
        if not isinstance(self.acceleration, bool):
            raise TypeError(f"acceleration must be True or False, but is {shown(self.acceleration)}.")


def spread(tree: Any, like: Params, argument: str, like_argument: str = "params") -> Any:
    """A tree of options that may be cut short, as one entry of the full shape for each leaf.

    Args:
        tree: of numbers or arrays.
        like: a tree of arrays.
        argument: the name of the first, for the message.
        like_argument: the name of the second.

    Returns:
        A tree like the second, with its shapes.

    Raises:
        ValueError: the trees or the shapes do not fit.
    """
    whole = _whole(tree, like, argument, like_argument)
    for (path, leaf), value in zip(jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(whole), strict=True):
        try:
            fits = np.broadcast_shapes(np.shape(value), np.shape(leaf)) == np.shape(leaf)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{argument}: {_tree.leaf_label(path)} has shape {np.shape(value)}, but must broadcast to the shape "
                f"{np.shape(leaf)} that {like_argument} has there."
            )
    return jax.tree.map(lambda value, leaf: jnp.broadcast_to(jnp.asarray(value), np.shape(leaf)), whole, like)


def frozen_mask(frozen: Any, params: Params) -> np.ndarray:
    """Which entries of the raveled parameters stay as they are, known at trace time.

    Args:
        frozen: as in ``Options``.
        params: the parameters.

    Returns:
        Booleans, shape (parameters,).

    Raises:
        TypeError: an entry is no boolean, or traced.
    """
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    if frozen is None:
        return np.zeros(size, bool)
    for path, leaf in jax.tree_util.tree_leaves_with_path(frozen):
        if not _known_bools(leaf):
            raise TypeError(
                f"frozen: {_tree.leaf_label(path, 'it')} must be True, False or an array of them, known at trace time, "
                f"but is {shown(leaf)}."
            )
    whole = _whole(frozen, params, "frozen", "params")
    parts = [
        np.broadcast_to(np.asarray(value), np.shape(leaf)).ravel()
        for value, leaf in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True)
    ]
    return np.concatenate([np.zeros(0, bool), *parts])


def _known_bools(leaf: Any) -> bool:
    try:
        return np.asarray(leaf).dtype == bool
    except jax.errors.TracerArrayConversionError:
        return False


def _whole(tree: Any, like: Params, argument: str, like_argument: str) -> Any:
    """A tree that is cut short, its entries repeated for each leaf below them."""
    try:
        return jax.tree.map(lambda value, below: jax.tree.map(lambda _: value, below), tree, like)
    except (ValueError, TypeError) as error:
        where = _tree.difference(tree, like, argument, like_argument)
        raise ValueError(
            f"{argument} must be a tree like {like_argument}, or a number for all of it, but {where}."
        ) from error
