r"""Per-layer factors of the Jacobian, and the Gram matrix (the empirical neural tangent kernel) from them.

A weight in a matrix product takes its gradient as a sum over positions of outer products of an activation and an output
cotangent, so inner products of gradients need inner products of the factors only: no Jacobian is formed. The network is
traced once for one example (``_uses`` says where each parameter goes) and evaluated under ``vmap``, so the axis of the
batch is never guessed.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from gn_linear import _tree
from gn_linear._typing import Inputs, Outputs, Params, Predict
from gn_linear._uses import BIAS, GRADIENT, PRODUCT, Program, Use, flattened, followed, verdict

BY_FACTORS, BY_PAIRS, BY_GRADIENTS = "factors", "pairs of positions", "gradients"
_FEW = 4  # entries of rows whose inner products are cheaper to compute anew than to read from memory
_LARGEST = 2**22  # entries of an intermediate array of ``gram``: 16 MiB in float32


class Leaf(NamedTuple):
    """What became of one leaf of the parameters.

    Attributes:
        path: its path, as ``jax.tree_util.keystr`` writes it.
        kind: ``"product"``, ``"bias"``, ``"gradient"`` (differentiated as it is) or ``"none"`` (without influence).
        reason: why it is differentiated as it is, naming the primitive; empty for other kinds.
    """

    path: str
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Structure:
    """Where the parameters of a network are used, as ``trace_structure`` finds it. Static, not a pytree.

    Attributes:
        leaves: what became of each leaf of the parameters, in tree order.
        params: shapes and dtypes of the parameters.
        program: the evaluation of one example.
        uses: for each leaf the places where it is used; empty unless its kind is product or bias.
    """

    leaves: tuple[Leaf, ...]
    params: Params
    program: Program = dataclasses.field(repr=False)
    uses: tuple[tuple[Use, ...], ...] = dataclasses.field(repr=False)


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of the Jacobian of n examples with c outputs each; a pytree.

    The gradient of an output by a product's leaf is ``sum_t outer(activations[i, t], cotangents[i, k, t])``, by the
    leaves of the other kinds it is ``cotangents[i, k]``.

    Attributes:
        leaves: what became of each leaf of the parameters, in tree order; static.
        activations: for each leaf an array (n, T, I), or None unless it is a product.
        cotangents: for each leaf an array (n, c, T, O) for products, (n, c, size of the leaf) for biases and gradients
            and (n, c, 0) for leaves without influence.
    """

    leaves: tuple[Leaf, ...] = dataclasses.field(metadata={"static": True})
    activations: tuple[Any, ...]
    cotangents: tuple[Any, ...]

    @property
    def reasons(self) -> dict[str, str]:
        """Why leaves are differentiated as they are, by path."""
        return {leaf.path: leaf.reason for leaf in self.leaves if leaf.kind == GRADIENT}


def capture(predict: Predict, params: Params, inputs: Inputs) -> Factors:
    r"""The factors of the Jacobian of ``predict`` on a batch: ``trace_structure``, then ``factors``.

    For a weight :math:`W` that multiplies activations :math:`a_{it}`, with the cotangents :math:`b_{ikt}` of output
    :math:`k` of example :math:`i`,

    .. math:: \partial f_{ik} / \partial W = \sum_t a_{it} b_{ikt}^\top.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``; it treats every example by itself.
        params: where to differentiate, a pytree of float arrays; may be traced.
        inputs: a batch, a pytree of arrays whose leading axis is the example.

    Returns:
        The factors.

    Raises:
        TypeError: a leaf of ``params`` or of the outputs is not a real float array.
        ValueError: the leading axis of an input or output is not the example.

    Example:
        >>> import jax.numpy as jnp
        >>> from gn_linear import _capture
        >>> found = _capture.capture(lambda p, x: jnp.tanh(x @ p), jnp.ones((3, 2)), jnp.zeros((4, 3)))
        >>> found.leaves[0].kind, found.activations[0].shape, found.cotangents[0].shape
        ('product', (4, 1, 3), (4, 2, 1, 2))
    """
    return factors(trace_structure(predict, params, inputs), params, inputs)


