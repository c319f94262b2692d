"""Evaluation of log densities that may fail to be finite, in chunks."""

import math

import pytest
import torch
from log_densities import generator
from torch.distributions import Distribution, Normal

from counterflow.posterior.evaluation import log_density, log_density_and_score
from counterflow.posterior.starts import initial_gaussians


def test_distributions_that_validate_their_parameters(monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", True)  # torch.compile turns it off

    def target(theta):
        scale = (4 * theta[:, 0]).exp()  # 0 or infinite before theta[0] is 200 away
        return Normal(0.0, 3.0).log_prob(theta[:, 0]) + Normal(0.0, scale).log_prob(theta[:, 1])

    far = torch.tensor([[-300.0, 1.0], [300.0, 1.0], [0.5, 1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="Expected parameter scale"):
        target(far)
    value, score = log_density_and_score(target, far)
    assert value[:2].tolist() == [-math.inf, -math.inf] and value[2].isfinite() and score.isfinite().all()
    assert Distribution._validate_args
    assert initial_gaussians(target, torch.zeros(3, 2).double(), generator()).elbo[0].isfinite()


@pytest.mark.parametrize(("max_points", "sizes"), [(None, [1024, 476]), (700, [700, 700, 100])])
def test_points_are_evaluated_in_chunks_that_the_target_limits(max_points, sizes):
    class Target:
        def __init__(self):
            self.sizes = []
            if max_points:
                self.max_points = max_points

        def __call__(self, theta):
            self.sizes.append(len(theta))
            return -theta.square().sum(-1)

    target = Target()
    theta = torch.randn(3, 500, 2).double()
    value = log_density(target, theta)
    assert value.shape == (3, 500) and torch.equal(value, -theta.square().sum(-1)) and target.sizes == sizes
    value, score = log_density_and_score(target, theta)
    assert value.shape == (3, 500) and torch.equal(score, -2 * theta) and target.sizes == 2 * sizes
