"""Objectives: equality with the evidence when q is the posterior, the stated bounds and gradients otherwise."""

import copy
import math
from functools import partial

import pytest
import torch
from registry import FLOWS, close, inputs, over, stir
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

import counterflow as cf
from counterflow.objectives import Draws, draw_from

CONDITIONAL = [name for name in FLOWS if FLOWS[name]().context]
BY_FEATURE = [name for name in CONDITIONAL if name.startswith(("IAF", "diagonal alone", "permuted"))]


def log_z(x):
    return 7 * x.sum(-1)


class Exact:
    """Model with a known posterior: p(x, z) = Z(x) p(z|x), p(z|x) a frozen flow; q is another flow or a copy of it."""

    def __init__(self, truth, q=None):
        self.truth = truth.requires_grad_(False)
        self.q = copy.deepcopy(truth).requires_grad_() if q is None else q

    def draw(self, x, samples=1, density="joint"):
        z, log_q = draw_from(self.q(x), samples, density)
        prior = Normal(torch.zeros_like(z), 1).log_prob(z)
        log_joint = log_z(x) + self.truth(x).log_prob(z)
        return Draws(log_joint - prior.sum(-1), prior if density == "by_feature" else prior.sum(-1), log_q, z)


class LinearGaussian:
    """z ~ N(0, I), x|z ~ N(W z, s^2 I), W with orthogonal columns: the posterior is a diagonal normal, linear in x."""

    W = torch.tensor([[1.0, 2.0], [2.0, -1.0], [0.0, 0.0]]).double()
    s = 0.7

    def __init__(self):
        self.variance = 1 / (1 + (self.W**2).sum(0) / self.s**2)
        self.x = torch.randn(5, 3).double()
        base = cf.bases.DiagonalNormal(2, 3).double()
        with torch.no_grad():
            base.linear.weight.zero_()
            base.linear.weight[:2] = self.variance[:, None] * self.W.T / self.s**2
            base.linear.bias[2:] = 7 * torch.atanh(0.5 * self.variance.log() / 7)
        self.q = cf.Flow(base, cf.Permute([0, 1]))

    def evidence(self):
        covariance = self.W @ self.W.T + self.s**2 * torch.eye(3).double()
        return MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(self.x)

    def posterior(self):
        return Independent(Normal(self.x @ self.W * self.variance / self.s**2, self.variance.sqrt()), 1)

    def worse(self):
        """Perturb q, so that it differs from the posterior; return self."""
        with torch.no_grad():
            for p in self.q.parameters():
                p += 0.15 * torch.randn_like(p)
        return self

    def draw(self, x, samples=1, density="joint"):
        z, log_q = draw_from(self.q(x), samples, density)
        prior = Normal(torch.zeros_like(z), 1).log_prob(z)
        log_p = Normal(z @ self.W.T, self.s).log_prob(x).sum(-1)
        return Draws(log_p, prior if density == "by_feature" else prior.sum(-1), log_q, z)


EACH = {"elbo": cf.objectives.elbo, "path_elbo": cf.objectives.path_elbo}  # one term per draw
JOINT = {  # one term per datum, over all its draws
    "iw_elbo": cf.objectives.iw_elbo,
    "dreg_elbo": cf.objectives.dreg_elbo,
    "renyi_elbo 0.5": partial(cf.objectives.renyi_elbo, alpha=0.5),
    "renyi_elbo -1": partial(cf.objectives.renyi_elbo, alpha=-1.0),
    "renyi_elbo 3": partial(cf.objectives.renyi_elbo, alpha=3.0),
    "forward_kl": cf.objectives.forward_kl,
}
OBJECTIVES = {**EACH, **JOINT}


def exact(name):
    truth = FLOWS[name]()
    return Exact(truth), inputs(truth, 5)[1]


def gradient(objective, model, x, *args, **more):
    return torch.autograd.grad(objective(model, x, *args, **more).mean(), list(model.q.parameters()))


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def vae(**more):
    small = {"latent": 4, "hidden": (8,), "context": 5, "posterior_hidden": (9,), "likelihood": "gaussian"}
    torch.manual_seed(3)
    return stir(cf.VAE((3,), **{**small, **more}), gain=1.0)


ROWS = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()


