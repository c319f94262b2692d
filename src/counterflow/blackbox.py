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
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from counterflow import objectives
from counterflow.autoregressive import Autoregressive
from counterflow.diagnostics import CLOSE, USABLE, Verdict, judge
from counterflow.fit import Epoch, FitConfig, Record, fit
from counterflow.flow import Flow, StudentT
from counterflow.gaussian import Gaussians, LogDensity, log_density, log_density_and_score
from counterflow.group import Group
from counterflow.recipes import stack
from counterflow.states import States
from counterflow.transform import Compose, Permute, Transform, Triangular
from counterflow.univariate import SinhArcsinh
from counterflow.vae import Density, Draws, draw_from

Estimator = Literal["reparameterised", "path", "dreg", "forward_kl", "renyi"]
ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "reparameterised": objectives.elbo,
    "path": objectives.path_elbo,
    "dreg": objectives.dreg_elbo,
    "forward_kl": objectives.forward_kl,
    "renyi": objectives.renyi_elbo,
}
WORTH = 0.9  # of the draws: the effective size from which no further stage is needed
TWENTIETH = math.log(20)  # nats: where the flow has so much less than the target, it does not cover it


@dataclass(frozen=True)
class PosteriorConfig:
    """How to fit a posterior. The defaults are meant for every model."""

    layers: int = 4  # of the flow at first; a stage may add as many
    hidden: tuple[int, ...] = ()  # sizes of each layer's network; empty takes two of 2 D, at least 32 and at most 256
    activation: str = "elu"  # smooth, since the path gradient takes the derivative of the flow's density
    df: float = 25.0  # at most, of the Student t base: tails heavier than normal ones bound the importance weights
    starts: int = 8  # points to climb from; as many again, far around the best, look for other modes
    estimator: Estimator = "path"  # of the gradient; the path derivative's variance is 0 where the flow is exact
    draws: int = 256  # a step
    steps: int = 250  # of the first stage; the later ones take more
    learning_rate: float = 1e-2  # of the first stage, falling to a hundredth; half of it in the later ones
    stages: int = 4  # at most; a good verdict ends them sooner
    seconds: float = 200.0  # no stage starts that is expected to end later
    verdict_draws: int = 10_000  # which judge each stage, and which are resampled in the end
    seed: int = 0  # of starting points, initial weights and all noise

    def __post_init__(self) -> None:
        for name in ("layers", "starts", "draws", "steps", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("df", "learning_rate", "seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} above 0, got {getattr(self, name)}")
        if self.verdict_draws < 1000:
            raise ValueError(f"expected verdict_draws of at least 1000, got {self.verdict_draws}; k-hat needs a tail")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"expected estimator as one of {', '.join(ESTIMATORS)}, got {self.estimator!r}")


@dataclass(frozen=True)
class Plan:
    """What a stage will do."""

    estimator: Estimator
    draws: int  # a step
    steps: int
    more_layers: bool = False
    enough: float = USABLE  # the k-hat below which, with a large effective size, no further stage is needed


@dataclass(frozen=True)
class Stage:
    """What a stage did, and what its draws said afterwards."""

    estimator: Estimator
    layers: int  # autoregressive ones
    draws: int  # a step
    steps: int
    skipped: int  # steps that were not finite
    stopped: str  # as a fit's `Record`: finished, interrupted or not finite
    seconds: float
    course: tuple[float, ...]  # the ELBO on the same noise after each tenth of the steps, nats
    k_hat: float
    ess: float  # of the verdict's draws
    verdict_draws: int
    elbo: float  # nats
    good: bool  # enough to end the fit


class Step(NamedTuple):
    """How far a stage is."""

    stage: int  # counted from 1
    done: int  # steps
    steps: int  # in all
    elbo: float  # where it was last looked at, nats; NaN before


class Pool(NamedTuple):
    """S draws of the flow, and what is known of them."""

    theta: Tensor  # (S, D)
    log_p: Tensor  # the target's log density, (S,)
    log_q: Tensor  # the flow's, (S,)


