"""Cholesky: the dense solve, in the space of the parameters or of the outputs, whichever is smaller."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from gn_linear import _tree
from gn_linear._dense import ROUNDING, Equations, Operator, equations, in_sample_space, times
from gn_linear._typing import Flag, Params, Scalar
from gn_linear.curvature import LinearisedProblem
from gn_linear.solvers._interface import Result, Solver, Status


class _Prepared(NamedTuple):
    params: Params
    equations: Equations
    matrix: jax.Array
    size: Scalar
    finite: Flag
    in_outputs: bool


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cholesky(Solver):
    r"""The dense solve by a Cholesky factorisation, for problems whose Jacobian fits into memory.

    .. math:: (G + \mu I) d = -b, \qquad G = A^T A + \lambda I, \quad A = B^T J, \quad H = B B^T

    The Jacobian :math:`J` of all outputs by all parameters is formed once a step, example by example, so examples must
    be independent of each other along the leading axis (no batch normalisation); a model that mixes them is noticed by
    its gradient, and its steps are refused. A refused step is tried again with more damping at no more than another
    factorisation. For N outputs in the batch and P parameters that is of

    - :math:`G + \mu I` (P x P) in the space of the parameters, or of
    - :math:`\mu I + A A^T` (N x N) in the space of the outputs, by the identity of Woodbury,
      :math:`(A^T A + \mu I)^{-1} = (I - A^T (\mu I + A A^T)^{-1} A) / \mu`.

    Both lose digits at small damping, which is mended by three corrections whose residual is computed in the form of
    least squares. In double precision errors are a few times those of ``QR`` at most up to condition numbers
    :math:`10^{12}` of :math:`G + \mu I`; in single precision the largest relative errors measured were 1e-5, 2e-4 and
    2e-3 at :math:`10^3`, :math:`10^4` and :math:`10^5`. Damping below ten roundings of the trace of :math:`A^T A`
    counts as that much in the factor, so undamped steps without curvature stay bounded; for undamped
    problems of bad condition use ``QR``. A negative damping is solved for where :math:`G + \mu I` is positive
    definite, which it never is in the space of the outputs.

    Memory: two matrices N x P, and the square one. ``info`` counts one inner step for each solve.

    Attributes:
        in_outputs: whether to factorise in the space of the outputs; None means wherever the matrix is smaller; a
            penalty ``l2`` that is no plain number needs the space of the parameters in any case; static.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import gn_linear as gnl
        >>> x = jnp.linspace(0.0, 1.0, 20)
        >>> y = 2.0 * jnp.exp(-1.5 * x)
        >>> predict = lambda p, x: p["a"] * jnp.exp(-p["k"] * x)
        >>> loss = gnl.losses.squared_error
        >>> optimiser = gnl.gauss_newton(predict, loss, solver=gnl.solvers.Cholesky())
        >>> params = {"a": jnp.array(1.0), "k": jnp.array(1.0)}
        >>> state = optimiser.init(params)
        >>> update, gradient = jax.jit(optimiser.update), jax.jit(jax.grad(lambda p: loss(predict(p, x), y)))
        >>> for _ in range(10):
        ...     updates, state = update(gradient(params), state, params, inputs=x, targets=y)
        ...     params = optax.apply_updates(params, updates)
        >>> print(f"{params['a']:.3f} {params['k']:.3f}")
        2.000 1.500

    References:
        Levenberg (1944), A method for the solution of certain non-linear problems in least squares; Woodbury (1950),
        Inverting modified matrices; Higham (2002), Accuracy and stability of numerical algorithms, chapters 10 and 12.
    """

    in_outputs: bool | None = dataclasses.field(default=None, metadata={"static": True})

    cheap_again: ClassVar[bool] = True

    def init(self, params: Params) -> tuple[()]:
        """Nothing is carried from step to step."""
        del params
        return ()

    def prepare(self, problem: LinearisedProblem, rhs: Params, state: Any) -> _Prepared:
        """Form the Jacobian, and the matrix that each damping shifts."""
        del state
        system, size = equations(problem, rhs)
        in_outputs = in_sample_space(problem, self.in_outputs)
        left = system.image if in_outputs else system.image.T
        matrix = times(left, left.T)
        finite = system.finite & _tree.all_finite((matrix, rhs))
        return _Prepared(problem.params, system, matrix, size, finite, in_outputs)

    def solve(self, prepared: _Prepared, damping: Scalar) -> Result:
        """The step for one damping, by one factorisation."""
        mu = damping.astype(prepared.matrix.dtype)
        inverse, definite = (_in_outputs if prepared.in_outputs else _in_parameters)(prepared, mu)
        step, solved = prepared.equations.solution(inverse, mu)
        return result(prepared.params, prepared.size * step, prepared.finite & jnp.isfinite(mu), definite & solved)


def result(params: Params, step: jax.Array, finite: Flag, definite: Flag) -> Result:
    """What a dense solve returns: the whole step, or none.

    Args:
        params: the parameters, for shapes and dtypes.
        step: as one vector.
        finite: whether all that was factorised was.
        definite: whether the damped matrix was found to be positive definite.

    Returns:
        The result; zero steps count and zero is the step unless the status is ``CONVERGED``.
    """
    status = jnp.where(definite, jnp.int32(Status.NON_FINITE), jnp.int32(Status.NON_POSITIVE_CURVATURE))
    status = jnp.where(finite, status, jnp.int32(Status.NON_FINITE))
    solved = finite & definite & _tree.all_finite(step)
    status = jnp.where(solved, jnp.int32(Status.CONVERGED), status)
    tree = _tree.unflatten(jnp.where(solved, step, jnp.zeros_like(step)), _tree.solve_zeros(params))
    return Result(tree, (), solved.astype(jnp.int32), status)


def _in_parameters(prepared: _Prepared, damping: Scalar) -> tuple[Operator, Flag]:
    matrix, system = prepared.matrix, prepared.equations
    shift = _raised(system.weights + damping, matrix)
    # What no output depends on and no gradient moves stays where it is, also under a negative damping.
    idle = (jnp.diag(matrix) == 0) & (system.residual(jnp.zeros_like(shift), damping) == 0)
    lower = jnp.linalg.cholesky(matrix + jnp.diag(jnp.where(idle, jnp.ones_like(shift), shift)))
    return lambda vector: cho_solve((lower, True), vector), _tree.all_finite(lower)


def _in_outputs(prepared: _Prepared, damping: Scalar) -> tuple[Operator, Flag]:
    matrix, image = prepared.matrix, prepared.equations.image
    shift = _raised(jnp.max(prepared.equations.weights, initial=0.0) + damping, matrix)
    lower = jnp.linalg.cholesky(matrix + shift * jnp.eye(len(matrix), dtype=matrix.dtype))

    def inverse(vector: jax.Array) -> jax.Array:
        seen = cho_solve((lower, True), times(image, vector))
        return (vector - times(image.T, seen)) / shift

    return inverse, _tree.all_finite(lower) & (shift > 0)


def _raised(shift: jax.Array, matrix: jax.Array) -> jax.Array:
    """The shift, raised above rounding, where a factorisation breaks down; a negative one is left to do so."""
    floor = ROUNDING * jnp.finfo(matrix.dtype).eps * jnp.trace(matrix)
    raised = jnp.where(shift >= 0, jnp.maximum(shift, floor), shift)
    return jnp.where(raised == 0, jnp.ones_like(raised), raised)  # no curvature and no damping at all
