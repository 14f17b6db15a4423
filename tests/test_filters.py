"""Every filter against its formula in 120 digits, and the identities between filters.

Each tolerance is a multiple of eps times the condition of the formula, derived next to the formula in ``Exact``.
"""

import dataclasses
import decimal
from decimal import Decimal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

import gn_linear as gnl
from gn_linear.filters import Filter, GradientDescent, GradientFlow, MinimumNorm, Proximal, Tikhonov
from tests.support import assert_bit_equal, assert_close, tolerance

DTYPES = [np.float32, np.float64]
SINGLE, DOUBLE = DTYPES

apply = jax.jit(lambda phi, eigenvalues: phi(eigenvalues))
stable = jax.jit(lambda phi, eigenvalues: phi.stable(eigenvalues))
stable_each = jax.jit(lambda phi, eigenvalues: jax.vmap(phi.stable)(eigenvalues))
at_damping = jax.jit(lambda phi, damping: phi.at_damping(damping))


@jax.jit
def slopes(phi, eigenvalues):
    """The derivatives by the numbers of a filter and by the eigenvalue, at each eigenvalue."""
    phi = jax.tree.map(lambda value: jnp.asarray(value, eigenvalues.dtype), phi)
    return jax.vmap(jax.grad(lambda phi, value: phi(value), argnums=(0, 1)), in_axes=(None, 0))(phi, eigenvalues)


@pytest.fixture(autouse=True)
def digits():
    """120 digits: 1 - (1 - z)**K keeps over 70 of them down to z = 1e-48. Exponents as large as K log z needs."""
    with decimal.localcontext(prec=120, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN):
        yield


# --- the formulas, and how much of a rounding error they pass on ------------------------------------------------------


class Exact(NamedTuple):
    """A value, and a bound on the error of computing it in a dtype."""

    value: Decimal
    error: Decimal


def number(x):
    """A float or an integer as it is, without rounding."""
    return Decimal(x) if isinstance(x, int) else Decimal(float(x))


def exp_minus(x):
    """exp(-x), 0 where it has no digit beside 1."""
    return Decimal(0) if x > 10_000 else (-x).exp()


def tikhonov(eigenvalue, damping, dtype):
    """A sum and a quotient of positive numbers: condition 1."""
    value = 1 / (eigenvalue + damping)
    return Exact(value, value * number(tolerance(dtype)))


def flow(eigenvalue, time, dtype):
    """1 - exp(-x) has the condition x / (exp(x) - 1) in x, and x = t lambda the condition 1 in both: at most 1."""
    value = (1 - exp_minus(time * eigenvalue)) / eigenvalue if eigenvalue else time
    return Exact(value, value * number(tolerance(dtype)))


def proximal(eigenvalue, size, steps, dtype):
    """As for flow, with x = m log(1 + z), where the logarithm has a condition of at most 1 as well."""
    value = (1 - (1 + size * eigenvalue) ** -steps) / eigenvalue if eigenvalue else size * steps
    return Exact(value, value * number(tolerance(dtype)))


def descent(eigenvalue, rate, steps, dtype):
    r"""Condition 1 up to z = eta lambda = 1; beyond, the error of the power (z - 1)**K beside 1.

    Up to 1, the condition in z is K z (1 - z)^(K - 1) / (1 - (1 - z)^K), at most 1 since the denominator is
    z sum_{j < K} (1 - z)^j; that in K is x / (exp(x) - 1) with x = -K log(1 - z), at most 1 too.

    Beyond 1, w = z - 1 has the absolute error eps z of the product (none where product and difference are exact, as
    with powers of two), which moves w^K within (w -+ eps z)^K: to first order by the condition K z / (z - 1). The power
    itself is exp(K log w): the rounding of K and of the logarithm is magnified by |K log w|. Where 1 and the power
    cancel, the error stays absolute.
    """
    eps = number(tolerance(dtype))
    if not eigenvalue or not steps:
        return Exact(rate * steps, rate * steps * eps)
    z = rate * eigenvalue
    if z <= 1:
        value = (1 - (1 - z) ** steps) / eigenvalue
        return Exact(value, value * eps)
    w = z - 1
    rounded = dtype(rate) * dtype(eigenvalue) - dtype(1)
    shift = 0 if number(rounded) == w else eps * z
    cap = number(float(jnp.finfo(dtype).max)).sqrt()  # what the filter documents: capped, so that it stays finite
    low, power, high = (min(max(base, 0) ** steps, cap) for base in (w - shift, w, w + shift))
    magnified = abs(power.ln()) if power else 0
    error = max(high - power, power - low) + eps * ((1 + magnified) * power + 1)
    sign = -1 if steps % 2 else 1
    return Exact((1 - sign * power) / eigenvalue, error / eigenvalue)


