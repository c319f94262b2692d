"""Time of a training step beyond the model's own work: `cf.fit` against the model's forward and backward passes.

    python benchmarks/training_step.py

A MAF of 30 parameter tensors on one thread. Per step: the model's own work (zero the gradients, the loss and its
backward pass), the same with PyTorch's gradient clipping and Adam by hand, and `cf.fit` with each optimizer, with and
without averaged weights. The sides take turns in one process. The time is the process's own CPU time, so that other
processes on the machine count as little as possible. Written to results/training_step.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import counterflow as cf

HERE = Path(__file__).parent / "results"
FEATURES, HIDDEN, LAYERS, BATCH = 8, (32, 32), 5, 128
STEPS = 200  # of each side in a round
MARK = 0.15  # ms a step beyond the model's own work


def maf() -> cf.Flow:
    return cf.MAF(FEATURES, layers=LAYERS, hidden=HIDDEN, seed=0)


def own_work(model: nn.Module, rows: Tensor, finish: Callable[[], object]) -> float:
    """Seconds per step of the loss and its backward pass, and of what finishes the step."""
    model.train()
    begun = time.process_time()
    for k in range(STEPS):
        model.zero_grad(set_to_none=True)
        x = rows[k * BATCH : (k + 1) * BATCH]
        (-cf.log_likelihood(model, x).mean()).backward()
        finish()
    return (time.process_time() - begun) / STEPS


def by_hand(rows: Tensor) -> float:
    model = maf()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def finish() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 50.0)
        optimizer.step()

    return own_work(model, rows, finish)


def by_fit(rows: Tensor, optimizer: str, ema: float) -> float:
    """Seconds per step of `cf.fit`, from the first step of its epoch to the last."""
    stamps: list[float] = []
    config = cf.FitConfig(epochs=1, batch_size=BATCH, optimizer=optimizer, ema=ema, learning_rate=1e-3)
    cf.fit(maf(), cf.log_likelihood, rows, rows[:1], config, on_step=lambda *_: stamps.append(time.process_time()))
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = torch.randn(STEPS * BATCH, FEATURES, generator=torch.Generator().manual_seed(0))
    tensors = len(list(maf().parameters()))
    sides: dict[str, Callable[[], float]] = {
        "the model's own work": lambda: own_work(maf(), rows, lambda: None),
        "with clipping and Adam by hand": lambda: by_hand(rows),
    }
    for optimizer in ("adam", "adamax", "adamw"):
        for ema in (0.999, 0.0):
            name = f"`cf.fit`, {optimizer}, {'averaged weights' if ema else 'no average'}"
            sides[name] = lambda optimizer=optimizer, ema=ema: by_fit(rows, optimizer, ema)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for k in range(args.rounds + 1):
        for name, side in sides.items():
            each = side()
            if k:  # the first round warms up
                seconds[name].append(each)
    own = seconds["the model's own work"]
    milliseconds = {name: 1e3 * statistics.median(each) for name, each in seconds.items()}
    beyond = {
        name: 1e3 * statistics.median(a - b for a, b in zip(each, own, strict=True)) for name, each in seconds.items()
    }
    machine = f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}"
    text = (
        "# A training step beyond the model's own work\n\n"
        f"Made by `python benchmarks/training_step.py` ({args.rounds} rounds of {STEPS} steps, one thread, {machine}). "
        f"A MAF of {LAYERS} layers, hidden {HIDDEN}, {FEATURES} features, {tensors} parameter tensors, batch {BATCH}; "
        "CPU time per step, medians over rounds.\n\n"
        "| | ms | beyond the model's own work, ms |\n|---|---|---|\n"
        + "".join(f"| {name} | {milliseconds[name]:.3f} | {beyond[name]:.3f} |\n" for name in sides)
        + f"\nThe mark is {MARK} ms beyond the model's own work.\n"
    )
    print(text)
    HERE.mkdir(exist_ok=True)
    (HERE / "training_step.md").write_text(text)
    result = {"milliseconds": milliseconds, "beyond": beyond, "tensors": tensors, "machine": machine}
    (HERE / "training_step.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
