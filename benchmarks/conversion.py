"""Accuracy and sampling speed of converted flows.

    pip install -c constraints.txt -e ".[dev]" && python benchmarks/conversion.py

Differences: every flow of tests/tools/test_interop.py, with random weights, at 64 of its samples; the largest one of
log_prob, and of samples from the same noise relative to 1 + the largest sample, in float64 and float32.

Times: 1,000 draws of a flow of five layers, D = 64, two hidden layers of 512 (nflows' default network has five), as
each library's users build it, and 10,000 draws of a posterior of sbi with D = 10. The original and the converted flow
take turns in one run; the ratio is that of the medians. Pyro samples in one pass itself; there it is the time of
scoring 1,000 points. Written to results/conversion.md.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import counterflow as cf

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests" / "tools"), str(HERE.parent / "tests")]
warnings.simplefilter("ignore")  # warnings of the other libraries

D, H, LAYERS, DRAWS = 64, 512, 5, 1_000
Pair = tuple[str, Callable[[], object], Callable[[], object]]  # what is timed, theirs, ours


def differences() -> list[str]:
    from test_interop import CASES, made

    lines = [
        "| flow | log_prob, float64 | samples, float64 | log_prob, float32 | samples, float32 |",
        "|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        found = []
        for dtype in (torch.float64, torch.float32):
            theirs, ours, eps, c = made(name, dtype)
            expected = case.to_data(theirs, eps, c)
            log_prob = ours(c).log_prob(expected) - case.log_prob(theirs, expected, c)
            sample = ours.transform(eps, c if ours.transform.context else None)[0] - expected
            sample = sample / (1 + expected.abs().max())
            found += [f"{difference.abs().max().item():.1e}" for difference in (log_prob, sample)]
            torch.set_default_dtype(torch.float32)
        lines.append(f"| {name} | {' | '.join(found)} |")
    return lines


def sampled(theirs: Any, draw: Callable[[], object]) -> tuple[Callable[[], object], Callable[[], object]]:
    flow = cf.convert(theirs)
    return draw, lambda: flow().sample((DRAWS,))


def nflows(residual: bool) -> Pair:
    from nflows import distributions, flows, transforms

    layers: list[Any] = []
    for _ in range(LAYERS):
        layers += [
            transforms.MaskedAffineAutoregressiveTransform(D, H, num_blocks=2, use_residual_blocks=residual),
            transforms.ReversePermutation(D),
        ]
    flow = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([D])).eval()
    blocks = "residual blocks (its default)" if residual else "feedforward blocks"
    return f"nflows, {blocks}", *sampled(flow, lambda: flow.sample(DRAWS))


def zuko() -> Pair:
    import zuko as library

    flow = library.flows.MAF(D, transforms=LAYERS, hidden_features=(H, H)).eval()
    return "zuko, MAF", *sampled(flow, lambda: flow().sample((DRAWS,)))


def normflows() -> Pair:
    import normflows as library

    layers: list[Any] = []
    for _ in range(LAYERS):
        layers += [
            library.flows.AutoregressiveRationalQuadraticSpline(D, 1, H),
            library.flows.LULinearPermute(D),
        ]
    flow = library.NormalizingFlow(library.distributions.DiagGaussian(D), layers).eval()
    return "normflows, autoregressive splines (1 block), LU", *sampled(flow, lambda: flow.sample(DRAWS))


def pyro() -> Pair:
    import pyro.distributions as dist
    from pyro.distributions import transforms
    from pyro.nn import AutoRegressiveNN

    layers = [transforms.AffineAutoregressive(AutoRegressiveNN(D, [H, H])) for _ in range(LAYERS)]
    theirs = dist.TransformedDistribution(dist.Normal(torch.zeros(D), torch.ones(D)), layers)
    flow, x = cf.convert(theirs), torch.randn(DRAWS, D)

    def score() -> object:
        for layer in layers:  # which remember their last values
            layer._cached_x_y = None, None
        return theirs.log_prob(x)

    return "Pyro, AffineAutoregressive, scoring", score, lambda: flow().log_prob(x)


def sbi(model: str, draws: int = 10_000) -> Pair:
    from sbi.inference.posteriors import DirectPosterior
    from sbi.neural_nets import posterior_nn
    from torch.distributions import MultivariateNormal

    prior = MultivariateNormal(torch.zeros(10), torch.eye(10))  # on the whole space: nothing is rejected
    theta = prior.sample((1_000,))
    x = theta + 0.3 * torch.randn_like(theta)
    estimator = posterior_nn(model)(theta, x).eval()
    posterior, flow = DirectPosterior(estimator, prior), cf.convert(estimator)
    return (
        f"sbi posterior.sample, {model}, D = 10, {draws:,} draws",
        lambda: posterior.sample((draws,), x=x[:1], show_progress_bars=False),
        lambda: flow(x[0]).sample((draws,)),
    )


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def times(repeats: int) -> list[str]:
    lines = ["| flow | the library, s | converted, s | ratio |", "|---|---|---|---|"]
    makers = [lambda: nflows(True), lambda: nflows(False), zuko, normflows, pyro]
    makers += [lambda model=model: sbi(model) for model in ("maf", "maf_rqs", "nsf", "zuko_maf", "zuko_nsf")]
    for make in makers:
        torch.manual_seed(0)
        name, theirs, ours = make()
        seconds(ours), seconds(ours)  # compiled, and warm
        both = [(seconds(theirs), seconds(ours)) for _ in range(repeats)]
        slow, fast = (statistics.median(column) for column in zip(*both, strict=True))
        lines.append(f"| {name} | {slow:.3g} | {fast:.3g} | {slow / fast:.3g} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        timed, differing = times(arguments.repeats), differences()
    where = f"{platform.machine()}, {arguments.threads} thread(s), torch {torch.__version__}"
    page = [
        "# Converted flows",
        "",
        f"Made by `python benchmarks/conversion.py` ({where}, {arguments.repeats} repeats).",
        "",
        f"## Time, float32: {DRAWS:,} rows of five layers, D = {D}, H = {H}",
        "",
        *timed,
        "",
        "## The largest difference from the original",
        "",
        "At 64 samples of each flow, with random weights; of the samples relative to 1 + the largest.",
        "",
        *differing,
        "",
    ]
    (HERE / "results" / "conversion.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
