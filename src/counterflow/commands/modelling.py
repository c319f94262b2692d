"""The model that a user names: a file of Python or Stan, its data, and one line for whatever is wrong with them."""

from __future__ import annotations

import importlib.util
import inspect
import json
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, Literal, get_args

import numpy as np
import torch

from counterflow.commands.eight_schools import eight_schools
from counterflow.posterior import targets
from counterflow.posterior.targets.target import Target

Tool = Literal["torch", "pymc", "pyro", "numpyro"]
Data = Mapping[str, Any]
DEFAULT = "eight-schools"
EXTRAS = {"pymc": "pymc", "pytensor": "pymc", "pyro": "pyro", "numpyro": "numpyro", "jax": "numpyro"}
PACKAGE = str(Path(targets.__file__).parents[1])


def find_target(model: str, data: Path | None, tool: Tool | None, dim: int | None) -> Target:
    """The target that `model` names: FILE.py:NAME, FILE.stan, or eight-schools, which is bundled.

    Raises:
        ValueError, OSError, ImportError: anything that is wrong with the file, the name, the data or the model.
    """
    if model == DEFAULT:
        if data is not None or tool or dim:
            raise ValueError(f"expected --data, --tool and --dim only with a model of yours, got them with {DEFAULT}")
        return eight_schools()
    file, name = split_name(model)
    values = None if data is None else read_data(data)
    with blaming(file):
        if file.suffix == ".stan":
            return targets.from_stan(file, values or {})
        return _target(_named(_executed(file), name, file), f"{file}:{name}", values, tool, dim)


def split_name(model: str) -> tuple[Path, str]:
    """FILE and NAME; a file of Stan has no name.

    Raises:
        ValueError: neither FILE.py:NAME nor FILE.stan.
        FileNotFoundError: there is no such file.
    """
    text, colon, name = model.rpartition(":")
    if not colon or not name.isidentifier():
        text, name = model, ""
    file = Path(text)
    if file.suffix not in (".py", ".stan") or (file.suffix == ".stan" and name):
        raise ValueError(
            f"expected a model as FILE.py:NAME or FILE.stan, got {model}; without one the {DEFAULT} are fitted"
        )
    if not file.is_file():
        came = "is a folder" if file.is_dir() else "does not exist"
        raise FileNotFoundError(f"expected a file with a model, got {file}, which {came}")
    return file, name


def read_data(file: Path) -> dict[str, Any]:
    """A model's data by name: the entries of one JSON object, lists as arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold a JSON object.
    """
    if not file.is_file():
        came = "is a folder" if file.is_dir() else "does not exist"
        raise FileNotFoundError(f"expected a JSON file after --data, got {file}, which {came}")
    try:
        values = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # text that is not UTF-8 is one as well
        raise ValueError(f"expected JSON in {file}, which does not read as such: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(
            f'expected an object like {{"y": [1, 2]}} in {file}, got {type(values).__name__}; name the data'
        )
    return {name: _array(value) for name, value in values.items()}


def _array(value: Any) -> Any:
    """A list of numbers, or of such lists, as an array; all else as it is."""
    if not isinstance(value, list) or not _all_numbers(value):
        return value
    try:
        array = np.array(value)
    except ValueError:  # rows of unequal length
        return value
    return array if array.dtype.kind in "biuf" else value


def _all_numbers(values: list[Any]) -> bool:
    """Whether nothing else is in it, however deep: an array of texts has room for the longest in every cell."""
    level = values
    while any(isinstance(value, list) for value in level):
        level = [inner for value in level for inner in (value if isinstance(value, list) else [value])]
    return all(isinstance(value, int | float) for value in level)


# -- Python files ------------------------------------------------------------------------------------


def _executed(file: Path) -> ModuleType:
    """The file, run as a module of a name of its own, as it may be called pymc.py; its neighbours can be imported."""
    spec = importlib.util.spec_from_file_location(f"__{file.stem}__", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"expected a file of Python, got {file}")
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(file.resolve().parent))  # after what is installed
    sys.modules[module.__name__] = module  # where a dataclass looks for its module
    spec.loader.exec_module(module)
    return module


def _named(module: ModuleType, name: str, file: Path) -> Any:
    there = [
        other for other, value in vars(module).items() if not other.startswith("_") and _may_be_model(value, module)
    ]
    listed = f"it holds {', '.join(there)}" if there else "nothing in it is a model"
    if not name:
        raise ValueError(f"expected {file}:NAME, got no name; {listed}")
    if name not in vars(module):
        raise ValueError(f"expected a name in {file}, got {name}, which is not there; {listed}")
    return getattr(module, name)


def _may_be_model(value: Any, module: ModuleType) -> bool:
    if isinstance(value, type | ModuleType):
        return False
    own = callable(value) and getattr(value, "__module__", None) == module.__name__
    return own or isinstance(value, Target) or _is_pymc(value)


def _is_pymc(value: Any) -> bool:
    pymc = sys.modules.get("pymc")  # which it is when there is a model of it
    return pymc is not None and isinstance(value, pymc.Model)


