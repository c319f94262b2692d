"""counterflow density, and score and sample of its runs: tables in, tables out, and what bad input leaves behind."""

import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from command_line import NUMBERS, ONE_FLOW, SUFFIXES, TABLE, N, everything, files, read_table, real, write_table
from PIL import Image
from pyarrow import parquet

import counterflow as cf
from counterflow.density.fitting import DensityTrainer
from counterflow.density.model import TableDensity

FILES = {
    *("config.json", "density.json", "metrics.jsonl", "model.safetensors", "report.html", "summary.json"),
    *("plots/calibration.png", "plots/learning_curve.png", "plots/pairs.png", "plots/scores.png"),
}
RNG = np.random.default_rng(0)


def test_a_run_leaves_its_folder(density_runs):
    folder, ran = density_runs
    assert files(folder / "plain") == FILES
    assert "Traceback" not in ran.stderr and "warn" not in ran.stderr.lower()
    assert "3 columns; 96 rows to train and validate, 24 to test" in ran.stderr
    for word in ("flow", "Gaussian mixture", "by BIC", "difference", "plain/plots"):
        assert word in ran.stdout
    for path in (folder / "plain" / "plots").iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 1
    config = json.loads((folder / "plain" / "config.json").read_text())
    assert (config["command"], Path(config["data"]).name) == ("density", "table.csv")
    assert config["fit"]["hidden"] == [8]
    metrics = [json.loads(line) for line in (folder / "plain" / "metrics.jsonl").read_text().splitlines()]
    tasks = ["member 1", "member 1 without correlations", "member 2", "member 3"]
    assert [(m["task"], m["epoch"]) for m in metrics] == [(task, epoch) for task in tasks for epoch in (1, 2)]


def test_the_summary_is_that_of_the_test_rows(density_runs):
    folder, _ = density_runs
    summary = json.loads((folder / "plain" / "summary.json").read_text())
    test = np.random.default_rng(0).permutation(N)[:24]
    scores = cf.FlowDensity.load(folder / "plain").score_samples(NUMBERS.iloc[test])
    assert summary["test_log_density"] == pytest.approx(scores.mean(), rel=1e-9)
    assert summary["standard_error"] == pytest.approx(scores.std(ddof=1) / math.sqrt(24), rel=1e-9)
    assert summary["rows"] == {"train and validation": 96, "test": 24}
    assert summary["columns"] == {"x": "linear", "count": "linear", "income": "log"}
    mixture, difference = summary["gaussian_mixture"], summary["difference"]
    gap = summary["test_log_density"] - mixture["test_log_density"]
    assert difference["log_density"] == pytest.approx(gap) and difference["standard_error"] > 0
    given = json.loads((folder / "given" / "summary.json").read_text())
    assert given["context"] == ["colour"] and "gaussian_mixture" not in given


@pytest.mark.slow
def test_the_bundled_table_beats_a_gaussian_mixture(here, tmp_path):
    assert here("density", "--epochs", 8, "--out", "run")[0] == 0
    difference = json.loads((tmp_path / "run" / "summary.json").read_text())["difference"]
    assert difference["log_density"] > 0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_score_adds_a_column(suffix, density_runs, tables, here, tmp_path):
    folder, _ = density_runs
    out = f"new/scores{'.npy' if suffix == '.npz' else suffix}"
    key = ["--key", "rows"] if suffix == ".npz" else []
    code, told, err = here("score", folder / "plain", tables / f"numbers{suffix}", *key, "--out", out)
    assert (code, err) == (0, "") and out in told and "120 rows: mean log density" in told
    scored = read_table(tmp_path / out, [*NUMBERS, "log_density"])
    expected = cf.FlowDensity.load(folder / "plain").score_samples(NUMBERS)
    np.testing.assert_allclose(scored.pop("log_density"), expected, rtol=1e-9)
    np.testing.assert_allclose(scored.to_numpy(float), NUMBERS.to_numpy(float), rtol=1e-15)
    assert f"{expected.mean():.3f}" in told
    assert files(tmp_path) == {out}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_score_matches_columns_by_name_and_carries_others(suffix, density_runs, here, tmp_path):
    folder, _ = density_runs
    shuffled = TABLE[["income", "colour", "id", "count", "x"]]
    write_table(shuffled, tmp_path / f"in{suffix}")
    assert here("score", folder / "given", f"in{suffix}", "--out", f"out{suffix}")[0] == 0
    scored = read_table(tmp_path / f"out{suffix}")
    assert list(scored) == [*shuffled, "log_density"]
    assert scored[["id", "colour"]].equals(shuffled[["id", "colour"]])
    expected = cf.FlowDensity.load(folder / "given").score_samples(NUMBERS, TABLE[["colour"]])
    np.testing.assert_allclose(scored.log_density, expected, rtol=1e-9)


