"""Our flows inside samplers of evidence and posteriors: pocoMC and nessai."""

import math

import numpy as np
import pytest
import torch
from registry import close, over, stir

D = 3
pytestmark = pytest.mark.filterwarnings("ignore")  # of the samplers
LOG_Z = -D * math.log(20)  # a normalized normal likelihood in the prior box [-10, 10]^D


def log_normal(x):
    return -0.5 * np.sum(np.square(x), -1) - 0.5 * D * math.log(2 * math.pi)


class TestPocoMC:
    @over(("nsf", "maf"))
    def test_the_evidence_of_a_normal(self, name):
        pocomc = pytest.importorskip("pocomc")
        scipy = pytest.importorskip("scipy.stats")
        from counterflow.interop.pocomc import flow

        prior = pocomc.Prior([scipy.uniform(-10, 20)] * D)
        more = {"vectorize": True, "random_state": 0, "n_effective": 200, "n_active": 100}
        adapted = flow(D, name, layers=2, hidden=(16,))
        sampler = pocomc.Sampler(prior, log_normal, flow=adapted, train_config={"epochs": 40}, **more)
        sampler.run(n_total=400, n_evidence=400, progress=False)
        assert abs(sampler.evidence()[0] - LOG_Z) < 0.5
        samples, log_weights, *_ = sampler.posterior()
        weights = np.exp(log_weights - log_weights.max()) if log_weights.min() < 0 else log_weights
        assert np.abs(np.average(samples, 0, weights)).max() < 0.4

    def test_its_contract(self):
        pocomc = pytest.importorskip("pocomc")
        from counterflow.interop.pocomc import flow

        theirs = pocomc.Flow(D, flow(D, layers=2, hidden=(16,)))
        x = torch.randn(50, D)
        u, log_det = theirs.forward(x)
        back, inverse_log_det = theirs.inverse(u)
        close(back, x, 1e-4)
        close(inverse_log_det, -log_det, 1e-4)
        theirs.fit(x, epochs=3)
        assert theirs.log_prob(x).shape == (50,) and theirs.sample(7)[0].shape == (7, D)

    def test_the_default_has_pocomcs_sizes(self):
        from counterflow.interop.pocomc import flow

        assert flow(20).unwrapped().transform.transform[0].hidden == (64, 64, 64)
        assert flow(2).unwrapped().transform.transform[0].hidden == (32, 32, 32)
        with pytest.raises(ValueError, match="expected kind to be one of nsf, maf, got 'nsf6'"):
            flow(3, "nsf6")


class TestNessai:
    @over(("maf", "nsf"))
    def test_the_evidence_of_a_normal(self, name, tmp_path):
        pytest.importorskip("nessai")
        from nessai.flowsampler import FlowSampler
        from nessai.model import Model

        from counterflow.interop.nessai import CounterflowFlow

        class Normal(Model):
            names = [f"x{k}" for k in range(D)]  # noqa: RUF012  # nessai's own convention
            bounds = {name: [-10, 10] for name in names}  # noqa: RUF012

            def log_prior(self, x):
                return np.log(self.in_bounds(x), dtype="float") + LOG_Z

            def log_likelihood(self, x):
                return log_normal(self.unstructured_view(x))

        sampler = FlowSampler(
            Normal(),
            output=str(tmp_path),
            resume=False,
            seed=1,
            nlive=200,
            flow_config={"flow": CounterflowFlow, "kind": name, "n_blocks": 2, "n_neurons": 16, "n_layers": 1},
            training_config={"max_epochs": 30},
            signal_handling=False,
        )
        sampler.run(plot=False, save=False)
        assert abs(sampler.ns.log_evidence - LOG_Z) < 0.6

    @over(("maf", "nsf", "iaf", "coupling"))
    @pytest.mark.parametrize("context", [0, 2])
    def test_its_contract(self, name, context):
        pytest.importorskip("nessai")
        from counterflow.interop.nessai import CounterflowFlow

        flow = stir(CounterflowFlow(D, 16, 2, 1, kind=name, context_features=context))
        x = torch.randn(7, D).double()
        c = torch.randn(7, context).double() if context else None
        z, log_q = flow.forward_and_log_prob(x, c)
        close(flow.inverse(z, c)[0], x, 1e-8)
        close(flow.log_prob(x, c), log_q)
        close(flow.log_prob(x, c), flow.flow(c).log_prob(x))
        samples, log_q = flow.sample_and_log_prob(7, c)
        close(flow.log_prob(samples, c), log_q, 1e-8)
        assert flow.sample(7, c).shape == (7, D)
        flow.freeze_transform()
        assert not any(p.requires_grad for p in flow.parameters())
        flow.unfreeze_transform()
        assert all(p.requires_grad for p in flow.parameters())
        flow.reset_parameters()
        assert flow.forward(x, c)[1].abs().max() < 0.5, "near the identity again"

    def test_an_unknown_kind_is_refused(self):
        pytest.importorskip("nessai")
        from counterflow.interop.nessai import CounterflowFlow

        with pytest.raises(ValueError, match="expected kind to be one of maf, nsf, iaf, coupling, got 'realnvp'"):
            CounterflowFlow(3, kind="realnvp")
