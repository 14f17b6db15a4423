r"""The Jacobian and its Gram matrix as arrays, for the dense solvers.

Where examples can be told apart by the shapes alone, each is evaluated by itself, which takes them to be independent;
otherwise rows are pulled back through the whole batch, which is always right and costs a factor of its size.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gn_linear import _capture, _tree
from gn_linear._linearise import Linearisation
from gn_linear._typing import Inputs, Outputs, Params, Predict
from gn_linear._xla_cpu import in_fast_forms

ROWS_AT_ONCE = 32
"""How many rows of a Jacobian are pulled back together where examples cannot be told apart."""


def jacobian(predict: Predict, params: Params, inputs: Inputs, linearisation: Linearisation) -> jax.Array:
    """The Jacobian of all outputs by all parameters, in the widest dtype of the solve.

    Args:
        predict: the model.
        params: where it is linearised.
        inputs: the batch.
        linearisation: of the model there.

    Returns:
        Shape (outputs, parameters), rows and columns in the order of ``jax.tree.leaves``, raveled.
    """
    outputs = linearisation.outputs
    lengths = _lengths(predict, params, inputs, outputs)
    if not lengths:
        return of_batch(params, linearisation)
    found = {length: iter(_rows_by_example(predict, params, inputs, outputs, length)) for length in lengths}
    blocks = [next(found[leaf.shape[0]]) for leaf in jax.tree.leaves(outputs)]
    wide = [_tree.whole(block) for block in blocks]
    return jnp.concatenate([block.reshape(block.shape[0] * block.shape[1], block.shape[2]) for block in wide])


def gram(predict: Predict, params: Params, inputs: Inputs, linearisation: Linearisation) -> jax.Array:
    r"""The Gram matrix :math:`J J^T`, without the Jacobian where all outputs share the axis of examples.

    Args:
        predict: the model.
        params: where it is linearised.
        inputs: the batch.
        linearisation: of the model there.

    Returns:
        Shape (outputs, outputs), in the order of ``jacobian`` and its dtype.
    """
    outputs = linearisation.outputs
    lengths = _lengths(predict, params, inputs, outputs)
    if not jax.tree.leaves(params) or lengths is None or len(lengths) != 1:
        rows = jacobian(predict, params, inputs, linearisation)
        return jnp.matmul(rows, rows.T, precision="highest")
    kernel = _tree.whole(_capture.gram(_capture.capture(predict, params, inputs)))
    size, count = kernel.shape[0] * kernel.shape[1], kernel.shape[1]
    widths = [math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(outputs)]
    places = np.arange(size).reshape(kernel.shape[0], count)
    # The kernel's rows go through the leaves of each example, ours through the examples of each leaf.
    order = np.concatenate([part.ravel() for part in np.split(places, np.cumsum(widths)[:-1], axis=1)])
    matrix = kernel.reshape(size, size).astype(_tree.scalar_dtype(params))
    return matrix if len(widths) == 1 else matrix[order][:, order]


def _lengths(predict: Predict, params: Params, inputs: Inputs, outputs: Outputs) -> tuple[int, ...] | None:
    """The leading axes of the outputs, if the model takes one example of each at a time; known from shapes alone."""
    leaves = jax.tree.leaves(inputs)
    numbers = [hasattr(x, "shape") and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    if not leaves or not all(numbers):
        return None
    lengths, others = ({np.shape(x)[:1] for x in tree} for tree in (leaves, jax.tree.leaves(outputs)))
    if lengths != others or lengths & {(), (0,)}:
        return None
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), x.dtype), inputs)
    try:
        alone = jax.eval_shape(predict, params, one)
    except (TypeError, ValueError, IndexError, AssertionError, RuntimeError):  # such as for a random key cut in two
        return None
    expected = jax.tree.map(lambda x: (1, *x.shape[1:]), outputs)
    return tuple(sorted(n for (n,) in lengths)) if jax.tree.map(lambda x: x.shape, alone) == expected else None


def _rows_by_example(
    predict: Predict, params: Params, inputs: Inputs, outputs: Outputs, length: int
) -> list[jax.Array]:
    """For each leaf of the outputs with so many examples its rows, (examples, entries, parameters)."""
    leaves, structure = jax.tree.flatten(inputs)
    varied, wanted = ([np.shape(x)[0] == length for x in tree] for tree in (leaves, jax.tree.leaves(outputs)))

    def example(own: list[Any]) -> list[jax.Array]:
        ones = iter(own)
        # Of inputs with another number of examples, such as points on the boundary, the first stands for all.
        batch = [next(ones)[None] if mine else x[:1] for x, mine in zip(leaves, varied, strict=True)]

        def model(p: Params) -> list[jax.Array]:
            found = jax.tree.leaves(predict(p, jax.tree.unflatten(structure, batch)))
            return [y for y, ours in zip(found, wanted, strict=True) if ours]

        return _rows(model, params)

    return jax.vmap(example)([x for x, mine in zip(leaves, varied, strict=True) if mine])


def _rows(model: Callable[[Params], list[jax.Array]], params: Params) -> list[jax.Array]:
    """The rows of one example, (entries, parameters) for each output."""
    dtype = _tree.scalar_dtype(params)
    outputs, pullback = jax.vjp(model, params)
    pull = in_fast_forms(lambda cotangents: pullback(cotangents)[0], outputs)

    def pulled(index: int, unit: jax.Array) -> jax.Array:
        parts = [unit.reshape(y.shape) if i == index else jnp.zeros_like(y) for i, y in enumerate(outputs)]
        return _tree.flatten(pull(parts), dtype)

    units = [jnp.eye(y.size, dtype=y.dtype) for y in outputs]
    return [jax.vmap(lambda unit, i=i: pulled(i, unit))(rows) for i, rows in enumerate(units)]


def of_batch(params: Params, linearisation: Linearisation) -> jax.Array:
    """The Jacobian row by row through the whole batch, or column by column where there are fewer parameters."""
    leaves, structure = jax.tree.flatten(linearisation.outputs)
    ends = np.cumsum([leaf.size for leaf in leaves])
    size = int(ends[-1]) if leaves else 0
    dtype, count = _tree.scalar_dtype(params), sum(np.size(leaf) for leaf in jax.tree.leaves(params))

    if count < size:
        units = jnp.eye(count, dtype=dtype)
        return _mapped(lambda unit: _tree.flatten(linearisation.jvp(_tree.unflatten(unit, params)), dtype), units).T

    def row(index: jax.Array) -> jax.Array:
        parts = [
            jax.nn.one_hot(index - (end - leaf.size), leaf.size, dtype=leaf.dtype).reshape(leaf.shape)
            for leaf, end in zip(leaves, ends, strict=True)
        ]
        return _tree.flatten(linearisation.vjp(jax.tree.unflatten(structure, parts)), dtype)

    return _mapped(row, jnp.arange(size))


def _mapped(function: Callable[[jax.Array], jax.Array], units: jax.Array) -> jax.Array:
    """A function of each unit, of a few at once; without a loop if that is all."""
    if len(units) <= ROWS_AT_ONCE:
        return jax.vmap(function)(units)
    return jax.lax.map(function, units, batch_size=ROWS_AT_ONCE)
