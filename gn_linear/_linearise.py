"""Linearisation of a model at an anchor: outputs, Jacobian-vector and vector-Jacobian products.

``linearise`` traces the model once; the residuals of that pass are stored and serve every later product, which is
what makes the inner products of a Gauss-Newton step cheaper than a gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gn_linear import _tree
from gn_linear._typing import Inputs, Outputs, Params, Predict, Scalar
from gn_linear._xla_cpu import fence, in_fast_forms


class Linearisation(NamedTuple):
    """A model linearised at an anchor: ``f(anchor + d) = outputs + jvp(d) + O(|d|^2)``.

    Attributes:
        outputs: ``f(anchor, inputs)``, an array whose leading axis is the example, or a pytree of such arrays.
        jvp: ``d -> J d``; takes a pytree like the parameters (same dtypes), returns one like ``outputs``.
        vjp: ``u -> J^T u``; takes a pytree like ``outputs`` (same dtypes), returns one like the parameters.
    """

    outputs: Outputs
    jvp: Callable[[Params], Outputs]
    vjp: Callable[[Outputs], Params]


def linearise(predict: Predict, params: Params, inputs: Inputs) -> Linearisation:
    r"""Linearise ``predict`` at ``params`` on one batch, once, for any number of products.

    With the Jacobian :math:`J = \partial f / \partial \theta` at :math:`\theta` = ``params``,

    .. math:: f(\theta + d, x) = f(\theta, x) + J d + O(\|d\|^2).

    The forward pass runs once (``jax.linearize``); its residuals are kept, and the transpose is taken from the same
    linear map (``jax.linear_transpose``). Memory is that of one reverse-mode gradient. Examples need not be
    independent.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``.
        params: where to linearise, a pytree of float arrays (None leaves are allowed).
        inputs: one batch, an opaque pytree that ``predict`` understands.

    Returns:
        The outputs and the two products, each a pure function that works under ``jit``, ``vmap`` and ``scan``.

    Raises:
        TypeError: a leaf of ``params`` or of the outputs is not a real float array; the leaf is named.
        ValueError: an output has no leading example axis.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> f = gnl.linearise(lambda p, x: jnp.sin(p["w"] * x), {"w": jnp.array(0.0)}, jnp.array([1.0, 2.0]))
        >>> print(f.outputs, f.jvp({"w": jnp.array(1.0)}))
        [0. 0.] [1. 2.]
        >>> print(f.vjp(jnp.array([1.0, 1.0]))["w"])
        3.0

    References:
        Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent, section 3.
    """
    _tree.check_float_leaves(params, "params")
    params = jax.tree.map(jnp.asarray, params)
    outputs, jvp = jax.linearize(lambda p: fence(predict(p, inputs)), params)
    _check_outputs(outputs)
    transpose = jax.linear_transpose(jvp, params)
    vjp = in_fast_forms(lambda cotangent: transpose(cotangent)[0], outputs)
    return Linearisation(outputs, in_fast_forms(jvp, params), vjp)


def linearised(predict: Predict, anchor: Params) -> Predict:
    r"""The linearised model, affine in its parameters and exact at the anchor.

    .. math:: f_\mathrm{lin}(\theta, x; \theta_s) = f(\theta_s, x) + J(\theta_s, x) (\theta - \theta_s).

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``.
        anchor: :math:`\theta_s`, a pytree of float arrays.

    Returns:
        ``predict_lin(params, inputs) -> outputs``, a function of the signature of ``predict``, one forward-mode pass
        a call. ``params`` must have the structure, shapes and dtypes of the anchor.

    Raises:
        TypeError: at the call, a leaf of the anchor or of ``params`` is not a real float array; the leaf is named.
        ValueError: at the call, ``params`` and the anchor differ in structure or shape, or an output has no leading
            example axis.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> predict_lin = gnl.linearised(lambda p, x: jnp.exp(p) * x, jnp.array(0.0))
        >>> print(predict_lin(jnp.array(0.5), jnp.array([1.0, 2.0])))
        [1.5 3. ]

    References:
        Lee et al. (2019), Wide neural networks of any depth evolve as linear models, equation 4.
    """

    def predict_lin(params: Params, inputs: Inputs) -> Outputs:
        _tree.check_float_leaves(anchor, "anchor")
        _tree.check_float_leaves(params, "params")
        _tree.check_same_shapes(params, anchor, "params", "anchor")
        primal = jax.tree.map(jnp.asarray, anchor)
        outputs, change = jax.jvp(lambda p: predict(p, inputs), (primal,), (displacement(primal, params),))
        _check_outputs(outputs)
        return jax.tree.map(jnp.add, outputs, change)

    return predict_lin


def displacement(anchor: Params, params: Params) -> Params:
    """How far the parameters are from the anchor, in its dtypes."""
    return jax.tree.map(lambda a, p: jnp.asarray(p).astype(a.dtype) - a, anchor, params)


def missed_share(predict: Predict, anchor: Params, params: Params, inputs: Inputs) -> Scalar:
    """The share of the outputs' motion that the linearised model misses.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``.
        anchor: where it is linearised, a pytree of arrays.
        params: where the parameters are.
        inputs: one batch.

    Returns:
        The share, shape (): 0 where neither model moved, the largest number of its dtype where the linearised model
        alone did, NaN or infinite only where outputs are.
    """
    start, change = jax.jvp(lambda p: fence(predict(p, inputs)), (anchor,), (displacement(anchor, params),))
    _check_outputs(start)
    moved = _tree.subtract(_tree.to_solve(fence(predict(params, inputs))), _tree.to_solve(start))
    motion, missed = _tree.norm(moved), _tree.norm(_tree.subtract(moved, _tree.to_solve(change)))
    largest = jnp.asarray(jnp.finfo(missed.dtype).max, missed.dtype)
    share = missed / jnp.where(motion == 0, jnp.ones_like(motion), motion)
    share_of_nothing = jnp.where(missed == 0, jnp.zeros_like(missed), largest)
    bounded = jnp.minimum(jnp.where(motion == 0, share_of_nothing, share), largest)
    return jnp.where(jnp.isfinite(missed), bounded, share)


def over_batches(predict: Predict) -> Predict:
    """The model on batches that are stacked on a leading axis of every leaf of its inputs, as one long batch.

    Args:
        predict: the model of one batch.

    Returns:
        The model whose outputs have the two leading axes, batch and example, merged.
    """

    def checked(params: Params, inputs: Inputs) -> Outputs:
        outputs = predict(params, inputs)
        _check_outputs(outputs)
        return outputs

    return lambda params, inputs: merge_batches(jax.vmap(checked, (None, 0))(params, inputs))


def merge_batches(tree: Any) -> Any:
    """A tree with the two leading axes of each leaf merged."""
    return jax.tree.map(lambda x: jnp.reshape(x, (np.shape(x)[0] * np.shape(x)[1], *np.shape(x)[2:])), tree)


def _check_outputs(outputs: Outputs) -> None:
    """Raise unless every output is a float array with a leading example axis."""
    _tree.check_float_leaves(outputs, "the outputs of predict")
    for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
        if np.ndim(leaf) == 0:
            raise ValueError(
                f"the outputs of predict: {_tree.leaf_label(path)} is a scalar, of shape (); outputs need a leading "
                "axis of examples. predict returns the model's outputs, not the loss, which is an argument of its own."
            )
