"""NumPy files, and the rules by which an array of any format becomes a tensor of rows or images."""

import io
import math
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from counterflow.io.data.formats import reading
from counterflow.io.limits import check_taken

NPY, NPZ = "a NumPy .npy file", "a NumPy .npz file"
HEADER = 10_000  # bytes, as NumPy has it
# What NumPy writes there. Python's parser, which reads it, takes all memory for some thousands of signs or operators.
PLAIN = re.compile(rb"(?:'[^']*+'|\d++L?|True|False|[{}()\[\],:\s])*+")
LISTED = 20  # arrays of an .npz, in an error
PACKINGS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}  # what NumPy writes

Array = np.ndarray[Any, Any]


class Header(NamedTuple):
    """What an .npy says of itself."""

    shape: tuple[int, ...]
    fortran: bool  # the first index moves fastest
    dtype: np.dtype[Any]
    size: int  # bytes of the numbers
    stored: int  # bytes of the file that it stands in


def read_npy(path: Path) -> Array:
    """The array of a .npy file, of real numbers, mapped into memory."""
    with reading(path, NPY), open(path, "rb") as stream:
        header = npy_header(stream, path.stat().st_size, path)
    _check_numeric(header.dtype, str(path))
    with reading(path, NPY):
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def read_npz(path: Path, key: str | None) -> Array:
    """The array of an .npz file that key names, or its only one."""
    member, header = npz_member(path, key)
    check_unpacked(path, header, header.size)
    with reading(path, NPZ), zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        array: Array = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def check_unpacked(path: Path, header: Header, held: int) -> None:
    """Raise ValueError where the bytes held of an array at a time are beyond what its file accounts for."""
    check_taken(path, f"an array of shape {header.shape}", held, header.stored, "save it as .npy, if they are there")


def npz_member(path: Path, key: str | None) -> tuple[str, Header]:
    """The file within an .npz that holds the array that key names, or its only one, of real numbers."""
    headers = {}
    with reading(path, NPZ), zipfile.ZipFile(path) as archive:
        for info in (info for info in archive.infolist() if info.filename.endswith(".npy")):
            if info.compress_type not in PACKINGS:
                raise ValueError(f"{info.filename!r} is neither {' nor '.join(PACKINGS.values())}")
            with archive.open(info) as stream:
                headers[info.filename.removesuffix(".npy")] = npy_header(stream, info.file_size, path)
    chosen = next(iter(headers)) if key is None and len(headers) == 1 else key
    if chosen is None or chosen not in headers:
        held = [f"{name} {header.shape} {header.dtype}" for name, header in headers.items()] or ["no arrays"]
        came = "no key" if key is None else repr(key)
        raise ValueError(
            f"expected a key that names one array of {path}, got {came}; it holds {', '.join(held[:LISTED])}"
            f"{', ..' if len(held) > LISTED else ''}"
        )
    _check_numeric(headers[chosen].dtype, f"{chosen!r} of {path}")
    return f"{chosen}.npy", headers[chosen]


def npy_header(stream: Any, length: int, path: Path) -> Header:
    """What the .npy says of itself that a stream of so many bytes begins with.

    Raises ValueError where that is no header, or more numbers than the stream has bytes.
    """
    version = np.lib.format.read_magic(stream)
    prefix = stream.read(2 if version == (1, 0) else 4)
    size = int.from_bytes(prefix, "little")
    if size > HEADER:
        raise ValueError(f"it has a header of {size:,} bytes, where {HEADER:,} are many")
    text = io.BytesIO(prefix + stream.read(size))
    if not PLAIN.fullmatch(text.getvalue(), len(prefix)):
        raise ValueError("its header is no dictionary of texts and numbers")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(text)
    rest, numbers = length - len(np.lib.format.MAGIC_PREFIX) - 2 - text.tell(), math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or numbers > rest or (numbers == 0 and max(shape, default=0) > rest + HEADER):
        raise ValueError(f"it declares an array {shape} of {numbers:,} bytes, and {rest:,} follow")
    return Header(shape, fortran, dtype, numbers, path.stat().st_size)


def _check_numeric(dtype: np.dtype[Any], what: str) -> None:
    if dtype.kind not in "buif":
        never = "objects are pickled, may run code and are never loaded: " if dtype.hasobject else ""
        raise ValueError(f"expected real numbers in {what}, got dtype {dtype}; {never}save it as numbers")


def narrow(array: Array) -> Array:
    """float32, or float64 if there are numbers beyond 2**24, where float32 rounds whole numbers."""
    reach = max(float(array.max(initial=0)), -float(array.min(initial=0)))
    return array.astype(np.float64 if reach > 2**24 else np.float32)


def as_tensor(array: Array, name: str) -> torch.Tensor:
    """(N, D) or (N, C, H, W), float32 or float64."""
    shape = array.shape
    channels_first = array.ndim == 4 and shape[1] in (1, 3)
    channels_last = array.ndim == 4 and shape[3] in (1, 3, 4) and not channels_first
    if not (array.ndim in (2, 3) or channels_first or channels_last):
        todo = "(N, 1), if it is N rows of one feature" if array.ndim == 1 else "one of these"
        raise ValueError(
            f"expected rows (N, D), grey images (N, H, W), or colour images (N, 3, H, W) or (N, H, W, 3) in "
            f"{name}, got shape {shape}; reshape it to {todo}"
        )
    if array.size == 0:
        raise ValueError(f"expected at least one row and one column in {name}, got shape {shape}; add data")
    if array.ndim == 3:
        array = array[:, None]
    if channels_last:
        array = np.moveaxis(array, 3, 1)
    if array.dtype.kind != "f":
        array = narrow(array)
    dtype = np.float64 if array.dtype.itemsize > 4 else np.float32
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def as_levels(values: torch.Tensor, levels: int, name: str) -> torch.Tensor:
    """The values as uint8 if levels <= 256, else int32; ValueError unless they are integers in 0..levels-1."""
    bad = (values != values.round()) | (values < 0) | (values > levels - 1)
    if bad.any():
        row, *rest = bad.nonzero()[0].tolist()
        place = f"column {rest[0]}" if len(rest) == 1 else f"index {tuple(rest)}"
        raise ValueError(
            f"expected integers in 0..{levels - 1} in {name}, as levels={levels} says, got {int(bad.sum())} "
            f"other values, the first {values[(row, *rest)].item()} at row {row}, {place} (counted from 0); "
            "rescale and round them, or leave levels out"
        )
    return values.to(torch.uint8 if levels <= 256 else torch.int32)
