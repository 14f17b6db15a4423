"""Losses: closed forms against formulas written once more, against optax, and at the edges."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gn_linear as gnl
from tests import support
from tests.support import (
    PROBLEMS,
    assert_bit_equal,
    assert_close,
    dense,
    dense_loss,
    flat,
    mean_of_sums,
    tolerance,
    unflatten_like,
)

losses = gnl.losses
CLOSED = [name for name in PROBLEMS if name not in {"from_convex", "decay", "affine"}]
BATCH = {"from_convex", *CLOSED}


def outputs_of(name):
    problem = PROBLEMS[name]
    return problem.predict(problem.params, problem.inputs)


@functools.cache
def compiled(name):
    """Value, gradient, and Hessian product of a problem's loss, in one compiled function."""
    problem = PROBLEMS[name]

    @jax.jit
    def everything(outputs, targets, v):
        product = problem.loss.hessian_product(outputs, targets, v)
        return problem.loss(outputs, targets), problem.loss.gradient(outputs, targets), product

    return everything


@pytest.mark.parametrize("name", sorted(BATCH))
def test_value_gradient_and_hessian(name):
    problem, oracle, outputs = PROBLEMS[name], dense(name), outputs_of(name)
    v = np.random.default_rng(3).normal(size=oracle.outputs.size)
    value, gradient, product = compiled(name)(outputs, problem.targets, unflatten_like(v, outputs))
    assert_close(value, oracle.value, size=oracle.outputs.size)
    assert_close(gradient, oracle.output_gradient)
    assert_close(product, oracle.hessian @ v)
    assert jax.tree.structure(gradient) == jax.tree.structure(outputs) == jax.tree.structure(product)


@pytest.mark.parametrize("name", sorted(BATCH))
def test_root_is_a_square_root_of_the_hessian(name):
    problem, oracle, outputs = PROBLEMS[name], dense(name), outputs_of(name)
    unravel = support.ravel_outputs(outputs)[1]

    @jax.jit
    @jax.vmap
    def columns(unit):
        hessian = problem.loss.hessian(outputs, problem.targets)
        pair = hessian.root(unravel(unit)), hessian.root_transpose(unravel(unit))
        return tuple(support.ravel_outputs(part)[0] for part in pair)

    root, root_transpose = (np.asarray(part).T for part in columns(jnp.eye(oracle.outputs.size)))
    # The root of a singular matrix is only as good as the root of the rounding error; its square is not.
    assert_close(root @ root.T, oracle.hessian)
    assert_close(root_transpose, root.T)


@pytest.mark.parametrize("name", CLOSED)
def test_jax_grad_is_the_gradient_to_the_bit(name):
    problem, outputs = PROBLEMS[name], outputs_of(name)
    assert_bit_equal(
        jax.grad(lambda out: problem.loss(out, problem.targets))(outputs),
        problem.loss.gradient(outputs, problem.targets),
    )


@pytest.mark.parametrize("name", ["softmax_labels", "sigmoid", "huber"])
def test_hessian_by_differentiating_twice(name):
    problem, oracle, outputs = PROBLEMS[name], dense(name), outputs_of(name)
    v = np.random.default_rng(4).normal(size=outputs.shape)
    gradient = jax.grad(problem.loss)
    assert_close(jax.jvp(lambda out: gradient(out, problem.targets), (outputs,), (v,))[1], oracle.hessian @ v.ravel())


F = jnp.asarray(np.random.default_rng(5).normal(size=(6, 3)))
LABELS = jnp.asarray([0, 2, 1, 1, 0, 2])
ONE_HOT = jnp.asarray(support.one_hot(LABELS, 3))
REAL = jnp.asarray(np.random.default_rng(6).normal(size=(6, 3)))
BINARY = jnp.asarray(np.random.default_rng(7).integers(0, 2, (6, 3)))
COUNTS = jnp.asarray(np.random.default_rng(8).poisson(2, (6, 3)))


def convex_of_three(f, y):
    """The Poisson loss written as a user would, one value per example."""
    return jnp.sum(jnp.exp(f) - y * f, axis=-1)


OPTAX = {
    "softmax": (losses.softmax_cross_entropy, optax.losses.softmax_cross_entropy, ONE_HOT),
    "softmax_integer": (
        losses.softmax_cross_entropy,
        optax.losses.softmax_cross_entropy_with_integer_labels,
        LABELS,
    ),
    "sigmoid": (losses.sigmoid_binary_cross_entropy, optax.losses.sigmoid_binary_cross_entropy, BINARY),
    "huber": (losses.huber(0.8), functools.partial(optax.losses.huber_loss, delta=0.8), REAL),
    "l2": (losses.squared_error, optax.losses.l2_loss, REAL),
}


