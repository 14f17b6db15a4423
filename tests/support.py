"""One table of small problems, and dense oracles for them that share no code with the package.

The oracles form every matrix: the Jacobian by ``jax.jacfwd`` on raveled parameters, the Hessian in output space by
``jax.hessian`` of formulas written here, the rest in plain numpy. Tolerances follow from the precision of the dtype,
the number of terms and the condition number; no test holds a number of its own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import gn_linear as gnl

# --- tolerances ------------------------------------------------------------------------------------------------------

_SAFETY = 16.0  # a small factor for the constants that textbooks leave out


def tolerance(dtype: Any, size: int = 1, condition: float = 1.0) -> float:
    """The relative rounding error of a sum of ``size`` terms, or of a solve with this condition number."""
    return _SAFETY * float(jnp.finfo(dtype).eps) * max(size, 1) * max(condition, 1.0)


def flat(tree: Any) -> np.ndarray:
    """All entries of a pytree in one float64 vector, leaf after leaf."""
    leaves = [np.asarray(leaf).astype(np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def narrowest(*trees: Any) -> Any:
    """The floating-point dtype of the leaves with the fewest digits."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(trees)]
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return max(floats, key=lambda dtype: float(jnp.finfo(dtype).eps), default=jnp.dtype(np.float64))


def assert_close(
    actual: Any,
    desired: Any,
    *,
    size: int | None = None,
    condition: float = 1.0,
    scale: float | None = None,
    dtype: Any = None,
) -> None:
    """Compare two pytrees in the maximum norm, relative to ``scale`` (the largest entry that is desired).

    The digits are those of the narrowest dtype of ``actual``; ``size`` is the number of terms that were summed (by
    default the number of entries).
    """
    a, d = flat(actual), flat(desired)
    assert a.shape == d.shape, f"{a.shape} against {d.shape}"
    assert np.all(np.isfinite(a)), f"not finite: {a}"
    reference = float(np.max(np.abs(d), initial=0.0)) if scale is None else scale
    bound = reference * tolerance(dtype or narrowest(actual), a.size if size is None else size, condition)
    error = float(np.max(np.abs(a - d), initial=0.0))
    assert error <= bound, f"error {error:.3e} > bound {bound:.3e}\nactual  {a}\ndesired {d}"


def assert_bit_equal(actual: Any, desired: Any) -> None:
    """Compare two pytrees to the bit: structure, dtypes, values, the sign of zero and NaN."""
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, d in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        a, d = np.asarray(a), np.asarray(d)
        assert a.dtype == d.dtype
        assert a.shape == d.shape
        assert a.tobytes() == d.tobytes(), f"{a} against {d}"


# --- losses, written once more ---------------------------------------------------------------------------------------


def one_hot(labels: Any, classes: int) -> np.ndarray:
    """Rows of the identity."""
    return np.eye(classes)[np.asarray(labels)]


def half_square(f: Any, y: Any) -> Any:
    return (f - y) ** 2 / 2


def cross_entropy(f: Any, y: Any) -> Any:
    y = y if np.shape(y) == np.shape(f) else one_hot(y, f.shape[-1])
    return -y * jnp.log(jnp.exp(f) / jnp.sum(jnp.exp(f), axis=-1, keepdims=True))


def binary_cross_entropy(f: Any, y: Any) -> Any:
    p = 1 / (1 + jnp.exp(-f))
    return -(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))


def poisson(f: Any, y: Any) -> Any:
    return jnp.exp(f) - y * f


def huber(delta: float) -> Callable[[Any, Any], Any]:
    return lambda f, y: jnp.where(abs(f - y) <= delta, (f - y) ** 2 / 2, delta * abs(f - y) - delta**2 / 2)


def mean_of_sums(entries: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The package's convention: sum over leaves of the mean over examples of the sum over outputs."""

    def total(outputs: Any, targets: Any) -> Any:
        pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(targets), strict=True)
        return sum(jnp.sum(entries(f, y)) / f.shape[0] for f, y in pairs)

    return total