def trace_structure(predict: Predict, params: Params, inputs: Inputs) -> Structure:
    """Trace one example, and find where each parameter is used. Nothing is computed.

    Args:
        predict: the model.
        params: the parameters, or their shapes and dtypes.
        inputs: a batch of any size, or its shapes and dtypes.

    Returns:
        The structure, for any number of calls of ``factors``. If ``predict`` closes over traced arrays, it belongs to
        their trace.

    Raises:
        TypeError: a leaf of ``params`` or of the outputs is not a real float array.
        ValueError: there are no parameters, or the leading axis of an input or output is not the example.
    """
    _tree.check_float_leaves(params, "params")
    if not jax.tree.leaves(params):
        raise ValueError(f"params must have at least one float leaf, but is {_tree.described(params)}.")
    check_batch(inputs)
    spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)), params)
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf)[1:], jnp.result_type(leaf)), inputs)
    program = flattened(jax.make_jaxpr(functools.partial(_one, predict))(spec, example))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(spec)]
    uses, spoiled = followed(program, [leaf.shape for leaf in jax.tree.leaves(spec)])
    verdicts = [verdict(uses[k], spoiled.get(k, "")) for k in range(len(paths))]
    leaves = tuple(Leaf(path, kind, reason) for path, (kind, reason) in zip(paths, verdicts, strict=True))
    kept = tuple(tuple(uses[k]) if leaf.kind in (PRODUCT, BIAS) else () for k, leaf in enumerate(leaves))
    return Structure(leaves, spec, program, kept)


def factors(structure: Structure, params: Params, inputs: Inputs) -> Factors:
    """The factors of the Jacobian on a batch or on a block of it.

    One forward pass, and one backward pass for each output of an example, all vectorised; block over examples to bound
    the memory.

    Args:
        structure: from ``trace_structure``.
        params: the parameters, of the shapes that the structure was traced with; may be traced.
        inputs: a batch of any number of examples.

    Returns:
        The factors.

    Raises:
        ValueError: ``params`` has other shapes, or the leading axis of an input is not the example.
    """
    _tree.check_same_shapes(params, structure.params, "params", "the params of the structure")
    check_batch(inputs)
    spec = jax.tree.leaves(structure.params)
    weights = [jnp.asarray(leaf, like.dtype) for leaf, like in zip(jax.tree.leaves(params), spec, strict=True)]
    example = functools.partial(_factors_of_one, structure, weights)
    activations, cotangents = jax.vmap(example)(jax.tree.leaves(inputs))
    return Factors(structure.leaves, activations, cotangents)


def gram(factors: Factors, other: Factors | None = None) -> jax.Array:
    r"""The Gram matrix of the Jacobian's rows, the empirical neural tangent kernel.

    .. math::
        \Theta_{ik,jl} = \sum_{\mathrm{leaves}} \langle \partial f_{ik}, \partial f_{jl} \rangle
        = \sum_{\mathrm{layers}} \sum_{t,t'} (a_{it} \cdot a_{jt'}) (b_{ikt} \cdot b_{jlt'}) + \ldots

    Products over several positions are contracted by pairs of positions or through the gradients of each example,
    whichever takes fewer operations.

    Args:
        factors: of n examples.
        other: of m examples, from the same structure; the same ones by default.

    Returns:
        An array (n, c, m, c) in the widest dtype of the factors, at least float32.

    Raises:
        ValueError: the two come from different structures.
    """
    return functools.reduce(jnp.add, gram_by_leaf(factors, other))


def gram_by_leaf(factors: Factors, other: Factors | None = None) -> list[jax.Array]:
    """The terms of ``gram``, one for each leaf of the parameters.

    Args:
        factors: of n examples.
        other: of m examples, from the same structure; the same ones by default.

    Returns:
        Arrays (n, c, m, c) in the dtype of ``gram``, in the order of the leaves.

    Raises:
        ValueError: the two come from different structures.
    """
    other = factors if other is None else other
    if other.leaves != factors.leaves:
        ours, theirs = (_tree.few(leaf.path or "the array" for leaf in side.leaves) for side in (factors, other))
        raise ValueError(f"factors and other must come from one structure, but are of the leaves {ours} and {theirs}.")
    dtype = _tree.scalar_dtype((factors.cotangents, factors.activations))
    activations, cotangents = jax.tree.map(_tree.whole, (other.activations, other.cotangents))
    rows = zip(factors.activations, factors.cotangents, activations, cotangents, strict=True)
    terms = [_rows(b, d) if a is None else _product(a, b, c, d) for a, b, c, d in rows]
    return [term.astype(dtype) for term in terms]


