"""Cholesky: the dense solve, in the space of the parameters or of the outputs, whichever is smaller."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from gn_linear import _tree
from gn_linear._dense import ROUNDING, Equations, Operator, by_gram, by_jacobian, in_sample_space, times
from gn_linear._typing import Flag, Number, Params, Scalar, check_number, shown
from gn_linear.curvature import LinearisedProblem
from gn_linear.solvers._interface import Result, Solver, Status


class CholeskyState(NamedTuple):
    """The last step taken, in units of which momentum is kept; there is none without momentum.

    Attributes:
        step: a pytree like the parameters in the dtypes of the solve.
        damping: absolute, that it was solved with, shape ().
    """

    step: Params
    damping: Scalar


class _Prepared(NamedTuple):
    params: Params
    equations: Equations
    matrix: jax.Array
    size: Scalar
    finite: Flag
    in_outputs: bool
    last: CholeskyState | None  # its step as one vector, scaled like the equations


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cholesky(Solver):
    r"""The dense solve by a Cholesky factorisation, for problems whose Jacobian fits into memory.

    .. math:: (G + \mu I) d = -b, \qquad G = A^T A + \lambda I, \quad A = B^T J, \quad H = B B^T

    For N outputs in the batch and P parameters, the matrix is

    - :math:`G + \mu I` (P x P) in the space of the parameters, from the Jacobian :math:`J`, or
    - :math:`\mu I + A A^T` (N x N) in the space of the outputs, by the identity of Woodbury,
      :math:`(A^T A + \mu I)^{-1} = (I - A^T (\mu I + A A^T)^{-1} A) / \mu`, from the Gram matrix :math:`J J^T`, which
      the factors of each layer give without a Jacobian (:func:`gn_linear.diagnostics.structure_report`).

    Both are formed once a step, example by example, so examples must be independent of each other along the leading
    axis (no batch normalisation); a model that mixes them is noticed by its gradient, and its steps are refused. A
    refused step is tried again with more damping at the cost of one more factorisation.

    Both lose digits at small damping, which is mended by three corrections whose residual is computed in the form of
    least squares. In double precision errors are a few times those of ``QR`` at most up to condition numbers
    :math:`10^{12}` of :math:`G + \mu I`; in single precision the largest relative errors measured were 1e-5, 2e-4 and
    2e-3 at :math:`10^3`, :math:`10^4` and :math:`10^5`. Damping below ten roundings of the trace of :math:`A^T A`
    counts as that much in the factor, so undamped steps without curvature stay bounded; for undamped
    problems of bad condition use ``QR``. A negative damping is solved for where :math:`G + \mu I` is positive
    definite, which it never is in the space of the outputs.

    With ``momentum`` :math:`\beta` the step is drawn towards the last one, :math:`p`, which stands for the batches seen
    before: a small batch, as of a physics-informed network, fixes few of the directions. It wants a ``learning_rate``
    of about :math:`1 - \beta`; with whole steps it overshoots.

    .. math:: \min_d \; \langle b, d \rangle + \tfrac12 d^T G d + \tfrac{\mu}{2} \|d - \beta p\|^2

    The pull is no stronger than the damping with which :math:`p` was computed, so more damping still shortens the step,
    and never so strong that it turns the gradient round.

    Memory: in the space of the outputs the square matrix and the factors of each layer, in that of the parameters two
    matrices N x P and the square one. ``info`` counts one inner step for each solve.

    Attributes:
        in_outputs: whether to factorise in the space of the outputs; None means wherever the matrix is smaller; a
            penalty ``l2`` that is no plain number needs the space of the parameters in any case; static.
        momentum: :math:`\beta`, from 0 to 1, such as 0.9; None keeps no state.

    Raises:
        TypeError: ``in_outputs`` is no bool or ``momentum`` no number.
        ValueError: ``momentum`` is negative or greater than 1.

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
        Inverting modified matrices; Higham (2002), Accuracy and stability of numerical algorithms, chapters 10 and 12;
        Goldshlager, Abrahamsen and Lin (2024), A Kaczmarz-inspired approach to accelerate the optimization of neural
        network wavefunctions, for the momentum.
    """

    in_outputs: bool | None = dataclasses.field(default=None, metadata={"static": True})
    momentum: Number | None = None

    cheap_again: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_in_outputs(self.in_outputs)
        if self.momentum is not None:
            number = check_number(self.momentum, "momentum", also=" and at most 1, or None")
            if number is not None and number > 1:
                raise ValueError(f"momentum must be at most 1, but is {shown(self.momentum)}.")

    @property
    def part_of_run(self) -> bool:
        """Whether there is a momentum, which a refused step leaves as it was."""
        return self.momentum is not None

    def init(self, params: Params) -> CholeskyState | tuple[()]:
        """No step yet; nothing at all without momentum."""
        if self.momentum is None:
            return ()
        return CholeskyState(_tree.solve_zeros(params), jnp.zeros([], _tree.scalar_dtype(params)))

    def prepare(self, problem: LinearisedProblem, rhs: Params, state: Any) -> _Prepared:
        """Form the matrix that each damping shifts."""
        in_outputs = in_sample_space(problem, self.in_outputs)
        if in_outputs:
            system, size, gram = by_gram(problem, rhs)
            half = jax.vmap(system.root_transpose, in_axes=1, out_axes=1)(gram)
            matrix = jax.vmap(system.root_transpose)(half)
        else:
            system, size, jacobian = by_jacobian(problem, rhs)
            image = jax.vmap(system.root_transpose, in_axes=1, out_axes=1)(jacobian)
            matrix = times(image.T, image)
        finite = system.finite & _tree.all_finite((matrix, rhs))
        last = None
        if self.momentum is not None:
            last = CholeskyState(_tree.flatten(state.step, matrix.dtype) / size, state.damping)
        return _Prepared(problem.params, system, matrix, size, finite, in_outputs, last)

    def solve(self, prepared: _Prepared, damping: Scalar) -> Result:
        """The step for one damping, by one factorisation."""
        mu = damping.astype(prepared.matrix.dtype)
        if prepared.last is not None:
            drawn = _drawn(prepared.equations, prepared.last, mu, jnp.asarray(self.momentum, mu.dtype))
            prepared = prepared._replace(equations=drawn)
        inverse, definite = (_in_outputs if prepared.in_outputs else _in_parameters)(prepared, mu)
        step, solved = prepared.equations.solution(inverse, mu)
        found = result(prepared.params, prepared.size * step, prepared.finite & jnp.isfinite(mu), definite & solved)
        return found if prepared.last is None else found._replace(state=CholeskyState(found.step, mu))


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


def check_in_outputs(in_outputs: Any) -> None:
    """Raise unless the choice of a space is one."""
    if in_outputs is not None and not isinstance(in_outputs, bool):
        raise TypeError(
            "in_outputs must be True, False, or None for the smaller of the two spaces, since it sets the size of "
            f"arrays, but is {shown(in_outputs)}."
        )


def _drawn(system: Equations, last: CholeskyState, damping: Scalar, momentum: Scalar) -> Equations:
    """The equations of a step that is drawn towards the last one."""
    strength = momentum * jnp.maximum(jnp.minimum(damping, last.damping.astype(damping.dtype)), 0.0)
    gradient = system.pull(system.gradient) + system.rest
    against, largest = jnp.vdot(gradient, last.step), 0.5 * jnp.vdot(gradient, gradient)
    pull = jnp.where(strength * against > largest, largest / against, strength)
    return system._replace(rest=system.rest - pull * last.step)


def _in_parameters(prepared: _Prepared, damping: Scalar) -> tuple[Operator, Flag]:
    matrix, system = prepared.matrix, prepared.equations
    shift = _raised(system.weights + damping, matrix)
    # What no output depends on and no gradient moves stays where it is, also under a negative damping.
    idle = (jnp.diag(matrix) == 0) & (system.residual(jnp.zeros_like(shift), damping) == 0)
    lower = jnp.linalg.cholesky(matrix + jnp.diag(jnp.where(idle, jnp.ones_like(shift), shift)))
    return lambda vector: cho_solve((lower, True), vector), _tree.all_finite(lower)


def _in_outputs(prepared: _Prepared, damping: Scalar) -> tuple[Operator, Flag]:
    matrix, system = prepared.matrix, prepared.equations
    shift = _raised(jnp.max(system.weights, initial=0.0) + damping, matrix)
    lower = jnp.linalg.cholesky(matrix + shift * jnp.eye(len(matrix), dtype=matrix.dtype))

    def inverse(vector: jax.Array) -> jax.Array:
        seen = cho_solve((lower, True), system.image(vector))
        return (vector - system.pull(system.root(seen))) / shift

    return inverse, _tree.all_finite(lower) & (shift > 0)


def _raised(shift: jax.Array, matrix: jax.Array) -> jax.Array:
    """The shift, raised above rounding, where a factorisation breaks down; a negative one is left to do so."""
    floor = ROUNDING * jnp.finfo(matrix.dtype).eps * jnp.trace(matrix)
    raised = jnp.where(shift >= 0, jnp.maximum(shift, floor), shift)
    return jnp.where(raised == 0, jnp.ones_like(raised), raised)  # no curvature and no damping at all
