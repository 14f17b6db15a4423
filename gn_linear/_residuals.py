r"""The residuals of a fit as functions of one vector, and their linearisation as a problem for the inner solvers.

The problem of a step is posed in units in which nothing overflows: residuals divided by their norm :math:`s`, and each
parameter by :math:`s / D_j`, where :math:`D` is the metric of the damping. Its Jacobian is :math:`J D^{-1}`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gn_linear import _jacobian, _tree
from gn_linear._linearise import Linearisation, linearise
from gn_linear._loss import Loss
from gn_linear._options import spread
from gn_linear._typing import Params, Scalar
from gn_linear._xla_cpu import folded, in_fast_forms
from gn_linear.curvature import LinearisedProblem
from gn_linear.losses import squared_error

PROBES = 4
"""Products with the transpose of the Jacobian that estimate the norms of its columns."""


class Point(NamedTuple):
    """The residuals at one vector of parameters, linearised.

    Attributes:
        residuals: weighted, shape (1, N), the one example that losses sum over; of chunked data, what QR left of them.
        value: ``scale -> cost / scale^2``.
        linearisation: of the residuals.
        matrix: its Jacobian, if that is kept.
        columns: the norms of its columns, estimated where there is no Jacobian, shape (P,).
    """

    residuals: jax.Array
    value: Callable[[Scalar], Scalar]
    linearisation: Linearisation
    matrix: jax.Array | None
    columns: jax.Array


@dataclasses.dataclass(frozen=True)
class Residuals:
    """The residuals of a fit as functions of the raveled parameters.

    Attributes:
        fn: as the user gave it.
        like: parameters, for structure and dtypes.
        args: what ``fn`` takes behind the parameters.
        loss: of the residuals; the one for squares if none was asked for.
        weights: as in ``Options``.
        chunks: likewise.
        dense: whether to keep a Jacobian.
    """

    fn: Callable[..., Any]
    like: Params
    args: tuple[Any, ...]
    loss: Loss
    weights: Any
    chunks: Any
    dense: bool

    def tree(self, vector: jax.Array) -> Any:
        """The residuals as the user's function returns them, chunks stacked."""
        params = _tree.unflatten(vector, self.like)
        if self.chunks is None:
            return self.fn(params, *self.args)
        return jax.lax.map(lambda chunk: self.fn(params, chunk, *self.args), self.chunks)

    def vector(self, vector: jax.Array) -> jax.Array:
        """All residuals, weighted, in one vector."""
        if self.chunks is None:
            return in_fast_forms(self._in_one_piece, vector)(vector)
        # Checkpointed, so that no more than a chunk's intermediate values are kept for the products.
        of_piece = jax.checkpoint(lambda v, piece: self._of_piece(v, piece))
        return jax.lax.map(lambda piece: of_piece(vector, piece), self._pieces(vector)).ravel()

    def _in_one_piece(self, vector: jax.Array) -> jax.Array:
        return _weighted(self.fn(_tree.unflatten(vector, self.like), *self.args), self.weights, vector.dtype)

    def value(self, vector: jax.Array, scale: Scalar) -> Scalar:
        """The cost over the square of a scale."""
        loss = in_units(self.loss, scale)
        if self.chunks is None:
            return loss((self.vector(vector) / scale)[None])
        pieces = self._pieces(vector)
        return jnp.sum(jax.lax.map(lambda piece: loss((self._of_piece(vector, piece) / scale)[None]), pieces))

    def point(self, vector: jax.Array) -> Point:
        """The residuals at a vector of parameters, linearised."""
        if self.dense and self.chunks is not None:
            return self._compressed(vector)

        def predict(v: jax.Array, _: Any) -> jax.Array:
            return self.vector(v)[None]

        lin = linearise(predict, vector, ())
        matrix = _jacobian.jacobian(predict, vector, (), lin) if self.dense else None
        columns = norms(matrix) if matrix is not None else _estimated(lin)
        residuals = lin.outputs

        def value(scale: Scalar) -> Scalar:
            return in_units(self.loss, scale)(residuals / scale)

        return Point(residuals, value, lin if matrix is None else _by_matrix(residuals, matrix), matrix, columns)

    def columns(self, vector: jax.Array) -> jax.Array:
        """``[J r]^T``, shape (P + 1, N); of chunked data the triangle of its QR factorisation in place of ``[J r]``."""
        if self.chunks is not None:
            return self._triangle_of_chunks(vector).T
        lin = linearise(lambda v, _: self.vector(v)[None], vector, ())
        return jnp.concatenate([_jacobian.of_batch(vector, lin).T, lin.outputs])

    def bend(self, vector: jax.Array, velocity: jax.Array, scale: Scalar) -> jax.Array:
        """The gradient ``J^T H r'' / scale`` of the second derivative along a velocity, chunk by chunk."""

        def add(total: jax.Array, piece: Any) -> tuple[jax.Array, None]:
            def residuals(v: jax.Array) -> jax.Array:
                return self._of_piece(v, piece)[None]

            second = second_derivative(residuals, vector, velocity) / scale
            here, pull = jax.vjp(residuals, vector)
            return total + pull(self.loss.hessian(here).product(second))[0], None

        return jax.lax.scan(add, jnp.zeros_like(vector), self._pieces(vector))[0]

    def _pieces(self, vector: jax.Array) -> tuple[Any, Any]:
        """Each chunk with its weights, if there are any."""
        if self.weights is None:
            return self.chunks, None
        return self.chunks, spread(self.weights, jax.eval_shape(self.tree, vector), "weights", "the residuals")

    def _of_piece(self, vector: jax.Array, piece: tuple[Any, Any]) -> jax.Array:
        chunk, weights = piece
        return _weighted(self.fn(_tree.unflatten(vector, self.like), chunk, *self.args), weights, vector.dtype)

    def _compressed(self, vector: jax.Array) -> Point:
        """The same problem with P + 1 residuals, and no squares."""
        triangle = self._triangle_of_chunks(vector)
        residuals, matrix = triangle[None, :, -1], triangle[:, :-1]
        return Point(residuals, lambda s: self.value(vector, s), _by_matrix(residuals, matrix), matrix, norms(matrix))

    def _triangle_of_chunks(self, vector: jax.Array) -> jax.Array:
        size = len(vector)

        def add(triangle: jax.Array, piece: Any) -> tuple[jax.Array, None]:
            residuals, push = jax.linearize(lambda v: self._of_piece(v, piece), vector)
            rows = jax.vmap(push, out_axes=1)(jnp.eye(size, dtype=vector.dtype))
            hessian, slope = self.loss.hessian(residuals[None]), self.loss.gradient(residuals[None])
            root = hessian.root(jnp.ones_like(slope))[0]
            root = jnp.maximum(root, jnp.asarray(jnp.finfo(root.dtype).eps ** 0.5, root.dtype))
            block = jnp.concatenate([rows * root[:, None], (slope[0] / root)[:, None]], axis=1)
            return jnp.linalg.qr(jnp.concatenate([triangle, block]), mode="r"), None

        empty = jnp.zeros([size + 1, size + 1], vector.dtype)
        return jax.lax.scan(add, empty, self._pieces(vector))[0]

    @property
    def compressed(self) -> bool:
        """Whether the points hold squares that stand for the cost, not the residuals themselves."""
        return self.dense and self.chunks is not None


