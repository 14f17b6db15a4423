"""The pytree vector space: inner products, axpy and casts that keep every leaf's dtype.

Reductions run in at least float32. Scalars are cast to the dtype of the leaf that they multiply, so that
loop carries keep their types and strict dtype promotion is respected.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from optax import MaskedNode

from gn_linear._typing import Flag, Params, Scalar, shown, with_article

_Class = TypeVar("_Class", bound=type)


def register_dataclass(cls: _Class) -> _Class:
    """Register a frozen dataclass as a pytree that is rebuilt without its constructor.

    JAX rebuilds pytrees with gradients, batches and placeholders in place of their numbers; the constructor's checks
    are for users. And two classes that ``jax.tree_util.register_dataclass`` registers have equal structures where their
    fields are alike (up to jax 0.10.2 at least): where their hashes collide, ``jit`` runs for one loss what it compiled
    for another. Fields with ``metadata={"static": True}`` are structure, the others are leaves.

    Args:
        cls: the dataclass.

    Returns:
        The same class, registered.
    """
    fields = dataclasses.fields(cast(Any, cls))
    static = [field.name for field in fields if field.metadata.get("static", False)]
    traced = [field.name for field in fields if not field.metadata.get("static", False)]

    def flatten(obj: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(obj, name) for name in traced], tuple(getattr(obj, name) for name in static)

    def flatten_with_keys(obj: Any) -> tuple[list[Any], tuple[Any, ...]]:
        children, structure = flatten(obj)
        keys = [jax.tree_util.GetAttrKey(name) for name in traced]
        return list(zip(keys, children, strict=True)), structure

    def unflatten(structure: tuple[Any, ...], children: Any) -> Any:
        obj = object.__new__(cls)
        for name, value in zip([*traced, *static], [*children, *structure], strict=True):
            object.__setattr__(obj, name, value)
        return obj

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def at_least_float32(dtype: Any) -> Any:
    """The dtype in which a leaf of this dtype takes part in a solve."""
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def scalar_dtype(tree: Params) -> Any:
    """The widest dtype of the leaves and at least float32: that of norms, damping and losses."""
    dtypes = [at_least_float32(jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]
    return max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits, default=jnp.dtype(jnp.float32))


def solve_zeros(params: Params) -> Params:
    """Zeros of the shapes of ``params`` in the dtypes of the solve."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=at_least_float32(jnp.result_type(p))), params)


def to_solve(tree: Params) -> Params:
    """``tree`` with leaves narrower than float32 widened to it."""
    return jax.tree.map(lambda x: jnp.asarray(x).astype(at_least_float32(jnp.result_type(x))), tree)


def cast_like(tree: Params, like: Params) -> Params:
    """``tree`` with the dtypes of ``like``."""
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def map_scalars(fn: Callable[..., Any], *trees: Params) -> Scalar:
    """The sum over leaves of ``fn``, a scalar for each leaf, in the widest dtype."""
    dtype = scalar_dtype(trees[0])
    terms = [term.astype(dtype) for term in jax.tree.leaves(jax.tree.map(fn, *trees))]
    return functools.reduce(jnp.add, terms, jnp.zeros([], dtype))


def total(*terms: Scalar) -> Scalar:
    """The sum of scalars in the widest of their dtypes, at least float32."""
    dtype = scalar_dtype(terms)
    return functools.reduce(jnp.add, [term.astype(dtype) for term in terms])


def _leaf_dot(x: jax.Array, y: jax.Array) -> jax.Array:
    dtype = at_least_float32(max((x.dtype, y.dtype), key=lambda d: jnp.finfo(d).bits))
    # Not a dot product: that would lower the precision on accelerators and refuses explicitly sharded axes.
    return jnp.sum(x.astype(dtype) * y.astype(dtype))


def dot(x: Params, y: Params) -> Scalar:
    """The inner product of two pytrees."""
    return map_scalars(_leaf_dot, x, y)


def norm(x: Params) -> Scalar:
    """The 2-norm, free of overflow and underflow of the squares."""
    largest = max_abs(x)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
    scaled = divide(x, scale)
    return scale * jnp.sqrt(dot(scaled, scaled))


def max_abs(x: Params) -> Scalar:
    """The largest absolute entry; NaN if there is one, 0 for an empty tree."""
    dtype = scalar_dtype(x)
    peaks = [jnp.max(jnp.abs(leaf)).astype(dtype) for leaf in jax.tree.leaves(x) if np.size(leaf)]
    return functools.reduce(jnp.maximum, peaks, jnp.zeros([], dtype))


