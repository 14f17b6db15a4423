r"""Kronecker factors of the Gauss-Newton matrix, layer by layer, from one backward pass over a batch.

A weight in a matrix product takes its gradient as a sum over rows (examples, positions) of outer products
:math:`a b^\top` of what it multiplies and the cotangent of the result, so that its block of the Gauss-Newton matrix is
about :math:`\mathrm{E}[a a^\top] \otimes \sum b b^\top`. The whole batch is traced at once: examples may depend on each
other, and derivatives of the network by its inputs, as in physics-informed networks, are uses of its weights like any
other.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as prims

from gn_linear import _tree
from gn_linear._capture import evaluated
from gn_linear._typing import Inputs, Params, Predict
from gn_linear._uses import BIAS, PRODUCT, Program, Use, flattened, followed

_LAYOUTS = (prims.reshape_p, prims.transpose_p, prims.squeeze_p, prims.broadcast_in_dim_p, prims.convert_element_type_p)


class Block(NamedTuple):
    """A weight as a matrix, with the bias of its layer.

    Attributes:
        weight: the number of its leaf in tree order.
        bias: that of the leaf that is added to all its products, or None.
        uses: the places where it is used.
        swapped: for each use whether the columns of the matrix are contracted, as in ``W x``, instead of its rows, as
            in ``x W``.
        biased: for each use how often the bias is added there; less than zero where it is subtracted.
    """

    weight: int
    bias: int | None
    uses: tuple[Use, ...]
    swapped: tuple[bool, ...]
    biased: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Whether the bias belongs to the columns of the extended matrix."""
        return any(swapped and biased for swapped, biased in zip(self.swapped, self.biased, strict=True))


class Form(NamedTuple):
    """How factors are kept: as matrices, or those of wide sides by their diagonals and products with random signs.

    Attributes:
        widest: the widest side that is kept as a matrix.
        rank: how many products are kept of the others.
    """

    widest: int
    rank: int

    def is_sketch(self, side: jax.Array) -> bool:
        """Whether a factor is kept by its diagonal, in the first column, and its products, in the others."""
        return self.sketches(len(side) - 1)

    def sketches(self, width: int) -> bool:
        """Whether factors of so many rows, without that of the bias, are kept so."""
        return width > max(self.widest, self.rank)

    def shape(self, width: int) -> tuple[int, int]:
        """The shape of a factor of so many rows and one more."""
        return (width + 1, 1 + (self.rank if self.sketches(width) else width))

    def directions(self, side: jax.Array) -> jax.Array:
        """The signs that a factor is multiplied by, (rows + 1, rank); always the same."""
        return signs((len(side), self.rank), jnp.uint32(len(side))).astype(side.dtype)

    def trace(self, side: jax.Array) -> jax.Array:
        """The trace of a factor."""
        return jnp.sum(side[:, 0]) if self.is_sketch(side) else jnp.trace(side)


class Moments(NamedTuple):
    """The factors of a block, each with a last row and column for the bias: zeros on the side that has none.

    Attributes:
        left: (rows + 1, rows + 1), or what the ``Form`` keeps of it.
        right: (columns + 1, columns + 1), likewise.
        rows: examples and positions that were averaged over.
    """

    left: jax.Array
    right: jax.Array
    rows: int


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """A weight's shape as a matrix: its last axis against the others, or its first one if that looks like the outputs.

    Windows of convolutions tell: as a rule they are square, in front of the channels or behind them. The state of a
    preconditioner is made before any input is seen; what guesses wrong has no factors.

    Args:
        shape: of the leaf.

    Returns:
        Rows and columns; None for vectors and scalars.
    """
    if len(shape) < 2:
        return None
    in_front, behind = (len(shape) > 3 and len(set(window)) == 1 for window in (shape[:-2], shape[2:]))
    outputs_first = len(shape) > 2 and (behind if in_front != behind else shape[0] > shape[-1])
    return (shape[0], math.prod(shape[1:])) if outputs_first else (math.prod(shape[:-1]), shape[-1])