def test_score_streams_in_batches(density_runs, here, tmp_path, monkeypatch):
    """Many batches, of many row groups, score as one does, in the order of the file."""
    folder, _ = density_runs
    big = pd.concat([NUMBERS] * 9, ignore_index=True)
    parquet.write_table(pa.Table.from_pandas(big), tmp_path / "big.parquet", row_group_size=100)
    write_table(big, tmp_path / "big.csv")
    expected = np.tile(cf.FlowDensity.load(folder / "plain").score_samples(NUMBERS), 9)
    monkeypatch.setattr("counterflow.commands.density_output.BATCH", 64)
    monkeypatch.setattr("counterflow.io.data.csv.BLOCK", 4096)
    for suffix in (".csv", ".parquet"):
        assert here("score", folder / "plain", f"big{suffix}", "--out", f"out{suffix}")[0] == 0
        np.testing.assert_allclose(read_table(tmp_path / f"out{suffix}").log_density, expected, rtol=1e-9)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sample_draws_a_table(suffix, density_runs, here, tmp_path):
    folder, _ = density_runs
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        code, told, err = here("sample", folder / "plain", "-n", 50, "--seed", seed, "--out", f"{name}{suffix}")
        assert (code, err) == (0, "") and "50 rows" in told
    a, b, c = (read_table(tmp_path / f"{name}{suffix}", list(NUMBERS)) for name in "abc")
    assert list(a) == list(NUMBERS) and len(a) == 50 and a.equals(b) and not a.equals(c)
    assert (a["count"] == a["count"].round()).all() and (a.income > 0).all()


def test_sample_given_a_context(density_runs, here, tmp_path):
    folder, _ = density_runs
    write_table(TABLE[["id", "colour"]].head(5), tmp_path / "given.csv")
    for suffix in (".csv", ".parquet"):
        arguments = ["-n", 3, "--context", "given.csv", "--out", f"out{suffix}"]
        assert here("sample", folder / "given", *arguments)[0] == 0
        drawn = read_table(tmp_path / f"out{suffix}")
        assert list(drawn) == ["colour", *NUMBERS] and drawn.colour.tolist() == np.repeat(TABLE.colour[:5], 3).tolist()
    assert here("sample", folder / "given", "--context", "given.csv", "--out", "one.csv")[0] == 0
    assert len(read_table(tmp_path / "one.csv")) == 5


def test_without_out_the_results_join_the_run(density_runs, copy_of, tables, here):
    run = copy_of(density_runs[0] / "plain")
    assert here("score", "run/model.safetensors", tables / "numbers.csv")[0] == 0
    assert here("sample", "run")[0] == 0
    assert files(run) == FILES | {"scores.csv", "samples.csv"}
    assert len(read_table(run / "samples.csv")) == 64


def test_one_column_and_no_names(here, tmp_path):
    np.savetxt("rows.csv", NUMBERS[["x"]])
    assert here("density", "rows.csv", *ONE_FLOW, "--out", "run")[0] == 0
    assert here("score", "run", "rows.csv", "--out", "out.csv")[0] == 0
    assert list(read_table(tmp_path / "out.csv")) == ["f0", "log_density"]
    assert (tmp_path / "run" / "plots" / "pairs.png").is_file()


@pytest.mark.slow
def test_a_thousand_columns(here, tmp_path):
    np.save("wide.npy", RNG.normal(size=(40, 1000)))
    assert here("density", "wide.npy", "--layers", 1, "--hidden", 4, "--epochs", 1, "--out", "run")[0] == 0
    assert here("score", "run", "wide.npy", "--out", "out.npy")[0] == 0
    assert np.load("out.npy").shape == (40, 1001)


