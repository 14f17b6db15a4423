"""Measures of motion against dense numpy, and at the edges of floating point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gn_linear as gnl
from gn_linear import periods
from tests.support import PROBLEMS, assert_bit_equal, assert_close, dense, flat, tolerance

measure = gnl.diagnostics.linearisation_error
motion = gnl.diagnostics.parameter_motion


def moved(params, seed=0, size=0.5):
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [leaf + size * rng.normal(size=leaf.shape) for leaf in leaves])


@pytest.mark.parametrize("name", ["squared_error", "two_heads", "decay"])
def test_error_by_hand(name):
    problem, oracle = PROBLEMS[name], dense(name)
    params = moved(problem.params)
    after = flat(problem.predict(params, problem.inputs))
    change = oracle.jacobian @ (flat(params) - oracle.params)
    away = np.linalg.norm(after - oracle.outputs)
    want = np.linalg.norm(after - oracle.outputs - change) / away
    got = jax.jit(measure, static_argnums=0)(problem.predict, problem.params, params, problem.inputs)
    condition = (np.linalg.norm(after) + np.linalg.norm(change)) / away
    assert_close(got, want, size=oracle.jacobian.size, condition=condition / min(want, 1.0))
    assert want > np.sqrt(np.finfo(np.float64).eps)  # or it would say little
    linear = gnl.linearised(problem.predict, problem.params)(params, problem.inputs)
    assert_close(got, np.linalg.norm(after - flat(linear)) / away, size=after.size, condition=condition / want)


def test_affine_model_has_no_error():
    problem = PROBLEMS["affine"]
    params = moved(problem.params)
    assert measure(problem.predict, problem.params, params, problem.inputs) <= tolerance(np.float64, 10)


X = jnp.asarray([1.0, -2.0])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.float64])
def test_error_where_something_does_not_move(dtype):
    """Nothing moved, the linearised model alone moved, the model alone moved, and a motion that is not finite."""
    x = X.astype(dtype)
    wide = jnp.promote_types(dtype, jnp.float32)

    def error(model, anchor, params):
        found = measure(model, jnp.asarray(anchor, dtype), jnp.asarray(params, dtype), x)
        assert (found.shape, found.dtype) == ((), wide)
        return float(found)

    assert error(lambda p, x: p * x, 3.0, 3.0) == 0.0
    assert error(lambda p, x: 0 * p + x, 1.0, 3.0) == 0.0
    assert error(lambda p, x: p**2 * x, -1.0, 1.0) == float(jnp.finfo(wide).max)
    assert error(lambda p, x: p**2 * x, 0.0, 1.0) == 1.0
    assert not np.isfinite(error(lambda p, x: x / p, 1.0, 0.0))
    assert not np.isfinite(error(lambda p, x: jnp.log(p) * x, 1.0, -1.0))


@pytest.mark.parametrize("exponent", [-300, 0, 300])
def test_error_does_not_depend_on_units(exponent):
    scale = 2.0**exponent

    def model(p, x):
        return scale * (jnp.sin(p) * x)

    unscaled = measure(lambda p, x: jnp.sin(p) * x, jnp.array(0.5), jnp.array(1.5), X)
    assert_close(measure(model, jnp.array(0.5), jnp.array(1.5), X), unscaled, size=4)


@settings(max_examples=10, deadline=None)
@given(anchor=st.floats(-2.0, 2.0), step=st.floats(0.25, 2.0))
def test_error_is_the_one_that_rules_and_transforms_see(anchor, step):
    anchor, params = jnp.float64(anchor), jnp.float64(anchor + step)

    def model(p, x):
        return jnp.exp(p * x)

    error = measure(model, anchor, params, X)
    context = periods.Context(jnp.asarray(1), jnp.asarray(1), params, anchor, X, model)
    assert not periods.when_linearisation_error(error)(context)
    assert periods.when_linearisation_error(0.999 * error)(context)


def test_motion_by_hand():
    params = PROBLEMS["squared_error"].params
    after = moved(params)
    got = jax.jit(motion)(params, after)
    assert jax.tree.structure(got.by_leaf) == jax.tree.structure(params)
    distance = np.linalg.norm(flat(after) - flat(params))
    assert_close(got.total, distance / np.linalg.norm(flat(params)), size=30)
    want = jax.tree.map(lambda p, a: np.linalg.norm(flat(p) - flat(a)) / np.linalg.norm(flat(a)), after, params)
    assert_close(got.by_leaf, want, size=30)


def test_motion_of_and_from_zero():
    anchor = {"w": jnp.ones((2, 2)), "b": jnp.zeros(2), "none": None, "still": jnp.zeros(1)}
    got = motion(anchor, {**anchor, "b": jnp.full(2, 2.0)})
    assert (float(got.by_leaf["w"]), float(got.by_leaf["b"]), float(got.by_leaf["still"])) == (0.0, np.inf, 0.0)
    assert_close(got.total, np.sqrt(2.0))
    assert float(motion({}, {}).total) == 0.0
    assert not np.isfinite(float(motion(anchor, {**anchor, "b": jnp.full(2, np.nan)}).total))


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_motion_of_narrow_leaves_is_exact_at_any_size(factor):
    anchor = {"a": jnp.asarray([3.0, 4.0], jnp.float32) * factor, "h": jnp.asarray([1.0], jnp.float16)}
    got = motion(anchor, {"a": anchor["a"] * 2, "h": anchor["h"]})
    assert_bit_equal(got.by_leaf, {"a": jnp.float32(1.0), "h": jnp.float32(0.0)})


def test_bad_input():
    with pytest.raises(ValueError, match=r"params and anchor must have the same tree structure"):
        measure(lambda p, x: p["a"] * x, {"a": X}, {"b": X}, X)
    with pytest.raises(ValueError, match=r"params: leaf \['a'\] has shape \(1,\)"):
        motion({"a": X}, {"a": X[:1]})
    with pytest.raises(TypeError, match="anchor: "):
        motion({"a": np.arange(3)}, {"a": X})
    with pytest.raises(ValueError, match="is a scalar"):
        measure(lambda p, x: jnp.sum(p * x), X, X, X)
