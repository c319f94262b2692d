"""Limits on what is built from a checkpoint's header, in proportion to the tensors in the file."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The constructor arguments that are sizes, or lists of sizes. Other integers are indices and values.
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


def build(header: str, tensors: Mapping[str, Tensor], decode: Callable[[Any], Any]) -> Any:
    """Build a module from a header, within limits set by the size of the header and the tensors.

    Args:
        header: JSON.
        tensors: all tensors of the file.
        decode: builds the module from the decoded JSON.

    Raises:
        ValueError: the module would take far more memory or time than the tensors account for.
    """
    with _Allowance(header, tensors) as allowance:
        description = json.loads(header)
        allowance.check(description)
        return decode(description)


class _Allowance(TorchDispatchMode):
    """Count the memory and the calls of torch while a module is built, and stop beyond what the file accounts for.

    Constructors believe the sizes they are given. A module takes about ten times the memory of its tensors for a
    moment, and about fifty calls of torch for each tensor; both limits leave room for several times that. Memory is
    counted before it is allocated. The loops in constructors are as long as the sizes say, so the sum of all sizes is
    limited before anything is built.
    """

    def __init__(self, header: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        stored = len(header) + sum(t.nbytes for t in tensors.values())
        self.sizes = (1 << 20) + stored
        self.bytes = (1 << 26) + 64 * stored
        self.objects = (1 << 8) + 8 * len(tensors)  # a layer is up to five described objects, with at least 4 tensors
        self.calls = (1 << 12) + 64 * len(tensors) + len(header) // 8

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first call imports the compiler, which takes seconds

    def check(self, description: Any) -> None:
        """Raise ValueError if the sizes, or the number of objects, are beyond what the file accounts for."""
        self.sizes -= sum(_sizes(description))
        self.objects -= _count_objects(description)
        if self.sizes < 0 or self.objects < 0:
            raise ValueError("sizes, or a number of modules, far beyond the tensors in the file")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls -= 1
        self.bytes -= _max_bytes(func, args, kwargs or {})
        if self.bytes < 0 or self.calls < 0:
            raise ValueError("sizes that take far more memory or time to build than the tensors in the file")
        return func(*args, **(kwargs or {}))


def _sizes(value: Any) -> Iterator[int]:
    """Yield all sizes in a description, at every depth."""
    if isinstance(value, list):
        for inner in value:
            yield from _sizes(inner)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name in SIZES:
                yield from (n for n in (inner if isinstance(inner, list) else [inner]) if isinstance(n, int))
            else:
                yield from _sizes(inner)


def _count_objects(value: Any) -> int:
    """Count the modules and univariate maps in a description, without the columns of tables.

    A column has no weights and takes microseconds to build, so the length of the header bounds the cost of all columns.
    """
    if isinstance(value, dict):
        counted = "type" in value and not str(value["type"]).endswith("Column")
        return int(counted) + sum(map(_count_objects, value.values()))
    return sum(map(_count_objects, value)) if isinstance(value, list) else 0


def _max_bytes(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Bound the memory of the tensors that a call of torch makes; views and in-place operations make none.

    The bound is the size that the arguments broadcast to, or are concatenated to, or the product of the sizes among
    them, with 8 bytes for each element.
    """
    made = [value for value in func._schema.returns if not value.alias_info]
    if not made:
        return 0
    values = [*args, *kwargs.values()]
    lists = [v for v in values if isinstance(v, list | tuple)]
    listed = [v for v in itertools.chain(*lists) if isinstance(v, Tensor)]
    tensors = [v for v in values if isinstance(v, Tensor)] + listed
    axes = itertools.zip_longest(*(reversed(t.shape) for t in tensors), fillvalue=1)
    sizes = [math.prod(max(n, 1) for n in v) for v in lists if all(isinstance(n, int) for n in v)]
    if not (sizes or tensors):  # as in arange(n)
        sizes = [math.prod(max(abs(n), 1) + 1 for n in values if isinstance(n, int))]
    return 8 * len(made) * max(math.prod(map(max, axes)), sum(t.numel() for t in listed), *sizes, 1)
