"""Files that are there as a whole or not at all, and JSON that may be anybody's."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

TOLD = 1000  # characters of an error that is told in ours; one may quote as much as there is in a file


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another path to write to, which becomes this file at the end: it is there as a whole or as it was before.

    So it is after a loss of power as well. Where the writing fails, the folders that were made for it go too.
    """
    folders = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        _to_disk(temporary, os.O_RDWR)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        for folder in folders:
            with suppress(OSError):  # somebody else has put something there
                folder.rmdir()
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _to_disk(path.parent, os.O_RDONLY)  # the new name, too


def check_room(folder: Path, size: int) -> None:
    """Raise OSError unless a disk has room for so many bytes: not every library survives it when it has not."""
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def leftovers(path: Path) -> list[Path]:
    """What processes that were killed have left of this file."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.part"))


def _to_disk(path: Path, mode: int) -> None:
    opened = os.open(path, mode)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there as a whole or as it was before, also after a loss of power."""
    with whole(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """One JSON file, indented, ending in a newline."""
    write_whole(path, (json.dumps(value, indent=2, default=str) + "\n").encode())


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


def as_hinted(value: Any, hint: Any, name: str) -> Any:
    """A value of JSON as a type hint has it: lists become tuples, texts paths, and objects the dataclass hinted.

    Raises:
        ValueError: it is of another type, or an object lacks a field or has others.

    Example:
        >>> as_hinted([1, 2], tuple[int, ...], "sizes")
        (1, 2)
        >>> as_hinted("two", int | None, "layers")
        Traceback (most recent call last):
        ValueError: expected layers as int | None, got 'two'
    """
    inner = get_args(hint)
    if hint is Any:
        return value
    if get_origin(hint) in (Union, UnionType):
        for one in inner:
            with suppress(ValueError):
                return as_hinted(value, one, name)
    elif get_origin(hint) is Literal and value in inner:
        return value
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif get_origin(hint) is tuple and isinstance(value, list):
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        if len(kinds) == len(value):
            return tuple(
                as_hinted(v, kind, f"{name}[{k}]") for k, (v, kind) in enumerate(zip(value, kinds, strict=True))
            )
    elif get_origin(hint) is dict and isinstance(value, dict):
        return {key: as_hinted(v, inner[1], f"{name}[{key!r}]") for key, v in value.items()}
    elif is_dataclass(hint) and isinstance(value, dict):
        hints = get_type_hints(hint)
        with suppress(KeyError, TypeError):  # a field too many, or one that is missing
            return cast(Any, hint)(**{key: as_hinted(v, hints[key], f"{name}.{key}") for key, v in value.items()})
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
    whole = isinstance(value, int) or value.is_integer()
    return value in (0, 1) if kind is bool else kind is float or whole


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the texts in its header.

    Raises:
        ValueError: it is none, or not all of one.
    """
    try:
        with safe_open(path, "pt", device) as file:
            # a file of safetensors can only be gone through by its keys
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"expected a safetensors file, got {path}, which does not read as one ({error})") from None


def alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in ordinary memory of which none shares any, as safetensors wants them."""
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
