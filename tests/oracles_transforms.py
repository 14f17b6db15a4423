"""Dense answers for the tests of the optax transforms, by NumPy and full Jacobians; nothing here uses gn_linear."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def eps(dtype=jnp.float64):
    return float(jnp.finfo(dtype).eps)


def tolerance(dtype=jnp.float64, *, condition=1.0, operations=1):
    """What rounding may do to a result of size 1: so many operations at such a condition number."""
    return operations * condition * eps(dtype)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def distance(got, want):
    """The relative 2-norm distance of two pytrees or vectors."""
    got, want = flat(got), flat(want)
    size = np.linalg.norm(want)
    return np.linalg.norm(got - want) / (size if size > 0 else 1.0)


def bits(tree):
    """The bits of every leaf, so that -0.0 differs from 0.0 and NaN equals itself."""
    return [np.asarray(leaf).reshape(-1).view(np.uint8).tolist() for leaf in jax.tree.leaves(tree)]


def kinds(tree):
    """Structure, shapes, dtypes and weak types."""
    avals = jax.eval_shape(lambda t: t, tree)
    return jax.tree.structure(avals), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(avals)]


class Dense(NamedTuple):
    jacobian: np.ndarray
    hessian: np.ndarray
    gradient: np.ndarray
    ggn: np.ndarray

    def damped_step(self, damping, rhs=None):
        rhs = self.gradient if rhs is None else flat(rhs)
        return -np.linalg.solve(self.ggn + damping * np.eye(len(rhs)), rhs)

    def condition(self, damping=0.0):
        return np.linalg.cond(self.ggn + damping * np.eye(len(self.ggn)))

    def filtered_step(self, phi):
        """-phi(G) g by an eigendecomposition."""
        values, vectors = np.linalg.eigh(self.ggn)
        return -vectors @ (phi(np.maximum(values, 0.0)) * (vectors.T @ self.gradient))


def dense(predict, value, params, inputs, l2=0.0):
    """Jacobian, output Hessian, gradient and GGN of ``value(outputs)`` at ``params``, all in full."""
    theta, unravel = ravel_pytree(params)
    shape = predict(params, inputs).shape

    def outputs(vector):
        return predict(unravel(vector), inputs).ravel()

    def of_outputs(vector):
        return value(vector.reshape(shape))

    jacobian = np.asarray(jax.jacfwd(outputs)(theta), np.float64)
    at = outputs(theta)
    hessian = np.asarray(jax.hessian(of_outputs)(at), np.float64)
    cotangent = np.asarray(jax.jacfwd(of_outputs)(at), np.float64)
    if not np.isscalar(l2):
        l2 = flat(jax.tree.map(lambda w, p: np.full(np.shape(p), w), l2, params))
    penalty = np.broadcast_to(np.asarray(l2, np.float64), theta.shape)
    gradient = jacobian.T @ cotangent + penalty * np.asarray(theta, np.float64)
    return Dense(jacobian, hessian, gradient, jacobian.T @ hessian @ jacobian + np.diag(penalty))


def mlp(params, inputs):
    """Two inputs, three hidden units, two outputs."""
    return jnp.tanh(inputs @ params["w1"] + params["b1"]) @ params["w2"]


def affine(params, inputs):
    return inputs @ params["w"] + params["b"]


def mlp_params(seed=0, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    shapes = {"w1": (2, 3), "b1": (3,), "w2": (3, 2)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def affine_params(seed=0, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(2, 2)), dtype), "b": jnp.asarray(rng.normal(size=2), dtype)}


def batch(seed=1, n=6, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, 2)), dtype), jnp.asarray(rng.normal(size=(n, 2)), dtype)


def half_mean_square(outputs, targets):
    return 0.5 * jnp.sum((outputs - targets) ** 2) / outputs.shape[0]


def cross_entropy(outputs, one_hot):
    return jnp.sum(jax.scipy.special.logsumexp(outputs, axis=-1) - jnp.sum(one_hot * outputs, -1)) / outputs.shape[0]
