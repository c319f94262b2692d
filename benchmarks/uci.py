"""Held-out log density of the UCI regression tables, features and target jointly, by several density estimators.

    python benchmarks/uci.py --data PATH/TO/data --threads 1

PATH holds uci/regression/*.npz. The columns are made continuous in the same way for all estimators (`uci_tables.py`).
There are five splits, rows 0 to 4 of test_mask, and one configuration of `cf.FlowDensity` for all tables. It is
compared with zuko's NSF and nflows' MAF, with the same optimizer, learning rate, weight decay, batches, epochs,
patience and validation rows, and layers of the same sizes; with scikit-learn's GaussianMixture of up to 30 components,
chosen by BIC; and with KernelDensity, its bandwidth chosen by five-fold cross-validation. Finished runs are kept in
results/uci.json and skipped, so the command can be repeated after an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import density_peers as peers
import numpy as np
import torch
import uci_tables
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from torch import Tensor

import counterflow as cf

HERE = Path(__file__).parent / "results"
SPLITS = range(5)


@dataclass(frozen=True)
class Budget:
    """Configuration of the flows of all three libraries and of their training."""

    layers: int = 3  # splines; two would do on the smaller tables
    affine_layers: int = 5  # of a MAF, whose layers are cheaper
    hidden: tuple[int, ...] = (64, 64)  # of each layer's network
    bins: int = 8
    epochs: int = 60  # the cosine ends there; most trainings have settled before
    learning_rate: float = 1e-2  # of Adam; 2e-3 ends lower on every small table, ours and zuko's
    weight_decay: float = 1e-3  # an L2 penalty
    ema: float = 0.99  # an epoch has only 20 to 30 steps
    patience: int = 10
    validation_fraction: float = 0.1

    def fit_config(self, rows: int, seed: int) -> cf.FitConfig:
        return cf.FitConfig(
            epochs=self.epochs,
            batch_size=max(32, min(256, rows // 20)),
            optimizer="adam",
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            ema=self.ema,
            patience=self.patience,
            seed=seed,
        )


BUDGET = Budget()


class Found(NamedTuple):
    """Log densities of the test rows, and facts about the fit."""

    scores: np.ndarray
    seconds: float  # of CPU, to fit
    more: dict


def tensor(rows: np.ndarray) -> Tensor:
    return torch.as_tensor(rows, dtype=torch.float32)


def parted(train: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    """Return training and validation rows."""
    order = np.random.default_rng(seed).permutation(len(train))
    held_out = round(BUDGET.validation_fraction * len(train))
    return tensor(train[order[held_out:]]), tensor(train[order[:held_out]])


@torch.no_grad()
def scores(model: Callable[[Tensor], Tensor], rows: Tensor) -> np.ndarray:
    return torch.cat([model(part) for part in rows.split(512)]).double().numpy()


def peer(build: Callable[[int], peers.Scored]) -> Callable[[uci_tables.Split, int], Found]:
    """Fit a flow of another library with `cf.fit`."""

    def run(split: uci_tables.Split, seed: int) -> Found:
        begun = time.process_time()
        torch.manual_seed(seed)
        model = build(split.train.shape[1])
        train, validation = parted(split.train, seed)
        record = cf.fit(model, peers.terms, train, validation, BUDGET.fit_config(len(train), seed))
        return Found(
            scores(model, tensor(split.test)),
            time.process_time() - begun,
            {"parameters": sum(p.numel() for p in model.parameters()), "epochs": len(record.epochs)},
        )

    return run


def ours(split: uci_tables.Split, seed: int) -> Found:
    """Fit cf.FlowDensity with its defaults."""
    begun = time.process_time()
    density = cf.FlowDensity(random_state=seed).fit(split.train)
    more = {
        "parameters": sum(p.numel() for p in density.flow_.parameters()),
        "epochs": [len(history.epochs) for history in density.histories_],
        "holds rows": density.holds_rows_,
    }
    return Found(density.score_samples(split.test), time.process_time() - begun, more)


def one_flow(split: uci_tables.Split, seed: int) -> Found:
    """Fit cf.FlowDensity with one member and without kernels, as large as the flows of zuko and nflows."""
    begun = time.process_time()
    density = cf.FlowDensity(random_state=seed, members=1, kernels=False).fit(split.train)
    parameters = sum(p.numel() for p in density.flow_.parameters())
    return Found(density.score_samples(split.test), time.process_time() - begun, {"parameters": parameters})


def gaussian_mixture(split: uci_tables.Split, seed: int) -> Found:
    begun, best = time.process_time(), (math.inf, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mixtures that have not converged; the BIC judges them as they are
        for components in range(1, 31):
            mixture = GaussianMixture(components, random_state=seed).fit(split.train)
            best = min(best, (mixture.bic(split.train), mixture), key=lambda pair: pair[0])
    return Found(best[1].score_samples(split.test), time.process_time() - begun, {"components": best[1].n_components})


def kernel_density(split: uci_tables.Split, seed: int) -> Found:
    """Fit a kernel density, its bandwidth the best of 25 on five folds of at most 400 rows, in NumPy for speed."""
    begun, D = time.process_time(), split.train.shape[1]
    widths, order = np.geomspace(0.02, 1.0, 25), np.random.default_rng(seed).permutation(len(split.train))
    reached = np.zeros(len(widths))
    for fold in range(5):
        checked, others = split.train[order[fold::5][:400]], np.delete(split.train, order[fold::5], 0)
        squares = torch.cdist(torch.from_numpy(checked), torch.from_numpy(others)).square()
        for k, width in enumerate(widths):
            near = torch.logsumexp(-squares / (2 * width**2), 1).mean().item()
            reached[k] += near - math.log(len(others)) - D * math.log(width)
    width = float(widths[reached.argmax()])
    density = KernelDensity(bandwidth=width).fit(split.train)
    return Found(density.score_samples(split.test), time.process_time() - begun, {"bandwidth": width})


METHODS: dict[str, Callable[[uci_tables.Split, int], Found]] = {
    "counterflow": ours,
    "zuko NSF": peer(lambda D: peers.zuko_nsf(D, BUDGET.layers, BUDGET.hidden, BUDGET.bins)),
    "nflows MAF": peer(lambda D: peers.nflows_maf(D, BUDGET.affine_layers, BUDGET.hidden)),
    "GaussianMixture": gaussian_mixture,
    "KernelDensity": kernel_density,
}
ALONE = {"one flow": one_flow}  # reported beside, not judged


def run(method: str, name: str, k: int, table: uci_tables.Table) -> dict:
    found = (METHODS | ALONE)[method](table.split(k), k)
    return {
        "set": name,
        "split": k,
        "method": method,
        "test": float(found.scores.mean()),
        "seconds": found.seconds,
        **found.more,
    }


class Verdict(NamedTuple):
    """cf.FlowDensity compared with the best other estimator on one table, over the splits that both have."""

    means: dict[str, float]
    errors: dict[str, float]
    best: str  # of the others
    lead: float  # ours less the best other one
    error: float  # of the lead: standard deviation of the paired differences by the root of the number of splits

    @property
    def words(self) -> str:
        if self.lead >= 0:
            return "best"
        return "within one standard error" if self.lead >= -self.error else "not the best"


def judge(results: list[dict], name: str) -> Verdict | None:
    by = {m: {r["split"]: r["test"] for r in results if r["set"] == name and r["method"] == m} for m in METHODS}
    splits = sorted(set.intersection(*(set(found) for found in by.values())))
    if len(splits) < 2:
        return None

    def error(values: list[float]) -> float:
        return statistics.stdev(values) / math.sqrt(len(values))

    tests = {m: [found[k] for k in splits] for m, found in by.items()}
    means = {m: statistics.mean(values) for m, values in tests.items()}
    best = max((m for m in METHODS if m != "counterflow"), key=means.__getitem__)
    gaps = [a - b for a, b in zip(tests["counterflow"], tests[best], strict=True)]
    errors = {m: error(values) for m, values in tests.items()}
    return Verdict(means, errors, best, statistics.mean(gaps), error(gaps))


def report(results: list[dict], where: str, folder: Path) -> str:
    """Return the report in Markdown."""
    lines = [
        "# Densities of the UCI regression tables",
        "",
        f"Made by `python benchmarks/uci.py --data PATH` on {where}.",
        "Mean held-out log density of the standardised, continuous table in nats per row, higher is better, and its",
        "standard error over the splits in brackets. The lead is ours less the best of the others, with the standard",
        "error of the mean of the paired differences by split; that decides the verdict. Seconds are CPU",
        "seconds of fitting on one thread, mean over splits.",
        "",
        "| table | rows, columns | splits | " + " | ".join(METHODS) + " | lead | verdict |",
        "|---|---|---|" + "---|" * len(METHODS) + "---|---|",
    ]
    judged = {name: judge(results, name) for name in uci_tables.SETS}
    for name, verdict in judged.items():
        if verdict is None:
            continue
        rows = uci_tables.load(name, folder).rows.shape
        count = min(sum(r["set"] == name and r["method"] == m for r in results) for m in METHODS)
        cells = [f"{verdict.means[m]:.3f} ({verdict.errors[m]:.3f})" for m in METHODS]
        cells += [f"{verdict.lead:+.3f} ({verdict.error:.3f}) to {verdict.best}", verdict.words]
        lines.append(f"| {name} | {rows[0]}, {rows[1]} | {count} | " + " | ".join(cells) + " |")
    lines += ["", "CPU seconds of one fit:", "", "| table | " + " | ".join(METHODS) + " |"]
    lines.append("|---|" + "---|" * len(METHODS))
    for name in uci_tables.SETS:
        times = [[r["seconds"] for r in results if r["set"] == name and r["method"] == m] for m in METHODS]
        lines.append(f"| {name} | " + " | ".join(f"{statistics.mean(t):.1f}" if t else "" for t in times) + " |")
    lines += [
        "",
        "Ours averages three flows, and holds training rows as kernels where the validation part asks for it.",
        "Beside it is one flow without kernels, and zuko's NSF of the same sizes:",
        "",
        "| table | splits that hold rows | counterflow | one flow | zuko NSF | parameters | of one | of zuko's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in uci_tables.SETS:
        found = {
            m: [r for r in results if r["set"] == name and r["method"] == m]
            for m in ("counterflow", "one flow", "zuko NSF")
        }
        if not all(found.values()):
            continue
        splits = set.intersection(*({r["split"] for r in runs} for runs in found.values()))
        held = sum(r["holds rows"] for r in found["counterflow"])
        means = [statistics.mean(r["test"] for r in runs if r["split"] in splits) for runs in found.values()]
        sizes = [runs[0]["parameters"] for runs in found.values()]
        cells = [f"{mean:.3f}" for mean in means] + [f"{size:,}" for size in sizes]
        lines.append(f"| {name} | {held} of {len(found['counterflow'])} | " + " | ".join(cells) + " |")
    lines += ["", "How the columns were made continuous:", "", "| table | columns | left out |", "|---|---|---|"]
    for name in uci_tables.SETS:
        table = uci_tables.load(name, folder)
        said = ", ".join(f"{n}: {kind}" for n, kind in zip(table.names, table.kinds, strict=True))
        lines.append(f"| {name} | {said} | {'; '.join(table.left_out) or 'none'} |")
    settings = dataclasses.asdict(BUDGET)
    lines += [
        "",
        "Settings of the other flows, and of ours by default: "
        + ", ".join(f"{key} {value}" for key, value in settings.items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Write a file atomically."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with uci/regression/")
    parser.add_argument("--sets", nargs="+", default=list(uci_tables.SETS), choices=list(uci_tables.SETS))
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *ALONE], choices=[*METHODS, *ALONE])
    parser.add_argument("--splits", type=int, nargs="+", default=list(SPLITS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "uci.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "scikit-learn", "nflows", "zuko"))
    where = f"{platform.machine()}, {args.threads} thread(s), {libraries}, Python {platform.python_version()}"
    results = json.loads(args.out.read_text())["results"] if args.out.exists() else []
    done = {(r["set"], r["split"], r["method"]) for r in results}
    for k in args.splits:
        for name in args.sets:
            table = uci_tables.load(name, args.data)
            for method in args.methods:
                if (name, k, method) in done:
                    continue
                results.append(run(method, name, k, table))
                print(json.dumps(results[-1]), flush=True)
                write(args.out, json.dumps({"machine": where, "results": results}, indent=1) + "\n")
                write(args.out.with_suffix(".md"), report(results, where, args.data))
    print(report(results, where, args.data))


if __name__ == "__main__":
    main()
