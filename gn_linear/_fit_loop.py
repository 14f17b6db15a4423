"""The loop of `least_squares`: search for a step, take it, test for convergence, in the parts of the transform."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._box import Box
from gn_linear._outcome import Outcome
from gn_linear._refusal import Refusal, first_that_holds
from gn_linear._residuals import Residuals, in_units, loss_of_points, scaled_problem, second_derivative, unit_of
from gn_linear._rounds import repeat
from gn_linear._trial import Attempt, Search
from gn_linear._typing import Count, Flag, Scalar
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
        first: the norm of the residuals at the start.
        entered: likewise, when this metric was entered.
        left: likewise, now.
        able: whether the other metric may find more.
        changes: how often the metric was changed.
        steps: searches so far.
        evaluations: of the residuals so far.
        status: an ``Outcome``, or ``RUNNING``.
        kept: what else a kind of loop carries.
    """

    vector: jax.Array
    scaled: Flag
    metric: jax.Array
    reference: Scalar
    damping: DampingState
    solver: Any
    first: Scalar
    entered: Scalar
    left: Scalar
    able: Flag
    changes: Count
    steps: Count
    evaluations: Count
    status: Count
    kept: Any = ()


class Look(NamedTuple):
    """What is known at a point before a step is sought."""

    scale: Scalar
    objective: Scalar
    problem: Any  # a LinearisedProblem, where a kind of loop poses one
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
        box: the bounds.
        frozen: which parameters stay, shape (P,).
        scaling: as in ``Options``.
        acceleration: likewise.
        max_steps: the cap on steps.
        rtol: relative tolerance of the parameters.
        atol: of the norm of the residuals.
    """

    residuals: Residuals
    solver: Solver
    box: Box
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
        count = jax.eval_shape(self.residuals.vector, start).size
        return repeat(
            lambda state: state.status == RUNNING,
            lambda state: self._at_an_end(self._step(state), state.vector),
            self._first(start),
            entries=count * (start.size + 1),
        )

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
            left=jnp.full([], jnp.inf, dtype),
            able=jnp.zeros([], bool),
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
            objective=lambda z: self.residuals.value(self.box.moved(state.vector, look.stretch * z), look.scale),
            solver=self.solver,
            prepared=self.solver.prepare(look.problem, rhs, state.solver),
            policy=POLICY,
            unit=jnp.ones_like(look.scale),
            count=state.steps,
            rate=jnp.ones_like(look.scale),
            hopeless=first_that_holds([(~look.finite, Refusal.GRADIENT)], Refusal.NONE),
            adjusted=lambda step, mu: self._adjusted(state, look, step, mu),
        )
        last, learnt = search.run(look.damping)
        solver = _tree.where(_tree.all_finite(last.result.step), last.result.state, state.solver)
        here_left = look.scale * jnp.sqrt(2 * look.objective)
        first = jnp.where(jnp.isinf(state.first), here_left, state.first)
        return self._after(state._replace(first=first), look, last, learnt)._replace(solver=solver)

    def _after(
        self, state: FitState, look: Look, last: Attempt, learnt: DampingState, searched: Flag | bool = True
    ) -> FitState:
        """The state after an attempt, the last one of its search or not."""
        here = self._arrived(look)
        going = here == RUNNING
        taken = last.trial.accepted & going
        moved = self.box.moved(state.vector, look.stretch * last.emitted)
        ended = jnp.where(searched, self._converged(state, look, last, learnt, moved), jnp.int32(RUNNING))
        gained = jnp.where(taken, last.trial.actual, jnp.zeros_like(last.trial.actual))
        left = look.scale * jnp.sqrt(2 * jnp.maximum(look.objective - gained, 0))
        return state._replace(
            vector=jnp.where(taken, moved, state.vector),
            scaled=look.scaled,
            metric=look.metric,
            reference=look.reference,
            damping=learnt,
            left=left,
            able=going & look.uneven,
            steps=state.steps + (going & searched),
            evaluations=state.evaluations + jnp.where(going, last.evaluations, 0),
            status=jnp.where(going, ended, here),
        )

    def _look(self, state: FitState) -> Look:
        point = self.residuals.point(state.vector)
        loss = loss_of_points(self.residuals)
        scale = unit_of(point.residuals, loss)
        slope = in_units(loss, scale).gradient(point.residuals / scale)
        gradient = point.linearisation.vjp(slope)
        look, inverse = self._look_along(state, scale, point.columns, gradient, _or_one(_tree.norm(slope)))
        problem = scaled_problem(point, loss, scale, inverse)
        finite = look.finite & _tree.all_finite(gradient)
        return look._replace(problem=problem, objective=problem.objective, finite=finite)

    def _look_along(
        self, state: FitState, scale: Scalar, columns: jax.Array, gradient: jax.Array, slope: Scalar | float
    ) -> tuple[Look, jax.Array]:
        """What the columns of the Jacobian and the gradient tell, and the inverse of the metric."""
        free = ~jnp.asarray(self.frozen) & ~self.box.holds(state.vector, gradient)
        running = jnp.maximum(state.metric, columns)
        finite = jnp.isfinite(scale) & jnp.isfinite(jnp.max(columns, initial=0.0))
        columns = jnp.where(free, columns, jnp.zeros_like(columns))
        cosines = jnp.abs(gradient) / _or_one(columns) / slope
        cosines = jnp.where(columns > 0, cosines, jnp.zeros_like(cosines))
        top, cosine = jnp.max(jnp.stack([columns, cosines]), axis=1, initial=0.0)
        largest = _or_one(top)
        smallest = jnp.min(jnp.where(columns > 0, columns, largest), initial=jnp.inf)
        # Next to the largest column's square, that of one below the root of rounding would be lost.
        lost = smallest < jnp.finfo(largest.dtype).eps ** 0.5 * largest
        # Where the cost overflows the columns tell how far away the start is, and not the units of the parameters.
        lost = lost & (state.steps == 0) & jnp.isfinite(scale * scale)
        scaled = state.scaled | lost if self.scaling is None else state.scaled
        metric = jnp.where(scaled & (running > 0), running, largest)
        inverse = jnp.where(free, 1 / metric, jnp.zeros_like(metric))
        # The damping of an unscaled metric is a multiple of the largest column's square, which has changed.
        drift = jnp.where((state.reference > 0) & ~scaled, state.reference / largest, jnp.ones_like(largest))
        multiple = jnp.clip(state.damping.multiple * drift * drift, POLICY.minimum, POLICY.maximum)
        look = Look(
            scale=scale,
            objective=jnp.full_like(scale, 0.5),
            problem=None,
            scaled=scaled,
            metric=jnp.where(scaled, running, state.metric),
            stretch=scale * inverse,
            columns=columns,
            cosine=cosine,
            damping=state.damping._replace(multiple=multiple),
            reference=largest,
            finite=finite,
            uneven=smallest < EVEN * largest,
        )
        return look, inverse

    def _adjusted(self, state: FitState, look: Look, step: jax.Array, damping: Scalar) -> jax.Array:
        if self.acceleration:
            step = self._bent(state, look, step, damping)
        return self.box.shortened(state.vector, step, look.stretch)

    def _bent(self, state: FitState, look: Look, step: jax.Array, damping: Scalar) -> jax.Array:
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

    def _arrived(self, look: Look) -> Count:
        """The outcome if there is nothing to do at a point, or ``RUNNING``."""
        atol = jnp.asarray(self.atol, look.scale.dtype)
        nothing = (look.objective == 0) | (look.cosine <= _square(self.rtol, look.scale))
        close = look.scale * jnp.sqrt(2 * look.objective) <= atol
        return first_that_holds(
            [(~look.finite, Outcome.NON_FINITE), (close & (atol > 0), Outcome.RESIDUALS), (nothing, Outcome.GRADIENT)],
            RUNNING,
        )

    def _converged(self, state: FitState, look: Look, last: Attempt, learnt: DampingState, moved: jax.Array) -> Count:
        """The outcome of a step, or ``RUNNING``."""
        trial, objective = last.trial, look.objective
        # Of the cost, to second order, a relative accuracy of the parameters is the square.
        bound = jnp.maximum(_square(self.rtol, objective), 8 * jnp.finfo(objective.dtype).eps) * objective
        level = (jnp.abs(trial.actual) <= bound) & (trial.predicted <= bound) & (trial.gain_ratio <= 2)
        level = (level & trial.accepted) | ~trial.informative
        columns = jnp.where(look.columns > 0, look.columns, jnp.zeros_like(look.columns))
        length, extent = jnp.sum(jnp.abs(columns * jnp.stack([moved - state.vector, state.vector])), axis=1)
        short = length <= jnp.asarray(self.rtol, length.dtype) * extent
        # A step that a bound has just cut short says nothing of the parameters that are left.
        whole = ~self.box.stops(state.vector, moved) | (trial.refusal == Refusal.ROUNDING)
        level, short = level & whole, short & whole
        held = last.damping > 1
        far = jnp.finfo(objective.dtype).eps ** 0.25  # a gradient with a larger cosine is no rounding
        # Residuals far below those of the start are as small as rounding lets them be, wherever they point.
        large = look.scale * jnp.sqrt(objective) > far * state.first
        idle = short | ~trial.informative | (learnt.multiple >= POLICY.maximum)
        useless = ~trial.accepted | ~trial.informative
        stuck = useless & (look.cosine > far) & large & held & idle & whole
        return first_that_holds(
            [
                (stuck, Outcome.STALLED),
                (level, Outcome.COST),
                (short & (trial.accepted | trial.too_long), Outcome.STEP),
                (learnt.multiple >= POLICY.maximum, Outcome.COST),
            ],
            RUNNING,
        )

    def _at_an_end(self, state: FitState, before: jax.Array) -> FitState:
        """What becomes of a fit that would end after a step, or has reached the cap on steps."""
        if self.scaling is None and self.residuals.dense:
            state = self._in_other_metric(state)
        capped = (state.status == RUNNING) & (state.steps >= self.max_steps)
        # Nothing is left, and still the parameters grow: nowhere else can this be told from a fit that began far away.
        vanished = state.left <= jnp.finfo(state.left.dtype).eps * state.first
        endless = vanished & (jnp.sum(jnp.abs(state.vector) - jnp.abs(before)) > 0)
        reached = jnp.where(endless, jnp.int32(Outcome.UNBOUNDED), jnp.int32(Outcome.MAX_STEPS))
        return state._replace(status=jnp.where(capped, reached, state.status))

    def _in_other_metric(self, state: FitState) -> FitState:
        """Goes on in the other metric where a fit would end, unless neither finds anything any more."""
        gained = state.left < state.entered * (1 - WORTHWHILE)
        again = (state.status != RUNNING) & state.able & (state.left > 0)
        again = again & ((state.changes == 0) | gained & (state.changes < CHANGES))
        fresh = state._replace(
            scaled=~state.scaled,
            metric=jnp.zeros_like(state.metric),
            reference=jnp.zeros_like(state.reference),
            damping=POLICY.init(state.left.dtype),
            entered=state.left,
            changes=state.changes + 1,
            status=jnp.full_like(state.status, RUNNING),
        )
        return _tree.where(again, fresh, state)


def _or_one(size: jax.Array) -> jax.Array:
    return jnp.where((size > 0) & jnp.isfinite(size), size, jnp.ones_like(size))


def _square(number: Any, like: Scalar) -> Scalar:
    return jnp.square(jnp.asarray(number, like.dtype))
