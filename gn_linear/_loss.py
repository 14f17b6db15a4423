"""What every loss in output space has in common: reductions, checks, and its derivative in closed form."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from gn_linear import _tree
from gn_linear._typing import Outputs, Scalar, Targets


def widen(x: Any) -> jax.Array:
    return jnp.asarray(x).astype(_tree.at_least_float32(jnp.result_type(x)))


def examples(outputs: Any) -> int:
    return max(np.shape(outputs)[0], 1)


class Loss:
    """A convex loss in output space.

    Calling it gives the value, a scalar of at least float32. The other methods take the same arguments and return
    arrays shaped like the outputs. A loss that treats its outputs leaf by leaf defines ``_values``, ``_gradients`` and
    ``_hessian`` on one array of shape (n, ...), unscaled; the mean over examples is taken here.
    """

    needs_targets: ClassVar[bool] = True

    def __call__(self, outputs: Outputs, targets: Targets = None) -> Scalar:
        """The value: mean over examples, sum over outputs, sum over leaves.

        Args:
            outputs: an array of shape (n, ...), or a pytree of such arrays whose n may differ.
            targets: what to compare them with, as the class says.

        Returns:
            A scalar of at least float32.

        Raises:
            ValueError: outputs and targets do not fit; both shapes are given.
        """
        return _value(self, outputs, self._matched(outputs, targets))

    def gradient(self, outputs: Outputs, targets: Targets = None) -> Outputs:
        """The gradient with respect to the outputs, like the outputs in structure, shape and dtype.

        Args:
            outputs: as in the call.
            targets: as in the call.

        Returns:
            The gradient, 1/n inside.
        """
        return self._gradient(outputs, self._matched(outputs, targets))

    def hessian(self, outputs: Outputs, targets: Targets = None) -> "OutputHessian":
        """The Hessian with respect to the outputs as an operator, what it needs computed once.

        Args:
            outputs: as in the call.
            targets: as in the call.

        Returns:
            Its product, and the products with a square root of it and with the transpose of that.
        """
        return self._operator(outputs, self._matched(outputs, targets))

    def hessian_product(self, outputs: Outputs, targets: Targets, vector: Outputs) -> Outputs:
        """``H v`` for one vector; ``hessian`` serves many.

        Args:
            outputs: as in the call.
            targets: as in the call.
            vector: a pytree like the outputs.

        Returns:
            The product, like ``vector``.
        """
        return self.hessian(outputs, targets).product(vector)

    def _matched(self, outputs: Outputs, targets: Targets) -> Targets:
        """The targets as a pytree that has one entry for each output leaf, after checking the shapes."""
        if targets is None:
            if self.needs_targets:
                raise ValueError(
                    f"targets is None, but {type(self).__name__} compares the outputs with targets; pass targets=. "
                    "Only squared_error and huber take None, which means zeros."
                )
            return jax.tree.map(jnp.zeros_like, outputs)
        check_structure(outputs, targets)
        for (path, out), target in zip(
            jax.tree_util.tree_leaves_with_path(outputs), jax.tree.leaves(targets), strict=True
        ):
            self._check_leaf(_tree.leaf_label(path), out, target)
        return targets

    def _check_leaf(self, name: str, outputs: Any, targets: Any) -> None:
        if np.shape(outputs) != np.shape(targets):
            raise ValueError(_shape_message(self, name, outputs, targets))

    def _value(self, outputs: Outputs, targets: Targets) -> Scalar:
        def leaf(out: Any, target: Any) -> jax.Array:
            return jnp.sum(self._values(widen(out), target)) / examples(out)

        return _tree.map_scalars(leaf, outputs, targets)

    def _gradient(self, outputs: Outputs, targets: Targets) -> Outputs:
        def leaf(out: Any, target: Any) -> jax.Array:
            return (self._gradients(widen(out), target) / examples(out)).astype(out.dtype)

        return jax.tree.map(leaf, outputs, targets)

    def _operator(self, outputs: Outputs, targets: Targets) -> "OutputHessian":
        leaves, structure = jax.tree.flatten(outputs)
        parts = [
            self._hessian(widen(out), target)
            for out, target in zip(leaves, structure.flatten_up_to(targets), strict=True)
        ]

        def mapped(which: int, root: bool) -> Callable[[Outputs], Outputs]:
            def apply(vector: Outputs) -> Outputs:
                results = [
                    (part[which](widen(v)) * _mean_factor(out, root)).astype(v.dtype)
                    for part, out, v in zip(parts, leaves, structure.flatten_up_to(vector), strict=True)
                ]
                return jax.tree.unflatten(structure, results)

            return apply

        return OutputHessian(mapped(0, False), mapped(1, True), mapped(2, True))

    def _values(self, outputs: jax.Array, targets: Any) -> jax.Array:
        """The loss of each output or of each example; summed by the caller."""
        raise NotImplementedError

    def _gradients(self, outputs: jax.Array, targets: Any) -> jax.Array:
        """The gradient of the sum of ``_values``."""
        raise NotImplementedError

    def _hessian(self, outputs: jax.Array, targets: Any) -> "Products":
        """The products H v, B v and B^T v with the Hessian of the sum of ``_values``."""
        raise NotImplementedError


def _mean_factor(outputs: Any, root: bool) -> float:
    return 1.0 / (examples(outputs) ** 0.5 if root else examples(outputs))


Product = Callable[[Any], Any]
Products = tuple[Product, Product, Product]


@dataclasses.dataclass(frozen=True)
class OutputHessian:
    """The Hessian ``H = B B^T`` of a loss in output space.

    Attributes:
        product: ``v -> H v``.
        root: ``v -> B v``, ``v`` shaped like the outputs.
        root_transpose: ``v -> B^T v``.
        closed_form: whether the square root is; if not, each product with it costs an eigendecomposition of each
            example's block, and where blocks cannot be told it is an error.
    """

    product: Callable[[Outputs], Outputs]
    root: Callable[[Outputs], Outputs]
    root_transpose: Callable[[Outputs], Outputs]
    closed_form: bool = True


@jax.custom_jvp
def _value(loss: Loss, outputs: Outputs, targets: Targets) -> Scalar:
    """The value of a loss, whose derivative by the outputs is the closed form."""
    return loss._value(outputs, targets)


def _value_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Scalar, Scalar]:
    loss, outputs, targets = primals
    is_zero = _is_symbolic_zero
    value = loss._value(outputs, targets)
    slope = jnp.zeros_like(value)
    if not all(map(is_zero, jax.tree.leaves((tangents[0], tangents[2]), is_leaf=is_zero))):
        dense = jax.tree.map(_dense_tangent, (tangents[0], tangents[2]), (loss, targets), is_leaf=is_zero)
        slope += jax.jvp(lambda a, c: a._value(outputs, c), (loss, targets), dense)[1]
    gradient = loss._gradient(outputs, targets)
    for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(tangents[1], is_leaf=is_zero), strict=True):
        if not is_zero(d):
            slope += jnp.sum(widen(g) * widen(d)).astype(value.dtype)
    return value, slope


def _is_symbolic_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _dense_tangent(tangent: Any, primal: Any) -> Any:
    if not _is_symbolic_zero(tangent):
        return tangent
    return np.zeros(tangent.shape, tangent.dtype)


_value.defjvp(_value_jvp, symbolic_zeros=True)


def check_structure(outputs: Outputs, targets: Targets, argument: str = "targets") -> None:
    if jax.tree.structure(targets) != jax.tree.structure(outputs):
        name, hint = argument.split()[-1], ""
        if jax.tree_util.all_leaves([outputs]) and isinstance(targets, list):
            hint = f" A list is a tree of its items; pass jnp.asarray({name})."
        elif jax.tree_util.all_leaves([outputs]) and isinstance(targets, tuple) and len(targets) == 2:
            hint = " A pair (targets, weights) is for a loss of gnl.losses.weighted."
        raise ValueError(
            f"{argument} must have the tree structure of the outputs of predict, but "
            f"{_tree.difference(targets, outputs, name, 'the outputs')}.{hint}"
        )


def _shape_message(loss: Loss, name: str, outputs: Any, targets: Any) -> str:
    hint = "Reshape one of them; nothing is broadcast."
    if np.size(outputs) == np.size(targets):
        hint = f"Use targets.reshape({np.shape(outputs)}), or drop the axis in predict; nothing is broadcast."
    return (
        f"targets: {name} has shape {np.shape(targets)}, but the outputs of predict have shape "
        f"{np.shape(outputs)} there; {type(loss).__name__} needs the same shape. {hint}"
    )


def diagonal_products(diagonal: jax.Array) -> Products:
    """The products with a diagonal Hessian, its root and the transpose of that.

    Args:
        diagonal: of the Hessian, an array like the outputs.

    Returns:
        The products.
    """
    root = jnp.sqrt(diagonal)
    return lambda v: diagonal * v, lambda v: root * v, lambda v: root * v


def block_roots(product: Product, outputs: Outputs) -> jax.Array:
    """Square roots (n, c, c) of the Hessian's blocks, one for each example, from c products."""
    if not isinstance(outputs, jax.Array):
        raise NotImplementedError(
            "loss: the Hessian square root of a plain callable is offered for a single output array, a jax.Array; the "
            f"outputs are {_tree.described(outputs)}. Use a loss of gnl.losses, or concatenate the outputs."
        )
    n, columns = outputs.shape[0], math.prod(outputs.shape[1:])

    def column(unit: jax.Array) -> jax.Array:
        rows = jnp.broadcast_to(unit, (n, columns)).reshape(outputs.shape).astype(outputs.dtype)
        return widen(product(rows)).reshape(n, columns)

    blocks = jnp.stack([column(unit) for unit in jnp.eye(columns)], axis=-1)
    values, vectors = jnp.linalg.eigh(blocks)
    return vectors * jnp.sqrt(jnp.maximum(values, jnp.zeros_like(values)))[:, None, :]


def blockwise(blocks: jax.Array, vector: jax.Array) -> jax.Array:
    """The product of a matrix (n, c, c) for each example with its outputs, shaped like them."""
    rows = widen(vector).reshape(blocks.shape[:2])
    return jnp.einsum("nij,nj->ni", blocks, rows).reshape(vector.shape).astype(vector.dtype)
