"""Tables larger than memory: read batch by batch, written batch by batch, whole or not at all."""

from __future__ import annotations

import csv
import io
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.io.atomic import atomic_write
from counterflow.io.data.arrays import NPZ, Array, check_unpacked, npy_header, npz_member, read_npy
from counterflow.io.data.cells import numbers, to_numbers_or_texts
from counterflow.io.data.formats import needs, reading
from counterflow.io.data.parquet import (
    PARQUET,
    Taken,
    arrow_batches,
    check_parquet,
    opened_parquet,
    row_groups,
    text_bytes,
)
from counterflow.io.data.source import Part, Source, in_turn, located
from counterflow.io.data.tables import CSV, csv_header
from counterflow.io.limits import check_taken

SUFFIXES = (".csv", ".parquet", ".npy", ".npz")
COLUMN = 1 << 10  # bytes that a name, and what Arrow knows of a column, take
CELL = 1 << 6  # bytes that Python takes for a text, besides its letters
FEWER = "write a file of fewer rows, if they are there"
BLOCK = 1 << 22  # bytes of a CSV or an .npz at a time


def open_table(path: Path, key: str | None = None) -> Source:
    """Look at a .csv, .parquet, .npy or .npz file, or a folder of Parquet files: what it holds, not yet its rows.

    A folder is one table: the .parquet files in it and in its subfolders, in the order of their paths, all with the
    same columns. Names that begin with . or _ are left out, as the libraries that write such folders mean them to be.

    Raises FileNotFoundError if there is none, and ValueError for another format, what does not decode, arrays that
    are not (N, D), files whose columns differ, and names that stand twice.
    """
    suffix = ".parquet" if path.is_dir() else path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"expected a table, {', '.join(SUFFIXES)}, got {path}; convert it to one of these")
    if key is not None and suffix != ".npz":
        raise ValueError(f"expected a key only with an .npz file, got {key!r} with {path}; leave the key out")
    if not path.exists():
        raise FileNotFoundError(f"expected a table, {', '.join(SUFFIXES)}; got {str(path)!r}, where nothing is")
    source = {".csv": _csv, ".parquet": _parquet, ".npy": _npy}.get(suffix, lambda path: _npz(path, key))(path)
    twice = sorted(name for name, count in Counter(source.names).items() if count > 1)
    if twice:
        raise ValueError(
            f"expected a name of its own for every column of {path}, got {str(twice)[:200]} more than once"
        )
    return source


def _csv(path: Path) -> Source:
    arrow, reader = (needs(module, "pyarrow", "a CSV file") for module in ("pyarrow", "pyarrow.csv"))
    names, named = csv_header(path)

    def read() -> Iterator[Any]:
        options = reader.ReadOptions(use_threads=False, block_size=BLOCK)
        options.autogenerate_column_names = not named
        convert = reader.ConvertOptions(column_types=dict.fromkeys(names, arrow.string()), strings_can_be_null=False)
        with reading(path, CSV):
            stream = reader.open_csv(path, read_options=options, convert_options=convert)
        with stream:
            yield from arrow_batches(stream, path, CSV)

    return Source(path, names, named, None, in_turn(path, None, read))


def _parquet(path: Path) -> Source:
    files = _parquet_files(path) if path.is_dir() else [path]
    names: list[str] = []
    groups: list[tuple[Taken, list[int]]] = []  # of each file, and the rows of each row group
    for k, file in enumerate(files):
        taken = check_parquet(file)
        with reading(file, PARQUET), opened_parquet(file) as found:
            came = list(found.schema_arrow.names)
            groups.append((taken, [found.metadata.row_group(g).num_rows for g in range(found.num_row_groups)]))
        names = names if k else came
        if came != names:
            raise ValueError(
                f"expected the columns of {files[0]} in every file of {path}, {', '.join(names)}, in that order, got "
                f"{', '.join(came)} in {file}; take that file out, or write it again"
            )

    def parts(most: int | None) -> Iterator[Part]:
        for file, (taken, sizes) in zip(files, groups, strict=True):
            first = 0
            for span in _spans(sizes, most):
                rows = sum(sizes[span.start : span.stop])
                if rows:
                    yield Part(file, first, rows, partial(row_groups, file, span, taken=taken))
                first += rows

    return Source(path, names, True, sum(sum(sizes) for _, sizes in groups), parts)