FORMULAS = {Tikhonov: tikhonov, GradientDescent: descent, GradientFlow: flow, Proximal: proximal}


def exact(phi, eigenvalue, dtype):
    """The formula of a filter at an eigenvalue of this dtype, negative ones counted as 0."""
    numbers = [number(value if isinstance(value, int) else dtype(value)) for value in dataclasses.astuple(phi)]
    if isinstance(phi, (GradientDescent, Proximal)):
        numbers[1] = int(numbers[1])
    return FORMULAS[type(phi)](max(number(eigenvalue), Decimal(0)), *numbers, dtype)


def assert_exact(phi, eigenvalues, values):
    """The values of a filter against its formula."""
    eigenvalues, values = np.asarray(eigenvalues), np.asarray(values)
    assert values.dtype == eigenvalues.dtype
    assert values.shape == eigenvalues.shape
    assert np.all(np.isfinite(values)), f"{phi} is not finite at {eigenvalues[~np.isfinite(values)]}"
    for eigenvalue, value in zip(eigenvalues.ravel(), values.ravel(), strict=True):
        truth = exact(phi, eigenvalue, eigenvalues.dtype.type)
        error = abs(number(value) - truth.value)
        assert error <= truth.error, (
            f"{phi} at {eigenvalue}: {value} for {truth.value:.17e}, error {error:.2e} > bound {truth.error:.2e}"
        )


# --- the material -----------------------------------------------------------------------------------------------------

GRID = [0.0, *np.logspace(-30, 6, 37)]
NEAR = [1e-3, 0.1, 0.5, 0.9, 1.0, 1.1, 1.5, 1.9, 2.0, 2.1, 2.5, 3.0, 10.0]


def eigenvalues_for(rate, dtype):
    """The grid, and eigenvalues at which rate times eigenvalue is around, at and one rounding beside 0, 1 and 2."""
    around = np.asarray(NEAR, dtype) / dtype(rate)
    beside = [np.nextafter(dtype(z) / dtype(rate), dtype(side)) for z in (1, 2) for side in (0, np.inf)]
    return np.concatenate([np.asarray(GRID, dtype), around, np.asarray(beside, dtype)])


def decades(low, high):
    """Numbers spread over decades, the same in float32 and float64."""
    return st.floats(low, high).map(lambda exponent: float(np.float32(10**exponent)))


def powers_of_two(low, high):
    """Rates that multiply without rounding."""
    return st.integers(low, high).map(lambda exponent: 2.0**exponent)


STEPS = st.one_of(
    st.sampled_from([0, 1, 2, 7, 8, 10**8 - 1, 10**8, 2**24 + 1]), st.integers(0, 300), st.integers(0, 10**8)
)
RATES = st.one_of(powers_of_two(-20, 10), decades(-6, 3))
TIMES = st.one_of(st.just(0.0), decades(-12, 12))
FILTERS = {
    Tikhonov: st.builds(Tikhonov, decades(-12, 12)),
    GradientDescent: st.builds(GradientDescent, RATES, STEPS),
    GradientFlow: st.builds(GradientFlow, TIMES),
    Proximal: st.builds(Proximal, decades(-12, 6), STEPS.filter(bool)),
}
SAMPLES = [Tikhonov(0.25), GradientDescent(0.5, 7), GradientFlow(3.0), Proximal(0.5, 4), MinimumNorm(1e-3)]
DAMPED = SAMPLES[:4]

