"""Damped Gauss-Newton as an optax transform.

One update reads from top to bottom: linearise on the batch, search for a step that lowers the objective (choose the
damping, solve for the incoming gradient, try the step, try again), and emit it, or a zero update if nothing helps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gn_linear import _tree
from gn_linear import damping as damping_policies
from gn_linear._batch import (
    MISSING,
    check_keywords,
    check_model,
    check_stacked,
    check_state,
    checked_params,
    whole_model,
)
from gn_linear._linearise import merge_batches, over_batches
from gn_linear._refusal import ADVICE, Refusal, first_that_holds
from gn_linear._trial import Attempt, Search
from gn_linear._typing import Count, Flag, Number, Params, Predict, Scalar, check_number, shown
from gn_linear._xla_cpu import fence
from gn_linear.curvature import (
    LinearisedProblem,
    check_l2,
    curvature_scale,
    damping_unit,
    fit_l2,
    linearised_problem,
    penalty,
)
from gn_linear.losses import Loss, from_convex
from gn_linear.solvers import ByStructure, Choice, Solver, Status, choose


class GaussNewtonInfo(NamedTuple):
    """What the last update of ``gauss_newton`` did; every field has shape ().

    Attributes:
        loss: the objective before the step: loss plus ``l2`` penalty on ``inputs``.
        predicted_reduction: by the undamped quadratic model.
        actual_reduction: of the objective, less what the incoming gradient holds besides this batch's.
        gain_ratio: actual over predicted; 1 on every quadratic, also where both are negative (a step that overshoots,
            solved on another curvature batch), which is refused.
        damping: the absolute damping of this step.
        solver_steps: inner steps taken.
        solver_status: a ``gn_linear.solvers.Status``.
        solver_choice: a ``gn_linear.solvers.Choice``.
        step_norm: 2-norm of the step that was tried last, learning rate and halvings included.
        accepted: whether it was taken.
        skipped: steps refused so far.
        refused_in_a_row: steps refused since the last one taken.
        refusal: why the last step was refused, a ``gn_linear.Refusal``.
    """

    loss: Scalar
    predicted_reduction: Scalar
    actual_reduction: Scalar
    gain_ratio: Scalar
    damping: Scalar
    solver_steps: Count
    solver_status: Count
    solver_choice: Count
    step_norm: Scalar
    accepted: Flag
    skipped: Count
    refused_in_a_row: Count
    refusal: Count

    @property
    def message(self) -> str:
        """What the last step did in words, with how many were refused and why; not for use inside ``jit``."""
        solver = Choice(int(self.solver_choice)).words
        if bool(self.accepted):
            return f"the last step was taken (refused so far: {int(self.skipped)}); {solver}"
        reason = Refusal(int(self.refusal))
        status = f" (solver status {Status(int(self.solver_status)).name})" if reason == Refusal.SOLVER else ""
        return (
            f"refused in a row: {int(self.refused_in_a_row)}, so far: {int(self.skipped)}, damping: "
            f"{float(self.damping):.1e}; the last step was refused because {ADVICE[reason]}{status}; {solver}"
        )


class GaussNewtonState(NamedTuple):
    """The state of ``gauss_newton``; read it through ``gn_linear.info``.

    Attributes:
        count: updates so far, shape ().
        damping: the damping policy's state.
        scale: the curvature scale, 0 before the first finite one, shape ().
        reached: the objective at the end of the last step taken, on its own batch, shape ().
        solver: the solver's state.
        model: a checksum of the parameters' shapes, so that another model's state is refused, shape ().
        info: what the last update did.
    """

    count: Count
    damping: damping_policies.DampingState
    scale: Scalar
    reached: Scalar
    solver: Any
    model: jax.Array
    info: GaussNewtonInfo


def gauss_newton(
    predict: Predict,
    loss: Loss | Callable[..., Any],
    *,
    solver: Solver | None = None,
    damping: damping_policies.Policy | Number = damping_policies.LevenbergMarquardt(),
    learning_rate: Number | Callable[[Any], Any] = 1.0,
    l2: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Damped Gauss-Newton: solve the linearised problem of each batch, take the step if it helps.

    For the incoming gradient :math:`b`, the Jacobian :math:`J` of the outputs and the Hessian :math:`H` of the loss,

    .. math:: d = -\eta \, (J^T H J + \lambda I + \mu I)^{-1} b.

    Under an adaptive damping policy a step that raises the objective raises the damping and is halved, at most five
    times, until it lowers it; ``solvers.Lanczos`` solves again with more damping instead, and ``damping.Path`` takes
    the best of several. A step that is not finite or still raises the objective is refused: the update is zero,
    the parameters stay as they are to the bit and the step is counted in ``info``. The objective is
    :math:`F + \langle b - \nabla F, \cdot \rangle` with :math:`F` the loss plus the penalty, so clipping, weight decay
    and accumulation in front of this transform compose, and the gain ratio is 1 on every quadratic.

    ``update(updates, state, params, *, inputs, targets=None, full_params=None, curvature_inputs=None,
    curvature_targets=None)`` takes the batch of the gradient as ``inputs`` and ``targets``, handed to ``predict`` and
    ``loss``. ``curvature_inputs`` (with ``curvature_targets``) gives the inner solver another batch; steps are judged
    on ``inputs`` all the same. ``full_params`` is needed inside ``optax.masked`` and ``optax.partition``. A solver with
    fresh batches takes them stacked on a leading axis of ``inputs`` and ``targets``, and the gradient of their mean.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``; the outputs' leading axis is the example.
        loss: a loss of ``gn_linear.losses``, or any convex ``loss(outputs, targets)`` that returns a scalar or one
            value per example.
        solver: the inner solver; None takes what ``solvers.choose`` finds for the parameters: for networks of dense
            layers and convolutions one conjugate gradient step with Kronecker factors and momentum, for networks that
            are differentiated by their inputs two with a part of the batch, else ``CG()``.
        damping: a policy of ``gn_linear.damping``, or a number, which is a constant absolute damping.
        learning_rate: factor :math:`\eta` of the step, a number or an optax schedule.
        l2: coefficient :math:`\lambda` of the penalty :math:`\frac12 \lambda \|\theta\|^2`, a number or a pytree like
            the parameters. The incoming gradient must already contain the penalty's.

    Returns:
        An optax transform whose update is to be added to the parameters (``optax.apply_updates``).

    Raises:
        TypeError: an argument has the wrong type; in ``update``, ``inputs`` is missing, a keyword is misspelt, the
            state is another transform's, or a leaf is not a float array.
        ValueError: a number is out of range; in ``update``, ``params`` is missing, shapes do not fit, or the curvature
            batch is half given.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import gn_linear as gnl
        >>> x = jnp.linspace(0.0, 1.0, 20)
        >>> y = 2.0 * jnp.exp(-1.5 * x)
        >>> predict = lambda p, x: p["a"] * jnp.exp(-p["k"] * x)
        >>> loss = gnl.losses.squared_error
        >>> optimiser = gnl.gauss_newton(predict, loss)
        >>> params = {"a": jnp.array(1.0), "k": jnp.array(1.0)}
        >>> state = optimiser.init(params)
        >>> for _ in range(10):
        ...     grads = jax.grad(lambda p: loss(predict(p, x), y))(params)
        ...     updates, state = optimiser.update(grads, state, params, inputs=x, targets=y)
        ...     params = optax.apply_updates(params, updates)
        >>> print(f"{params['a']:.3f} {params['k']:.3f}")
        2.000 1.500

    References:
        Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent; Martens (2010),
        Deep learning via Hessian-free optimization.
    """
    objective = from_convex(loss)
    policy = damping_policies.as_policy(damping)
    if not callable(predict):
        raise TypeError(f"predict must be a function predict(params, inputs), but is {shown(predict)}.")
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(f"solver must be one of gn_linear.solvers, such as CG(), but is {shown(solver)}.")
    if (
        solver is not None
        and not solver.adaptable
        and not (isinstance(policy, damping_policies.Constant) and _is_zero(policy.value))
    ):
        raise TypeError(
            f"solver has a filter without damping, {shown(solver)}, so damping must be 0.0, but is {shown(damping)}."
        )
    if not callable(learning_rate):
        check_number(learning_rate, "learning_rate", also=", or a schedule")
    check_l2(l2)
    transform = _GaussNewton(predict, objective, solver, policy, learning_rate, l2)
    return optax.GradientTransformationExtraArgs(transform.init, transform.update)


