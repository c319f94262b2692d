"""Two processes against one with the same batches: the same losses, and how much sooner.

    pip install -c constraints.txt -e . && python benchmarks/processes.py [--rounds 5]

Each process has one thread. One process and two take turns, so that what else the machine does meets both. The losses
are those of 100 steps of a MAF, each on new random rows, whose objective draws no noise; with noise (VAE, posterior)
two processes draw other numbers than one, and their losses agree in distribution alone. Rows a second are those of the
epochs after the first, without start-up. Written to results/reliability.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reliability import machine, write_section
from torch import Tensor, nn

import counterflow as cf
from counterflow.blackbox import OnTarget
from counterflow.objectives import path_elbo

D = 64


def rows(n: int) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0)).cumsum(1) / 8


def config(epochs: int, batch: int) -> cf.FitConfig:
    return cf.FitConfig(epochs=epochs, batch_size=batch, warm_up_steps=10, learning_rate=1e-3)


def maf() -> nn.Module:
    return cf.MAF(D, layers=5, hidden=(512, 512), seed=0)


def losses() -> cf.Record:
    """100 steps, an epoch each."""
    batch = 512
    return cf.fit(maf(), cf.log_likelihood, rows(batch * 3 // 2), rows(64), config(100, batch))


def table(batch: int) -> cf.Record:
    return cf.fit(maf(), cf.log_likelihood, rows(8 * batch), rows(2), config(4, batch))


def vae(batch: int) -> cf.Record:
    torch.manual_seed(0)
    images = torch.rand(8 * batch, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round()
    model = cf.VAE((1, 28, 28), latent=32, posterior="iaf", network="mlp", hidden=(512, 512))
    return cf.fit(model, cf.elbo, images, images[:2], config(4, batch))


def posterior(draws: int) -> cf.Record:
    flow, share = cf.IAF(D, layers=4, hidden=(128, 128), seed=0).double(), draws // processes_here()

    def target(theta: Tensor) -> Tensor:
        return -(theta.square() + (theta[..., :1] * theta).square()).sum(-1) / 2

    def objective(flow: nn.Module, _: None) -> Tensor:
        return path_elbo(OnTarget(flow, target), None, share)  # type: ignore[arg-type]

    return cf.fit(flow, objective, 8, 1, config(4, draws))


def processes_here() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


TRAININGS: dict[str, Callable[[], cf.Record]] = {
    "MAF of a table, 5 layers of (512, 512), D = 64, batch 1024": lambda: table(1024),
    "the same, batch 256": lambda: table(256),
    "VAE with an IAF, MLP of (512, 512), 28x28, batch 512": lambda: vae(512),
    "posterior, 4 layers of (128, 128), D = 64, 1024 draws a step": lambda: posterior(1024),
}


def work(rank: int, name: str, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        store = dist.FileStore(f"{folder}/store", processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=120))
    record = losses() if name == "losses" else TRAININGS[name]()
    if rank == 0:
        torch.save([(e.train, e.rows_per_second) for e in record.epochs], f"{folder}/epochs.pt")
    if processes > 1:
        dist.destroy_process_group()


def epochs(name: str, processes: int) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (name, processes, folder), nprocs=processes)
        return torch.load(Path(folder) / "epochs.pt", weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    one, two = ([train for train, _ in epochs("losses", processes)] for processes in (1, 2))
    off = max(abs(b / a - 1) for a, b in zip(one, two, strict=True))
    print(f"losses: {off:.1e}", flush=True)
    lines = [
        f"Over {len(one)} steps the losses of two processes are within {off:.1e} of those of one, relative.",
        "",
        "| training | rows a second, one process | two | ratio, median | by round |",
        "|---|---|---|---|---|",
    ]
    for name in TRAININGS:
        speeds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(options.rounds):
            for processes, each in speeds.items():
                each.append(statistics.median(speed for _, speed in epochs(name, processes)[1:]))
        ratios = [b / a for a, b in zip(speeds[1], speeds[2], strict=True)]
        middle = [f"{statistics.median(each):,.0f}" for each in speeds.values()]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"| {name} | {' | '.join(middle)} | {statistics.median(ratios):.2f} | {shown} |")
        print(lines[-1], flush=True)
    made = f"Made by `python {' '.join(sys.argv)}` ({machine()}), one thread a process."
    write_section("Two processes against one", [made, "", *lines])


if __name__ == "__main__":
    main()
