"""``info`` and ``anchor`` find the one state of ours in any nesting of optax states."""

import jax
import jax.numpy as jnp
import optax
import pytest

import gn_linear as gnl

PARAMS = {"w": jnp.array([1.0, 2.0]), "b": jnp.array(0.5)}
X = jnp.array([[1.0, 0.5], [0.2, -1.0], [0.3, 2.0]])
BATCH = {"inputs": X, "targets": jnp.array([1.0, -1.0, 0.0]), "full_params": PARAMS}
SQUARED = gnl.losses.squared_error


def predict(params, x):
    return x @ params["w"] + params["b"]


def newton():
    return gnl.gauss_newton(predict, SQUARED)


def linearising():
    return gnl.iterative_linearisation(predict, SQUARED, period=3)


def masked(inner):
    return optax.masked(inner, {"w": True, "b": False})


def injected(inner):
    del inner
    return optax.inject_hyperparams(gnl.gauss_newton, static_args=("predict", "loss"))(predict, SQUARED)


def injected_period(inner):
    del inner
    make = optax.inject_hyperparams(gnl.iterative_linearisation, static_args=("predict", "loss"))
    return make(predict, SQUARED, period=3)


def multi_steps(inner):
    """MultiSteps as a transform that hands the batch on; its own ``gradient_transformation`` does not say so."""
    wrapper = optax.MultiSteps(inner, 1)
    return optax.GradientTransformationExtraArgs(wrapper.init, wrapper.update)


NESTINGS = {
    "bare": lambda inner: inner,
    "chain": lambda inner: optax.chain(optax.clip(1.0), inner, optax.trace(0.9)),
    "named_chain": lambda inner: optax.named_chain(("clip", optax.clip(1.0)), ("ours", inner)),
    "MultiSteps": lambda inner: optax.MultiSteps(inner, 1),
    "masked": masked,
    "partition": lambda inner: optax.partition({"a": inner, "b": optax.sgd(1.0)}, {"w": "a", "b": "b"}),
    "apply_if_finite": lambda inner: optax.apply_if_finite(inner, 5),
    "all of them": lambda inner: optax.apply_if_finite(multi_steps(optax.chain(masked(inner))), 5),
}


def after_a_step(optimiser):
    state = optimiser.init(PARAMS)
    return optimiser.update(PARAMS, state, PARAMS, **BATCH)[1]


@pytest.mark.parametrize("wrap", [*NESTINGS.values(), injected], ids=[*NESTINGS, "inject_hyperparams"])
def test_info_of_gauss_newton(wrap):
    optimiser = wrap(newton())
    before = gnl.info(optimiser.init(PARAMS))
    assert isinstance(before, gnl.GaussNewtonInfo)
    assert jnp.isnan(before.loss)
    info = gnl.info(after_a_step(optimiser))
    assert abs(info.loss - SQUARED(predict(PARAMS, X), BATCH["targets"])) <= 3 * jnp.finfo(info.loss.dtype).eps
    with pytest.raises(ValueError, match="holds no IterativeLinearisationState"):
        gnl.anchor(optimiser.init(PARAMS))


@pytest.mark.parametrize("wrap", [*NESTINGS.values(), injected_period], ids=[*NESTINGS, "inject_hyperparams"])
def test_info_and_anchor_of_iterative_linearisation(wrap):
    state = after_a_step(wrap(linearising()))
    info = gnl.info(state)
    assert isinstance(info, gnl.LinearisationInfo)
    assert (info.feature_updates, info.age) == (1, 0)
    anchor = gnl.anchor(state)
    assert jnp.array_equal(anchor["w"], PARAMS["w"])


def test_works_under_jit():
    state = optax.chain(linearising(), optax.sgd(0.1)).init(PARAMS)
    info, anchor = jax.jit(lambda s: (gnl.info(s), gnl.anchor(s)))(state)
    assert info.feature_updates == 0
    assert jnp.array_equal(anchor["w"], PARAMS["w"])


@pytest.mark.parametrize(
    "state", [optax.adam(0.1).init(PARAMS), (), None, PARAMS], ids=["adam", "empty", "None", "dict"]
)
def test_none_is_an_error(state):
    with pytest.raises(ValueError, match="GaussNewtonState or IterativeLinearisationState"):
        gnl.info(state)
    with pytest.raises(ValueError, match="IterativeLinearisationState"):
        gnl.anchor(state)


def test_several_are_an_error_with_their_paths():
    state = optax.chain(linearising(), optax.chain(optax.clip(1.0), newton())).init(PARAMS)
    with pytest.raises(ValueError, match=r"state\[0\] \(Iterative.*\), state\[1\]\[1\] \(GaussNewtonState\)"):
        gnl.info(state)
    assert gnl.anchor(state) is state[0].anchor
    assert jnp.isnan(gnl.info(state[1]).loss)
    parts = optax.partition({"a": newton(), "b": newton()}, {"w": "a", "b": "b"}).init(PARAMS)
    with pytest.raises(ValueError, match=r"inner_states\['a'\].*inner_states\['b'\]"):
        gnl.info(parts)
    both = optax.chain(linearising(), linearising()).init(PARAMS)
    with pytest.raises(ValueError, match=r"state\[0\].*state\[1\]"):
        gnl.anchor(both)
