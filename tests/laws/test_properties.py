"""Laws that hold for all numbers: of every size and shape, at the edges of the maps, and for what is not a number.

How exactly a map comes back depends on how wild it is. So an error is measured against what it has to be at least:

    one feature      |x - x'| <= C eps (|x| + (|y| + shift) dx/dy),    shift: what the map adds, |m| or its bound
    whole transform  |x - x'| <= C (eps |x| + max_k |f_k^-1(y_k) - f^-1(y)|)

where f_k and y_k are f and y whose weights and coordinates are each changed by a few units in the last place (of the
box, for a spline, since its knots are rounded so): the answer is as good as that to a question which rounding has made.
That is backward stability. float64 says what these changes do.
"""

import math
from copy import deepcopy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from registry import ARCHITECTURES, FOREIGN, UNIVARIATES, over, stir

import counterflow as cf
from counterflow.made.activations import ACTIVATIONS


def laws(examples):
    """The same examples in every run, and the blob that repeats the one that failed."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


MAPS = (
    UNIVARIATES
    | FOREIGN
    | {
        "affine, tight": cf.Affine(bound=0.5),
        "sinh-arcsinh, tight": cf.transforms.SinhArcsinh(bound=0.2),
        "spline, 2 bins": cf.RationalQuadraticSpline(bins=2, bound=1.0),
        "spline, 30 bins": cf.RationalQuadraticSpline(bins=30, bound=8.0),
        "clipped spline, 2 bins": cf.RationalQuadraticSpline(bins=2, bound=1.0, min_slope=1e-2, clipped=True),
        "sigmoid, min_scale 0": cf.transforms.ForeignAffine("sigmoid", min_scale=0.0),
        "exp": cf.transforms.ForeignAffine("softclip", min_scale=0.0),
    }
)
SPLINES = [name for name, g in MAPS.items() if isinstance(g, cf.RationalQuadraticSpline)]
C = 40  # the largest seen in 20,000 numbers of each map is 13
DTYPES = (torch.float32, torch.float64)
DIRECTIONS = ("forward", "inverse")
dtypes, seeds = st.sampled_from(DTYPES), st.integers(0, 2**20)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
MODERATE = [0.0, -0.0, 1e-45, -1e-39, 1e-30, -1e-8, 1.0, -1.0, 5.0, -5.0, 4.9999995, 5.0000005, 100.0, -1e3]
LARGE = [1e6, -1e10, 1e18, 1.9e19, -1e25, 1e30, -1e30]
LARGEST = [*LARGE, 1e35, -1e38, 3.4e38]
NO_NUMBERS = [math.nan, math.inf, -math.inf]


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def rows(draw, shape, dtype, special=MODERATE, width=2.0):
    """Normal numbers of that width, of which some are replaced by special ones."""
    x = width * normal(draw(seeds), *shape, dtype=dtype)
    places = st.tuples(st.integers(0, max(x.numel() - 1, 0)), st.sampled_from(special))
    for place, value in draw(st.lists(places, max_size=6)) if x.numel() else []:
        x.view(-1)[place] = value
    return x


# -- one feature -------------------------------------------------------------------------------------


def spread_of(g, params):
    """Return the size of what the map adds: its shift, or its box."""
    if isinstance(g, cf.RationalQuadraticSpline):
        return torch.full_like(params[..., 0], g.bound)
    if isinstance(g, cf.transforms.SinhArcsinh):
        return torch.ones_like(params[..., 0])  # what it adds to u is bounded
    return params[..., 0].abs()


def bound_of(g, x, y, log_slope, params):
    """(|x| + (|y| + shift) dx/dy) eps, where a sinh makes |u| eps of its argument's rounding eps."""
    stretched = isinstance(g, cf.transforms.SinhArcsinh)
    more_x, more_y = (1 + torch.asinh(v).abs() if stretched else 1 for v in (x, y))
    back = torch.exp(-log_slope.double()).to(x.dtype)
    return torch.finfo(x.dtype).eps * (more_x * x.abs() + more_y * (y.abs() + spread_of(g, params)) * back)


def bend_of(g, direction, x, y, again, params):
    """Return the rate at which the log-slope changes along x: the larger of the rates on both sides."""
    if direction == "inverse":  # along y of the map, whose log-slope is minus that of the inverse
        x, again = y, g.inverse(again, params)[0]
    steep = [g.partials(v.double(), params.double()) for v in (x, again)]
    bends = [p.dl_dx.abs() / (p.dy_dx if direction == "inverse" else 1) for p in steep]
    return torch.maximum(*bends).nan_to_num(0.0, 0.0)


