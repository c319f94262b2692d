"""Black-box variational inference: an inverse autoregressive flow fitted to a log density, in stages.

    Gaussians (local, by climbing) -> flow in whitened coordinates -> stage 1, 2, ... until the verdict is good

Each stage trains, draws afresh and judges the draws. The next one trains for longer, then with more layers, then with
an objective that spreads the flow over all of the target.
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

from counterflow.diagnostics.importance import Verdict, diagnose
from counterflow.flows.bases import StudentT
from counterflow.flows.flow import Flow
from counterflow.flows.recipes import stack
from counterflow.objectives import DensityMode, Draws, draw_from
from counterflow.posterior.config import Estimator, PosteriorConfig
from counterflow.posterior.plans import ESTIMATORS, Plan, plans
from counterflow.posterior.starts import Gaussians, LogDensity, log_density, log_density_and_score
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

WORTH = 0.9  # of the draws: the effective size from which no further stage is needed


@dataclass(frozen=True)
class Stage:
    """What a stage did, and what its draws said afterwards."""

    estimator: Estimator
    layers: int  # autoregressive ones
    samples: int  # S, draws of the flow in each step
    steps: int
    skipped: int  # steps that were not finite
    stopped: str  # as a fit's `Record`: finished, interrupted or not finite
    seconds: float
    course: tuple[float, ...]  # the ELBO on the same noise after each tenth of the steps, nats
    k_hat: float
    ess: float  # of the verdict's draws
    verdict_samples: int
    elbo: float  # nats
    good: bool  # enough to end the fit


class WeightedDraws(NamedTuple):
    """S draws of the flow, and what is known of them."""

    theta: Tensor  # (S, D)
    log_p: Tensor  # the target's log density, (S,)
    log_q: Tensor  # the flow's, (S,)


@dataclass(frozen=True)
class TargetModel:
    """A flow and the log density that it shall follow, as the objectives want a model: no data, S draws.

    Where the target is not finite it is taken as flat, and as low as the lowest of the other draws.
    """

    flow: Flow
    target: LogDensity

    def draw(self, x: None = None, samples: int = 1, density: DensityMode = "joint") -> Draws:
        """S draws (S, 1), the target in the place of the likelihood and nothing in that of the prior."""
        theta, log_q = draw_from(self.flow().expand((1,)), samples, density)
        value, score = log_density_and_score(self.target, theta)
        value = torch.where(value > -math.inf, value, value.nan_to_num(neginf=math.inf).min())
        log_p = value + (score * (theta - theta.detach())).sum(-1)
        return Draws(log_p, torch.zeros_like(log_p), log_q, theta)


class FlowFit(NamedTuple):
    """The flow of the stage with the best verdict, and its draws."""

    flow: Flow
    pool: WeightedDraws
    verdict: Verdict
    stages: tuple[Stage, ...]


def fit_flow(
    target: LogDensity,
    start: Gaussians,
    config: PosteriorConfig,
    deadline: float,
    on_stage: Callable[[Stage], None] | None = None,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
) -> FlowFit:
    """Fit a flow that starts as the first Gaussian, stage by stage, until a verdict is good or the time is up.

    Of several processes each makes its share of the draws, and all come to the same flow and the same verdict.
    """
    group = Workers.current()
    base = StudentT(start.mean.shape[-1], config.df)
    parts: list[Transform] = [*_layers(config, 0, start), Inverse(Whiten(start.mean[0], start.factor[0]))]
    stages: list[Stage] = []
    best: FlowFit | None = None
    for number, plan in enumerate(plans(config)):
        kept = None if checkpoints is None else checkpoints.for_task(f"stage {number + 1}")
        late = bool(stages) and time.perf_counter() + _expected_seconds(plan, stages[-1]) > deadline
        if group.broadcast_value(late) and (kept is None or kept.load() is None):  # one that was begun goes on
            break
        begun = time.perf_counter()
        if plan.more_layers:
            parts = [*_layers(config, number, start), *parts]
        flow = Flow(base, Compose(parts)).double()
        record = _train(flow, target, plan, config, number, on_epoch, on_step, kept)
        pool = _pool_of_all(target, flow, config.verdict_samples, group)
        verdict = diagnose(pool.log_p - pool.log_q)
        stages.append(_report(parts, plan, record, verdict, time.perf_counter() - begun))
        if on_stage is not None and group.rank == 0:
            on_stage(stages[-1])
        if best is None or _rank(verdict) > _rank(best.verdict):
            best = FlowFit(copy.deepcopy(flow), pool, verdict, ())
        if group.broadcast_value(stages[-1].good) or record.stopped == "interrupted":
            break
    return best._replace(stages=tuple(stages))  # type: ignore[union-attr]  # the first stage always runs


def _rank(verdict: Verdict) -> tuple[bool, float]:
    return verdict.trusted, verdict.effective_sample_size


def _expected_seconds(plan: Plan, last: Stage) -> float:
    deeper = 2 if plan.more_layers else 1
    return deeper * last.seconds * plan.steps / last.steps * plan.samples / last.samples


def _report(parts: list[Transform], plan: Plan, record: History, verdict: Verdict, seconds: float) -> Stage:
    return Stage(
        estimator=plan.estimator,
        layers=sum(isinstance(part, Autoregressive) and part.univariate != SinhArcsinh() for part in parts),
        samples=plan.samples,
        steps=plan.steps,
        skipped=sum(epoch.skipped for epoch in record.epochs),
        stopped=record.stopped,
        seconds=seconds,
        course=tuple(epoch.validation for epoch in record.epochs),
        k_hat=verdict.k_hat,
        ess=verdict.effective_sample_size,
        verdict_samples=verdict.draws,
        elbo=verdict.elbo,
        good=verdict.k_hat < plan.enough and verdict.effective_sample_size >= WORTH * verdict.draws,
    )


@torch.no_grad()
def draw_pool(target: LogDensity, flow: Flow, n: int) -> WeightedDraws:
    """n draws of the flow with both densities."""
    theta, log_q = flow().rsample_and_log_prob((n,))
    return WeightedDraws(theta, log_density(target, theta), log_q)


def _pool_of_all(target: LogDensity, flow: Flow, n: int, group: Workers) -> WeightedDraws:
    """n draws, of which each process makes its share."""
    mine = draw_pool(target, flow, -(-n // group.size))
    return WeightedDraws(*(torch.cat(group.gather(part))[:n] for part in mine))


def _layers(config: PosteriorConfig, number: int, like: Gaussians) -> list[Transform]:
    """Autoregressive layers, then a map of each feature by itself for its skewness and its tails; near the identity.

    With one or two features the networks have next to nothing to go by, and each layer is followed by such a map.
    """
    D = like.mean.shape[-1]
    width = min(max(32, 2 * D), 256)
    hidden = config.hidden or (width, width)
    layers = stack(D, 0, config.layers, hidden, activation=config.activation, seed=config.seed + number)
    if D > 2:
        return [*layers, _by_feature(D)]
    backwards = Permute(range(D)[::-1])
    networks = [layer for layer in layers if isinstance(layer, Autoregressive)]
    return [part for network in networks for part in (network, _by_feature(D), backwards)]


def _by_feature(D: int) -> Autoregressive:
    return Autoregressive(D, hidden=(1,), univariate=SinhArcsinh(), degrees=[1] * D)


def _train(
    flow: Flow,
    target: LogDensity,
    plan: Plan,
    config: PosteriorConfig,
    number: int,
    on_epoch: OnEpoch | None,
    on_step: OnStep | None,
    checkpoints: Checkpoints | None,
) -> History:
    """One stage by the library's training loop; the flow ends with the averaged weights of the best ELBO."""
    estimator, epochs = ESTIMATORS[plan.estimator], min(10, plan.steps)
    samples = Workers.current().share(plan.samples, "samples")  # of each process, with noise of its own

    def objective(flow: nn.Module, batch: None) -> Tensor:
        return estimator(TargetModel(flow, target), None, samples)  # type: ignore[arg-type]  # it is the flow

    how = FitConfig(
        epochs=epochs,
        optimizer="adam",
        learning_rate=config.learning_rate / (2 if number else 1),
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
        how,
        on_step=on_step,
        on_epoch=on_epoch,
        checkpoints=checkpoints,
        task=f"stage {number + 1}",
    )
