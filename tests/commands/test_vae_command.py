"""counterflow vae, and sample and score of its runs: what a run leaves behind, and what bad input does not leave."""

import csv
import json
import math
import re
import shlex
import signal
import subprocess
import time
from functools import partial

import numpy as np
import pytest
import torch
from command_line import COMMAND, ENVIRONMENT, SMALL_VAE, everything, files, real
from PIL import Image
from registry import over

import counterflow as cf

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(60, 3)).astype(np.float32)
GREY = RNG.integers(0, 256, (40, 6, 5), dtype=np.uint8)
PICTURES = {"learning_curves.png", "posterior.png", "reconstructions.png", "samples.png"}
WEIGHTS = "model.safetensors"
PLAIN_RUN = {"config.json", "metrics.jsonl", "summary.json", "report.html", WEIGHTS}
RESULT = {"posterior", "test_elbo", "test_log_likelihood", "samples", "kl", "parameters", "seconds"}


def summary(run):
    return json.loads((run / "summary.json").read_text())


def check_pictures(run):
    assert {path.name for path in (run / "plots").iterdir()} == PICTURES
    for path in (run / "plots").iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 1


def check_result(result):
    numbers = {name: value for name, value in result.items() if isinstance(value, float)}
    assert result.keys() >= RESULT and all(map(math.isfinite, numbers.values()))
    assert result["test_log_likelihood"] > result["test_elbo"] and result["samples"] == 8


def test_vae_trains_both_posteriors(vae_run):
    folder, ran = vae_run
    run = folder / "digits"
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr and "warn" not in ran.stderr.lower()
    assert "gaussian" in ran.stdout and "iaf" in ran.stdout and "log-likelihood" in ran.stdout
    assert "digits/plots" in ran.stdout
    assert files(run) == PLAIN_RUN | {"model-gaussian.safetensors"} | {f"plots/{name}" for name in PICTURES}
    check_pictures(run)


def test_the_summary_of_a_run(vae_run):
    run = vae_run[0] / "digits"
    assert summary(run)["data"] == "digits"
    results = summary(run)["results"]
    assert [result["posterior"] for result in results] == ["gaussian", "iaf"]
    for result, name in zip(results, ("model-gaussian.safetensors", WEIGHTS), strict=True):
        check_result(result)
        vae = cf.load(run / name)
        assert vae.config()["posterior"] == result["posterior"] and vae.data_shape == (1, 8, 8)
        assert sum(p.numel() for p in vae.parameters()) == result["parameters"]
    assert results[1]["parameters"] > results[0]["parameters"]


def test_the_metrics_and_configuration_of_a_run(vae_run):
    run = vae_run[0] / "digits"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["task"], line["epoch"]) for line in lines] == [(p, k) for p in ("gaussian", "iaf") for k in (1, 2)]
    assert all(math.isfinite(line["train"]) and math.isfinite(line["validation"]) for line in lines)
    assert all(line["skipped"] == 0 and line["seconds"] > 0 for line in lines)
    config = json.loads((run / "config.json").read_text())
    assert (config["command"], config["version"], config["data"]) == ("vae", cf.__version__, "digits")
    assert (config["hidden"], config["latent"], config["fit"]["epochs"]) == ([16], 2, 2)


def test_sample_draws_from_a_run(vae_run, here):
    code, out, err = here("sample", vae_run[0] / "digits", "-n", 5, "--out", "new/five.npy")
    assert (code, err) == (0, "") and "new/five.npy and new/five.png" in out
    x = np.load("new/five.npy")
    assert x.shape == (5, 1, 8, 8) and set(np.unique(x)) == {0, 1}
    with Image.open("new/five.png") as picture:
        assert min(picture.size) > 100


def scores(path):
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(line["row"]) for line in table] == list(range(len(table)))
    return {name: np.array([float(line[name]) for line in table]) for name in ("elbo", "log_likelihood", "kl")}


def test_score_gives_the_elbo_and_likelihood_of_data(vae_run, here, tmp_path):
    code, out, _ = here("score", vae_run[0] / "digits", "digits", "--samples", 4, "--out", "scores.csv")
    assert code == 0
    found = scores(tmp_path / "scores.csv")
    assert all(len(column) == 1797 and np.isfinite(column).all() for column in found.values())
    assert (found["log_likelihood"] >= found["elbo"] - 1e-3).all()
    assert f"{found['elbo'].mean():.2f}" in out and "1797 rows" in out


