"""Our flows inside Pyro: transforms, guides, SVI, Predictive, NeuTraReparam, ZukoToPyro."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.infer.reparam import NeuTraReparam
from registry import close, over, stir

import counterflow as cf
from counterflow.interop.pyro import AutoIAF, PyroTransform

MAKERS = {"IAF": cf.IAF, "MAF": cf.MAF, "NSF": cf.NSF, "Coupling": cf.Coupling}


@pytest.fixture(autouse=True)
def fresh_parameters():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def correlated():
    """Two normals of correlation 0.9 and stds 1 and 2."""
    scale_tril = torch.tensor([[1.0, 0.0], [1.8, 0.872]])
    pyro.sample("theta", dist.MultivariateNormal(torch.tensor([1.0, -1.0]), scale_tril=scale_tril))


def funnel():
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("x", dist.Normal(0.0, scale))


def trained(model, guide, steps, lr=1e-2):
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": lr}), Trace_ELBO(num_particles=16, vectorize_particles=True))
    for _ in range(steps):
        loss = svi.step()
    return loss


@over(MAKERS)
def test_a_transform_in_pyros_distribution(name):
    flow = stir(MAKERS[name](3, layers=2, hidden=(8,)))
    t = PyroTransform(flow.transform)
    q = dist.TransformedDistribution(dist.Normal(torch.zeros(3).double(), 1.0).to_event(1), [t])
    x = q.rsample((4,))
    close(q.log_prob(x), flow().log_prob(x), 1e-8)
    close(q.log_prob(x.clone()), flow().log_prob(x), 1e-8)
    assert set(t.parameters()) == set(flow.transform.parameters())
    assert t.with_cache(1) is t and isinstance(t.with_cache(0), PyroTransform)
    for copied in (copy.deepcopy(t), pickle.loads(pickle.dumps(t))):  # although the last draw has a graph
        close(copied(x.detach()), t(x.detach()))


def test_auto_iaf_finds_a_correlated_posterior():
    guide = AutoIAF(correlated, layers=2, hidden=(16,))
    loss = trained(correlated, guide, 600)
    assert abs(loss) < 0.1, "the loss is KL(q || p), which is 0 for the right q"
    theta = Predictive(correlated, guide=guide, num_samples=4000)()["theta"].squeeze()
    assert torch.allclose(theta.mean(0), torch.tensor([1.0, -1.0]), atol=0.2)
    assert abs(torch.corrcoef(theta.T)[0, 1] - 0.9) < 0.05


def test_it_has_what_autonormalizingflow_has(tmp_path):
    guide = AutoIAF(funnel, layers=2, hidden=lambda features: (4 * features,), univariate=cf.Gated(), activation="tanh")
    trained(funnel, guide, 3)
    assert guide.transform.transform.features == 4
    assert guide.transform.transform[0].hidden == (16,)
    assert len(list(guide.parameters())) == len(list(guide.transform.parameters()))
    trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["scale"]["value"] > 0 and trace.nodes["x"]["value"].shape == (3,)
    samples = Predictive(guide, num_samples=7)()
    assert samples["x"].shape == (7, 3)
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    again = AutoIAF(funnel, layers=2, hidden=(16,), univariate=cf.Gated(), activation="tanh")
    again()
    again.load_state_dict(torch.load(tmp_path / "guide.pt"))
    close(again.transform(torch.zeros(4)), guide.transform(torch.zeros(4)))


def test_neutra():
    guide = AutoIAF(funnel, layers=2, hidden=(16,))
    trained(funnel, guide, 100)
    neutra = NeuTraReparam(guide.requires_grad_(False))
    model = neutra.reparam(funnel)
    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=20, warmup_steps=10, disable_progbar=True)
    mcmc.run()
    latent = next(iter(mcmc.get_samples().values()))
    assert latent.shape == (20, 4) and neutra.transform_sample(latent[0])["x"].shape == (3,)


def test_autonormalizingflow_takes_a_transform():
    guide = AutoNormalizingFlow(funnel, lambda D: PyroTransform(cf.IAF(D, layers=1, hidden=(8,)).transform))
    trained(funnel, guide, 3)


@over(MAKERS)
def test_zukotopyro_takes_our_distributions(name):
    flow = MAKERS[name](3, 2, layers=2, hidden=(8,))
    q = ZukoToPyro(flow(torch.zeros(4, 2)))

    def model():
        with pyro.plate("rows", 4):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def guide():
        pyro.module("flow", flow)
        with pyro.plate("rows", 4):
            pyro.sample("z", ZukoToPyro(flow(torch.zeros(4, 2))))

    x = q()
    assert x.shape == (4, 3)
    close(q.log_prob(x), flow(torch.zeros(4, 2)).log_prob(x), 1e-4)
    before = [p.detach().clone() for p in flow.parameters()]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step()
    assert any((p != was).any() for p, was in zip(flow.parameters(), before, strict=True))
