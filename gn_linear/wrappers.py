"""Bridges to code that does not pass extra arguments on, or that rejects them.

``gauss_newton`` and ``iterative_linearisation`` need the batch as keywords of ``update``. Most of optax forwards them;
``with_batch`` serves hosts that do not, ``without_batch`` serves transforms that raise on keywords they do not know.
"""

from typing import Any

import optax

from gn_linear._batch import KEYWORDS
from gn_linear._typing import Inputs, Params, Targets, shown

__all__ = ["with_batch", "without_batch"]


def with_batch(
    transform: optax.GradientTransformation, *, inputs: Inputs, targets: Targets = None, **more: Any
) -> optax.GradientTransformationExtraArgs:
    """Bind the batch to a transform, for hosts whose calls of ``update`` leave no room for it.

    The state is that of ``transform``, so it can be wound around each batch anew, inside ``jit``:
    ``optax.lookahead(gnl.wrappers.with_batch(optimiser, inputs=x, targets=y), ...)``. Hosts that run the whole loop
    themselves, such as ``optimistix.OptaxMinimiser`` and ``jaxopt.OptaxSolver``, get the full batch once.

    Args:
        transform: the transform that wants the batch, also a chain that holds it.
        inputs: handed to its ``update``.
        targets: likewise.
        **more: other keywords for its ``update``, such as ``full_params``.

    Returns:
        The transform, with these keywords bound; others that a caller gives are passed on as well.

    Raises:
        TypeError: ``transform`` is no optax transform; in ``update``, a caller gives a bound keyword again.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import gn_linear as gnl
        >>> x = jnp.array([1.0, 2.0])
        >>> inner = gnl.gauss_newton(lambda p, x: p * x, gnl.losses.squared_error, damping=0.0)
        >>> optimiser = gnl.wrappers.with_batch(inner, inputs=x, targets=3.0 * x)
        >>> params = jnp.array(1.0)
        >>> updates, state = optimiser.update(jnp.array(-5.0), optimiser.init(params), params)
        >>> print(f"{updates:.4f}")
        2.0000
    """
    inner = _extra_args(transform)
    bound = {"inputs": inputs, "targets": targets, **more}

    def update(updates: Params, state: Any, params: Params | None = None, **given: Any) -> tuple[Params, Any]:
        twice = sorted(bound.keys() & given.keys())
        if twice:
            raise TypeError(
                f"{', '.join(twice)}: given to update, but already bound by with_batch; pass the batch at one place."
            )
        return inner.update(updates, state, params, **bound, **given)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def without_batch(transform: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Hide the batch from a transform that raises on keywords which it does not know.

    Line searches and ``optax.lbfgs`` in a chain behind ``iterative_linearisation`` reject ``inputs`` and ``targets``
    unless their ``value_fn`` names them. Keywords of other transforms (``value``, ``grad``, ``value_fn``) are passed.

    Args:
        transform: the transform to shield.

    Returns:
        The transform, whose ``update`` takes and drops ``inputs``, ``targets``, ``full_params``, ``curvature_inputs``
        and ``curvature_targets``.

    Raises:
        TypeError: ``transform`` is no optax transform.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import gn_linear as gnl
        >>> x = jnp.array([1.0, 2.0])
        >>> predict, loss = lambda p, x: p * x, gnl.losses.squared_error
        >>> optimiser = optax.chain(
        ...     gnl.iterative_linearisation(predict, loss, period=5), gnl.wrappers.without_batch(optax.lbfgs())
        ... )
        >>> params = jnp.array(1.0)
        >>> value, grad = jax.value_and_grad(lambda p: loss(predict(p, x), 3.0 * x))(params)
        >>> updates, _ = optimiser.update(
        ...     grad, optimiser.init(params), params, inputs=x, targets=3.0 * x,
        ...     value=value, grad=grad, value_fn=lambda p: loss(predict(p, x), 3.0 * x),
        ... )
    """
    inner = _extra_args(transform)

    def update(updates: Params, state: Any, params: Params | None = None, **given: Any) -> tuple[Params, Any]:
        kept = {name: value for name, value in given.items() if name not in KEYWORDS}
        return inner.update(updates, state, params, **kept)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _extra_args(transform: Any) -> optax.GradientTransformationExtraArgs:
    if not isinstance(transform, optax.GradientTransformation):
        raise TypeError(f"transform must be an optax.GradientTransformation, but is {shown(transform)}.")
    return optax.with_extra_args_support(transform)
