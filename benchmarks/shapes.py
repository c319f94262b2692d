"""Accuracy on synthetic targets with exact draws: funnel, banana, ill-conditioned Gaussian, t, two modes.

    python benchmarks/shapes.py

Every target is fitted with the default configuration. 10,000 of its draws are compared with as many exact ones by the
Wasserstein-1 distance of each marginal, relative to the distance between two sets of exact draws. Synthetic targets,
the mean Wasserstein distance of the marginals and the baseline of exact draws follow Agrawal and Domke 2024,
"Disentangling impact of capacity, objective, batchsize, estimators, and step-size on flow VI"; the targets' parameters
are ours. Written to results/shapes.md.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Normal

import counterflow as cf

HERE = Path(__file__).parent / "results"
N = 10_000  # draws of each set
BASELINES = 10  # pairs of exact sets


@dataclass(frozen=True)
class Shape:
    """A log density (B, D) -> (B,), exact draws n -> (n, D), and whether only a flag is wanted."""

    dim: int
    log_density: Callable[[Tensor], Tensor]
    draw: Callable[[int], Tensor]
    to_be_flagged: bool = False


def real(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def funnel(dim: int) -> Shape:
    """v ~ N(0, 3), x_i ~ N(0, exp(v / 2)): Neal 2003, "Slice sampling"."""

    def log_density(theta: Tensor) -> Tensor:
        v, x = theta[:, 0], theta[:, 1:]
        return Normal(0, 3).log_prob(v) + Normal(0, (v / 2).exp()[:, None]).log_prob(x).sum(1)

    def draw(n: int) -> Tensor:
        v = 3 * torch.randn(n, 1, dtype=torch.float64)
        return torch.cat([v, (v / 2).exp() * torch.randn(n, dim - 1, dtype=torch.float64)], 1)

    return Shape(dim, log_density, draw)


def banana(bend: float) -> Shape:
    """x ~ N(0, 10), y ~ N(bend (100 - x^2), 1): Haario et al. 1999, "Adaptive proposal distribution"."""

    def log_density(theta: Tensor) -> Tensor:
        x, y = theta.T
        return Normal(0, 10).log_prob(x) + Normal(bend * (100 - x**2), 1).log_prob(y)

    def draw(n: int) -> Tensor:
        x = 10 * torch.randn(n, dtype=torch.float64)
        return torch.stack([x, bend * (100 - x**2) + torch.randn(n, dtype=torch.float64)], 1)

    return Shape(2, log_density, draw)


def gaussian(dim: int, condition: float) -> Shape:
    """Covariance with eigenvalues from 1 / condition to 1, evenly on the log scale, in a random rotation."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    eigenvalues = torch.logspace(-math.log10(condition), 0, dim, dtype=torch.float64)
    q = MultivariateNormal(torch.zeros(dim, dtype=torch.float64), (rotation * eigenvalues) @ rotation.T)
    return Shape(dim, q.log_prob, lambda n: q.sample((n,)))


def student(dim: int, df: float) -> Shape:
    """Multivariate t with unit scale matrix: z sqrt(df / chi2)."""

    def log_density(theta: Tensor) -> Tensor:
        return -(df + dim) / 2 * torch.log1p(theta.square().sum(1) / df)

    def draw(n: int) -> Tensor:
        chi2 = torch.distributions.Chi2(real(df)).sample((n,))
        return torch.randn(n, dim, dtype=torch.float64) * (df / chi2).sqrt()

    return Shape(dim, log_density, draw)


def two_modes(dim: int, apart: float) -> Shape:
    """Two unit Gaussians of weights 0.5, their means `apart` standard deviations from each other."""
    means = real(-apart / 2, apart / 2)[:, None] / math.sqrt(dim) * torch.ones(dim, dtype=torch.float64)
    modes = torch.distributions.Independent(Normal(means, 1), 1)
    q: Distribution = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(real(0.5, 0.5)), modes)
    return Shape(dim, q.log_prob, lambda n: q.sample((n,)), to_be_flagged=True)


