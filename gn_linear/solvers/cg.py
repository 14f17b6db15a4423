"""Preconditioned conjugate gradients on pytrees.

Differences from the textbook:
- the right-hand side is scaled to a largest entry of 1, so no guard is absolute and no square underflows;
- three tests stop it early: the relative residual, Martens' test of the quadratic model's progress, the step cap;
- a direction of non-positive curvature or a value that is not finite stops it at the last good iterate;
- the quadratic model is updated from the recurrence (each step lowers it by alpha <r, z> / 2), at no product;
- the warm start is dropped if the model is positive there, that is, if starting from zero is better;
- with momentum the previous solution is the direction before the first, so that the first step goes to the minimum over
  a plane; directions are made conjugate by what the Jacobian makes of them, which takes no Krylov space for granted;
- the last step allowed leaves out the vector-Jacobian product, for nobody looks at its residual.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._typing import Count, Flag, Number, Params, Scalar, check_count, check_number, shown
from gn_linear.curvature import LinearisedProblem
from gn_linear.preconditioners import Preconditioner
from gn_linear.solvers._interface import Result, Solver, Status


class CGState(NamedTuple):
    """What CG carries from step to step.

    Attributes:
        previous: the last solution, for the warm start or the momentum; None without them.
        preconditioner: the preconditioner's state; None without one.
    """

    previous: Any
    preconditioner: Any


class _Prepared(NamedTuple):
    problem: LinearisedProblem
    rhs: Params
    size: Scalar
    state: CGState


class _Carry(NamedTuple):
    x: Params
    x_image: Any
    residual: Params
    z: Params
    rz: Scalar
    direction: Params
    image: Any
    curvature: Scalar
    model: Scalar
    history: jax.Array
    steps: Count
    status: jax.Array


_RUNNING = -1
_UNROLLED = 4  # steps that are written out: XLA computes them faster than a loop, convolutions many times faster


@dataclasses.dataclass(frozen=True)
class _System:
    """The damped matrix and its preconditioner."""

    problem: LinearisedProblem
    damping: Scalar
    inverse: Callable[[Params], Params]

    def product(self, vector: Params) -> Params:
        return self.pulled(vector, self.problem.image(vector))

    def pulled(self, vector: Params, image: Any) -> Params:
        return _tree.axpy(self.damping, vector, self.problem.pulled(vector, image))

    def inner(self, vector: Params, image: Any, other: Params, other_image: Any) -> Scalar:
        return _tree.total(
            self.problem.inner(vector, image, other, other_image), self.damping * _tree.dot(vector, other)
        )


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
        momentum: whether the first inner step goes to the minimum over the plane of the preconditioned gradient and the
            previous solution, at one Jacobian-vector product more; static. It goes on from one batch to the next as
            a warm start would, with a factor that the exact quadratic model chooses at each step.
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
    momentum: bool = dataclasses.field(default=False, metadata={"static": True})
    progress: Number = 5e-4

    def __post_init__(self) -> None:
        check_count(self.max_steps, "max_steps")
        rtol = check_number(self.rtol, "rtol")
        if rtol is not None and rtol >= 1:
            raise ValueError(f"rtol must be below 1, since the step zero has the residual 1, but is {self.rtol!r}.")
        check_number(self.progress, "progress")
        if self.warm_start is not None:
            check_number(self.warm_start, "warm_start")
        if not isinstance(self.momentum, bool):
            raise TypeError(f"momentum must be True or False, but is {shown(self.momentum)}.")
        if self.momentum and self.warm_start is not None:
            raise ValueError(
                f"momentum starts from the previous solution by itself, so warm_start must be None, but is "
                f"{shown(self.warm_start)}."
            )
        if self.preconditioner is not None and not isinstance(self.preconditioner, Preconditioner):
            raise TypeError(
                f"preconditioner must be one of gn_linear.preconditioners or None, but is {self.preconditioner!r}."
            )

    def init(self, params: Params) -> CGState:
        """No previous solution yet."""
        starts = self.momentum or self.warm_start is not None
        previous = _tree.solve_zeros(params) if starts else None
        return CGState(previous, None if self.preconditioner is None else self.preconditioner.init(params))

    def prepare(self, problem: LinearisedProblem, rhs: Params, state: CGState) -> _Prepared:
        """Scale the right-hand side and refresh the preconditioner."""
        if self.preconditioner is not None:
            state = state._replace(preconditioner=self.preconditioner.refresh(problem, state.preconditioner))
        largest = _tree.max_abs(rhs)
        size = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
        return _Prepared(problem, _tree.divide(rhs, size), size, state)

    def solve(self, prepared: _Prepared, damping: Scalar) -> Result:
        """The step for one damping."""
        problem, state = prepared.problem, prepared.state
        inverse: Callable[[Params], Params] = lambda residual: residual  # noqa: E731
        if self.preconditioner is not None:
            inverse, learnt = self.preconditioner.inverse(problem, state.preconditioner, damping)
            state = state._replace(preconditioner=learnt)
        system = _System(problem, damping, inverse)
        rhs = _tree.negative(prepared.rhs)
        target = jnp.asarray(self.rtol, prepared.size.dtype) * jnp.sqrt(_tree.dot(rhs, rhs))
        end = self._start(system, rhs, prepared, target)
        if self.max_steps <= _UNROLLED:
            for k in range(self.max_steps):
                stepped = self._step(system, target, end, last=k + 1 == self.max_steps)
                end = _tree.where(end.status == _RUNNING, stepped, end)
        else:
            end = jax.lax.while_loop(lambda c: c.status == _RUNNING, lambda c: self._step(system, target, c), end)
        step = _tree.scale(prepared.size, end.x)
        if state.previous is not None:
            state = state._replace(previous=step)
        image = None if self.warm_start is not None else _tree.scale(prepared.size, end.x_image)
        return Result(step, state, end.steps, end.status, image)

    def _start(self, system: _System, rhs: Params, prepared: _Prepared, target: Scalar) -> _Carry:
        """At zero, or at a multiple of the last solution if that is better."""
        dtype = prepared.size.dtype
        x, residual = jax.tree.map(jnp.zeros_like, rhs), rhs
        model = jnp.zeros([], dtype)
        if self.warm_start is not None:
            factor = jnp.asarray(self.warm_start, dtype) / prepared.size
            warm = _tree.scale(factor, prepared.state.previous)
            warm_residual = _tree.subtract(rhs, system.product(warm))
            warm_model = -0.5 * (_tree.dot(warm, rhs) + _tree.dot(warm, warm_residual))
            better = warm_model < 0
            x, residual = _tree.where(better, warm, x), _tree.where(better, warm_residual, residual)
            model = jnp.where(better, warm_model, model)
        direction, image = jax.tree.map(jnp.zeros_like, (rhs, system.problem.linearisation.outputs))
        curvature = jnp.zeros([], dtype)
        if self.momentum:
            previous = _tree.divide(prepared.state.previous, prepared.size)
            moved = system.problem.image(previous)
            curvature = system.inner(previous, moved, previous, moved).astype(dtype)
            usable = jnp.isfinite(curvature)
            direction, image = _tree.where(usable, (previous, moved), (direction, image))
            curvature = jnp.where(usable, curvature, jnp.zeros_like(curvature))
        z = system.inverse(residual)
        rz = _tree.dot(residual, z).astype(dtype)
        finite = jnp.isfinite(target) & jnp.isfinite(rz)
        arrived = jnp.sqrt(_tree.dot(residual, residual)) <= target
        return _Carry(
            x=x,
            x_image=jax.tree.map(jnp.zeros_like, image),
            residual=residual,
            z=z,
            rz=rz,
            direction=direction,
            image=image,
            curvature=curvature,
            model=model.astype(dtype),
            history=jnp.zeros([self.max_steps + 1], dtype).at[0].set(model.astype(dtype)),
            steps=jnp.zeros([], jnp.int32),
            status=_pick([(~finite, Status.NON_FINITE), (arrived, Status.CONVERGED)]),
        )

    def _step(self, system: _System, target: Scalar, carry: _Carry, last: bool | None = None) -> _Carry:
        """To the minimum along the preconditioned residual, made conjugate to the last direction.

        Args:
            system: the matrix.
            target: for the norm of the residual.
            carry: where it is.
            last: whether this is the last step allowed; None if that is to be looked up.

        Returns:
            The new carry.
        """
        dtype = carry.rz.dtype
        image = system.problem.image(carry.z)
        known = jnp.isfinite(carry.curvature) & (carry.curvature > 0)
        weight = jnp.where(known, 1 / jnp.where(known, carry.curvature, 1), 0)
        mixed = (weight * system.inner(carry.z, image, carry.direction, carry.image)).astype(dtype)
        direction = _tree.axpy(-mixed, carry.direction, carry.z)
        image = _tree.axpy(-mixed, carry.image, image)
        curvature = system.inner(direction, image, direction, image).astype(dtype)
        sound = jnp.isfinite(curvature) & (curvature > 0)
        safe = jnp.where(sound, curvature, jnp.ones_like(curvature))
        moved = carry._replace(direction=direction, image=image, curvature=curvature, steps=carry.steps + 1)
        if self.momentum:
            # A gradient along the previous solution leaves rounding in a direction conjugate to it.
            least = jnp.finfo(dtype).eps * (curvature + mixed * mixed * carry.curvature)
            line = known & jnp.isfinite(curvature) & (curvature <= least)
            sound = sound | line
            kept = (carry.direction, carry.image, carry.curvature)
            latest = _tree.where(line, kept, (direction, image, curvature))
            moved = moved._replace(direction=latest[0], image=latest[1], curvature=latest[2])
            # Only the first residual has a part along the last direction, which is the previous solution.
            slope = _tree.dot(carry.residual, carry.direction).astype(dtype)
            ahead = jnp.where(line, jnp.zeros_like(slope), (carry.rz - mixed * slope) / safe)
            along = (weight * slope).astype(dtype)
            move = _tree.axpy(along, carry.direction, _tree.scale(ahead, direction))
            move_image = _tree.axpy(along, carry.image, _tree.scale(ahead, image))
            fall = ahead * (carry.rz - mixed * slope) + along * slope
        else:
            ahead = carry.rz / safe
            move, move_image, fall = _tree.scale(ahead, direction), _tree.scale(ahead, image), ahead * carry.rz
        model = carry.model - 0.5 * fall
        moved = moved._replace(
            x=_tree.add(carry.x, move),
            x_image=_tree.add(carry.x_image, move_image),
            model=model,
            history=carry.history.at[moved.steps].set(model),
        )

        def ended() -> _Carry:
            return moved._replace(status=jnp.full_like(carry.status, Status.MAX_STEPS))

        def goes_on() -> _Carry:
            return self._with_residual(system, target, moved, system.pulled(move, move_image))

        if last is None:
            reached = jax.lax.cond(moved.steps >= self.max_steps, ended, goes_on)
        else:
            reached = ended() if last else goes_on()
        failed = _pick([(~jnp.isfinite(curvature), Status.NON_FINITE), (~sound, Status.NON_POSITIVE_CURVATURE)])
        return _tree.where(sound, reached, carry._replace(status=failed))

    def _with_residual(self, system: _System, target: Scalar, carry: _Carry, product: Params) -> _Carry:
        """The carry with the residual after a move, and whether to go on."""
        residual = _tree.subtract(carry.residual, product)
        z = system.inverse(residual)
        rz = _tree.dot(residual, z).astype(carry.rz.dtype)
        status = _pick(
            [
                (jnp.sqrt(_tree.dot(residual, residual)) <= target, Status.CONVERGED),
                (~jnp.isfinite(rz), Status.NON_FINITE),
                (rz <= 0, Status.NON_POSITIVE_CURVATURE),
                (self._stalled(carry.history, carry.steps), Status.PROGRESS),
            ]
        )
        return carry._replace(residual=residual, z=z, rz=rz, status=status)

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
