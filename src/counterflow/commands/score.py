"""counterflow score: how well a trained model explains data."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from counterflow.commands import console, tables
from counterflow.commands.model import kind_of_run, observed, trained_vae
from counterflow.data import load
from counterflow.fit import check_device
from counterflow.likelihoods import Bernoulli, DiscretizedLogistic
from counterflow.objectives import evaluate


@dataclass(frozen=True)
class Score:
    """Score data under a trained model, in nats.

    A run of counterflow density: adds a column log_density to the table, in a file of the same format, batch by
    batch, however large it is. Columns are matched by name, in any order; others are carried through. A run of
    counterflow vae: ELBO and log-likelihood of each datum, to a CSV file.
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """run folder of counterflow density or vae, or one of its .safetensors files"""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """a table, or what counterflow vae takes as --data; all of it is scored"""
    key: str | None = None
    """which array of an .npz"""
    levels: int | None = None
    """of a VAE: states that an array holds whole numbers 0..levels-1 (256 for 8-bit images)"""
    samples: int = 500
    """of a VAE: draws of z for each datum"""
    seed: int = 0
    """of a VAE: of the draws and of the binarisation"""
    device: str = "cpu"
    """cpu, cuda or mps"""
    out: Path | None = None
    """the file to write, which must be new; scores.csv, or of the table's format, in the run folder when not given"""

    def run(self) -> int:
        """Write the scores."""
        check_device(self.device)
        if kind_of_run(self.run_folder) == "density":
            return tables.score(self.run_folder, Path(self.data), self.key, self.device, self.out)
        return self._score_by_vae()

    def _score_by_vae(self) -> int:
        model, folder = trained_vae(self.run_folder)
        path = console.new_file(self.out or folder / "scores.csv")
        logistic = isinstance(model.likelihood, DiscretizedLogistic)
        dataset = observed(load(self.data, self.key, self.levels), "discretized_logistic" if logistic else "other")
        values = dataset.values if dataset.test is None else torch.cat([dataset.values, dataset.test])
        model.check(values)
        torch.manual_seed(self.seed)
        x = model.likelihood.observe(values.float())
        with console.err.status(f"scoring {len(x)} data with {self.samples} samples each"):
            reached = evaluate(model.to(self.device), x.to(self.device), self.samples)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "elbo", "log_likelihood", "kl"])
            columns = (part.tolist() for part in reached)
            writer.writerows([row, *numbers] for row, numbers in enumerate(zip(*columns, strict=True)))
        binary = " (pixels binarised once)" if isinstance(model.likelihood, Bernoulli) else ""
        console.say(
            f"{len(x)} data{binary}: mean ELBO {reached.elbo.mean():.2f}, mean log-likelihood "
            f"{reached.log_likelihood.mean():.2f} nats; wrote {path}"
        )
        return 0
