"""score and sample to a folder of parts: shared by processes, completed after a kill, always the same numbers."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from command_line import ENVIRONMENT, everything, files, real
from pyarrow import parquet
from registry import over

import counterflow as cf
from counterflow.commands.sharded_output import seed_of_part
from counterflow.density.model import TableDensity
from counterflow.training.distributed import Workers

RNG = np.random.default_rng(0)
SIZES = (15_000, 20_000, 15_000, 15_000, 15_000, 15_000)  # of the files, each some tenths of a second of work
TABLE = pd.DataFrame(RNG.normal(size=(sum(SIZES), 3)), columns=list("abc"))
FEW = TABLE.head(100)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
ABOUT = {"_about.json", "_summary.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The run `run`, `given` of a density of a and b given c, `table`: many Parquet files, and FEW in every format."""
    folder = tmp_path_factory.mktemp("shards")
    density = cf.FlowDensity(members=1, kernels=False, hidden=(64, 64), epochs=1, random_state=0)
    density.fit(TABLE.head(300)).save(folder / "run")
    density.fit(TABLE[["a", "b"]].head(300), context=TABLE[["c"]].head(300)).save(folder / "given")
    for run in ("run", "given"):
        (folder / run / "config.json").write_text('{"command": "density"}')
    (folder / "table" / "more").mkdir(parents=True)
    (folder / "table" / "_SUCCESS").touch()
    start = 0
    for k, size in enumerate(SIZES):
        name = f"{'more/' if k == 5 else ''}{k}.parquet"
        rows = pa.Table.from_pandas(TABLE.iloc[start : start + size], preserve_index=False)
        parquet.write_table(rows, folder / "table" / name, row_group_size=5_000)
        start += size
    FEW.to_csv(folder / "few.csv", index=False)
    parquet.write_table(pa.Table.from_pandas(FEW), folder / "few.parquet", row_group_size=15)
    np.save(folder / "few.npy", FEW)
    np.savez_compressed(folder / "few.npz", x=FEW, y=np.ones(3))
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    """The log densities of TABLE."""
    return cf.FlowDensity.load(folder / "run").score_samples(TABLE)


def check(out, expected):
    """Check the rows of the folder, as other libraries read them, and its summary."""
    scored = pd.read_parquet(out)
    np.testing.assert_array_equal(scored[["a", "b", "c"]], TABLE)
    np.testing.assert_allclose(scored.log_density, expected, rtol=1e-9)
    summary = json.loads((out / "_summary.json").read_text())
    assert summary["parts"] == len(SIZES) == len(list(out.glob("part-*")))
    sums = {"rows": len(expected), "log_density": expected.sum(), "log_density_squared": (expected**2).sum()}
    assert summary["sums"] == pytest.approx(sums, rel=1e-9)
    assert not list(out.rglob("*.part"))


def under_way(out):
    """Return number -> process id of the parts that are being written."""
    return {int(p.name[6:11]): int(p.name.split(".")[-2]) for p in out.glob(".part-*.part")}


def finished(out):
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.glob("part-*")}


HOLD = """
import os, sys, time
from contextlib import contextmanager
from pathlib import Path
from counterflow.cli import main
from counterflow.commands import sharded_output

atomic_write = sharded_output.atomic_write

@contextmanager
def held(path):
    with atomic_write(path) as temporary:
        temporary.touch()
        while path.stem in ("part-00002", "part-00003") and not Path(os.environ["GATE"]).exists():
            time.sleep(0.01)
        yield temporary

sharded_output.atomic_write = held
sys.exit(main())
"""


def score_until_held(folder, tmp_path, *options):
    """Start two processes that score `table` and wait in their second part until the file `gate` exists.

    Returns torchrun's process, and the ids of both when they wait. Nothing depends on how fast they are.
    """
    (tmp_path / "hold.py").write_text(HOLD)
    environment = {**ENVIRONMENT, "GATE": str(tmp_path / "gate")}
    command = [*TORCHRUN, *options, tmp_path / "hold.py", "score", "run", "table", "--out", tmp_path / "out"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*map(str, command)], cwd=folder, env=environment, **pipes)
    until(lambda: under_way(tmp_path / "out").keys() == {2, 3} and len(finished(tmp_path / "out")) == 2, process)
    return process, under_way(tmp_path / "out")


def until(condition, process):
    """Wait until a condition holds, and return its value."""
    deadline = time.monotonic() + 240
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    return found


@pytest.mark.slow
def test_two_processes_share_the_parts_and_one_is_killed(folder, expected, tmp_path):
    out = tmp_path / "out"
    process, at_work = score_until_held(folder, tmp_path, "--max-restarts", "3")
    try:
        before = finished(out)
        os.kill(at_work[3], signal.SIGKILL)
        (tmp_path / "gate").touch()
        told, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert at_work[2] != at_work[3] and len(before) == 2
    assert before.items() <= finished(out).items()
    check(out, expected)
    error = expected.std() / (len(expected) - 1) ** 0.5
    line = f"{len(expected):,} rows: mean log density {expected.mean():.3f} ± {error:.3f} nats; 6 parts in {out}\n"
    assert told == line


