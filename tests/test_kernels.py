"""Measures of kernels against their formulas in numpy and float64, and against the identities that they obey.

The oracles work on the numbers that a function was given, after their rounding to its dtype. Kernels of shape
(n, n, c, c) are matrices there, with Kronecker products in place of the package's means over axes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gn_linear as gnl
from gn_linear import periods
from tests.support import affine, assert_close, flat, network, one_hot, tolerance

measure = gnl.diagnostics
N, M, C, RANK = 6, 3, 2, 4
DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64]
SCALED = [(jnp.float16, 1.0), *((d, s) for d in DTYPES if d != jnp.float16 for s in (1.0, 1e-30, 1e30))]
CHECK = settings(max_examples=30, deadline=None)
LABELS = np.array([0, 1, 1, 2, 0, 1])


def wide(*arrays):
    """As they are, in float64."""
    return [np.asarray(a).astype(np.float64) for a in arrays]


def features(seed, rows=N, columns=40):
    return np.random.default_rng(seed).normal(size=(rows, columns)) + 0.5


def matrix(seed, columns=40):
    """A kernel of shape (N, N)."""
    return features(seed, columns=columns) @ features(seed, columns=columns).T


def outputs(seed, others=None):
    """A kernel of shape (N, N, C, C), or between ``others`` and its examples."""
    own = features(seed, N * C).reshape(N, C, -1)
    return np.einsum("ikp,jlp->ijkl", own if others is None else others, own)


KERNELS = {"matrix": matrix, "outputs": outputs}


# --- the formulas -----------------------------------------------------------------------------------------------------


def as_matrix(kernel):
    """Rows (example, output), and the projection that takes off the mean over the examples of each output."""
    (kernel,) = wide(kernel)
    n = len(kernel)
    centring, c = np.eye(n) - np.ones((n, n)) / n, 1
    if kernel.ndim == 4:
        c = kernel.shape[2]
        kernel = np.block([[kernel[i, j] for j in range(n)] for i in range(n)])
    return kernel, np.kron(centring, np.eye(c))


def cosine(k, other):
    return np.trace(k @ other.T) / np.sqrt(np.trace(k @ k.T) * np.trace(other @ other.T))


def cka(kernel, other):
    (k, centring), (other, _) = as_matrix(kernel), as_matrix(other)
    return cosine(centring @ k @ centring, centring @ other @ centring)


def distance(kernel, other):
    k, other = (x / np.linalg.norm(x) for x in wide(kernel, other))
    return np.sum((k - other) ** 2) / 2


def spectrum(kernel):
    return np.linalg.eigvalsh(as_matrix(kernel)[0])


def effective_dimension(kernel, ridge):
    k, _ = as_matrix(kernel)
    return np.trace(k @ np.linalg.inv(k + ridge * np.eye(len(k))))


def effective_rank(kernel):
    return np.sum(spectrum(kernel)) ** 2 / np.sum(spectrum(kernel) ** 2)


def condition_number(kernel):
    return np.linalg.cond(as_matrix(kernel)[0])


def decay(kernel, first, last):
    values = spectrum(kernel)[::-1][first - 1 : last]
    return -np.polyfit(np.log(np.arange(first, last + 1)), np.log(values), 1)[0]


def regression(kernel, kernel_new, residuals, ridge):
    (k, _), (new, r) = as_matrix(kernel), wide(kernel_new, residuals)
    if new.ndim == 4:
        new = np.block([list(row) for row in new])
    found = new @ np.linalg.solve(k + ridge * np.eye(len(k)), r.reshape(len(k), -1))
    return found.reshape(-1, *r.shape[1:])


# --- formulas in every dtype and at every scale -----------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "scale"), SCALED)
@pytest.mark.parametrize("kind", KERNELS)
def test_measures_are_their_formulas(kind, dtype, scale):
    kernel, other = (jnp.asarray(scale * KERNELS[kind](seed), dtype) for seed in (0, 1))
    solve = jnp.promote_types(dtype, jnp.float32)
    condition, size = condition_number(kernel), kernel.size

    def check(found, wanted, condition=1.0):
        assert found.dtype == solve
        assert_close(found, wanted, size=size, condition=condition)

    check(measure.kernel_distance(kernel, other), distance(kernel, other))
    check(measure.kernel_velocity(kernel, other, 4), distance(kernel, other) / 4)
    check(measure.cka(kernel, other), cka(kernel, other))
    check(measure.effective_rank(kernel), effective_rank(kernel))
    check(measure.condition_number(kernel), condition, condition)
    for ridge in (0.1 * scale, 10.0 * scale):
        check(measure.effective_dimension(kernel, ridge), effective_dimension(kernel, ridge), condition)
    check(measure.spectrum_decay(kernel), decay(kernel, 1, len(spectrum(kernel))), condition)
    check(measure.spectrum_decay(kernel, first=2, last=4), decay(kernel, 2, 4), condition)


@pytest.mark.parametrize(("dtype", "scale"), SCALED)
@pytest.mark.parametrize("kind", KERNELS)
def test_regression_is_its_formula(kind, dtype, scale):
    rows = features(7, M * C if kind == "outputs" else M)
    new = outputs(0, rows.reshape(M, C, -1)) if kind == "outputs" else rows @ features(0).T
    kernel, new = (jnp.asarray(scale * x, dtype) for x in (KERNELS[kind](0), new))
    residuals = jnp.asarray(features(8, N, C) * scale, dtype)
    solve = jnp.promote_types(dtype, jnp.float32)
    for ridge in (0.0, scale):
        condition = np.linalg.cond(as_matrix(kernel)[0] + ridge * np.eye(len(as_matrix(kernel)[0])))
        found = measure.kernel_regression(kernel, new, residuals, ridge=ridge)
        assert found.dtype == solve
        assert found.shape == (M, C)
        # The solution of the system passes the condition number on once more.
        assert_close(found, regression(kernel, new, residuals, ridge), size=N, condition=condition)
    if kind == "matrix":
        column = measure.kernel_regression(kernel, new, residuals[:, 0], ridge=scale)
        assert column.shape == (M,)
        assert_close(column, np.asarray(found)[:, 0], size=N, condition=condition)


TARGETS = {
    "labels": (LABELS, one_hot(LABELS, 3)),
    "boolean": (LABELS > 0, one_hot(1 * (LABELS > 0), 2)),
    "one-hot integers": (one_hot(LABELS, 3).astype(np.int32), one_hot(LABELS, 3)),
    "real": (features(3, N, 1)[:, 0], features(3, N, 1)),
    "real columns": (1e20 * features(4, N, 2), 1e20 * features(4, N, 2)),
    "more columns than rows": (features(5, N, 9), features(5, N, 9)),
}


@pytest.mark.parametrize("name", TARGETS)
def test_target_alignment_is_that_with_the_gram_matrix_of_the_targets(name):
    targets, columns = TARGETS[name]
    kernel, (gram,) = matrix(0), wide(columns @ columns.T)
    assert_close(measure.target_alignment(kernel, targets), cka(kernel, gram), size=kernel.size)
    assert_close(measure.target_alignment(kernel, targets), measure.cka(kernel, gram), size=kernel.size)
    assert_close(measure.target_alignment(kernel, targets, centred=False), cosine(kernel, gram), size=kernel.size)


def test_target_alignment_with_a_kernel_of_all_outputs():
    kernel, targets = outputs(0), features(3, N, C)
    k, centring = as_matrix(kernel)
    column = targets.reshape(-1, 1)
    gram = column @ column.T
    want = cosine(centring @ k @ centring, centring @ gram @ centring)
    assert_close(measure.target_alignment(kernel, targets), want, size=k.size)
    assert_close(measure.target_alignment(kernel, targets, centred=False), cosine(k, gram), size=k.size)
    labels = LABELS % C
    rows = measure.target_alignment(kernel, one_hot(labels, C))
    for classes in (None, C):
        assert_close(measure.target_alignment(kernel, labels, classes=classes), rows, size=k.size)
    alone = kernel[:, :, :1, :1]
    assert_close(
        measure.target_alignment(alone, targets[:, 0]), measure.target_alignment(alone[:, :, 0, 0], targets[:, 0])
    )


def test_labels_may_have_any_names_unless_classes_are_given():
    kernel, names = matrix(0), np.array([70, -3, 5])[LABELS]
    want = measure.target_alignment(kernel, LABELS)
    assert_close(measure.target_alignment(kernel, names), want, size=N)
    assert_close(measure.target_alignment(kernel, LABELS, classes=9), want, size=N)
    traced = jax.jit(lambda labels: measure.target_alignment(kernel, labels, classes=3))
    assert_close(traced(LABELS), want, size=N)
    assert_close(traced(LABELS > 0), measure.target_alignment(kernel, LABELS > 0, classes=2), size=N)
    assert np.isnan(traced(LABELS + 1))
    assert np.isnan(traced(-LABELS))
    with pytest.raises(TypeError, match="classes must be given where labels are traced"):
        jax.jit(lambda labels: measure.target_alignment(kernel, labels))(LABELS)
    with pytest.raises(ValueError, match="labels from 0 to 1, for 2 classes, but go from 0 to 2"):
        measure.target_alignment(kernel, LABELS, classes=2)


# --- digits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KERNELS)
def test_a_kernel_is_at_distance_0_from_itself(kind):
    """Also where the compiler sees two arrays, and fuses their norms in two ways."""
    kernel = jnp.asarray(KERNELS[kind](0), jnp.float32)
    copy = jnp.array(kernel, copy=True)
    for function in (measure.kernel_distance, jax.jit(measure.kernel_distance)):
        assert function(kernel, copy) == 0
        assert function(kernel, 4 * kernel) == 0
    assert not np.any(jax.vmap(measure.kernel_distance)(jnp.stack([kernel, kernel]), jnp.stack([copy, copy])))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("change", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_small_distances_keep_their_digits(dtype, change, scale):
    """Entries are off by a rounding each, relative to a change of the root of twice the distance."""
    kernel = jnp.asarray(matrix(0), dtype)
    other = jnp.asarray(scale * (matrix(0) + change * matrix(1)), dtype)
    want = distance(kernel, other)
    assert_close(measure.kernel_distance(kernel, other), want, size=N, condition=1 / np.sqrt(2 * want))


def test_distance_of_opposite_and_orthogonal_kernels():
    kernel = matrix(0)
    assert_close(measure.kernel_distance(kernel, -kernel), 2.0)
    assert_close(measure.kernel_distance(np.diag([1.0, 0.0]), np.diag([0.0, 1.0])), 1.0)


def test_what_has_no_direction_is_nan():
    kernel, labels = jnp.asarray(matrix(0)), jnp.asarray(LABELS)
    nothing, broken = jnp.zeros((N, N)), kernel.at[1, 2].set(jnp.inf)
    for bad in (nothing, broken):
        for found in (
            measure.kernel_distance(kernel, bad),
            measure.kernel_distance(bad, kernel),
            measure.cka(kernel, bad),
            measure.target_alignment(bad, labels),
            measure.effective_rank(bad),
            measure.spectrum_decay(bad),
        ):
            assert np.isnan(found)
    for dtype in DTYPES:
        shift = jnp.asarray(0.1 * np.arange(N), dtype).astype(jnp.promote_types(dtype, jnp.float32))
        assert np.isnan(measure.cka(kernel, shift[:, None] + shift))  # rounding is all that centring leaves
    assert np.isnan(measure.target_alignment(kernel, jnp.full(N, 0.1)))
    assert np.isnan(measure.target_alignment(kernel, jnp.zeros(N, int)))
    assert measure.effective_dimension(nothing, 0.0) == measure.effective_dimension(nothing, 1.0) == 0
    assert measure.condition_number(nothing) == jnp.inf
    for bad in (broken, kernel.at[0, 1].set(jnp.nan)):
        assert np.isnan(measure.effective_dimension(bad, 1.0))
        assert np.isnan(measure.condition_number(bad))
        assert np.all(np.isnan(measure.kernel_regression(bad, kernel, labels.astype(float))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_eigenvalues_that_are_rounding_count_as_zero(dtype):
    rows = features(0, columns=RANK)
    kernel = jnp.asarray(rows @ rows.T, dtype)
    top = np.linalg.cond(rows) ** 2
    assert_close(measure.effective_dimension(kernel, 0.0), RANK)
    assert measure.condition_number(kernel) == jnp.inf
    assert measure.condition_number(matrix(0), rtol=0.5) == jnp.inf
    assert_close(measure.spectrum_decay(kernel), decay(rows.T @ rows, 1, RANK), size=N, condition=top)
    assert np.isnan(measure.spectrum_decay(kernel, first=RANK))
    assert np.isnan(measure.spectrum_decay(kernel, first=RANK + 1))
    new, residuals = features(7, M, RANK), features(8, N, C)
    # The minimum norm among the weights of the features.
    want = new @ np.linalg.lstsq(rows, residuals, rcond=None)[0]
    found = measure.kernel_regression(kernel, jnp.asarray(new @ rows.T, dtype), jnp.asarray(residuals, dtype))
    assert_close(found, want, size=N, condition=top)
    near = measure.kernel_regression(kernel, jnp.asarray(new @ rows.T, dtype), jnp.asarray(residuals), ridge=1e-300)
    assert_close(near, want, size=N, condition=top, dtype=dtype)
    only = measure.kernel_regression(
        kernel, jnp.asarray(new @ rows.T, dtype), jnp.asarray(residuals, dtype), rtol=0.999
    )
    values, vectors = np.linalg.eigh(np.asarray(rows @ rows.T))
    largest = np.outer(vectors[:, -1], vectors[:, -1]) / values[-1]
    assert_close(only, new @ rows.T @ largest @ residuals, size=N, condition=top)


# --- identities -------------------------------------------------------------------------------------------------------

compiled = {name: jax.jit(getattr(measure, name)) for name in ("kernel_distance", "cka", "effective_dimension")}
seeds, scales = st.integers(0, 10**6), st.floats(1e-6, 1e6)


@CHECK
@given(
    seed=seeds,
    scale=scales,
    shift=st.lists(st.floats(-10, 10), min_size=N, max_size=N),
    kind=st.sampled_from([*KERNELS]),
)
def test_alignment_does_not_see_scale_order_and_shifts(seed, scale, shift, kind):
    kernel, other = KERNELS[kind](seed), KERNELS[kind](seed + 1)
    want = compiled["cka"](kernel, other)
    order = np.random.default_rng(seed).permutation(N)
    rows = np.reshape(shift, (N, 1, *[1] * (kernel.ndim - 2)))
    moved = kernel + rows + np.swapaxes(rows, 0, 1)
    lost = np.linalg.norm(moved) / np.linalg.norm(
        moved - moved.mean(0) - moved.mean(1, keepdims=True) + moved.mean((0, 1))
    )
    assert -1 <= want <= 1
    assert want >= -tolerance(np.float64, kernel.size)  # both are positive semi-definite
    assert_close(compiled["cka"](other, kernel), want, size=kernel.size, scale=1.0)
    assert_close(compiled["cka"](scale * kernel, other), want, size=kernel.size, scale=1.0)
    assert_close(compiled["cka"](kernel[order][:, order], other[order][:, order]), want, size=kernel.size, scale=1.0)
    assert_close(compiled["cka"](moved, other), want, size=kernel.size, scale=1.0, condition=lost)
    assert_close(compiled["cka"](kernel, scale * kernel), 1.0, size=kernel.size)


@CHECK
@given(seed=seeds, scale=scales, kind=st.sampled_from([*KERNELS]))
def test_distance_is_symmetric_and_between_0_and_1(seed, scale, kind):
    kernel, other = KERNELS[kind](seed), KERNELS[kind](seed + 1)
    found = compiled["kernel_distance"](kernel, other)
    assert 0 <= found <= 1
    assert_close(compiled["kernel_distance"](other, kernel), found, size=kernel.size)
    assert_close(compiled["kernel_distance"](kernel, scale * other), found, size=kernel.size)
    assert compiled["kernel_distance"](kernel, kernel.copy()) == 0


@CHECK
@given(seed=seeds, ridges=st.tuples(scales, scales), kind=st.sampled_from([*KERNELS]))
def test_effective_dimension_lies_between_0_and_the_rows_and_falls_with_the_ridge(seed, ridges, kind):
    kernel = KERNELS[kind](seed)
    rows, rounding = len(spectrum(kernel)), tolerance(np.float64, N)
    less, more = (compiled["effective_dimension"](kernel, ridge) for ridge in sorted(ridges))
    assert 0 <= more <= less * (1 + rounding) <= rows * (1 + rounding) ** 2
    assert_close(compiled["effective_dimension"](kernel, 0.0), rows)


@CHECK
@given(seed=seeds)
def test_target_alignment_is_that_of_the_trace_for_independent_outputs(seed):
    """A kernel times the identity of the outputs is aligned as the kernel, up to the norms."""
    kernel, targets = matrix(seed), features(seed + 1, N, C)
    spread = kernel[:, :, None, None] * np.eye(C)
    centred = targets - targets.mean(0)
    factor = np.linalg.norm(centred @ centred.T) / (np.linalg.norm(centred) ** 2 * np.sqrt(C))
    want = factor * measure.target_alignment(kernel, targets)
    assert_close(measure.target_alignment(spread, targets), want, size=kernel.size)


# --- the package around it --------------------------------------------------------------------------------------------


FUNCTIONS = {
    "kernel_distance": lambda k, other: measure.kernel_distance(k, other),
    "kernel_velocity": lambda k, other: measure.kernel_velocity(k, other, 2.0),
    "cka": lambda k, other: measure.cka(k, other),
    "target_alignment": lambda k, other: measure.target_alignment(k, other[:, 0]),
    "effective_dimension": lambda k, other: measure.effective_dimension(k, jnp.abs(other.ravel()[0])),
    "effective_rank": lambda k, other: measure.effective_rank(k),
    "condition_number": lambda k, other: measure.condition_number(k, rtol=jnp.abs(other.ravel()[0]) * 1e-12),
    "spectrum_decay": lambda k, other: measure.spectrum_decay(k),
    "kernel_regression": lambda k, other: measure.kernel_regression(k, other[:M], k[:, :2], ridge=other[0, 0]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_under_jit_and_vmap_and_strict_promotion(name):
    """Two dtypes at once: the wider one counts."""
    kernels, others = jnp.stack([matrix(0), matrix(1)]), jnp.stack([matrix(2), matrix(3)]).astype(jnp.float32)
    function = FUNCTIONS[name]
    with jax.numpy_dtype_promotion("strict"):
        found = jax.jit(jax.vmap(function))(kernels, others)
    condition = condition_number(kernels[0]) + condition_number(kernels[1])
    assert found.dtype == jnp.float64
    for i in range(2):
        assert_close(found[i], function(kernels[i], others[i]), size=kernels[i].size, condition=condition)


def test_regression_is_what_damping_adds_to_the_outputs():
    """The ridge is n times the damping of a loss that is a mean; ``filtered_predictions`` needs no kernel."""
    rng = np.random.default_rng(0)
    params = {"in": {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4)}, "out": rng.normal(size=(4, C))}
    params = jax.tree.map(jnp.asarray, params)
    x, new, y = (jnp.asarray(rng.normal(size=shape)) for shape in ((N, 3), (M, 3), (N, C)))
    mu = 0.1

    @jax.jit
    def both(params):
        want, _ = gnl.filtered_predictions(network, params, x, y, [gnl.filters.Tikhonov(mu)], new, rank=N * C)
        kernel, between = (measure.empirical_ntk(network, params, batch, x) for batch in (x, new))
        added = measure.kernel_regression(kernel, between, y - network(params, x), ridge=N * mu)
        return want[0], network(params, new) + added, kernel

    want, got, kernel = both(params)
    condition = condition_number(as_matrix(kernel)[0] + N * mu * np.eye(N * C))
    assert_close(got, want, size=N * C, condition=condition)


def test_one_output_with_its_axes_or_without():
    kernel, new, residuals = matrix(0), features(7, M) @ features(0).T, features(8, N, 1)
    want = measure.kernel_regression(kernel, new, residuals, ridge=1.0)
    full = functools.partial(measure.kernel_regression, kernel[..., None, None], new[..., None, None], ridge=1.0)
    assert_close(full(residuals), want, size=N, condition=condition_number(kernel))
    assert full(residuals[:, 0]).shape == (M,)
    assert_close(full(residuals[:, 0]), want, size=N, condition=condition_number(kernel))


def test_the_estimate_of_when_kernel_drifts_is_of_this_distance():
    """Exact where it takes unit vectors; with random signs it is one draw of its own distribution."""
    rng = np.random.default_rng(0)
    params, anchor = ({"w": rng.normal(size=(3, C)), "b": rng.normal(size=C)} for _ in range(2))
    params, anchor, x = jax.tree.map(jnp.asarray, (params, anchor, rng.normal(size=(N, 3))))

    def model(p, x):
        return jnp.tanh(affine(p, x))

    now, then = (measure.empirical_ntk(model, p, x) for p in (params, anchor))
    exact, probes = measure.kernel_distance(now, then), 4
    assert_close(periods.kernel_distance(model, params, anchor, x, N * C), exact, size=N * C)
    signs = rng.choice([-1.0, 1.0], size=(2000, N * C, probes))
    draws = np.array([distance(as_matrix(now)[0] @ z, as_matrix(then)[0] @ z) for z in signs])
    estimate = float(periods.kernel_distance(model, params, anchor, x, probes))
    assert draws.min() < estimate < draws.max()
    assert estimate != pytest.approx(float(exact))  # with random signs indeed
    spread = np.std(draws)
    assert abs(np.mean(draws) - exact) < spread  # few probes are biased, by less than they scatter


# --- bad input --------------------------------------------------------------------------------------------------------

SQUARE = matrix(0)
BAD_KERNELS = {
    "not square": (np.ones((3, 4)), ValueError, "must be square"),
    "a vector": (np.ones(3), ValueError, "must be square"),
    "outputs differ": (np.ones((3, 3, 2, 1)), ValueError, "must be square"),
    "empty": (np.ones((0, 0)), ValueError, "at least one example"),
    "integers": (np.ones((3, 3), int), TypeError, "must be a real float array"),
    "complex": (np.ones((3, 3), complex), TypeError, "must be a real float array"),
    "a list": ([[1.0]], TypeError, "must be a real float array"),
}


@pytest.mark.parametrize("name", BAD_KERNELS)
def test_bad_kernels(name):
    bad, kind, message = BAD_KERNELS[name]
    for function in (
        lambda k: measure.kernel_distance(k, SQUARE),
        lambda k: measure.cka(k, SQUARE),
        lambda k: measure.kernel_velocity(k, SQUARE, 1.0),
        lambda k: measure.target_alignment(k, np.ones(3)),
        lambda k: measure.effective_dimension(k, 1.0),
        measure.effective_rank,
        measure.condition_number,
        measure.spectrum_decay,
        lambda k: measure.kernel_regression(k, np.ones((1, 3)), np.ones(3)),
    ):
        with pytest.raises(kind, match=f"kernel {message}|kernel .*{message}"):
            function(bad)
    with pytest.raises(kind, match=f"other .*{message}"):
        measure.cka(SQUARE, bad)


def test_bad_arguments():
    full, labels = outputs(0), LABELS
    with pytest.raises(ValueError, match="kernel and other must have the same shape"):
        measure.kernel_distance(SQUARE, SQUARE[:3, :3])
    for time in (0.0, -1.0):
        with pytest.raises(ValueError, match="time must be a positive"):
            measure.kernel_velocity(SQUARE, SQUARE, time)
    for function in (measure.effective_dimension, lambda k, r: measure.kernel_regression(k, k, k, ridge=r)):
        with pytest.raises(ValueError, match="ridge must be a finite number that is not negative"):
            function(SQUARE, -1.0)
    with pytest.raises(ValueError, match="rtol"):
        measure.condition_number(SQUARE, rtol=-1.0)
    for ranks in ({"first": 3, "last": 3}, {"first": 0}, {"last": N + 1}, {"first": N}):
        with pytest.raises(ValueError, match="first"):
            measure.spectrum_decay(SQUARE, **ranks)
    for kernel, targets in ((SQUARE, labels[:3]), (SQUARE, np.ones((N, 2, 2))), (full, np.ones(N)), (SQUARE, full)):
        with pytest.raises(ValueError, match="targets: its shape must be"):
            measure.target_alignment(kernel, targets)
    with pytest.raises(ValueError, match="classes must be 2 with a kernel of shape"):
        measure.target_alignment(full, labels, classes=3)
    with pytest.raises(TypeError, match="classes is for integer labels"):
        measure.target_alignment(SQUARE, np.ones(N), classes=3)
    for targets in ([0, 1], np.ones(N, complex), np.array(["a"] * N)):
        with pytest.raises(TypeError, match="targets must be an array"):
            measure.target_alignment(SQUARE, targets)
    for new in (full, SQUARE[:, :3], np.ones(N)):
        with pytest.raises(ValueError, match="kernel_new: its shape must be"):
            measure.kernel_regression(SQUARE, new, np.ones(N))
    for kernel, residuals in ((SQUARE, np.ones(3)), (SQUARE, np.ones((N, 0))), (full, np.ones(N))):
        with pytest.raises(ValueError, match="residuals: its shape must be"):
            measure.kernel_regression(kernel, kernel, residuals)
    with pytest.raises(TypeError, match="residuals must be a real float array"):
        measure.kernel_regression(SQUARE, SQUARE, np.ones(N, int))
    assert flat(measure.kernel_regression(SQUARE, SQUARE[:0], np.ones((N, C)))).shape == (0,)
