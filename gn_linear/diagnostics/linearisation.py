"""How far a network has left its linearisation, and how far its parameters have moved."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._linearise import displacement, missed_share
from gn_linear._typing import Inputs, Params, Predict, Scalar, shown


class ParameterMotion(NamedTuple):
    """How far parameters have moved, relative to where they were.

    Attributes:
        total: of all leaves together, shape ().
        by_leaf: of each leaf by itself, a pytree like the parameters of scalars; infinite for a leaf that was zero
            and is not any more, as biases often are at the start.
    """

    total: Scalar
    by_leaf: Params


def linearisation_error(predict: Predict, anchor: Params, params: Params, inputs: Inputs) -> Scalar:
    r"""The share of the outputs' motion that the model linearised at the anchor misses.

    .. math::
        \frac{\|f(\theta) - f_\mathrm{lin}(\theta; \theta_s)\|}{\|f(\theta) - f(\theta_s)\|}, \qquad
        f_\mathrm{lin}(\theta; \theta_s) = f(\theta_s) + J(\theta_s) (\theta - \theta_s),

    with norms over all outputs of the batch. 0 means that the model is affine between the two places, 1 is what a model
    that does not move would miss. It is the error in ``info`` of ``gn_linear.iterative_linearisation`` and in
    ``gn_linear.periods.when_linearisation_error``. It costs two forward passes and a Jacobian-vector product. Motions
    near the rounding of the outputs leave noise.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``.
        anchor: :math:`\theta_s`, where the model is linearised.
        params: :math:`\theta`, like the anchor.
        inputs: one batch.

    Returns:
        The error, shape (), at least float32. It is 0 where nothing moved, the largest number of its dtype where the
        linearised model alone did, NaN or infinite only where outputs are.

    Raises:
        TypeError: ``predict`` is not a function, or a leaf is not a float array.
        ValueError: ``params`` and ``anchor`` differ in structure or shape, or an output has no leading example axis.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x = jnp.array([1.0, 2.0])
        >>> print(gnl.diagnostics.linearisation_error(lambda p, x: p**2 * x, jnp.array(1.0), jnp.array(3.0), x))
        0.5

    References:
        Lee et al. (2019), Wide neural networks of any depth evolve as linear models, for the comparison of the two.
    """
    if not callable(predict):
        raise TypeError(f"predict must be a function predict(params, inputs), but is {shown(predict)}.")
    _check_pair(anchor, params)
    return missed_share(predict, _tree.strongly_typed(anchor), _tree.strongly_typed(params), inputs)


def parameter_motion(anchor: Params, params: Params) -> ParameterMotion:
    r"""How far the parameters are from the anchor, relative to the size of the anchor.

    .. math:: \frac{\|\theta - \theta_s\|}{\|\theta_s\|}

    Args:
        anchor: :math:`\theta_s`, such as the parameters at the start.
        params: :math:`\theta`, like the anchor.

    Returns:
        The motion of all leaves together and of each one; 0 where nothing moved, infinite where the anchor is zero and
        the parameters are not.

    Raises:
        TypeError: a leaf is not a float array.
        ValueError: ``params`` and ``anchor`` differ in structure or shape.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> anchor = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.0])}
        >>> motion = gnl.diagnostics.parameter_motion(anchor, {"w": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])})
        >>> print(motion.total, motion.by_leaf["w"], motion.by_leaf["b"])
        0.2 0.0 inf

    References:
        Chizat, Oyallon and Bach (2019), On lazy training in differentiable programming, where it is small if training
        is lazy.
    """
    _check_pair(anchor, params)
    before = _tree.to_solve(anchor)
    moved = displacement(before, _tree.to_solve(params))
    return ParameterMotion(_relative(moved, before), jax.tree.map(_relative, moved, before))


def _relative(moved: Params, before: Params) -> Scalar:
    distance, size = _tree.norm(moved), _tree.norm(before)
    away = jnp.where(distance == 0, distance, jnp.full_like(distance, jnp.inf))
    return jnp.where(size == 0, away, distance / jnp.where(size == 0, jnp.ones_like(size), size))


def _check_pair(anchor: Params, params: Params) -> None:
    _tree.check_float_leaves(anchor, "anchor")
    _tree.check_float_leaves(params, "params")
    _tree.check_same_shapes(params, anchor, "params", "anchor")
