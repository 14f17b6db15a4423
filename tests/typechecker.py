"""The checker that ``conftest.py`` hangs into the package's annotations.

jaxtyping's own decorator compiles its checks anew whenever a function inside of a function is defined, and checks the
arguments once more together with the result. Tracing defines and calls such functions all the time, so that this took
a fifth of the time of all tests; here every function of the source is compiled once.
"""

import functools
import inspect
import itertools
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, jaxtyped

_SAME_NAMES = jaxtyped("context")  # inside of it a name of an axis stands for one length
_FAILING = BeartypeConf(violation_type=TypeCheckError)


class _Checks(NamedTuple):
    """One check for each annotation of a function; None is a check that everything passes."""

    positional: list[Any]
    rest: Any  # of *args
    keyword: dict[str, Any]
    others: Any  # of **kwargs
    result: Any


_CHECKS: dict[CodeType, _Checks] = {}


def _check(function: Callable[..., Any], name: str | None) -> Any:
    """A function that raises unless its argument is what the function's annotation with this name says."""
    if function.__annotations__.get(name, Any) is Any:
        return None

    def check(value):
        return value

    place = "return" if name == "return" else "value"  # some types are those of results alone
    check.__annotations__ = {place: function.__annotations__[name]}
    check.__module__ = function.__module__
    check.__name__ = check.__qualname__ = f"{function.__name__}__{name}"  # what the error names
    return beartype(check, conf=_FAILING)


def _checks(function: Callable[..., Any]) -> _Checks:
    spec = inspect.getfullargspec(function)
    keyword = {name: _check(function, name) for name in (*spec.args, *spec.kwonlyargs)}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not parameter.empty and keyword[name]:
            keyword[name](parameter.default)
    rest, others, result = (_check(function, name) for name in (spec.varargs, spec.varkw, "return"))
    return _Checks([keyword[name] for name in spec.args], rest, keyword, others, result)


def checked(function: Any = None, *, typechecker: Any = None) -> Any:
    """``jaxtyping.jaxtyped`` with beartype, but for constructors.

    JAX rebuilds registered dataclasses with placeholders in place of numbers.
    """
    del typechecker
    if function is None:
        return checked
    if inspect.isclass(function) or function.__name__ == "__init__":
        return function

    checks = _CHECKS.get(function.__code__)
    if checks is None:
        checks = _CHECKS[function.__code__] = _checks(function)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with _SAME_NAMES:
            in_order = itertools.chain(checks.positional, itertools.repeat(checks.rest))
            for check, value in zip(in_order, args, strict=False):
                if check:
                    check(value)
            for name, value in kwargs.items():
                if check := checks.keyword.get(name, checks.others):
                    check(value)
            result = function(*args, **kwargs)
            if checks.result:
                checks.result(result)
            return result

    return wrapped