@dataclasses.dataclass(frozen=True)
class _GaussNewton:
    """The two functions of the transform, and what they share."""

    predict: Predict
    loss: Loss
    solver: Solver | None
    policy: damping_policies.Policy
    learning_rate: Any
    l2: Any

    def chosen(self, params: Params) -> tuple[Solver, Choice]:
        return (self.solver, Choice.GIVEN) if self.solver is not None else choose(params)

    def init(self, params: Params) -> GaussNewtonState:
        _tree.check_float_leaves(params, "params")
        solver, choice = self.chosen(params)
        dtype = _tree.scalar_dtype(params)
        unknown, none = jnp.full([], jnp.nan, dtype), jnp.zeros([], jnp.int32)
        info = GaussNewtonInfo(
            loss=unknown,
            predicted_reduction=unknown,
            actual_reduction=unknown,
            gain_ratio=unknown,
            damping=unknown,
            solver_steps=none,
            solver_status=none,
            solver_choice=jnp.full([], choice, jnp.int32),
            step_norm=unknown,
            accepted=jnp.ones([], bool),
            skipped=none,
            refused_in_a_row=none,
            refusal=none,
        )
        zero = jnp.zeros([], dtype)
        state = GaussNewtonState(
            count=none,
            damping=self.policy.init(dtype),
            scale=zero,
            reached=zero,
            solver=solver.init(params),
            model=_tree.checksum(params),
            info=info,
        )
        return _tree.copied(state)

    def update(
        self,
        updates: Params,
        state: Any,
        params: Any = None,
        *,
        inputs: Any = MISSING,
        targets: Any = None,
        full_params: Params | None = None,
        curvature_inputs: Any = None,
        curvature_targets: Any = None,
        **ignored: Any,
    ) -> tuple[Params, GaussNewtonState]:
        check_keywords("gauss_newton", ignored)
        _check_curvature_batch(targets, curvature_inputs, curvature_targets)
        params = checked_params("gauss_newton", updates, params, inputs)
        check_state("gauss_newton", state, GaussNewtonState, self.init, params)
        same_model = check_model("gauss_newton", state.model, params)
        model = whole_model(self.predict, params, full_params)
        solver, choice = self.chosen(params)
        if solver.batches is not None:
            check_stacked(solver, solver.batches, curvature_inputs, inputs=inputs, targets=targets)
            model, targets = over_batches(model), merge_batches(targets)
        coefficient = fit_l2(self.l2, params)
        problem = linearised_problem(model, self.loss, params, inputs, targets=targets, l2=coefficient)
        curved = problem
        if curvature_inputs is not None:
            curved = linearised_problem(
                model, self.loss, params, curvature_inputs, targets=curvature_targets, l2=coefficient
            )
        rhs = _tree.cast_like(_tree.to_solve(updates), _tree.to_solve(params))
        scale = jax.lax.cond(
            state.scale > 0, lambda: state.scale, lambda: curvature_scale(curved, rhs).astype(state.scale.dtype)
        )
        rate = self.learning_rate(state.count) if callable(self.learning_rate) else self.learning_rate
        hopeless = first_that_holds(
            [
                (~same_model, Refusal.STATE),
                (~jnp.isfinite(problem.objective), Refusal.OBJECTIVE),
                (~_tree.all_finite(updates), Refusal.GRADIENT),
            ],
            Refusal.NONE,
        )

        def objective(point: Params) -> Scalar:
            return _tree.total(self.loss(fence(model(point, inputs)), targets), penalty(coefficient, point))

        search = Search(
            problem=problem,
            rhs=rhs,
            objective=objective,
            solver=solver,
            prepared=solver.prepare(curved, rhs, state.solver),
            policy=self.policy,
            unit=damping_unit(curved, rhs, scale),
            count=state.count,
            rate=jnp.asarray(rate, scale.dtype),
            hopeless=hopeless,
            same_batch=curved is problem,
        )
        surprise, before = problem.objective.astype(scale.dtype) - state.reached, state.info
        damping = self.policy.reviewed(state.damping, before.gain_ratio, surprise, before.predicted_reduction)
        last, learnt = search.run(damping)
        if isinstance(solver, ByStructure) and choice != Choice.GIVEN:
            choice = solver.choice(curved)
        # Adding -0.0 changes no float; adding +0.0 would turn -0.0 into +0.0.
        kept = jax.tree.map(lambda u: jnp.where(last.trial.accepted, u, jnp.full_like(u, -0.0)), last.emitted)
        after = _next_state(state, search, last, scale)
        told = after.info._replace(solver_choice=jnp.full_like(after.info.solver_choice, choice))
        return kept, after._replace(damping=learnt, info=told)


