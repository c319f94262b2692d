"""Figures of the adapters: what our flows save inside zuko, sbi, Pyro, pocoMC and nessai.

    python benchmarks/interop.py [zuko] [sbi] [pyro] [pocomc] [nessai]

The library's own flow and ours take turns in one process, with one thread; a time is the median. Each section replaces
its own in results/interop.md. The extras of the same names install the libraries.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import counterflow as cf

PAGE = Path(__file__).parent / "results" / "interop.md"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def medians(works: list[Callable[[], object]], repeats: int = 5) -> list[float]:
    """Return the median time of each, in turns, after one call that warms up."""
    for work in works:
        work()
    times = [[seconds(work) for work in works] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def table(head: str, rows: list[tuple[object, ...]]) -> list[str]:
    names = head.split(" | ")
    lines = [f"| {head} |", "|" + "---|" * len(names)]
    return [*lines, *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)]


def zuko() -> list[str]:
    """Draw and score with flows of one size: five affine layers, D = 64, hidden layers (512, 512)."""
    import zuko as library

    from counterflow.interop.zuko import to_zuko

    theirs = library.flows.MAF(64, transforms=5, hidden_features=(512, 512)).eval()
    ours = to_zuko(cf.convert(theirs))
    x = torch.randn(1_000, 64)
    with torch.no_grad():
        draws = medians([lambda: theirs().sample((1_000,)), lambda: ours().sample((1_000,))], 3)
        scores = medians([lambda: theirs().log_prob(x), lambda: ours().log_prob(x)])
    rows = [
        ("1,000 draws", *(f"{t:.3g}" for t in draws), f"{draws[0] / draws[1]:.3g}"),
        ("1,000 log densities", *(f"{t:.3g}" for t in scores), f"{scores[0] / scores[1]:.3g}"),
    ]
    return table("MAF, D = 64, H = 512, five layers | zuko, s | to_zuko(cf.convert(it)), s | ratio", rows)


# Tasks of sbibm (Lueckmann et al. 2021), written here: prior, simulator, draws of the posterior given x.


class LinearGaussian:
    """theta in R^10 ~ N(0, 0.1 I), x = theta + N(0, 0.1 I)."""

    prior = torch.distributions.MultivariateNormal(torch.zeros(10), 0.1 * torch.eye(10))

    @staticmethod
    def simulate(theta: Tensor) -> Tensor:
        return theta + 0.1**0.5 * torch.randn_like(theta)

    @staticmethod
    def posterior(x: Tensor, n: int) -> Tensor:
        return x / 2 + 0.05**0.5 * torch.randn(n, 10)


class TwoMoons:
    """theta in [-1, 1]^2; x is a point of a crescent, moved by (-|theta_1 + theta_2|, theta_2 - theta_1) / sqrt(2)."""

    @property
    def prior(self) -> Any:
        from sbi.utils import BoxUniform

        return BoxUniform(-torch.ones(2), torch.ones(2))

    @staticmethod
    def crescent(n: int) -> Tensor:
        angle, radius = math.pi * (torch.rand(n) - 0.5), 0.1 + 0.01 * torch.randn(n)
        return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)

    def simulate(self, theta: Tensor) -> Tensor:
        first, second = theta.unbind(1)
        return self.crescent(len(theta)) + torch.stack([-(first + second).abs(), second - first], 1) / 2**0.5

    def posterior(self, x: Tensor, n: int) -> Tensor:
        moved = x - self.crescent(50 * n)
        total, difference = -(2**0.5) * moved[:, 0], 2**0.5 * moved[:, 1]
        sign = torch.where(torch.rand(len(moved)) < 0.5, -1.0, 1.0)
        theta = torch.stack([sign * total - difference, sign * total + difference], 1) / 2
        return theta[(total >= 0) & (theta.abs() <= 1).all(1)][:n]


class SLCP:
    """theta in [-3, 3]^5; x is four points of a normal with mean theta_1:2, stds theta_3^2, theta_4^2, tanh(theta_5)."""

    @property
    def prior(self) -> Any:
        from sbi.utils import BoxUniform

        return BoxUniform(-3 * torch.ones(5), 3 * torch.ones(5))

    @staticmethod
    def cholesky(shape: Tensor) -> Tensor:
        first, second, rho = shape[:, 0] ** 2, shape[:, 1] ** 2, torch.tanh(shape[:, 2])
        rows = [first, torch.zeros_like(first), rho * second, second * (1 - rho**2 + 1e-12).sqrt()]
        return torch.stack(rows, 1).reshape(-1, 2, 2)

    def simulate(self, theta: Tensor) -> Tensor:
        noise = torch.randn(len(theta), 4, 2) @ self.cholesky(theta[:, 2:]).mT
        return (theta[:, None, :2] + noise).flatten(1)

    def posterior(self, x: Tensor, n: int) -> Tensor:
        """Weight draws of the shape by its marginal likelihood; the mean given the shape is normal."""
        shape = 6 * torch.rand(2_000_000, 3, dtype=torch.float64) - 3
        L = self.cholesky(shape)
        points = x.double().reshape(4, 2)
        centred = points - points.mean(0)
        whitened = torch.linalg.solve_triangular(L, centred.T.expand(len(L), 2, 4), upper=False)
        log_weight = -whitened.square().sum((1, 2)) / 2 - 3 * L.diagonal(dim1=1, dim2=2).log().sum(1)
        chosen = torch.multinomial(torch.softmax(log_weight.nan_to_num(-math.inf), 0), 20 * n, replacement=True)
        mean = points.mean(0) + (L[chosen] @ torch.randn(len(chosen), 2, 1, dtype=torch.float64))[..., 0] / 2
        theta = torch.cat([mean, shape[chosen]], 1)
        return theta[(theta.abs() <= 3).all(1)][:n].float()


def sbi(simulations: int = 2_000, observations: int = 3, draws: int = 1_000) -> list[str]:
    """C2ST, training time and draws per second of NPE; steps per second of variational inference."""
    from sbi.inference import NPE
    from sbi.inference.posteriors import VIPosterior
    from sbi.inference.potentials.base_potential import CustomPotentialWrapper
    from sbi.utils.metrics import c2st

    from counterflow.interop.sbi import convert_posterior, estimator, variational

    found, rates = [], []
    for task in (TwoMoons(), LinearGaussian(), SLCP()):
        torch.manual_seed(1)
        theta = task.prior.sample((simulations,))
        x = task.simulate(theta)
        observed = task.simulate(task.prior.sample((observations,)))
        truth = [task.posterior(x_o, draws) for x_o in observed]
        estimators: dict[str, Any] = {
            "sbi, maf": "maf",
            "ours, maf": estimator("maf"),
            "sbi, nsf": "nsf",
            "ours, nsf": estimator("nsf", bins=10),
        }
        posteriors = {}
        row: list[object] = [type(task).__name__]
        for name, builder in estimators.items():
            torch.manual_seed(2)
            inference = NPE(task.prior, density_estimator=builder, show_progress_bars=False)
            inference.append_simulations(theta, x)
            spent = seconds(inference.train)
            posterior = posteriors[name] = inference.build_posterior()
            scores = []
            for x_o, exact in zip(observed, truth, strict=True):
                sampled = posterior.sample((len(exact),), x_o[None], show_progress_bars=False)
                scores.append(c2st(sampled, exact).item())
            row.append(f"{statistics.mean(scores):.3f} ({spent:.0f} s)")
            print(type(task).__name__, name, row[-1], flush=True)
        found.append(tuple(row))
        if not isinstance(task, SLCP):  # 100,000 accepted draws of a box take sbi minutes
            posteriors["sbi, maf, converted"] = convert_posterior(posteriors["sbi, maf"])
            posteriors["sbi, nsf, converted"] = convert_posterior(posteriors["sbi, nsf"])
            works = [
                partial(posterior.sample, (100_000,), observed[:1], show_progress_bars=False)
                for posterior in posteriors.values()
            ]
            times = medians(works, 3)
            rates += [
                (type(task).__name__, name, f"{100_000 / t:,.0f}") for name, t in zip(posteriors, times, strict=True)
            ]

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        return -(theta - x_o).square().sum(-1) / 0.2

    steps = []
    for D in (5, 20):
        prior = torch.distributions.MultivariateNormal(torch.zeros(D), torch.eye(D))
        works = []
        for q in ("maf", variational("iaf"), "nsf", variational("iaf", univariate=cf.RationalQuadraticSpline())):
            wrapped = CustomPotentialWrapper(potential, prior, torch.zeros(1, D))
            vi = VIPosterior(wrapped, prior, q=q)
            vi.set_default_x(torch.zeros(1, D))
            more = {"quality_control": False, "show_progress_bar": False, "check_for_convergence": False}
            works.append(lambda vi=vi, more=more: vi.train(max_num_iters=20, **more))
        steps.append((D, *(f"{20 / t:.3g}" for t in medians(works, 3))))
    names = list(estimators)
    return [
        f"C2ST of NPE with {simulations:,} simulations, the mean of {observations} observations (0.5 is best), and the",
        "time of training; sbi's defaults, and ours with five layers of (50, 50) units:",
        "",
        *table(f"task | {' | '.join(names)}", found),
        "",
        "100,000 draws of the posterior of one observation, in `posterior.sample`:",
        "",
        *table("task | estimator | draws per second", rates),
        "",
        "Steps per second of `VIPosterior.train` (rKL, 256 particles), a Gaussian target of D dimensions:",
        "",
        *table("D | sbi, maf | ours, iaf | sbi, nsf | ours, iaf of splines", steps),
    ]


SECTIONS = {"zuko": (zuko, ["zuko"]), "sbi": (sbi, ["sbi"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), choices=[*SECTIONS, []])
    chosen = parser.parse_args().sections
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    page = PAGE.read_text("utf-8") if PAGE.exists() else ""
    parts = {part.split("\n", 1)[0]: part for part in page.split("\n## ")[1:]}
    with tempfile.TemporaryDirectory() as folder:  # some libraries write logs where they run
        os.chdir(folder)
        for name in chosen:
            work, packages = SECTIONS[name]
            torch.manual_seed(0)
            lines = work()
            versions = ", ".join(f"{package} {version(package)}" for package in ("torch", *packages))
            where = f"{platform.machine()}, one thread, Python {platform.python_version()}, {versions}"
            made = f"Made by `python benchmarks/interop.py {name}` ({where})."
            parts[name] = "\n".join([name, "", made, "", *lines, ""])
            text = "# Our flows inside other libraries\n" + "".join(
                f"\n## {parts[key]}" for key in SECTIONS if key in parts
            )
            PAGE.write_text(text, "utf-8")
            print(parts[name], file=sys.stderr)


if __name__ == "__main__":
    main()