@over(MAPS, quick=UNIVARIATES)
@laws(40)
@given(st.data(), dtypes, st.sampled_from(DIRECTIONS), st.sampled_from([0.0, 1.0, 3.0, 20.0]))
def test_round_trip_of_maps(name, data, dtype, direction, scale):
    g = MAPS[name]
    x = data.draw(rows((30,), dtype, MODERATE + LARGE, width=3.0))
    params = scale * normal(data.draw(seeds), 30, g.parameters, dtype=dtype)
    there, back = (g.forward, g.inverse) if direction == "forward" else (g.inverse, g.forward)
    y, log_slope = there(x, params)
    again, log_slope_back = back(y, params)
    assert log_slope.isfinite().all() and not y.isnan().any()
    fine = y.isfinite()  # the others have overflowed
    slope = torch.minimum(log_slope, -log_slope_back)  # the flatter end, should rounding have passed a knot
    error, bound = (again - x).abs(), bound_of(g, x, y, slope, params)
    assert (error <= C * bound + 1e-44)[fine].all()
    off, bends = (log_slope + log_slope_back).abs(), bend_of(g, direction, x, y, again, params)
    assert (off <= C * (torch.finfo(dtype).eps * (1 + log_slope.abs()) + bends * bound))[fine].all()


@over(MAPS, quick=UNIVARIATES)
@laws(25)
@given(st.data(), dtypes, st.sampled_from(DIRECTIONS))
def test_maps_of_non_finite_values_are_not_finite(name, data, dtype, direction):
    g = MAPS[name]
    params = normal(data.draw(seeds), 3, g.parameters, dtype=dtype)
    x = torch.tensor(NO_NUMBERS, dtype=dtype)
    y, _ = getattr(g, direction)(x, params)
    assert y[0].isnan() and not y.isfinite().any() and y[1] != -math.inf and y[2] != math.inf
    params[data.draw(st.integers(0, 2))] = math.nan
    x = data.draw(rows((3,), dtype)).clamp(-0.9, 0.9)
    y, log_slope = getattr(g, direction)(x, params)
    broken = params.isnan().all(-1)
    assert y[broken].isnan().all() and log_slope[broken].isnan().all()
    assert y[~broken].isfinite().all() and log_slope[~broken].isfinite().all()


@over(SPLINES)
@laws(25)
@given(seeds, dtypes, st.sampled_from([0.3, 1.0, 3.0, 30.0]))
def test_a_spline_at_its_knots_and_bounds(name, seed, dtype, scale):
    """At each knot and one step of the last place to both sides: the knot's value, in order, and back again."""
    g = MAPS[name]
    params = scale * normal(seed, 4, g.parameters, dtype=dtype)
    xs, ys, slopes = (v[..., None].expand(-1, -1, 3) for v in g._knots(params))
    around = xs.clone()
    around[..., 0] = torch.nextafter(xs[..., 0], torch.full_like(xs[..., 0], -math.inf))
    around[..., 2] = torch.nextafter(xs[..., 0], torch.full_like(xs[..., 0], math.inf))
    wide = params[:, None, None].expand(-1, g.bins + 1, 3, -1)
    y, log_slope = g.forward(around, wide)
    eps = torch.finfo(dtype).eps
    steepest = slopes.amax(1, keepdim=True).clamp_min((ys.diff(dim=1) / xs.diff(dim=1)).max())
    assert log_slope.isfinite().all()
    assert ((y - ys).abs() <= 20 * eps * g.bound * (1 + steepest)).all()
    back, log_slope_back = g.inverse(y, wide)
    assert log_slope_back.isfinite().all()
    flatter = torch.minimum(log_slope, -log_slope_back)  # should rounding have passed the knot
    assert ((back - around).abs() <= C * bound_of(g, around, y, flatter, wide)).all()
    for side in (0, -1):
        assert torch.equal(y[:, side, 1], xs[:, side, 1]) and (log_slope[:, side, 1] == 0).all()


# -- transforms --------------------------------------------------------------------------------------


