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

__all__ = ["Constant", "DampingState", "LevenbergMarquardt", "Path", "Policy", "Schedule"]


LARGEST = 1e38
"""The largest multiple: what float32 holds."""
_MEMORY = 0.8


class DampingState(NamedTuple):
    """What a policy remembers.

    Attributes:
        multiple: the damping in multiples of the curvature scale, shape ().
        growth: the factor by which the next refusal multiplies it, shape ().
        tried: the multiple of the last step, if that lowered the objective as promised by the model, else 0; shape ().
        surprise: running sum of what the batches say of each other's steps, see ``LevenbergMarquardt``; shape ().
        predicted: running sum of the predicted reductions of these steps, shape ().
    """

    multiple: Scalar
    growth: Scalar
    tried: Scalar
    surprise: Scalar
    predicted: Scalar


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
        return _starting_at(jnp.zeros([], dtype))

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

    def reviewed(self, state: DampingState, gain_ratio: Scalar, surprise: Scalar, predicted: Scalar) -> DampingState:
        """The state before a step, once its batch is known, which tells something about the last step, too.

        Args:
            state: what the policy remembers.
            gain_ratio: of the last step, on its own batch.
            surprise: what the objective of the new batch is above that which the last step reached on its own batch;
                0 on the full batch.
            predicted: the reduction predicted for the last step.

        Returns:
            The new state; by default the old one.
        """
        del gain_ratio, surprise, predicted
        return state

    def relax(self, state: DampingState) -> DampingState:
        """The state after a step that told nothing, because all it changed is rounding.

        Args:
            state: what the policy remembers.

        Returns:
            The new state; by default the old one.
        """
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


class _Bounded(Policy):
    """An adaptive policy whose multiple starts at ``initial`` and stays between ``minimum`` and ``maximum``."""

    adaptive: ClassVar[bool] = True
    initial: Number
    minimum: Number
    maximum: Number

    def init(self, dtype: Any) -> DampingState:
        """The first multiple, within its bounds."""
        return _starting_at(self._within(jnp.asarray(self.initial, dtype)))

    def damping(self, state: DampingState, scale: Scalar, count: Count) -> Scalar:
        """The multiple times the scale."""
        del count
        return state.multiple * scale

    def relax(self, state: DampingState) -> DampingState:
        """Back towards the first multiple: a damping so large that every step is rounding would never come down."""
        first = self.init(state.multiple.dtype)
        eased = jnp.maximum(state.multiple / 3, jnp.minimum(state.multiple, first.multiple))
        return state._replace(multiple=eased, growth=first.growth, tried=first.tried)

    def _within(self, multiple: jax.Array) -> jax.Array:
        bounds = (jnp.asarray(bound, multiple.dtype) for bound in (self.minimum, self.maximum))
        return jnp.clip(multiple, *bounds)

    def _check_bounds(self) -> None:
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


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt(_Bounded):
    r"""Damping that follows the gain ratio :math:`\rho` by Nielsen's rule, in multiples of the curvature scale.

    .. math::
        \text{accepted:} \quad \mu \leftarrow \mu \max(\tfrac13, 1 - (2\rho - 1)^3), \quad \nu \leftarrow 2; \qquad
        \text{refused:} \quad \mu \leftarrow \mu \nu, \quad \nu \leftarrow 2 \nu.

    On minibatches a step can fit its own batch at the expense of the others, and its gain ratio is 1 all the same. The
    next batch tells: its objective where the step ended is a surprise if it is above the one that the step reached on
    its own batch. So the gain ratio of an accepted step is taken for

    .. math::
        \min(\rho, 1) - \phi \, \frac{\sum_k 0.8^k \, (F_{t+1-k} - F_{t-k})(\theta_{t+1-k})}
        {\sum_k 0.8^k \, \text{predicted}_{t-k}},
        \qquad \text{at least } 0,

    with :math:`\phi` = ``fresh`` and the sums over steps, as soon as the next step evaluates the objective. It costs
    nothing, and on the full batch it changes nothing.

    A step whose actual and predicted reductions are both below the rounding of the objective tells nothing. It leaves
    the damping as it is, or eases it towards ``initial`` if it is above.

    Attributes:
        initial: the first multiple.
        minimum: the smallest multiple.
        maximum: the largest multiple, at most 1e38.
        fresh: weight of the next batches' surprise, from 0 to 1; 0 believes a step's own batch.

    Raises:
        TypeError: one of them is not a number.
        ValueError: one is not positive and finite, ``minimum <= initial <= maximum`` does not hold, or ``fresh`` is not
            between 0 and 1.

    Example:
        >>> import gn_linear as gnl
        >>> policy = gnl.damping.LevenbergMarquardt(initial=1e-3)

    References:
        Levenberg (1944); Marquardt (1963); Nielsen (1999), Damping parameter in Marquardt's method, equation 2.5.
    """

    initial: Number = 1e-2
    minimum: Number = 1e-12
    maximum: Number = 1e8
    fresh: Number = 0.5

    def __post_init__(self) -> None:
        self._check_bounds()
        fresh = check_number(self.fresh, "fresh")
        if fresh is not None and fresh > 1:
            raise ValueError(f"fresh must be at most 1, since it is a weight, but is {shown(self.fresh)}.")

    def update(self, state: DampingState, gain_ratio: Scalar, accepted: Flag) -> DampingState:
        """Nielsen's rule."""
        # Beyond (0, 1) the rule is flat or refuses; clipping first keeps the cube finite.
        ratio = jnp.clip(gain_ratio.astype(state.multiple.dtype), -1, 1)
        trusted = accepted & (ratio > 0)
        multiple = state.multiple * jnp.where(trusted, _nielsen(ratio), state.growth)
        growth = jnp.where(trusted, jnp.full_like(state.growth, 2.0), jnp.minimum(2 * state.growth, 2.0**16))
        return state._replace(
            multiple=self._within(multiple), growth=growth, tried=jnp.where(trusted, state.multiple, 0)
        )

    def reviewed(self, state: DampingState, gain_ratio: Scalar, surprise: Scalar, predicted: Scalar) -> DampingState:
        """Nielsen's rule once more, with the next batch's word."""
        dtype = state.multiple.dtype
        usable = (state.tried > 0) & jnp.isfinite(surprise) & jnp.isfinite(predicted) & (predicted > 0)
        sums = [
            jnp.where(usable, _MEMORY * total + new.astype(dtype), total)
            for total, new in ((state.surprise, surprise), (state.predicted, predicted))
        ]
        share = jnp.asarray(self.fresh, dtype) * sums[0] / jnp.where(sums[1] > 0, sums[1], 1)
        ratio = jnp.clip(jnp.minimum(gain_ratio.astype(dtype), 1) - share, 0, 1)
        return state._replace(
            multiple=jnp.where(usable, self._within(state.tried * _nielsen(ratio)), state.multiple),
            tried=jnp.zeros_like(state.tried),
            surprise=sums[0],
            predicted=sums[1],
        )


