"""Many filters from one basis: against dense matrix functions, literal loops and least squares, in both spaces.

Where a tolerance has a ``scale``, it is the bound of ``rounding``: a backward stable method applies the filter to a
matrix and a gradient that are off by their rounding errors.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import gn_linear as gnl
from gn_linear import _filtered_steps
from gn_linear.filters import GradientDescent, GradientFlow, MinimumNorm, Proximal, Tikhonov
from tests.support import (
    PROBLEMS,
    Dense,
    assert_bit_equal,
    assert_close,
    dense_jacobian,
    dense_loss,
    flat,
    narrowest,
    network,
    tolerance,
)

RANK = 32  # more than any space of the table holds
FAST = {"xla_backend_optimization_level": 0}  # of compilation; no test is long


def filters_for(largest, cut=1e-10):
    """One filter of every kind and two of some, for a largest eigenvalue; ``cut`` lies in a gap of the spectrum."""
    return [
        Tikhonov(1e-2 * largest),
        Tikhonov(1e-6 * largest),
        GradientDescent(0.5 / largest, 7),
        GradientDescent(1.9 / largest, 10**5),  # oscillates
        GradientFlow(1e2 / largest),
        Proximal(20 / largest, 5),
        MinimumNorm(cut),
    ]


# --- problems and oracles ---------------------------------------------------------------------------------------------


def leading(count):
    return lambda tree: jax.tree.map(lambda x: x[:count], tree)


def doubled(tree):
    return jax.tree.map(lambda x: jnp.concatenate([x, 0.5 * x + 0.1]), tree)


@functools.cache
def sized(name, space):
    """A problem of the table with its examples as they are, fewer or more, so that the basis lives where it is told."""
    problem = PROBLEMS[name]
    if space == "outputs" and not name.startswith("two_heads"):
        change = leading(1 if name == "affine" else 2)
    elif space == "parameters" and name.startswith("two_heads"):
        change = doubled
    else:
        return problem
    return problem._replace(inputs=change(problem.inputs), targets=change(problem.targets))


JACOBIANS = {}


@functools.cache
def dense(name, space):
    """The dense oracle; a Jacobian does not depend on the loss."""
    problem = sized(name, space)
    outputs = problem.predict(problem.params, problem.inputs)
    key = problem.predict.__name__, len(flat(outputs))
    if key not in JACOBIANS:
        JACOBIANS[key] = dense_jacobian(problem.predict, problem.params, problem.inputs)
    value, gradient, hessian = dense_loss(problem.formula, outputs, problem.targets)
    return Dense(flat(problem.params), flat(outputs), value, gradient, JACOBIANS[key], hessian)


def largest(oracle):
    return float(np.linalg.norm(oracle.ggn, 2))


def exact(filter_, oracle):
    """The step of a filter by the eigenvalues of the dense matrix, and the filter's largest value."""
    values, vectors = np.linalg.eigh(oracle.ggn)
    phi = np.asarray(filter_(jnp.asarray(np.maximum(values, 0.0))))
    step = -vectors @ (phi * (vectors.T @ oracle.gradient))
    return step, max(float(np.max(phi)), float(filter_(jnp.zeros([]))))


def rounding(oracle, step, peak):
    r"""What a rounding error of size 1 of the matrix and of the gradient makes of a step.

    The divided differences of every filter are below twice :math:`\max\varphi \cdot \varphi(\lambda)`, as those of
    damping are below once that.
    """
    gradient = np.linalg.norm(oracle.jacobian, 2) * np.linalg.norm(oracle.output_gradient)
    return peak * (gradient + largest(oracle) * np.linalg.norm(step))


def rows(steps):
    """The steps, raveled, one a row."""
    return jax.vmap(lambda step: ravel_pytree(step)[0])(steps)


def assert_filtered(steps, filters, oracle, dtype=None):
    """Every step is that of its filter."""
    dtype = narrowest(steps) if dtype is None else dtype
    for step, chosen in zip(rows(steps), filters, strict=True):
        want, peak = exact(chosen, oracle)
        assert_close(step, want, size=max(oracle.jacobian.shape), scale=rounding(oracle, want, peak), dtype=dtype)


class Compiled(NamedTuple):
    """A compiled call for any filters, parameters and batch, and the sizes of the bases that its traces built."""

    call: object
    sizes: list


def compiling(predict, loss=gnl.losses.squared_error, rank=RANK):
    sizes = []

    def call(filters, params, inputs, targets, rtol=None):
        def recorded(space, start, *rest):
            sizes.append(sum(leaf.size for leaf in jax.tree.leaves(start)))
            return original(space, start, *rest)

        original, rtol = _filtered_steps.krylov_basis, 0.0 if rtol is None else rtol
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_filtered_steps, "krylov_basis", recorded)
            return gnl.filtered_steps(predict, params, inputs, targets, filters, rank=rank, loss=loss, rtol=rtol)

    jitted = jax.jit(call, compiler_options=FAST)
    # Numbers of one type, so that other filters of the same kinds compile nothing.
    return Compiled(lambda filters, *batch: jitted(jax.tree.map(float, filters), *batch), sizes)


