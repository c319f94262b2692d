"""NUTS in the flow's coordinates: the transform adapter that nutpie calls, and chains through it."""

from threading import Thread

import numpy as np
import pytest
import torch
from log_densities import banana, gaussian

import counterflow as cf
from counterflow.posterior.nuts import Adapter, Evaluator, nuts

D = 3


def bent():
    """Return a flow that is not the identity."""
    flow = cf.IAF(D, layers=2, hidden=(8, 8), activation="elu", seed=1).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return flow.requires_grad_(False)


@pytest.fixture
def evaluator():
    target = gaussian(D, [0.5, 1.0, 3.0])[0]
    made = Evaluator(bent(), lambda theta: torch.where(theta.norm(dim=-1) < 100, target(theta), torch.nan), 2)
    thread = Thread(target=made.run)
    thread.start()
    yield made
    made.stop()
    thread.join()


def tuned(evaluator):
    """Return an adapter after an update with mean and scale."""
    adapter = Adapter(evaluator, D, 1)
    theta = evaluator.flow().sample((200,))
    leaf = theta.clone().requires_grad_()
    value = evaluator.target(leaf)
    (score,) = torch.autograd.grad(value.sum(), leaf)
    adapter.update(0, list(theta.numpy()), list(score.numpy()), value.tolist())
    return adapter


def test_the_density_in_the_chains_coordinates_has_its_gradient(evaluator):
    adapter = tuned(evaluator)
    z = np.array([0.3, -0.2, 1.0])
    log_p, log_det, theta, score, gradient = adapter.init_from_transformed_position(z)
    assert adapter.transformation_id == 1 and log_p == pytest.approx(evaluator.target(torch.tensor(theta)[None]).item())

    def density(z):
        found = adapter.init_from_transformed_position(z)
        return found[0] + found[1]

    steps = 1e-5 * np.eye(D)
    differences = [(density(z + step) - density(z - step)) / 2e-5 for step in steps]
    assert gradient == pytest.approx(differences, abs=1e-6)
    corners = [adapter.init_from_transformed_position(z + step)[2] for step in steps]
    jacobian = (np.stack(corners) - theta) / 1e-5
    assert log_det == pytest.approx(np.linalg.slogdet(jacobian)[1], abs=1e-3) and len(score) == D


def test_the_directions_of_the_adapter_agree(evaluator):
    adapter = tuned(evaluator)
    z = np.array([0.3, -0.2, 1.0])
    log_p, log_det, theta, score, gradient = adapter.init_from_transformed_position(z)
    found = adapter.init_from_untransformed_position(theta)
    for a, b in zip(found, (log_p, log_det, score, z, gradient), strict=True):
        assert a == pytest.approx(b, abs=1e-9)
    for a, b in zip(adapter.inv_transform(theta, score), (log_det, z, gradient), strict=True):
        assert a == pytest.approx(b, abs=1e-9)
    there, part1 = adapter.init_from_transformed_position_part1(z)
    assert there == pytest.approx(theta)
    for a, b in zip(adapter.init_from_transformed_position_part2(part1, score), (log_det, gradient), strict=True):
        assert a == pytest.approx(b, abs=1e-9)


def test_the_scale_is_that_of_a_normal_in_latent_space():
    """The flow is the identity, so that the latent density is the target: a normal with known moments."""
    flow = cf.Flow(cf.bases.StandardNormal(D), cf.Compose([cf.Permute(range(D))])).double()
    target, mean, factor = gaussian(D, [0.5, 1.0, 3.0])
    evaluator = Evaluator(flow, target, 2)
    adapter = Adapter(evaluator, D, 1)
    variance = (factor @ factor.T).diagonal()
    theta = mean + torch.randn(400, D, generator=torch.Generator().manual_seed(0)).double() @ factor.T
    score = -(theta - mean) @ torch.linalg.inv(factor @ factor.T)
    adapter.update(0, list(theta.numpy()), list(score.numpy()), [0.0] * 400)
    assert adapter._scale**2 == pytest.approx((theta[200:].std(0) / score[200:].std(0)).numpy(), rel=1e-2)
    assert (adapter._scale**2 < 1.2 * variance.numpy()).all()
    few = Adapter(evaluator, D, 1)
    few.update(0, list(theta[:8].numpy()), list(score[:8].numpy()), [0.0] * 8)
    assert few.transformation_id == 0


def test_a_point_that_is_not_finite_is_a_divergence_and_no_failure(evaluator):
    point = evaluator(1, np.array([-1e9, 0.0, 1e9]))
    assert point.log_p == -np.inf and not point.gradient.any() and evaluator.failure is None


@pytest.mark.slow
def test_nutpie_samples_through_a_flow():
    """The target is the flow's density, so that the chains sample a standard normal in its latent space."""
    pytest.importorskip("nutpie")
    flow = bent()
    found = nuts(flow, flow().log_prob, chains=2, samples=100, warm_up=60, seed=1)
    assert found.draws.shape == (2, 100, D) and found.evaluations > 300 and found.divergences == 0
    assert found.convergence.r_hat.max() < 1.1 and found.convergence.ess_bulk.min() > 60
    again = nuts(flow, flow().log_prob, chains=2, samples=100, warm_up=60, seed=1)
    assert torch.equal(found.draws, again.draws)


@pytest.mark.slow
def test_nutpie_stays_inside_a_bounded_support():
    pytest.importorskip("nutpie")

    def half(theta):
        return torch.where(theta[:, 0] > 0, -theta.square().sum(-1) / 2, -torch.inf)

    found = nuts(bent(), half, chains=2, samples=60, warm_up=30)
    assert (found.draws[..., 0] > 0).all()


def test_an_error_of_the_target_ends_the_chains():
    pytest.importorskip("nutpie")
    calls = []

    def failing(theta):
        calls.append(len(theta))
        if len(calls) > 30:
            raise RuntimeError("the model fails")
        return -theta.square().sum(-1) / 2

    with pytest.raises(RuntimeError, match="the model fails"):
        nuts(bent(), failing, chains=2, samples=50, warm_up=50)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target_acceptance": 1.0}, "target_acceptance between 0 and 1, got 1.0"),
        ({"samples": 3}, "at least 4"),
    ],
    ids=["acceptance", "samples"],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        nuts(bent(), banana, **kwargs)


def test_a_missing_nutpie_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nutpie", None)
    with pytest.raises(ImportError, match=r"expected nutpie for NUTS .*; pip install 'counterflow\[refine\]'"):
        nuts(bent(), banana)
