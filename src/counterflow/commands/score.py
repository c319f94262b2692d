"""counterflow score: how well a trained model explains data."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from counterflow.checks import check_device
from counterflow.commands import console, parts, tables
from counterflow.commands.model import kind_of_run, observed, trained_vae, weights
from counterflow.io.atomic import atomic_write
from counterflow.io.data import load
from counterflow.objectives import Evaluation, evaluate
from counterflow.vae.likelihoods import Bernoulli, DiscretizedLogistic
from counterflow.vae.vae import VAE

ROWS = 1 << 10  # of a VAE's part: with 500 draws for each, a minute or so


@dataclass(frozen=True)
class Score:
    """Score data under a trained model, in nats.

    A run of counterflow density: adds a column log_density to the table, in a file of the same format, batch by
    batch, however large it is. Columns are matched by name, in any order; others are carried through. A run of
    counterflow vae: ELBO and log-likelihood of each datum, to a CSV file.

    Where --out is a name without a suffix, it is a folder of parts: part-00000.parquet and so on. A part that is there
    is not done again, so the same command completes what was interrupted; under torchrun the processes share the
    parts. A Parquet table is read by row groups. The noise of a VAE then depends on the seed and the part.
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """run folder of counterflow density or vae, or one of its .safetensors files"""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """a table, a folder of Parquet files, or what counterflow vae takes as --data; all of it is scored"""
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
    """a new file, or a folder of parts; scores.csv, or of the table's format, in the run folder when not given"""

    def run(self) -> int:
        """Write the scores."""
        check_device(self.device)
        if kind_of_run(self.run_folder) == "density":
            return tables.score(self.run_folder, Path(self.data), self.key, self.device, self.out)
        return self._score_by_vae()

    def _score_by_vae(self) -> int:
        into = parts.folder(self.out)
        model, folder = trained_vae(self.run_folder)
        path = console.new_file(self.out or folder / "scores.csv") if into is None else into
        logistic = isinstance(model.likelihood, DiscretizedLogistic)
        dataset = observed(load(self.data, self.key, self.levels), "discretized_logistic" if logistic else "other")
        values = dataset.values if dataset.test is None else torch.cat([dataset.values, dataset.test])
        model.check(values)

        def do(number: int, piece: tuple[int, Tensor], path: Path, show: parts.Show) -> parts.Sums:
            first, rows = piece
            show(f"scoring {len(rows)} data with {self.samples} samples each")
            torch.manual_seed(parts.seed_of(self.seed, number))
            return self._write(path, first, self._evaluate(model, rows))

        def tell(sums: parts.Sums) -> str:
            binary = " (pixels binarised once)" if isinstance(model.likelihood, Bernoulli) else ""
            return (
                f"{sums['rows']} data{binary}: mean ELBO {sums['elbo'] / sums['rows']:.2f}, mean log-likelihood "
                f"{sums['log_likelihood'] / sums['rows']:.2f} nats"
            )

        if into is not None:
            options = {name: getattr(self, name) for name in ("key", "levels", "samples", "seed")}
            made_of = parts.about(
                "score", [weights(self.run_folder)], Path(self.data).expanduser(), **options, rows=ROWS
            )
            pieces = ((k * ROWS, rows) for k, rows in enumerate(values.split(ROWS)))
            return parts.Parts(into, ".csv").write(made_of, pieces, do, tell)
        torch.manual_seed(self.seed)
        with console.err.status(f"scoring {len(values)} data with {self.samples} samples each"):
            reached = self._evaluate(model, values)
        with atomic_write(path) as temporary:
            sums = self._write(temporary, 0, reached)
        console.say(f"{tell(sums)}; wrote {path}")
        return 0

    def _evaluate(self, model: VAE, values: Tensor) -> Evaluation:
        x = model.likelihood.observe(values.float())
        return evaluate(model.to(self.device), x.to(self.device), self.samples)

    def _write(self, path: Path, first: int, reached: Evaluation) -> parts.Sums:
        """A line for each datum, the first of which has this number; the sums over them."""
        columns = [part.double().cpu() for part in reached]
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", *reached._fields])
            numbers = zip(*(part.tolist() for part in columns), strict=True)
            writer.writerows([row, *line] for row, line in enumerate(numbers, first))
        sums = {name: float(part.sum()) for name, part in zip(reached._fields, columns, strict=True)}
        return {"rows": len(columns[0]), **sums}