@functools.cache
def compiled(name, space):
    problem = sized(name, space)
    plain = name == "from_convex" and space == "outputs"  # as a function of outputs and targets, not wrapped
    return compiling(problem.predict, problem.loss.fn if plain else problem.loss)


def solve(name, space, filters):
    """The steps of seven filters of the kinds of ``filters_for``, compiled once."""
    problem = sized(name, space)
    return compiled(name, space).call(filters, problem.params, problem.inputs, problem.targets)


def solve_each(name, space, filters):
    """The steps of any filters, each from a call of its own beside six others."""
    steps = []
    for chosen in filters:
        seven = filters_for(1.0)
        index = next(k for k, other in enumerate(seven) if type(other) is type(chosen))
        seven[index] = chosen
        steps.append(np.asarray(rows(solve(name, space, seven)[0])[index]))
    return steps


# --- dense matrix functions -------------------------------------------------------------------------------------------

CASES = [(name, space) for name in PROBLEMS for space in ("outputs", "parameters")]
CASES = [case for case in CASES if case not in {("decay", "outputs"), ("two_heads_huber", "parameters")}]


@pytest.mark.parametrize(("name", "space"), CASES)
def test_steps_are_the_filters_of_the_dense_matrix(name, space):
    """Every filter, every loss, in the space that is the smaller one."""
    oracle = dense(name, space)
    filters = filters_for(largest(oracle))
    steps, info = solve(name, space, filters)
    assert_filtered(steps, filters, oracle)
    outputs, parameters = oracle.jacobian.shape
    assert (2 * outputs < parameters) == (space == "outputs")
    assert set(compiled(name, space).sizes) == {outputs if space == "outputs" else parameters}
    assert info.products <= min(outputs + 1, parameters)  # one may be rounding errors
    assert info.finite
    assert np.all(info.stable)
    assert (info.residual.shape, info.error_bound.shape, info.ritz_values.shape) == ((7,), (7,), (RANK,))
    assert jax.tree.structure(steps) == jax.tree.structure(sized(name, space).params)
    bound = tolerance(np.float64, outputs * parameters) * largest(oracle)
    values = np.linalg.eigvalsh(oracle.ggn)
    for ritz in np.asarray(info.ritz_values):  # the whole space is used, so each one is an eigenvalue
        assert np.min(np.abs(np.append(values, 0.0) - ritz)) <= bound


# --- the same steps from elsewhere ------------------------------------------------------------------------------------

NUMBERS = (1, 2, 5, 50, 200)


@functools.cache
def descended(name, space, rate):
    """Literal gradient descent on the squared error of the linearised model: how far it is after each step."""
    problem = sized(name, space)
    lin = gnl.linearised(problem.predict, problem.params)

    def step(params, _):
        grads = jax.grad(lambda p: problem.formula(lin(p, problem.inputs), problem.targets))(params)
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
        return params, params

    _, path = jax.jit(lambda p: jax.lax.scan(step, p, length=NUMBERS[-1]))(problem.params)
    return np.asarray(rows(path)) - flat(problem.params)


@pytest.mark.parametrize("relative_rate", [0.7, 1.5])
@pytest.mark.parametrize("space", ["outputs", "parameters"])
def test_gradient_steps_are_a_filter(space, relative_rate):
    oracle = dense("squared_error", space)
    rate = relative_rate / largest(oracle)
    filters = [GradientDescent(rate, number) for number in NUMBERS]
    steps = solve_each("squared_error", space, filters)
    path = descended("squared_error", space, rate)
    for number, step in zip(NUMBERS, steps, strict=True):
        # a step of the loop rounds the parameters, the outputs that the Jacobian maps back, and what it adds
        size = np.linalg.norm(oracle.params) + rounding(oracle, path[number - 1], rate)
        assert_close(step, path[number - 1], size=oracle.params.size * number, scale=size)


@pytest.mark.parametrize("steps", [3, 20])
def test_a_block_of_iterative_linearisation_is_a_filter(steps):
    problem, oracle = sized("squared_error", "parameters"), dense("squared_error", "parameters")
    rate = 0.5 / largest(oracle)
    optimiser = optax.chain(gnl.iterative_linearisation(problem.predict, problem.loss, period=steps), optax.sgd(rate))

    def step(carry, _):
        params, state = carry
        updates, state = optimiser.update(params, state, params, inputs=problem.inputs, targets=problem.targets)
        return (optax.apply_updates(params, updates), state), None

    start = problem.params, optimiser.init(problem.params)
    (end, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))(start)
    assert gnl.info(state).feature_updates == 1
    moved = flat(end) - oracle.params
    (filtered,) = solve_each("squared_error", "parameters", [GradientDescent(rate, steps)])
    size = np.linalg.norm(oracle.params) + rounding(oracle, moved, rate)
    assert_close(filtered, moved, size=oracle.params.size * steps, scale=size)


