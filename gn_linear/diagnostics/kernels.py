r"""Measures of a kernel as it is given: how far it moved, what it is aligned with, its spectrum, its predictions.

A kernel is a symmetric matrix of shape (n, n), with a row for each example, or an array of shape (n, n, c, c), as
:func:`empirical_ntk` returns it for c outputs. The latter counts as the matrix of n c rows, one for each pair of an
example and an output. Nothing is divided by n. Kernels are scaled by their largest entry first, so that no square
overflows, and narrow dtypes are widened to float32.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gn_linear import _tree
from gn_linear._typing import Number, Scalar, check_count, check_number, shown

Kernel: TypeAlias = Any
"""A float array of shape (n, n) or (n, n, c, c)."""

ROUNDINGS = 8
"""Up to so many roundings of the whole, what is left of a sum, or the smallest eigenvalue, counts as nothing.

Of kernels without full rank, of 10 to 2000 rows, the eigenvalues computed for zeros were up to 3.1 roundings of the
largest. The decisions about rank take as many roundings as there are rows, which is safe; a condition number that did
would be infinite where it is known to a few per cent.
"""


def kernel_distance(kernel: Kernel, other: Kernel) -> Scalar:
    r"""How far two kernels are apart in direction, whatever their scales.

    .. math:: S(K, L) = 1 - \frac{\langle K, L \rangle_F}{\|K\|_F \, \|L\|_F}

    It is computed from the part of the one that is orthogonal to the other, without the cancellation of the formula:
    small distances keep their digits, and a kernel is at distance 0 from itself.

    Args:
        kernel: shape (n, n) or (n, n, c, c).
        other: of the same shape.

    Returns:
        The distance, shape (), from 0 to 1 for positive semi-definite kernels, NaN if one is 0 or not finite.

    Raises:
        TypeError: a kernel is not a float array.
        ValueError: a kernel is not square, or the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> later = jnp.diag(jnp.array([1.0, 1.0, 0.0, 0.0]))
        >>> print(f"{gnl.diagnostics.kernel_distance(jnp.eye(4), later):.4f}")
        0.2929

    References:
        Fort et al. (2020), Deep learning versus kernel learning: an empirical study of loss landscape geometry and the
        time evolution of the neural tangent kernel.
    """
    pair = _checked_pair(kernel, other)
    dtype = _tree.scalar_dtype(pair)
    one, two = (x.astype(dtype) / _size(x).astype(dtype) for x in pair)
    first, second = _norm(one), _norm(two)
    cosine = jnp.sum(one * two) / (first * second)
    # Taken before the norms: equal entries differ by 0, but compilers fuse the two norms in two ways.
    change = two - one
    sine = _norm(change - jnp.sum(change * one) / first**2 * one) / second
    return jnp.where(cosine > 0, sine**2 / (1 + jnp.abs(cosine)), 1 - cosine)


def kernel_velocity(kernel: Kernel, other: Kernel, time: Number) -> Scalar:
    r"""How fast a kernel turns.

    .. math:: v = \frac{S(K_t, K_{t + \Delta t})}{\Delta t}

    Args:
        kernel: at the start, shape (n, n) or (n, n, c, c).
        other: at the end, of the same shape.
        time: what passed between them, positive, in any unit (steps, epochs, steps times learning rate).

    Returns:
        The :func:`kernel_distance` per unit of time, shape ().

    Raises:
        TypeError: a kernel is not a float array, or ``time`` is not a number.
        ValueError: a kernel is not square, the shapes differ, or ``time`` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> later = jnp.diag(jnp.array([1.0, 1.0, 0.0, 0.0]))
        >>> print(f"{gnl.diagnostics.kernel_velocity(jnp.eye(4), later, 10):.5f}")
        0.02929

    References:
        Fort et al. (2020), Deep learning versus kernel learning: an empirical study of loss landscape geometry and the
        time evolution of the neural tangent kernel.
    """
    check_number(time, "time", positive=True)
    distance = kernel_distance(kernel, other)
    return distance / jnp.asarray(time, distance.dtype)


def cka(kernel: Kernel, other: Kernel) -> Scalar:
    r"""The centred alignment of two kernels: the cosine between them once means over the examples are taken off.

    .. math:: \mathrm{CKA}(K, L) = \frac{\langle C K C, \, C L C \rangle_F}{\|C K C\|_F \, \|C L C\|_F},
              \qquad C = I - \tfrac1n 1 1^T

    Kernels of shape (n, n, c, c) are centred over the examples, for each pair of outputs by itself. This is the kernel
    of features without their mean, and what a bias of each output contributes is taken off.

    Args:
        kernel: shape (n, n) or (n, n, c, c).
        other: of the same shape.

    Returns:
        The alignment, shape (), from 0 to 1 for positive semi-definite kernels, 1 if they are proportional. NaN if
        nothing but rounding is left of one, or one is not finite.

    Raises:
        TypeError: a kernel is not a float array.
        ValueError: a kernel is not square, or the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> kernel = jnp.array([[2.0, 1.0, 2.0], [1.0, 5.0, 3.0], [2.0, 3.0, 3.0]])
        >>> print(f"{gnl.diagnostics.cka(kernel, 10.0 * kernel + 1.0):.4f}")
        1.0000

    References:
        Cortes, Mohri and Rostamizadeh (2012), Algorithms for learning kernels based on centered alignment; Kornblith
        et al. (2019), Similarity of neural network representations revisited.
    """
    pair = _checked_pair(kernel, other)
    dtype = _tree.scalar_dtype(pair)
    one, two = (_direction(x, centred=True).astype(dtype) for x in pair)
    return jnp.clip(jnp.sum(one * two), -1, 1)


def target_alignment(kernel: Kernel, targets: Any, *, centred: bool = True, classes: int | None = None) -> Scalar:
    r"""The alignment of a kernel with the targets: how much of it tells apart what the targets tell apart.

    .. math:: A = \frac{\langle C K C, \, Y Y^T \rangle_F}{\|C K C\|_F \, \|C Y Y^T C\|_F}

    This is :func:`cka` with the kernel :math:`Y Y^T`, which is not formed. For a kernel of shape (n, n, c, c), Y is
    the one column of the n c targets.

    Args:
        kernel: shape (n, n) or (n, n, c, c).
        targets: integer or boolean labels, shape (n,), taken as one-hot rows; or floats of shape (n,), or (n, c), such
            as one-hot rows.
        centred: whether means over the examples are taken off kernel and targets; without, it is the alignment of
            Cristianini et al.
        classes: how many classes there are, for labels from 0 to ``classes`` - 1. None takes c from a kernel of shape
            (n, n, c, c), and counts the distinct labels for one of shape (n, n), which needs their values and so does
            not work on labels traced by ``jit`` or ``vmap``.

    Returns:
        The alignment, shape (), from 0 to 1 for positive semi-definite kernels. NaN if nothing but rounding is left of
        kernel or targets, if one is not finite, or if a traced label is out of range.

    Raises:
        TypeError: the kernel is not a float array, the targets are no array of numbers, ``classes`` is not an int,
            misses for traced labels, or is given without labels.
        ValueError: the kernel is not square, the targets do not fit to it, or a label is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> labels = jnp.array([0, 0, 1, 1])
        >>> kernel = jnp.eye(4) + (labels[:, None] == labels)
        >>> print(f"{gnl.diagnostics.target_alignment(kernel, labels):.4f}")
        0.9045

    References:
        Cristianini et al. (2001), On kernel-target alignment; Cortes, Mohri and Rostamizadeh (2012), Algorithms for
        learning kernels based on centered alignment.
    """
    kernel = _checked(kernel, "kernel")
    columns = _columns(targets, kernel, classes)
    dtype = _tree.scalar_dtype((kernel, columns))
    matrix = _matrix(_direction(kernel, centred)).astype(dtype)
    columns = _direction(columns, centred, axes=(0,)).astype(dtype).reshape(len(matrix), -1)
    wide = columns.shape[1] > columns.shape[0]
    gram = _times(columns, columns.T) if wide else _times(columns.T, columns)
    return jnp.clip(jnp.sum(columns * _times(matrix, columns)) / jnp.sqrt(jnp.sum(gram * gram)), -1, 1)


def effective_dimension(kernel: Kernel, ridge: Number) -> Scalar:
    r"""How many directions of the outputs ridge regression with the kernel follows.

    .. math:: d(\lambda) = \mathrm{tr} \, K (K + \lambda I)^{-1} = \sum_i \frac{\lambda_i}{\lambda_i + \lambda}

    The kernel is taken as given. Losses of this package are means over n examples, so that a damping or penalty
    :math:`\mu` there is the ridge :math:`n \mu` here. Eigenvalues up to N eps of the largest, N being the number of
    rows, count as zero.

    Args:
        kernel: symmetric and positive semi-definite, shape (n, n) or (n, n, c, c).
        ridge: not negative; 0 gives the rank.

    Returns:
        The effective dimension, shape (), between 0 and N.

    Raises:
        TypeError: the kernel is not a float array, or ``ridge`` is not a number.
        ValueError: the kernel is not square, or ``ridge`` is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(f"{gnl.diagnostics.effective_dimension(jnp.diag(jnp.array([3.0, 1.0, 0.0])), 1.0):.4f}")
        1.2500

    References:
        Zhang (2005), Learning bounds for kernel regression using effective data dimensionality; Caponnetto and De Vito
        (2007), Optimal rates for the regularized least-squares algorithm.
    """
    check_number(ridge, "ridge")
    matrix = _matrix(_checked(kernel, "kernel"))
    values, negligible = _spectrum(matrix)
    shift = jnp.asarray(ridge, values.dtype) / _size(matrix)
    return jnp.sum(jnp.where(negligible, jnp.zeros_like(values), values / (values + shift)))


def effective_rank(kernel: Kernel) -> Scalar:
    r"""How many eigenvalues matter: the participation ratio of the spectrum.

    .. math:: r = \frac{(\mathrm{tr} \, K)^2}{\|K\|_F^2} = \frac{(\sum_i \lambda_i)^2}{\sum_i \lambda_i^2}

    It is N for N equal eigenvalues and 1 for a single one, and needs no decomposition.

    Args:
        kernel: symmetric and positive semi-definite, shape (n, n) or (n, n, c, c).

    Returns:
        The effective rank, shape (), from 1 to the number of rows; NaN if the kernel is 0 or not finite.

    Raises:
        TypeError: the kernel is not a float array.
        ValueError: the kernel is not square.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(f"{gnl.diagnostics.effective_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0]))):.4f}")
        2.6667

    References:
        Bartlett et al. (2020), Benign overfitting in linear regression, where it is :math:`R_0`.
    """
    matrix = _matrix(_checked(kernel, "kernel"))
    matrix = matrix / _size(matrix)
    return jnp.trace(matrix) ** 2 / jnp.sum(matrix * matrix)


def condition_number(kernel: Kernel, *, rtol: Number | None = None) -> Scalar:
    r"""The largest eigenvalue over the smallest, as far as rounding lets it be known.

    .. math:: \kappa = \frac{\lambda_{\max}}{\lambda_{\min}}, \qquad
              \kappa = \infty \text{ if } \lambda_{\min} \le \mathrm{rtol} \, \lambda_{\max}

    Args:
        kernel: symmetric and positive semi-definite, shape (n, n) or (n, n, c, c).
        rtol: eigenvalues up to this share of the largest count as zero. None means 8 eps of the kernel's dtype, at
            least float32; 0 takes the smallest eigenvalue as it was computed.

    Returns:
        The condition number, shape (), at least 1; NaN if the kernel is not finite.

    Raises:
        TypeError: the kernel is not a float array, or ``rtol`` is not a number.
        ValueError: the kernel is not square, or ``rtol`` is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(f"{gnl.diagnostics.condition_number(jnp.diag(jnp.array([4.0, 2.0, 1.0]))):.4f}")
        4.0000
    """
    matrix = _matrix(_checked(kernel, "kernel"))
    values, negligible = _spectrum(matrix, ROUNDINGS * float(jnp.finfo(matrix.dtype).eps) if rtol is None else rtol)
    return jnp.where(negligible[0], jnp.full_like(values[0], jnp.inf), values[-1] / values[0])


def spectrum_decay(kernel: Kernel, *, first: int = 1, last: int | None = None) -> Scalar:
    r"""The exponent of a power law for the eigenvalues, in descending order, by least squares in logarithms.

    .. math:: \lambda_k \sim k^{-\alpha}, \qquad \min_{\alpha, a} \sum_{k = \text{first}}^{\text{last}}
              (\log \lambda_k + \alpha \log k - a)^2

    Few spectra are power laws throughout: choose ranks between the first eigenvalues, which stand apart, and the last,
    which feel the number of examples. Those up to N eps of the largest, N being the number of rows, are left out.

    Args:
        kernel: symmetric and positive semi-definite, shape (n, n) or (n, n, c, c).
        first: the first rank k that counts; the largest eigenvalue has rank 1.
        last: the last one; None means the number of rows.

    Returns:
        The exponent :math:`\alpha`, shape (); NaN if fewer than two eigenvalues are left, or the kernel is not finite.

    Raises:
        TypeError: the kernel is not a float array, or a rank is not an int.
        ValueError: the kernel is not square, or the ranks are out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(f"{gnl.diagnostics.spectrum_decay(jnp.diag(1.0 / jnp.arange(1.0, 9.0) ** 2)):.4f}")
        2.0000

    References:
        Bordelon, Canatar and Pehlevan (2020), Spectrum dependent learning curves in kernel regression and wide neural
        networks, where the exponent sets how fast kernel regression learns.
    """
    matrix = _matrix(_checked(kernel, "kernel"))
    check_count(first, "first")
    last = len(matrix) if last is None else last
    check_count(last, "last")
    if not first < last <= len(matrix):
        raise ValueError(
            f"first and last must be two ranks, first below last, from 1 to the {len(matrix)} rows of the kernel, but "
            f"are {first} and {last}."
        )
    values, negligible = (x[::-1][first - 1 : last] for x in _spectrum(matrix))
    zeros = jnp.zeros_like(values)
    weights = jnp.where(negligible, zeros, jnp.ones_like(values))
    ranks = jnp.asarray(np.log(np.arange(first, last + 1)), values.dtype)
    logs = jnp.where(negligible, zeros, jnp.log(values))
    centred = weights * (ranks - jnp.sum(weights * ranks) / jnp.sum(weights))
    # Of one eigenvalue the mean may be off by a rounding.
    slope = -jnp.sum(centred * logs) / jnp.sum(centred * centred)
    return jnp.where(jnp.sum(weights) < 2, jnp.full_like(slope, jnp.nan), slope)


def kernel_regression(
    kernel: Kernel, kernel_new: Kernel, residuals: Any, *, ridge: Number = 0.0, rtol: Number | None = None
) -> Float[Array, " m"] | Float[Array, "m c"]:
    r"""The kernel ridge regression of residuals, evaluated on new examples.

    .. math:: g(x) = K(x, X) \, (K + \lambda I)^{-1} \, r

    Without ridge it is the interpolant of minimum norm. Components for which :math:`\lambda_i + \lambda` is at most
    ``rtol`` of the largest are left out. The kernel is taken as given: with the empirical neural tangent kernel, ridge
    :math:`n \mu` and :math:`r = y - f(X)`, it is what the damping :math:`\mu` of this package's squared error, a mean
    over n examples, adds to the outputs. :func:`gn_linear.filtered_predictions` finds that, for any filter and loss,
    without a kernel.

    Args:
        kernel: K between n examples, symmetric and positive semi-definite, shape (n, n) or (n, n, c, c).
        kernel_new: K between m new examples and these n, shape (m, n) or (m, n, c, c).
        residuals: r, what is to be fitted: shape (n, c) or (n,). With kernels of two axes each column is fitted by
            itself; (n,) goes with c = 1.
        ridge: :math:`\lambda`, not negative.
        rtol: None means N eps for N rows, with the eps of the kernel's dtype, at least float32: a kernel that was
            rounded to fewer digits than it has now needs more.

    Returns:
        The predictions, shape (m, c), or (m,) for residuals of shape (n,).

    Raises:
        TypeError: an array is not a float array, or ``ridge`` or ``rtol`` is not a number.
        ValueError: shapes do not fit, or ``ridge`` or ``rtol`` is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x, x_new = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
        >>> found = gnl.diagnostics.kernel_regression(jnp.outer(x, x), jnp.outer(x_new, x), 2.0 * x)
        >>> print([f"{value:.2f}" for value in found])
        ['6.00', '8.00']

    References:
        Jacot, Gabriel and Hongler (2018), Neural tangent kernel; Lee et al. (2019), Wide neural networks of any depth
        evolve as linear models.
    """
    check_number(ridge, "ridge")
    kernel = _checked(kernel, "kernel")
    new, rhs = _checked_floats(kernel_new, "kernel_new"), _checked_floats(residuals, "residuals")
    if new.ndim != kernel.ndim or new.shape[1:] != kernel.shape[1:]:
        needed = f"(m, {', '.join(map(str, kernel.shape[1:]))})"
        raise ValueError(
            f"kernel_new: its shape must be {needed} with a kernel of shape {kernel.shape}, but is {new.shape}."
        )
    _check_rows(rhs, kernel.shape, "residuals")
    shape = (new.shape[0], *rhs.shape[1:])
    dtype = _tree.scalar_dtype((kernel, new, rhs))
    share = _rtol(rtol, _matrix(kernel), dtype)
    matrix, new, rhs = _matrix(kernel.astype(dtype)), _matrix(new.astype(dtype)), rhs.astype(dtype)
    size, scale = _size(matrix), _size(rhs)
    values, vectors = jnp.linalg.eigh(matrix / size)
    shifted = jnp.maximum(_known(values, matrix), jnp.zeros_like(values)) + jnp.asarray(ridge, dtype) / size
    negligible = shifted <= share * jnp.max(shifted)
    inverse = jnp.where(negligible, jnp.zeros_like(values), 1 / shifted)
    fitted = _times(vectors.T, (rhs / scale).reshape(len(matrix), -1)) * inverse[:, None]
    return (scale * _times(new / size, _times(vectors, fitted))).reshape(shape)


def _spectrum(matrix: jax.Array, rtol: Number | None = None) -> tuple[jax.Array, jax.Array]:
    """The eigenvalues in ascending order, relative to the largest entry, and which of them count as zero."""
    values = _known(jnp.linalg.eigvalsh(matrix / _size(matrix)), matrix)
    return values, values <= _rtol(rtol, matrix, values.dtype) * jnp.maximum(values[-1], jnp.zeros_like(values[-1]))


def _known(values: jax.Array, matrix: jax.Array) -> jax.Array:
    """The eigenvalues, but NaN if the matrix is not finite: LAPACK may step over an entry."""
    return jnp.where(_tree.all_finite(matrix), values, jnp.full_like(values, jnp.nan))


def _rtol(rtol: Number | None, matrix: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The share of the largest eigenvalue that counts as zero, by default what rounding the matrix may make of zero."""
    if rtol is None:
        return jnp.asarray(len(matrix) * jnp.finfo(matrix.dtype).eps, dtype)
    check_number(rtol, "rtol")
    return jnp.asarray(rtol, dtype)