def blocks(program: Program, shapes: list[tuple[int, ...]]) -> list[Block]:
    """The weights that are used in nothing but matrix products and convolutions, as matrices.

    Args:
        program: the evaluation of a batch.
        shapes: of the leaves of the parameters.

    Returns:
        The blocks; leaves in none of them have no factors.
    """
    uses, spoiled = followed(program, shapes)
    found: list[Block] = []
    taken: set[int] = set()
    for k, shape in enumerate(shapes):
        matrix = matrix_shape(shape)
        if k in spoiled or not uses[k] or matrix is None or any(use.kind != PRODUCT for use in uses[k]):
            continue
        straight = np.arange(math.prod(shape), dtype=np.int32).reshape(matrix)
        swapped = [_is_transposed(use.index, straight) for use in uses[k]]
        if None in swapped:
            continue
        bias, biased = _bias_of(program, uses, {*spoiled, *taken}, k)
        if bias is not None and len({t for t, b in zip(swapped, biased, strict=True) if b}) > 1:
            bias, biased = None, (0,) * len(biased)
        if bias is not None:
            taken.add(bias)
        found.append(Block(k, bias, tuple(uses[k]), tuple(map(bool, swapped)), biased))
    return found


def _is_transposed(index: np.ndarray, straight: np.ndarray) -> bool | None:
    if np.array_equal(index, straight):
        return False
    return True if np.array_equal(index, straight.T) else None


def _bias_of(program: Program, uses: list[list[Use]], excluded: set[int], k: int) -> tuple[int | None, tuple[int, ...]]:
    """The leaf that is only ever added to products of leaf k, and how often to each of them."""
    steps = [use.step for use in uses[k]]
    columns = uses[k][0].index.shape[1]
    for other, places in enumerate(uses):
        if other in excluded or not places or any(use.kind != BIAS or use.index.size != columns for use in places):
            continue
        sources = [_source(program, use.step) for use in places]
        if all(source in steps for source in sources):
            signs = [-1 if program.steps[use.step].eqn.primitive is prims.sub_p else 1 for use in places]
            added = list(zip(sources, signs, strict=True))
            return other, tuple(sum(sign for source, sign in added if source == step) for step in steps)
    return None, (0,) * len(steps)


def _source(program: Program, number: int) -> int | None:
    """The step whose result an addition adds to, looked for behind changes of layout."""
    written = {slot: index for index, step in enumerate(program.steps[:number]) for slot in step.writes}
    for slot in program.steps[number].reads:
        while isinstance(slot, int) and slot in written:
            index = written[slot]
            step = program.steps[index]
            if step.eqn.primitive in (prims.dot_general_p, prims.conv_general_dilated_p):
                return index
            if step.eqn.primitive not in _LAYOUTS:
                break
            slot = step.reads[0]
    return None


