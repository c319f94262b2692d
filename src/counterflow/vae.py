"""Variational autoencoders whose posterior is a flow: encoder, posterior q(z|x), decoder, likelihood p(x|z)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Distribution, Independent, Normal, constraints

from counterflow.flow import DiagonalNormal, Flow, FlowDistribution
from counterflow.recipes import stack
from counterflow.transform import Permute, Transform, positive
from counterflow.univariate import Gated, Univariate

Density = Literal["joint", "by_feature", "path"]


# -- likelihoods -------------------------------------------------------------------------------------


class Likelihood(nn.Module, ABC):
    """p(x | z): turns what the decoder puts out, (..., *data_shape), into a distribution of data of that shape."""

    @abstractmethod
    def forward(self, out: Tensor) -> Distribution:
        """The distribution of x for decoder output out (..., *data_shape); its event is one datum."""

    @abstractmethod
    def check(self, x: Tensor) -> None:
        """Raise ValueError when a value of x lies where the likelihood has no density."""

    def observe(self, x: Tensor) -> Tensor:
        """What is seen of x at one step: x itself, but for dynamic binarisation."""
        return x

    def center(self, x: Tensor) -> Tensor:
        """x on a scale that suits a network, for the encoder."""
        return x


class Bernoulli(Likelihood):
    """Independent pixels, log p = x log s(out) + (1 - x) log s(-out), s the sigmoid; x is 0 or 1.

    Intensities between 0 and 1 are binarised anew at every step, x ~ Bernoulli(intensity): dynamic binarisation
    (Salakhutdinov and Murray 2008, "On the quantitative analysis of deep belief networks", section 6.1).
    """

    def __init__(self, data_shape: Sequence[int]) -> None:
        super().__init__()
        self.dims = len(data_shape)

    def forward(self, out: Tensor) -> Distribution:
        """Pixels with probability sigmoid(out)."""
        return Independent(BernoulliDistribution(logits=out, validate_args=False), self.dims, validate_args=False)

    def check(self, x: Tensor) -> None:
        """0 <= x <= 1."""
        low, high = _range(x)
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"expected values in [0, 1] for a Bernoulli likelihood, got {low:g} to {high:g}; rescale the data, "
                "for example x / 255 for 8-bit images, or take likelihood='discretized_logistic'"
            )

    def observe(self, x: Tensor) -> Tensor:
        """A draw of 0 and 1."""
        self.check(x)
        return torch.bernoulli(x)

    def center(self, x: Tensor) -> Tensor:
        """2 x - 1."""
        return 2 * x - 1


class Gaussian(Likelihood):
    """Independent normals of mean out and a trained scale, one for each feature, or each channel of an image.

    log p = log N(x; out, std^2),    std = exp(s),    s = bound * tanh(a / bound),    bound = 5
    """

    bound = 5.0  # a feature that is constant in the data stops at 0.0067, not at an infinite density

    def __init__(self, data_shape: Sequence[int]) -> None:
        super().__init__()
        self.dims = len(data_shape)
        self.scale = nn.Parameter(torch.zeros(_by_channel(data_shape)))

    def forward(self, out: Tensor) -> Distribution:
        """Normal(out, std)."""
        std = torch.exp(self.bound * torch.tanh(self.scale / self.bound))
        return Independent(Normal(out, std.expand_as(out), validate_args=False), self.dims, validate_args=False)

    def check(self, x: Tensor) -> None:
        """Every real number will do."""


class DiscretizedLogistic(Likelihood):
    """Integers 0..levels-1, each the mass that a logistic density puts on its unit interval.

        P(x) = s((x + 1/2 - mean) / scale) - s((x - 1/2 - mean) / scale),    s the sigmoid, s(+-inf) at both ends
        mean = (out + 1) (levels - 1) / 2,    log scale = log(levels / 16) + 4 tanh(a / 4), a trained for each channel

    Source: Kingma et al. 2016, section 6.2; Salimans et al. 2017, "PixelCNN++", equation 2.
    """

    def __init__(self, data_shape: Sequence[int], levels: int = 256) -> None:
        super().__init__()
        self.dims, self.levels = len(data_shape), levels
        self.scale = nn.Parameter(torch.zeros(_by_channel(data_shape)))

    def forward(self, out: Tensor) -> Distribution:
        """The distribution over 0..levels-1."""
        log_scale = math.log(self.levels / 16) + 4 * torch.tanh(self.scale / 4)
        mean = (out + 1) * ((self.levels - 1) / 2)
        logistic = _DiscretizedLogistic(mean, log_scale.exp().expand_as(mean), self.levels)
        return Independent(logistic, self.dims, validate_args=False)

    def check(self, x: Tensor) -> None:
        """Whole numbers in 0..levels-1."""
        low, high = _range(x)
        if low < 0 or high > self.levels - 1 or not torch.equal(x, x.round()):
            raise ValueError(
                f"expected whole numbers in 0..{self.levels - 1} for a discretized logistic likelihood, got values "
                f"from {low:g} to {high:g}; give the raw 8-bit values, or take likelihood='gaussian' for real numbers"
            )

    def center(self, x: Tensor) -> Tensor:
        """To [-1, 1]."""
        return x * (2 / (self.levels - 1)) - 1


class _DiscretizedLogistic(Distribution):
    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  # torch's own convention

    def __init__(self, loc: Tensor, scale: Tensor, levels: int) -> None:
        self.loc, self.scale, self.levels = loc, scale, levels
        super().__init__(loc.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc.clamp(0, self.levels - 1)  # that of the logistic, cut to the range

    def log_prob(self, value: Tensor) -> Tensor:
        upper, lower = (value + 0.5 - self.loc) / self.scale, (value - 0.5 - self.loc) / self.scale
        # s(u) - s(l) = s(u) s(-l) (1 - exp(l - u)), where nothing cancels.
        first, last = value <= 0, value >= self.levels - 1
        inner = torch.where(first | last, torch.zeros_like(lower), torch.log(-torch.expm1(-1 / self.scale)))
        left = torch.where(last, torch.zeros_like(upper), F.logsigmoid(upper))
        right = torch.where(first, torch.zeros_like(lower), F.logsigmoid(-lower))
        return left + right + inner

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008  # torch's own signature
        with torch.no_grad():
            uniform = torch.rand((*sample_shape, *self.loc.shape), dtype=self.loc.dtype, device=self.loc.device)
            return (self.loc + self.scale * torch.logit(uniform, eps=1e-6)).round().clamp(0, self.levels - 1)


def _range(x: Tensor) -> tuple[float, float]:
    """The smallest and the largest value; 0 and 0 where there is none."""
    low, high = x.aminmax() if x.numel() else (x.new_zeros(()), x.new_zeros(()))
    return low.item(), high.item()


def _by_channel(data_shape: Sequence[int]) -> tuple[int, ...]:
    return (data_shape[0], *(1 for _ in data_shape[1:]))


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "discretized_logistic": DiscretizedLogistic,
}


# -- encoders and decoders ---------------------------------------------------------------------------


def _gated(linear: nn.Linear | nn.Conv2d | nn.ConvTranspose2d, inputs: float, axis: int = 1) -> list[nn.Module]:
    """h' = (W h + b) * sigmoid(V h + c), for a linear map that gives both; each unit sees `inputs` numbers.

    A variance of 3 / inputs keeps the size of h from layer to layer: the gate takes a factor of 0.34 from the
    square. With torch's own (1 / 3) / inputs twelve such layers leave nothing, and the posterior collapses.
    """
    nn.init.normal_(linear.weight, std=math.sqrt(3 / inputs))
    nn.init.zeros_(linear.bias)  # type: ignore[arg-type]  # none of ours is without
    return [linear, nn.GLU(axis)]


def mlp(inputs: int, hidden: Sequence[int]) -> nn.Sequential:
    """Gated layers from inputs to hidden[-1]."""
    sizes = [inputs, *hidden]
    return nn.Sequential(*(layer for i, o in pairwise(sizes) for layer in _gated(nn.Linear(i, 2 * o), i)))


def conv_encoder(data_shape: Sequence[int], channels: int, outputs: int) -> nn.Sequential:
    """Five gated 5x5 convolutions, two of which halve the image, then one gated layer: (B, C, H, W) -> (B, outputs).

    Source: van den Berg et al. 2018, "Sylvester Normalizing Flows for Variational Inference", appendix A.
    """
    plan = [(data_shape[0], channels, 1), (channels, channels, 2), (channels, 2 * channels, 1)]
    plan += [(2 * channels, 2 * channels, 2), (2 * channels, 2 * channels, 1)]
    layers: list[nn.Module] = []
    for i, o, stride in plan:
        layers += _gated(nn.Conv2d(i, 2 * o, 5, stride, padding=2), 25 * i)
    _, _, (h, w) = _halvings(data_shape)
    return nn.Sequential(*layers, nn.Flatten(), *mlp(2 * channels * h * w, [outputs]))


def conv_decoder(latent: int, data_shape: Sequence[int], channels: int) -> nn.Sequential:
    """The encoder's mirror image, with transposed convolutions: (B, latent) -> (B, C, H, W)."""
    full, half, quarter = _halvings(data_shape)
    plan = [(2 * channels, 2 * channels, 1, quarter, quarter), (2 * channels, 2 * channels, 2, quarter, half)]
    plan += [(2 * channels, channels, 1, half, half), (channels, channels, 2, half, full)]
    plan += [(channels, channels, 1, full, full)]
    layers: list[nn.Module] = [
        *mlp(latent, [2 * channels * quarter[0] * quarter[1]]),
        nn.Unflatten(1, (2 * channels, *quarter)),
    ]
    for i, o, stride, small, large in plan:
        extra = (large[0] - (small[0] - 1) * stride - 1, large[1] - (small[1] - 1) * stride - 1)
        convolution = nn.ConvTranspose2d(i, 2 * o, 5, stride, padding=2, output_padding=extra)
        layers += _gated(convolution, 25 * i / stride**2)
    return nn.Sequential(*layers, nn.Conv2d(channels, data_shape[0], 1))


