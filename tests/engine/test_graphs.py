"""Tests of the bookkeeping of CUDA graphs, with a function in the place of a graph, and of the solver's refusal."""

import pytest
import torch
from registry import close, inputs, stir

import counterflow as cf
from counterflow.engine import gpu, reference
from counterflow.engine.gpu import graphs


class Captures:
    """Replay as a graph does: from buffers of its own. It records the shapes that were captured."""

    def __init__(self, error=None):
        self.shapes = []
        self.error = error

    def __call__(self, run, tensors):
        if self.error:
            raise self.error
        self.shapes.append([tuple(t.shape) for t in tensors])
        static = [t.clone() for t in tensors]

        def replay(tensors):
            for buffer, t in zip(static, tensors, strict=True):
                buffer.copy_(t)
            return run(static)

        return replay


def double(tensors):
    return [2 * t for t in tensors]


def test_a_shape_is_captured_when_it_comes_again():
    captures = Captures()
    call = graphs.Graphs(captures)
    for value in range(4):
        for size in (3, 5):
            [came] = call("double", double, [torch.full((size,), float(value))])
            assert came.tolist() == [2.0 * value] * size
    call("another", double, [torch.ones(3)])
    call("double", double, [torch.ones(3, dtype=torch.float64)])
    assert captures.shapes == [[(3,)], [(5,)]]


def test_what_cannot_be_captured_runs_as_it_is():
    call = graphs.Graphs(Captures(RuntimeError("operation not permitted when stream is capturing")))
    for value in (1.0, 2.0, 3.0):
        assert call("double", double, [torch.tensor(value)])[0].item() == 2 * value


def test_the_graph_that_was_not_used_for_longest_makes_room(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    captures = Captures()
    call = graphs.Graphs(captures)
    for size in (1, 1, 2, 2, 1, 3, 3, 1, 2, 2):  # 3 takes the place of 2, and 2 that of 3
        call("double", double, [torch.ones(size)])
    assert captures.shapes == [[(1,)], [(2,)], [(3,)], [(2,)]]


@pytest.mark.parametrize("context", [0, 2])
def test_a_solve_in_a_graph_has_the_numbers_of_reference(context, monkeypatch):
    monkeypatch.setattr(gpu, "_replay", lambda name, run, tensors: call(name, run, tensors))
    monkeypatch.setattr(gpu, "has_kernels", lambda layout, dtype: False)
    captures = Captures()
    call = graphs.Graphs(captures)
    t = stir(cf.Autoregressive(5, context, (7, 6), cf.transforms.SinhArcsinh()))
    for seed in range(3):
        y, c = inputs(t, 4, seed=seed)
        with torch.no_grad():
            system = t._system(y, c)
            at = reference.forward_substitution(system, y)
            pairs = [
                (gpu.forward_substitution(system, y), at),
                tuple(body.back_substitution(system, at, y.sin(), y[:, 0]) for body in (gpu, reference)),
            ]
        for ours, theirs in pairs:
            for came, expected in zip([*ours[:-1], *ours[-1]], [*theirs[:-1], *theirs[-1]], strict=True):
                close(came, expected)
    assert len(captures.shapes) == 2


def test_the_solver_gpu_needs_cuda(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    t = cf.Autoregressive(3)
    t.solver = "gpu"
    t(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"expected plain tensors on cuda for solver='gpu', got tensors on cpu.*auto"):
        t.inverse(torch.randn(2, 3))
