"""Where the parameters of a network are used: its trace without calls, and the parameters followed through it.

Every parameter is followed through changes of layout to the equations that it enters. Matrix products, convolutions and
additions are linear in it and taken apart; whatever else touches it is the reason why it is not. Functions with custom
derivatives are equations like any other: to look inside would bypass their rules.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as prims

from gn_linear import _tree

PRODUCT, BIAS, GRADIENT, NONE = "product", "bias", "gradient", "none"

_CALLS = (prims.jit_p, prims.remat_p, prims.closed_call_p, prims.call_p)
_ADDITIONS = (prims.add_p, prims.add_jaxvals_p, prims.sub_p)
_UNCHANGED = (prims.copy_p, prims.name_p, prims.sharding_constraint_p, prims.device_put_p)


class Step(NamedTuple):
    """One equation of a program without calls: it reads slots or literals, and writes slots."""

    eqn: core.JaxprEqn
    reads: tuple[Any, ...]
    writes: tuple[int, ...]


class Program(NamedTuple):
    """A computation without calls; its arguments are the leaves of the parameters and then those of one example."""

    steps: list[Step]
    constants: dict[int, Any]
    arguments: tuple[int, ...]
    results: tuple[Any, ...]


class Use(NamedTuple):
    """One place where a leaf enters linearly.

    ``index`` says which entry of the leaf stands where: in a matrix, contracted by free entries, for products; in the
    leaf's own order for biases. ``activation`` maps the operands of the equation to (T, I), ``cotangent`` that of its
    result to (T, O), or to (O,) for biases.
    """

    kind: str
    index: np.ndarray
    activation: Callable[[list[Any]], jax.Array] | None
    cotangent: Callable[[jax.Array], jax.Array]
    step: int = -1


def flattened(closed: core.ClosedJaxpr) -> Program:
    """The same computation without calls and without what the results do not need."""
    # Variables get numbers of their own in each call, for two calls of one jitted function share their variables.
    slots = itertools.count()
    steps, constants = [], {}

    def visit(inner: core.ClosedJaxpr, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        held = dict(zip(inner.jaxpr.invars, arguments, strict=True))
        for var, value in zip(inner.jaxpr.constvars, inner.consts, strict=True):
            held[var] = next(slots)
            constants[held[var]] = value

        def read(atom: Any) -> Any:
            return atom if isinstance(atom, core.Literal) else held[atom]

        for eqn in inner.jaxpr.eqns:
            reads, body = tuple(map(read, eqn.invars)), _body(eqn)
            if body is None:
                writes = tuple(next(slots) for _ in eqn.outvars)
                steps.append(Step(eqn, reads, writes))
            else:
                writes = visit(body, reads)
            held.update(zip(eqn.outvars, writes, strict=True))
        return tuple(map(read, inner.jaxpr.outvars))

    arguments = tuple(next(slots) for _ in closed.jaxpr.invars)
    results = visit(closed, arguments)
    needed, live = {slot for slot in results if isinstance(slot, int)}, []
    for step in reversed(steps):
        if step.eqn.effects or needed.intersection(step.writes):
            live.append(step)
            needed.update(slot for slot in step.reads if isinstance(slot, int))
    return Program(live[::-1], constants, arguments, results)


def _body(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """What a plain call computes; None for every other equation."""
    if eqn.primitive not in _CALLS:
        return None
    bodies = [value for value in eqn.params.values() if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]
    if len(bodies) != 1:
        return None
    closed = bodies[0] if isinstance(bodies[0], core.ClosedJaxpr) else core.ClosedJaxpr(bodies[0], ())
    fits = len(closed.jaxpr.constvars) == len(closed.consts) and len(closed.jaxpr.invars) == len(eqn.invars)
    return closed if fits else None


# --- the uses of each parameter --------------------------------------------------------------------------------------


def followed(program: Program, shapes: list[tuple[int, ...]]) -> tuple[list[list[Use]], dict[int, str]]:
    """All uses of each leaf, and for leaves with a use that is not taken apart the reason."""
    # What is followed is an array of the entries' numbers: moving them like the entries needs no algebra of layouts.
    aliases = {
        slot: (k, np.arange(math.prod(shape), dtype=np.int32).reshape(shape))
        for k, (slot, shape) in enumerate(zip(program.arguments, shapes, strict=False))
    }
    uses: list[list[Use]] = [[] for _ in shapes]
    spoiled: dict[int, str] = {}
    for number, step in enumerate(program.steps):
        eqn, places = step.eqn, [place for place, slot in enumerate(step.reads) if isinstance(slot, int)]
        held = {place: aliases[step.reads[place]] for place in places if step.reads[place] in aliases}
        if eqn.primitive is prims.stop_gradient_p or not eqn.outvars:
            continue
        for place, (k, index) in held.items():
            moved = _moved(eqn, place, index)
            if moved is not None:
                aliases[step.writes[place]] = (k, moved)
                continue
            use = _recognised(eqn, place, index, len(held), math.prod(shapes[k]))
            if isinstance(use, str):
                spoiled.setdefault(k, use)
            else:
                uses[k].append(use._replace(step=number))
    for slot in program.results:
        if isinstance(slot, int) and slot in aliases:
            spoiled.setdefault(aliases[slot][0], "it is an output")
    return uses, spoiled


def verdict(uses: list[Use], spoiled: str) -> tuple[str, str]:
    """Kind and reason of a leaf."""
    if spoiled or not uses:
        return (GRADIENT, spoiled) if spoiled else (NONE, "")
    kinds = {use.kind for use in uses}
    if len(kinds) > 1:
        return GRADIENT, "it is both added and multiplied"
    # Factors of two uses have the same outer products only if the same entries are contracted, in the same order.
    if any(not np.array_equal(use.index, uses[0].index) for use in uses):
        return GRADIENT, "matrix products contract different axes of it, as tied weights do"
    return kinds.pop(), ""


def _moved(eqn: core.JaxprEqn, place: int, index: np.ndarray) -> np.ndarray | None:
    """Where the entries are after an equation that only moves or repeats them; None for any other equation."""
    primitive, params = eqn.primitive, eqn.params
    out: Any = eqn.outvars[0].aval
    if primitive in _UNCHANGED or primitive.name == "optimization_barrier":
        return index
    if primitive is prims.convert_element_type_p and jnp.issubdtype(out.dtype, jnp.floating):
        return index
    if primitive is prims.reduce_precision_p:
        own = jnp.finfo(out.dtype)
        return index if (params["exponent_bits"], params["mantissa_bits"]) == (own.nexp, own.nmant) else None
    if place:
        return None
    if primitive is prims.transpose_p:
        return np.transpose(index, params["permutation"])
    if primitive is prims.reshape_p and params["dimensions"] is None:
        return index.reshape(params["new_sizes"])
    if primitive is prims.squeeze_p:
        return np.squeeze(index, params["dimensions"])
    if primitive is prims.rev_p:
        return np.flip(index, params["dimensions"])
    if primitive is prims.broadcast_in_dim_p:
        places = params["broadcast_dimensions"]
        spread = [index.shape[places.index(k)] if k in places else 1 for k in range(len(params["shape"]))]
        return np.broadcast_to(index.reshape(spread), params["shape"])
    return None


def _recognised(eqn: core.JaxprEqn, place: int, index: np.ndarray, parameters: int, size: int) -> Use | str:
    """The use of a leaf by an equation, or why it is not taken apart."""
    primitive = eqn.primitive
    out: Any = eqn.outvars[0].aval
    if primitive not in (*_ADDITIONS, prims.dot_general_p, prims.conv_general_dilated_p):
        return primitive.name
    if not jnp.issubdtype(out.dtype, jnp.floating):
        return f"{primitive.name} to {out.dtype}"
    if primitive in _ADDITIONS:
        return _addition(eqn, place, index, size)
    if parameters > 1:
        return f"{primitive.name} of two parameters"
    if index.size != size:
        return f"{primitive.name} after broadcast_in_dim"
    return (_matrix_product if primitive is prims.dot_general_p else _convolution)(eqn, place, index)


def _addition(eqn: core.JaxprEqn, place: int, index: np.ndarray, size: int) -> Use | str:
    out: Any = eqn.outvars[0].aval
    spread = np.broadcast_to(index, out.shape)
    repeated = tuple(k for k in range(out.ndim) if spread.strides[k] == 0 or out.shape[k] == 1)
    once = spread[tuple(0 if k in repeated else slice(None) for k in range(out.ndim))].ravel()
    if once.size != size:
        return f"{eqn.primitive.name} after broadcast_in_dim and reshape"
    order = _order(once)
    sign = -1 if eqn.primitive is prims.sub_p and place == 1 else 1

    def cotangent(y: jax.Array) -> jax.Array:
        return _taken(sign * jnp.sum(y, repeated, _tree.at_least_float32(y.dtype)).ravel(), order)

    return Use(BIAS, np.arange(size), None, cotangent)


def _matrix_product(eqn: core.JaxprEqn, place: int, index: np.ndarray) -> Use | str:
    contracted, batched = eqn.params["dimension_numbers"]
    if batched[0]:
        return "dot_general with batch dimensions"
    ours, theirs = tuple(contracted[place]), tuple(contracted[1 - place])
    free = tuple(axis for axis in range(index.ndim) if axis not in ours)
    other: Any = eqn.invars[1 - place].aval
    others = tuple(axis for axis in range(other.ndim) if axis not in theirs)
    rows, columns = (math.prod(index.shape[axis] for axis in axes) for axes in (ours, free))
    positions = math.prod(other.shape[axis] for axis in others)

    def activation(operands: list[Any]) -> jax.Array:
        return jnp.transpose(operands[1 - place], (*others, *theirs)).reshape(positions, rows)

    def cotangent(y: jax.Array) -> jax.Array:
        return y.reshape(positions, columns) if place else y.reshape(columns, positions).T

    return _sorted_use(np.transpose(index, (*ours, *free)).reshape(rows, columns), activation, cotangent)


def _convolution(eqn: core.JaxprEqn, place: int, index: np.ndarray) -> Use | str:
    params = eqn.params
    if place == 0:
        return "conv_general_dilated of a parameter as data"
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return "conv_general_dilated with groups"
    lhs, rhs, out = params["dimension_numbers"]
    kernel = np.transpose(index, (*rhs[2:], rhs[1], rhs[0]))

    def activation(operands: list[Any]) -> jax.Array:
        data = jnp.transpose(operands[0], (lhs[0], *lhs[2:], lhs[1]))
        edges = [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True)
        ]
        data = jax.lax.pad(data, jnp.zeros([], data.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        return _windows(data, kernel.shape[:-2], params["window_strides"], params["rhs_dilation"])

    def cotangent(y: jax.Array) -> jax.Array:
        return jnp.transpose(y, (out[0], *out[2:], out[1])).reshape(-1, kernel.shape[-1])

    return _sorted_use(kernel.reshape(-1, kernel.shape[-1]), activation, cotangent)


def _windows(data: jax.Array, window: tuple[int, ...], strides: Any, dilation: Any) -> jax.Array:
    """What each position of a convolution sees: (positions, window by features), from (batch, space, features)."""
    # Slices rather than conv_general_dilated_patches, which multiplies by an identity, one group for each feature.
    space = data.shape[1:-1]
    counts = [(s - (w - 1) * d - 1) // step + 1 for s, w, d, step in zip(space, window, dilation, strides, strict=True)]
    seen = []
    for offsets in itertools.product(*map(range, window)):
        starts = [offset * d for offset, d in zip(offsets, dilation, strict=True)]
        ends = [start + (count - 1) * step + 1 for start, count, step in zip(starts, counts, strides, strict=True)]
        limits = (data.shape[0], *ends, data.shape[-1])
        seen.append(jax.lax.slice(data, (0, *starts, 0), limits, (1, *strides, 1)))
    return jnp.stack(seen, axis=-2).reshape(-1, len(seen) * data.shape[-1])


def _sorted_use(
    index: np.ndarray, activation: Callable[[list[Any]], jax.Array], cotangent: Callable[[jax.Array], jax.Array]
) -> Use:
    """A product with rows and columns in an order of the leaf, for uses in different layouts to agree."""
    rows, columns = _order(index.min(axis=1, initial=index.size)), _order(index.min(axis=0, initial=index.size))
    ordered = index if rows is None else index[rows]
    return Use(
        PRODUCT,
        ordered if columns is None else ordered[:, columns],
        lambda operands: _taken(activation(operands), rows),
        lambda y: _taken(cotangent(y), columns),
    )


def _order(numbers: np.ndarray) -> np.ndarray | None:
    """The permutation that sorts; None for the identity, which costs nothing."""
    order = np.argsort(numbers, kind="stable")
    return None if np.array_equal(order, np.arange(order.size)) else order


def _taken(x: jax.Array, order: np.ndarray | None) -> jax.Array:
    return x if order is None else jnp.take(x, order, axis=-1)