@over(CONDITIONAL)
@over(OBJECTIVES, "objective")
def test_every_term_is_the_evidence_if_q_is_the_posterior(name, objective):
    model, x = exact(name)
    terms = OBJECTIVES[objective](model, x, 7)
    close(terms, log_z(x).expand(1 if objective in JOINT else 7, -1), 1e-8)


@over(CONDITIONAL)
@pytest.mark.parametrize(
    ("path", "full"),
    [(cf.objectives.path_elbo, cf.objectives.elbo), (cf.objectives.dreg_elbo, cf.objectives.iw_elbo)],
    ids=["path", "dreg"],
)
def test_the_path_gradient_is_zero_if_q_is_the_posterior(name, path, full):
    model, x = exact(name)
    for quiet, noisy in zip(gradient(path, model, x, 4), gradient(full, model, x, 4), strict=True):
        assert quiet.abs().max() < 1e-8
        assert noisy.abs().max() > 1e-4


@over(OBJECTIVES, "objective")
def test_the_evidence_of_a_linear_gaussian_model(objective):
    model = LinearGaussian()
    close(model.q(model.x).base.mean, model.posterior().mean)
    terms = OBJECTIVES[objective](model, model.x, 6)
    close(terms, model.evidence().expand_as(terms))


@pytest.mark.parametrize("draws_at_once", [1, 2, 7, 16, 10_000])
def test_evaluate_is_exact_if_q_is_the_posterior(draws_at_once):
    model, x = exact("IAF context")
    reached = cf.objectives.evaluate(model, x, samples=9, draws_at_once=draws_at_once)
    close(reached.elbo, log_z(x), 1e-8)
    close(reached.log_likelihood, log_z(x), 1e-8)
    assert reached.kl.shape == (5,) and not reached.elbo.requires_grad


def test_elbo_is_the_evidence_less_the_kl():
    model = LinearGaussian().worse()
    terms = cf.objectives.elbo(model, model.x, 20_000).detach()
    expected = model.evidence() - kl_divergence(model.q(model.x).base, model.posterior())
    assert ((terms.mean(0) - expected).abs() < 5 * terms.std(0) / len(terms) ** 0.5).all()
    assert (expected < model.evidence() - 0.01).all()


def test_iw_elbo_of_one_sample_is_elbo():
    model = vae()
    torch.manual_seed(5)
    expected = cf.objectives.elbo(model, ROWS, 1)
    torch.manual_seed(5)
    close(cf.objectives.iw_elbo(model, ROWS, 1), expected)


def test_iw_elbo_increases_with_the_samples_up_to_the_evidence():
    model = LinearGaussian().worse()
    many = model.x[:1].expand(4_000, -1)
    with torch.no_grad():
        means = [cf.objectives.iw_elbo(model, many, samples).mean().item() for samples in (1, 4, 16, 64)]
    evidence = model.evidence()[0].item()
    assert means == sorted(means) and means[1] - means[0] > 0.05
    assert evidence - 0.05 < means[-1] < evidence + 0.01


def renyi_divergence(q, p, alpha):
    """D_alpha(q, p) of diagonal normals (B, D), in nats: (B,)."""
    variance = alpha * p.variance + (1 - alpha) * q.variance
    apart = alpha * (q.mean - p.mean).square() / (2 * variance)
    return (apart + (p.variance / q.variance).log() / 2 + (p.variance / variance).log() / (2 * (alpha - 1))).sum(-1)


def kl(q, p):
    return kl_divergence(Independent(q, 1), Independent(p, 1))


GAPS = {  # objective, samples, divergence by which its limit is below the evidence
    "elbo": (cf.objectives.elbo, 2_000, kl),
    "path_elbo": (cf.objectives.path_elbo, 2_000, kl),
    "renyi_elbo 0.5": (partial(cf.objectives.renyi_elbo, alpha=0.5), 2_000, partial(renyi_divergence, alpha=0.5)),
    "renyi_elbo -0.5": (partial(cf.objectives.renyi_elbo, alpha=-0.5), 2_000, partial(renyi_divergence, alpha=-0.5)),
    "renyi_elbo 1": (partial(cf.objectives.renyi_elbo, alpha=1.0), 2_000, kl),
    "forward_kl": (cf.objectives.forward_kl, 2_000, lambda q, p: kl(p, q)),
}


