"""Damping policies against Nielsen's rule written once more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gn_linear as gnl
from gn_linear.damping import Constant, LevenbergMarquardt, Path, Schedule, as_policy
from tests.support import assert_bit_equal, assert_close, tolerance

SCALE, COUNT = jnp.float64(4.0), jnp.int32(0)


def nielsen(multiple, growth, ratio, accepted, minimum=1e-12, maximum=1e8):
    """Madsen, Nielsen and Tingleff (2004), Methods for non-linear least squares problems, Algorithm 3.16."""
    if accepted and ratio > 0:
        multiple, growth = multiple * max(1 / 3, 1 - (2 * ratio - 1) ** 3), 2.0
    else:
        multiple, growth = multiple * growth, 2 * growth
    return min(max(multiple, minimum), maximum), growth


@jax.jit
def play(policy, ratios, accepted):
    """The states after each of a sequence of steps."""

    def step(state, event):
        state = policy.update(state, *event)
        return state, state

    return jax.lax.scan(step, policy.init(jnp.float64), (ratios, accepted))[1]


LENGTH = 12
EVENTS = st.lists(
    st.tuples(st.floats(-2.0, 3.0, allow_nan=False, allow_subnormal=False), st.booleans()),
    min_size=LENGTH,
    max_size=LENGTH,
)


@settings(max_examples=50, deadline=None)
@given(events=EVENTS)
def test_nielsens_rule(events):
    ratios, accepted = (jnp.asarray(column) for column in zip(*events, strict=True))
    states = play(LevenbergMarquardt(0.5), ratios, accepted)
    multiple, growth = 0.5, 2.0
    for i, event in enumerate(events):
        multiple, growth = nielsen(multiple, growth, *event)
        assert_close(states.multiple[i], multiple, size=LENGTH)
        assert_close(states.growth[i], growth)


@pytest.mark.parametrize("ratio", [np.inf, 1e200, 1.0])
def test_ratio_beyond_one_shrinks_by_the_most(ratio):
    state = play(LevenbergMarquardt(0.5), jnp.full(LENGTH, ratio), jnp.ones(LENGTH, bool))
    assert_close(state.multiple[0], 0.5 / 3)
    assert_close(state.growth[0], 2.0)


@pytest.mark.parametrize("ratio", [np.nan, -np.inf, 0.0])
def test_ratio_that_is_no_gain_raises_the_damping(ratio):
    state = play(LevenbergMarquardt(0.5), jnp.full(LENGTH, ratio), jnp.zeros(LENGTH, bool))
    assert_close(state.multiple[:3], [1.0, 4.0, 32.0])


def test_bounds_hold_for_ever():
    policy = LevenbergMarquardt(1.0, 0.5, 20.0)
    up = play(policy, jnp.full(LENGTH, -1.0), jnp.zeros(LENGTH, bool))
    down = play(policy, jnp.ones(LENGTH), jnp.ones(LENGTH, bool))
    assert float(up.multiple[-1]) == 20.0
    assert float(down.multiple[-1]) == 0.5


PATH = Path((10.0, 0.1, 1.0), initial=0.5, minimum=0.1, maximum=100.0)


def test_path_tries_its_factors_within_the_bounds():
    state = PATH.init(jnp.float64)
    assert_close(PATH.dampings(state, SCALE), [20.0, 0.4, 2.0])
    assert_close(PATH.dampings(state._replace(multiple=jnp.float64(50.0)), SCALE), [400.0, 20.0, 200.0])
    assert int(PATH.most) == 0


@settings(max_examples=30, deadline=None)
@given(events=st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=LENGTH))
def test_path_moves_to_what_was_chosen_and_up_after_a_refusal(events):
    state, multiple = PATH.init(jnp.float64), 0.5
    for chosen, accepted in events:
        state = PATH.moved(state, jnp.int32(chosen), jnp.asarray(accepted))
        tried = np.clip(PATH.factors[chosen] * multiple, 0.1, 100.0)
        multiple = np.clip(tried if accepted else max(tried, 2 * multiple), 0.1, 100.0)
        assert_close(state.multiple, multiple, size=LENGTH)


def test_growth_stays_finite():
    def step(state, _):
        return LevenbergMarquardt().update(state, jnp.float32(-1.0), jnp.array(False)), None

    end = jax.lax.scan(step, LevenbergMarquardt().init(jnp.float32), None, length=5000)[0]
    assert np.isfinite(end.growth)
    assert_close(end.multiple, 1e8)


def test_damping_is_a_multiple_of_the_scale():
    policy = LevenbergMarquardt(0.25)
    assert_close(policy.damping(policy.init(jnp.float64), SCALE, COUNT), 1.0)
    assert_close(policy.damping(policy.init(jnp.float64), 1e100 * SCALE, COUNT), 1e100)
    schedule = optax.exponential_decay(1.0, 100, 0.5)
    for count in (0, 100, 250):
        ours = Schedule(schedule).damping(Schedule(schedule).init(jnp.float64), SCALE, jnp.int32(count))
        assert_close(ours, 4.0 * 0.5 ** (count / 100), dtype=jnp.float32)


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.floats(1e-3, 3.0),
            st.one_of(st.floats(-10.0, 10.0, allow_subnormal=False), st.sampled_from([np.nan, np.inf])),
            st.floats(1e-3, 10.0),
            st.booleans(),
        ),
        min_size=4,
        max_size=4,
    ),
    fresh=st.floats(0.0, 1.0),
)
def test_next_batches_have_their_share_in_the_gain_ratio(steps, fresh):
    policy = LevenbergMarquardt(0.5, fresh=fresh)
    state, multiple, growth, surprises, promises = policy.init(jnp.float64), 0.5, 2.0, 0.0, 0.0
    for own, surprise, predicted, accepted in steps:
        said = [jnp.float64(value) for value in (own, surprise, predicted)]
        state = policy.reviewed(policy.update(state, said[0], jnp.array(accepted)), *said)
        ratio = own
        if accepted and np.isfinite(surprise):
            surprises, promises = 0.8 * surprises + surprise, 0.8 * promises + predicted
            ratio = np.clip(min(own, 1.0) - fresh * surprises / promises, 1e-300, 1.0)
        multiple, growth = nielsen(multiple, growth, ratio, accepted)
        # The cube of a ratio near 1/2 loses nothing; sums that cancel lose their size over what they are divided by.
        size = 100 * (1 + fresh * 40 / max(promises, 1e-3))
        assert_close(state.multiple, multiple, size=size)
        assert_close(state.growth, growth)
        assert_bit_equal(policy.reviewed(state, *said), state)


def test_constant_is_absolute():
    policy = Constant(0.1)
    state = policy.init(jnp.float64)
    assert float(policy.damping(state, SCALE, COUNT)) == float(policy.damping(state, 1e9 * SCALE, COUNT)) == 0.1
    assert_bit_equal(policy.update(state, jnp.float64(-1.0), jnp.array(False)), state)
    assert not policy.adaptive
    assert not Schedule(lambda count: 1.0).adaptive
    assert LevenbergMarquardt().adaptive


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    "policy",
    [Constant(0.1), Schedule(optax.constant_schedule(0.1)), LevenbergMarquardt(), Path()],
    ids=lambda p: type(p).__name__,
)
def test_damping_is_in_the_dtype_of_the_solve(policy, dtype):
    state = policy.init(dtype)
    after = policy.update(state, jnp.ones([], dtype), jnp.array(True))
    everything = state, after, policy.damping(state, jnp.ones([], dtype), COUNT)
    assert {leaf.dtype for leaf in jax.tree.leaves(everything)} == {jnp.dtype(dtype)}


def test_plain_number_is_constant():
    assert as_policy(0.1) == Constant(0.1)
    assert as_policy(0) == Constant(0)
    policy = LevenbergMarquardt()
    assert as_policy(policy) is policy


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), -1, jnp.float64(-0.5)])
def test_negative_or_nan_damping(value):
    with pytest.raises(ValueError, match=r"^damping must be a finite number that is not negative"):
        Constant(value)
    with pytest.raises(ValueError, match=r"^damping must be a finite number that is not negative"):
        as_policy(value)


@pytest.mark.parametrize("value", ["0.1", True, None, jnp.ones(2)])
def test_damping_that_is_no_number(value):
    with pytest.raises(TypeError, match=r"^damping must be a finite number"):
        as_policy(value)


@pytest.mark.parametrize("policy", [LevenbergMarquardt(), Path()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", ["initial", "minimum", "maximum"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bounds_are_positive_and_finite(policy, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a positive finite number"):
        dataclasses.replace(policy, **{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_weight_of_the_next_batch_is_between_zero_and_one(value):
    with pytest.raises(ValueError, match=r"^fresh must be"):
        LevenbergMarquardt(fresh=value)


def test_schedule_is_a_function():
    with pytest.raises(TypeError, match="schedule must be a function of the step count"):
        Schedule(0.1)


def test_numbers_are_traced():
    def first(value):
        return as_policy(value).damping(as_policy(value).init(jnp.float64), SCALE, COUNT)

    values = jnp.asarray([0.1, 0.2])
    assert_bit_equal(jax.jit(jax.vmap(first))(values), values)
    initial = jax.vmap(lambda value: LevenbergMarquardt(value).init(jnp.float64).multiple)(values)
    assert_bit_equal(initial, values)
    assert jax.tree.leaves(LevenbergMarquardt(0.2, 0.1, 0.3, 0.4)) == [0.2, 0.1, 0.3, 0.4]
    assert jax.tree.leaves(Schedule(lambda count: 1.0)) == []


def test_another_value_compiles_nothing():
    traces = []

    @jax.jit
    def damping(policy):
        traces.append(None)
        return policy.damping(policy.init(jnp.float64), SCALE, COUNT)

    assert_close([damping(Constant(0.1)), damping(Constant(0.2))], [0.1, 0.2])
    assert len(traces) == 1


def test_policies_survive_gradients_and_batches():
    """JAX rebuilds a policy with derivatives, or with a leading axis, in place of its numbers: no check may refuse."""
    state = Constant(0.1).init(jnp.float64)
    slope = jax.grad(lambda policy: -policy.damping(state, SCALE, COUNT))(Constant(0.1))
    assert float(slope.value) == -1.0
    batch = jax.vmap(Constant)(jnp.asarray([0.1, 0.2]))
    assert_bit_equal(jax.vmap(lambda policy: policy.damping(state, SCALE, COUNT))(batch), batch.value)


def test_public_names():
    assert gnl.damping.LevenbergMarquardt is LevenbergMarquardt
    assert tolerance(np.float64) < tolerance(np.float32)