class Layers(NamedTuple):
    """The evaluation of a batch, and the weights in it that have factors; static."""

    program: Program
    blocks: list[Block]

    def rows(self, block: Block) -> int:
        """Examples and positions at all uses of a weight."""
        results: list[Any] = [self.program.steps[use.step].eqn.outvars[0].aval for use in block.uses]
        return sum(math.prod(aval.shape) // use.index.shape[1] for aval, use in zip(results, block.uses, strict=True))


def layers(predict: Predict, params: Params, inputs: Inputs) -> Layers:
    """Trace a batch, and find the weights that have factors. Nothing is computed.

    Args:
        predict: the model.
        params: its parameters.
        inputs: the batch.

    Returns:
        The layers; if ``predict`` closes over traced arrays, they belong to their trace.
    """
    program = flattened(jax.make_jaxpr(predict)(params, inputs))
    return Layers(program, blocks(program, [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]))


def moments(
    found: Layers, params: Params, inputs: Inputs, vectors: Callable[[Any], Any], form: Form
) -> tuple[dict[int, Moments], list[jax.Array]]:
    """The factors of a batch, and of all that has none the squares of its derivatives.

    Args:
        found: from ``layers``.
        params: the parameters.
        inputs: the batch.
        vectors: from the leaves of the outputs to output cotangents like them, with an axis of samples in front, whose
            second moments are the Hessian of the loss.
        form: of the factors.

    Returns:
        From the numbers of the weights to their factors; and, leaf by leaf, an estimate of the diagonal of the
        Gauss-Newton matrix, zero for what has factors.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
    program, weights = found.program, {block.weight: block for block in found.blocks}
    inside = {*weights, *(block.bias for block in found.blocks)}
    tapped = sorted({use.step for block in found.blocks for use in block.uses})
    results: list[Any] = [program.steps[number].eqn.outvars[0].aval for number in tapped]
    taps = {number: jnp.zeros(aval.shape, aval.dtype) for number, aval in zip(tapped, results, strict=True)}
    direct = {k: leaf for k, leaf in enumerate(leaves) if k not in inside}
    uses = tuple(weights[k].uses if k in weights else () for k in range(len(leaves)))

    def run(taps: dict[int, Any], direct: dict[int, Any]) -> tuple[Any, Any]:
        moved = [direct.get(k, leaf) for k, leaf in enumerate(leaves)]
        return evaluated(program, uses, [*moved, *jax.tree.leaves(inputs)], taps)

    outputs, pull, recorded = jax.vjp(run, taps, direct, has_aux=True)
    by_taps, gradients = jax.vmap(pull)(vectors(outputs))
    factors = {k: _moments_of(block, recorded[k], by_taps, form) for k, block in weights.items()}
    squares = [
        jnp.sum(jnp.square(_wide(gradients[k])), axis=0) if k in direct else jnp.zeros(leaf.shape, _wide(leaf).dtype)
        for k, leaf in enumerate(leaves)
    ]
    return factors, squares


def signs(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Signs that are random enough to average over, at the price of an addition.

    A network's outputs are many, and the generators of ``jax.random`` would cost more than the backward pass that
    their signs are for.

    Args:
        shape: how many.
        seed: an unsigned integer.

    Returns:
        An array of -1 and 1, int32, of the shape.
    """
    bits = jax.lax.iota(jnp.uint32, math.prod(shape)) + seed * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return 1 - 2 * (bits >> 31).astype(jnp.int32).reshape(shape)


def _moments_of(block: Block, recorded: list[jax.Array], by_taps: dict[int, Any], form: Form) -> Moments:
    """The factors of a block over all its uses.

    A sum of Kronecker products is none: each is balanced (both factors of equal trace), and the product of the sums
    is given the trace of the sum of the products.

    Args:
        block: the weight.
        recorded: what it multiplies, for each use.
        by_taps: cotangents of the results of its steps.
        form: of the factors.

    Returns:
        The factors; of a single use as they are.
    """
    sides, rows = [], 0
    for use, activation, swapped, biased in zip(block.uses, recorded, block.swapped, block.biased, strict=True):
        cotangent = _tree.whole(jax.vmap(use.cotangent)(by_taps[use.step]))
        extended = jnp.pad(activation, ((0, 0), (0, 1)), constant_values=biased)
        contracted = _moment(extended, form) / max(len(activation), 1)
        free = _moment(jnp.pad(cotangent.reshape(-1, cotangent.shape[-1]), ((0, 0), (0, 1))), form)
        sides.append((free, contracted) if swapped else (contracted, free))
        rows += len(activation)
    if len(sides) == 1:
        left, right = sides[0]
        return Moments(left, right, rows)
    balanced = []
    for left, right in sides:
        tall, wide = form.trace(left), form.trace(right)
        ratio = jnp.sqrt(jnp.where((tall > 0) & (wide > 0), wide / jnp.where(tall > 0, tall, 1), 1))
        balanced.append((left * ratio, right / jnp.where(ratio > 0, ratio, 1), tall * wide))
    left, right = (functools.reduce(jnp.add, [side[k] for side in balanced]) for k in (0, 1))
    whole = functools.reduce(jnp.add, [side[2] for side in balanced])
    both = form.trace(left) * form.trace(right)
    return Moments(left, right * jnp.where(both > 0, whole / jnp.where(both > 0, both, 1), 0), rows)


def _moment(rows: jax.Array, form: Form) -> jax.Array:
    """The sum of outer products of rows."""
    rows = _tree.whole(_wide(rows))
    if not form.is_sketch(rows.T):
        return rows.T @ rows
    diagonal = jnp.sum(jnp.square(rows), axis=0)
    return jnp.concatenate([diagonal[:, None], rows.T @ (rows @ form.directions(rows.T))], axis=1)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(_tree.at_least_float32(x.dtype))
