"""Targets from a user's model file, Python or Stan, and its data."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import torch

from counterflow.commands.eight_schools import eight_schools
from counterflow.commands.model_errors import errors_of_file
from counterflow.commands.model_names import DEFAULT_MODEL, missing_name, read_object, split_name
from counterflow.commands.model_tool import Tool, find_tool
from counterflow.posterior import targets
from counterflow.posterior.targets.target import Target

Data = Mapping[str, Any]


def load_target(model: str, data: Path | None, tool: Tool | None, dim: int | None) -> Target:
    """Return the target of the model that the command line names.

    Args:
        model: FILE.py:NAME, FILE.stan, or eight-schools, which is bundled.
        data: JSON file with the model's data by name.
        tool: tool that a function is written for; None finds it from the code.
        dim: D, for a log density in torch.

    Raises:
        ValueError, OSError, ImportError: something is wrong with the file, the name, the data or the model.
    """
    if model == DEFAULT_MODEL:
        if data is not None or tool or dim:
            raise ValueError(
                f"expected --data, --tool and --dim only with a model of yours, got them with {DEFAULT_MODEL}"
            )
        return eight_schools()
    file, name = split_name(model)
    values = None if data is None else read_data(data)
    with errors_of_file(file):
        if file.suffix == ".stan":
            return targets.from_stan(file, values or {})
        return _make_target(_lookup(_import_file(file), name, file), f"{file}:{name}", values, tool, dim)


def read_data(file: Path) -> dict[str, Any]:
    """Return a model's data by name, as `read_object` does. Lists of numbers become arrays."""
    return {name: _to_array(value) for name, value in read_object(file).items()}


def _to_array(value: Any) -> Any:
    """Return an array of a list of numbers, or of nested lists of numbers; return other values unchanged."""
    if not isinstance(value, list) or not _holds_only_numbers(value):
        return value
    try:
        array = np.array(value)
    except ValueError:  # rows of unequal length
        return value
    return array if array.dtype.kind in "biuf" else value


def _holds_only_numbers(values: list[Any]) -> bool:
    """Return True if nested lists hold only numbers. An array of texts would pad each cell to the longest text."""
    level = values
    while any(isinstance(value, list) for value in level):
        level = [inner for value in level for inner in (value if isinstance(value, list) else [value])]
    return all(isinstance(value, int | float) for value in level)


def _import_file(file: Path) -> ModuleType:
    """Run the file as a module, under a name that cannot hide a package; it can import its neighbours."""
    spec = importlib.util.spec_from_file_location(f"__{file.stem}__", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"expected a file of Python, got {file}")
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(file.resolve().parent))  # last, so that installed packages come first
    sys.modules[module.__name__] = module  # a dataclass looks its module up here
    spec.loader.exec_module(module)
    return module


def _lookup(module: ModuleType, name: str, file: Path) -> Any:
    candidates = [
        other for other, value in vars(module).items() if not other.startswith("_") and _may_be_model(value, module)
    ]
    if name not in vars(module):
        raise missing_name(file, name, candidates)
    return getattr(module, name)


def _may_be_model(value: Any, module: ModuleType) -> bool:
    if isinstance(value, type | ModuleType):
        return False
    is_own_function = callable(value) and getattr(value, "__module__", None) == module.__name__
    return is_own_function or isinstance(value, Target) or _is_pymc_model(value)


def _is_pymc_model(value: Any) -> bool:
    pymc = sys.modules.get("pymc")  # imported if there is a model of it
    return pymc is not None and isinstance(value, pymc.Model)


def _make_target(value: Any, name: str, data: Data | None, tool: Tool | None, dim: int | None) -> Target:
    """Return a target of the value that the file has under the name."""
    if (isinstance(value, Target) or _is_pymc_model(value)) and data is not None:
        raise ValueError(
            f"expected no --data, as {name} is a model that has its data, got some; make it a function of the data"
        )
    if isinstance(value, Target):
        return targets.as_target(value, dim)
    if _is_pymc_model(value):
        _check_no_dim(dim, "pymc")
        return targets.from_pymc(value)
    if not callable(value) or isinstance(value, type):
        raise ValueError(f"expected {name} to be a model or a function, got {type(value).__name__}")
    kind = tool or find_tool(value) or (None if dim is None else "torch")
    if kind is None:
        raise ValueError(
            f"expected a function whose tool can be found, got {name}, which has no attribute dim and calls none of "
            f"pymc, pyro and numpyro; give --dim D for a log density in torch, or --tool ({', '.join(get_args(Tool))})"
        )
    return _from_function(value, name, data or {}, kind, dim)


def _from_function(function: Callable[..., Any], name: str, data: Data, tool: Tool, dim: int | None) -> Target:
    """Return a target of a function of the data. In a log density in torch, theta comes first."""
    if tool != "torch":
        _check_no_dim(dim, tool)
    _check_arguments(function, name, data, ["theta"] if tool == "torch" else [])
    if tool == "torch":
        size = getattr(function, "dim", None) if dim is None else dim
        return targets.as_target(partial(function, **_to_tensors(data)), size)
    if tool == "numpyro":
        return targets.from_numpyro(function, **data)
    if tool == "pyro":
        return targets.from_pyro(function, **_to_tensors(data))
    result = function(**data)
    if not isinstance(result, Target) and not _is_pymc_model(result):
        raise ValueError(f"expected {name} to return a PyMC model or a target, got {type(result).__name__}; return it")
    return _make_target(result, name, None, None, None)


def _check_no_dim(dim: int | None, tool: str) -> None:
    if dim is not None:
        raise ValueError(
            f"expected --dim only for a log density in torch, got {dim} for a model of {tool}; leave it out"
        )


def _check_arguments(function: Callable[..., Any], name: str, data: Data, first: list[str]) -> None:
    """Raise ValueError for data that are not the arguments of a function after its first ones."""
    signature = inspect.signature(function)
    try:
        signature.bind(*first, **data)
    except TypeError:
        named = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        wanted = [p.name if p.default is p.empty else f"{p.name} (optional)" for p in named[len(first) :]]
        advice = (
            "name them so in the file after --data" if data else "give --data FILE.json, an object with these names"
        )
        raise ValueError(
            f"expected data {', '.join(wanted) or 'of no name'}, as {name} takes them, got "
            f"{', '.join(data) or 'none'}; {advice}"
        ) from None


def _to_tensors(data: Data) -> dict[str, Any]:
    return {name: torch.as_tensor(value) if isinstance(value, np.ndarray) else value for name, value in data.items()}