def folded(factors: Factors) -> Factors:
    """The same with all outputs as one, so that inner products are summed over the outputs.

    Args:
        factors: of n examples with c outputs each.

    Returns:
        Factors of one output, whose Gram matrix (n, 1, m, 1) is the sum of those of each output by itself.
    """

    def one(b: jax.Array) -> jax.Array:
        rows = jnp.moveaxis(b, 1, -2)
        return rows.reshape(*rows.shape[:-2], -1)[:, None]

    return dataclasses.replace(factors, cotangents=tuple(map(one, factors.cotangents)))


def numbers_computed(predict: Predict, params: Params, inputs: Inputs) -> int:
    """How many numbers one evaluation computes, of which reverse mode keeps no more than a few times as many.

    Args:
        predict: the model.
        params: the parameters, or their shapes and dtypes.
        inputs: a batch, or its shapes and dtypes; the examples need not be independent.

    Returns:
        The sum of the sizes of all arrays on the way to the outputs.
    """
    program = flattened(jax.make_jaxpr(predict)(params, inputs))
    return sum(math.prod(getattr(var.aval, "shape", ())) for step in program.steps for var in step.eqn.outvars)


def coarsest_rounding(predict: Predict, params: Params, inputs: Inputs) -> float:
    """The relative rounding of the narrowest float dtype that an evaluation passes through.

    Args:
        predict: the model.
        params: the parameters, or their shapes and dtypes.
        inputs: a batch, or its shapes and dtypes.

    Returns:
        The rounding; 0 if nothing is computed.
    """
    program = flattened(jax.make_jaxpr(predict)(params, inputs))
    dtypes = {getattr(var.aval, "dtype", None) for step in program.steps for var in step.eqn.outvars}
    floats = [dtype for dtype in dtypes if dtype is not None and jnp.issubdtype(dtype, jnp.floating)]
    return max((float(jnp.finfo(dtype).eps) for dtype in floats), default=0.0)


def check_independent(predict: Predict, params: Params, inputs: Inputs) -> None:
    """Raise if ``predict`` mixes the examples of a batch, by comparing the batch with its examples one by one.

    The comparison allows for rounding: half the digits of the outputs' dtype, relative to the largest output. A batch
    of one example or of equal examples shows nothing. Under ``jit`` the values are not known and only shapes are
    compared: call it outside.

    Args:
        predict: the model.
        params: the parameters.
        inputs: a batch of at least two examples.

    Raises:
        ValueError: the outputs of an example depend on the others.
    """
    check_batch(inputs)
    with jax.default_matmul_precision("highest"):
        together = predict(params, inputs)
        apart = jax.vmap(functools.partial(_one, predict), (None, 0))(params, inputs)
    alone = {jax.tree_util.keystr(path): y for path, y in jax.tree_util.tree_leaves_with_path(apart)}
    for path, y in jax.tree_util.tree_leaves_with_path(together):
        single = alone.get(jax.tree_util.keystr(path))
        if single is None or np.shape(y) != np.shape(single) or _differ(y, single):
            raise ValueError(
                f"predict mixes the examples of a batch: {_tree.leaf_label(path, 'its output')} changes when each "
                "example is evaluated by itself. Batch normalisation in training mode does this; evaluate it with its "
                "running averages, and let everything else in predict treat each example by itself."
            )


def _differ(together: Any, apart: Any) -> bool:
    limit = float(np.sqrt(float(jnp.finfo(together.dtype).eps)))
    finite = jnp.isfinite(together) & jnp.isfinite(apart)
    scale = jnp.max(jnp.where(finite, jnp.abs(together), 0), initial=0)
    far = jnp.where(finite, jnp.abs(together - apart) > limit * scale, ~jnp.isclose(together, apart, equal_nan=True))
    try:
        return bool(jnp.any(far))
    except jax.errors.ConcretizationTypeError:
        return False


# --- one example -----------------------------------------------------------------------------------------------------


def check_batch(inputs: Inputs) -> None:
    """Raise unless every leaf has the same number of examples on its leading axis."""
    sizes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
        if np.ndim(leaf) == 0:
            raise ValueError(
                f"inputs: {_tree.leaf_label(path)} is a scalar; the leading axis of every leaf must be the example. "
                "Close over what is the same for all examples in predict."
            )
        sizes.setdefault(np.shape(leaf)[0], _tree.leaf_label(path))
    if len(sizes) != 1:
        found = " and ".join(f"{size} ({label})" for size, label in sizes.items()) or "no leaves"
        raise ValueError(f"inputs: every leaf must have the same number of examples on its leading axis; got {found}.")


