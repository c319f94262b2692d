"""NUTS in the coordinates of a fitted flow beside plain NUTS: effective draws per evaluation of the target.

    python benchmarks/refine.py --seeds 0

nutpie runs four chains of 500 tuning draws and 500 draws: on the target itself, with its own diagonal adaptation, and
through the flow of `cf.fit_posterior` with the default configuration (`counterflow.posterior.nuts`). ESS is the smaller
one of bulk and tail, of the worst coordinate. Evaluations include the tuning, but not the fit, whose time has its own
column. Written to results/refine.md.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import nutpie
import pyarrow
import torch
from nutpie import compiled_pyfunc
from shapes import banana, funnel
from torch import Tensor
from torch.distributions import HalfCauchy, Normal

import counterflow as cf
from counterflow.diagnostics.chains import convergence
from counterflow.posterior.evaluation import log_density_and_score
from counterflow.posterior.mcmc import Chains
from counterflow.posterior.nuts import nuts

RESULT = Path(__file__).parent / "results" / "refine.md"
CHAINS = 4
DRAWS = 500  # of each chain, and as many to tune it
Target = Callable[[Tensor], Tensor]


def centred_schools(theta: Tensor) -> Tensor:
    """Return the eight schools with theta ~ N(mu, tau), (mu, log tau, theta): Rubin 1981."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
    mu, log_tau, effect = theta[:, :1], theta[:, 1:2], theta[:, 2:]
    prior = Normal(0, 5).log_prob(mu) + HalfCauchy(5.0).log_prob(log_tau.exp()) + log_tau
    groups = Normal(mu, log_tau.exp()).log_prob(effect) + Normal(effect, sigma).log_prob(y)
    return prior[:, 0] + groups.sum(1)


TARGETS: dict[str, tuple[int, Target]] = {
    "Neal's funnel, 10 d": (10, funnel(10).log_density),
    "Neal's funnel, 21 d": (21, funnel(21).log_density),
    "centred eight schools, 10 d": (10, centred_schools),
    "banana, 2 d, bend 0.1": (2, banana(0.1).log_density),
}


def plain(target: Target, dim: int, seed: int) -> Chains:
    """Run nutpie on the target itself."""

    def log_density(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, score = log_density_and_score(target, torch.tensor(theta)[None])
        return value.item(), score[0].numpy()

    model = compiled_pyfunc.from_pyfunc(
        dim,
        lambda: log_density,
        lambda seed1, seed2, chain: lambda theta: {"theta": theta},
        [np.dtype("float64")],
        [(dim,)],
        ["theta"],
        coords={"coordinate": list(map(str, range(dim)))},
        dims={"theta": ("coordinate",)},
    )
    found = nutpie.sample(
        model, draws=DRAWS, tune=DRAWS, chains=CHAINS, cores=1, seed=seed, progress_bar=False, return_raw_trace=True
    )
    draws, stats = found.get_arrow_trace()
    theta = torch.tensor(np.stack([column(chain, "theta")[-DRAWS:] for chain in draws]))
    diverging = sum(int(column(chain, "diverging")[-DRAWS:].sum()) for chain in stats)
    acceptance = float(np.mean([column(chain, "mean_tree_accept")[-DRAWS:] for chain in stats]))
    steps = sum(int(column(chain, "n_steps").sum()) for chain in stats)
    return Chains(theta, acceptance, diverging, convergence(theta), steps)


def column(batch: Any, name: str) -> np.ndarray:
    """Return a column of an Arrow record batch, one row for each draw."""
    return np.stack(pyarrow.array(batch.column(name)).to_numpy(zero_copy_only=False))


def row(name: str, seed: int, method: str, found: Chains, seconds: float, fit: str) -> str:
    """Return one row of the table."""
    r_hat = found.convergence.r_hat.max().item()
    ess = min(found.convergence.ess_bulk.min().item(), found.convergence.ess_tail.min().item())
    numbers = f"{r_hat:.3f} | {ess:,.0f} | {found.divergences} | {found.evaluations:,}"
    per_evaluation = f"{1000 * ess / found.evaluations:.2f}"
    return f"| {name} | {seed} | {method} | {numbers} | {per_evaluation} | {seconds:.0f} | {fit} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    args = parser.parse_args()
    lines = [
        "# NUTS in the coordinates of a flow",
        "",
        f"Made by `python benchmarks/refine.py --seeds {' '.join(map(str, args.seeds))}` on {platform.machine()}, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, nutpie {nutpie.__version__}. Four chains of "
        f"{DRAWS} tuning draws and {DRAWS} draws; seconds are CPU time; fit: k-hat and seconds.",
        "",
        "| target | seed | NUTS | R-hat | ESS | divergences | evaluations | ESS per 1,000 | seconds | fit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in args.targets:
        dim, target = TARGETS[name]
        for seed in args.seeds:
            begun = time.process_time()
            found = plain(target, dim, seed)
            lines.append(row(name, seed, "plain", found, time.process_time() - begun, ""))
            begun = time.process_time()
            fitted = cf.fit_posterior(target, cf.PosteriorConfig(seed=seed), dim=dim)
            fit = f"{fitted.k_hat:.2f}, {time.process_time() - begun:.0f}"
            begun = time.process_time()
            found = nuts(fitted.flow, target, chains=CHAINS, samples=DRAWS, warm_up=DRAWS, seed=seed)
            lines.append(row(name, seed, "flow", found, time.process_time() - begun, fit))
            print(*lines[-2:], sep="\n", flush=True)
            RESULT.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
