"""Our flows inside sbi: estimators trained by NPE and NLE, variational posteriors, converted posteriors."""

import pickle
import warnings

import pytest
import torch
from registry import close, over
from sbi.diagnostics import LC2ST_NF
from sbi.inference import NLE, NPE
from sbi.inference.posteriors import EnsemblePosterior, VIPosterior
from sbi.neural_nets import likelihood_nn, posterior_nn
from sbi.samplers.vi.vi_utils import detach_and_deepcopy
from sbi.utils import BoxUniform
from torch import nn

import counterflow as cf
from counterflow.interop.sbi import convert_estimator, convert_posterior, estimator, variational

KINDS = ("maf", "nsf", "iaf", "coupling")
SMALL = {"layers": 2, "hidden": (16,)}
PRIOR = BoxUniform(-2 * torch.ones(3), 2 * torch.ones(3))


@pytest.fixture
def simulations():
    theta = PRIOR.sample((300,))
    return theta, torch.stack([theta, 0.3 * torch.randn(300, 3)], 1)  # x is (N, 2, 3)


def trained(method, builder, theta, x, **more):
    inference = method(PRIOR, density_estimator=builder, show_progress_bars=False)
    inference.append_simulations(theta, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainings are short
        inference.train(max_num_epochs=2)
        return inference.build_posterior(**more)


@over(KINDS)
def test_npe_trains_and_samples(name, simulations, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theta, x = simulations
    builder = pickle.loads(pickle.dumps(estimator(name, embedding_net=nn.Flatten(), **SMALL)))
    posterior = trained(NPE, builder, theta, x)
    assert posterior.sample((5,), x=x[:1], show_progress_bars=False).shape == (5, 3)
    assert posterior.sample_batched((5,), x=x[:4], show_progress_bars=False).shape == (5, 4, 3)
    assert posterior.log_prob(theta[:4], x=x[:1]).isfinite().all()
    again = pickle.loads(pickle.dumps(posterior))
    close(
        again.log_prob(theta[:4], x=x[:1], norm_posterior=False),
        posterior.log_prob(theta[:4], x=x[:1], norm_posterior=False),
    )


def test_the_sizes_and_the_start_of_the_networks_are_those_of_sbi(simulations):
    theta, x = simulations
    modules = posterior_nn("maf")(theta, x.flatten(1)).net.modules()
    theirs = next(m for m in modules if type(m).__name__ == "MADE")
    ours = [m for m in estimator("maf")(theta, x.flatten(1)).modules() if isinstance(m, cf.Autoregressive)]
    assert len(ours) == 5 and ours[0].hidden == (theirs.initial_layer.out_features,) * (1 + len(theirs.blocks))
    for layer in ours:
        assert 0.1 < layer.made.layers[-1].weight.std() / theirs.final_layer.weight.std() < 10


@over(KINDS)
def test_the_contract_of_an_estimator(name, simulations):
    theta, x = simulations
    q = estimator(name, embedding_net=nn.Flatten(), z_score="structured", **SMALL)(theta, x)
    assert q.loss(theta, x).shape == (300,)
    assert q.log_prob(theta[:20].reshape(4, 5, 3), x[:5]).shape == (4, 5)
    assert q.sample(torch.Size((7, 2)), x[:5]).shape == (7, 2, 5, 3)
    samples, log_q = q.sample_and_log_prob(torch.Size((7,)), x[:5])
    close(q.log_prob(samples, x[:5]), log_q, 1e-4)
    close(-q.loss(theta, x), q.log_prob(theta[None], x)[0])
    z = q.inverse_transform(theta, x)
    flow = q.net.unwrapped()
    close(flow.transform(z, q.embedding_net(x))[0], theta, 1e-4)
    first = q.sample(torch.Size((1000,)), x[:1])  # near the standardized values before any training
    assert (first.std() / theta.std() - 1).abs() < 0.2


def test_builds_are_independent(simulations):
    theta, x = simulations
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 4))
    build = estimator("maf", embedding_net=net, **SMALL)
    first, second = build(theta, x), build(theta, x)
    weights = [weight for q in (first, second) for weight in q.parameters()]
    assert len({id(weight) for weight in (*weights, *net.parameters())}) == len(weights) + 2


