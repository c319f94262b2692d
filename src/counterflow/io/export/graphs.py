"""Graphs to export: one direction of a flow, or one part of a VAE, as a function from tensors to tensors."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from counterflow.flows.bases import Base, DiagonalNormal, StandardNormal, StudentT
from counterflow.flows.flow import Flow
from counterflow.flows.mixture import FlowMixture
from counterflow.made.masked_linear import MaskedLinear
from counterflow.transforms.autoregressive import Autoregressive
from counterflow.transforms.base import Transform, prepare
from counterflow.transforms.constant import Linear, Whiten
from counterflow.transforms.trained import LULinear
from counterflow.vae.vae import VAE

Direction = Literal["sample", "log_prob", "decode", "encode"]
OUTPUTS: dict[Direction, tuple[str, ...]] = {
    "sample": ("z", "log_q"),
    "log_prob": ("log_prob", "eps"),
    "decode": ("mean",),
    "encode": ("z", "log_q"),
}
MAX_SOLVED = 64  # degrees of a solved direction: each is a pass in the graph
DynamicAxes = dict[str, dict[int, Any]] | None  # by input, the axes that may have any size


class Graph(nn.Module):
    """Function from named tensors, each with a batch axis, to a tuple of tensors."""

    direction: Direction
    sizes: dict[str, tuple[int, ...]]  # shape of one row of each input

    def example(self, rows: int) -> dict[str, Tensor]:
        """Return random rows of each input."""
        like = next(self.parameters())
        return {name: torch.randn(rows, *size).to(like) for name, size in self.sizes.items()}

    def metadata(self) -> dict[str, str]:
        """Return what the file's metadata say: version, direction, inputs and outputs."""
        from counterflow import __version__

        return {
            "counterflow": __version__,
            "direction": self.direction,
            "inputs": json.dumps({name: list(size) for name, size in self.sizes.items()}),
            "outputs": json.dumps(OUTPUTS[self.direction]),
        }


