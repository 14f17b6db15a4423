"""Why a step was refused: the codes that ``gnl.info`` carries, and their meaning in words."""

import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gn_linear._typing import Flag


class Refusal(enum.IntEnum):
    """Why ``gauss_newton`` refused a step; the first that applies.

    Example:
        >>> import gn_linear as gnl
        >>> gnl.Refusal(2).name
        'OBJECTIVE'
    """

    NONE = 0
    """The step was taken."""
    STATE = 1
    """The state belongs to parameters of other shapes."""
    OBJECTIVE = 2
    """The objective at the parameters is not finite."""
    GRADIENT = 3
    """The incoming gradient is not finite."""
    SOLVER = 4
    """The inner solver found no step, for want of positive curvature or of finite products."""
    STEP = 5
    """The step is not finite."""
    TRIAL = 6
    """The objective at the trial point is not finite."""
    ROUNDING = 7
    """The objective would rise by less than its own rounding, so nothing is left to gain on this batch."""
    INCREASE = 8
    """The objective would rise, also after halving the step."""


ADVICE = {
    Refusal.NONE: "the step was taken",
    Refusal.STATE: (
        "the state belongs to parameters of other shapes; start from init(params), or restore the state that "
        "was saved with these parameters"
    ),
    Refusal.OBJECTIVE: (
        "the objective at the parameters is not finite; look for NaN or infinity in inputs, targets and params"
    ),
    Refusal.GRADIENT: (
        "the incoming gradient is not finite although the objective is; look for infinity in inputs, at the derivative "
        "of the model, and at what stands in front in the chain"
    ),
    Refusal.SOLVER: (
        "the inner solver found no step; look for NaN or infinity in the derivative of the model and in "
        "curvature_inputs, for a loss that is not convex in the outputs, and with a dense solver for a model that "
        "mixes the examples of a batch"
    ),
    Refusal.STEP: "the step is not finite; a larger damping or parameters of a wider dtype may help",
    Refusal.TRIAL: (
        "the objective at the trial point is not finite; an adaptive damping rises until a shorter step stays inside"
    ),
    Refusal.ROUNDING: (
        "the objective would rise by less than its own rounding; nothing is left to gain on this batch in this dtype"
    ),
    Refusal.INCREASE: (
        "the objective would rise, also after halving; if this goes on, check that the incoming gradient is that of "
        "the loss on inputs, and that the model gives the same outputs when it is called again"
    ),
}
"""Each code in words, with what to do about it."""


def first_that_holds(cases: Sequence[tuple[Flag, enum.IntEnum]], otherwise: int) -> jax.Array:
    """The code of the first condition that holds.

    Args:
        cases: conditions and their codes.
        otherwise: the code if none holds.

    Returns:
        The code, shape ().
    """
    code = jnp.int32(otherwise)
    for condition, reason in reversed(cases):  # jnp.select would search for the first, in an operation of its own
        code = jnp.where(condition, jnp.int32(reason), code)
    return code
