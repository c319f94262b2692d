"""Limits on untrusted files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What a few bytes can be unpacked to is bounded by nothing but their own word.
ALWAYS = 1 << 28  # bytes of memory that every file may take; readers hold up to three copies, which come to 1 GB
RATIO = 100  # beyond them, for each stored byte; numbers and images are packed 2 to 20 times


def check_taken(path: Path, what: str, taken: int, stored: int, todo: str) -> None:
    """Raise ValueError where a file would take more memory than its stored bytes account for, before it is taken."""
    if taken > ALWAYS and taken > RATIO * stored:
        raise ValueError(
            f"expected {path} to take at most {ALWAYS >> 20} MiB of memory, or {RATIO} times its {stored:,} bytes, got "
            f"{taken:,} bytes for {what}; {todo}"
        )


# The arguments among them that are sizes, or lists of sizes. Other whole numbers are indices and values.
SIZES = {
    "channels",
    "context",
    "data_shape",
    "features",
    "hidden",
    "latent",
    "points",
    "posterior_hidden",
    "posterior_layers",
}


class _Allowance(TorchDispatchMode):
    """Keeps what is built from a header in proportion to the file: a constructor believes the sizes that it is given.

    A module takes some ten times the memory of its tensors for a moment, and some fifty calls of torch for each of
    them; both are allowed many times over, and asked for before they are taken. Loops in Python are as long as the
    sizes say, of which the sum is bounded before anything is built.
    """

    def __init__(self, header: str, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        stored = len(header) + sum(t.nbytes for t in tensors.values())
        self.sizes, self.bytes = (1 << 20) + stored, (1 << 26) + 64 * stored
        self.parts = (1 << 8) + 8 * len(tensors)  # a layer is described in up to five, and has four tensors at least
        self.calls = (1 << 12) + 64 * len(tensors) + len(header) // 8

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first call imports the compiler, which takes seconds

    def checked(self, described: Any) -> Any:
        """The same; ValueError where what is described is beyond what the file holds."""
        self.sizes -= sum(_sizes(described))
        self.parts -= _parts(described)
        if self.sizes < 0 or self.parts < 0:
            raise ValueError("sizes, or parts, that are far beyond the tensors in the file")
        return described

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls -= 1
        self.bytes -= _bytes_of(func, args, kwargs or {})
        if self.bytes < 0 or self.calls < 0:
            raise ValueError("sizes that take far more memory or time to build than the tensors in the file")
        return func(*args, **(kwargs or {}))


def _sizes(value: Any) -> Iterator[int]:
    """All sizes in a header, however deep."""
    if isinstance(value, list):
        for inner in value:
            yield from _sizes(inner)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from (n for n in _flat(inner) if isinstance(n, int)) if name in SIZES else _sizes(inner)


def _parts(value: Any) -> int:
    """Count the modules and maps that a header describes, without the columns of tables.

    A column has no weights and takes microseconds to build, so the length of the header bounds the cost of all columns.
    """
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    counted = isinstance(value, dict) and "type" in value and not str(value["type"]).endswith("Column")
    return counted + sum(map(_parts, inner))


def _flat(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, list) else (value,)


def _bytes_of(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """What a call of torch takes at most for the tensors that it makes; views and changes in place take nothing.

    That is what its arguments broadcast to, or are joined to, or the sizes among them.
    """
    made = [value for value in func._schema.returns if not value.alias_info]
    if not made:
        return 0
    values = [*args, *kwargs.values()]
    lists = [v for v in values if isinstance(v, list | tuple)]
    joined = [v for v in itertools.chain(*lists) if isinstance(v, Tensor)]
    tensors = [v for v in values if isinstance(v, Tensor)] + joined
    axes = itertools.zip_longest(*(reversed(t.shape) for t in tensors), fillvalue=1)
    sizes = [math.prod(max(n, 1) for n in v) for v in lists if all(isinstance(n, int) for n in v)]
    if not (sizes or tensors):  # as in arange(n)
        sizes = [math.prod(max(abs(n), 1) + 1 for n in values if isinstance(n, int))]
    return 8 * len(made) * max(math.prod(map(max, axes)), sum(t.numel() for t in joined), *sizes, 1)
