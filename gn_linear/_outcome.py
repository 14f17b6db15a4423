"""Why a fit ended: the codes that ``Solution.status`` carries, and their meaning in words."""

import enum


class Outcome(enum.IntEnum):
    """Why ``least_squares`` ended; above zero it has converged. From 0 to 3 the codes are scipy's.

    Example:
        >>> import gn_linear as gnl
        >>> gnl.Outcome(2).name
        'COST'
    """

    UNBOUNDED = -3
    """The residuals vanished, but the parameters still grew when the cap on steps was reached."""
    STALLED = -2
    """No step lowers the cost although the gradient is not zero."""
    NON_FINITE = -1
    """The residuals or their derivative at the parameters are not finite."""
    MAX_STEPS = 0
    """The cap on steps was reached."""
    GRADIENT = 1
    """The gradient is zero, since every column of the Jacobian is orthogonal to the residuals."""
    COST = 2
    """The cost falls no more."""
    STEP = 3
    """The step is shorter than ``rtol`` of the parameters."""
    RESIDUALS = 5
    """The norm of the residuals is at most ``atol``."""


MESSAGES = {
    Outcome.UNBOUNDED: (
        "the residuals vanish as the parameters grow without end, so there is no minimum; set bounds, or take atol for "
        "the norm of the residuals that is small enough"
    ),
    Outcome.STALLED: (
        "no step lowers the cost although the gradient is not zero; check that the derivative of the residuals is "
        "right (custom_jvp, rounding, integer conversions), and that they are the same when called again"
    ),
    Outcome.NON_FINITE: (
        "the residuals or their derivative at the last parameters are not finite; start elsewhere, set bounds, or look "
        "for NaN in the data"
    ),
    Outcome.MAX_STEPS: "max_steps was reached; allow more steps or start closer",
    Outcome.GRADIENT: "converged: the gradient is zero",
    Outcome.COST: "converged: the cost falls no more",
    Outcome.STEP: "converged: the step is shorter than rtol of the parameters",
    Outcome.RESIDUALS: "converged: the norm of the residuals is at most atol",
}
"""Each code in words, with what to do about it."""
