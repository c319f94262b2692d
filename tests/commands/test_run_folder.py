"""Run folders: only one command writes to a folder at a time."""

import os
import signal
import subprocess
import sys
import time

import pytest
from command_line import COMMAND, ENVIRONMENT, NUMBERS, ONE_FLOW, files, write_table

import counterflow as cf
from counterflow.commands.folder_lock import locked

BUSY = "expected a folder that no other command is writing to, got run, which one is"
HOLD = """
import sys, time
from pathlib import Path
from counterflow.commands.folder_lock import locked

while not Path("start").exists():
    time.sleep(0.001)
try:
    with locked(Path("run")):
        print("locked", flush=True)
        time.sleep(float(sys.argv[1]))
except FileExistsError as error:
    print(error)
"""


def holder(folder, seconds):
    """Start a process that locks folder / "run" as soon as there is a file `start`."""
    command = [sys.executable, "-c", HOLD, str(seconds)]
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)


def test_a_lock_is_exclusive_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    with locked(run):
        assert files(run) == {".lock"}
        with pytest.raises(FileExistsError, match="expected a folder that no other command is writing to"), locked(run):
            pass
    with locked(run):
        pass
    assert run.is_dir() and not files(run)


@pytest.mark.system
def test_one_of_many_processes_gets_the_lock(tmp_path):
    processes = [holder(tmp_path, 3) for _ in range(6)]
    time.sleep(0.5)
    (tmp_path / "start").touch()
    told = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    assert told[-1] == "locked" and all(line.startswith(BUSY) for line in told[:-1]), told


@pytest.mark.system
def test_the_lock_of_a_killed_process_is_free(tmp_path):
    (tmp_path / "start").touch()
    with holder(tmp_path, 60) as process:
        assert process.stdout.readline() == "locked\n"
        process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    assert files(tmp_path / "run") == {".lock"}
    with locked(tmp_path / "run"):
        pass


def test_a_command_does_not_write_to_a_folder_in_use(here, tmp_path):
    write_table(NUMBERS, tmp_path / "numbers.csv")
    density = ("density", "numbers.csv", *ONE_FLOW)
    with locked(tmp_path / "run"):
        code, out, err = here(*density, "--out", "run")
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith(f"counterflow: {BUSY}; give another --out")
    (tmp_path / "run" / "config.json").write_text('{"command": "density"}')
    with locked(tmp_path / "run"):
        code, _, err = here("density", "--resume", "run")
    assert code == 2 and BUSY in err
    assert files(tmp_path / "run") == {"config.json"}


def test_parts_are_not_written_to_a_folder_in_use(density_runs, tables, here, tmp_path):
    with locked(tmp_path / "parts"):
        code, out, err = here("score", density_runs[0] / "plain", tables / "numbers.csv", "--out", "parts")
        assert (code, out, err.count("\n")) == (2, "", 1) and "no other command is writing to, got parts" in err
    assert here("score", density_runs[0] / "plain", tables / "numbers.csv", "--out", "parts")[0] == 0
    assert not (tmp_path / "parts" / ".lock").exists()


@pytest.mark.system
def test_one_of_two_runs_started_into_one_folder_is_refused(tmp_path):
    write_table(NUMBERS, tmp_path / "numbers.csv")
    command = [*COMMAND, "density", "numbers.csv", *ONE_FLOW, "--out", "run"]
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **options) for _ in range(2)]
    ended = sorted((process.communicate(timeout=300)[1], process.returncode) for process in processes)
    assert sorted(code for _, code in ended) == [0, 2], ended
    (refused,) = (err for err, code in ended if code == 2)
    assert refused.splitlines()[-1].startswith("counterflow: expected a ") and "Errno" not in refused
    assert cf.FlowDensity.load(tmp_path / "run").sample(3).shape == (3, 3)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
