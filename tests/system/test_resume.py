"""Runs that are ended and go on, through the real command line."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from command_line import COMMAND, ENVIRONMENT, files

SMALL = ["--epochs", "4", "--latent", "2", "--hidden", "16", "--iaf-layers", "1", "--iaf-hidden", "8"]
STEPS = ["--layer-steps", "80", "--flow-steps", "80"]
FLOW = ["--layers", "1", "--hidden", "8", "--members", "2"]
# the command, and the training of it during which it is ended
RUNS = {
    "vae": (["vae", *SMALL, "--test-samples", "3"], "iaf"),
    "density": (["density", "table.npy", *FLOW, "--epochs", "15"], "member-1-without-correlations"),
    "posterior": (["posterior", "--steps", "60", "--stages", "2", "--verdict-samples", "1000"], "stage-2"),
    "distill": (["distill", "teacher", *STEPS, "--samples", "100"], "flow"),
}
CASES = [("vae", s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)]
CASES += [("density", signal.SIGTERM), *((name, signal.SIGKILL) for name in ("density", "posterior", "distill"))]


# Runs the command and sends itself a signal right after the 20th checkpoint of one training, whatever the machine does.
LAUNCHER = """
import os, sys
from counterflow.cli import main
from counterflow.training.checkpoints import Checkpoints

training, number, save, saved = sys.argv[1], int(sys.argv[2]), Checkpoints.save, []

def save_and_end(self, checkpoint):
    save(self, checkpoint)
    if self.folder.name == training:
        saved.append(checkpoint.steps)
        if len(saved) == 20:
            os.kill(os.getpid(), number)

Checkpoints.save = save_and_end
sys.exit(main(sys.argv[3:]))
"""


def counterflow(folder, *arguments, ended_by=None, training=None):
    """Run the command and return its exit code and stderr; the signal comes in the middle of the training."""
    command = COMMAND if ended_by is None else [sys.executable, "-c", LAUNCHER, training, str(int(ended_by))]
    words = [*command, *map(str, arguments)]
    done = subprocess.run(words, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table, and a teacher that was trained on it."""
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "table.npy", np.random.default_rng(0).normal(size=(400, 2)).cumsum(1))
    options = ["--flow", "maf", "--layers", "1", "--hidden", "8", "--members", "1", "--epochs", "2"]
    code, errors = counterflow(folder, "density", "table.npy", *options, "--out", "teacher")
    assert code == 0, errors
    return folder


def outcome(run):
    """All that two runs must have in common: weights and draws to the bit, and what is said of them."""
    found = {path.name: path.read_bytes() for path in run.glob("*.safetensors")}
    found["metrics"] = [timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return found | {"summary": timeless(json.loads((run / "summary.json").read_text())), "files": files(run)}


def timeless(value):
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "rows_per_second")}
    return [timeless(part) for part in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ended_by"), CASES, ids=lambda v: getattr(v, "name", v))
def test_an_interrupted_run_resumes_bit_for_bit(name, ended_by, folder, here, monkeypatch):
    monkeypatch.chdir(folder)
    (words, training), run = RUNS[name], f"{name}-{ended_by.name}"
    words = [*words, "--save-every", "0"]
    if not (folder / name).exists():
        code, errors = counterflow(folder, *words, "--out", name)
        assert code == 0, errors

    code, errors = counterflow(folder, *words, "--out", run, ended_by=ended_by, training=training)
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[ended_by], errors
    if ended_by != signal.SIGKILL:
        assert f"continue with --resume {run}" in " ".join(errors.split()), errors
    code, _, errors = here(*words, "--out", run)
    assert code == 2 and f"or continue the run with --resume {run}" in " ".join(errors.split()), errors
    code, errors = counterflow(folder, words[0], "--resume", run)
    assert code == 0 and f"{training.replace('-', ' ')}: resuming from step" in errors, errors
    assert outcome(folder / run) == outcome(folder / name)
    code, _, errors = here(words[0], "--resume", run)
    assert code == 2 and "which is done" in errors and "Traceback" not in errors


def test_runs_that_cannot_be_resumed_are_refused(here, tmp_path):
    run = tmp_path / "run"
    for words, told in {
        ("vae", "--resume", "run"): "expected a run folder to resume, got run, which does not exist",
        ("distill",): "expected the run folder of a teacher, or --resume with that of a distillation, got none",
        ("density", "--save-every", "-1"): "expected --save-every to be at least 0 seconds, got -1.0",
    }.items():
        code, _, errors = here(*words)
        assert code == 2 and told in " ".join(errors.split())
    run.mkdir()
    for config, words, told in [
        ("[1", (), "expected run/config.json to be the configuration of a run, but it does not read as JSON"),
        ("[1]", (), "a JSON object, got list"),
        (
            '{"command": "posterior"}',
            (),
            "expected a run of counterflow density, got run, a run of counterflow posterior",
        ),
        ('{"command": "density"}', ("--layers", "7"), "got --layers"),
        ('{"command": "density"}', ("other.csv", "--no-kernels"), "got DATA, --no-kernels"),
    ]:
        (run / "config.json").write_text(config)
        code, _, errors = here("density", "--resume", "run", *words)
        assert code == 2 and told in " ".join(errors.split()), errors


def test_a_run_killed_before_its_first_checkpoint_starts_again(here, tmp_path):
    np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(size=(60, 2)))
    words = ("density", "table.npy", *FLOW, "--epochs", "1", "--out", "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.77.part").write_text("{")  # as a killed process leaves it
    assert here(*words)[0] == 0
    for path in [p for p in (tmp_path / "run").iterdir() if p.name != "config.json"]:
        path.rename(tmp_path / path.name)
    assert here("density", "--resume", "run")[0] == 0
    weights = "model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / weights).read_bytes()
    assert not list((tmp_path / "run").glob("*.part"))