@pytest.mark.parametrize("name", OPTAX)
def test_agrees_with_optax(name):
    ours, theirs, targets = OPTAX[name]

    def total(f):
        return jnp.sum(theirs(f, targets)) / f.shape[0]

    value, gradient = jax.value_and_grad(total)(F)
    assert_close(ours(F, targets), value, size=F.size)
    assert_close(ours.gradient(F, targets), gradient)
    _, product = jax.jvp(jax.grad(total), (F,), (REAL,))
    assert_close(ours.hessian_product(F, targets, REAL), product)


@pytest.mark.parametrize("name", ["softmax", "softmax_integer"])
def test_optax_loss_as_it_is(name):
    ours, theirs, targets = OPTAX[name]
    wrapped = losses.from_convex(theirs)
    assert_close(wrapped(F, targets), ours(F, targets), size=F.size)
    assert_close(wrapped.gradient(F, targets), ours.gradient(F, targets))
    assert_close(wrapped.hessian_product(F, targets, REAL), ours.hessian_product(F, targets, REAL))


def test_integer_labels_are_one_hot_targets():
    for targets in (ONE_HOT, ONE_HOT.astype(int)):
        assert_bit_equal(
            (losses.softmax_cross_entropy(F, LABELS), losses.softmax_cross_entropy.gradient(F, LABELS)),
            (losses.softmax_cross_entropy(F, targets), losses.softmax_cross_entropy.gradient(F, targets)),
        )


def test_labels_of_sequences_have_the_shape_without_the_classes():
    outputs, labels = F.reshape(2, 3, 3), LABELS.reshape(2, 3)
    # Two examples of three positions each: the mean is over two, the sum over three.
    assert_close(losses.softmax_cross_entropy(outputs, labels), 3 * losses.softmax_cross_entropy(F, LABELS), size=18)
    assert_close(
        losses.softmax_cross_entropy.gradient(outputs, labels), 3 * losses.softmax_cross_entropy.gradient(F, LABELS)
    )


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range_is_not_a_number(label):
    assert np.isnan(losses.softmax_cross_entropy(F, LABELS.at[2].set(label)))
    gradient = losses.softmax_cross_entropy.gradient(F, LABELS.at[2].set(label))
    assert np.all(np.isnan(gradient[2]))
    assert np.all(np.isfinite(np.delete(gradient, 2, axis=0)))


def test_masked_class_has_no_gradient():
    masked = F.at[:, 1].set(-jnp.inf)
    labels = jnp.zeros(6, int)
    rest = losses.softmax_cross_entropy(F[:, ::2], labels)
    assert_close(losses.softmax_cross_entropy(masked, labels), rest, size=F.size)
    assert not np.any(losses.softmax_cross_entropy.gradient(masked, labels)[:, 1])


# --- numbers at the edges --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [40.0, 200.0])
@pytest.mark.parametrize("right", [True, False])
def test_saturated_softmax_in_float32(gap, right):
    """Against the exact matrices in float64, where exp(-200) is far from underflow."""
    logits = np.array([[gap, 0.0, 1.0], [0.0, -gap, 0.5], [0.1, 0.2, 0.3]])
    label = jnp.asarray([0, 0, 2] if right else [1, 1, 0])
    v = np.random.default_rng(9).normal(size=(3, 3))
    value, gradient, hessian = dense_loss(mean_of_sums(support.cross_entropy), jnp.asarray(logits), label)
    f, v32 = jnp.asarray(logits, jnp.float32), jnp.asarray(v, jnp.float32)
    ours, operator = losses.softmax_cross_entropy, losses.softmax_cross_entropy.hessian(f, label)
    assert_close(ours(f, label), value, size=logits.size)
    assert_close(ours.gradient(f, label), gradient)
    product = hessian @ v.ravel()
    assert_close(operator.product(v32), product)
    assert_close(operator.root(operator.root_transpose(v32)), product)
    # Each example by itself: the saturated one is not hidden behind the largest.
    alone = operator.product(v32)[0]
    p = np.exp(logits[0] - gap) / np.sum(np.exp(logits[0] - gap))
    exact = p * (v[0] - p @ v[0]) / 3
    bound = tolerance(jnp.float32, 3) * (p * np.max(np.abs(v[0]))) + float(jnp.finfo(jnp.float32).tiny)
    assert np.all(np.abs(np.asarray(alone, np.float64) - exact) <= bound)


