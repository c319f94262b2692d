"""Writers of tables, batch by batch, to files that appear complete or not at all."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from counterflow.checks import require
from counterflow.io.atomic import atomic_write
from counterflow.io.data.tables import SUFFIXES
from counterflow.io.limits.parquet import KIND as PARQUET

Write = Callable[[Any], None]  # appends an Arrow record batch


@contextmanager
def table_writer(path: Path, rows: int | None = None) -> Iterator[Write]:
    """Yield a function that appends Arrow record batches to a table, which appears under its name when it is complete.

    Args:
        path: a .csv, .parquet, .npy or .npz file.
        rows: the number of rows that will be written; required for .npy and .npz, whose header says it.
    """
    with atomic_write(path) as temporary, append_batches(temporary, path.suffix.lower(), rows) as write:
        yield write


@contextmanager
def append_batches(path: Path, suffix: str, rows: int | None = None) -> Iterator[Write]:
    """Yield a function that appends Arrow record batches to a file whose format is given, not part of its name.

    Args:
        path: the file, often a temporary one.
        suffix: the format, ".csv", ".parquet", ".npy" or ".npz".
        rows: see `table_writer`.
    """
    with ExitStack() as stack:
        yield _writer(path, suffix, rows, stack)


def check_writable(path: Path) -> None:
    """Raise ValueError unless the name of a file ends in a format that `table_writer` knows."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"expected --out to end in one of {', '.join(SUFFIXES)}, got {path}; a name without a suffix is a folder "
            "of parts"
        )


def _writer(path: Path, suffix: str, rows: int | None, stack: ExitStack) -> Write:
    """Open a file of some format; `stack` closes it."""
    if suffix == ".parquet":
        return _ParquetWriter(path, stack).write
    if suffix == ".npz":
        archive = stack.enter_context(zipfile.ZipFile(path, "w"))
        return _ArrayWriter(stack.enter_context(archive.open("rows.npy", "w", force_zip64=True)), rows).write
    stream = stack.enter_context(path.open("wb"))
    return _ArrayWriter(stream, rows).write if suffix == ".npy" else _CsvWriter(stream).write


class _ParquetWriter:
    """Writer of a Parquet file, whose schema is that of the first batch."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._arrow, self._parquet = (require(name, "data", PARQUET) for name in ("pyarrow", "pyarrow.parquet"))
        self._path = path
        self._stack = stack
        self._opened: Any = None

    def write(self, batch: Any) -> None:
        if self._opened is None:
            # a dictionary of floats, which hardly repeat, takes as long to make as everything else
            repeated = [field.name for field in batch.schema if not self._arrow.types.is_floating(field.type)]
            writer = self._parquet.ParquetWriter(self._path, batch.schema, use_dictionary=repeated)
            self._opened = self._stack.enter_context(writer)
        if not batch.schema.equals(self._opened.schema):
            others = [field for field in batch.schema if field not in self._opened.schema]
            raise ValueError(
                f"expected columns of one type each to write one Parquet file, got {', '.join(map(str, others))} after "
                "another type; give --out as a folder, whose parts may differ"
            )
        self._opened.write_batch(batch)


class _CsvWriter:
    """Writer of a CSV file with a line of names."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._arrow, self._csv = (require(name, "data", "a CSV file") for name in ("pyarrow", "pyarrow.csv"))
        self._stream = stream
        self._started = False

    def write(self, batch: Any) -> None:
        if not self._started:
            header = io.StringIO()
            csv.writer(header, lineterminator="\n").writerow(batch.schema.names)
            self._stream.write(header.getvalue().encode())
            self._started = True
        try:  # with "needed", Arrow quotes every text of a batch in which one needs it
            text = self._text(batch, "none")
        except self._arrow.ArrowInvalid:
            text = self._text(batch, "needed")
        self._stream.write(text)

    def _text(self, batch: Any, quoting: str) -> Any:
        sink = self._arrow.BufferOutputStream()
        options = self._csv.WriteOptions(include_header=False, quoting_style=quoting)
        self._csv.write_csv(batch, sink, options)
        return sink.getvalue()


class _ArrayWriter:
    """Writer of an .npy file of float64."""

    def __init__(self, stream: IO[bytes], rows: int | None) -> None:
        self._stream = stream
        self._rows = rows
        self._started = False

    def write(self, batch: Any) -> None:
        if not self._started:
            header = {"descr": "<f8", "fortran_order": False, "shape": (self._rows, batch.num_columns)}
            np.lib.format.write_array_header_1_0(self._stream, header)
            self._started = True
        columns = [column.to_numpy(zero_copy_only=False).astype("<f8") for column in batch.columns]
        self._stream.write(np.stack(columns, 1).tobytes())