@pytest.mark.parametrize(("objective", "samples", "gap"), GAPS.values(), ids=GAPS)
def test_value_and_gradient_are_those_of_the_stated_bound(objective, samples, gap):
    """Compare with the closed-form divergences of normals q and p."""
    model, runs = LinearGaussian().worse(), 60
    parameters = list(model.q.parameters())
    bound = model.evidence() - gap(model.q(model.x).base.base_dist, model.posterior().base_dist)
    expected = [bound.mean(), *torch.autograd.grad(bound.mean(), parameters)]
    came = [objective(model, model.x, samples).mean() for _ in range(runs)]
    came = torch.stack([flat([one, *torch.autograd.grad(one, parameters)]) for one in came])
    error = came.std(0) / runs**0.5
    assert ((came.mean(0) - flat(expected)).abs() < 5 * error + 2 / samples).all()  # ratios have a bias of order 1 / S
    assert flat(expected)[1:].abs().max() > 20 * error.max()


class Line:
    """One latent feature, one datum: p = Z N(0.3, 0.8^2), q = N(mean, std^2)."""

    def __init__(self):
        self.q = cf.Flow(cf.bases.DiagonalNormal(1), cf.Permute([0])).double()
        self.p = Normal(torch.tensor(0.3).double(), 0.8)
        with torch.no_grad():
            self.q.base.constant.copy_(torch.tensor([-0.4, 0.25]))

    def log_joint(self, z):
        return 5 + self.p.log_prob(z).sum(-1)

    def draw(self, x, samples=1, density="joint"):
        z, log_q = draw_from(self.q().expand((len(x),)), samples, density)
        return Draws(self.log_joint(z), torch.zeros_like(log_q), log_q, z)


def two_sample_bound(model):
    """Compute E log (w_1 + w_2) / 2 over two draws of q by quadrature."""
    z = torch.linspace(-9, 9, 601).double()[:, None]
    log_q = model.q().log_prob(z)
    log_w = model.log_joint(z) - log_q
    cell = (log_q[:, None] + log_q).exp() * (z[1] - z[0]) ** 2
    return (cell * (torch.logaddexp(log_w[:, None], log_w) - math.log(2))).sum()


@over(["iw_elbo", "dreg_elbo", "renyi_elbo 0"], "objective")
def test_value_and_gradient_of_two_samples_are_those_of_quadrature(objective):
    model = Line()
    expected = two_sample_bound(model)
    expected = flat([expected, *torch.autograd.grad(expected, list(model.q.parameters()))])
    objective = {**OBJECTIVES, "renyi_elbo 0": partial(cf.objectives.renyi_elbo, alpha=0.0)}[objective]
    came = []
    for _ in range(50):
        one = objective(model, torch.zeros(1_000, 0), 2).mean()
        came.append(flat([one, *torch.autograd.grad(one, list(model.q.parameters()))]))
    came = torch.stack(came)
    assert ((came.mean(0) - expected).abs() < 5 * came.std(0) / 50**0.5).all()
    assert (came.std(0) / 50**0.5 < 0.02 * expected.abs().max()).all()


def test_dreg_elbo_of_one_sample_is_path_elbo():
    model = vae(posterior="iaf")
    came = []
    for objective in (cf.objectives.path_elbo, cf.objectives.dreg_elbo):
        torch.manual_seed(4)
        terms = objective(model, ROWS, 1)
        came.append((terms, *torch.autograd.grad(terms.mean(), list(model.parameters()), allow_unused=True)))
    for path, dreg in zip(*came, strict=True):
        close(dreg, path)


def test_dreg_elbo_has_less_gradient_noise_than_iw_elbo():
    model = LinearGaussian().worse()
    quiet, noisy = (
        torch.stack([flat(gradient(objective, model, model.x, 64)) for _ in range(100)]).std(0)
        for objective in (cf.objectives.dreg_elbo, cf.objectives.iw_elbo)
    )
    assert quiet.mean() < 0.5 * noisy.mean()


