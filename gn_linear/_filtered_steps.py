"""Many spectral filters from one Krylov basis: the steps of damped Gauss-Newton and of every period at once."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gn_linear import _tree
from gn_linear._krylov import (
    Filtered,
    KrylovBasis,
    Spectrum,
    apply_filter,
    combination,
    krylov_basis,
    parameter_space,
    pulled_back,
    ritz_spectrum,
    sample_space,
)
from gn_linear._linearise import linearise
from gn_linear._typing import Count, Inputs, Number, Outputs, Params, Predict, Targets, check_count, check_number, shown
from gn_linear.curvature import LinearisedProblem, linearised_problem
from gn_linear.filters import Filter
from gn_linear.losses import Loss, from_convex, squared_error


class FilteredStepsInfo(NamedTuple):
    """How far each filter has converged.

    Attributes:
        products: with the Gauss-Newton matrix, all filters together, shape ().
        residual: of the inner problem that each filter solves, relative to the gradient, shape (filters,). For damping
            it is that of the linear system, for gradient flow that of the differential equation at its last time.
        error_bound: the residual times the filter's largest value, relative to the step, shape (filters,); an estimate
            of the relative error of the step, which for damping is a bound in exact arithmetic; it sees no rounding.
        stable: whether the solver that a filter stands for converges on this spectrum, shape (filters,).
        finite: whether every product was finite, shape (). If the gradient is not, the steps are NaN; if a later
            product is not, they are those of the basis before it.
        ritz_values: eigenvalues of the Gauss-Newton matrix as the basis sees them, shape (rank,), 0 beyond its size.
    """

    products: Count
    residual: Float[Array, " filters"]
    error_bound: Float[Array, " filters"]
    stable: Bool[Array, " filters"]
    finite: Bool[Array, ""]
    ritz_values: Float[Array, " rank"]


class _Solved(NamedTuple):
    """The basis of a problem, and every filter in it."""

    problem: LinearisedProblem
    basis: KrylovBasis
    filtered: Filtered
    in_outputs: bool
    info: FilteredStepsInfo


def filtered_steps(
    predict: Predict,
    params: Params,
    inputs: Inputs,
    targets: Targets,
    filters: Sequence[Filter],
    *,
    rank: int,
    loss: Loss | Callable[..., Any] = squared_error,
    rtol: Number = 0.0,
) -> tuple[Params, FilteredStepsInfo]:
    r"""The steps of many spectral filters, at the price of the costliest.

    .. math:: d_i = -\varphi_i(G) \, J^T u, \qquad G = J^T H J,

    with the Jacobian :math:`J` at ``params``, the output gradient :math:`u` and the Hessian :math:`H` of the loss. With
    ``gn_linear.filters.GradientDescent(learning_rate, K)`` and the squared error this is where K steps of full-batch
    gradient descent on the linearised model end, for every K in the list, whatever its size: the number of products
    grows like the square root of the largest K, not like K.

    The basis lives in the outputs or in the parameters, whichever is smaller; it takes ``rank`` vectors of that size,
    twice as many in the outputs. Works under ``jit`` and ``vmap``.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``.
        params: the anchor.
        inputs: the batch.
        targets: its targets.
        filters: the filters, at least one.
        rank: the largest size of the basis; ``info`` says whether it sufficed.
        loss: a loss of ``gn_linear.losses`` or any convex callable; its Gauss-Newton matrix at the anchor is used.
        rtol: the basis stops growing when every filter's ``error_bound`` is below it; 0 uses the whole rank.

    Returns:
        The steps, a pytree like ``params`` whose leaves have a leading axis of ``len(filters)``, to be added to the
        parameters, and a ``FilteredStepsInfo``.

    Raises:
        TypeError: ``filters`` holds something else, ``rank`` is not an int, or a leaf is not a float array.
        ValueError: ``filters`` is empty, a number is out of range, or shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x = jnp.linspace(0.0, 1.0, 5)
        >>> predict = lambda p, x: p["a"] * x + p["b"]
        >>> params = {"a": jnp.array(0.0), "b": jnp.array(0.0)}
        >>> descents = [gnl.filters.GradientDescent(1.0, steps) for steps in (1, 100, 10_000)]
        >>> steps, info = gnl.filtered_steps(predict, params, x, 2.0 * x, descents, rank=2)
        >>> print([f"{a:.2f}" for a in steps["a"]])
        ['0.75', '2.00', '2.00']

    References:
        Goldwaser and Ge (2022), Understanding sparse feature updates in deep networks using iterative linearisation;
        Saad (1992), Analysis of some Krylov subspace approximations to the matrix exponential operator.
    """
    _check(predict, filters, rank, rtol)
    _tree.check_float_leaves(params, "params")
    problem = linearised_problem(predict, from_convex(loss), _tree.strongly_typed(params), inputs, targets=targets)
    in_outputs = 2 * problem.output_size < sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    solved = _solve(problem, filters, rank, rtol, in_outputs)

    def step(coefficients: jax.Array) -> Params:
        like = solved.problem.linearisation.outputs if solved.in_outputs else solved.problem.params
        vector = combination(solved.basis, -coefficients, like)
        vector = pulled_back(solved.problem, vector) if solved.in_outputs else vector
        return _tree.cast_like(vector, problem.params)

    return jax.lax.map(step, solved.filtered.coefficients), solved.info


def filtered_predictions(
    predict: Predict,
    params: Params,
    inputs: Inputs,
    targets: Targets,
    filters: Sequence[Filter],
    other_inputs: Inputs,
    *,
    rank: int,
    loss: Loss | Callable[..., Any] = squared_error,
) -> tuple[Outputs, FilteredStepsInfo]:
    r"""What the linearised model predicts elsewhere after each filter's step, without forming parameters.

    .. math:: f_\mathrm{lin}(x) = f(x) - \Theta(x, X) \, \varphi(H \Theta) \, u, \qquad \Theta(x, X) = J(x) J(X)^T

    For the squared error and ``Tikhonov`` this is kernel ridge regression with the empirical neural tangent kernel.
    The basis lives in the outputs.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``.
        params: the anchor.
        inputs: the batch that is trained on.
        targets: its targets.
        filters: the filters, at least one.
        other_inputs: where to predict.
        rank: the largest size of the basis.
        loss: a loss of ``gn_linear.losses`` or any convex callable.

    Returns:
        The predictions, like the outputs with a leading axis of ``len(filters)``, and a ``FilteredStepsInfo``.

    Raises:
        TypeError: as ``filtered_steps``.
        ValueError: as ``filtered_steps``.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x = jnp.linspace(0.0, 1.0, 5)
        >>> predict = lambda p, x: p["a"] * x + p["b"]
        >>> params = {"a": jnp.array(0.0), "b": jnp.array(0.0)}
        >>> outputs, _ = gnl.filtered_predictions(
        ...     predict, params, x, 2.0 * x, [gnl.filters.GradientFlow(1e4)], jnp.array([3.0]), rank=2
        ... )
        >>> print(f"{outputs[0, 0]:.2f}")
        6.00

    References:
        Jacot, Gabriel and Hongler (2018), Neural tangent kernel; Lee et al. (2019), Wide neural networks of any depth
        evolve as linear models, equation 10.
    """
    _check(predict, filters, rank, 0.0)
    _tree.check_float_leaves(params, "params")
    problem = linearised_problem(predict, from_convex(loss), _tree.strongly_typed(params), inputs, targets=targets)
    solved = _solve(problem, filters, rank, 0.0, in_outputs=True)
    elsewhere = linearise(predict, params, other_inputs)

    def prediction(coefficients: jax.Array) -> Outputs:
        pulled = pulled_back(
            solved.problem, combination(solved.basis, -coefficients, solved.problem.linearisation.outputs)
        )
        change = elsewhere.jvp(_tree.cast_like(pulled, solved.problem.params))
        return jax.tree.map(jnp.add, elsewhere.outputs, change)

    return jax.lax.map(prediction, solved.filtered.coefficients), solved.info


def _solve(problem: LinearisedProblem, filters: Sequence[Filter], rank: int, rtol: Number, in_outputs: bool) -> _Solved:
    start = _tree.to_solve(problem.output_gradient)
    space = sample_space(problem) if in_outputs else parameter_space(problem)
    start = start if in_outputs else pulled_back(problem, start)

    def apply(basis: KrylovBasis, spectrum: Spectrum) -> Filtered:
        each = [apply_filter(basis, spectrum, chosen) for chosen in filters]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def bounds(basis: KrylovBasis, filtered: Filtered) -> jax.Array:
        at_zero = jnp.stack([jnp.abs(chosen(jnp.zeros([1], basis.norm.dtype)))[0] for chosen in filters])
        largest = jnp.where(at_zero > 0, at_zero, jnp.inf)
        sizes = jnp.sqrt(jnp.sum(filtered.coefficients**2, axis=1))
        nothing = (sizes == 0) | (filtered.residual == 0)
        bound = filtered.residual * largest / jnp.where(nothing, jnp.ones_like(sizes), sizes)
        return jnp.where(nothing, jnp.zeros_like(sizes), bound)

    def converged(basis: KrylovBasis) -> jax.Array:
        return jnp.all(bounds(basis, apply(basis, ritz_spectrum(basis))) <= jnp.asarray(rtol, basis.norm.dtype))

    # A cost-only distinction: nothing passes a tolerance of 0 before the space is exhausted.
    asked = None if isinstance(rtol, (int, float)) and rtol == 0 else converged
    basis = krylov_basis(space, start, rank, asked)
    spectrum = ritz_spectrum(basis)
    filtered = apply(basis, spectrum)
    norm = jnp.where(basis.norm > 0, basis.norm, jnp.ones_like(basis.norm))
    info = FilteredStepsInfo(
        products=basis.size,
        residual=filtered.residual / norm,
        error_bound=jnp.where(basis.finite, bounds(basis, filtered), jnp.nan),
        stable=jnp.stack([chosen.stable(spectrum.values) for chosen in filters]),
        finite=basis.finite,
        ritz_values=spectrum.values,
    )
    return _Solved(problem, basis, filtered, in_outputs, info)


def _check(predict: Any, filters: Any, rank: Any, rtol: Any) -> None:
    if not callable(predict):
        raise TypeError(f"predict must be a function predict(params, inputs), but is {shown(predict)}.")
    check_count(rank, "rank")
    check_number(rtol, "rtol")
    if not isinstance(filters, (list, tuple)):
        raise TypeError(f"filters must be a list of gn_linear.filters, but is {shown(filters)}.")
    if not filters:
        raise ValueError("filters must hold at least one of gn_linear.filters, but is empty: [].")
    for index, chosen in enumerate(filters):
        if not isinstance(chosen, Filter):
            raise TypeError(f"filters[{index}] must be one of gn_linear.filters, but is {shown(chosen)}.")
