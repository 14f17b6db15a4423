"""QR: the dense solve of the stacked least-squares problem, whose condition number is not squared."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from gn_linear import _tree
from gn_linear._dense import REFINEMENTS, ROUNDING, Equations, Operator, by_jacobian, in_sample_space, times
from gn_linear._typing import Flag, Params, Scalar, check_count
from gn_linear.curvature import LinearisedProblem
from gn_linear.solvers._interface import Result, Solver
from gn_linear.solvers.cholesky import check_in_outputs, result


class _Prepared(NamedTuple):
    params: Params
    equations: Equations
    triangle: jax.Array  # of A = B^T J; A itself in the space of the outputs
    outside: tuple[jax.Array, jax.Array] | None  # basis of the range of J^T and what the gradient holds beside it
    size: Scalar
    finite: Flag


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class QR(Solver):
    r"""The dense solve by an orthogonal factorisation, for Jacobians of bad condition at little or no damping.

    .. math:: (G + \mu I) d = -b, \qquad G + \mu I = R^T R, \qquad
        \begin{pmatrix} B^T J \\ \sqrt{\lambda + \mu} \, I \end{pmatrix} = Q R

    ``Cholesky`` solves the same equations in a tenth of the time. It forms :math:`G`, whose condition number
    is the square of that of :math:`A = B^T J`; here :math:`R` is computed from :math:`A` itself, and the corrected
    seminormal equations :math:`R^T R \, \delta = -g`, with the residual :math:`g` computed in the form of least
    squares, have the accuracy of least squares: errors grow with the condition number of :math:`A` itself, and with
    its square only in proportion to what the linearised outputs cannot fit. Unlike the textbook's, the right-hand side
    need not be in the range of :math:`A^T`: decay, clipping and outliers without curvature are welcome.

    The Jacobian :math:`J` is formed once a step, example by example, so examples must be independent of each other
    along the leading axis (no batch normalisation). With fewer outputs N than parameters P, :math:`J^T = Q_1 L^T` is
    factorised first, and the rest is N x N. A refused step is tried again with more damping at the cost of one
    factorisation of two stacked square matrices of the smaller size. Without damping, steps along directions that no
    output depends on vanish, but outputs and parameters that depend on each other linearly need some.

    Memory: three matrices N x P, and a few of the smaller size squared. ``info`` counts one inner step for each solve.

    Attributes:
        in_outputs: whether to reduce the problem to the size of the outputs; None means wherever that is smaller; a
            penalty ``l2`` that is no plain number prevents it in any case; static.
        corrections: how often a solution is corrected; one keeps the accuracy of least squares where the residuals are
            small or the step need not be exact; static.

    Raises:
        TypeError: ``in_outputs`` is no bool.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import gn_linear as gnl
        >>> x = jnp.linspace(0.0, 1.0, 20)
        >>> y = 2.0 * jnp.exp(-1.5 * x)
        >>> predict = lambda p, x: p["a"] * jnp.exp(-p["k"] * x)
        >>> loss = gnl.losses.squared_error
        >>> optimiser = gnl.gauss_newton(predict, loss, solver=gnl.solvers.QR())
        >>> params = {"a": jnp.array(1.0), "k": jnp.array(1.0)}
        >>> state = optimiser.init(params)
        >>> update, gradient = jax.jit(optimiser.update), jax.jit(jax.grad(lambda p: loss(predict(p, x), y)))
        >>> for _ in range(10):
        ...     updates, state = update(gradient(params), state, params, inputs=x, targets=y)
        ...     params = optax.apply_updates(params, updates)
        >>> print(f"{params['a']:.3f} {params['k']:.3f}")
        2.000 1.500

    References:
        Golub (1965), Numerical methods for solving linear least squares problems; Björck (1987), Stability analysis of
        the method of seminormal equations for linear least squares problems; Moré (1978), The Levenberg-Marquardt
        algorithm: implementation and theory.
    """

    in_outputs: bool | None = dataclasses.field(default=None, metadata={"static": True})
    corrections: int = dataclasses.field(default=REFINEMENTS, metadata={"static": True})

    cheap_again: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_in_outputs(self.in_outputs)
        check_count(self.corrections, "corrections", minimum=0)

    def init(self, params: Params) -> tuple[()]:
        """Nothing is carried from step to step."""
        del params
        return ()

    def prepare(self, problem: LinearisedProblem, rhs: Params, state: Any) -> _Prepared:
        """Form the Jacobian, and factorise what does not depend on the damping."""
        del state
        system, size, jacobian = by_jacobian(problem, rhs)
        finite = system.finite & _tree.all_finite((jacobian, rhs))
        if not in_sample_space(problem, self.in_outputs):
            image = jax.vmap(system.root_transpose, in_axes=1, out_axes=1)(jacobian)
            return _Prepared(problem.params, system, jnp.linalg.qr(image, mode="r"), None, size, finite)
        basis, upper = jnp.linalg.qr(jacobian.T)
        inside = times(basis.T, system.rest)
        reduced = system._replace(
            push=lambda step: times(upper.T, step),
            pull=lambda vector: times(upper, vector),
            rest=inside,
            weights=system.weights[: inside.size],
        )
        image = jax.vmap(system.root_transpose, in_axes=1, out_axes=1)(upper.T)
        # A square basis leaves nothing outside but rounding, which would be divided by the damping.
        outside = system.rest - times(basis, inside) if len(basis) > inside.size else jnp.zeros_like(system.rest)
        return _Prepared(problem.params, reduced, image, (basis, outside), size, finite)

    def solve(self, prepared: _Prepared, damping: Scalar) -> Result:
        """The step for one damping, by one factorisation."""
        system = prepared.equations
        mu = damping.astype(prepared.triangle.dtype)
        inverse, definite = _inverse(prepared, mu)
        step, solved = system.solution(inverse, mu, self.corrections)
        if prepared.outside is not None:
            # Beside the range of J^T there is no curvature, so that a slope there needs damping.
            basis, outside = prepared.outside
            shift = jnp.max(system.weights, initial=0.0) + mu
            solved = solved & ((shift > 0) | jnp.all(outside == 0))
            step = times(basis, step) - outside / jnp.where(shift > 0, shift, jnp.ones_like(shift))
        return result(prepared.params, prepared.size * step, prepared.finite & jnp.isfinite(mu), definite & solved)


def _inverse(prepared: _Prepared, damping: Scalar) -> tuple[Operator, Flag]:
    r"""An approximate inverse of the damped matrix by its factor :math:`R`, and whether it has one."""
    triangle, system = prepared.triangle, prepared.equations
    shift = system.weights + damping
    # What no output depends on and no gradient moves stays where it is, also under a negative damping.
    idle = jnp.all(triangle == 0, axis=0) & (system.residual(jnp.zeros_like(shift), damping) == 0)
    shift = jnp.where(idle, jnp.ones_like(shift), shift)
    floor = ROUNDING * jnp.finfo(triangle.dtype).eps * _tree.norm(triangle)

    def stacked() -> jax.Array:
        below = jnp.maximum(jnp.sqrt(jnp.maximum(shift, jnp.zeros_like(shift))), floor)
        below = jnp.where(below == 0, jnp.ones_like(below), below)  # no curvature and no damping at all
        return jnp.linalg.qr(jnp.concatenate([triangle, jnp.diag(below)]), mode="r")

    def shifted() -> jax.Array:
        return jnp.linalg.cholesky(times(triangle.T, triangle) + jnp.diag(shift)).T

    # A negative damping has no root to stack, and squaring the condition number matters least of all there.
    factor = jax.lax.cond(jnp.any(shift < 0), shifted, stacked)

    def inverse(vector: jax.Array) -> jax.Array:
        return solve_triangular(factor, solve_triangular(factor, vector, trans="T"))

    return inverse, _tree.all_finite(factor)