by_kind = pytest.mark.parametrize("kind", FILTERS, ids=lambda kind: kind.__name__)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
each = pytest.mark.parametrize("phi", SAMPLES, ids=lambda phi: type(phi).__name__)
each_damped = pytest.mark.parametrize("phi", DAMPED, ids=lambda phi: type(phi).__name__)


# --- values -----------------------------------------------------------------------------------------------------------


@by_dtype
@by_kind
@settings(max_examples=100, deadline=None)
@given(data=st.data(), shrink=st.floats(0.1, 1.0))
def test_formula(kind, dtype, data, shrink):
    phi = data.draw(FILTERS[kind])
    eigenvalues = eigenvalues_for(getattr(phi, "learning_rate", 1.0), dtype)
    eigenvalues[: len(GRID)] *= dtype(shrink)
    assert_exact(phi, eigenvalues, apply(phi, jnp.asarray(eigenvalues)))


@by_dtype
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 255, 10**6 + 1, 2**24 + 1, 10**8])
def test_descent_at_every_kind_of_rate(steps, dtype):
    """Compiled or not; with a power of two nothing is rounded before the power, so that the bounds are the tightest."""
    for rate in (0.5, 0.1):
        phi, eigenvalues = GradientDescent(rate, steps), eigenvalues_for(rate, dtype)
        for values in (phi(jnp.asarray(eigenvalues)), apply(phi, jnp.asarray(eigenvalues))):
            assert_exact(phi, eigenvalues, values)


@by_dtype
def test_parity_of_more_steps_than_the_dtype_counts(dtype):
    """At eta lambda = 2 the formula is 0 for even and 2 / lambda for odd numbers of steps."""
    two = jnp.asarray([2.0], dtype)
    for steps in (10, 2**24, 2**30):
        assert float(apply(GradientDescent(1.0, steps), two)[0]) == 0.0
        assert float(apply(GradientDescent(1.0, steps + 1), two)[0]) == 1.0
    assert float(GradientDescent(1.0, 257)(two.astype(jnp.bfloat16))[0]) == 1.0


@by_dtype
@settings(max_examples=30, deadline=None)
@given(rate=st.one_of(powers_of_two(-6, 2), decades(-2, 1)), steps=st.integers(0, 200))
def test_descent_is_its_recursion(dtype, rate, steps):
    """K literal steps on the quadratics lambda d^2 / 2 + d, without rounding errors to speak of."""
    eigenvalues = eigenvalues_for(rate, dtype)
    step_size = number(dtype(rate))
    for eigenvalue, value in zip(eigenvalues, apply(GradientDescent(rate, steps), eigenvalues), strict=True):
        d = Decimal(0)
        for _ in range(steps):
            d -= step_size * (number(eigenvalue) * d + 1)
        truth = descent(number(eigenvalue), step_size, steps, dtype)
        if step_size * number(eigenvalue) <= 2:
            assert abs(number(value) + d) <= truth.error
        cap = number(float(jnp.finfo(dtype).max)).sqrt()
        if abs(number(eigenvalue) * d) < cap:
            assert abs(truth.value + d) <= Decimal("1e-60") * max(1, abs(d))


@by_dtype
@settings(max_examples=50, deadline=None)
@given(size=decades(-12, 6))
def test_one_proximal_step_is_damping(dtype, size):
    eigenvalues = jnp.asarray(GRID, dtype)
    one, damped = apply(Proximal(size, 1), eigenvalues), apply(Tikhonov(1 / size), eigenvalues)
    assert np.all(np.abs(one - damped) <= 2 * tolerance(dtype) * damped)