def _one(predict: Predict, params: Params, example: Any) -> Outputs:
    """The outputs of one example, as a batch of one."""
    outputs = predict(params, jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), example))
    _tree.check_float_leaves(outputs, "the outputs of predict")
    for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
        if np.shape(leaf)[:1] != (1,):
            raise ValueError(
                f"the outputs of predict: {_tree.leaf_label(path)} has shape {np.shape(leaf)} on a batch of one "
                "example; its leading axis must be the example (jnp.squeeze without an axis removes it)."
            )
    return jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), outputs)


def _factors_of_one(structure: Structure, weights: list[Any], example: list[Any]) -> Any:
    """Activations and cotangents for each leaf, by one forward pass and a backward pass for each output."""
    program, uses = structure.program, structure.uses
    tapped = sorted({use.step for leaf in uses for use in leaf})
    results: list[Any] = [program.steps[number].eqn.outvars[0].aval for number in tapped]
    taps = {number: jnp.zeros(aval.shape, aval.dtype) for number, aval in zip(tapped, results, strict=True)}
    direct = {k: weights[k] for k, leaf in enumerate(structure.leaves) if leaf.kind == GRADIENT}

    def run(taps: dict[int, Any], direct: dict[int, Any]) -> tuple[Any, Any]:
        moved = [direct.get(k, weight) for k, weight in enumerate(weights)]
        return evaluated(program, uses, [*moved, *example], taps)

    outputs, pull, activations = jax.vjp(run, taps, direct, has_aux=True)
    units = np.cumsum([0, *(y.size for y in outputs)])
    cotangents = [
        jnp.eye(units[-1], y.size, -start, dtype=y.dtype).reshape(units[-1], *y.shape)
        for y, start in zip(outputs, units[:-1], strict=True)
    ]
    by_taps, gradients = jax.vmap(pull)(cotangents)

    def gathered(k: int, leaf: Leaf) -> jax.Array:
        if leaf.kind == GRADIENT:
            return gradients[k].reshape(units[-1], -1)
        parts = [jax.vmap(use.cotangent)(by_taps[use.step]) for use in uses[k]]
        if leaf.kind == PRODUCT:
            return jnp.concatenate(parts, axis=1)
        return functools.reduce(jnp.add, parts) if parts else jnp.zeros((units[-1], 0), weights[k].dtype)

    joined = tuple(jnp.concatenate(parts) if parts else None for parts in activations)
    return joined, tuple(gathered(k, leaf) for k, leaf in enumerate(structure.leaves))


def evaluated(
    program: Program, uses: tuple[tuple[Use, ...], ...], arguments: list[Any], taps: dict[int, Any]
) -> tuple[list[Any], tuple[list[jax.Array], ...]]:
    """The outputs of a program, and the activations of the weights on the way.

    Args:
        program: the evaluation.
        uses: for each leaf of the parameters the places where it is used.
        arguments: of the program.
        taps: from numbers of steps to what is added to the result of the step.

    Returns:
        The outputs, and for each leaf the activations at each of its uses, in the order of the steps.
    """
    values = {**program.constants, **dict(zip(program.arguments, arguments, strict=True))}
    wanted = [(use.step, k, use.activation) for k, leaf in enumerate(uses) for use in leaf if use.activation]
    recorded: dict[int, list[Any]] = {}

    def read(slot: Any) -> Any:
        return slot.val if isinstance(slot, core.Literal) else values[slot]

    for number, step in enumerate(program.steps):
        eqn, operands = step.eqn, [read(slot) for slot in step.reads]
        with eqn.ctx.manager:
            results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
        results = results if eqn.primitive.multiple_results else [results]
        if number in taps:
            results = [results[0] + taps[number]]
            for _, k, activation in [use for use in wanted if use[0] == number]:
                recorded.setdefault(k, []).append(activation(operands))
        values.update(zip(step.writes, results, strict=True))
    outputs = [jnp.asarray(read(slot)) for slot in program.results]
    return outputs, tuple(recorded.get(k, []) for k in range(len(uses)))


# --- inner products of gradients -------------------------------------------------------------------------------------


