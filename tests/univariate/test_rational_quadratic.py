"""The rational-quadratic formula in float32, for bins whose slopes differ by up to six orders of magnitude."""

import torch

import counterflow as cf
from counterflow.univariate.rational_quadratic import Bin, inverse, terms, value


def steep(*shape: int, seed: int = 0) -> torch.Tensor:
    """Slopes from 1e-3 to 1e3, uniform in their logarithm."""
    return 10 ** (6 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 3)


def bins(n: int) -> Bin:
    width, height = 0.2 + torch.rand(2, n, generator=torch.Generator().manual_seed(1))
    return Bin(torch.zeros(n), torch.zeros(n), width, height, *steep(2, n))


def double(b: Bin) -> Bin:
    return Bin(*(part.double() for part in b))


def test_inverse_solves_the_formula_in_float32():
    b = bins(50_000)
    y = b.height * torch.rand(50_000, generator=torch.Generator().manual_seed(2))
    x, log_slope = inverse(b, y)
    exact, expected = inverse(double(b), y.double())
    assert (x - exact).abs().max() < 1e-4
    assert (log_slope - expected).abs().max() < 0.02
    assert (value(double(b), x.double())[0] - y).abs().max() < 1e-4


def test_inverse_undoes_the_formula_in_float64():
    b = double(bins(50_000))
    x = b.width * torch.rand(50_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y, log_slope = value(b, x)
    back, inverse_log_slope = inverse(b, y)
    # y is rounded, and where the slope is 1e-6 x is known to 1e-10 only.
    assert ((back - x).abs() * log_slope.exp()).max() < 1e-14
    assert ((log_slope + inverse_log_slope).abs() * log_slope.exp().clamp_max(1)).max() < 1e-10


def test_slope_is_autograds():
    b = double(bins(1000))
    x = (b.width * torch.rand(1000, dtype=torch.float64)).requires_grad_()
    y, log_slope = value(b, x)
    torch.testing.assert_close(log_slope.exp(), torch.autograd.grad(y.sum(), x)[0], rtol=1e-9, atol=0)


def test_the_three_quadratics_are_positive_inside():
    b = bins(1000)
    assert all((part > 0).all() for part in terms(b, torch.full((1000,), 0.5)))


def test_quantile_spline_inverts_steep_slopes_in_float32():
    """One inverse without the stable form of the root and without Newton steps was off by 0.28 nats here."""
    for seed in range(20):
        x, y = 0.2 + torch.rand(2, 1, 9, generator=torch.Generator().manual_seed(seed))
        t = cf.transforms.QuantileSpline(x.cumsum(1), y.cumsum(1), steep(1, 9, seed=seed))
        exact = cf.transforms.QuantileSpline(t.x.double(), t.y.double(), t.slopes.double())
        y = torch.linspace(t.y[0, 0].item(), t.y[0, -1].item(), 1001)[1:-1, None]
        x, inverse_log_det = t.inverse(y)
        back, log_det = t(x)
        assert (inverse_log_det - exact.inverse(y.double())[1]).abs().max() < 2e-3
        assert (log_det + inverse_log_det).abs().max() < 2e-3
        assert (back - y).abs().max() < 1e-3


def test_spline_inverts_steep_slopes_in_float32():
    g = cf.RationalQuadraticSpline(bins=8, bound=4.0)
    y = torch.linspace(-3.99, 3.99, 1000)
    for seed in range(20):
        slopes = steep(7, seed=seed).clamp_min(1.1e-3).double() - g.min_slope
        raw = torch.where(slopes > 30, slopes, slopes.clamp_max(30).expm1().log()) - g.softplus_offset
        params = torch.cat([torch.zeros(16), raw.float()]).expand(len(y), -1)
        x, inverse_log_slope = g.inverse(y, params)
        back, log_slope = g.forward(x, params)
        assert (log_slope + inverse_log_slope).abs().max() < 2e-3
        assert (back - y).abs().max() < 1e-3
