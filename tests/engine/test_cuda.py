"""Tests on a GPU, in float32: `pytest -m cuda`. test_gpu.py runs there as well, without the interpreter."""

import pytest
import torch
from registry import UNIVARIATES, case, close, inputs, stir

import counterflow as cf
from counterflow.engine import gpu

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


def layer(univariate="affine", D=64, H=512, **more):
    """Return a layer with a context on the GPU in float32, the same in float64 on the CPU, and rows for both."""
    made = [stir(cf.Autoregressive(D, 2, (H, H), UNIVARIATES[univariate], **more), gain=0.6) for _ in range(2)]
    y, c = inputs(made[0], 257)
    return made[0].float().to(DEVICE), made[1], y, c


def results(t, solver, y, c):
    t.solver = solver
    leaves = [y.detach().requires_grad_(), c.detach().requires_grad_()]
    x, log_det = t.inverse(*leaves)
    loss = (x * torch.cos(3 * x.detach())).sum() + (log_det * torch.cos(log_det.detach())).sum()
    return [x, log_det, *torch.autograd.grad(loss, [*leaves, *t.parameters()])]


@pytest.mark.parametrize("univariate", UNIVARIATES)
def test_every_body_has_the_values_and_gradients_of_the_cpu_in_float64(univariate):
    t, exact, y, c = layer(univariate, 24 if univariate == "sinh-arcsinh" else 64, 130)
    expected = results(exact, "reference", y, c)
    for solver in ("sliced", "gpu", "gpu", "gpu"):  # a graph is captured in the second run, and replayed in the third
        with case(solver=solver):
            for came, wanted in zip(
                results(t, solver, y.float().to(DEVICE), c.float().to(DEVICE)), expected, strict=True
            ):
                close(came.cpu(), wanted.float(), 1e-3)


def test_graphs_hold_residual_networks_and_float64():
    architecture = cf.transforms.Architecture.residual(blocks=1)
    t = stir(cf.Autoregressive(7, 0, (9,) * 3, architecture=architecture)).to(DEVICE)
    y = inputs(t, 33)[0].to(DEVICE)
    t.solver = "gpu"
    assert not gpu.has_kernels(t._layout, torch.float64)
    for _ in range(4):
        close(t(t.inverse(y)[0])[0], y)
        y = y + 0.1


def test_the_same_input_gives_the_same_bits():
    """Solve many tiles repeatedly: a race would show as a difference."""
    for univariate in ("affine", "spline"):
        t, _, _, _ = layer(univariate, H=130)
        y = torch.randn(5000, 64, device=DEVICE)
        c = torch.randn(5000, 2, device=DEVICE)
        first = results(t, "gpu", y, c)
        for _ in range(5):
            for one, other in zip(results(t, "gpu", y, c), first, strict=True):
                assert torch.equal(one, other)


def test_a_solve_is_a_part_of_a_graph_of_the_user():
    t, _, y, c = layer(H=130)
    y, c = y.float().to(DEVICE), c.float().to(DEVICE)
    t.solver = "gpu"
    with torch.no_grad():
        expected = t.inverse(y, c)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            came = t.inverse(y, c)[0]
        graph.replay()
    assert torch.equal(came, expected)


def test_a_flow_is_trained_and_sampled():
    rows = torch.randn(600, 5) @ torch.randn(5, 5)
    for flow in (cf.MAF(5, layers=2, hidden=(32, 32)), cf.NSF(5, layers=2, hidden=(32, 32))):
        for precision in ("float32", "bf16"):
            config = cf.FitConfig(epochs=2, batch_size=100, device=DEVICE, precision=precision)
            history = cf.fit(flow, cf.log_likelihood, rows[:500], rows[500:], config)
            assert history.epochs[-1].validation == history.epochs[-1].validation  # no NaN
            x = flow().sample((100,))
            assert x.device.type == DEVICE and x.isfinite().all()


def test_the_command_vae_runs(here):
    code, out, err = here("vae", "--data", "digits", "--device", DEVICE, "--epochs", "1", "--out", "run")
    assert code == 0, out + err
