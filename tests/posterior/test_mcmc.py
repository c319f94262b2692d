"""Markov chains that use an imperfect flow: their draws are those of the target."""

import copy
import math
import os
import signal
import sys

import pytest
import torch
from registry import over
from scipy import stats
from torch.distributions import MultivariateNormal

import counterflow as cf
from counterflow.diagnostics.chains import Convergence
from counterflow.posterior.mcmc import Chains, independence_metropolis, neutra

MEAN = torch.tensor([0.3, -0.5, 0.2]).double()
COVARIANCE = torch.tensor([[1.0, 0.6, -0.3], [0.6, 0.8, 0.1], [-0.3, 0.1, 0.5]]).double()


def gaussian(z):
    """Log density far from zero, as with many data; float32 has no decimals there."""
    return MultivariateNormal(MEAN, COVARIANCE).log_prob(z) - 3e7


def banana(z):
    """z_1 ~ N(0, 1), z_2 ~ N((z_1^2 - 1) / 2, 0.7^2): means 0, variances 1 and 0.7^2 + 1 / 2."""
    return -(z[:, 0].square() + ((z[:, 1] - (z[:, 0].square() - 1) / 2) / 0.7).square()) / 2


TARGETS = {  # log density, means, standard deviations
    "gaussian": (gaussian, MEAN, COVARIANCE.diagonal().sqrt()),
    "banana": (banana, torch.zeros(2).double(), torch.tensor([1.0, 0.99]).double().sqrt()),
}
SAMPLERS = {"metropolis": independence_metropolis, "neutra": neutra}
FLOW = cf.IAF(2, layers=1, hidden=(4,))


class Bend(cf.transforms.Transform):
    """y_1 = x_1, y_2 = x_2 + (x_1^2 - 1) / 3: less bent than the banana, and wider in x_2."""

    features = 2

    def forward(self, x, c=None):
        return x + self._shift(x), x.new_zeros(x.shape[:-1])

    def inverse(self, y, c=None):
        return y - self._shift(y), y.new_zeros(y.shape[:-1])

    def _shift(self, x):
        bend = (x[..., 0].square() - 1) / 3
        return torch.stack([torch.zeros_like(bend), bend], -1)

    def config(self):
        return {}


SHAPES = {
    "gaussian": cf.Inverse(
        cf.transforms.Whiten(torch.zeros(3), torch.linalg.cholesky(COVARIANCE + torch.eye(3) / 4).float())
    ),
    "banana": Bend(),
}


def imperfect(target="banana"):
    """Return a float32 flow that is off-centre or bends too little, is too wide and has tails that are too heavy."""
    torch.manual_seed(3)
    last = SHAPES[target]
    first = cf.IAF(last.features, layers=2, hidden=(16,)).transform
    with torch.no_grad():
        for p in first.parameters():
            p += 0.03 * torch.randn_like(p)
    return cf.Flow(cf.bases.StudentT(last.features, max_df=5.0), cf.Compose([first, last]))


def standard(z):
    return -z.square().sum(-1) / 2


@pytest.mark.parametrize("sampler", ["metropolis", pytest.param("neutra", marks=pytest.mark.slow)])
@over(TARGETS, "target")
def test_draws_have_the_moments_of_the_target_instead_of_the_flow(sampler, target):
    log_density, mean, std = TARGETS[target]
    flow = imperfect(target)
    before = copy.deepcopy(flow.state_dict())
    found = SAMPLERS[sampler](flow, log_density)
    assert found.draws.dtype == torch.float64 and found.draws.dim() == 3
    assert (found.convergence.r_hat < 1.02).all()
    error = std / found.convergence.ess_bulk.sqrt()
    assert ((found.draws.mean((0, 1)) - mean).abs() < 5 * error).all()
    assert ((found.draws.flatten(0, 1).std(0) - std).abs() < 5 * error).all()
    assert (error < 0.06).all()
    theirs = flow().sample((20_000,)).double()
    assert ((theirs.std(0) - std).abs() > 5 * error).any()
    assert flow.training and all(torch.equal(one, before[name]) for name, one in flow.state_dict().items())


@pytest.mark.slow
def test_neutra_of_a_target_that_computes_in_jax():
    """Sampler and target share JAX; the model is a normal mean with a normal prior, known variance and seven data."""
    from numpyro import distributions, sample

    y = torch.arange(7.0).numpy()
    target = cf.targets.from_numpyro(
        lambda: sample("y", distributions.Normal(sample("mean", distributions.Normal(0, 2)), 1.5).expand([7]), obs=y)
    )
    found = neutra(cf.IAF(1, layers=1, hidden=(4,)), target, samples=100, warm_up=100)
    precision = 1 / 2**2 + 7 / 1.5**2
    error = precision**-0.5 / found.convergence.ess_bulk.item() ** 0.5
    assert abs(found.draws.mean().item() - 21 / 1.5**2 / precision) < 5 * error
    assert abs(found.draws.std().item() - precision**-0.5) < 5 * error


def test_metropolis_has_the_distribution_of_its_target():
    wide = cf.Flow(cf.bases.StudentT(1, max_df=3.0), cf.IAF(1, layers=1, hidden=(4,)).transform)
    found = independence_metropolis(wide, standard, chains=64, samples=2_000)
    thinned = found.draws[:, ::20, 0].flatten().numpy()
    assert stats.kstest(thinned, "norm").pvalue > 1e-3
    assert stats.kstest(wide().sample((len(thinned),))[:, 0].numpy(), "norm").pvalue < 1e-3


