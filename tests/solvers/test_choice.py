"""The solver that is taken where none is given."""

import jax
import jax.numpy as jnp
import optax
import pytest

import gn_linear as gnl
from gn_linear.solvers import CG, Choice, choose

X = jnp.linspace(-1.0, 1.0, 12)[:, None]
Y = jnp.sin(3 * X)
PARAMS = {"w": jnp.ones((1, 60)), "v": jnp.full((60, 1), 0.1)}
SQUARE = {"w": jnp.eye(11), "v": jnp.full((11, 1), 0.1)}


def predict(params, x):
    return jnp.tanh(x * jnp.ones((1, params["w"].shape[0])) @ params["w"]) @ params["v"]


@pytest.mark.parametrize(
    ("shapes", "choice"),
    [
        ([(20, 10), (10,)], Choice.KRONECKER),
        ([(3, 3, 4, 8), (8,), (32, 10), (10,)], Choice.KRONECKER),
        ([(10, 10)], Choice.PLAIN),
        ([(101,)], Choice.PLAIN),
        ([(1000, 1)], Choice.PLAIN),
        ([(20, 10), (201,)], Choice.PLAIN),
        ([(20, 10), (200,)], Choice.KRONECKER),
        ([], Choice.PLAIN),
    ],
)
def test_choice_goes_by_shapes(shapes, choice):
    solver, chosen = choose([jnp.zeros(shape) for shape in shapes])
    assert chosen == choice
    assert (solver == CG()) == (choice == Choice.PLAIN)


@pytest.mark.parametrize(
    ("params", "solver", "choice"),
    [(PARAMS, None, Choice.PLAIN), (SQUARE, None, Choice.KRONECKER), (SQUARE, CG(), Choice.GIVEN)],
)
def test_info_says_who_chose_and_the_steps_are_those_of_the_chosen_solver(params, solver, choice):
    runs = []
    for taken in (solver, solver or choose(params)[0]):
        optimiser = gnl.gauss_newton(predict, gnl.losses.squared_error, solver=taken)
        grads = jax.grad(lambda p: gnl.losses.squared_error(predict(p, X), Y))(params)
        runs.append(jax.jit(optimiser.update)(grads, optimiser.init(params), params, inputs=X, targets=Y))
    (updates, state), (wanted, _) = runs
    assert Choice(int(state.info.solver_choice)) == choice
    assert state.info.message.endswith(choice.words)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, updates, wanted))


def test_one_vector_of_all_parameters_has_no_matrices():
    optimiser = optax.flatten(gnl.gauss_newton(predict, gnl.losses.squared_error))
    assert Choice(int(gnl.info(optimiser.init(SQUARE)).solver_choice)) == Choice.PLAIN
