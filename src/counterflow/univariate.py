"""Monotone maps of one feature, given its parameters: y = g(x; params), strictly increasing in x.

Everything here is elementwise: x, y and the log-derivative are (...), params is (..., P). Which features
the parameters were computed from is the business of `made.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor


class Partials(NamedTuple):
    """First derivatives of y = g(x; params) and of l = log dy/dx, at one point."""

    dy_dx: Tensor  # (...)
    dy_dparams: Tensor  # (..., P)
    dl_dx: Tensor  # (...)
    dl_dparams: Tensor  # (..., P)


class Univariate(ABC):
    """A strictly increasing map of one number, with P parameters. With zero parameters it is near the identity."""

    parameters: int  # P

    @abstractmethod
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return y = g(x; params) and log dy/dx."""

    @abstractmethod
    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return x with g(x; params) = y, and log dx/dy."""

    def partials(self, x: Tensor, params: Tensor) -> Partials:
        """The derivatives that back substitution needs; by autograd where no closed form is written."""
        with torch.enable_grad():
            x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
            y, log_slope = self.forward(x, params)
            if not y.requires_grad:
                raise RuntimeError(
                    f"expected partials() of {self!r} in closed form inside torch.compile, where autograd does not "
                    "record; write the method, or leave the solve out of the compiled function"
                )
            dy = torch.autograd.grad(y.sum(), (x, params), retain_graph=True)
            dl = torch.autograd.grad(log_slope.sum(), (x, params), materialize_grads=True)
        return Partials(dy[0], dy[1], dl[0], dl[1])

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return asdict(self)  # type: ignore[call-overload]  # every final class here is a dataclass


def _check_positive(value: float, name: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"expected {name} as a positive number, got {value!r}")


@dataclass(frozen=True)
class Affine(Univariate):
    """Affine map with a bounded scale.

        y = x * exp(s) + m,    s = bound * tanh(a / bound),    log dy/dx = s

    params (..., 2) holds (m, a). The soft clip keeps every scale within exp(-bound) and exp(bound); its slope
    is 1 at a = 0 and never jumps. With zero parameters y = x.

    Source: Papamakarios et al. 2017, "Masked Autoregressive Flow for Density Estimation", section 3; the clip is ours.

    Example:
        >>> import torch, counterflow as cf
        >>> y, log_slope = cf.Affine().forward(torch.tensor([1.0]), torch.tensor([[0.5, 0.0]]))
        >>> y.item(), log_slope.item()
        (1.5, 0.0)
    """

    bound: float = 3.0  # one layer stretches at most 20-fold; five layers still reach a factor of 3 million

    parameters = 2

    def __post_init__(self) -> None:
        _check_positive(self.bound, "bound")

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
        """Closed form: ds/da = 1 - tanh(a / bound)^2."""
        t = torch.tanh(params[..., 1] / self.bound)
        scale, slope = torch.exp(self.bound * t), 1 - t * t
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        return Partials(scale, torch.stack([one, x * scale * slope], -1), zero, torch.stack([zero, slope], -1))


@dataclass(frozen=True)
class Gated(Univariate):
    """Gated affine map: the numerically stable IAF step.

        y = s * x + (1 - s) * m,    s = sigmoid(a + 2),    log dy/dx = log s

    params (..., 2) holds (m, a). With zero parameters y = 0.88 x: a gate that starts nearer to 1 hardly learns,
    since its slope is s (1 - s). The inverse divides by s, which float32 keeps above 0 for a > -85.

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
        """Closed form: ds/da = s (1 - s), d log s / da = 1 - s."""
        m, a = params.unbind(-1)
        s, rest = torch.sigmoid(a + 2), torch.sigmoid(-a - 2)
        zero = torch.zeros_like(x)
        return Partials(s, torch.stack([rest, s * rest * (x - m)], -1), zero, torch.stack([zero, rest], -1))


Scale = Literal["softplus", "sigmoid", "softclip", "clamp"]


