"""counterflow sample: draw from a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor

from counterflow import plots
from counterflow.checks import check_device
from counterflow.commands import console, parts, tables
from counterflow.commands.model import kind_of_run, picture, trained_vae, weights
from counterflow.io.atomic import atomic_write
from counterflow.vae.vae import VAE

ROWS = 1 << 14  # of a VAE's part: 50 MB of MNIST


@dataclass(frozen=True)
class Sample:
    """Draw data from a trained model.

    A run of counterflow density: rows of the table, to a .csv, .parquet, .npy or .npz file; given --context, a table
    of the columns to condition on, n rows for each of its rows. A run of counterflow vae: z from the prior, x from
    p(x|z), to an .npy file, with a picture for images.

    Where --out is a name without a suffix, it is a folder of parts: part-00000.parquet and so on, or .npy of a VAE,
    without a picture. A part depends on the seed and its number alone. One that is there is not done again, so the same
    command completes what was interrupted; under torchrun the processes share the parts.
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """run folder of counterflow density or vae, or one of its .safetensors files"""
    n: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None
    """how many; 64 when not given, or 1 for each row of --context"""
    context: Path | None = None
    """of a density: .csv, .parquet, .npy or .npz file, or folder of Parquet files, with the columns to condition on"""
    mean: bool = False
    """of a VAE: the mean of p(x|z) in place of a draw from it"""
    seed: int = 0
    """of the draws"""
    out: Path | None = None
    """a new file, or a folder of parts; samples.npy (VAE) or samples.csv in the run folder when not given"""
    device: str = "cpu"
    """of a density: cpu, cuda or mps"""

    def run(self) -> int:
        """Write the samples."""
        n = self.n if self.n is not None else 1 if self.context else 64
        if n < 1:
            raise ValueError(f"expected n of at least 1, got {n}")
        if kind_of_run(self.run_folder) == "density":
            check_device(self.device)
            return tables.sample(self.run_folder, n, self.context, self.seed, self.device, self.out)
        return self._sample_from_vae(n)

    def _sample_from_vae(self, n: int) -> int:
        if self.context is not None:
            raise ValueError(f"expected no --context with a VAE, got {self.context}; leave it out")
        into = parts.folder(self.out)
        model, folder = trained_vae(self.run_folder)
        if into is not None:
            return self._parts_from_vae(model, n, into)
        path = console.new_file(self.out or folder / "samples.npy")
        if path.suffix != ".npy":
            raise ValueError(f"expected --out to end in .npy, got {path}; the picture goes beside it, as .png")
        image = console.new_file(path.with_suffix(".png")) if len(model.data_shape) == 3 else None
        torch.manual_seed(self.seed)
        x = self._draw(model, n)
        with atomic_write(path) as temporary:
            _save(temporary, x)
        if image is not None:
            grid = {f"{min(n, 256)} of {n} samples": picture(model, x[:256])}
            plots.image_grids(image, grid, str(self.run_folder))
        console.say(f"wrote {path}" + (f" and {image}" if image else ""))
        return 0

    def _parts_from_vae(self, model: VAE, n: int, into: Path) -> int:
        def do(number: int, rows: int, path: Path, show: parts.Show) -> parts.Sums:
            show(f"drawing {rows:,}")
            torch.manual_seed(parts.seed_of(self.seed, number))
            _save(path, self._draw(model, rows))
            return {"rows": rows}

        made_of = parts.about(
            "sample", [weights(self.run_folder)], None, n=n, seed=self.seed, mean=self.mean, rows=ROWS
        )
        return parts.Parts(into, ".npy").write(
            made_of, parts.sizes(n, ROWS), do, lambda sums: f"{sums['rows']:,} samples"
        )

    def _draw(self, model: VAE, n: int) -> Tensor:
        return torch.cat([model.sample(rows, self.mean) for rows in parts.sizes(n, 1024)])


def _save(path: Path, x: Tensor) -> None:
    with path.open("wb") as file:  # np.save would add a suffix to a path
        np.save(file, x.numpy())
