"""NUTS in coordinates that a flow straightens, by nutpie, whose transform adapters this module implements.

    z -> eps = mean + scale * z -> theta = f(eps)

f is the flow, which stays as it was fitted and is shared by all chains. Each chain adapts mean and scale to its tuning
draws. nutpie runs every chain in a thread; the points that the chains ask for meanwhile are evaluated together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch

from counterflow.checks import require
from counterflow.diagnostics.chains import convergence
from counterflow.flows.flow import Flow
from counterflow.posterior.evaluation import LogDensity, log_density_and_score
from counterflow.posterior.mcmc import Chains, frozen_copy
from counterflow.posterior.targets.target import Array
from counterflow.random import seeded

MIN_TUNING_DRAWS = 30  # fewest draws that mean and scale are adapted to
MAX_STARTS = 64  # draws of the flow among which the chains' starts are chosen


def nuts(
    flow: Flow,
    target: LogDensity,
    *,
    chains: int = 4,
    samples: int = 1000,
    warm_up: int = 500,
    target_acceptance: float = 0.8,
    seed: int = 0,
) -> Chains:
    """Run nutpie's NUTS in the latent space of the flow theta = f(mean + scale * z).

        log p(theta) + log|det dtheta/dz|

    is the log density there. mean and scale of each chain minimise the Fisher divergence between its tuning draws and
    a standard normal, coordinate by coordinate:

        scale^2 = sd(eps) / sd(g),    mean = E[eps] + scale^2 E[g],    g the gradient of the log density at eps

    Args:
        flow: f and its base, without a context; it is not changed. Chains start from draws of it.
        target: log p up to a constant, theta (B, D) -> (B,) in float64, differentiable once; a point where value or
            gradient is not finite counts as a divergence.
        chains: number of chains, which run in parallel.
        samples: draws of each chain after the tuning.
        warm_up: tuning draws of each chain, which are dropped.
        target_acceptance: acceptance statistic that the step size is adapted to.
        seed: seed of starts and sampler.

    Raises:
        ValueError: a flow with a context, samples below 4, target_acceptance outside (0, 1), or a target that is not
            finite where the flow draws.
        ImportError: nutpie or ArviZ is not installed.

    Source: Hoffman et al. 2019, "NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport"; the
    documentation of nutpie for the adaptation by Fisher divergence.
    """
    flow = frozen_copy(flow, chains, samples, warm_up).cpu()
    if not 0 < target_acceptance < 1:
        raise ValueError(f"expected target_acceptance between 0 and 1, got {target_acceptance}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23 announces version 1
        nutpie = require("nutpie", "refine", "NUTS through a flow")
    evaluator = Evaluator(flow, target, chains)
    model = _model(evaluator.starts(seed), evaluator)
    with ThreadPoolExecutor(1) as worker:
        worker.submit(evaluator.run)
        try:
            sampler = nutpie.sample(
                model,
                draws=samples,
                tune=warm_up,
                chains=chains,
                cores=chains,
                seed=seed,
                transform_adapt=True,
                target_accept=target_acceptance,
                progress_bar=False,
                return_raw_trace=True,
                blocking=False,
            )
            draws, stats = sampler.wait().get_arrow_trace()
        except BaseException as error:
            evaluator.failure = evaluator.failure or error  # which ends the chains, as they run in other threads
            raise evaluator.failure from None
        finally:
            evaluator.stop()
    if evaluator.failure is not None:
        raise evaluator.failure
    theta = torch.tensor(np.stack([_column(chain, "theta", samples) for chain in draws]))
    acceptance = np.stack([_column(chain, "mean_tree_accept", samples) for chain in stats]).mean().item()
    divergences = sum(int(_column(chain, "diverging", samples).sum()) for chain in stats)
    return Chains(theta, acceptance, divergences, convergence(theta), evaluator.evaluations)


class Point(NamedTuple):
    """Log density of the target and the map of the flow at one point."""

    theta: Array  # f(eps), (D,)
    log_p: float  # log density of the target at theta; -inf, with zeros as gradients, where anything is not finite
    score: Array  # its gradient, (D,)
    log_det: float  # log|det dtheta/deps|
    gradient: Array  # of log_p + log_det at eps, (D,)


class Evaluator:
    """Evaluate flow and target at the points of all chains, those that wait at once as one batch.

    A batch has one row for each chain, and rows of chains that do not wait are filled. Rounding, and so the draws,
    would depend on timing otherwise.

    Args:
        flow: the flow, frozen, in float64.
        target: the log density.
        chains: number of chains.
    """

    def __init__(self, flow: Flow, target: LogDensity, chains: int) -> None:
        self.flow = flow
        self.target = target
        self.chains = chains
        self.evaluations = 0
        self.failure: BaseException | None = None  # error of the target, or an interrupt; the chains end soon after it
        self._waiting: SimpleQueue[tuple[int, Array, Future[Point]] | None] = SimpleQueue()

    def starts(self, seed: int) -> Array:
        """Draw points theta (N, D), at least one for each chain, at which the target is finite."""
        with torch.no_grad(), seeded(seed):
            eps = self.flow().base.sample((max(MAX_STARTS, 4 * self.chains),)).numpy()
        points = [point for point in self._evaluate(eps) if np.isfinite(point.log_p)]
        if len(points) < self.chains:
            raise ValueError(
                f"expected a target that is finite where the flow draws, got {len(points)} of {len(eps)} draws with a "
                "finite log density; train the flow for longer"
            )
        return np.stack([point.theta for point in points])

    def run(self) -> None:
        """Serve the chains until `stop` is called."""
        while (first := self._waiting.get()) is not None:
            batch = [first]
            while not self._waiting.empty():
                request = self._waiting.get()
                if request is None:
                    self._waiting.put(None)
                    break
                batch.append(request)
            eps = np.repeat(first[1][None], self.chains, 0)
            for chain, own, _ in batch:
                eps[chain] = own
            try:
                points = self._evaluate(eps)
            except BaseException as error:
                self.failure = error
                points = [_nowhere(len(row)) for row in eps]
            for chain, _, future in batch:
                future.set_result(points[chain])

    def stop(self) -> None:
        """Let `run` return."""
        self._waiting.put(None)

    def __call__(self, chain: int, eps: Array) -> Point:
        """Evaluate a point (D,) of a chain in the thread of `run`. A chain waits for one point at a time."""
        if self.failure is not None:
            return _nowhere(len(eps))
        self.evaluations += 1
        future: Future[Point] = Future()
        self._waiting.put((chain, eps, future))
        return future.result()

    def inverse(self, theta: Array) -> Array:
        """Return the eps (..., D) of theta (..., D)."""
        with torch.no_grad():
            return self.flow.transform.inverse(torch.tensor(theta))[0].numpy()

    def gradients(self, eps: Array, scores: Array) -> Array:
        """Return the gradients (B, D) of log_p + log_det at eps (B, D) from the target's scores (B, D) at f(eps)."""
        with torch.enable_grad():
            leaf = torch.tensor(eps, requires_grad=True)
            theta, log_det = self.flow.transform(leaf)
            (gradient,) = torch.autograd.grad((theta * torch.tensor(scores)).sum() + log_det.sum(), leaf)
        return gradient.numpy()

    def _evaluate(self, eps: Array) -> list[Point]:
        """Evaluate points (B, D)."""
        with torch.enable_grad():
            leaf = torch.tensor(eps, requires_grad=True)
            theta, log_det = self.flow.transform(leaf)
            log_p, score = log_density_and_score(self.target, theta)
            (gradient,) = torch.autograd.grad((score * theta).sum() + log_det.sum(), leaf)
        finite = log_p.isfinite() & log_det.isfinite() & gradient.isfinite().all(1)
        columns = (theta.detach().numpy(), log_p.tolist(), score.numpy(), log_det.tolist(), gradient.numpy())
        points = [Point(*row) for row in zip(*columns, strict=True)]
        return [point if good else _nowhere(eps.shape[1]) for point, good in zip(points, finite, strict=True)]


