"""Likelihoods p(x | z): distributions of data given the output of a decoder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Distribution, Independent, Normal, constraints


class Likelihood(nn.Module, ABC):
    """Likelihood p(x | z): turns decoder output (..., *data_shape) into a distribution over data of that shape."""

    @abstractmethod
    def forward(self, out: Tensor) -> Distribution:
        """Return the distribution of x for decoder output out (..., *data_shape); its event is one datum."""

    @abstractmethod
    def check(self, x: Tensor) -> None:
        """Raise ValueError if the likelihood has no density at a value of x."""

    def adapt(self, x: Tensor) -> None:
        """Adapt to the scale of training data x (N, *data_shape); does nothing by default."""

    def observe(self, x: Tensor) -> Tensor:
        """Return the data of one training step: x itself, or a random binarization of it."""
        return x

    def center(self, x: Tensor) -> Tensor:
        """Return x on a scale that suits the encoder."""
        return x


class Bernoulli(Likelihood):
    """Independent pixels, log p = x log s(out) + (1 - x) log s(-out), s the sigmoid; x is 0 or 1.

    Intensities between 0 and 1 are binarized again in every step, x ~ Bernoulli(intensity): dynamic binarization
    (Salakhutdinov and Murray 2008, "On the quantitative analysis of deep belief networks").
    """

    def __init__(self, data_shape: Sequence[int]) -> None:
        super().__init__()
        self.dims = len(data_shape)

    def forward(self, out: Tensor) -> Distribution:
        """Return pixels with probability sigmoid(out)."""
        return Independent(BernoulliDistribution(logits=out, validate_args=False), self.dims, validate_args=False)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless 0 <= x <= 1."""
        low, high = _range(x)
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"expected values in [0, 1] for a Bernoulli likelihood, got {low:g} to {high:g}; rescale the data, "
                "for example x / 255 for 8-bit images, or take likelihood='discretized_logistic'"
            )

    def observe(self, x: Tensor) -> Tensor:
        """Draw 0 or 1 for each pixel, with probability x of 1."""
        self.check(x)
        return torch.bernoulli(x)

    def center(self, x: Tensor) -> Tensor:
        """Return 2 x - 1."""
        return 2 * x - 1


class Gaussian(Likelihood):
    """Independent normals with a trained scale for each feature, or each channel of an image.

        log p = log N(x; mean + std * out, (std * exp(s))^2),    s = bound * tanh(a / bound),    bound = 5

    mean and std are those of the training data after `adapt`, 0 and 1 before. The networks see standardized numbers,
    and log p is in the units of the data.
    """

    bound = 5.0  # the scale of a feature that is constant in the data ends at 0.0067 std, not at 0

    mean: Tensor
    std: Tensor

    def __init__(self, data_shape: Sequence[int]) -> None:
        super().__init__()
        self.dims = len(data_shape)
        self.scale = nn.Parameter(torch.zeros(_by_channel(data_shape)))
        self.register_buffer("mean", torch.zeros(_by_channel(data_shape)))
        self.register_buffer("std", torch.ones(_by_channel(data_shape)))

    def adapt(self, x: Tensor) -> None:
        """Store the mean and standard deviation of x by feature or channel; a constant one gets a deviation of 1."""
        flat = x.transpose(0, 1).flatten(1).double()
        mean, std = flat.mean(1), flat.std(1, correction=0)
        self.mean.copy_(mean.reshape(self.mean.shape))
        self.std.copy_(torch.where(std > 0, std, 1.0).reshape(self.std.shape))

    def forward(self, out: Tensor) -> Distribution:
        """Return Normal(mean + std * out, std * exp(s))."""
        return Independent(_ScaledNormal(self, out), self.dims, validate_args=False)

    def check(self, x: Tensor) -> None:
        """Accept every real number."""

    def center(self, x: Tensor) -> Tensor:
        """Return (x - mean) / std."""
        return (x - self.mean) / self.std


class _ScaledNormal(Normal):
    """Normal distribution whose density is computed on the standardized scale, so that no square overflows."""

    def __init__(self, likelihood: Gaussian, out: Tensor) -> None:
        mean, std, bound = likelihood.mean, likelihood.std, likelihood.bound
        self.likelihood, self.out, self.log_scale = likelihood, out, bound * torch.tanh(likelihood.scale / bound)
        scale = std * torch.exp(self.log_scale)
        super().__init__(mean + std * out, scale.expand_as(out), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        eps = (self.likelihood.center(value) - self.out) * torch.exp(-self.log_scale)
        return -0.5 * (eps * eps + math.log(2 * math.pi)) - self.log_scale - self.likelihood.std.log()


class DiscretizedLogistic(Likelihood):
    """Integers 0..levels-1, each the mass that a logistic density puts on its unit interval.

        P(x) = s((x + 1/2 - mean) / scale) - s((x - 1/2 - mean) / scale),    s the sigmoid, s(+-inf) at both ends
        mean = (out + 1) (levels - 1) / 2,    log scale = log(levels / 16) + 4 tanh(a / 4), a trained for each channel

    Source: Kingma et al. 2016; Salimans et al. 2017, "PixelCNN++", equation 2.
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
        """Raise ValueError unless x holds whole numbers in 0..levels-1."""
        low, high = _range(x)
        if low < 0 or high > self.levels - 1 or not torch.equal(x, x.round()):
            raise ValueError(
                f"expected whole numbers in 0..{self.levels - 1} for a discretized logistic likelihood, got values "
                f"from {low:g} to {high:g}; give the raw 8-bit values, or take likelihood='gaussian' for real numbers"
            )

    def center(self, x: Tensor) -> Tensor:
        """Map x to [-1, 1]."""
        return x * (2 / (self.levels - 1)) - 1


class _DiscretizedLogistic(Distribution):
    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  # torch's own convention

    def __init__(self, loc: Tensor, scale: Tensor, levels: int) -> None:
        self.loc, self.scale, self.levels = loc, scale, levels
        super().__init__(loc.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc.clamp(0, self.levels - 1)  # the mean of the logistic, clamped to the range

    def log_prob(self, value: Tensor) -> Tensor:
        upper, lower = (value + 0.5 - self.loc) / self.scale, (value - 0.5 - self.loc) / self.scale
        # s(u) - s(l) = s(u) s(-l) (1 - exp(l - u)), without cancellation.
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
    """Return the smallest and the largest value, 0 and 0 for an empty tensor."""
    low, high = x.aminmax() if x.numel() else (x.new_zeros(()), x.new_zeros(()))
    return low.item(), high.item()


def _by_channel(data_shape: Sequence[int]) -> tuple[int, ...]:
    return (data_shape[0], *(1 for _ in data_shape[1:]))


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "discretized_logistic": DiscretizedLogistic,
}
