"""JSON files, and values checked against type hints."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from counterflow.io.atomic import write_bytes

MAX_QUOTED = 1000  # characters of an error that is told in ours; one may quote as much as there is in a file


def write_json(path: Path, value: Any) -> None:
    """One JSON file, indented, ending in a newline."""
    write_bytes(path, (json.dumps(value, indent=2, default=str) + "\n").encode())


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The one JSON object that a file holds.

    Raises:
        ValueError: it holds something else.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "numbers.json"
        >>> write_json(path, {"a": 1})
        >>> read_json(path, "a file of numbers")
        {'a': 1}
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # text that is not UTF-8 is a ValueError as well
        came = "lists within lists without end" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"expected {path} to be {what}, but it does not read as JSON: {came}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected {path} to be {what}, an object of JSON, got {type(value).__name__}")
    return value


def from_json(value: Any, hint: Any, name: str) -> Any:
    """A value of JSON as a type hint has it: lists become tuples, texts paths, and objects the dataclass hinted.

    Raises:
        ValueError: it is of another type, or an object lacks a field or has others.

    Example:
        >>> from_json([1, 2], tuple[int, ...], "sizes")
        (1, 2)
        >>> from_json("two", int | None, "layers")
        Traceback (most recent call last):
        ValueError: expected layers as int | None, got 'two'
    """
    inner = get_args(hint)
    if hint is Any:
        return value
    if get_origin(hint) in (Union, UnionType):
        for one in inner:
            with suppress(ValueError):
                return from_json(value, one, name)
    elif get_origin(hint) is Literal and value in inner:
        return value
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif get_origin(hint) is tuple and isinstance(value, list):
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        if len(kinds) == len(value):
            return tuple(
                from_json(v, kind, f"{name}[{k}]") for k, (v, kind) in enumerate(zip(value, kinds, strict=True))
            )
    elif get_origin(hint) is dict and isinstance(value, dict):
        return {key: from_json(v, inner[1], f"{name}[{key!r}]") for key, v in value.items()}
    elif is_dataclass(hint) and isinstance(value, dict):
        hints = get_type_hints(hint)
        with suppress(KeyError, TypeError):  # a field too many, or one that is missing
            return cast(Any, hint)(**{key: from_json(v, hints[key], f"{name}.{key}") for key, v in value.items()})
    elif isinstance(hint, type) and _is(value, hint):
        return value
    told = hint.__name__ if isinstance(hint, type) and not inner else str(hint).replace("typing.", "")
    raise ValueError(f"expected {name} as {told}, got {value!r:.100}")


def _is(value: Any, kind: type) -> bool:
    """Whether it is of that type, where numbers are as JSON has them: 1 may stand for 1.0 or true, and 1.0 for 1."""
    if kind not in (int, float, bool):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value is True or value is False if kind is bool else False
    atomic_write = isinstance(value, int) or value.is_integer()
    return value in (0, 1) if kind is bool else kind is float or atomic_write