@st.composite
def transforms(draw, univariates=UNIVARIATES):
    """Draw a flow of a recipe or a single layer: every map, activation and architecture, D from 1 to 9; float64."""
    D, context = draw(st.integers(1, 9)), draw(st.sampled_from([0, 0, 1, 3]))
    more = {"activation": draw(st.sampled_from(list(ACTIVATIONS)))}
    univariate = draw(st.sampled_from(list(univariates.values())))
    hidden = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    kind = draw(st.sampled_from(["IAF", "MAF", "Coupling", "NSF", "layer", "coupling layer", "architecture"]))
    if kind == "architecture":
        hidden, architecture = draw(st.sampled_from(list(ARCHITECTURES.values())))
        t = cf.Autoregressive(max(D, 4), context, hidden, univariate, architecture=architecture, **more)
    elif kind == "layer":
        degrees = [1 + i % draw(st.integers(1, D)) for i in range(D)]
        degrees = [sorted(set(degrees)).index(d) + 1 for d in degrees]
        t = cf.Autoregressive(D, context, hidden, univariate, degrees, **more)
    elif kind == "coupling layer":
        moved = draw(st.lists(st.integers(0, D - 1), min_size=1, max_size=max(D - 1, 1), unique=True))
        hidden = hidden if D > 1 or context else ()
        t = cf.transforms.CouplingLayer(D, moved, context, hidden, univariate, more["activation"])
    else:
        more |= {"order": draw(st.sampled_from(["reversed", "random", "same"])), "layers": draw(st.integers(1, 3))}
        more |= {"bins": 4} if kind == "NSF" else {"univariate": univariate}
        t = getattr(cf, kind)(D, context, hidden=hidden, seed=0, **more).transform
    return stir(t, draw(seeds), gain=draw(st.sampled_from([0.1, 0.8, 1.5])))


@st.composite
def questions(draw, univariates=UNIVARIATES, special=MODERATE, contexts=MODERATE, batch=shapes, dtype=dtypes):
    """A transform, and x and c that it takes."""
    t, dtype, shape = draw(transforms(univariates)), draw(dtype), draw(batch)
    x = draw(rows((*shape, t.features), dtype, special))
    c = draw(rows((*shape, t.context), dtype, contexts)) if t.context else None
    return t.to(dtype), x, c


def set_solver(t, name):
    for layer in t.modules():
        if isinstance(layer, cf.Autoregressive):
            layer.solver = name


def run(t, direction, x, c):
    with torch.no_grad():
        return getattr(t, direction)(x, c)


def univariates_of(t):
    return [
        layer.univariate for layer in t.modules() if isinstance(layer, cf.Autoregressive | cf.transforms.CouplingLayer)
    ]


def needed(t, direction, y, c, draws=4):
    """Return the largest change of f(y) and log_det, by coordinate, when weights and arguments are rounded."""
    eps = torch.finfo(y.dtype).eps
    generator = torch.Generator().manual_seed(0)
    box = max((u.bound for u in univariates_of(t) if isinstance(u, cf.RationalQuadraticSpline)), default=0.0)

    def rounded(v, size=0.0):
        return v + 2 * eps * (v.abs() + size) * torch.randn(v.shape, generator=generator, dtype=v.dtype)

    exact = deepcopy(t).double()
    set_solver(exact, "sliced")
    y, c = (v if v is None else v.double() for v in (y, c))
    value, log_det = run(exact, direction, y, c)
    most = [eps * value.abs(), eps * (t.features + log_det.abs())]
    for _ in range(draws):
        other = deepcopy(exact)
        with torch.no_grad():
            for p in other.parameters():
                p.copy_(rounded(p))
        changed = run(other, direction, rounded(y, box), None if c is None else rounded(c))
        most = [torch.maximum(m, (v - w).abs()) for m, v, w in zip(most, changed, (value, log_det), strict=True)]
    return value, log_det, *most


def by_row(v):
    """The largest number of each row (..., D), for every coordinate: a mistake of one feature reaches the others."""
    return v.amax(-1, keepdim=True) if v.shape[-1] else v


def within(came, expected, needed, factor=100.0):
    """Within so many times the change that rounding makes, where that leaves a number."""
    expected, needed = expected.double(), needed.double().expand_as(expected)
    held = needed.isfinite() & (expected.abs() < torch.finfo(came.dtype).max / 1e4)
    off = (came.double() - expected).abs()
    wrong = held & ~(off <= factor * needed)
    assert not wrong.any(), f"off by {off[wrong].max():.3g} where rounding makes {needed[wrong].min():.3g}"


