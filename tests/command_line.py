"""The command line as the tests run it, and what it leaves in a folder."""

import os
import subprocess
import sys
from pathlib import Path

import counterflow as cf

COMMAND = [sys.executable, "-m", "counterflow.cli"]
SOURCE = str(Path(cf.__file__).parents[1])  # the tests run elsewhere, where a relative path would not be found
ENVIRONMENT = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def real(folder, *arguments):
    """The command in a process of its own."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def everything(folder):
    return {path: path.stat().st_mtime_ns if path.is_file() else 0 for path in folder.rglob("*")}
