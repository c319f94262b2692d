"""Outlier detection on the labelled tables of scikit-learn, by DensityOutlierDetector and scikit-learn's detectors.

    python benchmarks/outliers.py --seeds 3

One or more classes of a table are usual, a tenth as many rows of another class are outliers. "new rows": detectors are
fitted to 70 % of the usual rows and rank the other 30 % and the outliers. "same rows": they are fitted to all rows,
outliers included, and rank these. The figure is the area under the ROC curve. Writes benchmarks/results/outliers.md;
finished runs are kept in outliers.json beside it and skipped, so that the command can be repeated.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import counterflow as cf
from counterflow.density.outliers import DensityOutlierDetector

PAGE = Path(__file__).parent / "results" / "outliers.md"
KEPT = PAGE.with_suffix(".json")  # area under the curve by "table, setting, seed, detector"
TABLES = {  # loader, usual classes, class of the outliers
    "breast cancer": (load_breast_cancer, (1,), 0),
    "wine": (load_wine, (0, 1), 2),
    "iris": (load_iris, (0, 1), 2),
    "digits": (load_digits, (0, 1, 2, 3, 4), 8),
}


def gaussian_mixture(x: np.ndarray, seed: int) -> Any:
    """Return the Gaussian mixture of standardized rows with up to five components, chosen by BIC."""
    scaled = StandardScaler().fit(x)
    candidates = [
        GaussianMixture(k, reg_covar=1e-3, random_state=seed).fit(scaled.transform(x))
        for k in range(1, 6)
        if len(x) >= 20 * k
    ]
    return make_pipeline(scaled, min(candidates, key=lambda mixture: mixture.bic(scaled.transform(x))))


def flow(x: np.ndarray, seed: int) -> Any:
    return DensityOutlierDetector(cf.FlowDensity(kernels=False, random_state=seed)).fit(x)


DETECTORS: dict[str, Callable[[np.ndarray, int], Any]] = {
    "DensityOutlierDetector": flow,
    "IsolationForest": lambda x, seed: IsolationForest(random_state=seed).fit(x),
    "LocalOutlierFactor": lambda x, _: make_pipeline(StandardScaler(), LocalOutlierFactor(novelty=True)).fit(x),
    "GaussianMixture by BIC": gaussian_mixture,
}


def split(table: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return by setting the rows to fit, the rows to rank, and their labels, 1 for outliers."""
    load, usual_classes, other = TABLES[table]
    x, classes = load(return_X_y=True)
    rng = np.random.default_rng(seed)
    usual = rng.permutation(x[np.isin(classes, usual_classes)])
    outliers = rng.permutation(x[classes == other])[: len(usual) // 10]
    cut = int(0.7 * len(usual))
    ranked = np.concatenate([usual[cut:], outliers])
    everything = np.concatenate([usual, outliers])
    return {
        "new rows": (usual[:cut], ranked, np.repeat([0, 1], [len(usual) - cut, len(outliers)])),
        "same rows": (everything, everything, np.repeat([0, 1], [len(usual), len(outliers)])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # constant columns of the digits
    kept: dict[str, float] = json.loads(KEPT.read_text("utf-8")) if KEPT.exists() else {}
    areas: dict[tuple[str, str, str], list[float]] = {}
    for table in TABLES:
        for seed in range(seeds):
            for setting, (fitted, ranked, label) in split(table, seed).items():
                for name, make in DETECTORS.items():
                    run = f"{table}, {setting}, seed {seed}, {name}"
                    if run not in kept:
                        scores = make(fitted, seed).score_samples(ranked)
                        kept[run] = round(float(roc_auc_score(label, -np.nan_to_num(scores, neginf=-1e300))), 3)
                        KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
                    areas.setdefault((table, setting, name), []).append(kept[run])
                    print(f"{run}: {kept[run]:.3f}", flush=True)
    system = f"{platform.system()} {platform.machine()}"
    lines = [
        "# Outlier detection",
        "",
        f"Made by `python benchmarks/outliers.py --seeds {seeds}` on Python {platform.python_version()}, torch "
        f"{version('torch')},",
        f"scikit-learn {version('scikit-learn')}, {system}. Area under the ROC curve, mean over seeds; the",
        "script's docstring has the two settings.",
        "",
        "| table | rows | " + " | ".join(DETECTORS) + " |",
        "|---|---|" + "---|" * len(DETECTORS),
    ]
    ranks: dict[str, list[int]] = {name: [] for name in DETECTORS}
    for table in TABLES:
        for setting in ("new rows", "same rows"):
            means = {name: statistics.mean(areas[table, setting, name]) for name in DETECTORS}
            for name in DETECTORS:
                ranks[name].append(1 + sum(other > means[name] for other in means.values()))
            cells = [f"**{m:.3f}**" if m == max(means.values()) else f"{m:.3f}" for m in means.values()]
            lines.append(f"| {table} | {setting} | " + " | ".join(cells) + " |")
    lines.append("| mean rank | | " + " | ".join(f"{statistics.mean(ranks[name]):.2f}" for name in DETECTORS) + " |")
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(PAGE.read_text("utf-8"))


if __name__ == "__main__":
    main()
