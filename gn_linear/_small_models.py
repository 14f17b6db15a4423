r"""The quadratic model of a fit of few parameters, in a matrix as small as they are.

All that a search for a step needs of its point, the norms of the columns, the gradient and the damped problem, is in
the squares :math:`[J \; r]^T [J \; r]` as well as in the triangle of the QR factorisation of :math:`[J \; r]`.

``Squares`` cost a product and a Cholesky factorisation. That of :math:`G + \mu I`, with columns no longer than 1, is
one of :math:`G + \mu I + E`, :math:`\|E\| \le P \epsilon`, so that of the reduction that the step :math:`d` promises
at most :math:`(P \epsilon \|d\|)^2 / 2 \mu` is lost. Where that is more than a hundredth and the columns depend on each
other, there is no step. Smaller errors are corrected by the next steps, since the gradient is exact.

``Triangle`` costs QR factorisations of the rows and of two small matrices, the right-hand side as one more column,

.. math:: \begin{pmatrix} A & c \\ \sqrt{\mu} I & 0 \end{pmatrix} = Q \begin{pmatrix} R & y \\ 0 & \cdot \end{pmatrix},
    \qquad d = -R^{-1} y, \qquad \text{predicted: } \tfrac12 \|y\|^2 + \tfrac{\mu}{2} \|d\|^2,

so that no condition number is squared and nothing needs a correction.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from gn_linear._residuals import norms
from gn_linear._typing import Scalar

UNROLLED = 4
"""Up to so many parameters operations written out solve the damped problem sooner than LAPACK."""

INDEPENDENT = 0.5
"""The power of rounding that a factorisation leaves of the square of each column, where they are independent."""

LOSS = 0.02
"""Twice the part of what a step promises that it may lose to the squares."""


class Model(NamedTuple):
    """The model at a point.

    Attributes:
        matrix: squares or triangle.
        facts: the norms of the columns of ``[J r]``, and ``J^T r / |r|`` with anything behind it, shape (2, P + 1);
            None where the triangle tells them as soon.
    """

    matrix: jax.Array
    facts: jax.Array | None

    @property
    def lengths(self) -> jax.Array:
        """The norms of the columns and of the residuals, shape (P + 1,)."""
        return norms(self.matrix) if self.facts is None else self.facts[0]

    def slope(self, size: Scalar) -> jax.Array:
        """The gradient over ``size``, the norm of the residuals or one for none, shape (P,)."""
        return _slope(self.matrix, size) if self.facts is None else self.facts[1, :-1]


class Form:
    """A form of the model; ``units``, shape (P + 1,), is what the columns of ``[J r]`` are multiplied by."""

    def of(self, columns: jax.Array) -> Model:
        """A model from ``[J r]^T``."""
        raise NotImplementedError

    def solved(self, model: Model, units: jax.Array, damping: Scalar) -> tuple[jax.Array, Scalar]:
        """The damped step and the reduction that the model promises, which is NaN where the form has no step."""
        raise NotImplementedError

    def reduction(self, model: Model, units: jax.Array, step: jax.Array) -> Scalar:
        """What the model promises of any step."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Squares(Form):
    """``[J r]^T [J r]``."""

    def of(self, columns: jax.Array) -> Model:
        squares = jnp.matmul(columns, columns.T, precision="highest")
        lengths = jnp.sqrt(_diagonal(squares))
        return Model(squares, jnp.stack([lengths, squares[-1] / _or_one(lengths[-1])]))

    def solved(self, model: Model, units: jax.Array, damping: Scalar) -> tuple[jax.Array, Scalar]:
        scaled = self._scaled(model, units)
        count, precision = len(scaled) - 1, jnp.finfo(scaled.dtype)
        # One more in the corner keeps the last pivot positive, since the residuals have the norm of one.
        damped = scaled + jnp.where(jnp.arange(count + 1) < count, damping, 1) * jnp.eye(count + 1, dtype=scaled.dtype)
        step, pivots = (_eliminated if count <= UNROLLED else _factorised)(damped)
        # In one reduction each, since more operations cost more than their arithmetic.
        length, slope = jnp.sum(step * jnp.stack([step, scaled[count, :count]]), axis=1)
        predicted = 0.5 * (damping * length - slope)
        spared = (count * precision.eps) ** 2 * length <= LOSS * damping * predicted
        independent = pivots > precision.eps**INDEPENDENT * _diagonal(damped)
        held = (model.lengths > (precision.tiny / precision.eps) ** 0.5) & (model.lengths < precision.max**0.5)
        return step, jnp.where(jnp.all((independent | spared) & held), predicted, jnp.nan)

    def reduction(self, model: Model, units: jax.Array, step: jax.Array) -> Scalar:
        scaled = self._scaled(model, units)
        return -jnp.sum(step * (scaled[:-1, -1] + 0.5 * jnp.sum(scaled[:-1, :-1] * step, axis=1)))

    def _scaled(self, model: Model, units: jax.Array) -> jax.Array:
        return model.matrix * units * units[:, None]