@dataclass(frozen=True)
class OnTarget:
    """A flow and the log density that it shall follow, as the objectives want a model: no data, S draws.

    Where the target is not finite it is taken as flat, and as low as the lowest of the other draws.
    """

    flow: Flow
    target: LogDensity

    def draw(self, x: None = None, samples: int = 1, density: Density = "joint") -> Draws:
        """S draws (S, 1), the target in the place of the likelihood and nothing in that of the prior."""
        theta, log_q = draw_from(self.flow().expand((1,)), samples, density)
        value, score = log_density_and_score(self.target, theta)
        value = torch.where(value > -math.inf, value, value.nan_to_num(neginf=math.inf).min())
        log_p = value + (score * (theta - theta.detach())).sum(-1)
        return Draws(log_p, torch.zeros_like(log_p), log_q, theta)


def plans(config: PosteriorConfig) -> tuple[Plan, ...]:
    """The stages that a fit may go through: longer, then deeper, then over all of the target."""
    S, n = config.draws, config.steps
    return (
        Plan(config.estimator, S, n, enough=CLOSE),
        Plan(config.estimator, S, 2 * n),
        Plan(config.estimator, S, 4 * n, more_layers=True),
        Plan("forward_kl", 4 * S, 2 * n),
    )[: config.stages]


class Fitted(NamedTuple):
    """The flow of the stage with the best verdict, and its draws."""

    flow: Flow
    pool: Pool
    verdict: Verdict
    stages: tuple[Stage, ...]


