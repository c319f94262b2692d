"""Check and time both directions on one GPU, in at most six minutes.

    python benchmarks/gpu.py

The parts, in order; a part that does not fit into the time that is left is named as missing:

    checks      `pytest -m cuda`: every body against `reference`, the same bits in repeated runs, commands
    accuracy    the largest error of every body in float32 against `reference` in float64, values and gradients
    times       one affine layer: one pass, solve, and both with gradients, ours and other libraries
    splines     one spline layer in one pass, with gradients, ours and zuko
    fits        rows per second of training a MAF and an NSF, float32 and bf16 autocast

Times are the median of repeated calls between events of the device, after two calls for compilation and captures.
nflows, zuko, normflows and pyro-ppl take part where they are installed. Without a GPU, `--device cpu --quick` runs the
script itself, with small sizes; TRITON_INTERPRET=1 includes the kernels. Written to results/gpu.md, with --quick to
the standard output alone.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import counterflow as cf
from counterflow.commands.bench.peers import PEERS
from counterflow.engine import gpu, sliced
from counterflow.univariate.base import Univariate

BUDGET = 345.0  # seconds of all parts
SIZES = ((8, 64), (64, 512), (784, 1024))
ROWS = (16, 256, 4096)
MAPS: dict[str, Univariate] = {
    "affine": cf.Affine(),
    "gated": cf.Gated(),
    "spline": cf.RationalQuadraticSpline(8),
    "sinh-arcsinh": cf.transforms.SinhArcsinh(),
}
BODIES = ("sliced by degree", "sliced", "graph", "kernel")


class Clock:
    """Time that is left, and calls timed on a device."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device = device
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def milliseconds(self, call: Callable[[], Any], most: float = 2.0) -> float:
        """Return the median time of a call, or NaN if two calls take longer than `most` seconds."""
        started = time.monotonic()
        for _ in range(2):
            call()
            self._wait()
            if time.monotonic() - started > most:
                return float("nan")
        once = (time.monotonic() - started) / 2
        return statistics.median(self._time(call) for _ in range(max(3, min(30, int(most / 2 / max(once, 1e-4))))))

    def _time(self, call: Callable[[], Any]) -> float:
        if self.device == "cpu":
            started = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - started)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        self._wait()
        return float(first.elapsed_time(last))

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


class choose:
    """Make layers use one of BODIES while it is entered."""

    def __init__(self, body: str, *layers: cf.Autoregressive) -> None:
        self.body = body
        self.layers = layers
        self.kept: list[Any] = []

    def __enter__(self) -> None:
        self.kept = [sliced.Block.can_iterate, gpu.has_kernels]
        if self.body == "sliced by degree":
            sliced.Block.can_iterate = lambda self, like: False  # type: ignore[method-assign]
        if self.body == "graph":
            gpu.has_kernels = lambda layout, dtype: False  # type: ignore[assignment]
        for layer in self.layers:
            layer.solver = "sliced" if self.body.startswith("sliced") else "gpu"

    def __exit__(self, *error: object) -> None:
        sliced.Block.can_iterate, gpu.has_kernels = self.kept  # type: ignore[method-assign]


def bodies(layer: cf.Autoregressive, device: str) -> Iterator[str]:
    """Yield the bodies that run this layer in float32."""
    yield from BODIES[:2]
    if gpu.runs_on(torch.device(device)):
        yield "graph"
        if gpu.has_kernels(layer._layout, torch.float32):
            yield "kernel"


def shaken(layer: cf.Autoregressive) -> cf.Autoregressive:
    """Draw new weights, far from the initial ones."""
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.8 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.3)
    return layer


def with_gradients(run: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, module: torch.nn.Module) -> None:
    """Compute value and log_det, and the gradients of their sum."""
    leaf = x.detach().requires_grad_()
    value, log_det = run(leaf)
    torch.autograd.grad(value.sum() + log_det.sum(), [leaf, *module.parameters()])


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the lines of a table."""
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    lines += [" | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row) for row in rows]
    return [f"| {line} |" for line in lines]


def checks(clock: Clock, quick: bool) -> list[str]:
    """Run the tests of the marker cuda."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "cuda", "tests/engine"]
    limit = max(10.0, min(clock.left, 120.0))
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=Path(__file__).parents[1])
    except subprocess.TimeoutExpired:
        return [f"`pytest -m cuda` did not end within {limit:.0f} s."]
    tail = ran.stdout.strip().splitlines()[-1] if ran.stdout.strip() else ran.stderr.strip()
    failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return [f"`pytest -m cuda`: {tail}", *(f"* {line}" for line in failed)]


def accuracy(clock: Clock, quick: bool) -> list[str]:
    """Compare every body in float32 with `reference` in float64."""
    rows: list[list[object]] = []
    D, H, N = (5, 9, 7) if quick else (64, 512, 257)
    for name, univariate in MAPS.items():
        layer = shaken(cf.Autoregressive(D, 2, (H, H), univariate, activation="tanh")).to(clock.device)
        exact = deepcopy(layer).double()
        exact.solver = "sliced"  # in float64, which the tests compare with reference
        y = torch.randn(N, D, device=clock.device)
        c = torch.randn(N, 2, device=clock.device)
        expected = _results(exact, y.double(), c.double())
        for body in bodies(layer, clock.device):
            with choose(body, layer):
                for _ in range(3):  # a graph is captured in the second run
                    came = _results(layer, y, c)
            errors = [float((a - e).abs().max() / (1 + e.abs().max())) for a, e in zip(came, expected, strict=True)]
            rows.append([name, body, errors[0], errors[1], max(errors[2:])])
    return table(["map", "body", "x", "log_det", "gradients"], rows)