@over(["sample", "score"], "command")
def test_the_seed_decides(command, vae_run, here, tmp_path):
    run = vae_run[0] / "digits" / "model-gaussian.safetensors"  # a file of weights will do as well
    np.save("few.npy", RNG.integers(0, 2, (7, 8, 8)))
    tail = ["few.npy", "--samples", 3] if command == "score" else ["--mean"]
    suffix = "csv" if command == "score" else "npy"
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        code, out, _ = here(command, run, *tail, "--seed", seed, "--out", f"{name}.{suffix}")
        assert code == 0 and f"{name}.{suffix}" in out
    a, b, c = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in "abc")
    assert a == b != c


def test_without_out_the_results_join_the_run(here, tmp_path):
    vae = cf.VAE((3,), latent=2, likelihood="gaussian", hidden=(8,), context=4, posterior_hidden=(8,))
    cf.save(vae, tmp_path / "run" / WEIGHTS)
    np.save("rows.npy", ROWS)
    assert here("sample", "run", "-n", 5)[0] == 0
    assert here("score", "run", "rows.npy", "--samples", 3)[0] == 0
    assert files(tmp_path / "run") == {WEIGHTS, "samples.npy", "scores.csv"}  # rows have no picture
    assert np.load("run/samples.npy").shape == (5, 3) and len(scores(tmp_path / "run" / "scores.csv")["kl"]) == 60


def write_csv(folder):
    np.savetxt(folder / "rows.csv", ROWS, delimiter=",", header="a,b,c", comments="")


def write_npz(folder):
    np.savez(folder / "arrays.npz", rows=ROWS, images=GREY.reshape(-1, 6, 5) / 255)


def write_folder(folder):
    (folder / "images").mkdir()
    for k, pixels in enumerate(GREY):
        Image.fromarray(pixels).save(folder / "images" / f"{k:02}.png")


OTHERS = {
    "csv of rows": (write_csv, "--data rows.csv --likelihood gaussian --posterior iaf", (3,)),
    "npz with a key": (write_npz, "--data arrays.npz --key images --posterior gaussian --network auto", (1, 6, 5)),
    "folder of images": (
        write_folder,
        "--data images --likelihood discretized_logistic --posterior iaf --free-bits 0.1 --groups 1",
        (1, 6, 5),
    ),
    "splines, path": (
        write_csv,
        "--data rows.csv --likelihood gaussian --posterior iaf --iaf-map spline --iaf-activation tanh "
        "--objective path_elbo --samples 2",
        (3,),
    ),
    "importance-weighted": (
        write_csv,
        "--data rows.csv --likelihood gaussian --posterior iaf --iaf-map affine --objective iw_elbo --samples 3",
        (3,),
    ),
    "one latent feature": (write_csv, "--data rows.csv --likelihood gaussian --posterior gaussian --latent 1", (3,)),
}


@over(OTHERS, quick=["csv of rows"])
def test_vae_on_other_data(name, here, tmp_path):
    write, arguments, shape = OTHERS[name]
    write(tmp_path)
    code, out, err = here("vae", *SMALL_VAE, "--out", "run", *arguments.split())
    run = tmp_path / "run"
    assert code == 0, err
    assert files(run) == PLAIN_RUN | {f"plots/{name}" for name in PICTURES}
    check_pictures(run)
    (result,) = summary(run)["results"]
    check_result(result)
    assert cf.load(run / WEIGHTS).data_shape == shape
    assert ("bits" in out) == ("logistic" in arguments)
    if "logistic" in arguments:
        assert result["bits_per_dim"] == pytest.approx(-result["test_log_likelihood"] / (30 * math.log(2)))
        assert here("sample", "run", "-n", 3)[0] == 0
        x = np.load(run / "samples.npy")
        assert (x == x.round()).all() and x.min() >= 0 and x.max() <= 255


