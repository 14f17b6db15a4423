r"""The damped problem as matrices: what the dense solvers have in common.

With the Jacobian :math:`J`, the gradient in output space :math:`u`, a square root :math:`B B^T = H` of the Hessian of
the loss and :math:`A = B^T J`, a right-hand side is split into :math:`b = J^T u + r`, and the step solves

.. math:: J^T (u + B A d) + r + (\lambda + \mu) d = 0.

A factorisation gives a first solution, which loses as many digits as the damped matrix has in its condition number
(the identity of Woodbury in sample space: half as many again). The residual, computed in the form above, does not: it
is small where the linearised outputs fit, and a few corrections with the same factor bring the accuracy of least
squares. Nothing divides by :math:`B`, so saturated or outlying examples do no harm.

In sample space the factor needs the Gram matrix :math:`J J^T` alone, which has a form without the Jacobian; products
then go through the linearised model.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _capture, _tree
from gn_linear._krylov import is_shift, product_rounding
from gn_linear._typing import Flag, Params, Scalar
from gn_linear.curvature import LinearisedProblem, output_roots

REFINEMENTS = 3
"""How often a solution is corrected; each costs four products with a matrix like the Jacobian."""

UNROLLED = 1
"""So many corrections are made one after another, without a loop."""

ROUNDING = 10
"""A damping below so many roundings of the trace of the matrix is raised to that in its factor."""

Operator = Callable[[jax.Array], jax.Array]


class Equations(NamedTuple):
    """The equations of the step, for any damping.

    Attributes:
        push: ``d -> J d``.
        pull: ``v -> J^T v``.
        root: ``v -> B v``.
        root_transpose: ``v -> B^T v``.
        gradient: ``u``, shape (N,).
        rest: ``r``, shape (k,).
        weights: the penalty of each unknown, shape (k,).
        consistent: whether examples taken one by one give the derivatives of the batch; not where the model mixes them.
    """

    push: Operator
    pull: Operator
    root: Operator
    root_transpose: Operator
    gradient: jax.Array
    rest: jax.Array
    weights: jax.Array
    consistent: Flag

    def image(self, step: jax.Array) -> jax.Array:
        """``A d = B^T J d``."""
        return self.root_transpose(self.push(step))

    def residual(self, step: jax.Array, damping: Scalar) -> jax.Array:
        """The gradient of the damped quadratic model at a step."""
        return self.pull(self.gradient + self.root(self.image(step))) + self.rest + (self.weights + damping) * step

    def solution(self, inverse: Operator, damping: Scalar, corrections: int = REFINEMENTS) -> tuple[jax.Array, Flag]:
        """The step by an approximate inverse of the damped matrix, corrected.

        Args:
            inverse: of the damped matrix, applied to a vector.
            damping: absolute.
            corrections: how often the first solution is corrected.

        Returns:
            The step, and whether it is any better than none: without damping there may be a slope without curvature.
        """

        def corrected(step: jax.Array) -> jax.Array:
            return step - inverse(self.residual(step, damping))

        none = jnp.zeros_like(self.rest)
        if corrections > UNROLLED:
            step = jax.lax.fori_loop(0, 1 + corrections, lambda _, step: corrected(step), none)
        else:  # on the CPU the iterations of a loop cost more than what small problems do in them
            step = corrected(corrected(none)) if corrections else corrected(none)
        before, after = _tree.norm(self.residual(none, damping)), _tree.norm(self.residual(step, damping))
        # Without damping a slope without curvature stays in the residual, however small a part of it.
        undamped = jnp.max(self.weights, initial=0.0) + damping <= 0
        limit = before * jnp.where(undamped, jnp.finfo(before.dtype).eps ** 0.5, 1.0).astype(before.dtype)
        return step, (after < limit) | (before == 0)

    @property
    def finite(self) -> Flag:
        """Whether every number is, and is the batch's."""
        return self.consistent & _tree.all_finite((self.gradient, self.rest, self.weights))


def by_jacobian(problem: LinearisedProblem, rhs: Params) -> tuple[Equations, Scalar, jax.Array]:
    """The equations with a Jacobian in memory, for a right-hand side scaled to a largest entry of 1.

    Args:
        problem: the linearised problem.
        rhs: the gradient b, in the dtypes of the solve.

    Returns:
        The equations, what their solution must be multiplied by, and ``J``, shape (N, k).
    """
    jacobian = problem.jacobian()
    pulled = _products(problem)[1]

    def consistent(gradient: jax.Array) -> Flag:
        own, size = times(jacobian.T, gradient), jnp.abs(jacobian.T) @ jnp.abs(gradient)
        return _agree(problem, own, pulled(gradient), size)

    push, pull = (lambda step: times(jacobian, step)), (lambda vector: times(jacobian.T, vector))
    return *_equations(problem, rhs, push, pull, consistent), jacobian


