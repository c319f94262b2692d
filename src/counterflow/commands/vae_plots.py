"""Plots of a run of `counterflow vae`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from counterflow import plots
from counterflow.commands.vae_data import to_images
from counterflow.diagnostics.importance import effective_sample_size, resample
from counterflow.training.history import History
from counterflow.vae.vae import VAE

RECONSTRUCTED = "held-out data, and the mean of p(x'|z), z ~ q(z|x)"
ACTIVE_SD = 0.7  # a latent feature with a larger posterior deviation, close to the prior's 1, carries no information


def plot_run(
    folder: Path, models: Mapping[str, VAE], histories: Mapping[str, History], test: Tensor, seed: int
) -> None:
    """Plot learning curves, reconstructions, samples and posteriors.

    Args:
        folder: to write to.
        models: by name.
        histories: of their trainings, by name.
        test: held-out rows (n, *shape).
        seed: of the draws.
    """
    curves = {
        name: ([epoch.train for epoch in history.epochs], [epoch.validation for epoch in history.epochs])
        for name, history in histories.items()
    }
    plots.learning_curves(folder / "learning_curves.png", curves)
    torch.manual_seed(seed)
    first = next(iter(models.values()))
    is_image = len(first.data_shape) == 3
    if is_image:
        _plot_images(folder, models, test)
    else:
        _plot_rows(folder, models, test)
    chosen = test[:: max(1, len(test) // 2)][:2]
    panels = [[latent_panel(name, model, x) for name, model in models.items()] for x in chosen]
    data = to_images(first, chosen, test) if is_image else chosen.cpu().numpy()
    plots.latent_posteriors(folder / "posterior.png", list(data), panels)


def _plot_images(folder: Path, models: Mapping[str, VAE], test: Tensor) -> None:
    shown = {"data": to_images(next(iter(models.values())), test[:12], test)}
    shown |= {name: to_images(model, model.reconstruct(test[:12]), test) for name, model in models.items()}
    plots.image_rows(folder / "reconstructions.png", shown, RECONSTRUCTED)
    grids = {name: to_images(model, model.sample(64, mean=True), test) for name, model in models.items()}
    plots.image_grids(folder / "samples.png", grids, "samples: the mean of p(x|z), z from the prior")


def _plot_rows(folder: Path, models: Mapping[str, VAE], test: Tensor) -> None:
    tables = {"data": test.cpu().numpy()}
    tables |= {name: model.reconstruct(test).cpu().numpy() for name, model in models.items()}
    plots.pairs(folder / "reconstructions.png", tables, RECONSTRUCTED)
    tables |= {name: model.sample(512).cpu().numpy() for name, model in models.items()}
    plots.pairs(folder / "samples.png", tables, "held-out rows, and samples of the model")


@torch.no_grad()
def latent_panel(name: str, model: VAE, x: Tensor, samples: int = 20_000, shown: int = 2_000) -> plots.LatentPanel:
    """Compare q(z|x) of one datum with p(z|x), over the two active latent features most correlated under p(z|x).

    Draws of p(z|x) are draws of q(z|x), resampled by their importance weights.

    Args:
        name: of the model.
        model: VAE.
        x: datum of shape (*shape,).
        samples: S, draws of q(z|x).
        shown: draws in the plot.
    """
    x = x[None]
    q = model.encode(x)
    z, log_q = (part[:, 0] for part in q.rsample_and_log_prob((samples,)))
    log_p = torch.cat([model.decode(part).log_prob(x) for part in z.split(4096)])
    log_weights = log_p + model.prior().log_prob(z).sum(-1) - log_q
    truth = resample(z, log_weights, shown)
    active = truth.std(0) < ACTIVE_SD
    preference = 0.1 + (active[:, None] & active[None, :])  # for pairs of active features
    correlation = torch.corrcoef(truth.T).reshape(len(active), -1).nan_to_num().abs().triu(1) * preference
    i, j = divmod(int(correlation.argmax()), len(correlation))
    pair = torch.tensor([i, j])
    note = f"ESS {effective_sample_size(log_weights).item():,.0f} of {samples:,}"
    return plots.LatentPanel(name, z[:shown, pair].cpu().numpy(), truth[:, pair].cpu().numpy(), (i, j), note)
