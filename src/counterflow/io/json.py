"""JSON files, and values of JSON checked against type hints."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from counterflow.io.atomic import write_bytes

MAX_QUOTED = 1000  # characters of another error that an error quotes; that error may quote as much as a file holds


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file atomically; values that JSON does not know become texts."""
    write_bytes(path, (json.dumps(value, indent=2, default=str) + "\n").encode())


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read the JSON object in a file.

    Args:
        path: the file.
        what: the expected content, for errors.

    Raises:
        ValueError: the file does not hold a JSON object.

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
        cause = "its lists are nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"expected {path} to be {what}, but it does not read as JSON: {cause}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected {path} to be {what}, a JSON object, got {type(value).__name__}")
    return value


def from_json(value: Any, hint: Any, name: str) -> Any:
    """Convert a value of JSON to the type of a hint: lists to tuples, texts to paths, objects to dataclasses.

    Args:
        value: a value that `json.loads` returned.
        hint: a type hint of JSON's own types, Path, Literal, tuple, dict, dataclasses and unions of these.
        name: of the value, for errors.

    Raises:
        ValueError: the value has another type, or an object lacks a field or has unknown ones.

    Example:
        >>> from_json([1, 2], tuple[int, ...], "sizes")
        (1, 2)
        >>> from_json("two", int | None, "layers")
        Traceback (most recent call last):
        ValueError: expected layers to be int | None, got 'two'
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
        with suppress(KeyError, TypeError):  # unknown or missing fields
            return cast(Any, hint)(**{key: from_json(v, hints[key], f"{name}.{key}") for key, v in value.items()})
    elif isinstance(hint, type) and _has_type(value, hint):
        return value
    wanted = hint.__name__ if isinstance(hint, type) and not inner else str(hint).replace("typing.", "")
    raise ValueError(f"expected {name} to be {wanted}, got {value!r:.100}")


def _has_type(value: Any, kind: type) -> bool:
    """Check a value's type. JSON does not separate kinds of numbers: 1 may be a float or true, and 1.0 an int."""
    if kind not in (int, float, bool):
        return isinstance(value, kind)
    if isinstance(value, bool):
        return kind is bool
    if not isinstance(value, int | float):
        return False
    if kind is bool:
        return value in (0, 1)
    return kind is float or isinstance(value, int) or value.is_integer()
