"""The suites. To add one, add one module to this folder; nothing is registered anywhere.

A suite is a module with

- a docstring, whose first line is what `list` prints;
- `X64`: whether it needs 64-bit floats, which are switched on before it runs, so build no array at import;
- `run(settings) -> results`: does the work and returns named lists of tidy rows, such as
  `{"runs": [{"method": "Adam", "seed": 0, "seconds": 1.2}]}`;
- `table(results) -> str`: what is printed at the end, from the rows alone;
- `figure(results) -> matplotlib.figure.Figure`: what is saved, from the rows alone.

It may have `SEEDS` and `QUICK_SEEDS`, the number of seeds where the command line gives none, instead of 3 and 1.

`table` and `figure` see the rows as the record holds them: a number that is not finite has become None.

The module `feature_learning.py` is the suite `feature-learning`. Import peers inside the functions that use them.
"""

import ast
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

Results = dict[str, list[dict[str, Any]]]

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Returns the names of the suites, sorted."""
    return sorted(path.stem.replace("_", "-") for path in FOLDER.glob("[!_]*.py"))


def check(name: str) -> None:
    """Checks that a suite exists.

    Args:
        name: the suite's name.

    Raises:
        KeyError: if there is no such suite; the message names those that there are.
    """
    if name not in names():
        raise KeyError(f"no suite is called {name!r}; the suites are: {', '.join(names())}")


def description(name: str) -> str:
    """Reads the first line of a suite's docstring without importing the suite or its peers.

    Args:
        name: the suite's name.

    Returns:
        That line.

    Raises:
        KeyError: if there is no such suite.
    """
    check(name)
    source = (FOLDER / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def load(name: str) -> ModuleType:
    """Imports a suite.

    Args:
        name: the suite's name.

    Returns:
        Its module.

    Raises:
        KeyError: if there is no such suite.
    """
    check(name)
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
