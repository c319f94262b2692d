"""Gaussian approximations by Newton paths and by matching scores."""

import math

import torch
from log_densities import gaussian, generator
from registry import close, over

from counterflow.posterior.gaussians import Gaussians, batch_and_match, newton_paths, shrunk_gaussians

SCALES = {"equal": None, "from 1e-5 to 1e4": [1e-5, 1e4, 1.0, 1e-2, 300.0]}


@over(SCALES)
def test_newton_paths_find_a_gaussian_on_any_scale(name):
    target, mean, factor = gaussian(5, SCALES[name])
    q = newton_paths(target, torch.rand(3, 5, generator=generator()).double(), 40, generator())
    white = torch.linalg.solve_triangular(factor, q.mean.T - mean[:, None], upper=False)
    assert white.abs().max() < 1e-3
    for found in q.factor:
        spread = torch.linalg.solve_triangular(factor, found, upper=False)
        close(spread @ spread.T, torch.eye(5).double(), 1e-3)


def test_the_elbo_of_an_exact_gaussian_is_its_log_normaliser():
    target, mean, factor = gaussian(3)
    q = Gaussians(mean[None], factor[None], torch.zeros(1))
    log_z = factor.diagonal().log().sum() + 1.5 * math.log(2 * math.pi)
    close(batch_and_match(target, q, 0, generator()).elbo, log_z[None])


def test_batch_and_match_is_exact_for_a_gaussian():
    target, mean, factor = gaussian(4)
    wrong = Gaussians(torch.zeros(1, 4).double(), 0.1 * torch.eye(4).double()[None], torch.zeros(1))
    q = batch_and_match(target, wrong, 30, generator())
    close(q.mean[0], mean, 1e-2)
    close(q.factor[0] @ q.factor[0].T, factor @ factor.T, 1e-2)


def test_draws_and_density_of_gaussians_agree():
    _, mean, factor = gaussian(3)
    q = Gaussians(torch.stack([mean, -mean]), torch.stack([factor, 2 * factor]), torch.zeros(2))
    theta, log_q = q.rsample_and_log_prob(torch.randn(2, 7, 3).double())
    for k in range(2):
        close(q.log_prob(theta[k])[k], log_q[k])
        truth = torch.distributions.MultivariateNormal(q.mean[k], scale_tril=q.factor[k])
        close(truth.log_prob(theta[k]), log_q[k])


def test_gaussians_shrink_to_a_bounded_support():
    def box(theta):
        return torch.where((theta[:, 0] - 50).abs() < 0.01, -theta[:, 1].square() / 2 + 0 * theta[:, 0], -math.inf)

    q = shrunk_gaussians(box, torch.tensor([[50.005, 1.0], [49.999, -1.0]]).double(), generator())
    inside, _ = q.rsample_and_log_prob(torch.randn(len(q.mean), 500, 2, generator=generator()).double())
    assert (box(inside[0]).isfinite().double().mean() > 0.4) and q.factor[0, 1, 1] > 0.1


def test_the_score_of_a_gaussian():
    q = Gaussians(torch.tensor([[1.0, 2.0]]), torch.tensor([[[2.0, 0.0], [1.0, 0.5]]]), torch.zeros(1))
    theta = torch.tensor([[[0.3, -1.0]], [[2.0, 1.0]]], requires_grad=True)
    close(q.score(theta), torch.autograd.grad(q.log_prob(theta[:, 0]).sum(), theta)[0])
