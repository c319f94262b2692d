"""Results and errors of a coupling layer, a linear map and a standardized context."""

import pytest
import torch
from registry import close, inputs, over, stir

import counterflow as cf


def test_the_network_is_its_formula():
    t = stir(
        cf.transforms.CouplingLayer(
            5,
            [3, 0],
            2,
            (6, 4, 6),
            activation="tanh",
            skips=(None, None, 0),
            linear=(1,),
            gates=(2,),
            univariate=cf.Gated(),
        )
    )
    x, c = inputs(t, 7)
    first, second, third = t.layers
    a = first(torch.cat([x[:, [1, 2, 4]], c], 1))
    b = second(a.tanh())
    d = third(b) * torch.sigmoid(t.gating["2"](c)) + a
    params = t.last(d.tanh()).reshape(7, 2, 2)
    moved, log_slope = cf.Gated().forward(x[:, [3, 0]], params)
    y, log_det = t(x, c)
    close(y[:, [3, 0]], moved)
    close(log_det, log_slope.sum(1))
    assert torch.equal(y[:, [1, 2, 4]], x[:, [1, 2, 4]])


@over([torch.float32, torch.float64], "dtype")
def test_a_new_layer_is_near_the_identity(dtype):
    t = cf.transforms.CouplingLayer(6, range(3), 2, (32, 32)).to(dtype)
    x, c = inputs(t, 50, dtype=dtype)
    assert (t(x, c)[0] - x).abs().max() < 1e-2


def test_a_linear_map_is_its_formula():
    W, b = torch.tensor([[0.2, -1.5], [1.0, 0.3]]).double(), torch.tensor([0.5, -1.0]).double()
    x = torch.randn(7, 2, dtype=torch.float64)
    y, log_det = cf.transforms.Linear(b, W)(x)
    close(y, x @ W.T + b)
    close(log_det, torch.linalg.det(W).abs().log().expand(7))


def test_features_of_a_linear_map_have_no_log_det_of_their_own():
    t = cf.transforms.Linear(torch.zeros(2), torch.eye(2))
    with pytest.raises(TypeError, match="expected a transform with a log-determinant per feature, got Linear"):
        t.forward_by_feature(torch.zeros(3, 2), torch.zeros(3, 2))


WRONG = {
    "no feature moves": (
        lambda: cf.transforms.CouplingLayer(3, []),
        r"expected moved to be different features of 0\.\.2, got \(\)",
    ),
    "a feature twice": (
        lambda: cf.transforms.CouplingLayer(3, [1, 1]),
        r"expected moved to be different features .*, got \(1, 1\)",
    ),
    "a feature too many": (
        lambda: cf.transforms.CouplingLayer(3, [3]),
        r"expected moved to be different features .*, got \(3,\)",
    ),
    "nothing to see": (
        lambda: cf.transforms.CouplingLayer(3, [0, 1, 2]),
        r"expected hidden=\(\), since no features are kept and there is no context, got hidden=\(256, 256\)",
    ),
    "gates without a context": (
        lambda: cf.transforms.CouplingLayer(3, [0], gates=[0]),
        r"expected gates=\(\) without a context, got gates=\(0,\)",
    ),
    "a layer that does not exist": (
        lambda: cf.transforms.CouplingLayer(3, [0], linear=[2]),
        r"expected linear to hold indices of the 2 hidden layers, got \(2,\)",
    ),
    "a gate that does not exist": (
        lambda: cf.transforms.CouplingLayer(3, [0], 1, gates=[2]),
        r"expected gates to hold indices of the 2 hidden layers, got \(2,\)",
    ),
    "skips of another size": (
        lambda: cf.transforms.CouplingLayer(3, [0], hidden=(4, 5), skips=(None, 0)),
        r"expected skips\[1\] to be None or an earlier hidden layer of the same size, got 0",
    ),
    "too few skips": (
        lambda: cf.transforms.CouplingLayer(3, [0], skips=(None,)),
        r"expected skips to have an entry for each of the 2 hidden layers, got 1: \(None,\)",
    ),
    "an activation": (
        lambda: cf.transforms.CouplingLayer(3, [0], activation="cube"),
        "expected activation to be one of .*, got 'cube'",
    ),
    "shapes of a matrix": (
        lambda: cf.transforms.Linear(torch.zeros(2), torch.zeros(2, 3)),
        r"expected bias \(D,\) and weight \(D, D\), got \(2,\) and \(2, 3\)",
    ),
    "a singular matrix": (
        lambda: cf.transforms.Linear(torch.zeros(2), torch.ones(2, 2)),
        "expected an invertible weight, got a singular one",
    ),
    "a weight that is not finite": (
        lambda: cf.transforms.Linear([0.0], [[torch.nan]]),
        "expected finite numbers in bias and weight, got a NaN or an infinity",
    ),
    "a context of another size": (
        lambda: cf.transforms.StandardizedContext(cf.Autoregressive(3, 2, (4,)), [0.0], [1.0]),
        r"expected mean and std of shape \(2,\), the context of the transform, got \(1,\)",
    ),
    "a univariate map that is none": (
        lambda: cf.transforms.CouplingLayer(3, [0], univariate="affine"),
        r"expected univariate to be an instance such as cf.Affine\(\), got 'affine'",
    ),
}


@over(WRONG)
def test_wrong_arguments_are_named(name):
    make, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        make()
