"""Missing cells: FlowDensity(missing="model", members=1) beside IterativeImputer and a Gaussian mixture.

The tables are those of scikit-learn.

    python benchmarks/missing.py --seeds 1

A fifth of the cells of training and test rows is left out at random. All are fitted to the training rows with holes and
draw 20 values for each left-out cell of the test rows, given the known cells of the row.

* CRPS: the continuous ranked probability score of the draws, in standard deviations of the column, the mean over the
  left-out cells; lower is better.
* log score: the mean log density of the known cells of the test rows, nats per row; higher is better. IterativeImputer
  has none.

The mixture is fitted by EM on the rows with holes: its E-step conditions on what is known. The number of its
components is chosen on a tenth of the training rows. The draws of IterativeImputer (sample_posterior=True) come from
four fits, five of each. Numbers are standardized for both.

Writes benchmarks/results/missing.md; finished runs are kept in missing.json beside it and skipped.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.special import logsumexp
from sklearn.datasets import load_diabetes, load_iris
from sklearn.experimental import enable_iterative_imputer  # noqa: F401  # makes IterativeImputer importable
from sklearn.impute import IterativeImputer

import counterflow as cf

PAGE = Path(__file__).parent / "results" / "missing.md"
KEPT = PAGE.with_suffix(".json")
DRAWS = 20
SHARE = 0.2
RIDGE = 1e-3  # added to the variances of the mixture, as in scikit-learn's reg_covar, in standardized columns
TABLES = {
    "iris": lambda: load_iris(return_X_y=True)[0],
    "diabetes": lambda: load_diabetes(return_X_y=True, scaled=False)[0],
}


class HoledMixture:
    """Gaussian mixture fitted by EM to rows with missing cells (Ghahramani and Jordan 1994)."""

    def __init__(self, components: int, seed: int) -> None:
        self.K = components
        self.rng = np.random.default_rng(seed)

    def fit(self, x: np.ndarray, steps: int = 40) -> HoledMixture:
        D = x.shape[1]
        filled = np.where(np.isnan(x), 0.0, x)
        self.means = filled[self.rng.choice(len(x), self.K, replace=False)]
        self.covariances = np.stack([np.eye(D)] * self.K)
        self.weights = np.full(self.K, 1 / self.K)
        for _ in range(steps):
            joint = self._joint(x)
            r = np.exp(joint - logsumexp(joint, 1, keepdims=True))
            for k in range(self.K):
                first, second = np.zeros(D), np.zeros((D, D))
                for row, weight in zip(x, r[:, k], strict=True):
                    mean, covariance = self._conditional(row, k)
                    first += weight * mean
                    second += weight * (np.outer(mean, mean) + covariance)
                total = r[:, k].sum() + 1e-9
                self.means[k] = first / total
                self.covariances[k] = second / total - np.outer(self.means[k], self.means[k]) + RIDGE * np.eye(D)
                self.weights[k] = total
            self.weights /= self.weights.sum()
        return self

    def score_samples(self, x: np.ndarray) -> np.ndarray:
        return logsumexp(self._joint(x), 1)

    def draw(self, x: np.ndarray) -> np.ndarray:
        joint = self._joint(x)
        p = np.exp(joint - logsumexp(joint, 1, keepdims=True))
        rows = []
        for row, each in zip(x, p, strict=True):
            mean, covariance = self._conditional(row, self.rng.choice(self.K, p=each / each.sum()))
            rows.append(self.rng.multivariate_normal(mean, covariance, method="eigh"))
        return np.where(np.isnan(x), np.array(rows), x)

    def _joint(self, x: np.ndarray) -> np.ndarray:
        log_p = np.tile(np.log(self.weights), (len(x), 1))
        for n, row in enumerate(x):
            known = ~np.isnan(row)
            for k in range(self.K):
                factor = np.linalg.cholesky(self.covariances[k][np.ix_(known, known)])
                e = np.linalg.solve(factor, row[known] - self.means[k][known])
                log_p[n, k] += -0.5 * (e @ e + known.sum() * np.log(2 * np.pi)) - np.log(np.diag(factor)).sum()
        return log_p

    def _conditional(self, row: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        known = ~np.isnan(row)
        mean, covariance = np.where(known, row, 0.0), np.zeros((len(row), len(row)))
        if not known.all():
            S, m = self.covariances[k], self.means[k]
            gain = np.linalg.solve(S[np.ix_(known, known)], S[np.ix_(known, ~known)]).T
            mean[~known] = m[~known] + gain @ (row[known] - m[known])
            covariance[np.ix_(~known, ~known)] = S[np.ix_(~known, ~known)] - gain @ S[np.ix_(known, ~known)]
        return mean, covariance


def crps(draws: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean of E|X - y| - E|X - X'| / 2 over cells, from draws (S, cells) and their truths."""
    S = len(draws)
    ordered = np.sort(draws, 0)
    spread = ((2 * np.arange(1, S + 1) - S - 1)[:, None] * ordered).sum(0) / (S * (S - 1))
    return float((np.abs(draws - truth).mean(0) - spread).mean())


