"""The flows that people ask for by name, as they come out of the box: float32."""

import pytest
import torch
from registry import over

import counterflow as cf

RECIPES = {"IAF": cf.IAF, "MAF": cf.MAF, "NSF": cf.NSF, "Coupling": cf.Coupling}


def layers(flow):
    return [t for t in flow.modules() if isinstance(t, cf.Autoregressive)]


@over(RECIPES)
@over([0, 3], "context")
def test_a_fresh_flow_is_near_the_identity(name, context):
    flow = RECIPES[name](64, context, layers=5, order="same")
    x, c = torch.randn(256, 64), torch.randn(256, context) if context else None
    for direction in (flow.transform, flow.transform.inverse):
        y, log_det = direction(x, c)
        assert (y - x).abs().max() < 1e-2
        assert log_det.abs().max() < 64 * 1e-2


def test_a_new_gated_flow_has_the_scale_that_its_docstring_gives():
    x = torch.randn(256, 64)
    for n in (1, 5):
        y, log_det = cf.IAF(64, layers=n, univariate=cf.Gated(), order="same").transform(x)
        assert (y - 0.8808**n * x).abs().max() < 1e-2
        assert (log_det + n * 64 * 0.1269).abs().max() < 64 * 1e-2


@over(RECIPES)
def test_float32_round_trip_of_a_fresh_deep_flow(name):
    transform = RECIPES[name](64, layers=5, hidden=(512, 512)).transform
    x = torch.randn(256, 64)
    with torch.no_grad():
        for there, back in ((transform, transform.inverse), (transform.inverse, transform)):
            y, log_det = there(x)
            again, log_det_back = back(y)
            assert (again - x).abs().max() < 1e-5
            assert (log_det + log_det_back).abs().max() < 1e-4


@over(RECIPES)
def test_arguments_reach_the_layers(name):
    sizes = {"features": 5, "context": 2, "layers": 3, "hidden": (11, 7), "activation": "silu"}
    flow = RECIPES[name](**sizes, univariate=cf.Gated())
    assert (flow.features, flow.context, len(layers(flow))) == (5, 2, 3)
    for t in layers(flow):
        assert (t.features, t.context, t.hidden, t.activation) == (5, 2, (11, 7), "silu")
        assert t.univariate == cf.Gated()
        assert t.degrees == ((1, 1, 2, 2, 2) if name == "Coupling" else (1, 2, 3, 4, 5))
    assert (flow.transform.forward_cost, flow.transform.inverse_cost)[name == "IAF"] == "forward substitution"
    assert (flow.transform.inverse_cost, flow.transform.forward_cost)[name == "IAF"] == "one pass"


def test_the_default_univariate_map_of_each_recipe():
    assert layers(cf.NSF(2, hidden=(4,), bins=6, bound=3.0))[0].univariate == cf.RationalQuadraticSpline(6, 3.0)
    for make in (cf.IAF, cf.MAF, cf.Coupling):
        assert layers(make(2, hidden=(4,)))[0].univariate == cf.Affine()


def orders(flow):
    return [t.order.tolist() for t in flow.modules() if isinstance(t, cf.Permute)]


@over(RECIPES)
def test_order(name):
    def make(order, seed=0):
        return orders(RECIPES[name](20, layers=3, hidden=(4,), order=order, seed=seed))

    assert make("same") == []
    assert make("reversed") == [list(range(20))[::-1]] * 2
    assert make("random") == make("random") != make("random", seed=1)
    assert make("random")[0] != make("random")[1]


@over(RECIPES)
def test_seed(name, monkeypatch):
    """The same seed gives the same flow, and no global generator notices, that of a GPU included."""

    def make(seed):
        return torch.cat([p.flatten() for p in RECIPES[name](6, 2, 2, (8, 4), seed=seed).parameters()])

    touched = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", touched.append)
    before = torch.get_rng_state()
    assert torch.equal(make(3), make(3)) and not torch.equal(make(3), make(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert not touched, "every GPU's generator was seeded too; seed torch.default_generator alone"
    assert not torch.equal(make(None), make(None))
    assert not torch.equal(torch.get_rng_state(), before)


@over(RECIPES)
def test_one_feature(name):
    q = RECIPES[name](1, layers=2, hidden=(4,))()
    z, log_q = q.rsample_and_log_prob((100,))
    torch.testing.assert_close(q.log_prob(z), log_q, atol=1e-5, rtol=0)
    assert z.detach().std().item() == pytest.approx(1, abs=0.3)
