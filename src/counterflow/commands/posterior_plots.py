"""Plots of a run of `counterflow posterior`, of the numbers and pairs where approximation and posterior differ most."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from counterflow import plots
from counterflow.diagnostics.importance import resample
from counterflow.plots import Array
from counterflow.posterior.posterior import Posterior
from counterflow.posterior.stages import Stage
from counterflow.posterior.targets.layout import element_name
from counterflow.posterior.targets.target import Target

BINS = 6  # per number: each of the 36 cells of a pair holds about 280 of 10,000 draws
MAX_COMPARED = 60  # numbers whose pairs are compared, those with the largest discrepancy: a table of (60 * 6)^2 cells
MAX_MARGINALS = 20
MAX_PAIRS = 6
SHOWN = 1_500  # points in a scatter plot


class Discrepancy(NamedTuple):
    """Fractions of the mass that the approximation has in the wrong cells of a histogram, 0 to 1."""

    marginals: Array  # of each number, (N,)
    pairs: list[tuple[int, int, float]]  # (i, j, fraction), the largest first


def discrepancy(draws: Array, weights: Array) -> Discrepancy:
    """Compare histograms of draws (S, N), unweighted and with importance weights (S,) that sum to one.

        fraction = sum over cells |weight in the cell - fraction of the draws in it| / 2

    Each number is cut into BINS cells of equal weight, a pair of numbers into their products.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(5000, 3))
        >>> weights = np.exp(0.5 * draws[:, 0] * draws[:, 2])
        >>> found = discrepancy(draws, weights / weights.sum())
        >>> found.pairs[0][:2], bool(found.pairs[0][2] > 0.1 > found.marginals[1])
        ((0, 2), True)
    """
    surplus = weights - 1 / len(draws)
    cells = [_cells(column, surplus + 2 / len(draws)) for column in draws.T]
    marginals = np.array([abs(np.bincount(cell, surplus, BINS)).sum() / 2 for cell in cells])
    worst = np.sort(np.argsort(-marginals, kind="stable")[:MAX_COMPARED])
    table = np.concatenate([np.eye(BINS)[cells[i]] for i in worst], 1) if len(worst) else np.zeros((len(draws), 0))
    moved = abs(table.T @ (surplus[:, None] * table)).reshape(len(worst), BINS, len(worst), BINS).sum((1, 3)) / 2
    pairs = [
        (int(worst[i]), int(worst[j]), float(moved[i, j])) for i, j in zip(*np.triu_indices(len(worst), 1), strict=True)
    ]
    return Discrepancy(marginals, sorted(pairs, key=lambda pair: -round(pair[2], 9)))


def expected_discrepancy(weights: Array) -> float:
    """Return the mean fraction of a pair whose numbers do not depend on the weights (S,).

    0.4 sqrt(cells (1 / ESS - 1 / S)),    where 0.4 is half of the mean of an absolute normal number
    """
    return float(0.4 * BINS * np.sqrt(max(np.square(weights).sum() - 1 / len(weights), 0.0)))


def _cells(column: Array, weights: Array) -> Array:
    """Return the cell, out of BINS of equal weight, of each number (S,)."""
    order = np.argsort(column, kind="stable")
    cumulated = np.cumsum(weights[order])
    edges = column[order][np.searchsorted(cumulated, cumulated[-1] * np.arange(1, BINS) / BINS)]
    return np.searchsorted(edges, column, side="right")


def columns_of(name: str, draws: Array) -> Iterator[tuple[str, Array]]:
    """Yield the label name[i,j] and the draws (S,) of each number, for draws (S, *shape)."""
    for index in np.ndindex(*draws.shape[1:]):
        yield element_name(name, index), draws[(slice(None), *index)]


def plot_run(folder: Path, fitted: Posterior, target: Target) -> None:
    """Plot marginals, pairs, the tail of the importance weights and the ELBO of the stages."""
    weights = fitted.log_weights.exp().numpy()
    _plot_marginals(folder / "marginals.png", fitted, weights)
    if target.dim > 1:
        _plot_pairs(folder / "pairs.png", fitted, target, weights)
    raw = (fitted.draws.log_p - fitted.draws.log_q).numpy()
    plots.weight_tail(folder / "weights.png", raw, fitted.log_weights.numpy(), f"k-hat {fitted.k_hat:.2f}")
    curves = [
        plots.StageCurve(f"{k}, {stage.estimator.replace('_', ' ')}", stage.steps, stage.elbos, _verdict(stage))
        for k, stage in enumerate(fitted.stages, 1)
    ]
    plots.stage_curves(folder / "elbo.png", curves)


def _verdict(stage: Stage) -> str:
    return f"{stage.elbo:.2f}, k-hat {stage.k_hat:.2f}, ESS {100 * stage.ess / stage.verdict_samples:.0f} %"


def _plot_marginals(path: Path, fitted: Posterior, weights: Array) -> None:
    """Plot the numbers with the largest discrepancy, in the order of the model."""
    named = [column for name, value in fitted.values.items() for column in columns_of(name, value.double().numpy())]
    fractions = discrepancy(np.stack([draws for _, draws in named], 1), weights).marginals
    chosen = sorted(np.argsort(-fractions, kind="stable")[:MAX_MARGINALS])
    panels = [
        plots.MarginalPanel(named[i][0], named[i][1], weights, f"{100 * fractions[i]:.1f} % misplaced") for i in chosen
    ]
    shown = f"the {len(panels)} of {len(named)} that fit worst" if len(named) > len(panels) else "all numbers"
    plots.marginals(path, panels, f"marginals, {shown}")


def _plot_pairs(path: Path, fitted: Posterior, target: Target, weights: Array) -> None:
    """Plot the pairs of unconstrained coordinates, which the flow models, with the largest discrepancy."""
    theta = fitted.draws.theta
    truth = resample(theta, fitted.log_weights, SHOWN).numpy()
    panels = []
    for i, j, fraction in discrepancy(theta.numpy(), weights).pairs[:MAX_PAIRS]:
        names = (target.coordinates[i], target.coordinates[j])
        note = f"{100 * fraction:.1f} % misplaced"
        panels.append(plots.PairPanel(names, theta[:SHOWN, [i, j]].numpy(), truth[:, [i, j]], note))
    title = "pairs of unconstrained coordinates, the worst first"
    noise = f"{100 * expected_discrepancy(weights):.1f} %"
    plots.posterior_pairs(path, panels, f"{title}\n(noise alone misplaces {noise} of the mass)")
