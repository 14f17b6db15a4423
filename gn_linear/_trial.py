"""The trial of a step: solve, look at the objective at its end, and try again where that helps.

Under an adaptive damping policy a step that raises the objective is not the last word: where solving again is cheap it
is solved again with more damping, otherwise it is halved; a damping path looks at several dampings at once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gn_linear import _tree
from gn_linear._refusal import Refusal, first_that_holds
from gn_linear._typing import Count, Flag, Params, Scalar
from gn_linear.curvature import LinearisedProblem, Reductions
from gn_linear.damping import DampingState, Path, Policy
from gn_linear.solvers import Result, Solver, Status

MAX_RETRIES = 5
"""How often a step that raises the objective is halved, or solved again with more damping, before it is refused."""


class Trial(NamedTuple):
    """The verdict on a step.

    Attributes:
        actual: reduction of the objective, less what the incoming gradient holds besides this batch's.
        predicted: reduction by the quadratic model.
        gain_ratio: the one over the other.
        reached: the objective at the end of the step.
        refusal: a ``Refusal``.
        informative: whether the reductions are more than rounding.
    """

    actual: Scalar
    predicted: Scalar
    gain_ratio: Scalar
    reached: Scalar
    refusal: Count
    informative: Flag

    @property
    def accepted(self) -> Flag:
        """Whether the step is taken."""
        return self.refusal == Refusal.NONE

    @property
    def too_long(self) -> Flag:
        """Whether a shorter step may do."""
        beyond = (self.refusal == Refusal.TRIAL) | (self.refusal == Refusal.INCREASE)
        return beyond & jnp.isfinite(self.predicted) & (self.predicted != 0)


class Attempt(NamedTuple):
    """A step and its verdict.

    Attributes:
        damping: absolute, that it was solved with.
        result: what the solver returned.
        emitted: the step with the learning rate, in the dtypes of the parameters.
        trial: the verdict.
        evaluations: of the objective so far, this search's.
    """

    damping: Scalar
    result: Result
    emitted: Params
    trial: Trial
    evaluations: Count


@dataclasses.dataclass(frozen=True)
class Search:
    """The search for a step that lowers the objective, once everything is known that does not depend on the damping.

    Attributes:
        problem: the linearised problem of the batch on which steps are judged.
        rhs: the incoming gradient, in the dtypes of the solve.
        objective: of a point, like the parameters.
        solver: the inner solver.
        prepared: from ``solver.prepare``.
        policy: the damping policy.
        unit: what its multiples are multiples of.
        count: updates so far.
        rate: the learning rate.
        hopeless: why every step will be refused, or ``Refusal.NONE``.
        same_batch: whether the solver's batch is the one on which steps are judged.
        adjusted: ``(step, damping) -> step``, what becomes of a solved step before it is tried, such as a
            projection onto bounds.
    """

    problem: LinearisedProblem
    rhs: Params
    objective: Callable[[Params], Scalar]
    solver: Solver
    prepared: Any
    policy: Policy
    unit: Scalar
    count: Count
    rate: Scalar
    hopeless: Count
    same_batch: bool = True
    adjusted: Callable[[Params, Scalar], Params] | None = None

    def run(self, damping: DampingState) -> tuple[Attempt, DampingState]:
        """The step to report, with what the policy learnt.

        Args:
            damping: the policy's state.

        Returns:
            The last attempt, accepted or not, and the policy's new state.
        """
        if isinstance(self.policy, Path):
            return self._best_of_path(damping, self.policy)
        first = self._attempt(self.policy.damping(damping, self.unit, self.count))
        if not self.policy.adaptive:
            return first, damping
        if self.solver.cheap_again:
            return self._with_more_damping(first, damping)
        return self._shortened(first), learnt(self.policy, damping, first.trial)

    def _attempt(self, damping: Scalar) -> Attempt:
        mu = damping.astype(self.rate.dtype)
        result = self.solver.solve(self.prepared, mu)
        step = result.step if self.adjusted is None else self.adjusted(result.step, mu)
        emitted = _tree.cast_like(_tree.scale(self.rate, step), self.problem.params)
        image = result.image if self._images_fit() else None
        image = None if image is None else _tree.scale(self.rate, image)
        trial = self._judged(emitted, result, image)
        return Attempt(mu, result._replace(image=image), emitted, trial, jnp.ones([], jnp.int32))

    def _images_fit(self) -> bool:
        """Whether the image of the solver's step is that of the step as it is emitted and judged."""
        leaves = jax.tree.leaves((self.problem.params, self.problem.linearisation.outputs))
        exact = all(leaf.dtype == _tree.at_least_float32(leaf.dtype) for leaf in leaves)
        return exact and self.same_batch and self.adjusted is None

    def _judged(self, emitted: Params, result: Result, image: Any) -> Trial:
        # A solver that failed at once (no curvature along the gradient, NaN in a curvature batch) offers no step.
        failed = (result.status == Status.NON_FINITE) | (result.status == Status.NON_POSITIVE_CURVATURE)
        failed = failed & (result.solver_steps == 0)
        lost = (self.hopeless != Refusal.NONE) | failed
        reason = jnp.where(self.hopeless != Refusal.NONE, self.hopeless, jnp.int32(Refusal.SOLVER))
        reached = self.objective(optax.apply_updates(self.problem.params, emitted))
        trial = judge(self.problem, self.rhs, emitted, reached, self.policy.adaptive, image)
        return trial._replace(refusal=jnp.where(lost, reason, trial.refusal), informative=trial.informative | lost)

    def _shortened(self, first: Attempt) -> Attempt:
        """Halve a finite step that raises the objective until it lowers it, at a trial evaluation each.

        It rescues the step where few examples are far outside the model's reach, such as confident mistakes, whose
        curvature has vanished: refusing would skip their batch for ever. Halving rounds nothing.

        Args:
            first: the whole step.

        Returns:
            The step that was judged last.
        """

        def halve(carry: tuple[Count, Params, Any, Trial]) -> tuple[Count, Params, Any, Trial]:
            halvings, *long, _ = carry
            step, image = jax.tree.map(lambda leaf: leaf * jnp.asarray(0.5, leaf.dtype), long)
            return halvings + 1, step, image, self._judged(step, first.result, image)

        halvings, emitted, _, trial = jax.lax.while_loop(
            lambda carry: carry[3].too_long & (carry[0] < MAX_RETRIES),
            halve,
            (jnp.zeros([], jnp.int32), first.emitted, first.result.image, first.trial),
        )
        return first._replace(emitted=emitted, trial=trial, evaluations=first.evaluations + halvings)

    def _with_more_damping(self, first: Attempt, damping: DampingState) -> tuple[Attempt, DampingState]:
        """Solve again, from what is prepared, with the damping that the policy learns from each refusal."""

        def again(carry: tuple[Count, Attempt, DampingState]) -> tuple[Count, Attempt, DampingState]:
            retries, last, damping = carry
            damping = self.policy.update(damping, last.trial.gain_ratio, last.trial.accepted)
            return retries + 1, self._attempt(self.policy.damping(damping, self.unit, self.count)), damping

        retries, last, damping = jax.lax.while_loop(
            lambda carry: carry[1].trial.too_long & (carry[0] < MAX_RETRIES),
            again,
            (jnp.zeros([], jnp.int32), first, damping),
        )
        last = last._replace(evaluations=1 + retries)
        return last, learnt(self.policy, damping, last.trial)

    def _best_of_path(self, damping: DampingState, path: Path) -> tuple[Attempt, DampingState]:
        """Try all dampings of the path side by side; the one with the lowest objective is the step."""
        attempts = jax.vmap(self._attempt)(path.dampings(damping, self.unit))
        accepted = attempts.trial.refusal == Refusal.NONE
        gains = jnp.where(accepted, attempts.trial.actual, -jnp.inf)
        # Where none is accepted, the one with the most damping says why, and is halved.
        best = jnp.where(jnp.any(accepted), jnp.argmax(gains), path.most)
        chosen = jax.tree.map(lambda x: x[best], attempts)._replace(evaluations=jnp.int32(len(path.factors)))
        moved = path.moved(damping, best, chosen.trial.accepted)
        return self._shortened(chosen), _tree.where(chosen.trial.informative, moved, path.relax(damping))


