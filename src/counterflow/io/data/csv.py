"""CSV files of any dialect, compressed or not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from counterflow.checks import require
from counterflow.io.data.arrow import located_errors
from counterflow.io.data.cells import is_number
from counterflow.io.data.dialect import Dialect, detect_dialect
from counterflow.io.data.formats import CSV
from counterflow.io.data.source import TableSource, sequential_parts
from counterflow.io.limits import check_memory, decoding
from counterflow.io.table_formats import TableOptions

BLOCK = 1 << 22  # bytes read at a time
BYTES_PER_COLUMN = 1 << 14  # that Arrow's reader takes, whatever is in the column
INSPECTED = 1 << 20  # bytes in which the dialect and the first line are looked for


def open_csv(path: Path, options: TableOptions = TableOptions()) -> TableSource:
    """Open a CSV file; its cells are read as texts, numbers among them with a decimal point.

    The file may be compressed by gzip or Zstandard, as its name says. See `detect_dialect` for what is found from its
    first lines. Lines among the rows that begin with # are left out if they have another number of cells.
    """
    arrow = require("pyarrow", "data", "a CSV file")
    with decoding(path, CSV), _open(path) as stream:
        start = stream.read(INSPECTED)
    dialect = detect_dialect(start, len(start) < INSPECTED, options, path)
    names, named = _header(path, start, dialect)

    def read() -> Iterator[Any]:
        missing = arrow.array(options.na, arrow.string())
        with decoding(path, CSV):
            stream = _reader(path, dialect, names if not named or dialect.names else None, names)
        with stream:
            for batch in located_errors(stream, path, CSV):
                yield _normalized(batch, dialect, missing) if dialect.describe() or options.na else batch

    said = dialect.describe()
    notes = (f"{path}: {said}; --sep, --decimal and --encoding override it",) if said else ()
    return TableSource(path, names, named, None, sequential_parts(path, None, read), notes)


def _open(path: Path) -> Any:
    """Open a file as a stream of bytes, decompressed where its name ends in .gz or .zst."""
    arrow = require("pyarrow", "data", "a CSV file")
    return arrow.input_stream(str(path), compression="detect")


def _reader(path: Path, dialect: Dialect, given: list[str] | None, texts: list[str]) -> Any:
    """Open Arrow's reader of a CSV file.

    Args:
        path: the file.
        dialect: its dialect.
        given: names of the columns, if they do not stand in the first line.
        texts: names of columns to read as texts.
    """
    arrow, csv = (require(module, "data", "a CSV file") for module in ("pyarrow", "pyarrow.csv"))
    options = csv.ReadOptions(
        use_threads=False,  # with threads, errors do not know their line
        block_size=BLOCK,
        encoding=dialect.encoding,
        skip_rows=dialect.comments,
        column_names=given,
    )
    handler = _is_comment if dialect.later_comments else None  # it prints where a row is not UTF-8
    parse = csv.ParseOptions(delimiter=dialect.sep, invalid_row_handler=handler)
    convert = csv.ConvertOptions(column_types=dict.fromkeys(texts, arrow.string()), strings_can_be_null=False)
    return csv.open_csv(_open(path), read_options=options, parse_options=parse, convert_options=convert)


def _is_comment(row: Any) -> str:
    return "skip" if row.text.lstrip().startswith("#") else "error"


def _normalized(batch: Any, dialect: Dialect, missing: Any) -> Any:
    arrow, compute = (require(module, "data", "a CSV file") for module in ("pyarrow", "pyarrow.compute"))
    columns = []
    for column in map(dialect.normalized, batch.columns):
        is_missing = compute.is_in(compute.utf8_trim_whitespace(column), value_set=missing)
        columns.append(compute.if_else(is_missing, arrow.scalar(None, arrow.string()), column))
    return arrow.record_batch(columns, names=batch.schema.names)


def _header(path: Path, start: bytes, dialect: Dialect) -> tuple[list[str], bool]:
    """Return the names of the columns, f0, f1, .. where the file has none, and whether it has names."""
    if dialect.names is not None:
        return list(dialect.names), True
    columns = _max_columns(start, dialect)  # Arrow ends the process where columns take all memory
    todo = "if these are really columns, save the table as .npy"
    check_memory(path, f"up to {columns:,} columns", BYTES_PER_COLUMN * columns, path.stat().st_size, todo)
    with decoding(path, CSV), _reader(path, dialect, None, []) as stream:
        names = stream.schema.names
    if "" in names:
        raise ValueError(
            f"expected a name for every column of {path}, or no names at all, got {dialect.sep.join(names)!r:.200} in "
            "the first line; name or remove the column without (pandas: to_csv(index=False))"
        )
    # numbers in the first line are data, except 0, 1, 2, .., the names that pandas gives to columns without names
    if _are_numbers(names, dialect) and names != [str(column) for column in range(len(names))]:
        return [f"f{column}" for column in range(len(names))], False
    return names, True


def _are_numbers(names: list[str], dialect: Dialect) -> bool:
    arrow = require("pyarrow", "data", "a CSV file")
    return all(map(is_number, dialect.normalized(arrow.array(names, arrow.string())).to_pylist()))


def _max_columns(start: bytes, dialect: Dialect) -> int:
    """Return an upper limit on the number of columns: the separators in the first line, also those within quotes."""
    lines = [line for line in re.split(rb"[\r\n]+", start) if line][dialect.comments :] or [b""]
    sep = dialect.sep.encode()
    quoted = lines[0].count(b'"') % 2  # a quoted cell may contain the end of a line
    return (start if quoted else lines[0]).count(sep) + 1