def test_metropolis_accepts_every_draw_of_an_exact_flow():
    exact = cf.Flow(cf.bases.StandardNormal(2), cf.Permute([1, 0]))
    found = independence_metropolis(exact, standard, chains=3, samples=50, warm_up=0)
    assert found.acceptance == 1 and found.divergences == 0
    assert len(found.draws.flatten(0, 1).unique(dim=0)) == 150


def test_metropolis_accepts_as_often_as_the_densities_say():
    """From N(0, s^2) to N(0, 1) in one feature: E min(1, w' / w) = (4 / pi) arctan(s), for s below 1."""
    flow = cf.Flow(cf.bases.DiagonalNormal(1), cf.Permute([0])).double()
    s = 0.8
    with torch.no_grad():
        flow.base.constant[1] = 7 * math.atanh(math.log(s) / 7)
    found = independence_metropolis(flow, standard, chains=100, samples=2_000)
    # The chain's z is N(0, 1) and its proposal z' is N(0, s^2); it moves if |z'| > |z|, and otherwise with
    # probability exp(-(1 / s^2 - 1) (z^2 - z'^2) / 2): by symmetry twice the probability that |z'| > |z|.
    assert found.acceptance == pytest.approx(4 / math.pi * math.atan(s), abs=0.01)


def test_metropolis_outside_the_support_of_its_target():
    def half(z):
        return torch.where(z[:, 0] < 0.5, math.nan, standard(z))

    found = independence_metropolis(imperfect(), half, chains=32, samples=500)
    assert (found.draws[..., 0] >= 0.5).all()
    expected = stats.truncnorm(0.5, math.inf).mean()
    assert found.draws[..., 0].mean().item() == pytest.approx(expected, abs=0.05)


def test_chains_depend_only_on_their_seed():
    state = torch.get_rng_state()
    first, again, other = (
        independence_metropolis(FLOW, standard, chains=2, samples=30, seed=seed).draws for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@over([(1, 4, 0), (7, 33, 5)], "sizes")
def test_sizes_of_chains(sizes):
    chains, samples, warm_up = sizes
    found = independence_metropolis(FLOW, standard, chains=chains, samples=samples, warm_up=warm_up)
    assert found.draws.shape == (chains, samples, 2)


def test_the_summary_sentence_of_chains():
    mixed = Convergence(torch.tensor([1.001, 1.0042]), torch.tensor([1234.0, 900.0]), torch.tensor([800.4, 950.0]))
    assert Chains(torch.zeros(4, 1000, 2), 0.876, 3, mixed, 9).sentence == (
        "4 chains of 1,000 draws have mixed; R-hat is at most 1.004, the effective sample size at least 800, 88% were "
        "accepted and 3 diverged."
    )
    stuck = mixed._replace(r_hat=torch.tensor([1.0, 1.02]))
    assert "have not mixed: draw more, or train" in Chains(torch.zeros(4, 9, 2), 0.1, 0, stuck, 9).sentence


CONDITIONAL = cf.IAF(2, 3, layers=1, hidden=(4,))
REFUSED = {
    "context": ({"flow": CONDITIONAL}, "expected a flow without a context, got context=3"),
    "chains": ({"chains": 0}, "expected chains of at least 1, samples of at least 4 and warm_up .* got 0, "),
    "samples": ({"samples": 3}, "expected chains .* got [0-9]+, 3 and "),
    "warm_up": ({"warm_up": -1}, "expected chains .* and -1"),
}


@over(SAMPLERS, "sampler")
@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_errors(sampler, arguments, message):
    with pytest.raises(ValueError, match=message):
        SAMPLERS[sampler](**{"flow": FLOW, "target": standard, **arguments})


@pytest.mark.parametrize("target_acceptance", [0.0, 1.0, math.nan])
def test_target_acceptance(target_acceptance):
    with pytest.raises(ValueError, match="expected target_acceptance between 0 and 1, got"):
        neutra(FLOW, standard, target_acceptance=target_acceptance)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("metropolis", "at least one draw with a positive weight, got .* that are all -inf"),
        ("neutra", "got 0 of 256 draws with a finite log"),
    ],
)
def test_a_target_that_is_zero_everywhere(sampler, message):
    with pytest.raises(ValueError, match=message):
        SAMPLERS[sampler](FLOW, lambda z: z.sum(-1) - math.inf)


def failing(call, action):
    """Return a target that runs an action when it is called for the n-th time."""
    calls = 0

    def target(z):
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return standard(z)

    return target


@pytest.mark.slow  # JAX compiles
def test_neutra_raises_an_error_of_the_target():
    def fail():
        raise ZeroDivisionError("of the model")

    with pytest.raises(ZeroDivisionError, match="of the model"):
        neutra(FLOW, failing(50, fail), chains=4, samples=20, warm_up=20)


@pytest.mark.slow
def test_neutra_can_be_interrupted():
    interrupted = failing(50, lambda: os.kill(os.getpid(), signal.SIGINT))
    linear = cf.Flow(cf.bases.StandardNormal(2), cf.Permute([1, 0]))  # its log-determinant is a constant
    with pytest.raises(KeyboardInterrupt):
        neutra(linear, interrupted, chains=4, samples=2_000, warm_up=20)


def test_without_numpyro(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpyro.infer", None)
    with pytest.raises(ImportError, match=r"expected numpyro for NUTS, got: .*pip install 'counterflow\[refine\]'"):
        neutra(FLOW, standard)
