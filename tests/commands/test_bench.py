"""counterflow bench: it compares like with like, what it says was measured, and it survives its peers."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from registry import over

import counterflow as cf
from counterflow.cli import main
from counterflow.commands.bench import command, report
from counterflow.commands.bench.peers import OURS, PEERS
from counterflow.commands.bench.report import Results
from counterflow.commands.bench.runner import Limits, Measured, Runner
from counterflow.commands.bench.session import not_installed
from counterflow.commands.bench.worker import (
    MEASUREMENTS,
    STACK,
    MeasurementError,
    Prepared,
    Request,
    Settings,
    Size,
    Worker,
    answer,
    prepare,
)

MIB = 2**20
TORCH = [name for name in (*OURS, *PEERS) if not (OURS | PEERS)[name].jax]
JAX = [name for name in PEERS if PEERS[name].jax]
D, H, B = 6, 16, 5
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells what is resident at most")


def affine_parameters(D, H):
    return D * H + H + H * H + H + 2 * D * H + 2 * D


def contestant(name):
    found = (OURS | PEERS)[name]
    if not found.installed:
        pytest.skip(f"{name} is not installed")
    return found


def flow_of(name, layers):
    flow = contestant(name).build(D, H, layers)
    with torch.no_grad():
        for weight in flow.module.parameters():
            weight.normal_(std=0.3)
    return flow


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("layers", [1, STACK])
@over(TORCH)
def test_the_sequential_direction_is_the_inverse_of_the_parallel_one(name, layers):
    flow, x = flow_of(name, layers), torch.randn(B, D)
    y, log_det = flow.parallel(x)
    back, inverse_log_det = flow.sequential(y)
    tolerance = 1e-3 * x.abs().max()
    assert y.shape == (B, D) and log_det.shape == (B,) and (y - x).abs().max() > 0.1
    assert (back - x).abs().max() < tolerance and (log_det + inverse_log_det).abs().max() < tolerance
    again, _ = flow.sequential(y + 0)  # nor from what it remembers of x
    assert (again - x).abs().max() < tolerance


@pytest.mark.filterwarnings("ignore")
@over(TORCH)
def test_the_layer_is_autoregressive_and_its_log_det_is_true(name):
    flow, x = flow_of(name, 1), torch.randn(B, D)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.parallel(x)[0].sum(0), x).movedim(1, 0)  # (B, D, D)
    somewhere = jacobian.abs().amax(0) > 0  # a relu may be zero in one row
    assert torch.equal(somewhere, torch.ones(D, D).tril().bool())
    assert (torch.linalg.slogdet(jacobian).logabsdet - flow.parallel(x)[1]).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", [1, STACK])
@over(TORCH)
def test_all_have_the_same_hidden_layers(name, layers):
    layer = affine_parameters(D, H) + ((23 - 2) * (D * H + D) if name == "counterflow spline" else 0)
    module = flow_of(name, layers).module
    assert sum(weight.numel() for weight in module.parameters()) == layers * layer


@pytest.mark.filterwarnings("ignore")
@over([name for name in TORCH if name in PEERS])
def test_parallel_is_one_pass_of_a_peer_and_sequential_is_d(name):
    flow, x, passes = flow_of(name, 1), torch.randn(B, D), []
    first = next(module for module in flow.module.modules() if isinstance(module, torch.nn.Linear))
    first.register_forward_hook(lambda *_: passes.append(1))
    flow.parallel(x)
    assert len(passes) == 1
    passes.clear()
    flow.sequential(x)
    assert len(passes) in (D, D + 1)  # some pass once more for the log_det


@pytest.mark.filterwarnings("ignore")
@over(MEASUREMENTS, "measurement")
@over(TORCH)
def test_each_name_calls_the_library_it_names(name, measurement):
    """Values come without a graph, and gradients are those of the input and of every weight."""
    prepared = prepare(contestant(name), Size(D, H, B), measurement)
    result = prepared.call()
    if not measurement.endswith("backward"):
        assert result[0].shape == (B, D) and not result[0].requires_grad
    else:
        assert result[0].shape == (B, D) and sum(part.numel() for part in result[1:]) == prepared.parameters
        assert all(part.isfinite().all() and part.abs().sum() > 0 for part in result)
    assert (prepared.error is None) == (measurement != "sequential")
    if prepared.error:
        assert 0 < prepared.error(result) < 1e-4  # of float32; exactly 0 were no inverse, but a memory of x


@pytest.mark.slow
@over(JAX)
def test_the_layer_on_jax(name):
    """Run JAX in a process of its own, as the benchmark does: it does not survive a fork, and it warns."""
    contestant(name)
    size, worker = Size(48, 64, 32), Worker(name, Settings(threads=1, memory=2**32))
    try:
        for measurement in ("parallel backward", "sequential backward"):
            worker.ask(Request(size, measurement, 1, watched=True), 300)
        parallel = worker.ask(Request(size, "parallel", 20, watched=True), 300)
        sequential = worker.ask(Request(size, "sequential", 20, watched=True), 300)
    except MeasurementError as error:
        if re.match("AttributeError: module 'jax|ImportError|ModuleNotFoundError", str(error)):
            pytest.skip(f"{name} does not import with this jax: {error}")
        raise
    finally:
        worker.close()
    assert 0 < sequential.error < 1e-4
    assert sequential.parameters == parallel.parameters == affine_parameters(size.D, size.H)
    assert min(sequential.seconds) > 4 * min(parallel.seconds)  # 48 passes against one
    assert parallel.compile > 0 and parallel.peak >= 4 * size.B * size.D


@linux
def test_peak_memory_is_what_a_call_takes_at_most():
    def twice():  # 32 MiB, freed, then 48 MiB of which a third is the result
        for _ in range(2):
            torch.ones(8 * MIB)
        return torch.ones(4 * MIB), torch.ones(8 * MIB).sum()

    twice()  # a first call loads parts of torch, which do not count
    request = Request(Size(1, 1, 1), "parallel", 1, watched=True)
    peaks = [answer(Prepared(twice, 0, None), request).peak for _ in range(3)]
    assert 47 * MIB < min(peaks) < 52 * MIB, (
        peaks
    )  # the lowest is reported: others may count memory that was freed late
    assert answer(Prepared(twice, 0, None), request._replace(watched=False)).peak is None


@pytest.mark.slow
def test_a_process_that_is_stopped_or_runs_out_of_memory_is_replaced():
    worker = Worker("counterflow", Settings(threads=1, memory=1024 * MIB))
    small, large = Size(4, 8, 8), Size(4, 1024, 1 << 19)  # 2 GiB for each hidden layer, which is too wide for a tile
    try:
        reply = worker.ask(Request(small, "parallel", 3, watched=True), 60)
        assert len(reply.seconds) == 3 and min(reply.seconds) > 0
        assert reply.parameters == affine_parameters(4, 8) and reply.compile is None
        with pytest.raises(MeasurementError, match=r"^over 0\.001 s$"):
            worker.ask(Request(large, "parallel", 1, watched=False), 0.001)
        if sys.platform == "linux":
            with pytest.raises(MeasurementError, match=r"^out of memory \(over 1 GiB\)$"):
                worker.ask(Request(large, "parallel", 1, watched=False), 60)
        with pytest.raises(MeasurementError, match=r"^ValueError: expected hidden\[0\] .* got 0$"):
            worker.ask(Request(Size(4, 0, 8), "parallel", 1, watched=False), 60)
        assert worker.ask(Request(small, "sequential", 1, watched=True), 60).error < 1e-5
    finally:
        worker.close()
    worker.close()  # a second time does no harm


@pytest.mark.slow
def test_a_contestant_over_the_budget_gets_one_call_and_no_larger_size():
    turns, steps = [], []
    settings, limits = Settings(threads=1, memory=2**32), Limits(repeats=4, budget=1e-9, cap=60)
    runner = Runner(["counterflow"], settings, limits, turns.append, lambda: steps.append(1))
    try:
        runner.warm_up()
        runner.compare(Size(3, 8, 4))
        runner.measure_growth([2, 3])
        runner.limits = limits._replace(budget=60)
        runner.compare(Size(2, 8, 4))
    finally:
        runner.close()
    assert runner.failed == {} and len(steps) == 1 + 5 + 2 * 4 + 5
    assert [(m.measurement, m.calls) for m in runner.results[:5]] == [(name, 1) for name in MEASUREMENTS]
    assert all(m.calls >= 4 for m in runner.results[5:])
    assert all(m.quartiles[0] <= m.seconds <= m.quartiles[1] for m in runner.results)
    first, second = runner.growth[:4], runner.growth[4:]
    assert all(m.seconds > 0 and m.size == (2, 4, 64) for m in first)
    assert all(re.fullmatch(r"not run: \d\.\d s at D = 2", m.failure) and m.seconds is None for m in second)


SIZE, WIDE = Size(64, 512, 256), Size(784, 1024, 100)
TIMES = {
    "parallel": 2.0,
    "parallel backward": 4.0,
    "stack backward": 9.0,
    "sequential": 3.0,
    "sequential backward": 5.0,
}


def measured(name, size, measurement, seconds, peak=10 * MIB):
    return Measured(name, size, measurement, seconds, (seconds, seconds), 3, peak=peak, parameters=1)


def results(*more, names=tuple(OURS), size=SIZE, **replaced):
    ours = [measured(name, size, m, replaced.get(m, seconds)) for name in names for m, seconds in TIMES.items()]
    return Results([*ours, *more])


def goal(found, what, name="affine"):
    (only,) = (a for a in found if (a.what, a.map) == (what, name))
    return only


def test_ratios_of_the_directions():
    found = report.goals(results())
    assert len(found) == 9  # three maps, without peers
    forward = goal(found, "sequential / parallel")
    assert (forward.value, forward.bound, forward.met, round(forward.slack, 6)) == (1.5, 1.2, False, 0.8)
    assert goal(found, "sequential / parallel", "spline").met  # of which more is allowed
    assert goal(found, "sequential / parallel, backward").value == 1.25
    assert goal(found, "sequential / parallel, backward, memory", "gated").value == 1.0


def test_too_little_memory_makes_no_ratio():
    few = measured("counterflow", SIZE, "parallel backward", 4.0, peak=MIB // 2)
    assert sum("memory" in a.what for a in report.goals(results(few))) == 2


def test_the_fastest_peer_that_finished_counts():
    peers = [
        measured("zuko", SIZE, "sequential", 90.0),
        measured("pyro", SIZE, "sequential", 45.0),
        Measured("nflows", SIZE, "sequential", failure="over 90 s"),
        measured("zuko", SIZE, "stack backward", 6.0),
    ]
    found = report.goals(results(*peers))
    lead = goal(found, "sequential, fastest peer / ours, D = 64")
    assert (lead.value, lead.bound, lead.at_most, lead.met, lead.slack) == (15.0, 20, False, False, 0.75)
    assert goal(found, "five layers, ours / fastest peer").value == 1.5
    assert not any("H >= 1024" in a.what for a in found)
    wide = report.goals(results(measured("zuko", WIDE, "stack backward", 18.0), size=WIDE))
    assert goal(wide, "five layers, fastest peer / ours, H >= 1024").met
    sheet = report.peers_table(results(*peers), "sequential", "Solve")
    assert sheet.header == ["D/H/B", "counterflow", "zuko", "pyro", "nflows"]
    assert sheet.rows == [["64/512/256", "3,000", "30", "15", "over 90 s"]]


def test_the_worst_ratio_stands_in_the_table():
    both = [m for size, s in ((SIZE, 2.1), (WIDE, 2.6)) for m in [measured("counterflow", size, "sequential", s)]]
    both += [measured("counterflow", size, "parallel", 2.0) for size in (SIZE, WIDE)]
    sheet = report.goals_table(report.goals(Results(both)))
    assert sheet.rows == [["sequential / parallel", "affine", "at most 1.2", "1.30", "784/1024/100", "1/2"]]
    assert sheet.markdown().splitlines()[2:4] == [
        "| ratio | map | goal | worst | at | met |",
        "| --- | --- | --- | --- | --- | --- |",
    ]


@over([1.0, 2.0, 2.9], "power")
def test_the_exponent_of_a_power_law(power):
    D, noise = np.array([64, 128, 256, 512, 1024]), np.exp(np.random.default_rng(0).normal(0, 0.01, 5))
    assert report.exponent(D, 3e-6 * D**power) == pytest.approx(power, abs=1e-9)
    assert report.exponent(D, 3e-6 * D**power * noise) == pytest.approx(power, abs=0.02)
    assert math.isnan(report.exponent(D[:1], [1.0]))


def test_the_growth_leaves_out_what_was_not_run():
    grown = [measured("counterflow", Size(d, 2 * d, 64), "sequential", 1e-6 * d**2) for d in (64, 128, 256)]
    grown.append(Measured("counterflow", Size(512, 1024, 64), "sequential", failure="not run"))
    came = Results(grown)
    assert report.exponents(came)["counterflow"]["sequential"] == pytest.approx(2)
    assert report.series(came, "counterflow", "sequential", "seconds")[0] == [64, 128, 256]
    assert report.growth_table(came).rows[1] == [
        "counterflow",
        "sequential",
        "4.10",
        "16.38",
        "65.54",
        "not run",
        "2.00",
    ]


SOURCE = str(Path(cf.__file__).parents[1])
TINY = shlex.split("bench --sizes 3/8/5 64/64/2 --growth 2 4 --repeats 1 --budget 0.5 --threads 1 --no-first-calls")


@pytest.mark.slow
def test_a_run_of_the_real_command(tmp_path):
    (tmp_path / "broken" / "zuko").mkdir(parents=True)
    (tmp_path / "broken" / "zuko" / "__init__.py").write_text("raise AttributeError('made for another torch')")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "broken"), SOURCE])
    command = [sys.executable, "-m", "counterflow.cli", *TINY, "--peers", "nflows", "zuko", "--out", "run"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr and "zuko was left out: AttributeError: made for another torch" in ran.stderr
    assert "Ratios and their goals" in ran.stdout and "run/bench.md" in ran.stdout
    run = tmp_path / "run"
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    written = {"config.json", "bench.json", "summary.json", "bench.md", "report.html"}
    assert files == written | {"plots/time.png", "plots/memory.png"}
    for path in (run / "plots").iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 1

    peers = ["nflows"] if PEERS["nflows"].installed else []
    bench, summary = (json.loads((run / name).read_text()) for name in ("bench.json", "summary.json"))
    assert bench["machine"]["threads"] == 1 and bench["machine"]["torch"] == torch.__version__
    names = {(m["contestant"], tuple(m["size"]), m["measurement"]) for m in bench["measured"]}
    assert len(names) == len(bench["measured"]) == 2 * (4 * 3 + 1 + 5 * len(peers))
    assert all(m["seconds"] > 0 and m["calls"] >= 1 and not m["failure"] for m in bench["measured"])
    assert all(m["error"] < 1e-4 for m in bench["measured"] if m["measurement"] == "sequential")
    assert {m["contestant"] for m in bench["growth"]} == {"counterflow", *peers}
    assert summary["failed"] == {"zuko": "AttributeError: made for another torch"}
    assert set(summary["not installed"]) == {"nflows"} - set(peers)
    assert set(summary["exponents"]) == {"counterflow", *peers}
    assert {a["size"] for a in summary["aims"]} == {"3/8/5", "64/64/2"}
    page = (run / "bench.md").read_text()
    assert all(words in page for words in ("## Growth with D", "## D = 64, H = 64, B = 2", "torch", "zuko was left"))


def test_the_options_name_every_peer():
    assert tuple(PEERS) == command.PEERS


def test_a_peer_that_is_not_installed_is_named_with_its_remedy(monkeypatch):
    for module in ("nflows", "flowjax", "tensorflow_probability"):
        monkeypatch.setitem(sys.modules, module, None)
    assert not_installed(["nflows", "flowjax", "tfp"]) == {
        "nflows": "pip install 'counterflow[bench]'",
        "flowjax": "pip install 'counterflow[bench-jax]'",
        "tfp": "pip install 'tensorflow-probability'",
    }


BAD = {
    "unknown peer": ("--peers nflows torchflows", "expected peers out of nflows, normflows, .*, got torchflows"),
    "sizes with commas": ("--sizes 64,512,256", "expected sizes D/H/B .* such as 64/512/256, got '64,512,256'"),
    "two sizes": ("--sizes 8/64/256 64/512", "expected sizes D/H/B .* got '64/512'"),
    "words": ("--sizes a/b/c", "expected sizes D/H/B .* got 'a/b/c'"),
    "no rows": ("--sizes 8/64/0", "expected sizes D/H/B .* got '8/64/0'"),
    "one feature": ("--sizes 1/64/8", "with D of at least 2.* got '1/64/8'"),
    "growth": ("--growth 64 1", "expected growth of at least 2, got 1"),
    "threads": ("--threads 0", "expected threads of at least 1, got 0"),
    "repeats": ("--repeats 0", "expected repeats of at least 1, got 0"),
    "budget": ("--budget 0", "expected budget above 0, got 0"),
    "cap": ("--cap nan", "expected cap above 0, got nan"),
    "memory": ("--memory -1", "expected memory above 0, got -1"),
    "run folder that exists": ("--out old", "expected a new folder for the run, got old, which exists"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine").touch()
    assert main(["bench", *shlex.split(arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("counterflow: ")
    assert re.search(message, err), err
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["old", "old/mine"]