@pytest.mark.parametrize("gap", [40.0, 200.0])
def test_saturated_sigmoid_in_float32(gap):
    f = jnp.asarray([[gap], [-gap], [0.3]], jnp.float32)
    y = jnp.asarray([[1.0], [1.0], [0.0]], jnp.float32)
    assert_close(losses.sigmoid_binary_cross_entropy(f, y), (gap + np.log1p(np.exp(np.float32(0.3)))) / 3, size=3)
    expected = np.array([-np.exp(-gap), -1.0, 1 / (1 + np.exp(-np.float64(np.float32(0.3))))]) / 3
    gradient = losses.sigmoid_binary_cross_entropy.gradient(f, y).astype(np.float64)
    # Entry by entry: the small gradient of the output that is right is not lost beside the others.
    tiny = float(jnp.finfo(jnp.float32).tiny)
    for entry, exact in zip(gradient[:, 0], expected, strict=True):
        assert abs(entry - exact) <= tolerance(jnp.float32, 3, gap) * abs(exact) + tiny
    assert np.all(np.isfinite(losses.sigmoid_binary_cross_entropy.hessian(f, y).product(f)))


def test_huber_outliers_have_a_gradient_but_no_curvature():
    residuals = jnp.asarray([[0.3], [-50.0], [1e30], [-0.9]])
    ours = losses.huber(1.0)
    value, gradient, hessian = dense_loss(mean_of_sums(support.huber(1.0)), residuals, jnp.zeros((4, 1)))
    assert_close(ours(residuals), value, size=4)
    assert_close(ours.gradient(residuals), gradient)
    assert_close(flat(ours.gradient(residuals)), np.array([0.3, -1.0, 1.0, -0.9]) / 4)
    product = ours.hessian(residuals).product(jnp.ones((4, 1)))
    assert_close(product, np.diag(hessian))
    assert flat(product)[1] == flat(product)[2] == 0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", sorted(BATCH))
def test_dtypes(name, dtype):
    problem = PROBLEMS[name]
    outputs = jax.tree.map(lambda x: x.astype(dtype), outputs_of(name))

    targets = problem.targets.astype(dtype) if name == "from_convex" else problem.targets  # a plain callable promotes

    def everything(outputs):
        value, by_jax = jax.value_and_grad(problem.loss)(outputs, targets)
        gradient, hessian = problem.loss.gradient(outputs, targets), problem.loss.hessian
        return value, (by_jax, gradient, hessian(outputs, targets).product(outputs))

    value, vectors = jax.eval_shape(everything, outputs)
    assert value.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(vectors)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_outputs_are_reduced_in_float32(dtype):
    n = 4096  # 1 is below half a unit in the last place of this sum
    outputs, targets = jnp.full((n,), 2.0, dtype), jnp.zeros(n, dtype)
    assert float(losses.squared_error(outputs, targets)) == 2.0
    assert_close(losses.squared_error.gradient(outputs, targets), np.full(n, 2.0 / n), size=1)


@pytest.mark.parametrize("name", sorted(BATCH - {"from_convex"}))
def test_strict_promotion(name):
    problem = PROBLEMS[name]
    outputs = jax.tree.map(lambda x: x.astype(jnp.float32), outputs_of(name))

    def everything(outputs):
        hessian = problem.loss.hessian(outputs, problem.targets)
        products = hessian.product(outputs), hessian.root(outputs), hessian.root_transpose(outputs)
        return jax.value_and_grad(problem.loss)(outputs, problem.targets), products

    with jax.numpy_dtype_promotion("strict"):
        results = jax.eval_shape(everything, outputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype(jnp.float32)}


def test_empty_batch_is_zero():
    assert float(losses.squared_error(jnp.zeros((0, 3)), jnp.zeros((0, 3)))) == 0
    assert losses.squared_error.gradient(jnp.zeros((0, 3))).shape == (0, 3)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [losses.squared_error, losses.softmax_cross_entropy, losses.huber(0.5)])
def test_weight_of_zero_leaves_an_example_out(inner):
    targets = LABELS if isinstance(inner, losses.SoftmaxCrossEntropy) else REAL
    weights = jnp.ones(6).at[4].set(0.0)
    keep = np.array([0, 1, 2, 3, 5])
    ours = losses.weighted(inner)
    assert_close(ours(F, (targets, weights)), 5 / 6 * inner(F[keep], targets[keep]), size=F.size)
    gradient = ours.gradient(F, (targets, weights))
    assert_close(gradient[keep], 5 / 6 * inner.gradient(F[keep], targets[keep]))
    assert not np.any(gradient[4])
    wild = F.at[4].set(1e10)
    assert_bit_equal(ours(wild, (targets, weights)), ours(F, (targets, weights)))
    product = ours.hessian(F, (targets, weights)).product(REAL)
    assert_close(product[keep], 5 / 6 * inner.hessian(F[keep], targets[keep]).product(REAL[keep]))
    assert not np.any(product[4])


