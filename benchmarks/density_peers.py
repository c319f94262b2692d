"""Flows of several libraries, built as the users of each library build them.

The flows are modules with one call: rows (B, D) to log densities (B,). GaussianMixture and KernelDensity have `fit` and
`score_samples` of scikit-learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import counterflow as cf
from counterflow.made.network import MADE


class Scored(nn.Module):
    """A flow of any library, called on rows."""

    def __init__(self, flow: nn.Module, score: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.flow, self._score = flow, score

    def forward(self, x: Tensor) -> Tensor:
        return self._score(self.flow, x)


def called(flow: nn.Module, x: Tensor) -> Tensor:
    """Flow of counterflow or zuko: calling it returns a distribution."""
    return flow().log_prob(x)


def asked(flow: nn.Module, x: Tensor) -> Tensor:
    """Flow of nflows."""
    return flow.log_prob(x)


def terms(model: Scored, x: Tensor) -> Tensor:
    """Return the log density of each row, the objective of `cf.fit`."""
    return model(x)


def started(flow: cf.Flow) -> cf.Flow:
    """Initialize the hidden layers as torch does a linear layer: from U(-k, k) with k = 1 / sqrt(inputs).

    That is a third of the variance, or less, that MaskedLinear gives its weights, and not zero for the biases. On few
    rows the larger start overfits sooner: on MINIBOONE it costs 1.5 nats with a MAF and 2.8 with an NSF.
    """
    for made in (m for m in flow.modules() if isinstance(m, MADE)):
        for layer in made.masked_layers()[:-1]:
            k = 1 / math.sqrt(layer.in_features)
            with torch.no_grad():
                layer.weight.uniform_(-k, k).mul_(layer.mask)
                layer.bias.uniform_(-k, k)
    return flow


def our_maf(D: int, layers: int, hidden: Sequence[int]) -> Scored:
    return Scored(started(cf.MAF(D, layers=layers, hidden=hidden)), called)


def our_nsf(D: int, layers: int, hidden: Sequence[int], bins: int) -> Scored:
    return Scored(started(cf.NSF(D, layers=layers, hidden=hidden, bins=bins)), called)


def zuko_maf(D: int, layers: int, hidden: Sequence[int]) -> Scored:
    from zuko.flows import MAF

    return Scored(MAF(D, transforms=layers, hidden_features=tuple(hidden)), called)


def zuko_nsf(D: int, layers: int, hidden: Sequence[int], bins: int) -> Scored:
    from zuko.flows import NSF

    return Scored(NSF(D, transforms=layers, hidden_features=tuple(hidden), bins=bins), called)


def nflows_maf(D: int, layers: int, hidden: Sequence[int]) -> Scored:
    """The library's recipe: one width; a first layer without an activation, then len(hidden) layers with one.

    Batch normalisation stays off, as it is by default; the blocks are plain ones, which are of the others' size.
    """
    from nflows.flows.autoregressive import MaskedAutoregressiveFlow

    return Scored(MaskedAutoregressiveFlow(D, hidden[0], layers, len(hidden), use_residual_blocks=False), asked)


def nflows_nsf(D: int, layers: int, hidden: Sequence[int], bins: int) -> Scored:
    """Splines in autoregressive layers, for which the library has no recipe: linear outside [-5, 5] as in its examples.

    Its blocks are as in `nflows_maf`.
    """
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import (
        CompositeTransform,
        MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
        ReversePermutation,
    )

    parts: list[nn.Module] = []
    for k in range(layers):
        parts += [ReversePermutation(D)] if k else []
        parts += [
            MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                D, hidden[0], num_bins=bins, tails="linear", tail_bound=5.0, num_blocks=len(hidden),
                use_residual_blocks=False,
            )
        ]  # fmt: skip
    return Scored(Flow(CompositeTransform(parts), StandardNormal([D])), asked)
