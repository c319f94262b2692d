"""Degrees, masks and activations."""

import pickle

import pytest
import torch
from registry import over, stir

from counterflow.made.activations import ACTIVATIONS
from counterflow.made.architecture import Architecture, hidden_degrees
from counterflow.made.network import MADE

TOPS = [(top, lowest) for top in (0, 1, 2, 6, 63) for lowest in (0, 1) if top >= lowest]


@over(ACTIVATIONS)
@over([torch.float32, torch.float64], "dtype")
def test_df_is_autograds(name, dtype):
    activation = ACTIVATIONS[name]
    a = torch.cat([torch.linspace(-30, 30, 1001, dtype=dtype), torch.randn(1000, dtype=dtype)]).requires_grad_()
    (expected,) = torch.autograd.grad(activation.f(a).sum(), a)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(activation.df(a).detach(), expected, rtol=4 * eps, atol=eps)


@over([1, 2, 3, 7, 64], "size")
def test_hidden_degrees_are_sorted_spread_and_keep_the_top(size):
    for top, lowest in TOPS:
        degrees = hidden_degrees(size, top, lowest)
        assert len(degrees) == size and degrees == sorted(degrees)
        assert degrees[-1] == top and degrees[0] >= lowest
        counts = [degrees.count(d) for d in range(lowest, top + 1)]
        assert max(counts) - min(counts) <= 1
        if size > 1:
            assert degrees[0] == lowest


@over([((1, 2, 3), (4, 6), 2), ((1,), (3,), 0), ((1, 1, 2, 2, 2), (5, 2), 0), (range(1, 10), (4, 7, 3), 1)], "sizes")
def test_masks_are_staircases_that_ends_describe(sizes):
    degrees, hidden, context = sizes
    made = MADE(degrees, 2, hidden, "tanh", context)
    levels = [[g for g in range(1, len(ends)) for _ in range(ends[g] - ends[g - 1])] for ends in made.ends]
    levels = [[0] * ends[0] + level for ends, level in zip(made.ends, levels, strict=True)]
    assert levels[0] == list(degrees) and [len(level) for level in levels[1:]] == list(hidden)
    for layer, before, after in zip(made.layers, levels, [*levels[1:], None], strict=True):
        if after is None:  # two parameters for each feature
            expected = [[e < d for e in before] for d in degrees for _ in range(2)]
        else:
            expected = [[e <= unit for e in before] for unit in after]
        assert torch.equal(layer.mask.bool(), torch.tensor(expected))
        assert (layer.masked_weight()[~layer.mask.bool()] == 0).all()


def test_only_a_context_gives_units_of_degree_0():
    assert MADE((1, 2, 3), 2, (9,), "tanh", 0).ends[1][0] == 0
    assert MADE((1, 2, 3), 2, (9,), "tanh", 4).ends[1][0] == 3


def test_masked_weights_have_no_effect():
    made = stir(MADE((1, 2, 3), 2, (5, 4), "tanh", 0))
    x = torch.randn(6, 3, dtype=torch.float64)
    expected = made(x)
    with torch.no_grad():
        for layer in made.layers:
            assert (layer.weight[~layer.mask.bool()] != 0).any()
            layer.weight[~layer.mask.bool()] = 1e6
    assert torch.equal(made(x), expected)


def test_initial_weights_are_scaled_by_the_inputs_that_their_unit_sees():
    """Early features have enough weight; the last layer is a thousand times smaller, or more."""
    made = MADE(range(1, 65), 2, (512, 512), "relu", 3)
    for layer, context in zip(made.layers[:-1], (3, 0), strict=True):
        seen = layer.mask.sum(1, keepdim=True) + context
        standard = (layer.weight * seen.sqrt())[layer.mask.bool()]
        assert standard.var().item() == pytest.approx(1, abs=0.02)
        assert standard.abs().max() <= 3**0.5 + 1e-6
        assert (layer.bias == 0).all()
        assert (layer.weight[~layer.mask.bool()] == 0).all()
    last = made.layers[-1]
    assert last.weight.abs().max() <= 1e-3 * 3**0.5 and (last.bias == 0).all()
    assert (last.weight[~last.mask.bool()] == 0).all()


@over(ACTIVATIONS, "activation")
def test_a_network_is_sent_to_another_process(activation):
    """Whoever starts worker processes pickles what they get."""
    network = stir(MADE((1, 2), 2, (3,), activation, 0))
    x = torch.randn(4, 2, dtype=torch.float64)
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))


def test_a_residual_network_is_its_formula():
    made = stir(MADE((1, 2, 3), 2, (6,) * 5, "tanh", 2, Architecture.residual(blocks=2)))
    x, c = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    first, *blocks = made.layers[:-1]
    h = first(x) + made.contexts["0"](c)
    for k in (0, 2):
        inner = blocks[k](h.tanh()) + made.contexts[str(k + 1)](c)
        h = h + blocks[k + 1](inner.tanh())
    torch.testing.assert_close(made(x, c), made.layers[-1](h).reshape(7, 3, 2))


WRONG = {
    "no blocks": (lambda: Architecture.residual(blocks=0), "expected blocks to be a whole number of at least 1, got 0"),
    "too few layers": (
        lambda: MADE((1, 2), 2, (4, 4), "relu", 0, Architecture.residual(blocks=2)),
        r"expected skips to have an entry for each of the 2 hidden layers, got 5: \(None, None, 0, None, 2\)",
    ),
    "layers of two sizes": (
        lambda: MADE((1, 2, 3), 2, (4, 4, 5), "relu", 0, Architecture(skips=(None, None, 0))),
        r"expected skips\[2\] to be None or an earlier hidden layer of the same degrees, got 0",
    ),
    "linear as flags": (
        lambda: MADE((1, 2), 2, (4,), "relu", 0, Architecture(linear=(1,))),
        r"expected linear to hold indices of the 1 hidden layers, got \(1,\)",
    ),
    "a context of a layer that does not exist": (
        lambda: MADE((1, 2), 2, (4,), "relu", 1, Architecture(contexts=(1,))),
        r"expected contexts to hold indices of the 1 hidden layers .*, got contexts=\(1,\)",
    ),
    "degrees out of order": (
        lambda: MADE((1, 2), 2, (2,), "relu", 1, Architecture(hidden_degrees=[[1, 0]])),
        r"expected hidden_degrees in ascending order from 0\.\.1",
    ),
}


@over(WRONG)
def test_an_architecture_that_does_not_fit_is_refused(name):
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make()
