"""Importance weights: what they are worth, and what is drawn by them."""

import math

import pytest
import torch
from registry import over

from counterflow.diagnostics import effective_sample_size, resample

SIZES = {
    "equal": ([0.0, 0.0, 0.0, 0.0], 4),
    "one": ([5.0], 1),
    "one of many": ([0.0, -math.inf, -math.inf], 1),
    "two to one": ([math.log(2), 0.0], 9 / 5),
    "far from zero": ([-1e5, -1e5, -1e5 - math.log(2)], 6.25 / 2.25),
    "huge": ([1e5, 1e5], 2),
}


@pytest.mark.parametrize(("log_weights", "expected"), SIZES.values(), ids=SIZES)
def test_effective_sample_size(log_weights, expected):
    assert effective_sample_size(torch.tensor(log_weights, dtype=torch.float64)).item() == pytest.approx(expected)


@over([0.1, 3.0, 300.0], "spread")
def test_effective_sample_size_lies_between_one_and_all(spread):
    ess = effective_sample_size(spread * torch.randn(50, 4, 3))
    assert ess.shape == (4, 3) and (ess >= 1 - 1e-5).all() and (ess <= 50 + 1e-3).all()


def test_more_even_weights_are_worth_more():
    log_weights = torch.randn(100)
    sizes = [effective_sample_size(spread * log_weights).item() for spread in (0, 0.5, 1, 2, 4)]
    assert sizes == sorted(sizes, reverse=True)


def test_draws_are_picked_in_proportion_to_their_weights():
    draws, p = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]), torch.tensor([0.1, 0.6, 0.0, 0.3])
    n = 20_000
    picked = resample(draws, p.log() - 1e3, n)
    assert picked.shape == (n, 2) and (picked[:, 1] - picked[:, 0] == 1).all()
    share = torch.stack([(picked[:, 0] == first).float().mean() for first in draws[:, 0]])
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-12).all()
