"""Time of one masked linear layer: as a dense product, and in steps that leave out the zeros.

    OMP_NUM_THREADS=1 python benchmarks/staircase.py

float32. The first layer of a network (H rows, D columns), a hidden one (H, H) and the last (2 D, H), with B rows of
input: forward, and forward plus backward with respect to input, weight and bias. All variants run repeatedly in random
order; the minimum of each is reported as a fraction of the dense product that multiplies by its mask at each call.

    once    dense product with a weight that was masked beforehand; its gradient is masked in place
    k       k steps of equal height
    cut     the steps that `counterflow.made.staircase.cut` chooses, and their number; empty if it chooses the dense
            product

With one thread the CPU time is measured, which other programs on the machine disturb less. Results go to
results/staircase.md, or with several threads to results/staircase_THREADS.md.
"""

from __future__ import annotations

import argparse
import platform
import random
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from counterflow.made.network import MADE
from counterflow.made.staircase import LINE, Staircase, Step, linear, step

FEATURES = (784, 64, 8)
HIDDEN = (64, 128, 256, 512, 1024, 2048)
ROWS = (64, 256, 1024)
STEPS = (2, 3, 4, 6, 8)


class _Once(torch.autograd.Function):
    """Dense product with a masked weight; its gradient is masked in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        return y_bar @ weight, (y_bar.T @ x).mul_(mask), y_bar.sum(0), None


def equal(mask: Tensor, count: int) -> list[Step]:
    """Return steps of equal height, rounded to cache lines."""
    rows, columns = mask.shape
    borders = sorted({rows * k // count // LINE * LINE for k in range(count)} | {rows})
    reach = mask.sum(1).tolist()
    return [step(reach, columns, first, last) for first, last in pairwise(borders)]


def variants(mask: Tensor) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    numbers, chosen = mask.float(), Staircase(mask)
    cuts = {str(k): Staircase(mask, equal(mask, k)) for k in STEPS if len(mask) >= LINE * k}
    if chosen.steps:
        cuts[f"cut {len(chosen.steps)}"] = chosen
    return {
        "dense": lambda x, weight, bias: F.linear(x, weight * numbers, bias),
        "once": lambda x, weight, bias: _Once.apply(x, weight, bias, numbers),
        **{name: partial(linear, staircase=staircase) for name, staircase in cuts.items()},
    }


def measure(mask: Tensor, B: int, seconds: float, clock: Callable[[], float]) -> dict[str, tuple[float, float]]:
    """Return for each variant the minimal seconds of forward, and of forward plus backward."""
    out, columns = mask.shape
    leaves = [torch.randn(B, columns), torch.randn(out, columns) * mask, torch.randn(out)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y_bar = torch.randn(B, out)
    calls = variants(mask)
    best = dict.fromkeys(calls, (float("inf"), float("inf")))
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        rounds += 1
        for name, call in random.sample(list(calls.items()), len(calls)):
            begun = clock()
            y = call(*leaves)
            between = clock()
            torch.autograd.grad(y, leaves, y_bar)
            took = between - begun, clock() - begun
            best[name] = min(best[name][0], took[0]), min(best[name][1], took[1])
    return best


def line(label: str, best: dict[str, tuple[float, float]]) -> str:
    dense = best["dense"]
    parts = {name: f"{times[0] / dense[0]:.2f}, {times[1] / dense[1]:.2f}" for name, times in best.items()}
    cut = [f"{cell} ({name.split()[1]})" for name, cell in parts.items() if name.startswith("cut")] or [""]
    cells = [parts.get(name, "") for name in ("once", *map(str, STEPS))] + cut
    return f"| {label} | {1e3 * dense[0]:.2f}, {1e3 * dense[1]:.2f} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.5, help="seconds of measurement for each line")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    lines = [
        f"# Steps against the dense product, threads: {args.threads}",
        "",
        f"Made by `python benchmarks/staircase.py --threads {args.threads}` ({platform.machine()}, "
        f"torch {torch.__version__}); float32. Forward, forward + backward: milliseconds of the dense product, then "
        "fractions of them.",
        "",
        "| out, in; B | dense, ms | once | " + " | ".join(f"{k} steps" for k in STEPS) + " | cut |",
        "|---|" + "---|" * (len(STEPS) + 3),
    ]
    seen = set()
    for H in HIDDEN:
        for D in FEATURES:
            for layer in MADE(range(1, D + 1), 2, (H, H), "relu", 0).masked_layers():
                mask = layer.mask.bool()
                for B in ROWS:
                    label = f"{mask.shape[0]}, {mask.shape[1]}; {B}"
                    if label in seen:
                        continue  # the hidden layer of another D
                    seen.add(label)
                    lines.append(line(label, measure(mask, B, args.seconds, clock)))
                    print(lines[-1], flush=True)
    path = Path(__file__).parent / "results" / f"staircase{f'_{args.threads}' * (args.threads > 1)}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
