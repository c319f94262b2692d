"""Stages of black-box variational inference: an inverse autoregressive flow fitted to a log density.

    initial Gaussian -> flow in whitened coordinates -> stage 1, 2, ... until the verdict is good

Each stage trains the flow, draws from it and judges the draws by their importance weights. Later stages train for
longer, then with more layers, then with an objective that spreads the flow over all of the target.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from counterflow.diagnostics.importance import psis
from counterflow.diagnostics.verdict import Verdict, diagnose
from counterflow.flows.bases import StudentT
from counterflow.flows.flow import Flow
from counterflow.flows.mixture import FlowMixture
from counterflow.flows.recipes import stack
from counterflow.objectives import DensityMode, Draws, draw_from
from counterflow.posterior.config import Estimator, PosteriorConfig
from counterflow.posterior.evaluation import LogDensity, log_density, log_density_and_score
from counterflow.posterior.gaussians import Gaussians
from counterflow.posterior.plans import ESTIMATORS, StagePlan, stage_plans
from counterflow.training.checkpoints import Checkpoints
from counterflow.training.config import FitConfig
from counterflow.training.distributed import Workers
from counterflow.training.fit import fit
from counterflow.training.history import History, OnEpoch, OnStep
from counterflow.transforms.autoregressive import Autoregressive
from counterflow.transforms.base import Transform
from counterflow.transforms.compose import Compose, Inverse
from counterflow.transforms.constant import Permute, Whiten
from counterflow.univariate.sinh_arcsinh import SinhArcsinh

MIN_EFFICIENCY = 0.9  # effective sample size per draw from which no further stage is needed
EPOCHS, MIN_EPOCH = 10, 25  # maximum number of epochs in a stage, and minimum number of steps in one


@dataclass(frozen=True)
class Stage:
    """Settings and results of one stage."""

    estimator: Estimator
    layers: int  # number of autoregressive layers
    samples: int  # S, draws of the flow in each step
    steps: int
    skipped: int  # steps whose loss or gradient was not finite
    stopped: str  # as in the training's `History`: finished, interrupted or not finite
    seconds: float
    elbos: tuple[float, ...]  # ELBO on the same noise after each epoch, nats
    k_hat: float  # shape of the weights' tail of the stage's verdict
    ess: float  # effective sample size of the verdict's draws
    verdict_samples: int  # number of the verdict's draws
    elbo: float  # ELBO of the verdict, nats
    good: bool  # good enough to end the fit
    mode: int = 1  # number of the flow, one for each mode, in the order of the fits


class WeightedDraws(NamedTuple):
    """S draws of the flow with their densities and weights."""

    theta: Tensor  # unconstrained draws, (S, D)
    log_p: Tensor  # log density of the target, (S,)
    log_q: Tensor  # log density of the flow, (S,)
    log_weights: Tensor  # Pareto-smoothed importance weights, normalised, (S,)


@dataclass(frozen=True)
class TargetModel:
    """Adapter that presents a flow and a log density to the objectives as a variational model without data.

    Where the target is not finite, its value is the lowest one at the other draws. The gradient there is zero, or that
    of the first Gaussian of `inside`, which leads back into a bounded support.
    """

    flow: Flow
    target: LogDensity
    inside: Gaussians | None = None

    def draw(self, x: None = None, samples: int = 1, density: DensityMode = "joint") -> Draws:
        """Draw S times, (S, 1), with the target's log density as the likelihood and a prior of zero."""
        theta, log_q = draw_from(self.flow().expand((1,)), samples, density)
        value, score = log_density_and_score(self.target, theta)
        finite = value > -math.inf
        value = torch.where(finite, value, value.nan_to_num(neginf=math.inf).min())
        if self.inside is not None and not finite.all():
            score = torch.where(finite[..., None], score, self.inside.score(theta.detach()))
        log_p = value + (score * (theta - theta.detach())).sum(-1)
        return Draws(log_p, torch.zeros_like(log_p), log_q, theta)