def second_derivative(function: Callable[[jax.Array], jax.Array], vector: jax.Array, velocity: jax.Array) -> jax.Array:
    """Of a function along a straight line."""

    def slope(v: jax.Array) -> jax.Array:
        return jax.jvp(function, (v,), (velocity,))[1]

    return jax.jvp(slope, (vector,), (velocity,))[1]


def _weighted(residuals: Any, weights: Any, dtype: Any) -> jax.Array:
    flat = _tree.flatten(residuals, dtype)
    if weights is None:
        return flat
    weights = _tree.flatten(spread(weights, residuals, "weights", "the residuals"), dtype)
    # A residual without weight may be anything, and so may its derivative.
    kept = jnp.where(weights == 0, jnp.zeros_like(flat), flat)
    return jnp.sqrt(weights) * kept


def in_units(loss: Loss, scale: Scalar) -> Loss:
    """The loss of residuals that were divided by a scale, over its square."""
    delta: Any = getattr(loss, "delta", None)
    if delta is None:
        return loss
    robust: Any = loss
    return dataclasses.replace(robust, delta=jnp.asarray(delta, scale.dtype) / scale)


def unit_of(residuals: jax.Array, loss: Loss) -> Scalar:
    """The scale that brings a cost to the size of one: the norm of the residuals, of outliers no more than counts."""
    norm = _tree.norm(residuals)
    delta: Any = getattr(loss, "delta", None)
    if delta is not None:
        norm = jnp.minimum(norm, jnp.asarray(delta, norm.dtype) * residuals.size**0.5)
    return jnp.where(norm > 0, norm, jnp.ones_like(norm))


