"""Starting points, also where the density is rarely finite, and the initial Gaussians."""

import math

import pytest
import torch
from log_densities import QUICK, gaussian, generator, modes, schools
from torch.distributions import constraints

import counterflow as cf
from counterflow.posterior.starts import initial_gaussians, starting_points
from counterflow.posterior.targets.function import from_torch


def test_a_spike_of_the_density_does_not_attract_the_start():
    starts = 4 * torch.rand(6, 10, generator=generator()).double() - 2
    q = initial_gaussians(schools, starts, generator())
    assert -2 < q.mean[0, 9] < 3  # log tau
    assert q.elbo[0] > -17  # the log evidence is -13.63


def test_two_modes_are_found_and_duplicates_removed():
    q = initial_gaussians(modes, 4 * torch.rand(6, 3, generator=generator()).double() - 2, generator())
    assert sorted(q.mean[:, 0].round().tolist()) == [-5, 5]
    target = gaussian(3)[0]
    assert len(initial_gaussians(target, torch.rand(6, 3, generator=generator()).double(), generator()).mean) == 1


def test_a_target_that_is_nowhere_finite():
    with pytest.raises(ValueError, match="finite around at least one of 3 starting points, got none"):
        initial_gaussians(lambda theta: theta.sum(-1) * math.nan, torch.zeros(3, 2).double(), generator())


def ball(center, radius, D=2):
    """Return a target that is finite only within a distance of a point."""

    def log_density(theta):
        distance = (theta - center).norm(dim=-1)
        return torch.where(distance < radius, -distance.square(), -math.inf)

    return from_torch(log_density, dim=D)


def distances(points, center=0.0):
    return (points - center).norm(dim=-1)


def test_starting_points_are_uniform_if_they_are_finite():
    target = ball(0.0, 5.0)
    points = starting_points(target, 6, 3)
    assert torch.equal(points, target.initial(6, 3)) and points.abs().max() < 2


@pytest.mark.parametrize("radius", [0.01, 0.12, 0.3])
def test_smaller_radii_and_the_origin_are_tried(radius):
    points = starting_points(ball(0.0, radius, D=6), 4, 0)
    assert len(points) in (1, 4) and (distances(points) < radius).all()


def test_the_initial_point_of_the_model_is_used():
    target = ball(50.0, 1.0)
    target.initial_points = lambda n, generator: torch.full((n, 2), 50.2, dtype=torch.float64)
    points = starting_points(target, 8, 0)
    assert len(points) == 9 and (distances(points, 50.0) < 1).all() and len(points.unique(dim=0)) == 9


def test_prior_draws_of_the_model_are_tried():
    def initial_points(n, generator):
        draws = 50 + 2 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return torch.cat([torch.full((1, 2), 7.0, dtype=torch.float64), draws])[:n]

    target = ball(50.0, 1.0)
    target.initial_points = initial_points
    points = starting_points(target, 8, 0)
    assert len(points) >= 8 and (distances(points, 50.0) < 1).all()


def test_starts_of_the_user_are_added_to_the_others():
    target = ball(0.0, 30.0)
    points = starting_points(target, 4, 0, {"theta": [[5.0, 6.0], [7.0, 8.0]]})
    assert torch.equal(points[:4], target.initial(4, 0)) and points[4:].tolist() == [[5.0, 6.0], [7.0, 8.0]]


def named():
    """Return a target whose data limit mu to (49.5, 50.5)."""
    y = torch.tensor([49.5, 50.5]).double()

    def log_density(mu, tau, z):
        inside = (mu[:, None] - y).abs().lt(1).all(-1)
        return torch.where(inside, -((mu - 50) / 5).square() / 2, -math.inf) - tau - z.square().sum(-1) / 2

    shapes = {"mu": (), "tau": (), "z": (2,)}
    return from_torch(log_density, shapes=shapes, constraints={"tau": constraints.positive})


def test_starts_of_some_variables_are_completed_at_random():
    target = named()
    with pytest.raises(
        ValueError, match=r"got none; it is -inf with parameters mu, tau, z.* or pass starts=, values of"
    ):
        starting_points(target, 4, 0)
    points = starting_points(target, 4, 0, {"mu": 50.2, "tau": 3.0})
    assert len(points) == 5 and points[0, :2].tolist() == pytest.approx([50.2, math.log(3.0)])
    assert points[0, 2:].abs().max() < 2 and (points[:, 0] - 50).abs().max() < 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigma": 1.0}, "expected starts for some of mu, tau, z, got sigma"),
        ({}, "expected starts for some of mu, tau, z, got none"),
        ({"z": [1.0, 2.0, 3.0]}, r"expected starts of z of shape \(2,\) or \(K, \*shape\), got \(3,\)"),
        ({"mu": [1.0, 2.0], "tau": [1.0, 2.0, 3.0]}, "the same number of starts for all variables, got mu 2, tau 3"),
        ({"mu": 10.0}, "expected starts at which the log density and its gradient are finite, got none; it is -inf"),
    ],
    ids=["unknown", "none", "shape", "numbers", "not finite"],
)
def test_errors_of_the_starts(values, message):
    with pytest.raises(ValueError, match=message):
        starting_points(named(), 4, 0, values)


def test_a_fit_from_starts_of_the_user():
    posterior = cf.fit_posterior(named(), QUICK, starts={"mu": 50.0})
    assert (posterior.values["mu"][posterior.log_weights > -math.inf] - 50).abs().max() < 0.5
    assert posterior.summary().rows["mu"].mean == pytest.approx(50.0, abs=0.1)