@pytest.mark.slow
def test_two_runs_of_one_seed_are_the_same(here, tmp_path, monkeypatch):
    monkeypatch.setattr("counterflow.commands.vae_plots.plot_run", lambda *_: None)  # only time
    write_csv(tmp_path)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        arguments = ["--data", "rows.csv", "--likelihood", "gaussian", "--out", name, "--seed", seed]
        assert here("vae", *SMALL_VAE, *arguments)[0] == 0
    for file in (WEIGHTS, "model-gaussian.safetensors"):
        a, b, c = (cf.load(tmp_path / name / file).state_dict() for name in "abc")
        assert all(torch.equal(a[name], b[name]) for name in a) and not all(torch.equal(a[name], c[name]) for name in a)
    a, b = (summary(tmp_path / name)["results"] for name in "ab")
    assert [r["test_log_likelihood"] for r in a] == [r["test_log_likelihood"] for r in b]


def test_the_training_validation_and_test_parts(here, tmp_path, monkeypatch):
    """Grey values are binarised for training, validation and test alike; the tested weights are those of the file."""
    seen, tested = [], {}

    def elbo(model, x, *arguments, **more):
        seen.append((model.training, x.unique().tolist()))
        return cf.objectives.elbo(model, x, *arguments, **more) - (
            0 if model.training else 1000 * len(seen)
        )  # the first is best

    def evaluate(model, x, *arguments, **options):
        tested.update(model.state_dict(), x=x)
        return cf.objectives.evaluate(model, x, *arguments, **options)

    for name, spy in (("elbo", elbo), ("evaluate", evaluate), ("vae_plots.plot_run", lambda *_: None)):
        monkeypatch.setattr(f"counterflow.commands.vae_run.{name}", spy)
    np.save("grey.npy", GREY / 255)
    wild = "--posterior iaf --learning-rate 1 --schedule constant --warm-up-steps 0 --ema 0 --epochs 6 --out run"
    assert here("vae", *SMALL_VAE, "--data", "grey.npy", *wild.split())[0] == 0
    assert {training for training, _ in seen} == {True, False}
    assert all(values == [0, 1] for _, values in seen[1:]) and tested.pop("x").unique().tolist() == [0, 1]
    best = [json.loads(line)["best"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(best) == 6 and not best[-1]
    kept = cf.load(tmp_path / "run" / WEIGHTS).state_dict()
    assert all(torch.equal(kept[name], tested[name]) for name in kept)


def test_names_with_brackets_are_shown_as_they_are(here, tmp_path, monkeypatch):
    monkeypatch.setattr("counterflow.commands.vae_plots.plot_run", lambda *_: None)
    np.save(tmp_path / "[red].npy", ROWS)
    arguments = ["--data", "[red].npy", "--likelihood", "gaussian", "--posterior", "gaussian", "--out", "[bold]"]
    code, out, err = here("vae", *SMALL_VAE, *arguments)
    assert code == 0 and "[red].npy" in err and "[bold]" in out
    code, out, _ = here("score", "[bold]", "[red].npy", "--samples", 2)
    assert code == 0 and "[bold]/scores.csv" in out


@pytest.fixture
def listens_to_ctrl_c():
    """A shell's background jobs ignore SIGINT, and so would the processes that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.system
def test_ctrl_c_keeps_the_best_weights(tmp_path, listens_to_ctrl_c):
    run = tmp_path / "a folder with a name that is longer than the line" / "run"
    command = [*COMMAND, "vae", *SMALL_VAE, "--epochs", "100000", "--out", str(run)]
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "stderr": subprocess.PIPE, "text": True}
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    with subprocess.Popen(command, preexec_fn=listen, **options) as process:
        try:
            metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
            while not (metrics.is_file() and metrics.stat().st_size):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err and "interrupted" in err
    assert str(run / "model-gaussian.safetensors") in err
    left = {name for name in files(run) if not name.startswith("checkpoints/gaussian/")}
    assert left == {"config.json", "metrics.jsonl", "model-gaussian.safetensors"} and (run / "checkpoints").is_dir()
    assert cf.load(run / "model-gaussian.safetensors").sample(2).shape == (2, 1, 8, 8)


def test_ctrl_c_before_and_after_the_training(here, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    write_csv(tmp_path)
    arguments = [*SMALL_VAE, "--data", "rows.csv", "--likelihood", "gaussian", "--posterior", "iaf"]
    with monkeypatch.context() as patch:
        patch.setattr("counterflow.commands.vae_run.warm_up", interrupt)  # which is called at every step
        code, _, err = here("vae", *arguments, "--out", "before")
        assert code == 130 and "no epoch finished" in err
        assert not (tmp_path / "before").exists()  # nothing is left to go on from
    with monkeypatch.context() as patch:
        patch.setattr("counterflow.commands.vae_run.evaluate", interrupt)
        code, _, err = here("vae", *arguments, "--out", "after")
        assert code == 130 and "after/model.safetensors" in err
        assert cf.load(tmp_path / "after" / WEIGHTS).data_shape == (3,)


@pytest.mark.filterwarnings("default")
def test_a_training_that_diverges_says_so(here, tmp_path):
    write_csv(tmp_path)
    wild = "--learning-rate 1e30 --schedule constant --warm-up-steps 0 --ema 0 --max-skipped 1 --posterior gaussian"
    code, _, err = here(
        "vae", *SMALL_VAE, "--data", "rows.csv", "--likelihood", "gaussian", *wild.split(), "--out", "run"
    )
    assert code == 1 and "not finite" in " ".join(err.split()) and "smaller learning_rate" in " ".join(err.split())
    assert "Traceback" not in err and "no weights" in err
    assert files(tmp_path / "run") == {"config.json", "metrics.jsonl"}


@pytest.fixture(scope="session")
def bad_material(tmp_path_factory):
    """A folder with everything that BAD names."""
    folder = tmp_path_factory.mktemp("bad")
    np.save(folder / "rows.npy", ROWS)
    np.save(folder / "bytes.npy", GREY)
    np.save(folder / "binary.npy", GREY[:, :3, :2] > 99)
    np.save(folder / "nan.npy", np.where(np.arange(180).reshape(60, 3) == 7, np.nan, ROWS))
    np.savez(folder / "arrays.npz", rows=ROWS, images=GREY)
    for name in ("empty", "no model", "text"):
        (folder / name).mkdir()
    (folder / "text" / "a.txt").write_text("hello")
    (folder / "no model" / "model-gaussian.safetensors").write_bytes(b"")
    vae = cf.VAE((3,), latent=2, likelihood="gaussian", hidden=(8,), context=4, posterior_hidden=(8,))
    cf.save(vae, folder / "run" / WEIGHTS)
    images = cf.VAE((1, 3, 2), latent=2, hidden=(8,), context=4, network="mlp", posterior_hidden=(8,))
    cf.save(images, folder / "images" / WEIGHTS)
    cf.save(cf.MAF(3, hidden=(4,)), folder / "flow" / WEIGHTS)
    (folder / "broken").mkdir()
    (folder / "broken" / WEIGHTS).write_bytes(b"broken")
    for name in ("old.csv", "old.png"):
        (folder / name).write_text("mine")
    return folder


@pytest.fixture
def material(bad_material, tmp_path):
    """Everything that BAD names, as links in tmp_path."""
    for path in bad_material.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


GAUSSIAN = "vae --data rows.npy --likelihood gaussian "
BAD = {
    "missing folder": ("vae --data nowhere", "expected .* got nowhere, which does not exist"),
    "empty folder": ("vae --data empty", "expected IDX files or PNG, .* images in empty, got an empty folder"),
    "folder of texts": ("vae --data text", "got 1 other files, the first a.txt"),
    "bytes under Bernoulli": ("vae --data bytes.npy", r"values in \[0, 1\] .* got 0 to 255; rescale"),
    "rows under Bernoulli": ("vae --data rows.npy", r"values in \[0, 1\] for a Bernoulli"),
    "rows under logistic": ("vae --data rows.npy --likelihood discretized_logistic", "expected whole numbers in 0"),
    "nan": ("vae --data nan.npy --likelihood gaussian", "finite numbers in nan.npy, .* at row 2, column 1"),
    "no key": ("vae --data arrays.npz", "a key that names one array .* got no key; it holds rows .*, images"),
    "wrong key": ("vae --data arrays.npz --key labels", "expected a key that names one array .* got 'labels'"),
    "key without npz": (GAUSSIAN + "--key rows", "expected a key only with an .npz file"),
    "run folder that exists": (GAUSSIAN + "--out text", "new folder for the run, got text, which exists; give another"),
    "run folder that is a file": (GAUSSIAN + "--out old.csv", "expected a new folder for the run, got old.csv"),
    "large batch": (GAUSSIAN + "--batch-size 49", "batch of 49 training rows, got 48; set --batch-size to at most 48"),
    "hidden": (GAUSSIAN + "--hidden 0", "expected hidden to be a whole number of at least 1, got 0"),
    "iaf hidden": (GAUSSIAN + "--iaf-hidden 0", r"expected hidden\[0\] to be a whole number of at least 1, got 0"),
    "latent": (GAUSSIAN + "--latent 0", "expected latent to be a whole number of at least 1, got 0"),
    "convolved rows": (GAUSSIAN + "--network conv", "expected network to be mlp, or conv for images, got 'conv'"),
    "epochs": (GAUSSIAN + "--epochs 0", "expected epochs to be at least 1, got 0"),
    "batch size": (GAUSSIAN + "--batch-size -1", "expected batch_size to be at least 1, got -1"),
    "learning rate": (GAUSSIAN + "--learning-rate nan", "expected learning_rate to be above 0, got nan"),
    "samples": (GAUSSIAN + "--samples 0", "expected samples of at least 1, got 0"),
    "test samples": (GAUSSIAN + "--test-samples 0", "expected --test-samples to be at least 1, got 0"),
    "groups": (GAUSSIAN + "--free-bits 0.1 --groups 3", "expected groups to divide 2 latent features, got groups=3"),
    "free bits of another objective": (
        GAUSSIAN + "--free-bits 0.1 --objective iw_elbo",
        "expected --objective elbo with --free-bits, got iw_elbo",
    ),
    "free bits": (GAUSSIAN + "--free-bits -1", "expected free_bits .*got -1"),
    "device": (GAUSSIAN + "--device toaster", "expected .*device.* got 'toaster'"),
    "missing device": (GAUSSIAN + "--device cuda:99", "expected .*device.* got 'cuda:99'"),
    "sample a missing run": ("sample nowhere", "a run folder of counterflow .* vae, got nowhere, which does not"),
    "sample without a model": ("sample 'no model'", "expected no model/model.safetensors, .*/model-gaussian"),
    "sample a broken model": ("sample broken", "expected a safetensors file, got broken/model.safetensors"),
    "sample a flow": ("sample flow", "expected a VAE in flow, got a Flow"),
    "sample nothing": ("sample run -n 0", "expected -n to be at least 1, got 0"),
    "sample over a file": ("sample run --out old.csv", "expected a new file, got old.csv, which exists; give another"),
    "sample over an old picture": ("sample images --out old.npy", "expected a new file, got old.png, which exists"),
    "samples to a picture": ("sample images --out new.png", "expected .*new.png"),
    "score by a missing run": ("score nowhere rows.npy", "expected a run folder of counterflow .* vae, got nowhere"),
    "score without a model": ("score 'no model' rows.npy", "expected no model/model.safetensors, which does not exist"),
    "score nothing": ("score run nowhere.npy", "got nowhere.npy, which does not exist"),
    "score another shape": ("score run bytes.npy --out new/a.csv", r"of shape \(B, 3\), got \(40, 1, 6, 5\); this VAE"),
    "score other values": ("score images bytes.npy --out new/a.csv", "expected data of shape"),
    "score over a file": ("score run rows.npy --out old.csv", "expected a new file, got old.csv, which exists"),
    "score by no samples": ("score run rows.npy --samples 0", "expected samples of at least 1, got 0"),
    "score on a device": ("score run rows.npy --device toaster", "expected .*device.* got 'toaster'"),
    "sample on a device": ("sample run --device toaster", "expected .*device.* got 'toaster'"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(line, message, material, here):
    before = everything(material)
    arguments = shlex.split(line)
    code, out, err = here(*arguments[:1], *(SMALL_VAE if arguments[0] == "vae" else []), *arguments[1:])
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("counterflow: ")
    assert re.search(message, err), err
    assert everything(material) == before


@pytest.mark.system
def test_bad_input_of_a_real_process(material):
    before = everything(material)
    ran = real(material, "vae", *SMALL_VAE, "--data", "bytes.npy")
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1) and "rescale" in ran.stderr
    assert everything(material) == before