def learnt(policy: Policy, damping: DampingState, trial: Trial) -> DampingState:
    """What a policy remembers after a trial.

    Args:
        policy: the damping policy.
        damping: its state before.
        trial: the verdict on the step.

    Returns:
        Its state after.
    """
    new = policy.update(damping, trial.gain_ratio, trial.accepted)
    return _tree.where(trial.informative, new, policy.relax(damping))


def judge(
    problem: LinearisedProblem, rhs: Params, emitted: Params, trial_objective: Scalar, adaptive: bool, image: Any = None
) -> Trial:
    """Compare what a step does with what the quadratic model promised.

    Args:
        problem: the linearised problem of the batch.
        rhs: the gradient that the step was solved for, in the dtypes of the solve.
        emitted: the step, in the dtypes of the parameters.
        trial_objective: the objective at its end.
        adaptive: whether a step that raises the objective is refused.
        image: what the Jacobian makes of the step, if that is known already.

    Returns:
        The verdict.
    """
    reductions = problem.reductions(rhs, _tree.to_solve(emitted), image)
    sound = _tree.all_finite(emitted)
    return verdict(problem.objective, trial_objective, reductions, problem.sensitivity, sound, adaptive)


def verdict(
    before: Scalar, after: Scalar, reductions: Reductions, sensitivity: Scalar, sound: Flag, adaptive: bool
) -> Trial:
    """Compare two values of the objective with what the quadratic model promised.

    Args:
        before: the objective.
        after: at the end of the step.
        reductions: by the model.
        sensitivity: how much the objective changes by relative changes of the outputs.
        sound: whether the step is finite.
        adaptive: whether a step that raises the objective is refused.

    Returns:
        The verdict.
    """
    predicted, rest = reductions
    actual = _tree.total(before, -after, -rest)
    exact = actual == predicted
    ratio = jnp.where(exact, jnp.ones_like(actual), actual / jnp.where(exact, jnp.ones_like(predicted), predicted))
    # Some roundings of the terms, and of the outputs in them: a change below these cannot be told from none.
    terms = (before, after, rest, sensitivity)
    resolution = 4 * jnp.finfo(actual.dtype).eps * _tree.total(*(jnp.abs(term) for term in terms))
    finite = jnp.isfinite(actual) & jnp.isfinite(predicted)
    noise = finite & (jnp.abs(actual) <= resolution) & (jnp.abs(predicted) <= resolution)
    worse = (actual < 0) & adaptive
    refusal = first_that_holds(
        [
            (~sound, Refusal.STEP),
            (~finite, Refusal.TRIAL),
            (worse & noise, Refusal.ROUNDING),
            (worse, Refusal.INCREASE),
        ],
        Refusal.NONE,
    )
    return Trial(actual, predicted, ratio, after, refusal, ~noise)
