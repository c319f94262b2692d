"""Packages that import their public names on first use: printing the help of a command should not import torch."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import Any


def on_first_use(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and the `__dir__` of a package that imports its public names on first use (PEP 562).

    Args:
        package: the package's `__name__`.
        names: where each public name comes from, "module:attribute", or "module:" for the module itself.

    Example:
        >>> module_getattr, module_dir = on_first_use(__name__, {"sqrt": "math:sqrt", "maths": "math:"})
        >>> module_getattr("sqrt")(4.0), module_getattr("maths").pi > 3, "sqrt" in module_dir()
        (2.0, True, True)
    """
    namespace = vars(sys.modules[package])

    def module_getattr(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = pkgutil.resolve_name(names[name])  # the next access finds it without this function
        return namespace[name]

    def module_dir() -> list[str]:
        return sorted({*namespace, *names})

    return module_getattr, module_dir
