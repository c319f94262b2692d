"""Plots of a run of `counterflow density`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from counterflow import plots
from counterflow.density.estimator import FlowDensity
from counterflow.flows.mixture import FlowMixture
from counterflow.transforms.constant import Permute

if TYPE_CHECKING:
    from counterflow.commands.density_run import Rows

SHOWN = 2_000  # rows in a plot


def plot_run(folder: Path, density: FlowDensity, test: Rows, seed: int) -> None:
    """Plot learning curves, held-out rows beside samples, their log densities, and the calibration."""
    import pyarrow

    names = density.get_feature_names_out().tolist()
    curves = {
        f"member {k}": ([epoch.train for epoch in history.epochs], [epoch.validation for epoch in history.epochs])
        for k, history in enumerate(density.records_, 1)
    }
    plots.learning_curves(folder / "learning_curve.png", curves, "log density, nats per row")
    shown = test.take(np.arange(min(SHOWN, test.x.num_rows)))
    samples = density.sample(shown.x.num_rows if shown.context else SHOWN, shown.context, seed)
    tables = {"held-out rows": shown.array, "samples": samples[: shown.x.num_rows]}
    plots.pairs(folder / "pairs.png", tables, "held-out rows and samples", names=names)
    scores = {
        "held-out rows": density.score_samples(shown.x, shown.context),
        "samples": density.score_samples(pyarrow.table(dict(zip(names, samples.T, strict=True))), shown.context),
    }
    plots.histograms(folder / "scores.png", scores, "log density, nats", "log density of held-out rows and of samples")
    u = torch.special.ndtr(torch.from_numpy(density.noise(shown.x, shown.context, seed))).numpy()
    title = "held-out rows mapped to noise: uniform if the density is right"
    plots.uniform_histograms(folder / "calibration.png", u, _names_of_noise(density, names), title)


def _names_of_noise(density: FlowDensity, names: list[str]) -> list[str]:
    """Return for each coordinate of the noise the column that it comes from, through the permutations of the flow."""
    order = torch.arange(len(names))[None].double()
    first: Any = density.flow_.flows[0] if isinstance(density.flow_, FlowMixture) else density.flow_
    for transform in reversed(first.transform.flattened()):
        if isinstance(transform, Permute):
            order = transform.inverse(order)[0]
    return [names[int(i)] for i in order[0]]
