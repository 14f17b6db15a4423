"""Bad input gets an error that names the argument, at construction or when the update is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gn_linear as gnl

X = jnp.arange(4.0)
SQUARED = gnl.losses.squared_error


def predict(p, x):
    return p["a"] * x


PARAMS = {"a": jnp.float64(1.0)}
TRANSFORMS = {
    "gauss_newton": gnl.gauss_newton(predict, SQUARED),
    "iterative_linearisation": gnl.iterative_linearisation(predict, SQUARED, period=2),
}


@pytest.mark.parametrize("period", [2**31, np.int64(2**31), np.int64(2**40), 10**10])
def test_period_beyond_the_counter(period):
    with pytest.raises(ValueError, match="period must be at most 2147483647"):
        gnl.iterative_linearisation(predict, SQUARED, period=period)


def test_longest_period_never_moves_the_anchor():
    optimiser = gnl.iterative_linearisation(predict, SQUARED, period=2**31 - 1)
    state = optimiser.init(PARAMS)
    for step in range(4):
        _, state = optimiser.update(PARAMS, state, {"a": jnp.float64(step)}, inputs=X, targets=X)
    assert gnl.info(state).feature_updates == 1
    assert gnl.anchor(state)["a"] == 0.0


@pytest.mark.parametrize("which", TRANSFORMS)
@pytest.mark.parametrize("keyword", ["target", "input"])
def test_misspelt_keyword(which, keyword):
    optimiser = TRANSFORMS[which]
    with pytest.raises(TypeError, match=f"^{keyword}: {which} has no such argument.*did you mean {keyword}s"):
        optimiser.update(PARAMS, optimiser.init(PARAMS), PARAMS, inputs=X, **{keyword: X})


@pytest.mark.parametrize("which", TRANSFORMS)
def test_keywords_of_other_transforms_pass(which):
    optimiser = TRANSFORMS[which]
    plain, _ = optimiser.update(PARAMS, optimiser.init(PARAMS), PARAMS, inputs=X, targets=X)
    extra = {"value": 1.0, "grad": PARAMS, "value_fn": predict}
    updates, _ = optimiser.update(PARAMS, optimiser.init(PARAMS), PARAMS, inputs=X, targets=X, **extra)
    assert updates == plain


@pytest.mark.parametrize("which", TRANSFORMS)
def test_state_of_another_optimiser(which):
    with pytest.raises(TypeError, match=r"^state must be the .*State.*but is a tuple"):
        TRANSFORMS[which].update(PARAMS, optax.adam(1e-3).init(PARAMS), PARAMS, inputs=X, targets=X)


def test_half_a_curvature_batch():
    optimiser = TRANSFORMS["gauss_newton"]
    state = optimiser.init(PARAMS)
    with pytest.raises(ValueError, match="curvature_targets is missing"):
        optimiser.update(PARAMS, state, PARAMS, inputs=X, targets=X, curvature_inputs=X)
    with pytest.raises(ValueError, match="curvature_inputs is missing"):
        optimiser.update(PARAMS, state, PARAMS, inputs=X, targets=X, curvature_targets=X)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_softmax_without_a_class_axis(shape):
    labels = jnp.zeros(shape, int)
    with pytest.raises(ValueError, match=r"needs \(n, \.\.\., c\) with at least two classes.*sigmoid"):
        gnl.losses.softmax_cross_entropy(jnp.zeros(shape), labels)


@pytest.mark.parametrize("factory", [gnl.losses.SquaredError, gnl.losses.huber, gnl.losses.weighted])
def test_loss_that_was_not_made(factory):
    with pytest.raises(TypeError, match=r"^loss: .* makes a loss; call it first"):
        gnl.gauss_newton(predict, factory)


@pytest.mark.parametrize(
    "bounds", [{"minimum": 10, "maximum": 1}, {"minimum": np.float32(10)}, {"initial": 1e-13}, {"initial": 1e12}]
)
def test_damping_bounds_in_disorder(bounds):
    with pytest.raises(ValueError, match="minimum <= initial <= maximum"):
        gnl.damping.LevenbergMarquardt(**bounds)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gnl.solvers.CG(rtol=np.float32(2)), "rtol must be below 1"),
        (lambda: gnl.damping.LevenbergMarquardt(maximum=1e39), "maximum must be at most 1e\\+38"),
        (lambda: gnl.solvers.CG(max_steps=2.5), "max_steps must be an int"),
        (lambda: gnl.solvers.CG(max_steps=0), "max_steps must be at least 1"),
        (lambda: gnl.preconditioners.Jacobi(samples=2.5), "samples must be an int"),
        (lambda: gnl.preconditioners.Jacobi(exact_up_to=-1), "exact_up_to must be at least 0"),
        (lambda: gnl.gauss_newton(predict, SQUARED, l2=None), "l2 must be a number or a pytree"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("which", TRANSFORMS)
def test_weakly_typed_parameters_trace_once(which):
    traces = []
    optimiser = optax.chain(TRANSFORMS[which], optax.scale(1.0))

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = optimiser.update(PARAMS, state, params, inputs=X, targets=X)
        return optax.apply_updates(params, updates), state

    params = {"a": jnp.asarray(1.0)}
    assert params["a"].weak_type
    state = optimiser.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) <= 2  # the first step makes the parameters strongly typed


def test_negative_curvature_is_left_behind():
    """A loss that is concave here gives no step at first; refusals raise the damping until one is found."""

    def concave(outputs, targets):
        return -jnp.mean(jnp.cos(outputs - targets))

    optimiser = gnl.gauss_newton(lambda p, x: p * x, concave)
    params, x, y = jnp.float64(2.5), jnp.ones(3), jnp.zeros(3)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: concave(p * x, y))(params)
        updates, state = optimiser.update(grads, state, params, inputs=x, targets=y)
        return optax.apply_updates(params, updates), state

    state = optimiser.init(params)
    _, first = step(params, state)
    assert first.info.solver_status == gnl.solvers.Status.NON_POSITIVE_CURVATURE
    assert (first.info.accepted, first.info.skipped) == (False, 1)
    for _ in range(40):
        params, state = step(params, state)
    assert concave(params * x, y) < -1 + 10 * jnp.finfo(params.dtype).eps
