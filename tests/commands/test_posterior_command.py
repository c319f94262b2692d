"""counterflow posterior as a user meets it: a model in, a verdict and a run folder out, and common mistakes."""

import json
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import files
from PIL import Image
from pyarrow import parquet
from registry import over

import counterflow as cf
from counterflow import plots
from counterflow.cli import main
from counterflow.commands.model_file import load_target
from counterflow.commands.model_names import split_name
from counterflow.commands.posterior_plots import discrepancy, expected_discrepancy

QUICK = shlex.split("--stages 1 --steps 30 --layers 1 --samples 32 --verdict-samples 1000 --starts 2")
FILES = {
    *("config.json", "metrics.jsonl", "summary.json", "report.html", "posterior.nc", "draws.parquet"),
    *("model.safetensors", "draws.safetensors", "posterior.json"),
    *("plots/marginals.png", "plots/pairs.png", "plots/elbo.png", "plots/weights.png"),
}
KEYS = {"model", "verdict", "trusted", "k_hat", "ess", "samples", "elbo", "seconds", "stopped", "table"}

TORCH = """
import torch
import counterflow as cf

CONSTANT = 3

def banana(theta):
    x, y = theta.unbind(-1)
    return -(x.square() + (y - x.square()).square()) / 2
banana.dim = 2

def normal(theta, y, sd=1.0):
    return -((theta - y) / sd).square().sum(-1) / 2

def built(y):
    return cf.targets.from_torch(lambda mu: -(mu[:, None] - y).square().sum(-1), shapes={"mu": ()})

def built_with_tensors(y):
    return built(torch.as_tensor(y))

finished = cf.targets.from_torch(normal, shapes={"theta": (1,), "y": (1,)})

def modes(theta):
    return torch.logaddexp(-(theta - 8).square().sum(-1) / 2, -(theta + 8).square().sum(-1) / 2)
modes.dim = 1

def model_of(y, width):
    def log_density(mu):
        return -mu.square() / 2 - ((mu[:, None] - y) / width).square().sum(-1) / 2
    def simulate(seed):
        generator = torch.Generator().manual_seed(seed)
        mu = torch.randn((), generator=generator).double()
        return {"mu": mu}, model_of(mu + torch.randn(3, generator=generator).double(), width)
    return cf.targets.from_torch(log_density, shapes={"mu": ()}, simulate=simulate)
simulated = model_of(torch.zeros(3).double(), 1.0)
too_narrow = model_of(torch.zeros(3).double(), 0.3)

def nowhere(theta):
    return theta.sum(-1) * float("nan")
nowhere.dim = 2

def scalar(theta):
    return theta.sum()
scalar.dim = 2

def wrong(theta):
    size = 3
    return theta @ torch.ones(size)
wrong.dim = 2

def listed(theta):
    return [0.0]
listed.dim = 2

def picky(theta):
    if theta.abs().max() > 2:
        raise RuntimeError("too far")
    return -theta.square().sum(-1)
picky.dim = 2
"""
PYMC = """
import pymc as pm

def schools(y, sigma):
    with pm.Model(coords={"school": range(len(y))}) as model:
        mu = pm.Normal("mu", 0, 5)
        tau = pm.HalfNormal("tau", 5)
        theta = pm.Normal("theta", mu, tau, dims="school")
        pm.Normal("y", theta, sigma, observed=y, dims="school")
    return model

with pm.Model() as finished:
    pm.Normal("y", pm.Normal("mu"), 1, observed=[0.1, 1.0])

def counts():
    with pm.Model() as model:
        pm.Poisson("k", 3)
    return model

def impossible():
    with pm.Model() as model:
        pm.Exponential("y", pm.HalfNormal("rate"), observed=-1.0)
    return model

def forgotten():
    with pm.Model():
        pm.Normal("mu")
"""
PYRO = """
import {0}
import {0}.distributions as dist

def schools(y, sigma):
    mu = {0}.sample("mu", dist.Normal(0, 5))
    tau = {0}.sample("tau", dist.HalfNormal(5.0))
    with {0}.plate("school", len(y)):
        theta = {0}.sample("theta", dist.Normal(mu, tau))
        {0}.sample("y", dist.Normal(theta, sigma), obs=y)

def prior():
    return schools_of(dist.Normal(0, 5))

def schools_of(d):
    {0}.sample("mu", d)

def discrete():
    {0}.sample("k", dist.Poisson(3.0))
"""
STAN = """
data { int J; vector[J] y; vector[J] sigma; }
parameters { real mu; real<lower=0> tau; vector[J] z; }
model { mu ~ normal(0, 5); tau ~ normal(0, 5); z ~ std_normal(); y ~ normal(mu + tau * z, sigma); }
"""
Y, SIGMA = [28, 8, -3, 7], [15, 10, 16, 11]


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """The command in this process, in tmp_path with its models: arguments -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    write_models(tmp_path)

    def run(*arguments):
        try:
            code = main(["posterior", *map(str, arguments)])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    yield run
    sys.modules.pop("mine", None)  # which one test imports from its folder


def write_models(folder):
    texts = {
        "mine.py": TORCH,
        "mine_pymc.py": PYMC,
        "mine_pyro.py": PYRO.format("pyro"),
        "mine_numpyro.py": PYRO.format("numpyro"),
        "schools.stan": STAN,
        "syntax.py": "def model(:\n    pass\n",
        "divides.py": "\nx = 1 / 0\n",
        "lacks.py": "import a_package_that_nobody_has\nx = a_package_that_nobody_has.Model()\n",
        "exits.py": "raise SystemExit('usage: model.py')\ndef x(): ...\n",
        "schools.json": json.dumps({"y": Y, "sigma": SIGMA}),
        "stan.json": json.dumps({"J": 4, "y": Y, "sigma": SIGMA}),
        "unequal.json": json.dumps({"y": Y, "sigma": SIGMA[1:]}),
        "names.json": json.dumps({"y": Y, "sd": SIGMA}),
        "y.json": json.dumps({"y": [1.0, 2.0, 3.0]}),
        "broken.json": '{"y": [1, 2,}',
        "list.json": "[1, 2]",
        "notes.txt": "mine",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "old").mkdir()
    (folder / "old" / "mine.txt").write_text("mine")


def everything(folder):
    paths = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}


def summary(run):
    return json.loads((run / "summary.json").read_text())


def rows(run):
    return {row["variable"]: row for row in summary(run)["table"]}


def test_without_arguments_it_fits_the_eight_schools(posterior_run):
    run, ran = posterior_run
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr and "eight-schools: 10 dimensions (mu, tau, z)" in ran.stderr
    assert "stage 1: 100 steps" in ran.stderr and "k-hat" in ran.stderr and "ELBO" in ran.stderr
    assert "theta[7]" in ran.stdout and summary(run)["verdict"] in ran.stdout and "schools/plots" in ran.stdout
    assert files(run) == FILES


def test_the_summary_of_a_run(posterior_run):
    found = summary(posterior_run[0])
    assert found.keys() >= KEYS and found["model"] == "eight-schools" and found["stopped"] == "finished"
    assert found["trusted"] and found["k_hat"] < 0.7 and found["ess"] > 2_000 and found["samples"] == 4_000
    # mean 4.4 and sd 3.3 of mu, mean 3.6 and sd 3.2 of tau by posteriordb's reference draws
    table = rows(posterior_run[0])
    assert table["mu"]["mean"] == pytest.approx(4.4, abs=0.4) and table["mu"]["sd"] == pytest.approx(3.3, abs=0.4)
    assert table["tau"]["mean"] == pytest.approx(3.6, abs=0.4) and table["tau"]["5%"] < 1 < table["tau"]["95%"]
    assert len(table) == 18 and all(row["ess"] > 500 for row in table.values())


def test_the_draws_of_a_run(posterior_run):
    import arviz

    data = arviz.from_netcdf(posterior_run[0] / "posterior.nc")
    table = parquet.read_table(posterior_run[0] / "draws.parquet")
    assert data["posterior"]["theta"].shape == (1, 500, 8) and list(data["posterior"]["school"].values) == [*"ABCDEFGH"]
    assert table.num_rows == 500 and table.column_names == list(rows(posterior_run[0]))
    assert np.array_equal(table["theta[3]"].to_numpy(), data["posterior"]["theta"].values[0, :, 3])
    theta = table["mu"].to_numpy() + table["tau"].to_numpy() * table["z[3]"].to_numpy()
    assert theta == pytest.approx(table["theta[3]"].to_numpy())


def test_a_run_is_loaded_again(posterior_run):
    posterior = cf.Posterior.load(posterior_run[0])
    found = summary(posterior_run[0])
    assert (posterior.k_hat, posterior.ess) == pytest.approx((found["k_hat"], found["ess"]))
    assert posterior.sample(7)["theta"].shape == (7, 8)
    assert cf.load(posterior_run[0] / "model.safetensors").features == 10


def test_the_configuration_and_the_metrics_of_a_run(posterior_run):
    config = json.loads((posterior_run[0] / "config.json").read_text())
    assert (config["command"], config["model"], config["fit"]["steps"]) == ("posterior", "eight-schools", 100)
    stages = [json.loads(line) for line in (posterior_run[0] / "metrics.jsonl").read_text().splitlines()]
    assert [stage["stage"] for stage in stages] == list(range(1, summary(posterior_run[0])["stages"] + 1))
    assert len(stages[0]["elbos"]) == 4 and all(map(math.isfinite, stages[0]["elbos"]))


def test_the_pictures_of_a_run(posterior_run):
    for path in (posterior_run[0] / "plots").iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 1


KINDS = {
    "torch": ("mine.py:banana", "theta[0] theta[1]"),
    "torch, --dim": ("mine.py:normal --dim 3 --data y.json", "theta[0] theta[1] theta[2]"),
    "a function that returns a target": ("mine.py:built_with_tensors --data y.json", "mu"),
}
SLOW = {
    "function that returns a PyMC model": (
        "mine_pymc.py:schools --data schools.json",
        "mu tau theta[0] theta[1] theta[2] theta[3]",
    ),
    "PyMC model": ("mine_pymc.py:finished", "mu"),
    "Pyro": ("mine_pyro.py:schools --data schools.json", "mu tau theta[0] theta[1] theta[2] theta[3]"),
    "NumPyro": ("mine_numpyro.py:schools --data schools.json", "mu tau theta[0] theta[1] theta[2] theta[3]"),
    "Stan": ("schools.stan --data stan.json", "mu tau z[0] z[1] z[2] z[3]"),
}
NEEDS = {"PyMC model": "pymc", "Pyro": "pyro", "NumPyro": "numpyro", "Stan": "httpstan"}
NEEDS["function that returns a PyMC model"] = "pymc"


def check_kind(here, arguments, names, folder):
    code, out, err = here(*arguments.split(), *QUICK, "--out", "run")
    assert code == 0, err
    wanted = FILES - {"plots/pairs.png"} if names == "mu" else FILES  # one coordinate has no pairs
    assert files(folder / "run") == wanted and list(rows(folder / "run")) == names.split()
    assert summary(folder / "run")["verdict"] in out
    assert all(name in out for name in names.split())


@over(KINDS, "kind", quick=["a function that returns a target"])
def test_models_in_torch(kind, here, tmp_path):
    check_kind(here, *KINDS[kind], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
def test_models_of_other_tools(kind, here, tmp_path):
    pytest.importorskip(NEEDS[kind])
    check_kind(here, *SLOW[kind], tmp_path)


def test_data_reach_the_model(here, tmp_path):
    assert here("mine.py:normal", "--dim", 3, "--data", "y.json", *QUICK, "--out", "run")[0] == 0
    means = [row["mean"] for row in rows(tmp_path / "run").values()]
    assert means == pytest.approx([1, 2, 3], abs=0.15)


@pytest.mark.slow
def test_chains_through_the_flow_are_reported(here, tmp_path):
    code, out, _ = here("mine.py:banana", *QUICK, "--refine", "imh", "-n", 400, "--out", "run")
    refined = summary(tmp_path / "run")["refined"]
    assert code == 0 and refined["sentence"] in out and (tmp_path / "run" / "refined.nc").exists()
    assert refined["r_hat"] > 0.9 and refined["divergences"] == 0 and refined["evaluations"] > 400


@pytest.mark.slow
def test_the_same_seed_the_same_draws(here, tmp_path, monkeypatch):
    monkeypatch.setattr("counterflow.commands.posterior_plots.plot_run", lambda *_: None)  # only time
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert here("mine.py:banana", *QUICK, "--seed", seed, "--out", name)[0] == 0
    a, b, c = (parquet.read_table(tmp_path / name / "draws.parquet") for name in "abc")
    assert a.equals(b) and not a.equals(c)


def test_a_file_may_import_its_neighbour_and_have_the_name_of_a_package(here, tmp_path):
    (tmp_path / "torch.py").write_text("from mine import banana\nimport torch\nfive = torch.tensor(5)\n")
    assert load_target("torch.py:banana", None, None, None).dim == 2
    assert sys.modules["torch"] is torch


@pytest.mark.parametrize(("package", "code"), [("pyro", "import pyro"), ("numpyro", "from numpyro import sample")])
def test_the_tool_is_detected_from_what_a_function_calls(package, code, here, tmp_path):
    pytest.importorskip(package)
    from counterflow.commands.model_file import _import_file
    from counterflow.commands.model_tool import find_tool

    call = f"{package}.sample" if "import " + package in code else "sample"
    (tmp_path / "told.py").write_text(
        f"import torch\n{code}\ndef inner():\n    return {call}('x', None)\ndef outer():\n    return inner()\n"
        f"def local():\n    import {package}\n    return {package}.sample\n"
    )
    module = _import_file(Path("told.py"))
    assert [find_tool(function) for function in (module.inner, module.outer, module.local)] == [package] * 3


def test_a_bad_verdict_is_printed_on_stderr_and_the_exit_code_is_0(here, tmp_path):
    code, out, err = here("mine.py:modes", *QUICK, "--modes", "1", "--out", "run")
    verdict = summary(tmp_path / "run")["verdict"]
    assert code == 0 and "cannot be trusted" in verdict and not summary(tmp_path / "run")["trusted"]
    assert verdict in out and f"counterflow: {verdict}" in err and "not corrected" in err


def test_two_modes_are_reported(here, tmp_path):
    code, out, _ = here("mine.py:modes", *QUICK, "--out", "run")
    weights = summary(tmp_path / "run")["mode_weights"]
    assert code == 0 and weights == pytest.approx([0.5, 0.5], abs=0.05) and summary(tmp_path / "run")["trusted"]
    assert "2 modes, each with a flow of its own, of weights 0." in out
    assert "weights of the modes" in (tmp_path / "run" / "report.html").read_text()


CALIBRATED = ("config.json", "metrics.jsonl", "summary.json", "report.html", "ranks.parquet", "plots/ranks.png")


def test_calibration_by_simulated_data(here, tmp_path):
    code, out, err = here("mine.py:simulated", *QUICK, "--calibrate", "12", "--processes", "1", "--out", "run")
    assert code == 0, err
    found = summary(tmp_path / "run")
    assert found["calibrated"] and found["replications"] == 12 and found["calibration"] in out
    assert [row["variable"] for row in found["table"]] == ["mu"] and files(tmp_path / "run") == set(CALIBRATED)
    ranks = parquet.read_table(tmp_path / "run" / "ranks.parquet").column("mu").to_numpy()
    assert len(ranks) == 12 and (ranks > 0).all() and (ranks < 1).all()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 12


@pytest.mark.slow
def test_calibration_of_a_wrong_model_finds_it(here, tmp_path):
    code, out, err = here("mine.py:too_narrow", *QUICK, "--calibrate", "40", "--processes", "1", "--out", "run")
    assert code == 0 and not summary(tmp_path / "run")["calibrated"]
    assert "The posteriors are not calibrated in 40 simulated data sets" in out and "not calibrated" in err


@pytest.mark.slow
def test_calibration_in_processes_gives_the_same_ranks(here, tmp_path):
    for processes in (1, 2):
        run = str(tmp_path / f"run{processes}")
        code, _, err = here("mine.py:simulated", *QUICK, "--calibrate", 4, "--processes", processes, "--out", run)
        assert code == 0, err
    one, two = (parquet.read_table(tmp_path / f"run{n}" / "ranks.parquet").column("mu").to_pylist() for n in (1, 2))
    assert one == two


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibrate", "1"], "expected --calibrate to be at least 2 data sets, got 1"),
        (["--processes", "2"], "expected --processes only with --calibrate"),
        (["--calibrate", "5", "--processes", "0"], "expected --processes to be at least 1, got 0"),
        (["--calibrate", "5", "--refine", "imh"], "expected --calibrate without --refine, --resume and --tracker"),
        (["--calibrate", "5"], "expected a model from which parameters and data can be drawn"),
    ],
)
def test_calibration_that_cannot_be_done(here, options, message):
    code, _, err = here("mine.py:banana", *options)
    assert code == 2 and message in err and "Traceback" not in err


def test_the_discrepancy_finds_the_pair_that_the_weights_couple():
    x = np.random.default_rng(0).normal(size=(20_000, 4))
    weights = 1 + np.tanh(2 * x[:, 1] * x[:, 3])  # which says nothing of either alone
    weights /= weights.sum()
    found = discrepancy(x, weights)
    assert found.pairs[0][:2] == (1, 3) and found.pairs[0][2] > 0.1 and len(found.pairs) == 6
    assert found.pairs[1][2] < 3 * expected_discrepancy(weights) and (found.marginals < 0.06).all()


def test_the_discrepancy_is_a_fraction_of_the_mass():
    x = np.random.default_rng(0).normal(size=(60_000, 2))
    upper = x[:, 0] > 0
    found = discrepancy(x, upper / upper.sum())  # half of the draws are where no mass is
    assert found.marginals[0] == pytest.approx(0.5, abs=0.09)  # a cell of the middle has both
    equal = discrepancy(x, np.full(60_000, 1 / 60_000))
    assert equal.pairs[0][2] < 1e-12 and expected_discrepancy(np.full(60_000, 1 / 60_000)) < 1e-9
    assert discrepancy(x[:, :1], upper / upper.sum()).pairs == []


def test_the_expected_discrepancy_is_that_of_independent_weights():
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=10_000)
    weights /= weights.sum()
    shares = [share for _, _, share in discrepancy(rng.normal(size=(10_000, 12)), weights).pairs]
    assert np.mean(shares) == pytest.approx(expected_discrepancy(weights), rel=0.1)


RNG = np.random.default_rng(0)
EVEN = np.full(200, 1 / 200)


def marginal(draws):
    return plots.MarginalPanel("mu", draws, EVEN, "note")


def cross(approximation, posterior):
    return plots.PairPanel(("mu", "log(tau)"), approximation, posterior, "note")


def curve(*elbo):
    return plots.StageCurve("1", 3, elbo, "note")


PICTURES = {
    "one marginal": lambda path: plots.marginals(path, [marginal(RNG.normal(size=200))], "title"),
    "a constant": lambda path: plots.marginals(path, [marginal(np.ones(200))] * 5, "title"),
    "one pair": lambda path: plots.posterior_pairs(path, [cross(*RNG.normal(size=(2, 9, 2)))], "title"),
    "a pair of points": lambda path: plots.posterior_pairs(path, [cross(np.ones((1, 2)), np.ones((1, 2)))], "title"),
    "stages with gaps": lambda path: plots.stage_curves(path, [curve(np.nan, -np.inf, 2.0)] * 5),
    "nothing finite": lambda path: plots.stage_curves(path, [curve(np.nan)]),
    "no course": lambda path: plots.stage_curves(path, [curve()]),
    "equal weights": lambda path: plots.weight_tail(path, np.zeros(200), np.log(EVEN), "k-hat 0"),
    "weights of zero": lambda path: plots.weight_tail(path, *[np.r_[-np.inf, RNG.normal(size=199)]] * 2, "k-hat 0.1"),
    "one weight": lambda path: plots.weight_tail(path, *[np.r_[0.0, np.full(199, -np.inf)]] * 2, "k-hat inf"),
}  # fmt: skip


@over(PICTURES, quick=["one pair", "stages with gaps", "weights of zero", "a constant"])
def test_pictures_of_unusual_posteriors(name, tmp_path):
    path = PICTURES[name](tmp_path / "plots" / "picture.png")
    with Image.open(path) as picture:
        assert min(picture.size) > 100 and np.asarray(picture.convert("L")).std() > 1


def test_ctrl_c_in_a_stage_keeps_its_result(here, tmp_path):
    (tmp_path / "pressed.py").write_text(
        "steps = 0\ndef model(theta):\n    global steps\n    steps += len(theta) == 37\n"
        "    if len(theta) == 37 and steps == 9:\n        raise KeyboardInterrupt\n"
        "    return -theta.square().sum(-1)\nmodel.dim = 2\n"
    )
    code, _, err = here("pressed.py:model", *QUICK, "--samples", 37, "--out", "run")
    assert code == 130 and "interrupted" in err and summary(tmp_path / "run")["stopped"] == "interrupted"
    assert files(tmp_path / "run") == FILES and "(interrupted)" in err


def test_ctrl_c_before_the_first_stage_leaves_no_files(here, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("counterflow.posterior.fit.initial_gaussians", interrupt)
    code, _, err = here("mine.py:banana", *QUICK, "--out", "run")
    assert code == 130 and err.endswith("interrupted\n") and not (tmp_path / "run").exists()


def test_an_error_during_the_fit_leaves_no_files(here, tmp_path):
    before = everything(tmp_path)
    code, _, err = here("mine.py:picky", *QUICK, "--out", "run")
    assert code == 2 and "Traceback" not in err
    assert re.search(r"expected mine.py to run, got RuntimeError: too far.* \(line \d+ of mine.py: raise Run", err), err
    assert everything(tmp_path) == before and not (tmp_path / "run").exists()


BAD = {
    "missing file": ("nowhere.py:model", "expected a file with a model, got nowhere.py, which does not exist"),
    "a folder": ("old.py:model", "expected a file with a model, got old.py, which does not exist"),
    "another kind of file": ("notes.txt:model", "expected a model as FILE.py:NAME or FILE.stan, got notes.txt:model"),
    "no name": ("mine.py", "expected mine.py:NAME, got no name; it holds banana, normal, built"),
    "no such name": ("mine.py:bananas", "got bananas, which is not there; it holds banana, normal, built, .*finished"),
    "no model": ("mine.py:CONSTANT", "expected mine.py:CONSTANT to be a model or a function, got int"),
    "syntax": ("syntax.py:model", r"expected syntax.py to run, got SyntaxError: .*\(line 1 of syntax.py: def mod"),
    "an error in the file": ("divides.py:x", r"got ZeroDivisionError: division by zero \(line 2 of divides.py: x = 1"),
    "a file that exits": ("exits.py:x", "expected exits.py to run, got SystemExit: usage: model.py"),
    "a missing package": ("lacks.py:x", "expected a_package_that_nobody_has, which is not installed; pip install a_"),
    "missing data file": ("mine.py:built --data no.json", "expected a JSON file after --data, got no.json, which does"),
    "broken JSON": ("mine.py:built --data broken.json", "expected broken.json to be JSON, .*: Expecting value: line 1"),
    "a list": ("mine.py:built --data list.json", r'expected an object like {"y": \[1, 2\]} in list.json, got list'),
    "data are missing": ("mine.py:built", "expected data y, as mine.py:built takes them, got none; give --data FILE"),
    "other data": ("mine.py:built --data names.json", "as mine.py:built takes them, got y, sd; name them so in"),
    "strange data": ("mine.py:banana --data y.json", "expected data of no name, as mine.py:banana takes them, got y"),
    "data for a finished model": ("mine.py:finished --data y.json", "expected no --data, as mine.py:finished is a mod"),
    "starting values": ("mine.py:banana --inits y.json", "expected starts for some of theta, got y"),
    "no dim": ("mine.py:normal --data y.json", "expected a function whose tool can be found, got mine.py:normal"),
    "dim of a target": ("mine.py:built_with_tensors --data y.json --dim 3", "expected --dim only for a log density"),
    "never finite": ("mine.py:nowhere", "expected a finite log density and gradient at one of 100 random points"),
    "a scalar": ("mine.py:scalar", r"expected a log density of shape \(\d+,\), one for each row of theta, got \(\)"),
    "a list for a tensor": ("mine.py:listed", "expected the log density to be a .*tensor.*, got list"),
    "a model that raises": ("mine.py:wrong", r"got RuntimeError: size mismatch.*\(line \d+ of mine.py: return theta @"),
    "a returned array": ("mine.py:built --data y.json", r"\(line \d+ of mine.py: return cf.targets.from_torch"),
    "folder that exists": ("mine.py:banana --out old", "expected a new folder for the run, got old, which exists"),
    "n": ("mine.py:banana -n 0", "expected -n to be at least 1, got 0"),
    "stages": ("mine.py:banana --stages 0", "expected stages of at least 1, got 0"),
    "flags with the default": ("--dim 3", "expected --data, --tool and --dim only with a model of yours"),
}  # fmt: skip
BAD_TOOLS = {
    "PyMC data": ("pymc", "mine_pymc.py:schools", "expected data y, sigma, as mine_pymc.py:schools takes them"),
    "PyMC names": ("pymc", "mine_pymc.py:schools --data names.json", "got y, sd; name them so in the file after"),
    "PyMC shapes": ("pymc", "mine_pymc.py:schools --data unequal.json", "expected mine_pymc.py to run, got ValueError"),
    "PyMC finished": ("pymc", "mine_pymc.py:finished --dim 3", "expected --dim only for a log density in torch, got 3"),
    "PyMC discrete": ("pymc", "mine_pymc.py:counts", "expected continuous free variables, got k, which is discrete"),
    "PyMC impossible": ("pymc", "mine_pymc.py:impossible", "random points .* got none; log p of y is -inf"),
    "PyMC not returned": ("pymc", "mine_pymc.py:forgotten", "to return a PyMC model or a target, got NoneType"),
    "dim": ("pymc", "mine_pymc.py:schools --data schools.json --dim 3", "expected --dim only for a log density"),
    "Pyro discrete": ("pyro", "mine_pyro.py:discrete", "expected continuous variables, got k, which is discrete"),
    "Pyro shapes": ("pyro", "mine_pyro.py:schools --data unequal.json", "size of tensor a|expected data that fit"),
    "NumPyro discrete": ("numpyro", "mine_numpyro.py:discrete", "expected continuous variables, got k, which is discr"),
    "NumPyro shapes": ("numpyro", "mine_numpyro.py:schools --data unequal.json", "Incompatible shapes for broadcasti"),
}  # fmt: skip


def check_refused(here, line, message, folder):
    before = everything(folder)
    code, out, err = here(*QUICK, *shlex.split(line))
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1 and err.startswith("counterflow: ")
    assert re.search(message, err), err
    assert everything(folder) == before and not (folder / "runs").exists()


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(line, message, here, tmp_path):
    check_refused(here, line, message, tmp_path)


@pytest.mark.tools
@pytest.mark.parametrize(("package", "line", "message"), BAD_TOOLS.values(), ids=BAD_TOOLS)
def test_bad_input_of_modelling_tools_ends_in_one_line(package, line, message, here, tmp_path):
    pytest.importorskip(package)
    check_refused(here, line, message, tmp_path)


@pytest.mark.parametrize(("module", "extra"), [("xarray", "posterior"), ("pyarrow", "data"), ("matplotlib", "plots")])
def test_a_missing_package_is_named_before_the_fit(module, extra, here, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    check_refused(here, "mine.py:banana", rf"expected {module}.*pip install 'counterflow\[{extra}\]'", tmp_path)


def test_a_missing_tool_is_named(here, tmp_path, monkeypatch):
    pytest.importorskip("pymc")
    monkeypatch.setitem(sys.modules, "pymc", None)
    check_refused(here, "mine_pymc.py:schools", r"expected pymc.*pip install 'counterflow\[pymc\]'.*line 2", tmp_path)


def test_names_of_files_and_models():
    here = str(Path(__file__))
    assert split_name(f"{here}:model") == (Path(here), "model") and split_name(here) == (Path(here), "")


@pytest.mark.slow
def test_a_disk_without_room_for_the_draws(here, tmp_path, monkeypatch):
    def full(path):
        return SimpleNamespace(free=1000)

    monkeypatch.setattr("counterflow.commands.preflight.check_space", lambda folder: None)
    monkeypatch.setattr("shutil.disk_usage", full)
    code, _, err = here(*QUICK, "--out", "run")
    assert code == 2 and "expected free space on the disk to write run, got none; free some" in " ".join(err.split()), (
        err
    )
    assert "continue with --resume run" in " ".join(err.split()) and not (tmp_path / "run" / "posterior.nc").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert here("--resume", "run")[0] == 0 and (tmp_path / "run" / "posterior.nc").is_file()


def test_a_package_that_writes_the_results_is_checked_before_the_fit(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    code, _, err = here(*QUICK, "--out", "run")
    assert code == 2 and "expected h5py for posterior.nc, got: " in err and not Path("run").exists()
