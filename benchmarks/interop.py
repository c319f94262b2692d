"""Figures of the adapters: what our flows save inside zuko, sbi, Pyro, pocoMC and nessai.

    python benchmarks/interop.py [SECTION ...]       # a section is one of the names in SECTIONS

The library's own flow and ours take turns in one process, with one thread; a time is the median. Each section replaces
its own in results/interop.md. The extras `zuko`, `sbi`, `pyro`, `pocomc` and `nessai` install the libraries.
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
REMARK = "Other programs ran on the machine; the libraries and ours took turns."


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
    """theta in [-3, 3]^5; x is four points of a normal: mean theta_1:2, stds theta_3^2, theta_4^2, tanh(theta_5)."""

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


def c2st(
    task: Any,
    simulations: int = 1_000,
    seeds: int = 1,
    observations: int = 3,
    draws: int = 500,
    epochs: int = 10_000,
) -> list[str]:
    """C2ST and training time of NPE with sbi's estimators and ours, at equal budget."""
    from sbi.inference import NPE
    from sbi.utils import metrics

    from counterflow.interop.sbi import estimator

    builders = {
        "sbi, maf": "maf",
        "ours, maf": estimator("maf"),
        "sbi, nsf": "nsf",
        "ours, nsf": estimator("nsf", bins=10),
    }
    scores: dict[str, list[float]] = {name: [] for name in builders}
    spent: dict[str, float] = dict.fromkeys(builders, 0.0)
    trained = dict.fromkeys(builders, 0)
    for seed in range(seeds):
        torch.manual_seed(100 + seed)
        theta = task.prior.sample((simulations,))
        x = task.simulate(theta)
        observed = task.simulate(task.prior.sample((observations,)))
        truth = [task.posterior(x_o, draws) for x_o in observed]
        for name, builder in builders.items():
            torch.manual_seed(200 + seed)
            inference = NPE(task.prior, density_estimator=builder, show_progress_bars=False)
            inference.append_simulations(theta, x)
            spent[name] += seconds(partial(inference.train, max_num_epochs=epochs)) / seeds
            trained[name] += inference.summary["epochs_trained"][-1]
            posterior = inference.build_posterior()
            for x_o, exact in zip(observed, truth, strict=True):
                sampled = posterior.sample((len(exact),), x_o[None], show_progress_bars=False)
                scores[name].append(metrics.c2st(sampled, exact).item())
            print(seed, name, scores[name][-observations:], f"{spent[name]:.0f} s", flush=True)
    rows: list[tuple[object, ...]] = []
    for name, values in scores.items():
        difference = torch.tensor(values) - torch.tensor(scores[f"sbi, {name.split()[-1]}"])
        error = difference.std().item() / len(values) ** 0.5
        versus = f"{difference.mean():+.3f} ± {error:.3f}" if name.startswith("ours") else ""
        rows.append((name, f"{statistics.mean(values):.3f}", versus, f"{spent[name]:.0f}", trained[name] // seeds))
    return [
        f"NPE with {simulations:,} simulations, sbi's settings of training and at most {epochs:,} epochs. C2ST is the "
        f"mean of {seeds} seeds and {observations} observations for each, with {draws:,} draws for each; 0.5 is best. "
        "The difference is from sbi's estimator of the same kind, on the same observations.",
        "",
        *table("estimator | C2ST | difference | training, s | epochs", rows),
    ]


def sbi_draws(draws: int = 100_000) -> list[str]:
    """Draws per second of `posterior.sample`, of sbi's estimators, the same ones converted, and ours."""
    from sbi.inference.posteriors import DirectPosterior
    from sbi.neural_nets import posterior_nn

    from counterflow.interop.sbi import convert_posterior, estimator

    task = LinearGaussian()
    theta = task.prior.sample((1_000,))
    x = task.simulate(theta)
    theirs = DirectPosterior(posterior_nn("maf")(theta, x).eval(), task.prior)
    ours = DirectPosterior(estimator("maf")(theta, x).eval(), task.prior)
    posteriors = {"sbi, maf": theirs, "sbi, maf, converted": convert_posterior(theirs), "ours, maf": ours}
    works = [partial(q.sample, (draws,), x[:1], show_progress_bars=False) for q in posteriors.values()]
    rows = [(name, f"{draws / t:,.0f}") for name, t in zip(posteriors, medians(works, 1), strict=True)]
    return [
        f"{draws:,} draws of the posterior of one observation, D = 10:",
        "",
        *table("estimator | draws per second", rows),
    ]


STEPS = 5  # of VIPosterior.train, between two readings of the clock


def sbi_vi() -> list[str]:
    """Steps per second of `VIPosterior.train` on a Gaussian target."""
    from sbi.inference.posteriors import VIPosterior
    from sbi.inference.potentials.base_potential import CustomPotentialWrapper

    from counterflow.interop.sbi import variational

    def potential(theta: Tensor, x_o: Tensor) -> Tensor:
        return -(theta - x_o).square().sum(-1) / 0.2

    rows: list[tuple[object, ...]] = []
    more = {"quality_control": False, "show_progress_bar": False, "check_for_convergence": False}
    for D in (5, 15):
        prior = torch.distributions.MultivariateNormal(torch.zeros(D), torch.eye(D))
        works = []
        for q in ("maf", variational("iaf"), "nsf", variational("iaf", univariate=cf.RationalQuadraticSpline())):
            vi = VIPosterior(CustomPotentialWrapper(potential, prior, torch.zeros(1, D)), prior, q=q)
            vi.set_default_x(torch.zeros(1, D))
            works.append(partial(vi.train, max_num_iters=STEPS, **more))
        rows.append((D, *(f"{STEPS / t:.3g}" for t in medians(works, 3))))
        print(*rows[-1], flush=True)
    return [
        "Steps per second of `VIPosterior.train`, rKL with 256 particles, a Gaussian target of D dimensions:",
        "",
        *table("D | sbi, maf | ours, iaf | sbi, nsf | ours, iaf of splines", rows),
    ]


def pyro(steps: int = 500) -> list[str]:
    """Loss and time per step of SVI: Pyro's guide and ours, on a funnel and a regression of 30 coefficients."""
    import pyro as library
    import pyro.distributions as dist
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoIAFNormal

    from counterflow.interop.pyro import AutoIAF

    inputs = torch.randn(200, 30)
    outputs = inputs @ torch.randn(30) + 0.5 * torch.randn(200)

    def funnel() -> None:
        scale = library.sample("scale", dist.LogNormal(torch.tensor(0.0), 1.5))
        library.sample("x", dist.Normal(torch.zeros(9), scale[..., None]).to_event(1))

    def horseshoe() -> None:
        scales = library.sample("scales", dist.HalfCauchy(torch.ones(30)).to_event(1))
        weights = library.sample("weights", dist.Normal(torch.zeros(30), 1.0).to_event(1)) * scales * 0.1
        noise = library.sample("noise", dist.HalfNormal(torch.tensor(1.0)))
        mean = (weights[..., None, :] * inputs).sum(-1)
        library.sample("y", dist.Normal(mean, noise[..., None]).to_event(1), obs=outputs)

    rows: list[tuple[object, ...]] = []
    for model, D in ((funnel, 10), (horseshoe, 61)):
        width = max(32, 2 * D)
        guides = {
            "AutoIAFNormal": partial(AutoIAFNormal, hidden_dim=[width, width], num_transforms=3),
            "AutoIAF": partial(AutoIAF, layers=3),
        }
        svis, losses = {}, {}
        elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
        for name, make in guides.items():
            library.clear_param_store()
            library.set_rng_seed(0)
            guide = make(model)
            svi = SVI(model, guide, library.optim.ClippedAdam({"lr": 3e-3}), elbo)
            for _ in range(steps):
                svi.step()
            many = Trace_ELBO(num_particles=256, vectorize_particles=True)
            with torch.no_grad():
                each = [many.loss(model, guide) for _ in range(20)]
            losses[name] = f"{statistics.mean(each):.2f} ± {statistics.stdev(each) / 20**0.5:.2f}"
            svis[name] = svi
        times = medians([svi.step for svi in svis.values()], 50)
        rows += [
            (f"{model.__name__}, D = {D}", name, losses[name], f"{1e3 * t:.2f}")
            for name, t in zip(guides, times, strict=True)
        ]
    return [
        f"After {steps:,} steps of ClippedAdam (3e-3, 16 particles). Both guides have three layers, each with",
        "two hidden layers of max(32, 2 D) units.",
        "",
        *table("model | guide | loss (negative ELBO) | ms per step", rows),
    ]


def rosenbrock(x: Any) -> Any:
    """Return the log-likelihood (N,) of pairs on curved ridges, for x (N, D)."""
    return -(10 * (x[:, ::2] ** 2 - x[:, 1::2]) ** 2 + (x[:, ::2] - 1) ** 2).sum(-1)


def normal(x: Any) -> Any:
    """Return the log-likelihood (N,) of a correlated normal, for x (N, D)."""
    total = x.sum(-1)
    return -(x**2).sum(-1) / 2 - total**2 / 2


def pocomc_step() -> list[str]:
    """Time one step of the chains."""
    import pocomc as library

    from counterflow.interop.pocomc import flow

    walkers = torch.randn(256, 20)
    theirs, ours = library.Flow(20, "nsf6"), library.Flow(20, flow(20))
    with torch.no_grad():
        steps = medians([lambda: theirs.inverse(walkers), lambda: ours.inverse(walkers)], 3)
    return table(
        "256 walkers, D = 20 | nsf6, ms | ours, ms | ratio",
        [("from base space to parameters", *(f"{1e3 * t:.0f}" for t in steps), f"{steps[0] / steps[1]:.3g}")],
    )


def pocomc_run(D: int = 6) -> list[str]:
    """Time whole runs on two problems, with the smaller of pocoMC's spline flows and ours of its sizes."""
    import pocomc as library
    import scipy.stats

    from counterflow.interop.pocomc import flow

    rows: list[tuple[object, ...]] = []
    for likelihood in (normal, rosenbrock):
        for name, chosen in (("nsf3", "nsf3"), ("ours", flow(D, layers=3))):
            prior = library.Prior([scipy.stats.norm(0, 3)] * D)
            more: dict[str, Any] = {"vectorize": True, "random_state": 0, "n_effective": 128, "n_active": 64}
            sampler = library.Sampler(prior, likelihood, flow=chosen, **more)
            spent = seconds(lambda sampler=sampler: sampler.run(n_total=512, n_evidence=512, progress=False))
            log_z, error = sampler.evidence()
            rows.append((f"{likelihood.__name__}, D = {D}", name, f"{log_z:.2f} ± {error:.2f}", f"{spent:.0f}"))
            print(*rows[-1], flush=True)
    return table("problem | flow | log Z | run, s", rows)


def nessai(kind: str, live_points: int = 100) -> list[str]:
    """Time whole runs on two problems with nessai's flow of a kind and ours."""
    from nessai.flowsampler import FlowSampler
    from nessai.model import Model

    from counterflow.interop.nessai import CounterflowFlow

    def model(D: int, likelihood: Callable[[Any], Any]) -> Any:
        class Problem(Model):
            def __init__(self) -> None:
                self.names = [f"x{k}" for k in range(D)]
                self.bounds = {name: [-5, 5] for name in self.names}

            def log_prior(self, x: Any) -> Any:
                return self.in_bounds(x).astype(float) - 1 - D * math.log(10)

            def log_likelihood(self, x: Any) -> Any:
                return likelihood(self.unstructured_view(x).reshape(-1, D)).reshape(x.shape)

        return Problem()

    rows: list[tuple[object, ...]] = []
    for D, likelihood in ((6, normal), (4, rosenbrock)):
        for name, config in (
            (f"nessai, {kind}", {"ftype": kind}),
            (f"ours, {kind}", {"flow": CounterflowFlow, "kind": kind}),
        ):
            more: dict[str, Any] = {"resume": False, "seed": 1, "nlive": live_points, "signal_handling": False}
            config = {"n_blocks": 4, "n_layers": 2, "n_neurons": 32, **config}
            with tempfile.TemporaryDirectory() as folder:
                sampler = FlowSampler(model(D, likelihood), output=folder, flow_config=config, **more)
                spent = seconds(lambda sampler=sampler: sampler.run(plot=False, save=False))
            log_z, error = sampler.ns.log_evidence, sampler.ns.log_evidence_error
            rows.append((f"{likelihood.__name__}, D = {D}", name, f"{log_z:.2f} ± {error:.2f}", f"{spent:.0f}"))
            print(*rows[-1], flush=True)
    return [f"{live_points} live points.", "", *table("problem | flow | log Z | run, s", rows)]


SECTIONS: dict[str, tuple[Callable[[], list[str]], list[str]]] = {
    "zuko": (zuko, ["zuko"]),
    "sbi-draws": (sbi_draws, ["sbi"]),
    "sbi-vi": (sbi_vi, ["sbi"]),
    "sbi-two-moons": (lambda: c2st(TwoMoons(), seeds=1, observations=4, epochs=100), ["sbi"]),
    "sbi-linear-gaussian": (lambda: c2st(LinearGaussian(), seeds=2, draws=1_000), ["sbi"]),
    "sbi-slcp": (lambda: c2st(SLCP(), simulations=2_000, seeds=1, epochs=60), ["sbi"]),
    "pyro": (pyro, ["pyro-ppl"]),
    "pocomc-step": (pocomc_step, ["pocomc", "zuko"]),
    "pocomc-run": (pocomc_run, ["pocomc", "zuko"]),
    "nessai-maf": (lambda: nessai("maf"), ["nessai"]),
    "nessai-nsf": (lambda: nessai("nsf"), ["nessai"]),
}


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
            text = f"# Our flows inside other libraries\n\n{REMARK}\n" + "".join(
                f"\n## {parts[key]}" for key in SECTIONS if key in parts
            )
            PAGE.write_text(text, "utf-8")
            print(parts[name], file=sys.stderr)


if __name__ == "__main__":
    main()
