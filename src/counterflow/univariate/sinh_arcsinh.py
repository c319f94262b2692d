"""The sinh-arcsinh map."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from counterflow.checks import positive_number
from counterflow.univariate.base import Partials, Univariate


@dataclass(frozen=True)
class SinhArcsinh(Univariate):
    """Skews a feature and makes its tails heavier or lighter.

        y = sinh(u),    u = exp(s) asinh(x) + e,    s = bound * tanh(a / bound),    e = 3 bound * tanh(m / (3 bound))
        log dy/dx = s + log cosh(u) - log(1 + x^2) / 2

    params (..., 2) holds (m, a). Far out y grows like |x|^exp(s): with s > 0 a normal x gets heavier tails, with
    s < 0 lighter ones; e > 0 skews to the right. With zero parameters y = x.

    Source: Jones and Pewsey 2009, "Sinh-arcsinh distributions", whose transformation this is; the clips are ours.

    Example:
        >>> import torch, counterflow as cf
        >>> y, log_slope = cf.transforms.SinhArcsinh().forward(torch.tensor([2.0]), torch.zeros(1, 2))
        >>> round(y.item(), 4), round(log_slope.item(), 4)
        (2.0, 0.0)
    """

    bound: float = 1.0  # powers from 0.37 to 2.7

    parameters = 2

    def __post_init__(self) -> None:
        positive_number(self.bound, "bound")

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx."""
        e, s = self._clipped(params)
        v = torch.asinh(x)
        u = torch.exp(s) * v + e
        return torch.sinh(u), s + _log_cosh(u) - _log_cosh(v)  # log(1 + x^2) / 2, whose square would overflow

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy."""
        e, s = self._clipped(params)
        u = torch.asinh(y)
        v = torch.exp(-s) * (u - e)
        return torch.sinh(v), -s + _log_cosh(v) - _log_cosh(u)

    def partials(self, x: Tensor, params: Tensor) -> Partials:
        """Closed form: d asinh(x) / dx = 1 / sqrt(1 + x^2), d log cosh(u) / du = tanh(u)."""
        e, s = self._clipped(params)
        t, v, root = torch.exp(s), torch.asinh(x), torch.hypot(torch.ones_like(x), x)
        du_dx = t / root
        ds = 1 - (s / self.bound).square()
        du = torch.stack([1 - (e / (3 * self.bound)).square(), t * v * ds], -1)
        u = t * v + e
        cosh, tanh = torch.cosh(u), torch.tanh(u)
        dl = tanh[..., None] * du + torch.stack([torch.zeros_like(ds), ds], -1)
        return Partials(cosh * du_dx, cosh[..., None] * du, tanh * du_dx - x / root / root, dl)

    def _clipped(self, params: Tensor) -> tuple[Tensor, Tensor]:
        m, a = params.unbind(-1)
        wide = 3 * self.bound
        return wide * torch.tanh(m / wide), self.bound * torch.tanh(a / self.bound)


def _log_cosh(u: Tensor) -> Tensor:
    return u.abs() + torch.log1p(torch.exp(-2 * u.abs())) - math.log(2)
