r"""Losses in output space: value, gradient, Hessian product and Hessian square root.

Every loss is the mean over the leading axis (the examples) of the sum over the other axes (the outputs), summed over
the leaves if the outputs are a pytree; the mean sits inside the Hessian :math:`H`. The objects are frozen dataclasses
registered as pytrees: their numbers are traced leaves. Differentiating one with ``jax.grad`` gives its closed-form
gradient.

Any convex callable ``loss(outputs, targets)`` can stand wherever one of these can: see ``from_convex``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gn_linear import _tree
from gn_linear._loss import (
    Loss,
    OutputHessian,
    Products,
    block_roots,
    blockwise,
    check_structure,
    diagonal_products,
    widen,
)
from gn_linear._typing import Number, Outputs, Scalar, Targets, check_number, shown

__all__ = [
    "FromConvex",
    "Huber",
    "Poisson",
    "SigmoidBinaryCrossEntropy",
    "SoftmaxCrossEntropy",
    "SquaredError",
    "Weighted",
    "from_convex",
    "huber",
    "poisson",
    "sigmoid_binary_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
    "weighted",
]


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class SquaredError(Loss):
    r"""Half the squared error, :math:`\frac{1}{2n} \sum_i \|f_i - y_i\|^2`.

    The gradient is :math:`(f - y)/n`, the Hessian :math:`I/n`. Targets have the shape of the outputs; ``None`` means
    zeros. The instance is ``gnl.losses.squared_error``; ``optax.losses.l2_loss`` is the same before the reduction.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(gnl.losses.squared_error(jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [1.0]])))
        1.25
    """

    needs_targets: ClassVar[bool] = False

    def _values(self, outputs: jax.Array, targets: Any) -> jax.Array:
        return 0.5 * jnp.square(outputs - targets.astype(outputs.dtype))

    def _gradients(self, outputs: jax.Array, targets: Any) -> jax.Array:
        return outputs - targets.astype(outputs.dtype)

    def _hessian(self, outputs: jax.Array, targets: Any) -> Products:
        return diagonal_products(jnp.ones([], outputs.dtype))


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropy(Loss):
    r"""Cross-entropy of the softmax over the last axis, :math:`-\frac{1}{n} \sum_i \sum_k y_{ik} \log p_{ik}`.

    With :math:`p = \mathrm{softmax}(f)` and :math:`s = \sum_k y_k` (1 for a label), per example: the gradient is
    :math:`s p - y`, the Hessian :math:`s (\mathrm{diag}(p) - p p^T)`, its root
    :math:`\sqrt{s} (\mathrm{diag}(\sqrt{p}) - p \sqrt{p}^T)`. Targets are integer labels of shape (n, ...) for outputs
    (n, ..., c), or one-hot (or any non-negative) weights of shape (n, ..., c). Labels outside 0 .. c-1 give NaN. The
    instance is ``gnl.losses.softmax_cross_entropy``.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(gnl.losses.softmax_cross_entropy(jnp.zeros((2, 4)), jnp.array([3, 0])).round(4))
        1.3863
    """

    def _check_leaf(self, name: str, outputs: Any, targets: Any) -> None:
        if np.ndim(outputs) < 2 or np.shape(outputs)[-1] < 2:
            raise ValueError(
                f"the outputs of predict: {name} has shape {np.shape(outputs)}, but softmax_cross_entropy needs "
                "(n, ..., c) with at least two classes c on the last axis. For one logit per output use "
                "sigmoid_binary_cross_entropy."
            )
        integer = jnp.issubdtype(jnp.result_type(targets), jnp.integer)
        if integer and np.shape(targets) == np.shape(outputs)[:-1]:
            return
        if np.shape(targets) != np.shape(outputs):
            raise ValueError(
                f"targets: {name} has shape {np.shape(targets)} and dtype {jnp.result_type(targets)}, but the "
                f"outputs of predict have shape {np.shape(outputs)} there; softmax_cross_entropy needs integer labels "
                f"of shape {np.shape(outputs)[:-1]}, or one-hot targets of shape {np.shape(outputs)}."
            )

    def _weights(self, outputs: jax.Array, targets: Any) -> jax.Array:
        if np.shape(targets) == np.shape(outputs):
            return jnp.asarray(targets).astype(outputs.dtype)
        classes = np.shape(outputs)[-1]
        one_hot = jax.nn.one_hot(targets, classes, dtype=outputs.dtype)
        valid = (targets >= 0) & (targets < classes)
        return jnp.where(valid[..., None], one_hot, jnp.full_like(one_hot, jnp.nan))

    def _values(self, outputs: jax.Array, targets: Any) -> jax.Array:
        weights = self._weights(outputs, targets)
        # A weight of zero silences its class also at a log-probability of -inf (a logit of -inf masks a class).
        terms = weights * jax.nn.log_softmax(outputs)
        return -jnp.sum(jnp.where(weights == 0, jnp.zeros_like(terms), terms), axis=-1)

    def _gradients(self, outputs: jax.Array, targets: Any) -> jax.Array:
        weights = self._weights(outputs, targets)
        return jax.nn.softmax(outputs) * jnp.sum(weights, -1, keepdims=True) - weights

    def _hessian(self, outputs: jax.Array, targets: Any) -> Products:
        p = jax.nn.softmax(outputs)
        s = jnp.sum(self._weights(outputs, targets), -1, keepdims=True)
        root_p, root_s = jnp.sqrt(p), jnp.sqrt(s)

        def product(v: jax.Array) -> jax.Array:
            # Centred twice: p (v - <p, v>) loses no digits where p is close to a corner of the simplex.
            return s * p * (v - jnp.sum(p * v, -1, keepdims=True))

        def root(v: jax.Array) -> jax.Array:
            return root_s * (root_p * v - p * jnp.sum(root_p * v, -1, keepdims=True))

        def root_transpose(v: jax.Array) -> jax.Array:
            return root_s * root_p * (v - jnp.sum(p * v, -1, keepdims=True))

        return product, root, root_transpose


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class SigmoidBinaryCrossEntropy(Loss):
    r"""Binary cross-entropy of the logistic sigmoid, :math:`\frac{1}{n} \sum [\log(1 + e^f) - y f]`.

    With :math:`p = \sigma(f)`: the gradient is :math:`p - y`, the Hessian :math:`p (1 - p)`. Targets are labels or
    probabilities in [0, 1] of the shape of the outputs. The instance is ``gnl.losses.sigmoid_binary_cross_entropy``.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(gnl.losses.sigmoid_binary_cross_entropy(jnp.zeros(2), jnp.array([0, 1])).round(4))
        0.6931
    """

    def _values(self, outputs: jax.Array, targets: Any) -> jax.Array:
        y = targets.astype(outputs.dtype)
        return -y * jax.nn.log_sigmoid(outputs) - (1 - y) * jax.nn.log_sigmoid(-outputs)

    def _gradients(self, outputs: jax.Array, targets: Any) -> jax.Array:
        # y in two terms keeps the small gradient of a saturated, correct output: 1 - p is sigmoid(-f).
        y = targets.astype(outputs.dtype)
        return (1 - y) * jax.nn.sigmoid(outputs) - y * jax.nn.sigmoid(-outputs)

    def _hessian(self, outputs: jax.Array, targets: Any) -> Products:
        return diagonal_products(jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs))


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Poisson(Loss):
    r"""Poisson negative log-likelihood of log-rates, :math:`\frac{1}{n} \sum [e^f - y f]`, without :math:`\log y!`.

    The gradient is :math:`e^f - y`, the Hessian :math:`e^f`. Targets are counts of the shape of the outputs. The
    instance is ``gnl.losses.poisson``.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(gnl.losses.poisson(jnp.zeros(2), jnp.array([0, 3])))
        1.0
    """

    def _values(self, outputs: jax.Array, targets: Any) -> jax.Array:
        return jnp.exp(outputs) - targets.astype(outputs.dtype) * outputs

    def _gradients(self, outputs: jax.Array, targets: Any) -> jax.Array:
        return jnp.exp(outputs) - targets.astype(outputs.dtype)

    def _hessian(self, outputs: jax.Array, targets: Any) -> Products:
        return diagonal_products(jnp.exp(outputs))


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Huber(Loss):
    r"""Huber's loss: :math:`\frac12 r^2` for :math:`|r| \le \delta`, :math:`\delta (|r| - \frac12 \delta)` beyond.

    With :math:`r = f - y`: the gradient is :math:`r` clipped to :math:`\pm\delta`, the Hessian 1 inside and 0 outside.
    Targets have the shape of the outputs; ``None`` means zeros. ``optax.losses.huber_loss`` is the same before the
    reduction. Built by ``gnl.losses.huber``.

    Attributes:
        delta: where the quadratic ends, in units of the outputs; positive.
    """

    delta: Number = 1.0
    needs_targets: ClassVar[bool] = False

    def _values(self, outputs: jax.Array, targets: Any) -> jax.Array:
        delta = jnp.asarray(self.delta, outputs.dtype)
        size = jnp.abs(outputs - targets.astype(outputs.dtype))
        inside = jnp.minimum(size, delta)
        return 0.5 * jnp.square(inside) + delta * (size - inside)

    def _gradients(self, outputs: jax.Array, targets: Any) -> jax.Array:
        delta = jnp.asarray(self.delta, outputs.dtype)
        return jnp.clip(outputs - targets.astype(outputs.dtype), -delta, delta)

    def _hessian(self, outputs: jax.Array, targets: Any) -> Products:
        delta = jnp.asarray(self.delta, outputs.dtype)
        inside = jnp.abs(outputs - targets.astype(outputs.dtype)) <= delta
        return diagonal_products(inside.astype(outputs.dtype))


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weighted(Loss):
    r"""A loss with a weight for each example, :math:`\frac{1}{n} \sum_i w_i \ell(f_i, y_i)`.

    Targets are a pair ``(targets, weights)``: the weights have shape (n,), or are a pytree of such arrays like the
    outputs. A weight of zero leaves the example out (padding), whatever its outputs are, as long as they are finite;
    the sum is still divided by n. Built by ``gnl.losses.weighted``.

    Attributes:
        loss: one of the losses of this module, which treats examples one by one.
    """

    loss: Loss

    def _matched(self, outputs: Outputs, targets: Targets) -> Targets:
        if not (isinstance(targets, (tuple, list)) and len(targets) == 2):
            raise ValueError(
                f"targets: weighted needs the pair targets=(targets, weights), but got {_tree.described(targets)}."
            )
        inner, weights = targets
        inner = self.loss._matched(outputs, inner)
        check_structure(outputs, weights, "targets: weights")
        for (path, out), weight in zip(
            jax.tree_util.tree_leaves_with_path(outputs), jax.tree.leaves(weights), strict=True
        ):
            if np.shape(weight) != np.shape(out)[:1]:
                leaf = f" of {_tree.leaf_label(path)}" if path else ""
                raise ValueError(
                    f"targets: the weights{leaf} have shape {np.shape(weight)}, but the outputs "
                    f"have shape {np.shape(out)} there; weights need shape {np.shape(out)[:1]}, one per example."
                )
        return jax.tree.map(lambda _, target, weight: _WeightedTargets(target, weight), outputs, inner, weights)

    def _values(self, outputs: jax.Array, targets: "_WeightedTargets") -> jax.Array:
        values = self.loss._values(outputs, targets.targets)
        return _per_example(targets.weights, values) * values

    def _gradients(self, outputs: jax.Array, targets: "_WeightedTargets") -> jax.Array:
        return _per_example(targets.weights, outputs) * self.loss._gradients(outputs, targets.targets)

    def _hessian(self, outputs: jax.Array, targets: "_WeightedTargets") -> Products:
        product, root, root_transpose = self.loss._hessian(outputs, targets.targets)
        weight = _per_example(targets.weights, outputs)
        half = jnp.sqrt(weight)
        return (
            lambda v: weight * product(v),
            lambda v: half * root(v),
            lambda v: half * root_transpose(v),
        )


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class _WeightedTargets:
    targets: Any
    weights: Any


def _per_example(weights: Any, like: jax.Array) -> jax.Array:
    return jnp.reshape(weights, np.shape(weights) + (1,) * (np.ndim(like) - 1)).astype(like.dtype)


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class FromConvex(Loss):
    r"""Any convex callable as a loss, differentiated by JAX.

    The Hessian square root is taken numerically (an eigendecomposition for each example) and is offered for a single
    output array only. Built by ``gnl.losses.from_convex``.

    Attributes:
        fn: ``fn(outputs, targets)``, returning a scalar, or one value per example (n,), which is averaged.
    """

    fn: Callable[[Outputs, Targets], Any] = dataclasses.field(metadata={"static": True})

    def _matched(self, outputs: Outputs, targets: Targets) -> Targets:
        return targets

    def __call__(self, outputs: Outputs, targets: Targets = None) -> Scalar:
        """The value of the callable, averaged if it returns one value per example.

        Args:
            outputs: an array of shape (n, ...), or a pytree of such arrays.
            targets: whatever the callable takes.

        Returns:
            A scalar of at least float32.

        Raises:
            ValueError: the callable returns neither a scalar nor one value per example.
        """
        return self._value(outputs, targets)

    def _value(self, outputs: Outputs, targets: Targets) -> Scalar:
        value = jnp.asarray(self.fn(outputs, targets))
        rows = {np.shape(leaf)[0] for leaf in jax.tree.leaves(outputs)}
        if not jnp.issubdtype(value.dtype, jnp.floating) or (value.ndim and value.shape not in {(n,) for n in rows}):
            hint = " Check whether outputs and targets were broadcast against each other." if value.ndim else ""
            raise ValueError(
                f"loss: {shown(self.fn)} returned shape {value.shape} and dtype {value.dtype} for outputs of shape "
                f"{_tree.few(str(np.shape(leaf)) for leaf in jax.tree.leaves(outputs))}; it must return a float "
                f"scalar, or one float per example.{hint}"
            )
        return jnp.mean(widen(value))

    def _gradient(self, outputs: Outputs, targets: Targets) -> Outputs:
        return jax.grad(self._value)(outputs, targets)

    def _operator(self, outputs: Outputs, targets: Targets) -> OutputHessian:
        _, product = jax.linearize(lambda out: self._gradient(out, targets), outputs)

        def root(vector: Outputs) -> Outputs:
            return blockwise(block_roots(product, outputs), vector)

        def root_transpose(vector: Outputs) -> Outputs:
            return blockwise(jnp.swapaxes(block_roots(product, outputs), 1, 2), vector)

        return OutputHessian(product, root, root_transpose, closed_form=False)


squared_error = SquaredError()
"""Half the squared error, mean over examples; see ``SquaredError``."""
softmax_cross_entropy = SoftmaxCrossEntropy()
"""Cross-entropy of the softmax, integer labels or one-hot; see ``SoftmaxCrossEntropy``."""
sigmoid_binary_cross_entropy = SigmoidBinaryCrossEntropy()
"""Binary cross-entropy of the logistic sigmoid; see ``SigmoidBinaryCrossEntropy``."""
poisson = Poisson()
"""Poisson negative log-likelihood of log-rates; see ``Poisson``."""


def huber(delta: Number = 1.0) -> Huber:
    r"""Huber's loss, quadratic near zero and linear beyond: robust against outliers.

    .. math:: \ell(r) = \tfrac12 r^2 \text{ if } |r| \le \delta, \quad \delta (|r| - \tfrac12 \delta) \text{ otherwise.}

    Args:
        delta: where the quadratic ends, in units of the outputs; positive, may be traced.

    Returns:
        The loss; targets have the shape of the outputs.

    Raises:
        TypeError: ``delta`` is not a number.
        ValueError: ``delta`` is not positive and finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(gnl.losses.huber(1.0)(jnp.array([0.5, 3.0]), jnp.zeros(2)))
        1.3125

    References:
        Huber (1964), Robust estimation of a location parameter.
    """
    check_number(delta, "delta", positive=True)
    return Huber(delta)


def weighted(loss: Loss) -> Weighted:
    r"""A loss whose targets carry a weight for each example, ``targets=(targets, weights)``.

    .. math:: \frac{1}{n} \sum_i w_i \, \ell(f_i, y_i)

    Args:
        loss: one of the losses of this module.

    Returns:
        The weighted loss. Its weights have shape (n,). Negative ones, which are not checked, make it lose its
        convexity.

    Raises:
        TypeError: ``loss`` is a plain callable, which has no value for each example to weight.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> loss = gnl.losses.weighted(gnl.losses.squared_error)
        >>> print(loss(jnp.array([1.0, 9.0]), (jnp.zeros(2), jnp.array([1.0, 0.0]))))
        0.25
    """
    if not isinstance(loss, Loss) or isinstance(loss, FromConvex):
        raise TypeError(
            f"loss: weighted takes a loss of gnl.losses, but got {shown(loss)}; put the weights of a plain callable "
            "inside it, as part of its targets."
        )
    return Weighted(loss)


def from_convex(fn: Callable[[Outputs, Targets], Any]) -> Loss:
    """A loss from any callable that is convex in the outputs.

    Gradient and Hessian products come from automatic differentiation. The transforms call this themselves on a plain
    callable, so it is rarely needed. Convexity is not checked: a solver that meets negative curvature stops there and
    says so in its status.

    Args:
        fn: ``fn(outputs, targets)``, which returns a float scalar, or one float per example (n,), which is averaged.

    Returns:
        The loss. A loss of this module is returned as it is.

    Raises:
        TypeError: ``fn`` is not callable, or makes a loss instead of being one.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import gn_linear as gnl
        >>> loss = gnl.losses.from_convex(optax.losses.log_cosh)
        >>> print(loss(jnp.zeros(3), jnp.zeros(3)))
        0.0
    """
    if isinstance(fn, Loss):
        return fn
    if isinstance(fn, type) or fn is huber or fn is weighted:
        raise TypeError(f"loss: {fn.__name__} makes a loss; call it first, with its own arguments.")
    if not callable(fn):
        raise TypeError(f"loss must be a loss of gnl.losses or a callable loss(outputs, targets), but is {shown(fn)}.")
    return FromConvex(fn)
