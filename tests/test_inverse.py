"""Swept inverses against numpy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gn_linear._inverse import inverse

RNG = np.random.default_rng(5)
swept = jax.jit(inverse)


def definite(n, condition, shape=()):
    """Symmetric matrices with eigenvalues from 1 / condition to 1, in double precision."""
    basis = np.linalg.qr(RNG.normal(size=(*shape, n, n)))[0]
    return (basis * np.geomspace(1 / condition, 1, n)) @ np.swapaxes(basis, -1, -2)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 8), (2, 65), (1, 257)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("power", [0.25, 0.75])
def test_inverse_is_as_accurate_as_the_condition_allows(shape, dtype, power):
    count, n = shape
    condition = float(np.finfo(dtype).eps) ** -power
    matrices = definite(n, condition, (count,)).astype(dtype)
    found = np.asarray(swept(jnp.asarray(matrices)), np.float64)
    exact = np.linalg.inv(matrices.astype(np.float64))
    error = np.linalg.norm(found - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    assert np.max(error) <= n * condition * np.finfo(dtype).eps
    assert np.array_equal(found, np.swapaxes(found, 1, 2)) or n > 256


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inverse_stays_positive_definite(dtype):
    """Explicit inverses of the blocks on the way lose definiteness long before the Cholesky factorisation does."""
    n, eps = 64, float(np.finfo(dtype).eps)
    found = np.asarray(swept(jnp.asarray(definite(n, 1 / (8 * n * eps)).astype(dtype))), np.float64)
    assert np.linalg.eigvalsh(found)[0] > 0.5


def test_elsewhere_lapack_is_called_directly(monkeypatch):
    matrices = jnp.asarray(definite(12, 1e3, (2,)))
    ours = np.asarray(swept(matrices))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "while" not in str(jax.make_jaxpr(inverse)(matrices))
    np.testing.assert_allclose(inverse(matrices), ours, rtol=1e3 * 12 * np.finfo(float).eps)


def test_what_is_not_definite_is_nan():
    matrices = jnp.stack([jnp.eye(9), jnp.diag(jnp.arange(9.0) - 4)])
    found = swept(matrices)
    np.testing.assert_array_equal(found[0], np.eye(9))
    assert np.any(np.isnan(found[1]))