def run(table: str, seed: int) -> dict[str, float]:
    """Return scores by "contestant, score"."""
    rng = np.random.default_rng(seed)
    x = rng.permutation(TABLES[table]())
    x = x + 0.0
    cut = round(0.7 * len(x))
    holes = rng.random(x.shape) < SHARE
    holes[holes.all(1), 0] = False
    holed = np.where(holes, np.nan, x)
    train, test, truth = holed[:cut], holed[cut:], x[cut:]
    mean, std = np.nanmean(train, 0), np.nanstd(train, 0)
    z_train, z_test = (train - mean) / std, (test - mean) / std
    cells = np.isnan(test)

    def score(draws: np.ndarray) -> float:
        """The CRPS of draws (S, N, D) in standard deviations."""
        return crps(((draws - mean) / std)[:, cells], ((truth - mean) / std)[cells])

    result = {}
    started = time.perf_counter()
    density = cf.FlowDensity(missing="model", columns="real", members=1, random_state=seed).fit(train)
    result["flow, log score"] = density.score(test)
    result["flow, seconds"] = time.perf_counter() - started
    for candidates in (1, 16):
        drawn = density.impute(test, DRAWS, random_state=seed, candidates=candidates)
        result[f"flow with {candidates} candidates, CRPS"] = score(drawn)
    tenth = cut // 10
    best = max(
        range(1, 4),
        key=lambda K: HoledMixture(K, seed).fit(z_train[tenth:], 20).score_samples(z_train[:tenth]).mean(),
    )
    mixture = HoledMixture(best, seed).fit(z_train)
    result["mixture, log score"] = float(mixture.score_samples(z_test).mean() - np.log(std) @ (~cells).mean(0))
    result["mixture, CRPS"] = score(np.stack([mixture.draw(z_test) * std + mean for _ in range(DRAWS)]))
    drawn = []
    for k in range(DRAWS // 5):
        imputer = IterativeImputer(sample_posterior=True, random_state=seed * 100 + k).fit(z_train)
        drawn += [imputer.transform(z_test) * std + mean for _ in range(5)]
    result["IterativeImputer, CRPS"] = score(np.stack(drawn))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="splits and masks of each table")
    parser.add_argument("--tables", nargs="*", default=list(TABLES), help="some of the tables")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    for seed in range(options.seeds):
        for table in options.tables:
            if f"{table}, {seed}" in kept:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kept[f"{table}, {seed}"] = run(table, seed)
            KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
            print(table, seed, kept[f"{table}, {seed}"], flush=True)
    write_page(kept, options.seeds)


def write_page(kept: dict[str, dict[str, float]], seeds: int) -> None:
    names = {
        "CRPS": ["flow with 1 candidates", "flow with 16 candidates", "mixture", "IterativeImputer"],
        "log score": ["flow", "mixture"],
    }
    lines = ["# Missing cells", "", f"    python benchmarks/missing.py --seeds {seeds}", ""]
    lines += [f"A fifth of the cells is missing. The docstring of the benchmark says more; means of {seeds} splits."]
    for kind, contestants in names.items():
        better = "standard deviations, lower is better" if kind == "CRPS" else "nats per row, higher is better"
        heads = [name.replace("1 candidates", "one candidate") for name in contestants]
        lines += ["", f"{kind}, {better}:", "", f"| table | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
        for table in TABLES:
            runs = [kept[f"{table}, {seed}"] for seed in range(seeds) if f"{table}, {seed}" in kept]
            if runs:
                cells = [f"{statistics.mean(r[f'{name}, {kind}'] for r in runs):.3f}" for name in contestants]
                lines.append(f"| {table} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("counterflow", "torch", "scikit-learn"))
    lines += ["", f"One thread of {platform.machine()} with other work beside it; {versions}."]
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
