"""Finding the model of a run folder."""

from __future__ import annotations

from pathlib import Path

from counterflow.checkpoint import load
from counterflow.vae import VAE


def trained_vae(run: Path) -> tuple[VAE, Path]:
    """The VAE of a run folder, or of one weights file, and the folder.

    Raises:
        FileNotFoundError: there is no run, or none that saved a model.
        ValueError: the model is not a VAE.
    """
    if not run.exists():
        raise FileNotFoundError(f"expected a run folder of counterflow vae, got {run}, which does not exist")
    path = run / "model.safetensors" if run.is_dir() else run
    if not path.is_file():
        others = ", ".join(str(p) for p in sorted(run.glob("*.safetensors"))) or "none"
        raise FileNotFoundError(f"expected {path}, which does not exist; other models in this folder: {others}")
    model = load(path)
    if not isinstance(model, VAE):
        raise ValueError(f"expected a VAE in {path}, got a {type(model).__name__}")
    return model, path.parent
