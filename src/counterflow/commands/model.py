"""What the commands that use a model share: finding it, data and pictures on its scale."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from counterflow.density.config import DESCRIPTION
from counterflow.io.data import Dataset
from counterflow.io.json import read_json
from counterflow.io.serialization import load
from counterflow.vae.likelihoods import DiscretizedLogistic
from counterflow.vae.vae import VAE


def kind_of_run(run: Path) -> str:
    """The command that made a run folder, or one of its files; vae where the folder does not say.

    Raises:
        ValueError: a command whose runs are neither scored nor sampled, or a config.json that does not read.
    """
    config = (run if run.is_dir() else run.parent) / "config.json"
    if not config.is_file():
        return "vae"
    command = read_json(config, "what a run of counterflow writes").get("command")
    if not isinstance(command, str):
        raise ValueError(f"expected {config} to name the command of a run of counterflow, got {command!r:.100}")
    if command == "distill" and (config.parent / DESCRIPTION).is_file():
        return "density"  # a student of one is used as its teacher
    if command not in ("vae", "density"):
        raise ValueError(f"expected a run folder of counterflow vae or density, got {run}, of {command:.100}")
    return command


def weights(run: Path) -> Path:
    """The weights file of a run folder, or the one that was given."""
    return run / "model.safetensors" if run.is_dir() else run


def trained(run: Path, kind: str = "counterflow") -> tuple[Any, Path]:
    """The model of a run folder, or of one weights file, and the folder.

    Raises:
        FileNotFoundError: there is no run of that kind, or none that saved a model.
    """
    if not run.exists():
        raise FileNotFoundError(f"expected a run folder of {kind}, got {run}, which does not exist")
    path = weights(run)
    if not path.is_file():
        others = ", ".join(str(p) for p in sorted(run.glob("*.safetensors"))) or "none"
        raise FileNotFoundError(f"expected {path}, which does not exist; other models in this folder: {others}")
    return load(path), path.parent


def trained_vae(run: Path) -> tuple[VAE, Path]:
    """The same for a VAE.

    Raises:
        FileNotFoundError: as `trained` does.
        ValueError: the model is not a VAE.
    """
    model, folder = trained(run, "counterflow vae")
    if not isinstance(model, VAE):
        raise ValueError(f"expected a VAE in {run}, got a {type(model).__name__}")
    return model, folder


def observed(dataset: Dataset, likelihood: str) -> Dataset:
    """The data as float32: whole numbers for the discretized logistic, else in [0, 1] where levels are known."""
    scaled = dataset if likelihood == "discretized_logistic" else dataset.unit()
    test = None if scaled.test is None else scaled.test.float()
    return dataclasses.replace(scaled, values=scaled.values.float(), test=test)


def picture(model: VAE, x: Tensor, like: Tensor | None = None) -> Any:
    """Images (n, C, H, W) as an array in [0, 1]; real numbers outside of it are scaled to the range of `like`, or x."""
    if isinstance(model.likelihood, DiscretizedLogistic):
        return (x / (model.likelihood.levels - 1)).cpu().numpy()
    low, high = ((x if like is None else like).aminmax()) if len(x) else (x.new_zeros(()), x.new_ones(()))
    low, high = low.clamp_max(0), high.clamp_min(1)
    return ((x - low) / (high - low)).cpu().numpy()
