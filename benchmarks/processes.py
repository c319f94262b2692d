"""Two processes against one with the same batches: the same losses, and how much sooner.

    pip install -c constraints.txt -e . && python benchmarks/processes.py [--rounds 5]

Each process has one thread. Losses are those of 100 steps of a MAF, each on a random batch, whose objective draws no
noise; with noise (VAE, posterior) two processes draw other numbers than one,
and their losses agree in distribution alone. As two processes add in another order than one, there is a control: one
process that has the rows of each batch in reverse. One process, two, and two that train by themselves with half of
each batch, which is as fast as two could be, take turns, so that what else the machine does meets all. Rows a second
are those of the epochs after the first, without start-up. Written to results/reliability.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reliability import machine, write_section
from torch import Tensor, nn

import counterflow as cf
from counterflow.objectives import path_elbo
from counterflow.posterior.stages import TargetModel

D = 64


def rows(n: int) -> Tensor:
    """x_i = z_i + sin(2 x_{i-1}), whose entropy is that of z: no density comes near zero nats."""
    z = torch.randn(n, D, generator=torch.Generator().manual_seed(0))
    columns = [z[:, 0]]
    for k in range(1, D):
        columns.append(z[:, k] + (2 * columns[-1]).sin())
    return torch.stack(columns, 1)


def config(epochs: int, batch: int) -> cf.FitConfig:
    return cf.FitConfig(epochs=epochs, batch_size=batch, warm_up_steps=10, learning_rate=1e-3)


def maf() -> cf.Flow:
    return cf.MAF(D, layers=5, hidden=(512, 512), seed=0)


def losses(kind: str) -> cf.training.History:
    """100 steps, an epoch each."""
    batch, dtype = 512, torch.float64 if "float64" in kind else torch.float32

    def objective(flow: cf.Flow, x: Tensor) -> Tensor:
        return cf.log_likelihood(flow, x.flip(0) if "reverse" in kind else x)

    data = rows(batch * 3 // 2).to(dtype)
    return cf.fit(maf().to(dtype), objective, data, data[:64], config(100, batch))


def table(batch: int) -> cf.training.History:
    return cf.fit(maf(), cf.log_likelihood, rows(8 * batch), rows(2), config(4, batch))


def vae(network: Literal["conv", "mlp"], batch: int) -> cf.training.History:
    torch.manual_seed(0)
    images = torch.rand(8 * batch, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round()
    model = cf.VAE((1, 28, 28), network=network)
    return cf.fit(model, cf.objectives.elbo, images, images[:2], config(4, batch))


def posterior(draws: int) -> cf.training.History:
    flow, share = cf.IAF(D, layers=4, hidden=(128, 128), seed=0).double(), draws // processes_here()

    def target(theta: Tensor) -> Tensor:
        return -(theta.square() + (theta[..., :1] * theta).square()).sum(-1) / 2

    def objective(flow: nn.Module, _: None) -> Tensor:
        return path_elbo(TargetModel(flow, target), None, share)  # type: ignore[arg-type]

    return cf.fit(flow, objective, 8, 1, config(4, draws))


def processes_here() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


TRAININGS: dict[str, Callable[[int], cf.training.History]] = {
    "MAF of a table, 5 layers of (512, 512), D = 64, batch 2048": lambda each: table(2048 // each),
    "the same, batch 1024": lambda each: table(1024 // each),
    "the same, batch 256": lambda each: table(256 // each),
    "VAE with an IAF, 28x28, as it comes (convolutions), batch 128": lambda each: vae("conv", 128 // each),
    "the same, with an MLP of (512, 512), batch 512": lambda each: vae("mlp", 512 // each),
    "posterior, 4 layers of (128, 128), D = 64, 1024 draws a step": lambda each: posterior(1024 // each),
}
LOSSES = ("float32", "float32, reverse", "float64", "float64, reverse")


def work(rank: int, name: str, processes: int, together: bool, folder: str) -> None:
    torch.set_num_threads(1)
    if together:
        store = dist.FileStore(f"{folder}/store", processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=120))
    record = losses(name) if name in LOSSES else TRAININGS[name](1 if together else processes)
    torch.save([(e.train, e.rows_per_second) for e in record.epochs], f"{folder}/epochs-{rank}.pt")
    if together:
        dist.destroy_process_group()


def epochs(name: str, processes: int, together: bool = True) -> list[list[tuple[float, float]]]:
    """Return the training objective and the rows per second of each epoch, for each process."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (name, processes, together and processes > 1, folder), nprocs=processes)
        return [torch.load(Path(folder, f"epochs-{rank}.pt"), weights_only=True) for rank in range(processes)]


def off(a: list[float], b: list[float]) -> str:
    """The largest relative difference up to step 10, 30 and 100."""
    apart = [abs(y / x - 1) for x, y in zip(a, b, strict=True)]
    return " | ".join(f"{max(apart[:steps]):.1e}" for steps in (10, 30, 100))


def compared() -> list[str]:
    one, two = ({kind: [train for train, _ in epochs(kind, p)[0]] for kind in LOSSES} for p in (1, 2))
    course = one["float32"]
    lines = [
        f"The loss of 100 steps, a batch each, which goes from {-course[0]:.1f} to {-course[-1]:.1f} nats ({D} "
        "features): the largest relative difference from one process in the same dtype.",
        "",
        "| | up to step 10 | 30 | 100 |",
        "|---|---|---|---|",
    ]
    for dtype in ("float32", "float64"):
        lines.append(f"| two processes, {dtype} | {off(one[dtype], two[dtype])} |")
        lines.append(f"| one, rows of a batch in reverse, {dtype} | {off(one[dtype], one[f'{dtype}, reverse'])} |")
    return lines


def speeds(name: str, processes: int, together: bool = True) -> float:
    """Rows a second, of all processes together."""
    of_each = [statistics.median(speed for _, speed in each[1:]) for each in epochs(name, processes, together)]
    return of_each[0] if together else sum(of_each)


def compared_in_speed(name: str, rounds: int) -> str:
    ways = {"one": (1,), "two": (2,), "alone": (2, False)}
    measured: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, how in ways.items():
            measured[way].append(speeds(name, *how))
    ratios = [b / a for a, b in zip(measured["one"], measured["two"], strict=True)]
    most = statistics.median(b / a for a, b in zip(measured["one"], measured["alone"], strict=True))
    one, two = (f"{statistics.median(measured[way]):,.0f}" for way in ("one", "two"))
    shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"| {name} | {one} | {two} | {shown} | {most:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    lines = [f"Made by `python {' '.join(sys.argv)}` ({machine()}), one thread a process.", "", *compared()]
    lines += [
        "",
        "| training | rows/s, one process | two | two / one | two by themselves / one |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in TRAININGS:
        lines.append(compared_in_speed(name, options.rounds))
        print(lines[-1], flush=True)
        write_section("Two processes against one", lines)


if __name__ == "__main__":
    main()
