r"""Lanczos: one Krylov basis, every spectral filter and every damping.

``krylov_basis`` builds an orthonormal basis of the Krylov space of a self-adjoint operator, in which the operator is a
small tridiagonal matrix; any filter of that matrix is then cheap. It runs in one of two spaces:

- *parameter space*: on :math:`G` from any right-hand side, a basis vector has the size of the parameters;
- *sample space*: on :math:`H \Theta` with :math:`\Theta = J J^T`, a basis vector has the size of the outputs. It is
  self-adjoint in the inner product :math:`\langle u, v \rangle = u^T \Theta v`, so nothing divides by :math:`H` or by
  its square root, and saturated or outlying examples do no harm. There
  :math:`\varphi(G) J^T u = J^T \varphi(H \Theta) u`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._typing import Count, Number, Params, Scalar, check_count, check_number, shown
from gn_linear.curvature import LinearisedProblem
from gn_linear.filters import Filter, Tikhonov
from gn_linear.solvers._interface import Result, Solver, Status

CHECKS = 8
"""How often a growing basis is tested for convergence, at most; a test costs an eigenproblem of its largest size."""


_Carry = tuple["KrylovBasis", Any, Any, Any, Scalar, jax.Array]


class Space(NamedTuple):
    """A self-adjoint operator and its inner product, as Lanczos needs them.

    Attributes:
        dual: a vector to its norm and its image under the Gram matrix of the inner product.
        apply: that image to the operator's image of the vector.
        plain: whether the Gram matrix is the identity, so that no images need be kept.
    """

    dual: Callable[[Any], tuple[Scalar, Any]]
    apply: Callable[[Any], Any]
    plain: bool


class KrylovBasis(NamedTuple):
    """An orthonormal Krylov basis, with the operator in it.

    Attributes:
        vectors: the basis, like the starting vector with flat leaves (rank, size of the leaf); what stands beyond
            ``size`` does not count.
        diagonal: of the tridiagonal matrix, shape (rank,).
        off_diagonal: below it; the last entry in use couples the basis to what it does not hold, shape (rank,).
        norm: of the starting vector.
        size: how many vectors there are.
        finite: whether every product was.
    """

    vectors: Any
    diagonal: jax.Array
    off_diagonal: jax.Array
    norm: Scalar
    size: Count
    finite: jax.Array


class Filtered(NamedTuple):
    """A filter of the tridiagonal matrix, applied to the first unit vector.

    Attributes:
        coefficients: of the basis vectors, times the norm of the starting vector, shape (rank,).
        residual: norm of the residual of the inner problem that the filter solves, shape ().
    """

    coefficients: jax.Array
    residual: Scalar


class Spectrum(NamedTuple):
    """The eigenproblem of the tridiagonal matrix.

    Attributes:
        values: the eigenvalues (Ritz values), shape (rank,); 0 beyond the size of the basis.
        vectors: the eigenvectors, columns, shape (rank, rank).
    """

    values: jax.Array
    vectors: jax.Array


def krylov_basis(
    space: Space, start: Any, rank: int, converged: Callable[[KrylovBasis], jax.Array] | None = None
) -> KrylovBasis:
    """Lanczos with full re-orthogonalisation, twice at each step.

    It stops at ``rank`` vectors; where the Krylov space is exhausted, which is where the next vector is rounding
    relative to the operator's size; where a product is not finite; or where ``converged`` says so.

    Args:
        space: the operator.
        start: the starting vector, a pytree of arrays.
        rank: the largest size of the basis.
        converged: of the basis so far, asked every few steps.

    Returns:
        The basis.
    """
    norm, image = space.dual(start)
    dtype = norm.dtype
    unit = jnp.where((norm > 0) & jnp.isfinite(norm), norm, jnp.ones_like(norm))
    first, first_image = _tree.divide(start, unit), _tree.divide(image, unit)
    # Flat leaves: XLA on CPU copies a stack of matrices at every step to multiply by it.
    store = jax.tree.map(lambda x: jnp.zeros((rank, x.size), x.dtype), start)
    images = None if space.plain else store
    zeros = jnp.zeros([rank], dtype)
    live = (norm > 0) & jnp.isfinite(norm) & _tree.all_finite(start)
    basis = KrylovBasis(store, zeros, zeros, norm, jnp.zeros([], jnp.int32), jnp.isfinite(norm))

    def step(carry: _Carry) -> _Carry:
        basis, images, vector, image, reach, _ = carry
        k = basis.size
        vectors = _tree_set(basis.vectors, k, vector)
        images = None if images is None else _tree_set(images, k, image)
        vectors, images = jax.lax.optimization_barrier((vectors, images))  # else the stacks are copied, too
        duals = vectors if images is None else images
        moved = space.apply(image)
        alpha = _tree.dot(image, moved).astype(dtype)
        scale = jnp.maximum(jnp.abs(alpha), jnp.max(jnp.abs(basis.diagonal) + jnp.abs(basis.off_diagonal)))
        for _ in range(2):
            moved = _tree.subtract(moved, _combine(vectors, _project(duals, moved, dtype), moved))
        beta, image = space.dual(moved)
        finite = jnp.isfinite(alpha) & jnp.isfinite(beta) & _tree.all_finite(moved)
        # What lies outside of the range of the Gram matrix does not count in the norm, but rounds into it.
        ratio = _tree.norm(image).astype(dtype) / jnp.where(beta > 0, beta, jnp.ones_like(beta))
        reach = jnp.maximum(reach, jnp.where(beta > 0, ratio, jnp.zeros_like(ratio)))
        exhausted = beta <= 10 * jnp.finfo(dtype).eps * jnp.maximum(scale, reach * _tree.norm(moved).astype(dtype))
        unit = jnp.where(finite & ~exhausted, beta, jnp.ones_like(beta)).astype(dtype)
        grown = KrylovBasis(
            (),
            basis.diagonal.at[k].set(alpha),
            basis.off_diagonal.at[k].set(jnp.where(exhausted, 0.0, beta).astype(dtype)),
            basis.norm,
            k + 1,
            basis.finite,
        )
        before = basis._replace(vectors=(), finite=jnp.zeros([], bool))
        grown = _tree.where(finite, grown, before)._replace(vectors=vectors)
        done = ~finite | exhausted
        if converged is not None:
            asked = (grown.size % max(CHECKS, -(-rank // CHECKS)) == 0) & ~done
            done = done | jax.lax.cond(asked, converged, lambda _: jnp.zeros([], bool), grown)
        return grown, images, _tree.divide(moved, unit), _tree.divide(image, unit), reach, ~done

    carry = (basis, images, first, first_image, _tree.norm(first_image).astype(dtype), live)
    return jax.lax.while_loop(lambda c: c[-1] & (c[0].size < rank), step, carry)[0]


def tridiagonal_spectrum(basis: KrylovBasis) -> Spectrum:
    """Eigenvalues and eigenvectors of the operator in the basis.

    Args:
        basis: the basis.

    Returns:
        The spectrum of its tridiagonal matrix.
    """
    inside = jnp.arange(basis.diagonal.shape[0], dtype=basis.size.dtype) < basis.size
    coupling = jnp.where(inside[1:], basis.off_diagonal[:-1], 0.0)
    # Rows beyond the size are zero and coupled to nothing: their eigenvectors have no share in the first unit vector.
    return Spectrum(*jnp.linalg.eigh(jnp.diag(basis.diagonal) + jnp.diag(coupling, 1) + jnp.diag(coupling, -1)))


def apply_filter(basis: KrylovBasis, spectrum: Spectrum, function: Callable[[jax.Array], jax.Array]) -> Filtered:
    r"""A filter of the operator, in the basis.

    The residual is :math:`\|b\| \beta_m |e_m^T \varphi(T) e_1|`: that of :math:`(G + \mu) d = -b` for damping, of
    :math:`\dot d = -(G d + b)` at the last time for gradient flow, and likewise for steps.

    Args:
        basis: the basis.
        spectrum: of the basis.
        function: of the eigenvalues.

    Returns:
        The coefficients, with an estimate of what the basis misses.
    """
    inside = jnp.arange(basis.diagonal.shape[0], dtype=basis.size.dtype) < basis.size
    solution = spectrum.vectors @ (function(spectrum.values) * spectrum.vectors[0])
    coefficients = basis.norm * jnp.where(inside, solution, 0.0)
    last = jnp.maximum(basis.size - 1, 0)
    return Filtered(coefficients, basis.off_diagonal[last] * jnp.abs(coefficients[last]))


class LanczosState(NamedTuple):
    """What Lanczos carries from step to step.

    Attributes:
        damping: the last damping that was solved for, which says how far the next basis must go, shape ().
    """

    damping: Scalar


class _Prepared(NamedTuple):
    problem: LinearisedProblem
    bases: tuple[KrylovBasis, ...]
    spectra: tuple[Spectrum, ...]
    target: Scalar
    rest: Params | None
    size: Scalar
    state: LanczosState


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lanczos(Solver):
    r"""Any spectral filter of the Gauss-Newton matrix, from one Krylov basis.

    .. math:: d = -\varphi_\mu(G) \, b \approx -\|b\| \, Q \, \varphi_\mu(T) \, e_1, \qquad T = Q^T G Q

    The basis :math:`Q` does not depend on the damping, so a refused step is tried again with more damping at no
    further product. It lives in the smaller of two spaces: the parameters, or the outputs of the batch, where the
    incoming gradient is split into :math:`J^T u`, with :math:`u` the output gradient, and the rest (decay, clipping),
    which gets a basis of its own if it is more than rounding. A penalty ``l2`` that is no plain number needs the first.

    The filter's own parameter is what the damping policy sets: damping, time :math:`1/\mu`, steps
    :math:`1/(\eta\mu)`. To hold it fixed, pass ``damping=filter.equivalent_damping()``.

    Memory: ``rank`` vectors like the parameters, or in the space of outputs twice (with a rest four times) as many like
    the outputs. Each vector costs one product with the Gauss-Newton matrix, each solve one pullback.

    Attributes:
        rank: the largest size of a basis; static.
        filter: one of ``gn_linear.filters``.
        rtol: the basis stops growing when the residual of the inner problem, at a quarter of the last damping, is
            below this share of the gradient; 0 uses the whole rank.
        in_outputs: whether to work in the space of outputs; None means wherever vectors are smaller; static.

    Raises:
        TypeError: ``rank`` is not an int, ``filter`` is no filter.
        ValueError: ``rank`` is below 1, ``rtol`` is negative.

    Example:
        >>> import gn_linear as gnl
        >>> solver = gnl.solvers.Lanczos(rank=30, filter=gnl.filters.GradientFlow(1.0))

    References:
        Lanczos (1950), An iteration method for the solution of the eigenvalue problem; Saad (1992), Analysis of some
        Krylov subspace approximations to the matrix exponential operator; Parlett (1980), The symmetric eigenvalue
        problem, chapter 13.
    """

    rank: int = dataclasses.field(default=50, metadata={"static": True})
    filter: Filter = Tikhonov()
    rtol: Number = 1e-2
    in_outputs: bool | None = dataclasses.field(default=None, metadata={"static": True})

    cheap_again: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count(self.rank, "rank")
        check_number(self.rtol, "rtol")
        if not isinstance(self.filter, Filter):
            raise TypeError(
                f"filter must be one of gn_linear.filters, such as Tikhonov(), but is {shown(self.filter)}."
            )

    @property
    def adaptable(self) -> bool:
        """Whether a damping policy can set the filter's parameter."""
        return self.filter.adaptable

    def init(self, params: Params) -> LanczosState:
        """No damping known yet, so that the first basis goes as far as it can."""
        return LanczosState(jnp.zeros([], _tree.scalar_dtype(params)))

    def prepare(self, problem: LinearisedProblem, rhs: Params, state: LanczosState) -> _Prepared:
        """Build the basis, or the two of them."""
        largest = _tree.max_abs(rhs)
        size = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
        scaled = _tree.divide(rhs, size)
        target = jnp.asarray(self.rtol, size.dtype) * _tree.norm(scaled)
        if not self._in_outputs(problem):
            converged = self._converged(self._functions(state.damping / 4, 0.0)[0], target, state)
            basis = krylov_basis(parameter_space(problem), scaled, self.rank, converged)
            return _Prepared(problem, (basis,), (tridiagonal_spectrum(basis),), target, None, size, state)
        start = _tree.divide(_tree.to_solve(problem.output_gradient), size)
        own = pulled_back(problem, start)
        rest = _tree.subtract(scaled, own)
        # What the incoming gradient holds beside this batch's own is often nothing but rounding.
        rounding = 64 * jnp.finfo(size.dtype).eps * (_tree.norm(scaled) + _tree.norm(own))
        rest = _tree.where(_tree.norm(rest) > rounding, rest, jax.tree.map(jnp.zeros_like, rest))
        moved = problem.linearisation.jvp(_tree.cast_like(rest, problem.params))
        moved = _tree.to_solve(problem.hessian.product(moved))
        space, functions = sample_space(problem), self._functions(state.damping / 4, problem.l2)
        bases = tuple(
            krylov_basis(space, vector, self.rank, self._converged(function, target, state))
            for vector, function in zip((start, moved), functions, strict=True)
        )
        spectra = tuple(tridiagonal_spectrum(basis) for basis in bases)
        return _Prepared(problem, bases, spectra, target, rest, size, state)

    def solve(self, prepared: _Prepared, damping: Scalar) -> Result:
        """The step for one damping: a small product, and in the space of outputs one pullback."""
        problem, bases = prepared.problem, prepared.bases
        in_parameters = prepared.rest is None
        functions = self._functions(damping, 0.0 if in_parameters else problem.l2)
        filtered = [
            apply_filter(basis, spectrum, function)
            for basis, spectrum, function in zip(bases, prepared.spectra, functions, strict=False)
        ]
        like = problem.params if in_parameters else problem.linearisation.outputs
        vectors = [combination(basis, f.coefficients, like) for basis, f in zip(bases, filtered, strict=True)]
        if in_parameters:
            step = vectors[0]
        else:
            at_zero = functions[0](jnp.zeros([], damping.dtype))
            step = _tree.axpy(at_zero, prepared.rest, pulled_back(problem, _tree.add(*vectors)))
        residual = sum((f.residual for f in filtered), jnp.zeros_like(damping))
        finite = jnp.isfinite(prepared.target)
        for basis in bases:
            finite = finite & basis.finite
        status = jnp.where(residual <= prepared.target, Status.CONVERGED, Status.MAX_STEPS)
        usable = jnp.isfinite(damping)
        status = jnp.where(finite & usable, status, Status.NON_FINITE)
        for spectrum in prepared.spectra:
            seen = jnp.where(spectrum.vectors[0] == 0, jnp.inf, spectrum.values)
            indefinite = (damping < 0) & (jnp.min(seen) + damping <= 0)
            status, usable = jnp.where(indefinite, Status.NON_POSITIVE_CURVATURE, status), usable & ~indefinite
        steps = sum((basis.size for basis in bases), jnp.zeros([], jnp.int32))
        # With a damping that no filter has there is no step, and the state keeps the last one that was good.
        steps, status = jnp.where(usable, steps, jnp.zeros_like(steps)), status.astype(jnp.int32)
        last = prepared.state.damping
        state = LanczosState(jnp.where(usable, damping.astype(last.dtype), last))
        return Result(_tree.scale(-prepared.size, step), state, steps, status)

    def _functions(self, damping: Scalar, l2: Any) -> tuple[Callable[[jax.Array], jax.Array], ...]:
        r"""What is applied to the basis of the batch's own gradient, and to that of the rest.

        A vector r outside the range of :math:`J^T` is filtered by
        :math:`\varphi(G) r = \varphi(0) r + J^T \psi(H \Theta) H J r`,
        :math:`\psi(\lambda) = (\varphi(\lambda) - \varphi(0)) / \lambda`.

        Args:
            damping: absolute.
            l2: a number that shifts the spectrum.

        Returns:
            The two functions of the eigenvalues.
        """
        chosen = self.filter.at_damping(damping) if self.filter.adaptable else self.filter

        def own(values: jax.Array) -> jax.Array:
            return chosen(values + jnp.asarray(l2, values.dtype))

        def rest(values: jax.Array) -> jax.Array:
            kept = values > 0
            change = own(values) - own(jnp.zeros([], values.dtype))
            return jnp.where(kept, change / jnp.where(kept, values, 1.0), 0.0)

        return own, rest

    def _in_outputs(self, problem: LinearisedProblem) -> bool:
        plain = jax.tree.structure(problem.l2) == jax.tree.structure(0.0)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
        return plain and (2 * problem.output_size < parameters if self.in_outputs is None else self.in_outputs)

    def _converged(
        self, function: Callable[[jax.Array], jax.Array], target: Scalar, state: LanczosState
    ) -> Callable[[KrylovBasis], jax.Array]:
        def converged(basis: KrylovBasis) -> jax.Array:
            residual = apply_filter(basis, tridiagonal_spectrum(basis), function).residual
            return (residual <= target) & (state.damping > 0)

        return converged


