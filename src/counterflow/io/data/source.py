"""Tables on disk: read in parts of consecutive rows, batch by batch, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TablePart:
    """Consecutive rows of one file.

    Args:
        path: the file.
        first: the number of the part's first row in the file.
        rows: the number of rows; None where only reading them tells.
        batches: function from the maximum number of rows in a batch to Arrow record batches, in the order of the file.
            The cells of a CSV file are texts.
    """

    path: Path
    first: int
    rows: int | None
    batches: Callable[[int], Iterator[Any]]


@dataclass(frozen=True)
class TableSource:
    """Table in a file, in a folder of Parquet files, or in memory.

    Args:
        path: the file or folder.
        names: of the columns; f0, f1, .. where the file has none.
        named: the file has names.
        rows: the number of rows; None where only reading to the end tells.
        parts: function from the maximum number of rows in a part to the parts, in order; with None, each file is one
            part. Row groups of Parquet are not cut, so one with more rows is a part of its own. A CSV and an .npz file
            are read from the start: read one part before asking for the next, which skips the rows that are left.
            Batches may hold columns beyond the names, such as the index of a pandas frame, which are only copied.
        notes: one line each on what was found out about the file.
    """

    path: Path
    names: list[str]
    named: bool
    rows: int | None
    parts: Callable[[int | None], Iterator[TablePart]]
    notes: tuple[str, ...] = ()

    def batches(self, size: int) -> Iterator[Any]:
        """Yield all rows in Arrow record batches of at most `size` rows."""
        return (batch for _, _, batch in located_batches(self.parts(None), size))


def located_batches(parts: Iterable[TablePart], size: int) -> Iterator[tuple[Path, int, Any]]:
    """Yield (file, number of the batch's first row in the file, batch) for batches of at most `size` rows."""
    for part in parts:
        first = part.first
        for batch in part.batches(size):
            yield part.path, first, batch
            first += batch.num_rows


def sequential_parts(
    path: Path, rows: int | None, read: Callable[[], Iterator[Any]]
) -> Callable[[int | None], Iterator[TablePart]]:
    """Return `TableSource.parts` for a file that can only be read from its start.

    Args:
        path: the file.
        rows: the number of rows, if known.
        read: opens the file and yields all of its batches, of any size.
    """

    def parts(size: int | None) -> Iterator[TablePart]:
        stream = _RowStream(read())
        while stream.has_rows():
            first = stream.row
            end = None if size is None else first + size
            yield TablePart(path, first, _known_rows(rows, first, size), partial(stream.read_until, end))
            for _ in stream.read_until(end, 1 << 30):
                pass

    return parts


def _known_rows(total: int | None, first: int, size: int | None) -> int | None:
    if total is None:
        return None
    return total - first if size is None else min(size, total - first)


class _RowStream:
    """Batches that are read once, and cut at any row."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.row = 0  # the number of the next row
        self._batches = batches
        self._batch: Any = None  # the rest of the latest batch

    def has_rows(self) -> bool:
        """Return True if there is another row."""
        while self._batch is None or not self._batch.num_rows:
            self._batch = next(self._batches, None)
            if self._batch is None:
                return False
        return True

    def read_until(self, end: int | None, size: int) -> Iterator[Any]:
        """Yield the rows before row `end`, or all, in batches of at most `size` rows."""
        while (end is None or self.row < end) and self.has_rows():
            rows = min(size, self._batch.num_rows)
            if end is not None:
                rows = min(rows, end - self.row)
            batch = self._batch.slice(0, rows)
            self._batch = self._batch.slice(rows)
            self.row += rows
            yield batch