@pytest.mark.slow
def test_the_other_process_ends_where_torchrun_is_killed_and_one_completes_the_parts(folder, expected, tmp_path):
    out = tmp_path / "out"
    process, at_work = score_until_held(folder, tmp_path)
    os.kill(at_work[3], signal.SIGSTOP)  # so that it does nothing while torchrun is killed
    for pid in (process.pid, at_work[3]):
        os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=240)  # both pipes end with the other process, which was not killed
    assert errors.endswith("torchrun was killed: ending this process as well\ninterrupted\n")
    assert not (out / "_summary.json").exists() and len(list(out.glob(".part-*"))) <= 1, "the killed one's"
    before = finished(out)
    assert len(before) == 2
    ran = real(folder, "score", "run", "table", "--out", out)
    assert ran.returncode == 0 and before.items() <= finished(out).items(), ran.stderr
    check(out, expected)


@pytest.mark.slow
def test_two_processes_draw_what_one_does(folder, here, tmp_path):
    arguments = ["sample", folder / "given", "--context", folder / "table", "--seed", 3, "--out"]
    ran = subprocess.run([*TORCHRUN, "-m", "counterflow", *map(str, arguments), tmp_path / "two"], env=ENVIRONMENT)
    assert ran.returncode == 0
    assert here(*arguments, "one")[:2] == (0, f"{len(TABLE):,} rows; 6 parts in one\n")
    one, two = (pd.read_parquet(tmp_path / name) for name in ("one", "two"))
    assert one.equals(two) and one.c.equals(TABLE.c) and np.isfinite(one.to_numpy()).all()
    assert len(one.a.unique()) == len(one), "each part has draws of its own"


