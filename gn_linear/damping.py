r"""Damping policies: how much :math:`\mu` is added to the Gauss-Newton matrix, and how it adapts.

A policy keeps its damping as a multiple of a curvature scale, the Rayleigh quotient :math:`b^T G b / b^T b` of the
first gradient, so floors and caps mean the same in every unit. ``Constant`` alone is absolute.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._typing import Count, Flag, Number, Scalar, check_number, shown

__all__ = ["Constant", "DampingState", "LevenbergMarquardt", "Policy", "Schedule"]


LARGEST = 1e38
"""The largest multiple: what float32 holds."""


class DampingState(NamedTuple):
    """What a policy remembers.

    Attributes:
        multiple: the damping in multiples of the curvature scale, shape ().
        growth: the factor by which the next refusal multiplies it, shape ().
    """

    multiple: Scalar
    growth: Scalar


class Policy:
    """A damping policy: ``init``, ``damping`` and ``update``.

    Attributes:
        adaptive: whether the policy learns from the gain ratio; then a step that raises the objective is refused.
    """

    adaptive: ClassVar[bool] = False

    def init(self, dtype: Any) -> DampingState:
        """The state before the first step.

        Args:
            dtype: of the damping, that of the solve.

        Returns:
            The state.
        """
        return DampingState(jnp.zeros([], dtype), jnp.full([], 2.0, dtype))

    def damping(self, state: DampingState, scale: Scalar, count: Count) -> Scalar:
        r"""The damping :math:`\mu` of this step.

        Args:
            state: what the policy remembers.
            scale: the curvature scale.
            count: steps taken so far.

        Returns:
            The damping, absolute.
        """
        raise NotImplementedError

    def update(self, state: DampingState, gain_ratio: Scalar, accepted: Flag) -> DampingState:
        """The state after a step.

        Args:
            state: what the policy remembers.
            gain_ratio: actual over predicted reduction.
            accepted: whether the step was taken.

        Returns:
            The new state; by default the old one.
        """
        del gain_ratio, accepted
        return state


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Constant(Policy):
    r"""The same absolute damping at every step; a plain number as ``damping`` means this.

    .. math:: \mu_t = \text{value}

    Attributes:
        value: the damping, in the units of the Gauss-Newton matrix; not negative, may be traced.

    Example:
        >>> import gn_linear as gnl
        >>> gnl.damping.Constant(0.1)
        Constant(value=0.1)
    """

    value: Number

    def __post_init__(self) -> None:
        check_number(self.value, "damping", also=", or a policy of gn_linear.damping")

    def damping(self, state: DampingState, scale: Scalar, count: Count) -> Scalar:
        """The value, in the dtype of the solve."""
        del scale, count
        return jnp.asarray(self.value, state.multiple.dtype)


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule(Policy):
    r"""Damping by an optax schedule, in multiples of the curvature scale.

    .. math:: \mu_t = \text{schedule}(t) \cdot \text{scale}

    Attributes:
        schedule: ``schedule(count) -> multiple``, not negative.

    Example:
        >>> import optax
        >>> import gn_linear as gnl
        >>> policy = gnl.damping.Schedule(optax.exponential_decay(1.0, 100, 0.5))
    """

    schedule: Callable[[Any], Any] = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        if not callable(self.schedule):
            raise TypeError(f"schedule must be a function of the step count, but is {shown(self.schedule)}.")

    def damping(self, state: DampingState, scale: Scalar, count: Count) -> Scalar:
        """The schedule's multiple at this step, times the scale."""
        return jnp.asarray(self.schedule(count), state.multiple.dtype) * scale


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt(Policy):
    r"""Damping that follows the gain ratio :math:`\rho` by Nielsen's rule, in multiples of the curvature scale.

    .. math::
        \text{accepted:} \quad \mu \leftarrow \mu \max(\tfrac13, 1 - (2\rho - 1)^3), \quad \nu \leftarrow 2; \qquad
        \text{refused:} \quad \mu \leftarrow \mu \nu, \quad \nu \leftarrow 2 \nu.

    A step whose actual and predicted reductions are both below the rounding of the objective tells nothing, and
    leaves the damping as it is.

    Attributes:
        initial: the first multiple.
        minimum: the smallest multiple.
        maximum: the largest multiple, at most 1e38.

    Raises:
        TypeError: one of them is not a number.
        ValueError: one is not positive and finite, or ``minimum <= initial <= maximum`` does not hold.

    Example:
        >>> import gn_linear as gnl
        >>> policy = gnl.damping.LevenbergMarquardt(initial=1e-3)

    References:
        Levenberg (1944); Marquardt (1963); Nielsen (1999), Damping parameter in Marquardt's method, equation 2.5.
    """

    initial: Number = 1e-2
    minimum: Number = 1e-8
    maximum: Number = 1e8
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        initial, minimum, maximum = (
            check_number(getattr(self, name), name, positive=True) for name in ("initial", "minimum", "maximum")
        )
        if maximum is not None and maximum > LARGEST:
            raise ValueError(
                f"maximum must be at most {LARGEST}, to be finite in float32, but is {shown(self.maximum)}."
            )
        if initial is not None and minimum is not None and maximum is not None and not minimum <= initial <= maximum:
            raise ValueError(
                f"minimum <= initial <= maximum must hold, but minimum is {minimum!r}, initial is {initial!r} and "
                f"maximum is {maximum!r}."
            )

    def init(self, dtype: Any) -> DampingState:
        """The first multiple, within its bounds."""
        first = jnp.clip(jnp.asarray(self.initial, dtype), *self._bounds(dtype))
        return DampingState(first, jnp.full([], 2.0, dtype))

    def damping(self, state: DampingState, scale: Scalar, count: Count) -> Scalar:
        """The multiple times the scale."""
        del count
        return state.multiple * scale

    def update(self, state: DampingState, gain_ratio: Scalar, accepted: Flag) -> DampingState:
        """Nielsen's rule."""
        dtype = state.multiple.dtype
        # Beyond (0, 1) the rule is flat or refuses; clipping first keeps the cube finite.
        ratio = jnp.clip(gain_ratio.astype(dtype), -1, 1)
        trusted = accepted & (ratio > 0)
        shrink = jnp.maximum(jnp.asarray(1 / 3, dtype), 1 - (2 * ratio - 1) ** 3)
        multiple = state.multiple * jnp.where(trusted, shrink, state.growth)
        growth = jnp.where(trusted, jnp.full_like(state.growth, 2.0), jnp.minimum(2 * state.growth, 2.0**16))
        return DampingState(jnp.clip(multiple, *self._bounds(dtype)), growth)

    def _bounds(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(self.minimum, dtype), jnp.asarray(self.maximum, dtype)


def as_policy(damping: Any) -> Policy:
    """A policy from a policy or a plain number.

    Args:
        damping: a policy, or a number, which means ``Constant``.

    Returns:
        The policy.
    """
    return damping if isinstance(damping, Policy) else Constant(damping)
