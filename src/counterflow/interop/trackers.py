"""Clients of experiment trackers for `tracker=`: TensorBoard, Weights & Biases and MLflow.

Each is a context that ends the run; an error within the block marks the run as failed where the tracker knows the word.
They have the methods of sbi's trackers, so `NPE(tracker=...)` takes them as well.
"""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

from counterflow.checks import one_of, require
from counterflow.training.config import TrackerName

EVENTS = "tensorboard"  # folder of the event files in that of a run
MAX_PARAM = 500  # characters of a setting that every version of MLflow stores
PROJECT = "counterflow"  # of runs, unless an environment variable of the tracker names another one


class _Client:
    """Base of the clients: a context, and one number as a dictionary of one."""

    log_dir: str | None = None  # where the files are, if on this machine; sbi asks for it

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        """Log a number."""
        self.log_metrics({name: value}, step)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log several numbers of one step."""
        raise NotImplementedError

    def flush(self) -> None:
        """Write what is held back."""

    def close(self, failed: bool = False) -> None:
        """End the run."""
        raise NotImplementedError


class TensorBoardTracker(_Client):
    """Client of TensorBoard: writes event files, which `tensorboard --logdir FOLDER` shows.

    Args:
        folder: for the event files.

    Raises:
        ImportError: tensorboard is not installed.

    Example:
        >>> import tempfile, torch, counterflow as cf
        >>> from counterflow.interop.trackers import TensorBoardTracker
        >>> flow, rows = cf.MAF(features=2, layers=1, hidden=(8,)), torch.randn(60, 2)
        >>> config = cf.FitConfig(epochs=2, batch_size=50)
        >>> with TensorBoardTracker(tempfile.mkdtemp()) as tracker:
        ...     history = cf.fit(flow, cf.log_likelihood, rows[:50], rows[50:], config, tracker=tracker)
    """

    def __init__(self, folder: Path | str) -> None:
        require("tensorboard", "tensorboard", "TensorBoard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        self.log_dir = str(folder)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log several numbers of one step, each as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_params(self, params: dict[str, Any]) -> None:
        """Log settings, as the texts params/NAME."""
        for name, value in params.items():
            self._writer.add_text(f"params/{name}", str(value))

    def add_figure(self, name: str, figure: Any, step: int | None = None) -> None:
        """Log a figure of Matplotlib, as an image."""
        self._writer.add_figure(name, figure, step, close=False)

    def flush(self) -> None:
        """Write the events to the file."""
        self._writer.flush()

    def close(self, failed: bool = False) -> None:
        """Close the event file."""
        self._writer.close()


class WandbTracker(_Client):
    """Client of Weights & Biases: one run of `wandb.init`.

    The numbers of each task have a step of their own, TASK/step, because the steps of a run may only grow.

    Args:
        name: name of the run; wandb makes one up if None.
        settings: further arguments of `wandb.init`. The project is that of WANDB_PROJECT, or counterflow.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, name: str | None = None, **settings: Any) -> None:
        wandb = require("wandb", "wandb", "Weights & Biases")
        self._image = wandb.Image
        self._run = wandb.init(name=name, **{"project": os.environ.get("WANDB_PROJECT", PROJECT), **settings})
        self._tasks: set[str] = set()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log several numbers of one step."""
        if step is None:
            self._run.log(metrics)
            return
        tasks = {name.rpartition("/")[0] for name in metrics}
        for task in tasks - self._tasks:
            self._run.define_metric(f"{task}/*", step_metric=f"{task}/step")
        self._tasks |= tasks
        self._run.log({**metrics, **{f"{task}/step": step for task in tasks}})

    def log_params(self, params: dict[str, Any]) -> None:
        """Log settings, in the configuration of the run."""
        self._run.config.update(params, allow_val_change=True)

    def add_figure(self, name: str, figure: Any, step: int | None = None) -> None:
        """Log a figure of Matplotlib, as an image."""
        from PIL import Image  # wandb itself takes only figures of pyplot; Matplotlib brings this package

        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        self._run.log({name: self._image(Image.open(buffer))})

    def close(self, failed: bool = False) -> None:
        """Finish the run."""
        self._run.finish(exit_code=int(failed))


class MLflowTracker(_Client):
    """Client of MLflow: one run, by its `MlflowClient`.

    Args:
        name: name of the run; MLflow makes one up if None.
        tracking_uri: server, or folder as file:PATH; by default that of MLFLOW_TRACKING_URI, or MLflow's own.
        experiment: name of the experiment, which is created if there is none; by default that of
            MLFLOW_EXPERIMENT_NAME, or counterflow.

    Raises:
        ImportError: mlflow is not installed.
    """

    def __init__(self, name: str | None = None, tracking_uri: str | None = None, experiment: str | None = None) -> None:
        require("mlflow", "mlflow", "MLflow")
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        self._entities = entities
        self._client = MlflowClient(tracking_uri)
        experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        identifier = self._client.create_experiment(experiment) if found is None else found.experiment_id
        self.run_id: str = self._client.create_run(identifier, run_name=name).info.run_id

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log several numbers of one step."""
        now = time.time_ns() // 1_000_000
        rows = [self._entities.Metric(name, float(value), now, step or 0) for name, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=rows)

    def log_params(self, params: dict[str, Any]) -> None:
        """Log settings; long values are cut."""
        rows = [self._entities.Param(name, str(value)[:MAX_PARAM]) for name, value in params.items()]
        self._client.log_batch(self.run_id, params=rows)

    def add_figure(self, name: str, figure: Any, step: int | None = None) -> None:
        """Log a figure of Matplotlib, as the artifact NAME.png."""
        self._client.log_figure(self.run_id, figure, f"{name}.png")

    def close(self, failed: bool = False) -> None:
        """End the run, as FINISHED or FAILED."""
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


def open_tracker(kind: TrackerName, name: str, folder: Path) -> TensorBoardTracker | WandbTracker | MLflowTracker:
    """Return the client of a tracker of this kind, for one run.

    Args:
        kind: tensorboard, wandb or mlflow.
        name: name of the run.
        folder: for local files: event files in folder/tensorboard, or those that wandb sends later.

    Raises:
        ValueError: an unknown kind.
        ImportError: its package is not installed.
    """
    one_of(kind, "the tracker", get_args(TrackerName))
    if kind == "tensorboard":
        return TensorBoardTracker(folder / EVENTS)
    return MLflowTracker(name) if kind == "mlflow" else WandbTracker(name, dir=str(folder))
