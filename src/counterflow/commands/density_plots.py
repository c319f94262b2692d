"""Plots of a run of `counterflow density`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from counterflow import plots
from counterflow.density.fitting import DensityTrainer
from counterflow.density.model import TableDensity

if TYPE_CHECKING:
    from counterflow.commands.density_run import Rows

Array = np.ndarray[Any, Any]
SHOWN = 2_000  # rows in a plot


def plot_run(
    folder: Path,
    density: TableDensity,
    trainer: DensityTrainer,
    test: Rows,
    scores: Array,
    samples: Array,
    seed: int,
) -> None:
    """Plot learning curves, held-out rows beside samples, their log densities, and the calibration.

    Args:
        folder: the folder of the pictures.
        density: the density.
        trainer: its trainer, with the histories.
        test: held-out rows (M, D).
        scores: their log densities (M,).
        samples: samples (S, D), in the contexts of the held-out rows if there are any.
        seed: seed of the noise of numbers within their cells.
    """
    curves = {
        task: ([epoch.train for epoch in history.epochs], [epoch.validation for epoch in history.epochs])
        for task, history in zip(trainer.tasks, trainer.histories, strict=False)  # an interrupted fit has fewer
    }
    plots.learning_curves(folder / "learning_curve.png", curves, "log density, nats per row")
    complete = np.flatnonzero(~np.isnan(test.x).any(1))
    shown = test.take(complete[:SHOWN] if len(complete) > 1 else np.arange(len(test.x)))
    context = density.encode(shown.context)
    samples = samples[:SHOWN]
    tables = {"held-out rows": shown.x, "samples": samples[: len(shown.x)]}
    plots.pairs(folder / "pairs.png", tables, "held-out rows and samples", names=density.names)
    both = {"held-out rows": scores[:SHOWN], "samples": density.score(samples, context)}
    plots.histograms(folder / "scores.png", both, "log density, nats", "log density of held-out rows and of samples")
    u = torch.special.ndtr(torch.from_numpy(density.to_noise(shown.x, context, seed))).numpy()
    title = "held-out rows mapped to noise: uniform if the density is right"
    plots.uniform_histograms(folder / "calibration.png", u, density.noise_names, title)
