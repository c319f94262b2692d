"""Parquet files and folders of them, read in batches that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from counterflow.checks import require
from counterflow.io.data.arrow import decoded_bytes, located_errors, without_index
from counterflow.io.data.source import TablePart, TableSource
from counterflow.io.limits import FREE_BYTES, check_memory, decoding
from counterflow.io.limits.parquet import KIND as PARQUET
from counterflow.io.limits.parquet import Needs, check_parquet

TEXT_BYTES = FREE_BYTES // 2  # of the texts that are read at once
BUFFER = 1 << 20  # bytes that Arrow reads at a time


def open_parquet(path: Path) -> TableSource:
    """Open a .parquet file, or a folder of them as one table."""
    files = parquet_files(path)
    names: list[str] = []
    notes: tuple[str, ...] = ()
    groups: list[tuple[Needs, list[int]]] = []  # of each file: its memory, and the rows of each row group
    for k, file in enumerate(files):
        needs = check_parquet(file)
        with decoding(file, PARQUET), _open(file) as opened:
            found, notes = without_index(opened.schema_arrow, path)
            groups.append((needs, [opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups)]))
        names = names if k else found
        if found != names:
            raise ValueError(
                f"expected the columns of {files[0]} in every file of {path}, {', '.join(names)}, in that order, got "
                f"{', '.join(found)} in {file}; remove that file or write it again"
            )

    def parts(size: int | None) -> Iterator[TablePart]:
        for file, (needs, sizes) in zip(files, groups, strict=True):
            first = 0
            for span in _spans(sizes, size):
                rows = sum(sizes[span.start : span.stop])
                if rows:
                    yield TablePart(file, first, rows, partial(_batches, file, span, needs=needs))
                first += rows

    return TableSource(path, names, True, sum(sum(sizes) for _, sizes in groups), parts, notes)


def parquet_files(path: Path) -> list[Path]:
    """Return the Parquet files of a folder and its subfolders, ordered by path; a file stands for itself.

    Names that begin with . or _ are left out: the libraries that write such folders use them for other files.
    """
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() == ".parquet" and file.is_file())
    files = [file for file in found if not any(name[0] in "._" for name in file.relative_to(path).parts)]
    if not files:
        raise ValueError(f"expected Parquet files in {path}, got none; give such a folder, or one file")
    return files


def _spans(sizes: Sequence[int], max_rows: int | None) -> Iterator[range]:
    """Yield ranges of neighbouring row groups with at most `max_rows` rows together; a larger one is a range alone.

    Args:
        sizes: the rows of each row group.
        max_rows: None for one range of all row groups.
    """
    start, rows = 0, 0
    for k, size in enumerate(sizes):
        if max_rows is not None and k > start and rows + size > max_rows:
            yield range(start, k)
            start, rows = k, 0
        rows += size
    if sizes:
        yield range(start, len(sizes))


def _batches(path: Path, groups: Sequence[int], size: int, needs: Needs) -> Iterator[Any]:
    """Yield the rows of some row groups in Arrow record batches of at most `size` rows.

    Raises:
        ValueError: a batch takes more memory than the file's bytes account for.
    """
    arrow = require("pyarrow", "data", PARQUET)
    rows_at_once = max(1, min(size, TEXT_BYTES // max(needs.row, 1)))
    stored = path.stat().st_size
    held, rows, pieces = 0, 0, []
    with decoding(path, PARQUET):
        opened = _open(path)
    with opened:
        texts = [k for k, kind in enumerate(opened.schema_arrow.types) if not arrow.types.is_primitive(kind)]
        stream = opened.iter_batches(batch_size=rows_at_once, row_groups=list(groups), use_threads=False)
        for piece in located_errors(stream, path, PARQUET):
            pieces.append(piece)
            rows += piece.num_rows
            for column in map(piece.column, texts):
                with decoding(path, PARQUET):
                    column.validate(full=True)  # are texts UTF-8?
                held += decoded_bytes(column)
            check_memory(path, f"{rows:,} rows", held, stored, "write the file without the column of long texts")
            if rows + rows_at_once > size:
                yield from _joined(arrow, pieces)
                held, rows, pieces = 0, 0, []
        yield from _joined(arrow, pieces)


def _open(path: Path) -> Any:
    """Open a file with Arrow, which then reads pages as they are needed: a row group may be larger than memory."""
    parquet = require("pyarrow.parquet", "data", PARQUET)
    return parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER)


def _joined(arrow: Any, batches: list[Any]) -> Iterator[Any]:
    if len(batches) == 1:
        yield batches[0]
    elif batches:
        yield from arrow.Table.from_batches(batches).combine_chunks().to_batches()