@pytest.mark.parametrize(
    ("name", "space"), [("squared_error", "outputs"), ("affine", "outputs"), ("affine", "parameters")]
)
def test_many_steps_are_the_minimum_norm_step(name, space):
    """More and fewer outputs than parameters; the parts that are left decay below rounding."""
    oracle = dense(name, space)
    values = np.linalg.eigvalsh(oracle.ggn)
    top = values[-1]
    bottom = np.min(values[values > 1e-10 * top])
    left = 40 / bottom  # exp(-40) < eps
    filters = [
        GradientDescent(1 / top, float(np.ceil(left * top))),
        GradientFlow(left),
        Proximal(left, 40),
        MinimumNorm(1e-10),
        GradientFlow(2 * left),
    ]
    n = jax.tree.leaves(sized(name, space).inputs)[0].shape[0]
    want = -np.linalg.lstsq(oracle.jacobian, n * oracle.output_gradient, rcond=1e-5)[0]
    for step in solve_each(name, space, filters):
        assert_close(step, want, size=max(oracle.jacobian.shape), scale=rounding(oracle, want, 2 * left))


@pytest.mark.parametrize("space", ["outputs", "parameters"])
def test_tikhonov_is_ridge_regression(space):
    """The normal equations with a multiple of the identity, and least squares with rows for the penalty below."""
    problem, oracle = sized("squared_error", space), dense("squared_error", space)
    n, size = problem.inputs.shape[0], oracle.params.size
    residual = n * oracle.output_gradient
    dampings = [share * largest(oracle) for share in (1e-4, 1e-2, 1.0, 10.0, 100.0)]
    steps = solve_each("squared_error", space, [Tikhonov(damping) for damping in dampings])
    for step, damping in zip(steps, dampings, strict=True):
        stacked = np.concatenate([oracle.jacobian, np.sqrt(damping * n) * np.eye(size)])
        want = -np.linalg.lstsq(stacked, np.concatenate([residual, np.zeros(size)]), rcond=None)[0]
        bound = rounding(oracle, want, 1 / damping)
        assert_close(step, want, size=len(stacked), scale=bound)
        ridge = -np.linalg.solve(oracle.jacobian.T @ oracle.jacobian + damping * n * np.eye(size), n * oracle.gradient)
        assert_close(step, ridge, size=len(stacked), scale=bound)


@pytest.mark.parametrize(("name", "space"), [("squared_error", "outputs"), ("softmax_soft", "parameters")])
def test_gradient_flow_is_the_matrix_exponential(name, space):
    r"""The flow :math:`\dot d = -(G d + g)` from 0, by the exponential of the bordered matrix."""
    oracle = dense(name, space)
    size = oracle.params.size
    times = [share / largest(oracle) for share in (0.01, 0.1, 1.0, 10.0, 1000.0)]
    steps = solve_each(name, space, [GradientFlow(time) for time in times])
    bordered = np.zeros([size + 1, size + 1])
    bordered[:size, :size], bordered[:size, size] = -oracle.ggn, -oracle.gradient
    for step, time in zip(steps, times, strict=True):
        want = scipy.linalg.expm(time * bordered)[:size, size]
        # the oracle squares a matrix of norm t |G| down to norm 1, and each squaring rounds
        squarings = 1 + max(0.0, np.log2(time * largest(oracle)))
        assert_close(step, want, size=size * squarings, scale=rounding(oracle, want, time))


@pytest.mark.parametrize(("name", "rank"), [("squared_error", 1), ("poisson", 2), ("squared_error", 5)])
def test_rank_of_k_is_exact_for_k_steps(name, rank):
    """K gradient steps stay in the Krylov space of dimension K; damping does not."""
    problem, oracle = sized(name, "parameters"), dense(name, "parameters")
    rate = 0.7 / largest(oracle)
    exactly = [GradientDescent(rate, number) for number in range(1, rank + 1)]
    other = Tikhonov(1e-3 * largest(oracle))
    steps, info = compiling(problem.predict, problem.loss, rank).call(
        [*exactly, other], problem.params, problem.inputs, problem.targets
    )
    assert int(info.products) == rank
    assert_filtered(jax.tree.map(lambda x: x[:-1], steps), exactly, oracle)
    want, _ = exact(other, oracle)
    error = np.linalg.norm(rows(steps)[-1] - want) / np.linalg.norm(want)
    assert error > 1e-3
    assert info.error_bound[-1] > error


