"""Tests of the Triton kernels against `reference`: by Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch
from registry import Launches, case, close, inputs, stir

pytest.importorskip("triton", reason="needs Triton: pip install triton")

import counterflow as cf
from counterflow.engine import gpu, reference
from counterflow.engine.gpu import splines, substitution
from counterflow.made.activations import ACTIVATIONS

pytestmark = pytest.mark.cuda if torch.cuda.is_available() else []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float64 if gpu.is_interpreted() else torch.float32
TOLERANCE = 1e-10 if gpu.is_interpreted() else 5e-4
SPLINE = cf.RationalQuadraticSpline(bins=5, bound=3.0)
CASES = {  # with few hidden units, shared degrees, degree 0, several blocks and one feature
    "affine": (5, 2, (11, 7), cf.Affine(), None, "tanh"),
    "gated": (6, 0, (37,), cf.Gated(), [1, 3, 2, 3, 1, 4], "silu"),
    "spline": (4, 2, (9, 2), SPLINE, None, "elu"),
    "three layers": (3, 0, (3, 11, 5), cf.Affine(), [2, 1, 2], "softplus"),
    "one feature": (1, 2, (5,), SPLINE, None, "sigmoid"),
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill new buffers with NaN, so that a value that a kernel fails to write shows."""

    def with_nan(make):
        def made(*args, **kwargs):
            buffer = make(*args, **kwargs)
            return buffer.fill_(torch.nan) if buffer.is_floating_point() else buffer

        return made

    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, with_nan(getattr(owner, name)))


def made(name, rows=17):
    t = stir(cf.Autoregressive(*CASES[name])).to(DEVICE, DTYPE)
    y, c = (v if v is None else v.to(DEVICE, DTYPE) for v in inputs(t, rows))
    y[::3] *= 3
    return t, y, c


@pytest.fixture
def small_blocks(monkeypatch):
    """Cut layers of few degrees into several blocks, the last one ragged."""
    substitution._plan.cache_clear()
    monkeypatch.setattr(substitution, "block_size", lambda layout: 2)
    yield
    substitution._plan.cache_clear()


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_reference(name, small_blocks):
    t, y, c = made(name)
    results = []
    for solver in ("reference", "gpu"):
        t.solver = solver
        leaves = [v.detach().requires_grad_() for v in (y, c) if v is not None]
        found = t.inverse(*leaves)
        bars = [torch.cos(3 * v).detach() for v in found]
        results.append([*found, *torch.autograd.grad(found, [*leaves, *t.parameters()], bars)])
    for expected, came in zip(*results, strict=True):
        close(came, expected, TOLERANCE)


def test_every_activation_and_each_substitution():
    for activation in ACTIVATIONS:
        with case(activation=activation):
            t = stir(cf.Autoregressive(3, 0, (7, 5), activation=activation)).to(DEVICE, DTYPE)
            y = 4 * inputs(t, 5)[0].to(DEVICE, DTYPE)
            with torch.no_grad():
                system = t._system(y, None)
                at = reference.forward_substitution(system, y)
                pairs = [
                    (gpu.forward_substitution(system, y), at),
                    *[tuple(body.back_substitution(system, at, y.sin(), y[:, 0].cos()) for body in (gpu, reference))],
                ]
            for ours, theirs in pairs:
                for came, expected in zip([*ours[:-1], *ours[-1]], [*theirs[:-1], *theirs[-1]], strict=True):
                    close(came, expected, TOLERANCE)


def test_a_solve_takes_at_most_ten_launches(monkeypatch):
    """Count the operations around the kernels, each of which is one more."""
    kernels = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: kernels.append(grid)

    monkeypatch.setattr(substitution, "_forward", Kernel())
    monkeypatch.setattr(substitution, "_back", Kernel())
    t = cf.Autoregressive(64, hidden=(512, 512))
    y = torch.randn(40, 64)
    with torch.no_grad():
        system = t._system(y, None)
    solution = substitution.forward_substitution(system, y)
    with Launches() as forward:
        substitution.forward_substitution(system, y)
    with Launches() as back:
        substitution.back_substitution(system, solution, y, y[:, 0])
    assert kernels == 3 * [(3,)] and max(forward.count, back.count) < 10


