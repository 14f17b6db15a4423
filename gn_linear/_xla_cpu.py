"""Four detours around XLA's CPU compiler, which change what it compiles and not what is computed.

- A sum or maximum behind a chain of matrix products is fused with all of them into one kernel that runs on a fraction
  of the machine (a product of a perceptron's Gauss-Newton matrix took 2.7 gradients instead of 1.2). ``fence`` ends the
  fusion at the model's outputs.
- Convolutions inside loops and branches are fast only in the layout NHWC, HWIO, NHWC; elsewhere the compiler brings
  them into it, there it does not. Their transposes, which backward passes consist of, come in other layouts (six times
  slower). ``in_fast_forms`` transposes their operands.
- Sums over an axis of a few entries, as derivatives of a network by its inputs are full of, are kernels of their own,
  and slow ones (a backward pass of a Poisson network took 8 ms instead of 1.2, a thousand fits of three
  peaks 0.7 s instead of 0.2). ``in_fast_forms`` writes them out.
- Sums and maxima over the rows of a wide matrix are slow kernels too (of 256 x 17,025 entries 35 to 40 ms each, instead
  of 3). ``folded`` combines one half of the rows with the other until one is left.

On other platforms they return what they are given. The platform is JAX's default backend; where a computation goes to
another device than that, only speed is at stake.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core.primitives import conv_general_dilated_p, reduce_sum_p

_FEW = 8
"""Entries of a sum that are added one by one."""
_LONG = 2**12
"""Entries of a row from which on rows are combined by halves."""


def fence(outputs: Any) -> Any:
    """The same outputs, which no compiler fuses with what follows; so are their tangents and cotangents.

    Args:
        outputs: a pytree of arrays; what is not floating-point is left alone.

    Returns:
        The outputs, to the bit.
    """
    if jax.default_backend() != "cpu":
        return outputs
    return jax.tree.map(_to_its_own_precision, outputs)


def folded(combine: Callable[[jax.Array, jax.Array], jax.Array], rows: jax.Array) -> jax.Array:
    """The sum or maximum over the rows of a matrix.

    Args:
        combine: ``jnp.add`` or ``jnp.maximum``, of two arrays.
        rows: a matrix without negative entries.

    Returns:
        One row; zeros if there is none.
    """
    spread = any(axis is not None for axis in jax.typeof(rows).sharding.spec)
    if len(rows) < 2 or rows.shape[1] < _LONG or spread or jax.default_backend() != "cpu":
        return jnp.sum(rows, axis=0) if combine is jnp.add else jnp.max(rows, axis=0, initial=0.0)
    while len(rows) > 1:
        half = (len(rows) + 1) // 2
        rows = combine(rows[:half], jnp.pad(rows[half:], [(0, 2 * half - len(rows)), (0, 0)]))
    return rows[0]


def _to_its_own_precision(leaf: Any) -> Any:
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        return leaf
    precision = jnp.finfo(dtype)
    return jax.lax.reduce_precision(leaf, exponent_bits=precision.nexp, mantissa_bits=precision.nmant)


def in_fast_forms(function: Callable[[Any], Any], example: Any) -> Callable[[Any], Any]:
    """``function`` with its convolutions and short sums in the forms that XLA on CPU runs fast everywhere.

    Args:
        function: of one pytree of arrays; it is traced here and not called again.
        example: a pytree of the structure, shapes and dtypes of its argument.

    Returns:
        A function of the same values up to the order of summation; the same one if there is nothing to do.
    """
    if jax.default_backend() != "cpu":
        return function
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(example)
    if not _has_slow_forms(traced.jaxpr):
        return function

    def rewritten(argument: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(shapes), _evaluate(traced, jax.tree.leaves(argument)))

    return rewritten


def _has_slow_forms(jaxpr: core.Jaxpr) -> bool:
    return any(
        _is_other_convolution(eqn)
        or _is_short_sum(eqn)
        or (_is_plain_call(eqn) and _has_slow_forms(eqn.params["jaxpr"].jaxpr))
        for eqn in jaxpr.eqns
    )


def _is_plain_call(eqn: core.JaxprEqn) -> bool:
    """Whether an equation is a jitted function that says nothing about devices."""
    shardings = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    return eqn.primitive.name in ("jit", "pjit") and not any(isinstance(s, jax.sharding.Sharding) for s in shardings)


def _is_other_convolution(eqn: core.JaxprEqn) -> bool:
    if eqn.primitive is not conv_general_dilated_p:
        return False
    layout = eqn.params["dimension_numbers"]
    return layout != _plain_layout(len(layout.out_spec))


def _is_short_sum(eqn: core.JaxprEqn) -> bool:
    if eqn.primitive is not reduce_sum_p:
        return False
    terms: Any = eqn.invars[0].aval
    axes = eqn.params["axes"]
    if terms.dtype not in (jnp.float32, jnp.float64) or any(terms.sharding.spec[axis] is not None for axis in axes):
        return False
    return 1 <= math.prod(terms.shape[axis] for axis in axes) <= _FEW


def _plain_layout(rank: int) -> jax.lax.ConvDimensionNumbers:
    """Batch, space, feature; and for the kernel space, input feature, output feature."""
    space = tuple(range(1, rank - 1))
    data = (0, rank - 1, *space)
    return jax.lax.ConvDimensionNumbers(data, (rank - 1, rank - 2, *range(rank - 2)), data)


def _evaluate(closed: core.ClosedJaxpr, arguments: list[Any]) -> list[Any]:
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *arguments], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if _is_other_convolution(eqn):
            results = [_plain_convolution(*operands, **eqn.params)]
        elif _is_short_sum(eqn):
            results = [_added(operands[0], tuple(map(int, eqn.params["axes"])))]
        elif _is_plain_call(eqn):
            results = _evaluate(eqn.params["jaxpr"], operands)
        else:
            with eqn.ctx.manager:
                results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
            results = results if eqn.primitive.multiple_results else [results]
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _plain_convolution(
    data: jax.Array, kernel: jax.Array, *, dimension_numbers: jax.lax.ConvDimensionNumbers, **params: Any
) -> jax.Array:
    lhs, rhs, out = dimension_numbers
    plain = _plain_layout(data.ndim)
    result = conv_general_dilated_p.bind(
        jnp.transpose(data, (lhs[0], *lhs[2:], lhs[1])),
        jnp.transpose(kernel, (*rhs[2:], rhs[1], rhs[0])),
        dimension_numbers=plain,
        **params,
    )
    place = {axis: position for position, axis in enumerate((out[0], *out[2:], out[1]))}
    return jnp.transpose(result, [place[axis] for axis in range(data.ndim)])


def _added(terms: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A sum over a few entries, one by one."""
    kept = [length for axis, length in enumerate(terms.shape) if axis not in axes]
    parts = jnp.moveaxis(terms, axes, range(len(axes))).reshape(-1, *kept)
    return functools.reduce(jnp.add, parts)