# --- one basis for all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["outputs", "parameters"])
def test_filters_do_not_know_of_each_other(space):
    """The stack is each filter alone, in any order."""
    oracle = dense("softmax_soft", space)
    filters = filters_for(largest(oracle))
    steps, info = solve("softmax_soft", space, filters)
    wanted = [exact(chosen, oracle) for chosen in filters]
    scales = [rounding(oracle, *pair) for pair in wanted]
    order = [5, 2, 6]
    few, other = solve("softmax_soft", space, [filters[k] for k in order])
    for step, k in zip(rows(few), order, strict=True):
        assert_close(step, rows(steps)[k], scale=scales[k])
    assert_close(other.ritz_values, info.ritz_values, size=RANK)
    assert (other.residual.shape, int(other.products)) == ((3,), int(info.products))
    seven = [filters[k] for k in (1, 0, 3, 2, 4, 5, 6)]
    swapped, _ = solve("softmax_soft", space, seven)
    for k, other in ((0, 1), (2, 3), (4, 4)):
        assert_close(rows(swapped)[other], rows(steps)[k], scale=scales[k])
    if space == "outputs":
        alone, _ = solve("softmax_soft", space, filters[3:4])
        assert_close(rows(alone)[0], rows(steps)[3], scale=scales[3])


def test_filters_that_do_nothing():
    filters = filters_for(1.0)
    filters[2], filters[4] = GradientDescent(0.5, 0), GradientFlow(0.0)
    steps, info = solve("squared_error", "outputs", filters)
    for index in (2, 4):
        assert not np.any(rows(steps)[index])
        assert info.error_bound[index] == 0


# --- random spectra ---------------------------------------------------------------------------------------------------

linear = compiling(lambda p, x: x @ p, rank=12)
# examples, parameters of an output, outputs: the first three are solved in the outputs
SHAPES = [(1, 10, 1), (2, 10, 3), (4, 9, 3), (8, 10, 1), (8, 2, 3)]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**31),
    spread=st.floats(0.0, 6.0),
    share=st.floats(0.0, 1.0),
    decades=st.floats(-10.0, 2.0),
    size=st.floats(-20.0, 20.0),
)
def test_random_spectra(shape, seed, spread, share, decades, size):
    """Singular values over up to six decades, of any rank, and filters from next to no damping to little else."""
    (n, parameters, outputs), rng = shape, np.random.default_rng(seed)
    rank = 1 + round(share * (min(n, parameters) - 1))
    left, _ = np.linalg.qr(rng.normal(size=(n, rank)))
    right, _ = np.linalg.qr(rng.normal(size=(parameters, rank)))
    x = 10.0**size * left * 10.0 ** -rng.uniform(0.0, spread, rank) @ right.T
    params, y = rng.normal(size=(parameters, outputs)), rng.normal(size=(n, outputs))
    hessian = np.eye(n * outputs) / n
    oracle = Dense(params.ravel(), None, 0.0, ((x @ params - y) / n).ravel(), np.kron(x, np.eye(outputs)), hessian)
    top = largest(oracle)
    damping = 10.0**decades * top
    filters = [
        Tikhonov(damping),
        GradientDescent(1 / top, float(np.ceil(top / damping))),
        GradientDescent(1.9 / top, float(np.ceil(top / damping))),
        GradientFlow(1 / damping),
        Proximal(1 / (3 * damping), 3),
        MinimumNorm(0.1 * 10.0 ** (-2 * spread)),
    ]
    steps, info = linear.call(filters, params, x, y)
    assert_filtered(steps, filters, oracle)
    assert info.products <= min(12, parameters * outputs, n * outputs + 1)  # one may be rounding errors
    assert np.all(info.stable)


@pytest.mark.parametrize("noise", [1.0, 1e4, 1e8])
def test_examples_that_contradict_each_other(noise):
    """Twins with different targets: the output gradient lies mostly outside of the range of the Jacobian."""
    rng = np.random.default_rng(4)
    x = np.repeat(rng.normal(size=(2, 9)), 2, axis=0)
    params, y = rng.normal(size=(9, 3)), rng.normal(size=(2, 3)).repeat(2, axis=0)
    y += noise * np.asarray([1.0, -1.0, 1.0, -1.0])[:, None]
    residual = ((x @ params - y) / 4).ravel()
    oracle = Dense(params.ravel(), None, 0.0, residual, np.kron(x, np.eye(3)), np.eye(12) / 4)
    filters = filters_for(largest(oracle))
    del filters[1]
    steps, info = linear.call(filters, params, x, y)
    assert_filtered(steps, filters, oracle)
    assert info.products <= 6  # two distinct eigenvalues; the rest are rounding errors of the gradient
    assert np.max(info.ritz_values) <= (1 + 1e-6) * largest(oracle)
    assert np.all(info.stable)


# --- what info says ---------------------------------------------------------------------------------------------------


def smooth(n, parameters, spread, seed=0):
    """A linear problem whose singular values are spaced evenly over some decades."""
    rng = np.random.default_rng(seed)
    rank = min(n, parameters)
    left, _ = np.linalg.qr(rng.normal(size=(n, rank)))
    right, _ = np.linalg.qr(rng.normal(size=(parameters, rank)))
    x = left * np.geomspace(1.0, 10.0**-spread, rank) @ right.T
    params, y = rng.normal(size=parameters), rng.normal(size=n)
    return (params, x, y), Dense(params, x @ params, 0.0, (x @ params - y) / n, x, np.eye(n) / n)


