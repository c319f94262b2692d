"""Layers in steps are dense layers with a mask: values, every derivative, and what torch's tools make of them."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from registry import TRANSFORMS, close, inputs, over, stir
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacfwd, jacrev, stack_module_state, vmap

import counterflow as cf
from counterflow.made import staircase as module
from counterflow.made.masked_linear import MaskedLinear
from counterflow.made.staircase import Staircase, cut, linear, weight_gradient

# How many columns each row sees, and the columns there are.
SHAPES = {
    "one by one": (range(7), 7),
    "two by two": ([k // 2 for k in range(10)], 5),
    "none at first": ([0, 0, 0, 2, 2, 7, 7], 9),
    "all alike": ([3] * 6, 5),
    "coupling": ([0] * 4 + [6] * 4, 6),
    "one row": ([2], 3),
    "one column": ([0, 0, 1], 1),
    "nothing": ([0, 0], 4),
}

# What torch does itself where a process first uses it.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def mask_of(reach, columns):
    return torch.arange(columns) < torch.tensor(list(reach))[:, None]


@pytest.fixture
def always_cut(monkeypatch):
    """Steps cost nothing, so that small layers are cut too; memory that nobody has written to holds NaN."""
    monkeypatch.setattr(module, "STEP", 0)
    monkeypatch.setattr(module, "START", -(10**9))
    cut.cache_clear()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    cut.cache_clear()


@pytest.fixture(params=SHAPES, ids=str)
def layer(request, always_cut):
    """Compute in float64, with numbers in places that must have no effect."""
    layer = stir(MaskedLinear(mask_of(*SHAPES[request.param])))
    assert layer.staircase.steps
    with torch.no_grad():
        layer.weight[~layer.mask] = 1e6
    return layer


def dense(layer, x):
    return F.linear(x, torch.where(layer.mask, layer.weight, 0), layer.bias)


def rows(layer, *batch):
    return torch.randn(*batch, layer.in_features, dtype=torch.float64)


@over([1, 7, 16, 40, 100], "rows")
@over([1, 5, 16, 33], "columns")
def test_steps_cover_the_staircase(rows, columns, always_cut):
    for reach in (sorted(torch.randint(columns + 1, (rows,)).tolist()) for _ in range(20)):
        steps = cut(tuple(reach), columns)
        assert [step.first for step in steps] == [0, *(step.last for step in steps[:-1])] and steps[-1].last == rows
        for first, last, full, seen in steps:
            assert 0 <= full <= reach[first] and reach[last - 1] <= seen <= columns


def test_steps_cost_least(monkeypatch):
    """Against all ways to cut 96 rows at whole cache lines."""
    monkeypatch.setattr(module, "START", -(10**9))
    reach, columns, borders = tuple(range(0, 192, 2)), 6400, range(16, 96, 16)
    for cost in (0, 100, 1000, 3000, 10**6):
        monkeypatch.setattr(module, "STEP", cost)
        cut.cache_clear()
        ways = (inner for k in range(6) for inner in itertools.combinations(borders, k))
        best = min(
            sum((last - first) * reach[last - 1] + cost for first, last in itertools.pairwise((0, *inner, 96)))
            for inner in ways
        )
        came = cut(reach, columns)
        assert sum((last - first) * reach[last - 1] + cost for first, last, *_ in came) == best
    cut.cache_clear()


def test_small_layers_are_dense_and_large_ones_cut():
    small, large = (cf.Autoregressive(64, hidden=(H, H)).made.masked_layers()[1].staircase for H in (128, 1024))
    assert not small.steps and small.mask.is_floating_point()
    area = sum((last - first) * seen for first, last, _, seen in large.steps)
    assert len(large.steps) >= 4 and area < 0.65 * 1024**2
    assert large.mask.dtype == torch.bool and large.diagonals.numel() < 1024**2 / 4  # no full mask of numbers


@over([(), (0,), (1,), (5,), (2, 3, 4), (3, 0)], "batch")
def test_values_and_gradients_are_those_of_the_dense_product(layer, batch):
    results = []
    for run in (layer, lambda x: dense(layer, x)):
        torch.manual_seed(1)
        x = rows(layer, *batch).requires_grad_()
        y = run(x)
        results.append((y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), torch.randn_like(y))))
    for came, expected in zip(*results, strict=True):
        close(came, expected, 1e-13)
    assert (results[0][2][~layer.mask] == 0).all()


def test_inputs_that_a_row_does_not_see_have_no_effect(layer):
    J = torch.autograd.functional.jacobian(layer, rows(layer))
    assert (J[~layer.mask] == 0).all() and (J[layer.mask] != 0).all()


def test_strides_do_not_matter(layer):
    x, y_bar = rows(layer, 6), torch.randn(6, layer.out_features, 2, dtype=torch.float64)
    for given in (x.T.contiguous().T, x.repeat(1, 2)[:, : layer.in_features], x[:1].expand(6, -1)):
        given = given.detach().requires_grad_()
        for sent in (y_bar[..., 0], y_bar[:1, :1, 0].expand(6, layer.out_features)):
            came = torch.autograd.grad(layer(given), (given, layer.weight), sent)
            expected = torch.autograd.grad(dense(layer, given), (given, layer.weight), sent)
            close(came[0], expected[0], 1e-13)
            close(came[1], expected[1], 1e-13)


@FORWARD_MODE
def test_derivatives_of_both_orders_and_directions(layer):
    """Also with cotangents and tangents that come in batches."""
    leaves = [rows(layer, 2), layer.weight.detach().clamp(-2, 2), layer.bias.detach()]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def call(x, weight, bias):
        return linear(x, weight, bias, layer.staircase)

    more = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(call, leaves, **more)
    assert gradgradcheck(call, leaves, check_fwd_over_rev=True, check_batched_grad=True)


def test_only_tensors_that_require_a_gradient_receive_one(layer):
    layer.weight.requires_grad_(False)
    x = rows(layer, 3)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None
    layer.requires_grad_(False)
    (grad,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)
    close(grad, torch.autograd.grad(dense(layer, x).sum(), x)[0], 1e-13)


TRANSFORMED = {
    "gradients by row": lambda f: vmap(jacrev(f), (None, 0)),
    "forward mode": lambda f: jacfwd(f, argnums=1),
    "hessian": lambda f: hessian(f, argnums=1),
    "hessians by row": lambda f: vmap(hessian(f), (None, 0)),
    "nothing of it": lambda f: lambda parameters, x: vmap(lambda scale: scale * f(parameters, x))(x),
}


@over(TRANSFORMED, "way")
@FORWARD_MODE
def test_functions_are_transformed_as_the_dense_product_is(layer, way):
    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).sin().sum()

    def expected(parameters, x):
        weight = torch.where(layer.mask, parameters["weight"], 0)
        return F.linear(x, weight, parameters["bias"]).sin().sum()

    arguments = dict(layer.named_parameters()), rows(layer, 4)
    torch.testing.assert_close(*(TRANSFORMED[way](f)(*arguments) for f in (loss, expected)))


def test_vmap_over_an_ensemble(always_cut):
    networks = [stir(cf.Autoregressive(5, hidden=(9, 7)), seed) for seed in range(3)]
    parameters, buffers = stack_module_state(networks)
    x, _ = inputs(networks[0], 4)
    for stacked in ((parameters, buffers), (parameters,)):
        y, _ = vmap(lambda *state: functional_call(networks[0], state, (x,)))(*stacked)
        for came, network in zip(y, networks, strict=True):
            close(came, network(x)[0])


def test_a_jacobian_is_vectorised(layer):
    """Without a word about missing rules."""
    x = rows(layer, 2)
    came, expected = (
        torch.autograd.functional.jacobian(run, x, vectorize=True) for run in (layer, lambda x: dense(layer, x))
    )
    close(came, expected, 1e-13)


@pytest.mark.slow
@over(["eager", "aot_eager"], "backend")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch's own tracer does
def test_torch_compile_sees_one_graph(backend, always_cut):
    torch.compiler.reset()
    t = stir(cf.Autoregressive(7, 2, (11, 9)))
    x, c = inputs(t, 4)

    def loss(x, c):
        y, log_det = t(x, c)
        return (y * x).sum() + log_det.sum()

    values = []
    for run in (loss, torch.compile(loss, backend=backend, fullgraph=True)):
        value = run(x.requires_grad_(), c)
        values.append((value, *torch.autograd.grad(value, [x, *t.parameters()])))
    for expected, came in zip(*values, strict=True):
        close(came, expected)


def test_autocast_is_that_of_the_dense_product(layer):
    layer.float()
    x = rows(layer, 4).float().requires_grad_()
    with torch.no_grad():
        layer.weight.clamp_(-2, 2)
    results = []
    for run in (layer, lambda x: dense(layer, x)):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, layer.weight, layer.bias))))
    for came, expected in zip(*results, strict=True):
        assert came.dtype == expected.dtype
        close(came.double(), expected.double(), 0.03)
    assert (results[0][2][~layer.mask] == 0).all()
    layer.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.double()).dtype == torch.float64


def test_another_dtype_or_width_is_torchs_error(layer):
    with pytest.raises(RuntimeError, match="dtype"):
        layer(rows(layer, 2).float())
    for width in (layer.in_features - 1, layer.in_features + 1):
        with pytest.raises(RuntimeError, match="shapes"):
            layer(torch.randn(2, width, dtype=torch.float64))


@over([name for name, make in TRANSFORMS.items() if isinstance(make(), cf.Autoregressive)])
def test_a_network_in_steps_is_the_dense_one(name, always_cut):
    t = TRANSFORMS[name]()
    for part in t.made.masked_layers():
        assert part.staircase.steps
    results = []
    for _ in range(2):
        x, c = inputs(t, 9)
        y, log_det = t(x.requires_grad_(), c)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + log_det.sum()
        results.append((y, log_det, *torch.autograd.grad(loss, (x, *t.parameters()))))
        for part in t.made.masked_layers():
            part.staircase = Staircase(part.staircase.mask, steps=()).double()
    for came, expected in zip(*results, strict=True):
        close(came, expected, 1e-12)


def test_weight_gradient(layer):
    y_bar, x = torch.randn(layer.out_features, 5, dtype=torch.float64).T, rows(layer, 5)
    for staircase in (layer.staircase, Staircase(layer.mask, steps=()).double()):
        came = weight_gradient(staircase, y_bar, x)
        close(came, torch.where(layer.mask, y_bar.T @ x, 0), 1e-13)
        assert (came[~layer.mask] == 0).all()


# Whatever happens to the weight, the layer is masked.


def optimizers(parameters):
    parameters = list(parameters)
    yield torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.3)
    yield torch.optim.Adam(parameters, lr=0.1, weight_decay=0.3, amsgrad=True)
    yield torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.3)
    yield torch.optim.RMSprop(parameters, lr=0.1, momentum=0.5, centered=True)
    yield torch.optim.Adamax(parameters, lr=0.1, weight_decay=0.3)


@over([False, True], "is_cut")
def test_training_keeps_zeros_at_zero(is_cut, request):
    if is_cut:
        request.getfixturevalue("always_cut")
    t = cf.Autoregressive(7, hidden=(9, 8))
    averaged = torch.optim.swa_utils.AveragedModel(t, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    before = copy.deepcopy(t.state_dict())
    for optimizer in optimizers(t.parameters()):
        for _ in range(3):
            optimizer.zero_grad()
            y, log_det = t(torch.randn(5, 7))
            (y.square().sum() - log_det.sum()).backward()
            optimizer.step()
            averaged.update_parameters(t)
    for network in (t, averaged.module, copy.deepcopy(t).double(), pickle.loads(pickle.dumps(t))):
        for part in network.made.masked_layers():
            assert bool(part.staircase.steps) == is_cut
            assert (part.weight[~part.mask.bool()] == 0).all() and (part.weight[part.mask.bool()] != 0).any()
    assert any(not torch.equal(v, before[k]) for k, v in t.state_dict().items())


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight + 1


def by_hand(layer):
    torch.nn.init.normal_(layer.weight)


def through_data(layer):
    layer.weight.data.normal_()


def other_data(layer):
    layer.weight.data = torch.randn_like(layer.weight)


def other_parameter(layer):
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))


def parametrization(layer):
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())


def weight_norm(layer):
    torch.nn.utils.parametrizations.weight_norm(layer)


def loaded(layer):
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()})


def assigned(layer):
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()}, assign=True)


CHANGES = [by_hand, through_data, other_data, other_parameter, parametrization, weight_norm, loaded, assigned]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@over([False, True], "is_cut")
def test_writes_to_the_weight_are_masked(change, is_cut, request):
    if is_cut:
        request.getfixturevalue("always_cut")
    layer = stir(MaskedLinear(mask_of(*SHAPES["two by two"])))
    x = rows(layer, 3)
    layer(x)
    change(layer)
    assert (layer.weight[~layer.mask.bool()] != 0).any()
    weight = torch.where(layer.mask.bool(), layer.weight, 0)
    close(layer(x), F.linear(x, weight, layer.bias), 1e-13)
    assert torch.equal(layer.masked_weight(), weight)


def test_saved_files_hold_no_masks(tmp_path, always_cut):
    t = stir(cf.Autoregressive(5, hidden=(9, 7)))
    assert set(t.state_dict()) == {f"made.layers.{k}.{kind}" for k in range(3) for kind in ("weight", "bias")}
    x, _ = inputs(t, 4)
    cf.save(t, tmp_path / "t.safetensors")
    assert torch.equal(cf.load(tmp_path / "t.safetensors")(x)[0], t(x)[0])


def test_distributed_data_parallel(tmp_path, always_cut):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        t = stir(cf.Autoregressive(5, hidden=(9, 7)))
        x, _ = inputs(t, 4)
        parallel = torch.nn.parallel.DistributedDataParallel(t)
        for run in (t, parallel):
            y, log_det = run(x)
            (y.sum() + log_det.sum()).backward()
        doubled = [p.grad.clone() for p in t.parameters()]
        t.zero_grad()
        y, log_det = t(x)
        (y.sum() + log_det.sum()).backward()
        for p, both in zip(t.parameters(), doubled, strict=True):
            close(both, 2 * p.grad)
    finally:
        torch.distributed.destroy_process_group()
