"""Writers of tables, batch by batch, to files that appear complete or not at all."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from counterflow.checks import require
from counterflow.io.atomic import atomic_write
from counterflow.io.limits.feather import KIND as FEATHER
from counterflow.io.limits.parquet import KIND as PARQUET
from counterflow.io.table_formats import format_of, suffix_of

WRITTEN = ("csv", "parquet", "feather", "npy", "npz")  # formats

Write = Callable[[Any], None]  # appends an Arrow record batch


@contextmanager
def table_writer(path: Path, rows: int | None = None) -> Iterator[Write]:
    """Yield a function that appends Arrow record batches to a table, which appears under its name when it is complete.

    Args:
        path: a file with a suffix of `WRITTEN`; .csv may be compressed, as in .csv.gz.
        rows: the number of rows that will be written; required for .npy and .npz, whose header says it.
    """
    with atomic_write(path) as temporary, append_batches(temporary, suffix_of(path), rows) as write:
        yield write


@contextmanager
def append_batches(path: Path, suffix: str, rows: int | None = None) -> Iterator[Write]:
    """Yield a function that appends Arrow record batches to a file whose format is given, not part of its name.

    Args:
        path: the file, often a temporary one.
        suffix: the format, such as ".csv" or ".csv.gz".
        rows: see `table_writer`.
    """
    with ExitStack() as stack:
        yield _writer(path, suffix, rows, stack)


def check_writable(path: Path) -> None:
    """Raise ValueError unless the name of a file ends in a format that `table_writer` knows."""
    if format_of(suffix_of(path)) not in WRITTEN:
        raise ValueError(
            "expected --out to end in one of .csv, .tsv, .csv.gz, .csv.zst, .parquet, .feather, .npy, .npz, got "
            f"{path}; a name without a suffix is a folder of parts"
        )


def _writer(path: Path, suffix: str, rows: int | None, stack: ExitStack) -> Write:
    """Open a file of some format; `stack` closes it."""
    kind = format_of(suffix)
    if kind == "parquet":
        return _SchemaWriter(partial(_parquet, path), PARQUET, stack).write
    if kind == "feather":
        return _SchemaWriter(partial(_feather, path), FEATHER, stack).write
    if kind == "csv":
        arrow = require("pyarrow", "data", "a CSV file")
        packing = {"gz": "gzip", "zst": "zstd"}.get(suffix.rpartition(".")[2])
        stream = stack.enter_context(arrow.output_stream(str(path), compression=packing))
        return _CsvWriter(stream, "\t" if suffix.startswith(".tsv") else ",").write
    if suffix == ".npz":
        archive = stack.enter_context(zipfile.ZipFile(path, "w"))
        return _ArrayWriter(stack.enter_context(archive.open("rows.npy", "w", force_zip64=True)), rows).write
    return _ArrayWriter(stack.enter_context(path.open("wb")), rows).write


def _parquet(path: Path, schema: Any) -> Any:
    arrow, parquet = (require(name, "data", PARQUET) for name in ("pyarrow", "pyarrow.parquet"))
    # a dictionary of floats, which hardly repeat, takes as long to make as everything else
    repeated = [field.name for field in schema if not arrow.types.is_floating(field.type)]
    return parquet.ParquetWriter(path, schema, use_dictionary=repeated)


def _feather(path: Path, schema: Any) -> Any:
    ipc = require("pyarrow.ipc", "data", FEATHER)
    return ipc.new_file(str(path), schema, options=ipc.IpcWriteOptions(compression="zstd"))


class _SchemaWriter:
    """Writer of a file of Arrow batches, whose schema is that of the first batch."""

    def __init__(self, open_file: Callable[[Any], Any], kind: str, stack: ExitStack) -> None:
        self._open_file = open_file
        self._kind = kind
        self._stack = stack
        self._opened: Any = None
        self._schema: Any = None

    def write(self, batch: Any) -> None:
        if self._opened is None:
            self._schema = batch.schema
            self._opened = self._stack.enter_context(self._open_file(batch.schema))
        if not batch.schema.equals(self._schema):
            others = [field for field in batch.schema if field not in self._schema]
            raise ValueError(
                f"expected columns of one type each to write {self._kind}, got {', '.join(map(str, others))} after "
                "another type; give --out as a folder, whose parts may differ"
            )
        self._opened.write_batch(batch)


class _CsvWriter:
    """Writer of a CSV file with a line of names."""

    def __init__(self, stream: IO[bytes], delimiter: str) -> None:
        self._delimiter = delimiter
        self._arrow, self._csv = (require(name, "data", "a CSV file") for name in ("pyarrow", "pyarrow.csv"))
        self._stream = stream
        self._started = False

    def write(self, batch: Any) -> None:
        if not self._started:
            header = io.StringIO()
            csv.writer(header, delimiter=self._delimiter, lineterminator="\n").writerow(batch.schema.names)
            self._stream.write(header.getvalue().encode())
            self._started = True
        try:  # with "needed", Arrow quotes every text of a batch in which one needs it
            text = self._text(batch, "none")
        except self._arrow.ArrowInvalid:
            text = self._text(batch, "needed")
        self._stream.write(text)

    def _text(self, batch: Any, quoting: str) -> Any:
        sink = self._arrow.BufferOutputStream()
        options = self._csv.WriteOptions(include_header=False, quoting_style=quoting, delimiter=self._delimiter)
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
