"""Spectra against dense eigenvalues, and the learning rate against gradient descent."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

import gn_linear as gnl
from tests.support import PROBLEMS, assert_bit_equal, assert_close, dense, flat, l2_diagonal, tolerance

diagnostics = gnl.diagnostics
KEY = jax.random.key(0)
TREE = {"in": {"w": 0.1, "b": 0.0}, "out": 1.0, "absent": None}
SIGMAS = 5.0
"""A sum of many terms is this far from its mean once in two million times; the keys are fixed."""


def linear(params, inputs):
    return inputs @ params


def inputs_of(values):
    """Inputs of a linear model with the squared error, whose Gauss-Newton matrix is diagonal."""
    return jnp.diag(jnp.sqrt(len(values) * values))


@functools.partial(jax.jit, static_argnames=("rank", "probes"))
def of_diagonal(values, key=KEY, l2=0.0, *, rank, probes=1):
    zeros = jnp.zeros(len(values), values.dtype)
    return diagnostics.spectrum(linear, zeros, inputs_of(values), rank=rank, probes=probes, key=key, l2=l2)


@functools.partial(jax.jit, static_argnames=("name", "rank", "probes"))
def of_problem(name, params, inputs, targets, l2, *, rank, probes):
    """The spectrum, and the density of a wide bump at a few points."""
    problem = PROBLEMS[name]
    found = diagnostics.spectrum(
        problem.predict, params, inputs, targets, loss=problem.loss, l2=l2, rank=rank, probes=probes, key=KEY
    )
    return found, found.density(jnp.linspace(-1.0, 3.0, 5), 0.5)


def spectrum_of(name, rank, probes, l2=0.0):
    problem = PROBLEMS[name]
    return of_problem(name, problem.params, problem.inputs, problem.targets, l2, rank=rank, probes=probes)


def check_against_dense(found, density, ggn):
    """Moments, eigenvalues, their bounds and the density, for probes that are an orthonormal basis."""
    exact = np.linalg.eigvalsh(ggn)[::-1]
    size, largest, rank = len(exact), exact[0], found.nodes.shape[1]
    condition = 4.0  # roundings of products with J and with B, on both sides
    assert found.nodes.shape == found.weights.shape == found.couplings.shape == (size, rank)
    assert int(found.parameters) == size
    assert_close(jnp.sum(found.weights, axis=1), np.ones(size), size=size)
    for power in range(1, 7):
        moment = jnp.sum(found.weights * found.nodes**power) / size
        assert_close(moment, np.sum(exact**power) / size, size=size * power, condition=condition)
    points = np.linspace(-1.0, 3.0, 5)
    bumps = np.exp(-2 * (points[:, None] - exact) ** 2) / (0.5 * math.sqrt(2 * math.pi))
    # A bump is a polynomial up to the first term of its series in Chebyshev polynomials that the quadrature misses;
    # here every basis is as large as the space that it lives in, and nothing is missed.
    steepest = max(largest, 1.0) / 0.5**2
    assert_close(density, np.mean(bumps, axis=1), size=size * rank, condition=condition * steepest)
    used = np.isfinite(found.error_bounds)
    distance = np.min(np.abs(np.asarray(found.eigenvalues)[used, None] - exact), axis=1)
    assert np.all(distance <= np.asarray(found.error_bounds)[used] + tolerance(np.float64) * largest)  # of both sides
    floor = tolerance(np.float64, size) * largest
    wanted, seen = distinct(exact, floor), distinct(np.asarray(found.eigenvalues)[used], floor)
    assert_close(seen[: len(wanted)], wanted, size=size, condition=condition)


def distinct(values, floor):
    """The positive ones among descending values, each once."""
    apart = np.append(True, -np.diff(values) > floor)
    return values[apart & (values > floor)]


@pytest.mark.parametrize("name", PROBLEMS)
def test_spectrum_is_that_of_the_dense_matrix(name):
    """With every loss, from an orthonormal basis of probes."""
    size = dense(name).params.size
    check_against_dense(*spectrum_of(name, min(size, 24), size), dense(name).ggn)


@pytest.mark.parametrize("l2", [0.25, TREE], ids=["number", "tree"])
def test_penalty_is_part_of_the_matrix(l2):
    size = dense("softmax_labels").params.size
    ggn = dense("softmax_labels").ggn + np.diag(l2_diagonal(l2, PROBLEMS["softmax_labels"].params))
    check_against_dense(*spectrum_of("softmax_labels", size, size, l2), ggn)


def test_float32():
    problem, exact = PROBLEMS["softmax_labels"], np.linalg.eigvalsh(dense("softmax_labels").ggn)[::-1]
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (problem.params, problem.inputs))
    found, density = of_problem("softmax_labels", *narrow, problem.targets, 0.0, rank=24, probes=3)
    assert {leaf.dtype for leaf in (*found[:-1], density)} == {jnp.dtype(jnp.float32)}
    assert_close(found.eigenvalues[:8], exact[:8], size=len(exact), condition=4.0)
    assert np.all(np.abs(found.eigenvalues[:8] - exact[:8]) <= found.error_bounds[:8])
    assert found.error_bounds[0] <= tolerance(np.float32) * exact[0]


def test_narrow_parameters_are_solved_in_float32():
    values = jnp.asarray([4.0, 1.0, 0.25], jnp.bfloat16)
    found = of_diagonal(values, rank=3)
    assert found.nodes.dtype == jnp.float32
    assert np.all(np.abs(found.eigenvalues - np.asarray(values, np.float64)) <= found.error_bounds)


def test_spectrum_of_the_kernel():
    """The nonzero eigenvalues are those of the kernel over the number of examples."""
    problem = PROBLEMS["squared_error"]
    found, _ = spectrum_of("squared_error", 24, 28)
    n = 6
    kernel = np.asarray(diagnostics.empirical_ntk(problem.predict, problem.params, problem.inputs))
    exact = np.linalg.eigvalsh(kernel.transpose(0, 2, 1, 3).reshape(3 * n, 3 * n))[::-1]
    count = int(np.sum(exact > 1e-6 * exact[0]))
    assert_close(n * found.eigenvalues[:count], exact[:count], size=3 * n, condition=4.0)


def test_every_eigenvalue_once_and_its_multiplicity_in_the_density():
    values = jnp.asarray([3.0, 3.0, 3.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = of_diagonal(values, rank=6, probes=10)
    assert_close(found.eigenvalues[:2], np.asarray([3.0, 1.0]), size=10)
    for value, count in ((3.0, 3), (1.0, 2), (0.0, 5)):
        near = np.abs(np.asarray(found.nodes) - value) < 0.5
        assert_close(np.sum(np.asarray(found.weights)[near]), count, size=60)
    unused = ~np.isfinite(found.error_bounds)
    assert np.any(unused)  # the space was exhausted
    assert not np.any(np.asarray(found.eigenvalues)[unused])


def test_moments_from_few_probes():
    """Unbiased, with the variance of quadratic forms of a random direction: 2 / (P + 2) of that of the eigenvalues."""
    values, probes = np.geomspace(1e-3, 1.0, 100), 400
    found = of_diagonal(jnp.asarray(values), rank=2, probes=probes)
    for power in (1, 2):
        each = np.sum(np.asarray(found.weights * found.nodes**power), axis=1)
        deviation = np.sqrt(2 / (len(values) + 2) * np.var(values**power))
        assert abs(np.mean(each) - np.mean(values**power)) <= SIGMAS * deviation / np.sqrt(probes)
        # The relative error of a variance from samples; the form is near enough to normal.
        assert abs(np.std(each) / deviation - 1) <= SIGMAS / np.sqrt(2 * probes)
    different = of_diagonal(jnp.asarray(values), jax.random.key(1), rank=2, probes=probes)
    assert not np.any(different.weights == found.weights)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), decades=st.floats(0.0, 6.0), scale=st.sampled_from([1e-60, 1.0, 1e60]))
def test_eigenvalues_are_from_below_and_the_bound_is_from_above(seed, decades, scale):
    rng = np.random.default_rng(seed)
    values = scale * np.sort(10 ** -rng.uniform(0.0, decades, 12))[::-1]
    found = of_diagonal(jnp.asarray(values), jax.random.key(seed), rank=4, probes=2)
    rounding = tolerance(np.float64, 12)
    assert np.all(np.asarray(found.eigenvalues) <= values[:4] + rounding * values[0])
    distance = np.min(np.abs(np.asarray(found.eigenvalues)[:, None] - values), axis=1)
    assert np.all(distance <= found.error_bounds)
    likely = diagnostics.largest_stable_learning_rate(found, failure=0.5)
    sure = diagnostics.largest_stable_learning_rate(found, failure=1e-9)
    assert sure.lower_bound <= 2 / values[0] <= sure.rate * (1 + rounding)
    assert 0 < sure.lower_bound <= likely.lower_bound <= likely.rate == sure.rate


@pytest.mark.parametrize("failure", [0.1, 0.5])
def test_probability_of_failure(failure):
    """Two parameters, one product: the bound fails if |tan| of the angle is below t, in 2 / pi atan(t) of all cases."""
    trials, t = 2000, failure / math.sqrt(4 / math.pi)
    keys = jax.random.split(jax.random.key(3), trials)

    def lower_bound(key):
        found = of_diagonal(jnp.asarray([1.0, 0.0]), key, rank=1)
        return diagnostics.largest_stable_learning_rate(found, failure=failure).lower_bound

    failed = float(np.mean(jax.jit(jax.vmap(lower_bound))(keys) > 2.0))
    expected = 2 / math.pi * math.atan(t)
    assert expected < failure
    assert abs(failed - expected) <= SIGMAS * math.sqrt(expected * (1 - expected) / trials)


def test_bound_from_an_orthonormal_basis_of_probes_is_certain():
    for seed in range(5):
        found = of_diagonal(jnp.asarray([1.0, 0.9, 0.1, 0.0]), jax.random.key(seed), rank=1, probes=4)
        result = diagnostics.largest_stable_learning_rate(found, failure=0.999)
        assert result.lower_bound <= 2.0 <= result.rate


def test_bound_of_a_converged_run_is_tight():
    """Also with a gap that is all rounding, and with nothing left to find."""
    for values, rank in ((np.geomspace(1.0, 1e-4, 30), 20), (np.full(30, 2.0), 5), (np.arange(3.0), 3)):
        found = of_diagonal(jnp.asarray(values), rank=rank)
        result = diagnostics.largest_stable_learning_rate(found, failure=1e-6)
        assert_close(flat(result), np.full(2, 2 / np.max(values)), size=30)


def test_no_curvature_bears_any_learning_rate():
    result = diagnostics.largest_stable_learning_rate(of_diagonal(jnp.zeros(3), rank=3))
    assert flat(result).tolist() == [np.inf, np.inf]


def test_gradient_descent_on_the_linearised_model():
    """It converges at 0.95 of the rate and diverges at 1.05 of it, by the factor of the largest eigenvalue."""
    problem, loss, steps = PROBLEMS["squared_error"], gnl.losses.squared_error, 200

    @jax.jit
    def descend(share):
        found = diagnostics.spectrum(problem.predict, problem.params, problem.inputs, rank=20, key=KEY, probes=1)
        result = diagnostics.largest_stable_learning_rate(found)
        model = gnl.linearised(problem.predict, problem.params)

        def value(params):
            return loss(model(params, problem.inputs), problem.targets)

        def step(params, _):
            now, gradient = jax.value_and_grad(value)(params)
            return jax.tree.map(lambda p, g: p - share * result.lower_bound * g, params, gradient), now

        return jax.lax.scan(step, problem.params, length=steps)[1]

    below, above = descend(0.95), descend(1.05)
    assert np.all(np.diff(below) <= 0)
    # The part along the largest eigenvector shrinks by 0.9 a step, and grows by 1.1.
    growth = np.log(above[-1] / above[-2])
    assert abs(growth - 2 * np.log(1.1)) <= np.sqrt(tolerance(np.float64, steps))
    assert above[-1] > 1e6 * above[0]


def test_a_product_that_is_not_finite_gives_no_number():
    found = of_diagonal(jnp.asarray([1.0, jnp.nan, 2.0]), rank=2, probes=2)
    for leaf in found[:-1]:
        assert np.all(np.isnan(leaf))
    assert np.all(np.isnan(flat(diagnostics.largest_stable_learning_rate(found))))
    assert np.all(np.isnan(found.density(jnp.zeros(2), 1.0)))


def test_density_is_a_density():
    found = of_diagonal(jnp.asarray([3.0, 1.0, 0.5, 0.0]), rank=2, probes=3)
    points = np.linspace(-2.0, 6.0, 1001)
    density = found.density(points.reshape(7, 143), 0.1)
    assert density.shape == (7, 143)
    assert np.all(density >= 0)
    # The rule of equal weights converges faster than any power for a smooth function that vanishes at both ends.
    assert_close(np.sum(density) * (points[1] - points[0]), 1.0, size=1001)


def test_bad_input():
    values = jnp.ones(2)
    for options, message in (
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 2, "probes": 0}, "probes must be at least 1"),
        ({"rank": 2, "l2": -1.0}, "l2 must be a finite number"),
        ({"rank": 2, "l2": {"w": 1.0}}, "l2 must be a number or a pytree"),
    ):
        with pytest.raises(ValueError, match=message):
            diagnostics.spectrum(linear, values, inputs_of(values), key=KEY, **options)
    with pytest.raises(ValueError, match="params must hold at least one number"):
        diagnostics.spectrum(lambda p, x: x, {}, inputs_of(values), rank=2, key=KEY)
    with pytest.raises(ValueError, match="targets is None"):
        diagnostics.spectrum(linear, values, inputs_of(values), loss=gnl.losses.softmax_cross_entropy, rank=2, key=KEY)
    found = of_diagonal(values, rank=2)
    with pytest.raises(ValueError, match="width must be a positive"):
        found.density(values, 0.0)
    for failure in (0.0, 1.0):
        with pytest.raises(ValueError, match="failure must be"):
            diagnostics.largest_stable_learning_rate(found, failure=failure)


# ---- operators of scipy


def operator_of(name, l2=0.0):
    problem = PROBLEMS[name]
    return diagnostics.as_linear_operator(
        problem.predict, problem.params, problem.inputs, problem.targets, loss=problem.loss, l2=l2
    )


@pytest.mark.parametrize("name", ["softmax_labels", "two_heads_huber", "decay"])
def test_operator_is_the_dense_matrix(name):
    operator, ggn = operator_of(name, 0.25), dense(name).ggn + 0.25 * np.eye(dense(name).params.size)
    size = len(ggn)
    assert (operator.shape, operator.dtype) == ((size, size), np.float64)
    for same in (operator, operator.T, operator.H):
        assert_close(same @ np.eye(size), ggn, size=size)


def test_eigsh_and_cg():
    operator, ggn = operator_of("poisson", TREE), dense("poisson").ggn
    ggn = ggn + np.diag(l2_diagonal(TREE, PROBLEMS["poisson"].params))
    exact, size = np.linalg.eigvalsh(ggn)[::-1], len(ggn)
    found, _ = scipy.sparse.linalg.eigsh(operator, k=3, v0=np.ones(size))
    assert_close(found[::-1], exact[:3], size=size, condition=4.0)
    by_lanczos, _ = spectrum_of("poisson", size, 2, TREE)
    assert_close(by_lanczos.eigenvalues[:3], found[::-1], size=size, condition=4.0)
    shifted = operator + scipy.sparse.linalg.aslinearoperator(np.eye(size))
    rtol = np.sqrt(np.finfo(np.float64).eps)
    solution, status = scipy.sparse.linalg.cg(shifted, np.arange(size, dtype=float), rtol=rtol)
    assert status == 0
    residual = (ggn + np.eye(size)) @ solution - np.arange(size)
    assert np.linalg.norm(residual) <= 2 * rtol * np.linalg.norm(np.arange(size))


@pytest.mark.parametrize("of", ["parameters", "outputs"])
def test_dtypes_of_operators(of):
    """A float32 operator on every dtype of vector: the wider dtype comes back, and nothing over- or underflows."""
    values = jnp.asarray([4.0, 1.0, 0.25], jnp.float32)
    make = {"parameters": diagnostics.as_linear_operator, "outputs": diagnostics.ntk_as_linear_operator}[of]
    operator = make(linear, jnp.zeros(3, jnp.float32), inputs_of(values))
    exact = np.asarray(values, np.float64) * (1 if of == "parameters" else 3)
    assert operator.dtype == np.float32
    vector = np.asarray([1.0, -2.0, 3.0])
    for dtype, wide in ((np.float16, np.float32), (np.float32, np.float32), (np.float64, np.float64)):
        got = operator @ vector.astype(dtype)
        assert got.dtype == wide
        assert_close(got, exact * vector, size=3, dtype=np.float32)
    assert_close(operator @ vector.astype(int), exact * vector, size=3, dtype=np.float32)
    for scale in (1e-200, 1e200):
        assert_close((operator @ (scale * vector)) / scale, exact * vector, size=3, dtype=np.float32)
    both = operator @ (vector + 2j * vector)
    assert_close([both.real, both.imag], [exact * vector, 2 * exact * vector], size=3, dtype=np.float32)
    assert_bit_equal(operator @ np.zeros(3), np.zeros(3))
    assert np.all(np.isnan(operator @ np.full(3, np.nan)))
    found = scipy.sparse.linalg.eigsh(operator, k=2, v0=np.ones(3, np.float32), return_eigenvectors=False)
    assert_close(np.sort(found)[::-1], exact[:2], size=3, dtype=np.float32, condition=4.0)


def test_kernel_operator_is_the_kernel():
    """Rows are (example, output) over all leaves."""

    def heads(params, x):
        hidden = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"])
        return {"a": hidden @ params["out"][:, :2], "b": hidden @ params["out"][:, 2]}

    problem = PROBLEMS["squared_error"]
    operator = diagnostics.ntk_as_linear_operator(heads, problem.params, problem.inputs)
    kernel = np.asarray(diagnostics.empirical_ntk(heads, problem.params, problem.inputs))
    assert operator.shape == (18, 18)
    assert_close(operator @ np.eye(18), kernel.transpose(0, 2, 1, 3).reshape(18, 18), size=28)


def test_kernel_operator_of_leaves_of_different_lengths():
    problem, oracle = PROBLEMS["two_heads"], dense("two_heads")
    operator = diagnostics.ntk_as_linear_operator(problem.predict, problem.params, problem.inputs)
    size = oracle.outputs.size
    assert_close(operator @ np.eye(size), oracle.jacobian @ oracle.jacobian.T, size=28)


def test_products_are_compiled_once():
    traces = []

    def predict(params, inputs):
        traces.append(None)
        return inputs["x"] @ params if inputs["on"] is True else params  # what is no array stays what it is

    for make in (diagnostics.as_linear_operator, diagnostics.ntk_as_linear_operator):
        operator = make(predict, jnp.ones(2), {"x": np.eye(2), "on": True})
        first = operator @ np.ones(2)
        before = len(traces)
        assert_bit_equal(operator @ np.ones(2), first)
        assert len(traces) == before > 0


def test_operator_is_refused_where_it_is_made():
    with pytest.raises(ValueError, match="l2 must be a number or a pytree"):
        diagnostics.as_linear_operator(linear, jnp.ones(2), jnp.eye(2), l2={"w": 1.0})
    with pytest.raises(ValueError, match="targets: the array has shape"):
        diagnostics.as_linear_operator(linear, jnp.ones(2), jnp.eye(2), jnp.ones(3))
    with pytest.raises(ValueError, match="is a scalar"):
        diagnostics.ntk_as_linear_operator(lambda p, x: jnp.sum(p), jnp.ones(2), jnp.eye(2))
