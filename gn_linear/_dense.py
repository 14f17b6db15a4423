r"""The damped problem as matrices: what the dense solvers have in common.

With the Jacobian :math:`J`, the gradient in output space :math:`u`, a square root :math:`B B^T = H` of the Hessian of
the loss and :math:`A = B^T J`, a right-hand side is split into :math:`b = J^T u + r`, and the step solves

.. math:: J^T (u + B A d) + r + (\lambda + \mu) d = 0.

A factorisation gives a first solution, which loses as many digits as the damped matrix has in its condition number
(the identity of Woodbury in sample space: half as many again). The residual, computed in the form above, does not: it
is small where the linearised outputs fit, and a few corrections with the same factor bring the accuracy of least
squares. Nothing divides by :math:`B`, so saturated or outlying examples do no harm.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._krylov import is_shift, product_rounding
from gn_linear._typing import Count, Flag, Params, Scalar
from gn_linear.curvature import LinearisedProblem

REFINEMENTS = 3
"""How often a solution is corrected; each costs four products with a matrix like the Jacobian."""

ROUNDING = 10
"""A damping below so many roundings of the trace of the matrix is raised to that in its factor."""

Operator = Callable[[jax.Array], jax.Array]


class Equations(NamedTuple):
    """The equations of the step, for any damping.

    Attributes:
        jacobian: ``J``, shape (N, k).
        image: ``A = B^T J``, shape (N, k).
        root: ``v -> B v``.
        gradient: ``u``, shape (N,).
        rest: ``r``, shape (k,).
        weights: the penalty of each unknown, shape (k,).
        consistent: whether the Jacobian gives the gradient of the whole batch; not where the model mixes examples.
    """

    jacobian: jax.Array
    image: jax.Array
    root: Operator
    gradient: jax.Array
    rest: jax.Array
    weights: jax.Array
    consistent: Flag

    def residual(self, step: jax.Array, damping: Scalar) -> jax.Array:
        """The gradient of the damped quadratic model at a step."""
        outputs = self.gradient + self.root(times(self.image, step))
        return times(self.jacobian.T, outputs) + self.rest + (self.weights + damping) * step

    def solution(self, inverse: Operator, damping: Scalar) -> tuple[jax.Array, Flag]:
        """The step by an approximate inverse of the damped matrix, corrected.

        Args:
            inverse: of the damped matrix, applied to a vector.
            damping: absolute.

        Returns:
            The step, and whether it is any better than none: without damping there may be a slope without curvature.
        """

        def correct(_: Count, step: jax.Array) -> jax.Array:
            return step - inverse(self.residual(step, damping))

        none = jnp.zeros_like(self.rest)
        step = jax.lax.fori_loop(0, 1 + REFINEMENTS, correct, none)
        before, after = _tree.norm(self.residual(none, damping)), _tree.norm(self.residual(step, damping))
        return step, (after < before) | (before == 0)

    @property
    def finite(self) -> Flag:
        """Whether every entry is, and is the batch's."""
        entries = (self.jacobian, self.image, self.gradient, self.rest, self.weights)
        return self.consistent & _tree.all_finite(entries)


def equations(problem: LinearisedProblem, rhs: Params) -> tuple[Equations, Scalar]:
    """The equations in the space of the parameters, for a right-hand side scaled to a largest entry of 1.

    Args:
        problem: the linearised problem.
        rhs: the gradient b, in the dtypes of the solve.

    Returns:
        The equations, and what their solution must be multiplied by.
    """
    largest = _tree.max_abs(rhs)
    dtype = largest.dtype
    size = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
    jacobian = problem.jacobian()
    gradient = _tree.flatten(problem.output_gradient, dtype) / size
    gradient = jnp.where(largest == 0, jnp.zeros_like(gradient), gradient)
    scaled, own = _tree.flatten(rhs, dtype) / size, times(jacobian.T, gradient)
    rest = scaled - own
    pulled = _tree.flatten(problem.linearisation.vjp(problem.output_gradient), dtype) / size
    # Half of the digits: rounding is far below, and what examples have to do with each other is not.
    apart = _tree.norm(jnp.where(largest == 0, own, pulled) - own)
    consistent = ~(apart > product_rounding(problem) ** 0.5 * _tree.norm(jnp.abs(jacobian.T) @ jnp.abs(gradient)))
    # What the incoming gradient holds beside this batch's own is often nothing but rounding.
    rounding = 64 * jnp.finfo(dtype).eps * (_tree.norm(scaled) + _tree.norm(own))
    rest = jnp.where(_tree.norm(rest) <= rounding, jnp.zeros_like(rest), rest)
    root, root_transpose = roots(problem, dtype)
    image = jax.vmap(root_transpose, in_axes=1, out_axes=1)(jacobian)
    return Equations(jacobian, image, root, gradient, rest, _weights(problem, dtype), consistent), size


def in_sample_space(problem: LinearisedProblem, in_outputs: bool | None) -> bool:
    """Whether matrices are as large as the outputs of the batch instead of the parameters.

    Args:
        problem: the linearised problem.
        in_outputs: as asked for; None means wherever they are smaller.

    Returns:
        The answer; a penalty that is no plain number needs the space of the parameters.
    """
    parameters = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    return is_shift(problem) and (problem.output_size < parameters if in_outputs is None else in_outputs)


def roots(problem: LinearisedProblem, dtype: jax.typing.DTypeLike) -> tuple[Operator, Operator]:
    """Products with ``B`` and ``B^T`` on raveled outputs; negative curvature of a plain callable counts as none."""
    outputs, hessian = problem.linearisation.outputs, problem.hessian
    like = _tree.to_solve(outputs)

    def raveled(product: Callable[[Params], Params], like: Params) -> Operator:
        return lambda vector: _tree.flatten(product(_tree.unflatten(vector, like)), dtype)

    if hessian.closed_form or isinstance(outputs, jax.Array):
        return raveled(hessian.root, like), raveled(hessian.root_transpose, like)
    units = jnp.eye(problem.output_size, dtype=dtype)
    values, vectors = jnp.linalg.eigh(jax.vmap(raveled(hessian.product, outputs))(units))
    matrix = vectors * jnp.sqrt(jnp.maximum(values, jnp.zeros_like(values)))
    return lambda vector: times(matrix, vector), lambda vector: times(matrix.T, vector)


def times(matrix: jax.Array, other: jax.Array) -> jax.Array:
    """A product in full precision, which accelerators would lower."""
    return jnp.matmul(matrix, other, precision="highest")


def _weights(problem: LinearisedProblem, dtype: jax.typing.DTypeLike) -> jax.Array:
    zeros = _tree.solve_zeros(problem.params)
    if is_shift(problem):
        return jnp.full_like(_tree.flatten(zeros, dtype), jnp.asarray(problem.l2, dtype))
    spread = jax.tree.map(lambda w, p: jnp.broadcast_to(jnp.asarray(w, dtype), jnp.shape(p)), problem.l2, zeros)
    return _tree.flatten(spread, dtype)