def _target(value: Any, name: str, data: Data | None, tool: Tool | None, dim: int | None) -> Target:
    """A target from what the file has under the name."""
    finished = isinstance(value, Target) or _is_pymc(value)
    if finished and data is not None:
        raise ValueError(
            f"expected no --data, as {name} is a model that has its data, got some; make it a function of them"
        )
    if isinstance(value, Target):
        return targets.as_target(value, dim)
    if _is_pymc(value):
        _refuse_dim(dim, "pymc")
        return targets.from_pymc(value)
    if not callable(value) or isinstance(value, type):
        raise ValueError(f"expected a model or a function as {name}, got {type(value).__name__}")
    kind = tool or _tool(value) or (None if dim is None else "torch")
    if kind is None:
        raise ValueError(
            f"expected a function whose tool can be told, got {name}, which has no attribute dim and calls none of "
            f"pymc, pyro and numpyro; give --dim D for a log density in torch, or --tool ({', '.join(get_args(Tool))})"
        )
    return _of_function(value, name, data or {}, kind, dim)


def _of_function(function: Callable[..., Any], name: str, data: Data, kind: str, dim: int | None) -> Target:
    """A target from a function of the data, which follow theta in a log density in torch."""
    if kind != "torch":
        _refuse_dim(dim, kind)
    _check_arguments(function, name, data, ["theta"] if kind == "torch" else [])
    if kind == "torch":
        size = getattr(function, "dim", None) if dim is None else dim
        return targets.as_target(partial(function, **_tensors(data)), size)
    if kind == "numpyro":
        return targets.from_numpyro(function, **data)
    if kind == "pyro":
        return targets.from_pyro(function, **_tensors(data))
    built = function(**data)
    if not isinstance(built, Target) and not _is_pymc(built):
        raise ValueError(f"expected {name} to return a PyMC model or a target, got {type(built).__name__}; return it")
    return _target(built, name, None, None, None)


def _refuse_dim(dim: int | None, kind: str) -> None:
    if dim is not None:
        raise ValueError(
            f"expected --dim only for a log density in torch, got {dim} for a model of {kind}; leave it out"
        )


def _check_arguments(function: Callable[..., Any], name: str, data: Data, first: list[str]) -> None:
    """Raise ValueError for data that are not the arguments of a function, after its first ones."""
    signature = inspect.signature(function)
    try:
        signature.bind(*first, **data)
    except TypeError:
        named = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        words = [p.name if p.default is p.empty else f"{p.name} (optional)" for p in named[len(first) :]]
        advice = (
            "name them so in the file after --data" if data else "give --data FILE.json, an object with these names"
        )
        raise ValueError(
            f"expected data {', '.join(words) or 'of no name'}, as {name} takes them, got {', '.join(data) or 'none'}; "
            f"{advice}"
        ) from None


def _tensors(data: Data) -> dict[str, Any]:
    return {name: torch.as_tensor(value) if isinstance(value, np.ndarray) else value for name, value in data.items()}


# -- which tool --------------------------------------------------------------------------------------


def _tool(function: Callable[..., Any]) -> str | None:
    """Which tool a function is written for: by its attribute dim, else by what it calls, else by its file's imports."""
    if hasattr(function, "dim"):
        return "torch"
    inner = inspect.unwrap(function.func if isinstance(function, partial) else function)
    if not isinstance(inner, FunctionType):  # such as a module of Pyro's
        return _one_of_two({_package(base) for base in type(inner).__mro__})
    called = _packages_called(inner)
    if called & {"pymc", "counterflow"}:
        return "pymc"  # it builds its model, or its target
    return _one_of_two(called) or _one_of_two({_package(value) for value in inner.__globals__.values()})


def _one_of_two(packages: set[str]) -> str | None:
    found = packages & {"pyro", "numpyro"}
    return found.pop() if len(found) == 1 else None


def _packages_called(function: FunctionType) -> set[str]:
    """The packages that a function, and those of its file that it calls, take names from."""
    codes, seen, found = [function.__code__], set[CodeType](), set[str]()
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
            found.add(name if value is None else _package(value))  # one that it imports itself is no global
    return found


def _package(value: Any) -> str:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return str(name).partition(".")[0]


# -- what goes wrong in it ---------------------------------------------------------------------------


@contextmanager
def blaming(file: Path) -> Iterator[None]:
    """Turn an error from a model's file, or from the tool that it is written for, into one line that says where."""
    try:
        yield
    except (Exception, SystemExit) as error:
        where = _where(error, file)
        if isinstance(error, OSError) and not where:
            raise  # such as a full disk, to which the run is written
        if not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE):
            raise ValueError(_line(error, file, where)) from error
        if isinstance(error, TypeError) or where:  # it says itself what was expected
            raise ValueError(f"{error}{where}") from error
        raise


def _line(error: BaseException, file: Path, where: str) -> str:
    """An error that others raised."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing:
        package = missing.partition(".")[0]
        source = f"'counterflow[{EXTRAS[package]}]'" if package in EXTRAS else package
        return f"expected {package}, which is not installed; pip install {source}{where}"
    text = ((error.msg if isinstance(error, SyntaxError) else str(error)).strip() or "no message").splitlines()[0]
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
    return f"expected {file} to run, got {type(error).__name__}: {text}{notes}{where}"


def _where(error: BaseException, file: Path) -> str:
    """Which line of the file an error comes from; empty where from none."""
    path = os.path.abspath(file)  # as the code that was compiled from it knows it
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    if not lines or lines[-1] is None:
        return ""
    return f" (line {lines[-1]} of {file}: {linecache.getline(path, lines[-1]).strip()})"
