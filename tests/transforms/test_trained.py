"""Maps that are trained without a network."""

import pytest
import torch
from registry import close, stir

import counterflow as cf
from counterflow.transforms import ActNorm, LULinear
from counterflow.transforms.trained import initialize


def rows(n=500):
    generator = torch.Generator().manual_seed(0)
    mixed = torch.tensor([[1.0, 0.5, 0.0], [0.0, 3.0, 1.0], [2.0, 0.0, 1.0]], dtype=torch.float64)
    return 5 + torch.randn(n, 3, generator=generator, dtype=torch.float64) @ mixed


def test_they_start_as_the_identity():
    x = rows()
    for t in (ActNorm(3).double(), LULinear(3).double()):
        y, log_det = t(x)
        assert torch.equal(y, x) and (log_det == 0).all()


def test_initialization_standardizes_what_reaches_each_layer():
    for wrap in (lambda t: t, cf.Inverse):
        first, last = ActNorm(3), ActNorm(3)
        t = cf.Compose([wrap(first), stir(cf.Autoregressive(3, hidden=(8,), activation="tanh")), wrap(last)]).double()
        y, log_det = initialize(t, rows())
        for part in (y, t[0](rows())[0]):
            close(part.mean(0), torch.zeros(3, dtype=torch.float64))
            close(part.std(0, correction=0), torch.ones(3, dtype=torch.float64))
        for came, expected in zip(t(rows()), (y, log_det), strict=True):
            close(came, expected)


def test_a_linear_flow_learns_a_covariance():
    flow = cf.Flow(cf.bases.StandardNormal(3), cf.Inverse(cf.Compose([ActNorm(3), LULinear(3)])))
    x = rows(3000).float()
    initialize(cf.Inverse(flow.transform), x)
    config = cf.FitConfig(epochs=40, batch_size=200, learning_rate=2e-2, ema=0.9)
    cf.fit(flow, cf.log_likelihood, x[:2500], x[2500:], config)
    exact = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T))
    gap = exact.log_prob(x).mean() - flow().log_prob(x).mean()
    assert 0 <= gap < 0.01


def test_what_is_refused():
    with pytest.raises(ValueError, match="expected features to be a whole number of at least 1, got 0"):
        LULinear(0)
    with pytest.raises(ValueError, match=r"expected at least two rows \(N, D\) .* got x of shape \(3,\)"):
        initialize(ActNorm(3), torch.zeros(3))
    x = rows()
    x[:, 1] = 7
    with pytest.raises(ValueError, match="expected features that vary, got a constant one: 1; drop it first"):
        initialize(ActNorm(3).double(), x)
