"""Affine and gated maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from counterflow.checks import one_of, positive_number
from counterflow.univariate.base import Partials, Univariate


@dataclass(frozen=True)
class Affine(Univariate):
    """Affine map with a bounded scale.

        y = x * exp(s) + m,    s = bound * tanh(a / bound),    log dy/dx = s

    params (..., 2) holds (m, a). The smooth clip keeps every scale between exp(-bound) and exp(bound); its slope is 1
    at a = 0. With zero parameters y = x.

    Args:
        bound: the largest |log dy/dx|.

    Raises:
        ValueError: bound is not positive and finite.

    Source: Papamakarios et al. 2017, "Masked Autoregressive Flow for Density Estimation", section 3; the clip is ours.

    Example:
        >>> import torch, counterflow as cf
        >>> y, log_slope = cf.Affine().forward(torch.tensor([1.0]), torch.tensor([[0.5, 0.0]]))
        >>> y.item(), log_slope.item()
        (1.5, 0.0)
    """

    bound: float = 3.0  # a layer scales by at most 20, five layers by 3 million

    parameters = 2

    def __post_init__(self) -> None:
        positive_number(self.bound, "bound")

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx."""
        m, a = params.unbind(-1)
        s = self.bound * torch.tanh(a / self.bound)
        return torch.addcmul(m, x, torch.exp(s)), s

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy."""
        m, a = params.unbind(-1)
        s = self.bound * torch.tanh(a / self.bound)
        return (y - m) * torch.exp(-s), -s

    def partials(self, x: Tensor, params: Tensor) -> Partials:
        """Return the derivatives in closed form: ds/da = 1 - tanh(a / bound)^2."""
        t = torch.tanh(params[..., 1] / self.bound)
        scale = torch.exp(self.bound * t)
        slope = 1 - t * t
        one = torch.ones_like(x)
        zero = torch.zeros_like(x)
        return Partials(scale, torch.stack([one, x * scale * slope], -1), zero, torch.stack([zero, slope], -1))


@dataclass(frozen=True)
class Gated(Univariate):
    """Gated affine map, the numerically stable IAF step.

        y = s * x + (1 - s) * m,    s = sigmoid(a + 2),    log dy/dx = log s

    params (..., 2) holds (m, a). With zero parameters y = 0.88 x: the derivative of the gate is s (1 - s), so that a
    gate that starts closer to 1 would learn slowly. The inverse divides by s, which is above 0 in float32 for a > -85.

    Source: Kingma et al. 2016, "Improving Variational Inference with Inverse Autoregressive Flow", section 4.

    Example:
        >>> import torch, counterflow as cf
        >>> y, log_slope = cf.Gated().forward(torch.tensor([1.0]), torch.zeros(1, 2))
        >>> round(y.item(), 4), round(log_slope.item(), 4)
        (0.8808, -0.1269)
    """

    parameters = 2

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx."""
        m, a = params.unbind(-1)
        return torch.lerp(m, x, torch.sigmoid(a + 2)), F.logsigmoid(a + 2)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy."""
        m, a = params.unbind(-1)
        return m + (y - m) / torch.sigmoid(a + 2), -F.logsigmoid(a + 2)

    def partials(self, x: Tensor, params: Tensor) -> Partials:
        """Return the derivatives in closed form: ds/da = s (1 - s), d log s / da = 1 - s."""
        m, a = params.unbind(-1)
        s = torch.sigmoid(a + 2)
        rest = torch.sigmoid(-a - 2)  # 1 - s, without its rounding
        zero = torch.zeros_like(x)
        return Partials(s, torch.stack([rest, s * rest * (x - m)], -1), zero, torch.stack([zero, rest], -1))


Scale = Literal["softplus", "sigmoid", "softclip", "clamp"]


@dataclass(frozen=True)
class ForeignAffine(Univariate):
    """Affine map with the scale functions of other libraries, so that their trained flows can be converted.

        y = x * s + m,    log dy/dx = log s

        softplus    s = min_scale + softplus(a + log(exp(1 - min_scale) - 1))    nflows
        sigmoid     s = min_scale + sigmoid(a + 2)                           nflows' coupling layers, normflows
        softclip    log s = a / (1 + |a| / log(1 / min_scale))               zuko; with min_scale = 0 it is s = exp(a)
        clamp       log s = min(max(a, low), high)                       Pyro

    params (..., 2) holds (m, a). With zero parameters y = x, or (0.88 + min_scale) x for "sigmoid". The gradient of
    "clamp" is 0 where it clips. For new flows use `Affine`, whose clip is smooth.

    Args:
        scale: one of the four functions above.
        min_scale: the smallest scale; for "softclip" also one over the largest. Not used by "clamp".
        low: the smallest log s of "clamp".
        high: the largest log s of "clamp".

    Raises:
        ValueError: an unknown scale, min_scale outside [0, 1), or low not below high.

    Example:
        >>> import torch, counterflow as cf
        >>> y, log_slope = cf.transforms.ForeignAffine("clamp").forward(torch.tensor([1.0]), torch.tensor([[0.5, 9.0]]))
        >>> round(y.item(), 4), log_slope.item()
        (20.5855, 3.0)
    """

    scale: Scale
    min_scale: float = 1e-3  # the default of nflows and zuko
    low: float = -5.0  # the default of Pyro
    high: float = 3.0  # the default of Pyro

    parameters = 2

    def __post_init__(self) -> None:
        one_of(self.scale, "scale", get_args(Scale))
        if not (0 <= self.min_scale < 1 and self.low < self.high):
            raise ValueError(
                f"expected 0 <= min_scale < 1 and low < high, got min_scale={self.min_scale}, low={self.low}, "
                f"high={self.high}"
            )

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx."""
        m, a = params.unbind(-1)
        s, log_s = self._scale(a)
        return torch.addcmul(m, x, s), log_s

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy."""
        m, a = params.unbind(-1)
        s, log_s = self._scale(a)
        return (y - m) / s, -log_s

    def partials(self, x: Tensor, params: Tensor) -> Partials:
        """Return the derivatives in closed form: dy/da = x ds/da, d log s / da = (ds/da) / s."""
        a = params[..., 1]
        s, _ = self._scale(a)
        slope = self._slope(a, s)
        one = torch.ones_like(x)
        zero = torch.zeros_like(x)
        return Partials(s, torch.stack([one, x * s * slope], -1), zero, torch.stack([zero, slope], -1))

    def _scale(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale s and log s."""
        if self.scale == "softplus":
            s = self.min_scale + F.softplus(a + self.softplus_offset)
            return s, s.log()
        if self.scale == "sigmoid":
            s = self.min_scale + torch.sigmoid(a + 2)
            return s, s.log() if self.min_scale else F.logsigmoid(a + 2)
        log_s = softclip(a, self._max_log_scale) if self.scale == "softclip" else a.clamp(self.low, self.high)
        return log_s.exp(), log_s

    def _slope(self, a: Tensor, s: Tensor) -> Tensor:
        """Return d log s / da."""
        if self.scale == "softplus":
            return torch.sigmoid(a + self.softplus_offset) / s
        if self.scale == "sigmoid":
            return torch.sigmoid(a + 2) * torch.sigmoid(-a - 2) / s
        if self.scale == "softclip":
            return (1 + a.abs() / self._max_log_scale) ** -2
        return ((a >= self.low) & (a <= self.high)).to(a.dtype)

    @property
    def softplus_offset(self) -> float:
        """Argument of softplus at a = 0, where s is 1."""
        return math.log(math.expm1(1 - self.min_scale))

    @property
    def _max_log_scale(self) -> float:
        return -math.log(self.min_scale) if self.min_scale else math.inf


def softclip(a: Tensor, bound: float) -> Tensor:
    """Return a / (1 + |a| / bound), which lies between -bound and bound."""
    return a / (1 + a.abs() / bound)
