"""Damped Gauss-Newton as an optax transform.

One update reads from top to bottom: linearise on the batch, choose the damping, solve the damped linearised problem
for the incoming gradient, try the step, shorten it if it is too long, and emit it, or a zero update if nothing helps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gn_linear import _tree
from gn_linear import damping as damping_policies
from gn_linear._batch import MISSING, check_keywords, check_model, check_state, checked_params, whole_model
from gn_linear._refusal import ADVICE, Refusal, first_reason
from gn_linear._typing import Count, Flag, Number, Params, Predict, Scalar, check_number, shown
from gn_linear._xla_cpu import fence
from gn_linear.curvature import LinearisedProblem, check_l2, fit_l2, linearised_problem, penalty
from gn_linear.losses import Loss, from_convex
from gn_linear.solvers import CG, Result, Solver, Status

MAX_HALVINGS = 5
"""How often a step that raises the objective is halved before it is refused."""


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
    step_norm: Scalar
    accepted: Flag
    skipped: Count
    refused_in_a_row: Count
    refusal: Count

    @property
    def message(self) -> str:
        """What the last step did in words, with how many were refused and why; not for use inside ``jit``."""
        if bool(self.accepted):
            return f"the last step was taken (refused so far: {int(self.skipped)})"
        reason = Refusal(int(self.refusal))
        status = f" (solver status {Status(int(self.solver_status)).name})" if reason == Refusal.SOLVER else ""
        return (
            f"refused in a row: {int(self.refused_in_a_row)}, so far: {int(self.skipped)}, damping: "
            f"{float(self.damping):.1e}; the last step was refused because {ADVICE[reason]}{status}"
        )


class GaussNewtonState(NamedTuple):
    """The state of ``gauss_newton``; read it through ``gn_linear.info``.

    Attributes:
        count: updates so far, shape ().
        damping: the damping policy's state.
        scale: the curvature scale, 0 before the first finite one, shape ().
        solver: the solver's state.
        model: a checksum of the parameters' shapes, so that another model's state is refused, shape ().
        info: what the last update did.
    """

    count: Count
    damping: damping_policies.DampingState
    scale: Scalar
    solver: Any
    model: jax.Array
    info: GaussNewtonInfo


class _Trial(NamedTuple):
    actual: Scalar
    predicted: Scalar
    gain_ratio: Scalar
    refusal: Count
    informative: Flag

    @property
    def accepted(self) -> Flag:
        return self.refusal == Refusal.NONE


def gauss_newton(
    predict: Predict,
    loss: Loss | Callable[..., Any],
    *,
    solver: Solver = CG(),
    damping: damping_policies.Policy | Number = damping_policies.LevenbergMarquardt(),
    learning_rate: Number | Callable[[Any], Any] = 1.0,
    l2: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Damped Gauss-Newton: solve the linearised problem of each batch, take the step if it helps.

    For the incoming gradient :math:`b`, the Jacobian :math:`J` of the outputs and the Hessian :math:`H` of the loss,

    .. math:: d = -\eta \, (J^T H J + \lambda I + \mu I)^{-1} b.

    Under an adaptive damping policy a step that raises the objective raises the damping and is halved, at most five
    times, until it lowers it. A step that is not finite or still raises the objective is refused: the update is zero,
    the parameters stay as they are to the bit and the step is counted in ``info``. The objective is
    :math:`F + \langle b - \nabla F, \cdot \rangle` with :math:`F` the loss plus the penalty, so clipping, weight decay
    and accumulation in front of this transform compose, and the gain ratio is 1 on every quadratic.

    ``update(updates, state, params, *, inputs, targets=None, full_params=None, curvature_inputs=None,
    curvature_targets=None)`` takes the batch of the gradient as ``inputs`` and ``targets``, handed to ``predict`` and
    ``loss``. ``curvature_inputs`` (with ``curvature_targets``) gives the inner solver another batch; steps are judged
    on ``inputs`` all the same. ``full_params`` is needed inside ``optax.masked`` and ``optax.partition``.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``; the outputs' leading axis is the example.
        loss: a loss of ``gn_linear.losses``, or any convex ``loss(outputs, targets)`` that returns a scalar or one
            value per example.
        solver: the inner solver.
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
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be one of gn_linear.solvers, such as CG(), but is {shown(solver)}.")
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
    solver: Solver
    policy: damping_policies.Policy
    learning_rate: Any
    l2: Any

    def init(self, params: Params) -> GaussNewtonState:
        _tree.check_float_leaves(params, "params")
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
            step_norm=unknown,
            accepted=jnp.ones([], bool),
            skipped=none,
            refused_in_a_row=none,
            refusal=none,
        )
        policy, scale, model = self.policy.init(dtype), jnp.zeros([], dtype), _tree.checksum(params)
        return _tree.copied(GaussNewtonState(none, policy, scale, self.solver.init(params), model, info))

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
        coefficient = fit_l2(self.l2, params)
        problem = linearised_problem(model, self.loss, params, inputs, targets=targets, l2=coefficient)
        curved = problem
        if curvature_inputs is not None:
            curved = linearised_problem(
                model, self.loss, params, curvature_inputs, targets=curvature_targets, l2=coefficient
            )
        rhs = _tree.cast_like(_tree.to_solve(updates), _tree.to_solve(params))
        scale = _curvature_scale(curved, rhs, state.scale)
        mu = self.policy.damping(state.damping, _damping_unit(curved, rhs, scale), state.count).astype(scale.dtype)
        result = self.solver.solve(self.solver.prepare(curved, rhs, state.solver), mu)
        rate = self.learning_rate(state.count) if callable(self.learning_rate) else self.learning_rate
        emitted = _tree.cast_like(_tree.scale(jnp.asarray(rate, scale.dtype), result.step), params)

        # A solver that failed at once (no curvature along the gradient, NaN in a curvature batch) offers no step.
        failed = (result.status == Status.NON_FINITE) | (result.status == Status.NON_POSITIVE_CURVATURE)
        hopeless = first_reason(
            [
                (~same_model, Refusal.STATE),
                (~jnp.isfinite(problem.objective), Refusal.OBJECTIVE),
                (~_tree.all_finite(updates), Refusal.GRADIENT),
                (failed & (result.solver_steps == 0), Refusal.SOLVER),
            ],
            Refusal.NONE,
        )

        def judge(step: Params) -> _Trial:
            point = optax.apply_updates(params, step)
            reached = _tree.total(self.loss(fence(model(point, inputs)), targets), penalty(coefficient, point))
            trial = _judge(problem, rhs, step, reached, self.policy.adaptive)
            lost = hopeless != Refusal.NONE
            return trial._replace(
                refusal=jnp.where(lost, hopeless, trial.refusal), informative=trial.informative | lost
            )

        whole = judge(emitted)
        emitted, trial = _shortened(judge, emitted, whole) if self.policy.adaptive else (emitted, whole)
        # Adding -0.0 changes no float; adding +0.0 would turn -0.0 into +0.0.
        kept = jax.tree.map(lambda u: jnp.where(trial.accepted, u, jnp.full_like(u, -0.0)), emitted)
        learnt = self.policy.update(state.damping, whole.gain_ratio, whole.accepted)
        new_state = GaussNewtonState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            damping=_tree.where(whole.informative, learnt, state.damping),
            scale=scale,
            solver=_tree.where(_tree.all_finite(result.step), result.state, state.solver),
            model=state.model,
            info=_report(problem, trial, result, mu, emitted, state.info),
        )
        return kept, new_state


def _check_curvature_batch(targets: Any, curvature_inputs: Any, curvature_targets: Any) -> None:
    """Raise if the curvature batch is half given: a loss would take the missing targets for zeros."""
    if curvature_inputs is None and curvature_targets is not None:
        raise ValueError("curvature_targets are given, but curvature_inputs is missing; pass both or neither.")
    if curvature_inputs is not None and curvature_targets is None and targets is not None:
        raise ValueError("curvature_inputs are given, but curvature_targets is missing; pass both or neither.")


def _curvature_scale(problem: LinearisedProblem, rhs: Params, known: Scalar) -> Scalar:
    """The Rayleigh quotient of the curvature along the first gradient that gives a positive one."""

    def estimate() -> Scalar:
        size = _tree.norm(rhs)
        unit = _tree.divide(rhs, jnp.where(size > 0, size, jnp.ones_like(size)))
        quotient = problem.quadratic(unit).astype(known.dtype)
        return jnp.where(jnp.isfinite(quotient) & (quotient > 0), quotient, jnp.zeros_like(quotient))

    return jax.lax.cond(known > 0, lambda: known, estimate)


def _damping_unit(problem: LinearisedProblem, rhs: Params, scale: Scalar) -> Scalar:
    """The curvature scale, or while there is none (Huber with outliers alone) what the loss itself suggests."""
    size = _tree.norm(rhs)
    guess = size * (size / problem.objective.astype(size.dtype))
    return jnp.where((scale > 0) | ~jnp.isfinite(guess), scale, jnp.maximum(guess, jnp.zeros_like(guess)))


def _judge(problem: LinearisedProblem, rhs: Params, emitted: Params, trial_objective: Scalar, adaptive: bool) -> _Trial:
    """Compare what the step did with what the quadratic model promised."""
    step = _tree.to_solve(emitted)
    predicted, rest = problem.reductions(rhs, step)
    actual = _tree.total(problem.objective, -trial_objective, -rest)
    exact = actual == predicted
    ratio = jnp.where(exact, jnp.ones_like(actual), actual / jnp.where(exact, jnp.ones_like(predicted), predicted))
    # Some roundings of the terms: a change below them cannot be told from none.
    resolution = (
        4 * jnp.finfo(actual.dtype).eps * (jnp.abs(problem.objective) + jnp.abs(trial_objective) + jnp.abs(rest))
    )
    finite = jnp.isfinite(actual) & jnp.isfinite(predicted)
    noise = finite & (jnp.abs(actual) <= resolution) & (jnp.abs(predicted) <= resolution)
    worse = (actual < 0) & adaptive
    refusal = first_reason(
        [
            (~_tree.all_finite(emitted), Refusal.STEP),
            (~finite, Refusal.TRIAL),
            (worse & noise, Refusal.ROUNDING),
            (worse, Refusal.INCREASE),
        ],
        Refusal.NONE,
    )
    return _Trial(actual, predicted, ratio, refusal, ~noise)


def _shortened(judge: Callable[[Params], _Trial], step: Params, whole: _Trial) -> tuple[Params, _Trial]:
    """Halve a finite step that raises the objective until it lowers it, at a trial evaluation each.

    It rescues the step where few examples are far outside the model's reach, such as confident mistakes, whose
    curvature has vanished: refusing would skip their batch for ever. Halving rounds nothing.

    Args:
        judge: of a step.
        step: the whole step.
        whole: what ``judge`` said of it.

    Returns:
        The step that was judged last, and its judgement.
    """

    def fails(carry: tuple[Count, Params, _Trial]) -> Flag:
        halvings, _, trial = carry
        too_long = (trial.refusal == Refusal.TRIAL) | (trial.refusal == Refusal.INCREASE)
        promising = jnp.isfinite(trial.predicted) & (trial.predicted != 0)
        return too_long & promising & (halvings < MAX_HALVINGS)

    def halve(carry: tuple[Count, Params, _Trial]) -> tuple[Count, Params, _Trial]:
        halvings, shorter, _ = carry
        shorter = jax.tree.map(lambda leaf: leaf * jnp.asarray(0.5, leaf.dtype), shorter)
        return halvings + 1, shorter, judge(shorter)

    return jax.lax.while_loop(fails, halve, (jnp.zeros([], jnp.int32), step, whole))[1:]


def _report(
    problem: LinearisedProblem, trial: _Trial, result: Result, mu: Scalar, emitted: Params, last: GaussNewtonInfo
) -> GaussNewtonInfo:
    dtype = last.loss.dtype
    refused = (~trial.accepted).astype(last.skipped.dtype)
    return GaussNewtonInfo(
        loss=problem.objective.astype(dtype),
        predicted_reduction=trial.predicted.astype(dtype),
        actual_reduction=trial.actual.astype(dtype),
        gain_ratio=trial.gain_ratio.astype(dtype),
        damping=mu,
        solver_steps=result.solver_steps,
        solver_status=result.status,
        step_norm=_tree.norm(_tree.to_solve(emitted)).astype(dtype),
        accepted=trial.accepted,
        skipped=last.skipped + refused,
        refused_in_a_row=(last.refused_in_a_row + 1) * refused,
        refusal=trial.refusal,
    )
