"""Fixtures and rules for every test: one seed, one thread, tiers by folder, a limit on time."""

import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from numba.core.event import install_timer
from registry import seed_all

from counterflow.cli import main

os.environ.setdefault("MPLBACKEND", "Agg")  # also for the processes that a test starts
os.environ["COUNTERFLOW_COMPILE"] = "foreground"  # the same bits in the first run as in later ones
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for those only: torch is imported already
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which torch may do as well

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src" / "counterflow"
collect_ignore_glob = ["**/conftest.py", "conftest.py"]  # no doctests there, and two files of one name
FOLDERS = {  # tier -> folders and modules whose tests belong to it; see CONTRIBUTING.md
    "tools": (
        HERE / "tools",
        *(SOURCE / path for path in ("posterior/targets", "posterior/mcmc.py", "posterior/nuts.py", "interop")),
    ),
    "system": (HERE / "system",),
    "smoke": (HERE / "smoke",),
    "docs": (HERE / "docs",),
}
MAX_SECONDS = 10.0  # of CPU time in the test's own process


def pytest_configure(config: pytest.Config) -> None:
    """Do not import what is not run: the tools' modules alone take many seconds in each process."""
    left_out = [path for tier, paths in FOLDERS.items() for path in paths if f"not {tier}" in config.option.markexpr]
    if find_spec("triton") is None:  # which these import at the top, as its decorators need
        left_out += [SOURCE / "engine" / "gpu" / f"{name}.py" for name in ("maps", "splines", "substitution")]
    config.option.ignore = [*(config.option.ignore or []), *map(str, left_out)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the folders of FOLDERS, and skip those of a GPU where there is none."""
    tiers: dict[Path, list[str]] = {}
    for item in items:
        if item.path not in tiers:
            tiers[item.path] = [name for name, paths in FOLDERS.items() if any(map(item.path.is_relative_to, paths))]
        for tier in tiers[item.path]:
            item.add_marker(tier)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU with CUDA"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that takes too long and has no marker: the default tier is one that people wait for.

    CPU time does not depend on what else runs on the machine. A test in which Numba compiled is not judged, because
    that happens once on a machine. Pages of the docs are as long as their readers need.
    """
    compiling: list[float] = []
    started = time.process_time()
    with install_timer("numba:compile", compiling.append):
        result = yield
    seconds = time.process_time() - started
    exempt = (
        any(item.get_closest_marker(name) for name in ("slow", "cuda", *FOLDERS)) or item.path.name == "test_docs.py"
    )
    if seconds > MAX_SECONDS and not compiling and not exempt:
        pytest.fail(
            f"expected at most {MAX_SECONDS:.0f} s of CPU time, got {seconds:.1f}; make the test faster or mark it slow"
        )
    return result


@pytest.fixture(autouse=True)
def same_start_for_every_test() -> Iterator[None]:
    """Set seed 0 and one thread: on tensors this small a second thread only costs, and sums keep their order.

    No test changes the default dtype: one that needs float64 says so where it makes its tensors.
    """
    seed_all(0)
    torch.set_num_threads(1)
    torch.distributions.Distribution.set_default_validate_args(True)  # torch.compile turns it off for the process
    yield
    assert torch.get_default_dtype() == torch.float32, "the test left another default dtype behind"


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command in this process, in tmp_path: arguments -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run
