"""The Jacobi preconditioner against the dense diagonal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gn_linear import curvature
from gn_linear.preconditioners import Jacobi
from tests.support import PROBLEMS, assert_bit_equal, assert_close, dense, flat, unflatten_like

NAME = "softmax_labels"
LINEAR = curvature.linearised_problem(
    PROBLEMS[NAME].predict,
    PROBLEMS[NAME].loss,
    PROBLEMS[NAME].params,
    PROBLEMS[NAME].inputs,
    targets=PROBLEMS[NAME].targets,
)


@jax.jit
def refresh(jacobi, state, factor=1.0):
    """One refresh on the problem of this file, whose inputs are multiplied by a factor."""
    problem = PROBLEMS[NAME]
    linear = curvature.linearised_problem(
        problem.predict, problem.loss, problem.params, problem.inputs * factor, targets=problem.targets, l2=0.2
    )
    return jacobi.refresh(linear, state)


PARAMS = PROBLEMS[NAME].params
SAMPLED = Jacobi(samples=3, exact_up_to=0, decay=0.5)


def scaled(state):
    """The average that a state stands for."""
    return flat(state.diagonal) / float(state.weight)


def test_small_problem_has_the_exact_diagonal():
    state = refresh(Jacobi(), Jacobi().init(PARAMS))
    diagonal = np.diag(dense(NAME).ggn) + 0.2
    assert_close(state.diagonal, diagonal, size=dense(NAME).jacobian.size)
    assert float(state.weight) == 1.0
    again = refresh(Jacobi(), state)
    assert_bit_equal(again.diagonal, state.diagonal)
    r = np.random.default_rng(17).normal(size=diagonal.size)
    inverse = Jacobi().inverse(LINEAR, state, jnp.float64(0.3))[0]
    assert_close(inverse(unflatten_like(r, PARAMS)), r / (diagonal + 0.3), size=dense(NAME).jacobian.size)


def test_limit_of_the_exact_diagonal():
    """Eighteen outputs are fewer than the parameters, and so they count."""
    assert dense(NAME).outputs.size == 18 < dense(NAME).params.size
    at, below = Jacobi(exact_up_to=18), Jacobi(exact_up_to=17)
    diagonal = np.diag(dense(NAME).ggn) + 0.2
    assert_close(refresh(at, at.init(PARAMS)).diagonal, diagonal, size=dense(NAME).jacobian.size)
    estimate = scaled(refresh(below, below.init(PARAMS)))
    assert np.max(np.abs(estimate - diagonal)) > np.sqrt(np.finfo(np.float64).eps) * np.max(diagonal)


def test_estimates_are_averaged_without_bias():
    states = [SAMPLED.init(PARAMS)]
    fresh = []
    for count in range(3):
        states.append(refresh(SAMPLED, states[-1]))
        alone = SAMPLED.init(PARAMS)._replace(count=jnp.int32(count))
        fresh.append(scaled(refresh(SAMPLED, alone)))
    assert int(states[-1].count) == 3
    weights = np.array([0.25, 0.5, 1.0])
    assert_close(scaled(states[-1]), weights @ np.array(fresh) / np.sum(weights), size=3)
    assert np.any(fresh[0] != fresh[1])


def test_seed_decides_the_signs():
    one, same, other = (refresh(Jacobi(exact_up_to=0, seed=seed), SAMPLED.init(PARAMS)) for seed in (0, 0, 1))
    assert_bit_equal(one, same)
    assert np.any(flat(one.diagonal) != flat(other.diagonal))


@pytest.mark.parametrize("jacobi", [Jacobi(), SAMPLED], ids=["exact", "sampled"])
def test_diagonal_that_is_not_finite_is_left_out(jacobi):
    good = refresh(jacobi, jacobi.init(PARAMS))
    after = refresh(jacobi, good, jnp.nan)
    assert_bit_equal((after.diagonal, after.weight), (good.diagonal, good.weight))
    never = refresh(jacobi, jacobi.init(PARAMS), jnp.nan)
    inverse = jacobi.inverse(LINEAR, never, jnp.float64(2.0))[0]
    assert_close(inverse(PARAMS), flat(PARAMS) / 2)


def test_entries_without_curvature_count_as_the_largest():
    jacobi = Jacobi()
    state = jacobi.init(jnp.ones(3))._replace(diagonal=jnp.asarray([0.0, 2.0, 8.0]), weight=jnp.float64(1.0))
    assert_close(jacobi.inverse(LINEAR, state, jnp.float64(0.0))[0](jnp.ones(3)), [1 / 8, 1 / 2, 1 / 8])
    assert_close(jacobi.inverse(LINEAR, state, jnp.float64(1.0))[0](jnp.ones(3)), [1.0, 1 / 3, 1 / 9])
    assert_close(jacobi.inverse(LINEAR, jacobi.init(jnp.ones(3)), jnp.float64(0.0))[0](jnp.ones(3)), np.ones(3))


def test_state_of_narrow_parameters_is_float32():
    state = Jacobi().init(jax.tree.map(lambda p: p.astype(jnp.float16), PARAMS))
    assert {leaf.dtype for leaf in jax.tree.leaves((state.diagonal, state.weight))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"exact_up_to": -1}, "exact_up_to must be at least 0"),
        ({"decay": -0.1}, "decay must be a finite number that is not negative"),
        ({"decay": 1.0}, "decay must be below 1"),
    ],
)
def test_arguments_are_checked(arguments, says):
    with pytest.raises(ValueError, match=says):
        Jacobi(**arguments)