def test_no_rows():
    t, y, c = made("affine", rows=0)
    t.solver = "gpu"
    x, log_det = t.inverse(y.requires_grad_(), c)
    (x.sum() + log_det.sum()).backward()
    assert x.shape == (0, 5) and log_det.shape == (0,) and y.grad.shape == (0, 5)


def test_a_spline_in_one_pass_has_the_numbers_and_derivatives_of_torch():
    x = (3 * torch.randn(13, 6)).to(DEVICE, DTYPE)
    x[0, :3] = torch.tensor([3.0, -3.0, 40.0])  # on the bound, and beyond
    params = (2 * torch.randn(6, 13, SPLINE.parameters)).to(DEVICE, DTYPE).transpose(0, 1)  # not contiguous
    results = []
    for forward in (SPLINE.forward, lambda x, params: splines.forward(SPLINE, x, params)):
        leaves = [v.detach().requires_grad_() for v in (x, params)]
        found = forward(*leaves)
        bars = [torch.cos(3 * v).detach() for v in found]
        first = torch.autograd.grad(found, leaves, bars, retain_graph=True)
        slopes = torch.autograd.grad(found, leaves, bars, create_graph=True)
        second = torch.autograd.grad([slope.sin().sum() for slope in slopes], leaves)
        results.append([*found, *first, *second])
    for expected, came in zip(*results, strict=True):
        close(came, expected, 10 * TOLERANCE)


def test_a_layer_with_the_solver_uses_the_kernel_in_one_pass(monkeypatch):
    t, x, c = made("spline")
    expected = t(x, c)
    t.solver = "gpu"
    calls = []
    forward = splines.forward
    monkeypatch.setattr(splines, "forward", lambda *args: calls.append(args) or forward(*args))
    for came, wanted in zip(t(x, c), expected, strict=True):
        close(came, wanted, TOLERANCE)
    assert len(calls) == 1


def test_networks_and_maps_without_a_kernel_are_solved_by_sliced():
    architecture = cf.transforms.Architecture.residual(blocks=1)
    for more in ({"architecture": architecture}, {"univariate": cf.transforms.SinhArcsinh()}):
        t = stir(cf.Autoregressive(4, 0, (6, 6, 6), **more)).to(DEVICE, DTYPE)
        y = inputs(t, 7)[0].to(DEVICE, DTYPE)
        t.solver = "gpu"
        assert not gpu.has_kernels(t._layout, DTYPE)
        close(t(t.inverse(y)[0])[0], y, TOLERANCE)


COMPILES = """
import torch, triton, counterflow as cf
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from counterflow.engine.gpu import splines, substitution
from counterflow.engine.gpu.maps import constants_of

def compiled(kernel, constants):
    types = dict.fromkeys(substitution.SIZES, "i32") | dict.fromkeys(("begins", "starts", "weight_starts"), "*i32")
    constants = {name: v for name, v in constants.items() if name not in types}
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

for univariate in (cf.Affine(), cf.Gated(), cf.RationalQuadraticSpline(8)):
    layout = cf.Autoregressive(64, 2, (512, 512), univariate)._layout
    options = substitution._plan(layout, torch.device("cpu")).options
    for kernel in (substitution._forward, substitution._back):
        assert "tf32" not in compiled(kernel, options)
constants = constants_of(univariate)._asdict() | {"NUMBERS": 64}
compiled(splines._gradient, constants)
constants.pop("MAP")
compiled(splines._value, constants)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu(tmp_path):
    """Compile for an H100 without one; no product may round its inputs to TF32."""
    changes = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", COMPILES], env=os.environ | changes, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