shapes = pytest.mark.parametrize(("n", "parameters"), [(12, 40), (30, 24)])
RANKS = (3, 8)


@functools.cache
def ranked(rank):
    return compiling(lambda p, x: x @ p, rank=rank)


@shapes
@pytest.mark.parametrize("rank", RANKS)
def test_error_bounds_hold(rank, n, parameters):
    """For damping the residual is that of the system and the bound is one; for the others it is of the right size.

    Over these spectra the errors of the other filters are 1e-6 to 1 times what ``error_bound`` says.
    """
    for seed, spread in enumerate((0.3, 1.0, 2.0, 3.0)):
        batch, oracle = smooth(n, parameters, spread, seed)
        filters = filters_for(largest(oracle))
        steps, info = ranked(rank).call(filters, *batch)
        gradient = np.linalg.norm(oracle.gradient)
        for chosen, step, residual, bound in zip(filters, rows(steps), info.residual, info.error_bound, strict=True):
            want, peak = exact(chosen, oracle)
            size = np.linalg.norm(want)
            error, noise = np.linalg.norm(step - want) / size, rounding(oracle, want, peak) / size
            noise *= tolerance(np.float64, parameters)
            if isinstance(chosen, Tikhonov):
                of_system = oracle.ggn @ step + chosen.damping * step + oracle.gradient
                scale = rounding(oracle, step, 1.0) / gradient
                assert_close(residual, np.linalg.norm(of_system) / gradient, size=parameters, scale=scale)
                assert_close(bound, residual * gradient / (chosen.damping * np.linalg.norm(step)), scale=bound + noise)
                assert error <= bound + noise
            elif isinstance(chosen, MinimumNorm):
                assert np.isinf(bound)  # nothing bounds 1 / lambda
            else:
                assert error <= 10 * bound + noise


@shapes
def test_tolerance_stops_the_basis(n, parameters):
    """Fewer products the looser it is, and the steps are as good as asked."""
    batch, oracle = smooth(n, parameters, 3.0)
    top = largest(oracle)
    filters = [Tikhonov(0.1 * top), GradientDescent(1 / top, 10), GradientFlow(10 / top), Proximal(2 / top, 5)]
    run, products = ranked(40), []
    for rtol in (0.0, 1e-6, 1e-3):
        steps, info = run.call(filters, *batch, rtol)
        products.append(int(info.products))
        assert np.all(info.error_bound <= rtol) or rtol == 0
        for chosen, step in zip(filters, rows(steps), strict=True):
            want, peak = exact(chosen, oracle)
            noise = tolerance(np.float64, parameters) * rounding(oracle, want, peak)
            assert np.linalg.norm(step - want) <= 10 * rtol * np.linalg.norm(want) + noise
    assert products[0] > products[2]
    assert products == sorted(products, reverse=True)
    _, info = run.call([Tikhonov(1e-9 * top), *filters[1:]], *batch, 1e-3)
    assert int(info.products) > products[2]  # the hardest filter decides


@pytest.mark.parametrize("steps", [1, 10, 10**9])
def test_steps_that_diverge_are_finite(steps):
    batch, oracle = smooth(12, 40, 1.0)
    top = largest(oracle)
    for rate in (2.5, 100.0, 1e6):
        filters = filters_for(top)
        filters[2] = GradientDescent(rate / top, steps)
        found, info = ranked(8).call(filters, *batch)
        assert info.stable.tolist() == [True, True, False, True, True, True, True]
        assert np.all(np.isfinite(rows(found)))
        assert info.finite
        assert not np.any(np.isnan(info.residual))
        if steps == 1:  # one step is the gradient, whatever the rate
            want = -rate / top * oracle.gradient
            assert_close(rows(found)[2], want, size=40, scale=rounding(oracle, want, rate / top))


@shapes
def test_gradient_of_zero(n, parameters):
    (params, x, _), oracle = smooth(n, parameters, 1.0)
    steps, info = ranked(8).call(filters_for(largest(oracle)), params, x, x @ params)
    # the model's product rounds otherwise than numpy's
    if np.any(np.asarray(jnp.asarray(x) @ params) != x @ params):
        steps, info = ranked(8).call(filters_for(largest(oracle)), 0 * params, x, np.zeros(n))
    assert_bit_equal(np.abs(rows(steps)), np.zeros([7, parameters]))
    assert_bit_equal(info.error_bound, np.zeros(7))
    assert_bit_equal(info.residual, np.zeros(7))
    assert int(info.products) == 0
    assert info.finite


@shapes
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["params", "inputs", "targets"])
def test_a_gradient_that_is_not_finite_is_told(where, value, n, parameters):
    batch, oracle = smooth(n, parameters, 1.0)
    batch = dict(zip(("params", "inputs", "targets"), batch, strict=True))
    batch[where] = batch[where].copy()
    batch[where][0] = value
    steps, info = ranked(8).call(filters_for(largest(oracle)), *batch.values())
    assert not info.finite
    assert int(info.products) == 0
    assert not np.any(info.error_bound < 1)  # NaN or large: nothing that could be taken for a success
    assert rows(steps).shape == (7, parameters)


