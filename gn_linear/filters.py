r"""Spectral filters: what an inner solver does to each eigenvalue of the Gauss-Newton matrix.

On the full batch with the squared error, every inner solver moves by :math:`d = -\varphi(G) \, g`, with :math:`g` the
gradient at the anchor. Solvers differ only in the filter :math:`\varphi`:

=============================================  ============================================  ======================
inner solver                                   :math:`\varphi(\lambda)`                      equivalent damping
=============================================  ============================================  ======================
``Tikhonov``: damped Gauss-Newton              :math:`1 / (\lambda + \mu)`                   :math:`\mu`
``GradientDescent``: K steps at rate η         :math:`(1 - (1 - \eta\lambda)^K) / \lambda`   :math:`1 / (\eta K)`
``GradientFlow``: time t                       :math:`(1 - e^{-t\lambda}) / \lambda`         :math:`1 / t`
``Proximal``: m implicit steps of size h       :math:`(1 - (1 + h\lambda)^{-m}) / \lambda`   :math:`1 / (h m)`
``MinimumNorm``: undamped                      :math:`1 / \lambda`, 0 off the range          0
=============================================  ============================================  ======================

All are evaluated without cancellation, at :math:`\lambda = 0` by their limit :math:`1/\mu`; eigenvalues that rounding
has made negative count as 0, and NaN stays NaN.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gn_linear import _tree
from gn_linear._typing import Flag, Number, Scalar, check_number, shown

__all__ = ["Filter", "GradientDescent", "GradientFlow", "MinimumNorm", "Proximal", "Tikhonov"]

Spectrum = Float[Array, " *eigenvalues"]


class Filter:
    r"""A spectral filter :math:`\varphi`, called on eigenvalues.

    Attributes:
        adaptable: whether it has a parameter that acts like damping, which a damping policy can set.
    """

    adaptable: ClassVar[bool] = True

    def __call__(self, eigenvalues: Spectrum) -> Spectrum:
        r""":math:`\varphi(\lambda)`, entry by entry.

        Args:
            eigenvalues: of the Gauss-Newton matrix, any shape.

        Returns:
            The filter's values in the same shape and dtype, finite if the eigenvalues are.
        """
        raise NotImplementedError

    def equivalent_damping(self) -> Scalar:
        r"""The equivalent damping :math:`\mu = 1 / \varphi(0)`.

        Returns:
            The damping, shape (), in JAX's default float type.
        """
        raise NotImplementedError

    def at_damping(self, damping: Scalar) -> "Filter":
        """The filter of this kind whose equivalent damping is given.

        Args:
            damping: positive; zero counts as the smallest positive number.

        Returns:
            The filter.

        Raises:
            TypeError: the filter has no damping.
        """
        raise NotImplementedError

    def stable(self, eigenvalues: Spectrum) -> Flag:
        """Whether the solver that the filter stands for converges on these eigenvalues.

        Args:
            eigenvalues: of the Gauss-Newton matrix.

        Returns:
            A flag; only explicit gradient steps can be unstable.
        """
        del eigenvalues
        return jnp.ones([], bool)


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tikhonov(Filter):
    r"""Damped Gauss-Newton, the step of Levenberg and Marquardt.

    .. math:: \varphi(\lambda) = \frac{1}{\lambda + \mu}

    Attributes:
        damping: :math:`\mu`, in the units of the Gauss-Newton matrix; not negative, may be traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(gnl.filters.Tikhonov(1.0)(jnp.array([0.0, 1.0, 3.0])))
        [1.   0.5  0.25]

    References:
        Levenberg (1944); Marquardt (1963).
    """

    damping: Number = 0.0

    def __post_init__(self) -> None:
        check_number(self.damping, "damping")

    def __call__(self, eigenvalues: Spectrum) -> Spectrum:
        """The inverse of the damped eigenvalue; 0 where it is 0."""
        return _inverse(_clipped(eigenvalues) + _as(self.damping, eigenvalues))

    def equivalent_damping(self) -> Scalar:
        """Its own."""
        return _float(self.damping)

    def at_damping(self, damping: Scalar) -> "Tikhonov":
        """With this damping."""
        return Tikhonov(damping)


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientDescent(Filter):
    r"""K gradient steps on the linearised model, the inner loop of iterative linearisation.

    .. math::
        \varphi(\lambda) = \frac{1 - (1 - \eta \lambda)^K}{\lambda}, \qquad \varphi(0) = \eta K, \qquad
        \mu = \frac{1}{\eta K}

    Multiplied by :math:`\lambda` it differs from damping by at most 0.50 (K = 1), 0.26 (5), 0.21 (100) while
    :math:`\eta \lambda \le 1`. Beyond :math:`\eta \lambda = 2` the steps diverge: ``stable`` is then false, and the
    values are capped so that they stay finite.

    Attributes:
        learning_rate: :math:`\eta`, positive, may be traced.
        steps: K, at least 0; an integer, or a float that holds one (more than 2**31 steps); may be traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(gnl.filters.GradientDescent(0.5, 2)(jnp.array([0.0, 1.0, 2.0])))
        [1.   0.75 0.5 ]

    References:
        Goldwaser and Ge (2022), Understanding sparse feature updates in deep networks using iterative linearisation.
    """

    learning_rate: Number
    steps: Number

    def __post_init__(self) -> None:
        check_number(self.learning_rate, "learning_rate", positive=True)
        _check_steps(self.steps)

    def __call__(self, eigenvalues: Spectrum) -> Spectrum:
        """By logarithms, so that neither a small eigenvalue nor many steps cancel."""
        rate, steps, kept = _as(self.learning_rate, eigenvalues), _as(self.steps, eigenvalues), _clipped(eigenvalues)
        z = rate * kept
        inside = z < 1
        z_in = jnp.where(inside, z, jnp.zeros_like(z))
        exponent = steps * jnp.log1p(z_in / (1 - z_in))  # -log1p(-z), which XLA rounds worse: by 100 eps at z = 0.41
        smooth = _one_minus_exp(exponent, kept, at_zero=rate * steps, curvature=rate * (steps - 1))
        # Beyond 1 the powers alternate in sign, and beyond 2 they grow; half the range of exponents keeps them finite.
        z_out = jnp.where(inside, jnp.full_like(z, 1.5), z)
        largest = math.sqrt(float(jnp.finfo(z.dtype).max))
        capped = steps * jnp.log(jnp.maximum(z_out - 1, jnp.finfo(z.dtype).tiny)) > math.log(largest)
        base = jnp.where(capped | (steps == 0), 1.0, z_out - 1)  # 0 to the power 0 has no gradient
        size = jnp.where(capped, largest, base**steps)
        # The parity is that of the steps as they came: a narrow dtype rounds large odd numbers to even ones.
        odd = jax.lax.stop_gradient(_as(self.steps % 2, eigenvalues))
        alternating = rate * (1 - (1 - 2 * odd) * size) / z_out
        return jnp.where(inside, smooth, alternating)

    def equivalent_damping(self) -> Scalar:
        """The inverse of learning rate times steps."""
        return 1 / (_float(self.learning_rate) * _float(self.steps))

    def at_damping(self, damping: Scalar) -> "GradientDescent":
        """The nearest number of steps, at least one."""
        steps = jnp.round(1 / (jnp.asarray(self.learning_rate, damping.dtype) * _positive(damping)))
        return GradientDescent(self.learning_rate, jnp.clip(steps, 1, jnp.finfo(damping.dtype).max))

    def stable(self, eigenvalues: Spectrum) -> Flag:
        """Whether learning rate times the largest eigenvalue is at most 2."""
        return jnp.all(_as(self.learning_rate, eigenvalues) * eigenvalues <= 2)


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientFlow(Filter):
    r"""Gradient flow on the linearised model, the limit of small learning rates.

    .. math::
        \varphi(\lambda) = \frac{1 - e^{-t \lambda}}{\lambda}, \qquad \varphi(0) = t, \qquad \mu = \frac{1}{t}

    Multiplied by :math:`\lambda` it differs from damping by at most 0.2036, at :math:`t \lambda = 2.513`.

    Attributes:
        time: t, not negative, may be traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(gnl.filters.GradientFlow(2.0)(jnp.array([0.0, 100.0])))
        [2.   0.01]

    References:
        Lee et al. (2019), Wide neural networks of any depth evolve as linear models, equation 8.
    """

    time: Number

    def __post_init__(self) -> None:
        check_number(self.time, "time")

    def __call__(self, eigenvalues: Spectrum) -> Spectrum:
        """By ``expm1``, so that small eigenvalues do not cancel."""
        time, kept = _as(self.time, eigenvalues), _clipped(eigenvalues)
        return _one_minus_exp(time * kept, kept, at_zero=time, curvature=time)

    def equivalent_damping(self) -> Scalar:
        """The inverse of the time."""
        return 1 / _float(self.time)

    def at_damping(self, damping: Scalar) -> "GradientFlow":
        """With the inverse as its time."""
        return GradientFlow(1 / _positive(damping))


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proximal(Filter):
    r"""Implicit (proximal) gradient steps on the linearised model, stable at every size.

    .. math::
        \varphi(\lambda) = \frac{1 - (1 + h \lambda)^{-m}}{\lambda}, \qquad \varphi(0) = h m, \qquad \mu = \frac{1}{h m}

    One step is ``Tikhonov(1 / h)``; many small ones are gradient flow.

    Attributes:
        step_size: h, positive, may be traced; it is what a damping policy sets.
        steps: m, at least 1, may be traced.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(gnl.filters.Proximal(1.0, 2)(jnp.array([0.0, 1.0])))
        [2.   0.75]

    References:
        Rockafellar (1976), Monotone operators and the proximal point algorithm.
    """

    step_size: Number
    steps: Number

    def __post_init__(self) -> None:
        check_number(self.step_size, "step_size", positive=True)
        _check_steps(self.steps, positive=True)

    def __call__(self, eigenvalues: Spectrum) -> Spectrum:
        """By logarithms, so that small eigenvalues do not cancel."""
        size, steps, kept = _as(self.step_size, eigenvalues), _as(self.steps, eigenvalues), _clipped(eigenvalues)
        exponent = steps * jnp.log1p(size * kept)
        return _one_minus_exp(exponent, kept, at_zero=size * steps, curvature=size * (steps + 1))

    def equivalent_damping(self) -> Scalar:
        """The inverse of step size times steps."""
        return 1 / (_float(self.step_size) * _float(self.steps))

    def at_damping(self, damping: Scalar) -> "Proximal":
        """With the step size that this takes, and as many steps."""
        return Proximal(1 / (jnp.asarray(self.steps, damping.dtype) * _positive(damping)), self.steps)


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class MinimumNorm(Filter):
    r"""The undamped Gauss-Newton step of minimum norm, the limit of all others as the damping vanishes.

    .. math:: \varphi(\lambda) = \frac{1}{\lambda} \text{ if } \lambda > \mathrm{rtol} \, \max \lambda, \text{ else } 0

    Attributes:
        rtol: eigenvalues up to this share of the largest count as zero.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(gnl.filters.MinimumNorm(1e-3)(jnp.array([4.0, 1e-9])))
        [0.25 0.  ]

    References:
        Ben-Israel (1966), A Newton-Raphson method for the solution of systems of equations.
    """

    rtol: Number = 1e-6
    adaptable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number(self.rtol, "rtol")

    def __call__(self, eigenvalues: Spectrum) -> Spectrum:
        """The inverse on the numerical range; the largest eigenvalue is taken along the last axis."""
        kept = _clipped(eigenvalues)
        largest = jnp.max(kept, axis=-1, keepdims=True, initial=0.0) if jnp.ndim(kept) else kept
        return jnp.where(kept <= _as(self.rtol, kept) * largest, jnp.zeros_like(kept), _inverse(kept))

    def equivalent_damping(self) -> Scalar:
        """None, that is 0."""
        return _float(0.0)

    def at_damping(self, damping: Scalar) -> "MinimumNorm":
        """Impossible: it has no damping."""
        raise TypeError(
            "filter: MinimumNorm has no damping for a policy to adapt; use damping=0.0 with it, or one of the other "
            "filters of gn_linear.filters."
        )


def _as(value: Number, like: Spectrum) -> jax.Array:
    return jnp.asarray(value, jnp.result_type(like))


def _float(value: Number) -> Scalar:
    return jnp.asarray(value, jnp.result_type(float))


def _positive(damping: Scalar) -> Scalar:
    return jnp.maximum(damping, jnp.finfo(damping.dtype).tiny)


def _check_steps(steps: Any, *, positive: bool = False) -> None:
    value = check_number(steps, "steps", positive=positive)
    if value is not None and value != round(value):
        raise ValueError(f"steps must be a whole number, but is {shown(steps)}.")


def _clipped(eigenvalues: Spectrum) -> Spectrum:
    return jnp.where(eigenvalues < 0, jnp.zeros_like(eigenvalues), eigenvalues)


def _inverse(x: jax.Array) -> jax.Array:
    """``1 / x``, 0 where x is 0 or so small that the inverse may overflow."""
    zero = x < jnp.finfo(x.dtype).tiny
    return jnp.where(zero, jnp.zeros_like(x), 1 / jnp.where(zero, jnp.ones_like(x), x))


def _one_minus_exp(exponent: jax.Array, kept: jax.Array, *, at_zero: jax.Array, curvature: jax.Array) -> jax.Array:
    """``(1 - exp(-exponent)) / kept``, by ``at_zero * (1 - curvature * kept / 2)`` where that is exact to rounding."""
    near = jnp.maximum(at_zero, jnp.abs(curvature)) * kept < float(jnp.finfo(kept.dtype).eps) ** 0.5
    # Each branch is given harmless numbers where the other one counts: infinities would turn its gradient into NaN.
    series = at_zero * (1 - curvature * jnp.where(near, kept, jnp.zeros_like(kept)) / 2)
    return jnp.where(near, series, -jnp.expm1(-exponent) / jnp.where(near, jnp.ones_like(kept), kept))
