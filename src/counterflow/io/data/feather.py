"""Feather files, which are Arrow IPC files, read batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from counterflow.checks import require
from counterflow.io.data.arrow import decoded_bytes, without_index
from counterflow.io.data.source import TablePart, TableSource
from counterflow.io.limits import check_memory, decoding
from counterflow.io.limits.feather import KIND as FEATHER
from counterflow.io.limits.feather import check_feather


def open_feather(path: Path) -> TableSource:
    """Open a .feather, .arrow or .ipc file: the Arrow IPC file format, which Feather calls version 2."""
    check_feather(path)
    with decoding(path, FEATHER), _open(path) as opened:
        names, notes = without_index(opened.schema, path)
        sizes = [opened.get_batch(k).num_rows for k in range(opened.num_record_batches)]

    def parts(size: int | None) -> Iterator[TablePart]:
        total = sum(sizes)
        for first in range(0, total, size or total or 1):
            stop = min(first + (size or total), total)
            yield TablePart(path, first, stop - first, partial(_batches, path, sizes, first, stop))

    return TableSource(path, names, True, sum(sizes), parts, notes)


def _batches(path: Path, sizes: list[int], start: int, stop: int, size: int) -> Iterator[Any]:
    """Yield the rows start to stop in batches of at most `size` rows."""
    stored = path.stat().st_size
    with decoding(path, FEATHER):
        opened = _open(path)
    with opened:
        first = 0
        for k, rows in enumerate(sizes):
            if first < stop and first + rows > start:
                with decoding(path, FEATHER):
                    batch = opened.get_batch(k)
                    batch.validate(full=True)
                held = sum(map(decoded_bytes, batch.columns))
                check_memory(path, f"{rows:,} rows", held, stored, "write the file without the column of long texts")
                begin, end = max(start - first, 0), min(stop - first, rows)
                for row in range(begin, end, size):
                    yield batch.slice(row, min(size, end - row))
            first += rows


def _open(path: Path) -> Any:
    ipc = require("pyarrow.ipc", "data", FEATHER)
    return ipc.open_file(require("pyarrow", "data", FEATHER).memory_map(str(path)))