def _results(layer: cf.Autoregressive, y: Tensor, c: Tensor) -> list[Tensor]:
    leaf = y.detach().requires_grad_()
    x, log_det = layer.inverse(leaf, c)
    loss = (x * x.detach().cos()).sum() + (log_det * log_det.detach().sin()).sum()
    return [x.detach(), log_det.detach(), *torch.autograd.grad(loss, [leaf, *layer.parameters()])]


def times(clock: Clock, quick: bool) -> list[str]:
    """Time one affine layer in each body and library."""
    rows: list[list[object]] = []
    for D, H in ((3, 8),) if quick else SIZES:
        for N in (5,) if quick else ROWS:
            if clock.left < 60 and not quick:
                return [*table(HEADER, rows), "", f"No time was left from {D}/{H}/{N} on."]
            x = torch.randn(N, D, device=clock.device)
            layer = cf.Autoregressive(D, hidden=(H, H)).to(clock.device)
            for body in bodies(layer, clock.device):
                with choose(body, layer):
                    rows.append([f"{D}/{H}/{N}", body, *_row(clock, layer, layer.forward, layer.inverse, x)])
            for name in ("zuko", "nflows", "normflows", "pyro"):
                if PEERS[name].installed:
                    try:
                        flow = PEERS[name].build(D, H, 1)
                        flow.module.to(clock.device)
                        rows.append(
                            [f"{D}/{H}/{N}", name, *_row(clock, flow.module, flow.parallel, flow.sequential, x)]
                        )
                    except Exception as error:  # of another library
                        rows.append([f"{D}/{H}/{N}", name, f"{type(error).__name__}: {error}"[:80], "", "", ""])
    return table(HEADER, rows)


HEADER = ("D/H/B", "body or library", "one pass", "with gradients", "solve", "with gradients")


def _row(clock: Clock, module: torch.nn.Module, forward: Any, inverse: Any, x: Tensor) -> list[float]:
    with torch.no_grad():
        found = [clock.milliseconds(lambda: forward(x)), 0.0, clock.milliseconds(lambda: inverse(x)), 0.0]
    found[1] = clock.milliseconds(lambda: with_gradients(forward, x, module))
    found[3] = clock.milliseconds(lambda: with_gradients(inverse, x, module))
    return found


def splines(clock: Clock, quick: bool) -> list[str]:
    """Time a spline layer in one pass with gradients."""
    rows: list[list[object]] = []
    for D, H, N in ((3, 8, 5),) if quick else ((8, 64, 256), (64, 512, 256), (64, 512, 4096)):
        x = torch.randn(N, D, device=clock.device)
        layer = cf.Autoregressive(D, hidden=(H, H), univariate=MAPS["spline"]).to(clock.device)
        for body in ("sliced", *(["kernel"] if gpu.runs_on(torch.device(clock.device)) else [])):
            with choose(body, layer):
                rows.append([f"{D}/{H}/{N}", body, clock.milliseconds(partial(with_gradients, layer, x, layer))])
        if PEERS["zuko"].installed:
            from zuko.flows import NSF

            lazy = NSF(D, bins=8, transforms=1, hidden_features=(H, H)).transform.to(clock.device)
            run = partial(_call, lazy)
            rows.append([f"{D}/{H}/{N}", "zuko", clock.milliseconds(partial(with_gradients, run, x, lazy))])
    return table(["D/H/B", "body or library", "one pass with gradients"], rows)


def _call(lazy: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Build the transform of a zuko flow and call it, as its distributions do."""
    return lazy().call_and_ladj(x)


def fits(clock: Clock, quick: bool) -> list[str]:
    """Time the training of a MAF and an NSF."""
    rows: list[list[object]] = []
    D, H, N = (3, 8, 512) if quick else (64, 256, 20_000)
    data = torch.randn(N, D)
    for name, build in (("MAF", cf.MAF), ("NSF", cf.NSF)):
        for precision in ("float32", "bf16"):
            if clock.left < 15 and not quick:
                return [*table(["flow", "precision", "rows per second"], rows), "", "No time was left for the rest."]
            flow = build(D, layers=2 if quick else 5, hidden=(H, H))
            config = cf.FitConfig(epochs=2, batch_size=256, device=clock.device, precision=precision)
            history = cf.fit(flow, cf.log_likelihood, data, data[:100], config)
            rows.append([name, precision, round(history.epochs[-1].rows_per_second)])
    return table(["flow", "precision", "rows per second"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes; results are not written")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("expected a GPU with CUDA, got none; --device cpu --quick runs the script itself")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    clock = Clock(options.device, BUDGET)
    name = platform.processor() if options.device == "cpu" else torch.cuda.get_device_name()
    lines = [
        "# Both directions on a GPU",
        "",
        f"Made by `python benchmarks/gpu.py` on {name}, torch {torch.__version__}, Python {platform.python_version()}.",
        "Milliseconds; NaN where two calls took longer than two seconds. Products are in float32 (no TF32).",
    ]
    for part in (checks, accuracy, times, splines, fits):
        started = time.monotonic()
        try:
            found = part(clock, options.quick)
        except Exception as error:  # the parts after it still run
            found = [f"{type(error).__name__}: {error}"]
        lines += ["", f"## {part.__name__}", "", *found, "", f"({time.monotonic() - started:.0f} s)"]
        print("\n".join(lines[-len(found) - 5 :]), flush=True)
        if not options.quick:
            Path(__file__).with_name("results").joinpath("gpu.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