@pytest.mark.parametrize("small_steps", [GradientDescent, Proximal])
def test_many_small_steps_are_gradient_flow(small_steps):
    r"""log(1 -+ x/m) = -+x/m - x^2 / 2m^2 -+ ...: both differ from exp(-x) by x^2 exp(-x) / 2m, at most 2 exp(-2) / m.

    The next term is (x^4/8 -+ x^3/3) exp(-x) / m^2, at most 1.1 / m^2; twice that leaves room for the rest.
    """
    time, x = 3.0, jnp.linspace(0.0, 30.0, 3001)
    for m in (100, 200, 400):
        gap = x / time * (apply(GradientFlow(time), x / time) - apply(small_steps(time / m, m), x / time))
        assert abs(m * float(jnp.max(jnp.abs(gap))) - 2 * np.exp(-2)) <= 2.2 / m


def response(phi, eigenvalues):
    """lambda phi(lambda), the share of each component that is fitted."""
    return np.asarray(eigenvalues) * np.asarray(apply(phi, eigenvalues))


@by_dtype
@by_kind
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_response_is_a_share(kind, dtype, data):
    """In [0, 1]; gradient steps overshoot where 1 < eta lambda, by (eta lambda - 1)**K, at most 1 while stable."""
    phi = data.draw(FILTERS[kind])
    eigenvalues = eigenvalues_for(getattr(phi, "learning_rate", 1.0), dtype)
    kept = np.asarray(stable_each(phi, eigenvalues))
    share = response(phi, eigenvalues)[kept]
    z = (dtype(getattr(phi, "learning_rate", 0.0)) * eigenvalues)[kept]
    assert np.all(share >= -tolerance(dtype))
    assert np.all(share <= (1 + (z > 1)) * (1 + tolerance(dtype)))


@by_dtype
@by_kind
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_more_time_and_less_damping_fit_more(kind, dtype, data):
    """Monotone up to rounding, gradient steps as long as eta lambda <= 1."""
    phi = data.draw(FILTERS[kind])
    factor = data.draw(st.integers(1, 100))
    field = dataclasses.fields(phi)[-1].name
    more = dataclasses.replace(phi, **{field: getattr(phi, field) * factor})
    eigenvalues = np.asarray(GRID, dtype)
    kept = eigenvalues * dtype(getattr(phi, "learning_rate", 0.0)) <= 1
    less, more = (response(one, eigenvalues)[kept] for one in ((more, phi) if kind is Tikhonov else (phi, more)))
    assert np.all(less <= more * (1 + 2 * tolerance(dtype)))


@pytest.mark.parametrize("damping", [1e-6, 0.37, 1e3])
def test_greatest_difference_of_flow_and_damping(damping):
    def difference(x):
        eigenvalue = jnp.asarray([x * damping])
        return float((response(GradientFlow(1 / damping), eigenvalue) - response(Tikhonov(damping), eigenvalue))[0])

    grid = [difference(x) for x in np.logspace(-4, 4, 200)]
    assert min(grid) >= -tolerance(DOUBLE)
    found = scipy.optimize.minimize_scalar(lambda x: -difference(x), bounds=(1.0, 10.0), options={"xatol": 1e-9})
    assert -found.fun >= max(grid)
    assert round(-found.fun, 4) == 0.2036
    assert round(found.x, 3) == 2.513


@pytest.mark.parametrize(("steps", "published"), [(1, 0.50), (2, 0.35), (5, 0.26), (10, 0.23), (100, 0.21)])
def test_greatest_difference_of_steps_and_damping(steps, published):
    rate = 0.25
    eigenvalues = jnp.linspace(0.0, 1 / rate, 100_001)
    descent_of = response(GradientDescent(rate, steps), eigenvalues)
    difference = descent_of - response(Tikhonov(1 / (rate * steps)), eigenvalues)
    assert round(float(jnp.max(jnp.abs(difference))), 2) == published


def test_minimum_norm():
    eigenvalues = jnp.asarray([[4.0, 5e-3, 4e-3, 0.0, -1.0], [1e-30, 1e-29, 0.0, 1e-33, -1e-9]])
    assert_close(apply(MinimumNorm(1e-3), eigenvalues)[0], [0.25, 200.0, 0.0, 0.0, 0.0])
    assert_close(apply(MinimumNorm(1e-3), eigenvalues)[1], [1e30, 1e29, 0.0, 0.0, 0.0])
    assert_close(apply(MinimumNorm(0.0), eigenvalues)[1], [1e30, 1e29, 0.0, 1e33, 0.0])
    assert_close(apply(MinimumNorm(), jnp.asarray(4.0)), 0.25)
    assert_close(apply(MinimumNorm(), jnp.zeros(3)), np.zeros(3), scale=0.0)