def _einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    dtype = _tree.scalar_dtype(operands)
    return jnp.einsum(subscripts, *operands, precision="highest", preferred_element_type=dtype)


def _rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """Inner products of gradients that stand there as rows."""
    if x.shape[1] == y.shape[1] == 1:
        return _inner(x[:, 0], y[:, 0])[:, None, :, None]
    return _einsum("ncp,mdp->ncmd", x, y)


def route(activations: tuple[int, ...], cotangents: tuple[int, ...], others: tuple[int, ...]) -> str:
    """How the gradients of a product's leaf are contracted: the way of the fewest multiplications.

    Args:
        activations: the shape (n, T, I) of n examples.
        cotangents: the shape (n, c, T, O).
        others: the shape (m, S, I) of the activations of the other examples.

    Returns:
        ``BY_FACTORS``, ``BY_PAIRS`` or ``BY_GRADIENTS``.
    """
    (n, t, i), (c, o), (m, s) = activations, (cotangents[1], cotangents[3]), others[:2]
    if t == s == 1:
        return BY_GRADIENTS if c * c * i * o <= i + c * c * o else BY_FACTORS
    by_pairs = n * m * (t * s * (i + c * o) + c * c * t * o)
    by_gradients = c * i * o * (n * t + m * s) + n * m * c * c * i * o
    return BY_PAIRS if by_pairs < by_gradients else BY_GRADIENTS


def _product(a: jax.Array, b: jax.Array, other_a: jax.Array, other_b: jax.Array) -> jax.Array:
    """Inner products of sums of outer products, the cheaper way."""
    chosen = route(a.shape, b.shape, other_a.shape)
    if chosen == BY_FACTORS:
        inputs = _inner(a[:, 0], other_a[:, 0])
        return inputs[:, None, :, None] * _rows(b[:, :, 0], other_b[:, :, 0])
    return (_by_pairs if chosen == BY_PAIRS else _by_gradients)(a, b, other_a, other_b)


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """Inner products of all rows."""
    if not 0 < x.shape[1] <= _FEW:
        return _einsum("ni,mi->nm", x, y)
    # Not a matrix product, so that the compiler fuses it into what it is multiplied with.
    wide = [v.astype(_tree.at_least_float32(v.dtype)) for v in (x, y)]
    return functools.reduce(jnp.add, [wide[0][:, None, k] * wide[1][None, :, k] for k in range(x.shape[1])])


def _by_pairs(a: jax.Array, b: jax.Array, other_a: jax.Array, other_b: jax.Array) -> jax.Array:
    """Through inner products of activations at all pairs of positions, for some examples at a time."""

    def row(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        kernel = _einsum("ti,msi->tms", one[0], other_a)
        return _einsum("cto,tmdo->cmd", one[1], _einsum("tms,mdso->tmdo", kernel, other_b))

    m, c, s, o = other_b.shape
    entries = a.shape[1] * m * max(c * o, s)
    at_once = min(max(_LARGEST // max(entries, 1), 1), a.shape[0])
    return jax.vmap(row)((a, b)) if at_once == a.shape[0] else jax.lax.map(row, (a, b), batch_size=at_once)


def _by_gradients(a: jax.Array, b: jax.Array, other_a: jax.Array, other_b: jax.Array) -> jax.Array:
    """Through the gradients of each example, for some rows of the weight at a time."""

    def part(columns: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows = [_einsum("nti,ncto->ncio", x, y) for x, y in zip(columns, (b, other_b), strict=True)]
        return _rows(*(x.reshape(*x.shape[:2], x.shape[2] * x.shape[3]) for x in rows))

    entries = (a.shape[0] + other_a.shape[0]) * b.shape[1] * b.shape[3]
    size = min(max(_LARGEST // max(entries, 1), 1), a.shape[2])
    if size == a.shape[2]:
        return part((a, other_a))
    count = -(-a.shape[2] // size)

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, count * size - x.shape[2])))
        return jnp.moveaxis(padded.reshape(*x.shape[:2], count, size), 2, 0)

    def add(total: jax.Array, columns: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + part(columns), None

    blocks = (cut(a), cut(other_a))
    start = jax.eval_shape(part, jax.tree.map(lambda x: x[0], blocks))
    return jax.lax.scan(add, jnp.zeros(start.shape, start.dtype), blocks)[0]
