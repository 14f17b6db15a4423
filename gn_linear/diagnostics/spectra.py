r"""Spectra of the Gauss-Newton matrix: its largest eigenvalues, their density, and the learning rate that they allow.

``spectrum`` runs Lanczos' method, as bidiagonalisation, from a few random vectors. ``largest_stable_learning_rate``
reads the same runs. ``as_linear_operator`` and ``ntk_as_linear_operator`` hand the matrices to scipy.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gn_linear import _tree
from gn_linear._krylov import ROUNDING, Space, is_shift, krylov_basis, parameter_space, ritz_spectrum
from gn_linear._linearise import linearise
from gn_linear._typing import (
    Count,
    Inputs,
    Number,
    Outputs,
    Params,
    Predict,
    Scalar,
    Targets,
    check_count,
    check_number,
    shown,
)
from gn_linear.curvature import LinearisedProblem, check_l2, fit_l2, linearised_problem
from gn_linear.losses import Loss, from_convex, squared_error

if TYPE_CHECKING:
    import scipy.sparse.linalg  # loaded where it is needed: it takes longer than the rest of this package

NEWTON_STEPS = 64
"""Of the equation for the bound of the largest eigenvalue; each ends at a valid bound, and most converge in ten."""


class Spectrum(NamedTuple):
    r"""What Lanczos' method saw of the spectrum of the Gauss-Newton matrix from each of its probes.

    In exact arithmetic there is an eigenvalue of :math:`G` within each of ``error_bounds`` of its entry of
    ``eigenvalues``, and the k-th entry never exceeds the k-th largest of the distinct eigenvalues. A probe sees every
    eigenvalue once, whatever its multiplicity: that is in the density.

    Attributes:
        eigenvalues: the largest distinct eigenvalues, descending, shape (rank,); good ones have small error bounds. 0
            beyond what the best probe could find.
        error_bounds: norms of the residuals, :math:`\|G v - \lambda v\|`, and ten roundings of the largest eigenvalue,
            shape (rank,); infinite beyond what the best probe could find.
        nodes: the nodes of the Gauss quadrature of each probe, shape (probes, rank).
        weights: their weights, which add up to 1 for each probe, shape (probes, rank); 0 for nodes not in use.
        couplings: the entries beside the diagonal of each probe's tridiagonal matrix, the last of which couples it to
            what it does not hold, shape (probes, rank).
        parameters: the size of the matrix, shape ().
    """

    eigenvalues: Float[Array, " rank"]
    error_bounds: Float[Array, " rank"]
    nodes: Float[Array, "probes rank"]
    weights: Float[Array, "probes rank"]
    couplings: Float[Array, "probes rank"]
    parameters: Count

    def density(self, points: Any, width: Number) -> jax.Array:
        r"""The density of the eigenvalues, smoothed by a Gaussian; its integral is 1.

        .. math::
            \rho(x) = \frac1p \sum_{i=1}^p \sum_{k=1}^m w_{ik} \,
            \frac{1}{\sigma \sqrt{2 \pi}} \exp \Bigl( -\frac{(x - \lambda_{ik})^2}{2 \sigma^2} \Bigr)

        Args:
            points: where, an array of any shape.
            width: :math:`\sigma`, the standard deviation of the Gaussian, positive.

        Returns:
            The density, shaped like ``points``.

        Raises:
            TypeError: ``width`` is not a number.
            ValueError: ``width`` is not positive and finite.
        """
        check_number(width, "width", positive=True)
        sigma = jnp.asarray(width, self.nodes.dtype)
        distance = (jnp.asarray(points, self.nodes.dtype)[..., None, None] - self.nodes) / sigma
        bumps = self.weights * jnp.exp(-0.5 * distance**2) / (sigma * math.sqrt(2 * math.pi))
        return jnp.sum(bumps, axis=(-2, -1)) / self.nodes.shape[0]


class StableLearningRate(NamedTuple):
    r"""Up to which learning rate gradient descent is stable on the linearised model.

    Attributes:
        rate: :math:`2 / \lambda`, with the largest eigenvalue that was found, shape (); what is true is never more, but
            for rounding. Infinite if there is no curvature.
        lower_bound: with the given probability the true one is no less, shape ().
    """

    rate: Scalar
    lower_bound: Scalar


def spectrum(  # noqa: PLR0913 (what defines the matrix, and three numbers)
    predict: Predict,
    params: Params,
    inputs: Inputs,
    targets: Targets = None,
    *,
    loss: Loss | Callable[..., Any] = squared_error,
    l2: Any = 0.0,
    rank: int,
    key: jax.Array,
    probes: int = 4,
) -> Spectrum:
    r"""The largest eigenvalues and the spectral density of the Gauss-Newton matrix, by stochastic Lanczos quadrature.

    .. math::
        G = J^T H J + \lambda I, \qquad
        \frac1P \mathrm{tr} \, f(G) = \mathrm{E} \, v^T f(G) \, v \approx \frac1p \sum_{i=1}^p \sum_{k=1}^m w_{ik} \,
        f(\lambda_{ik})

    with P parameters and unit vectors :math:`v_i` of random direction. Each starts a Krylov basis of ``rank`` vectors,
    whose eigenvalues are the nodes :math:`\lambda_{ik}` and whose eigenvectors' first entries, squared, the weights.
    The sum over k is exact for polynomials up to degree 2 rank - 1. If there are no more parameters than probes, the
    probes are an orthonormal basis instead, and the mean over them is exact as well.

    Losses are means over examples. The nonzero eigenvalues of :math:`G` without a penalty are those of :math:`H^{1/2}
    \Theta H^{1/2}` with the neural tangent kernel :math:`\Theta = J J^T`; for the squared error of one output array of
    n examples, n times them are those of :math:`\Theta`.

    A probe costs ``rank`` products with :math:`G` and the memory of ``rank`` copies of the parameters; probes go one
    after another. Works under ``jit`` and ``vmap``.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``.
        params: where it is linearised.
        inputs: the batch.
        targets: its targets.
        loss: a loss of ``gn_linear.losses`` or any convex callable.
        l2: coefficient of the penalty :math:`\frac12 \lambda \|\theta\|^2`, a number or a pytree like ``params``.
        rank: the largest size of each basis.
        key: a random key, for the directions of the probes.
        probes: how many; the error of the density shrinks like its inverse square root.

    Returns:
        A ``Spectrum``, in the widest dtype of the parameters and at least float32; NaN if a product is not finite.

    Raises:
        TypeError: ``predict`` is not a function, ``rank`` or ``probes`` is not an int, or a leaf is not a float array.
        ValueError: a number is out of range, ``params`` are empty, or shapes do not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> found = gnl.diagnostics.spectrum(lambda p, x: x @ p, jnp.zeros(2), x, rank=2, key=jax.random.key(0))
        >>> print([f"{value:.2f}" for value in found.eigenvalues])
        ['4.50', '0.50']

    References:
        Ghorbani, Krishnan and Xiao (2019), An investigation into neural net optimization via Hessian eigenvalue
        density, section 2; Lin, Saad and Yang (2016), Approximating spectral densities of large matrices, section 3.2;
        Papyan (2018), The full spectrum of deepnet Hessians at scale.
    """
    check_count(rank, "rank")
    check_count(probes, "probes")
    _check(predict, params, l2)
    params = _tree.strongly_typed(params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    if size == 0:
        raise ValueError(f"params must hold at least one number, but are {_tree.described(params)}.")
    problem = _problem(predict, from_convex(loss), params, inputs, targets, l2)
    zeros, dtype = _tree.solve_zeros(params), _tree.scalar_dtype(params)
    shift = jnp.asarray(problem.l2 if is_shift(problem) else 0.0, dtype)
    if size <= probes:
        # Not unit vectors: those may be orthogonal to most eigenvectors.
        directions, direction = jnp.linalg.qr(jax.random.normal(key, (size, size), dtype))[0], lambda row: row
    else:
        directions = jax.random.split(key, probes)
        direction = functools.partial(jax.random.normal, shape=(size,), dtype=dtype)
    run = functools.partial(_run, parameter_space(problem), shift, rank)
    runs = jax.lax.map(lambda x: run(_tree.unflatten(direction(x), zeros)), directions)
    best = jnp.argmax(jnp.where(runs.used, runs.nodes, -jnp.inf), axis=0)[None]  # NaN counts as largest
    values, bounds, used = (jnp.take_along_axis(x, best, 0)[0] for x in (runs.nodes, runs.bounds, runs.used))
    values = jnp.where(used, values, jnp.zeros_like(values))
    return Spectrum(values, bounds, runs.nodes, runs.weights, runs.couplings, jnp.asarray(size))


class _Run(NamedTuple):
    """What comes of one probe, each field of shape (rank,)."""

    nodes: jax.Array
    weights: jax.Array
    couplings: jax.Array
    bounds: jax.Array
    used: jax.Array


def _run(space: Space, shift: Scalar, rank: int, start: Params) -> _Run:
    basis = krylov_basis(space, start, rank)
    values, vectors = ritz_spectrum(basis)
    sound = jnp.where(basis.finite, jnp.zeros_like(shift), jnp.full_like(shift, jnp.nan))
    nodes, couplings = values + shift + sound, basis.diagonal * basis.above + sound
    last = jnp.maximum(basis.size - 1, 0)
    used = (jnp.arange(rank) < basis.size) | ~basis.finite
    rounding = jnp.asarray(ROUNDING * space.rounding, shift.dtype) * nodes[0]
    bounds = couplings[last] * jnp.abs(vectors[last]) + rounding
    return _Run(
        nodes, vectors[0] ** 2 + sound, couplings, jnp.where(used, bounds, jnp.full_like(bounds, jnp.inf)), used
    )


def largest_stable_learning_rate(spectrum: Spectrum, *, failure: Number = 1e-3) -> StableLearningRate:
    r"""Up to which learning rate gradient descent converges on the linearised model: two over the largest eigenvalue.

    .. math:: \theta \leftarrow \theta - \eta \, (G \theta - b) \text{ converges if } \eta < 2 / \lambda_\max(G)

    For the squared error this is gradient descent on the linearised model; for another loss it holds while the
    Hessian of the loss is what it is at these parameters. Lanczos' method finds the largest eigenvalue from below, so
    the rate comes with a bound that can be relied on. It is :math:`2 / x` with the largest root :math:`x` of

    .. math:: \prod_{k=1}^m \frac{x - \lambda_k}{\beta_k} = \frac1t

    with nodes :math:`\lambda_k` and couplings :math:`\beta_k` of a probe: the eigenvalue can be no larger if the probe
    has a component of at least :math:`t` along its eigenvector. A random direction in P dimensions has less with a
    probability of at most :math:`t \sqrt{2P/\pi}`.

    Args:
        spectrum: what ``spectrum`` returned.
        failure: the probability, above 0 and below 1, with which the bound may fail; may be traced.

    Returns:
        The rate and its lower bound.

    Raises:
        TypeError: ``spectrum`` or ``failure`` is something else.
        ValueError: ``failure`` is not above 0 and below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> found = gnl.diagnostics.spectrum(lambda p, x: x @ p, jnp.zeros(2), x, rank=2, key=jax.random.key(0))
        >>> print(f"{gnl.diagnostics.largest_stable_learning_rate(found).rate:.3f}")
        0.444

    References:
        Kuczyński and Woźniakowski (1992), Estimating the largest eigenvalue by the power and Lanczos algorithms with a
        random start, for the bound that holds before a run, which this one sharpens after it.
    """
    if not isinstance(spectrum, Spectrum):
        raise TypeError(f"spectrum must be what gn_linear.diagnostics.spectrum returned, but is {shown(spectrum)}.")
    probability = check_number(failure, "failure", positive=True)
    if probability is not None and probability >= 1:
        raise ValueError(f"failure must be a probability below 1, but is {shown(failure)}.")
    nodes, couplings = spectrum.nodes, spectrum.couplings
    dtype, (probes, rank) = nodes.dtype, nodes.shape
    size = spectrum.parameters.astype(dtype)
    # All probes fail together or not at all; of an orthonormal basis one has at least the mean.
    log_t = jnp.log(jnp.asarray(failure, dtype)) / probes - 0.5 * jnp.log(2 * size / math.pi)
    log_t = jnp.where(size <= probes, -0.5 * jnp.log(size), log_t)
    exhausted = jnp.any(couplings == 0, axis=1)
    level = jnp.sum(jnp.log(jnp.where(couplings == 0, jnp.ones_like(couplings), couplings)), axis=1) - log_t
    log_gaps = jnp.log(nodes[:, :1] - nodes)

    def newton(_: Any, log_excess: jax.Array) -> jax.Array:
        """Convex and increasing in the logarithm, so that every iterate from above stays above."""
        factors = jnp.logaddexp(log_excess[:, None], log_gaps)
        slope = jnp.sum(jnp.exp(log_excess[:, None] - factors), axis=1)
        return log_excess - (jnp.sum(factors, axis=1) - level) / slope

    excess = jnp.exp(jax.lax.fori_loop(0, NEWTON_STEPS, newton, level / rank))
    above = jnp.max(nodes[:, 0] + jnp.where(exhausted, jnp.zeros_like(excess), excess))
    largest = spectrum.eigenvalues[0]
    return StableLearningRate(2 / largest, 2 / jnp.maximum(above, largest + spectrum.error_bounds[0]))


def as_linear_operator(
    predict: Predict,
    params: Params,
    inputs: Inputs,
    targets: Targets = None,
    *,
    loss: Loss | Callable[..., Any] = squared_error,
    l2: Any = 0.0,
) -> "scipy.sparse.linalg.LinearOperator":
    r"""The Gauss-Newton matrix as a linear operator of scipy, for ``eigsh``, ``cg`` and the like.

    .. math:: v \mapsto (J^T H J + \lambda I) \, v

    Rows and columns are the parameters in the order of ``jax.tree.leaves``, raveled. A product is compiled once, at the
    first call, and linearises anew: it costs about two gradients.

    Products run in the dtypes of the parameters, and the ``dtype`` of the operator is the widest of them, at least
    float32. A vector of another dtype is brought to the size of 1 and cast, and its product has the wider of the two
    dtypes, with the accuracy of the operator: ``eigsh`` works in the dtype of the operator, ``cg`` in the wider of
    those of operator and right-hand side. For float64, linearise float64 parameters and inputs under
    ``jax.enable_x64``.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``.
        params: where it is linearised; known arrays, so outside of ``jit``.
        inputs: the batch.
        targets: its targets.
        loss: a loss of ``gn_linear.losses`` or any convex callable.
        l2: coefficient of the penalty :math:`\frac12 \lambda \|\theta\|^2`, a number or a pytree like ``params``.

    Returns:
        A symmetric ``scipy.sparse.linalg.LinearOperator`` of shape (P, P) with P parameters.

    Raises:
        TypeError: ``predict`` is not a function, or a leaf is not a float array.
        ValueError: a number is out of range, or shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> operator = gnl.diagnostics.as_linear_operator(lambda p, x: x @ p, jnp.zeros(2), x)
        >>> print(operator @ [1.0, 1.0])
        [4.5 0.5]

    References:
        Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.
    """
    _check(predict, params, l2)
    objective, zeros, dtype = from_convex(loss), _tree.solve_zeros(params), _tree.scalar_dtype(params)

    def product(params: Params, inputs: Inputs, targets: Targets, vector: jax.Array) -> jax.Array:
        problem = _problem(predict, objective, params, inputs, targets, l2)
        return _tree.flatten(problem.product(_tree.unflatten(vector, zeros)), dtype)

    size = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    return _operator(product, (_tree.strongly_typed(params), inputs, targets), size, dtype)


def ntk_as_linear_operator(predict: Predict, params: Params, inputs: Inputs) -> "scipy.sparse.linalg.LinearOperator":
    r"""The empirical neural tangent kernel as a linear operator of scipy, for ``eigsh``, ``cg`` and the like.

    .. math:: v \mapsto J J^T v

    Rows and columns are (example, output), the outputs of an example over all leaves: the kernel of
    ``empirical_ntk(...).transpose(0, 2, 1, 3)`` as a matrix. If the leaves of the outputs have different numbers of
    examples, one leaf follows another. Dtypes and costs are as in ``as_linear_operator``, with outputs in the place of
    parameters.

    Args:
        predict: the model, ``predict(params, inputs) -> outputs``.
        params: where it is linearised; known arrays, so outside of ``jit``.
        inputs: the batch.

    Returns:
        A symmetric ``scipy.sparse.linalg.LinearOperator`` of shape (N c, N c) with N examples of c outputs.

    Raises:
        TypeError: ``predict`` is not a function, or a leaf is not a float array.
        ValueError: an output has no leading example axis.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x = jnp.array([[3.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> operator = gnl.diagnostics.ntk_as_linear_operator(lambda p, x: x @ p, jnp.zeros(2), x)
        >>> print(operator @ [1.0, 1.0, 1.0])
        [9. 3. 6.]

    References:
        Novak, Sohl-Dickstein and Schoenholz (2022), Fast finite width neural tangent kernel, section 3.
    """
    _check(predict, params, 0.0)
    params = _tree.strongly_typed(params)
    outputs = jax.eval_shape(lambda p, x: linearise(predict, p, x).outputs, params, inputs)
    dtype = _tree.scalar_dtype(outputs)

    def product(params: Params, inputs: Inputs, vector: jax.Array) -> jax.Array:
        linear = linearise(predict, params, inputs)
        return _rows(linear.jvp(linear.vjp(_from_rows(vector, linear.outputs))), dtype)

    size = sum(leaf.size for leaf in jax.tree.leaves(outputs))
    return _operator(product, (params, inputs), size, dtype)


def _rows(outputs: Outputs, dtype: Any) -> jax.Array:
    """Outputs as a vector, example after example if their leaves have the same number of them."""
    leaves = jax.tree.leaves(outputs)
    if len({leaf.shape[0] for leaf in leaves}) != 1:
        return _tree.flatten(outputs, dtype)
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1).astype(dtype) for leaf in leaves], axis=1).ravel()


def _from_rows(vector: jax.Array, like: Outputs) -> Outputs:
    leaves, structure = jax.tree.flatten(like)
    if len({leaf.shape[0] for leaf in leaves}) != 1:
        return _tree.unflatten(vector, like)
    widths = [math.prod(leaf.shape[1:]) for leaf in leaves]
    columns = jnp.split(vector.reshape(leaves[0].shape[0], sum(widths)), np.cumsum(widths)[:-1], axis=1)
    parts = [column.reshape(leaf.shape).astype(leaf.dtype) for column, leaf in zip(columns, leaves, strict=True)]
    return jax.tree.unflatten(structure, parts)


def _operator(
    product: Callable[..., jax.Array], data: tuple[Any, ...], size: int, dtype: Any
) -> "scipy.sparse.linalg.LinearOperator":
    """A symmetric operator from a product of arrays with a vector; arrays are arguments of the compiled function."""
    from scipy.sparse.linalg import LinearOperator

    leaves, structure = jax.tree.flatten(data)
    arrays = {i: jnp.asarray(x) for i, x in enumerate(leaves) if isinstance(x, (jax.Array, np.ndarray))}

    @jax.jit
    def compiled(arrays: dict[int, jax.Array], vector: jax.Array) -> jax.Array:
        return product(*jax.tree.unflatten(structure, [arrays.get(i, x) for i, x in enumerate(leaves)]), vector)

    jax.eval_shape(compiled, arrays, jax.ShapeDtypeStruct((size,), dtype))  # what does not fit is an error now

    class Symmetric(LinearOperator):
        def _matvec(self, x: Any) -> Any:
            if np.iscomplexobj(x):
                return self._matvec(x.real) + 1j * self._matvec(x.imag)
            wide = np.result_type(x.dtype, dtype)
            vector = x.ravel().astype(wide)
            # By a power of two, which rounds nothing: a residual of 1e-60 in float64 would be 0 in float32.
            exponent = np.frexp(np.max(np.abs(vector), initial=0.0))[1]
            result = compiled(arrays, jnp.asarray(np.ldexp(vector, -exponent), dtype))
            return np.ldexp(np.asarray(result).astype(wide), exponent)

        def _adjoint(self) -> Any:
            return self

        _transpose = _adjoint

    return Symmetric(np.dtype(dtype), (size, size))


def _problem(
    predict: Predict, loss: Loss, params: Params, inputs: Inputs, targets: Targets, l2: Any
) -> LinearisedProblem:
    return linearised_problem(predict, loss, params, inputs, targets=targets, l2=fit_l2(l2, params))


def _check(predict: Any, params: Any, l2: Any) -> None:
    if not callable(predict):
        raise TypeError(f"predict must be a function predict(params, inputs), but is {shown(predict)}.")
    check_l2(l2)
    _tree.check_float_leaves(params, "params")