class FlowFit(NamedTuple):
    """Result of `fit_flow`, the flow of the stage with the best verdict and its draws, or of a mixture of flows."""

    flow: Flow | FlowMixture
    draws: WeightedDraws
    verdict: Verdict
    stages: tuple[Stage, ...]


def fit_flow(
    target: LogDensity,
    start: Gaussians,
    config: PosteriorConfig,
    deadline: float,
    mode: int = 1,
    on_stage: Callable[[Stage], None] | None = None,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
) -> FlowFit:
    """Fit a flow that starts as the first Gaussian, stage by stage, until a verdict is good or the time is up.

    With several processes, each makes its share of the draws, and all end with the same flow and the same verdict.

    Args:
        target: log density.
        start: Gaussians, the best one first.
        config: configuration of the fit.
        deadline: value of time.perf_counter() after which no further stage should end.
        mode: number of the flow among those of several modes.
        on_stage: called after each stage, on rank 0.
        on_epoch: called as on_epoch(task, epoch) up to ten times per stage, on rank 0.
        on_step: called as on_step(task, done, total) after each step.
        checkpoints: where each stage writes its training state.
    """
    group = Workers.current()
    base = StudentT(start.mean.shape[-1], config.df)
    layers: list[Transform] = [*_new_layers(config, 0, start), Inverse(Whiten(start.mean[0], start.factor[0]))]
    stages: list[Stage] = []
    pace = 0.0
    best: FlowFit | None = None
    for number, plan in enumerate(stage_plans(config)):
        task = f"stage {number + 1}" if mode == 1 else f"mode {mode} stage {number + 1}"
        task_checkpoints = None if checkpoints is None else checkpoints.for_task(task)
        depth = 2 if plan.more_layers else 1
        late = bool(stages) and time.perf_counter() + depth * pace * plan.samples * plan.steps > deadline
        if group.broadcast_value(late) and (task_checkpoints is None or task_checkpoints.load() is None):
            break  # a stage that has a checkpoint is resumed, however late it is
        begun = time.perf_counter()
        if plan.more_layers:
            layers = [*_new_layers(config, number, start), *layers]
        flow = Flow(base, Compose(layers)).double()
        history = _train(flow, target, plan, start, config, number, task, on_epoch, on_step, task_checkpoints)
        pace = _seconds_per_draw(history, plan)
        draws, verdict = draw_and_judge(target, flow, config.verdict_samples, group)
        stages.append(_stage(layers, plan, history, verdict, time.perf_counter() - begun, mode))
        if on_stage is not None and group.rank == 0:
            on_stage(stages[-1])
        if best is None or _quality(verdict) > _quality(best.verdict):
            best = FlowFit(copy.deepcopy(flow), draws, verdict, ())
        if group.broadcast_value(stages[-1].good) or history.stopped == "interrupted":
            break
    return best._replace(stages=tuple(stages))  # type: ignore[union-attr]  # the first stage always runs


def _quality(verdict: Verdict) -> tuple[bool, float]:
    return verdict.trusted, verdict.ess