@dataclass(frozen=True)
class ScaledAffine(Univariate):
    """Affine map whose scale is computed as other libraries compute it; their trained flows are converted to it.

        y = x * s + m,    log dy/dx = log s

        softplus    s = least + softplus(a + log(exp(1 - least) - 1))    nflows
        sigmoid     s = least + sigmoid(a + 2)                           nflows' coupling layers, normflows
        softclip    log s = a / (1 + |a| / log(1 / least))               zuko; with least = 0 it is s = exp(a)
        clamp       log s = min(max(a, low), high)                       Pyro

    params (..., 2) holds (m, a). With zero parameters y = x, and 0.88 x + least x for "sigmoid". The gradient for a
    is the true one: 0 where "clamp" clips. For new flows take `Affine`, whose clip is smooth.

    Raises:
        ValueError: a scale that is not in the list, least outside of 0..1, or low not below high.

    Example:
        >>> import torch, counterflow as cf
        >>> y, log_slope = cf.ScaledAffine("clamp").forward(torch.tensor([1.0]), torch.tensor([[0.5, 9.0]]))
        >>> round(y.item(), 4), log_slope.item()
        (20.5855, 3.0)
    """

    scale: Scale
    least: float = 1e-3  # what nflows and zuko have
    low: float = -5.0  # what Pyro has
    high: float = 3.0

    parameters = 2

    def __post_init__(self) -> None:
        if self.scale not in get_args(Scale):
            raise ValueError(f"expected scale as one of {', '.join(get_args(Scale))}, got {self.scale!r}")
        if not (0 <= self.least < 1 and self.low < self.high):
            raise ValueError(
                f"expected least in 0..1 and low below high, got least={self.least}, low={self.low}, high={self.high}"
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
        """Closed form: dy/da = x ds/da, and dl/da = (ds/da) / s."""
        a = params[..., 1]
        s, _ = self._scale(a)
        slope = self._slope(a, s)
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        return Partials(s, torch.stack([one, x * s * slope], -1), zero, torch.stack([zero, slope], -1))

    def _scale(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """The scale s, and log s."""
        if self.scale == "softplus":
            s = self.least + F.softplus(a + self.unit)
            return s, s.log()
        if self.scale == "sigmoid":
            s = self.least + torch.sigmoid(a + 2)
            return s, s.log() if self.least else F.logsigmoid(a + 2)
        log_s = _softclip(a, self._most) if self.scale == "softclip" else a.clamp(self.low, self.high)
        return log_s.exp(), log_s

    def _slope(self, a: Tensor, s: Tensor) -> Tensor:
        """The derivative of log s by a."""
        if self.scale == "softplus":
            return torch.sigmoid(a + self.unit) / s
        if self.scale == "sigmoid":
            return torch.sigmoid(a + 2) * torch.sigmoid(-a - 2) / s
        if self.scale == "softclip":
            return (1 + a.abs() / self._most) ** -2
        return ((a >= self.low) & (a <= self.high)).to(a.dtype)

    @property
    def unit(self) -> float:
        """What softplus is given at a = 0."""
        return math.log(math.expm1(1 - self.least))

    @property
    def _most(self) -> float:
        return -math.log(self.least) if self.least else math.inf


def _softclip(a: Tensor, bound: float) -> Tensor:
    return a / (1 + a.abs() / bound)


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
        >>> y, log_slope = cf.SinhArcsinh().forward(torch.tensor([2.0]), torch.zeros(1, 2))
        >>> round(y.item(), 4), round(log_slope.item(), 4)
        (2.0, 0.0)
    """

    bound: float = 1.0  # powers from 0.37 to 2.7

    parameters = 2

    def __post_init__(self) -> None:
        _check_positive(self.bound, "bound")

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


@dataclass(frozen=True)
class RationalQuadraticSpline(Univariate):
    """Monotone rational-quadratic spline on [-bound, bound], the identity outside.

    params (..., 3 bins - 1) holds bins widths w, bins heights h and bins - 1 inner slopes d, unnormalised:

        width_k  = 2 bound (1e-3 + (1 - 1e-3 bins) softmax(w)_k), heights alike;  knots by cumulative sum
        slope_k  = 1e-3 + softplus(d_k + log(exp(1 - 1e-3) - 1)), and 1 at both ends
        y = y_k + height_k (s t^2 + slope_k t (1 - t)) / (s + (slope_k + slope_k+1 - 2 s) t (1 - t))

    with t = (x - x_k) / width_k and s = height_k / width_k in bin k. With zero parameters y = x. 1e-3 is `least`. With
    `clipped` it bounds the raw numbers instead, as in zuko:

        width_k  = 2 bound softmax(clip(w, b / 2))_k, heights alike
        slope_k  = exp(clip(d_k, b)),    b = log(1 / least),    clip(a, b) = a / (1 + |a| / b)

    Raises:
        ValueError: fewer than 2 bins, bins that least leaves no room for, or a bound that is not positive.

    Source: Durkan et al. 2019, "Neural Spline Flows", section 3.1; Rozet et al. 2022, zuko, for `clipped`.

    Example:
        >>> import torch, counterflow as cf
        >>> spline = cf.RationalQuadraticSpline(bins=4, bound=2.0)
        >>> y, log_slope = spline.forward(torch.tensor([0.5, 9.0]), torch.zeros(2, spline.parameters))
        >>> [round(v, 4) for v in y.tolist()]
        [0.5, 9.0]
    """

    bins: int = 8
    bound: float = 5.0
    least: float = 1e-3  # the smallest slope, and the smallest share of a bin; Durkan et al.'s and zuko's own
    clipped: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.bins, int) and 2 <= self.bins <= 500):
            raise ValueError(f"expected bins as a whole number from 2 to 500, got {self.bins!r}")
        _check_positive(self.bound, "bound")
        if not 0 < self.least <= 1 / (2 * self.bins):
            raise ValueError(f"expected least above 0 and at most 1 / (2 bins), got {self.least!r}")

    @property
    def parameters(self) -> int:  # type: ignore[override]
        """P = 3 bins - 1."""
        return 3 * self.bins - 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx."""
        inside = x.abs() < self.bound
        t_x = torch.where(inside, x, torch.zeros_like(x))
        xs, ys, slopes = self._knots(params)
        x0, x1, y0, y1, d0, d1 = _bin(t_x, xs, xs, ys, slopes)
        width, height = x1 - x0, y1 - y0
        s, t = height / width, (t_x - x0) / width
        u = t * (1 - t)
        below = s + (d0 + d1 - 2 * s) * u
        y = y0 + height * (s * t * t + d0 * u) / below
        log_slope = self._log_slope(s, t, u, d0, d1, below)
        return torch.where(inside, y, x), torch.where(inside, log_slope, torch.zeros_like(x))

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy: the root of a quadratic, by the form of it that does not cancel, and a Newton step.

        The step is for slopes that differ a lot: the quadratic's coefficients cancel then, what it is made of does not.
        """
        inside = y.abs() < self.bound
        t_y = torch.where(inside, y, torch.zeros_like(y))
        xs, ys, slopes = self._knots(params)
        x0, x1, y0, y1, d0, d1 = _bin(t_y, ys, xs, ys, slopes)
        width, height = x1 - x0, y1 - y0
        s, up = height / width, t_y - y0
        bend = d0 + d1 - 2 * s
        mixed = up * bend
        a, b, c = height * (s - d0) + mixed, height * d0 - mixed, -s * up
        root, forth = torch.sqrt((b * b - 4 * a * c).clamp_min(0)), b >= 0
        t = (torch.where(forth, 2 * c, root - b) / torch.where(forth, -b - root, 2 * a)).clamp(0, 1)
        u = t * (1 - t)
        below, above = s + bend * u, d1 * t * t + 2 * s * u + d0 * (1 - t) * (1 - t)
        off = height * (s * t * t + d0 * u) - up * below
        t = (t - off * below / (height * s * above)).clamp(0, 1)
        u = t * (1 - t)
        log_slope = self._log_slope(s, t, u, d0, d1, s + bend * u)
        return torch.where(inside, x0 + t * width, y), torch.where(inside, -log_slope, torch.zeros_like(y))

    def partials(self, x: Tensor, params: Tensor) -> Partials:
        """Closed form: by the chain rule to the ends and slopes of the bin, and from there to the params."""
        inside = x.abs() < self.bound
        t_x = torch.where(inside, x, torch.zeros_like(x))
        xs, ys, slopes = self._knots(params)
        x0, x1, y0, y1, d0, d1 = _bin(t_x, xs, xs, ys, slopes)
        width, height = x1 - x0, y1 - y0
        s, t = height / width, (t_x - x0) / width
        rest, bend = 1 - t, d0 + d1 - 2 * s
        u = t * rest
        over, below = s * t * t + d0 * u, s + bend * u  # y = y0 + height over / below
        above = d1 * t * t + 2 * s * u + d0 * rest * rest  # l = 2 log s + log above - 2 log below
        below_t, above_t = bend * (rest - t), 2 * (d1 * t + s * (rest - t) - d0 * rest)
        dy_dx, dl_dx = s * s * above / (below * below), (above_t / above - 2 * below_t / below) / width

        def to_params(by_over: Tensor, by_above: Tensor, by_below: Tensor, by_s: Tensor, by_ends: Tensor) -> Tensor:
            """From derivatives by these to derivatives by the params; by_ends is dy/dy0, which is 1, or dl/dy0."""
            by_s = by_s + 2 * u * by_above + t * t * by_over + (1 - 2 * u) * by_below
            by_t = by_over * (2 * s * t + d0 * (rest - t)) + by_above * above_t + by_below * below_t
            by_height, by_width = by_s / width + by_ends * over / below, -(by_s * s + by_t * t) / width
            by_d0 = by_over * u + by_above * rest * rest + by_below * u
            return torch.cat(
                [
                    self._by_shares(w, t_x, xs, xs, -by_t / width - by_width, by_width),
                    self._by_shares(h, t_x, xs, ys, by_ends - by_height, by_height),
                    self._by_slopes(d, t_x, xs, slopes, by_d0, by_above * t * t + by_below * u),
                ],
                -1,
            )

        w, h, d = self._split(params)
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        dy = to_params(height / below, zero, -height * over / (below * below), zero, one)
        dl = to_params(zero, 1 / above, -2 / below, 2 / s, zero)
        beyond = ~inside[..., None]
        return Partials(
            torch.where(inside, dy_dx, one),
            dy.masked_fill(beyond, 0),
            torch.where(inside, dl_dx, zero),
            dl.masked_fill(beyond, 0),
        )

    def _by_shares(
        self, raw: Tensor, x: Tensor, xs: Tensor, edges: Tensor, by_left: Tensor, by_right: Tensor
    ) -> Tensor:
        """Derivatives by w or h (..., bins), from those by the edges at both ends of the bin of x."""
        begun = (x[..., None] >= xs[..., :-1]).to(x.dtype)  # the bin of x and those before it
        before = F.pad(begun[..., 1:], (0, 1))
        by_share = by_left[..., None] * before + by_right[..., None] * begun
        shares = (edges.diff(dim=-1) / (2 * self.bound) - self._floor) / (1 - self._floor * self.bins)
        mean = (shares * by_share).sum(-1, keepdim=True)
        by_raw = 2 * self.bound * (1 - self._floor * self.bins) * shares * (by_share - mean)
        return by_raw * (1 + raw.abs() / (self._most / 2)) ** -2 if self.clipped else by_raw

    def _by_slopes(
        self, raw: Tensor, x: Tensor, xs: Tensor, slopes: Tensor, by_left: Tensor, by_right: Tensor
    ) -> Tensor:
        """Derivatives by d (..., bins - 1), from those by the slopes at both ends of the bin of x."""
        place = (x[..., None] >= xs[..., 1:-1]).sum(-1, keepdim=True)
        by = torch.zeros_like(slopes).scatter(-1, place, by_left[..., None]).scatter(-1, place + 1, by_right[..., None])
        inner = slopes[..., 1:-1]
        if self.clipped:
            return by[..., 1:-1] * inner * (1 + raw.abs() / self._most) ** -2
        return by[..., 1:-1] * -torch.expm1(self.least - inner)  # the sigmoid of what softplus was given

    def _log_slope(self, s: Tensor, t: Tensor, u: Tensor, d0: Tensor, d1: Tensor, below: Tensor) -> Tensor:
        above = d1 * t * t + 2 * s * u + d0 * (1 - t) * (1 - t)
        return 2 * s.log() + above.log() - 2 * below.log()

    def _knots(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Knots xs, ys (..., bins + 1), the outer ones exactly at -bound and bound, and slopes (..., bins + 1)."""
        w, h, d = self._split(params)
        if self.clipped:
            w, h, slopes = (*(_softclip(v, self._most / 2) for v in (w, h)), _softclip(d, self._most).exp())
        else:
            slopes = self.least + F.softplus(d + self.unit)
        return self._edges(w), self._edges(h), F.pad(slopes, (1, 1), value=1.0)

    def _edges(self, raw: Tensor) -> Tensor:
        shares = self._floor + (1 - self._floor * self.bins) * raw.softmax(-1)
        inner = self.bound * (2 * shares[..., :-1].cumsum(-1) - 1)
        return F.pad(F.pad(inner, (1, 0), value=-self.bound), (0, 1), value=self.bound)

    def _split(self, params: Tensor) -> tuple[Tensor, ...]:
        return params.split([self.bins, self.bins, self.bins - 1], -1)

    @property
    def unit(self) -> float:
        """What softplus is given at d = 0."""
        return math.log(math.expm1(1 - self.least))

    @property
    def _floor(self) -> float:
        return 0.0 if self.clipped else self.least

    @property
    def _most(self) -> float:
        return -math.log(self.least)


def _bin(v: Tensor, edges: Tensor, xs: Tensor, ys: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
    """Ends of the bin of `edges` in which v lies: x0, x1, y0, y1 and the slopes d0, d1, each (...)."""
    k = (v.unsqueeze(-1) >= edges[..., 1:-1]).sum(-1, keepdim=True)
    return tuple(table.gather(-1, k + side).squeeze(-1) for table in (xs, ys, slopes) for side in (0, 1))
