"""Parameters as a few vectors, and the optimizers on them: the same numbers as torch.optim, parameter by parameter."""

import copy
import math

import pytest
import torch
from registry import over
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import counterflow as cf
from counterflow.training.flat import CPU_SIZE, FlatParameters, WeightAverage, clip_norm
from counterflow.training.optimizers import Optimizer

OPTIMIZERS = {"adam": torch.optim.Adam, "adamax": torch.optim.Adamax, "adamw": torch.optim.AdamW}
SHAPES = [(3, 4), (5,), (), (300, 300), (2, 0), (7, 1, 2)]  # the fourth one is longer than a vector


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def loss(parameters):
    return sum(((k + 1) * p.square() + p.sin()).real.sum() for k, p in enumerate(parameters))


@over([0.0, 0.3], "weight_decay")
@over(OPTIMIZERS, "kind")
def test_steps_are_those_of_torch(kind, weight_decay):
    ours, theirs = parameters(), parameters()
    flat = FlatParameters(ours)
    optimizer = Optimizer(kind, flat.vectors, weight_decay)
    expected = OPTIMIZERS[kind](theirs, lr=1.0, weight_decay=weight_decay)
    for learning_rate in (0.1, 0.05, 0.2, 0.01):
        flat.clear_gradients()
        expected.zero_grad()
        loss(ours).backward()
        loss(theirs).backward()
        gradients = flat.gradients()
        norm = nn.utils.clip_grad_norm_(theirs, math.inf).item()
        assert clip_norm(gradients, math.inf) == pytest.approx(norm, rel=1e-12)
        optimizer.step(gradients, learning_rate)
        expected.param_groups[0]["lr"] = learning_rate
        expected.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_clipping_scales_only_what_is_too_long():
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    assert clip_norm(gradients, 6.0) == 5.0 and gradients[1].item() == 4.0
    assert clip_norm(gradients, 2.5) == 5.0
    torch.testing.assert_close(torch.cat(gradients), torch.tensor([1.5, 0.0, 2.0]))
    gradients[0][1] = math.inf
    assert clip_norm(gradients, 1.0) == math.inf and gradients[1].item() == 2.0


def test_parameters_of_one_dtype_share_vectors():
    mixed = [*parameters(), *parameters(torch.float32), nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))]
    before = [p.detach().clone() for p in mixed]
    flat = FlatParameters(mixed)
    assert max(p.numel() for p in mixed) > CPU_SIZE
    assert [len(group) for group in flat.groups] == [3, 1, 2, 3, 1, 2, 1]
    assert [len(vector) for vector in flat.vectors] == [18, 90_000, 14, 18, 90_000, 14, 12]
    assert all(torch.equal(p, value) for p, value in zip(mixed, before, strict=True))
    loss(mixed).backward()
    joint = torch.cat([g.double() for g in flat.gradients()]).square().sum()
    torch.testing.assert_close(joint, sum(p.grad.abs().double().square().sum() for p in mixed))
    for vector in flat.vectors:
        vector.add_(1.0)
    for p, value in zip(mixed, before, strict=True):
        assert torch.equal(p, value + (1 + 1j if p.is_complex() else 1))


def test_closing_gives_each_parameter_its_own_memory():
    mine = parameters()
    flat = FlatParameters(mine)
    assert mine[0].untyped_storage().data_ptr() == mine[1].untyped_storage().data_ptr()
    before = [p.detach().clone() for p in mine]
    flat.close()
    assert all(torch.equal(p, value) for p, value in zip(mine, before, strict=True))
    assert len({p.untyped_storage().data_ptr() for p in mine if p.numel()}) == sum(p.numel() > 0 for p in mine)
    assert all(p.untyped_storage().nbytes() == 8 * p.numel() for p in mine)


@over(["finished", "interrupted", "an error"], "end")
def test_a_trained_model_owns_its_parameters(end):
    flow, steps = cf.MAF(2, layers=2, hidden=(8,), seed=0), []

    def on_step(task, done, total):
        steps.append(len({p.untyped_storage().data_ptr() for p in flow.parameters()}))
        if end == "interrupted":
            raise KeyboardInterrupt
        if end == "an error":
            raise ZeroDivisionError

    try:
        cf.fit(flow, cf.log_likelihood, torch.randn(20, 2), torch.randn(5, 2), cf.FitConfig(1, 10), on_step=on_step)
    except ZeroDivisionError:
        assert end == "an error"
    tensors = list(flow.parameters())
    assert set(steps) == {1} and len({p.untyped_storage().data_ptr() for p in tensors}) == len(tensors)


def test_a_parameter_without_a_gradient_stays():
    used, unused = parameters()[:2]
    flat = FlatParameters([used, unused])
    before = unused.detach().clone()
    optimizer = Optimizer("adam", flat.vectors)
    for _ in range(3):
        flat.clear_gradients()
        used.square().sum().backward()
        optimizer.step(flat.gradients(), 0.1)
    assert unused.grad is None and torch.equal(unused, before)


def test_the_average_is_that_of_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    model[2].bias.requires_grad_(False)
    expected = AveragedModel(copy.deepcopy(model), multi_avg_fn=lambda a, b, n: update(a, b, n), use_buffers=False)
    flat = FlatParameters([p for p in model.parameters() if p.requires_grad])
    average = WeightAverage(model, flat, 0.3)

    def update(averages, weights, n):
        get_ema_multi_avg_fn(min(0.3, (1 + int(n)) / (10 + int(n))))(averages, weights, n)

    for _ in range(5):
        model(torch.randn(6, 3, dtype=torch.float64))
        for vector in flat.vectors:
            vector.add_(torch.randn_like(vector))
        average.update()
        expected.update_parameters(model)
    average.copy_buffers(model)
    state = expected.state_dict()
    assert average.state().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in average.state().items())
    again = WeightAverage(model, flat, 0.3)
    again.restore({name: value.clone() for name, value in state.items()})
    assert all(torch.equal(value, state[name]) for name, value in again.state().items())
