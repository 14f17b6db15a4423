"""What both transforms check and complete before they linearise."""

import difflib
from typing import Any

import jax
import optax

from gn_linear import _tree
from gn_linear._typing import Inputs, Outputs, Params, Predict


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
            f"inputs is missing: {transform} linearises the model on the batch; call {call}. If you do, a wrapper in "
            "between drops the extra arguments; rebuild it as optax.GradientTransformationExtraArgs(w.init, w.update)."
        )
    _tree.check_float_leaves(params, "params")
    _tree.check_float_leaves(updates, "updates")
    _tree.check_same_shapes(updates, params, "updates", "params")
    return _tree.strongly_typed(params)


def check_state(transform: str, state: Any, kind: type) -> None:
    """Raise unless the state is that of the transform.

    Args:
        transform: the name of the transform, for the message.
        state: what ``update`` was handed.
        kind: what it must be.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be the {kind.__name__} that init or the last update of this {transform} returned, but is a "
            f"{type(state).__name__}."
        )


def with_holes_filled(predict: Predict, params: Params, full_params: Params | None) -> Predict:
    """``predict`` as a function of the parameters that this transform sees.

    Args:
        predict: the model on whole parameters.
        params: what the transform was handed, perhaps with holes of ``optax.masked`` or ``optax.partition``.
        full_params: the whole parameters.

    Returns:
        The model; the same function if there are no holes.

    Raises:
        ValueError: there are holes, and ``full_params`` is missing.
    """
    if not _tree.has_holes(params):
        return predict
    if full_params is None:
        holes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
        names = [_tree.leaf_name(path) for path, leaf in holes if isinstance(leaf, optax.MaskedNode)]
        raise ValueError(
            f"full_params is missing: params come without {', '.join(names)} (optax.masked or optax.partition took "
            "them out), and the model needs all of them; call update(..., inputs=x, targets=y, full_params=params)."
        )

    def predict_part(part: Params, inputs: Inputs) -> Outputs:
        return predict(_tree.fill_holes(part, full_params), inputs)

    return predict_part