def fit_flow(
    target: LogDensity,
    start: Gaussians,
    config: PosteriorConfig,
    deadline: float,
    on_stage: Callable[[Stage], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    states: States | None = None,
) -> Fitted:
    """Fit a flow that starts as the first Gaussian, stage by stage, until a verdict is good or the time is up.

    Of several processes each makes its share of the draws, and all come to the same flow and the same verdict.
    """
    group = Group.here()
    base = StudentT(start.mean.shape[-1], config.df)
    parts: list[Transform] = [*_layers(config, 0, start), Triangular(start.mean[0], start.factor[0])]
    stages: list[Stage] = []
    best: Fitted | None = None
    for number, plan in enumerate(plans(config)):
        kept = None if states is None else states.of(f"stage-{number + 1}")
        late = bool(stages) and time.perf_counter() + _expected_seconds(plan, stages[-1]) > deadline
        if group.first(late) and (kept is None or kept.load() is None):  # one that was begun goes on
            break
        begun = time.perf_counter()
        if plan.more_layers:
            parts = [*_layers(config, number, start), *parts]
        flow = Flow(base, Compose(parts)).double()
        record = _train(flow, target, plan, config, number, on_step, kept)
        pool = _pool_of_all(target, flow, config.verdict_draws, group)
        verdict = judge(pool.log_p - pool.log_q)
        stages.append(_report(parts, plan, record, verdict, time.perf_counter() - begun))
        if on_stage is not None and group.rank == 0:
            on_stage(stages[-1])
        if best is None or _rank(verdict) > _rank(best.verdict):
            best = Fitted(copy.deepcopy(flow), pool, verdict, ())
        if group.first(stages[-1].good) or record.stopped == "interrupted":
            break
    return best._replace(stages=tuple(stages))  # type: ignore[union-attr]  # the first stage always runs


def _rank(verdict: Verdict) -> tuple[bool, float]:
    return verdict.trusted, verdict.effective_sample_size


def _expected_seconds(plan: Plan, last: Stage) -> float:
    deeper = 2 if plan.more_layers else 1
    return deeper * last.seconds * plan.steps / last.steps * plan.draws / last.draws


def _report(parts: list[Transform], plan: Plan, record: Record, verdict: Verdict, seconds: float) -> Stage:
    return Stage(
        estimator=plan.estimator,
        layers=sum(isinstance(part, Autoregressive) and part.univariate != SinhArcsinh() for part in parts),
        draws=plan.draws,
        steps=plan.steps,
        skipped=sum(epoch.skipped for epoch in record.epochs),
        stopped=record.stopped,
        seconds=seconds,
        course=tuple(epoch.validation for epoch in record.epochs),
        k_hat=verdict.k_hat,
        ess=verdict.effective_sample_size,
        verdict_draws=verdict.draws,
        elbo=verdict.elbo,
        good=verdict.k_hat < plan.enough and verdict.effective_sample_size >= WORTH * verdict.draws,
    )


@torch.no_grad()
def draw_pool(target: LogDensity, flow: Flow, n: int) -> Pool:
    """n draws of the flow with both densities."""
    theta, log_q = flow().rsample_and_log_prob((n,))
    return Pool(theta, log_density(target, theta), log_q)


def _pool_of_all(target: LogDensity, flow: Flow, n: int, group: Group) -> Pool:
    """n draws, of which each process makes its share."""
    mine = draw_pool(target, flow, -(-n // group.size))
    return Pool(*(torch.cat(group.gather(part))[:n] for part in mine))


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
    on_step: Callable[[Step], None] | None,
    states: States | None,
) -> Record:
    """One stage by the library's training loop; the flow ends with the averaged weights of the best ELBO."""
    estimator, epochs, elbo = ESTIMATORS[plan.estimator], min(10, plan.steps), math.nan
    draws = Group.here().share(plan.draws, "draws")  # of each process, with noise of its own

    def objective(flow: nn.Module, batch: None) -> Tensor:
        return estimator(OnTarget(flow, target), None, draws)  # type: ignore[arg-type]  # it is the flow

    how = FitConfig(
        epochs=epochs,
        optimizer="adam",
        learning_rate=config.learning_rate / (2 if number else 1),
        warm_up_steps=min(30, plan.steps // 5),
        clip_norm=10.0,
        ema=0.98,
        seed=config.seed + number,
    )

    def stepped(done: int, steps: int) -> None:
        if on_step is not None:
            on_step(Step(number + 1, done, steps, elbo))

    def looked(epoch: Epoch, _: nn.Module) -> None:
        nonlocal elbo
        elbo = epoch.validation

    return fit(flow, objective, plan.steps // epochs, 4, how, on_step=stepped, on_epoch=looked, states=states)


@torch.no_grad()
def suspects(target: LogDensity, flow: Flow, n: int, draws: int = 1000) -> Tensor:
    """n points (n, D) where the target is high and the flow low: of `draws` each, the one with the largest p / q.

    The draws are made from a base that is stretched up to fourfold, so that they also fall around what q covers.
    """
    wide = torch.linspace(1, 4, draws, dtype=torch.float64).repeat(n)[:, None]
    base = flow().base
    eps = wide * base.sample((n * draws,))
    theta, log_det = flow.transform(eps)
    ratio = log_density(target, theta) - base.log_prob(eps) + log_det
    best = ratio.nan_to_num(nan=-math.inf, neginf=-math.inf).reshape(n, draws).argmax(1)
    return theta.reshape(n, draws, -1)[torch.arange(n), best]


@torch.no_grad()
def uncovered(target: LogDensity, flow: Flow, found: Gaussians, generator: torch.Generator, draws: int = 500) -> float:
    """The share of the mass that was found where the flow has less than a twentieth of what it should have.

        sum_s w_s [p(s) > 20 Z q(s)] / sum_s w_s,    w_s = p(s) / m(s),    Z = mean_s w_s

    with draws s from m, half of them from the flow q and half from the K Gaussians.
    """
    K, S, D = len(found.mean), draws, found.mean.shape[-1]
    eps = torch.randn(K, S, D, generator=generator, dtype=found.mean.dtype)
    theta = torch.cat([found.rsample_and_log_prob(eps)[0].reshape(-1, D), flow().sample((K * S,))])
    log_p = log_density(target, theta)
    log_q = flow().log_prob(theta).nan_to_num(nan=-math.inf, neginf=-math.inf)
    log_m = torch.logaddexp(log_q, torch.logsumexp(found.log_prob(theta), 0) - math.log(K)) - math.log(2)
    log_w = log_p - log_m
    log_z = torch.logsumexp(log_w, 0) - math.log(len(log_w))
    missed = (log_p > -math.inf) & (log_p > log_z + TWENTIETH + log_q)
    return (log_w.softmax(0) * missed).sum().item()
