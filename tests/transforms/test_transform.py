"""Transforms without a network, and every error of the mathematical core."""

import pytest
import torch
from registry import over

import counterflow as cf
from counterflow.made.network import MADE

AR = cf.Autoregressive
X, C = torch.randn(5, 3), torch.randn(5, 2)


def plain():
    return AR(3, hidden=(4,))


def conditional():
    return AR(3, 2, (4,))


# What is called, the error's type, and a pattern: what was expected, what came and, where it is not plain, what to do.
ERRORS = {
    "x is a list": (
        lambda: plain()([1.0]),
        TypeError,
        r"expected x to be a floating-point tensor, got list; convert it",
    ),
    "x is None": (lambda: plain()(None), TypeError, r"expected x to be a floating-point tensor, got None"),
    "x is whole": (lambda: plain()(X.long()), TypeError, r"expected x .*, got a tensor of torch.int64; .*\.float\(\)"),
    "y is whole": (lambda: plain().inverse(X.long()), TypeError, r"expected y to be a floating-point tensor"),
    "c is whole": (lambda: conditional()(X, C.long()), TypeError, r"expected c to be .*, got a tensor of torch.int64"),
    "c is a list": (lambda: conditional()(X, [1.0, 2.0]), TypeError, r"expected c to be .*, got list"),
    "x is float64": (
        lambda: plain()(X.double()),
        TypeError,
        r"expected x of torch\.float32, got torch\.float64; convert it with \.to\(torch\.float32\), or the flow",
    ),
    "c is float64": (
        lambda: conditional()(X, C.double()),
        TypeError,
        r"expected c of torch\.float32, got torch\.float64",
    ),
    "x too wide": (
        lambda: plain()(torch.randn(64, 20)),
        ValueError,
        r"expected x of shape \(\.\.\., 3\), got \(64, 20\); this Autoregressive was built with features=3",
    ),
    "y too wide": (lambda: plain().inverse(X[:, :2]), ValueError, r"expected y of shape \(\.\.\., 3\), got \(5, 2\)"),
    "x without axes": (lambda: plain()(torch.tensor(1.0)), ValueError, r"expected x of shape .*, got \(\); this"),
    "x of push_score": (lambda: plain().push_score(X[:, :2], X[:, :2]), ValueError, r"expected x of shape"),
    "x by feature": (lambda: plain().forward_by_feature(X[:, :2], X[:, :2]), ValueError, r"expected x of shape"),
    "no c": (
        lambda: conditional()(X),
        ValueError,
        r"expected a context c of shape \(\.\.\., 2\), got None; this Autoregressive was built with context=2",
    ),
    "c not wanted": (
        lambda: plain()(X, C),
        ValueError,
        r"expected no context, got c of shape \(5, 2\); this Autoregressive was built with context=0",
    ),
    "c too wide": (
        lambda: conditional()(X, X),
        ValueError,
        r"expected a context c of shape \(\.\.\., 2\), got c of shape \(5, 3\); this Autoregressive was built",
    ),
    "c without axes": (
        lambda: conditional()(X, torch.tensor(1.0)),
        ValueError,
        r"expected a context c of shape .*, got c of shape \(\)",
    ),
    "c of another batch": (
        lambda: conditional().inverse(X, C[:4]),
        ValueError,
        r"expected batch shapes that broadcast, got y \(5, 3\) and c \(4, 2\); give c the batch shape of y",
    ),
    "c for Compose": (lambda: cf.Compose([plain()])(X, C), ValueError, r"expected no context.*this Compose"),
    "c for Permute": (lambda: cf.Permute([0, 2, 1])(X, C), ValueError, r"expected no context.*this Permute"),
    "x for Standardize": (
        lambda: cf.Standardize([0.0], [1.0])(X),
        ValueError,
        r"expected x of shape \(\.\.\., 1\), got \(5, 3\); this Standardize",
    ),
    "no features": (lambda: AR(0), ValueError, r"expected features to be a whole number of at least 1, got 0"),
    "features as a float": (lambda: AR(2.0), ValueError, r"expected features to be a whole number .*, got 2\.0"),
    "features as a bool": (lambda: AR(True), ValueError, r"expected features to be a whole number .*, got True"),
    "negative context": (lambda: AR(3, -1), ValueError, r"expected context to be a whole number .*, got -1"),
    "no hidden units": (lambda: AR(3, hidden=(8, 0)), ValueError, r"expected hidden\[1\] to be a whole .*, got 0"),
    "no hidden layers": (
        lambda: AR(3, hidden=()),
        ValueError,
        r"expected the sizes of the hidden layers, such as hidden=\(64, 64\), got hidden=\(\)",
    ),
    "hidden as one number": (lambda: cf.IAF(3, hidden=64), ValueError, r"such as hidden=\(64, 64\), got hidden=64"),
    "an array": (
        lambda: plain()(X.numpy()),
        TypeError,
        r"got ndarray; convert it with torch\.as_tensor\(\.\.\.\)\.float",
    ),
    "no hidden layers in MADE": (
        lambda: MADE((1,), 2, (), "relu", 0),
        ValueError,
        r"expected the sizes of the hidden layers",
    ),
    "no such activation": (
        lambda: AR(3, activation="rleu"),
        ValueError,
        r"expected activation to be one of elu, leaky_relu, relu, sigmoid, silu, softplus, tanh, got 'rleu'",
    ),
    "univariate as a class": (
        lambda: AR(3, univariate=cf.Gated),
        TypeError,
        r"expected univariate to be an instance such as cf\.Affine\(\), got <class",
    ),
    "degrees with a gap": (
        lambda: AR(3, degrees=(1, 3, 3)),
        ValueError,
        r"expected 3 degrees that use every number of 1\.\.G, got \(1, 3, 3\); for example \(1, 1, 2, 2\)",
    ),
    "degrees from 0": (lambda: AR(2, degrees=(0, 1)), ValueError, r"expected 2 degrees .*, got \(0, 1\)"),
    "too few degrees": (lambda: AR(3, degrees=(1, 2)), ValueError, r"expected 3 degrees .*, got \(1, 2\)"),
    "empty degrees": (lambda: AR(3, degrees=()), ValueError, r"expected 3 degrees .*, got \(\)"),
    "no such solver": (
        lambda: setattr(plain(), "solver", "fast"),
        ValueError,
        r"expected solver to be one of auto, reference, sliced.*, got 'fast'",
    ),
    "empty Compose": (
        lambda: cf.Compose([]),
        ValueError,
        r"expected at least one transform in Compose, and transforms only, got \[\]",
    ),
    "Compose of other features": (
        lambda: cf.Compose([plain(), cf.Permute([0, 1])]),
        ValueError,
        r"expected transforms that agree on features and context, got features=\[2, 3\]",
    ),
    "Compose of other contexts": (
        lambda: cf.Compose([conditional(), AR(3, 4, (4,))]),
        ValueError,
        r"agree on features and context, got features=\[3\] and context=\[2, 4\]",
    ),
    "an index twice": (
        lambda: cf.Permute([0, 2, 2]),
        ValueError,
        r"expected order to be a permutation of 0\.\.D-1, each index once, got \[0, 2, 2\]",
    ),
    "empty order": (lambda: cf.Permute([]), ValueError, r"expected order to be a permutation"),
    "order in two axes": (
        lambda: cf.Permute(torch.zeros(1, 1, dtype=torch.long)),
        ValueError,
        r"expected order to be a permutation of 0\.\.D-1, .*got \[\[0\]\]",
    ),
    "order of floats": (
        lambda: cf.Permute([1.0, 0.0]),
        TypeError,
        r"expected order to hold integers, got a tensor of torch\.float32; convert it with \.long\(\)",
    ),
    "order of booleans": (
        lambda: cf.Permute(torch.tensor([False, True])),
        TypeError,
        r"expected order to hold integers, got a tensor of torch\.bool",
    ),
    "mean longer than std": (
        lambda: cf.Standardize([0.0, 1.0], [1.0]),
        ValueError,
        r"expected mean and std of one shape \(D,\), got \(2,\) and \(1,\)",
    ),
    "empty mean": (lambda: cf.Standardize([], []), ValueError, r"expected mean and std of one shape"),
    "a constant column": (
        lambda: cf.Standardize([0.0, 5.0], [1.0, 0.0]),
        ValueError,
        r"positive, finite stds, got mean=5\.0, std=0\.0 at feature 1; drop constant columns first",
    ),
    "a mean that is no number": (
        lambda: cf.Standardize([torch.nan], [1.0]),
        ValueError,
        r"expected finite means .*, got mean=nan",
    ),
    "an infinite std": (lambda: cf.Standardize([0.0], [torch.inf]), ValueError, r"expected finite .*std=inf"),
    "mean and factor of two sizes": (
        lambda: cf.Inverse(cf.transforms.Whiten([0.0, 1.0], [[1.0]])),
        ValueError,
        r"expected mean \(D,\) and factor \(D, D\), got \(2,\) and \(1, 1\)",
    ),
    "a factor that is no number": (
        lambda: cf.Inverse(cf.transforms.Whiten([0.0], [[torch.nan]])),
        ValueError,
        r"expected finite numbers in mean and factor",
    ),
    "a full factor": (
        lambda: cf.Inverse(cf.transforms.Whiten([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]])),
        ValueError,
        r"expected factor to be a lower triangular matrix .* torch\.linalg\.cholesky\(covariance\)",
    ),
    "a factor that is flat": (
        lambda: cf.Inverse(cf.transforms.Whiten([0.0], [[0.0]])),
        ValueError,
        r"lower triangular matrix with a positive diagonal",
    ),
    "by feature backwards": (
        lambda: cf.Inverse(plain()).forward_by_feature(X, X),
        TypeError,
        r"expected a transform with a log-determinant per feature, got Inverse; free bits need a flow",
    ),
    "one bin": (
        lambda: cf.RationalQuadraticSpline(bins=1),
        ValueError,
        r"expected bins to be a whole number from 2 to 500, got 1",
    ),
    "a float of bins": (lambda: cf.RationalQuadraticSpline(bins=8.0), ValueError, r"expected bins .*, got 8\.0"),
    "too many bins": (lambda: cf.RationalQuadraticSpline(bins=501), ValueError, r"expected bins .*, got 501"),
    "a spline without room": (
        lambda: cf.RationalQuadraticSpline(bound=0.0),
        ValueError,
        r"expected bound to be a positive number, got 0\.0",
    ),
    "a negative clip": (
        lambda: cf.Affine(bound=-1.0),
        ValueError,
        r"expected bound to be a positive number, got -1\.0",
    ),
    "a clip that is no number": (lambda: cf.Affine(bound=float("nan")), ValueError, r"expected bound .*, got nan"),
    "base of no features": (lambda: cf.bases.StandardNormal(0), ValueError, r"expected features to be a whole number"),
    "base of a negative context": (
        lambda: cf.bases.DiagonalNormal(2, -1),
        ValueError,
        r"expected context to be a whole",
    ),
    "base and transform of other features": (
        lambda: cf.Flow(cf.bases.StandardNormal(2), plain()),
        ValueError,
        r"expected base and transform that agree, got features=2, context=0 and features=3, context=0",
    ),
    "base and transform of other contexts": (
        lambda: cf.Flow(cf.bases.DiagonalNormal(3, 1), conditional()),
        ValueError,
        r"expected base and transform that agree, got features=3, context=1 and features=3, context=2",
    ),
    "flow without its context": (
        lambda: cf.IAF(3, 2)(),
        ValueError,
        r"expected a context c of shape \(\.\.\., 2\), got None; this flow was built with context=2",
    ),
    "flow with a context": (
        lambda: cf.IAF(3)(C),
        ValueError,
        r"expected no context, got c of shape \(5, 2\); this flow was built with context=0",
    ),
    "flow with a wide context": (
        lambda: cf.IAF(3, 2)(X),
        ValueError,
        r"expected a context c of shape \(\.\.\., 2\), got c of shape \(5, 3\); this flow was built with context=2",
    ),
    "value of a flow": (
        lambda: cf.IAF(3)().log_prob(C),
        ValueError,
        r"expected value of shape \(\.\.\., 3\), got \(5, 2\); this flow was built with features=3",
    ),
    "value of another batch": (
        lambda: cf.IAF(3, 2)(C).log_prob(X[:4]),
        ValueError,
        r"expected batch shapes that broadcast, got value \(4, 3\) and c \(5, 2\)",
    ),
    "flow by feature backwards": (
        lambda: cf.MAF(3)().rsample_and_log_prob_by_feature(),
        TypeError,
        r"expected a transform with a log-determinant per feature, got Inverse",
    ),
    "no such order": (
        lambda: cf.MAF(3, order="backwards"),
        ValueError,
        r"expected order to be one of reversed, random, same, got 'backwards'",
    ),
} | {
    f"{make.__name__} without {name}": (
        lambda make=make, name=name: make(**{"features": 3, name: 0}),
        ValueError,
        rf"expected {name} to be a whole number of at least 1, got 0",
    )
    for make in (cf.IAF, cf.MAF, cf.NSF, cf.Coupling)
    for name in ("features", "layers")
}