def _direction(x: jax.Array, centred: bool, axes: tuple[int, ...] = (0, 1)) -> jax.Array:
    """The array at norm 1, the means over its axes of examples taken off; NaN if nothing is left."""
    x = x / _size(x)
    norm = _norm(x)
    for axis in axes if centred else ():
        x = x - jnp.mean(x, axis, keepdims=True)
    left = _norm(x)
    gone = left <= ROUNDINGS * jnp.finfo(x.dtype).eps * norm
    return x / jnp.where(gone, jnp.full_like(left, jnp.nan), left)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x))


def _size(x: jax.Array) -> jax.Array:
    """The largest absolute entry; 1 where that is 0."""
    largest = jnp.max(jnp.abs(x))
    return jnp.where(largest == 0, jnp.ones_like(largest), largest)


def _times(one: jax.Array, two: jax.Array) -> jax.Array:
    """A product in full precision, which accelerators would lower."""
    return jnp.matmul(one, two, precision="highest")


def _matrix(kernel: jax.Array) -> jax.Array:
    """The kernel with a row for each pair of an example and an output."""
    if kernel.ndim == 2:
        return kernel
    n, m, c, d = kernel.shape
    return jnp.swapaxes(kernel, 1, 2).reshape(n * c, m * d)


def _columns(targets: Any, kernel: jax.Array, classes: int | None) -> jax.Array:
    """The targets as floats, shape (n,) or (n, c)."""
    shape = kernel.shape
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    if not isinstance(targets, (jax.Array, np.ndarray)) or not any(jnp.issubdtype(targets.dtype, k) for k in kinds):
        raise TypeError(
            f"targets must be an array of labels or of real numbers, but is {shown(targets)}; pass "
            f"an array of integers or of floats."
        )
    floating = jnp.issubdtype(targets.dtype, jnp.floating)
    labels = targets.ndim == 1 and not floating
    if classes is not None:
        check_count(classes, "classes")
        if not labels:
            raise TypeError(
                f"classes is for integer labels of shape (n,), but targets is {shown(targets)}; pass labels, or leave "
                f"classes out."
            )
    if labels and targets.shape == shape[:1]:
        outputs = shape[2] if len(shape) == 4 else classes
        if classes not in (None, outputs):
            raise ValueError(f"classes must be {outputs} with a kernel of shape {shape}, but is {classes}.")
        return _one_hot(targets, outputs).astype(kernel.dtype)
    _check_rows(targets, shape, "targets")
    return _tree.to_solve(targets) if floating else jnp.asarray(targets).astype(kernel.dtype)