def _parquet_files(folder: Path) -> list[Path]:
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() == ".parquet" and file.is_file())
    files = [file for file in found if not any(name[0] in "._" for name in file.relative_to(folder).parts)]
    if not files:
        raise ValueError(f"expected Parquet files in {folder}, got none; give such a folder, or one file")
    return files


def _spans(sizes: Sequence[int], most: int | None) -> Iterator[range]:
    """Row groups of these sizes, side by side, with at most so many rows together; a larger one is alone."""
    start, rows = 0, 0
    for k, size in enumerate(sizes):
        if most is not None and k > start and rows + size > most:
            yield range(start, k)
            start, rows = k, 0
        rows += size
    if sizes:
        yield range(start, len(sizes))


def _npy(path: Path) -> Source:
    array = read_npy(path)
    names = _array_names(array.shape, str(path), path)

    def batches(start: int, stop: int, size: int) -> Iterator[Any]:
        for first in range(start, stop, size):
            yield _as_batch(np.asarray(array[first : min(first + size, stop)]), names)

    def parts(most: int | None) -> Iterator[Part]:
        for first in range(0, len(array), most or len(array) or 1):
            stop = min(first + (most or len(array)), len(array))
            yield Part(path, first, stop - first, partial(batches, first, stop))

    return Source(path, names, False, len(array), parts)


def _npz(path: Path, key: str | None) -> Source:
    member, header = npz_member(path, key)
    shape, fortran, dtype = header.shape, header.fortran, header.dtype
    names = _array_names(shape, f"{member.removesuffix('.npy')!r} of {path}", path)

    def read() -> Iterator[Any]:
        kind, width = NPZ, dtype.itemsize * shape[1]
        size = max(1, BLOCK // width)
        check_unpacked(path, header, header.size if fortran else min(size, shape[0]) * width)
        with ExitStack() as stack:
            with reading(path, kind):
                archive = stack.enter_context(zipfile.ZipFile(path))
                stream = stack.enter_context(archive.open(member))
                if fortran:  # whose rows are spread over the whole file
                    atomic_write = np.lib.format.read_array(stream, allow_pickle=False)
                else:
                    npy_header(stream, archive.getinfo(member).file_size, path)
            for first in range(0, shape[0], size):
                rows = min(size, shape[0] - first)
                if fortran:
                    part = atomic_write[first : first + rows]
                else:
                    with reading(path, kind):
                        part = np.frombuffer(stream.read(rows * width), dtype).reshape(rows, shape[1])
                yield _as_batch(part, names)

    return Source(path, names, False, shape[0], in_turn(path, shape[0], read))


def _array_names(shape: tuple[int, ...], what: str, path: Path) -> list[str]:
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"expected rows (N, D) in {what}, got shape {shape}; reshape it")
    check_taken(path, f"{shape[1]:,} columns", COLUMN * shape[1], path.stat().st_size, "take fewer, if they are there")
    return [f"f{column}" for column in range(shape[1])]


def _as_batch(array: Array, names: Sequence[str]) -> Any:
    arrow = needs("pyarrow", "pyarrow", "a table")
    # Arrow knows the machine's own order of bytes alone, and no longer numbers
    dtype = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.float64
    columns = [arrow.array(np.ascontiguousarray(column, dtype)) for column in array.T]
    return arrow.record_batch(columns, names=list(names))


def read_table(source: Source, names: Sequence[str], others: Sequence[str]) -> tuple[Any, dict[str, Array]]:
    """All rows: an Arrow table of these columns as float64, and others as numbers or texts.

    Raises ValueError where a cell of the first is missing, is no number or is not finite, and where they take more
    memory than the file's bytes account for.
    """
    arrow = needs("pyarrow", "pyarrow", "a table")
    files = _parquet_files(source.path) if source.path.is_dir() else [source.path]
    stored, held = sum(file.stat().st_size for file in files), 0
    parts: list[Array] = [np.empty((0, len(names)))]
    rest: list[Any] = []
    check_taken(source.path, "its rows", (source.rows or 0) * (8 * len(names) + CELL * len(others)), stored, FEWER)
    for path, first, batch in located(source.parts(None), 1 << 16):
        parts.append(numbers(batch, names, path, first))
        rest.append(arrow.Table.from_batches([batch.select(list(others))]))
        held += sum(text_bytes(batch.column(name)) for name in others)
        check_taken(source.path, "its context", held, stored, FEWER)
    table = arrow.table(dict(zip(names, np.concatenate(parts).T, strict=True)))
    if not (others and rest):
        return table, {}
    every = arrow.concat_tables(rest, promote_options="permissive")  # the files of a folder may differ in their types
    joined = every.combine_chunks().to_batches()[0]
    return table, {name: to_numbers_or_texts(joined.column(name)) for name in others}


