"""Trained models in run folders: find one and load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from counterflow.density.config import DESCRIPTION, MODEL
from counterflow.io.json import read_json

if TYPE_CHECKING:
    from counterflow.vae.vae import VAE


def kind_of_run(run: Path) -> str:
    """Return "vae" or "density" for a run folder or one of its files; "vae" if the folder has no config.json.

    Raises:
        ValueError: runs of this command are neither scored nor sampled, or config.json is invalid.
    """
    config = (run if run.is_dir() else run.parent) / "config.json"
    if not config.is_file():
        return "vae"
    command = read_json(config, "the configuration of a counterflow run").get("command")
    if not isinstance(command, str):
        raise ValueError(f"expected {config} to name the command of a counterflow run, got {command!r:.100}")
    if command == "distill" and (config.parent / DESCRIPTION).is_file():
        return "density"  # the student of a density is used like its teacher
    if command not in ("vae", "density"):
        raise ValueError(f"expected a run folder of counterflow vae or density, got {run}, of {command:.100}")
    return command


def weights_file(run: Path) -> Path:
    """Return the weights file of a run folder; a file is returned as it is."""
    return run / MODEL if run.is_dir() else run


def load_trained(run: Path, kind: str = "counterflow") -> tuple[Any, Path]:
    """Return the model of a run folder, or of a weights file, and the folder.

    Args:
        run: run folder or .safetensors file.
        kind: the command that made the run, for the error.

    Raises:
        FileNotFoundError: there is no such run, or it has no weights.
    """
    from counterflow.io.serialization import load

    if not run.exists():
        raise FileNotFoundError(f"expected a run folder of {kind}, got {run}, which does not exist")
    path = weights_file(run)
    if not path.is_file():
        others = ", ".join(str(other) for other in sorted(run.glob("*.safetensors"))) or "none"
        raise FileNotFoundError(f"expected {path}, which does not exist; other models in this folder: {others}")
    return load(path), path.parent


def load_trained_vae(run: Path) -> tuple[VAE, Path]:
    """Return the VAE of a run folder, or of a weights file, and the folder.

    Raises:
        FileNotFoundError: there is no such run, or it has no weights.
        ValueError: the model is not a VAE.
    """
    from counterflow.vae.vae import VAE

    model, folder = load_trained(run, "counterflow vae")
    if not isinstance(model, VAE):
        raise ValueError(f"expected a VAE in {run}, got a {type(model).__name__}")
    return model, folder