@by_dtype
def test_minimum_norm_is_the_limit_of_all_others(dtype):
    """At damping 0 every filter is 1/lambda on the range, as far as the range reaches in the grid."""
    eigenvalues = jnp.asarray(GRID[1:], dtype)
    for phi in (Tikhonov(), GradientDescent(2.0**-20, 1), GradientFlow(1.0), Proximal(1.0, 1), Proximal(1.0, 3)):
        limit = at_damping(phi, dtype(0))
        assert_close(response(limit, eigenvalues), np.ones(len(eigenvalues)), size=1)
    assert_close(response(MinimumNorm(0.0), eigenvalues), np.ones(len(eigenvalues)), size=1)


# --- damping ----------------------------------------------------------------------------------------------------------


@by_kind
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_value_at_zero_is_the_inverse_of_the_damping(kind, data):
    phi = data.draw(FILTERS[kind])
    damping = phi.equivalent_damping()
    assert damping.dtype == jnp.result_type(float)
    assert damping.shape == ()
    assert_close(apply(phi, jnp.zeros([])), 1 / damping)
    with jax.enable_x64(False):
        assert phi.equivalent_damping().dtype == np.float32


def test_undamped_filters_have_no_damping():
    assert float(MinimumNorm().equivalent_damping()) == 0.0
    assert float(Tikhonov().equivalent_damping()) == 0.0
    assert float(Tikhonov()(jnp.zeros([]))) == 0.0
    assert np.isinf(GradientDescent(0.1, 0).equivalent_damping())
    assert np.isinf(GradientFlow(0.0).equivalent_damping())
    assert not MinimumNorm.adaptable
    assert all(phi.adaptable for phi in DAMPED)
    with pytest.raises(TypeError, match=r"^filter: MinimumNorm has no damping"):
        MinimumNorm().at_damping(jnp.ones([]))


@by_dtype
@by_kind
@settings(max_examples=50, deadline=None)
@given(data=st.data(), damping=decades(-12, 12))
def test_damping_can_be_set(kind, dtype, data, damping):
    phi = data.draw(FILTERS[kind])
    adapted = at_damping(phi, dtype(damping))
    assert type(adapted) is kind
    reached = adapted.equivalent_damping()
    if kind is GradientDescent:
        assert float(adapted.learning_rate) == phi.learning_rate
        steps, wanted = float(adapted.steps), 1 / (phi.learning_rate * damping)
        assert steps == round(steps) >= 1
        assert abs(steps - max(wanted, 1.0)) <= 0.5 + tolerance(dtype) * wanted
        assert_close(reached, 1 / (phi.learning_rate * steps))
    else:
        assert_close(reached, damping, dtype=dtype)
    if kind is Proximal:
        assert int(adapted.steps) == phi.steps


@by_dtype
@each_damped
def test_zero_damping_is_finite(phi, dtype):
    limit = at_damping(phi, dtype(0))
    eigenvalues = jnp.asarray([-1e-9, *GRID], dtype)
    assert np.all(np.isfinite(apply(limit, eigenvalues)))
    if isinstance(phi, GradientFlow):  # the derivatives by the other numbers overflow, like 1 / mu^2
        assert np.all(np.isfinite(slopes(limit, eigenvalues)[0].time))


# --- what is not a positive eigenvalue --------------------------------------------------------------------------------


