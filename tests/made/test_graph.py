"""Networks whose features see their parents in a graph."""

import pytest
import torch
from registry import GRAPH, case, close, stir

import counterflow as cf

CHAIN = [[int(j == i - 1) for j in range(6)] for i in range(6)]
STAR = [[int(j == 0 < i) for j in range(40)] for i in range(40)]


def test_a_solve_takes_as_many_steps_as_the_longest_path():
    for adjacency, steps in ((GRAPH, 3), (CHAIN, 6), (STAR, 2)):
        with case(adjacency=adjacency):
            D = len(adjacency)
            t = stir(cf.Autoregressive(D, hidden=(16, 16), adjacency=torch.tensor(adjacency), activation="tanh"))
            assert max(t.degrees) == t._layout.groups == steps
            x = torch.randn(9, D, dtype=torch.float64)
            close(t.inverse_by_passes(t(x)[0], None)[0], x)  # one pass for each degree


def test_the_diagonal_does_not_count():
    with_diagonal = [[1 if i == j else seen for j, seen in enumerate(row)] for i, row in enumerate(GRAPH)]
    t = cf.Autoregressive(5, adjacency=with_diagonal)
    assert t.adjacency == GRAPH and t.config()["degrees"] is None
    assert repr(t).count("graph of 4 edges, degrees 1..3") == 1


def test_training_keeps_to_the_graph():
    t = cf.Autoregressive(5, hidden=(12, 12), adjacency=GRAPH, univariate=cf.RationalQuadraticSpline(bins=4))
    flow = cf.Flow(cf.bases.StandardNormal(5), cf.Inverse(t))
    rows = torch.randn(600, 5) @ torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    cf.fit(flow, cf.log_likelihood, rows[:500], rows[500:], cf.FitConfig(epochs=2, batch_size=50, weight_decay=0.1))
    J = torch.autograd.functional.jacobian(lambda x: t(x)[0].sum(0), rows).movedim(1, 0)
    assert torch.equal((J != 0).any(0), torch.tensor(GRAPH).bool() | torch.eye(5, dtype=torch.bool))


def test_a_chain_uses_few_of_the_weights():
    full = cf.Autoregressive(6, hidden=(32,))
    sparse = cf.Autoregressive(6, hidden=(32,), adjacency=CHAIN)
    used = [sum(int((layer.mask != 0).sum()) for layer in t.made.masked_layers()) for t in (full, sparse)]
    assert used[1] < used[0] / 2


def test_what_is_refused():
    cases = [
        (
            {"adjacency": [[0, 1], [1, 0]]},
            "expected adjacency without cycles, got one through some of the features [0, 1]",
        ),
        ({"adjacency": [[0, 0, 0]]}, "expected adjacency of shape (2, 2), got (1, 3)"),
        ({"adjacency": [[0, 0], [1, 0]], "degrees": (1, 2)}, "expected degrees or adjacency"),
        (
            {"adjacency": [[0, 0], [1, 0]], "architecture": cf.transforms.Architecture(hidden_degrees=[[1, 1]])},
            "expected adjacency or an architecture with hidden_degrees, got both",
        ),
        ({"adjacency": [[0, 0], [1, 0]], "context": 1, "hidden": (1,)}, "expected hidden layers of at least 2 units"),
    ]
    for settings, words in cases:
        with case(settings=settings), pytest.raises(ValueError) as refused:
            cf.Autoregressive(2, **{"hidden": (2,), **settings})
        assert words in str(refused.value)