def _nowhere(D: int) -> Point:
    """Return a point of density zero, at which nutpie's trajectory diverges."""
    return Point(np.zeros(D), -np.inf, np.zeros(D), 0.0, np.zeros(D))


class Adapter:
    """Transform theta = f(mean + scale * z) of one chain, with the methods that nutpie calls.

    Positions are float64 arrays (D,); "transformed" ones are z, "untransformed" ones theta, and log_det is
    log|det dtheta/dz|.

    Args:
        evaluator: flow and target.
        D: number of coordinates.
        chain: index of the chain.

    Attributes:
        transformation_id: changes whenever mean or scale does.
    """

    def __init__(self, evaluator: Evaluator, D: int, chain: int) -> None:
        self.transformation_id = 0
        self._chain = chain
        self._evaluator = evaluator
        self._mean = np.zeros(D)
        self._scale = np.ones(D)

    def update(self, seed: int, thetas: Sequence[Array], scores: Sequence[Array], log_ps: Sequence[float]) -> None:
        """Adapt mean and scale to the later half of the tuning draws theta and the target's scores there."""
        first = len(thetas) // 2
        if len(thetas) - first < MIN_TUNING_DRAWS:
            return
        eps = self._evaluator.inverse(np.stack(thetas[first:]))
        gradient = self._evaluator.gradients(eps, np.stack(scores[first:]))
        usable = np.isfinite(eps).all(1) & np.isfinite(gradient).all(1)
        mean, scale = diagonal_fisher(eps[usable], gradient[usable])
        if np.isfinite(mean).all() and np.isfinite(scale).all() and (scale > 0).all():
            self._mean = mean
            self._scale = scale
            self.transformation_id += 1

    def init_from_transformed_position(self, z: Array) -> tuple[float, float, Array, Array, Array]:
        """Return log_p, log_det, theta, the score at theta and the gradient at z."""
        point = self._evaluator(self._chain, self._mean + self._scale * z)
        return point.log_p, self._log_det(point), point.theta, point.score, self._scale * point.gradient

    def init_from_transformed_position_part1(self, z: Array) -> tuple[Array, tuple[Array, float]]:
        """Return theta, and what the second part needs."""
        with torch.no_grad():
            eps = self._mean + self._scale * z
            theta, log_det = self._evaluator.flow.transform(torch.tensor(eps)[None])
        return theta[0].numpy(), (eps, log_det.item() + float(np.log(self._scale).sum()))

    def init_from_transformed_position_part2(self, part1: tuple[Array, float], score: Array) -> tuple[float, Array]:
        """Return log_det and the gradient at z, from the score at theta."""
        eps, log_det = part1
        return log_det, self._scale * self._evaluator.gradients(eps[None], score[None])[0]

    def init_from_untransformed_position(self, theta: Array) -> tuple[float, float, Array, Array, Array]:
        """Return log_p, log_det, the score at theta, z and the gradient at z."""
        eps = self._evaluator.inverse(theta[None])[0]
        point = self._evaluator(self._chain, eps)
        z = (eps - self._mean) / self._scale
        return point.log_p, self._log_det(point), point.score, z, self._scale * point.gradient

    def inv_transform(self, theta: Array, score: Array) -> tuple[float, Array, Array]:
        """Return log_det, z and the gradient at z."""
        eps = self._evaluator.inverse(theta[None])[0]
        point = self._evaluator(self._chain, eps)
        return self._log_det(point), (eps - self._mean) / self._scale, self._scale * point.gradient

    def _log_det(self, point: Point) -> float:
        return point.log_det + float(np.log(self._scale).sum())