def test_weights_of_a_pytree():
    problem, outputs = PROBLEMS["two_heads"], outputs_of("two_heads")
    weights = {"inside": jnp.full(7, 2.0), "edge": jnp.full(3, 0.5)}
    ours = losses.weighted(losses.squared_error)(outputs, (problem.targets, weights))
    parts = {key: losses.squared_error(outputs[key], problem.targets[key]) for key in outputs}
    assert_close(ours, 2 * parts["inside"] + parts["edge"] / 2, size=13)
    assert_close(losses.weighted(losses.squared_error)(outputs, (None, weights)) >= 0, 1.0)


@pytest.mark.parametrize("weights", [jnp.ones((6, 1)), jnp.ones(5), jnp.float64(1.0), jnp.ones((6, 3))])
def test_weights_are_one_an_example(weights):
    ours = losses.weighted(losses.squared_error)
    shape = str(weights.shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"weights have shape {shape}.*weights need shape \(6,\)"):
        ours(F, (REAL, weights))


def test_weighted_needs_a_pair_and_a_loss_of_this_module():
    with pytest.raises(ValueError, match=r"targets=\(targets, weights\)"):
        losses.weighted(losses.squared_error)(F, REAL)
    with pytest.raises(TypeError, match=r"put the weights of a plain callable\s+inside it"):
        losses.weighted(losses.from_convex(optax.losses.l2_loss))


# --- plain callables -------------------------------------------------------------------------------------------------


def test_from_convex_takes_a_scalar_or_one_value_per_example():
    per_example = losses.from_convex(convex_of_three)
    scalar = losses.from_convex(lambda f, y: jnp.mean(convex_of_three(f, y)))
    for ours in (per_example, scalar):
        assert_close(ours(F, COUNTS), losses.poisson(F, COUNTS), size=F.size)
        assert_close(ours.gradient(F, COUNTS), losses.poisson.gradient(F, COUNTS))
        assert_close(ours.hessian_product(F, COUNTS, REAL), losses.poisson.hessian_product(F, COUNTS, REAL))


def test_from_convex_refuses_what_was_broadcast():
    ours = losses.from_convex(optax.losses.l2_loss)
    square = losses.from_convex(lambda f, y: (f - y) ** 2)
    with pytest.raises(ValueError, match=r"returned shape \(6, 6\).*outputs of shape \(6,\);.*broadcast"):
        square(F[:, 0], REAL[:, :1])
    with pytest.raises(ValueError, match=r"returned shape \(6, 3\)"):
        ours.gradient(F, REAL)
    with pytest.raises(ValueError, match="dtype int64"):
        losses.from_convex(lambda f, y: jnp.sum(y))(F, COUNTS)


def test_from_convex_passes_losses_through():
    assert losses.from_convex(losses.poisson) is losses.poisson
    with pytest.raises(TypeError, match=r"[cC]allable"):
        losses.from_convex("mse")


def test_root_of_a_plain_callable_is_for_one_array():
    ours = losses.from_convex(lambda f, y: jnp.sum(f["a"] ** 2))
    with pytest.raises(NotImplementedError, match="single output array"):
        ours.hessian({"a": F}, None).root({"a": F})


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [losses.squared_error, losses.huber(0.7)])
def test_no_targets_mean_zeros(loss):
    zeros = jnp.zeros_like(F)
    assert_bit_equal(loss(F), loss(F, zeros))
    assert_bit_equal(loss.gradient(F, None), loss.gradient(F, zeros))


@pytest.mark.parametrize(
    "loss", [losses.softmax_cross_entropy, losses.sigmoid_binary_cross_entropy, losses.poisson], ids=str
)
def test_no_targets_are_an_error_elsewhere(loss):
    for method in (loss, loss.gradient, loss.hessian):
        with pytest.raises(ValueError, match=f"targets is None, but {type(loss).__name__}"):
            method(F, None)


