"""Overhead of the library: one VAE training step against the same step written by hand in plain torch.

    python benchmarks/vae_step.py

Batch 256, 784 binary pixels, latent 32, 4 gated IAF steps of width 320, an MLP on both sides; both sides run forward,
backward, gradient clipping and Adamax, interleaved in one process. Written to results/vae_step.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import counterflow as cf

HERE = Path(__file__).parent / "results"
B, D, LATENT, CONTEXT, HIDDEN, WIDTH, STEPS = 256, 784, 32, 256, 512, 320, 4


class HandMade(nn.Module):
    """One MADE of the plain kind: dense weights, a mask multiplied at each call."""

    def __init__(self) -> None:
        super().__init__()
        d, h = torch.arange(1, LATENT + 1), torch.arange(WIDTH) % LATENT
        self.l1, self.l2 = nn.Linear(LATENT, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.l3, self.context = nn.Linear(WIDTH, 2 * LATENT), nn.Linear(CONTEXT, WIDTH, bias=False)
        self.register_buffer("m1", (h[:, None] >= d[None]).float())
        self.register_buffer("m2", (h[:, None] >= h[None]).float())
        self.register_buffer("m3", (d[:, None] > h[None]).float().repeat(2, 1))

    def forward(self, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        h = F.elu(F.linear(z, self.l1.weight * self.m1, self.l1.bias) + self.context(c))
        h = F.elu(F.linear(h, self.l2.weight * self.m2, self.l2.bias))
        m, a = F.linear(h, self.l3.weight * self.m3, self.l3.bias).chunk(2, -1)
        return m + torch.sigmoid(a + 2) * (z - m), F.logsigmoid(a + 2).sum(-1)


class ByHand(nn.Module):
    """The VAE as one would write it for a paper."""

    def __init__(self) -> None:
        super().__init__()

        def gated(i: int, o: int) -> list[nn.Module]:
            return [nn.Linear(i, 2 * o), nn.GLU()]

        self.encoder = nn.Sequential(*gated(D, HIDDEN), *gated(HIDDEN, HIDDEN), *gated(HIDDEN, CONTEXT))
        self.heads = nn.Linear(CONTEXT, 2 * LATENT)
        self.flow = nn.ModuleList(HandMade() for _ in range(STEPS))
        self.decoder = nn.Sequential(*gated(LATENT, HIDDEN), *gated(HIDDEN, HIDDEN), nn.Linear(HIDDEN, D))

    def elbo(self, x: Tensor) -> Tensor:
        h = self.encoder(2 * x - 1)
        mean, log_std = self.heads(h).chunk(2, -1)
        eps = torch.randn_like(mean)
        z = mean + log_std.exp() * eps
        log_q = (-0.5 * eps.square() - log_std).sum(-1)
        for k, step in enumerate(self.flow):
            z, log_det = step(z.flip(-1) if k else z, h)
            log_q = log_q - log_det
        log_prior = -0.5 * z.square().sum(-1)  # the constants of q and prior cancel
        log_likelihood = -F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(-1)
        return log_likelihood + log_prior - log_q


def stepper(model: nn.Module, terms: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    """One training step."""
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-3)

    def step(x: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        (-terms(x).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 50.0)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    vae = cf.VAE((D,), LATENT, network="mlp", hidden=(HIDDEN, HIDDEN), context=CONTEXT, posterior_hidden=(WIDTH, WIDTH))
    by_hand = ByHand()
    sides = {
        "counterflow": stepper(vae, lambda x: cf.objectives.elbo(vae, x)),
        "by hand": stepper(by_hand, by_hand.elbo),
    }
    x = torch.rand(B, D).round()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for k in range(args.rounds + 10):
        for name, step in sides.items():
            begun = time.perf_counter()
            step(x)
            if k >= 10:  # the first ones warm up
                seconds[name].append(time.perf_counter() - begun)
    ratios = [a / b for a, b in zip(seconds["counterflow"], seconds["by hand"], strict=True)]
    result = {
        "ratio_of_medians": statistics.median(seconds["counterflow"]) / statistics.median(seconds["by hand"]),
        "median_of_ratios": statistics.median(ratios),
        "milliseconds": {name: 1e3 * statistics.median(s) for name, s in seconds.items()},
        "parameters": {"counterflow": _size(vae), "by hand": _size(by_hand)},
        "threads": args.threads,
        "machine": f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    text = (
        "# One VAE training step: Counterflow against plain torch by hand\n\n"
        f"Made by `python benchmarks/vae_step.py` ({args.rounds} interleaved rounds, {args.threads} threads, "
        f"{result['machine']}).\nBatch {B}, {D} pixels, latent {LATENT}, {STEPS} IAF steps of width {WIDTH}.\n\n"
        "| | median ms | parameters |\n|---|---|---|\n"
        + "".join(f"| {n} | {result['milliseconds'][n]:.1f} | {result['parameters'][n]:,} |\n" for n in sides)
        + f"\nRatio of the medians {result['ratio_of_medians']:.3f}; median of the ratios round by round "
        f"{result['median_of_ratios']:.3f}.\n"
    )
    print(text)
    HERE.mkdir(exist_ok=True)
    (HERE / "vae_step.md").write_text(text)
    (HERE / "vae_step.json").write_text(json.dumps(result, indent=1) + "\n")


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
