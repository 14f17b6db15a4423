"""The bounds of a fit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gn_linear._typing import Flag


class Box(NamedTuple):
    """Where the parameters of a fit may be.

    Attributes:
        sides: the lower and the upper bounds, each of shape (P,); None where there are none.
    """

    sides: tuple[jax.Array, jax.Array] | None

    def holds(self, vector: jax.Array, gradient: jax.Array) -> jax.Array:
        """Which parameters are at a bound that the gradient pushes them against."""
        if self.sides is None:
            return jnp.zeros_like(vector, bool)
        lower, upper = self.sides
        return (vector <= lower) & (gradient > 0) | (vector >= upper) & (gradient < 0)

    def moved(self, vector: jax.Array, step: jax.Array) -> jax.Array:
        """Where a step ends."""
        end = vector + step
        if self.sides is None:
            return end
        lower, upper = self.sides
        end = jnp.clip(end, lower, upper)
        # Onto a bound, not within rounding of it: what is held there no longer takes part in the steps.
        rounding = 4 * jnp.finfo(end.dtype).eps * (jnp.abs(vector) + jnp.abs(end))
        end = jnp.where((step < 0) & (end - lower <= rounding), lower, end)
        return jnp.where((step > 0) & (upper - end <= rounding), upper, end)

    def shortened(self, vector: jax.Array, step: jax.Array, stretch: jax.Array) -> jax.Array:
        """A step in other units that ends in the box; ``stretch`` of the one is one of the parameters'."""
        if self.sides is None:
            return step
        (lower, upper), end = self.sides, vector + stretch * step
        inside = (self.moved(vector, stretch * step) - vector) / jnp.where(stretch > 0, stretch, 1)
        within = (end >= lower) & (end <= upper)
        return jnp.where(within, step, jnp.where(stretch > 0, inside, jnp.zeros_like(step)))

    def stops(self, vector: jax.Array, end: jax.Array) -> Flag:
        """Whether a step has met a bound."""
        if self.sides is None:
            return jnp.zeros([], bool)
        lower, upper = self.sides
        return jnp.any((end != vector) & ((end <= lower) | (end >= upper)))