def diagonal_fisher(draws: Array, gradients: Array) -> tuple[Array, Array]:
    """Return mean and scale (D,) of the diagonal normal whose scores match gradients (N, D) at draws (N, D) best.

        minimise sum_n |(x_n - mean) / scale + scale * g_n|^2:    scale^2 = sd(x) / sd(g),    mean = E[x] + scale^2 E[g]

    Example:
        >>> x = np.linspace(-1.0, 7.0, 9)[:, None]
        >>> [part.tolist() for part in diagonal_fisher(x, -(x - 5.0) / 4.0)]
        [[5.0], [2.0]]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = draws.std(0) / gradients.std(0)
    return draws.mean(0) + variance * gradients.mean(0), np.sqrt(variance)


def _column(batch: Any, name: str, samples: int) -> Array:
    """Return the last rows of a column of an Arrow record batch: (samples,), or (samples, D) for lists."""
    column = require("pyarrow", "refine", "NUTS through a flow").array(batch.column(name))
    return np.stack(column.to_numpy(zero_copy_only=False))[-samples:]


@cache
def _model_class() -> Any:
    """Return a class of models that take any transform adapter; nutpie's own makes that of its JAX flow."""
    from nutpie import _lib
    from nutpie.compiled_pyfunc import PyFuncModel

    @dataclass(frozen=True)
    class AdaptedModel(PyFuncModel):  # type: ignore[misc]
        """Model of a Python log density, with a factory of transform adapters: (seed, position, gradient, chain)."""

        make_adapter: Callable[..., Adapter] | None = None

        def _make_model(self, init_mean: Array) -> Any:
            return _lib.PyModel(
                self._make_logp_func,
                self._make_expand_func,
                self._variables,
                self.n_dim,
                dim_sizes=self._dim_sizes,
                coords=self._coords,
                init_point_func=self._make_initial_points,
                transform_adapter=self.make_adapter,
            )

    return AdaptedModel


def _model(starts: Array, evaluator: Evaluator) -> Any:
    """Return nutpie's model of the evaluator's target, whose chains start at some of the points (N, D)."""
    from nutpie import _lib

    D = starts.shape[1]
    dims = {"theta": ("coordinate",)}

    def log_density(theta: Array) -> tuple[float, Array]:
        point = evaluator(0, evaluator.inverse(theta[None])[0])
        return point.log_p, point.score

    return _model_class()(
        dims=dims,
        _n_dim=D,
        _coords={},
        _dim_sizes={"coordinate": D},
        _make_logp_func=lambda: log_density,
        _make_expand_func=lambda seed1, seed2, chain: lambda theta: {"theta": theta},
        _make_initial_points=lambda seed: starts[seed % len(starts)],
        _variables=_lib.PyVariable.new_variables(["theta"], ["float64"], [(D,)], {"coordinate": D}, dims),
        _shared_data={},
        _raw_logp_fn=None,
        make_adapter=lambda seed, position, gradient, chain: Adapter(evaluator, D, chain),
    )
