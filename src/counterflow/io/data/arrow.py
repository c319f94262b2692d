"""Helpers for Arrow's batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
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


def without_index(schema: Any, path: Path) -> tuple[list[str], tuple[str, ...]]:
    """Return the names of the columns without the index of a pandas frame, and a note if there is one.

    pandas stores the index of a frame as columns, unless it counts the rows, and lists them in the schema's metadata.
    """
    stored = (schema.metadata or {}).get(b"pandas")
    listed: Any = []
    if stored is not None:
        with suppress(ValueError, AttributeError):  # metadata that pandas did not write
            listed = json.loads(stored).get("index_columns")
    index = [name for name in schema.names if isinstance(listed, list) and name in listed]
    if not index or len(index) == len(schema.names):
        return list(schema.names), ()
    note = f"{path}: left out the index of the pandas frame, {', '.join(index)}; reset_index() makes it a column"
    return [name for name in schema.names if name not in index], (note,)