SHAPES = {
    "Neal's funnel, 10 d": funnel(10),
    "banana, 2 d, bend 0.1": banana(0.1),
    "Gaussian, 50 d, condition number 1e4": gaussian(50, 1e4),
    "Student t, 10 d, 3 degrees of freedom": student(10, 3.0),
    "two modes 12 sd apart, 2 d": two_modes(2, 12.0),
}


def distances(a: Tensor, b: Tensor) -> np.ndarray:
    """Wasserstein-1 distance of each marginal of two sets of draws, (n, D) each -> (D,)."""
    return np.array([wasserstein_distance(u, v) for u, v in zip(a.T.numpy(), b.T.numpy(), strict=True)])


def baseline(shape: Shape) -> np.ndarray:
    """Distances (D,) of exact draws from exact draws, averaged over pairs of sets."""
    return np.mean([distances(shape.draw(N), shape.draw(N)) for _ in range(BASELINES)], 0)


def run(shape: Shape, seed: int) -> dict:
    """Fit one target and compare its draws with exact ones."""
    begun = time.perf_counter()
    target = cf.targets.from_torch(shape.log_density, dim=shape.dim)
    posterior = cf.fit_posterior(target, cf.PosteriorConfig(seed=seed))
    draws = torch.cat([value.reshape(N, -1) for value in posterior.sample(N).values()], 1)
    seconds = time.perf_counter() - begun
    torch.manual_seed(seed)
    ours = np.mean([distances(draws, shape.draw(N)) for _ in range(BASELINES)], 0)
    exact = baseline(shape)
    return {
        "seed": seed,
        "k_hat": posterior.k_hat,
        "flagged": not posterior.trusted,
        "mean": ours.mean(),
        "exact_mean": exact.mean(),
        "ratio_of_means": ours.mean() / exact.mean(),
        "worst_ratio": (ours / exact).max(),
        "seconds": seconds,
    }


def passes(shape: Shape, result: dict) -> bool:
    return result["flagged"] or (not shape.to_be_flagged and result["ratio_of_means"] <= 2)


def report(results: dict[str, list[dict]], threads: int) -> str:
    lines = [
        "# Synthetic shapes with exact draws",
        "",
        f"Made by `python benchmarks/shapes.py` on {platform.machine()}, {threads} thread(s), "
        f"torch {torch.__version__}, Python {platform.python_version()}.",
        f"W1: Wasserstein-1 distance of the marginals from {N:,} exact draws, mean over marginals. Exact: the same of "
        f"{N:,} other exact draws, mean of {BASELINES} pairs. Worst: the largest ratio of a marginal. Wanted: a ratio "
        "of at most 2, or a flag; the two modes must be flagged.",
        "",
        "| target | seed | k-hat | flagged | W1 | exact | ratio | worst | seconds | as wanted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        lines += [
            f"| {name} | {r['seed']} | {r['k_hat']:.2f} | {'yes' if r['flagged'] else ''} | {r['mean']:.4g} "
            f"| {r['exact_mean']:.4g} | {r['ratio_of_means']:.2f} | {r['worst_ratio']:.2f} | {r['seconds']:.1f} "
            f"| {'yes' if passes(SHAPES[name], r) else 'no'} |"
            for r in rows
        ]
    rows = [passes(SHAPES[name], r) for name in results for r in results[name]]
    seconds = statistics.median(r["seconds"] for rows in results.values() for r in rows)
    lines += ["", f"As wanted: {sum(rows)} of {len(rows)} runs; {seconds:.0f} s in the median."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="targets whose names hold a PART")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "shapes.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, list[dict]] = {}
    for name, shape in SHAPES.items():
        if not any(part in name for part in args.only):
            continue
        for seed in args.seeds:
            results.setdefault(name, []).append(run(shape, seed))
            print(name, results[name][-1], flush=True)
            args.out.parent.mkdir(exist_ok=True)
            args.out.write_text(report(results, args.threads))


if __name__ == "__main__":
    main()
