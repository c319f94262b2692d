"""One trained run of each kind for all tests of a test run, and copies of them for tests that write to a run."""

import json
import shutil
import subprocess

import pytest
from command_line import NUMBERS, ONE_FLOW, SMALL_DENSITY, SMALL_VAE, SUFFIXES, TABLE, real, write_table
from filelock import FileLock


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    """Return a function that runs a command in a process, once for all workers of the test run.

    (name of the run folder, arguments) -> the folder that holds the run folder, and the finished process.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "trained"
    shared.mkdir(exist_ok=True)

    def run(name, *arguments):
        record = shared / f"{name}.json"
        with FileLock(shared / f"{name}.lock"):
            if not record.exists():
                ran = real(shared, *arguments, "--out", name)
                record.write_text(json.dumps([ran.returncode, ran.stdout, ran.stderr]))
        return shared, subprocess.CompletedProcess(arguments, *json.loads(record.read_text()))

    return run


@pytest.fixture(scope="session")
def vae_run(once):
    """A folder with the run `digits`, and the process that made it."""
    return once("digits", "vae", *SMALL_VAE, "--batch-size", 64)


@pytest.fixture(scope="session")
def posterior_run(once):
    """The run folder of the eight schools, and the process that made it."""
    folder, ran = once("schools", "posterior", "--steps", 100, "--verdict-samples", 4000, "-n", 500)
    return folder / "schools", ran


@pytest.fixture(scope="session")
def density_runs(once, tables):
    """A folder with the runs `plain` and `given` (a context), and the process that made `plain`; see `once`."""
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
