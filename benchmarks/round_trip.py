"""Round-trip error in float32: affine layers, D = 64, two hidden layers of 512.

    pip install -c constraints.txt -e ".[bench]" && python benchmarks/round_trip.py

Each library's masked autoregressive flow is built as for `counterflow bench`: two hidden layers, and another order of
the features after each layer. It has 5 or 20 layers, with its initial parameters or with every parameter multiplied by
3. x ~ N(0, I) is mapped to y by the one-pass direction and back by the solved direction; the error is max |x - x'| over
256 rows. The largest |y| and |log det| show how far the map is from the identity.

Counterflow's last layers start at 3e-4 of the others' size, so that its map starts near the identity. It is therefore
also measured with torch's initial weights in every layer, as in the other libraries, by the solve and by the D passes
that define it. The second table uses these weights to find where float32 fails, and how far float64, fewer layers and
maps with other bounds go. Results go to results/round_trip.md.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from reliability import machine, write_section

import counterflow as cf
from counterflow.commands.bench import peers
from counterflow.commands.bench.peers import TorchFlow

D, H, B = 64, 512, 256
DEPTHS, FACTORS = (5, 20), (1.0, 3.0)
MORE_FACTORS = (1.0, 1.5, 2.0, 2.5, 3.0)  # for the second table


def counterflow(
    layers: int, univariate: cf.transforms.Univariate, own_weights: bool = True, solver: str = "auto"
) -> TorchFlow:
    flow = peers.counterflow(D, H, layers, univariate)
    for layer in flow.module.modules():
        if isinstance(layer, cf.Autoregressive):
            layer.solver = solver
            if not own_weights:
                for linear in layer.made.layers:
                    linear.reset_parameters()
    return flow


SIDES: dict[str, Callable[[int], TorchFlow]] = {
    "Counterflow": lambda layers: counterflow(layers, cf.Affine()),
    "Counterflow, torch's weights": lambda layers: counterflow(layers, cf.Affine(), False),
    "Counterflow, torch's weights, D passes": lambda layers: counterflow(layers, cf.Affine(), False, "reference"),
    "nflows": lambda layers: peers.nflows(D, H, layers),
    "normflows": lambda layers: peers.normflows(D, H, layers),
    "zuko": lambda layers: peers.zuko(D, H, layers),
    "Pyro": lambda layers: peers.pyro(D, H, layers),
}
MAPS = {
    "Affine()": cf.Affine(),
    "Affine(bound=1.0)": cf.Affine(1.0),
    "Gated()": cf.Gated(),
    "RationalQuadraticSpline()": cf.RationalQuadraticSpline(),
}


@torch.no_grad()
def measure(
    build: Callable[[], TorchFlow], factor: float, dtype: torch.dtype = torch.float32
) -> tuple[float, float, float]:
    """Return the error, the largest |y| and the largest |log det|."""
    torch.manual_seed(0)
    flow = build()
    flow.module.to(dtype).eval()
    for parameter in flow.module.parameters():
        parameter *= factor
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, log_det = flow.parallel(x)
    back = flow.sequential(y)[0]
    error = (back - x).abs().nan_to_num(nan=math.inf).max()
    return error.item(), y.abs().max().item(), log_det.abs().max().item()


def compare_libraries() -> list[str]:
    """Return the lines of the first table."""
    settings = [(layers, factor) for layers in DEPTHS for factor in FACTORS]
    heads = [f"{layers} layers" + (f", weights x {factor:g}" if factor > 1 else "") for layers, factor in settings]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(settings)]
    for name, build in SIDES.items():
        cells = []
        for layers, factor in settings:
            error, y, log_det = measure(partial(build, layers), factor)
            cells.append(f"{error:.1e} ({y:.1e}, {log_det:.3g})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def find_the_limits() -> list[str]:
    """Return the lines of the second table."""
    heads = [f"weights x {factor:g}" for factor in MORE_FACTORS]
    lines = ["| | layers | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(MORE_FACTORS)]
    for name, univariate in MAPS.items():
        for dtype in (torch.float32, torch.float64):
            for layers in DEPTHS:
                build = partial(counterflow, layers, univariate, own_weights=False)
                cells = [f"{measure(build, factor, dtype)[0]:.0e}" for factor in MORE_FACTORS]
                lines.append(f"| {name}, {str(dtype)[6:]} | {layers} | " + " | ".join(cells) + " |")
                print(lines[-1], flush=True)
    return lines


def summary(table: list[str]) -> list[str]:
    """Return the section for the page on reliability: the head and the first two rows of the first table."""
    return [
        f"Made by `python benchmarks/round_trip.py` ({machine()}): affine layers, D = {D}, hidden ({H}, {H}), {B} rows "
        "x ~ N(0, I); the largest |x - x'| after one pass and the solve back, in brackets the largest |y| and the "
        "largest |log det|.",
        "",
        *table[:4],
        "",
        "With the initial weights of this library, multiplied by 3, twenty layers stay far below 1e-3. With torch's "
        "initial weights, multiplied by 3, float32 is not enough: five layers reach |log det| 65, twenty values "
        'of 1e20. `docs/flows.md`, "Where float32 ends", has the limits by map, dtype and depth, how to recognise a '
        "flow beyond them, and what to do; `results/round_trip.md` has all rows, and other libraries.",
    ]


def main() -> None:
    table = compare_libraries()
    lines = [
        "# Round trip in float32",
        "",
        f"Made by `python benchmarks/round_trip.py` ({platform.machine()}, torch {torch.__version__}): affine layers, "
        f"D = {D}, hidden ({H}, {H}), {B} rows; the largest error of a coordinate, in brackets the largest |y| and the "
        "largest |log det|. An error of inf is a NaN or an overflow.",
        "",
        *table,
        "",
        "Counterflow with torch's initial weights in every layer, multiplied: the error by map, dtype and depth.",
        "",
        *find_the_limits(),
    ]
    path = Path(__file__).parent / "results" / "round_trip.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    write_section("Round trip in float32", summary(table))


if __name__ == "__main__":
    main()
