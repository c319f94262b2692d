"""How exactly does float32 come back? Five affine layers, D = 64, two hidden layers of 512, there and back again.

    pip install -c constraints.txt -e ".[bench]" && python benchmarks/round_trip.py

Each library's masked autoregressive flow is built as its users build it, with the order reversed between layers, and is
tried as initialised and with every parameter multiplied by 3. x ~ N(0, I) goes through the one-pass direction to y, the
solved direction brings it back, and the error is max |x - x'| over 256 rows. Counterflow's last layers start at 3e-4 of
the others' size, which makes its map tame; it is also tried with torch's initial weights in every layer, which are what
the other libraries start from. The spread of y and the largest |log det| say how wild a map is. Written to
results/round_trip.md.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import counterflow as cf

D, H, LAYERS, B = 64, 512, 5, 256
Pair = tuple[nn.Module, Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[Tensor], Tensor]]


def counterflow(own_weights: bool, solver: str = "auto") -> Pair:
    transform = cf.MAF(features=D, layers=LAYERS, hidden=(H, H)).transform.transform
    for layer in transform:
        if isinstance(layer, cf.Autoregressive):
            layer.solver = solver
            if not own_weights:
                for linear in layer.made.layers:
                    linear.reset_parameters()
    return transform, transform, lambda y: transform.inverse(y)[0]


def nflows() -> Pair:
    from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, ReversePermutation

    parts: list[nn.Module] = []
    for _ in range(LAYERS):
        parts += [
            MaskedAffineAutoregressiveTransform(D, H, num_blocks=2, use_residual_blocks=False),
            ReversePermutation(D),
        ]
    flow = CompositeTransform(parts)
    return flow, flow, lambda y: flow.inverse(y)[0]


def zuko() -> Pair:
    import zuko as library

    flow = library.flows.MAF(D, transforms=LAYERS, hidden_features=(H, H))
    transform = lambda: flow().transform  # noqa: E731  # built anew, since it holds the weights of its moment
    return flow, lambda x: transform().call_and_ladj(x), lambda y: transform().inv(y)


def normflows() -> Pair:
    from normflows.flows import MaskedAffineAutoregressive, Permute

    layers = nn.ModuleList()
    for _ in range(LAYERS):
        layers += [MaskedAffineAutoregressive(D, H, num_blocks=2, use_residual_blocks=False), Permute(D, mode="swap")]

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x))
        for layer in reversed(layers):
            x, log_det = layer.inverse(x)
            total = total + log_det
        return x, total

    def back(y: Tensor) -> Tensor:
        for layer in layers:
            y = layer.forward(y)[0]
        return y

    first = layers[0]
    probe = torch.randn(2, D)
    if (first.forward(first.inverse(probe)[0])[0] - probe).abs().max() > 1e-2:
        raise RuntimeError("expected normflows' layer to undo itself")
    return layers, forward, back


def pyro() -> Pair:
    from pyro.distributions.transforms import affine_autoregressive

    layers = nn.ModuleList(affine_autoregressive(D, hidden_dims=[H, H]) for _ in range(LAYERS))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x))
        for layer in layers:
            y = layer._call(x)
            total = total + layer.log_abs_det_jacobian(x, y)
            x = y.flip(-1)
        return x, total

    def back(y: Tensor) -> Tensor:
        for layer in reversed(layers):
            y = layer._inverse(y.flip(-1))
        return y

    return layers, forward, back


SIDES: dict[str, Callable[[], Pair]] = {
    "Counterflow": lambda: counterflow(own_weights=True),
    "Counterflow, torch's weights": lambda: counterflow(own_weights=False),
    "Counterflow, torch's weights, D passes": lambda: counterflow(own_weights=False, solver="reference"),
    "nflows": nflows,
    "normflows": normflows,
    "zuko": zuko,
    "Pyro": pyro,
}


@torch.no_grad()
def measure(build: Callable[[], Pair], factor: float) -> tuple[float, float, float]:
    """Error, spread of y, largest log det."""
    torch.manual_seed(0)
    module, forward, back = build()
    for parameter in module.parameters():
        parameter *= factor
    module.eval()
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    y, log_det = forward(x)
    return (back(y) - x).abs().max().item(), y.std().item(), log_det.abs().max().item()


def main() -> None:
    lines = [
        "# Round trip in float32",
        "",
        f"Made by `python benchmarks/round_trip.py` ({platform.machine()}, torch {torch.__version__}): {LAYERS} affine "
        f"layers, D = {D}, hidden ({H}, {H}), {B} rows; the largest error of a coordinate.",
        "",
        "| | as initialised | std of y | max abs log det | weights x 3 | std of y | max abs log det |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, build in SIDES.items():
        cells = [f"{v:.1e}" if k == 0 else f"{v:.3g}" for f in (1.0, 3.0) for k, v in enumerate(measure(build, f))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    path = Path(__file__).parent / "results" / "round_trip.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
