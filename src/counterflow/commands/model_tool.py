"""Detection of the modelling tool that a function is written for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any, Literal

Tool = Literal["torch", "pymc", "pyro", "numpyro"]


def find_tool(function: Callable[..., Any]) -> Tool | None:
    """Return the tool of a function from its attribute dim, else from its calls, else from its file's imports.

    A function that builds a PyMC model or a target counts as "pymc". None if the code does not tell.
    """
    if hasattr(function, "dim"):
        return "torch"
    inner = inspect.unwrap(function.func if isinstance(function, partial) else function)
    if not isinstance(inner, FunctionType):  # such as a PyroModule
        return _pyro_or_numpyro({_package_of(base) for base in type(inner).__mro__})
    called = _packages_called(inner)
    if called & {"pymc", "counterflow"}:
        return "pymc"
    return _pyro_or_numpyro(called) or _pyro_or_numpyro({_package_of(value) for value in inner.__globals__.values()})


def _pyro_or_numpyro(packages: set[str]) -> Tool | None:
    if ("pyro" in packages) == ("numpyro" in packages):
        return None
    return "pyro" if "pyro" in packages else "numpyro"


def _packages_called(function: FunctionType) -> set[str]:
    """Return the packages whose names a function uses, including functions of its file that it calls."""
    codes = [function.__code__]
    seen = set[CodeType]()
    found = set[str]()
    while codes:
        code = codes.pop()
        if code in seen:
            continue
        seen.add(code)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        for name in code.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, FunctionType) and value.__globals__ is function.__globals__:
                codes.append(value.__code__)
            found.add(name if value is None else _package_of(value))  # a package imported inside is no global
    return found


def _package_of(value: Any) -> str:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return str(name).partition(".")[0]