def _halvings(data_shape: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """The image's size, halved once and halved twice, rounded up."""
    _, h, w = data_shape
    return (h, w), (-(-h // 2), -(-w // 2)), (-(-h // 4), -(-w // 4))


# -- the model ---------------------------------------------------------------------------------------


class Draws(NamedTuple):
    """What an objective needs of S draws z ~ q(z|x) for B data; in nats."""

    log_likelihood: Tensor  # log p(x|z), (S, B)
    log_prior: Tensor  # log p(z), (S, B), or (S, B, D) by feature
    log_q: Tensor  # log q(z|x), (S, B), or (S, B, D) by feature


class VAE(nn.Module):
    """Variational autoencoder with a flow as its posterior.

        h = encoder(x),  z ~ q(z|h),  p(x, z) = p(x|decoder(z)) N(z; 0, I)

    With posterior="iaf", q starts from a diagonal Gaussian whose mean and scale are linear in h, and carries its
    sample through `posterior_layers` autoregressive steps, each with h as context, the order reversed between them.

    Args:
        data_shape: of one datum: (D,) for rows, (channels, height, width) for images.
        latent: the size of z.
        posterior: "gaussian", "iaf", or a `Flow` with features=latent and context=context.
        likelihood: "bernoulli" (values in [0, 1]), "gaussian" (real) or "discretized_logistic" (whole numbers).
        levels: how many values the discretized logistic knows, 256 for 8-bit images.
        network: "conv" or "mlp"; "auto" takes conv for images from 16x16 up, mlp for smaller ones and for rows.
        hidden: sizes of the mlp's hidden layers, mirrored in the decoder.
        channels: of the first convolution; the later ones have twice as many.
        context: the size of h.
        posterior_layers, posterior_hidden, univariate, activation: of the IAF.

    Raises:
        ValueError: a shape that is neither rows nor images, an unknown name, a posterior of another size.

    Source: Kingma et al. 2016, "Improving Variational Inference with Inverse Autoregressive Flow", algorithm 1.

    Example:
        >>> import torch, counterflow as cf
        >>> vae = cf.VAE(data_shape=(1, 8, 8), latent=6, network="conv", channels=4)
        >>> x = torch.rand(5, 1, 8, 8).round()
        >>> cf.elbo(vae, x, samples=3).shape, vae.sample(2).shape
        (torch.Size([3, 5]), torch.Size([2, 1, 8, 8]))
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        latent: int = 32,
        posterior: str | Flow = "iaf",
        likelihood: str = "bernoulli",
        *,
        levels: int = 256,
        network: Literal["auto", "conv", "mlp"] = "auto",
        hidden: Sequence[int] = (512, 512),
        channels: int = 32,
        context: int = 256,
        posterior_layers: int = 4,
        posterior_hidden: Sequence[int] = (320, 320),
        univariate: Univariate | None = None,
        activation: str = "elu",
    ) -> None:
        super().__init__()
        self._config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.data_shape = tuple(positive(size, "data_shape") for size in data_shape)
        if len(self.data_shape) not in (1, 3):
            raise ValueError(f"expected data_shape as (features,) or (channels, height, width), got {self.data_shape}")
        if network == "auto":
            # On the 8x8 digits the MLP is ahead of the convolutions by 0.3 nats and several times as fast.
            network = "conv" if len(self.data_shape) == 3 and min(self.data_shape[1:]) >= 16 else "mlp"
        if network not in ("conv", "mlp") or (network == "conv" and len(self.data_shape) == 1):
            raise ValueError(f"expected network as mlp, or conv for images, got {network!r}")
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"expected likelihood as one of {', '.join(LIKELIHOODS)}, got {likelihood!r}")

        self.latent = positive(latent, "latent")
        positive(context, "context")
        positive(channels, "channels")
        if levels < 2:
            raise ValueError(f"expected levels of at least 2, got {levels}; 8-bit values have 256")
        self.likelihood = (
            DiscretizedLogistic(self.data_shape, levels)
            if likelihood == "discretized_logistic"
            else LIKELIHOODS[likelihood](self.data_shape)
        )
        if network == "conv":
            self.encoder = conv_encoder(self.data_shape, channels, context)
            self.decoder = conv_decoder(latent, self.data_shape, channels)
        else:
            sizes = [positive(size, "hidden") for size in hidden]
            size = math.prod(self.data_shape)
            self.encoder = nn.Sequential(nn.Flatten(), *mlp(size, [*sizes, context]))
            self.decoder = nn.Sequential(
                *mlp(latent, sizes[::-1]),
                nn.Linear([latent, *sizes[::-1]][-1], size),
                nn.Unflatten(1, self.data_shape),
            )
        if isinstance(posterior, Flow):
            if (posterior.features, posterior.context) != (latent, context):
                raise ValueError(
                    f"expected a posterior with features={latent} and context={context}, got features="
                    f"{posterior.features} and context={posterior.context}"
                )
            self.posterior = posterior
        elif posterior in ("gaussian", "iaf"):
            transform: Transform = Permute(range(latent))  # the identity
            if posterior == "iaf":
                transform = stack(
                    latent,
                    context,
                    posterior_layers,
                    posterior_hidden,
                    univariate=univariate or Gated(),
                    activation=activation,
                )
            self.posterior = Flow(DiagonalNormal(latent, context), transform)
        else:
            raise ValueError(f"expected posterior as gaussian, iaf or a Flow, got {posterior!r}")

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless x (B, *data_shape) has the shape and the values that the model was built for."""
        if tuple(x.shape[1:]) != self.data_shape or x.dim() == 0:
            raise ValueError(
                f"expected data of shape (B, {', '.join(map(str, self.data_shape))}), got {tuple(x.shape)}; "
                f"this VAE was built with data_shape={self.data_shape}"
            )
        if not x.is_floating_point():
            raise TypeError(f"expected data of a floating-point dtype, got {x.dtype}; convert them with .float()")
        self.likelihood.check(x)

    def encode(self, x: Tensor) -> FlowDistribution:
        """The posterior q(z|x) for x (B, *data_shape): a distribution of batch shape (B,)."""
        self.check(x)
        return self.posterior(self.encoder(self.likelihood.center(x)).to(x.dtype))

    def decode(self, z: Tensor) -> Distribution:
        """The likelihood p(x|z) for z (..., latent): a distribution of batch shape (...) over data."""
        batch = z.shape[:-1]
        out = self.decoder(z.reshape(math.prod(batch), self.latent)).to(z.dtype)  # lower under autocast
        return self.likelihood(out.reshape(*batch, *self.data_shape))

    def prior(self) -> Distribution:
        """N(0, I) over the latent features, each an element of the batch shape (latent,)."""
        zero = next(self.parameters()).new_zeros(self.latent)
        return Normal(zero, torch.ones_like(zero), validate_args=False)

    def draw(self, x: Tensor, samples: int = 1, density: Density = "joint") -> Draws:
        """S draws of z for each x (B, *data_shape), with the three log densities of the ELBO.

        density says how log q is given: "joint" (S, B); "by_feature" (S, B, D), with the prior's alike, for free
        bits; "path" (S, B), with the gradient of the path derivative alone.
        """
        q = self.encode(x)
        if density == "by_feature":
            z, log_q = q.rsample_and_log_prob_by_feature((samples,))
            log_prior = self.prior().log_prob(z)
        else:
            run = q.rsample_and_path_log_prob if density == "path" else q.rsample_and_log_prob
            z, log_q = run((samples,))
            log_prior = self.prior().log_prob(z).sum(-1)
        each = self.decode(z).base_dist.log_prob(x)  # type: ignore[attr-defined]  # every Likelihood is an Independent
        return Draws(each.flatten(-len(self.data_shape)).sum(-1), log_prior, log_q)

    @torch.no_grad()
    def sample(self, n: int, mean: bool = False) -> Tensor:
        """n data (n, *data_shape) from the model: z from the prior, x from p(x|z), or its mean."""
        p = self.decode(self.prior().sample((n,)))
        return p.mean if mean else p.sample()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x'|z) with one z ~ q(z|x) for each x."""
        return self.decode(self.encode(x).sample()).mean

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return self._config