def copied(tree: Params) -> Params:
    """``tree`` with a buffer of its own for each leaf, so that it can be donated."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def strongly_typed(tree: Params) -> Params:
    """``tree`` as arrays whose dtypes do not yield in promotion, so that types stay the same from step to step."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), tree)


def scale(alpha: Scalar, x: Params) -> Params:
    """``alpha x``."""
    return jax.tree.map(lambda leaf: alpha.astype(leaf.dtype) * leaf, x)


def divide(x: Params, alpha: Scalar) -> Params:
    """``x / alpha``."""
    return jax.tree.map(lambda leaf: leaf / alpha.astype(leaf.dtype), x)


def add(x: Params, y: Params) -> Params:
    """``x + y``."""
    return jax.tree.map(jnp.add, x, y)


def subtract(x: Params, y: Params) -> Params:
    """``x - y``."""
    return jax.tree.map(jnp.subtract, x, y)


def negative(x: Params) -> Params:
    """``-x``."""
    return jax.tree.map(jnp.negative, x)


def axpy(alpha: Scalar, x: Params, y: Params) -> Params:
    """``alpha x + y``."""
    return jax.tree.map(lambda a, b: alpha.astype(a.dtype) * a + b, x, y)


def where(condition: Flag, x: Params, y: Params) -> Params:
    """``x`` where the condition holds, else ``y``, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def all_finite(tree: Params) -> Flag:
    """Whether every entry is finite."""
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, flags, jnp.ones([], bool))


def leaf_label(path: tuple[Any, ...], alone: str = "the array") -> str:
    """A leaf as messages call it: ``leaf ['w']``, or the other words where the tree is a single leaf."""
    return f"leaf {jax.tree_util.keystr(path)}" if path else alone


def few(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


_ADVICE = {
    "the outputs of predict": "Let predict return what the loss compares with targets (logits, not labels).",
    "updates": "Pass the gradient of the loss with respect to params, as jax.grad returns it.",
}
_KEEP_OUT = "Keep what is not trained out of the tree (close over it in predict, or pass it in inputs)."


def check_float_leaves(tree: Params, argument: str) -> None:
    """Raise a TypeError that names the first leaf which is not a real floating-point array."""
    advice = _ADVICE.get(argument, _KEEP_OUT)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            raise TypeError(
                f"{argument}: {leaf_label(path, 'it')} is {shown(leaf)}; every leaf must be a float array. {advice}"
            )
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            if jnp.issubdtype(dtype, jnp.complexfloating):
                advice = "Split complex numbers into real and imaginary parts."
            elif advice is _KEEP_OUT:
                advice = f"Make it float (1.0 for 1) if it is trained. {_KEEP_OUT}"
            raise TypeError(
                f"{argument}: {leaf_label(path)} has dtype {dtype}; every leaf must be a real float array. {advice}"
            )


def check_same_shapes(tree: Params, like: Params, argument: str, like_argument: str) -> None:
    """Raise a ValueError that names the first leaf in which two trees differ in structure or shape."""
    structure, expected = jax.tree.structure(tree), jax.tree.structure(like)
    if structure != expected:
        raise ValueError(
            f"{argument} and {like_argument} must have the same tree structure, but "
            f"{difference(tree, like, argument, like_argument)}."
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(like), strict=True)
    for (path, leaf), other in pairs:
        if np.shape(leaf) != np.shape(other):
            raise ValueError(
                f"{argument}: {leaf_label(path)} has shape {np.shape(leaf)}, but {like_argument} has shape "
                f"{np.shape(other)} there; they must be the same."
            )


_ABSENT = object()


def difference(tree: Params, like: Params, argument: str, like_argument: str) -> str:
    """Where two trees of different structures part, in words: the first path that differs, and what is there.

    Args:
        tree: a tree.
        like: a tree of another structure.
        argument: the name of the first.
        like_argument: the name of the second.

    Returns:
        Half a sentence.
    """
    path, ours, theirs = _parting(tree, like)
    ours, theirs = described(ours), described(theirs)
    if ours == theirs:
        return f"{path or 'each'} is {ours} of other static fields in {argument} than in {like_argument}"
    if not path:
        return f"got {ours} as {argument} and {theirs} as {like_argument}"
    return f"{path} is {ours} in {argument} and {theirs} in {like_argument}"


def _parting(tree: Any, like: Any, path: str = "") -> tuple[str, Any, Any]:
    ours, theirs = _children(tree), _children(like)
    if _node(tree) == _node(like):
        for key, child in ours.items():
            if jax.tree.structure(child) != jax.tree.structure(theirs[key]):
                return _parting(child, theirs[key], path + key)
    if type(tree) is type(like):
        for key in [*theirs, *ours]:
            if (key in ours) != (key in theirs):
                return path + key, ours.get(key, _ABSENT), theirs.get(key, _ABSENT)
    return path, tree, like


def _node(tree: Any) -> Any:
    return jax.tree.structure(tree, is_leaf=lambda x: x is not tree)


def _children(tree: Any) -> dict[str, Any]:
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is not tree)
    return {jax.tree_util.keystr(path): child for path, child in pairs if path}


def described(tree: Any) -> str:
    """What stands at the root of a tree, in words."""
    if tree is _ABSENT:
        return "missing"
    if _is_hole(tree):
        return "a hole of optax.masked or optax.partition"
    if tree is None:
        return "None"
    if jax.tree_util.all_leaves([tree]):
        typed = hasattr(tree, "dtype") and hasattr(tree, "shape")
        return with_article(f"{tree.dtype} array of shape {tree.shape}") if typed else shown(tree)
    kind = with_article(type(tree).__name__)
    if isinstance(tree, Mapping):
        return f"{kind} with keys {few(map(repr, tree))}" if tree else f"{kind} without keys"
    plain = isinstance(tree, (tuple, list)) and not hasattr(tree, "_fields")
    return f"{kind} of {len(tree)}" if plain else kind


def checksum(tree: Params) -> jax.Array:
    """A number that two trees share if their leaves have the same shapes in the same order, and hardly ever else."""
    # Without names: some frameworks call the same leaf differently in init and in update.
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(tree)]
    return jnp.asarray(np.uint32(zlib.crc32(repr(shapes).encode())))


def is_flattened(vector: Params, full: Params) -> bool:
    """Whether ``vector`` is what ``optax.flatten`` makes of ``full``."""
    if not is_vector(vector) or is_vector(full):
        return False
    return np.shape(vector) == (sum(np.size(leaf) for leaf in jax.tree.leaves(full)),)


def is_vector(tree: Params) -> bool:
    """Whether the tree is one array with one axis."""
    return jax.tree_util.all_leaves([tree]) and np.ndim(tree) == 1


def unflatten(vector: jax.Array, like: Params) -> Params:
    """A tree like ``like`` from the entries of a vector, leaf after leaf."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([np.size(leaf) for leaf in leaves])
    parts = jnp.split(vector, ends[:-1]) if leaves else []
    shaped = [
        part.reshape(np.shape(leaf)).astype(jnp.result_type(leaf)) for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, [sharded_like(part, leaf) for part, leaf in zip(shaped, leaves, strict=True)])


