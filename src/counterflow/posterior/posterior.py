"""The posterior of a Bayesian model: fitted by an inverse autoregressive flow, and judged by its own draws."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from counterflow.diagnostics.chains import import_arviz
from counterflow.diagnostics.importance import Verdict, effective_sample_size_of_means, psis, resample
from counterflow.flows.flow import Flow
from counterflow.io.atomic import write_bytes
from counterflow.io.json import MAX_QUOTED, from_json, read_json, write_json
from counterflow.io.serialization import load, save
from counterflow.io.tensors import contiguous_copies, read_tensors
from counterflow.posterior.config import PosteriorConfig
from counterflow.posterior.mcmc import Chains, independence_metropolis, neutra
from counterflow.posterior.modes import missed_mass, undercovered_points
from counterflow.posterior.stages import FlowFit, Stage, WeightedDraws, draw_pool, fit_flow
from counterflow.posterior.starts import CLIMBS, initial_gaussians, join, newton_paths, refine_and_dedupe
from counterflow.posterior.targets.function import as_target
from counterflow.posterior.targets.target import Target
from counterflow.random import seeded
from counterflow.training.checkpoints import Checkpoints
from counterflow.training.distributed import Workers
from counterflow.training.history import OnEpoch, OnStep

REFINERS: dict[str, Callable[..., Chains]] = {"metropolis": independence_metropolis, "neutra": neutra}
MISSED = 0.02  # the share of the mass found that an approximation may leave out
FILES = ("model.safetensors", "draws.safetensors", "posterior.json")
FACTS: dict[str, Any] = {  # in the last of them
    "config": PosteriorConfig,
    "verdict": Verdict,
    "stages": tuple[Stage, ...],
    "variables": tuple[str, ...],
    "missed": float,
    "seconds": float,
}


def fit_posterior(
    target: Target | Callable[[Tensor], Tensor],
    config: PosteriorConfig = PosteriorConfig(),
    *,
    dim: int | None = None,
    on_stage: Callable[[Stage], None] | None = None,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
) -> Posterior:
    """Fit an inverse autoregressive flow to a posterior, in stages, and judge it by its own draws.

        q = f(eps),  eps ~ independent Student t,  f = L . (skew, tails) . IAF,    maximise E_q[log p - log q]

    L whitens: a location and a triangular scale that are found by climbing from several points and by matching the
    scores there. Each stage ends with draws whose importance weights give a verdict (Pareto k-hat); where it is not
    good, the next stage trains longer, then deeper, then by the forward KL, within `config.stages` and
    `config.seconds`. Other modes are looked for from all starting points, far around, and where p / q is large; one
    that the flow leaves out makes the verdict a bad one, however good k-hat is.

    Where torch.distributed has a process group, all its processes call this with the same arguments; each makes its
    share of the draws, with noise of its own. on_stage is called by the first process alone.

    Args:
        target: a `counterflow.targets.Target`, or a function theta (B, dim) -> (B,) in float64: the log density up to
            a constant, without bounds, differentiable by autograd.
        config: how to fit; the defaults are meant for every model.
        dim: D, for a function.
        on_stage: called after each stage.
        on_epoch: called as on_epoch(task, epoch) ten times a stage, on rank 0; the tasks are "stage 1", "stage 2", ...
        on_step: called as on_step(task, done, total) after each step.
        checkpoints: where to keep what it takes to go on after a kill, as `cf.fit` does: a folder for each stage. The
            seconds of `config` are counted anew.

    Raises:
        ValueError: a missing dim, or a log density that is nowhere finite.
        TypeError: a target that is neither of the two.
        ImportError: ArviZ is not installed, which computes k-hat.

    Source: Kingma et al. 2016, "Improving Variational Inference with Inverse Autoregressive Flow"; Yao et al. 2018,
    "Yes, but did it work?: Evaluating variational inference", for the verdict; `counterflow.gaussian` for the start.

    Example:
        >>> import torch, counterflow as cf
        >>> def banana(theta):
        ...     x, y = theta.unbind(-1)
        ...     return -(x.square() + (y - x.square()).square()) / 2
        >>> posterior = cf.fit_posterior(banana, cf.PosteriorConfig(layers=2, verdict_samples=2000), dim=2)
        >>> posterior.resampled, posterior.sample(50)["theta"].shape
        (True, torch.Size([50, 2]))
    """
    begun, group = time.perf_counter(), Workers.current()
    target = as_target(target, dim)
    generator = torch.Generator().manual_seed(config.seed)
    found = initial_gaussians(target, target.initial(config.starts, config.seed), generator)
    with seeded(group.rank_seed(config.seed)):
        fitted = fit_flow(target, found, config, begun + config.seconds, on_stage, on_epoch, on_step, checkpoints)
        doubtful = newton_paths(target, undercovered_points(target, fitted.flow, config.starts), CLIMBS, generator)
        found = join(found, refine_and_dedupe(target, doubtful, generator))
        missed = group.broadcast_value(missed_mass(target, fitted.flow, found, generator))
    values = target.constrain(fitted.pool.theta)
    return Posterior(target, config, fitted, values, missed, time.perf_counter() - begun)


class SummaryRow(NamedTuple):
    """What the draws say of one number."""

    mean: float
    sd: float
    low: float  # the 5 % quantile
    high: float  # the 95 % quantile
    ess: float  # as many exact draws would know the mean as well


@dataclass(frozen=True)
class Summary:
    """A table of all variables, and the verdict. Printing it shows both."""

    rows: dict[str, SummaryRow]  # by name and index, in the model's order
    verdict: str

    def __str__(self) -> str:
        width = max(map(len, self.rows), default=0)
        lines = [f"{'':{width}} {'mean':>12} {'sd':>12} {'5%':>12} {'95%':>12} {'ess':>8}"]
        for name, row in self.rows.items():
            numbers = " ".join(f"{value:12.5g}" for value in row[:4])
            lines.append(f"{name:{width}} {numbers} {row.ess:8.0f}")
        return "\n".join([*lines, self.verdict])


@dataclass(frozen=True)
class Refined:
    """Draws of a posterior by Markov chains that a flow guides."""

    values: dict[str, Tensor]  # name -> (chains, draws, *shape), constrained
    chains: Chains  # the unconstrained draws, and how far they converged

    def to_arviz(self) -> Any:
        """The chains as ArviZ keeps them: see `Posterior.to_arviz`."""
        groups = {"posterior": {name: value.numpy() for name, value in self.values.items()}}
        return _arviz_data(groups, {}, {}, {"verdict": self.chains.sentence})

    def __repr__(self) -> str:
        return f"Refined({', '.join(self.values)})\n  {self.chains.sentence}"


class Posterior:
    """A fitted posterior: draws of the model's variables, and how far they can be trusted.

    Attributes:
        flow: the approximation q over unconstrained theta (D,).
        pool: the draws of q that were judged, with log p and log q.
        log_weights: their Pareto-smoothed importance weights, summing to one, (S,).
        verdict: what the weights say: see `counterflow.diagnostics.Verdict`.
        missed: the share of the posterior mass found that q leaves out: other modes.
        stages: what each stage of the fit did and reached.
        seconds: the fit's wall-clock time.
        target: what was fitted; None after loading without it.
    """

    def __init__(
        self,
        target: Target | None,
        config: PosteriorConfig,
        fitted: FlowFit,
        values: dict[str, Tensor],
        missed: float,
        seconds: float,
    ) -> None:
        self.target, self.config, self.missed, self.seconds = target, config, missed, seconds
        self.flow, self.pool, self.verdict, self.stages = fitted
        self.values = values  # name -> (S, *shape), constrained
        self.log_weights = psis(self.pool.log_p - self.pool.log_q)[0]

    @property
    def k_hat(self) -> float:
        """The shape of the importance weights' tail: below 0.5 q is close, above 0.7 it is not good enough."""
        return self.verdict.k_hat

    @property
    def ess(self) -> float:
        """How many exact draws those of the verdict are worth, by their importance weights."""
        return self.verdict.effective_sample_size

    @property
    def elbo(self) -> float:
        """The evidence lower bound, nats."""
        return self.verdict.elbo

    @property
    def trusted(self) -> bool:
        """Whether the draws can be used as the posterior's: a good k-hat, and no mode known that q leaves out."""
        return self.verdict.trusted and self.missed < MISSED

    @property
    def resampled(self) -> bool:
        """Whether draws are resampled by their importance weights: where they are trusted; else they are q's own."""
        return self.trusted

    @property
    def sentence(self) -> str:
        """The verdict in plain words."""
        if self.missed < MISSED:
            return self.verdict.sentence
        return (
            f"The approximation cannot be trusted: {100 * self.missed:.0f} % of the posterior mass that was found lies "
            "where it has next to none, as with separate modes or a funnel that it does not reach; look at the model "
            f"for a symmetry or a better parameterisation (k-hat {self.k_hat:.2f} speaks only for what is covered)."
        )

    def sample(self, n: int) -> dict[str, Tensor]:
        """n draws of the model's variables: name -> (n, *shape), constrained.

        They are resampled from the verdict's draws by their weights where the verdict allows it, and otherwise draws of
        q as it is. The noise is that of torch's global generator.

        Raises:
            ValueError: n below 1, or more than the verdict's draws after loading without the target.
        """
        if n < 1:
            raise ValueError(f"expected n of at least 1, got {n}")
        if n <= len(self.log_weights):
            index = self._picked(self.log_weights, n)
            return {name: value[index] for name, value in self.values.items()}
        pool = draw_pool(self._target(), self.flow, n)
        return self._target().constrain(pool.theta[self._picked(psis(pool.log_p - pool.log_q)[0], n)])

    def _picked(self, log_weights: Tensor, n: int) -> Tensor:
        index = torch.arange(len(log_weights))
        return resample(index, log_weights, n) if self.resampled else index[:n]

    def _target(self) -> Target:
        if self.target is None:
            raise ValueError(
                f"expected the target, got a posterior that was loaded without it, with {len(self.log_weights)} draws; "
                "sample no more than those, or load it with Posterior.load(folder, target)"
            )
        return self.target

    @torch.no_grad()
    def log_prob(self, theta: Tensor) -> Tensor:
        """log q(theta) (...) of unconstrained theta (..., D), nats; one forward substitution a layer."""
        return self.flow().log_prob(theta.double())

    def summary(self) -> Summary:
        """Mean, standard deviation, 5 % and 95 % quantiles and effective size of every number of every variable.

        Weighted where the verdict allows it, and otherwise those of q as it is.
        """
        S = len(self.log_weights)
        log_w = self.log_weights if self.resampled else torch.full_like(self.log_weights, -math.log(S))
        rows: dict[str, SummaryRow] = {}
        for name, value in self.values.items():
            columns = value.reshape(S, -1).double()
            ess = effective_sample_size_of_means(columns, self.log_weights)
            for label, column, size in zip(_labels(name, value.shape[1:]), columns.T, ess.tolist(), strict=True):
                rows[label] = _row(column, log_w.exp(), size)
        return Summary(rows, self.sentence)

    def to_arviz(self, draws: int = 4000) -> Any:
        """The draws as ArviZ keeps them: InferenceData in version 0, a DataTree from version 1 on.

        Groups: posterior (one chain), sample_stats (log_weight, lp, log_q), and where the target has them
        posterior_predictive and observed_data. The attributes of posterior hold the verdict.
        """
        index = self._picked(self.log_weights, draws)
        stats = {"lp": self.pool.log_p, "log_q": self.pool.log_q, "log_weight": self.pool.log_p - self.pool.log_q}
        groups: dict[str, dict[str, Any]] = {
            "posterior": {name: value[index][None].numpy() for name, value in self.values.items()},
            "sample_stats": {name: value[index][None].numpy() for name, value in stats.items()},
        }
        target = self.target
        if target is not None:
            predictive = target.predictive(self.pool.theta[index], self.config.seed)
            groups["posterior_predictive"] = {name: value[None] for name, value in predictive.items()}
            groups["observed_data"] = dict(target.observed)
        return _arviz_data(
            {name: group for name, group in groups.items() if group},
            {} if target is None else target.dims,
            {} if target is None else target.coords,
            {"verdict": self.sentence, "k_hat": self.k_hat, "resampled": int(self.resampled)},
        )

    def refine(
        self, method: Literal["metropolis", "neutra"] = "neutra", *, chains: int = 16, draws: int = 500, seed: int = 0
    ) -> Refined:
        """Exact draws by chains that the flow guides: see `counterflow.refine`. They find no mode that q leaves out.

        Raises:
            ValueError: an unknown method, or a posterior that was loaded without its target.
            ImportError: NumPyro, which "neutra" needs, is not installed.
        """
        if method not in REFINERS:
            raise ValueError(f"expected method as one of {', '.join(REFINERS)}, got {method!r}")
        target = self._target()
        found = REFINERS[method](self.flow, target, chains=chains, draws=draws, seed=seed)
        values = target.constrain(found.draws.flatten(0, 1))
        return Refined({name: value.unflatten(0, (chains, draws)) for name, value in values.items()}, found)

    def save(self, folder: str | Path) -> None:
        """Write the flow, the draws and the verdict to a folder: safetensors and JSON, never pickle.

        Raises:
            ValueError: a variable whose values safetensors does not hold.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILES[2]).unlink(missing_ok=True)  # it comes back last: a folder that has it is whole
        save(self.flow, folder / FILES[0])
        tensors = {f"values/{name}": value for name, value in self.values.items()} | self.pool._asdict()
        write_bytes(folder / FILES[1], safetensors.torch.save(contiguous_copies(tensors)))
        facts = {
            "config": asdict(self.config),
            "verdict": asdict(self.verdict),
            "stages": [asdict(stage) for stage in self.stages],
            "variables": list(self.values),
            "missed": self.missed,
            "seconds": self.seconds,
        }
        write_json(folder / FILES[2], facts)

    @classmethod
    def load(cls, folder: str | Path, target: Target | Callable[[Tensor], Tensor] | None = None) -> Posterior:
        """Read what `save` wrote. Without the target it keeps its draws, summary and density, and makes no new draws.

        Raises:
            FileNotFoundError: the folder lacks a file.
            ValueError: files that are not those of a posterior, or a target of another size than the flow.
        """
        folder = Path(folder)
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"expected a folder written by Posterior.save, got {folder} without {missing[0]}")
        facts, (tensors, _) = (
            read_json(folder / FILES[2], "what Posterior.save writes"),
            read_tensors(folder / FILES[1]),
        )
        flow: Flow = load(folder / FILES[0])
        try:
            config, verdict, stages, variables, missed, seconds = (
                from_json(facts[name], hint, name) for name, hint in FACTS.items()
            )
            pool = WeightedDraws(*(tensors[name] for name in WeightedDraws._fields))
            values = {name: tensors[f"values/{name}"] for name in variables}
            S, shapes = len(pool.theta), [tuple(t.shape) for t in pool]
            if shapes != [(S, flow.features), (S,), (S,)] or any(v.shape[:1] != (S,) for v in values.values()):
                raise ValueError(f"draws of shapes {shapes} for a flow of {flow.features} features")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"expected {folder} as Posterior.save writes it, got: {error!r:.{MAX_QUOTED}}") from None
        known = None if target is None else as_target(target, flow.features)
        return cls(known, config, FlowFit(flow, pool, verdict, stages), values, missed, seconds)

    def __repr__(self) -> str:
        how = "resampled by importance weights" if self.resampled else "of the approximation as it is, NOT corrected"
        stages = f"{len(self.stages)} stage{'s' if len(self.stages) > 1 else ''}"
        return (
            f"Posterior({self.flow.features} dimensions: {', '.join(self.values)}; {stages}, {self.seconds:.1f} s)\n"
            f"  {self.sentence}\n"
            f"  draws: {how}"
        )


def _labels(name: str, shape: torch.Size) -> list[str]:
    """name[i,j] for each element, in the order of the flattened tensor; the name alone for a scalar."""
    if not shape:
        return [name]
    return [f"{name}[{','.join(map(str, index))}]" for index in np.ndindex(*shape)]


def _row(x: Tensor, w: Tensor, ess: float) -> SummaryRow:
    """x (S,) under weights w (S,) that sum to one."""
    mean = (w * x).sum()
    order = x.argsort()
    places = torch.searchsorted(w[order].cumsum(0), torch.tensor([0.05, 0.95], dtype=w.dtype)).clamp_max(len(x) - 1)
    low, high = x[order][places].tolist()
    return SummaryRow(mean.item(), (w * (x - mean).square()).sum().sqrt().item(), low, high, ess)


def _arviz_data(
    groups: dict[str, dict[str, Any]], dims: dict[str, Any], coords: dict[str, Any], attributes: dict[str, Any]
) -> Any:
    """The groups as either generation of ArviZ wants them."""
    arviz = import_arviz()
    named = {"dims": {name: list(value) for name, value in dims.items()}, "coords": dict(coords)}
    first = hasattr(arviz, "InferenceData")  # version 0
    data = arviz.from_dict(**groups, **named) if first else arviz.from_dict(groups, **named)
    data["posterior"].attrs.update(attributes)
    return data
