"""Tests that every body returns the numbers of `reference`, and `reference` those of plain autograd."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from threading import Timer

import pytest
import torch
from registry import ARCHITECTURES, FOREIGN, UNIVARIATES, close, inputs, over, stir

import counterflow as cf
from counterflow.engine import reference
from counterflow.engine.contract import System
from counterflow.engine.cpu import compilation, threads
from counterflow.engine.solve import SOLVERS, body_for, solve
from counterflow.made.activations import ACTIVATIONS

BODIES = [name for name in SOLVERS if name not in ("auto", "reference", "gpu")]  # test_gpu.py has the last one
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
HIDDEN = [(7,), (13, 5), (3, 11), (11, 6, 9), (37, 70), (130,)]
DEGREES = {  # of D features
    "own": lambda D: None,
    "shared": lambda D: [1 + i * ((D + 2) // 3) // D for i in range(D)],
    "two, unsorted": lambda D: [1 + i % 2 for i in range(D)],
}
# Every pair of activation and univariate map, and of size and kind of degrees, without the full product of all.
CASES = {
    f"{D}, {univariate}, {activation}, {hidden}, {degrees}, context {context}": (
        D,
        context,
        hidden,
        (UNIVARIATES | FOREIGN)[univariate],
        DEGREES[degrees](D),
        activation,
    )
    for (univariate, D, activation), hidden, degrees, context in zip(
        [*product(UNIVARIATES, (1, 2, 3, 17, 64), ACTIVATIONS), *product(FOREIGN, (2, 17), ("tanh", "relu"))],
        cycle(HIDDEN),
        cycle([*DEGREES, "own"]),
        cycle((0, 2, 3)),
    )
    if (univariate, D) != ("sinh-arcsinh", 64)  # a power of a power of a power overflows
}
CASES |= {
    f"{D}, {univariate}, {activation}, {name}, {degrees}, context {context}": (
        D,
        context,
        hidden,
        UNIVARIATES[univariate],
        DEGREES[degrees](D),
        activation,
        architecture,
    )
    for (D, univariate, activation, degrees, context), (name, (hidden, architecture)) in product(
        (
            (4, "affine", "elu", "own", 2),
            (5, "gated", "tanh", "own", 0),
            (17, "spline", "relu", "own", 3),
            (70, "affine", "silu", "own", 2),
            (11, "affine", "silu", "own", 0),
        ),
        ARCHITECTURES.items(),
    )
}

NARROW = [case for case in CASES if not case.startswith("64")]
EVERY_BODY = list(product(["reference", *BODIES], UNIVARIATES))
EVERY = [*EVERY_BODY, *product(BODIES, FOREIGN)]
BODY_CASES = [(body, case) for body, u in EVERY for case in CASES if body != "reference" and f", {u}," in case]


@pytest.fixture
def poisoned(monkeypatch):
    """Fill new buffers with NaN, so that a value that a body fails to write shows; the shapes of these buffers."""
    fresh = []

    def with_nan(make):
        def made(*args, **kwargs):
            buffer = make(*args, **kwargs)
            fresh.append(buffer.shape)
            return buffer.fill_(torch.nan) if buffer.is_floating_point() else buffer

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, with_nan(getattr(owner, name)))
    return fresh


def made(case, device="cpu", dtype=torch.float64, rows=6):
    """Return the transform of a case, y with some rows far from 0, and c."""
    *arguments, architecture = (*CASES[case], None)[:7]
    t = stir(cf.Autoregressive(*arguments, architecture=architecture)).to(device, dtype)
    y, c = (v if v is None else v.to(device, dtype) for v in inputs(t, rows))
    y[::3] *= 3
    return t, y, c


def results(solver, t, y, c):
    """Return x, log_det, and the gradients with respect to y, c, each weight and each bias."""
    t.solver = solver
    leaves = [v.detach().requires_grad_() for v in (y, c) if v is not None]
    x, log_det = t.inverse(*leaves)
    generator = torch.Generator().manual_seed(3)
    x_bar, log_det_bar = (torch.randn(v.shape, generator=generator).to(v) for v in (x, log_det))
    return x, log_det, *torch.autograd.grad((x, log_det), [*leaves, *t.parameters()], (x_bar, log_det_bar))


@over(BODY_CASES, "body_and_case", quick=BODY_CASES[::3])
@over(DEVICES, "device")
def test_values_and_gradients_are_those_of_reference(body_and_case, device, poisoned):
    body, case = body_and_case
    t, y, c = made(case, device)
    expected = results("reference", t, y, c)
    poisoned.clear()
    came = results(body, t, y, c)
    assert poisoned, "no buffer of this body held NaN: poison the function that it allocates with"
    for one, other in zip(came, expected, strict=True):
        close(one, other)


@over(BODY_CASES, "body_and_case", quick=BODY_CASES[::3])
@over(DEVICES, "device")
def test_each_substitution_is_that_of_reference(body_and_case, device, poisoned):
    """Compare the adjoints of every hidden layer too, since an error there may not show in the weight gradients."""
    body, case = body_and_case
    t, y, c = made(case, device)
    body = body_for(body, t._layout, y)
    with torch.no_grad():
        y, system = t._sort(y), t._system(y, c)
        expected, came = (b.forward_substitution(system, y) for b in (reference, body))
        v, w = torch.randn_like(y), torch.randn_like(y[:, 0])
        # Both go back from the same point: a relu's slope may differ on two sides of a kink.
        pairs = [
            (came, expected),
            (body.back_substitution(system, expected, v, w), reference.back_substitution(system, expected, v, w)),
        ]
    for ours, theirs in pairs:
        for one, other in zip([*ours[:-1], *ours[-1]], [*theirs[:-1], *theirs[-1]], strict=True):
            close(one, other)


@over(BODY_CASES[::2], "body_and_case", quick=BODY_CASES[::6])
@over(DEVICES, "device")
def test_float32_is_near_float64(body_and_case, device, poisoned):
    body, case = body_and_case
    exact = results("reference", *made(case, device))
    for came, expected in zip(results(body, *made(case, device, torch.float32)), exact, strict=True):
        close(came, expected.float(), 5e-4)


@over(NARROW, "case", quick=NARROW[::4])
def test_reference_has_the_gradients_of_plain_autograd(case):
    """Compare the implicit function theorem with a graph through all passes."""
    t, y, c = made(case)
    leaves = [v.requires_grad_() for v in (y, c) if v is not None] + list(t.parameters())
    system, flat = t._system(y, c), t._sort(y)
    through_the_loop = reference.forward_substitution(system, flat)
    x, log_det = solve(reference, system, t._staircases, flat)
    bars = torch.randn_like(x), torch.randn_like(log_det)
    expected = torch.autograd.grad(through_the_loop[:2], leaves, bars, retain_graph=True)
    for came, plain in zip(torch.autograd.grad((x, log_det), leaves, bars), expected, strict=True):
        close(came, plain)


@over(EVERY_BODY, "solver_and_univariate", quick=[("reference", "affine"), ("sliced", "gated"), ("cpu", "spline")])
@over([0, 2], "context", quick=[2])
def test_gradcheck(solver_and_univariate, context):
    solver, univariate = solver_and_univariate
    t = stir(cf.Autoregressive(3, context, (4, 3), UNIVARIATES[univariate], (2, 1, 3), "tanh"))
    t.solver = solver
    names, parameters = zip(*t.named_parameters(), strict=True)
    y, c = inputs(t, 2)
    given = [y] if c is None else [y, c]

    def inverse(*leaves):
        state, args = leaves[: len(names)], leaves[len(names) :]
        return torch.func.functional_call(Inverted(t), {f"t.{n}": p for n, p in zip(names, state, strict=True)}, args)

    assert torch.autograd.gradcheck(inverse, [*parameters, *(v.requires_grad_() for v in given)])


class Inverted(torch.nn.Module):
    def __init__(self, t):
        super().__init__()
        self.t = t

    def forward(self, y, c=None):
        return self.t.inverse(y, c)


@pytest.mark.parametrize(("solver", "univariate"), EVERY_BODY)
@over(["after it", "within it"], "backward")
def test_autocast_does_not_reach_the_solve(solver, univariate, backward):
    context = 2 if backward == "after it" else 0  # torch's own backward of the context's linear layer is low within
    t = stir(cf.Autoregressive(5, context, (11, 7), UNIVARIATES[univariate])).float()
    t.solver = solver
    given = [v.requires_grad_() for v in inputs(t, 8, dtype=torch.float32) if v is not None]
    leaves = *given, *t.parameters()
    expected = t.inverse(*given)
    expected += torch.autograd.grad(expected, leaves, expected, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert {v.dtype for v in t(*given)} == {torch.float32}
        low = t.inverse(*(v.bfloat16() for v in given))
        came = t.inverse(*given)
        if backward == "within it":
            came += torch.autograd.grad(came, leaves, came)
    if backward == "after it":
        came += torch.autograd.grad(came, leaves, came)
    for one, other in zip(came, expected, strict=True):
        close(one, other, 1e-6)
    for one, other in zip(low, t.inverse(*(v.bfloat16().float() for v in given)), strict=True):
        assert torch.equal(one, other)


@over(UNIVARIATES, "univariate")
def test_push_score_and_forward_agree_under_autocast(univariate):
    t = stir(cf.Autoregressive(5, 2, (11, 7), UNIVARIATES[univariate])).float()
    x, c = inputs(t, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for came, expected in zip(t.push_score(x, x, c), t(x, c), strict=False):
            close(came, expected.detach(), 1e-6)


@over(["auto", *BODIES], "solver")
def test_only_tensors_that_require_a_gradient_get_one(solver):
    t = stir(cf.Autoregressive(3, 2, (5,)))
    y, c = inputs(t, 4)
    t.solver = solver
    everything = torch.autograd.grad(t.inverse(y, c)[0].sum(), list(t.parameters()))
    t.requires_grad_(False)
    assert not t.inverse(y, c)[0].requires_grad
    for parameter, expected in zip(t.parameters(), everything, strict=True):
        parameter.requires_grad_()
        (came,) = torch.autograd.grad(t.inverse(y, c)[0].sum(), parameter)
        parameter.requires_grad_(False)
        close(came, expected)


@over(["x", "log_det"], "of")
def test_a_second_derivative_is_refused_not_wrong(of):
    t = stir(cf.Autoregressive(3, 0, (5,), activation="tanh"))
    y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x, log_det = t.inverse(y)
    loss = (x.square() if of == "x" else log_det).sum() + y.pow(3).sum()
    (slope,) = torch.autograd.grad(loss, y, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(slope.sum(), y)


def test_the_system_has_the_networks_weights(poisoned):
    """Compare the network that substitution reads (`MADE.ends`, masked weights) with the one that forward runs."""
    t, y, c = made(next(case for case in CASES if case.startswith("17") and "context 2" in case))
    with torch.no_grad():
        params, hidden = reference.network(t._system(y, c), y)
        expected, layers = t.made.run(y, c)
    assert isinstance(t._system(y, c), System)
    for one, other in zip((params, *hidden), (expected, *layers), strict=True):
        close(one, other, 1e-13)


@dataclass(frozen=True)
class Shift(cf.transforms.Univariate):
    """Univariate map that is not compiled."""

    parameters = 1

    def forward(self, x, params):
        return x + params[..., 0], torch.zeros_like(x)

    def inverse(self, y, params):
        return y - params[..., 0], torch.zeros_like(y)


def test_auto_compiles_where_it_can():
    layouts = [cf.Autoregressive(3, univariate=u)._layout for u in (*(UNIVARIATES | FOREIGN).values(), Shift())]
    for device in map(torch.device, ("cpu", "meta")):
        for layout, u in zip(layouts, [*UNIVARIATES, *FOREIGN, "shift"], strict=True):
            body = "cpu" if device.type == "cpu" and u != "shift" else "sliced"
            assert body_for("auto", layout, torch.empty(0, device=device)).__name__ == f"counterflow.engine.{body}"


def test_a_user_defined_map_is_solved_in_slices():
    t = stir(cf.Autoregressive(3, 0, (5,), univariate=Shift()))
    y, _ = inputs(t, 4)
    close(t(t.inverse(y)[0])[0], y)
    t.solver = "cpu"
    with pytest.raises(ValueError, match=r"expected a map of this library on the CPU .* got Shift\(\) on cpu; use"):
        t.inverse(y)


def test_a_long_compilation_is_announced(caplog, monkeypatch):
    monkeypatch.setattr(compilation, "_announced_for", set())
    monkeypatch.setattr(compilation, "Timer", lambda seconds, *call: Timer(0.01 * seconds, *call))
    with caplog.at_level("WARNING", "counterflow"), compilation._announced(torch.float32):
        time.sleep(0.3)
    [message] = caplog.messages
    assert message.startswith("compiling kernels for torch.float32; this happens once")


@pytest.fixture(params=["torch's threads", "our threads"])
def team(request, monkeypatch):
    """Run with each of the two ways to share tiles among threads."""
    if request.param == "our threads":
        monkeypatch.setattr(threads, "openmp_parallel", lambda: None)
    elif threads.openmp_parallel() is None:
        pytest.skip("this build of torch offers no GOMP_parallel")


@over([1, 2, 3], "count")
def test_the_same_input_gives_the_same_bits(count, team):
    """Use enough work for several threads, and a number of rows that is no multiple of a tile."""
    torch.set_num_threads(count)
    t = stir(cf.Autoregressive(64, 0, (130, 97)), 1).float()
    y = torch.randn(1111, 64)
    first, second = (t.inverse(y) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    close(t(first[0])[0], y, 1e-4)


@over([0, 2], "context")
def test_rows_may_be_solved_in_parts(context, monkeypatch):
    t = stir(cf.Autoregressive(3, context, (7, 5)))
    y, c = inputs(t, 23)
    with torch.no_grad():
        whole = t.inverse(y, c)
        monkeypatch.setattr("counterflow.engine.solve.MAX_VALUES", 4 * (7 + 5 + 6))
        parts = t.inverse(y, c)
    for one, other in zip(parts, whole, strict=True):
        close(one, other)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # caused by torch's own tracer
@over(UNIVARIATES, "univariate", quick=["affine", "spline"])
@over([0, 2], "context", quick=[2])
def test_torch_compile_sees_one_graph(univariate, context):
    """Compile without a graph break and compare the numbers."""
    t = stir(cf.Autoregressive(3, context, (7, 5), UNIVARIATES[univariate]))
    y, c = inputs(t, 4)

    def loss(y, c):
        x, log_det = t.inverse(y, c)
        return (x * y).sum() + log_det.sum()

    values = []
    for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaf = y.clone().requires_grad_()
        value = run(leaf, c)
        values.append((value, *torch.autograd.grad(value, [leaf, *t.parameters()])))
    for expected, came in zip(*values, strict=True):
        close(came, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_user_defined_map_needs_partials_inside_torch_compile():
    t = stir(cf.Autoregressive(3, 0, (5,), univariate=Shift()))
    y, _ = inputs(t, 4)
    x, _ = torch.compile(t.inverse, backend="aot_eager", fullgraph=True)(y)
    close(t(x)[0], y)
    with pytest.raises(RuntimeError, match=r"expected partials\(\) of Shift\(\) in closed form inside torch.compile"):
        x.sum().backward()


FITS = """
import sys, torch, counterflow as cf
from registry import close, inputs, stir
from counterflow.engine import cpu, reference
with torch.no_grad():
    for hidden, activation in (((6,) * 5, "elu"), ((37, 70), "tanh"), ((9, 7), "relu")):
        t = stir(cf.Autoregressive(6, 2, hidden, activation=activation))
        y, c = inputs(t, 6)
        system, v, w = t._system(y, c), torch.randn_like(y), torch.randn_like(y[:, 0])
        solution = reference.forward_substitution(system, y)
        close(cpu.forward_substitution(system, y).x, solution.x)
        if sys.argv[1] == "both":
            u = [body.back_substitution(system, solution, v, w).u for body in (reference, cpu)]
            close(u[1], u[0])
