"""What every preconditioner offers."""

from collections.abc import Callable
from typing import Any

from gn_linear._typing import Params, Scalar
from gn_linear.curvature import LinearisedProblem


class Preconditioner:
    """A cheap approximate inverse of the damped Gauss-Newton matrix.

    ``init`` once, ``refresh`` once a step, ``inverse`` for each solve.
    """

    def init(self, params: Params) -> Any:
        """The state before the first step.

        Args:
            params: the parameters that will be trained.

        Returns:
            A pytree of arrays.
        """
        raise NotImplementedError

    def refresh(self, problem: LinearisedProblem, state: Any) -> Any:
        """Take in this step's curvature; nothing here depends on the damping.

        Args:
            problem: the linearised problem.
            state: the state so far.

        Returns:
            The new state.
        """
        raise NotImplementedError

    def inverse(
        self, problem: LinearisedProblem, state: Any, damping: Scalar
    ) -> tuple[Callable[[Params], Params], Any]:
        """``r -> M^-1 r``, symmetric and positive definite.

        Args:
            problem: the linearised problem.
            state: from ``refresh``.
            damping: of the solve.

        Returns:
            The function, and the state with what is worth keeping for later steps, such as factorisations.
        """
        raise NotImplementedError
