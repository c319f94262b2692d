"""Save and load: weights as safetensors, the constructor's arguments as JSON in the file's header. Never pickle."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from counterflow.autoregressive import Autoregressive
from counterflow.columns import Columns
from counterflow.context import StandardizedContext
from counterflow.coupling import CouplingLayer
from counterflow.files import TOLD, alone, read_tensors, write_whole
from counterflow.flow import DiagonalNormal, Flow, KernelMixture, StandardNormal, StudentT
from counterflow.linear import Linear
from counterflow.made import Wiring
from counterflow.marginals import Marginals
from counterflow.mixture import FlowMixture
from counterflow.transform import Compose, Inverse, Permute, Standardize, Triangular
from counterflow.univariate import Affine, Gated, RationalQuadraticSpline, ScaledAffine, SinhArcsinh, Univariate
from counterflow.vae import VAE

# Only these are ever built from a file.
TYPES: dict[str, type] = {
    t.__name__: t
    for t in (
        Affine,
        Autoregressive,
        Columns,
        Compose,
        CouplingLayer,
        DiagonalNormal,
        Flow,
        FlowMixture,
        Gated,
        Inverse,
        KernelMixture,
        Linear,
        Marginals,
        Permute,
        RationalQuadraticSpline,
        ScaledAffine,
        SinhArcsinh,
        StandardNormal,
        Standardize,
        StandardizedContext,
        StudentT,
        Triangular,
        VAE,
        Wiring,
    )
}
KEY = "counterflow"  # in the header of the file
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


def save(module: nn.Module, path: str | Path) -> None:
    """Write a flow, a transform or a VAE to one safetensors file, whole or not at all.

    A layer that stands in it twice is written twice, and is two layers when it is loaded.

    Raises:
        TypeError: the module, or a part of it, is of a class that `load` does not know.

    Example:
        >>> import counterflow as cf, tempfile, os
        >>> flow = cf.MAF(features=3, layers=1, hidden=(8,))
        >>> path = os.path.join(tempfile.mkdtemp(), "flow.safetensors")
        >>> cf.save(flow, path)
        >>> cf.load(path).features
        3
    """
    header = json.dumps(encode(module))
    write_whole(Path(path), safetensors.torch.save(alone(module.state_dict()), metadata={KEY: header}))


def load(path: str | Path, device: str = "cpu") -> Any:
    """Build again what `save` wrote: the same class, the same numbers, the same dtype.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not safetensors, was not written by `save`, or holds other tensors than its header says.
    """
    path = Path(path)
    if not path.is_file():
        came = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"expected a file written by counterflow.save, got {path}, which {came}")
    tensors, texts = read_tensors(path, device)
    if KEY not in texts:
        raise ValueError(f"expected a file written by counterflow.save, got {path}, whose header has no {KEY!r} entry")
    try:
        with _Allowance(texts[KEY], tensors) as allowance:
            module = decode(allowance.checked(json.loads(texts[KEY])))
        # The tensors take the place of the fresh ones, dtype and all; buffers that are not saved follow their dtype.
        dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
        module.to(device=device, dtype=dtypes.pop() if len(dtypes) == 1 else None)
        module.load_state_dict(tensors, assign=True)
    except Exception as error:  # the header may be anybody's, and make a constructor fail in any way
        came = " ".join(f"{error}".split()) or type(error).__name__
        raise ValueError(f"expected {path} to hold what its header describes, got: {came[:TOLD]}") from None
    return module.eval()


def encode(value: Any) -> Any:
    """The constructor's arguments of a module or univariate map, all the way down, as JSON knows them."""
    if isinstance(value, nn.Module | Univariate | Wiring):
        name = type(value).__name__
        if TYPES.get(name) is not type(value):
            raise TypeError(f"expected a class that counterflow can load again ({', '.join(TYPES)}), got {name}")
        arguments: dict[str, Any] = value.config()  # type: ignore[operator]  # every class of TYPES has it
        return {"type": name, "arguments": {k: encode(v) for k, v in arguments.items()}}
    if isinstance(value, list | tuple | torch.Size):
        return [encode(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"expected arguments that JSON can hold, got {type(value).__name__}")


def decode(value: Any) -> Any:
    """What `encode` wrote, built again."""
    if isinstance(value, dict):
        if value.get("type") not in TYPES:
            raise ValueError(f"unknown type {value.get('type')!r}; known are {', '.join(TYPES)}")
        return TYPES[value["type"]](**{k: decode(v) for k, v in value["arguments"].items()})
    return [decode(v) for v in value] if isinstance(value, list) else value


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
    """How many modules and maps a header describes."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return ("type" in value if isinstance(value, dict) else 0) + sum(map(_parts, inner))


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