@by_dtype
def test_stable_up_to_two(dtype):
    for rate in (1.0, 0.5, 0.1, 3.0):
        phi, edge = GradientDescent(rate, 3), dtype(2) / dtype(rate)
        beyond = edge
        while dtype(rate) * beyond <= 2:
            beyond = np.nextafter(beyond, dtype(np.inf))
        within = beyond
        while dtype(rate) * within > 2:
            within = np.nextafter(within, dtype(0))
        assert bool(stable(phi, jnp.asarray([0.0, -1.0, within], dtype)))
        assert not bool(stable(phi, jnp.asarray([0.0, beyond, 1.0], dtype)))
    assert bool(stable(GradientDescent(0.5, 3), jnp.asarray([4.0], dtype)))
    assert not bool(stable(GradientDescent(0.5, 3), jnp.asarray([1.0, np.nan], dtype)))


@each
def test_stability_is_a_flag(phi):
    flag = phi.stable(jnp.ones(3))
    assert (flag.shape, flag.dtype) == ((), np.bool_)
    assert bool(flag)
    assert bool(stable(phi, jnp.full(3, 1e6))) == (type(phi) is not GradientDescent)


@by_dtype
@settings(max_examples=50, deadline=None)
@given(rate=RATES, steps=STEPS)
def test_unstable_steps_stay_finite(dtype, rate, steps):
    eigenvalues = np.asarray([2.0, 2.0 + 1e-6, 2.5, 10.0, 1e6], dtype) / dtype(rate)
    assert np.all(np.isfinite(apply(GradientDescent(rate, steps), eigenvalues)))


@by_dtype
@each
def test_negative_eigenvalues_count_as_zero(phi, dtype):
    eigenvalues = jnp.asarray([-1e-9, 1.0, -1e-30, -1e6, -0.0], dtype)
    assert_bit_equal(apply(phi, eigenvalues), apply(phi, jnp.asarray([0.0, 1.0, 0.0, 0.0, 0.0], dtype)))


@by_dtype
@each
def test_nan_stays_where_it_is_and_infinity_is_never_fitted(phi, dtype):
    """No filter turns NaN into a number; beside an infinite eigenvalue, all others are negligible for MinimumNorm."""
    eigenvalues = jnp.asarray([1.0, np.nan, 0.25], dtype)
    values = np.asarray(apply(phi, eigenvalues))
    expected = np.asarray(apply(phi, jnp.asarray([1.0, 0.5, 0.25], dtype)))
    assert np.isnan(values[1])
    assert_bit_equal(values[::2], expected[::2])
    values = np.asarray(apply(phi, jnp.asarray([np.inf, 0.5, 0.25], dtype)))
    assert values[0] == 0.0
    assert_bit_equal(values[1:], expected[1:] * dtype(not isinstance(phi, MinimumNorm)))


@by_dtype
@each
def test_subnormal_eigenvalues(phi, dtype):
    tiny = np.finfo(dtype).tiny
    for family in (phi, Tikhonov(0.0), MinimumNorm(0.0)):
        assert np.all(np.isfinite(apply(family, jnp.asarray([tiny, tiny / 8, tiny / 1024], dtype))))


# --- pytrees, dtypes, gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
@each
def test_dtype_and_shape_are_kept(phi, dtype):
    with jax.numpy_dtype_promotion("strict"):
        for shape in [(), (0,), (2, 3)]:
            eigenvalues = jnp.full(shape, 0.5, dtype)
            values = apply(phi, eigenvalues)
            assert (values.dtype, values.shape) == (dtype, shape)
            assert_close(values, apply(phi, jnp.full(shape, 0.5, np.float64)), dtype=dtype, size=1)
            assert stable(phi, eigenvalues).dtype == np.bool_
        if phi.adaptable and jnp.finfo(dtype).bits >= 32:
            assert_close(at_damping(phi, jnp.asarray(2.0**-7, dtype)).equivalent_damping(), 2.0**-7, dtype=dtype)


@each
def test_numbers_are_leaves(phi):
    numbers = [getattr(phi, field.name) for field in dataclasses.fields(phi)]
    assert jax.tree.leaves(phi) == numbers
    assert jax.tree.map(lambda value: value, phi) == phi
    assert hash(phi) == hash(dataclasses.replace(phi))
    other = dataclasses.replace(phi, **{dataclasses.fields(phi)[0].name: 0.125})
    assert other != phi
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(phi, dataclasses.fields(phi)[0].name, 1.0)


