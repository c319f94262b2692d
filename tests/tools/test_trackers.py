"""Experiment trackers: what trainings and commands log, read back from the files of TensorBoard, MLflow and wandb."""

import json
import math
import struct
import sys

import pytest
import torch
from command_line import SMALL_VAE

import counterflow as cf
from counterflow import cli
from counterflow.interop import trackers
from counterflow.training.tracking import LOGGED

ROWS = torch.randn(80, 2, generator=torch.Generator().manual_seed(0))
BLOCK = 1 << 15  # bytes, of wandb's files
CONFIG = cf.FitConfig(epochs=3, batch_size=32)


def train(tracker):
    flow = cf.MAF(features=2, layers=1, hidden=(8,), seed=0)
    return cf.fit(flow, cf.log_likelihood, ROWS[:64], ROWS[64:], CONFIG, tracker=tracker)


def figure():
    from matplotlib.figure import Figure

    made = Figure(figsize=(1, 1))
    made.subplots().plot([0, 1])
    return made


def events(folder):
    """Return what TensorBoard reads from a folder of event files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    return read.Reload()


def scalars(read):
    """Return the (step, value) of each scalar by tag."""
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def by_epoch(history, field):
    return [(epoch.epoch, pytest.approx(getattr(epoch, field))) for epoch in history.epochs]


def test_tensorboard_reads_a_training(tmp_path):
    pytest.importorskip("tensorboard")
    with trackers.TensorBoardTracker(tmp_path) as tracker:
        history = train(tracker)
        tracker.log_metric("more", 2.0, 7)
        tracker.add_figure("figure", figure(), 1)
    assert tracker.log_dir == str(tmp_path)
    read = events(tmp_path)
    found = scalars(read)
    assert found == {"more": [(7, 2.0)], **{f"training/{field}": by_epoch(history, field) for field in LOGGED}}
    (text,) = read.Tensors("params/learning_rate/text_summary")
    assert float(text.tensor_proto.string_val[0]) == CONFIG.learning_rate
    assert read.Images("figure")[0].width == 100


def test_mlflow_reads_a_training(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    uri = (tmp_path / "store").as_uri()
    with trackers.MLflowTracker("first", uri, "maf") as tracker:
        history = train(tracker)
        tracker.log_metric("worst", math.nan)
        tracker.add_figure("plots/figure", figure())
    with pytest.raises(ZeroDivisionError), trackers.MLflowTracker("second", uri, "maf") as failed:
        raise ZeroDivisionError
    client = MlflowClient(uri)
    run = client.get_run(tracker.run_id)
    assert run.info.run_name == "first" and run.info.status == "FINISHED"
    assert client.get_run(failed.run_id).info.status == "FAILED"
    assert client.get_experiment(run.info.experiment_id).name == "maf"
    assert run.data.params["epochs"] == "3" and math.isnan(run.data.metrics["worst"])
    for field in LOGGED:
        kept = client.get_metric_history(tracker.run_id, f"training/{field}")
        assert [(each.step, each.value) for each in kept] == by_epoch(history, field)
    assert [each.path for each in client.list_artifacts(tracker.run_id, "plots")] == ["plots/figure.png"]


def test_wandb_keeps_a_training(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    with trackers.WandbTracker(
        "first", mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True)
    ) as tracker:
        history = train(tracker)
        tracker.add_figure("figure", figure())
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    config, rows = wandb_records(file)
    assert config["epochs"] == 3
    for field in LOGGED:
        kept = [(row["training/step"], row[f"training/{field}"]) for row in rows if "training/step" in row]
        assert kept == by_epoch(history, field)
    assert rows[-1]["figure/format"] == "png"
    assert tracker._run.project == "counterflow" and tracker._run.name == "first"


def wandb_records(file):
    """Return the configuration and the history of the file of a run: a log of LevelDB's format, of records."""
    from wandb.proto import wandb_internal_pb2

    content, place, parts, config, rows = file.read_bytes(), 7, b"", {}, []
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:  # the rest of a block that holds no header
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind not in (1, 4):  # whole, or the last part
            continue
        record = wandb_internal_pb2.Record.FromString(parts)
        parts = b""
        config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return config, rows


def test_sbi_takes_a_tracker(tmp_path):
    pytest.importorskip("tensorboard")
    inference = pytest.importorskip("sbi.inference")
    from sbi.utils import BoxUniform

    with trackers.TensorBoardTracker(tmp_path) as tracker:
        trainer = inference.NPE(BoxUniform(-torch.ones(2), torch.ones(2)), tracker=tracker, show_progress_bars=False)
        with pytest.warns(UserWarning, match="not yet fully converged"):
            trainer.append_simulations(ROWS, ROWS).train(max_num_epochs=1)
    assert "epochs_trained" in scalars(events(tmp_path))


def test_a_command_logs_options_epochs_results_and_plots(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    assert cli.main(["vae", *SMALL_VAE, "-q", "--tracker", "tensorboard", "--out", str(run)]) == 0
    read = events(run / "tensorboard")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = scalars(read)
    for task in ("gaussian", "iaf"):
        expected = [(row["epoch"], pytest.approx(row["validation"])) for row in rows if row["task"] == task]
        assert found[f"{task}/validation"] == expected
    results = json.loads((run / "summary.json").read_text())["results"]
    assert found["summary/iaf/test_elbo"] == [(0, pytest.approx(results[1]["test_elbo"]))]
    assert {path.stem for path in (run / "plots").iterdir()} == {
        tag.removeprefix("plots/") for tag in read.Tags()["images"]
    }
    assert "params/warm_up/text_summary" in read.Tags()["tensors"]


def test_a_command_refuses_a_tracker_that_is_not_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = tmp_path / "run"
    assert cli.main(["vae", *SMALL_VAE, "-q", "--tracker", "wandb", "--out", str(out)]) == 2
    refused = capsys.readouterr().err
    assert refused.startswith("counterflow: expected wandb for --tracker wandb, got: ")
    assert refused.endswith("pip install 'counterflow[wandb]'\n") and not out.exists()
