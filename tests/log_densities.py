"""Log densities with known answers, for the tests of posteriors."""

import math

import torch

import counterflow as cf

QUICK = cf.PosteriorConfig(layers=2, steps=60, samples=64, stages=1, verdict_samples=2_000, starts=4, modes=1)


def normal(x, mean=0.0, sd=1.0):
    return -0.5 * ((x - mean) / sd) ** 2 - (sd.log() if isinstance(sd, torch.Tensor) else math.log(sd))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(D, scales=None, seed=1):
    """Return the log density of a strongly correlated N(mean, L L^T) on the given scales, and mean and L."""
    g = generator(seed)
    scales = torch.ones(D, dtype=torch.float64) if scales is None else torch.as_tensor(scales, dtype=torch.float64)
    factor = scales[:, None] * (torch.eye(D, dtype=torch.float64) + torch.randn(D, D, generator=g).double().tril(-1))
    mean = 3 * scales * torch.randn(D, generator=g).double()
    inverse = torch.linalg.inv(factor)
    return (lambda theta: -0.5 * ((theta - mean) @ inverse.T).square().sum(-1)), mean, factor


def banana(theta):
    x, y = theta.unbind(-1)
    return normal(x) + normal(y, x.square(), 0.5)


def modes(theta, apart=5.0, share=0.5):
    """Evaluate a mixture of two unit normals at -apart and apart in the first coordinate."""
    left, right = (normal(theta - at * torch.eye(theta.shape[1])[0].double()).sum(-1) for at in (-apart, apart))
    return torch.logaddexp(math.log(share) + left, math.log(1 - share) + right)


def schools(theta):
    """Evaluate the centred eight schools; the density is unbounded as log tau falls with all effects at mu."""
    y = torch.tensor([28, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
    sd = torch.tensor([15, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
    effects, mu, log_tau = theta[:, :8], theta[:, 8], theta[:, 9]
    tau = log_tau.exp()
    prior = normal(mu, 0.0, 5.0) - torch.log1p((tau / 5).square()) + log_tau
    return prior + normal(effects, mu[:, None], tau[:, None]).sum(-1) + normal(y, effects, sd).sum(-1)