def parameter_space(problem: LinearisedProblem) -> Space:
    """The operator ``G`` on the parameters, penalty included."""
    return Space(lambda v: (_tree.norm(v), v), problem.product, plain=True)


def sample_space(problem: LinearisedProblem) -> Space:
    """The operator ``H J J^T`` on the outputs, in the inner product of ``J J^T``."""
    outputs = problem.linearisation.outputs

    def dual(vector: Any) -> tuple[Scalar, Any]:
        pulled = problem.linearisation.vjp(_tree.cast_like(vector, outputs))
        return _tree.norm(_tree.to_solve(pulled)), _tree.to_solve(problem.linearisation.jvp(pulled))

    def apply(image: Any) -> Any:
        return _tree.to_solve(problem.hessian.product(_tree.cast_like(image, outputs)))

    return Space(dual, apply, plain=False)


def pulled_back(problem: LinearisedProblem, vector: Any) -> Params:
    """``J^T`` of a vector like the outputs, in the dtypes of the solve."""
    return _tree.to_solve(problem.linearisation.vjp(_tree.cast_like(vector, problem.linearisation.outputs)))


def combination(basis: KrylovBasis, coefficients: jax.Array, like: Any) -> Any:
    """The vector of these coefficients, with leaves of the shapes of ``like``."""
    return _combine(basis.vectors, coefficients, like)


def _tree_set(stack: Any, index: Count, vector: Any) -> Any:
    return jax.tree.map(lambda s, v: jax.lax.dynamic_update_index_in_dim(s, v.ravel(), index, 0), stack, vector)


def _project(stack: Any, vector: Any, dtype: Any) -> jax.Array:
    parts = jax.tree.map(lambda s, v: jnp.sum(s * v.ravel()[None], axis=1).astype(dtype), stack, vector)
    return sum(jax.tree.leaves(parts), jnp.zeros([], dtype))


def _combine(stack: Any, coefficients: jax.Array, like: Any) -> Any:
    def leaf(s: jax.Array, x: Any) -> jax.Array:
        return jnp.dot(coefficients.astype(s.dtype), s, precision="highest").reshape(jnp.shape(x))

    return jax.tree.map(leaf, stack, like)
