"""What holds for every test: the same seed, one thread, no window."""

import os
from collections.abc import Iterator

import pytest
import torch

from counterflow.cli import main

os.environ.setdefault("MPLBACKEND", "Agg")  # also for the processes that a test starts
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for those alone: torch has been imported here


@pytest.fixture(autouse=True)
def same_start_for_every_test() -> Iterator[None]:
    """Seed 0 and one thread: on tensors this small a second thread only costs, and sums keep their order.

    The default dtype is nobody's to change: a test that wants float64 says so where it makes its tensors.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    assert torch.get_default_dtype() == torch.float32, "the test left another default dtype behind"


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """The command in this process, in tmp_path: arguments -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run