@over(KINDS)
def test_nle_by_mcmc_and_variational_inference(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theta = PRIOR.sample((300,))
    x = theta[:, :2] + 0.3 * torch.randn(300, 2)
    posterior = trained(NLE, estimator(name, of="likelihood", **SMALL), theta, x, sample_with="mcmc")
    assert posterior.potential_fn.likelihood_estimator.input_shape == (2,)
    q = VIPosterior(posterior.potential_fn, PRIOR, q=variational(name, **SMALL))
    q.set_default_x(x[:1]).train(max_num_iters=12, quality_control=False, show_progress_bar=False)
    theta = q.sample((50,))
    assert theta.shape == (50, 3) and PRIOR.support.check(theta).all()
    assert q.log_prob(theta).isfinite().all()
    assert pickle.loads(pickle.dumps(q)).sample((5,)).shape == (5, 3)
    VIPosterior(posterior.potential_fn, PRIOR, q=q)  # walks through the flow, and copies it
    q.train(max_num_iters=12, retrain_from_scratch=True, quality_control=False, show_progress_bar=False)


def test_a_distribution_of_ours_is_a_variational_family_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theta = PRIOR.sample((200,))
    posterior = trained(NLE, estimator(of="likelihood", **SMALL), theta, theta + 0.1, sample_with="mcmc")
    flow = cf.IAF(3, **SMALL)
    more = {"parameters": flow.parameters(), "modules": flow.modules()}
    q = VIPosterior(posterior.potential_fn, PRIOR, q=flow(), **more)
    q.set_default_x(theta[:1]).train(max_num_iters=12, quality_control=False, show_progress_bar=False)
    assert q.sample((5,)).shape == (5, 3)


def test_lc2st_takes_the_inverse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theta = PRIOR.sample((200,))
    q = estimator(**SMALL)(theta, theta)
    draws = q.sample(torch.Size(()), theta).detach()
    base = torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
    test = LC2ST_NF(theta, theta, draws, flow_inverse_transform=q.inverse_transform, flow_base_dist=base, num_eval=20)
    assert test.theta_q.shape[1] == 3


@over(("maf", "maf_rqs", "nsf", "zuko_maf", "zuko_nsf"))
def test_a_trained_posterior_is_converted_with_its_embedding_net(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theta = PRIOR.sample((200,))
    x = theta + 0.3 * torch.randn(200, 3)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    posterior = trained(NPE, posterior_nn(name, hidden_features=12, embedding_net=net), theta, x)
    fast = convert_posterior(posterior)
    unnormalized = {"x": x[:1], "norm_posterior": False}
    close(fast.log_prob(theta, **unnormalized), posterior.log_prob(theta, **unnormalized), 1e-4)
    close(fast.potential(theta, x=x[:1]), posterior.potential(theta, x=x[:1]), 1e-4)
    assert type(fast) is type(posterior) and type(fast.posterior_estimator.net).__name__ == "AdaptedFlow"
    assert type(posterior.posterior_estimator.net).__name__ != "AdaptedFlow", "the original was changed"
    assert fast.sample((5,), x=x[:1], show_progress_bars=False).shape == (5, 3)
    both = EnsemblePosterior([posterior, posterior])
    close(convert_posterior(both).potential(theta, x=x[:1]), both.potential(theta, x=x[:1]), 1e-4)


def test_a_trained_likelihood_is_converted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theta = PRIOR.sample((200,))
    posterior = trained(NLE, likelihood_nn("maf", hidden_features=12), theta, theta + 0.1, sample_with="mcmc")
    close(convert_posterior(posterior).potential(theta, x=theta[:1]), posterior.potential(theta, x=theta[:1]), 1e-4)


def test_mistakes_are_named(simulations):
    theta, x = simulations
    with pytest.raises(ValueError, match="expected kind to be one of maf, nsf, iaf, coupling, got 'mdn'"):
        estimator("mdn")
    with pytest.raises(ValueError, match="expected of to be one of posterior, likelihood, got 'x'"):
        estimator(of="x")
    with pytest.raises(ValueError, match="expected z_score to be one of none, independent, structured, got 'yes'"):
        estimator(z_score="yes")
    with pytest.raises(ValueError, match=r"expected an embedded condition of shape \(N, C\), got \(2, 2, 3\); give"):
        estimator()(theta, x)
    with pytest.raises(ValueError, match=r"expected x of shape \(N, D\), got \(300, 2, 3\); flatten it"):
        estimator(of="likelihood")(theta, x)
    with pytest.raises(TypeError, match=r"expected a posterior with a trained density estimator, .* got BoxUniform"):
        convert_posterior(PRIOR)
    with pytest.raises(TypeError, match="expected a density estimator NFlowsFlow or ZukoFlow, got Linear"):
        convert_estimator(nn.Linear(2, 2))


def test_sbis_walker_over_a_distribution():
    q = cf.IAF(2)()
    q.rsample()
    detach_and_deepcopy(q)