@pytest.mark.parametrize("name", ["squared_error", "sigmoid_binary_cross_entropy", "poisson", "huber"])
def test_nothing_is_broadcast(name):
    loss = losses.huber() if name == "huber" else getattr(losses, name)
    for method in (loss, loss.gradient, loss.hessian):
        with pytest.raises(ValueError, match=r"has shape \(6, 1\), but the outputs of predict have shape \(6,\)"):
            method(F[:, 0], REAL[:, :1])
        with pytest.raises(ValueError, match=r"has shape \(6,\), but the outputs of predict have shape \(6, 1\)"):
            method(F[:, :1], REAL[:, 0])


def test_softmax_says_which_targets_it_takes():
    message = r"shape \(6, 1\).*shape \(6, 3\).*integer labels of shape \(6,\), or one-hot targets of shape \(6, 3\)"
    with pytest.raises(ValueError, match=message):
        losses.softmax_cross_entropy(F, LABELS[:, None])
    with pytest.raises(ValueError, match=r"dtype float64.*integer labels"):
        losses.softmax_cross_entropy(F, LABELS.astype(float))


def test_leaf_with_the_wrong_shape_is_named():
    problem, outputs = PROBLEMS["two_heads"], outputs_of("two_heads")
    with pytest.raises(ValueError, match=r"leaf \['inside'\] has shape \(7, 1\)"):
        problem.loss(outputs, {**problem.targets, "inside": problem.targets["inside"][:, None]})
    with pytest.raises(ValueError, match="targets must have the tree structure of the outputs"):
        problem.loss(outputs, problem.targets["inside"])


# --- transformations -------------------------------------------------------------------------------------------------


def test_delta_may_be_traced():
    deltas = jnp.asarray([0.2, 1.0, 5.0])
    values = jax.jit(jax.vmap(lambda delta: losses.huber(delta)(F, REAL)))(deltas)
    assert_close(values, [float(losses.huber(float(d))(F, REAL)) for d in deltas], size=F.size)


def test_losses_are_pytrees_of_their_numbers():
    assert jax.tree.leaves(losses.weighted(losses.huber(0.3))) == [0.3]
    assert jax.tree.leaves(losses.squared_error) == []
    values = jax.vmap(lambda loss: loss(F, REAL))(losses.Huber(jnp.asarray([0.2, 1.0])))
    assert_close(values, [float(losses.huber(0.2)(F, REAL)), float(losses.huber(1.0)(F, REAL))], size=F.size)


def test_derivative_by_delta_and_by_targets():
    slope = jax.grad(lambda loss: loss(F, REAL))(losses.huber(0.5)).delta
    residuals = np.abs(np.asarray(F - REAL))
    assert_close(slope, np.sum(np.where(residuals > 0.5, residuals - 0.5, 0)) / 6, size=F.size)
    by_targets = jax.grad(losses.squared_error, argnums=1)(F, REAL)
    assert_close(by_targets, -(F - REAL) / 6)
    both = jax.grad(losses.squared_error, argnums=(0, 1))(F, REAL)
    assert_close(both, (np.asarray(F - REAL) / 6, -np.asarray(F - REAL) / 6))


@pytest.mark.parametrize("name", ["softmax_labels", "two_heads", "weighted_squared_error"])
def test_vmap_over_batches(name):
    problem, outputs = PROBLEMS[name], outputs_of(name)
    batches = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), outputs)
    values, gradients = jax.vmap(jax.value_and_grad(lambda out: problem.loss(out, problem.targets)))(batches)
    for i, factor in enumerate((1, 2)):
        single = jax.tree.map(lambda x, factor=factor: factor * x, outputs)
        assert_close(values[i], problem.loss(single, problem.targets), size=flat(outputs).size)
        picked = jax.tree.map(lambda g, i=i: g[i], gradients)
        assert_close(picked, problem.loss.gradient(single, problem.targets))


def test_losses_are_frozen_and_compare_by_value():
    assert losses.huber(0.5) == losses.Huber(0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        losses.huber(0.5).delta = 1.0


@pytest.mark.parametrize("delta", [0.0, -1.0, float("nan"), float("inf")])
def test_delta_is_positive_and_finite(delta):
    with pytest.raises(ValueError, match="delta must be a positive finite number"):
        losses.huber(delta)


def test_numpy_arrays_are_taken_as_they_are():
    f, y = np.asarray(F), np.asarray(REAL)
    for loss in (losses.squared_error, losses.huber(0.5)):
        assert_bit_equal(jnp.asarray(loss(f, y)), loss(F, REAL))
        assert_bit_equal(jnp.asarray(loss.gradient(f, y)), loss.gradient(F, REAL))
    assert_bit_equal(losses.softmax_cross_entropy(f, np.asarray(LABELS)), losses.softmax_cross_entropy(F, LABELS))