@shapes
def test_a_product_that_is_not_finite_is_told(n, parameters):
    """The gradient is finite, but the Gauss-Newton matrix overflows: finite steps, and bounds that promise nothing."""
    x = np.full((n, parameters), 1e200)
    steps, info = ranked(8).call(filters_for(1.0), np.zeros(parameters), x, np.full(n, 1e-100))
    assert not info.finite
    assert np.all(np.isfinite(rows(steps)))
    assert not np.any(info.error_bound < 1)


# --- transformations and dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "parameters", "over"), [(12, 40, "params"), (30, 24, "targets"), (12, 40, "damping")])
def test_ensembles(n, parameters, over):
    (params, x, y), oracle = smooth(n, parameters, 1.0)
    damping, time = 0.01 * largest(oracle), 10 / largest(oracle)
    members = {
        "params": np.stack([params, -params, 0 * params]),
        "targets": np.stack([y, 0 * y, 3 * y]),
        "damping": damping * np.asarray([1.0, 10.0, 100.0]),
    }

    def call(member):
        own = {"params": params, "targets": y, "damping": damping, over: member}
        filters = [Tikhonov(own["damping"]), GradientFlow(time)]
        return gnl.filtered_steps(lambda p, x: x @ p, own["params"], x, own["targets"], filters, rank=24)

    steps, info = jax.jit(jax.vmap(call), compiler_options=FAST)(members[over])
    assert info.products.shape == (3,)
    for k in range(3):
        own = {"params": params, "targets": y, "damping": damping, over: members[over][k]}
        member = oracle._replace(output_gradient=(x @ own["params"] - own["targets"]) / n)
        assert_filtered(steps[k], [Tikhonov(own["damping"]), GradientFlow(time)], member)


def test_the_plain_call_and_leaves_that_are_numbers():
    """Python floats are parameters too, and without ``jit`` nothing else comes out."""
    x = jnp.linspace(0.0, 1.0, 5)
    call = functools.partial(gnl.filtered_steps, lambda p, x: p["a"] * x + p["b"], rank=2)
    start = {"a": 0.0, "b": 0.0}
    steps, _ = jax.jit(lambda y: call(start, x, y, (MinimumNorm(),)))(1.0 + 2.0 * x)
    assert_close(steps, {"a": [2.0], "b": [1.0]}, condition=100)
    again, _ = call(start, x, 1.0 + 2.0 * x, [MinimumNorm()])
    assert_close(again, steps, condition=100)


DYADIC = np.asarray([[1.0, -0.5, 0.25], [0.5, 1.0, -0.25], [-1.0, 0.5, 0.5], [0.25, -1.0, 1.0]])


def uneven(params, x):
    """A scalar, a column, an absent leaf and a vector that not every model has."""
    return x @ params["w"] + params["b"] + jnp.sum(params["v"] * jnp.asarray([1.0, -0.5], x.dtype))


def uneven_problem(dtype):
    """Numbers that bfloat16 holds without rounding."""
    params = {"w": jnp.zeros(3, dtype), "b": jnp.zeros([], dtype), "v": jnp.ones(2, dtype), "absent": None}
    jacobian = np.concatenate([np.ones([4, 1]), np.tile([1.0, -0.5], [4, 1]), DYADIC], axis=1)
    targets = np.asarray([1.5, -1.0, 0.5, 2.0])
    gradient = (jacobian @ flat(params) - targets) / 4
    oracle = Dense(flat(params), None, 0.0, gradient, jacobian, np.eye(4) / 4)
    return (params, jnp.asarray(DYADIC, dtype), jnp.asarray(targets, dtype)), oracle


@pytest.mark.parametrize(
    ("dtype", "x64", "strict"),
    [
        (jnp.bfloat16, True, True),
        (jnp.bfloat16, False, False),
        (jnp.float32, True, True),
        (jnp.float32, False, True),
    ],
)
def test_steps_keep_their_dtypes(dtype, x64, strict):
    """Scalars, absent leaves; with and without double precision and implicit promotion."""
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict" if strict else "standard"):
        (params, x, y), oracle = uneven_problem(dtype)
        top = largest(oracle)
        filters = [Tikhonov(top), GradientDescent(1 / top, 2), GradientFlow(1 / top)]
        call = jax.jit(lambda p, x, y: gnl.filtered_steps(uneven, p, x, y, filters, rank=4), compiler_options=FAST)
        steps, info = call(params, x, y)
    assert jax.tree.structure(steps) == jax.tree.structure(params)
    for step, leaf in zip(jax.tree.leaves(steps), jax.tree.leaves(params), strict=True):
        assert (step.dtype, step.shape) == (dtype, (3, *leaf.shape))
    assert info.residual.dtype == info.error_bound.dtype == info.ritz_values.dtype == np.float32
    assert info.products.dtype == np.int32
    steps = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), steps)
    for k, chosen in enumerate(filters):
        want, peak = exact(chosen, oracle)
        assert_close(
            jax.tree.map(lambda leaf, k=k: leaf[k], steps),
            want,
            size=1,
            scale=rounding(oracle, want, peak),
            dtype=dtype,
        )