"""


@pytest.mark.slow
def test_code_compiled_by_two_processes_can_be_linked(tmp_path):
    """Link code from disk with code compiled now: Numba links by names, and two processes may use one name twice."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    for which in ("forward", "both", "both"):
        ran = subprocess.run([sys.executable, "-c", FITS, which], env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr


PROBE = """
import torch
from counterflow.engine.cpu import compilation
from counterflow.engine.cpu.{helper} import value

def closed_over(sources):
    def kernel(pointer):
        _ = sources
        pointer[0] = value()
    return kernel

number = torch.zeros(1, dtype=torch.float64)
compilation.machine_code(closed_over(compilation.SOURCES), torch.float64)(number.data_ptr())
print(number.item())
"""


@pytest.mark.slow
def test_a_change_in_another_file_of_the_folder_compiles_again(tmp_path):
    """Keep the file of a kernel and change the file of a function that it calls."""
    package = tmp_path / "counterflow"
    shutil.copytree(Path(cf.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    folder = package / "engine" / "cpu"
    helper = folder / "helper.py"
    (folder / "probe.py").write_text(PROBE.format(helper=helper.stem))
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    for number in ("3.0", "3.0", "4.0"):
        lines = ["from counterflow.engine.cpu.compilation import compiled", "", "@compiled", "def value():"]
        helper.write_text("\n".join([*lines, f"    return {number}", ""]))
        command = [sys.executable, "-m", "counterflow.engine.cpu.probe"]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.stdout.strip() == number, ran.stderr
    [folder] = (tmp_path / "cache").iterdir()
    assert len(list(folder.glob("*.nbc"))) == 2  # one for each content of the helper: the second run compiled nothing
