"""Fit of a posterior: starting points, a flow for each mode, and the verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from counterflow.diagnostics.estimates import unreliable_features
from counterflow.posterior.config import PosteriorConfig
from counterflow.posterior.mixtures import fit_modes
from counterflow.posterior.posterior import Posterior
from counterflow.posterior.propriety import check_proper
from counterflow.posterior.stages import Stage
from counterflow.posterior.starts import initial_gaussians, starting_points
from counterflow.posterior.targets.function import as_target
from counterflow.posterior.targets.layout import element_names
from counterflow.posterior.targets.target import Target
from counterflow.random import seeded
from counterflow.training.checkpoints import Checkpoints
from counterflow.training.distributed import Workers
from counterflow.training.history import OnEpoch, OnStep
from counterflow.training.tracking import Tracker, of_rank_0, tracked

LOGGED = ("elbo", "k_hat", "ess", "seconds")  # of a stage, by a tracker


def fit_posterior(
    target: Target | Callable[[Tensor], Tensor],
    config: PosteriorConfig = PosteriorConfig(),
    *,
    dim: int | None = None,
    starts: Mapping[str, Any] | None = None,
    on_stage: Callable[[Stage], None] | None = None,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
    tracker: Tracker | None = None,
) -> Posterior:
    """Fit an inverse autoregressive flow to a posterior, in stages, and judge it by its own draws.

        q = f(eps),  eps ~ independent Student t,  f = L . (skew, tails) . IAF,    maximise E_q[log p - log q]

    L is a location and a triangular scale, which come from Newton paths from several points and from matching the
    scores there. Each stage ends with draws whose importance weights give a verdict (Pareto k-hat). If it is not good,
    the next stage trains longer, then deeper, then by the forward KL, within `config.stages` and `config.seconds`.
    Other modes are searched from all starting points, far around, and where p / q is large. Each that the flow leaves
    out gets a flow of its own, up to `config.modes`; the flows are weighted by the evidence of their modes, and the
    verdict is that of the mixture. If a mode is left out nevertheless, the posterior is not trusted, however good k-hat
    is.

    With a process group of torch.distributed, all its processes call this function with the same arguments; each makes
    its share of the draws, with its own noise.

    Args:
        target: a `counterflow.targets.Target`, or a function theta (B, dim) -> (B,) in float64: the log density up to
            a constant, without bounds, differentiable by autograd.
        config: configuration of the fit.
        dim: D, for a function.
        starts: values of variables at which to start as well, name -> (*shape), or (K, *shape) for K starting points.
            Variables that are left out start at random.
        on_stage: called after each stage, on rank 0.
        on_epoch: called as on_epoch(task, epoch) up to ten times per stage, on rank 0; the tasks are "stage 1",
            "stage 2", ...
        on_step: called as on_step(task, done, total) after each step.
        checkpoints: where to write the state that resumes a fit after a kill, as in `cf.fit`, with a folder for each
            stage. A resumed fit counts `config.seconds` anew.
        tracker: client of an experiment tracker, which logs the configuration, every epoch, and the verdict of every
            stage as stages/elbo, stages/k_hat and stages/ess.

    Raises:
        ValueError: a missing dim, a log density that is finite at no starting point, or an improper posterior: one
            whose density does not fall along a coordinate or a combination of coordinates.
        TypeError: a target that is neither a Target nor a function.

    Source: Kingma et al. 2016, "Improving Variational Inference with Inverse Autoregressive Flow"; Yao et al. 2018,
    "Yes, but did it work?: Evaluating variational inference", for the verdict; `counterflow.posterior.gaussians` for
    the starting points.

    Example:
        >>> import torch, counterflow as cf
        >>> def banana(theta):
        ...     x, y = theta.unbind(-1)
        ...     return -(x.square() + (y - x.square()).square()) / 2
        >>> posterior = cf.fit_posterior(banana, cf.PosteriorConfig(layers=2, verdict_samples=2000), dim=2)
        >>> posterior.trusted, posterior.sample(50)["theta"].shape
        (True, torch.Size([50, 2]))
    """
    begun = time.perf_counter()
    group = Workers.current()
    on_epoch = tracked(tracker, config, on_epoch)
    on_stage = _tracked_stages(tracker, on_stage)
    target = as_target(target, dim)
    generator = torch.Generator().manual_seed(config.seed)
    points = starting_points(target, config.starts, config.seed, starts)
    check_proper(target, points, target.coordinates, config.seed)
    gaussians = initial_gaussians(target, points, generator)
    with seeded(group.rank_seed(config.seed)):
        deadline = begun + config.seconds
        fitted = fit_modes(target, gaussians, config, deadline, generator, on_stage, on_epoch, on_step, checkpoints)
    values = target.constrain(fitted.draws.theta)
    unreliable = _unreliable_parameters(target, values, fitted.draws.log_weights)
    fitted = fitted._replace(verdict=replace(fitted.verdict, unreliable=unreliable))
    return Posterior(target, config, fitted, values, time.perf_counter() - begun)


def _tracked_stages(
    tracker: Tracker | None, on_stage: Callable[[Stage], None] | None
) -> Callable[[Stage], None] | None:
    """Return the callback of the stages, which also logs their verdicts."""
    tracker = of_rank_0(tracker)
    if tracker is None:
        return on_stage
    numbers = count(1)

    def log(stage: Stage) -> None:
        tracker.log_metrics({f"stages/{name}": getattr(stage, name) for name in LOGGED}, next(numbers))
        if on_stage is not None:
            on_stage(stage)

    return log


def _unreliable_parameters(target: Target, values: dict[str, Tensor], log_weights: Tensor) -> tuple[str, ...]:
    """Labels of the elements of parameters whose standard deviation is not reliable; derived variables do not count."""
    found: list[str] = []
    for name in target.parameters:
        labels = element_names(name, values[name].shape[1:])
        columns = values[name].reshape(len(log_weights), -1)
        found += [labels[i] for i in unreliable_features(columns, log_weights)]
    return tuple(found)
