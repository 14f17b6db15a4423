"""The checker that ``conftest.py`` hangs into the package's annotations."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Beartype, but for constructors: JAX rebuilds registered dataclasses with placeholders in place of numbers."""
    return function if function.__name__ == "__init__" else beartype(function)
