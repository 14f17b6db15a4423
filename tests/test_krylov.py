"""Krylov bases against dense linear algebra, in both spaces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gn_linear as gnl
from gn_linear import _krylov, _tree
from tests.support import assert_close, flat, tolerance

FILTERS = {
    "tikhonov": gnl.filters.Tikhonov(0.05),
    "descent": gnl.filters.GradientDescent(0.01, 500),
    "flow": gnl.filters.GradientFlow(20.0),
    "proximal": gnl.filters.Proximal(4.0, 5),
}
SIZE = 12


def space_of(matrix, in_outputs):
    """The space of G = A^T A, with A as the Jacobian of a model whose loss has the identity as its Hessian."""
    return _krylov.Space(
        forward=lambda v: (matrix @ v, matrix @ v),
        dual=lambda x: (_tree.norm(x), x),
        lift=lambda x: x,
        pull=lambda x: matrix.T @ x,
        origin=(jnp.zeros(matrix.shape[0], matrix.dtype),) * 2,
        in_outputs=in_outputs,
        largest=min(matrix.shape) if in_outputs else matrix.shape[1],
        rounding=float(jnp.finfo(matrix.dtype).eps),
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _basis(matrix, start, rank, in_outputs):
    return _krylov.krylov_basis(space_of(matrix, in_outputs), start, rank)


def random_matrix(singular, rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(rows, len(singular))))
    right, _ = np.linalg.qr(rng.normal(size=(columns, len(singular))))
    return left * singular @ right.T


def vectors_of(basis, matrix, in_outputs):
    """The basis as columns like the parameters."""
    kept = np.asarray(basis.vectors, np.float64)[: int(basis.size)].T
    return matrix.T @ kept if in_outputs else kept


def bidiagonal_of(basis):
    k = int(basis.size)
    above = np.asarray(basis.above, np.float64)[: k - 1]
    return np.diag(np.asarray(basis.diagonal, np.float64)[:k]) + np.diag(above, 1)


@pytest.mark.parametrize("in_outputs", [False, True])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), rank=st.integers(1, SIZE), spread=st.floats(0.0, 6.0))
def test_basis_is_orthonormal_and_bidiagonalises(in_outputs, seed, rank, spread):
    """V is orthonormal to rounding where it is kept, elsewhere up to the length of what is kept instead."""
    matrix = random_matrix(10.0 ** -np.linspace(0.0, spread, SIZE), SIZE, SIZE, seed)
    start = np.random.default_rng(seed).normal(size=SIZE)
    basis = _basis(jnp.asarray(matrix), jnp.asarray(start), rank, in_outputs)
    k, factor = int(basis.size), bidiagonal_of(basis)
    condition = float(np.max(np.linalg.norm(np.asarray(basis.vectors)[:k], axis=1))) if in_outputs else 1.0
    v = vectors_of(basis, matrix, in_outputs)
    assert_close(v.T @ v, np.eye(k), size=SIZE * k, condition=condition)
    assert_close(np.linalg.norm(matrix @ v, axis=0), np.linalg.norm(factor, axis=0), size=SIZE * k, scale=1.0)
    assert_close(v.T @ matrix.T @ matrix @ v, factor.T @ factor, size=SIZE * k, condition=condition, scale=1.0)
    b = matrix.T @ start if in_outputs else start
    assert_close(basis.norm, np.linalg.norm(b), size=SIZE)
    assert_close(v[:, 0], b / np.linalg.norm(b), size=SIZE)


@pytest.mark.parametrize(("dtype", "in_outputs"), [(jnp.float32, False), (jnp.float32, True), (jnp.float64, False)])
def test_small_eigenvalues_keep_their_digits(dtype, in_outputs):
    """Their square roots are off by eps, relative to the largest; from G the eigenvalues themselves would be."""
    singular = np.array([1.0, 0.3, 0.1, 0.03, 3e-3, 3e-4])
    if dtype == jnp.float64:
        singular = singular**2.3
    matrix = random_matrix(singular, 9, 8)
    start = np.random.default_rng(1).normal(size=9 if in_outputs else 8)
    narrow, begin = jnp.asarray(matrix, dtype), jnp.asarray(start, dtype)
    basis = _basis(narrow, begin, 7, in_outputs)
    values = np.sort(np.asarray(_krylov.ritz_spectrum(basis).values, np.float64))[::-1][:6]
    exact = np.linalg.svd(np.asarray(narrow, np.float64), compute_uv=False)[:6]
    assert_close(np.sqrt(values), exact, size=9 * 8, dtype=dtype, scale=1.0)
    assert values[-1] < float(jnp.finfo(dtype).eps)  # so that Lanczos on G could not see it


@pytest.mark.parametrize("in_outputs", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_many_vectors_of_a_matrix_of_good_condition(in_outputs, dtype):
    """Recurrences that orthogonalise the wrong side lose a digit at every step here."""
    matrix = random_matrix(np.linspace(0.5, 1.0, 60), 60, 60)
    basis = _basis(
        jnp.asarray(matrix, dtype), jnp.asarray(np.random.default_rng(1).normal(size=60), dtype), 50, in_outputs
    )
    v = vectors_of(basis, matrix, in_outputs)
    assert_close(v.T @ v, np.eye(50), size=60, dtype=dtype, condition=2.0)


@pytest.mark.parametrize("in_outputs", [False, True])
def test_entries_stay_near_the_norm_of_a_coarse_matrix(in_outputs):
    """Products and their transposes that differ by rounding must not feed on each other from step to step."""
    rng = np.random.default_rng(3)
    matrix, start = jnp.asarray(rng.normal(size=(60, 40))), jnp.asarray(rng.normal(size=60 if in_outputs else 40))
    other = matrix * (1 + 1e-3 * rng.normal(size=matrix.shape))
    space = space_of(matrix, in_outputs)._replace(pull=lambda x: other.T @ x, rounding=1e-6)
    basis = jax.jit(lambda start: _krylov.krylov_basis(space, start, 40))(start)
    assert basis.finite
    assert max(basis.diagonal.max(), basis.above.max()) < 4 * np.linalg.norm(matrix, 2)


@pytest.mark.parametrize("in_outputs", [False, True])
@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_exhausted_space_ends_the_basis(distinct, in_outputs):
    """A matrix with few distinct singular values has a small Krylov space, in which every filter is exact."""
    singular = np.sqrt(np.resize(np.arange(1.0, distinct + 1), SIZE))
    matrix = random_matrix(singular, SIZE, SIZE, distinct)
    start = np.random.default_rng(distinct).normal(size=SIZE)
    basis = _basis(jnp.asarray(matrix), jnp.asarray(start), SIZE, in_outputs)
    assert basis.size >= distinct
    if distinct < 3:  # later the last coupling may be just above rounding, which costs products and no digits
        assert basis.size == distinct
    right = matrix.T @ start if in_outputs else start
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    for chosen in FILTERS.values():
        filtered = _krylov.apply_filter(basis, _krylov.ritz_spectrum(basis), chosen)
        kept = np.asarray(_krylov.combination(basis, filtered.coefficients, jnp.asarray(start)))
        exact = vectors @ (np.asarray(chosen(jnp.asarray(values))) * (vectors.T @ right))
        assert_close(matrix.T @ kept if in_outputs else kept, exact, size=SIZE, condition=distinct)
        assert filtered.residual <= tolerance(np.float64, SIZE) * np.linalg.norm(right)


@pytest.mark.parametrize("in_outputs", [False, True])
def test_start_outside_of_the_range(in_outputs):
    """What A maps to zero stays in the basis, with eigenvalue 0; a basis of the outputs has no such part."""
    matrix, start = np.diag([2.0, 1.0, 0.0, 0.0]), np.array([1.0, 1.0, 1.0, 1.0])
    basis = _basis(jnp.asarray(matrix), jnp.asarray(start), 4, in_outputs)
    assert basis.size == (2 if in_outputs else 3)
    filtered = _krylov.apply_filter(basis, _krylov.ritz_spectrum(basis), gnl.filters.Tikhonov(0.5))
    kept = np.asarray(_krylov.combination(basis, filtered.coefficients, jnp.asarray(start)))
    exact = np.diag(matrix) * start if in_outputs else start
    exact = exact / (np.diag(matrix) ** 2 + 0.5)
    assert_close(matrix.T @ kept if in_outputs else kept, exact, size=4)
    nothing = _basis(jnp.zeros((4, 4)), jnp.asarray(start), 4, in_outputs)
    assert (int(nothing.size), bool(nothing.finite)) == (0 if in_outputs else 1, True)


@pytest.mark.parametrize("in_outputs", [False, True])
def test_zero_and_broken_starts(in_outputs):
    matrix = jnp.eye(4)
    empty = _basis(matrix, jnp.zeros(4), 4, in_outputs)
    assert (int(empty.size), bool(empty.finite)) == (0, True)
    broken = _basis(matrix, jnp.array([1.0, jnp.nan, 0.0, 0.0]), 4, in_outputs)
    assert (int(broken.size), bool(broken.finite)) == (0, False)
    late = jnp.diag(jnp.array([1.0, 2.0, 3.0, 4.0])).at[2, 3].set(jnp.inf)
    late = _basis(late, jnp.array([1.0, 1.0, 0.0, 0.0]), 4, in_outputs)
    assert not late.finite
    assert np.all(np.isfinite(flat((late.diagonal, late.above, late.norm))) | (late.size == 0))


@pytest.mark.parametrize("in_outputs", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_residual_is_that_of_the_damped_system(dtype, in_outputs):
    matrix = random_matrix(np.geomspace(0.03, 1.0, 30), 30, 30)
    start = np.random.default_rng(0).normal(size=30)
    basis = _basis(jnp.asarray(matrix, dtype), jnp.asarray(start, dtype), 8, in_outputs)
    filtered = _krylov.apply_filter(basis, _krylov.ritz_spectrum(basis), gnl.filters.Tikhonov(0.01))
    kept = np.asarray(_krylov.combination(basis, filtered.coefficients, jnp.asarray(start)), np.float64)
    x, right = (matrix.T @ kept, matrix.T @ start) if in_outputs else (kept, start)
    left = np.linalg.norm(right - matrix.T @ (matrix @ x) - 0.01 * x)
    assert left > 1e-3 * np.linalg.norm(right)  # or it would say little
    assert_close(filtered.residual, left, size=30, scale=float(np.linalg.norm(right)), dtype=dtype)