def _nielsen(ratio: Scalar) -> Scalar:
    """The factor of the damping after an accepted step."""
    return jnp.maximum(jnp.asarray(1 / 3, ratio.dtype), 1 - (2 * ratio - 1) ** 3)


def _starting_at(multiple: Scalar) -> DampingState:
    zero = jnp.zeros_like(multiple)
    return DampingState(multiple, jnp.full_like(multiple, 2.0), zero, zero, zero)


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Path(_Bounded):
    r"""Several dampings at every step, of which the one with the lowest objective is taken.

    .. math:: \mu_i = f_i \, \mu, \qquad \mu \leftarrow \mu_{i^*}, \qquad i^* = \arg\min_i F(\theta + d(\mu_i))

    The steps come from one preparation of the solver, and the objectives from one batched evaluation of the model. It
    is meant for ``solvers.Lanczos``, where a further damping costs no product; conjugate gradients solve anew for each.
    If no step lowers the objective, the one with the most damping is halved, refused if that does not help either, and
    the path moves there.

    Attributes:
        factors: multiples of the path's centre that are tried, positive.
        initial: the first centre, in multiples of the curvature scale.
        minimum: the smallest multiple.
        maximum: the largest multiple, at most 1e38.

    Raises:
        TypeError: one of them is not a number, or ``factors`` is not a tuple.
        ValueError: one is not positive and finite, ``factors`` is empty, or the bounds are in disorder.

    Example:
        >>> import gn_linear as gnl
        >>> policy = gnl.damping.Path(factors=(0.1, 1.0, 10.0))

    References:
        Marquardt (1963), An algorithm for least-squares estimation of nonlinear parameters, section 5.
    """

    factors: tuple[Number, ...] = (0.1, 1.0, 10.0)
    initial: Number = 1e-2
    minimum: Number = 1e-8
    maximum: Number = 1e8

    def __post_init__(self) -> None:
        if not isinstance(self.factors, tuple):
            raise TypeError(f"factors must be a tuple of positive numbers, but is {shown(self.factors)}.")
        if not self.factors:
            raise ValueError("factors must hold at least one positive number, but is an empty tuple ().")
        for index, factor in enumerate(self.factors):
            check_number(factor, f"factors[{index}]", positive=True)
        self._check_bounds()

    def dampings(self, state: DampingState, scale: Scalar) -> jax.Array:
        """All dampings of the path.

        Args:
            state: what the policy remembers.
            scale: the curvature scale.

        Returns:
            The dampings, absolute, shape (factors,).
        """
        return self._multiples(state) * scale

    @property
    def most(self) -> jax.Array:
        """The number of the largest factor."""
        return jnp.argmax(jnp.stack([jnp.asarray(factor, jnp.float32) for factor in self.factors]))

    def moved(self, state: DampingState, chosen: Count, accepted: Flag) -> DampingState:
        """The state after a step, at the damping that was chosen.

        Args:
            state: what the policy remembers.
            chosen: the number of the factor.
            accepted: whether the step was taken.

        Returns:
            The new state; after a refusal the centre doubles at least.
        """
        multiple = self._multiples(state)[chosen]
        multiple = jnp.where(accepted, multiple, jnp.maximum(multiple, 2 * state.multiple))
        return state._replace(multiple=self._within(multiple))

    def _multiples(self, state: DampingState) -> jax.Array:
        dtype = state.multiple.dtype
        factors = jnp.stack([jnp.asarray(factor, dtype) for factor in self.factors])
        return self._within(factors * state.multiple)


def as_policy(damping: Any) -> Policy:
    """A policy from a policy or a plain number.

    Args:
        damping: a policy, or a number, which means ``Constant``.

    Returns:
        The policy.
    """
    return damping if isinstance(damping, Policy) else Constant(damping)
