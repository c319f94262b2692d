"""Helpers for Arrow's batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from counterflow.checks import require
from counterflow.io.limits import decoding


def located_errors(batches: Iterator[Any], path: Path, kind: str) -> Iterator[Any]:
    """Yield the batches of one of Arrow's readers; its errors name the file and the format `kind`."""
    while True:
        with decoding(path, kind):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def decoded_bytes(column: Any) -> int:
    """Return the bytes of an Arrow column once its dictionaries are decoded."""
    types = require("pyarrow.types", "data", "a table")
    if types.is_struct(column.type):
        return sum(map(decoded_bytes, column.flatten()))
    return int((column.dictionary_decode() if types.is_dictionary(column.type) else column).nbytes)
