"""Tables of any size: opened without reading their rows, read batch by batch or as one array."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from counterflow.checks import require
from counterflow.io.data.arrays import open_npy, open_npz
from counterflow.io.data.arrow import decoded_bytes
from counterflow.io.data.cells import Array, check_cells, to_numbers, to_numbers_or_texts
from counterflow.io.data.conversion import narrow
from counterflow.io.data.csv import open_csv
from counterflow.io.data.database import open_duckdb, open_sqlite
from counterflow.io.data.excel import open_excel
from counterflow.io.data.faults import Faults, TableFaultsError, missing_cells
from counterflow.io.data.feather import open_feather
from counterflow.io.data.parquet import open_parquet, parquet_files
from counterflow.io.data.source import TableSource, located_batches
from counterflow.io.limits import check_memory
from counterflow.io.table_formats import TABLE, TableOptions, format_of, suffix_of

ROWS = 1 << 16  # of a batch, where all rows are read
BYTES_PER_TEXT = 1 << 6  # of a Python text, without its characters
TODO = "if it really has that many rows, split the table"


OPTIONS = {  # option -> the formats that it belongs to, and their name
    "key": (("npz",), "an .npz file"),
    **dict.fromkeys(("sep", "decimal", "encoding", "na"), (("csv",), "a CSV file")),
    "sheet": (("excel",), "an .xlsx file"),
    "query": (("sqlite", "duckdb"), "an SQLite or DuckDB file"),
}
DUCKDB_MAGIC = b"DUCK"  # at byte 8


class ReadTable(NamedTuple):
    """Rows of a table: its columns of numbers as an Arrow table in float64, the others, and the recorded types."""

    columns: Any
    others: dict[str, Array]
    types: dict[str, str]


def open_table(path: Path, options: TableOptions = TableOptions()) -> TableSource:
    """Open a table without reading its rows: CSV, Parquet, Feather, Excel, SQLite, DuckDB, .npy or .npz.

    A folder is one table: the .parquet files in it and in its subfolders, ordered by path, all with the same columns.
    Names that begin with . or _ are left out.

    Args:
        path: the file or folder.
        options: array of an .npz file, dialect of a CSV file, sheet of an .xlsx file, query of a database.

    Raises:
        FileNotFoundError: the path does not exist.
        ImportError: the package that reads the format is not installed.
        ValueError: another format, a file that does not decode, an array that is not (N, D), files whose columns
            differ, names that appear twice, or an option of another format.
    """
    source = _open(path, options)
    if not source.names:
        raise ValueError(f"expected at least one column in {path}, got none; write the table again")
    twice = sorted(name for name, count in Counter(source.names).items() if count > 1)
    if twice:
        raise ValueError(f"expected distinct names of columns in {path}, got {str(twice)[:200]} more than once")
    return source


def _open(path: Path, options: TableOptions) -> TableSource:
    kind = "parquet" if path.is_dir() else format_of(suffix_of(path))
    if kind is None:
        raise ValueError(f"expected {TABLE}, got {path}; convert it to one of these")
    if not path.exists():
        raise FileNotFoundError(f"expected {TABLE}; got {str(path)!r}, which does not exist")
    if kind == "database":
        with path.open("rb") as file:
            kind = "duckdb" if file.read(12)[8:] == DUCKDB_MAGIC else "sqlite"
    for field in fields(options):
        value = getattr(options, field.name)
        formats, name = OPTIONS[field.name]
        if value not in (None, ()) and kind not in formats:
            raise ValueError(
                f"expected a {field.name} only with {name}, got {value!r} with {path}; leave the {field.name} out"
            )
    match kind:
        case "csv":
            return open_csv(path, options)
        case "npz":
            return open_npz(path, options.key)
        case "excel":
            return open_excel(path, options.sheet)
        case "sqlite":
            return open_sqlite(path, options.query)
        case "duckdb":
            return open_duckdb(path, options.query)
    return {"parquet": open_parquet, "feather": open_feather, "npy": open_npy}[kind](path)


def read_table(
    source: TableSource,
    names: Sequence[str],
    others: Sequence[str],
    missing: Literal["error", "drop", "keep"] = "error",
) -> ReadTable:
    """Read all rows of some columns.

    Args:
        source: the table.
        names: columns of numbers.
        others: columns of numbers or texts.
        missing: "error" to refuse missing cells, "drop" to leave out their rows, "keep" to keep them as NaN, or as None
            in columns of texts.

    Raises:
        TableFaultsError: a missing cell that is refused, or a cell of the columns `names` that is not a finite number;
            it names every such column.
        ValueError: the rows take more memory than the file's bytes account for.
    """
    arrow = require("pyarrow", "data", "a table")
    stored = sum(file.stat().st_size for file in parquet_files(source.path))
    row_bytes = 8 * len(names) + BYTES_PER_TEXT * len(others)
    check_memory(source.path, "its rows", (source.rows or 0) * row_bytes, stored, TODO)
    held = 0
    faults = Faults()
    blocks: list[Array] = [np.empty((0, len(names)))]
    rest: list[Any] = []
    for path, first, batch in located_batches(source.parts(None), ROWS):
        blocks.append(faults.numbers(batch, names, path, first))
        rest.append(arrow.Table.from_batches([batch.select(list(others))]))
        held += sum(decoded_bytes(batch.column(name)) for name in others)
        check_memory(source.path, "its context", held, stored, TODO)
    x = np.concatenate(blocks)
    context = _joined(rest, others) if others and rest else {}
    incomplete = np.isnan(x[:, [name not in faults.text for name in names]]).any(1)
    for name, column in context.items():
        holes = missing_cells(column)
        faults.add_missing(name, holes)
        incomplete |= holes
    if faults.text or faults.infinite or (faults.missing and missing == "error"):
        raise TableFaultsError(source.path, faults, int(incomplete.sum()), len(x), context)
    if faults.missing and missing == "drop":
        x = x[~incomplete]
        context = {name: column[~incomplete] for name, column in context.items()}
    return ReadTable(arrow.table(dict(zip(names, x.T, strict=True))), context, faults.types)


def _joined(parts: Sequence[Any], names: Sequence[str]) -> dict[str, Array]:
    """Return columns of numbers or texts of Arrow tables by name."""
    arrow = require("pyarrow", "data", "a table")
    every = arrow.concat_tables(parts, promote_options="permissive")  # the files of a folder may differ in their types
    joined = every.combine_chunks().to_batches()[0]
    return {name: to_numbers_or_texts(joined.column(name)) for name in names}


def read_rows(path: Path) -> Array:
    """Read a table as an array (N, D), float64 where Parquet or Arrow hold float64, else see `narrow`.

    Raises:
        ValueError: a cell is missing, not a number or not finite, or the rows take more memory than the file's bytes
            account for.
    """
    source = _open(path, TableOptions())
    check_memory(path, "its rows", (source.rows or 0) * 8 * len(source.names), path.stat().st_size, TODO)
    blocks: list[Array] = [np.empty((0, len(source.names)))]
    dtype: np.dtype[Any] | None = None
    for _, first, batch in located_batches(source.parts(None), ROWS):
        block = np.empty((batch.num_rows, len(source.names)))
        kept = [k for k, name in enumerate(batch.schema.names) if name in source.names]
        for k, name in enumerate(source.names):  # by position: names may appear twice
            block[:, k] = to_numbers(batch.column(kept[k]), name, path, first)
        blocks.append(block)
        dtype = _common_dtype(batch.schema.types)
    values = np.concatenate(blocks)
    check_cells(values, source.names, path)
    return narrow(values) if dtype is None or dtype.kind != "f" else values.astype(dtype, copy=False)


def _common_dtype(types: Sequence[Any]) -> np.dtype[Any] | None:
    """Return NumPy's common type of Arrow types; None where one is not of integers, floats or truth values."""
    arrow = require("pyarrow.types", "data", "a table")
    if all(arrow.is_integer(t) or arrow.is_floating(t) or arrow.is_boolean(t) for t in types):
        return np.result_type(*(np.dtype(t.to_pandas_dtype()) for t in types))
    return None
