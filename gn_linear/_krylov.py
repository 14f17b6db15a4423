r"""Krylov bases: one basis, every spectral filter and every damping.

``krylov_basis`` builds an orthonormal basis :math:`V` of the Krylov space of :math:`G = A^T A`, :math:`A = B^T J`, with
a square root :math:`B` of the Hessian of the loss, by Golub and Kahan's bidiagonalisation :math:`A V = P R`. In that
basis :math:`G` is the small tridiagonal matrix :math:`R^T R`, and any filter of it is cheap. Its eigenvalues are the
squares of the singular values of :math:`R`: an eigenvalue is as accurate as a product with :math:`J` lets it be, where
Lanczos on :math:`G` would lose twice as many digits of the small ones. Vectors are kept in one of two spaces:

- *parameter space*: :math:`V` itself, from any starting vector;
- *sample space*: vectors :math:`w_k` like the outputs with :math:`V = J^T W`, from a start :math:`J^T u`, and their
  images :math:`\Theta W = J V`, :math:`\Theta = J J^T`, so that they are orthonormal in the inner product
  :math:`\langle w, w' \rangle = w^T \Theta w'`. Nothing divides by :math:`B`, so saturated or outlying examples do no
  harm. There :math:`\varphi(G) J^T u = J^T \varphi(H \Theta) u`. They grow as long as one over a singular value of
  :math:`J`, and are orthonormal to as many roundings.

Vectors are re-orthogonalised in full, twice at each step. The other side, P, is not: only its last column is needed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._typing import Count, Flag, Params, Scalar
from gn_linear.curvature import LinearisedProblem

ROUNDING = 10
"""A vector shorter than so many roundings of what it was computed from is no direction."""

CHECKS = 8
"""How often a growing basis is tested for convergence, at most; a test costs a decomposition of its largest size."""


class Space(NamedTuple):
    """The factors of ``G``, and where vectors are kept.

    Attributes:
        forward: a vector like the parameters to its image ``J v`` and the left vector ``A v``.
        dual: a left vector to its norm, and to the vector whose dot products are its inner products.
        lift: that dual to what ``pull`` takes.
        pull: from there to a vector like the parameters.
        origin: the left vector that is zero, and its dual.
        in_outputs: whether vectors are kept in the space of outputs.
        largest: the size that no basis exceeds.
        rounding: of the products, relative.
    """

    forward: Callable[[Params], tuple[Any, Any]]
    dual: Callable[[Any], tuple[Scalar, Any]]
    lift: Callable[[Any], Any]
    pull: Callable[[Any], Params]
    origin: tuple[Any, Any]
    in_outputs: bool
    largest: int
    rounding: float


class KrylovBasis(NamedTuple):
    """An orthonormal Krylov basis, with the operator in it.

    Attributes:
        vectors: the basis, like the starting vector with flat leaves (rank, size of the leaf); what stands beyond
            ``size`` does not count.
        diagonal: of the upper bidiagonal matrix, shape (rank,).
        above: the diagonal; the last entry in use couples the basis to what it does not hold, shape (rank,).
        norm: of the starting vector, in parameter space.
        size: how many vectors there are.
        finite: whether every product was.
    """

    vectors: Any
    diagonal: jax.Array
    above: jax.Array
    norm: Scalar
    size: Count
    finite: Flag


class Spectrum(NamedTuple):
    """The eigenproblem of ``G`` in the basis.

    Attributes:
        values: the eigenvalues (Ritz values), shape (rank,); 0 beyond the size of the basis.
        vectors: the eigenvectors, columns, shape (rank, rank).
    """

    values: jax.Array
    vectors: jax.Array


class Filtered(NamedTuple):
    """A filter of ``G`` in the basis, applied to the starting vector.

    Attributes:
        coefficients: of the basis vectors, shape (rank,).
        residual: norm of the residual of the inner problem that the filter solves, shape ().
    """

    coefficients: jax.Array
    residual: Scalar


class _Carry(NamedTuple):
    basis: KrylovBasis
    images: Any  # of the basis, in sample space
    left: Any  # the last left vector
    dual: Any  # and its dual
    right: Params  # the next vector of the basis, like the parameters
    kept: Any  # the same, as it is kept
    reach: Scalar  # the largest entry of R so far, about the norm of A
    slope: Scalar  # the longest image so far, about the norm of J
    live: Flag


def krylov_basis(
    space: Space, start: Any, rank: int, converged: Callable[[KrylovBasis], Flag] | None = None
) -> KrylovBasis:
    """Golub-Kahan bidiagonalisation with full re-orthogonalisation of the basis, twice at each step.

    It stops at ``rank`` vectors; where the Krylov space is exhausted, which is where the next vector is rounding
    relative to the norm of ``A``; where a product is not finite; or where ``converged`` says so.

    Args:
        space: the factors.
        start: the starting vector, like the outputs or like the parameters, as the space says.
        rank: the largest size of the basis.
        converged: of the basis so far, asked every few steps.

    Returns:
        The basis.
    """
    right = space.pull(start) if space.in_outputs else start
    norm = _tree.norm(right)
    dtype, rounding = norm.dtype, ROUNDING * space.rounding
    unit = jnp.where((norm > 0) & jnp.isfinite(norm), norm, jnp.ones_like(norm))
    live = (norm > 0) & jnp.isfinite(norm) & _tree.all_finite(start)
    right, kept = _tree.divide(right, unit), _tree.divide(start, unit)
    zeros, zero, none = jnp.zeros([rank], dtype), jnp.zeros([], dtype), jnp.zeros([], jnp.int32)
    basis = KrylovBasis(_stack(kept, rank), zeros, zeros, norm, none, jnp.isfinite(norm))
    images = _stack(kept, rank) if space.in_outputs else None

    def step(carry: _Carry) -> _Carry:
        basis, k = carry.basis, carry.basis.size
        image, left = space.forward(carry.right)
        slope = jnp.maximum(carry.slope, _tree.norm(image).astype(dtype))
        vectors = _set(basis.vectors, k, carry.kept)
        images = None if carry.images is None else _set(carry.images, k, image)
        vectors, images = jax.lax.optimization_barrier((vectors, images))  # else the stacks are copied at every step
        # The component along the last one is the last entry above the diagonal. Taken off as it is found, since what
        # rounding leaves of it would grow from step to step.
        before = _tree.dot(carry.dual, left).astype(dtype)
        alpha, dual, left = _normalised(space, _tree.axpy(-before, carry.left, left), rounding * carry.reach)
        lifted = space.lift(dual)
        moved = lifted if space.in_outputs else space.pull(lifted)
        moved = _orthogonal(_tree.axpy(-alpha, carry.kept, moved), vectors, vectors if images is None else images)
        right = space.pull(moved) if space.in_outputs else moved
        beta = _tree.norm(right).astype(dtype)
        reach = jnp.maximum(carry.reach, jnp.maximum(alpha, beta))
        finite = jnp.isfinite((2 * reach) ** 2) & _tree.all_finite(right)  # eigenvalues are finite, too
        # What a vector of outputs holds outside of the range of J does not count in the norm, but rounds into it.
        floor = jnp.maximum(reach, slope * _tree.norm(moved).astype(dtype)) if space.in_outputs else reach
        exhausted = (alpha == 0) | (beta <= rounding * floor)
        unit = jnp.where(finite & ~exhausted, beta, jnp.ones_like(beta))
        grown = basis._replace(
            vectors=(),
            diagonal=basis.diagonal.at[k].set(alpha),
            above=basis.above.at[k].set(jnp.where(exhausted, zero, beta)),
            size=k + 1,
        )
        ended = basis._replace(vectors=(), finite=jnp.zeros([], bool))
        grown = _tree.where(finite, grown, ended)._replace(vectors=vectors)
        done = ~finite | exhausted
        if converged is not None:
            asked = (grown.size % max(CHECKS, -(-rank // CHECKS)) == 0) & ~done
            done = done | jax.lax.cond(asked, converged, lambda _: jnp.zeros([], bool), grown)
        right, kept = _tree.divide(right, unit), _tree.divide(moved, unit)
        return _Carry(grown, images, left, dual, right, kept, reach, slope, ~done)

    most = min(rank, space.largest)
    carry = _Carry(basis, images, *space.origin, right, kept, zero, zero, live)
    return jax.lax.while_loop(lambda c: c.live & (c.basis.size < most), step, carry).basis


def _normalised(space: Space, left: Any, floor: Scalar) -> tuple[Scalar, Any, Any]:
    """Norm, dual and direction of a left vector; a norm up to the floor is rounding and becomes 0."""
    norm, dual = space.dual(left)
    norm = norm.astype(floor.dtype)
    norm = jnp.where(norm <= floor, jnp.zeros_like(norm), norm)
    unit = jnp.where((norm > 0) & jnp.isfinite(norm), norm, jnp.ones_like(norm))
    return norm, _tree.divide(dual, unit), _tree.divide(left, unit)


def ritz_spectrum(basis: KrylovBasis) -> Spectrum:
    """Eigenvalues and eigenvectors of ``G`` in the basis, from the singular values of its bidiagonal factor.

    Args:
        basis: the basis.

    Returns:
        The spectrum.
    """
    # Rows beyond the size are zero and coupled to nothing: their eigenvectors have no share in the first unit vector.
    coupling = jnp.where(_inside(basis)[1:], basis.above[:-1], jnp.zeros_like(basis.above[:-1]))
    _, singular, transposed = jnp.linalg.svd(jnp.diag(basis.diagonal) + jnp.diag(coupling, 1))
    return Spectrum(singular**2, transposed.T)


def apply_filter(basis: KrylovBasis, spectrum: Spectrum, function: Callable[[jax.Array], jax.Array]) -> Filtered:
    r"""A filter of the operator, in the basis.

    The residual is :math:`\|b\| \alpha_m \beta_m |e_m^T \varphi(R^T R) e_1|`: that of :math:`(G + \mu) d = -b` for
    damping, of :math:`\dot d = -(G d + b)` at the last time for gradient flow, and likewise for steps.

    Args:
        basis: the basis.
        spectrum: of the basis.
        function: of the eigenvalues.

    Returns:
        The coefficients, with an estimate of what the basis misses.
    """
    solution = spectrum.vectors @ (function(spectrum.values) * spectrum.vectors[0])
    coefficients = basis.norm * jnp.where(_inside(basis), solution, jnp.zeros_like(solution))
    last = jnp.maximum(basis.size - 1, 0)
    return Filtered(coefficients, basis.diagonal[last] * basis.above[last] * jnp.abs(coefficients[last]))


def combination(basis: KrylovBasis, coefficients: jax.Array, like: Any) -> Any:
    """The vector of these coefficients, with leaves of the shapes of ``like``."""
    return _combine(basis.vectors, coefficients, like)


def parameter_space(problem: LinearisedProblem) -> Space:
    """The space of the parameters; a penalty that is a number is left out, since it shifts the spectrum alone."""
    space = _factors(problem)
    if is_shift(problem):
        return space
    # A penalty by leaves is a second factor below the first.
    weights = jax.tree.map(lambda w, p: jnp.asarray(w, p.dtype), problem.l2, _tree.solve_zeros(problem.params))
    roots, nothing = jax.tree.map(jnp.sqrt, weights), _tree.solve_zeros(problem.params)

    def forward(vector: Params) -> tuple[Any, Any]:
        image, left = space.forward(vector)
        return image, (left, jax.tree.map(jnp.multiply, roots, vector))

    def dual(left: Any) -> tuple[Scalar, Any]:
        size, image = space.dual(left[0])
        below = _tree.norm(left[1])
        return jnp.hypot(size.astype(below.dtype), below), (image, left[1])

    return space._replace(
        forward=forward,
        dual=dual,
        lift=lambda left: (space.lift(left[0]), jax.tree.map(jnp.multiply, roots, left[1])),
        pull=lambda pair: _tree.add(space.pull(pair[0]), pair[1]),
        origin=((space.origin[0], nothing), (space.origin[1], nothing)),
    )


def sample_space(problem: LinearisedProblem) -> Space:
    """The space of the outputs, for starting vectors in the range of the transposed Jacobian, without a penalty."""
    space = _factors(problem)
    return space._replace(in_outputs=True, largest=min(space.largest, problem.output_size))


def is_shift(problem: LinearisedProblem) -> bool:
    """Whether the penalty is a number, so that it shifts the spectrum and leaves the basis alone."""
    return jax.tree.structure(problem.l2) == jax.tree.structure(0.0)


def pulled_back(problem: LinearisedProblem, vector: Any) -> Params:
    """``J^T`` of a vector like the outputs, in the dtypes of the solve."""
    linearisation = problem.linearisation
    if all(jnp.finfo(leaf.dtype).bits >= 32 for leaf in jax.tree.leaves(linearisation.outputs)):
        return _tree.to_solve(linearisation.vjp(_tree.cast_like(vector, linearisation.outputs)))
    # A short vector would lose its digits in the range of float16, and a sum over a large batch might leave it.
    norm = _tree.norm(vector)
    unit = jnp.where((norm > 0) & jnp.isfinite(norm), norm, jnp.ones_like(norm))
    pulled = linearisation.vjp(_tree.cast_like(_tree.divide(vector, unit), linearisation.outputs))
    return _tree.scale(unit, _tree.to_solve(pulled))


def product_rounding(problem: LinearisedProblem) -> float:
    """The relative rounding of products with the Jacobian: that of the narrowest dtype among parameters and outputs."""
    leaves = jax.tree.leaves((problem.params, problem.linearisation.outputs))
    return max((float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in leaves), default=0.0)


def _factors(problem: LinearisedProblem) -> Space:
    """The factors of ``J^T H J``, in the space of the parameters."""
    outputs, hessian = problem.linearisation.outputs, problem.hessian

    def forward(vector: Params) -> tuple[Any, Any]:
        image = _tree.to_solve(problem.linearisation.jvp(_tree.cast_like(vector, problem.params)))
        return image, hessian.root_transpose(image) if hessian.closed_form else image

    def in_curvature(left: Any) -> tuple[Scalar, Any]:
        """Norm and dual in the inner product of H, where its square root has no closed form."""
        largest = _tree.max_abs(left)
        unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
        scaled = _tree.divide(left, unit)
        image = _tree.to_solve(hessian.product(_tree.cast_like(scaled, outputs)))
        square = _tree.dot(scaled, image)
        return unit * jnp.sqrt(jnp.where(square < 0, jnp.zeros_like(square), square)), _tree.scale(unit, image)

    zeros = jax.tree.map(jnp.zeros_like, _tree.to_solve(outputs))
    return Space(
        forward,
        dual=(lambda left: (_tree.norm(left), left)) if hessian.closed_form else in_curvature,
        lift=hessian.root if hessian.closed_form else lambda image: image,
        pull=lambda vector: pulled_back(problem, vector),
        origin=(zeros, zeros),
        in_outputs=False,
        largest=sum(leaf.size for leaf in jax.tree.leaves(problem.params)),
        rounding=product_rounding(problem),
    )


def _inside(basis: KrylovBasis) -> jax.Array:
    return jnp.arange(basis.diagonal.shape[0], dtype=basis.size.dtype) < basis.size


# Stacks have flat leaves: XLA on CPU copies a stack of matrices at every step to multiply by it.


def _stack(like: Any, rank: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(jnp.zeros_like(x.ravel()), (rank, x.size)), like)


def _set(stack: Any, index: Count, vector: Any) -> Any:
    return jax.tree.map(lambda s, v: jax.lax.dynamic_update_index_in_dim(s, v.ravel(), index, 0), stack, vector)


def _orthogonal(vector: Any, stack: Any, duals: Any) -> Any:
    """The vector without its components along a stack, taken off twice."""
    for _ in range(2):
        vector = _tree.subtract(vector, _combine(stack, _project(duals, vector), vector))
    return vector


def _project(stack: Any, vector: Any) -> jax.Array:
    dtype = _tree.scalar_dtype(vector)
    parts = jax.tree.map(lambda s, v: jnp.sum(s * v.ravel()[None], axis=1).astype(dtype), stack, vector)
    return sum(jax.tree.leaves(parts), jnp.zeros([], dtype))


def _combine(stack: Any, coefficients: jax.Array, like: Any) -> Any:
    def leaf(s: jax.Array, x: Any) -> jax.Array:
        return jnp.dot(coefficients.astype(s.dtype), s, precision="highest").reshape(jnp.shape(x))

    return jax.tree.map(leaf, stack, like)
