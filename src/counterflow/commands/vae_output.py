"""Samples of a trained VAE, and scores of data under it, in one file or in a folder of parts."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from counterflow import plots
from counterflow.commands import console
from counterflow.commands.progress import Progress
from counterflow.commands.requirements import require_packages
from counterflow.commands.score import Score
from counterflow.commands.sharded_output import (
    Report,
    ShardedOutput,
    Sums,
    inputs,
    portions,
    seed_of_part,
    shard_folder,
)
from counterflow.commands.trained import load_trained_vae, weights_file
from counterflow.commands.vae_data import packages_for, to_images, to_likelihood_scale
from counterflow.io.atomic import atomic_write
from counterflow.io.data import load
from counterflow.objectives import Evaluation, evaluate
from counterflow.vae.likelihoods import Bernoulli, DiscretizedLogistic
from counterflow.vae.vae import VAE

ROWS_PER_SAMPLE_PART = 1 << 14  # 50 MB of MNIST
ROWS_PER_SCORE_PART = 1 << 10  # about a minute with 500 draws per row
BATCH = 1024  # rows drawn at a time
MAX_SHOWN = 256  # images in the plot


def sample_from_vae(run: Path, n: int, mean: bool, seed: int, device: str, out: Path | None) -> int:
    """Write n samples of a VAE and, of images, a plot; return the exit code."""
    shards = shard_folder(out)
    model, folder = load_trained_vae(run)
    model.to(device)

    def draw(rows: int, report: Report) -> Tensor:
        parts = []
        for portion in portions(rows, BATCH):
            parts.append(model.sample(portion, mean).cpu())
            report(sum(map(len, parts)))
        return torch.cat(parts)

    if shards is not None:

        def write_part(number: int, rows: int, path: Path, report: Report) -> Sums:
            torch.manual_seed(seed_of_part(seed, number))
            _save(path, draw(rows, report))
            return {"rows": rows}

        about = inputs("sample", [weights_file(run)], None, n=n, seed=seed, mean=mean, rows=ROWS_PER_SAMPLE_PART)
        pieces = portions(n, ROWS_PER_SAMPLE_PART)
        progress = Progress("drawing", "samples")
        output = ShardedOutput(shards, ".npy")
        return output.write(about, pieces, write_part, lambda sums: f"{sums['rows']:,} samples", progress, n)
    path = console.new_file(out or folder / "samples.npy")
    if path.suffix != ".npy":
        raise ValueError(f"expected --out to end in .npy, got {path}; the plot is written beside it, as .png")
    image = console.new_file(path.with_suffix(".png")) if len(model.data_shape) == 3 else None
    if image is not None:
        require_packages("matplotlib")
    torch.manual_seed(seed)
    with Progress("drawing", "samples") as progress:
        x = draw(n, lambda done: progress.update(done, n))
    with atomic_write(path) as temporary:
        _save(temporary, x)
    if image is not None:
        grid = {f"{min(n, MAX_SHOWN)} of {n} samples": to_images(model, x[:MAX_SHOWN])}
        plots.image_grids(image, grid, str(run))
    console.say(f"wrote {path}" + (f" and {image}" if image else ""))
    return 0


def _save(path: Path, x: Tensor) -> None:
    with path.open("wb") as file:  # np.save would add a suffix to a path
        np.save(file, x.numpy())


def score_by_vae(options: Score) -> int:
    """Write ELBO, log-likelihood and KL of each row under a VAE; return the exit code."""
    shards = shard_folder(options.out)
    require_packages(*packages_for(options.data))
    model, folder = load_trained_vae(options.run_folder)
    path = console.new_file(options.out or folder / "scores.csv") if shards is None else shards
    likelihood = "discretized_logistic" if isinstance(model.likelihood, DiscretizedLogistic) else "other"
    dataset = to_likelihood_scale(load(options.data, options.table.key, options.levels), likelihood)
    values = dataset.values if dataset.test is None else torch.cat([dataset.values, dataset.test])
    model.check(values)

    def evaluated(rows: Tensor, report: Report) -> Evaluation:
        x = model.likelihood.observe(rows.float()).to(options.device)
        return evaluate(
            model.to(options.device), x, options.samples, on_batch=lambda done, _: report(done / options.samples)
        )

    def write_part(number: int, piece: tuple[int, Tensor], path: Path, report: Report) -> Sums:
        first, rows = piece
        torch.manual_seed(seed_of_part(options.seed, number))
        return _write_scores(path, first, evaluated(rows, report))

    if shards is not None:
        values_of = {name: getattr(options, name) for name in ("levels", "samples", "seed")}
        values_of["key"] = options.table.key
        data = Path(options.data).expanduser()
        about = inputs("score", [weights_file(options.run_folder)], data, **values_of, rows=ROWS_PER_SCORE_PART)
        pieces = ((k * ROWS_PER_SCORE_PART, rows) for k, rows in enumerate(values.split(ROWS_PER_SCORE_PART)))
        progress = Progress("scoring", "rows")
        output = ShardedOutput(shards, ".csv")
        return output.write(about, pieces, write_part, lambda sums: _describe(model, sums), progress, len(values))
    torch.manual_seed(options.seed)
    with Progress(f"scoring with {options.samples} samples each", "rows") as progress:
        evaluation = evaluated(values, lambda done: progress.update(done, len(values)))
    with atomic_write(path) as temporary:
        sums = _write_scores(temporary, 0, evaluation)
    console.say(f"{_describe(model, sums)}; wrote {path}")
    return 0


def _describe(model: VAE, sums: Sums) -> str:
    binary = " (pixels binarised once)" if isinstance(model.likelihood, Bernoulli) else ""
    elbo, log_likelihood = (sums[name] / sums["rows"] for name in ("elbo", "log_likelihood"))
    return f"{sums['rows']} rows{binary}: mean ELBO {elbo:.2f}, mean log-likelihood {log_likelihood:.2f} nats"


def _write_scores(path: Path, first: int, evaluation: Evaluation) -> Sums:
    """Write a line for each row, numbered from `first`; return the sums of the columns."""
    columns = {name: values.double().cpu() for name, values in evaluation._asdict().items()}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", *columns])
        lines = zip(*(values.tolist() for values in columns.values()), strict=True)
        writer.writerows([row, *line] for row, line in enumerate(lines, first))
    return {"rows": len(evaluation.elbo), **{name: float(values.sum()) for name, values in columns.items()}}
