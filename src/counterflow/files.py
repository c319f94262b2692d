"""Files that are there as a whole or not at all, and JSON that may be anybody's."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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


def alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in ordinary memory of which none shares any, as safetensors wants them."""
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
