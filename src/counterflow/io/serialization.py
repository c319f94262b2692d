"""Save and load: weights as safetensors, the constructor's arguments as JSON in the file's header. Never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from counterflow.flows.bases import DiagonalNormal, KernelMixture, StandardNormal, StudentT
from counterflow.flows.flow import Flow
from counterflow.flows.mixture import FlowMixture
from counterflow.io.atomic import write_bytes
from counterflow.io.json import MAX_QUOTED
from counterflow.io.limits import _Allowance
from counterflow.io.tensors import contiguous_copies, read_tensors
from counterflow.made.architecture import Architecture
from counterflow.transforms.autoregressive import Autoregressive
from counterflow.transforms.compose import Compose, Inverse
from counterflow.transforms.constant import Linear, Permute, Standardize, Whiten
from counterflow.transforms.context import StandardizedContext
from counterflow.transforms.coupling import CouplingLayer
from counterflow.transforms.quantile_spline import QuantileSpline
from counterflow.transforms.table.columns import (
    AsinhColumn,
    GridColumn,
    LinearColumn,
    LogColumn,
    LogitColumn,
    OrdinalColumn,
    SpikedColumn,
)
from counterflow.transforms.table.table import TableTransform
from counterflow.univariate.affine import Affine, ForeignAffine, Gated
from counterflow.univariate.base import Univariate
from counterflow.univariate.sinh_arcsinh import SinhArcsinh
from counterflow.univariate.spline import RationalQuadraticSpline
from counterflow.vae.vae import VAE

# Only these are ever built from a file.
TYPES: dict[str, type] = {
    t.__name__: t
    for t in (
        Affine,
        Architecture,
        AsinhColumn,
        Autoregressive,
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
        LinearColumn,
        LogColumn,
        LogitColumn,
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
KEY = "counterflow"  # in the header of the file


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
    write_bytes(Path(path), safetensors.torch.save(contiguous_copies(module.state_dict()), metadata={KEY: header}))


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
        raise ValueError(f"expected {path} to hold what its header describes, got: {came[:MAX_QUOTED]}") from None
    return module.eval()


def encode(value: Any) -> Any:
    """The constructor's arguments of a module or univariate map, all the way down, as JSON knows them."""
    if isinstance(value, nn.Module | Univariate | Architecture):
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