def test_leaves_of_different_dtypes():
    def predict(p, x):
        return x @ p["w"].astype(jnp.float64) + p["b"].astype(jnp.float64) + p["v"][0] - 0.5 * p["v"][1]

    (params, x, y), oracle = uneven_problem(jnp.float64)
    params = {**params, "w": params["w"].astype(jnp.float32), "b": params["b"].astype(jnp.bfloat16)}
    filters = [Tikhonov(largest(oracle))]
    steps, info = compiling(predict, rank=6).call(filters, params, x, y)
    assert [leaf.dtype for leaf in jax.tree.leaves(steps)] == [leaf.dtype for leaf in jax.tree.leaves(params)]
    assert info.residual.dtype == np.float64
    want, peak = exact(filters[0], oracle)
    assert_close(jax.tree.map(lambda leaf: leaf[0], steps), want, size=1, scale=rounding(oracle, want, peak))


@pytest.mark.parametrize("rtol", [0.0, 1e-3])
def test_slopes_by_the_numbers_of_a_filter(rtol):
    """Reverse mode, against the derivative of the dense formula."""
    (params, x, y), oracle = smooth(12, 40, 1.0)
    top = largest(oracle)
    direction = np.random.default_rng(3).normal(size=40)

    def along(filters):
        steps, _ = gnl.filtered_steps(lambda p, x: x @ p, params, x, y, filters, rank=24, rtol=rtol)
        return jnp.sum(steps @ direction)

    filters = [Tikhonov(0.1 * top), GradientFlow(1 / top), Proximal(1 / top, 3.0), GradientDescent(1 / top, 3.0)]
    slopes = jax.jit(jax.grad(along), compiler_options=FAST)(filters)
    assert np.all(np.isfinite(flat(slopes)))
    if rtol == 0:
        inverse = np.linalg.inv(oracle.ggn + 0.1 * top * np.eye(40))
        want = direction @ inverse @ inverse @ oracle.gradient
        scale = np.linalg.norm(direction) * rounding(oracle, np.zeros(40), (0.1 * top) ** -2)
        assert_close(slopes[0].damping, want, size=40, condition=10, scale=scale)
        want = -direction @ scipy.linalg.expm(-oracle.ggn / top) @ oracle.gradient
        scale = np.linalg.norm(direction) * rounding(oracle, np.zeros(40), 1.0)
        assert_close(slopes[1].time, want, size=40, scale=scale)


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "elsewhere"),
    [
        ("squared_error", False),
        ("squared_error", True),
        ("softmax_labels", True),
        ("two_heads", True),
    ],
)
def test_predictions_are_those_of_the_linearised_model(name, elsewhere):
    """By the parameters, from a basis in the other space."""
    problem, oracle = sized(name, "parameters"), dense(name, "parameters")
    filters = filters_for(largest(oracle))
    change = np.random.default_rng(5).normal(size=(2, 3))
    other = problem.inputs
    if elsewhere:  # another number of examples
        other = {"inside": change, "edge": change[:1]} if name == "two_heads" else change

    steps, _ = solve(name, "parameters", filters)

    @jax.jit
    def linearised(steps):
        moved = jax.vmap(lambda step: jax.tree.map(jnp.add, problem.params, step))(steps)
        return jax.vmap(lambda params: gnl.linearised(problem.predict, problem.params)(params, other))(moved)

    @functools.partial(jax.jit, compiler_options=FAST)
    def predicted(filters):
        return gnl.filtered_predictions(
            problem.predict,
            problem.params,
            problem.inputs,
            problem.targets,
            filters,
            other,
            rank=RANK,
            loss=problem.loss,
        )

    outputs, info = predicted(filters)
    wanted = linearised(steps)
    assert jax.tree.structure(outputs) == jax.tree.structure(wanted)
    assert [leaf.shape for leaf in jax.tree.leaves(outputs)] == [leaf.shape for leaf in jax.tree.leaves(wanted)]
    assert info.finite
    jacobian = dense_jacobian(problem.predict, problem.params, other)
    here = flat(problem.predict(problem.params, other))
    assert info.residual.shape == (len(filters),)
    for chosen, own, want in zip(filters, rows(outputs), rows(wanted), strict=True):
        step, peak = exact(chosen, oracle)
        largest_term = np.max(np.abs(here)) + np.linalg.norm(jacobian, 2) * np.linalg.norm(oracle.params)
        scale = largest_term + np.linalg.norm(jacobian, 2) * rounding(oracle, step, peak)
        size = max(oracle.jacobian.shape)
        assert_close(own, want, size=size, scale=scale)
        assert_close(own, here + jacobian @ step, size=size, scale=scale)


