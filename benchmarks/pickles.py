"""Pickles from elsewhere, read without running anything that they name: plain containers and numeric arrays only."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

NUMERIC = re.compile(r"[biuf][0-9]{1,2}")
"""Booleans, signed and unsigned integers, floats: the names of the dtypes that may come."""


class _Dtype:
    """What the file calls numpy.dtype; numpy's own would take its state from the file unchecked."""

    def __init__(self, name: Any, *flags: Any) -> None:
        del flags
        name = _text(name)
        if not NUMERIC.fullmatch(name):
            raise pickle.UnpicklingError(f"dtype {name!r} is not that of numbers")
        self.value = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        order: Any = _text(state[1])
        self.value = self.value.newbyteorder(order)


class _Array:
    """What the file calls numpy.ndarray: made empty, then given its state."""

    value: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, content = state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array must come as bytes with a numeric dtype")
        self.value = np.frombuffer(content, dtype.value).reshape(shape, order="F" if is_fortran else "C")


def _empty_array(*arguments: Any) -> _Array:
    """What the file calls numpy's _reconstruct."""
    del arguments
    return _Array()


def _text(value: Any) -> str:
    """Reads text that Python 2 or 3 wrote."""
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


ADMITTED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
}


class _Unpickler(pickle.Unpickler):
    """Admits the names of an array and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return ADMITTED[module, name]


def load(path: Path) -> dict[Any, Any]:
    """Reads a pickled dictionary of containers, text, bytes, numbers and numeric arrays.

    A pickle is a program, and `pickle.load` runs it. Here every name but those of an array is refused, and for these
    stand plain classes of this module, so that a file can at worst fail to be read.

    Args:
        path: the file; protocols up to 4, by Python 2 as well, whose text comes as bytes.

    Returns:
        The dictionary; its values that are arrays are arrays of numpy.

    Raises:
        ValueError: if the file is no such pickle.
    """
    try:
        with path.open("rb") as file:
            found = _Unpickler(file, encoding="bytes").load()
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not a dictionary")
        return {key: item.value if isinstance(item, _Array) else item for key, item in found.items()}
    # Bytes that are broken, or meant to break, fail in any of these ways.
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError, MemoryError) as error:
        raise ValueError(f"{path} is not a pickle of plain containers and numeric arrays: {error}.") from error
