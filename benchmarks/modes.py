"""Posteriors of several modes: the weights of the modes and k-hat of the mixture of flows.

    python benchmarks/modes.py

Targets, each fitted with the default configuration and several seeds:

* two normals N(-5 e, I) and N(5 e, I) of weights 0.3 and 0.7, 10 standard deviations apart along a random direction e,
* a two-component mixture model without an ordering, whose labels can be exchanged: 3 parameters, 100 rows,
* the same with three components of unequal weights, which has 6 labellings: 8 parameters, 150 rows.

"weight" is that of the smallest mode by the weighted draws, "largest error" that of any mode. Written to
results/modes.md after each fit.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import constraints

import counterflow as cf
from counterflow.posterior.targets.target import Target

RESULT = Path(__file__).parent / "results" / "modes.md"
ModeOf = Callable[[dict[str, Tensor]], Tensor]  # the number of the mode (S,) of draws by name


def two_normals(D: int) -> tuple[Target, ModeOf, list[float]]:
    """Return the target, the mode of draws, and the weights of the modes."""
    e = torch.randn(D, generator=torch.Generator().manual_seed(D)).double()
    at = 5 * e / e.norm()

    def log_density(theta: Tensor) -> Tensor:
        left, right = (-(theta - mean).square().sum(-1) / 2 for mean in (-at, at))
        return torch.logaddexp(math.log(0.3) + left, math.log(0.7) + right)

    return cf.targets.from_torch(log_density, dim=D), lambda x: (x["theta"] @ at > 0).long(), [0.3, 0.7]


def mixture_model(means: list[float], shares: list[float], rows: int) -> tuple[Target, ModeOf, list[float]]:
    """Return a mixture model of normals without an ordering: K! labellings of the same posterior probability."""
    K = len(means)
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor(shares), rows, replacement=True, generator=generator)
    y = (torch.tensor(means)[labels] + torch.randn(rows, generator=generator)).double()

    def log_density(mean: Tensor, share: Tensor) -> Tensor:
        each = share.log()[:, None] - (y[:, None] - mean[:, None]).square() / 2
        return torch.logsumexp(each, -1).sum(-1) - mean.square().sum(-1) / 200

    target = cf.targets.from_torch(
        log_density, shapes={"mean": (K,), "share": (K,)}, constraints={"share": constraints.simplex}
    )
    orders = torch.cartesian_prod(*[torch.arange(K)] * K)
    orders = orders[[len(set(order)) == K for order in orders.tolist()]]

    def mode_of(x: dict[str, Tensor]) -> Tensor:
        return (x["mean"].argsort(1)[:, None] == orders).all(-1).long().argmax(1)

    return target, mode_of, [1 / math.factorial(K)] * math.factorial(K)


TARGETS: dict[str, Callable[[], tuple[Target, ModeOf, list[float]]]] = {
    **{f"two normals, {D} d": lambda D=D: two_normals(D) for D in (2, 5, 10, 20)},  # type: ignore[misc]
    "mixture of 2, no ordering": lambda: mixture_model([-2.0, 2.0], [0.6, 0.4], 100),
    "mixture of 3, no ordering": lambda: mixture_model([-4.0, 0.0, 4.0], [0.5, 0.3, 0.2], 150),
}


def rows(name: str, seeds: list[int]) -> Iterator[str]:
    """Fit a target with each seed and yield the rows of the table."""
    target, mode_of, truth = TARGETS[name]()
    for seed in seeds:
        begun = time.process_time()
        posterior = cf.fit_posterior(target, cf.PosteriorConfig(seed=seed))
        seconds = time.process_time() - begun
        weights = torch.zeros(len(truth)).double()
        weights.index_add_(0, mode_of(posterior.values), posterior.log_weights.exp())
        error = (weights - torch.tensor(truth)).abs().max()
        yield (
            f"| {name} | {seed} | {len(posterior.mode_weights)} of {len(truth)} | {weights.min():.3f} | {error:.3f} | "
            f"{posterior.k_hat:.2f} | {posterior.ess:,.0f} | {posterior.missed:.3f} | "
            f"{'yes' if posterior.trusted else 'no'} | {seconds:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    args = parser.parse_args()
    lines = [
        "# Several modes",
        "",
        f"Made by `python benchmarks/modes.py` on {platform.machine()}, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}. 10,000 draws judge each fit; seconds are CPU time.",
        "",
        "| target | seed | flows of modes | smallest weight | largest error | k-hat | ESS | missed | trusted | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in args.targets:
        for row in rows(name, args.seeds):
            lines.append(row)
            print(row, flush=True)
            RESULT.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