def weighted_mean_of_sums(entries: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The same with a weight for each example, for one output array."""

    def total(outputs: Any, targets: Any) -> Any:
        y, weights = targets
        per_example = jnp.sum(entries(outputs, y).reshape(outputs.shape[0], -1), axis=1)
        return jnp.dot(weights, per_example) / outputs.shape[0]

    return total


# --- the table of problems -------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A model, a batch and a loss; ``formula`` is the loss written independently of the package."""

    name: str
    predict: Callable[[Any, Any], Any]
    params: Any
    inputs: Any
    targets: Any
    loss: Any
    formula: Callable[[Any, Any], Any]


def network(params: Any, x: Any) -> Any:
    """A small tanh network: (n, 3) to (n, 3)."""
    return jnp.tanh(x @ params["in"]["w"] + params["in"]["b"]) @ params["out"]


def two_heads(params: Any, x: Any) -> Any:
    """Outputs with different leading axes and ranks: seven values inside, three pairs on the boundary."""
    hidden = jnp.tanh(x["inside"] @ params["in"]["w"] + params["in"]["b"])
    edge = jnp.tanh(x["edge"] @ params["in"]["w"] + params["in"]["b"])
    return {"inside": hidden @ params["out"][:, 0], "edge": edge @ params["out"][:, 1:]}


def decay(params: Any, t: Any) -> Any:
    """Exponential decay, a scalar leaf for each parameter."""
    return params["a"] * jnp.exp(-params["k"] * t)


def affine(params: Any, x: Any) -> Any:
    """Affine in its parameters, so that every objective with the squared error is a quadratic."""
    return x @ params["w"] + params["b"]


def _problems() -> dict[str, Problem]:
    rng = np.random.default_rng(2211)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape))

    params = {"in": {"w": draw(3, 4), "b": draw(4)}, "out": draw(4, 3), "absent": None}
    x, real = draw(6, 3), draw(6, 3)
    labels, binary = jnp.asarray(rng.integers(0, 3, 6)), jnp.asarray(rng.integers(0, 2, (6, 3)))
    soft = jnp.asarray(rng.dirichlet(np.ones(3), 6))
    counts = jnp.asarray(rng.poisson(2.0, (6, 3)))
    weights = jnp.asarray([1.0, 0.0, 2.0, 0.5, 3.0, 1.0])
    t = jnp.linspace(0.0, 2.0, 9)
    heads = {"inside": draw(7, 3), "edge": draw(3, 3)}
    head_targets = {"inside": draw(7), "edge": draw(3, 2)}

    def log_cosh(f: Any, y: Any) -> Any:
        return jnp.sum(jnp.log(jnp.cosh(f - y)), axis=-1)

    losses = gnl.losses
    table = [
        ("squared_error", real, losses.squared_error, mean_of_sums(half_square)),
        ("softmax_labels", labels, losses.softmax_cross_entropy, mean_of_sums(cross_entropy)),
        ("softmax_soft", soft, losses.softmax_cross_entropy, mean_of_sums(cross_entropy)),
        ("sigmoid", binary, losses.sigmoid_binary_cross_entropy, mean_of_sums(binary_cross_entropy)),
        ("poisson", counts, losses.poisson, mean_of_sums(poisson)),
        ("huber", real, losses.huber(1.0), mean_of_sums(huber(1.0))),
        (
            "weighted_softmax",
            (labels, weights),
            losses.weighted(losses.softmax_cross_entropy),
            weighted_mean_of_sums(cross_entropy),
        ),
        (
            "weighted_squared_error",
            (real, weights),
            losses.weighted(losses.squared_error),
            weighted_mean_of_sums(half_square),
        ),
        (
            "from_convex",
            real,
            losses.from_convex(log_cosh),
            mean_of_sums(lambda f, y: jnp.log((jnp.exp(f - y) + jnp.exp(y - f)) / 2)),
        ),
    ]
    problems = [Problem(name, network, params, x, y, loss, formula) for name, y, loss, formula in table]
    pair = mean_of_sums(half_square)
    problems += [
        Problem("two_heads", two_heads, params, heads, head_targets, losses.squared_error, pair),
        Problem("two_heads_huber", two_heads, params, heads, head_targets, losses.huber(0.5), mean_of_sums(huber(0.5))),
        Problem("decay", decay, {"a": jnp.float64(1.5), "k": jnp.float64(0.7)}, t, draw(9), losses.squared_error, pair),
        Problem("affine", affine, {"w": draw(3, 2), "b": draw(2)}, draw(8, 3), draw(8, 2), losses.squared_error, pair),
    ]
    return {problem.name: problem for problem in problems}


