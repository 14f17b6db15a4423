"""The loop of `least_squares`: search for a step, take it, test for convergence, in the parts of the transform."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._outcome import Outcome
from gn_linear._refusal import Refusal, first_reason
from gn_linear._residuals import (
    Point,
    Residuals,
    in_units,
    loss_of_points,
    scaled_problem,
    second_derivative,
    unit_of,
)
from gn_linear._trial import Attempt, Search
from gn_linear._typing import Count, Flag, Scalar
from gn_linear.curvature import LinearisedProblem
from gn_linear.damping import DampingState, LevenbergMarquardt
from gn_linear.solvers import Solver

RUNNING = 127
"""The code of a fit that has not ended."""

POLICY = LevenbergMarquardt(initial=1e-3, minimum=1e-30, maximum=1e30)
"""Nielsen's rule; multiples are of the largest column's square, or of each column's under Moré's scaling."""

WORTHWHILE = 1e-6
"""A metric that lowers the cost by less than this part of it has found nothing new."""

EVEN = 1e-3
"""Columns whose norms differ by less have no other metric to try."""

CHANGES = 4
"""How often the metric is changed at most."""

BENT = 0.75
"""The largest acceleration, in velocities, by which a step is bent."""


class FitState(NamedTuple):
    """What the loop carries.

    Attributes:
        vector: the parameters, shape (P,).
        scaled: whether the metric is Moré's.
        metric: its running maximum of the norms of the columns, shape (P,).
        reference: the largest column when the damping was last set, 0 before.
        damping: the policy's state.
        solver: the solver's.
        first: the scale of the cost at the start.
        entered: likewise, when this metric was entered.
        changes: how often the metric was changed.
        steps: searches so far.
        evaluations: of the residuals so far.
        status: an ``Outcome``, or ``RUNNING``.
    """

    vector: jax.Array
    scaled: Flag
    metric: jax.Array
    reference: Scalar
    damping: DampingState
    solver: Any
    first: Scalar
    entered: Scalar
    changes: Count
    steps: Count
    evaluations: Count
    status: Count


class _Look(NamedTuple):
    """What is known at a point before a step is sought."""

    point: Point
    scale: Scalar
    problem: LinearisedProblem
    scaled: Flag
    metric: jax.Array
    stretch: jax.Array  # of the step, to that of the parameters
    columns: jax.Array
    cosine: Scalar
    damping: DampingState
    reference: Scalar
    finite: Flag
    uneven: Flag  # whether the two metrics differ by much


@dataclasses.dataclass(frozen=True)
class FitLoop:
    """The loop and its settings.

    Attributes:
        residuals: of the fit.
        solver: the inner solver.
        lower: bounds, shape (P,).
        upper: likewise.
        frozen: which parameters stay, shape (P,).
        scaling: as in ``Options``.
        acceleration: likewise.
        max_steps: the cap on steps.
        rtol: relative tolerance of the parameters.
        atol: of the norm of the residuals.
    """

    residuals: Residuals
    solver: Solver
    lower: jax.Array
    upper: jax.Array
    frozen: Any
    scaling: bool | None
    acceleration: bool
    max_steps: int
    rtol: Any
    atol: Any

    def run(self, start: jax.Array) -> FitState:
        """The end of the loop.

        Args:
            start: the parameters to start from, within bounds.

        Returns:
            Its last state.
        """
        return jax.lax.while_loop(lambda state: state.status == RUNNING, self._step, self._first(start))

    def _first(self, start: jax.Array) -> FitState:
        none, dtype = jnp.zeros([], jnp.int32), start.dtype
        scaled = jnp.asarray(self.scaling is True)
        return FitState(
            vector=start,
            scaled=scaled,
            metric=jnp.zeros_like(start),
            reference=jnp.zeros([], dtype),
            damping=POLICY.init(dtype),
            solver=self.solver.init(start),
            first=jnp.full([], jnp.inf, dtype),
            entered=jnp.full([], jnp.inf, dtype),
            changes=none,
            steps=none,
            evaluations=jnp.ones([], jnp.int32),
            status=jnp.full([], RUNNING, jnp.int32),
        )

    def _step(self, state: FitState) -> FitState:
        look = self._look(state)
        rhs = look.problem.linearisation.vjp(look.problem.output_gradient)
        search = Search(
            problem=look.problem,
            rhs=rhs,
            objective=lambda z: self.residuals.value(self._moved(state.vector, look.stretch * z), look.scale),
            solver=self.solver,
            prepared=self.solver.prepare(look.problem, rhs, state.solver),
            policy=POLICY,
            unit=jnp.ones_like(look.scale),
            count=state.steps,
            rate=jnp.ones_like(look.scale),
            hopeless=first_reason([(~look.finite, Refusal.GRADIENT)], Refusal.NONE),
            adjusted=lambda step, mu: self._adjusted(state, look, step, mu),
        )
        last, learnt = search.run(look.damping)
        here = self._arrived(look)
        taken = last.trial.accepted & (here == RUNNING)
        moved = self._moved(state.vector, look.stretch * last.emitted)
        vector = jnp.where(taken, moved, state.vector)
        ended = jnp.where(here == RUNNING, self._converged(state, look, last, learnt, moved), here)
        here_left = look.scale * jnp.sqrt(2 * look.problem.objective)
        gained = jnp.where(taken, last.trial.actual, jnp.zeros_like(last.trial.actual))
        left = look.scale * jnp.sqrt(2 * jnp.maximum(look.problem.objective - gained, 0))
        after = state._replace(
            vector=vector,
            scaled=look.scaled,
            metric=look.metric,
            reference=look.reference,
            damping=learnt,
            solver=_tree.where(_tree.all_finite(last.result.step), last.result.state, state.solver),
            first=jnp.where(jnp.isinf(state.first), here_left, state.first),
            entered=jnp.where(state.reference == 0, here_left, state.entered),
            steps=state.steps + (here == RUNNING),
            evaluations=state.evaluations + jnp.where(here == RUNNING, last.evaluations, 0),
            status=ended,
        )
        after = self._in_other_metric(after, left, (here == RUNNING) & look.uneven)
        capped = (after.status == RUNNING) & (after.steps >= self.max_steps)
        # Nothing is left, and still the parameters grow: nowhere else can this be told from a fit that began far away.
        vanished = left <= jnp.finfo(left.dtype).eps * after.first
        endless = vanished & (_tree.norm(after.vector) > _tree.norm(state.vector))
        reached = jnp.where(endless, jnp.int32(Outcome.UNBOUNDED), jnp.int32(Outcome.MAX_STEPS))
        return after._replace(status=jnp.where(capped, reached, after.status))

    def _look(self, state: FitState) -> _Look:
        point = self.residuals.point(state.vector)
        loss = loss_of_points(self.residuals)
        scale = unit_of(point.residuals, loss)
        slope = in_units(loss, scale).gradient(point.residuals / scale)
        gradient = point.linearisation.vjp(slope)
        blocked = (state.vector <= self.lower) & (gradient > 0) | (state.vector >= self.upper) & (gradient < 0)
        free = ~jnp.asarray(self.frozen) & ~blocked
        columns = jnp.where(free, point.columns, jnp.zeros_like(point.columns))
        largest = _or_one(jnp.max(columns, initial=0.0))
        smallest = jnp.min(jnp.where(columns > 0, columns, largest), initial=jnp.inf)
        # Next to the largest column's square, that of one below the root of rounding would be lost.
        lost = (state.steps == 0) & (smallest < jnp.finfo(largest.dtype).eps ** 0.5 * largest)
        scaled = state.scaled | lost if self.scaling is None else state.scaled
        running = jnp.maximum(state.metric, point.columns)
        metric = jnp.where(scaled & (running > 0), running, largest)
        inverse = jnp.where(free, 1 / metric, jnp.zeros_like(metric))
        cosines = jnp.abs(gradient) / _or_one(columns) / _or_one(_tree.norm(slope))
        # The damping of an unscaled metric is a multiple of the largest column's square, which has changed.
        drift = jnp.where((state.reference > 0) & ~scaled, state.reference / largest, jnp.ones_like(largest))
        multiple = jnp.clip(state.damping.multiple * drift * drift, POLICY.minimum, POLICY.maximum)
        return _Look(
            point=point,
            scale=scale,
            problem=scaled_problem(point, loss, scale, inverse),
            scaled=scaled,
            metric=jnp.where(scaled, running, state.metric),
            stretch=scale * inverse,
            columns=columns,
            cosine=jnp.max(jnp.where(columns > 0, cosines, jnp.zeros_like(cosines)), initial=0.0),
            damping=state.damping._replace(multiple=multiple),
            reference=largest,
            uneven=smallest < EVEN * largest,
            finite=jnp.isfinite(scale) & _tree.all_finite((gradient, point.columns)),
        )

    def _moved(self, vector: jax.Array, step: jax.Array) -> jax.Array:
        end = jnp.clip(vector + step, self.lower, self.upper)
        # Onto a bound, not within rounding of it: what is held there no longer takes part in the steps.
        rounding = 4 * jnp.finfo(end.dtype).eps * (jnp.abs(vector) + jnp.abs(end))
        end = jnp.where((step < 0) & (end - self.lower <= rounding), self.lower, end)
        return jnp.where((step > 0) & (self.upper - end <= rounding), self.upper, end)

    def _adjusted(self, state: FitState, look: _Look, step: jax.Array, damping: Scalar) -> jax.Array:
        if self.acceleration:
            step = self._bent(state, look, step, damping)
        inside = self._moved(state.vector, look.stretch * step) - state.vector
        within = vector_fits(state.vector, look.stretch * step, self.lower, self.upper)
        shortened = inside / jnp.where(look.stretch > 0, look.stretch, jnp.ones_like(look.stretch))
        return jnp.where(within, step, jnp.where(look.stretch > 0, shortened, jnp.zeros_like(step)))

    def _bent(self, state: FitState, look: _Look, step: jax.Array, damping: Scalar) -> jax.Array:
        """The step and half its acceleration, if that is the smaller part of it."""
        problem, velocity = look.problem, look.stretch * step
        if self.residuals.compressed:
            outward = jnp.zeros_like(problem.output_gradient)
            rhs = look.stretch / look.scale * self.residuals.bend(state.vector, velocity, look.scale)
        else:
            second = second_derivative(self.residuals.vector, state.vector, velocity)[None] / look.scale
            outward = problem.hessian.product(second)
            rhs = problem.linearisation.vjp(outward)
        curved = dataclasses.replace(problem, output_gradient=outward)
        found = self.solver.solve(self.solver.prepare(curved, rhs, state.solver), damping)
        small = 2 * _tree.norm(found.step) <= BENT * _tree.norm(step)
        return jnp.where(small & _tree.all_finite(found.step), step + 0.5 * found.step, step)

    def _arrived(self, look: _Look) -> Count:
        """The outcome if there is nothing to do at a point, or ``RUNNING``."""
        atol = jnp.asarray(self.atol, look.scale.dtype)
        nothing = (look.problem.objective == 0) | (look.cosine <= _square(self.rtol, look.scale))
        close = look.scale * jnp.sqrt(2 * look.problem.objective) <= atol
        return _first(
            [(~look.finite, Outcome.NON_FINITE), (close & (atol > 0), Outcome.RESIDUALS), (nothing, Outcome.GRADIENT)]
        )

    def _converged(self, state: FitState, look: _Look, last: Attempt, learnt: DampingState, moved: jax.Array) -> Count:
        """The outcome of a step, or ``RUNNING``."""
        trial, objective = last.trial, look.problem.objective
        # Of the cost, to second order, a relative accuracy of the parameters is the square.
        bound = jnp.maximum(_square(self.rtol, objective), 8 * jnp.finfo(objective.dtype).eps) * objective
        level = (jnp.abs(trial.actual) <= bound) & (trial.predicted <= bound) & (trial.gain_ratio <= 2)
        level = (level & trial.accepted) | ~trial.informative
        columns = jnp.where(look.columns > 0, look.columns, jnp.zeros_like(look.columns))
        length = _tree.norm(columns * (moved - state.vector))
        short = length <= jnp.asarray(self.rtol, length.dtype) * _tree.norm(columns * state.vector)
        # A step that a bound has just cut short says nothing of the parameters that are left.
        landed = (moved != state.vector) & ((moved <= self.lower) | (moved >= self.upper))
        whole = ~jnp.any(landed) | (last.trial.refusal == Refusal.ROUNDING)
        level, short = level & whole, short & whole
        held = last.damping > 1
        far = jnp.finfo(objective.dtype).eps ** 0.25  # a gradient with a larger cosine is no rounding
        # Residuals far below those of the start are as small as rounding lets them be, wherever they point.
        large = look.scale * jnp.sqrt(objective) > far * state.first
        idle = short | ~trial.informative | (learnt.multiple >= POLICY.maximum)
        useless = ~trial.accepted | ~trial.informative
        stuck = useless & (look.cosine > far) & large & held & idle & whole
        return _first(
            [
                (stuck, Outcome.STALLED),
                (level, Outcome.COST),
                (short & (trial.accepted | trial.too_long), Outcome.STEP),
                (learnt.multiple >= POLICY.maximum, Outcome.COST),
            ]
        )

    def _in_other_metric(self, state: FitState, left: Scalar, able: Flag) -> FitState:
        """Goes on in the other metric where a fit would end, unless neither finds anything any more."""
        if self.scaling is not None or not self.residuals.dense:
            return state
        gained = left < state.entered * (1 - WORTHWHILE)
        again = (
            (state.status != RUNNING) & able & (left > 0) & ((state.changes == 0) | gained & (state.changes < CHANGES))
        )
        scaled = state.scaled ^ again
        fresh = state._replace(
            scaled=scaled,
            metric=jnp.zeros_like(state.metric),
            reference=jnp.zeros_like(state.reference),
            damping=POLICY.init(state.vector.dtype),
            changes=state.changes + 1,
            status=jnp.full_like(state.status, RUNNING),
        )
        return _tree.where(again, fresh, state)


def vector_fits(vector: jax.Array, step: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """Where a step stays within bounds."""
    return (vector + step >= lower) & (vector + step <= upper)


def _or_one(size: jax.Array) -> jax.Array:
    return jnp.where((size > 0) & jnp.isfinite(size), size, jnp.ones_like(size))


def _square(number: Any, like: Scalar) -> Scalar:
    return jnp.square(jnp.asarray(number, like.dtype))


def _first(cases: list[tuple[Flag, Outcome]]) -> Count:
    return jnp.select([flag for flag, _ in cases], [jnp.int32(code) for _, code in cases], jnp.int32(RUNNING))