@pytest.fixture(scope="session")
def bad_tables(tables, tmp_path_factory):
    """A folder with broken tables and run folders."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("empty.csv", "empty.parquet", "empty.npy", "empty.npz", "old.csv", "table.xlsx"):
        (folder / name).touch()
    (folder / "header.csv").write_text("x,count,income\n")
    (folder / "ragged.csv").write_text("x,count,income\n1,2,3\n4,5\n6,7,8\n")
    (folder / "twice.csv").write_text("x,count,income,x\n1,2,3,4\n")
    (folder / "other.csv").write_text("x,count,salary\n1,2,3\n")
    (folder / "scored.csv").write_text("x,count,income,log_density\n1,2,3,4\n")
    (folder / "pink.csv").write_text("x,count,income,colour\n1,2,3,red\n1,2,3,pink\n")
    rows = "".join(f"{k},{k * k % 7},{k + 0.5}\n" for k in range(20_000))  # the bad cell is in a later batch
    for name, cell in (("text", "high"), ("gap", ""), ("inf", "inf"), ("nan", "nan")):
        (folder / f"{name}.csv").write_text(f"x,count,income\n{rows}1,{cell},3\n")
    parquet.write_table(pa.table({"x": [1.0, 2], "count": ["5", "many"], "income": [1, 2]}), folder / "text.parquet")
    parquet.write_table(pa.table({"x": [1.0, None], "count": [5, 6], "income": [1, 2]}), folder / "gap.parquet")
    good = (tables / "numbers.parquet").read_bytes()
    (folder / "footer.parquet").write_bytes(good[:-60] + bytes(52) + good[-8:])
    (folder / "cut.parquet").write_bytes(good[: len(good) // 2])
    (folder / "one.csv").write_text("x,count,income\n1,2,3\n")
    same = NUMBERS.assign(copy=2 * NUMBERS.x, still=1)
    write_table(same, folder / "same.csv")
    np.save(folder / "cube.npy", np.ones((3, 4, 5)))
    for name, config in (
        ("posterior", '{"command": "posterior"}'),
        ("broken", "{"),
        ("bare", '{"command": "density"}'),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
    return folder


@pytest.fixture
def material(density_runs, tables, bad_tables, tmp_path):
    """All that BAD names, as links in tmp_path."""
    runs = [density_runs[0] / run for run in ("plain", "given")]
    for path in [*runs, *tables.iterdir(), *bad_tables.iterdir()]:
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


BAD = {
    "no table": ("density nowhere.csv", "expected a table .*, got nowhere.csv, which does"),
    "no such format": ("density table.ods", "expected a table .*, got table.ods, which does not exist"),
    "empty csv": ("density empty.csv", "expected empty.csv to be a CSV table .* does not read: Empty CSV file"),
    "empty parquet": ("density empty.parquet", "expected empty.parquet to be a Parquet file, but it does not read"),
    "empty npy": ("density empty.npy", "expected empty.npy to be a NumPy .npy file, but it does not read"),
    "empty npz": ("density empty.npz", "expected empty.npz to be a NumPy .npz file, but it does not read"),
    "header alone": ("density header.csv", "expected at least 10 rows in header.csv, got 0"),
    "one row": ("density one.csv", "expected at least 10 rows in one.csv, got 1; provide more data"),
    "ragged": ("density ragged.csv", "expected ragged.csv to be a CSV table .*Row #3: Expected 3 columns, got 2"),
    "names twice": ("density twice.csv", r"distinct names of columns in twice.csv, got \['x'\] more than once"),
    "text": ("density table.csv", "got text in 'id' .'r0' in row 0.; .*no categories .id.; try --drop id$"),
    "late text": ("density text.csv", "in every cell of text.csv, got text in 'count' .'high' in row 20000.;"),
    "late gap": ("density gap.csv", "missing cells in 'count' .1, the first in row 20000.; .* leaves out 1 of 20,001"),
    "late nan": ("density nan.csv", "got missing cells in 'count' .1, the first in row 20000.; .*--drop-missing$"),
    "late inf": ("density inf.csv", "infinite numbers in 'count' .the first in row 20000.; .* --drop count$"),
    "text in parquet": ("density text.parquet", "of text.parquet, got text in 'count' .'many' in row 1.; rows are"),
    "gap in parquet": ("density gap.parquet", "every cell of gap.parquet, got missing cells in 'x' .1, the first"),
    "corrupt footer": ("density footer.parquet", "expected footer.parquet to be a Parquet file, but it does not read"),
    "cut parquet": ("density cut.parquet", "expected cut.parquet to be a Parquet file, but it does not read"),
    "cube": ("density cube.npy", r"expected rows \(N, D\) in cube.npy, got shape \(3, 4, 5\)"),
    "no key": ("density numbers.npz", "expected a key that names one array of numbers.npz, got no key"),
    "key elsewhere": ("density numbers.csv --key a", "expected a key only with an .npz file, got 'a'"),
    "copies": ("density same.csv --constant error", "non-constant columns; 'still' is constant and 'copy'"),
    "strange context": ("density numbers.csv --context hue", r"expected names of columns \(x, count, income\), got hu"),
    "no bounds": ("density numbers.csv --bounds x", "expected --bounds COLUMN=LOW:HIGH, such as share=0:1 .* got x$"),
    "text as bounds": ("density numbers.csv --bounds x=0:much", "expected --bounds COLUMN=LOW:HIGH, .* got x=0:much"),
    "strange bounds": ("density numbers.csv --bounds hue=0:1", r"expected names of columns \(x, count, income\), got"),
    "outside": ("density numbers.csv --bounds x=0:1", r"expected numbers in \[0.0, 1.0\] in column 'x', its stated"),
    "strange grade": ("density numbers.csv --ordinal hue", r"expected names of columns \(x, count, income\), got hue"),
    "all dropped": ("density numbers.csv --drop x count income", "expected at least one column besides --context and "),
    "old run": ("density numbers.csv --out plain", "expected a new folder for the run, got plain, which exists"),
    "test part": ("density numbers.csv --test 1", r"expected --test to be in \(0, 1\), got 1"),
    "epochs": ("density numbers.csv --epochs 0", "expected epochs to be a whole number of at least 1, got 0"),
    "device": ("density numbers.csv --device toaster", "expected device to be an available .* got 'toaster'"),
    "score nothing": ("score plain nowhere.csv", "got nowhere.csv, which does not exist"),
    "score no rows": ("score plain header.csv --out new/a.csv", "expected at least one row in header.csv, got none"),
    "score empty": ("score plain empty.csv --out new/a.csv", "does not read: Empty CSV file"),
    "score ragged": ("score plain ragged.csv --out new/a.csv", "Expected 3 columns, got 2"),
    "score other columns": (
        "score plain other.csv --out new/a.csv",
        "expected the trained columns in other.csv, got none called income; .* not trained on: salary",
    ),
    "score late text": ("score plain text.csv --out new/a.csv", "column 'count' of text.csv, got 'high' in row 20000"),
    "score late inf": ("score plain inf.csv --out new/a.csv", "got infinite .inf.: row 20000 of 'count'"),
    "score corrupt": ("score plain footer.parquet --out new/a.parquet", "expected footer.parquet to be a Parquet file"),
    "score scored": ("score plain scored.csv --out new/a.csv", "a table without a column 'log_density'"),
    "score over a file": ("score plain numbers.csv --out old.csv", "expected a new file, got old.csv, which exists"),
    "score to another format": ("score plain numbers.csv --out a.npy", "expected --out to end in .csv, as numbers.csv"),
    "score without context": ("score given numbers.csv --out new/a.csv", "got none called colour"),
    "score unseen": ("score given pink.csv --out new/a.csv", "that training saw .*, got 'pink' in row 1"),
    "score by a posterior": ("score posterior numbers.csv", "a run folder of counterflow vae or density, got posterio"),
    "score by a broken run": ("score broken numbers.csv", "expected broken/config.json to be the configuration of"),
    "score by a bare run": ("score bare numbers.csv", "expected bare/density.json, which FlowDensity.save writes"),
    "score by a missing run": ("score nowhere numbers.csv", "expected a run folder .* got nowhere, which does not exi"),
    "sample nothing": ("sample plain -n 0", "expected -n to be at least 1, got 0"),
    "sample by a posterior": ("sample posterior -n 3", "a run folder of counterflow vae or density, got posterior"),
    "sample to a picture": ("sample plain --out a.png", "expected --out to end in one of .csv, .tsv, .csv.gz, "),
    "sample over a file": ("sample plain --out old.csv", "expected a new file, got old.csv, which exists"),
    "sample without context": ("sample given --out a.csv", r"expected --context FILE with \['colour'\], .* got none"),
    "sample with context": ("sample plain --context table.csv --out a.csv", "expected no --context, as this run was t"),
    "sample of other context": ("sample given --context numbers.csv --out new/a.csv", "got none called colour"),
    "sample of unseen": ("sample given --context pink.csv --out new/a.csv", "got 'pink' in row 1"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(line, message, material, here):
    before = everything(material)
    command, *rest = shlex.split(line)
    code, out, err = here(command, *rest, *(ONE_FLOW if command == "density" and "--epochs" not in rest else []))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("counterflow: ")
    assert re.search(message, err), err
    assert everything(material) == before


@pytest.mark.system
def test_bad_input_of_a_real_process(material):
    before = everything(material)
    ran = real(material, "score", "plain", "text.csv", "--out", "new/a.csv")
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1) and "row 20000" in ran.stderr
    assert everything(material) == before


def test_ctrl_c_while_scoring_leaves_no_file(density_runs, tables, here, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(TableDensity, "score", interrupt)
    code, _, err = here("score", density_runs[0] / "plain", tables / "numbers.csv", "--out", "new/a.csv")
    assert code == 130 and "interrupted" in err and not list(tmp_path.iterdir())


def test_ctrl_c_keeps_the_best_weights(here, tmp_path, monkeypatch):
    fit = DensityTrainer.fit

    def interrupted(self, *, on_epoch, **more):
        def stop(task, epoch):
            on_epoch(task, epoch)
            raise KeyboardInterrupt

        return fit(self, on_epoch=stop, **more)

    monkeypatch.setattr(DensityTrainer, "fit", interrupted)
    write_table(NUMBERS, tmp_path / "numbers.csv")
    code, out, err = here("density", "numbers.csv", *ONE_FLOW, "--out", "run")
    assert code == 130 and "interrupted; these are the best weights so far" in err and "flow" in out
    assert files(tmp_path / "run") == FILES


def test_a_table_as_it_comes_takes_two_runs(here, tmp_path):
    """All columns are complained about at once, with the options that settle it."""
    share = np.where(np.arange(N) % 10, RNG.uniform(size=N), 0.0)
    grade = pd.Series(RNG.integers(1, 4, N), dtype="Int64").where(np.arange(N) % 7 > 0)
    messy = TABLE.assign(day="2024-01-02", share=share, grade=grade, still=1.0, copy=2 * TABLE.x)
    write_table(messy, tmp_path / "messy.csv")
    code, _, err = here("density", "messy.csv", *ONE_FLOW, "--out", "run")
    assert code == 2 and not (tmp_path / "run").exists()
    for text in (
        "text in 'id' ('r0' in row 0); missing cells in 'grade' (18, the first in row 0)",
        "--drop-missing leaves out 18 of 120 rows; try --drop id --drop-missing\n",
    ):
        assert text in err, err
    options = "--drop id --drop-missing --context colour --bounds share=0:1 income=0: --ordinal grade"
    code, _, err = here("density", "messy.csv", *options.split(), *ONE_FLOW, "--out", "run")
    assert code == 0, err
    density = cf.FlowDensity.load(tmp_path / "run")
    kinds = {column.name: column.map for column in density.columns_.columns}
    assert "left out columns: 'day' is constant; 'still' is constant; 'copy' is an affine copy of 'x'" in err
    assert kinds["grade"] == "ordinal" and kinds["share"] == "logit" and kinds["income"] == "log"


def test_a_rare_category_is_in_the_training_part(here, tmp_path):
    """A category of one row would be in the test part of seed 0, where the density could not be evaluated."""
    test = np.random.default_rng(0).permutation(N)[:24]
    rare = TABLE.assign(colour=np.where(np.arange(N) == test[5], "pink", TABLE.colour))
    write_table(rare, tmp_path / "rare.csv")
    code, _, err = here("density", "rare.csv", "--context", "colour", "--drop", "id", *ONE_FLOW, "--out", "run")
    assert code == 0 and "97 rows to train and validate, 23 to test" in err
    assert "pink" in (tmp_path / "run" / "density.json").read_text()


def test_a_context_of_names_is_refused_before_training(here, tmp_path):
    write_table(TABLE, tmp_path / "table.csv")
    code, _, err = here("density", "table.csv", "--context", "id", "--drop", "colour", *ONE_FLOW, "--out", "run")
    assert code == 2 and "expected rows to test whose categories are in training rows as well, got none" in err
    assert not (tmp_path / "run").exists()


def test_an_error_after_training_does_not_lose_the_training(here, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ValueError("expected a finite mean, got nan")

    monkeypatch.setattr("counterflow.commands.density_run.mixture_log_density", fails)
    write_table(NUMBERS, tmp_path / "numbers.csv")
    code, _, err = here("density", "numbers.csv", *ONE_FLOW, "--out", "run")
    assert code == 2 and "expected a finite mean" in err
    assert np.isfinite(cf.FlowDensity.load(tmp_path / "run").score_samples(NUMBERS)).all()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert here("density", "--resume", "run")[0] == 0
    assert files(tmp_path / "run") == FILES
