"""The Nystrom preconditioner against dense eigendecompositions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gn_linear as gnl
from gn_linear import curvature
from gn_linear.preconditioners import Nystrom
from tests.support import PROBLEMS, assert_bit_equal, assert_close, dense, flat, unflatten_like

NAME = "softmax_labels"
PARAMS = PROBLEMS[NAME].params
SIZE = dense(NAME).params.size
L2 = 0.01
GGN = dense(NAME).ggn + L2 * np.eye(SIZE)


def linear(factor=1.0):
    problem = PROBLEMS[NAME]
    return curvature.linearised_problem(
        problem.predict, problem.loss, problem.params, problem.inputs * factor, targets=problem.targets, l2=L2
    )


@jax.jit
def refresh(nystrom, state, factor=1.0):
    return nystrom.refresh(linear(factor), state)


@functools.cache
def sketched(rank):
    nystrom = Nystrom(rank=rank)
    return nystrom, refresh(nystrom, nystrom.init(PARAMS))


def inverse_matrix(rank, damping):
    """The preconditioner's inverse as a matrix."""
    nystrom, state = sketched(rank)
    apply, _ = nystrom.inverse(linear(), state, jnp.float64(damping))
    rows = jax.vmap(lambda v: jnp.concatenate([x.ravel() for x in jax.tree.leaves(apply(v))]))
    return np.asarray(rows(jax.vmap(lambda v: unflatten_like(v, PARAMS))(jnp.eye(SIZE))))


@pytest.mark.parametrize("rank", [SIZE, SIZE + 7])
def test_the_whole_sketch_is_the_inverse(rank):
    values = np.linalg.eigvalsh(GGN)
    damping = L2 / 2
    found = inverse_matrix(rank, damping)
    scale = values[0] + damping  # the least eigenvalue counts, and sets the scale of the rest
    # Halving the digits is the price of eigenvalues from the squares of a factor.
    limit = np.sqrt(np.finfo(np.float64).eps) * values[-1] / values[0]
    np.testing.assert_allclose(found, scale * np.linalg.inv(GGN + damping * np.eye(SIZE)), atol=limit)


def test_pairs_are_those_of_the_sketch():
    """Y (Omega^T Y)^-1 Y^T has eigenvalues below those of the matrix, and orthonormal vectors."""
    _, state = sketched(6)
    vectors = np.stack([flat(jax.tree.map(lambda x, k=k: x[k], state.vectors)) for k in range(6)])
    assert_close(vectors @ vectors.T, np.eye(6), size=SIZE**2)
    approximation = vectors.T @ np.diag(state.values) @ vectors
    rounding = np.sqrt(np.finfo(np.float64).eps) * np.linalg.norm(GGN)
    assert np.linalg.eigvalsh(GGN - approximation)[0] >= -rounding
    assert np.all(np.diff(state.values) <= 0)
    values = np.linalg.eigvalsh(GGN)[::-1]
    assert values[0] / 2 < state.values[0] <= values[0] + rounding


@pytest.mark.parametrize("damping", [1e-6, 0.02, 10.0])
def test_symmetric_and_positive_definite(damping):
    matrix = inverse_matrix(6, damping)
    np.testing.assert_allclose(matrix, matrix.T, atol=SIZE * np.finfo(np.float64).eps)
    values = np.linalg.eigvalsh(matrix)
    assert values[0] > 0
    if damping == 10.0:  # above all eigenvalues: nothing to precondition
        np.testing.assert_array_equal(matrix, np.eye(SIZE))


def test_it_shortens_conjugate_gradients():
    rhs = unflatten_like(np.random.default_rng(3).normal(size=SIZE), PARAMS)

    @jax.jit
    def steps(solver):
        prepared = solver.prepare(linear(), rhs, solver.init(PARAMS))
        return solver.solve(prepared, jnp.float64(1e-4)).solver_steps

    plain = gnl.solvers.CG(max_steps=100, rtol=1e-6, progress=0.0)
    helped = gnl.solvers.CG(max_steps=100, rtol=1e-6, progress=0.0, preconditioner=Nystrom(rank=SIZE))
    assert int(steps(helped)) <= 3 < int(steps(plain))


def test_a_sketch_serves_several_steps_and_nan_is_left_out():
    nystrom = Nystrom(rank=6, every=3)
    first = refresh(nystrom, nystrom.init(PARAMS))
    second = refresh(nystrom, first, 2.0)
    assert_bit_equal(second.values, first.values)
    assert int(second.age) == 1
    fourth = refresh(nystrom, refresh(nystrom, second, 2.0), 2.0)
    assert np.any(np.asarray(fourth.values) != np.asarray(first.values))
    broken = refresh(nystrom, first._replace(age=jnp.int32(5)), jnp.nan)
    assert_bit_equal(broken.values, first.values)
    assert_bit_equal(broken.vectors, first.vectors)


@pytest.mark.parametrize("argument", ["rank", "every"])
def test_arguments_are_checked(argument):
    with pytest.raises(TypeError, match=f"{argument} must be an int"):
        Nystrom(**{argument: 2.5})
    with pytest.raises(ValueError, match=f"{argument} must be at least 1"):
        Nystrom(**{argument: 0})
