"""Commands under torchrun: two processes do the work of one, and go on by themselves where one of them dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import ENVIRONMENT

import counterflow as cf

SMALL = ["--latent", "2", "--hidden", "16", "--iaf-layers", "1", "--iaf-hidden", "8", "--test-samples", "3"]
FLOW = ["--flow", "maf", "--layers", "1", "--hidden", "8", "--members", "1"]
VAE = ["vae", *SMALL, "--posterior", "iaf", "--save-every", "0.05"]

pytestmark = pytest.mark.slow


def torchrun(folder, *arguments, processes=2, restarts=0):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [*launcher, "--max-restarts", str(restarts), "-m", "counterflow", *map(str, arguments)]
    return subprocess.Popen(
        words, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process, code=0):
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == code, printed
    return printed


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_command_that_trains_runs_in_two_processes(tmp_path):
    np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(size=(600, 3)).cumsum(1))
    density = ["density", "table.npy", *FLOW, "--epochs", "3"]
    for processes, out in ((1, "one"), (2, "two")):
        ended(torchrun(tmp_path, *density, "--out", out, processes=processes))
    one, two = ([(row["train"], row["validation"]) for row in lines(tmp_path / run)] for run in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-4)  # no draws in it: the same steps
    printed = ended(torchrun(tmp_path, "posterior", "--steps", "100", "--stages", "1", "--out", "posterior"))
    found = cf.Posterior.load(tmp_path / "posterior")
    assert found.k_hat < 0.7 and len(found.draws.theta) == 10_000 and printed.count("stage 1: 100 steps") == 1
    halves = found.draws.theta.chunk(2)  # of both processes
    assert not (halves[0] == halves[1]).any()
    distill = ["distill", "two", "--layer-steps", "100", "--flow-steps", "50", "--samples", "500"]
    ended(torchrun(tmp_path, *distill, "--out", "student"))
    assert json.loads((tmp_path / "student" / "summary.json").read_text())["reverse"] < 0.1
    for run in ("one", "two", "posterior", "student"):
        assert not (tmp_path / run / "checkpoints").exists() and (tmp_path / run / "plots").is_dir()


def test_training_resumes_after_a_process_or_torchrun_is_killed(tmp_path):
    vae = [*VAE, "--epochs", "12", "--out"]
    ended(torchrun(tmp_path, *vae, "alone"))

    def under_way(run, **options):
        process = torchrun(tmp_path, *vae, run, **options)
        while not any((tmp_path / run / "checkpoints").rglob("*.safetensors")):
            assert process.poll() is None
            time.sleep(0.02)
        return process

    process = under_way("one", restarts=2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    printed = {"one": ended(process)}
    process = under_way("all")
    process.kill()
    left, _ = process.communicate(timeout=300)  # the pipe ends with the processes that torchrun has left behind
    assert left.count("torchrun was killed: ending this process as well\n") == 1, left
    assert "\ninterrupted; " in left and left.endswith("; continue with --resume all\n")
    printed["all"] = ended(torchrun(tmp_path, *vae, "all"))
    alone = [(row["epoch"], row["validation"]) for row in lines(tmp_path / "alone")]
    for run, output in printed.items():
        assert "iaf: resuming from step" in output
        rows = [(row["epoch"], row["validation"]) for row in lines(tmp_path / run)]
        np.testing.assert_allclose(rows, alone, rtol=1e-5)


def test_errors_under_torchrun_are_printed_once(tmp_path):
    printed = ended(torchrun(tmp_path, "vae"), code=1)
    assert printed.count("expected --out under torchrun, which finds the checkpoints there when it restarts") == 1
    printed = ended(torchrun(tmp_path, *VAE, "--batch-size", "63", "--out", "run"), code=1)
    assert printed.count("expected batch_size to be a multiple of the 2 processes, got 63") == 1
    assert not (tmp_path / "run").exists()
