"""Tests that kernels are compiled in another process, and that nothing depends on that process."""

import os
import subprocess
import sys
import time

import pytest
import torch

from counterflow.engine.cpu import background

WANTED = ("map 0 0",), torch.float32


@pytest.fixture
def compiler(monkeypatch):
    """Return a compiler that finds nothing on disk."""
    monkeypatch.setattr(background, "is_on_disk", lambda *_: False)
    return background._Compiler()


def wait(compiler):
    compiler.process.wait(30)


def test_a_process_that_fails_is_replaced_by_this_one(compiler, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "false")
    assert not compiler.look(*WANTED)
    assert "in the background" in caplog.text
    wait(compiler)
    assert compiler.look(*WANTED)
    assert "failed" in caplog.text


@pytest.mark.parametrize("executable", ["", "/no/such/python"])
def test_without_another_process_this_one_compiles(compiler, monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    assert compiler.look(*WANTED)


def test_one_process_at_a_time(compiler, monkeypatch):
    monkeypatch.setattr(sys, "executable", "true")
    assert not compiler.look(*WANTED)
    first = compiler.process
    monkeypatch.setattr(first, "poll", lambda: None)
    assert not compiler.look(("map 1 0",), torch.float32)
    assert compiler.process is first
    monkeypatch.undo()
    first.wait(30)


def test_kernels_on_disk_are_ready_at_once(monkeypatch):
    monkeypatch.setattr(background, "is_on_disk", lambda *_: True)
    compiler = background._Compiler()
    assert compiler.look(*WANTED)
    assert compiler.process is None


def test_the_foreground_waits(monkeypatch):
    monkeypatch.setenv("COUNTERFLOW_COMPILE", "foreground")
    monkeypatch.setattr(background._compiler, "look", lambda *_: pytest.fail("looked"))
    assert background.ready(("map 2 0",), torch.float32)


CLIENT = """
import sys, time
import torch, counterflow as cf
from counterflow.engine.cpu import background
flow = cf.IAF(3, layers=2, hidden=(8,), seed=0)
torch.manual_seed(0)
before = flow().rsample((5,))
process = background._compiler.process
if sys.argv[1] == "wait":
    process.wait(400)
    torch.manual_seed(0)
    assert torch.allclose(flow().rsample((5,)), before, atol=1e-5)
    assert background._compiler.process is None and len(background._compiler.ready) == 1
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["wait", "leave"])
def test_a_first_run_does_not_wait_for_the_compiler(tmp_path, order):
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "COUNTERFLOW_COMPILE": "background",
    }
    ran = subprocess.run([sys.executable, "-c", CLIENT, order], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "in the background" in ran.stderr
    deadline = time.monotonic() + 400
    while len(list(tmp_path.rglob("*.nbc"))) < 8:  # also when the client has left
        assert time.monotonic() < deadline
        time.sleep(0.2)


COMPILE = """
import sys
from numba.core.event import install_timer
from counterflow.engine.cpu.background import compile_all
compilations = []
with install_timer("numba:compile", compilations.append):
    compile_all()
print(len(compilations) > 0)
"""


@pytest.mark.system
def test_processes_compile_one_after_the_other(tmp_path):
    """The second finds on disk what the first has compiled."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE, "float32", "map 0 0", "map 0 1"]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(process.communicate(timeout=200)[0].strip() for process in running) == ["False", "False", "True"]