# -- writing -----------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path, rows: int | None = None) -> Iterator[Callable[[Any], None]]:
    """A function that appends record batches of one schema to a .csv, .parquet, .npy or .npz file.

    The file appears under its name when all is written, and never in part. An array needs to know its rows.
    """
    with atomic_write(path) as part, appending(part, path.suffix.lower(), rows) as write:
        yield write


@contextmanager
def appending(path: Path, suffix: str, rows: int | None = None) -> Iterator[Callable[[Any], None]]:
    """The same without regard to the name, for a file that somebody else keeps whole."""
    with ExitStack() as stack:
        yield _writer(path, suffix, rows, stack)


def check_writable(path: Path) -> None:
    """Raise ValueError unless the name ends in a format that `writing` knows."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"expected --out to end in one of {', '.join(SUFFIXES)}, got {path}; a name without a suffix is a folder "
            "of parts"
        )


def _writer(part: Path, suffix: str, rows: int | None, stack: ExitStack) -> Callable[[Any], None]:
    if suffix == ".parquet":
        return _parquet_writer(part, stack)
    if suffix == ".npz":
        archive = stack.enter_context(zipfile.ZipFile(part, "w"))
        return _array_writer(stack.enter_context(archive.open("rows.npy", "w", force_zip64=True)), rows)
    stream = stack.enter_context(part.open("wb"))
    return _array_writer(stream, rows) if suffix == ".npy" else _csv_writer(stream)


def _parquet_writer(part: Path, stack: ExitStack) -> Callable[[Any], None]:
    arrow, parquet = (needs(module, "pyarrow", "a Parquet file") for module in ("pyarrow", "pyarrow.parquet"))
    opened: list[Any] = []

    def write(batch: Any) -> None:
        if not opened:
            # a dictionary of numbers that are all different costs as much as all else
            repeated = [field.name for field in batch.schema if not arrow.types.is_floating(field.type)]
            opened.append(stack.enter_context(parquet.ParquetWriter(part, batch.schema, use_dictionary=repeated)))
        if not batch.schema.equals(opened[0].schema):
            came = [field for field in batch.schema if field not in opened[0].schema]
            raise ValueError(
                f"expected columns of one type each to write one Parquet file, got {', '.join(map(str, came))} after "
                "another type; give --out as a folder, whose parts may differ"
            )
        opened[0].write_batch(batch)

    return write


def _csv_writer(stream: Any) -> Callable[[Any], None]:
    arrow, writer = (needs(module, "pyarrow", "a CSV file") for module in ("pyarrow", "pyarrow.csv"))
    begun: list[bool] = []

    def write(batch: Any) -> None:
        if not begun:
            header = io.StringIO()
            csv.writer(header, lineterminator="\n").writerow(batch.schema.names)
            stream.write(header.getvalue().encode())
            begun.append(True)
        try:  # quotes round every text, where there is one that needs them
            text = _csv_text(arrow, writer, batch, "none")
        except arrow.ArrowInvalid:
            text = _csv_text(arrow, writer, batch, "needed")
        stream.write(text)

    return write


def _csv_text(arrow: Any, writer: Any, batch: Any, quoting: str) -> Any:
    sink = arrow.BufferOutputStream()
    writer.write_csv(batch, sink, writer.WriteOptions(include_header=False, quoting_style=quoting))
    return sink.getvalue()


def _array_writer(stream: Any, rows: int | None) -> Callable[[Any], None]:
    begun: list[bool] = []

    def write(batch: Any) -> None:
        if not begun:
            shape = (rows, batch.num_columns)
            np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": shape})
            begun.append(True)
        columns = [column.to_numpy(zero_copy_only=False).astype("<f8") for column in batch.columns]
        stream.write(np.stack(columns, 1).tobytes())

    return write