@dataclasses.dataclass(frozen=True)
class Triangle(Form):
    """The triangle of ``[J r]``, or these rows where there are no more of them.

    Attributes:
        alone: whether there is no other form.
    """

    alone: bool = False

    def of(self, columns: jax.Array) -> Model:
        size, length = columns.shape
        rows = columns.T if length <= size else jnp.linalg.qr(columns.T, mode="r")
        if self.alone:
            return Model(rows, None)
        lengths = norms(rows)
        return Model(rows, jnp.stack([lengths, jnp.append(_slope(rows, _or_one(lengths[-1])), 0)]))

    def solved(self, model: Model, units: jax.Array, damping: Scalar) -> tuple[jax.Array, Scalar]:
        above = model.matrix * units
        below = jnp.sqrt(damping) * jnp.eye(above.shape[1] - 1, above.shape[1], dtype=above.dtype)
        # A branch of many operations costs more than LAPACK, even where it is not taken.
        solve = _orthogonalised if self.alone and len(below) <= UNROLLED else _least_squares
        seen, step = solve(jnp.concatenate([above, below]))
        return step, 0.5 * jnp.sum(seen * seen + damping * step * step)

    def reduction(self, model: Model, units: jax.Array, step: jax.Array) -> Scalar:
        rows = model.matrix * units
        image = jnp.sum(rows[:, :-1] * step, axis=1)
        return -jnp.sum(image * (rows[:, -1] + 0.5 * image))


def forms(residuals: int, parameters: int) -> tuple[Form, ...]:
    """The forms for a problem of this size, the fastest first, the last one for every problem.

    Args:
        residuals: how many there are.
        parameters: likewise.

    Returns:
        One or two.
    """
    return (Squares(), Triangle()) if residuals > parameters + 1 else (Triangle(alone=True),)


def _or_one(length: Scalar) -> Scalar:
    return jnp.where(length == 0, jnp.ones_like(length), length)


def _slope(rows: jax.Array, size: Scalar) -> jax.Array:
    return jnp.sum(rows[:, :-1] * (rows[:, -1:] / size), axis=0)


def _diagonal(matrix: jax.Array) -> jax.Array:
    return jnp.sum(matrix * jnp.eye(len(matrix), dtype=matrix.dtype), axis=0)


def _factorised(damped: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The step and the pivots of the damped squares, by LAPACK."""
    count = len(damped) - 1
    # Symmetric, and LAPACK reads it the other way round.
    factor = jnp.linalg.cholesky(damped.T, symmetrize_input=False)
    step = solve_triangular(factor[:count, :count], -factor[count, :count], lower=True, trans="T")
    return step, jnp.square(_diagonal(factor))


def _eliminated(damped: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The step and the pivots of the damped squares, written out."""
    count, columns, pivots = len(damped) - 1, [], []
    for k in range(count):
        pivots.append(damped[k, k])
        columns.append(damped[:, k] / damped[k, k])
        damped = damped - columns[k][:, None] * damped[k]
    step: list[jax.Array] = []
    for k in reversed(range(count)):
        step.insert(0, -(columns[k][count] + sum(c * d for c, d in zip(columns[k][k + 1 : count], step, strict=True))))
    return jnp.stack(step), jnp.stack([*pivots, damped[count, count]])


def _least_squares(stacked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of ``[A c]`` with more rows than columns ``Q^T c`` and the solution ``d`` of least squares of ``A d + c``."""
    count = stacked.shape[1] - 1
    factor = jnp.linalg.qr(stacked, mode="r")
    seen = factor[:count, count]
    return seen, -solve_triangular(factor[:count, :count], seen)


def _orthogonalised(stacked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same by the modified rule of Gram and Schmidt: with the right-hand side as a column as stable as QR."""
    count = stacked.shape[1] - 1
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
