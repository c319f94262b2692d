"""NumPy files, and the rules by which an array of any format becomes a tensor of rows or images."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from counterflow.data.formats import reading

Array = np.ndarray[Any, Any]


def read_npy(path: Path) -> Array:
    """The array of a .npy file, of real numbers, mapped into memory."""
    kind = "a NumPy .npy file"
    with reading(path, kind), open(path, "rb") as stream:
        _, _, dtype = npy_header(stream)
    _check_numeric(dtype, str(path))
    with reading(path, kind):
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)  # mmap looks at the length first
    return array


def read_npz(path: Path, key: str | None) -> Array:
    """The array of an .npz file that key names, or its only one."""
    member = npz_member(path, key)
    with reading(path, "a NumPy .npz file"), zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        array: Array = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def npz_member(path: Path, key: str | None) -> str:
    """The file within an .npz that holds the array that key names, or its only one, of real numbers."""
    kind, headers = "a NumPy .npz file", {}
    with reading(path, kind), zipfile.ZipFile(path) as archive:
        for member in (name for name in archive.namelist() if name.endswith(".npy")):
            with archive.open(member) as stream:
                headers[member.removesuffix(".npy")] = npy_header(stream)
    chosen = next(iter(headers)) if key is None and len(headers) == 1 else key
    if chosen is None or chosen not in headers:
        held = ", ".join(f"{name} {shape} {dtype}" for name, (shape, _, dtype) in headers.items()) or "no arrays"
        came = "no key" if key is None else repr(key)
        raise ValueError(f"expected a key that names one array of {path}, got {came}; it holds {held}")
    _check_numeric(headers[chosen][2], f"{chosen!r} of {path}")
    return f"{chosen}.npy"


def npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it is in Fortran's order, and dtype of the .npy that a stream begins with."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return shape, fortran, dtype


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
