"""The problems of the contests: a model and a loss each, in plain JAX, so that any environment can import them."""

import math
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import networks


class Problem(NamedTuple):
    """A model and its loss.

    Attributes:
        predict: predict(params, inputs) -> outputs, a pytree of arrays (n, c).
        kind: "squares" for 1/2 the mean squared error, summed over the leaves; "classes" for the mean cross-entropy of
            softmax with integer labels.
        term: for physics-informed problems, from a name of the outputs' leaves to the residual's part at one point,
            term(params, point) -> scalar.
    """

    predict: Callable[[Any, Any], Any]
    kind: Literal["squares", "classes"]
    term: dict[str, Callable[[Any, jax.Array], jax.Array]] | None = None

    def value(self, params: Any, inputs: Any, targets: Any) -> jax.Array:
        """Returns the loss, shape ()."""
        if self.kind == "squares":
            squares = jax.tree.map(lambda leaf: jnp.vdot(leaf, leaf), self.residuals(params, inputs, targets))
            return jax.tree.reduce(operator.add, squares) / 2
        logits = jax.nn.log_softmax(self.predict(params, inputs))
        return -jnp.mean(jnp.take_along_axis(logits, targets[:, None], axis=1))

    def residuals(self, params: Any, inputs: Any, targets: Any) -> Any:
        """Returns residuals scaled so that the loss is half the sum of their squares, a pytree like the outputs."""
        outputs = self.predict(params, inputs)
        return jax.tree.map(lambda mine, wanted: (mine - wanted) / math.sqrt(len(mine)), outputs, targets)


def error_rate(problem: Problem, params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the share of examples that get another label, shape ().

    Args:
        problem: a problem of classes.
        params: of its model.
        inputs: (n, ...).
        labels: (n,), integers.

    Returns:
        The share.
    """
    return jnp.mean(jnp.argmax(problem.predict(params, inputs), axis=1) != labels)


def poisson_source(points: Any) -> Any:
    """Returns the source 2 pi^2 u of :func:`poisson_solution`.

    Args:
        points: (n, 2), any kind of array.

    Returns:
        Its values (n, 1).
    """
    return 2 * math.pi**2 * poisson_solution(points)


def poisson_solution(points: Any) -> Any:
    """Returns u = sin(pi a) sin(pi b), which is 0 on the boundary of the unit square.

    Args:
        points: (n, 2), any kind of array.

    Returns:
        Its values (n, 1).
    """
    return jnp.sin(math.pi * points[:, :1]) * jnp.sin(math.pi * points[:, 1:])


def _laplacian(params: Any, point: jax.Array) -> jax.Array:
    return -jnp.trace(jax.hessian(lambda at: _TANH(params, at[None])[0, 0])(point))


def _boundary(params: Any, point: jax.Array) -> jax.Array:
    return _TANH(params, point[None])[0, 0]


def _poisson(params: Any, inputs: Any) -> Any:
    """The negative Laplacian at the interior points, by nested differentiation, and the values at the boundary."""
    interior = jax.vmap(_laplacian, (None, 0))(params, inputs["interior"])
    return {"interior": interior[:, None], "boundary": _TANH(params, inputs["boundary"])}


_TANH = networks.mlp(jnp.tanh)

PROBLEMS = {
    "regression": Problem(_TANH, "squares"),
    "classes": Problem(networks.mlp(jax.nn.relu), "classes"),
    "poisson": Problem(_poisson, "squares", {"interior": _laplacian, "boundary": _boundary}),
}
"""From names to problems: a name can be sent to another process."""
