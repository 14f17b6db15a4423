"""The loop of `least_squares` for few parameters: a point is no more than a small matrix.

The time of a small fit is that of the many little operations of its steps; hence one loop, one attempt a round, and no
more than is looked at. Another damping costs the factorisation of a small matrix. A fit begins with the squares of the
Jacobian and goes on with its triangle where they lose too much.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._fit_loop import POLICY, FitLoop, FitState, Look
from gn_linear._rounds import one_of
from gn_linear._small_models import Form, Model
from gn_linear._trial import MAX_RETRIES, Attempt, learnt, verdict
from gn_linear._typing import Count, Scalar
from gn_linear.curvature import Reductions
from gn_linear.solvers import Result, Status

PARAMETERS = 100
"""So many make the matrix small."""

ROUNDING = 10
"""A damping below the square of so many roundings of the Jacobian is raised to that."""


class Kept(NamedTuple):
    """What is known of the point.

    Attributes:
        model: there, once there was an attempt.
        attempts: how many there were.
        form: which of the forms the models have.
    """

    model: Model
    attempts: Count
    form: Count


@dataclasses.dataclass(frozen=True)
class SmallLoop(FitLoop):
    """The loop for sums of squares of few parameters.

    Attributes:
        forms: of the model, in the order in which they are tried; the others are those of `FitLoop`.
    """

    forms: tuple[Form, ...] = ()

    def _first(self, start: jax.Array) -> FitState:
        none = jnp.zeros([], jnp.int32)
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(self._model, start, none))
        return super()._first(start)._replace(kept=Kept(empty, none, none))

    def _model(self, vector: jax.Array, chosen: Count) -> Model:
        return one_of(chosen, [form.of for form in self.forms], self.residuals.columns(vector))

    def _step(self, state: FitState) -> FitState:
        model, attempts, form = state.kept
        model = jax.lax.cond(attempts == 0, self._model, lambda *_: model, state.vector, form)
        size = jnp.where(jnp.isinf(state.left), model.lengths[-1], state.left)
        begun = state._replace(first=jnp.where(jnp.isinf(state.first), size, state.first))
        scale = jnp.where(size == 0, jnp.ones_like(size), size)
        look, inverse = self._look_along(begun, scale, model.lengths[:-1], model.slope(scale), 1.0)
        look = look._replace(objective=jnp.where(size == 0, size, look.objective))
        # Not in the branches that solve: up to eight operations XLA runs in turn, more it schedules.
        units = jnp.append(inverse, 1 / scale)
        last = self._attempted(begun, look, model, units)
        searched = ~last.trial.too_long | (attempts >= MAX_RETRIES)
        left = jnp.where(last.trial.accepted, scale * jnp.sqrt(2 * last.trial.reached), size)
        after = self._after(begun, look, last, learnt(POLICY, look.damping, last.trial), searched)._replace(
            left=left, kept=Kept(model, jnp.where(searched, jnp.zeros_like(attempts), attempts + 1), form)
        )
        if len(self.forms) == 1:
            return after
        lost = (form == 0) & ~jnp.isfinite(last.trial.predicted)
        kept = Kept(model, jnp.zeros_like(attempts), jnp.ones_like(form))
        again = state._replace(evaluations=state.evaluations + 1, kept=kept)
        return _tree.where(lost, again, after)

    def _attempted(self, state: FitState, look: Look, model: Model, units: jax.Array) -> Attempt:
        """A step for the damping that is due."""
        count, rounding = len(units) - 1, ROUNDING * jnp.finfo(units.dtype).eps
        damping = jnp.maximum(look.damping.multiple, count * rounding**2)
        chosen = state.kept.form
        step, predicted = one_of(chosen, [form.solved for form in self.forms], model, units, damping)
        if self.box.sides is not None:
            step = self._adjusted(state, look, step, damping)
            # Of no step there is nothing to promise.
            promised = one_of(chosen, [form.reduction for form in self.forms], model, units, step)
            predicted = jnp.where(jnp.isfinite(predicted), promised, predicted)
        reached = self.residuals.value(self.box.moved(state.vector, look.stretch * step), look.scale)
        return _judged(look, step, predicted, reached)


def _judged(look: Look, step: jax.Array, predicted: Scalar, reached: Scalar) -> Attempt:
    one, nothing = jnp.ones([], jnp.int32), jnp.zeros_like(reached)
    trial = verdict(
        look.objective, reached, Reductions(predicted, nothing), 2 * look.objective, jnp.isfinite(predicted), True
    )
    return Attempt(look.damping.multiple, Result(step, (), one, jnp.int32(Status.CONVERGED)), step, trial, one)
