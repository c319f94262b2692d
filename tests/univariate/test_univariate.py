"""Laws that every monotone map of one feature obeys, and its description."""

import math

import pytest
import torch
from registry import close, over

import counterflow as cf
from counterflow.univariate.base import Univariate

MAPS = {
    "affine": cf.Affine(),
    "affine, tight": cf.Affine(bound=0.5),
    "gated": cf.Gated(),
    "sinh-arcsinh": cf.transforms.SinhArcsinh(),
    "sinh-arcsinh, tight": cf.transforms.SinhArcsinh(bound=0.2),
    "spline": cf.RationalQuadraticSpline(),
    "spline, 2 bins": cf.RationalQuadraticSpline(bins=2, bound=1.0),
    "spline, 30 bins": cf.RationalQuadraticSpline(bins=30, bound=8.0),
    "spline, another min_slope": cf.RationalQuadraticSpline(bins=4, bound=3.0, min_slope=1e-2),
    "spline, clipped": cf.RationalQuadraticSpline(clipped=True),
    "spline, clipped, 2 bins": cf.RationalQuadraticSpline(bins=2, bound=1.0, min_slope=1e-2, clipped=True),
    "softplus": cf.transforms.ForeignAffine("softplus"),
    "sigmoid": cf.transforms.ForeignAffine("sigmoid"),
    "sigmoid, min_scale 0": cf.transforms.ForeignAffine("sigmoid", min_scale=0.0),
    "softclip": cf.transforms.ForeignAffine("softclip"),
    "exp": cf.transforms.ForeignAffine("softclip", min_scale=0.0),
    "clamp": cf.transforms.ForeignAffine("clamp", low=-2.0, high=1.0),
}
SPLINES = [name for name in MAPS if "spline" in name]


def points(univariate, *shape, scale=2.0):
    """x between -8 and 8 and params that vary."""
    x = 16 * torch.rand(shape, dtype=torch.float64) - 8
    return x, scale * torch.randn(*shape, univariate.parameters, dtype=torch.float64)


@over(MAPS)
def test_round_trip_and_shapes(name):
    g = MAPS[name]
    x, params = points(g, 40, 50)
    y, log_slope = g.forward(x, params)
    again, log_slope_back = g.inverse(y, params)
    close(again, x)
    close(log_slope_back, -log_slope)
    assert y.shape == log_slope.shape == x.shape
    for shape in ((), (0,), (1,), (2, 0, 3)):
        assert [v.shape for v in g.forward(*points(g, *shape))] == [torch.Size(shape)] * 2


@over(MAPS)
def test_slope_is_autograds_and_positive(name):
    x, params = points(MAPS[name], 2000)
    x.requires_grad_()
    y, log_slope = MAPS[name].forward(x, params)
    close(log_slope.exp(), torch.autograd.grad(y.sum(), x)[0])
    assert torch.isfinite(log_slope).all()


@over(MAPS)
def test_partials_are_autograds(name):
    g = MAPS[name]
    x, params = points(g, 5, 400)
    for came, expected in zip(g.partials(x, params), Univariate.partials(g, x, params), strict=True):
        close(came, expected)
        assert not came.requires_grad


@over(MAPS)
def test_order_is_kept(name):
    g = MAPS[name]
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    _, params = points(g, 8, 1, scale=3.0)
    assert (g.forward(x, params.expand(-1, len(x), -1))[0].diff() > 0).all()


@over(MAPS)
@over([torch.float32, torch.float64], "dtype")
def test_zero_parameters(name, dtype):
    g = MAPS[name]
    x = torch.linspace(-9, 9, 1001, dtype=dtype)
    y, log_slope = g.forward(x, x.new_zeros(1001, g.parameters))
    slope = 1 / (1 + math.exp(-2)) + getattr(g, "min_scale", 0.0) if "gated" in name or "sigmoid" in name else 1.0
    close(y, slope * x, 1e-6)
    close(log_slope.exp(), torch.full_like(x, slope), 1e-5)


@over(MAPS)
def test_extreme_parameters_stay_finite(name):
    g = MAPS[name]
    x = torch.linspace(-9, 9, 101)
    for value in (-60.0, 60.0):
        for results in (g.forward, g.inverse):
            assert all(torch.isfinite(v).all() for v in results(x, torch.full((101, g.parameters), value)))
    (x, params) = (v.float() for v in points(g, 50_000, scale=20.0))
    for results in (g.forward, g.inverse):
        assert all(torch.isfinite(v).all() for v in results(x, params.clamp(-60, 60)))


def test_affine_is_its_formula():
    (x, params), bound = points(cf.Affine(), 100), 3.0
    m, a = params.unbind(-1)
    s = bound * torch.tanh(a / bound)
    y, log_slope = cf.Affine().forward(x, params)
    close(y, x * s.exp() + m, 1e-14)
    close(log_slope, s, 1e-14)
    assert cf.Affine(0.5).forward(x, 100 * params)[1].abs().max() <= 0.5


def test_gated_is_its_formula():
    x, params = points(cf.Gated(), 100)
    m, a = params.unbind(-1)
    s = torch.sigmoid(a + 2)
    y, log_slope = cf.Gated().forward(x, params)
    close(y, s * x + (1 - s) * m, 1e-14)
    close(log_slope, s.log(), 1e-14)


