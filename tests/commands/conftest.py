"""One trained run of each kind for all tests of a test run, and copies of them for tests that write to a run."""

import json
import shutil
import subprocess
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO

import pytest
from command_line import NUMBERS, ONE_FLOW, SMALL_DENSITY, SMALL_VAE, SUFFIXES, TABLE, write_table
from filelock import FileLock

from counterflow.cli import main


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    """Return a function that runs a command in this process, once for all workers of the test run.

    (name of the run folder, arguments) -> the folder that holds the run folder, and what ran: exit code and output.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "trained"
    shared.mkdir(exist_ok=True)

    def run(name, *arguments):
        record = shared / f"{name}.json"
        with FileLock(shared / f"{name}.lock"):
            if not record.exists():
                with pytest.MonkeyPatch.context() as patch, chdir(shared), redirect_stdout(StringIO()) as out:
                    patch.setenv("COLUMNS", "80")
                    with redirect_stderr(StringIO()) as err:
                        code = main([*map(str, arguments), "--out", name])
                record.write_text(json.dumps([code, out.getvalue(), err.getvalue()]))
        return shared, subprocess.CompletedProcess(arguments, *json.loads(record.read_text()))

    return run


@pytest.fixture(scope="session")
def vae_run(once):
    """A folder with the run `digits`, and what ran."""
    return once("digits", "vae", *SMALL_VAE, "--batch-size", 64)


@pytest.fixture(scope="session")
def posterior_run(once):
    """The run folder of the eight schools, and what ran."""
    folder, ran = once("schools", "posterior", "--steps", 100, "--verdict-samples", 4000, "-n", 500)
    return folder / "schools", ran


@pytest.fixture(scope="session")
def density_runs(once, tables):
    """A folder with the runs `plain` and `given` (a context), and what ran for `plain`."""
    folder, ran = once("plain", "density", tables / "table.csv", "--drop", "id", "colour", *SMALL_DENSITY)
    once("given", "density", tables / "table.csv", "--context", "colour", "--drop", "id", *ONE_FLOW)
    return folder, ran


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    """A folder with TABLE as table.csv and table.parquet, and NUMBERS as numbers in every format."""
    folder = tmp_path_factory.mktemp("tables")
    for suffix in (".csv", ".parquet"):
        write_table(TABLE, folder / f"table{suffix}")
    for suffix in SUFFIXES:
        write_table(NUMBERS, folder / f"numbers{suffix}")
    return folder


@pytest.fixture
def copy_of(tmp_path):
    """Return a function that copies a run folder to tmp_path / "run"."""
    return lambda run: shutil.copytree(run, tmp_path / "run")
