"""The VAE: shapes, likelihoods, posteriors, and what it says about data and arguments that do not fit."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from registry import close, over

import counterflow as cf
from counterflow.vae.likelihoods import LIKELIHOODS, Bernoulli, DiscretizedLogistic, Gaussian
from counterflow.vae.networks import conv_decoder, conv_encoder

SHAPES = [(1,), (3,), (1, 8, 8), (3, 5, 7), (2, 1, 1)]
IMAGE = (1, 4, 4)
SMALL = {"latent": 2, "hidden": (8,), "channels": 2, "context": 4, "posterior_layers": 2, "posterior_hidden": (5,)}
INNER = {"layers": 2, "hidden": (5,), "activation": "tanh"}
POSTERIORS = {
    "gaussian": lambda: "gaussian",
    "iaf": lambda: "iaf",
    "flow from a standard normal": lambda: cf.IAF(2, 4, **INNER),
    "flow from a diagonal normal": lambda: cf.Flow(cf.bases.DiagonalNormal(2, 4), cf.IAF(2, 0, **INNER).transform),
    "flow that is solved": lambda: cf.NSF(2, 4, bins=3, **INNER),
}
BY_FEATURE = [name for name in POSTERIORS if "solved" not in name]  # free bits need the forward direction's slopes
OBJECTIVES = {
    "elbo": cf.objectives.elbo,
    "free bits": lambda vae, x: cf.objectives.elbo(vae, x, free_bits=1e-9),
    "iw_elbo": lambda vae, x: cf.objectives.iw_elbo(vae, x, samples=2),
    "path_elbo": cf.objectives.path_elbo,
}


def make(shape=IMAGE, posterior="iaf", likelihood="gaussian", **more):
    return cf.VAE(shape, posterior=posterior, likelihood=likelihood, **{**SMALL, **more})


def data(vae, n):
    """Values that the likelihood allows: 0..1, real numbers or 0..255."""
    x = {Bernoulli: torch.rand, Gaussian: torch.randn, DiscretizedLogistic: torch.rand}[type(vae.likelihood)](
        n, *vae.data_shape
    )
    return (255 * x).round() if isinstance(vae.likelihood, DiscretizedLogistic) else x


def in_range(vae, x):
    """Within what the likelihood allows, for samples and means alike."""
    top = {Bernoulli: 1, Gaussian: math.inf, DiscretizedLogistic: 255}[type(vae.likelihood)]
    return bool((x >= (-math.inf if top == math.inf else 0)).all() and (x <= top).all())


# -- shapes and gradients ----------------------------------------------------------------------------


@over(SHAPES, "shape")
@over(LIKELIHOODS, "likelihood")
@over(["auto", "mlp"], "network")
def test_shapes_and_ranges(shape, likelihood, network):
    vae = make(shape, likelihood=likelihood, network=network)
    for n in (1, 3):
        x = data(vae, n)
        vae.check(x)
        x = vae.likelihood.observe(x)
        q = vae.encode(x)
        assert (q.batch_shape, q.event_shape) == ((n,), (2,))
        p = vae.decode(q.rsample((5,)))
        assert (p.batch_shape, p.event_shape) == ((5, n), shape)
        assert p.log_prob(x).shape == cf.objectives.elbo(vae, x, samples=5).shape == (5, n)
        assert cf.objectives.iw_elbo(vae, x, samples=5).shape == (1, n)
        assert cf.objectives.elbo(vae, x).isfinite().all()
        for came in (vae.sample(n), vae.sample(n, mean=True), vae.reconstruct(x)):
            assert came.shape == x.shape and came.isfinite().all() and in_range(vae, came)
        vae.check(vae.sample(n))
    assert vae.decode(torch.zeros(2)).event_shape == shape


@pytest.mark.parametrize(
    ("name", "objective"),
    [(n, o) for n, o in itertools.product(POSTERIORS, OBJECTIVES) if o != "free bits" or n in BY_FEATURE],
)
def test_every_parameter_receives_a_gradient(name, objective):
    vae = make(posterior=POSTERIORS[name]()).double()
    OBJECTIVES[objective](vae, data(vae, 7).double()).mean().backward()
    silent = [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not silent


@over(LIKELIHOODS, "likelihood")
@over(["conv", "mlp"], "network")
def test_every_parameter_of_networks_and_likelihoods_receives_a_gradient(likelihood, network):
    vae = make((3, 5, 7), likelihood=likelihood, network=network)
    cf.objectives.elbo(vae, vae.likelihood.observe(data(vae, 4))).mean().backward()
    assert not [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.any()]


@over(POSTERIORS)
def test_joint_path_and_by_feature_densities_agree(name):
    vae = make(posterior=POSTERIORS[name]()).double()
    x = data(vae, 3).double()
    densities = ["joint", "path", *(["by_feature"] if name in BY_FEATURE else [])]
    drawn = []
    for density in densities:
        torch.manual_seed(1)
        drawn.append(vae.draw(x, 5, density))
    for d in drawn:
        close(d.log_likelihood, drawn[0].log_likelihood)
        close(d.log_prior.reshape(5, 3, -1).sum(-1), drawn[0].log_prior)
        close(d.log_q.reshape(5, 3, -1).sum(-1), drawn[0].log_q)


def test_rows_do_not_see_each_other():
    vae = make((1, 6, 9)).double()
    x = data(vae, 4).double()
    z = torch.randn(4, 2).double()
    together = vae.encode(x).log_prob(z)
    close(together, torch.cat([vae.encode(x[k : k + 1]).log_prob(z[k : k + 1]) for k in range(4)]))
    close(vae.decode(z).mean, torch.cat([vae.decode(z[k : k + 1]).mean for k in range(4)]))


@over(POSTERIORS)
def test_dtype_is_kept(name):
    vae = make(posterior=POSTERIORS[name]()).double()
    x = data(vae, 2).double()
    for came in (*vae.draw(x), vae.sample(2), vae.reconstruct(x)):
        assert came.dtype == torch.float64


def test_densities_are_float32_under_autocast():
    vae = make()
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = [part.dtype for part in vae.draw(data(vae, 2))]
    assert dtypes == [torch.float32] * 4  # bfloat16 would give log q to 3 digits


def test_convolutional_decoders_return_any_image_size():
    for h, w in itertools.product(range(1, 10), (1, 4, 7)):
        assert conv_encoder((2, h, w), 1, 3)(torch.zeros(1, 2, h, w)).shape == (1, 3)
        assert conv_decoder(2, (2, h, w), 1)(torch.zeros(1, 2)).shape == (1, 2, h, w)


@pytest.mark.parametrize(("shape", "network"), [((1, 28, 28), "conv"), ((64,), "mlp")])
def test_a_new_encoder_keeps_the_scale_of_its_input(shape, network):
    vae = cf.VAE(shape, network=network, hidden=(64, 64), channels=8, context=64)
    size = vae.encoder(torch.randn(16, *shape)).std().item()
    assert 0.2 < size < 5  # torch's own initial weights leave 1e-3, and the posterior collapses


def test_auto_takes_convolutions_for_images():
    def convolves(**more):
        return any(isinstance(layer, torch.nn.Conv2d) for layer in make(**more).modules())

    assert convolves(shape=(1, 16, 17)) and convolves(shape=IMAGE, network="conv")
    assert not convolves(shape=(1, 16, 17), network="mlp") and not convolves(shape=(3,)) and not convolves(shape=IMAGE)


def test_a_latent_of_one_feature_and_no_hidden_layer():
    vae = make((3,), latent=1, hidden=())
    assert cf.objectives.elbo(vae, data(vae, 2)).shape == (1, 2) and vae.sample(4).shape == (4, 3)


# -- likelihoods -------------------------------------------------------------------------------------


def test_bernoulli_is_its_formula():
    likelihood = Bernoulli((3, 2))
    out, x = 5 * torch.randn(4, 3, 2).double(), torch.rand(4, 3, 2).round().double()
    expected = x * torch.log(torch.sigmoid(out)) + (1 - x) * torch.log(torch.sigmoid(-out))
    close(likelihood(out).log_prob(x), expected.sum((1, 2)))


@over([(4,), (3, 5, 2)], "shape")
def test_gaussian_adapts_to_the_scale_of_data(shape):
    likelihood, unit = (Gaussian(shape).double() for _ in range(2))
    x = 1e4 + 1e3 * torch.randn(50, *shape, dtype=torch.float64)
    x[:, 1] = 7.0  # constant, and kept at a deviation of 1
    likelihood.adapt(x)
    standard = likelihood.center(x)
    assert standard[:, 0].mean().abs() < 1e-12 and standard[:, 0].std(correction=0) == pytest.approx(1)
    assert (standard[:, 1] == 0).all() and likelihood.std[1].item() == 1
    out = torch.randn(50, *shape, dtype=torch.float64)
    jacobian = likelihood.std.log().expand(shape).sum()
    close(likelihood(out).log_prob(x), unit(out).log_prob(standard) - jacobian)


@over([1e-38, 1e-30, 1e-8, 1e18, 1e25, 1e36], "scale")
def test_gaussian_of_data_on_any_scale(scale):
    """The same terms, but for the log of the scale, and the same gradients: squares of such numbers are no floats."""
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    terms, gradients = [], []
    for rows in (x, scale * x):
        torch.manual_seed(0)
        vae = cf.VAE((3,), 2, "iaf", "gaussian", hidden=(8,), context=4, posterior_layers=1, posterior_hidden=(8,))
        vae.likelihood.adapt(rows)
        terms.append(cf.objectives.elbo(vae, rows))
        terms[-1].mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in vae.parameters()]))
    close(terms[1] + 3 * math.log(scale), terms[0], 1e-4)
    close(gradients[1], gradients[0], 1e-4)


def test_gaussian_is_its_formula():
    likelihood = Gaussian((3, 2, 2)).double()
    assert likelihood.scale.shape == (3, 1, 1)
    torch.nn.init.normal_(likelihood.scale, std=4)
    out, x = torch.randn(2, 5, 3, 2, 2).double().unbind(0)
    std = torch.exp(5 * torch.tanh(likelihood.scale / 5))
    expected = -0.5 * ((x - out) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)
    close(likelihood(out).log_prob(x), expected.sum((1, 2, 3)))
    assert Gaussian((7,)).scale.shape == (7,)


def logistic(levels, mean, a):
    """The distribution of the means (n,), given as values of the data."""
    likelihood = DiscretizedLogistic((1,), levels).double()
    torch.nn.init.constant_(likelihood.scale, a)
    mean = torch.as_tensor(mean, dtype=torch.float64).reshape(-1, 1)
    return likelihood(2 * mean / (levels - 1) - 1)


def log_masses(levels, mean, a):
    """log P of each of 0..levels-1 (levels, n)."""
    return logistic(levels, mean, a).log_prob(torch.arange(levels).double().reshape(-1, 1, 1))


@over([2, 17, 256], "levels")
@over([-1e3, -5.0, 0.0, 5.0, 1e3], "a")
def test_discretized_logistic_sums_to_one(levels, a):
    means = torch.tensor([-1e6, -300.0, -0.5, 0.0, 0.3, 0.5, 1.0, levels / 2, levels - 1, levels, 3e3, 1e6])
    log_p = log_masses(levels, means, a)
    assert log_p.isfinite().all()
    close(log_p.logsumexp(0), torch.zeros(len(means)).double(), 1e-12)


@over([17, 256], "levels")
def test_discretized_logistic_is_its_formula(levels):
    a, mean = 1.3, 0.4 * levels
    scale = math.exp(math.log(levels / 16) + 4 * math.tanh(a / 4))
    cuts = torch.tensor([-math.inf, *(k + 0.5 for k in range(levels - 1)), math.inf]).double()
    s = torch.sigmoid((cuts - mean) / scale)
    close(log_masses(levels, mean, a).exp()[:, 0], s[1:] - s[:-1], 1e-13)


@over([torch.float32, torch.float64], "dtype")
def test_discretized_logistic_is_finite_far_out(dtype):
    likelihood = DiscretizedLogistic((1,)).to(dtype)
    torch.nn.init.constant_(likelihood.scale, -1e3)
    out = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4], dtype=dtype).reshape(-1, 1).requires_grad_()
    log_p = torch.stack([likelihood(out).log_prob(torch.tensor([v], dtype=dtype)) for v in (0, 1, 128, 254, 255)])
    gradients = torch.autograd.grad(log_p.sum(), (out, likelihood.scale))
    assert log_p.isfinite().all() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(("mean", "a"), [(2.2, 0.5), (-1.0, 1.0), (4.4, -3.0)])
def test_samples_of_the_discretized_logistic_follow_its_masses(mean, a):
    n = 20_000
    drawn = logistic(5, mean, a).sample((n,)).flatten()
    p = log_masses(5, mean, a).exp().flatten()
    share = torch.stack([(drawn == k).double().mean() for k in range(5)])
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 2 / n).all()


@over(LIKELIHOODS, "likelihood")
def test_only_bernoulli_binarises(likelihood):
    vae = make((500, 10, 10), likelihood=likelihood, network="mlp")
    x = torch.full((1, 500, 10, 10), 0.3)
    seen = vae.likelihood.observe(x)
    if likelihood != "bernoulli":
        assert seen is x
        return
    assert set(seen.unique().tolist()) == {0.0, 1.0}
    assert seen.mean().item() == pytest.approx(0.3, abs=5 * (0.21 / x.numel()) ** 0.5)
    assert not torch.equal(seen, vae.likelihood.observe(x))
    assert torch.equal(vae.likelihood.observe(seen), seen)


@pytest.mark.parametrize(("likelihood", "top"), [("bernoulli", 1), ("discretized_logistic", 255)])
def test_the_encoder_sees_values_from_minus_one_to_one(likelihood, top):
    assert make((1,), likelihood=likelihood).likelihood.center(torch.tensor([0.0, top])).tolist() == [-1, 1]


# -- errors ------------------------------------------------------------------------------------------

CHECKED = {
    "8-bit under Bernoulli": ("bernoulli", [0.0, 255.0], r"in \[0, 1\] for a Bernoulli .* got 0 to 255; rescale .*255"),
    "negative under Bernoulli": ("bernoulli", [-0.1, 0.5], r"expected values in \[0, 1\] .* got -0\.1 to 0\.5"),
    "nan under Bernoulli": ("bernoulli", [math.nan, 0.5], r"expected values in \[0, 1\]"),
    "fractions under logistic": ("discretized_logistic", [0.0, 0.5], r"whole numbers in 0\.\.255 .* from 0 to 0\.5"),
    "too large for logistic": ("discretized_logistic", [0.0, 256.0], r"whole numbers in 0\.\.255 .* to 256; give the"),
    "negative under logistic": ("discretized_logistic", [-1.0, 3.0], r"expected whole numbers in 0\.\.255"),
    "nan under logistic": ("discretized_logistic", [math.nan, 3.0], r"expected whole numbers in 0\.\.255"),
}


@pytest.mark.parametrize(("likelihood", "values", "message"), CHECKED.values(), ids=CHECKED)
def test_check_refuses_values_without_a_density(likelihood, values, message):
    with pytest.raises(ValueError, match=message):
        make((1,), likelihood=likelihood).check(torch.tensor(values)[:, None])


@over(LIKELIHOODS, "likelihood")
def test_check_accepts_valid_data(likelihood):
    make(likelihood=likelihood).check(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, *IMAGE))


@over(LIKELIHOODS, "likelihood")
@over(["conv", "mlp"], "network")
def test_an_empty_batch(likelihood, network):
    vae, nothing = make(likelihood=likelihood, network=network), torch.zeros(0, *IMAGE)
    vae.check(nothing)
    assert cf.objectives.elbo(vae, vae.likelihood.observe(nothing), samples=3).shape == (3, 0)
    assert vae.reconstruct(nothing).shape == vae.sample(0).shape == nothing.shape


def test_whole_numbers_must_be_floats():
    with pytest.raises(TypeError, match=r"floating-point dtype, got torch\.uint8; convert them with \.float\(\)"):
        make().check(torch.zeros(2, *IMAGE, dtype=torch.uint8))


def test_free_bits_of_a_solved_posterior_are_refused():
    with pytest.raises(TypeError, match="expected a transform with a log-determinant per feature, got Inverse"):
        cf.objectives.elbo(make(posterior=POSTERIORS["flow that is solved"]()), torch.zeros(2, *IMAGE), free_bits=0.1)


SEEN_BY = {
    "check": lambda vae, x: vae.check(x),
    "encode": lambda vae, x: vae.encode(x),
    "reconstruct": lambda vae, x: vae.reconstruct(x),
    "elbo": cf.objectives.elbo,
    "evaluate": lambda vae, x: cf.objectives.evaluate(vae, x, 2),
}


@over(SEEN_BY)
@over([(2, 4, 4), (2, 16), (2, 4, 4, 1), (2, 1, 4, 5)], "shape")
def test_data_of_another_shape_are_refused(name, shape):
    with pytest.raises(ValueError, match=r"expected data of shape \(B, 1, 4, 4\), got \(2, .*data_shape=\(1, 4, 4\)"):
        SEEN_BY[name](make(network="mlp"), torch.zeros(shape))


UNBUILT = {
    "likelihood": (
        {"likelihood": "poisson"},
        "expected likelihood to be one of bernoulli, gaussian, .*, got 'poisson'",
    ),
    "posterior": ({"posterior": "maf"}, "expected posterior to be gaussian, iaf or a Flow, got 'maf'"),
    "network": ({"network": "resnet"}, "expected network to be mlp, or conv for images, got 'resnet'"),
    "convolved rows": (
        {"shape": (16,), "network": "conv"},
        "expected network to be mlp, or conv for images, got 'conv'",
    ),
    "matrix": (
        {"shape": (4, 4)},
        r"expected data_shape to be \(features,\) or \(channels, height, width\), got \(4, 4\)",
    ),
    "no shape": ({"shape": ()}, r"expected data_shape to be .*, got \(\)"),
    "empty image": ({"shape": (1, 0, 4)}, "expected data_shape to be a whole number of at least 1, got 0"),
    "latent": ({"latent": 0}, "expected latent to be a whole number of at least 1, got 0"),
    "hidden": ({"hidden": (8, 0), "network": "mlp"}, "expected hidden to be a whole number of at least 1, got 0"),
    "channels": ({"channels": 0}, "expected channels to be a whole number of at least 1, got 0"),
    "context": ({"context": 0}, "expected context to be a whole number of at least 1, got 0"),
    "layers": ({"posterior_layers": 0}, "expected layers to be a whole number of at least 1, got 0"),
    "features of a flow": ({"posterior": cf.IAF(3, 4, hidden=(5,))}, "features=2 and context=4, got features=3 and"),
    "context of a flow": ({"posterior": cf.IAF(2, 5, hidden=(5,))}, "features=2 and context=4, got .* context=5"),
    "flow without context": ({"posterior": cf.IAF(2, hidden=(5,))}, "expected a posterior with .*, got .* context=0"),
    "levels": ({"likelihood": "discretized_logistic", "levels": 1}, "expected levels .* got 1"),
}


@pytest.mark.parametrize(("arguments", "message"), UNBUILT.values(), ids=UNBUILT)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_a_given_flow_is_the_posterior():
    flow = POSTERIORS["flow that is solved"]()
    vae = make(posterior=flow)
    assert vae.posterior is flow and F.mse_loss(vae.encode(data(vae, 1)).sample((3,)), torch.zeros(3, 1, 2)) > 0
