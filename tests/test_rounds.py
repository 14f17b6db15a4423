"""`repeat` and `one_of` against plain Python: alone, and more of them than there are lanes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gn_linear as gnl
from gn_linear._rounds import FEWEST, IN_CACHE, one_of, repeat


def collatz(start, step=1):
    """The number of rounds until 1 is reached and the largest number on the way, by repeat."""

    def round_of(state):
        n, rounds, largest, trace = state
        n = jnp.where(n % 2 == 0, n // 2, 3 * n + 1)
        return n, rounds + step, jnp.maximum(largest, n.astype(largest.dtype)), trace.at[0].add(1.0)

    first = (start, jnp.int32(0), start.astype(jnp.float32), jnp.zeros(3))
    n, rounds, largest, trace = repeat(lambda state: state[0] != 1, round_of, first, entries=IN_CACHE)
    return {"n": n, "rounds": rounds, "largest": largest, "trace": trace}


def by_hand(n, step=1):
    rounds, largest = 0, n
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        rounds, largest = rounds + 1, max(largest, n)
    return rounds * step, largest, rounds


@pytest.mark.parametrize("count", [1, FEWEST, FEWEST + 1, 27, 100])
def test_each_of_many_ends_as_it_would_alone(count):
    starts = np.random.default_rng(count).integers(1, 200, count)
    found = jax.jit(jax.vmap(collatz))(jnp.asarray(starts, jnp.int32))
    for place, start in enumerate(starts):
        rounds, largest, _ = by_hand(int(start))
        assert found["n"][place] == 1
        assert found["rounds"][place] == rounds
        assert found["largest"][place] == largest
        np.testing.assert_array_equal(found["trace"][place], [rounds, 0, 0])


def test_what_a_round_closes_over_may_be_batched_too():
    starts, steps = np.arange(1, 31), np.arange(30) % 5
    found = jax.vmap(collatz)(jnp.asarray(starts, jnp.int32), jnp.asarray(steps, jnp.int32))
    expected = [by_hand(int(n), int(step))[0] for n, step in zip(starts, steps, strict=True)]
    np.testing.assert_array_equal(found["rounds"], expected)
    same_start = jax.vmap(lambda step: collatz(jnp.int32(7), step))(jnp.asarray(steps, jnp.int32))
    np.testing.assert_array_equal(same_start["rounds"], [by_hand(7, int(step))[0] for step in steps])


def test_maps_may_be_nested():
    starts, steps = np.arange(1, 13), np.arange(6)
    nested = jax.vmap(lambda n: jax.vmap(lambda step: collatz(n, step))(jnp.asarray(steps, jnp.int32)))
    found = jax.jit(nested)(jnp.asarray(starts, jnp.int32))
    np.testing.assert_array_equal(found["rounds"], [[by_hand(int(n), int(s))[0] for s in steps] for n in starts])


def test_a_batch_without_entries_gives_none():
    assert jax.vmap(collatz)(jnp.zeros(0, jnp.int32))["rounds"].shape == (0,)


def test_a_fit_does_not_depend_on_its_company():
    with jax.enable_x64(True):
        t = jnp.linspace(0.0, 3.0, 100)
        rng = np.random.default_rng(0)
        truth = rng.uniform(0.5, 3.0, (1100, 2))
        data = jnp.asarray(truth[:, :1] * np.exp(-truth[:, 1:] * np.asarray(t)))
        truth = jnp.asarray(truth)

        def fit(y):
            found = gnl.least_squares(lambda p: p[0] * jnp.exp(-p[1] * t) - y, jnp.ones(2))
            return found.params, found.status

        params, status = jax.jit(jax.vmap(fit))(data)
        assert np.all(np.asarray(status) > 0)
        np.testing.assert_allclose(params, truth, rtol=1e-7)
        for place in (0, 550, 1099):
            alone = jax.jit(fit)(data[place])[0]
            np.testing.assert_allclose(params[place], alone, rtol=jnp.finfo(jnp.float64).eps ** 0.5)
        # Each data set's amplitude answers for itself alone.
        slope = jax.jit(jax.vmap(jax.grad(lambda y: fit(y)[0][0])))(data)
        moved = jax.vmap(lambda g, y: jnp.vdot(g, y))(slope, data)
        np.testing.assert_allclose(moved, truth[:, 0], rtol=1e-6)


def test_one_of_is_a_switch():
    branches = [lambda x, y: {"a": x + y["b"]}, lambda x, y: {"a": x * y["b"]}]
    x, y = jnp.arange(6.0), {"b": jnp.float64(3.0)}
    for index in ([0] * 6, [1] * 6, [0, 1, 1, 0, 1, 0]):
        expected = np.where(np.array(index) == 0, np.arange(6) + 3, np.arange(6) * 3)
        found = jax.jit(jax.vmap(lambda i, x: one_of(i, branches, x, y)))(jnp.asarray(index), x)
        np.testing.assert_array_equal(found["a"], expected)
        alone = [one_of(jnp.asarray(i), branches, value, y)["a"] for i, value in zip(index, x, strict=True)]
        np.testing.assert_array_equal(alone, expected)
    same = jax.vmap(lambda x: one_of(jnp.int32(1), branches, x, y))(x)
    np.testing.assert_array_equal(same["a"], np.arange(6) * 3)
    np.testing.assert_array_equal(one_of(jnp.int32(5), branches[:1], x, y)["a"], np.arange(6) + 3)