def flatten(tree: Params, dtype: Any) -> jax.Array:
    """All entries in one vector of this dtype, leaf after leaf; ``unflatten`` is the way back."""
    leaves = [jnp.ravel(whole(leaf)).astype(dtype) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate([jnp.zeros([0], dtype), *leaves])


def whole(x: Any) -> Any:
    """An array that is not divided among devices where shardings are explicit; elsewhere the compiler sees to it."""
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec()) if _explicit(x) else x


def sharded_like(x: jax.Array, like: Any) -> jax.Array:
    """An array that is divided as another one of its shape is, or with whole axes in front of those."""
    spec = (*(None,) * (jnp.ndim(x) - jnp.ndim(like)), *jax.typeof(like).sharding.spec)
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec(*spec)) if _explicit(like) else x


def _explicit(x: Any) -> bool:
    return jax.sharding.AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def has_holes(tree: Params) -> bool:
    """Whether ``optax.masked`` or ``optax.partition`` has cut leaves out of the tree."""
    return any(isinstance(x, MaskedNode) for x in jax.tree.leaves(tree, is_leaf=_is_hole))


def fill_holes(tree: Params, full: Params) -> Params:
    """``tree`` with each hole filled by the subtree of ``full`` in its place."""
    return jax.tree.map(lambda x, whole: whole if _is_hole(x) else x, tree, full, is_leaf=_is_hole)


def cut_holes(full: Params, like: Params) -> Params:
    """``full`` with holes wherever ``like`` has them, if the rest of the two structures agree."""
    if not has_holes(like):
        return full
    return jax.tree.map(lambda x, whole: x if _is_hole(x) else whole, like, full, is_leaf=_is_hole)


def _is_hole(x: Any) -> bool:
    return isinstance(x, MaskedNode)