@over(ERRORS)
def test_errors_say_what_was_expected_what_came_and_what_to_do(name):
    call, error, pattern = ERRORS[name]
    with pytest.raises(error, match=pattern) as caught:
        call()
    assert caught.type is error


def test_permute_and_standardize_compute_their_formulas():
    x = torch.tensor([[10.0, 20.0, 30.0]])
    assert cf.Permute([2, 0, 1])(x)[0].tolist() == [[30.0, 10.0, 20.0]]
    assert cf.Permute([2, 0, 1]).inverse(x)[0].tolist() == [[20.0, 30.0, 10.0]]
    y, log_det = cf.Standardize([10.0, 0.0, 0.0], [1.0, 2.0, 5.0])(x)
    assert y.tolist() == [[0.0, 10.0, 6.0]]
    assert log_det.item() == pytest.approx(-2.302585)


def test_whiten_computes_its_formula():
    factor = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    y, log_det = cf.Inverse(cf.transforms.Whiten([1.0, -1.0], factor))(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    assert y.tolist() == [[3.0, 1.0], [1.0, -1.0]] and log_det.tolist() == [0.0, 0.0]


@over([torch.float32, torch.float64], "dtype")
def test_standardize_by_whole_numbers_keeps_the_dtype(dtype):
    t = cf.Standardize([0, 0], [2, 4]).to(dtype)
    x = torch.randn(5, 2, dtype=dtype)
    assert {v.dtype for v in (*t(x), *t.inverse(x), *t.push_score(x, x))} == {dtype}


def test_standardize_does_not_share_what_it_was_given():
    mean, std = torch.zeros(2), torch.ones(2, requires_grad=True)
    t = cf.Standardize(mean, std)
    mean += 1
    assert t.mean.tolist() == [0.0, 0.0] and not t(torch.randn(3, 2))[0].requires_grad


def test_costs():
    one, solved = "one pass", "forward substitution"
    shuffle = cf.Permute([2, 0, 1])
    for t, forward, inverse in (
        (plain(), one, solved),
        (cf.Inverse(plain()), solved, one),
        (shuffle, one, one),
        (cf.Compose([plain(), shuffle, plain()]), one, solved),
        (cf.Compose([cf.Inverse(plain()), shuffle]), solved, one),
        (cf.Inverse(cf.Compose([plain(), shuffle])), solved, one),
        (cf.Compose([plain(), cf.Inverse(plain())]), "mixed", "mixed"),
    ):
        assert (t.forward_cost, t.inverse_cost) == (forward, inverse)


def test_compose_is_a_sequence():
    a, b, c = plain(), cf.Permute([2, 0, 1]), plain()
    t = cf.Compose([a, b, c])
    assert len(t) == 3 and list(t) == [a, b, c]
    assert t[0] is a and t[-1] is c
    front = t[:2]
    assert isinstance(front, cf.Compose) and list(front) == [a, b]
    back, log_det = t[1:](front[:1](X)[0])
    torch.testing.assert_close(t(X), (back, log_det + a(X)[1]))
    with pytest.raises(IndexError):
        t[3]
    with pytest.raises(ValueError, match=r"expected at least one transform in Compose, .*got \[\]"):
        t[3:]


def test_flattened_undoes_every_nesting():
    layer, order = plain(), cf.Permute([2, 0, 1])
    nested = cf.Inverse(cf.Compose([cf.Inverse(cf.Compose([layer, order])), order, cf.Inverse(cf.Inverse(layer))]))
    parts = nested.flattened()
    assert [type(part) for part in parts] == [cf.Inverse, cf.Permute, AR, cf.Permute]
    assert parts[0].transform is layer and parts[2] is layer
    torch.testing.assert_close(cf.Compose(parts)(X), nested(X))
    assert layer.flattened() == [layer]