def test_filters_of_a_kind_compare_by_value():
    assert Tikhonov(0.1) == Tikhonov(0.1) != Tikhonov(0.2)
    assert Tikhonov(0.1) != GradientFlow(0.1)
    assert len(set(SAMPLES)) == len(SAMPLES)


def test_another_value_compiles_nothing():
    traces = []

    @jax.jit
    def evaluate(phi, eigenvalues):
        traces.append(None)
        return phi(eigenvalues)

    for phi in (GradientDescent(0.1, 3), GradientDescent(0.2, 10**8)):
        evaluate(phi, jnp.ones(3))
    assert len(traces) == 1


def test_batches_of_filters():
    rates, steps, eigenvalues = jnp.asarray([0.1, 0.5, 1.0]), jnp.asarray([1, 2, 3]), jnp.asarray([0.0, 0.5, 1.5])
    over_rates = jax.vmap(lambda rate: GradientDescent(rate, 5)(eigenvalues))(rates)
    assert_close(over_rates, [apply(GradientDescent(float(rate), 5), eigenvalues) for rate in rates])
    batch = jax.vmap(GradientDescent)(rates, steps)
    over_both = jax.jit(jax.vmap(lambda phi: phi(eigenvalues)))(batch)
    pairs = zip(rates.tolist(), steps.tolist(), strict=True)
    singles = [apply(GradientDescent(*pair), eigenvalues) for pair in pairs]
    assert_close(over_both, singles)
    dampings = jax.vmap(lambda damping: GradientFlow(1.0).at_damping(damping).equivalent_damping())(rates)
    assert_close(dampings, rates)


@by_dtype
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 10**8])
def test_gradients_of_steps_are_finite(steps, dtype):
    """At 0, 1 and 2, beside them, and where the powers are capped; without a step too."""
    eigenvalues = jnp.asarray(eigenvalues_for(1.0, dtype))
    families = [GradientDescent(1.0, steps)] + ([Proximal(1.0, steps)] if steps else [])
    for phi in families:
        for leaf in jax.tree.leaves(slopes(phi, eigenvalues)):
            assert leaf.dtype == dtype
            assert np.all(np.isfinite(leaf)), f"{phi}: {eigenvalues[~np.isfinite(leaf)]}"


@by_dtype
@pytest.mark.parametrize("phi", [GradientFlow(0.0), GradientFlow(1.0), GradientFlow(1e12), Tikhonov(1e-3)], ids=repr)
def test_gradients_are_finite(phi, dtype):
    for leaf in jax.tree.leaves(slopes(phi, jnp.asarray(GRID, dtype))):
        assert np.all(np.isfinite(leaf))


@by_dtype
@pytest.mark.parametrize("phi", [Tikhonov(0.0), MinimumNorm(0.0)], ids=repr)
def test_gradients_without_damping_are_finite(phi, dtype):
    """As far as 1 / lambda^2 is."""
    for leaf in jax.tree.leaves(slopes(phi, jnp.asarray([0.0, 1e-10, 1.0], dtype))):
        assert np.all(np.isfinite(leaf))


@by_dtype
def test_gradients_by_the_numbers(dtype):
    """The derivative of each closed form.

    JAX differentiates expm1(-x) to expm1(-x) + 1, that is exp(-x) with an absolute error of eps; the derivative of x
    by the number multiplies it.
    """
    eps = tolerance(dtype)
    eigenvalues = jnp.asarray([0.0, 1e-30, 1e-6, 1e-3, 0.1, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0], dtype)
    x = np.asarray(eigenvalues, np.float64)
    by_time = slopes(GradientFlow(3.0), eigenvalues)[0].time
    assert np.all(np.abs(by_time - np.exp(-3 * x)) <= eps)
    by_damping = slopes(Tikhonov(0.5), eigenvalues)[0].damping
    assert np.all(np.abs(by_damping + (x + 0.5) ** -2) <= 2 * eps * (x + 0.5) ** -2)
    for steps in (1, 2, 3, 10):
        by_size = slopes(Proximal(1.0, steps), eigenvalues)[0].step_size
        assert np.all(np.abs(by_size - steps * (1 + x) ** -(steps + 1)) <= eps * steps / (1 + x))
        by_rate = slopes(GradientDescent(1.0, steps), eigenvalues)[0].learning_rate
        truth, power = steps * (1 - x) ** (steps - 1), np.abs(1 - x) ** steps
        # Beyond 1 it is the sum of the derivatives of the quotient and of the power, whose condition is K.
        scale = np.where(x < 1, steps / np.where(x < 1, 1 - x, 1.0), 1 + power + steps * np.abs(truth))
        assert np.all(np.abs(by_rate - truth) <= eps * scale)


