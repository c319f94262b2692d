"""Runs that are ended and go on, through the real command line."""

import json
import signal
import subprocess
import time

import pytest
from command_line import COMMAND, ENVIRONMENT

SMALL = ["--epochs", "4", "--latent", "2", "--hidden", "16", "--iaf-layers", "1", "--iaf-hidden", "8"]
VAE = ["vae", *SMALL, "--save-every", "0.05", "--test-samples", "3"]


def counterflow(*arguments, ended_by=None, when=None):
    """The command's exit code and stderr; the signal is sent as soon as `when()` holds."""
    command = [*COMMAND, *map(str, arguments)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while ended_by is not None and process.poll() is None:
        if when():
            process.send_signal(ended_by)
            break
        time.sleep(0.01)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


@pytest.mark.slow
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_vae_that_was_ended_goes_on_bit_by_bit(ended_by, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert counterflow(*VAE, "--out", whole)[0] == 0

    def under_way():  # the second of the two models
        return len(list((run / "states" / "iaf").glob("*.safetensors"))) == 2

    code, errors = counterflow(*VAE, "--out", run, ended_by=ended_by, when=under_way)
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[ended_by], errors
    code, errors = counterflow("vae", "--resume", run)
    assert code == 0 and "iaf: going on from step" in errors, errors
    for file in ("model.safetensors", "model-gaussian.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    rows = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, whole)]
    assert [(r["posterior"], r["epoch"], r["validation"]) for r in rows[0]] == [
        (r["posterior"], r["epoch"], r["validation"]) for r in rows[1]
    ]
    assert not (run / "states").exists()
    code, errors = counterflow("vae", "--resume", run)
    assert code == 2 and "which is finished" in errors and "Traceback" not in errors


def test_what_cannot_be_resumed(tmp_path):
    code, errors = counterflow("vae", "--resume", tmp_path / "nothing")
    assert code == 2 and "expected a run folder of counterflow vae to resume" in " ".join(errors.split()), errors
    (tmp_path / "states").mkdir()
    (tmp_path / "config.json").write_text('{"command": "posterior"}')
    code, errors = counterflow("vae", "--resume", tmp_path)
    assert code == 2 and "one of counterflow posterior" in " ".join(errors.split()), errors
    (tmp_path / "config.json").write_text('{"command": "vae"}')
    code, errors = counterflow("vae", "--resume", tmp_path, "--latent", "3")
    assert code == 2 and "got --latent as well" in " ".join(errors.split()), errors
