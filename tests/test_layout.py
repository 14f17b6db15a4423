"""The laws of the package's layout: names give files, everything is documented, no private JAX, small parts."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gn_linear as gnl

ROOT = Path(gnl.__file__).parent
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
PRIVATE_JAX = re.compile(r"jax\.(_src|core|interpreters)\b")

# Top-level names that share the file of another name.
SHARED_FILES = {
    "filtered_predictions": "_filtered_steps",
    "FilteredStepsInfo": "_filtered_steps",
    "info": "_inspect",
    "anchor": "_inspect",
    "linearised": "_linearise",
    "Linearisation": "_linearise",
    "GaussNewtonInfo": "_gauss_newton",
    "GaussNewtonState": "_gauss_newton",
    "IterativeLinearisationState": "_iterative_linearisation",
    "LinearisationInfo": "_iterative_linearisation",
    "Refusal": "_refusal",
    "Options": "_options",
    "Outcome": "_outcome",
    "Solution": "_solution",
    "curve_fit": "_least_squares",
}


def home(obj: Any) -> str:
    """The module that defines a function or class, or the class of any other object."""
    return getattr(obj if hasattr(obj, "__name__") else type(obj), "__module__", "")


def public_objects() -> Iterator[tuple[str, str, Any]]:
    """Every public object with the names of the module and of the attribute that a user imports it by."""
    for name in gnl.__all__:
        obj = getattr(gnl, name)
        if isinstance(obj, ModuleType):
            yield from ((obj.__name__, inner, getattr(obj, inner)) for inner in getattr(obj, "__all__", ()))
        elif name != "__version__":
            yield gnl.__name__, name, obj


def public_members() -> Iterator[tuple[str, Any]]:
    """Every public object, and the methods and properties of every public class, with their full names."""
    for module, name, obj in public_objects():
        yield f"{module}.{name}", obj
        for member, value in vars(obj).items() if inspect.isclass(obj) else ():
            if not member.startswith("_") and (callable(value) or isinstance(value, property | classmethod)):
                yield f"{module}.{name}.{member}", getattr(obj, member)


OBJECTS = {f"{module}.{name}": (module, name, obj) for module, name, obj in public_objects()}
MEMBERS = dict(public_members())
FUNCTIONS = {path: obj for path, (_, _, obj) in OBJECTS.items() if inspect.isfunction(obj)}
SETTINGS = {  # what a user fills in: functions with their parameters, dataclasses and named tuples with their fields
    **{path: list(inspect.signature(function).parameters) for path, function in FUNCTIONS.items()},
    **{
        path: [f.name for f in dataclasses.fields(obj)] if dataclasses.is_dataclass(obj) else list(obj._fields)
        for path, (_, _, obj) in OBJECTS.items()
        if inspect.isclass(obj) and (dataclasses.is_dataclass(obj) or hasattr(obj, "_fields"))
    },
}


@pytest.mark.parametrize("name", [name for name in gnl.__all__ if isinstance(getattr(gnl, name), ModuleType)])
def test_public_module_says_what_is_public(name):
    assert getattr(gnl, name).__all__


@pytest.mark.parametrize("path", OBJECTS)
def test_import_path_gives_file(path):
    module, name, obj = OBJECTS[path]
    if module == "gn_linear":
        assert home(obj) == f"gn_linear.{SHARED_FILES.get(name, '_' + name)}"
    else:
        assert f"{home(obj)}.".startswith(f"{module}."), f"{path} is defined in {home(obj)}"


@pytest.mark.parametrize("path", MEMBERS)
def test_public_object_is_documented(path):
    assert inspect.getdoc(MEMBERS[path]), f"{path} has no docstring"


@pytest.mark.parametrize("path", SETTINGS)
def test_every_parameter_is_documented(path):
    doc = inspect.getdoc(OBJECTS[path][2])
    missing = [name for name in SETTINGS[path] if not re.search(rf"^\s+\*{{0,2}}{name}\b.*:", doc, re.MULTILINE)]
    assert not missing


@pytest.mark.parametrize("path", FUNCTIONS)
def test_public_function_has_an_example(path):
    assert ">>>" in inspect.getdoc(FUNCTIONS[path])


def dotted_names(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that a module imports or reaches by attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


@pytest.mark.parametrize("file", TREES)
def test_no_private_jax(file):
    assert not [name for name in dotted_names(TREES[file]) if PRIVATE_JAX.match(name)]


@pytest.mark.parametrize("file", [file for file in TREES if file != "__init__.py"])
def test_modules_import_modules_not_the_package(file):
    for name in dotted_names(TREES[file]):
        if name.split(".")[0] == "gn_linear":
            part = ROOT / name.split(".")[1] if "." in name else ROOT / "missing"
            assert part.is_dir() or part.with_suffix(".py").is_file(), f"{file} imports {name}"


@pytest.mark.parametrize("file", TREES)
def test_modules_and_functions_are_short(file):
    lines = (ROOT / file).read_text().count("\n")
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    docs = [node.body[0] for node in ast.walk(TREES[file]) if isinstance(node, documented) and ast.get_docstring(node)]
    assert lines - sum(doc.end_lineno - doc.lineno + 1 for doc in docs) <= 300  # docstrings do not count
    functions = {}
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            functions[node.name] = node.end_lineno - body[0].lineno + 1  # the docstring does not count
    assert not {name: lines for name, lines in functions.items() if lines > 60}


def test_import_is_light():
    """Importing the package loads no optional package and leaves JAX's settings alone."""
    script = (
        "import sys, jax; before = jax.config.jax_enable_x64; import gn_linear; "
        "assert jax.config.jax_enable_x64 == before; "
        "print(*{'jaxopt', 'matplotlib', 'mlxtend', 'sklearn', 'tqdm'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stdout + result.stderr