@pytest.mark.parametrize("alpha", [1 - 1e-3, 1 - 1e-6, 1 - 1e-12, 1.0, 1 + 1e-12, 1 + 1e-6, 1 + 1e-3])
@over([torch.float32, torch.float64], "dtype")
def test_renyi_elbo_keeps_its_precision_near_alpha_1(alpha, dtype):
    model = vae().to(dtype)
    terms = same_noise(cf.objectives.elbo, model, ROWS.to(dtype), 50)
    expected = terms.mean(0) + (1 - alpha) / 2 * terms.var(0, correction=0)  # the next term of the cumulant expansion
    close(
        same_noise(cf.objectives.renyi_elbo, model, ROWS.to(dtype), 50, alpha=alpha)[0],
        expected,
        20 * torch.finfo(dtype).eps + 100 * (1 - alpha) ** 2,
    )


def test_renyi_elbo_of_zero_is_iw_elbo_and_it_decreases_with_alpha():
    model = vae()
    came = {
        alpha: same_noise(cf.objectives.renyi_elbo, model, ROWS, 9, alpha=alpha)
        for alpha in (-500, -1, 0, 0.5, 1, 2, 500)
    }
    close(came[0], same_noise(cf.objectives.iw_elbo, model, ROWS, 9))
    assert (torch.cat(list(came.values())).diff(dim=0) < 0).all()
    terms = same_noise(cf.objectives.elbo, model, ROWS, 9)
    close(came[-500][0], terms.max(0).values, 0.01)
    close(came[500][0], terms.min(0).values, 0.01)


def test_forward_kl_takes_no_gradient_of_the_target_in_z():
    """Compare the gradient with that of the weighted log q, plus the weighted log p if p has parameters."""
    model = vae()
    parameters = list(model.parameters())
    came = torch.autograd.grad(
        same_noise(cf.objectives.forward_kl, model, ROWS, 7).mean(), parameters, allow_unused=True
    )
    d = same_noise(model.draw, ROWS, 7, "score")
    assert not d.z.requires_grad
    v = (d.log_likelihood + d.log_prior - d.log_q).softmax(0).detach()
    expected = torch.autograd.grad((v * (d.log_likelihood + d.log_q)).sum(0).mean(), parameters, allow_unused=True)
    for one, other in zip(came, expected, strict=True):
        close(one, other)


def test_forward_kl_outside_the_support_of_the_target():
    model = Line()
    model.log_joint = lambda z: torch.where(z < 0, -math.inf, Line.log_joint(model, z)[..., None]).sum(-1)
    terms = cf.objectives.forward_kl(model, torch.zeros(3, 0), 50)
    assert terms.isfinite().all()
    (came,) = torch.autograd.grad(terms.mean(), list(model.q.parameters()))
    assert came.isfinite().all() and came[0] > 0


@over(OBJECTIVES, "objective")
def test_terms_are_the_same_without_gradients(objective):
    model = vae()
    expected = same_noise(OBJECTIVES[objective], model, ROWS, 3)
    with torch.no_grad():
        close(same_noise(OBJECTIVES[objective], model, ROWS, 3), expected)
    assert expected.requires_grad and expected.shape == (1 if objective in JOINT else 3, 6)


@over([*BY_FEATURE, "diagonal context", "NSF context"])
def test_the_path_gradient_omits_the_score_of_q(name):
    """Compare the gradient with that of log p(x, z) - log q(z) through z, with q's own parameters fixed."""
    model, x = Exact(FLOWS[name](), stir(FLOWS[name](), seed=4)), inputs(FLOWS[name](), 5)[1]
    torch.manual_seed(2)
    came = gradient(cf.objectives.path_elbo, model, x, 3)

    def path(model, x, samples):
        z = model.q(x).rsample((samples,))
        return model.truth(x).log_prob(z) - copy.deepcopy(model.q).requires_grad_(False)(x).log_prob(z)

    torch.manual_seed(2)
    for one, other in zip(came, gradient(path, model, x, 3), strict=True):
        close(one, other, 1e-7)


def test_the_path_gradient_is_right_in_expectation():
    model = LinearGaussian().worse()

    def gradients(objective):
        return torch.stack([flat(gradient(objective, model, model.x, 100)) for _ in range(60)])

    path, full = gradients(cf.objectives.path_elbo), gradients(cf.objectives.elbo)
    error = ((path.var(0) + full.var(0)) / 60).sqrt()
    assert ((path.mean(0) - full.mean(0)).abs() < 5 * error + 1e-9).all()
    assert path.mean(0).abs().max() > 0.1