class _Sample(Graph):
    direction: Direction = "sample"

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.draw = _Draw(flow)
        self.sizes = _sizes(flow, "eps")

    def forward(self, eps: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.draw(eps, context)


class _LogProb(Graph):
    direction: Direction = "log_prob"

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.base = _BaseInClosedForm(flow.base)
        self.transform = flow.transform
        self.sizes = _sizes(flow, "x")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.transform.inverse(x, context if self.transform.context else None)
        mean, std = self.base.mean_and_std(z, context)
        eps = (z - mean) / std
        return self.base.log_prob(eps, std) + log_det, eps


class _Decode(Graph):
    direction: Direction = "decode"

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.likelihood = vae.likelihood
        self.sizes = {"z": (vae.latent,)}

    def forward(self, z: Tensor) -> tuple[Tensor]:
        return (self.likelihood(self.decoder(z)).mean,)


class _Encode(Graph):
    direction: Direction = "encode"

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.likelihood = vae.likelihood
        self.draw = _Draw(vae.posterior)
        self.sizes = {"x": vae.data_shape, "eps": (vae.latent,)}

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        return self.draw(eps, self.encoder(self.likelihood.center(x)))


def _sizes(flow: Flow, name: str) -> dict[str, tuple[int, ...]]:
    """Return the inputs of a flow's graph: one of its features, and the context if it takes one."""
    context = {"context": (flow.context,)} if flow.context else {}
    return {name: (flow.features,), **context}


class _BaseInClosedForm(nn.Module):
    """Base distribution of mean + std * eps, with eps from N(0, 1), or from a Student t's own distribution.

    It is written in tensor operations that ONNX has.
    """

    df: Tensor
    constant: Tensor

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base
        self.is_student = isinstance(base, StudentT)
        if isinstance(base, StudentT):
            df = base.df.detach()
            constant = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - (df * math.pi).log() / 2
            self.register_buffer("df", df)
            self.register_buffer("constant", constant)  # computed now: ONNX has no lgamma

    def mean_and_std(self, like: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mean and the scale, each shaped like `like` (B, D)."""
        if not isinstance(self.base, DiagonalNormal):
            return torch.zeros_like(like), torch.ones_like(like)
        normal: Any = self.base(c if self.base.context else None)
        return normal.base_dist.loc.expand_as(like), normal.base_dist.scale.expand_as(like)

    def log_prob(self, eps: Tensor, std: Tensor) -> Tensor:
        """Return the log density (B,) of the points mean + std * eps."""
        if self.is_student:
            return (self.constant - (self.df + 1) / 2 * torch.log1p(eps * eps / self.df)).sum(-1)
        return (-(eps * eps + math.log(2 * math.pi)) / 2 - std.log()).sum(-1)


class _Draw(nn.Module):
    """Map from eps to z = f(mean + std * eps) and log q(z)."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.base = _BaseInClosedForm(flow.base)
        self.transform = flow.transform

    def forward(self, eps: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        mean, std = self.base.mean_and_std(eps, c)
        z, log_det = self.transform(mean + std * eps, c if self.transform.context else None)
        return z, self.base.log_prob(eps, std) - log_det


GRAPHS: dict[Direction, type[Graph]] = {"sample": _Sample, "log_prob": _LogProb, "decode": _Decode, "encode": _Encode}


def graph_of(module: Flow | VAE, direction: Direction | None = None, fold: bool = True) -> Graph:
    """Return the graph of one direction of a module, on a copy of the module.

    The solved direction is written as one pass per degree of the features, so it is limited to MAX_SOLVED degrees.

    Args:
        module: a flow or a VAE.
        direction: see `export`; default: the flow's one-pass direction, or "decode".
        fold: multiply masks into weights, and turn triangular systems into products.

    Raises:
        TypeError: the module is neither a flow nor a VAE.
        ValueError: an unknown direction, a solved one of more than MAX_SOLVED degrees, a mixture, or a base without a
            closed form.
    """
    if isinstance(module, FlowMixture):
        raise ValueError(f"expected one flow, got a mixture of {len(module.flows)}; fit the density with members=1")
    if not isinstance(module, Flow | VAE):
        raise TypeError(f"expected a Flow or a VAE, got {type(module).__name__}")
    if isinstance(module, VAE):
        known: tuple[Direction, ...] = ("decode", "encode")
        direction = direction or "decode"
    else:
        known = ("sample", "log_prob")
        direction = direction or ("sample" if module.transform.forward_cost == "one pass" else "log_prob")
    if direction not in known:
        raise ValueError(
            f"expected direction to be one of {', '.join(known)} for a {type(module).__name__}, got {direction!r}"
        )
    _check_size(module, direction)
    base = module.posterior.base if isinstance(module, VAE) else module.base
    if not isinstance(base, StandardNormal | DiagonalNormal | StudentT):
        raise ValueError(
            f"expected a base of StandardNormal, DiagonalNormal or StudentT, got {type(base).__name__}; for a table, "
            "fit the density with kernels=False"
        )
    module = copy.deepcopy(module)
    if fold:
        _fold(module)
    _replace(module, Autoregressive, _ByPasses)
    graph: Graph = GRAPHS[direction](module).eval()
    return graph


def _check_size(module: Flow | VAE, direction: Direction) -> None:
    """Raise ValueError if the direction is solved, and has too many degrees to be written as passes."""
    if direction == "decode":
        return
    transform = module.posterior.transform if isinstance(module, VAE) else module.transform
    cost = transform.inverse_cost if direction == "log_prob" else transform.forward_cost
    degrees = max((max(t.degrees) for t in transform.modules() if isinstance(t, Autoregressive)), default=1)
    if cost != "one pass" and degrees > MAX_SOLVED:
        raise ValueError(
            f"expected at most {MAX_SOLVED} features for a direction that is solved, got {degrees} and {direction!r}: "
            "its graph has one pass for each; distil a student that samples in one pass, cf.distill(flow), or export "
            "the other direction"
        )


class _ByPasses(Transform):
    """Autoregressive layer whose inverse is one pass per degree."""

    def __init__(self, layer: Autoregressive) -> None:
        super().__init__()
        self.layer = layer
        self.features, self.context = layer.features, layer.context

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.layer(x, c)

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.layer.inverse_by_passes(y, c)

    def config(self) -> dict[str, Any]:
        return self.layer.config()


def _fold(module: nn.Module) -> None:
    """Replace every masked layer by a plain one, and every system of equations by a product."""
    _replace(module, MaskedLinear, _Dense)
    _replace(module, Whiten, _WhitenByProduct)
    _replace(module, Linear, _LinearByProduct)
    _replace(module, LULinear, _LinearByProduct)


def _replace(module: nn.Module, kind: type[nn.Module], by: Callable[[Any], nn.Module]) -> None:
    """Replace every module of a kind inside a module."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, kind):
                parent.add_module(name, by(child))


class _Dense(nn.Linear):
    """`MaskedLinear` with its masks applied in advance."""

    def __init__(self, layer: MaskedLinear) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight = nn.Parameter(layer.masked_weight().detach())
        self.bias = layer.bias

    @property
    def graph_weight(self) -> Tensor:
        return self.weight


class _WhitenByProduct(Whiten):
    """`Whiten` with L^-1 computed in advance: ONNX cannot solve triangular systems."""

    inverted: Tensor

    def __init__(self, t: Whiten) -> None:
        super().__init__(t.mean, t.factor)
        one = torch.eye(t.features, dtype=torch.float64, device=t.factor.device)
        inverted = torch.linalg.solve_triangular(t.factor.double(), one, upper=False)
        self.register_buffer("inverted", inverted.to(t.factor))

    def _divide(self, v: Tensor, by: Tensor) -> Tensor:
        return v @ (self.inverted if by is self.factor else self.inverted.T)


class _LinearByProduct(Linear):
    """`Linear` or `LULinear` with W^-1 and log|det W| computed in advance: ONNX cannot solve systems of equations."""

    inverted: Tensor
    log_abs_det: Tensor

    def __init__(self, t: Linear | LULinear) -> None:
        super().__init__(t.bias, t.weight)
        weight = self.weight.double()
        self.register_buffer("inverted", torch.linalg.inv(weight).to(self.weight))
        self.register_buffer("log_abs_det", torch.linalg.slogdet(weight).logabsdet.to(self.weight))

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = prepare(self, y, c, "y")
        return (y - self.bias) @ self.inverted.T, -self._log_det(y)

    def _log_det(self, like: Tensor) -> Tensor:
        return self.log_abs_det.expand(like.shape[:-1])
