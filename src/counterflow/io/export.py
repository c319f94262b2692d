"""Out of Python: the one-pass direction of a flow, or a part of a VAE, to ONNX or to an archive of torch.export.

Both files hold one graph of plain tensor operations for any number of rows: no masks, since each weight is written
with its zeros, no solve, and no code of this library.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from counterflow.flows.bases import Base, DiagonalNormal, StandardNormal, StudentT
from counterflow.flows.flow import Flow
from counterflow.flows.mixture import FlowMixture
from counterflow.made.masked_linear import MaskedLinear
from counterflow.transforms.constant import Whiten
from counterflow.vae.vae import VAE

Direction = Literal["sample", "log_prob", "decode", "encode"]
OUTPUTS: dict[Direction, tuple[str, ...]] = {
    "sample": ("z", "log_q"),
    "log_prob": ("log_prob", "eps"),
    "decode": ("mean",),
    "encode": ("z", "log_q"),
}
Free = dict[str, dict[int, Any]] | None  # by input, the axes that may have any size
SUFFIXES = (".onnx", ".pt2")
EXAMPLE = 3  # rows of the input that the graph is recorded with, where any number of them is allowed


def export(module: Flow | VAE, path: str | Path, direction: Direction | None = None, batch: int | None = None) -> Path:
    """Write what a program without Python needs of a flow or a VAE to one file, whole or not at all.

    | direction | of | inputs | outputs |
    |---|---|---|---|
    | "sample" | a flow that samples in one pass, such as an IAF | eps, context | z, log_q |
    | "log_prob" | a flow that scores in one pass, such as a MAF | x, context | log_prob, eps |
    | "decode" | a VAE | z | mean, of p(x given z) |
    | "encode" | a VAE | x, eps | z, log_q: a draw of q(z given x) |

    eps (B, D) are draws of N(0, I), and of a Student t base those of its own; context (B, C) stands only where the
    flow takes one; log_q and log_prob (B,) are in nats. The ONNX file's metadata name the version, the sizes and the
    direction, as does counterflow.json in the archive.

    Args:
        module: its dtype and weights are those of the graph; it is not changed.
        path: ends in .onnx, or in .pt2 for `torch.export.load`.
        direction: the flow's one-pass direction, or "decode", when not given.
        batch: the number of rows B, the same at every call; any number when not given.

    Raises:
        TypeError: neither a flow nor a VAE.
        ValueError: another suffix, a direction of no such name or that is not one pass.
        ImportError: onnx or onnxscript is not installed, for .onnx.

    Example:
        >>> import torch, counterflow as cf, tempfile, os
        >>> flow = cf.IAF(features=3, layers=2, hidden=(16,), seed=0)
        >>> path = cf.export(flow, os.path.join(tempfile.mkdtemp(), "flow.pt2"))
        >>> z, log_q = torch.export.load(path).module()(torch.zeros(5, 3))
        >>> z.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"expected a path that ends in {' or '.join(SUFFIXES)}, got {path}")
    graph = graph_of(module, direction)
    rows = EXAMPLE if batch is None else batch
    if rows < 1:
        raise ValueError(f"expected batch of at least 1, got {batch}")
    inputs = graph.example(rows)
    free: Free = None if batch is not None else {name: {0: torch.export.Dim("batch")} for name in inputs}
    with torch.no_grad():
        program = torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=free, strict=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        write = _write_archive if path.suffix == ".pt2" else _write_onnx
        write(program, graph, temporary, free)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def largest_difference(
    module: Flow | VAE, path: str | Path, direction: Direction | None = None, rows: int = 64
) -> float:
    """Run an exported file on random rows beside the module: max |a - b| / (1 + max |b|), the worst of its outputs.

    ONNX files are run by ONNX Runtime, on the CPU.

    Raises:
        ImportError: onnxruntime is not installed, for .onnx.
        ValueError: it lacks an operator in this dtype; in float64 those of splines and of some activations.
    """
    graph = graph_of(module, direction, fold=False)
    inputs = graph.example(rows)
    with torch.no_grad():
        expected = graph(**inputs)
    run = _run_archive if Path(path).suffix == ".pt2" else _run_onnx
    pairs = zip(run(Path(path), inputs), expected, strict=True)
    return max(((a - b).abs().max() / (1 + b.abs().max())).item() for a, b in pairs)


