"""What both transforms check and complete before they linearise."""

import difflib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gn_linear import _tree
from gn_linear._typing import Flag, Inputs, Outputs, Params, Predict


class _Missing:
    """Marks an argument that was not given; None is a value that inputs may have."""

    def __repr__(self) -> str:
        return "<missing>"


MISSING = _Missing()

KEYWORDS = ("inputs", "targets", "full_params", "curvature_inputs", "curvature_targets")


def check_keywords(transform: str, ignored: dict[str, Any]) -> None:
    """Raise on a keyword that looks like a misspelt one of ours; others are for other transforms.

    Args:
        transform: the name of the transform, for the message.
        ignored: the keywords that it does not know.

    Raises:
        TypeError: one of them is nearly one of ours.
    """
    for name in ignored:
        near = difflib.get_close_matches(name, KEYWORDS, n=1, cutoff=0.85)
        if near:
            raise TypeError(f"{name}: {transform} has no such argument in update; did you mean {near[0]}?")


def checked_params(transform: str, updates: Params, params: Params | None, inputs: Any) -> Params:
    """The parameters as arrays, once it is sure that an update has all that it needs, with leaves that fit.

    Args:
        transform: the name of the transform, for the messages.
        updates: the incoming gradient.
        params: the parameters.
        inputs: the batch.

    Returns:
        ``params``, strongly typed.

    Raises:
        TypeError: the batch was not passed on, or a leaf is not a float array.
        ValueError: params is missing, or the gradient does not fit it.
    """
    call = "update(grads, state, params, inputs=x, targets=y)"
    if params is None:
        raise ValueError(f"params is None, but {transform} needs the parameters: call {call}.")
    if inputs is MISSING:
        raise TypeError(
            f"inputs is missing: {transform} linearises the model on the batch; call {call}. If what "
            "calls update leaves no room for the batch, bind it with gn_linear.wrappers.with_batch."
        )
    _tree.check_float_leaves(params, "params")
    _tree.check_float_leaves(updates, "updates")
    _tree.check_same_shapes(updates, params, "updates", "params")
    return _tree.strongly_typed(params)


def check_stacked(solver: Any, count: int, curvature_inputs: Any, **batches: Any) -> None:
    """Raise unless a step's batches are stacked on a leading axis.

    Args:
        solver: whoever takes them, for the messages.
        count: how many there must be.
        curvature_inputs: what must not be given then.
        **batches: ``inputs`` and ``targets``.

    Raises:
        ValueError: a leaf has another leading axis, or there is a curvature batch.
    """
    needs = f"{type(solver).__name__} takes {count} fresh batches a step"
    if curvature_inputs is not None:
        raise ValueError(
            f"curvature_inputs are given, but {needs} from inputs; leave curvature_inputs out, or use a solver without "
            "fresh batches."
        )
    for argument, tree in batches.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if np.shape(leaf)[:1] != (count,) or (argument == "targets" and np.ndim(leaf) == 1):
                raise ValueError(
                    f"{argument}: {_tree.leaf_label(path)} has shape {np.shape(leaf)}, but {needs}, so every leaf of "
                    f"inputs and targets needs a leading axis of length {count} in front of that of the examples; use "
                    f"jnp.stack on {count} batches of one size."
                )


def check_state(transform: str, state: Any, kind: type, init: Callable[[Params], Any], params: Params) -> None:
    """Raise unless the state is what ``init`` of this transform makes for such parameters, leaf by leaf.

    Args:
        transform: the name of the transform, for the message.
        state: what ``update`` was handed.
        kind: what it must be.
        init: of the transform.
        params: the parameters.

    Raises:
        TypeError: it is something else.
        ValueError: a leaf is missing, or has another shape or dtype: the state of another model or other settings.
    """
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be the {kind.__name__} that init or the last update of this {transform} returned, but is "
            f"{_tree.described(state)}."
        )
    expected = _named_leaves(jax.eval_shape(init, params))
    found = _named_leaves(state)
    for name in [*expected, *(name for name in found if name not in expected)]:
        have, need = (_kind_of(leaves[name]) if name in leaves else "nothing" for leaves in (found, expected))
        if have != need:
            raise ValueError(
                f"state{name} is {have}, but this {transform} needs {need} there for these params: it is the state of "
                "another model or of other settings, or a wrapper changed it. Start from init(params), or restore the "
                "one saved with them."
            )


def check_model(transform: str, checksum: jax.Array, params: Params) -> Flag:
    """Whether a state that holds no leaf like the parameters was made for them; raises if that is known now.

    Args:
        transform: the name of the transform, for the message.
        checksum: of the parameters that the state was made for.
        params: the parameters.

    Returns:
        Whether the two agree, for steps inside ``jit``.

    Raises:
        ValueError: they do not, outside of ``jit``.
    """
    same = jnp.asarray(checksum == _tree.checksum(params))
    try:
        known = bool(same)
    except jax.errors.ConcretizationTypeError:
        return same
    if not known:
        leaves = _tree.few(
            f"{_tree.leaf_label(path)} of shape {np.shape(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        )
        raise ValueError(
            f"state.model is not that of params: the state of this {transform} belongs to parameters of other "
            f"shapes than {leaves}. Start from init(params), or restore the state saved with these params."
        )
    return same


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _kind_of(leaf: Any) -> str:
    return f"a {jnp.result_type(leaf)} array of shape {np.shape(leaf)}"


def whole_model(predict: Predict, params: Params, full_params: Params | None) -> Predict:
    """``predict`` as a function of the parameters that this transform sees.

    Args:
        predict: the model on whole parameters.
        params: what the transform was handed: perhaps with holes of ``optax.masked`` or ``optax.partition``, or as the
            one vector that ``optax.flatten`` makes.
        full_params: the whole parameters.

    Returns:
        The model; the same function if the parameters are whole.

    Raises:
        ValueError: there are holes, and ``full_params`` is missing.
    """
    if _tree.has_holes(params):
        if full_params is None:
            raise ValueError(
                f"full_params is missing: params come without {_missing(params)} (optax.masked or optax.partition took "
                "them out), and the model needs all of them; call update(..., inputs=x, targets=y, full_params=params)."
            )
        if _tree.has_holes(full_params):
            raise ValueError(
                f"full_params come without {_missing(full_params)}, but must hold all parameters; leave "
                "mask_compatible_extra_args of optax.masked and optax.partition at False."
            )
        return lambda part, inputs: predict(_tree.fill_holes(part, full_params), inputs)
    if full_params is not None and _tree.is_flattened(params, full_params):
        return lambda vector, inputs: predict(_tree.unflatten(vector, full_params), inputs)
    if full_params is None and _tree.is_vector(params):
        return _with_hint_of_flattening(predict)
    return predict


def _missing(tree: Params) -> str:
    holes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    names = [jax.tree_util.keystr(path) for path, leaf in holes if isinstance(leaf, optax.MaskedNode)]
    return _tree.few(names) if any(names) else "any leaf"


def _with_hint_of_flattening(predict: Predict) -> Predict:
    """Adds to an error of a model that got a bare vector where the vector may come from."""

    def hinting(params: Params, inputs: Inputs) -> Outputs:
        try:
            return predict(params, inputs)
        except Exception as error:
            error.add_note(
                f"predict was called with params as one vector of shape {np.shape(params)}. If optax.flatten made it, "
                "call update(..., inputs=x, targets=y, full_params=params)."
            )
            raise

    return hinting
