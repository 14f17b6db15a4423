r"""The loop of `least_squares` for few parameters: a point is no more than the triangle of :math:`[J \; r]`.

The norms of the columns, the gradient and the damped problem, all that a search for a step needs of its point, are in
that small matrix, so that another damping costs a factorisation of two of them. The damped step is solved with its
right-hand side as one more column,

.. math:: \begin{pmatrix} A & c \\ \sqrt{\mu} I & 0 \end{pmatrix} = Q \begin{pmatrix} R & y \\ 0 & \cdot \end{pmatrix},
    \qquad d = -R^{-1} y, \qquad \text{predicted: } \tfrac12 \|y\|^2 + \tfrac{\mu}{2} \|d\|^2,

so that no condition number is squared and nothing needs a correction. The time of a small fit is that of the many
little operations of its steps; hence one loop, one attempt a round, and no more than is looked at.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from gn_linear._fit_loop import POLICY, FitLoop, FitState, Look
from gn_linear._residuals import norms
from gn_linear._trial import MAX_RETRIES, Attempt, learnt, verdict
from gn_linear._typing import Count
from gn_linear.curvature import Reductions
from gn_linear.solvers import Result, Status

PARAMETERS = 100
"""So many make the triangle small."""

UNROLLED = 4
"""Up to so many parameters operations written out solve the damped problem sooner than LAPACK."""

ROUNDING = 10
"""A damping below the square of so many roundings of the Jacobian is raised to that."""


class Kept(NamedTuple):
    """What is known of the point.

    Attributes:
        triangle: of the Jacobian and the residuals there, once there was an attempt.
        attempts: how many there were.
    """

    triangle: jax.Array
    attempts: Count


@dataclasses.dataclass(frozen=True)
class TriangleLoop(FitLoop):
    """The loop for sums of squares of few parameters; its attributes are those of `FitLoop`."""

    def _first(self, start: jax.Array) -> FitState:
        shape = jax.eval_shape(self.residuals.triangle, start)
        kept = Kept(jnp.zeros(shape.shape, shape.dtype), jnp.zeros([], jnp.int32))
        return super()._first(start)._replace(kept=kept)

    def _step(self, state: FitState) -> FitState:
        triangle, attempts = state.kept
        triangle = jax.lax.cond(attempts == 0, self.residuals.triangle, lambda _: triangle, state.vector)
        lengths = norms(triangle)
        size = jnp.where(jnp.isinf(state.left), lengths[-1], state.left)
        state = state._replace(first=jnp.where(jnp.isinf(state.first), size, state.first))
        scale = jnp.where(size == 0, jnp.ones_like(size), size)
        matrix, unit = triangle[:, :-1], triangle[:, -1] / scale
        gradient = jnp.sum(matrix * unit[:, None], axis=0)
        look, inverse = self._look_along(state, scale, lengths[:-1], gradient, 1.0)
        look = look._replace(objective=jnp.where(size == 0, size, look.objective))
        last = self._attempted(state, look, matrix * inverse, unit)
        searched = ~last.trial.too_long | (attempts >= MAX_RETRIES)
        left = jnp.where(last.trial.accepted, scale * jnp.sqrt(2 * last.trial.reached), size)
        kept = Kept(triangle, jnp.where(searched, jnp.zeros_like(attempts), attempts + 1))
        return self._after(state, look, last, learnt(POLICY, look.damping, last.trial), searched)._replace(
            left=left, kept=kept
        )

    def _attempted(self, state: FitState, look: Look, matrix: jax.Array, unit: jax.Array) -> Attempt:
        """A step for the damping that is due."""
        count, rounding = matrix.shape[1], ROUNDING * jnp.finfo(matrix.dtype).eps
        damping = jnp.maximum(look.damping.multiple, count * rounding**2)
        below = jnp.sqrt(damping) * np.eye(count, count + 1, dtype=matrix.dtype)
        above = jnp.concatenate([matrix, unit[:, None]], axis=1)
        seen, step = _solved(jnp.concatenate([above, below]))
        predicted = 0.5 * jnp.sum(seen * seen + damping * step * step)
        if self.box.sides is not None:
            step = self._adjusted(state, look, step, damping)
            image = jnp.sum(matrix * step, axis=1)
            predicted = -jnp.sum(image * (unit + 0.5 * image))
        reached = self.residuals.value(self.box.moved(state.vector, look.stretch * step), look.scale)
        nothing = jnp.zeros_like(reached)
        trial = verdict(
            look.objective, reached, Reductions(predicted, nothing), 2 * look.objective, jnp.isfinite(predicted), True
        )
        one = jnp.ones([], jnp.int32)
        result = Result(step, (), one, jnp.int32(Status.CONVERGED))
        return Attempt(look.damping.multiple, result, step, trial, one)


def _solved(stacked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of ``[A c]`` with more rows than columns ``Q^T c`` and the solution ``d`` of least squares of ``A d + c``."""
    count = stacked.shape[1] - 1
    if count > UNROLLED:
        factor = jnp.linalg.qr(stacked, mode="r")
        seen = factor[:count, count]
        return seen, -solve_triangular(factor[:count, :count], seen)
    # With the right-hand side as a column the modified rule of Gram and Schmidt is as stable as Householder's.
    columns, rows = [stacked[:, j] for j in range(count + 1)], []
    for k in range(count):
        length = jnp.sqrt(jnp.sum(columns[k] * columns[k]))
        unit = columns[k] / length
        row = [jnp.sum(unit * column) for column in columns[k + 1 :]]
        columns[k + 1 :] = [column - r * unit for r, column in zip(row, columns[k + 1 :], strict=True)]
        rows.append([length, *row])
    step: list[jax.Array] = []
    for length, *inner, end in reversed(rows):
        step.insert(0, -(end + sum(r * d for r, d in zip(inner, step, strict=True))) / length)
    return jnp.stack([row[-1] for row in rows]), jnp.stack(step)
