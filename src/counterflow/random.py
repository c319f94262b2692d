"""Reproducible random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, *, cuda: bool = False) -> Iterator[None]:
    """Seed torch's global random generator inside a `with` block, and restore its earlier state afterwards.

    Args:
        seed: the seed.
        cuda: True to seed and restore the generators of all GPUs as well; otherwise only that of the CPU.

    Example:
        >>> with seeded(3):
        ...     first = torch.rand(2)
        >>> with seeded(3):
        ...     torch.equal(first, torch.rand(2))
        True
    """
    with torch.random.fork_rng(list(range(torch.cuda.device_count())) if cuda else []):
        if cuda:
            torch.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach every GPU
        yield