# -- graphs: one method from tensors to tensors ------------------------------------------------------


class _Graph(nn.Module):
    """What is exported: keyword tensors in, a tuple of tensors out."""

    direction: Direction
    sizes: dict[str, tuple[int, ...]]  # of a row of each input

    def example(self, rows: int) -> dict[str, Tensor]:
        """Random rows for each input."""
        like = next(self.parameters())
        return {name: torch.randn(rows, *size).to(like) for name, size in self.sizes.items()}

    def metadata(self) -> dict[str, str]:
        """What the file says of itself, beside the names of inputs and outputs."""
        from counterflow import __version__

        return {
            "counterflow": __version__,
            "direction": self.direction,
            "inputs": json.dumps({name: list(size) for name, size in self.sizes.items()}),
            "outputs": json.dumps(OUTPUTS[self.direction]),
        }


class _Sample(_Graph):
    direction: Direction = "sample"

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.draw, self.sizes = _Draw(flow), _sizes(flow, "eps")

    def forward(self, eps: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.draw(eps, context)


class _LogProb(_Graph):
    direction: Direction = "log_prob"

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.start, self.transform, self.sizes = _Start(flow.base), flow.transform, _sizes(flow, "x")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        place, log_det = self.transform.inverse(x, context if self.transform.context else None)
        mean, std = self.start.place(place, context)
        eps = (place - mean) / std
        return self.start.log_prob(eps, std) + log_det, eps


class _Decode(_Graph):
    direction: Direction = "decode"

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.decoder, self.likelihood, self.sizes = vae.decoder, vae.likelihood, {"z": (vae.latent,)}

    def forward(self, z: Tensor) -> tuple[Tensor]:
        return (self.likelihood(self.decoder(z)).mean,)


class _Encode(_Graph):
    direction: Direction = "encode"

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.encoder, self.likelihood, self.draw = vae.encoder, vae.likelihood, _Draw(vae.posterior)
        self.sizes = {"x": vae.data_shape, "eps": (vae.latent,)}

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        return self.draw(eps, self.encoder(self.likelihood.center(x)))


def _sizes(flow: Flow, name: str) -> dict[str, tuple[int, ...]]:
    return {name: (flow.features,), **({"context": (flow.context,)} if flow.context else {})}


class _Start(nn.Module):
    """A base in closed form: N(mean, std^2), which eps from N(0, 1) reaches as mean + std eps, or Student t's."""

    df: Tensor
    constant: Tensor

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base, self.tails = base, isinstance(base, StudentT)
        if isinstance(base, StudentT):
            df = base.df.detach()
            constant = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - (df * math.pi).log() / 2
            self.register_buffer("df", df)
            self.register_buffer("constant", constant)  # here, because ONNX has no lgamma

    def place(self, like: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and std (B, D)."""
        if not isinstance(self.base, DiagonalNormal):
            return torch.zeros_like(like), torch.ones_like(like)
        normal: Any = self.base(c if self.base.context else None)
        return normal.base_dist.loc.expand_as(like), normal.base_dist.scale.expand_as(like)

    def log_prob(self, eps: Tensor, std: Tensor) -> Tensor:
        """(B,), of the point mean + std eps."""
        if self.tails:
            return (self.constant - (self.df + 1) / 2 * torch.log1p(eps * eps / self.df)).sum(-1)
        return (-(eps * eps + math.log(2 * math.pi)) / 2 - std.log()).sum(-1)


class _Draw(nn.Module):
    """One run from eps to z, and log q(z)."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.start, self.transform = _Start(flow.base), flow.transform

    def forward(self, eps: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        mean, std = self.start.place(eps, c)
        z, log_det = self.transform(mean + std * eps, c if self.transform.context else None)
        return z, self.start.log_prob(eps, std) - log_det


def graph_of(module: Flow | VAE, direction: Direction | None = None, fold: bool = True) -> _Graph:
    """The module's graph of that direction, on a copy; see `export`. With `fold`, its weights hold their zeros."""
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
            f"expected direction as one of {', '.join(known)} for a {type(module).__name__}, got {direction!r}"
        )
    _check_one_pass(module, direction)
    base = module.posterior.base if isinstance(module, VAE) else module.base
    if not isinstance(base, StandardNormal | DiagonalNormal | StudentT):
        raise ValueError(
            f"expected a base of StandardNormal, DiagonalNormal or StudentT, got {type(base).__name__}; of a table, "
            "fit the density with kernels=False"
        )
    module = copy.deepcopy(module)
    if fold:
        _fold(module)
    made = {"sample": _Sample, "log_prob": _LogProb, "decode": _Decode, "encode": _Encode}[direction]
    return cast(_Graph, made(module).eval())


def _check_one_pass(module: Flow | VAE, direction: Direction) -> None:
    if direction == "decode":
        return
    transform = module.posterior.transform if isinstance(module, VAE) else module.transform
    cost, other = transform.forward_cost, transform.inverse_cost
    if direction == "log_prob":
        cost, other = other, cost
    if cost == "one pass":
        return
    if other != "one pass":
        advice = "neither direction is; distil a student that samples in one pass first: cf.distill(flow)"
    elif direction == "log_prob":
        advice = "direction='sample' is one pass"
    else:
        advice = "direction='log_prob' is one pass; to sample, distil a student first: cf.distill(flow)"
    raise ValueError(
        f"expected a direction of one pass, got {direction!r}, which is solved step by step and has no graph; {advice}"
    )


def _fold(module: nn.Module) -> None:
    """Make every masked layer a plain one, and every triangular system a product."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, MaskedLinear):
                parent.add_module(name, _plain(child))
            elif isinstance(child, Whiten):
                parent.add_module(name, _Inverted(child))


def _plain(layer: MaskedLinear) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
    plain.weight, plain.bias = nn.Parameter(layer.masked_weight().detach()), layer.bias
    return plain


class _Inverted(Whiten):
    """A `Whiten` with L^-1 at hand, for ONNX solves no systems."""

    inverted: Tensor

    def __init__(self, t: Whiten) -> None:
        super().__init__(t.mean, t.factor)
        one = torch.eye(t.features, dtype=torch.float64, device=t.factor.device)
        inverted = torch.linalg.solve_triangular(t.factor.double(), one, upper=False)
        self.register_buffer("inverted", inverted.to(t.factor))

    def _divide(self, v: Tensor, by: Tensor) -> Tensor:
        return v @ (self.inverted if by is self.factor else self.inverted.T)


# -- files -------------------------------------------------------------------------------------------


def _write_archive(program: torch.export.ExportedProgram, graph: _Graph, path: Path, free: Free) -> None:
    torch.export.save(program, path, extra_files={"counterflow.json": json.dumps(graph.metadata())})


def _write_onnx(program: torch.export.ExportedProgram, graph: _Graph, path: Path, free: Free) -> None:
    for package in ("onnx", "onnxscript"):
        _import(package)
    try:
        with _quiet():
            written = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                input_names=list(graph.sizes),
                output_names=OUTPUTS[graph.direction],
                dynamic_shapes=free,  # for the name of the axis
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"expected operators that ONNX has, got: {cause}; export to .pt2, which has all") from error
    if written is None:
        raise RuntimeError("expected an ONNX program from torch.onnx.export, got None")
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()  # where in this machine's files each comes from: half of a small file
    written.model.metadata_props.update(graph.metadata())
    written.save(path)


def _run_archive(path: Path, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = torch.export.load(path).module()(*inputs.values())
    return found


def _run_onnx(path: Path, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    runtime = _import("onnxruntime")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except runtime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise ValueError(
            f"expected operators that ONNX Runtime knows in this dtype, got {error}; export a flow in float32"
        ) from error
    found = session.run(None, {name: value.cpu().numpy() for name, value in inputs.items()})
    return tuple(torch.from_numpy(value) for value in found)


def _import(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise ImportError(f"expected {package}, for ONNX files; pip install 'counterflow[export]'") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of packages that this library has no use for, and of torch's own changes."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = registration.level
    registration.setLevel(logging.ERROR)  # of every operator of torchvision, that it is not installed
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", ".*The axis name: .* will not be used", UserWarning)  # both are one
            yield
    finally:
        registration.setLevel(before)