def test_damped_predictions_are_kernel_ridge_regression():
    problem, oracle = sized("squared_error", "outputs"), dense("squared_error", "outputs")
    n, top = problem.inputs.shape[0], largest(oracle)
    other = np.random.default_rng(6).normal(size=(4, 3))
    dampings = [share * top for share in (1e-3, 1e-1, 10.0)]
    filters = [Tikhonov(damping) for damping in dampings]

    @functools.partial(jax.jit, compiler_options=FAST)
    def predicted(params):
        return gnl.filtered_predictions(network, params, problem.inputs, problem.targets, filters, other, rank=6)

    outputs, info = predicted(problem.params)
    there = dense_jacobian(network, problem.params, other)
    kernel, cross = oracle.jacobian @ oracle.jacobian.T, there @ oracle.jacobian.T
    residual = n * oracle.output_gradient
    for damping, own in zip(dampings, outputs, strict=True):
        want = -cross @ np.linalg.solve(kernel + n * damping * np.eye(len(kernel)), residual)
        scale = np.linalg.norm(there, 2) * rounding(oracle, exact(Tikhonov(damping), oracle)[0], 1 / damping)
        change = np.asarray(own).ravel() - flat(network(problem.params, other))
        assert_close(change, want, size=max(there.shape), scale=scale)
    assert info.products <= 6


def test_predictions_keep_their_dtype():
    dtype = jnp.bfloat16
    with jax.numpy_dtype_promotion("strict"):
        (params, x, y), oracle = uneven_problem(dtype)
        damping = largest(oracle)
        call = functools.partial(gnl.filtered_predictions, uneven, filters=[Tikhonov(damping)], rank=4)
        outputs, _ = jax.jit(call, compiler_options=FAST)(params, x, y, other_inputs=x[:3])
    assert (outputs.dtype, outputs.shape) == (dtype, (1, 3))
    step, peak = exact(Tikhonov(damping), oracle)
    want = oracle.jacobian[:3] @ (oracle.params + step)
    scale = np.linalg.norm(oracle.jacobian, 2) * (np.linalg.norm(oracle.params) + rounding(oracle, step, peak))
    assert_close(outputs, want, size=1, scale=scale)


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD = {
    "predict": lambda p, x: x @ p["w"],
    "params": {"w": jnp.ones(3)},
    "inputs": jnp.ones([4, 3]),
    "targets": jnp.ones(4),
    "filters": [Tikhonov(0.1)],
    "rank": 3,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"filters": []}, ValueError, r"^filters must hold at least one"),
        ({"filters": ()}, ValueError, r"^filters must hold at least one"),
        ({"filters": Tikhonov(0.1)}, TypeError, r"^filters must be a list .* Tikhonov\(damping=0\.1\)"),
        ({"filters": {"a": Tikhonov(0.1)}}, TypeError, r"^filters must be a list"),
        ({"filters": [Tikhonov(0.1), 0.1]}, TypeError, r"^filters\[1\] must be one of .* 0\.1"),
        ({"filters": [Tikhonov]}, TypeError, r"^filters\[0\] must be one of .* the class Tikhonov"),
        ({"filters": [None]}, TypeError, r"^filters\[0\] must be one of .* None"),
        ({"rank": 0}, ValueError, r"^rank must be at least 1, but is 0"),
        ({"rank": 3.0}, TypeError, r"^rank must be an int"),
        ({"rank": True}, TypeError, r"^rank must be an int"),
        ({"predict": None}, TypeError, r"^predict must be a function"),
        ({"targets": jnp.ones([4, 1])}, ValueError, r"^targets: .* \(4, 1\)"),
        ({"targets": jnp.ones(5)}, ValueError, r"^targets: .* \(5,\)"),
        ({"params": {"w": jnp.ones(3, int)}}, TypeError, r"^params: leaf \['w'\] has dtype int64"),
        ({"params": {"w": jnp.ones(3), "kind": "linear"}}, TypeError, r"^params: leaf \['kind'\] is 'linear'"),
        ({"predict": lambda p, x: jnp.sum(x @ p["w"])}, ValueError, r"^the outputs of predict"),
    ],
)
@pytest.mark.parametrize("function", ["filtered_steps", "filtered_predictions"])
def test_bad_input(function, change, error, message):
    arguments = {**GOOD, **change}
    if function == "filtered_predictions":
        arguments["other_inputs"] = jnp.ones([2, 3])
    with pytest.raises(error, match=message):
        unchecked(getattr(gnl, function))(**arguments)


def unchecked(function):
    """Without the type checks of ``conftest.py``: what a user meets."""
    return getattr(function, "__wrapped__", function)


@pytest.mark.parametrize(("rtol", "error"), [(-1.0, ValueError), (np.nan, ValueError), (np.ones(2), TypeError)])
def test_bad_tolerance(rtol, error):
    with pytest.raises(error, match=r"^rtol must be a"):
        unchecked(gnl.filtered_steps)(**GOOD, rtol=rtol)
