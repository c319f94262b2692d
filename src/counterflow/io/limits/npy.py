"""Checks of the headers of NumPy's .npy files and of their packing in .npz files."""

from __future__ import annotations

import io
import math
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from counterflow.io.limits import check_memory

MAX_HEADER = 10_000  # bytes, NumPy's own limit
# NumPy parses the header as Python, and a few thousand signs or operators make that parser take all memory; this
# matches the literals that NumPy writes.
LITERALS = re.compile(rb"(?:'[^']*+'|\d++L?|True|False|[{}()\[\],:\s])*+")
PACKINGS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}  # those that NumPy writes


class Header(NamedTuple):
    """Header of an .npy file."""

    shape: tuple[int, ...]
    fortran: bool  # the first index varies fastest
    dtype: np.dtype[Any]
    size: int  # bytes of the numbers in memory
    stored: int  # bytes of the file that holds the array


def read_header(stream: Any, length: int, path: Path) -> Header:
    """Read the header of an .npy file and check that the numbers it declares fit into the file.

    Args:
        stream: the .npy file, at its start.
        length: bytes of the .npy file, unpacked.
        path: the file on disk, which may be an .npz.

    Raises:
        ValueError: the header is invalid, or declares more numbers than the stream has bytes.
    """
    version = np.lib.format.read_magic(stream)
    prefix = stream.read(2 if version == (1, 0) else 4)
    size = int.from_bytes(prefix, "little")
    if size > MAX_HEADER:
        raise ValueError(f"its header has {size:,} bytes, more than {MAX_HEADER:,}")
    text = io.BytesIO(prefix + stream.read(size))
    if not LITERALS.fullmatch(text.getvalue(), len(prefix)):
        raise ValueError("its header is not a dictionary of texts and numbers")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(text)
    rest = length - len(np.lib.format.MAGIC_PREFIX) - 2 - text.tell()
    numbers = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or numbers > rest or (numbers == 0 and max(shape, default=0) > rest + MAX_HEADER):
        raise ValueError(f"it declares an array {shape} of {numbers:,} bytes, and {rest:,} follow")
    return Header(shape, fortran, dtype, numbers, path.stat().st_size)


def check_packing(info: zipfile.ZipInfo) -> None:
    """Raise ValueError unless a member of an .npz is packed in a way that NumPy writes."""
    if info.compress_type not in PACKINGS:
        raise ValueError(f"{info.filename!r} is neither {' nor '.join(PACKINGS.values())}")


def check_array(path: Path, header: Header, needed: int) -> None:
    """Raise ValueError if the bytes of an array that are held at once are more than its file accounts for."""
    todo = "if the file really holds that many numbers, save it as .npy"
    check_memory(path, f"an array of shape {header.shape}", needed, header.stored, todo)
