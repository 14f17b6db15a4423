"""``with_batch`` and ``without_batch`` by themselves: which keywords arrive, and what is rejected."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import gn_linear as gnl
from gn_linear._batch import KEYWORDS
from tests.support import assert_bit_equal

X, Y = jnp.linspace(0.0, 1.0, 5), jnp.linspace(1.0, 2.0, 5)
START = jnp.array(0.5)


def predict(params, x):
    return params * x


def recorder():
    """A transform whose state is what its last update was handed."""

    def update(updates, state, params=None, **extra):
        return updates, {"params": params, **extra}

    return optax.GradientTransformationExtraArgs(lambda params: {"start": params}, update)


def test_with_batch_binds_what_it_is_given():
    bound = gnl.wrappers.with_batch(recorder(), inputs=X, targets=Y, full_params=START)
    assert bound.init(START) == {"start": START}
    updates, got = bound.update(START, None, START + 1, value=2.0)
    assert updates is START
    assert got == {"params": START + 1, "inputs": X, "targets": Y, "full_params": START, "value": 2.0}


def test_with_batch_targets_are_optional():
    _, got = gnl.wrappers.with_batch(recorder(), inputs=X).update(START, None)
    assert got == {"params": None, "inputs": X, "targets": None}


@pytest.mark.parametrize("more", [{}, {"full_params": START}])
def test_with_batch_rejects_what_is_bound_already(more):
    bound = gnl.wrappers.with_batch(recorder(), inputs=X, **more)
    with pytest.raises(TypeError, match=r"inputs, targets: given to update, but already bound by with_batch"):
        bound.update(START, None, START, inputs=X, targets=Y)
    if more:
        with pytest.raises(TypeError, match=r"full_params: given to update"):
            bound.update(START, None, START, full_params=START)


def test_with_batch_leaves_misspelt_keywords_to_the_transform():
    bound = gnl.wrappers.with_batch(gnl.gauss_newton(predict, gnl.losses.squared_error), inputs=X, target=Y)
    with pytest.raises(TypeError, match=r"target: gauss_newton has no such argument.*did you mean targets"):
        bound.update(START, bound.init(START), START)


def test_with_batch_takes_transforms_without_keywords():
    bound = gnl.wrappers.with_batch(optax.sgd(0.5), inputs=X)
    updates, _ = bound.update(START, bound.init(START), START)
    assert updates == -0.25


def test_with_batch_binds_each_batch_anew_inside_jit():
    inner = gnl.gauss_newton(predict, gnl.losses.squared_error)
    traces = []

    @jax.jit
    def step(params, state, x, y):
        traces.append(None)
        return gnl.wrappers.with_batch(inner, inputs=x, targets=y).update(START, state, params)

    direct = jax.jit(lambda params, state, x, y: inner.update(START, state, params, inputs=x, targets=y))
    state = inner.init(START)
    for x in (X, X + 1):
        assert_bit_equal(step(START, state, x, Y), direct(START, state, x, Y))
        _, state = step(START, state, x, Y)
    assert len(traces) == 1


def test_without_batch_drops_the_batch_alone():
    shielded = gnl.wrappers.without_batch(recorder())
    assert shielded.init(START) == {"start": START}
    batch = dict.fromkeys(KEYWORDS, X)
    updates, got = shielded.update(START, None, START + 1, value=2.0, grad=START, **batch)
    assert updates is START
    assert got == {"params": START + 1, "value": 2.0, "grad": START}


def test_without_batch_takes_transforms_without_keywords():
    shielded = gnl.wrappers.without_batch(optax.sgd(0.5))
    assert shielded.update(START, shielded.init(START), inputs=X)[0] == -0.25


@pytest.mark.parametrize("transform", [None, optax.sgd, (1, 2), predict])
def test_no_transform_is_rejected(transform):
    # Unwrapped, because the checks of annotations in conftest.py would come first; a user has none.
    with_batch, without_batch = map(inspect.unwrap, (gnl.wrappers.with_batch, gnl.wrappers.without_batch))
    with pytest.raises(TypeError, match=r"transform must be an optax.GradientTransformation, but is"):
        with_batch(transform, inputs=X)
    with pytest.raises(TypeError, match=r"transform must be an optax.GradientTransformation, but is"):
        without_batch(transform)
