"""Detection of improper posteriors, by the directions in which their densities do not fall."""

import math

import pytest
import torch
from log_densities import banana, gaussian, generator, normal, schools
from registry import over
from torch.distributions import constraints
from torch.nn.functional import softplus

import counterflow as cf
from counterflow.posterior.propriety import check_proper, flat_directions

LABELS = torch.tensor([-1.0, -1.0, 1.0, 1.0]).double()
PREDICTORS = torch.tensor([[1.0, -2.0], [1.0, -1.0], [1.0, 1.0], [1.0, 2.0]]).double()

IMPROPER = {  # log density, number of coordinates, directions
    "flat": (lambda t: normal(t[:, 0]), 2, "t1"),
    "sum": (lambda t: normal(t[:, 0] + t[:, 1]), 2, "t0 - t1"),
    "weighted sum": (lambda t: normal(t[:, 0] + 2 * t[:, 2]) + normal(t[:, 1]), 3, "t0 - 0.5 t2"),
    "flat and sum": (lambda t: normal(t[:, 1] - t[:, 3]) + normal(t[:, 0]), 4, "t2, t1 + t3"),
    "flat in a positive variable": (lambda t: normal(t[:, 0]) + t[:, 1], 2, "t1"),
    "tail that is too heavy": (lambda t: -0.3 * torch.log1p(t.abs()).sum(-1), 1, "t0"),
    "separable logistic regression": (lambda t: -softplus(-LABELS * (t @ PREDICTORS.T)).sum(-1), 2, "t1"),
    "many": (lambda t: normal(t.sum(-1)), 8, ""),
}


def starts(D):
    return 4 * torch.rand(5, D, generator=generator(), dtype=torch.float64) - 2


@over(IMPROPER)
def test_flat_directions_are_named(name):
    target, D, directions = IMPROPER[name]
    with pytest.raises(ValueError, match="expected a proper posterior") as caught:
        check_proper(target, starts(D), [f"t{i}" for i in range(D)], 0)
    described = str(caught.value).split("does not fall along ")[1].split(";")[0]
    assert described == directions or name == "many"


def rotated(condition, D=12):
    """Return the log density of a Gaussian in D dimensions with this condition number and random axes."""
    axes = torch.linalg.qr(torch.randn(D, D, generator=generator(), dtype=torch.float64))[0]
    precision = axes * torch.logspace(-math.log10(condition), 0, D, dtype=torch.float64) @ axes.T
    return lambda theta: -0.5 * ((theta @ precision) * theta).sum(-1)


def funnel(theta):
    return normal(theta[:, 0], 0.0, 3.0) + normal(theta[:, 1:], 0.0, (theta[:, :1] / 2).exp()).sum(-1)


PROPER = {
    "gaussian": (gaussian(4)[0], 4),
    "scales": (gaussian(5, [1e-5, 1e4, 1.0, 1e-2, 300.0])[0], 5),
    "condition number 1e12": (rotated(1e12), 12),
    "wide": (lambda t: normal(t, 0.0, 1e6).sum(-1), 2),
    "mode that is far away": (lambda t: normal(t, 1e8).sum(-1), 2),
    "cauchy": (lambda t: -torch.log1p(t.square()).sum(-1), 3),
    "student t, 0.2 df": (lambda t: -0.6 * torch.log1p(t.square()).sum(-1), 2),
    "inverse gamma 0.001 of a positive variable": (lambda t: (-0.001 * t - 0.001 * (-t).exp()).sum(-1), 1),
    "uniform on an interval": (lambda t: -(softplus(t) + softplus(-t)).sum(-1), 2),
    "banana": (banana, 2),
    "funnel": (funnel, 5),
    "schools": (schools, 10),
    "bounded": (lambda t: torch.where(t.abs() < 3, 0 * t, -math.inf).sum(-1), 2),
    "overflow": (lambda t: -t.exp().sum(-1) + t.sum(-1), 2),
}


@over(PROPER)
def test_proper_densities_have_no_flat_direction(name):
    target, D = PROPER[name]
    assert len(flat_directions(target, starts(D), generator())) == 0


def test_a_fit_of_an_improper_posterior_is_refused():
    message = r"got one that does not fall along theta\[1\]; give these parameters a prior, or data that inform them"
    with pytest.raises(ValueError, match=message):
        cf.fit_posterior(lambda theta: -theta[:, 0].square() / 2, dim=2)


def test_a_simplex_that_the_data_leave_out_at_its_corners_is_proper():
    """torch clips the shares of a mixture at 2e-308, beyond which no density falls."""
    y = torch.cat([torch.linspace(-3, -1, 20), torch.linspace(1, 3, 30)]).double()

    def log_density(mean, share):
        each = share.log()[:, None] - (y[:, None] - mean[:, None]).square() / 2
        return torch.logsumexp(each, -1).sum(-1) - mean.square().sum(-1) / 200

    shapes = {"mean": (2,), "share": (2,)}
    target = cf.targets.from_torch(log_density, shapes=shapes, constraints={"share": constraints.simplex})
    points = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).double()
    check_proper(target, points, target.coordinates, seed=0)
