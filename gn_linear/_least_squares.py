"""Nonlinear least squares: damped Gauss-Newton on residuals, run to a tolerance."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gn_linear import _tree
from gn_linear._box import Box
from gn_linear._fit_loop import FitLoop
from gn_linear._implicit import implicit_root
from gn_linear._options import Options, frozen_mask, spread
from gn_linear._residuals import Residuals, loss_of_points, parameter_count
from gn_linear._small_loop import PARAMETERS, SmallLoop
from gn_linear._small_models import forms
from gn_linear._solution import Solution
from gn_linear._typing import Number, Params, check_count, check_number, shown
from gn_linear.losses import squared_error
from gn_linear.solvers import CG, QR, Cholesky, Solver

SMALL, MEDIUM = 1000, 4000
"""The smaller side of the Jacobian up to which QR is chosen, and a dense solver at all."""
WIDE, IN_MEMORY = 2**22, 2**26
"""The entries of a Jacobian with fewer rows than columns from which on QR is too slow, and those that are kept."""


def least_squares(
    residuals: Callable[..., Any],
    params: Params,
    *,
    args: tuple[Any, ...] = (),
    solver: Solver | None = None,
    options: Options | None = None,
    max_steps: int = 2000,
    rtol: Number | None = None,
    atol: Number = 0.0,
) -> Solution:
    r"""Fit parameters to the least sum of squares of residuals.

    .. math:: \min_\theta \; \tfrac12 \sum_i r_i(\theta)^2

    Levenberg and Marquardt's damping of Gauss-Newton steps: a step that does not lower the cost, or ends where the
    residuals are not finite, is refused and tried again with more damping, so that a fit never ends worse than it
    started. Where it would end, it goes on with the damping in units of the Jacobian's columns, and ends once neither
    metric lowers the cost.

    It has converged when no more than ``rtol`` squared of the cost is gained by a step or promised by its model; when
    a step is shorter than ``rtol`` of the parameters, both in units of the columns of the Jacobian; when the cosine of
    every column with the residuals is below ``rtol`` squared; or when the norm of the residuals is at most ``atol``.

    The whole fit is one loop, so it works inside ``jit`` and, many fits at once, ``vmap``. Called by itself it compiles
    anew each time; to fit again and again, jit a function of the data that calls it, with the data in ``args``. The
    solution is differentiable with respect to ``args`` and all that ``residuals`` closes over, in both modes, by the
    implicit function theorem.

    Args:
        residuals: ``residuals(params, *args)``, a float array or a pytree of them.
        params: where to start, a pytree of floats.
        args: passed on to ``residuals``.
        solver: one of :mod:`gn_linear.solvers`; None chooses ``QR`` for up to 1,000 parameters or residuals, in single
            precision 4,000, which up to 100 parameters leaves to a Cholesky factorisation of the squares as long as a
            step loses less than a hundredth of its promise to them; in double precision ``Cholesky`` for up to 4,000,
            and for fewer where there are more parameters than residuals and four million entries of the Jacobian; and
            ``CG`` beyond or where the Jacobian would not fit into memory.
        options: bounds, robust losses, weights, frozen parameters, scaling and more.
        max_steps: the cap on steps.
        rtol: the relative accuracy of the parameters; None means the root of the rounding of their dtype, 1.5e-8 in
            double precision.
        atol: the norm of the residuals that is small enough.

    Returns:
        The solution, with statistics and a report. What is not finite at the start is returned as it was, and the
        status says so.

    Raises:
        TypeError: a leaf of ``params`` or of the residuals is not a real float array, or an argument has the wrong
            type.
        ValueError: a number is out of range, or a tree of options does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> t = jnp.linspace(0.0, 1.0, 20)
        >>> y = 2.0 * jnp.exp(-1.5 * t)
        >>> fit = gnl.least_squares(lambda p: p["a"] * jnp.exp(-p["k"] * t) - y, {"a": 1.0, "k": 1.0})
        >>> print(f"{fit.params['a']:.3f} {fit.params['k']:.3f}")
        2.000 1.500

    References:
        Levenberg (1944); Marquardt (1963); Moré (1978), The Levenberg-Marquardt algorithm: implementation and theory;
        Nielsen (1999), Damping parameter in Marquardt's method.
    """
    options = Options() if options is None else options
    _check(residuals, args, solver, options)
    check_count(max_steps, "max_steps")
    check_number(atol, "atol")
    if rtol is not None:
        check_number(rtol, "rtol")
    _tree.check_float_leaves(params, "params")
    params = _tree.strongly_typed(params)
    frozen = frozen_mask(options.frozen, params)
    bounds = tuple(
        spread(default if bound is None else bound, params, name)
        for bound, default, name in ((options.lower, -jnp.inf, "lower"), (options.upper, jnp.inf, "upper"))
    )

    def fit(params: Params, args: Any, bounds: Any) -> Solution:
        return _fit(_Request(residuals, solver, options, frozen, max_steps, rtol, atol), params, args, bounds)

    return jax.jit(fit)(params, args, bounds)


def curve_fit(
    f: Callable[..., Any],
    x: Any,
    y: Any,
    params: Params,
    *,
    sigma: Any = None,
    **settings: Any,
) -> Solution:
    r"""Fit a model ``f(x, params)`` to data, weighted by their standard deviations.

    .. math:: \min_\theta \; \tfrac12 \sum_i \frac{(f(x_i, \theta) - y_i)^2}{\sigma_i^2}

    As ``scipy.optimize.curve_fit``, but parameters are one pytree and the covariance is a method of what is returned.

    Args:
        f: the model, ``f(x, params)``, like ``y``.
        x: where it was observed, handed on as it is.
        y: the observations, an array or a pytree.
        params: where to start.
        sigma: standard deviations of the observations, or relative ones; a number or a tree like ``y``. For absolute
            ones ask for ``solution.covariance(absolute=True)``.
        **settings: of :func:`gn_linear.least_squares`: ``solver``, ``options``, ``max_steps``, ``rtol``, ``atol``.

    Returns:
        The solution; its residuals are ``f(x, params) - y``.

    Raises:
        ValueError: ``sigma`` and the weights in ``options`` are both given, or model and data differ in shape.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x = jnp.array([0.0, 1.0, 2.0, 3.0])
        >>> fit = gnl.curve_fit(lambda x, p: p[0] * x + p[1], x, jnp.array([1.1, 2.9, 5.1, 6.9]), jnp.zeros(2))
        >>> print(*(f"{p:.2f} +- {e:.2f}" for p, e in zip(fit.params, fit.standard_errors())))
        1.96 +- 0.06 1.06 +- 0.11
    """
    options = settings.pop("options", None) or Options()
    if sigma is not None and options.weights is not None:
        raise ValueError("sigma is given, but options.weights too, and they mean the same; pass one of them.")
    if sigma is not None:
        options = _replaced(options, weights=jax.tree.map(lambda s: 1 / jnp.asarray(s) ** 2, sigma))

    def residuals(params: Params, x: Any, y: Any) -> Any:
        found = f(x, params)
        _tree.check_same_shapes(found, y, "what f returns", "y")
        return jax.tree.map(jnp.subtract, found, y)

    y = jax.tree.map(jnp.asarray, y)
    return least_squares(residuals, params, args=(x, y), options=options, **settings)


class _Request(NamedTuple):
    """What was asked for, as far as it is no array of the problem."""

    fn: Callable[..., Any]
    solver: Solver | None
    options: Options
    frozen: np.ndarray
    max_steps: int
    rtol: Number | None
    atol: Number


def _fit(request: _Request, params: Params, args: Any, bounds: Any) -> Solution:
    fn, solver, options, frozen, max_steps, rtol, atol = request
    dtype = _tree.scalar_dtype(params)
    loss = squared_error if options.loss is None else options.loss
    residuals = Residuals(fn, params, args, loss, options.weights, options.chunks, True)
    shapes = jax.eval_shape(residuals.tree, _tree.flatten(params, dtype))
    _tree.check_float_leaves(shapes, "the residuals")
    count = parameter_count(shapes)
    solver, why = (solver, "as asked for") if solver is not None else choose(count, parameter_count(params), dtype)
    dense = not isinstance(solver, CG)
    residuals = Residuals(fn, params, args, loss, options.weights, options.chunks, dense)
    lower, upper = (_tree.flatten(bound, dtype) for bound in bounds)
    start = _tree.flatten(params, dtype)
    start = jnp.where(frozen, start, jnp.clip(start, lower, upper))
    lower, upper = jnp.where(frozen, -jnp.inf, lower), jnp.where(frozen, jnp.inf, upper)
    accuracy = jnp.finfo(dtype).eps ** 0.5 if rtol is None else rtol
    fixed = jax.lax.stop_gradient
    box = Box(None if options.lower is None and options.upper is None else (lower, upper))
    settings = {
        "residuals": residuals,
        "solver": solver,
        "box": box,
        "frozen": frozen,
        "scaling": options.scaling,
        "acceleration": options.acceleration,
        "max_steps": max_steps,
        "rtol": accuracy,
        "atol": atol,
    }
    loop = FitLoop(**settings)
    if _is_small(request, solver, len(start)):
        loop = SmallLoop(**settings, forms=forms(count, len(start)))
        why += "; by Cholesky where the squares keep enough digits" if len(loop.forms) > 1 else ""

    def solve(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        end = loop.run(vector)
        # As floats, since integers have no derivatives.
        return end.vector, jnp.stack([end.steps, end.evaluations, end.status]).astype(dtype)

    def gradient(vector: jax.Array) -> jax.Array:
        return jax.grad(lambda v: residuals.value(v, jnp.ones([], dtype)))(vector)

    def stationary(vector: jax.Array) -> jax.Array:
        slope = gradient(vector)
        bound = jnp.where(slope > 0, lower, upper)
        held = jnp.where(box.holds(fixed(vector), fixed(slope)), vector - bound, slope)
        return jnp.where(frozen, vector - start, held)

    vector, counts = implicit_root(stationary, start, solve)
    return _solution(
        residuals,
        vector,
        fixed(counts).astype(jnp.int32),
        box,
        frozen,
        (count, f"{type(solver).__name__}, {why}"),
    )


def _is_small(request: _Request, chosen: Solver, parameters: int) -> bool:
    """Whether a point is no more than a small matrix of its Jacobian and residuals."""
    small = request.solver is None and isinstance(chosen, QR) and parameters <= PARAMETERS
    return small and request.options.loss is None and not request.options.acceleration


def _solution(
    residuals: Residuals,
    vector: jax.Array,
    counts: jax.Array,
    box: Box,
    frozen: np.ndarray,
    static: tuple[int, str],
) -> Solution:
    """All that is known at the end of a fit."""
    unit = jnp.ones([], vector.dtype)
    cost = residuals.value(vector, unit)
    slope = jax.grad(lambda v: residuals.value(v, unit))(vector)
    held = box.holds(vector, slope) & ~frozen
    matrix = None
    if residuals.dense:
        point = residuals.point(vector)
        loss = loss_of_points(residuals)
        root = loss.hessian(point.residuals).root(jnp.ones_like(point.residuals))
        matrix = root[0][:, None] * point.matrix
    still = jnp.where(held | frozen, jnp.zeros_like(slope), jnp.abs(slope))
    count, name = static
    return Solution(
        params=_tree.unflatten(vector, residuals.like),
        residuals=residuals.tree(vector),
        cost=cost,
        gradient_norm=jnp.max(still, initial=0.0),
        gradient=_tree.unflatten(slope, residuals.like),
        steps=counts[0],
        status=counts[2],
        evaluations=counts[1],
        jacobian=matrix,
        at_bounds=_tree.unflatten(held, jax.tree.map(lambda p: jnp.zeros_like(p, bool), residuals.like)),
        solver=name,
        frozen=tuple(map(bool, frozen)),
        count=count,
    )


def choose(residuals: int, parameters: int, dtype: Any) -> tuple[Solver, str]:
    """The solver for a problem of this size and precision, and why.

    Cholesky squares the condition number: it keeps the accuracy of least squares up to the fourth root of rounding.

    Args:
        residuals: how many there are.
        parameters: likewise.
        dtype: of the solve.

    Returns:
        The solver, and half a sentence.
    """
    smaller, single = min(residuals, parameters), jnp.finfo(dtype).eps > jnp.finfo(jnp.float64).eps
    chosen = f"chosen for {residuals} residuals and {parameters} parameters"
    if residuals * parameters > IN_MEMORY or smaller > MEDIUM:
        iterative = CG(max_steps=min(500, max(smaller, 1)), rtol=1e-3, progress=0.0)
        return iterative, f"{chosen}, too many for a dense solver"
    wide = residuals < parameters and residuals * parameters >= WIDE
    if (smaller <= SMALL and not wide) or single:
        return QR(corrections=1), f"{chosen}, since it does not square the condition number"
    space = "residuals" if residuals < parameters else "parameters"
    return (
        Cholesky(),
        f"{chosen}, since QR takes longer and double precision bears its squares; in the space of {space}",
    )


def _replaced(options: Options, **changes: Any) -> Options:
    return Options(**{**vars(options), **changes})


def _check(residuals: Any, args: Any, solver: Any, options: Any) -> None:
    """Raise unless the arguments of a fit are what they should be."""
    if not callable(residuals):
        raise TypeError(f"residuals must be a function residuals(params, *args), but is {shown(residuals)}.")
    if not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple, such as (x, y) or (x,), but is {shown(args)}.")
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(f"solver must be one of gn_linear.solvers, such as QR(), or None, but is {shown(solver)}.")
    if solver is not None and not isinstance(solver, (CG, QR, Cholesky)):
        raise TypeError(f"solver must be QR, Cholesky or CG of gn_linear.solvers for a fit, but is {shown(solver)}.")
    if not isinstance(options, Options):
        raise TypeError(f"options must be a gn_linear.Options(...) or None, but is {shown(options)}.")