@over(["gaussian", "iaf"], "posterior")
@pytest.mark.parametrize(
    "pair",
    [(cf.objectives.elbo, cf.objectives.path_elbo), (cf.objectives.iw_elbo, cf.objectives.dreg_elbo)],
    ids=["path", "dreg"],
)
def test_the_path_gradient_of_a_decoder_is_the_full_one(posterior, pair):
    model = vae(posterior=posterior)
    came = []
    for objective in pair:
        torch.manual_seed(4)
        terms = objective(model, ROWS, 3)
        decoder = [*model.decoder.parameters(), *model.likelihood.parameters()]
        came.append((terms, *torch.autograd.grad(terms.mean(), decoder)))
    for full, path in zip(*came, strict=True):
        close(path, full)


@over(BY_FEATURE)
def test_log_q_by_feature_sums_to_log_q(name):
    model, x = exact(name)
    torch.manual_seed(3)
    whole = model.draw(x, 4)
    torch.manual_seed(3)
    parts = model.draw(x, 4, "by_feature")
    assert parts.log_q.shape == (4, len(x), 3)
    close(parts.log_q.sum(-1), whole.log_q)


@over(["gaussian", "iaf"], "posterior")
def test_by_feature_kl_is_that_of_each_latent_feature(posterior):
    model = vae(posterior=posterior)
    with torch.no_grad():
        d = model.draw(ROWS, 2_000, "by_feature")
        joint = model.draw(ROWS, 2_000)
    kl, total = (d.log_q - d.log_prior).mean(0), joint.log_q - joint.log_prior
    assert (kl.sum(-1).mean() - total.mean()).abs() < 5 * total.mean(1).std() / 2_000**0.5
    if posterior == "gaussian":
        q = model.encode(ROWS).base.base_dist
        expected = kl_divergence(q, model.prior())
        assert ((kl - expected).abs() < 6 * (d.log_q - d.log_prior).std(0) / 2_000**0.5).all()


def same_noise(objective, *args, **more):
    torch.manual_seed(8)
    return objective(*args, **more)


@over([None, 1, 2, 4], "groups")
def test_free_bits_below_every_kl_change_nothing(groups):
    """If every group's KL exceeds lambda, the mean over terms is the plain ELBO."""
    model = vae()
    came = same_noise(cf.objectives.elbo, model, ROWS, 5, free_bits=1e-9, groups=groups)
    assert came.shape == (5, 6)
    close(came.mean(), same_noise(cf.objectives.elbo, model, ROWS, 5).mean())


