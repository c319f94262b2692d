"""What does each direction cost? One affine layer: the one-pass direction, the solved one, and the solve in D passes.

    python benchmarks/directions.py

float32, two hidden layers of H, B rows; forward alone, and forward plus backward (for y, and every weight). The
one-pass direction and the solve with solver="auto" run interleaved and their medians are compared, with solver="sliced"
beside them; D passes (solver="reference", as autoregressive flows are commonly inverted) run once, where that is a
matter of seconds. Written to results/directions.md, or with OMP_WAIT_POLICY=passive, which keeps torch's idle OpenMP
workers from spinning on the cores that the solver's threads could use, to results/directions_passive.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import counterflow as cf

SIZES = [(8, 64, 256), (64, 512, 256), (64, 512, 1024), (256, 1024, 256), (784, 1024, 100), (784, 2048, 256)]


def timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(D: int, H: int, B: int, rounds: int) -> list[float]:
    """Milliseconds of: one pass, solve, the same two with backward, sliced, D passes (nan where it takes too long)."""
    torch.manual_seed(0)
    t = cf.Autoregressive(features=D, hidden=(H, H))
    x = torch.randn(B, D)
    y = t(x)[0].detach()
    leaf = y.clone().requires_grad_()

    def forward(v: torch.Tensor, solved: bool, solver: str = "auto") -> None:
        t.solver = solver
        with torch.no_grad():
            (t.inverse if solved else t)(v)

    def backward(v: torch.Tensor, solved: bool) -> None:
        t.solver = "auto"
        value, log_det = (t.inverse if solved else t)(v)
        (value.square().sum() + log_det.sum()).backward()

    calls = [
        lambda: forward(x, False),
        lambda: forward(y, True),
        lambda: backward(leaf, False),
        lambda: backward(leaf, True),
        lambda: forward(y, True, "sliced"),
    ]
    seconds: list[list[float]] = [[] for _ in calls]
    for k in range(rounds + 2):
        for call, column in zip(calls, seconds, strict=True):
            value = timed(call)
            if k >= 2:
                column.append(value)
    milliseconds = [1e3 * statistics.median(column) for column in seconds]
    slow = 1e3 * timed(lambda: forward(y, True, "reference")) if milliseconds[0] * D < 15_000 else float("nan")
    return [*milliseconds, slow]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    lines = [
        "# Both directions of one affine layer",
        "",
        f"Made by `{'OMP_WAIT_POLICY=passive ' * passive}python benchmarks/directions.py --rounds {args.rounds} "
        f"--threads {args.threads}` ({platform.machine()}, torch {torch.__version__}); float32, medians in ms.",
        "",
        "| D, H, B | one pass | solve | ratio | pass + backward | solve + backward | ratio | sliced | D passes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for D, H, B in SIZES:
        one, solve, one_back, solve_back, sliced, slow = measure(D, H, B, args.rounds)
        lines.append(
            f"| {D}, {H}, {B} | {one:.2f} | {solve:.2f} | {solve / one:.2f} | {one_back:.2f} | {solve_back:.2f} "
            f"| {solve_back / one_back:.2f} | {sliced:.2f} | {slow:,.0f} |"
        )
        print(lines[-1], flush=True)
    path = Path(__file__).parent / "results" / f"directions{'_passive' * passive}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