def _one_hot(labels: Any, classes: int | None) -> jax.Array:
    try:
        known = np.asarray(labels)
    except jax.errors.TracerArrayConversionError as error:
        if classes is None:
            raise TypeError(
                f"classes must be given where labels are traced, but is None and targets is {shown(labels)}; pass the "
                f"number of classes."
            ) from error
        labels = labels.astype(jnp.int32)
        inside = (labels >= 0) & (labels < classes)
        return jnp.where(inside[:, None], jax.nn.one_hot(labels, classes, dtype=jnp.float32), jnp.nan)
    if classes is None:
        known = np.unique(known, return_inverse=True)[1]
        classes = int(known.max()) + 1
    elif known.min() < 0 or known.max() >= classes:
        raise ValueError(
            f"targets must be labels from 0 to {classes - 1}, for {classes} classes, but go from {known.min()} to "
            f"{known.max()}."
        )
    return jax.nn.one_hot(known.astype(np.int32), classes, dtype=jnp.float32)


def _check_rows(rows: Any, shape: tuple[int, ...], argument: str) -> None:
    """Raise unless an array has a row for each example of the kernel."""
    n, outputs = shape[0], shape[2:3]
    one = rows.shape == (n,) and outputs in ((), (1,))
    if not one and not (rows.ndim == 2 and rows.shape[0] == n and rows.shape[1] and outputs in ((), rows.shape[1:])):
        needed = f"({n}, {outputs[0]})" if outputs else f"({n},) or ({n}, c)"
        raise ValueError(f"{argument}: its shape must be {needed} with a kernel of shape {shape}, but is {rows.shape}.")


def _checked_floats(array: Any, argument: str) -> jax.Array:
    """As an array of at least float32."""
    if not isinstance(array, (jax.Array, np.ndarray)) or not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{argument} must be a real float array, but is {shown(array)}; pass jnp.asarray({argument}, float)."
        )
    return _tree.to_solve(array)


def _checked(kernel: Any, argument: str) -> jax.Array:
    """As an array of at least float32."""
    array = _checked_floats(kernel, argument)
    square = array.ndim in (2, 4) and array.shape[::2] == array.shape[1::2]
    if not square or array.size == 0:
        raise ValueError(
            f"{argument} must be square, of shape (n, n) or (n, n, c, c) with at least one example, but has shape "
            f"{array.shape}."
        )
    return array


def _checked_pair(kernel: Any, other: Any) -> tuple[jax.Array, jax.Array]:
    """Two kernels of one shape, as arrays of at least float32."""
    one, two = _checked(kernel, "kernel"), _checked(other, "other")
    if one.shape != two.shape:
        raise ValueError(
            f"kernel and other must have the same shape, but have {one.shape} and {two.shape}; use the same examples "
            f"and outputs for both."
        )
    return one, two
