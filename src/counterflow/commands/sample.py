"""counterflow sample: draw from a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from counterflow import plots
from counterflow.commands import console
from counterflow.commands.model import picture, trained_vae


@dataclass(frozen=True)
class Sample:
    """Draw data from a trained VAE: z from the prior, x from p(x|z). Writes an .npy file, and a picture for images."""

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """run folder of counterflow vae, or one of its .safetensors files"""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 64
    """how many"""
    mean: bool = False
    """the mean of p(x|z) in place of a draw from it"""
    seed: int = 0
    """of the draws"""
    out: Path | None = None
    """the .npy file, which must be new; samples.npy in the run folder when not given"""

    def run(self) -> int:
        """Write the samples."""
        if self.n < 1:
            raise ValueError(f"expected n of at least 1, got {self.n}")
        model, folder = trained_vae(self.run_folder)
        path = console.new_file(self.out or folder / "samples.npy")
        if path.suffix != ".npy":
            raise ValueError(f"expected --out to end in .npy, got {path}; the picture goes beside it, as .png")
        image = console.new_file(path.with_suffix(".png")) if len(model.data_shape) == 3 else None
        torch.manual_seed(self.seed)
        x = torch.cat([model.sample(min(1024, self.n - first), self.mean) for first in range(0, self.n, 1024)])
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, x.numpy())
        if image is not None:
            grid = {f"{min(self.n, 256)} of {self.n} samples": picture(model, x[:256])}
            plots.image_grids(image, grid, str(self.run_folder))
        console.say(f"wrote {path}" + (f" and {image}" if image else ""))
        return 0