def _seconds_per_draw(history: History, plan: StagePlan) -> float:
    """Return the time of each draw in the last epoch: the first steps may wait for compilation."""
    if not history.epochs:
        return 0.0
    return history.epochs[-1].seconds / (plan.steps // _epochs(plan)) / plan.samples


def _epochs(plan: StagePlan) -> int:
    return max(1, min(EPOCHS, plan.steps // MIN_EPOCH))


def _stage(
    layers: list[Transform], plan: StagePlan, history: History, verdict: Verdict, seconds: float, mode: int
) -> Stage:
    return Stage(
        estimator=plan.estimator,
        layers=sum(isinstance(layer, Autoregressive) and layer.univariate != SinhArcsinh() for layer in layers),
        samples=plan.samples,
        steps=plan.steps,
        skipped=sum(epoch.skipped for epoch in history.epochs),
        stopped=history.stopped,
        seconds=seconds,
        elbos=tuple(epoch.validation for epoch in history.epochs),
        k_hat=verdict.k_hat,
        ess=verdict.ess,
        verdict_samples=verdict.samples,
        elbo=verdict.elbo,
        good=verdict.k_hat < plan.max_k_hat and verdict.ess >= MIN_EFFICIENCY * verdict.samples,
        mode=mode,
    )


def draw_and_judge(
    target: LogDensity, flow: Flow | FlowMixture, n: int, group: Workers
) -> tuple[WeightedDraws, Verdict]:
    """Draw n times from the flow, each process its share, and judge the flow by the weights."""
    mine = draw_with_densities(target, flow, -(-n // group.size))
    theta, log_p, log_q = (torch.cat(group.gather(part))[:n] for part in mine)
    smoothed = psis(log_p - log_q)
    draws = WeightedDraws(theta, log_p, log_q, smoothed.log_weights)
    return draws, diagnose(log_p - log_q, smoothed=smoothed)


@torch.no_grad()
def draw_with_densities(target: LogDensity, flow: Flow | FlowMixture, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw n times from the flow: theta (n, D), and the log densities (n,) of the target and of the flow."""
    theta, log_q = sample_and_log_prob(flow, n)
    return theta, log_density(target, theta), log_q


def sample_and_log_prob(flow: Flow | FlowMixture, n: int) -> tuple[Tensor, Tensor]:
    """Draw n times from the flow: theta (n, D) and its log density (n,), from a single pass if it is one flow."""
    if not isinstance(flow, FlowMixture):
        return flow().rsample_and_log_prob((n,))
    theta = flow().sample((n,))
    return theta, flow().log_prob(theta)


def _new_layers(config: PosteriorConfig, number: int, like: Gaussians) -> list[Transform]:
    """Build layers near the identity: autoregressive ones, then a map of each feature for skewness and tails.

    With one or two features the autoregressive networks have almost no input, so each is followed by such a map.
    """
    D = like.mean.shape[-1]
    width = min(max(32, 2 * D), 256)
    hidden = config.hidden or (width, width)
    layers = stack(D, 0, config.layers, hidden, activation=config.activation, seed=config.seed + number)
    if D > 2:
        return [*layers, _featurewise(D)]
    reverse = Permute(range(D)[::-1])
    networks = [layer for layer in layers if isinstance(layer, Autoregressive)]
    return [part for network in networks for part in (network, _featurewise(D), reverse)]


def _featurewise(D: int) -> Autoregressive:
    return Autoregressive(D, hidden=(1,), univariate=SinhArcsinh(), degrees=[1] * D)


def _train(
    flow: Flow,
    target: LogDensity,
    plan: StagePlan,
    start: Gaussians,
    config: PosteriorConfig,
    number: int,
    task: str,
    on_epoch: OnEpoch | None,
    on_step: OnStep | None,
    checkpoints: Checkpoints | None,
) -> History:
    """Train one stage; the flow ends with the averaged weights of the highest ELBO."""
    estimator = ESTIMATORS[plan.estimator]
    epochs = _epochs(plan)
    samples = Workers.current().share(plan.samples, "samples")  # of this process, with its own noise

    def objective(flow: nn.Module, batch: None) -> Tensor:
        return estimator(TargetModel(flow, target, start), None, samples)  # type: ignore[arg-type]  # it is a Flow

    fit_config = FitConfig(
        epochs=epochs,
        optimizer="adam",
        learning_rate=plan.rate * config.learning_rate,
        warm_up_steps=min(30, plan.steps // 5),
        clip_norm=10.0,
        ema=0.98,
        seed=config.seed + number,
    )
    return fit(
        flow,
        objective,
        plan.steps // epochs,
        4,
        fit_config,
        on_step=on_step,
        on_epoch=on_epoch,
        checkpoints=checkpoints,
        task=task,
    )
