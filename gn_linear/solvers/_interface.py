"""What every inner solver offers, and what it returns."""

import enum
from typing import Any, ClassVar, NamedTuple

import jax

from gn_linear._typing import Count, Params, Scalar
from gn_linear.curvature import LinearisedProblem


class Status(enum.IntEnum):
    """Why an inner solver stopped."""

    CONVERGED = 0
    """The relative residual fell below ``rtol``."""
    PROGRESS = 1
    """The quadratic model hardly falls any more (Martens' test)."""
    MAX_STEPS = 2
    """The cap on inner steps was reached; the step so far is used."""
    NON_POSITIVE_CURVATURE = 3
    """A direction without positive curvature was met; the step before it is used."""
    NON_FINITE = 4
    """A product, an inner step or the right-hand side was not finite; the step before it is used."""
    COMPLETED = 5
    """All inner steps that were asked for were taken, by a solver that has no tolerance to meet."""


class Result(NamedTuple):
    r"""What a solve returns.

    Attributes:
        step: approximately :math:`-(G + \mu I)^{-1} b`, a pytree like the parameters in the dtypes of the solve.
        state: the solver's state for the next step.
        solver_steps: inner steps taken, shape ().
        status: a ``Status``, shape ().
        image: what the Jacobian makes of the step, like the outputs, if the solver knows it; it saves a product.
    """

    step: Params
    state: Any
    solver_steps: Count
    status: jax.Array
    image: Any = None


class Solver:
    r"""An inner solver of the damped linearised problem.

    .. math:: \min_d \; \langle b, d \rangle + \tfrac12 d^T (G + \mu I) d

    ``prepare`` does all that does not depend on the damping, ``solve`` the rest, so that another damping is cheap.

    Attributes:
        cheap_again: whether ``solve`` costs next to nothing once prepared; a step that raises the objective is then
            solved again with more damping instead of being halved.
    """

    cheap_again: ClassVar[bool] = False

    @property
    def part_of_run(self) -> bool:
        """Whether the state belongs to the run as the parameters do, such as a momentum.

        Then a refused step leaves it as it was; otherwise it is what the solver has learnt, which a refusal does not
        undo.
        """
        return False

    @property
    def adaptable(self) -> bool:
        """Whether the solver uses the damping; if not, only ``damping=0.0`` goes with it."""
        return True

    @property
    def batches(self) -> int | None:
        """How many batches a step takes, stacked on a new leading axis of its inputs and targets; None for one batch.

        The problem is then that of all of them, and its targets have the two leading axes merged.
        """
        return None

    def init(self, params: Params) -> Any:
        """The state before the first step, a pytree of arrays.

        Args:
            params: the parameters that will be trained.

        Returns:
            The state.
        """
        raise NotImplementedError

    def prepare(self, problem: LinearisedProblem, rhs: Params, state: Any) -> Any:
        """All the work that does not depend on the damping.

        Args:
            problem: the linearised problem.
            rhs: the gradient b, in the dtypes of the solve.
            state: from ``init`` or the last ``Result``.

        Returns:
            What ``solve`` needs.
        """
        raise NotImplementedError

    def solve(self, prepared: Any, damping: Scalar) -> Result:
        """The step for one damping.

        Args:
            prepared: from ``prepare``.
            damping: absolute, shape ().

        Returns:
            The step, with the state for the next one.
        """
        raise NotImplementedError
