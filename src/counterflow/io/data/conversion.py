"""Rules by which an array becomes a tensor of rows or images."""

from __future__ import annotations

import numpy as np
import torch

from counterflow.io.data.cells import Array


def narrow(array: Array) -> Array:
    """Convert to float32, or to float64 if a number is beyond 2**24, where float32 rounds integers."""
    largest = max(float(array.max(initial=0)), -float(array.min(initial=0)))
    return array.astype(np.float64 if largest > 2**24 else np.float32)


def as_tensor(array: Array, name: str) -> torch.Tensor:
    """Convert an array to rows (N, D) or images (N, C, H, W), in float32 or float64.

    Args:
        array: (N, D), (N, H, W), (N, C, H, W) with C in (1, 3), or (N, H, W, C) with C in (1, 3, 4).
        name: of the data, for errors.
    """
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
    """Convert integers in 0..levels-1 to uint8 if levels <= 256, else to int32.

    Raises:
        ValueError: other values, naming the first.
    """
    bad = (values != values.round()) | (values < 0) | (values > levels - 1)
    if bad.any():
        row, *rest = bad.nonzero()[0].tolist()
        place = f"column {rest[0]}" if len(rest) == 1 else f"index {tuple(rest)}"
        raise ValueError(
            f"expected integers in 0..{levels - 1} in {name}, because levels={levels}, got {int(bad.sum())} "
            f"other values, the first {values[(row, *rest)].item()} at row {row}, {place} (counted from 0); "
            "rescale and round them, or leave levels out"
        )
    return values.to(torch.uint8 if levels <= 256 else torch.int32)
