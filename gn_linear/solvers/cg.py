"""Preconditioned conjugate gradients on pytrees.

Differences from the textbook:
- the right-hand side is scaled to a largest entry of 1, so no guard is absolute and no square underflows;
- three tests stop it early: the relative residual, Martens' test of the quadratic model's progress, the step cap;
- a direction of non-positive curvature or a value that is not finite stops it at the last good iterate;
- the quadratic model is updated from the recurrence (each step lowers it by alpha <r, z> / 2), at no product;
- the warm start is dropped if the model is positive there, that is, if starting from zero is better.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._typing import Count, Flag, Number, Params, Scalar, check_count, check_number
from gn_linear.curvature import LinearisedProblem
from gn_linear.preconditioners import Preconditioner
from gn_linear.solvers._interface import Result, Solver, Status


class CGState(NamedTuple):
    """What CG carries from step to step.

    Attributes:
        previous: the last solution, for the warm start; None without one.
        preconditioner: the preconditioner's state; None without one.
    """

    previous: Any
    preconditioner: Any


class _Prepared(NamedTuple):
    product: Callable[[Params], Params]
    rhs: Params
    size: Scalar
    state: CGState


class _Carry(NamedTuple):
    x: Params
    residual: Params
    direction: Params
    rz: Scalar
    model: Scalar
    history: jax.Array
    steps: Count
    status: jax.Array


_RUNNING = -1


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class CG(Solver):
    r"""Preconditioned conjugate gradients on :math:`(G + \mu I) d = -b`, matrix-free.

    It stops at step i when the residual satisfies :math:`\|r_i\| \le \mathrm{rtol} \, \|b\|`; when the quadratic
    model :math:`q` hardly falls, :math:`i > k`, :math:`q_i < 0` and
    :math:`(q_i - q_{i-k}) / q_i < k \cdot \mathrm{progress}` with :math:`k = \max(10, i/10)`; or at ``max_steps``.
    Stopping early regularises, too: the norm of the step grows with i.

    Each inner step costs one Jacobian-vector and one vector-Jacobian product; four vectors like the parameters are
    kept, and one more in the state with a warm start.

    Attributes:
        max_steps: the cap on inner steps; static.
        rtol: of the residual, relative to that of the step zero; in [0, 1). The default is loose: far from a solution
            the model is wrong by more than that, and on minibatches a tighter solve fits one batch at the expense of
            the others. Full-batch fits to many digits want 1e-2 or less, and a higher cap.
        preconditioner: one of ``gn_linear.preconditioners``, or None.
        warm_start: the factor by which the previous solution is multiplied to start from (Martens: 0.95), which costs
            one product; None starts from zero.
        progress: the least relative progress a step of the quadratic model, looked at from step 11 on; 0 switches the
            test off.

    Example:
        >>> import gn_linear as gnl
        >>> solver = gnl.solvers.CG(max_steps=50, rtol=1e-3)

    References:
        Hestenes and Stiefel (1952), Methods of conjugate gradients for solving linear systems; Martens (2010), Deep
        learning via Hessian-free optimization, sections 4.4 to 4.8.
    """

    max_steps: int = dataclasses.field(default=50, metadata={"static": True})
    rtol: Number = 0.1
    preconditioner: Preconditioner | None = None
    warm_start: Number | None = None
    progress: Number = 5e-4

    def __post_init__(self) -> None:
        check_count(self.max_steps, "max_steps")
        rtol = check_number(self.rtol, "rtol")
        if rtol is not None and rtol >= 1:
            raise ValueError(f"rtol must be below 1, since the step zero has the residual 1, but is {self.rtol!r}.")
        check_number(self.progress, "progress")
        if self.warm_start is not None:
            check_number(self.warm_start, "warm_start")
        if self.preconditioner is not None and not isinstance(self.preconditioner, Preconditioner):
            raise TypeError(
                f"preconditioner must be one of gn_linear.preconditioners or None, but is {self.preconditioner!r}."
            )

    def init(self, params: Params) -> CGState:
        """No previous solution yet."""
        previous = None if self.warm_start is None else _tree.solve_zeros(params)
        return CGState(previous, None if self.preconditioner is None else self.preconditioner.init(params))

    def prepare(self, problem: LinearisedProblem, rhs: Params, state: CGState) -> _Prepared:
        """Scale the right-hand side and refresh the preconditioner."""
        if self.preconditioner is not None:
            state = state._replace(preconditioner=self.preconditioner.refresh(problem, state.preconditioner))
        largest = _tree.max_abs(rhs)
        size = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
        return _Prepared(problem.product, _tree.divide(rhs, size), size, state)

    def solve(self, prepared: _Prepared, damping: Scalar) -> Result:
        """The step for one damping."""

        def operator(x: Params) -> Params:
            return _tree.axpy(damping, x, prepared.product(x))

        def identity(residual: Params) -> Params:
            return residual

        inverse = identity
        if self.preconditioner is not None:
            inverse = self.preconditioner.inverse(prepared.state.preconditioner, damping)
        rhs = _tree.negative(prepared.rhs)
        carry = self._start(operator, inverse, rhs, prepared)
        target = jnp.asarray(self.rtol, carry.rz.dtype) * jnp.sqrt(_tree.dot(rhs, rhs))
        end = jax.lax.while_loop(
            lambda c: c.status == _RUNNING,
            lambda c: self._step(operator, inverse, target, c),
            carry._replace(status=self._first_status(carry, target)),
        )
        step = _tree.scale(prepared.size, end.x)
        state = prepared.state if self.warm_start is None else prepared.state._replace(previous=step)
        return Result(step, state, end.steps, end.status)

    def _start(
        self,
        operator: Callable[[Params], Params],
        inverse: Callable[[Params], Params],
        rhs: Params,
        prepared: _Prepared,
    ) -> _Carry:
        dtype = prepared.size.dtype
        x, residual = jax.tree.map(jnp.zeros_like, rhs), rhs
        model = jnp.zeros([], dtype)
        if self.warm_start is not None:
            factor = jnp.asarray(self.warm_start, dtype) / prepared.size
            warm = _tree.scale(factor, prepared.state.previous)
            warm_residual = _tree.subtract(rhs, operator(warm))
            warm_model = -0.5 * (_tree.dot(warm, rhs) + _tree.dot(warm, warm_residual))
            better = warm_model < 0
            x, residual = _tree.where(better, warm, x), _tree.where(better, warm_residual, residual)
            model = jnp.where(better, warm_model, model)
        z = inverse(residual)
        return _Carry(
            x=x,
            residual=residual,
            direction=z,
            rz=_tree.dot(residual, z).astype(dtype),
            model=model.astype(dtype),
            history=jnp.zeros([self.max_steps + 1], dtype).at[0].set(model.astype(dtype)),
            steps=jnp.zeros([], jnp.int32),
            status=jnp.full([], _RUNNING, jnp.int32),
        )

    def _first_status(self, carry: _Carry, target: Scalar) -> jax.Array:
        finite = jnp.isfinite(target) & jnp.isfinite(carry.rz)
        arrived = jnp.sqrt(_tree.dot(carry.residual, carry.residual)) <= target
        return _pick([(~finite, Status.NON_FINITE), (arrived, Status.CONVERGED)])

    def _step(
        self,
        operator: Callable[[Params], Params],
        inverse: Callable[[Params], Params],
        target: Scalar,
        carry: _Carry,
    ) -> _Carry:
        image = operator(carry.direction)
        curvature = _tree.dot(carry.direction, image)
        sound = jnp.isfinite(curvature) & (curvature > 0)
        alpha = jnp.where(sound, carry.rz / curvature, jnp.zeros_like(curvature)).astype(carry.rz.dtype)
        # With alpha = 0 the iterate stays, as the direction is finite; the residual is not used again.
        x = _tree.axpy(alpha, carry.direction, carry.x)
        residual = _tree.axpy(-alpha, image, carry.residual)
        z = inverse(residual)
        rz = _tree.dot(residual, z).astype(carry.rz.dtype)
        steps = carry.steps + sound.astype(carry.steps.dtype)
        model = carry.model - 0.5 * alpha * carry.rz
        history = carry.history.at[steps].set(model)
        status = _pick(
            [
                (~jnp.isfinite(curvature), Status.NON_FINITE),
                (curvature <= 0, Status.NON_POSITIVE_CURVATURE),
                (jnp.sqrt(_tree.dot(residual, residual)) <= target, Status.CONVERGED),
                (~jnp.isfinite(rz), Status.NON_FINITE),
                (rz <= 0, Status.NON_POSITIVE_CURVATURE),
                (self._stalled(history, steps), Status.PROGRESS),
                (steps >= self.max_steps, Status.MAX_STEPS),
            ]
        )
        direction = _tree.axpy(rz / carry.rz, carry.direction, z)
        return _Carry(x, residual, direction, rz, model, history, steps, status)

    def _stalled(self, history: jax.Array, steps: Count) -> Flag:
        """Martens' test on the values of the quadratic model."""
        k = jnp.maximum(10, steps // 10)
        now, before = history[steps], history[jnp.maximum(steps - k, 0)]
        bound = k.astype(history.dtype) * jnp.asarray(self.progress, history.dtype)
        return (steps > k) & (now < 0) & ((now - before) / jnp.where(now < 0, now, -jnp.ones_like(now)) < bound)


def _pick(cases: list[tuple[Flag, Status]]) -> jax.Array:
    """The first status whose condition holds, else 'running'."""
    conditions = [condition for condition, _ in cases]
    return jnp.select(conditions, [jnp.int32(status) for _, status in cases], jnp.int32(_RUNNING))
