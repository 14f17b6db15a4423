"""Lanczos: any spectral filter of the Gauss-Newton matrix as the step, and every damping from one Krylov basis."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._krylov import (
    KrylovBasis,
    Spectrum,
    apply_filter,
    combination,
    is_shift,
    krylov_basis,
    parameter_space,
    product_rounding,
    pulled_back,
    ritz_spectrum,
    sample_space,
)
from gn_linear._typing import Number, Params, Scalar, check_count, check_number, shown
from gn_linear.curvature import LinearisedProblem
from gn_linear.filters import Filter, Tikhonov
from gn_linear.solvers._interface import Result, Solver, Status


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

    .. math:: d = -\varphi_\mu(G) \, b \approx -\|b\| \, V \, \varphi_\mu(T) \, e_1, \qquad T = V^T G V

    The basis :math:`V` does not depend on the damping, so a refused step is tried again with more damping at no
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
        Lanczos (1950), An iteration method for the solution of the eigenvalue problem; Golub and Kahan (1965),
        Calculating the singular values and pseudo-inverse of a matrix; Simon and Zha (2000), Low-rank matrix
        approximation using the Lanczos bidiagonalization process; Saad (1992), Analysis of some
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
            converged = self._converged(self._functions(state.damping / 4, problem)[0], target, state)
            basis = krylov_basis(parameter_space(problem), scaled, self.rank, converged)
            return _Prepared(problem, (basis,), (ritz_spectrum(basis),), target, None, size, state)
        start = _tree.divide(_tree.to_solve(problem.output_gradient), size)
        own = pulled_back(problem, start)
        rest = _tree.subtract(scaled, own)
        # What the incoming gradient holds beside this batch's own is often nothing but rounding.
        rounding = 64 * product_rounding(problem) * (_tree.norm(scaled) + _tree.norm(own))
        rest = _tree.where(_tree.norm(rest) > rounding, rest, jax.tree.map(jnp.zeros_like, rest))
        moved = problem.linearisation.jvp(_tree.cast_like(rest, problem.params))
        moved = _tree.to_solve(problem.hessian.product(moved))
        space, functions = sample_space(problem), self._functions(state.damping / 4, problem)
        bases = tuple(
            krylov_basis(space, vector, self.rank, self._converged(function, target, state))
            for vector, function in zip((start, moved), functions, strict=True)
        )
        spectra = tuple(ritz_spectrum(basis) for basis in bases)
        return _Prepared(problem, bases, spectra, target, rest, size, state)

    def solve(self, prepared: _Prepared, damping: Scalar) -> Result:
        """The step for one damping: a small product, and in the space of outputs one pullback."""
        problem, bases = prepared.problem, prepared.bases
        in_parameters = prepared.rest is None
        functions = self._functions(damping, problem)
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
        usable, shift = jnp.isfinite(damping), self._shift(problem, damping.dtype)
        status = jnp.where(finite & usable, status, Status.NON_FINITE)
        for spectrum in prepared.spectra:
            share = jnp.abs(spectrum.vectors[0])
            seen = jnp.where(share <= jnp.finfo(share.dtype).eps, jnp.inf, spectrum.values)
            indefinite = (damping < 0) & (jnp.min(seen) + shift + damping <= 0)
            status, usable = jnp.where(indefinite, Status.NON_POSITIVE_CURVATURE, status), usable & ~indefinite
        steps = sum((basis.size for basis in bases), jnp.zeros([], jnp.int32))
        # With a damping that no filter has there is no step, and the state keeps the last one that was good.
        steps, status = jnp.where(usable, steps, jnp.zeros_like(steps)), status.astype(jnp.int32)
        last = prepared.state.damping
        state = LanczosState(jnp.where(usable, damping.astype(last.dtype), last))
        return Result(_tree.scale(-prepared.size, step), state, steps, status)

    def _functions(self, damping: Scalar, problem: LinearisedProblem) -> tuple[Callable[[jax.Array], jax.Array], ...]:
        r"""What is applied to the basis of the batch's own gradient, and to that of the rest.

        A vector r outside the range of :math:`J^T` is filtered by
        :math:`\varphi(G) r = \varphi(0) r + J^T \psi(H \Theta) H J r`,
        :math:`\psi(\lambda) = (\varphi(\lambda) - \varphi(0)) / \lambda`.

        Args:
            damping: absolute.
            problem: the linearised problem, whose penalty may shift the spectrum.

        Returns:
            The two functions of the eigenvalues.
        """
        chosen = self.filter.at_damping(damping) if self.filter.adaptable else self.filter

        def own(values: jax.Array) -> jax.Array:
            return chosen(values + self._shift(problem, values.dtype))

        def rest(values: jax.Array) -> jax.Array:
            kept = values > 0
            change = own(values) - own(jnp.zeros([], values.dtype))
            return jnp.where(kept, change / jnp.where(kept, values, 1.0), 0.0)

        return own, rest

    @staticmethod
    def _shift(problem: LinearisedProblem, dtype: Any) -> jax.Array:
        return jnp.asarray(problem.l2 if is_shift(problem) else 0.0, dtype)

    def _in_outputs(self, problem: LinearisedProblem) -> bool:
        parameters = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
        smaller = 2 * problem.output_size < parameters if self.in_outputs is None else self.in_outputs
        return is_shift(problem) and smaller

    def _converged(
        self, function: Callable[[jax.Array], jax.Array], target: Scalar, state: LanczosState
    ) -> Callable[[KrylovBasis], jax.Array]:
        def converged(basis: KrylovBasis) -> jax.Array:
            residual = apply_filter(basis, ritz_spectrum(basis), function).residual
            return (residual <= target) & (state.damping > 0)

        return converged