@pytest.mark.parametrize(("groups", "count"), [(None, 4), (4, 4), (2, 2), (1, 1)])
def test_free_bits_above_every_kl_are_a_constant(groups, count):
    model, free = vae(), 1e3
    terms = same_noise(cf.objectives.elbo, model, ROWS, 5, free_bits=free, groups=groups)
    likelihood = same_noise(model.draw, ROWS, 5).log_likelihood
    close(terms, likelihood - free * count)
    parameters = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(terms.mean(), parameters, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(likelihood.mean(), parameters, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        close(one, other)


@over([None, 1, 2], "groups")
def test_free_bits_follow_their_formula(groups):
    model = vae()
    d = same_noise(model.draw, ROWS, 5, "by_feature")
    kl = (d.log_q - d.log_prior).mean((0, 1)).reshape(groups or 4, -1).sum(1)
    free = kl.median().item() + 0.01  # some groups above, some below
    came = same_noise(cf.objectives.elbo, model, ROWS, 5, free_bits=free, groups=groups, beta=0.3)
    close(came, d.log_likelihood - 0.3 * kl.clamp(min=free).sum())


def test_beta_weights_the_kl():
    model = vae()
    d = same_noise(model.draw, ROWS, 5)
    for beta in (0.0, 0.5, 1.0):
        close(
            same_noise(cf.objectives.elbo, model, ROWS, 5, beta=beta), d.log_likelihood - beta * (d.log_q - d.log_prior)
        )


@pytest.mark.parametrize(
    ("epoch", "epochs", "beta"), [(0, 10, 0), (2.5, 10, 0.25), (10, 10, 1), (99, 10, 1), (0, 0, 1), (3, 0, 1)]
)
def test_warm_up(epoch, epochs, beta):
    assert cf.objectives.warm_up(epoch, epochs) == beta


def test_evaluation_does_not_depend_on_the_chunk_size():
    model = vae()
    whole, chunks = (cf.objectives.evaluate(model, ROWS, 3_000, size) for size in (10**6, 200))
    with torch.no_grad():
        d = model.draw(ROWS, 3_000)
    error = (d.log_likelihood + d.log_prior - d.log_q).std(0) / 3_000**0.5
    for part in ("elbo", "kl"):
        assert ((getattr(whole, part) - getattr(chunks, part)).abs() < 6 * error).all()
    assert (whole.log_likelihood > whole.elbo).all() and (chunks.log_likelihood > chunks.elbo).all()


def test_evaluation_of_one_sample_is_elbo():
    model = vae()
    reached = same_noise(cf.objectives.evaluate, model, ROWS, 1)
    expected = same_noise(cf.objectives.elbo, model, ROWS, 1)[0]
    close(reached.elbo, expected)
    close(reached.log_likelihood, expected)
    d = same_noise(model.draw, ROWS, 1)
    close(reached.kl, (d.log_q - d.log_prior)[0])


def test_evaluation_reaches_the_evidence():
    model = LinearGaussian().worse()
    reached = cf.objectives.evaluate(model, model.x, 5_000)
    assert (reached.log_likelihood - model.evidence()).abs().max() < 0.1
    assert reached.elbo.dtype == torch.float64 and reached.elbo.shape == (5,)


@pytest.mark.parametrize("draws_at_once", [1, 50, 1_000])
def test_evaluation_respects_draws_at_once(draws_at_once):
    model, sizes = vae(), []
    draw = model.draw
    model.draw = lambda x, samples: sizes.append(len(x) * samples) or draw(x, samples)
    cf.objectives.evaluate(model, ROWS, 130, draws_at_once)
    assert max(sizes) <= draws_at_once and sum(sizes) == 130 * len(ROWS)


def test_log_likelihood_takes_rows_or_rows_and_context():
    plain, conditional = FLOWS["MAF"](), FLOWS["MAF context random"]()
    x, c = inputs(conditional, 4)
    close(cf.log_likelihood(plain, x), plain().log_prob(x))
    close(cf.log_likelihood(conditional, (x, c)), conditional(c).log_prob(x))


REFUSED = {
    "elbo": (partial(cf.objectives.elbo, samples=0), "expected samples of at least 1, got 0"),
    "iw_elbo": (partial(cf.objectives.iw_elbo, samples=0), "expected samples of at least 1, got 0"),
    "path_elbo": (partial(cf.objectives.path_elbo, samples=-1), "expected samples of at least 1, got -1"),
    "dreg_elbo": (partial(cf.objectives.dreg_elbo, samples=0), "expected samples of at least 1, got 0"),
    "renyi_elbo": (partial(cf.objectives.renyi_elbo, samples=0), "expected samples of at least 1, got 0"),
    "forward_kl": (partial(cf.objectives.forward_kl, samples=1), "expected samples of at least 2, got 1"),
    "alpha": (partial(cf.objectives.renyi_elbo, alpha=math.inf), "expected alpha to be finite, got inf"),
    "evaluate": (partial(cf.objectives.evaluate, samples=0), "expected samples of at least 1, got 0"),
    "three groups": (
        partial(cf.objectives.elbo, free_bits=0.1, groups=3),
        "groups to divide 4 latent features, got groups=3",
    ),
    "no groups": (
        partial(cf.objectives.elbo, free_bits=0.1, groups=0),
        "groups to divide 4 latent features, got groups=0",
    ),
    "negative": (partial(cf.objectives.elbo, free_bits=-0.1), "expected free_bits .*got -0.1"),
    "nan": (partial(cf.objectives.elbo, free_bits=math.nan), "expected free_bits .*got nan"),
}


@pytest.mark.parametrize(("objective", "message"), REFUSED.values(), ids=REFUSED)
def test_errors(objective, message):
    with pytest.raises(ValueError, match=message):
        objective(vae(), ROWS)


def test_dreg_elbo_needs_z():
    model = vae()
    draw = model.draw
    model.draw = lambda *args: draw(*args)._replace(z=None)
    with pytest.raises(ValueError, match=r"expected the model.s draw to return z, got None; return Draws\(..., z=z\)"):
        cf.objectives.dreg_elbo(model, ROWS)
