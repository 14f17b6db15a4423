"""Shared type aliases, the check that every numeric argument passes, and how error messages show a value."""

import math
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

Params: TypeAlias = PyTree[Any]
"""A pytree of float arrays (None is an empty subtree)."""

Inputs: TypeAlias = Any
"""An opaque pytree, handed to ``predict`` as it came."""

Outputs: TypeAlias = PyTree[Any]
"""An array whose leading axis is the example, or a pytree of such arrays."""

Targets: TypeAlias = Any
"""What the loss compares the outputs with."""

Predict: TypeAlias = Callable[[Params, Inputs], Outputs]
"""``predict(params, inputs) -> outputs``, any framework's apply function."""

Scalar: TypeAlias = Float[Array, ""]
"""A float array of shape ()."""

Count: TypeAlias = Int[Array, ""]
"""An integer array of shape ()."""

Flag: TypeAlias = Bool[Array, ""]
"""A boolean array of shape ()."""

Number: TypeAlias = float | int | Shaped[Array, ""]
"""A real number that may be traced."""


LONGEST_REPR = 80


def shown(value: Any) -> str:
    """A value as error messages show it: on one line, without addresses, arrays by dtype and shape.

    Args:
        value: anything.

    Returns:
        Its text, with its type where that is not plain to see.
    """
    name = getattr(value, "__name__", None)
    if isinstance(value, type):
        return f"the class {name} (call it first)"
    if isinstance(value, (jax.Array, np.ndarray)):
        return _shown_array(value)
    if callable(value) and name:
        return f"the function {name}"
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(repr(value).split()))
    text = re.sub(r"<function ([^ >]+)>", r"\1", text)
    kind = type(value).__name__
    if len(text) > LONGEST_REPR:
        text = f"{text[: LONGEST_REPR - 3]}..."
    plain = value is None or isinstance(value, (bool, int, float, complex, str, np.generic)) or text.startswith(kind)
    return text if plain else f"{text} ({with_article(kind)})"


def _shown_array(value: Any) -> str:
    kind = f"{value.dtype} array of shape {value.shape}"
    try:
        return f"{np.asarray(value)} ({with_article(kind)})" if value.ndim == 0 else with_article(kind)
    except jax.errors.TracerArrayConversionError:
        return f"a traced {kind}"


def with_article(noun: str) -> str:
    """The noun behind ``a`` or ``an``."""
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def check_number(value: Any, argument: str, *, positive: bool = False, also: str = "") -> float | None:
    """Raise unless a number is real, finite and not negative (or positive); traced values cannot be checked.

    Args:
        value: the number; a traced one passes.
        argument: its name, for the message.
        positive: whether zero is refused as well.
        also: what else the argument may be, for the message.

    Returns:
        Its value; None if it is traced.

    Raises:
        TypeError: it is not a real scalar.
        ValueError: it is out of range.
    """
    kind = ("a positive finite number" if positive else "a finite number that is not negative") + also
    if isinstance(value, (bool, str)) or value is None or (not np.isscalar(value) and np.shape(value) != ()):
        raise TypeError(f"{argument} must be {kind}, but is {shown(value)}.")
    scalar: Any = value
    try:
        number = float(scalar)
    except jax.errors.ConcretizationTypeError:
        return None
    except (TypeError, ValueError) as error:
        raise TypeError(f"{argument} must be {kind}, but is {shown(value)}.") from error
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{argument} must be {kind}, but is {shown(value)}.")
    return number


def check_count(value: Any, argument: str, *, minimum: int = 1) -> None:
    """Raise unless a value is an integer known at trace time, since it sets the size of arrays or loops.

    Args:
        value: the value.
        argument: its name, for the message.
        minimum: the smallest one allowed.

    Raises:
        TypeError: it is not an integer, or traced.
        ValueError: it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{argument} must be an int, since it sets the size of arrays or loops, but is {shown(value)}.")
    if value < minimum:
        raise ValueError(f"{argument} must be at least {minimum}, but is {value}.")
