"""Sheets of Excel's .xlsx files: values only, neither formulas nor macros."""

from __future__ import annotations

import datetime
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

from counterflow.checks import require
from counterflow.io.data.source import TableSource, sequential_parts
from counterflow.io.limits import check_memory, decoding

KIND = "an Excel .xlsx file"
BYTES_PER_CELL = 1 << 6  # of a Python object
MAX_LISTED = 20  # sheets that an error names


def open_excel(path: Path, sheet: str | None) -> TableSource:
    """Open a sheet of an .xlsx file: the one of that name, or the only one. Its rows are held in memory.

    The first row that is not empty has the names of the columns, unless all of its cells are numbers. Formulas have the
    values that were stored with them.
    """
    arrow = require("pyarrow", "data", KIND)
    _check_size(path)
    rows = _rows(path, sheet)
    if not rows:
        raise ValueError(f"expected rows in {path}, got an empty sheet; choose another --sheet")
    width = max(map(len, rows))
    first = [*rows[0], *[None] * (width - len(rows[0]))]
    named = not all(isinstance(cell, int | float) for cell in first)
    if named and None in first:
        raise ValueError(
            f"expected a name for every column of {path} in the first row that is not empty, got none in column "
            f"{first.index(None) + 1}; name the column, or remove what is above or beside the table"
        )
    names = [str(cell) for cell in first] if named else [f"f{k}" for k in range(width)]
    cells = [[row[k] if k < len(row) else None for row in rows[named:]] for k in range(width)]
    with decoding(path, KIND):
        table = arrow.table([_column(column) for column in cells], names=names)
    return TableSource(path, names, named, len(table), sequential_parts(path, len(table), lambda: _batches(table)))


def _batches(table: Any) -> Iterator[Any]:
    yield from table.to_batches()


def _check_size(path: Path) -> None:
    """Raise ValueError if the parts of the file unpack to more memory than it accounts for."""
    with decoding(path, KIND), zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    check_memory(path, "its parts", unpacked, path.stat().st_size, "save it as .csv")


def _rows(path: Path, sheet: str | None) -> list[tuple[Any, ...]]:
    """Return the rows of a sheet from the first to the last that is not empty."""
    with path.open("rb") as file:  # openpyxl leaves a file open that it cannot read
        return _rows_of(path, file, sheet)


def _rows_of(path: Path, file: BinaryIO, sheet: str | None) -> list[tuple[Any, ...]]:
    openpyxl = require("openpyxl", "excel", KIND)
    with decoding(path, KIND):
        book = openpyxl.load_workbook(file, read_only=True, data_only=True, keep_links=False)
    with closing(book):
        sheets = {each.title: each for each in book.worksheets}
        chosen = next(iter(sheets)) if sheet is None and len(sheets) == 1 else sheet
        if chosen is None or chosen not in sheets:
            got = "none" if chosen is None else repr(chosen)
            listed = ", ".join(map(repr, list(sheets)[:MAX_LISTED]))
            raise ValueError(f"expected --sheet to be a sheet of {path}, {listed}, got {got}")
        rows: list[tuple[Any, ...]] = []
        held = 0
        empty = 0  # rows since the last one with a value
        with decoding(path, KIND):
            for row in sheets[chosen].iter_rows(values_only=True):
                row = row[: max((k + 1 for k, cell in enumerate(row) if cell is not None), default=0)]
                held += BYTES_PER_CELL * len(row)
                empty = 0 if row else empty + 1
                if row:
                    rows += [()] * (empty if rows else 0)
                    rows.append(row)
                check_memory(path, "its cells", held, path.stat().st_size, "save it as .csv")
    return rows


def _column(cells: Sequence[Any]) -> Any:
    """Return cells as an Arrow array, as texts if they are of several types."""
    arrow = require("pyarrow", "data", KIND)
    kinds = {type(cell) for cell in cells if cell is not None}
    if datetime.datetime in kinds and all(isinstance(cell, datetime.datetime) or cell is None for cell in cells):
        if all(cell is None or cell.time() == datetime.time() for cell in cells):
            return arrow.array([cell and cell.date() for cell in cells])
        return arrow.array(cells, arrow.timestamp("us"))
    if len(kinds) > 1 and not kinds <= {int, float}:
        return arrow.array([None if cell is None else str(cell) for cell in cells], arrow.string())
    return arrow.array([None if cell is None else float(cell) for cell in cells] if float in kinds else cells)