PROBLEMS = _problems()


# --- dense oracles ---------------------------------------------------------------------------------------------------


class Dense(NamedTuple):
    """Everything about a problem as numpy arrays, without a penalty."""

    params: np.ndarray
    outputs: np.ndarray
    value: float
    output_gradient: np.ndarray
    jacobian: np.ndarray
    hessian: np.ndarray

    @property
    def gradient(self) -> np.ndarray:
        return self.jacobian.T @ self.output_gradient

    @property
    def ggn(self) -> np.ndarray:
        return self.jacobian.T @ self.hessian @ self.jacobian


def ravel_outputs(outputs: Any) -> tuple[jax.Array, Callable[[Any], Any]]:
    """The outputs as one vector, and the way back."""
    return ravel_pytree(outputs)


def dense_jacobian(predict: Callable[[Any, Any], Any], params: Any, inputs: Any) -> np.ndarray:
    """The Jacobian of all outputs by all parameters, a matrix."""
    vector, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.jacfwd(lambda v: ravel_pytree(predict(unravel(v), inputs))[0]))(vector))


def dense_loss(formula: Callable[[Any, Any], Any], outputs: Any, targets: Any) -> tuple[float, np.ndarray, np.ndarray]:
    """Value, gradient and Hessian of a formula by the raveled outputs."""
    vector, unravel = ravel_pytree(outputs)

    @jax.jit
    def derivatives(v: Any) -> Any:
        def value(w: Any) -> Any:
            return formula(unravel(w), targets)

        return value(v), jax.grad(value)(v), jax.hessian(value)(v)

    value, gradient, hessian = derivatives(vector)
    return float(value), np.asarray(gradient), np.asarray(hessian)


def make_dense(problem: Problem) -> Dense:
    """The dense oracle of any problem."""
    outputs = problem.predict(problem.params, problem.inputs)
    value, gradient, hessian = dense_loss(problem.formula, outputs, problem.targets)
    jacobian = dense_jacobian(problem.predict, problem.params, problem.inputs)
    return Dense(flat(problem.params), flat(outputs), value, gradient, jacobian, hessian)


@functools.cache
def dense(name: str) -> Dense:
    """The dense oracle of a problem of the table, computed once."""
    return make_dense(PROBLEMS[name])


def damped_step(ggn: np.ndarray, rhs: np.ndarray, damping: float) -> np.ndarray:
    """The step ``-(G + mu I)^-1 b``."""
    return -np.linalg.solve(ggn + damping * np.eye(len(ggn)), rhs)


def condition(ggn: np.ndarray, damping: float = 0.0) -> float:
    """The condition number of ``G + mu I``."""
    return float(np.linalg.cond(ggn + damping * np.eye(len(ggn))))


def l2_diagonal(l2: Any, params: Any) -> np.ndarray:
    """The penalty's coefficient of every parameter, from a number or a pytree of numbers or arrays."""
    if np.ndim(l2) == 0 and not isinstance(l2, dict):
        return np.full(flat(params).size, float(l2))
    return flat(jax.tree.map(lambda w, p: np.broadcast_to(np.asarray(w, np.float64), np.shape(p)), l2, params))


def unflatten_like(vector: Any, tree: Any) -> Any:
    """A pytree like ``tree`` from a numpy vector."""
    return ravel_pytree(tree)[1](jnp.asarray(vector, ravel_pytree(tree)[0].dtype))
