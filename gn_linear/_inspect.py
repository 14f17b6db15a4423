"""Find the state of our transforms inside any nesting of optax states."""

from typing import Any

import jax

from gn_linear import _tree
from gn_linear._gauss_newton import GaussNewtonInfo, GaussNewtonState
from gn_linear._iterative_linearisation import IterativeLinearisationState, LinearisationInfo
from gn_linear._typing import Params


def info(state: Any) -> GaussNewtonInfo | LinearisationInfo:
    """What the last update did, read from any nesting of optax states.

    Args:
        state: the state of an optimiser that holds one ``gauss_newton`` or ``iterative_linearisation``.

    Returns:
        ``GaussNewtonInfo`` or ``LinearisationInfo``, of scalars; works inside ``jit``.

    Raises:
        ValueError: there is none, or there are several; their paths are given.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import gn_linear as gnl
        >>> optimiser = optax.chain(
        ...     optax.clip_by_global_norm(1.0), gnl.gauss_newton(lambda p, x: p * x, gnl.losses.squared_error)
        ... )
        >>> state = optimiser.init(jnp.array(1.0))
        >>> print(gnl.info(state).skipped)
        0
    """
    return _find(state, (GaussNewtonState, IterativeLinearisationState)).info


def anchor(state: Any, *, full_params: Params | None = None) -> Params:
    """Where iterative linearisation is linearised now, read from any nesting of optax states.

    Args:
        state: the state of an optimiser that holds one ``iterative_linearisation``.
        full_params: the whole parameters, for a transform inside ``optax.masked``, ``optax.partition`` or
            ``optax.flatten``: they fill the holes of the anchor, and give a vector its structure back.

    Returns:
        The anchor, a pytree like the parameters.

    Raises:
        ValueError: there is none, or there are several; their paths are given.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import gn_linear as gnl
        >>> first = gnl.iterative_linearisation(lambda p, x: p * x, gnl.losses.squared_error, period=5)
        >>> state = optax.chain(first, optax.sgd(0.1)).init(jnp.array(1.0))
        >>> print(gnl.anchor(state))
        1.0
    """
    found = _find(state, (IterativeLinearisationState,)).anchor
    if full_params is None:
        return found
    return (
        _tree.unflatten(found, full_params)
        if _tree.is_flattened(found, full_params)
        else _tree.fill_holes(found, full_params)
    )


def _find(state: Any, kinds: tuple[type, ...]) -> Any:
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, kinds))
    found = [(f"state{jax.tree_util.keystr(path)}", leaf) for path, leaf in leaves if isinstance(leaf, kinds)]
    names = " or ".join(kind.__name__ for kind in kinds)
    if not found:
        raise ValueError(
            f"state holds no {names}; it is {_tree.described(state)}. Pass the whole state of an optimiser that holds "
            "one."
        )
    if len(found) > 1:
        paths = ", ".join(f"{path} ({type(leaf).__name__})" for path, leaf in found)
        raise ValueError(f"state holds several of {names}: {paths}. Pass the one that you mean, such as {found[0][0]}.")
    return found[0][1]