def test_scaled_affine_is_its_formulas():
    x, params = points(cf.Affine(), 100, scale=4.0)
    m, a = params.unbind(-1)
    b = math.log(1e3)
    scales = {
        cf.transforms.ForeignAffine("softplus"): 1e-3 + (1 + (a + math.log(math.exp(1 - 1e-3) - 1)).exp()).log(),
        cf.transforms.ForeignAffine("sigmoid"): 1e-3 + 1 / (1 + (-a - 2).exp()),
        cf.transforms.ForeignAffine("softclip"): (a / (1 + a.abs() / b)).exp(),
        cf.transforms.ForeignAffine("softclip", min_scale=0.0): a.exp(),
        cf.transforms.ForeignAffine("clamp", low=-1.0, high=0.5): a.exp().clamp(math.exp(-1), math.exp(0.5)),
    }
    for g, scale in scales.items():
        y, log_slope = g.forward(x, params)
        close(y, x * scale + m, 1e-13)
        close(log_slope, scale.log(), 1e-13)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("cube",), "expected scale to be one of softplus, sigmoid, softclip, clamp, got 'cube'"),
        (("softplus", 1.0), "expected 0 <= min_scale < 1 and low < high, got min_scale=1.0"),
        (("clamp", 1e-3, 3.0, -5.0), "got min_scale=0.001, low=3.0, high=-5.0"),
    ],
)
def test_scaled_affine_says_what_it_expects(wrong, message):
    with pytest.raises(ValueError, match=message):
        cf.transforms.ForeignAffine(*wrong)


def test_sinh_arcsinh_is_its_formula():
    g = cf.transforms.SinhArcsinh(bound=0.7)
    x, params = points(g, 100)
    m, a = params.unbind(-1)
    u = torch.exp(0.7 * torch.tanh(a / 0.7)) * torch.asinh(x) + 2.1 * torch.tanh(m / 2.1)
    close(g.forward(x, params)[0], torch.sinh(u), 1e-13)


def test_sinh_arcsinh_shapes_tails_and_skewness():
    x = torch.tensor([-50.0, 50.0], dtype=torch.float64)
    heavier, lighter, right = (
        cf.transforms.SinhArcsinh().forward(x, torch.tensor([p, p], dtype=x.dtype))[0]
        for p in ([0, 0.5], [0, -0.5], [1.0, 0])
    )
    assert (heavier.abs() > 200).all() and (lighter.abs() < 20).all()
    assert right[1] > 100 and right[0] > -25


@over(SPLINES)
def test_spline_is_its_formula(name):
    """One bin after the other, in plain numbers."""
    g = MAPS[name]
    x, params = points(g, 20)
    x = x / 8 * g.bound
    for here, raw, y, log_slope in zip(x, params, *g.forward(x, params), strict=True):
        w, h, d = raw.split([g.bins, g.bins, g.bins - 1])
        if g.clipped:
            b = -math.log(g.min_slope)
            w, h, d = (v / (1 + v.abs() / most) for v, most in ((w, b / 2), (h, b / 2), (d, b)))
            widths, heights = (2 * g.bound * v.softmax(0) for v in (w, h))
            slopes = [1.0, *d.exp().tolist(), 1.0]
        else:
            widths, heights = (2 * g.bound * (g.min_slope + (1 - g.min_slope * g.bins) * v.softmax(0)) for v in (w, h))
            slopes = [1.0, *(g.min_slope + (1 + (d + math.log(math.expm1(1 - g.min_slope))).exp()).log()).tolist(), 1.0]
        xs, ys = (-g.bound + torch.cat([v.new_zeros(1), v.cumsum(0)]) for v in (widths, heights))
        k = int((here >= xs).sum()) - 1
        t, s, d0, d1 = (here - xs[k]) / widths[k], heights[k] / widths[k], slopes[k], slopes[k + 1]
        below = s + (d1 + d0 - 2 * s) * t * (1 - t)
        close(y, ys[k] + heights[k] * (s * t**2 + d0 * t * (1 - t)) / below)
        above = s**2 * (d1 * t**2 + 2 * s * t * (1 - t) + d0 * (1 - t) ** 2)
        close(log_slope, (above / below**2).log())


@over(SPLINES)
def test_spline_is_the_identity_outside_and_joins_it_smoothly(name):
    g = MAPS[name]
    _, params = points(g, 6)
    for side in (-1.0, 1.0):
        for beyond in (1.0, 1.5, 100.0):
            x = torch.full((6,), side * beyond * g.bound, dtype=torch.float64)
            for results in (g.forward, g.inverse):
                value, log_slope = results(x, params)
                assert torch.equal(value, x) and (log_slope == 0).all()
        x = torch.full((6,), side * g.bound * (1 - 1e-9), dtype=torch.float64)
        y, log_slope = g.forward(x, params)
        close(y, x, 1e-7)
        close(log_slope, torch.zeros_like(x), 1e-3)  # the slope changes fast in a narrow bin


@over(SPLINES)
def test_spline_passes_its_knots_without_a_jump(name):
    g = MAPS[name]
    _, params = points(g, 6, scale=1.0)
    xs, ys, slopes = g._knots(params)
    for side in (0.0, -1e-9, 1e-9):
        for k in range(1, g.bins):
            y, log_slope = g.forward(xs[:, k] + side, params)
            close(y, ys[:, k], 1e-7)
            close(log_slope.exp(), slopes[:, k], 1e-5)
