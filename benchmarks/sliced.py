"""Time and launches of the `sliced` solve, by the size of its blocks, with and without iteration in diagonal blocks.

    OMP_NUM_THREADS=1 python benchmarks/sliced.py

One autoregressive layer, float32, one thread, both substitutions. All variants run in turn, and the minimum of the CPU
time of each is reported. Layers: as built (near the identity), with random weights far from that (normal, standard
deviation 0.8 / sqrt(inputs)), and the third layer of a MAF that was trained on the 64 pixels of scikit-learn's digits.
A launch is an operation that torch dispatches and that is no view. Written to results/sliced.md.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import counterflow as cf
from counterflow.engine import sliced

ALWAYS = 1 << 60
CHOOSE = sliced.block_size
VARIANTS = {  # degrees of a block, 0 to choose, and the largest number of values of a sweep
    "one degree at a time": (1, 0),
    **{f"blocks of {size}, by degree": (size, 0) for size in (8, 16, 32)},
    **{f"blocks of {size}, iterated": (size, ALWAYS) for size in (8, 16, 32, 64)},
    "as chosen": (0, sliced.MAX_SWEPT),
}


class Launches(TorchDispatchMode):
    """Count the operations that are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def shaken(t: cf.Autoregressive) -> cf.Autoregressive:
    """Draw new weights, far from the initial ones."""
    with torch.no_grad():
        for p in t.parameters():
            p.normal_(std=0.8 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.3)
    return t


def trained() -> tuple[cf.Autoregressive, Tensor]:
    """Train a MAF on the digits; return its third layer, and points that this layer has to invert."""
    pixels = torch.as_tensor(load_digits().data, dtype=torch.float32)
    rows = (pixels + torch.rand_like(pixels) - 8) / 8
    flow = cf.MAF(64, layers=5, hidden=(512, 512))
    cf.fit(flow, cf.log_likelihood, rows[:1500], rows[1500:], cf.FitConfig(epochs=15, batch_size=100))
    layers = [m for m in flow.modules() if isinstance(m, cf.Autoregressive)]
    given: list[Tensor] = []
    handle = layers[2].register_forward_hook(lambda module, inputs, outputs: given.append(outputs[0]))
    with torch.no_grad():
        flow().log_prob(rows[:1024])
    handle.remove()
    return layers[2], given[0]


def cases(quick: bool) -> Iterator[tuple[str, cf.Autoregressive, Tensor]]:
    sizes = (
        [(16, 64, 256)] if quick else [(16, 128, 256), (16, 128, 1024), (64, 512, 16), (64, 512, 256), (256, 512, 256)]
    )
    for D, H, N in sizes:
        for name, change in (("as built", lambda t: t), ("random", shaken)):
            yield f"D = {D}, H = {H}, N = {N}, {name}", change(cf.Autoregressive(D, hidden=(H, H))), torch.randn(N, D)
    spline = shaken(cf.Autoregressive(16, hidden=(128, 128), univariate=cf.RationalQuadraticSpline(8)))
    yield "D = 16, H = 128, N = 256, spline, random", spline, torch.randn(256, 16)
    if not quick:
        layer, y = trained()
        for N in (16, 256):
            yield f"D = 64, H = 512, N = {N}, trained", layer, y[:N]


def measure(t: cf.Autoregressive, y: Tensor, repeats: int) -> list[list[str]]:
    """Return a row for each variant: CPU time in ms and launches, of forward and back substitution."""
    with torch.no_grad():
        system = t._system(y, None)
    w = torch.randn(len(y))
    solution = sliced.forward_substitution(system, y)
    runs: dict[tuple[str, int], Callable[[], Any]] = {}
    for name in VARIANTS:
        runs[name, 0] = partial(sliced.forward_substitution, system, y)
        runs[name, 1] = partial(sliced.back_substitution, system, solution, y, w)
    seconds = dict.fromkeys(runs, float("inf"))
    launches = {}
    for repeat in range(repeats + 1):
        for (name, direction), run in runs.items():
            size, sliced.MAX_SWEPT = VARIANTS[name]
            sliced.block_size = (lambda layout, size=size: size) if size else CHOOSE
            if repeat:
                started = time.process_time()
                run()
                seconds[name, direction] = min(seconds[name, direction], time.process_time() - started)
            else:  # fills the caches as well
                with Launches() as counted:
                    run()
                launches[name, direction] = counted.count
    return [
        [name, *(f"{1e3 * seconds[name, k]:.2f}" for k in (0, 1)), *(f"{launches[name, k]}" for k in (0, 1))]
        for name in VARIANTS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small sizes; results are not written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sliced.is_transformed = lambda: False  # launches are counted by a mode of torch, under which nothing is iterated
    lines = [
        "# The `sliced` solve in blocks of degrees",
        "",
        f"Made by `OMP_NUM_THREADS=1 python benchmarks/sliced.py` on {platform.machine()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}.",
        "CPU time in ms, the minimum of repeated runs, on a machine that was also used by others; launches are torch "
        "operations, views left out. `one degree at a time` is the solve without blocks.",
    ]
    for title, t, y in cases(options.quick):
        lines += ["", f"## {title}", "", "| variant | forward ms | back ms | forward launches | back launches |"]
        lines += ["|---|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in measure(t, y, options.repeats))]
        print("\n".join(lines[-len(VARIANTS) - 4 :]), flush=True)
    if not options.quick:
        Path(__file__).with_name("results").joinpath("sliced.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
