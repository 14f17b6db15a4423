"""The preconditioner from a part of the batch against dense linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import gn_linear as gnl
from gn_linear import curvature
from gn_linear.preconditioners import Subsample
from gn_linear.solvers import CG, ByStructure, Choice
from tests.support import assert_close, condition, dense_jacobian, flat

RNG = np.random.default_rng(31)
INSIDE, EDGE = 12, 4
PARAMS = {"w": jnp.asarray(RNG.normal(size=(2, 10))), "b": jnp.zeros(10), "v": jnp.asarray(RNG.normal(size=(10, 10)))}
PARAMS["out"] = jnp.asarray(RNG.normal(size=(10, 1)))
POINTS = {"edge": jnp.asarray(RNG.uniform(size=(EDGE, 2))), "inside": jnp.asarray(RNG.uniform(size=(INSIDE, 2)))}
TARGETS = {"edge": jnp.zeros(EDGE), "inside": jnp.ones(INSIDE)}
SQUARED = gnl.losses.squared_error
L2 = 0.01


def network(params, x):
    return jnp.tanh(jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]) @ params["out"]


def equation(params, points):
    """The Laplacian inside, values on the edge."""

    def u(point):
        return network(params, point[None])[0, 0]

    return {
        "edge": jax.vmap(u)(points["edge"]),
        "inside": jax.vmap(lambda p: jnp.trace(jax.hessian(u)(p)))(points["inside"]),
    }


def problem(points=POINTS, targets=TARGETS, l2=L2, predict=equation, loss=SQUARED):
    return curvature.linearised_problem(predict, loss, PARAMS, points, targets=targets, l2=l2)


def state(count=1):
    return Subsample().init(PARAMS)._replace(count=jnp.int32(count))


def matrix_of(subsample, damping, **of):
    """Of the problem with these arguments."""

    @jax.jit
    def columns(units):
        apply, _ = subsample.inverse(problem(**of), state(), jnp.asarray(damping))
        return jax.vmap(lambda unit: ravel_pytree(apply(unravel(unit)))[0])(units)

    vector, unravel = ravel_pytree(PARAMS)
    return np.asarray(columns(jnp.eye(vector.size)))


def ggn(points):
    """By the Jacobian of each kind of points, in numpy."""
    jacobians = [dense_jacobian(lambda p, x, k=k: equation(p, x)[k], PARAMS, points) for k in ("edge", "inside")]
    return sum(
        j.reshape(len(x), -1).T @ j.reshape(len(x), -1) / len(x)
        for j, x in zip(jacobians, points.values(), strict=True)
    )


def test_all_rows_give_the_inverse():
    damping = 0.05
    found = matrix_of(Subsample(rows=INSIDE + EDGE), damping)
    exact = ggn(POINTS) + (damping + L2) * np.eye(len(found))
    assert_close(found, np.linalg.inv(exact), size=len(found), condition=condition(exact))


def test_some_rows_give_the_inverse_of_theirs():
    subsample = Subsample(rows=8)

    @jax.jit
    def drawn():
        part = subsample.part(problem(), state())
        return part.inputs, part.targets

    inputs, targets = drawn()
    assert jax.tree.map(len, inputs) == {"edge": 2, "inside": 6}
    for name, points in inputs.items():
        rows = [np.flatnonzero(np.all(POINTS[name] == point, axis=1)).item() for point in points]
        assert len(set(rows)) == len(rows)
        np.testing.assert_array_equal(targets[name], TARGETS[name][np.array(rows)])
    found = matrix_of(subsample, 0.05)
    exact = ggn(inputs) + (0.05 + L2) * np.eye(len(found))
    assert_close(found, np.linalg.inv(exact), size=len(found), condition=condition(exact))


def test_every_step_draws_anew_and_all_points_alike():
    subsample, linear = Subsample(rows=4), problem()
    draw = jax.jit(jax.vmap(lambda count: subsample.part(linear, state(count)).inputs["inside"]))
    drawn = np.asarray(draw(jnp.arange(2000)))
    counts = np.array([np.sum(np.all(drawn == point, axis=-1)) for point in POINTS["inside"]])
    mean = drawn.shape[0] * drawn.shape[1] / INSIDE
    assert np.all(np.abs(counts - mean) < 6 * np.sqrt(mean))
    refreshed = subsample.refresh(linear, state(3))
    assert int(refreshed.count) == 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_no_damping_is_no_division_by_zero(dtype):
    params, points, targets = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, POINTS, TARGETS))
    vector = jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), dtype), params)

    @jax.jit
    def solve(params, vector):
        linear = curvature.linearised_problem(equation, SQUARED, params, points, targets=targets)
        apply, _ = Subsample(rows=8).inverse(linear, state(), jnp.zeros([], dtype))
        return apply(vector)

    solved = solve(params, vector)
    assert np.all(np.isfinite(flat(solved)))
    assert flat(solved) @ flat(vector) > 0


def test_weighted_losses_and_plain_callables():
    weights = jax.tree.map(lambda y: jnp.linspace(0.5, 2.0, len(y)), TARGETS)
    weighted = gnl.losses.weighted(SQUARED)
    convex = gnl.losses.from_convex(
        lambda outputs, targets: sum(
            jnp.mean(0.5 * w * (f - y) ** 2)
            for f, y, w in zip(*(jax.tree.leaves(t) for t in (outputs, *targets)), strict=True)
        )
    )
    first, second = (
        matrix_of(Subsample(rows=INSIDE + EDGE), 0.1, loss=loss, targets=(TARGETS, weights))
        for loss in (weighted, convex)
    )
    assert_close(first, second, size=len(first), condition=condition(first))


def test_outputs_that_do_not_follow_are_refused():
    linear = problem(predict=lambda p, x: equation(p, POINTS), points={"unused": jnp.ones(3)})
    assert not Subsample().follows(linear)
    with pytest.raises(ValueError, match=r"Subsample draws examples along the leading axes of inputs.*edge"):
        Subsample().inverse(linear, state(), jnp.float64(0.1))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [({"rows": 0}, ValueError, "rows must be"), ({"rows": 1.5}, TypeError, "rows"), ({"seed": -1}, ValueError, "seed")],
)
def test_arguments_are_checked(arguments, error, says):
    with pytest.raises(error, match=says):
        Subsample(**arguments)


def train(predict, points, targets, steps, solver=None):
    optimiser = gnl.gauss_newton(predict, SQUARED, solver=solver)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(lambda p: SQUARED(predict(p, points), targets))(params)
        updates, state = optimiser.update(grads, state, params, inputs=points, targets=targets)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps))
    (_, state), values = run((PARAMS, optimiser.init(PARAMS)))
    return state, np.asarray(values)


def test_it_is_chosen_for_differentiated_networks_alone():
    state, values = train(equation, POINTS, TARGETS, 12)
    assert Choice(int(state.info.solver_choice)) == Choice.SUBSAMPLE
    assert Choice.SUBSAMPLE.words in state.info.message
    assert values[-1] < values[0] / 1e3
    given = CG(max_steps=2, rtol=0.0, preconditioner=Subsample(rows=256), momentum=True)
    np.testing.assert_array_equal(values, train(equation, POINTS, TARGETS, 12, given)[1])
    values_alone = problem(predict=network, points=POINTS["inside"], targets=TARGETS["inside"][:, None])
    assert ByStructure().choice(values_alone) == Choice.KRONECKER
    points_are_no_inputs = problem(predict=lambda p, x: equation(p, POINTS), points=jnp.ones(3))
    assert ByStructure().choice(points_are_no_inputs) == Choice.KRONECKER


def test_several_outputs_of_an_example_keep_the_factors():
    linear = problem(
        predict=lambda p, x: network(p, network(p, x) * x)[:, [0, 0]], points=POINTS["inside"], targets=None
    )
    assert any(len(block.uses) > 1 for block in linear.layers.blocks)
    assert ByStructure().choice(linear) == Choice.KRONECKER
