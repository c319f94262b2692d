"""Checks of a model file and its data that read text only: nothing is imported, run or compiled."""

from __future__ import annotations

import ast
import json
import linecache
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from counterflow.commands.preflight import check_readable, what_is_wrong
from counterflow.posterior.targets.stan_data import check_data_names

DEFAULT_MODEL = "eight-schools"
UNSEEN = ("exec", "globals", "setattr", "vars")  # calls that may define names which the text does not show


def check_model(model: str, data: Path | None) -> None:
    """Check that the model file exists and defines the name, and that the data file is a JSON object.

    Raises:
        ValueError, OSError: as `split_name` and `read_object`, or the file does not compile or lacks the name, or the
            data lack some of those that a Stan program declares.
    """
    file, name = split_name(model)
    check_readable(file, "a file with a model")
    values = {} if data is None else read_object(data)
    if file.suffix == ".py":
        _check_name(file, name)
    else:
        check_data_names(file.read_text("utf-8", "replace"), values)


def split_name(model: str) -> tuple[Path, str]:
    """Return FILE and NAME of FILE.py:NAME; a Stan file has no name.

    Raises:
        ValueError: neither FILE.py:NAME nor FILE.stan.
        FileNotFoundError: there is no such file.
    """
    text, colon, name = model.rpartition(":")
    if not colon or not name.isidentifier():
        text = model
        name = ""
    file = Path(text)
    if file.suffix not in (".py", ".stan") or (file.suffix == ".stan" and name):
        raise ValueError(
            f"expected a model as FILE.py:NAME or FILE.stan, got {model}; without a model, the {DEFAULT_MODEL} model "
            "is fitted"
        )
    if not file.is_file():
        raise FileNotFoundError(f"expected a file with a model, got {file}, {what_is_wrong(file)}")
    return file, name


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold a JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"expected a JSON file after --data, got {file}, {what_is_wrong(file)}")
    try:
        values = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError also for text that is not UTF-8
        raise ValueError(f"expected {file} to be JSON, but it does not read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(
            f'expected an object like {{"y": [1, 2]}} in {file}, got {type(values).__name__}; name the data'
        )
    return values


def missing_name(file: Path, name: str, candidates: list[str]) -> ValueError:
    """Return the error for a name that a model file does not define, or for no name."""
    listed = f"it holds {', '.join(candidates)}" if candidates else "it holds no model"
    if not name:
        return ValueError(f"expected {file}:NAME, got no name; {listed}")
    return ValueError(f"expected a name in {file}, got {name}, which is not there; {listed}")


def line_of(file: Path, number: int) -> str:
    """Return a line of a file for an error, such as " (line 3 of model.py: return y)"."""
    return f" (line {number} of {file}: {linecache.getline(str(file), number).strip()})"


def _check_name(file: Path, name: str) -> None:
    """Raise ValueError if the text of a Python file shows that it does not define the name."""
    code = file.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # running the file reports it
            compile(code, str(file), "exec", dont_inherit=True)
    except SyntaxError as error:
        place = "" if error.lineno is None else line_of(file, error.lineno)
        raise ValueError(f"expected {file} to run, got {type(error).__name__}: {error.msg}{place}") from None
    except ValueError as error:  # a null byte
        raise ValueError(f"expected {file} to be a file of Python, got one that does not read: {error}") from None
    tree = ast.parse(code, str(file))
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    defined = list(_defined(tree.body))
    if "*" in defined or calls & {*UNSEEN}:
        return
    if name not in defined:
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assigned = [
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value, ast.Call)
        ]
        raise missing_name(file, name, [each for each in functions + assigned if not each.startswith("_")])


def _defined(statements: list[ast.stmt]) -> Iterator[str]:
    """Yield the names that statements define at the level of the module; "*" for all names of another module."""
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield node.name  # such as one in an if statement
            elif isinstance(node, ast.alias):
                yield (node.asname or node.name).partition(".")[0]