@pytest.mark.slow
@laws(120)
@given(questions(UNIVARIATES | FOREIGN), st.sampled_from(DIRECTIONS))
def test_round_trip(question, direction):
    t, x, c = question
    other = DIRECTIONS[direction == "forward"]
    y, log_det = run(t, direction, x, c)
    again, log_det_back = run(t, other, y, c)
    assert again.shape == x.shape and log_det.shape == x.shape[:-1] and again.dtype == log_det.dtype == x.dtype
    assume(y.isfinite().all())
    _, _, by_x, by_log_det = needed(t, other, y, c)
    _, _, by_y, by_log_det_there = needed(t, direction, x, c)
    # What the way there has rounded, the way back stretches: y is off by by_y, and so x by as much as that does.
    moved, log_det_moved = run(t, other, y + by_y.to(y), c)
    within(again, x, by_row(by_x + (moved - again).abs()) + torch.finfo(x.dtype).tiny)
    within(log_det_back, -log_det, by_log_det + by_log_det_there + (log_det_moved - log_det_back).abs())


def flat(*tensors):
    """(..., N) each -> rows (B, N)."""
    return [v if v is None else v.reshape(-1, v.shape[-1]) for v in tensors]


@pytest.mark.slow
@laws(60)
@given(questions(UNIVARIATES | FOREIGN), st.sampled_from(DIRECTIONS))
def test_shapes_and_strides(question, direction):
    """A batch of any rank gives what its rows give, to some roundings, also where they do not lie side by side."""
    t, x, c = question
    y, log_det = run(t, direction, x, c)
    expected = run(t, direction, *flat(x, c))
    apart = [v if v is None else v.repeat_interleave(2, -1)[..., ::2] for v in (x, c)]
    for value, slope in (run(t, direction, *apart), (y, log_det)):
        assert value.shape == x.shape and slope.shape == x.shape[:-1]
        assert torch.equal(value.isfinite(), y.isfinite())
        _, _, by_y, by_log_det = needed(t, direction, *flat(x, c))
        within(*flat(value), expected[0], by_row(by_y))
        within(slope.flatten(), expected[1], by_log_det)