def test_slopes_by_the_eigenvalue_at_zero():
    """From the right: phi(lambda) = phi(0) (1 - c lambda / 2 + ...)."""
    zero = jnp.zeros(1)
    for phi, expected in [
        (Tikhonov(0.5), -4.0),
        (GradientFlow(3.0), -9.0 / 2),
        (GradientDescent(0.5, 7), -0.25 * 7 * 6 / 2),
        (GradientDescent(0.5, 1), 0.0),
        (Proximal(0.5, 4), -0.25 * 4 * 5 / 2),
    ]:
        assert_close(slopes(phi, zero)[1], [expected], scale=10.0)


# --- arguments --------------------------------------------------------------------------------------------------------

FIELDS = [(phi, field.name) for phi in SAMPLES for field in dataclasses.fields(phi)]
POSITIVE = {(GradientDescent, "learning_rate"), (Proximal, "step_size"), (Proximal, "steps")}
by_field = pytest.mark.parametrize(("phi", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", str(value)))


@by_field
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), -1, jnp.float64(-0.5)])
def test_numbers_out_of_range(phi, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a"):
        dataclasses.replace(phi, **{name: value})


@by_field
@pytest.mark.parametrize("value", ["0.1", True, None, jnp.ones(2), [1.0]])
def test_no_numbers(phi, name, value):
    with pytest.raises(TypeError, match=f"^{name} must be a"):
        dataclasses.replace(phi, **{name: value})


@by_field
def test_zero_where_it_has_a_meaning(phi, name):
    if (type(phi), name) in POSITIVE:
        with pytest.raises(ValueError, match=f"^{name} must be a positive finite number, but is 0"):
            dataclasses.replace(phi, **{name: 0})
    else:
        assert getattr(dataclasses.replace(phi, **{name: 0}), name) == 0


@pytest.mark.parametrize("value", [2.5, 0.5, jnp.float32(1.5)])
@pytest.mark.parametrize("kind", [GradientDescent, Proximal])
def test_steps_are_whole(kind, value):
    with pytest.raises(ValueError, match=r"^steps must be a whole number, but is \d\.5"):
        kind(0.1, value)
    assert kind(0.1, 3.0) == kind(0.1, 3)


def test_more_steps_than_an_integer_holds():
    """A float that holds a whole number, beyond the integers of single precision."""
    with jax.enable_x64(False):
        eigenvalues = jnp.asarray([0.0, 1e-13, 1.0, 2.0], jnp.float32)
        for steps in (2.0**40, 2**40):
            assert_exact(GradientDescent(1.0, 2**40), eigenvalues, GradientDescent(1.0, steps)(eigenvalues))
        assert_exact(GradientDescent(1.0, 2**40), eigenvalues, apply(GradientDescent(1.0, 2.0**40), eigenvalues))


def test_interface():
    for call in (
        lambda: Filter()(jnp.ones(1)),
        lambda: Filter().equivalent_damping(),
        lambda: Filter().at_damping(jnp.ones([])),
    ):
        with pytest.raises(NotImplementedError):
            call()
    assert gnl.filters.Tikhonov is Tikhonov
    assert {kind.__name__ for kind in Filter.__subclasses__()} == set(gnl.filters.__all__) - {"Filter"}
