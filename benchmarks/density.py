"""Densities of BSDS300 patches and of MINIBOONE by flows of several libraries at the same budget.

    python benchmarks/density.py --data PATH/TO/data --threads 1

PATH holds bsds300/bsds300_patches8x8_uint8.npz and miniboone/{val,head,test}.npz. Patches are prepared as usual: U[0,
1) is added, they are divided by 256, the mean of each patch is subtracted, and the last pixel is left out: 63 numbers.
MINIBOONE is trained on val and head, a tenth of which is used for validation, and tested on test. Its original training
part is no longer public, so the figures cannot be compared with those of papers.

All flows get the same standardized rows in the same order, have the same numbers of layers, hidden units and bins, and
are trained by `cf.fit` with the same optimizer, learning rate, steps and weight averaging. The weights with the best
validation objective are kept. Finished runs are kept in results/density.json and skipped, so the command can be
repeated after an interruption.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import density_peers as peers
import numpy as np
import torch
from torch import Tensor

import counterflow as cf

HERE = Path(__file__).parent / "results"
LAYERS, HIDDEN, BINS = 5, (256, 256), 8
METHODS: dict[str, Callable[[int], peers.Scored]] = {
    "counterflow MAF": lambda D: peers.our_maf(D, LAYERS, HIDDEN),
    "nflows MAF": lambda D: peers.nflows_maf(D, LAYERS, HIDDEN),
    "zuko MAF": lambda D: peers.zuko_maf(D, LAYERS, HIDDEN),
    "counterflow NSF": lambda D: peers.our_nsf(D, LAYERS, HIDDEN, BINS),
    "zuko NSF": lambda D: peers.zuko_nsf(D, LAYERS, HIDDEN, BINS),
}
CONFIGS = {
    "bsds300": cf.FitConfig(epochs=2, batch_size=256, optimizer="adam", learning_rate=2e-3),
    "miniboone": cf.FitConfig(epochs=60, batch_size=128, optimizer="adam", learning_rate=1e-3, patience=15, ema=0.99),
}
SEEDS = {"bsds300": 1, "miniboone": 3}  # at most; a seed of the patches takes five times as long


class Rows(NamedTuple):
    """Rows standardized by the training rows; `shift` is added to log densities to be per original unit."""

    train: Tensor
    validation: Tensor
    test: Tensor
    shift: float


def bsds300(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = np.load(folder / "bsds300" / "bsds300_patches8x8_uint8.npz")
    generator = np.random.default_rng(0)

    def recipe(patches: np.ndarray) -> np.ndarray:
        x = (patches.reshape(len(patches), 64) + generator.random((len(patches), 64))) / 256
        return (x - x.mean(1, keepdims=True))[:, :63]

    return recipe(parts["train"]), recipe(parts["val"][:5000]), recipe(parts["test"])


def miniboone(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = np.concatenate([np.load(folder / "miniboone" / f)["data"] for f in ("val.npz", "head.npz")])
    rows = rows[np.random.default_rng(0).permutation(len(rows))].astype(np.float64)
    part = len(rows) // 10
    return rows[part:], rows[:part], np.load(folder / "miniboone" / "test.npz")["data"].astype(np.float64)


def load(name: str, folder: Path) -> Rows:
    train, validation, test = {"bsds300": bsds300, "miniboone": miniboone}[name](folder)
    mean, std = train.mean(0), train.std(0)
    parts = [torch.as_tensor((part - mean) / std, dtype=torch.float32) for part in (train, validation, test)]
    return Rows(*parts, float(-np.log(std).sum()))


def run(method: str, name: str, rows: Rows, seed: int, config: cf.FitConfig) -> dict:
    """Train and test one flow."""
    torch.manual_seed(seed)
    model = METHODS[method](rows.train.shape[1])
    begun = time.process_time()

    def report(task: str, epoch: cf.training.Epoch) -> None:
        print(f"{name} {method} seed {seed} epoch {epoch.epoch} {epoch.validation + rows.shift:.3f}", flush=True)

    record = cf.fit(model, peers.terms, rows.train, rows.validation, config, on_epoch=report)
    trained = time.process_time()
    with torch.no_grad():
        scores = torch.cat([model(part) for part in rows.test.split(512)]).double() + rows.shift
    return {
        "set": name,
        "method": method,
        "seed": seed,
        "test": scores.mean().item(),
        "se": scores.std().item() / math.sqrt(len(scores)),
        "validation": record.best.validation + rows.shift,
        "best_epoch": record.best.epoch,
        "epochs": len(record.epochs),
        "skipped": sum(e.skipped for e in record.epochs),
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_minutes": (trained - begun) / 60,
        "curve": [round(e.validation + rows.shift, 3) for e in record.epochs],
    }


def machine(threads: int) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "nflows", "zuko"))
    return f"{platform.machine()}, {threads} thread(s), {libraries}, Python {platform.python_version()}"


def table(results: list[dict], where: str) -> str:
    """Return the report in Markdown."""
    lines = [
        "# Densities of image patches and of particle events, at one budget",
        "",
        f"Made by `python benchmarks/density.py --data PATH` on {where}.",
        f"{LAYERS} layers, hidden {HIDDEN}, {BINS} bins. Test log density in nats per row, higher is better; the",
        "standard error is over test rows; with several seeds the means are shown, and the range over seeds.",
        "Minutes are CPU minutes of training on one thread. The hidden layers of our flows start as torch starts",
        "linear layers (`density_peers.started`), as those of the other libraries do.",
        "",
    ]
    for name, config in CONFIGS.items():
        found = [r for r in results if r["set"] == name]
        if not found:
            continue
        lines += [
            f"## {name}",
            "",
            f"{config.optimizer}, rate {config.learning_rate:g} (cosine), batch {config.batch_size}, at most "
            f"{config.epochs} epochs, patience {config.patience or 'none'}, weights averaged with {config.ema}.",
            "",
            "| flow | test | se | seeds | range | validation | best epoch of | parameters | minutes |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for method in METHODS:
            rs = [r for r in found if r["method"] == method]
            if not rs:
                continue
            test, mean = [r["test"] for r in rs], {k: statistics.mean(r[k] for r in rs) for k in ("se", "validation")}
            epochs = ", ".join(f"{r['best_epoch']}/{r['epochs']}" for r in rs)
            lines.append(
                f"| {method} | {statistics.mean(test):.2f} | {mean['se']:.2f} | {len(rs)} "
                f"| {max(test) - min(test):.2f} | {mean['validation']:.2f} | {epochs} | {rs[0]['parameters']:,} "
                f"| {statistics.mean(r['cpu_minutes'] for r in rs):.1f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with bsds300/ and miniboone/")
    parser.add_argument("--sets", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "density.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = machine(args.threads)
    results = json.loads(args.out.read_text())["results"] if args.out.exists() else []
    for name in args.sets:
        rows = load(name, args.data)
        for seed in args.seeds[: SEEDS[name]]:
            for method in args.methods:
                if any((r["set"], r["method"], r["seed"]) == (name, method, seed) for r in results):
                    continue
                results.append(run(method, name, rows, seed, CONFIGS[name]))
                write(args.out, json.dumps({"machine": where, "results": results}, indent=1) + "\n")
                write(args.out.with_suffix(".md"), table(results, where))
    print(table(results, where))


def write(path: Path, text: str) -> None:
    """Write a file atomically."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


if __name__ == "__main__":
    main()
