"""Convergence of Markov chains."""

import math
import sys
import warnings

import pytest
import torch
from registry import over

from counterflow.diagnostics.chains import convergence

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # on import, ArviZ 0.23 announces version 1
    import arviz


def test_convergence_equals_arviz_for_each_feature():
    draws = torch.randn(4, 100, 3).double().cumsum(1)
    found = convergence(draws)
    for i in range(3):
        one = draws[..., i].numpy()
        expected = (arviz.rhat(one), arviz.ess(one, method="bulk"), arviz.ess(one, method="tail"))
        assert [part[i].item() for part in found] == pytest.approx(expected)


def test_convergence_detects_chains_that_disagree_or_do_not_move():
    draws = torch.randn(4, 200, 4)
    draws[0, :, 1] += 1
    draws[..., 2] = 3.0
    draws[..., 3] = torch.arange(4.0)[:, None]
    r_hat = convergence(draws).r_hat
    assert r_hat[0] < 1.03 and r_hat[1] > 1.1 and (r_hat[2:] == math.inf).all()


@over([(1, 50, 1), (70, 5, 1), (4, 4, 2)], "shape")
def test_convergence_of_few_chains_and_of_many_short_ones(shape):
    assert [part.shape for part in convergence(torch.randn(shape))] == [shape[2:]] * 3


@pytest.mark.parametrize("shape", [(50, 2), (4, 3, 2)])
def test_chains_that_are_too_short_or_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"draws \(chains, draws, D\) with at least 4 per chain, got \("):
        convergence(torch.randn(shape))


def test_without_arviz(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"expected arviz for R-hat.* pip install 'counterflow\[posterior\]'"):
        convergence(torch.randn(2, 9, 1))
