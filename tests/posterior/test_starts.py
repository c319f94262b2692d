"""Starting points and the initial Gaussians."""

import math

import pytest
import torch
from log_densities import gaussian, generator, modes, schools

from counterflow.posterior.starts import initial_gaussians


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
