"""Convergence of Markov chains."""

import math
import sys

import numpy as np
import pytest
import torch
from registry import over

from counterflow.diagnostics.chains import convergence


def test_convergence_is_the_same_with_every_version_of_arviz():
    """The reference numbers come from ArviZ 0.23.4; ArviZ 1.3 gives the same."""
    draws = np.random.RandomState(0).standard_normal((4, 200, 3))
    for t in range(1, 200):
        draws[:, t] += np.array([0.0, 0.5, 0.9]) * draws[:, t - 1]
    draws[0, :, 1] += 0.5
    found = convergence(torch.from_numpy(draws))
    assert found.r_hat.tolist() == pytest.approx([1.00091378, 1.0481555, 1.10635271], rel=1e-7)
    assert found.ess_bulk.tolist() == pytest.approx([787.931906, 118.414013, 31.2055858], rel=1e-7)
    assert found.ess_tail.tolist() == pytest.approx([751.030235, 451.870648, 98.403372], rel=1e-7)


def test_convergence_detects_chains_that_disagree_or_do_not_move():
    draws = torch.randn(4, 200, 4)
    draws[0, :, 1] += 1
    draws[..., 2] = 3.0
    draws[..., 3] = torch.arange(4.0)[:, None]
    r_hat, ess_bulk, ess_tail = convergence(draws)
    assert r_hat[0] < 1.03 and r_hat[1] > 1.1 and (r_hat[2:] == math.inf).all()
    assert (ess_bulk[2:] == 4).all() and (ess_tail[2:] == 4).all()


@over([(1, 50, 1), (70, 5, 1), (4, 4, 2)], "shape")
def test_convergence_of_few_chains_and_of_many_short_ones(shape):
    assert [part.shape for part in convergence(torch.randn(shape))] == [shape[2:]] * 3


@pytest.mark.parametrize("shape", [(50, 2), (4, 3, 2)])
def test_chains_that_are_too_short_or_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"draws \(chains, draws, D\) with at least 4 per chain, got \("):
        convergence(torch.randn(shape))


def test_without_arviz(monkeypatch):
    for module in ("arviz", "arviz_stats.base"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"expected arviz.* for R-hat.* pip install 'counterflow\[posterior\]'"):
        convergence(torch.randn(2, 9, 1))
