"""A table on disk, as parts of consecutive rows of one file, each read batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one file.

    path     of the file
    first    which of its rows is the first one here
    rows     how many, None where only reading them would tell
    batches  rows at most -> Arrow record batches, in the order of the file; a CSV's are texts
    """

    path: Path
    first: int
    rows: int | None
    batches: Callable[[int], Iterator[Any]]


@dataclass(frozen=True)
class Source:
    """A table on disk.

    names    of the columns; f0, f1, .. where the file gives none
    named    whether it does
    rows     how many, None where only reading to the end would tell
    parts    rows at most -> the table in parts, in its order; for None, a part is a file. Row groups of Parquet are
             never cut: one with more rows is a part of its own. A CSV and an .npz are read from the start, so one of
             their parts must be read before the next one is asked for, which reads over what was left
    """

    path: Path
    names: list[str]
    named: bool
    rows: int | None
    parts: Callable[[int | None], Iterator[Part]]

    def batches(self, size: int) -> Iterator[Any]:
        """All rows in Arrow record batches of at most so many."""
        return (batch for _, _, batch in located(self.parts(None), size))


def located(parts: Iterable[Part], size: int) -> Iterator[tuple[Path, int, Any]]:
    """Each batch of these parts, with its file and which row of it is the batch's first."""
    for part in parts:
        first = part.first
        for batch in part.batches(size):
            yield part.path, first, batch
            first += batch.num_rows


def in_turn(path: Path, rows: int | None, read: Callable[[], Iterator[Any]]) -> Callable[[int | None], Iterator[Part]]:
    """`Source.parts` of a file that must be read from its start; `read` opens it and gives all of its batches."""

    def parts(size: int | None) -> Iterator[Part]:
        stream = _Stream(read())
        while stream.more():
            first = stream.row
            end = None if size is None else first + size
            known = None if rows is None else rows - first if size is None else min(size, rows - first)
            yield Part(path, first, known, partial(stream.until, end))
            for _ in stream.until(end, 1 << 30):
                pass

    return parts


class _Stream:
    """Batches that are read once, in pieces of any number of rows."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.row = 0  # the next one
        self._batches = batches
        self._batch: Any = None  # what is left of the latest

    def more(self) -> bool:
        """Whether there is another row."""
        while self._batch is None or not self._batch.num_rows:
            self._batch = next(self._batches, None)
            if self._batch is None:
                return False
        return True

    def until(self, end: int | None, most: int) -> Iterator[Any]:
        """The rows before row `end`, in batches of at most so many."""
        while (end is None or self.row < end) and self.more():
            size = min(most, self._batch.num_rows, most if end is None else end - self.row)
            batch, self._batch = self._batch.slice(0, size), self._batch.slice(size)
            self.row += size
            yield batch