def by_gram(problem: LinearisedProblem, rhs: Params) -> tuple[Equations, Scalar, jax.Array]:
    """The equations with a Gram matrix in memory, for a right-hand side scaled to a largest entry of 1.

    Args:
        problem: the linearised problem.
        rhs: the gradient b, in the dtypes of the solve.

    Returns:
        The equations, what their solution must be multiplied by, and ``J J^T``, shape (N, N).
    """
    gram = problem.gram()
    push, pull = _products(problem)

    def consistent(gradient: jax.Array) -> Flag:
        return _agree(problem, times(gram, gradient), push(pull(gradient)), jnp.abs(gram) @ jnp.abs(gradient))

    return *_equations(problem, rhs, push, pull, consistent), gram


def _equations(
    problem: LinearisedProblem, rhs: Params, push: Operator, pull: Operator, consistent: Callable[[jax.Array], Flag]
) -> tuple[Equations, Scalar]:
    largest = _tree.max_abs(rhs)
    dtype = largest.dtype
    size = _or_one(largest)
    outputs, scaled = _tree.flatten(problem.output_gradient, dtype), _tree.flatten(rhs, dtype) / size
    unit = outputs / _or_one(_tree.max_abs(outputs))
    direction = pull(unit)
    length = _or_one(_tree.norm(direction))
    # As much of this batch's gradient as there is: after clipping, what is left over would drown in its rounding.
    share = jnp.vdot(scaled, direction / length) / length
    gradient, own = share * unit, share * direction
    rest = scaled - own
    # What the incoming gradient holds beside this batch's own is often nothing but rounding.
    rounding = 64 * jnp.finfo(dtype).eps * (_tree.norm(scaled) + _tree.norm(own))
    rest = jnp.where(_tree.norm(rest) <= rounding, jnp.zeros_like(rest), rest)
    weights = _weights(problem, dtype)
    return Equations(push, pull, *output_roots(problem, dtype), gradient, rest, weights, consistent(unit)), size


def _or_one(size: Scalar) -> Scalar:
    return jnp.where((size > 0) & jnp.isfinite(size), size, jnp.ones_like(size))


def _products(problem: LinearisedProblem) -> tuple[Operator, Operator]:
    """Products with the Jacobian and its transpose on raveled parameters and outputs."""
    linearisation, dtype = problem.linearisation, _tree.scalar_dtype(problem.params)

    def push(step: jax.Array) -> jax.Array:
        return _tree.flatten(linearisation.jvp(_tree.unflatten(step, problem.params)), dtype)

    def pull(vector: jax.Array) -> jax.Array:
        return _tree.flatten(linearisation.vjp(_tree.unflatten(vector, linearisation.outputs)), dtype)

    return push, pull


def _agree(problem: LinearisedProblem, alone: jax.Array, together: jax.Array, size: jax.Array) -> Flag:
    """Whether two roads lead to one vector, which is a sum of terms of this size."""
    if problem.matrix is not None:
        return jnp.ones([], bool)
    # Half of the digits: rounding is far below, and what examples have to do with each other is not.
    inside = _capture.coarsest_rounding(problem.predict, problem.params, problem.inputs)
    return ~(_tree.norm(together - alone) > max(product_rounding(problem), inside) ** 0.5 * _tree.norm(size))


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


def times(matrix: jax.Array, other: jax.Array) -> jax.Array:
    """A product in full precision, which accelerators would lower."""
    return jnp.matmul(matrix, other, precision="highest")


def _weights(problem: LinearisedProblem, dtype: jax.typing.DTypeLike) -> jax.Array:
    zeros = _tree.solve_zeros(problem.params)
    if is_shift(problem):
        return jnp.full_like(_tree.flatten(zeros, dtype), jnp.asarray(problem.l2, dtype))
    spread = jax.tree.map(lambda w, p: jnp.broadcast_to(jnp.asarray(w, dtype), jnp.shape(p)), problem.l2, zeros)
    return _tree.flatten(spread, dtype)
