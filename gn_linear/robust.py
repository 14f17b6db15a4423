r"""Robust losses of residuals that grow more slowly than the square, for :func:`gn_linear.least_squares`.

With :math:`C` = ``delta`` each is quadratic, :math:`\frac12 r^2`, for :math:`|r| \ll C`; outliers beyond weigh less.
They are scipy's losses of the same names with ``f_scale`` = ``delta``; Huber's is :func:`gn_linear.losses.huber`.
Cauchy's and the arctangent are not convex: their curvature counts as none where it is negative, so that they belong to
a solver that refuses bad steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._loss import Loss, Products, diagonal_products
from gn_linear._typing import Number, check_number

__all__ = ["Arctan", "Cauchy", "SoftL1", "arctan", "cauchy", "soft_l1"]


@dataclasses.dataclass(frozen=True)
class _Robust(Loss):
    """A loss of each residual, from its value, slope and curvature for ``delta = 1``."""

    needs_targets: ClassVar[bool] = False
    delta: Number = 1.0

    @staticmethod
    def _value_of(t: jax.Array) -> jax.Array:
        raise NotImplementedError

    @staticmethod
    def _slope_of(t: jax.Array) -> jax.Array:
        raise NotImplementedError

    @staticmethod
    def _curvature_of(t: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _scaled(self, outputs: jax.Array, targets: Any, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        # Beyond, where squares of squares overflow, the losses are as flat as they get.
        largest = float(jnp.finfo(outputs.dtype).max) ** 0.2
        residuals = (outputs - targets.astype(outputs.dtype)) / jnp.asarray(self.delta, outputs.dtype)
        return function(jnp.where(jnp.isnan(residuals), residuals, jnp.clip(residuals, -largest, largest)))

    def _values(self, outputs: jax.Array, targets: Any) -> jax.Array:
        return jnp.asarray(self.delta, outputs.dtype) ** 2 * self._scaled(outputs, targets, self._value_of)

    def _gradients(self, outputs: jax.Array, targets: Any) -> jax.Array:
        return jnp.asarray(self.delta, outputs.dtype) * self._scaled(outputs, targets, self._slope_of)

    def _hessian(self, outputs: jax.Array, targets: Any) -> Products:
        curvature = self._scaled(outputs, targets, self._curvature_of)
        return diagonal_products(jnp.maximum(curvature, jnp.asarray(jnp.finfo(outputs.dtype).eps, outputs.dtype)))


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftL1(_Robust):
    r"""A smooth absolute value, :math:`C^2 (\sqrt{1 + (r/C)^2} - 1)`. Built by ``gnl.robust.soft_l1``.

    Attributes:
        delta: where the quadratic ends, :math:`C`, in units of the residuals.
    """

    @staticmethod
    def _value_of(t: jax.Array) -> jax.Array:
        return t**2 / (1 + jnp.sqrt(1 + t**2))

    @staticmethod
    def _slope_of(t: jax.Array) -> jax.Array:
        return t / jnp.sqrt(1 + t**2)

    @staticmethod
    def _curvature_of(t: jax.Array) -> jax.Array:
        return (1 + t**2) ** -1.5


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cauchy(_Robust):
    r"""Cauchy's (Lorentz's) loss, :math:`\frac12 C^2 \log(1 + (r/C)^2)`. Built by ``gnl.robust.cauchy``.

    Attributes:
        delta: where the quadratic ends, :math:`C`, in units of the residuals.
    """

    @staticmethod
    def _value_of(t: jax.Array) -> jax.Array:
        return 0.5 * jnp.log1p(t**2)

    @staticmethod
    def _slope_of(t: jax.Array) -> jax.Array:
        return t / (1 + t**2)

    @staticmethod
    def _curvature_of(t: jax.Array) -> jax.Array:
        return (1 - t**2) / (1 + t**2) ** 2


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arctan(_Robust):
    r"""A bounded loss, :math:`\frac12 C^2 \arctan((r/C)^2)`. Built by ``gnl.robust.arctan``.

    Attributes:
        delta: where the quadratic ends, :math:`C`, in units of the residuals.
    """

    @staticmethod
    def _value_of(t: jax.Array) -> jax.Array:
        return 0.5 * jnp.arctan(t**2)

    @staticmethod
    def _slope_of(t: jax.Array) -> jax.Array:
        return t / (1 + t**4)

    @staticmethod
    def _curvature_of(t: jax.Array) -> jax.Array:
        return (1 - 3 * t**4) / (1 + t**4) ** 2


def soft_l1(delta: Number = 1.0) -> SoftL1:
    r"""A smooth absolute value: convex, and linear for outliers.

    .. math:: \ell(r) = C^2 (\sqrt{1 + (r/C)^2} - 1)

    Args:
        delta: where the quadratic ends, :math:`C`, in units of the residuals; positive, may be traced.

    Returns:
        The loss.

    Raises:
        TypeError: ``delta`` is not a number.
        ValueError: ``delta`` is not positive and finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(f"{gnl.robust.soft_l1()(jnp.array([[3.0]])):.3f}")
        2.162

    References:
        Charbonnier et al. (1994), Two deterministic half-quadratic regularization algorithms for computed imaging.
    """
    check_number(delta, "delta", positive=True)
    return SoftL1(delta)


def cauchy(delta: Number = 1.0) -> Cauchy:
    r"""Cauchy's loss, the likelihood of Lorentzian noise: outliers pull less the further away they are.

    .. math:: \ell(r) = \tfrac12 C^2 \log(1 + (r/C)^2)

    Args:
        delta: where the quadratic ends, :math:`C`, in units of the residuals; positive, may be traced.

    Returns:
        The loss.

    Raises:
        TypeError: ``delta`` is not a number.
        ValueError: ``delta`` is not positive and finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(gnl.robust.cauchy()(jnp.array([[3.0]])).round(3))
        1.151

    References:
        Triggs et al. (2000), Bundle adjustment: a modern synthesis, section 4.3.
    """
    check_number(delta, "delta", positive=True)
    return Cauchy(delta)


def arctan(delta: Number = 1.0) -> Arctan:
    r"""A bounded loss: outliers hardly pull at all.

    .. math:: \ell(r) = \tfrac12 C^2 \arctan((r/C)^2)

    Args:
        delta: where the quadratic ends, :math:`C`, in units of the residuals; positive, may be traced.

    Returns:
        The loss.

    Raises:
        TypeError: ``delta`` is not a number.
        ValueError: ``delta`` is not positive and finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> print(gnl.robust.arctan()(jnp.array([[3.0]])).round(3))
        0.73

    References:
        Triggs et al. (2000), Bundle adjustment: a modern synthesis, section 4.3.
    """
    check_number(delta, "delta", positive=True)
    return Arctan(delta)
