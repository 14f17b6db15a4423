"""The linearised problem against dense matrices."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gn_linear as gnl
from gn_linear import _jacobian, _tree, curvature
from tests.support import PROBLEMS, assert_close, dense, dense_jacobian, flat, l2_diagonal, tolerance, unflatten_like

PENALTIES = {
    "none": lambda params: 0.0,
    "scalar": lambda params: 0.3,
    "tree": lambda params: jax.tree.map(lambda p: 0.1 + 0.2 * p.ndim, params),
}


@functools.cache
def compiled(name):
    """All that a problem offers, for a vector, a right-hand side and a penalty, in one compiled function."""
    problem = PROBLEMS[name]

    @jax.jit
    def everything(l2, vector, rhs):
        linear = curvature.linearised_problem(
            problem.predict, problem.loss, problem.params, problem.inputs, targets=problem.targets, l2=l2
        )
        products = linear.product(vector), linear.quadratic(vector)
        return linear.objective, *products, linear.reductions(rhs, vector), linear.diagonal()

    return everything


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_everything_against_dense_matrices(name, penalty):
    problem, oracle = PROBLEMS[name], dense(name)
    l2 = PENALTIES[penalty](problem.params)
    coefficients = l2_diagonal(l2, problem.params)
    ggn = oracle.ggn + np.diag(coefficients)
    rng = np.random.default_rng(11)
    v, b = rng.normal(size=(2, oracle.params.size))
    trees = unflatten_like(v, problem.params), unflatten_like(b, problem.params)
    objective, product, quadratic, reductions, diagonal = compiled(name)(l2, *trees)
    size = oracle.jacobian.size
    assert_close(objective, oracle.value + oracle.params @ (coefficients * oracle.params) / 2, size=size)
    assert_close(product, ggn @ v, size=size)
    assert_close(quadratic, v @ ggn @ v, size=size)
    assert_close(diagonal, np.diag(ggn), size=size)
    gradient = oracle.gradient + coefficients * oracle.params
    slopes = float(np.abs(b) @ np.abs(v) + v @ ggn @ v)
    assert_close(reductions.predicted, -(b @ v + v @ ggn @ v / 2), scale=slopes, size=size)
    assert_close(reductions.rest, (b - gradient) @ v, scale=slopes + float(np.abs(gradient) @ np.abs(v)), size=size)


@pytest.mark.parametrize("name", ["affine", "decay"])
def test_predicted_reduction_of_the_own_gradient_has_no_rest(name):
    problem, oracle = PROBLEMS[name], dense(name)
    d = np.random.default_rng(12).normal(size=oracle.params.size)
    trees = unflatten_like(d, problem.params), unflatten_like(oracle.gradient + 0.3 * oracle.params, problem.params)
    reductions = compiled(name)(0.3, *trees)[3]
    scale = float(np.abs(oracle.gradient + 0.3 * oracle.params) @ np.abs(d))
    assert_close(reductions.rest, 0.0, scale=scale, size=oracle.jacobian.size)


def test_predicted_reduction_is_the_actual_one_on_a_quadratic():
    problem, oracle = PROBLEMS["affine"], dense("affine")
    d = np.random.default_rng(13).normal(size=oracle.params.size)
    step, gradient = unflatten_like(d, problem.params), unflatten_like(oracle.gradient, problem.params)
    objective, _, _, reductions, _ = compiled("affine")(0.0, step, gradient)
    moved = problem.predict(_tree.add(problem.params, step), problem.inputs)
    after = np.sum((flat(moved) - flat(problem.targets)) ** 2) / 2 / 8
    assert_close(reductions.predicted, float(objective) - after, size=16, scale=float(objective) + after)


@pytest.mark.parametrize(("parameters", "outputs"), [(3, 9), (9, 3)])
def test_diagonal_by_parameters_or_by_outputs(parameters, outputs):
    """Whichever is fewer; both ways are exact."""
    matrix = np.random.default_rng(14).normal(size=(outputs, parameters))
    linear = curvature.linearised_problem(
        lambda p, x: x @ p, gnl.losses.squared_error, jnp.ones(parameters), jnp.asarray(matrix), l2=0.5
    )
    assert linear.output_size == outputs
    assert_close(linear.diagonal(), np.sum(matrix**2, axis=0) / outputs + 0.5, size=matrix.size)


@pytest.mark.parametrize("name", ["softmax_soft", "two_heads", "huber"])
def test_sampled_diagonal_is_unbiased(name, monkeypatch):
    """The mean over all sign vectors of a few outputs is the diagonal, exactly."""
    problem = PROBLEMS[name]
    few = jax.tree.map(lambda x: x[:2], (problem.inputs, problem.targets))
    small = problem._replace(inputs=few[0], targets=few[1])

    def linear():
        return curvature.linearised_problem(
            small.predict, small.loss, small.params, small.inputs, targets=small.targets
        )

    size = linear().output_size
    signs = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=size)))
    leaves = jax.tree.leaves(linear().linearisation.outputs)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    mean, exact = jax.jit(lambda signs: (mean_over(linear(), leaves, ends, signs), linear().diagonal()))(signs)
    assert_close(mean, exact, size=len(signs) * size)
    assert np.max(flat(exact)) > 0


def mean_over(linear, leaves, ends, signs):
    """The average of what one sample contributes, through the same private step that the estimate takes."""

    def one(row):
        parts = [part.reshape(leaf.shape) for part, leaf in zip(jnp.split(row, ends), leaves, strict=True)]
        return linear._squared_pullback(jax.tree.unflatten(jax.tree.structure(linear.linearisation.outputs), parts))

    return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.vmap(one)(signs))


def test_sampled_diagonal_is_within_its_own_standard_error():
    """Six of them: the variance 2 (sum_j a_j^2)^2 - 2 sum_j a_j^4 of (a^T z)^2 is at most twice the squared mean."""
    problem, oracle, samples = PROBLEMS["softmax_labels"], dense("softmax_labels"), 400

    @jax.jit
    def estimate(key):
        linear = curvature.linearised_problem(
            problem.predict, problem.loss, problem.params, problem.inputs, targets=problem.targets, l2=0.3
        )
        return linear.sampled_diagonal(key, samples), linear.sampled_diagonal(key, 1)

    diagonal = np.diag(oracle.ggn)
    many, one = estimate(jax.random.key(0))
    bound = 6 * np.sqrt(2 / samples) * diagonal
    assert np.all(np.abs(flat(many) - diagonal - 0.3) <= bound + tolerance(np.float64, oracle.jacobian.size))
    assert np.all(flat(one) >= 0.3)
    assert np.max(np.abs(flat(one) - diagonal - 0.3)) > np.max(np.abs(flat(many) - diagonal - 0.3))


def test_half_precision_parameters_are_solved_in_float32():
    problem = PROBLEMS["squared_error"]
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), (problem.params, problem.inputs))

    def everything(params, x):
        linear = curvature.linearised_problem(problem.predict, problem.loss, params, x, targets=problem.targets, l2=0.1)
        v = _tree.to_solve(params)
        return linear.product(v), linear.quadratic(v), linear.diagonal(), linear.reductions(v, v), linear.objective

    leaves = jax.tree.leaves(jax.eval_shape(everything, *low))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


def test_penalties():
    params = PROBLEMS["affine"].params
    trees = {"w": 0.1, "b": 0.7}
    assert_close(curvature.penalty(0.3, params), 0.15 * np.sum(flat(params) ** 2), size=8)
    weights = l2_diagonal(trees, params)
    assert_close(curvature.penalty(trees, params), np.sum(weights * flat(params) ** 2) / 2, size=8)
    assert_close(curvature.l2_times(trees, params), weights * flat(params))
    assert curvature.fit_l2(trees, params) == trees
    with pytest.raises(ValueError, match="l2 must be a number or a pytree of numbers with the structure of params"):
        curvature.fit_l2({"w": 0.1}, params)


@pytest.mark.parametrize(("l2", "name"), [(-1.0, "l2"), ({"w": 0.1, "b": float("nan")}, r"l2\['b'\]")])
def test_penalty_out_of_range_is_named(l2, name):
    with pytest.raises(ValueError, match=rf"^{name} must be a finite number that is not negative"):
        curvature.check_l2(l2)


# ---- the Jacobian as a matrix


@pytest.mark.parametrize("name", ["softmax_labels", "two_heads", "decay", "affine"])
def test_jacobian_is_the_dense_one(name):
    problem, oracle = PROBLEMS[name], dense(name)

    @jax.jit
    def jacobian():
        linear = curvature.linearised_problem(
            problem.predict, problem.loss, problem.params, problem.inputs, targets=problem.targets
        )
        return linear.jacobian()

    assert_close(jacobian(), oracle.jacobian, size=oracle.jacobian.size)


NOISE = np.random.default_rng(9).normal(size=2)
PATTERNS = np.random.default_rng(9).normal(size=(2, 3))


def noisy(params, inputs):
    return jnp.tanh(inputs[0] @ params) * jax.random.normal(inputs[1], (2,))


TOGETHER = {
    "no inputs": (None, lambda p, _: jnp.tanh(PATTERNS @ p)),
    "a random key": ((PATTERNS, jax.random.key(0)), noisy),
    "a random key as numbers": ((PATTERNS, np.asarray([0, 7], np.uint32)), noisy),
    "leaves of several lengths": ([PATTERNS, PATTERNS[:1]], lambda p, x: jnp.tanh(x[0] @ p) + (x[1] @ p)[0]),
    "a number": ((PATTERNS, 2.0), lambda p, x: jnp.tanh(x[0] @ p) * x[1]),
    "outputs of another length": (PATTERNS, lambda p, x: jnp.tanh(x @ p)[:1]),
    "a model for two examples": (PATTERNS, lambda p, x: jnp.tanh(x @ p) * NOISE),
}


@pytest.mark.parametrize("kind", TOGETHER)
def test_jacobian_of_examples_that_cannot_be_told_apart(kind):
    inputs, predict = TOGETHER[kind]
    params = jnp.asarray([0.3, -0.2, 0.5])
    problem = curvature.linearised_problem(predict, gnl.losses.squared_error, params, inputs)
    assert _jacobian._lengths(predict, params, inputs, problem.linearisation.outputs) is None
    expected = dense_jacobian(predict, params, inputs)
    assert_close(problem.jacobian(), expected, size=6)
    assert_close(problem.gram(), expected @ expected.T, size=6)


@pytest.mark.parametrize("name", ["softmax_labels", "two_heads", "decay", "affine"])
def test_gram_is_that_of_the_dense_jacobian(name):
    problem, oracle = PROBLEMS[name], dense(name)

    @jax.jit
    def gram():
        return curvature.linearised_problem(
            problem.predict, problem.loss, problem.params, problem.inputs, targets=problem.targets
        ).gram()

    assert_close(gram(), oracle.jacobian @ oracle.jacobian.T, size=oracle.jacobian.size)


def test_gram_needs_no_jacobian():
    n, width = 24, 13

    def predict(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    def matrix(p, x):
        return curvature.linearised_problem(predict, gnl.losses.squared_error, p, x).gram()

    params = {"w": jnp.ones((11, width)), "v": jnp.ones((width, 3))}
    shapes = {aval.shape for aval in intermediate_shapes(jax.make_jaxpr(matrix)(params, jnp.ones((n, 11))))}
    assert max(math.prod(shape) for shape in shapes) <= (3 * n) ** 2 < 3 * n * 11 * width


def intermediate_shapes(jaxpr):
    """Of every value, in inner functions too."""
    for eqn in jaxpr.eqns:
        yield from (var.aval for var in eqn.outvars)
        for value in eqn.params.values():
            if hasattr(value, "eqns"):
                yield from intermediate_shapes(value)


# ---- points of several kinds, as inside and on the boundary of a domain


def heat(params, points):
    """What is left of an equation inside, values on the boundary, and one number for each of the two together."""

    def value(point):
        return jnp.tanh(point @ params["w"] + params["b"]) @ params["v"]

    inside = jax.vmap(lambda point: jnp.trace(jax.hessian(value)(point)))(points["inside"])
    return {"boundary": jax.vmap(value)(points["boundary"])[:, None], "inside": inside}


HEAT = {"w": jnp.asarray(np.random.default_rng(3).normal(size=(2, 4))), "b": jnp.zeros(4), "v": jnp.ones(4)}
POINTS = {
    "inside": jnp.asarray(np.random.default_rng(4).normal(size=(6, 2))),
    "boundary": jnp.asarray(np.random.default_rng(5).normal(size=(3, 2))),
}


def test_points_of_several_kinds_are_taken_one_by_one():
    calls = []

    def predict(params, points):
        calls.append({name: len(part) for name, part in points.items()})
        return heat(params, points)

    @jax.jit
    def matrices(params, points):
        problem = curvature.linearised_problem(predict, gnl.losses.squared_error, params, points)
        calls.clear()
        return problem.jacobian(), problem.gram()

    matrix, gram = matrices(HEAT, POINTS)
    assert calls
    assert all(counts == {"inside": 1, "boundary": 1} for counts in calls)
    expected = dense_jacobian(heat, HEAT, POINTS)
    assert_close(matrix, expected, size=expected.size)
    assert_close(gram, expected @ expected.T, size=expected.size)


def test_jacobian_costs_one_example_a_row():
    """Each row is pulled back through one example, not through the batch: no value is as large as rows times batch."""
    n, params = 64, jnp.ones(3)

    def predict(p, x):
        return jnp.tanh(x @ p)

    def matrix(x):
        return curvature.linearised_problem(predict, gnl.losses.squared_error, params, x).jacobian()

    text = str(jax.make_jaxpr(matrix)(jnp.ones((n, 3))))
    assert f"[{n},{n}]" not in text
    assert f"[{n},1,3]" in text.replace(" ", "")
