"""CSV files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from counterflow.checks import require
from counterflow.io.data.arrow import located_errors
from counterflow.io.data.cells import is_number
from counterflow.io.data.formats import CSV
from counterflow.io.data.source import TableSource, sequential_parts
from counterflow.io.limits import check_memory, decoding

BLOCK = 1 << 22  # bytes read at a time
BYTES_PER_COLUMN = 1 << 14  # that Arrow's reader takes, whatever is in the column
INSPECTED = 1 << 20  # bytes in which Arrow looks for the first line
BOM = b"\xef\xbb\xbf"


def open_csv(path: Path) -> TableSource:
    """Open a .csv file; its cells are read as texts."""
    arrow, csv = (require(module, "data", "a CSV file") for module in ("pyarrow", "pyarrow.csv"))
    names, named = _header(path)

    def read() -> Iterator[Any]:
        options = csv.ReadOptions(use_threads=False, block_size=BLOCK)  # with threads, errors do not know their line
        options.autogenerate_column_names = not named
        convert = csv.ConvertOptions(column_types=dict.fromkeys(names, arrow.string()), strings_can_be_null=False)
        with decoding(path, CSV):
            stream = csv.open_csv(path, read_options=options, convert_options=convert)
        with stream:
            yield from located_errors(stream, path, CSV)

    return TableSource(path, names, named, None, sequential_parts(path, None, read))


def _header(path: Path) -> tuple[list[str], bool]:
    """Return the names of the columns, f0, f1, .. where the file has none, and whether it has names."""
    csv = require("pyarrow.csv", "data", "a CSV file")
    columns = _max_columns(path)  # Arrow ends the process where columns take all memory
    todo = "if these are really columns, save the table as .npy"
    check_memory(path, f"up to {columns:,} columns", BYTES_PER_COLUMN * columns, path.stat().st_size, todo)
    with decoding(path, CSV), csv.open_csv(path, read_options=csv.ReadOptions(use_threads=False)) as stream:
        names = stream.schema.names
    if "" in names:
        raise ValueError(
            f"expected a name for every column of {path}, or no names at all, got {','.join(names)!r:.200} in the "
            "first line; name or remove the column without (pandas: to_csv(index=False))"
        )
    # numbers in the first line are data, except 0, 1, 2, .., the names that pandas gives to columns without names
    if all(map(is_number, names)) and names != [str(column) for column in range(len(names))]:
        return [f"f{column}" for column in range(len(names))], False
    return names, True


def _max_columns(path: Path) -> int:
    """Return an upper limit on the number of columns: the commas in the first line, also those within quotes."""
    with path.open("rb") as file:
        block = file.read(INSPECTED).removeprefix(BOM).lstrip(b"\r\n")
    line = re.split(rb"[\r\n]", block, maxsplit=1)[0]
    return (block if line.count(b'"') % 2 else line).count(b",") + 1  # a quoted cell may contain the end of a line