def scaled_problem(point: Point, loss: Loss, scale: Scalar, inverse_metric: jax.Array) -> LinearisedProblem:
    """The problem of a step from a point in units of the metric.

    Args:
        point: where.
        loss: of its residuals.
        scale: what they are divided by.
        inverse_metric: ``1 / D``, zero for parameters that stay as they are, shape (P,).

    Returns:
        The problem at zero; its step times ``scale * inverse_metric`` is that of the parameters.
    """
    outputs, loss = point.residuals / scale, in_units(loss, scale)
    if point.matrix is not None:
        matrix = point.matrix * inverse_metric
        lin = _by_matrix(outputs, matrix)
    else:
        matrix, inner = None, point.linearisation
        lin = Linearisation(outputs, lambda d: inner.jvp(inverse_metric * d), lambda u: inverse_metric * inner.vjp(u))
    return LinearisedProblem(
        params=jnp.zeros_like(inverse_metric),
        linearisation=lin,
        hessian=loss.hessian(outputs),
        output_gradient=loss.gradient(outputs),
        objective=point.value(scale),
        l2=0.0,
        predict=lambda params, inputs: outputs,
        loss=loss,
        inputs=(),
        targets=None,
        matrix=matrix,
    )


def loss_of_points(residuals: Residuals) -> Loss:
    """The loss whose slope and curvature at the residuals of a point are those of the cost."""
    return squared_error if residuals.compressed else residuals.loss


def _by_matrix(outputs: jax.Array, matrix: jax.Array) -> Linearisation:
    def push(step: jax.Array) -> jax.Array:
        return jnp.matmul(matrix, step, precision="highest")[None]

    def pull(vector: jax.Array) -> jax.Array:
        return jnp.matmul(vector[0], matrix, precision="highest")

    return Linearisation(outputs, push, pull)


def norms(matrix: jax.Array) -> jax.Array:
    """Norms of the columns, free of overflow and underflow of the squares."""
    largest = folded(jnp.maximum, jnp.abs(matrix))
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
    return largest * jnp.sqrt(folded(jnp.add, (matrix / unit) ** 2))


def _estimated(lin: Linearisation) -> jax.Array:
    """Norms of the columns without a Jacobian: those of random combinations of its rows, within a factor of about 2."""
    shape, dtype = (PROBES, *lin.outputs.shape), lin.outputs.dtype
    probes = jax.random.normal(jax.random.key(0), shape, dtype)  # always the same, so that a fit can be repeated
    return norms(jax.lax.map(lin.vjp, probes)) / jnp.asarray(PROBES**0.5, dtype)


def parameter_count(params: Params) -> int:
    """How many numbers the parameters are."""
    return sum(np.size(leaf) for leaf in jax.tree.leaves(params))
