"""Cost and variance of the path gradient: a training step of `path_elbo` beside one of `elbo`.

    python benchmarks/path_gradient.py

The flows are IAFs of 4 layers and the target is a standard normal, which costs almost nothing itself. Both sides run
forward, backward and Adam, interleaved in one process. Then the noise of both gradients is measured at and near q = p:
p is a copy of q whose weights were moved by a normal of standard deviation delta. Results go to
results/path_gradient.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import counterflow as cf
from counterflow.objectives import DensityMode, Draws, draw_from

HERE = Path(__file__).parent / "results"
LAYERS = 4
SHAPES = ((8, 64, 256), (32, 320, 256), (64, 512, 256), (256, 512, 64))  # D, H (two hidden layers each), S
DELTAS = (0.0, 0.0001, 0.001, 0.01)
MARK = 2.0  # largest acceptable ratio of the two times


class Fitting:
    """Flow trained on a log density, in the form that the objectives expect of a model: S draws and no data."""

    def __init__(self, flow: cf.Flow, log_density: Callable[[Tensor], Tensor]) -> None:
        self.flow, self.log_density = flow, log_density

    def draw(self, x: None = None, samples: int = 1, density: DensityMode = "joint") -> Draws:
        z, log_q = draw_from(self.flow(), samples, density)
        return Draws(self.log_density(z), torch.zeros_like(log_q), log_q, z)


def standard_normal(z: Tensor) -> Tensor:
    return -z.square().sum(-1) / 2


def stepper(objective: Callable[..., Tensor], D: int, H: int, S: int) -> Callable[[], None]:
    """Return a function that runs one training step."""
    flow = cf.IAF(D, layers=LAYERS, hidden=(H, H), activation="elu", seed=0)
    model, optimizer = Fitting(flow, standard_normal), torch.optim.Adam(flow.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (-objective(model, None, S).mean()).backward()
        optimizer.step()

    return step


def times(rounds: int, D: int, H: int, S: int) -> dict[str, float]:
    """Return the median milliseconds of a step of each objective, and their ratio."""
    sides = {"elbo": stepper(cf.objectives.elbo, D, H, S), "path_elbo": stepper(cf.objectives.path_elbo, D, H, S)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for k in range(rounds + 5):
        for name, step in sides.items():
            begun = time.perf_counter()
            step()
            if k >= 5:  # the first steps warm up
                seconds[name].append(time.perf_counter() - begun)
    found = {name: 1e3 * statistics.median(s) for name, s in seconds.items()}
    ratios = [path / plain for path, plain in zip(seconds["path_elbo"], seconds["elbo"], strict=True)]
    return {
        **found,
        "ratio_of_medians": found["path_elbo"] / found["elbo"],
        "median_of_ratios": statistics.median(ratios),
    }


def noise(delta: float, D: int = 16, H: int = 64, S: int = 64, runs: int = 100) -> dict[str, float]:
    """Return the root of the gradient's total variance under each objective, and the length of its mean."""
    generator = torch.Generator().manual_seed(0)

    def moved(flow: cf.Flow, by: float) -> cf.Flow:
        flow = copy.deepcopy(flow)
        with torch.no_grad():
            for p in flow.parameters():
                p += by * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        return flow

    truth = moved(cf.IAF(D, layers=LAYERS, hidden=(H, H), activation="elu", seed=0).double(), 0.02)
    model = Fitting(moved(truth, delta), truth.requires_grad_(False)().log_prob)
    model.flow.requires_grad_()
    found = {}
    torch.manual_seed(0)
    for name, objective in {"elbo": cf.objectives.elbo, "path_elbo": cf.objectives.path_elbo}.items():
        gradients = []
        for _ in range(runs):
            parts = torch.autograd.grad(objective(model, None, S).mean(), list(model.flow.parameters()))
            gradients.append(torch.cat([part.flatten() for part in parts]))
        stacked = torch.stack(gradients)
        found[name] = stacked.var(0).sum().sqrt().item()
        found["mean"] = stacked.mean(0).norm().item()  # of the last objective, which has less noise
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    steps = {f"{D}, {H}, {S}": times(args.rounds, D, H, S) for D, H, S in SHAPES}
    noises = {delta: noise(delta) for delta in DELTAS}
    machine = f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}"
    worst = max(found["ratio_of_medians"] for found in steps.values())
    text = (
        "# The path gradient: cost and variance\n\n"
        f"Made by `python benchmarks/path_gradient.py --rounds {args.rounds} --threads {args.threads}` ({machine}).\n\n"
        f"One training step (forward, backward, Adam) of an IAF of {LAYERS} layers on a standard normal, float32, "
        f"{args.rounds} interleaved rounds, medians.\nThe mark is a ratio of {MARK}; the worst one is {worst:.2f}.\n\n"
        "| D, H, samples | `elbo` ms | `path_elbo` ms | ratio of medians | median of ratios |\n|---|---|---|---|---|\n"
        + "".join(
            f"| {shape} | {found['elbo']:.2f} | {found['path_elbo']:.2f} | {found['ratio_of_medians']:.2f} "
            f"| {found['median_of_ratios']:.2f} |\n"
            for shape, found in steps.items()
        )
        + "\nThe gradient's noise (root of its total variance over all weights) near q = p: D = 16, H = 64,\n"
        "64 samples, 100 gradients in float64. p is q with every weight moved by a normal of standard deviation "
        "delta.\n\n"
        "| delta | noise of `elbo` | noise of `path_elbo` | length of the mean of the latter |\n|---|---|---|---|\n"
        + "".join(
            f"| {delta:g} | {found['elbo']:.2g} | {found['path_elbo']:.2g} | {found['mean']:.2g} |\n"
            for delta, found in noises.items()
        )
    )
    print(text)
    HERE.mkdir(exist_ok=True)
    (HERE / "path_gradient.md").write_text(text)
    result = {"steps": steps, "noise": noises, "threads": args.threads, "machine": machine}
    (HERE / "path_gradient.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