@laws(80)
@given(questions(UNIVARIATES | FOREIGN, batch=st.just((5,))), st.data(), st.sampled_from(DIRECTIONS))
def test_rows_do_not_see_each_other(question, data, direction):
    """Bit by bit, whatever stands in the other rows."""
    t, x, c = question
    set_solver(t, data.draw(st.sampled_from(["auto", "sliced", "reference"])))
    y, log_det = run(t, direction, x, c)
    kept = data.draw(st.integers(0, 4))
    others = torch.arange(5) != kept
    for v in (x, c) if t.context else (x,):
        v[others] = data.draw(rows((4, v.shape[1]), v.dtype, LARGEST + NO_NUMBERS))
    y_too, log_det_too = run(t, direction, x, c)
    for came, expected in ((y_too, y), (log_det_too, log_det)):
        torch.testing.assert_close(came[kept], expected[kept], rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@laws(120)
@given(questions(UNIVARIATES | FOREIGN, special=MODERATE + LARGE), st.data())
def test_every_body_agrees_with_the_definition(question, data):
    """Values everywhere, and in float64 the gradients of y where nothing is near a kink or a billion away."""
    t, y, c = question
    y, c = flat(y, c)
    set_solver(t, "reference")
    x, log_det = run(t, "inverse", y, c)
    _, _, by_x, by_log_det = needed(t, "inverse", y, c)
    near = ((by_x / (1e-300 + x.abs()) < 1e-12) & (x.abs() < 1e9)).all(-1)
    v, w = (normal(data.draw(seeds), *shape) for shape in (y.shape, y.shape[:-1]))
    expected = gradient(t, y[near], None if c is None else c[near], v[near], w[near])
    for solver in ("sliced", "auto"):
        set_solver(t, solver)
        came = run(t, "inverse", y, c)
        within(came[0], x, by_row(by_x))
        within(came[1], log_det, by_log_det)
        if y.dtype == torch.float64:
            off = (gradient(t, y[near], None if c is None else c[near], v[near], w[near]) - expected).abs()
            assert (off <= 1e-7 * by_row(expected.abs())).all()


def gradient(t, y, c, v, w):
    """Gradient of the inverse and its log_det for y, with cotangents v and w."""
    y = y.clone().requires_grad_()
    x, log_det = t.inverse(y, c)
    return torch.autograd.grad((x * v).sum() + (log_det * w).sum(), y)[0]


@laws(60)
@given(
    questions(UNIVARIATES | FOREIGN, special=NO_NUMBERS, batch=st.just((4,))), st.sampled_from(DIRECTIONS), st.data()
)
def test_a_non_finite_feature_stays_non_finite(question, direction, data):
    """A NaN or an infinity in a feature is still none in that feature, whatever solves, and no other row has it."""
    t, x, c = question
    t = next(layer for layer in t.modules() if isinstance(layer, cf.Autoregressive | cf.transforms.CouplingLayer))
    set_solver(t, data.draw(st.sampled_from(["auto", "sliced", "reference"])))
    c = None if c is None else c.nan_to_num(0.0, 1.0, -1.0)
    y, log_det = run(t, direction, x, c)
    assert not y[~x.isfinite()].isfinite().any()
    assert y[x.isfinite().all(-1)].isfinite().all() and log_det[x.isfinite().all(-1)].isfinite().all()


# -- densities ---------------------------------------------------------------------------------------


@st.composite
def flows(draw):
    """Every base over transforms in both directions; float32 or float64."""
    t = draw(transforms())
    t = draw(st.sampled_from([lambda t: t, cf.Inverse]))(t)
    bases = [cf.bases.StandardNormal, cf.bases.StudentT, lambda D: cf.bases.DiagonalNormal(D, t.context)]
    flow = stir(cf.Flow(draw(st.sampled_from(bases))(t.features), t), draw(seeds))
    return flow.to(draw(dtypes))


def dtype_of(flow):
    return next(flow.parameters()).dtype


@laws(150)
@given(flows(), shapes, st.data())
def test_log_prob_of_finite_numbers_is_finite_or_minus_infinity(flow, shape, data):
    dtype = dtype_of(flow)
    largest = [1e39, 1e150, 1e160, -1e300, 1.7e308] if dtype == torch.float64 else []
    special = data.draw(st.sampled_from([MODERATE, LARGE, LARGEST, LARGEST + largest]))
    x = data.draw(rows((*shape, flow.features), dtype, special))
    c = data.draw(rows((*shape, flow.context), dtype, MODERATE + LARGE)) if flow.context else None
    with torch.no_grad():
        log_q = flow(c).log_prob(x)
    assert log_q.shape == x.shape[:-1] and log_q.dtype == dtype
    assert not log_q.isnan().any() and (log_q < math.inf).all()


@laws(60)
@given(flows(), st.data())
def test_log_prob_of_nan_is_refused_or_nan(flow, data):
    dtype = dtype_of(flow)
    x = data.draw(rows((3, flow.features), dtype))
    c = data.draw(rows((3, flow.context), dtype, [0.0, 1.0])) if flow.context else None
    x[1, data.draw(st.integers(0, flow.features - 1))] = data.draw(st.sampled_from(NO_NUMBERS))
    q = flow(c)
    with torch.no_grad():
        if x.isnan().any():
            with pytest.raises(ValueError, match="within the support"):
                q.log_prob(x)
        q._validate_args = False
        log_q = q.log_prob(x)
    assert not log_q[1].isfinite() and log_q[1] != math.inf


@laws(40)
@given(flows(), seeds)
def test_log_prob_of_a_sample_is_the_samples(flow, seed):
    """One run through the layers, and the way back."""
    dtype = dtype_of(flow)
    assume(dtype == torch.float64)
    c = normal(seed, 4, flow.context) if flow.context else None
    with torch.no_grad():
        z, log_q = flow(c).rsample_and_log_prob((2,) if flow.context else (4, 2))
        _, log_det = flow.transform.inverse(z, c if flow.transform.context else None)
    assume((log_det.abs() < 30).all() and (z.abs() < 1e6).all())
    assert ((flow(c).log_prob(z) - log_q).abs() <= 1e-6 * (1 + log_q.abs())).all()


@over(DTYPES, "dtype")
def test_weights_that_are_nan_are_not_taken_for_overflow(dtype):
    flow = stir(cf.IAF(3, 2, layers=2, hidden=(5,))).to(dtype)
    x, c = 1e25 * normal(0, 4, 3, dtype=dtype), normal(1, 4, 2, dtype=dtype)
    with torch.no_grad():
        assert not flow(c).log_prob(x).isnan().any()
        c[1] = math.nan
        assert flow(c).log_prob(x).isnan().tolist() == [False, True, False, False]
        flow.transform.transforms[0].made.layers[0].bias.fill_(math.nan)
        assert flow(c).log_prob(x).isnan().all()
