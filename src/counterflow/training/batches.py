"""The rows that a training is given: a tensor, or a tuple of tensors with a row for each."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from counterflow.checks import check_finite, positive

Batch = Any  # a tensor (B, ...), or a tuple of tensors of B rows each; None where the objective draws its own


def parts_of(data: Batch) -> tuple[Tensor, ...]:
    """The tensors of a batch, one or several."""
    return data if isinstance(data, tuple) else (data,)


def check_rows(data: Batch | int, what: str, least: int) -> int:
    """How many rows there are; a step without data counts as a batch of them."""
    if isinstance(data, int):
        return positive(data, what) * least
    sizes = {len(part) for part in parts_of(data)}
    if len(sizes) > 1:
        raise ValueError(f"expected as many rows in each part of {what}, got {sorted(sizes)}")
    rows = sizes.pop()
    if rows < least:
        smaller = f"set batch_size to at most {rows} or " if rows else ""
        raise ValueError(f"expected at least {least} rows in {what}, got {rows}; {smaller}bring more data")
    for part in parts_of(data):
        check_finite(part, what)
    return rows


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    if batch is None:
        return None
    there = tuple(part.to(device) for part in parts_of(batch))
    return there if isinstance(batch, tuple) else there[0]


def in_order(data: Batch | int, size: int) -> Iterator[tuple[Batch, int]]:
    """All rows in batches, the last one shorter, and how many rows each has."""
    if isinstance(data, int):
        yield from repeat((None, 1), data)
        return
    for parts in zip(*(part.split(size) for part in parts_of(data)), strict=True):
        yield parts if isinstance(data, tuple) else parts[0], len(parts[0])


def fingerprint_of(data: tuple[Batch | int, ...]) -> str:
    """A number that other data would not have."""
    total = 0
    for batch in data:
        for part in (batch,) if isinstance(batch, int) else parts_of(batch):
            if isinstance(part, int):
                total = zlib.crc32(str(part).encode(), total)
            else:
                total = zlib.crc32(str((tuple(part.shape), part.dtype)).encode(), total)
                total = zlib.crc32(part.detach().cpu().contiguous().numpy().data, total)
    return f"{total:08x}"
