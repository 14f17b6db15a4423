"""The diagonal of the Gauss-Newton matrix, exact or sampled."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._typing import Count, Number, Params, Scalar, check_count, check_number, shown
from gn_linear.curvature import LinearisedProblem
from gn_linear.preconditioners._interface import Preconditioner


class JacobiState(NamedTuple):
    """A running average of the diagonal.

    Attributes:
        diagonal: the decayed sum of diagonals, like the parameters.
        count: refreshes so far.
        weight: the decayed sum of weights, which corrects the average's bias.
    """

    diagonal: Params
    count: Count
    weight: Scalar


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Jacobi(Preconditioner):
    r"""The diagonal of the Gauss-Newton matrix, :math:`M = \mathrm{diag}(G) + \mu I`.

    Where the parameters or the outputs of a batch number at most ``exact_up_to``, the diagonal is exact. Otherwise it
    is estimated by random signs (Hutchinson), with a running average over steps.

    Attributes:
        samples: sign vectors a step, one vector-Jacobian product each.
        exact_up_to: the largest number of products spent on the exact diagonal.
        decay: of the running average of estimates, in [0, 1); an exact diagonal is not averaged.
        seed: of the signs.

    Example:
        >>> import gn_linear as gnl
        >>> solver = gnl.solvers.CG(preconditioner=gnl.preconditioners.Jacobi())

    References:
        Hutchinson (1990), A stochastic estimator of the trace; Martens (2010), Deep learning via Hessian-free
        optimization, section 4.7.
    """

    samples: int = dataclasses.field(default=4, metadata={"static": True})
    exact_up_to: int = dataclasses.field(default=64, metadata={"static": True})
    decay: Number = 0.9
    seed: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self) -> None:
        check_count(self.samples, "samples")
        check_count(self.exact_up_to, "exact_up_to", minimum=0)
        decay = check_number(self.decay, "decay")
        if decay is not None and decay >= 1:
            raise ValueError(f"decay must be below 1, so that new curvature counts, but is {shown(self.decay)}.")

    def init(self, params: Params) -> JacobiState:
        """No curvature seen yet."""
        zeros = _tree.solve_zeros(params)
        return JacobiState(zeros, jnp.zeros([], jnp.int32), jnp.zeros([], _tree.scalar_dtype(params)))

    def refresh(self, problem: LinearisedProblem, state: JacobiState) -> JacobiState:
        """Take in this step's diagonal; one that is not finite is left out."""
        parameters = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
        dtype = state.weight.dtype
        if min(parameters, problem.output_size) <= self.exact_up_to:
            fresh, decay = problem.diagonal(), jnp.zeros([], dtype)
        else:
            key = jax.random.fold_in(jax.random.key(self.seed), state.count)
            fresh, decay = problem.sampled_diagonal(key, self.samples), jnp.asarray(self.decay, dtype)
        averaged = _tree.axpy(decay, state.diagonal, _tree.scale(1 - decay, fresh))
        usable = _tree.all_finite(fresh)
        return JacobiState(
            _tree.where(usable, averaged, state.diagonal),
            state.count + 1,
            jnp.where(usable, decay * state.weight + 1 - decay, state.weight),
        )

    def inverse(
        self, problem: LinearisedProblem, state: JacobiState, damping: Scalar
    ) -> tuple[Callable[[Params], Params], JacobiState]:
        """``r -> r / (diag + mu)``, where entries without any curvature count as the largest one."""
        del problem
        weight = jnp.where(state.weight > 0, state.weight, jnp.ones_like(state.weight))
        largest = _tree.max_abs(state.diagonal) / weight + damping
        fallback = jnp.where(largest > 0, largest, jnp.ones_like(largest))

        def entry(diagonal: jax.Array) -> jax.Array:
            whole = diagonal / weight.astype(diagonal.dtype) + damping.astype(diagonal.dtype)
            return jnp.where(whole > 0, whole, fallback.astype(diagonal.dtype))

        diagonal = jax.tree.map(entry, state.diagonal)
        return lambda residual: jax.tree.map(jnp.divide, residual, diagonal), state
