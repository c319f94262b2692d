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
    """Sinh-arcsinh map, which skews a feature and makes its tails heavier or lighter.

        y = sinh(u),    u = exp(s) asinh(x) + e,    s = bound * tanh(a / bound),    e = 3 bound * tanh(m / (3 bound))
        log dy/dx = s + log cosh(u) - log(1 + x^2) / 2

    params (..., 2) holds (m, a). For large |x|, |y| grows like |x|^exp(s): s > 0 gives a normal x heavier tails, s < 0
    lighter ones, and e > 0 skews it to the right. With zero parameters y = x.

    Args:
        bound: the largest |s|; |e| is at most 3 bound.

    Raises:
        ValueError: bound is not positive and finite.

    Source: Jones and Pewsey 2009, "Sinh-arcsinh distributions", for the transformation; the clips are ours.

    Example:
        >>> import torch, counterflow as cf
        >>> y, log_slope = cf.transforms.SinhArcsinh().forward(torch.tensor([2.0]), torch.zeros(1, 2))
        >>> round(y.item(), 4), round(log_slope.item(), 4)
        (2.0, 0.0)
    """

    bound: float = 1.0  # powers exp(s) from 0.37 to 2.7

    parameters = 2

    def __post_init__(self) -> None:
        positive_number(self.bound, "bound")

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx."""
        e, s = self._clipped(params)
        v = torch.asinh(x)
        u = torch.exp(s) * v + e
        return torch.sinh(u), s + _log_cosh(u) - _log_cosh(
            v
        )  # log cosh(v) = log(1 + x^2) / 2, whose x^2 could overflow

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy."""
        e, s = self._clipped(params)
        u = torch.asinh(y)
        v = torch.exp(-s) * (u - e)
        return torch.sinh(v), -s + _log_cosh(v) - _log_cosh(u)

    def partials(self, x: Tensor, params: Tensor) -> Partials:
        """Return the derivatives in closed form: d asinh(x) / dx = 1 / sqrt(1 + x^2), d log cosh(u) / du = tanh(u)."""
        e, s = self._clipped(params)
        t = torch.exp(s)
        v = torch.asinh(x)
        root = torch.hypot(torch.ones_like(x), x)
        du_dx = t / root
        ds = 1 - (s / self.bound).square()
        du = torch.stack([1 - (e / (3 * self.bound)).square(), t * v * ds], -1)
        u = t * v + e
        cosh = torch.cosh(u)
        tanh = torch.tanh(u)
        dl = tanh[..., None] * du + torch.stack([torch.zeros_like(ds), ds], -1)
        return Partials(cosh * du_dx, cosh[..., None] * du, tanh * du_dx - x / root / root, dl)

    def _clipped(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return e and s."""
        m, a = params.unbind(-1)
        e_bound = 3 * self.bound
        return e_bound * torch.tanh(m / e_bound), self.bound * torch.tanh(a / self.bound)


def _log_cosh(u: Tensor) -> Tensor:
    return u.abs() + torch.log1p(torch.exp(-2 * u.abs())) - math.log(2)
