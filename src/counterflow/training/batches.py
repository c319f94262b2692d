"""Training data: a tensor of rows, or a tuple of tensors with the same number of rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.checks import check_finite, positive

Batch = Any  # a tensor (B, ...), or a tuple of tensors with B rows each; None for an objective without data


def tensors_of(data: Batch) -> tuple[Tensor, ...]:
    """Return the tensors of a batch as a tuple."""
    return data if isinstance(data, tuple) else (data,)


def as_batch(data: Any, what: str, dtype: torch.dtype) -> Batch | int:
    """Return training data as tensors: NumPy arrays, lists, data frames and series are converted to a dtype.

    Tensors and numbers of steps are returned unchanged, and a tuple has each of its parts converted.

    Raises:
        TypeError: data that are not numbers.

    Example:
        >>> as_batch([[1, 2], [3, 4]], "the training data", torch.float32)
        tensor([[1., 2.],
                [3., 4.]])
    """
    if isinstance(data, tuple):
        return tuple(as_batch(part, what, dtype) for part in data)
    if isinstance(data, Tensor | int):
        return data
    try:
        array = np.asarray(data).astype(np.float64)
        if not array.ndim:
            raise TypeError
        return torch.from_numpy(array).to(dtype)
    except (TypeError, ValueError):
        raise TypeError(
            f"expected {what} to be a tensor, or an array, a list or a data frame of numbers, got "
            f"{type(data).__name__}; convert it to numbers"
        ) from None


def check_rows(data: Batch | int, what: str, min_rows: int) -> int:
    """Return the number of rows; a step without data counts as min_rows of them.

    Raises:
        ValueError: fewer than min_rows rows, tensors of different lengths, or values that are not finite.
    """
    if isinstance(data, int):
        return positive(data, what) * min_rows
    sizes = {len(tensor) for tensor in tensors_of(data)}
    if len(sizes) > 1:
        raise ValueError(f"expected as many rows in each part of {what}, got {sorted(sizes)}")
    rows = sizes.pop()
    if rows < min_rows:
        smaller = f"set batch_size to at most {rows} or " if rows else ""
        raise ValueError(f"expected at least {min_rows} rows in {what}, got {rows}; {smaller}bring more data")
    for tensor in tensors_of(data):
        check_finite(tensor, what)
    return rows


def placed(data: Batch | int, device: torch.device, free: int | None = None) -> Batch | int:
    """Return data on the device of the training if they take at most a quarter of its free memory, else as they are.

    Args:
        data: rows.
        device: where batches are needed.
        free: bytes; by default those of the device.
    """
    if isinstance(data, int) or device.type == "cpu":
        return data
    free = _free_bytes(device) if free is None else free
    fits = 4 * sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(data)) <= free
    return moved(data, device) if fits else data


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return 0


def picked(data: Batch, rows: Tensor) -> Batch:
    """Return the rows with these indices as a batch."""
    found = tuple(part[rows.to(part.device, non_blocking=True)] for part in tensors_of(data))
    return found if isinstance(data, tuple) else found[0]


def moved(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on a device; a copy to CUDA goes on while the caller does."""
    if batch is None:
        return None
    there = tuple(_moved(tensor, device) for tensor in tensors_of(batch))
    return there if isinstance(batch, tuple) else there[0]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.is_cpu and device.type == "cuda":
        tensor = tensor.pin_memory()  # which a copy that does not wait needs
    return tensor.to(device, non_blocking=True)


def in_order(data: Batch | int, size: int) -> Iterator[tuple[Batch, int]]:
    """Yield all rows in batches, the last one shorter, each with its number of rows."""
    if isinstance(data, int):
        yield from repeat((None, 1), data)
        return
    for tensors in zip(*(tensor.split(size) for tensor in tensors_of(data)), strict=True):
        yield tensors if isinstance(data, tuple) else tensors[0], len(tensors[0])


def fingerprint_of(data: tuple[Batch | int, ...]) -> str:
    """Return a CRC-32 of the values, shapes and dtypes, by which a checkpoint recognizes its data."""
    total = 0
    for batch in data:
        for part in (batch,) if isinstance(batch, int) else tensors_of(batch):
            if isinstance(part, int):
                total = zlib.crc32(str(part).encode(), total)
            else:
                total = zlib.crc32(str((tuple(part.shape), part.dtype)).encode(), total)
                total = zlib.crc32(part.detach().cpu().contiguous().numpy().data, total)
    return f"{total:08x}"
