"""The pytree vector space against numpy."""

import dataclasses
import importlib
import inspect
import itertools
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gn_linear as gnl
from gn_linear import _tree
from tests.support import assert_bit_equal, assert_close, flat, tolerance

WIDER = [
    (jnp.float16, jnp.float32),
    (jnp.bfloat16, jnp.float32),
    (jnp.float32, jnp.float32),
    (jnp.float64, jnp.float64),
]


def tree(seed=0, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(3, 2)), dtype), "b": [jnp.asarray(rng.normal(), dtype), None]}


@pytest.mark.parametrize(("narrow", "wide"), WIDER)
def test_solves_run_in_at_least_float32(narrow, wide):
    x = tree(dtype=narrow)
    assert _tree.at_least_float32(narrow) == wide
    assert _tree.scalar_dtype(x) == wide
    for leaf in jax.tree.leaves([_tree.to_solve(x), _tree.solve_zeros(x), _tree.dot(x, x), _tree.norm(x)]):
        assert leaf.dtype == wide
    assert_bit_equal(_tree.cast_like(_tree.to_solve(x), x), x)


def test_widest_leaf_gives_the_dtype_of_scalars():
    mixed = {"a": jnp.ones(2, jnp.float16), "b": jnp.ones(2, jnp.float64)}
    assert _tree.scalar_dtype(mixed) == jnp.float64
    assert _tree.dot(mixed, mixed).dtype == jnp.float64
    assert _tree.scalar_dtype({}) == jnp.float32


def test_vector_space_operations():
    x, y, alpha = tree(0), tree(1), jnp.float64(-1.7)
    assert_close(_tree.dot(x, y), flat(x) @ flat(y), scale=float(np.abs(flat(x)) @ np.abs(flat(y))))
    assert_close(_tree.norm(x), np.linalg.norm(flat(x)))
    assert_close(_tree.max_abs(x), np.max(np.abs(flat(x))))
    assert_close(_tree.scale(alpha, x), -1.7 * flat(x))
    assert_close(_tree.divide(x, alpha), flat(x) / -1.7)
    assert_close(_tree.add(x, y), flat(x) + flat(y))
    assert_close(_tree.subtract(x, y), flat(x) - flat(y))
    assert_close(_tree.negative(x), -flat(x))
    assert_close(_tree.axpy(alpha, x, y), -1.7 * flat(x) + flat(y))
    assert_bit_equal(_tree.where(jnp.array(True), x, y), x)
    assert_bit_equal(_tree.where(jnp.array(False), x, y), y)


def test_scalars_do_not_promote_leaves():
    x = tree(dtype=jnp.float32)
    for result in (_tree.scale(jnp.float64(2), x), _tree.divide(x, jnp.float64(2)), _tree.axpy(jnp.float64(2), x, x)):
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(jnp.float32)}


@settings(max_examples=25, deadline=None)
@given(exponent=st.integers(-300, 300))
def test_norm_neither_overflows_nor_underflows(exponent):
    unit = np.array([3.0, -4.0, 12.0])
    assert_close(_tree.norm(jnp.asarray(unit * 10.0**exponent)), np.linalg.norm(unit) * 10.0**exponent)


def test_norm_of_the_extremes():
    tiny = float(jnp.finfo(jnp.float32).tiny)
    assert float(_tree.norm(jnp.zeros(3))) == 0
    assert float(_tree.norm({})) == 0
    assert float(_tree.max_abs({"empty": jnp.zeros(0)})) == 0
    assert np.isnan(_tree.norm(jnp.array([jnp.nan, 1.0])))
    assert np.isinf(_tree.norm(jnp.array([jnp.inf, 1.0])))
    np.testing.assert_allclose(_tree.norm(jnp.full(4, tiny, jnp.float32)), 2 * tiny, rtol=tolerance(jnp.float32))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_all_finite_sees_one_bad_entry(bad):
    x = tree()
    assert bool(_tree.all_finite(x))
    assert bool(_tree.all_finite({}))
    assert not bool(_tree.all_finite({**x, "w": x["w"].at[2, 1].set(bad)}))


@pytest.mark.parametrize(
    ("leaf", "says"),
    [
        (jnp.arange(3), "int64"),
        (3, "int"),
        (True, "bool"),
        (jnp.ones(3, complex), "complex128"),
        (1j, "complex128"),
        ("text", "'text'"),
    ],
)
def test_only_real_float_leaves_are_parameters(leaf, says):
    with pytest.raises(TypeError, match=rf"^the argument: leaf \['layer'\]\[1\] .*{says}"):
        _tree.check_float_leaves({"layer": [jnp.ones(2), leaf]}, "the argument")


def test_floats_and_none_are_leaves():
    _tree.check_float_leaves({"a": jnp.ones(2), "b": 1.0, "c": None, "d": np.float32(1), "e": np.ones(2)}, "params")


def test_a_bare_array_is_named():
    with pytest.raises(TypeError, match=r"^params: the array has dtype int"):
        _tree.check_float_leaves(jnp.arange(3), "params")


def test_shapes_and_structures_are_compared():
    x = tree()
    _tree.check_same_shapes(x, tree(1), "updates", "params")
    with pytest.raises(ValueError, match=r"updates: leaf \['w'\] has shape \(2,\).*params has shape \(3, 2\)"):
        _tree.check_same_shapes({**x, "w": jnp.ones(2)}, x, "updates", "params")
    with pytest.raises(ValueError, match="updates and params must have the same tree structure"):
        _tree.check_same_shapes({"w": x["w"]}, x, "updates", "params")


def test_holes_are_cut_and_filled():
    full = {"a": jnp.ones(2), "b": {"c": jnp.zeros(3)}}
    holed = {"a": full["a"], "b": optax.MaskedNode()}
    assert _tree.has_holes(holed)
    assert not _tree.has_holes(full)
    assert_bit_equal(_tree.fill_holes(holed, full), full)
    assert_bit_equal(_tree.cut_holes(full, holed), holed)
    assert_bit_equal(_tree.cut_holes(full, full), full)


def registered_classes():
    """The dataclasses of the package that are pytrees."""
    modules = [importlib.import_module(name) for _, name, _ in pkgutil.walk_packages(gnl.__path__, "gn_linear.")]
    classes = {c for module in modules for c in vars(module).values() if inspect.isclass(c)}
    own = sorted((c for c in classes if c.__module__.startswith("gn_linear")), key=lambda c: c.__qualname__)
    return [c for c in own if dataclasses.is_dataclass(c) and not jax.tree_util.all_leaves([blank(c)])]


def blank(cls):
    obj = object.__new__(cls)
    for field in dataclasses.fields(cls):
        object.__setattr__(obj, field.name, 0.0)
    return obj


def test_no_two_classes_have_the_same_structure():
    # Else `jit` may run for one what it compiled for the other.
    classes = registered_classes()
    assert {gnl.losses.Huber, gnl.robust.Cauchy, gnl.solvers.CG, gnl.damping.Constant} <= set(classes)
    for one, other in itertools.combinations(classes, 2):
        assert jax.tree.structure(blank(one)) != jax.tree.structure(blank(other)), (one, other)


def test_a_class_without_its_constructor_is_itself():
    for loss in (gnl.robust.cauchy(0.5), gnl.losses.from_convex(optax.losses.huber_loss), gnl.losses.squared_error):
        leaves, structure = jax.tree.flatten(loss)
        assert jax.tree.unflatten(structure, leaves) == loss
        assert jax.tree.structure(jax.tree.map(lambda x: 2 * x, loss)) == structure