@pytest.mark.slow
def test_an_error_in_another_process_is_reported(folder, tmp_path):
    for k in range(3):
        FEW.assign(b=np.where(FEW.index == 7, np.nan if k == 1 else 0, FEW.b)).to_parquet(tmp_path / f"{k}.parquet")
    command = [*TORCHRUN, "-m", "counterflow", "score", folder / "run", tmp_path, "--out", tmp_path / "out"]
    ran = subprocess.run([*map(str, command)], env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode != 0
    assert f"every cell of {tmp_path}/1.parquet, got missing (NaN): row 7 of 'b'" in ran.stderr.replace("\n", " ")
    assert not list((tmp_path / "out").rglob("*.part"))


def ended_at(monkeypatch, count):
    """Send SIGTERM to this process at the batch of this number."""
    score, seen = TableDensity.score, []

    def scored(*arguments):
        seen.append(1)
        if len(seen) == count:
            signal.raise_signal(signal.SIGTERM)
        return score(*arguments)

    monkeypatch.setattr(TableDensity, "score", scored)


def test_sigterm_keeps_the_finished_parts(folder, here, tmp_path, monkeypatch):
    monkeypatch.setattr("counterflow.commands.density_output.ROWS_PER_PART", 32)
    ended_at(monkeypatch, 3)
    before = signal.getsignal(signal.SIGTERM)
    assert here("score", folder / "run", folder / "few.csv", "--out", "out") == (143, "", "interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(finished(tmp_path / "out")) == 2 and not list(tmp_path.rglob("*.part"))
    assert here("score", folder / "run", folder / "few.csv", "--out", "out")[0] == 0
    assert len(finished(tmp_path / "out")) == 4


def test_sigterm_leaves_no_file(folder, here, tmp_path, monkeypatch):
    monkeypatch.setattr("counterflow.commands.density_output.BATCH", 10)
    ended_at(monkeypatch, 3)
    assert here("score", folder / "run", folder / "few.csv", "--out", "new/out.csv")[0] == 143
    assert not list(tmp_path.iterdir())


def read(out, suffix):
    found = sorted(out.glob(f"part-*{suffix}"))
    if suffix == ".npy":
        return np.concatenate([np.load(part) for part in found])
    return pd.concat([pd.read_csv(part) if suffix == ".csv" else pd.read_parquet(part) for part in found]).to_numpy()


@over(["few.csv", "few.parquet", "few.npy", "few.npz"], "table")
def test_parts_of_every_format(table, folder, expected, here, tmp_path, monkeypatch):
    monkeypatch.setattr("counterflow.commands.density_output.ROWS_PER_PART", 32)
    monkeypatch.setattr("counterflow.commands.density_output.BATCH", 10)
    for reader in ("csv", "arrays"):
        monkeypatch.setattr(f"counterflow.io.data.{reader}.BLOCK", 1000)
    suffix = {".npz": ".npy"}.get((folder / table).suffix, (folder / table).suffix)
    arguments = ["score", folder / "run", folder / table, *(["--key", "x"] if "npz" in table else []), "--out", "out"]
    code, told, errors = here(*arguments)
    assert (code, errors) == (0, "") and "100 rows: mean log density" in told and "4 parts in out" in told
    assert files(tmp_path / "out") == {
        *ABOUT,
        *(f"part-0000{k}{suffix}" for k in range(4)),
        *(f"_sums/0000{k}.json" for k in range(4)),
    }
    came = read(tmp_path / "out", suffix)
    np.testing.assert_allclose(came, np.column_stack([FEW, expected[:100]]), rtol=1e-9)
    before = finished(tmp_path / "out")
    assert here(*arguments) == (0, told, "out: all parts are there, nothing is left to do\n")
    assert finished(tmp_path / "out") == before
    before.pop(f"part-00001{suffix}")
    (tmp_path / "out" / f"part-00001{suffix}").unlink()
    for stale in (f".part-00001{suffix}.99.part", "_sums/.00001.json.99.part"):
        (tmp_path / "out" / stale).touch()
    assert here(*arguments) == (0, told, "")
    assert before.items() <= finished(tmp_path / "out").items() and not list(tmp_path.rglob("*.part"))
    np.testing.assert_array_equal(read(tmp_path / "out", suffix), came)


def test_a_folder_of_parquet_files_is_one_table(folder, expected, here, tmp_path):
    """Score a sharded table to a single file, and fit it."""
    for k in range(4):
        FEW.iloc[25 * k : 25 * k + 25].to_parquet(tmp_path / f"{k}.parquet")
    (tmp_path / "_old").mkdir()
    (tmp_path / "_old" / "a.parquet").touch()
    (tmp_path / ".a.parquet").touch()
    assert here("score", folder / "run", ".", "--out", "new/out.parquet")[0] == 0
    np.testing.assert_allclose(pd.read_parquet("new/out.parquet").log_density, expected[:100], rtol=1e-9)
    (tmp_path / "new" / "out.parquet").unlink()
    assert here("density", ".", "--layers", 1, "--hidden", 8, "--epochs", 1, "--members", 1, "--out", "_run")[0] == 0
    assert json.loads((tmp_path / "_run" / "summary.json").read_text())["rows"] == {
        "train and validation": 80,
        "test": 20,
    }


def test_parts_have_different_seeds():
    """Expect distinct 32-bit seeds: at random, two of 100,000 would be equal with probability 2/3."""
    seeds = {seed_of_part(seed, number) for seed in (0, 1) for number in range(100_000)}
    assert len(seeds) == 200_000 and min(seeds) >= 0 and max(seeds) < 2**32


@over(["run", "given"], "run")
def test_a_part_is_drawn_by_its_number_alone(run, folder, here, tmp_path, monkeypatch):
    monkeypatch.setattr("counterflow.commands.density_output.ROWS_PER_PART", 40)
    context = ["--context", folder / "few.csv", "-n", 2] if run == "given" else ["-n", 200]
    for name, seed in (("a", 1), ("b", 2)):
        assert here("sample", folder / run, *context, "--seed", seed, "--out", name)[0] == 0
    a, b = (read(tmp_path / name, ".parquet") for name in "ab")
    assert a.shape == b.shape == (200, 3) and len(np.unique(a[:, -1])) == len(np.unique(a[:, -2])) == 200
    assert not np.isin(a, b[:, 1:]).any() or run == "given"
    (tmp_path / "a" / "part-00003.parquet").unlink()
    assert here("sample", folder / run, *context, "--seed", 1, "--out", "a")[0] == 0
    np.testing.assert_array_equal(read(tmp_path / "a", ".parquet"), a)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    cf.save(cf.VAE((1, 4, 4), latent=2, hidden=(8,), context=4, network="mlp"), folder / "model.safetensors")
    np.save(folder / "images.npy", RNG.random((50, 4, 4)))
    return folder


def test_parts_of_a_vae(vae, here, tmp_path, monkeypatch):
    monkeypatch.setattr("counterflow.commands.vae_output.ROWS_PER_SCORE_PART", 20)
    monkeypatch.setattr("counterflow.commands.vae_output.ROWS_PER_SAMPLE_PART", 20)
    score = ["score", vae, vae / "images.npy", "--samples", 4, "--out", "scores"]
    draw = ["sample", vae, "-n", 50, "--out", "drawn"]
    assert "50 rows (pixels binarised once): mean ELBO" in here(*score)[1]
    assert here(*draw) == (0, "50 samples; 3 parts in drawn\n", "")
    assert here("sample", vae, "-n", 5, "--out", "few") == (0, "5 samples; 1 part in few\n", "")
    scores, drawn = read(tmp_path / "scores", ".csv"), read(tmp_path / "drawn", ".npy")
    np.testing.assert_array_equal(scores[:, 0], np.arange(50))
    assert np.isfinite(scores).all() and len(np.unique(scores[:, 1])) == 50 and drawn.shape == (50, 1, 4, 4)
    sums = json.loads((tmp_path / "scores" / "_summary.json").read_text())["sums"]
    assert sums == pytest.approx(
        dict(zip(("rows", "elbo", "log_likelihood", "kl"), [50, *scores.sum(0)[1:]], strict=True))
    )
    for part in ("scores/part-00001.csv", "drawn/part-00002.npy"):
        (tmp_path / part).unlink()
    assert here(*score)[0] == here(*draw)[0] == 0
    np.testing.assert_array_equal(read(tmp_path / "scores", ".csv"), scores)
    np.testing.assert_array_equal(read(tmp_path / "drawn", ".npy"), drawn)


WISH = "expected --out to be a new folder, or one that this command started, got"
REFUSED = {
    "a file": ("score run few.csv --out file", "expected --out without a suffix to be a folder of parts, got file,"),
    "something else": ("score run few.csv --out empty", f"{WISH} empty, which holds other files; give another"),
    "other data": ("score run few.npy --out begun", f"{WISH} begun, started with another data; give another --out"),
    "another model": ("score given few.csv --out begun", f"{WISH} begun, started with another model; give another"),
    "another command": ("sample run --out begun", f"{WISH} begun, started with another command, data, n, seed, opt"),
    "another seed": ("sample run --seed 1 --out drawn", f"{WISH} drawn, started with another seed; give another --out"),
    "what does not read": ("score run few.csv --out broken", "expected broken/_about.json to be what counterfl"),
    "no rows": ("score run header.csv --out new", "expected at least one row, got none; add some"),
    "no Parquet files": ("score run empty --out new", "expected Parquet files in empty, got none; give such a folder"),
    "another column": (
        "score run columns --out new",
        "expected the columns of columns/0.parquet in every file of columns, a, b, c, in that order, got a, b in "
        "columns/1.parquet; remove that file or write it again",
    ),
    "types that differ": (
        "score run types --out new/one.parquet",
        "expected columns of one type each to write a Parquet file, got pyarrow.Field<c: int64> after another type; "
        "give --out as a folder, whose parts may differ",
    ),
    "another suffix": ("score run few.csv --out a.npy", "to end in .csv, as few.csv is such a table, or to be a na"),
    "an unknown suffix": ("sample run --out a.png", "got a.png; a name without a suffix is a folder of parts"),
}  # fmt: skip


@pytest.fixture
def material(folder, tmp_path):
    for name in ("run", "given", "few.csv", "few.npy"):
        (tmp_path / name).symlink_to(folder / name)
    for name in ("empty", "broken", "columns", "types"):
        (tmp_path / name).mkdir()
    for path in ("file", "empty/mine.txt"):
        (tmp_path / path).write_text("mine")
    (tmp_path / "broken" / "_about.json").write_text("{")
    (tmp_path / "header.csv").write_text("a,b,c\n")
    for name, other in (("columns", FEW[["a", "b"]]), ("types", FEW.assign(c=1))):
        FEW.to_parquet(tmp_path / name / "0.parquet")
        other.to_parquet(tmp_path / name / "1.parquet")
    return tmp_path


@over(REFUSED)
def test_refusals(name, material, here):
    assert here("score", "run", "few.csv", "--out", "begun")[0] == here("sample", "run", "--out", "drawn")[0] == 0
    before = everything(material)
    line, message = REFUSED[name]
    code, told, errors = here(*shlex.split(line))
    assert (code, told) == (2, "") and errors.count("\n") == 1
    assert message in errors
    assert everything(material) == before


class Second(Workers):
    """The second of two processes, on a disk where the first one's files are not."""

    def broadcast_bytes(self, content):
        return b'{"value": false}'


@over(
    [
        "score run few.csv",
        "score run few.csv --out a.csv",
        "sample run",
        "sample run --out a.csv",
        "score run few.csv --out a",
    ],
    "line",
)
def test_refusals_of_several_processes(line, material, here, monkeypatch):
    monkeypatch.setattr(Workers, "current", classmethod(lambda _: Second(1, 2)))
    before = everything(material)
    code, told, errors = here(*line.split())
    assert (code, told) == (2, "")
    if line.endswith("--out a"):
        assert "expected --out to be on a disk that all processes share, got a, which is not" in errors
    else:
        came = "a.csv" if "--out" in line else "none"
        assert "expected --out under torchrun to be a folder, a name without a suffix, where each process" in errors
        assert f"writes its own parts, got {came}\n" in errors
    assert everything(material) == before
