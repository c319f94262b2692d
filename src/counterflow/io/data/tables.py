"""Tables of numbers, CSV and Parquet: every cell must be there and be a number."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.io.data.arrays import Array, narrow
from counterflow.io.data.cells import is_number
from counterflow.io.data.formats import needs, reading
from counterflow.io.data.parquet import PARQUET, check_parquet, opened_parquet, row_groups
from counterflow.io.limits import check_taken

CSV = "a CSV table in UTF-8 with as many cells on every line (blank lines do not count as a Row)"

ROWS = 1 << 16  # read at a time
COLUMN = 1 << 14  # bytes that the reader of CSV takes for each column, whatever is in it


def csv_header(path: Path) -> tuple[list[str], bool]:
    """The names of the columns of a .csv file, f0, f1, .. where it has none, and whether it has them."""
    csv = needs("pyarrow.csv", "pyarrow", "a CSV file")
    columns = _most_columns(path)  # counted here, as Arrow ends the process where they take all memory
    todo = "save it as .npy, if they are columns"
    check_taken(path, f"up to {columns:,} columns", COLUMN * columns, path.stat().st_size, todo)
    with reading(path, CSV), csv.open_csv(path, read_options=csv.ReadOptions(use_threads=False)) as stream:
        names = stream.schema.names
    if "" in names:
        raise ValueError(
            f"expected a name for every column of {path}, or no names at all, got {','.join(names)!r:.200} in the "
            "first line; name or remove the column without (pandas: to_csv(index=False))"
        )
    # numbers in the first line are data, save for 0, 1, 2, .., the names that pandas gives to columns without
    if all(map(is_number, names)) and names != [str(column) for column in range(len(names))]:
        return [f"f{column}" for column in range(len(names))], False
    return names, True


def _most_columns(path: Path) -> int:
    """How many columns the first line of a .csv file has at most: a comma within quotes counts as well."""
    with path.open("rb") as file:
        block = file.read(1 << 20).removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n")  # as much as Arrow looks at
    line = re.split(rb"[\r\n]", block, maxsplit=1)[0]
    return (block if line.count(b'"') % 2 else line).count(b",") + 1  # quotes may reach over the end of a line


def read_csv(path: Path) -> Array:
    """(N, D) of a .csv file, with or without a line of names."""
    arrow, csv = (needs(module, "pyarrow", "a CSV file") for module in ("pyarrow", "pyarrow.csv"))
    options = csv.ReadOptions(use_threads=False)  # with threads, errors do not know their line
    names, named = csv_header(path)
    options.autogenerate_column_names = not named

    def read(dtype: Any) -> Any:
        convert = csv.ConvertOptions(column_types=dict.fromkeys(names, dtype), strings_can_be_null=True)
        return csv.read_csv(path, read_options=options, convert_options=convert)

    with reading(path, CSV):
        try:
            table = read(arrow.float64())
        except arrow.ArrowInvalid:
            table = read(arrow.string())  # for _stack to name the cell that is no number
    return narrow(_stack(path, table))


def read_parquet(path: Path) -> Array:
    """(N, D) of a .parquet file."""
    arrow, taken, stored = needs("pyarrow", "pyarrow", PARQUET), check_parquet(path), path.stat().st_size
    check_taken(path, "its rows", taken.numbers, stored, "save it as .npy, if they are there")
    with reading(path, PARQUET), opened_parquet(path) as file:
        groups, schema = range(file.num_row_groups), file.schema_arrow
    batches: list[Any] = []
    held = 0
    for batch in row_groups(path, groups, ROWS, taken):
        batches.append(batch)
        held += batch.nbytes
        check_taken(path, "its rows", held, stored, "write it without the column of long texts")
    return _stack(path, arrow.Table.from_batches(batches, schema))


def _stack(path: Path, table: Any) -> Array:
    """(N, D) of an Arrow table, every cell of which must be there and be a number."""
    if not table.num_rows or not table.num_columns:
        return np.empty((table.num_rows, table.num_columns))
    text = next((text for text in _texts(table) if not is_number(str(text[2]))), next(_texts(table), None))
    if text is not None:
        name, row, cell = text
        raise ValueError(
            f"expected numbers in column {name!r:.100} of {path}, got {cell!r:.100} in row {row} (counted from 0); "
            "drop the column or encode it as numbers"
        )
    missing = np.stack([column.is_null().to_numpy() for column in table.columns], axis=1)  # (N, D)
    if missing.any():
        places = [f"row {row} of {table.column_names[column]!r:.100}" for row, column in np.argwhere(missing)[:3]]
        more = ", .." if missing.sum() > len(places) else ""
        raise ValueError(
            f"expected a number in every cell of {path}, got {missing.sum()} missing: {', '.join(places)}"
            f"{more} (rows counted from 0); impute, or drop {missing.any(1).sum()} of {len(missing)} rows"
        )
    return np.stack([column.to_numpy() for column in table.columns], axis=1)


def _texts(table: Any) -> Iterator[tuple[str, int, object]]:
    """(column, row, cell) of what is not missing in the columns that have no numeric type."""
    types = needs("pyarrow.types", "pyarrow", "a table")
    numeric = (types.is_integer, types.is_floating, types.is_boolean)
    for name, column in zip(table.column_names, table.columns, strict=True):
        if not any(is_type(column.type) for is_type in numeric):
            for row, cell in enumerate(column.to_pylist()):
                if cell is not None:
                    yield name, row, cell
