"""The command line in a process, the files that it leaves, and a table for it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import counterflow as cf

COMMAND = [sys.executable, "-m", "counterflow.cli"]
SOURCE = str(Path(cf.__file__).parents[1])  # the tests run elsewhere, where a relative path would not be found
ENVIRONMENT = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}

SMALL_VAE = shlex.split(
    "--network mlp --hidden 16 --context 4 --latent 2 --channels 2 --iaf-layers 1 --iaf-hidden 8 "
    "--epochs 2 --batch-size 16 --test-samples 8"
)
SMALL_DENSITY = shlex.split("--layers 1 --hidden 8 --epochs 2")
ONE_FLOW = [*SMALL_DENSITY, "--members", "1", "--no-kernels"]

N = 120
RNG = np.random.default_rng(0)
COLOUR = RNG.choice(["red", "light, blue"], N)
TABLE = pd.DataFrame(
    {
        "id": [f"r{k}" for k in range(N)],
        "x": RNG.normal(size=N) + 3 * (COLOUR == "red"),
        "colour": COLOUR,
        "count": RNG.poisson(20, N),
        "income": RNG.lognormal(10, 1, N),
    }
)
NUMBERS = TABLE[["x", "count", "income"]]
SUFFIXES = (".csv", ".parquet", ".npy", ".npz")


def real(folder, *arguments):
    """Run the command in a process of its own."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def everything(folder):
    return {path: path.stat().st_mtime_ns if path.is_file() else 0 for path in folder.rglob("*")}


def write_table(table, path):
    match path.suffix:
        case ".csv":
            table.to_csv(path, index=False)
        case ".parquet":
            table.to_parquet(path)
        case ".npy":
            np.save(path, table.to_numpy(float))
        case ".npz":
            np.savez_compressed(path, rows=table.to_numpy(float), more=np.ones((2, 2)))


def read_table(path, names=()):
    match path.suffix:
        case ".csv":
            return pd.read_csv(path)
        case ".parquet":
            return pd.read_parquet(path)
        case ".npy":
            return pd.DataFrame(np.load(path), columns=names)
    with np.load(path) as arrays:
        return pd.DataFrame(arrays["rows"], columns=names)
