"""Checkpoints: weights as safetensors, and the constructor's arguments as JSON in the file's header. Never pickle.

Files are not trusted: see `counterflow.io.limits` for the threat model and what is guaranteed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar, overload

import safetensors.torch
import torch
from torch import nn

from counterflow.flows.bases import DiagonalNormal, KernelMixture, StandardNormal, StudentT
from counterflow.flows.categories import CategoryNetwork
from counterflow.flows.flow import Flow
from counterflow.flows.mixture import FlowMixture
from counterflow.io.atomic import write_bytes
from counterflow.io.limits import one_line
from counterflow.io.limits.checkpoint import build
from counterflow.io.tensors import contiguous_copies, read_tensors
from counterflow.made.architecture import Architecture
from counterflow.transforms.autoregressive import Autoregressive
from counterflow.transforms.compose import Compose, Inverse
from counterflow.transforms.constant import Linear, Permute, Standardize, Whiten
from counterflow.transforms.context import StandardizedContext
from counterflow.transforms.coupling import CouplingLayer
from counterflow.transforms.masked import MaskedAutoregressive
from counterflow.transforms.quantile_spline import QuantileSpline
from counterflow.transforms.table.circular import CircularColumn
from counterflow.transforms.table.continuous import AsinhColumn, LinearColumn, LogColumn, LogitColumn
from counterflow.transforms.table.discrete import GridColumn, OrdinalColumn, SpikedColumn
from counterflow.transforms.table.table import TableTransform
from counterflow.transforms.trained import ActNorm, LULinear
from counterflow.univariate.affine import Affine, ForeignAffine, Gated
from counterflow.univariate.base import Univariate
from counterflow.univariate.sinh_arcsinh import SinhArcsinh
from counterflow.univariate.spline import RationalQuadraticSpline
from counterflow.vae.vae import VAE

# The classes that a file may name; no others are built.
TYPES: dict[str, type] = {
    t.__name__: t
    for t in (
        ActNorm,
        Affine,
        Architecture,
        AsinhColumn,
        Autoregressive,
        CategoryNetwork,
        CircularColumn,
        Compose,
        CouplingLayer,
        DiagonalNormal,
        Flow,
        FlowMixture,
        ForeignAffine,
        Gated,
        GridColumn,
        Inverse,
        KernelMixture,
        Linear,
        LULinear,
        LinearColumn,
        LogColumn,
        LogitColumn,
        MaskedAutoregressive,
        OrdinalColumn,
        Permute,
        QuantileSpline,
        RationalQuadraticSpline,
        SinhArcsinh,
        SpikedColumn,
        StandardNormal,
        Standardize,
        StandardizedContext,
        StudentT,
        TableTransform,
        VAE,
        Whiten,
    )
}
KEY = "counterflow"  # of the description in the file's header

Module = TypeVar("Module", bound=nn.Module)


def save(module: nn.Module, path: str | Path) -> None:
    """Save a flow, a transform or a VAE to one safetensors file, atomically.

    A layer that appears twice in the module is written twice, and becomes two layers when it is loaded.

    Args:
        module: built from classes of this library.
        path: the file; missing folders are created.

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
    write_bytes(Path(path), safetensors.torch.save(contiguous_copies(module.state_dict()), metadata={KEY: header}))


@overload
def load(path: str | Path, device: str = "cpu") -> Any: ...


@overload
def load(path: str | Path, device: str = "cpu", *, kind: type[Module]) -> Module: ...


def load(path: str | Path, device: str = "cpu", *, kind: type[nn.Module] = nn.Module) -> Any:
    """Load what `save` wrote: the same class, numbers and dtype, in evaluation mode.

    Args:
        path: the file.
        device: of the loaded module.
        kind: the expected class, such as `cf.Flow`; type checkers then know what is returned.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file was not written by `save`, its tensors differ from what its header describes, or it holds
            a module of another class than `kind`.

    Example:
        >>> import counterflow as cf, tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "flow.safetensors")
        >>> cf.save(cf.MAF(features=3, layers=1, hidden=(8,)), path)
        >>> cf.load(path, kind=cf.Flow)().sample((2,)).shape
        torch.Size([2, 3])
    """
    path = Path(path)
    if not path.is_file():
        cause = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"expected a file written by counterflow.save, got {path}, which {cause}")
    tensors, texts = read_tensors(path, device)
    if KEY not in texts:
        raise ValueError(f"expected a file written by counterflow.save, got {path}, whose header has no {KEY!r} entry")
    try:
        module = build(texts[KEY], tensors, decode)
        # The loaded tensors replace the new ones, dtype included; buffers that are not saved follow their dtype.
        dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
        module.to(device=device, dtype=dtypes.pop() if len(dtypes) == 1 else None)
        module.load_state_dict(tensors, assign=True)
    except Exception as error:  # an untrusted header may make a constructor fail in any way
        raise ValueError(f"expected {path} to hold what its header describes, got: {one_line(error)}") from None
    if not isinstance(module, kind):
        raise ValueError(f"expected {path} to hold a {kind.__name__}, got a {type(module).__name__}")
    return module.eval()


def encode(value: Any) -> Any:
    """Describe a module or a univariate map by its class and constructor arguments, recursively, in values of JSON."""
    if isinstance(value, nn.Module | Univariate | Architecture):
        name = type(value).__name__
        if TYPES.get(name) is not type(value):
            raise TypeError(f"expected a class that counterflow can load ({', '.join(TYPES)}), got {name}")
        arguments: dict[str, Any] = value.config()  # type: ignore[operator]  # every class of TYPES has it
        return {"type": name, "arguments": {k: encode(v) for k, v in arguments.items()}}
    if isinstance(value, list | tuple | torch.Size):
        return [encode(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"expected arguments that JSON can hold, got {type(value).__name__}")


def decode(value: Any) -> Any:
    """Build what `encode` described."""
    if isinstance(value, dict):
        if value.get("type") not in TYPES:
            raise ValueError(f"unknown type {value.get('type')!r}; known are {', '.join(TYPES)}")
        return TYPES[value["type"]](**{k: decode(v) for k, v in value["arguments"].items()})
    return [decode(v) for v in value] if isinstance(value, list) else value
