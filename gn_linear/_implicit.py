r"""The derivative of a solution with respect to what its residuals depend on, by the implicit function theorem.

At a minimum the gradient vanishes, :math:`g(\theta, a) = 0`, so
:math:`d\theta = -H^{-1} \, \partial_a g \, da` with the whole Hessian :math:`H = J^T J + \sum_i r_i \nabla^2 r_i`.
Without its second term, as in the normal equations, the derivative would be right only where the residuals vanish.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

DENSE = 512
"""The number of parameters up to which the Hessian is formed; beyond, conjugate gradients solve with its products."""


def implicit_root(
    stationary: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    solve: Callable[[jax.Array], tuple[jax.Array, Any]],
) -> tuple[jax.Array, Any]:
    """The root that a solver finds, with derivatives by the implicit function theorem in both modes.

    Args:
        stationary: zero at the root; closes over what the root depends on. Its derivative is symmetric.
        start: where the solver starts.
        solve: ``start -> (root, anything)``.

    Returns:
        The root, and what came with it, which has no derivative.
    """

    def tangent_solve(product: Callable[[jax.Array], jax.Array], rhs: jax.Array) -> jax.Array:
        if len(rhs) > DENSE:
            return jax.lax.custom_linear_solve(
                product, rhs, lambda multiply, b: jax.scipy.sparse.linalg.cg(multiply, b, tol=1e-10)[0], symmetric=True
            )
        matrix = jax.vmap(product)(jnp.eye(len(rhs), dtype=rhs.dtype))
        matrix = 0.5 * (matrix + matrix.T)
        # Of parameters that no residual depends on nothing is known but that they stay.
        diagonal = jnp.sqrt(jnp.abs(jnp.diag(matrix)))
        unit = 1 / jnp.where(diagonal > 0, diagonal, jnp.ones_like(diagonal))
        values, vectors = jnp.linalg.eigh(unit[:, None] * matrix * unit)
        seen = jnp.abs(values) > len(rhs) * jnp.finfo(rhs.dtype).eps * jnp.max(jnp.abs(values), initial=0.0)
        inverse = jnp.where(seen, 1 / jnp.where(seen, values, jnp.ones_like(values)), jnp.zeros_like(values))
        return unit * (vectors @ (inverse * (vectors.T @ (unit * rhs))))

    return jax.lax.custom_root(stationary, start, lambda _, x: solve(x), tangent_solve, has_aux=True)