def _next_state(state: GaussNewtonState, search: Search, last: Attempt, scale: Scalar) -> GaussNewtonState:
    """The state after a step, but for what the policy learnt."""
    trial = last.trial
    kept_by_solver = trial.accepted if search.solver.part_of_run else _tree.all_finite(last.result.step)
    return state._replace(
        count=jnp.asarray(optax.safe_increment(state.count)),
        # A scale under which every step is rounding came from another regime, and is estimated anew.
        scale=jnp.where(trial.informative | ~jnp.asarray(search.policy.adaptive), scale, jnp.zeros_like(scale)),
        reached=jnp.where(trial.accepted, trial.reached.astype(scale.dtype), state.reached),
        solver=_tree.where(kept_by_solver, last.result.state, state.solver),
        info=_report(search.problem, last, state.info),
    )


def _is_zero(value: Number) -> bool:
    return check_number(value, "damping") == 0


def _check_curvature_batch(targets: Any, curvature_inputs: Any, curvature_targets: Any) -> None:
    """Raise if the curvature batch is half given: a loss would take the missing targets for zeros."""
    if curvature_inputs is None and curvature_targets is not None:
        raise ValueError("curvature_targets are given, but curvature_inputs is missing; pass both or neither.")
    if curvature_inputs is not None and curvature_targets is None and targets is not None:
        raise ValueError("curvature_inputs are given, but curvature_targets is missing; pass both or neither.")


def _report(problem: LinearisedProblem, last: Attempt, before: GaussNewtonInfo) -> GaussNewtonInfo:
    dtype, trial = before.loss.dtype, last.trial
    refused = (~trial.accepted).astype(before.skipped.dtype)
    return before._replace(
        loss=problem.objective.astype(dtype),
        predicted_reduction=trial.predicted.astype(dtype),
        actual_reduction=trial.actual.astype(dtype),
        gain_ratio=trial.gain_ratio.astype(dtype),
        damping=last.damping,
        solver_steps=last.result.solver_steps,
        solver_status=last.result.status,
        step_norm=_tree.norm(_tree.to_solve(last.emitted)).astype(dtype),
        accepted=trial.accepted,
        skipped=before.skipped + refused,
        refused_in_a_row=(before.refused_in_a_row + 1) * refused,
        refusal=trial.refusal,
    )
