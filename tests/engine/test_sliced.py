"""Tests of the blocks of `sliced`: launches, iteration and its fallback; test_engine.py compares its numbers."""

import pytest
import torch
from registry import ARCHITECTURES, UNIVARIATES, Launches, case, close, inputs, stir

import counterflow as cf
from counterflow.engine import reference, sliced


def system_of(t, rows=6, dtype=torch.float64):
    """Return y, sorted by degree, and the system of a transform."""
    y, c = inputs(t.to(dtype), rows, dtype=dtype)
    with torch.no_grad():
        return t._sort(y), t._system(y, c)


def same(came, expected):
    for one, other in zip([*came[:-1], *came[-1]], [*expected[:-1], *expected[-1]], strict=True):
        close(one, other)


def both(body, system, y, **options):
    """Return the solution, and the adjoints at the solution of `reference` for fixed cotangents."""
    solution = body.forward_substitution(system, y, **options)
    at = reference.forward_substitution(system, y)
    return solution, body.back_substitution(system, at, y.sin(), y[:, 0].cos(), **options)


def test_a_solve_takes_at_most_500_launches(monkeypatch):
    monkeypatch.setattr(sliced, "is_transformed", lambda: False)  # the count is a mode of torch, as tracers are
    for gain in (0.1, 0.8):
        with case(gain=gain):
            t = stir(cf.Autoregressive(64, hidden=(512, 512)), gain=gain)
            y, system = system_of(t, 16, torch.float32)
            solution = sliced.forward_substitution(system, y)
            with Launches() as forward:
                sliced.forward_substitution(system, y)
            with Launches() as back:
                sliced.back_substitution(system, solution, y, y[:, 0])
            assert max(forward.count, back.count) <= 500


@pytest.mark.parametrize("iterate", [True, False])
def test_blocks_of_any_size_give_the_numbers_of_reference(iterate, monkeypatch):
    for D, context, degrees in ((9, 0, None), (10, 2, None), (10, 0, [1, 1, 2, 3, 3, 4, 5, 6, 7, 7])):
        for univariate, (hidden, architecture) in zip(UNIVARIATES.values(), ARCHITECTURES.values(), strict=True):
            if architecture.hidden_degrees and not context:
                architecture, hidden = None, (37,)
            t = cf.Autoregressive(D, context, hidden, univariate, degrees, "tanh", architecture=architecture)
            y, system = system_of(stir(t))
            expected = both(reference, system, y)
            for size in (1, 3, 4, 99):
                monkeypatch.setattr(sliced, "block_size", lambda layout, size=size: size)
                with case(D=D, context=context, univariate=univariate, size=size):
                    for one, other in zip(both(sliced, system, y, iterate=iterate), expected, strict=True):
                        same(one, other)


def test_a_block_that_does_not_settle_goes_by_degree(monkeypatch):
    t = stir(cf.Autoregressive(40, 0, (60,), activation="tanh"), gain=2.0)
    y, system = system_of(t)
    swept = []
    monkeypatch.setattr(sliced, "_settled", lambda new, old: swept.append(new) or False)
    for came, expected in zip(both(sliced, system, y), both(reference, system, y), strict=True):
        same(came, expected)
    assert len(swept) == 2 * 20  # of each substitution, only the first block is tried, half as often as it has degrees


def test_a_row_that_is_not_finite_changes_no_other():
    y, system = system_of(stir(cf.Autoregressive(20, 0, (30,))))
    expected = sliced.forward_substitution(system, y).x
    for bad in (torch.nan, torch.inf):
        spoiled = y.clone()
        spoiled[2, 5] = bad
        came = sliced.forward_substitution(system, spoiled).x
        assert not came[2, 5:].isfinite().all()
        close(came[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])
        close(came[2, :5], expected[2, :5])
