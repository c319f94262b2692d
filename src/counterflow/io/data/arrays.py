"""NumPy's .npy and .npz files, as arrays and as tables."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.checks import require
from counterflow.io.data.cells import Array
from counterflow.io.data.formats import NPY, NPZ
from counterflow.io.data.source import TablePart, TableSource, sequential_parts
from counterflow.io.limits import check_memory, decoding
from counterflow.io.limits.npy import Header, check_array, check_packing, read_header

BLOCK = 1 << 22  # bytes of an .npz read at a time
BYTES_PER_COLUMN = 1 << 10  # of a column's name and what Arrow keeps for it
MAX_LISTED = 20  # arrays of an .npz that an error names


def read_npy(path: Path) -> Array:
    """Map the array of real numbers in a .npy file into memory."""
    with decoding(path, NPY), open(path, "rb") as stream:
        header = read_header(stream, path.stat().st_size, path)
    _check_real(header.dtype, str(path))
    with decoding(path, NPY):
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def read_npz(path: Path, key: str | None) -> Array:
    """Read the array of an .npz file named `key`, or its only array."""
    member, header = _find_member(path, key)
    check_array(path, header, header.size)
    with decoding(path, NPZ), zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        array: Array = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def open_npy(path: Path) -> TableSource:
    """Open a .npy file of rows (N, D) as a table."""
    array = read_npy(path)
    names = _column_names(array.shape, str(path), path)

    def batches(start: int, stop: int, size: int) -> Iterator[Any]:
        for first in range(start, stop, size):
            yield _as_batch(np.asarray(array[first : min(first + size, stop)]), names)

    def parts(size: int | None) -> Iterator[TablePart]:
        for first in range(0, len(array), size or len(array) or 1):
            stop = min(first + (size or len(array)), len(array))
            yield TablePart(path, first, stop - first, partial(batches, first, stop))

    return TableSource(path, names, False, len(array), parts)


def open_npz(path: Path, key: str | None) -> TableSource:
    """Open rows (N, D) in an .npz file as a table: the array named `key`, or the only one."""
    member, header = _find_member(path, key)
    names = _column_names(header.shape, f"{member.removesuffix('.npy')!r} of {path}", path)
    read = partial(_read_columns if header.fortran else _read_rows, path, member, header)
    rows = header.shape[0]
    return TableSource(
        path,
        names,
        False,
        rows,
        sequential_parts(path, rows, lambda: (_as_batch(block, names) for block in read())),
    )


def _read_rows(path: Path, member: str, header: Header) -> Iterator[Array]:
    """Yield an array stored row by row, a block of rows at a time."""
    rows, columns = header.shape
    width = header.dtype.itemsize * columns
    size = max(1, BLOCK // width)
    check_array(path, header, min(size, rows) * width)
    with ExitStack() as stack:
        with decoding(path, NPZ):
            archive = stack.enter_context(zipfile.ZipFile(path))
            stream = stack.enter_context(archive.open(member))
            read_header(stream, archive.getinfo(member).file_size, path)
        for first in range(0, rows, size):
            count = min(size, rows - first)
            with decoding(path, NPZ):
                block = np.frombuffer(stream.read(count * width), header.dtype).reshape(count, columns)
            yield block


def _read_columns(path: Path, member: str, header: Header) -> Iterator[Array]:
    """Yield an array stored column by column, which must be read at once, a block of rows at a time."""
    array = read_npz(path, member.removesuffix(".npy"))
    size = max(1, BLOCK // (header.dtype.itemsize * header.shape[1]))
    for first in range(0, len(array), size):
        yield array[first : first + size]


def _find_member(path: Path, key: str | None) -> tuple[str, Header]:
    """Return the member of an .npz that holds the array named `key`, or its only array, and its header."""
    headers = {}
    with decoding(path, NPZ), zipfile.ZipFile(path) as archive:
        for info in (info for info in archive.infolist() if info.filename.endswith(".npy")):
            check_packing(info)
            with archive.open(info) as stream:
                headers[info.filename.removesuffix(".npy")] = read_header(stream, info.file_size, path)
    chosen = next(iter(headers)) if key is None and len(headers) == 1 else key
    if chosen is None or chosen not in headers:
        held = [f"{name} {header.shape} {header.dtype}" for name, header in headers.items()] or ["no arrays"]
        got = "no key" if key is None else repr(key)
        raise ValueError(
            f"expected a key that names one array of {path}, got {got}; it holds {', '.join(held[:MAX_LISTED])}"
            f"{', ..' if len(held) > MAX_LISTED else ''}"
        )
    _check_real(headers[chosen].dtype, f"{chosen!r} of {path}")
    return f"{chosen}.npy", headers[chosen]


def _check_real(dtype: np.dtype[Any], what: str) -> None:
    if dtype.kind not in "buif":
        never = "objects are pickled, may run code and are never loaded: " if dtype.hasobject else ""
        raise ValueError(f"expected real numbers in {what}, got dtype {dtype}; {never}save it as numbers")


def _column_names(shape: tuple[int, ...], what: str, path: Path) -> list[str]:
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"expected rows (N, D) in {what}, got shape {shape}; reshape it")
    todo = "if it really has that many, store fewer columns"
    check_memory(path, f"{shape[1]:,} columns", BYTES_PER_COLUMN * shape[1], path.stat().st_size, todo)
    return [f"f{column}" for column in range(shape[1])]


def _as_batch(array: Array, names: Sequence[str]) -> Any:
    """Convert rows (N, D) to an Arrow record batch."""
    arrow = require("pyarrow", "data", "a table")
    # Arrow knows only the machine's own byte order, and no floats of more than 8 bytes
    dtype = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.float64
    columns = [arrow.array(np.ascontiguousarray(column, dtype)) for column in array.T]
    return arrow.record_batch(columns, names=list(names))
