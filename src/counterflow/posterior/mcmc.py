"""Markov chains that turn an imperfect flow into exact draws of its target.

| | proposals | evaluates | suitable if |
|---|---|---|---|
| `independence_metropolis` | draws of the flow | values of the target | the flow covers the target: k-hat below 0.7 |
| `neutra` | NUTS in the flow's latent space | values and gradients | the flow has the target's shape, not its tails |

Both run many chains at once, since a flow takes hardly longer for 64 rows than for one. Neither finds a mode that the
flow and the chains' starts have missed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from counterflow.checks import require
from counterflow.diagnostics.chains import Convergence, convergence
from counterflow.diagnostics.importance import check_log_weights
from counterflow.flows.flow import Flow
from counterflow.flows.mixture import FlowMixture
from counterflow.posterior.evaluation import MAX_POINTS, LogDensity, log_density, log_density_and_score
from counterflow.posterior.stages import sample_and_log_prob
from counterflow.random import seeded

AnyFlow = TypeVar("AnyFlow", bound=Flow | FlowMixture)

MAX_R_HAT = 1.01  # above it, the chains still depend on their starts (Vehtari et al. 2021)


@dataclass(frozen=True)
class Chains:
    """Draws of a target by Markov chains, with their convergence diagnostics."""

    draws: Tensor  # (chains, draws, D), after the warm-up
    acceptance: float  # share of proposals that were accepted; for NUTS the mean acceptance statistic
    divergences: int  # draws after the warm-up at which NUTS diverged; 0 for Metropolis
    convergence: Convergence  # R-hat and effective sample sizes of each feature
    evaluations: int  # points at which the target was evaluated, the warm-up's included

    @property
    def sentence(self) -> str:
        """The convergence in plain words, with the numbers that it rests on."""
        r_hat = self.convergence.r_hat.max().item()
        ess = min(self.convergence.ess_bulk.min().item(), self.convergence.ess_tail.min().item())
        mixed = "have mixed" if r_hat < MAX_R_HAT else "have not mixed: draw more, or train the flow for longer"
        return (
            f"{len(self.draws)} chains of {self.draws.shape[1]:,} draws {mixed}; R-hat is at most {r_hat:.3f}, the "
            f"effective sample size at least {ess:,.0f}, {self.acceptance:.0%} were accepted and {self.divergences:,} "
            "diverged."
        )


def independence_metropolis(
    flow: Flow | FlowMixture,
    target: LogDensity,
    *,
    chains: int = 16,
    samples: int = 1000,
    warm_up: int = 100,
    seed: int = 0,
) -> Chains:
    """Run Metropolis-Hastings with independent draws of the flow as proposals.

        z -> z' ~ q with probability min(1, w(z') / w(z)),    w = p / q

    A chain repeats draws of large weight. With weights of mean 1, its dependence on the start decays at least as fast
    as (1 - 1 / max w)^n, so that unbounded weights (k-hat above 0.7) slow it down. All proposals are made and scored
    beforehand.

    Args:
        flow: q, a flow or a mixture of flows, without a context; it is not changed.
        target: log p up to a constant, theta (B, D) -> (B,) in float64; NaN counts as -inf.
        chains: number of chains.
        samples: draws of each chain after the warm-up.
        warm_up: draws of each chain that are dropped.
        seed: seed of proposals and acceptances.

    Raises:
        ValueError: a flow with a context, samples below 4, or a target that is -inf for all proposals.
        ImportError: ArviZ, which computes R-hat, is not installed.

    Source: Tierney 1994, "Markov Chains for Exploring Posterior Distributions", for the chain; Mengersen and Tweedie
    1996, "Rates of convergence of the Hastings and Metropolis algorithms", for its rate.

    Example:
        >>> import torch, counterflow as cf
        >>> wide = cf.Flow(cf.bases.StudentT(2, max_df=3.0), cf.IAF(2, layers=1, hidden=(8,)).transform)
        >>> found = independence_metropolis(wide, lambda z: -z.square().sum(-1) / 2, chains=4, samples=500)
        >>> found.draws.shape, found.acceptance > 0.5, found.convergence.r_hat.max().item() < 1.05
        (torch.Size([4, 500, 2]), True, True)
    """
    flow = frozen_copy(flow, chains, samples, warm_up)
    steps = warm_up + samples
    with torch.no_grad(), seeded(seed, cuda=True):
        parts = [sample_and_log_prob(flow, n) for n in _chunk_sizes(steps * chains)]
        log_u = torch.rand(steps, chains, dtype=torch.float64).log()
    z, log_q = (torch.cat(part) for part in zip(*parts, strict=True))
    log_w = (log_density(target, z) - log_q).reshape(steps, chains).cpu()
    check_log_weights(log_w)
    chosen, accepted = _accept(log_w, log_u)
    draws = z.reshape(steps, chains, -1)[chosen[warm_up:], torch.arange(chains)].transpose(0, 1)
    return Chains(draws, accepted[warm_up:].double().mean().item(), 0, convergence(draws), len(z))


def neutra(
    flow: Flow,
    target: LogDensity,
    *,
    chains: int = 16,
    samples: int = 250,
    warm_up: int = 300,
    target_acceptance: float = 0.8,
    seed: int = 0,
) -> Chains:
    """Run NUTS in the latent space of the flow z = f(eps), where the target is close to the flow's base.

        log p(f(eps)) + log|det df/deps|

    is its log density there. The gradient is one forward and one backward pass in the sampling direction of the flow,
    for all chains at once. The sampler is NumPyro's with vectorised chains, which adapt step size and diagonal mass in
    the warm-up. It computes in JAX's float32, on energies relative to their mean at the start; flow and target compute
    in float64.

    Args:
        flow: f and its base, without a context; it is not changed. Chains start from draws of the base.
        target: log p up to a constant, theta (B, D) -> (B,) in float64, differentiable once; a value or gradient that
            is not finite counts as a divergence.
        chains: number of chains; in every iteration all of them wait for the longest trajectory.
        samples: draws of each chain after the warm-up.
        warm_up: draws of each chain that adapt the sampler and are dropped.
        target_acceptance: acceptance statistic that the step size is adapted to; nearer to 1 means smaller steps and
            fewer divergences.
        seed: seed of starts and sampler.

    Raises:
        ValueError: a flow with a context, samples below 4, target_acceptance outside (0, 1), or a target that is not
            finite where the flow draws.
        ImportError: NumPyro or ArviZ is not installed.

    Source: Hoffman et al. 2019, "NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport".

    Example:
        >>> import torch, counterflow as cf
        >>> flow = cf.IAF(2, layers=1, hidden=(8,))
        >>> found = neutra(flow, lambda z: -z.square().sum(-1) / 8, chains=8, samples=100, warm_up=50)
        >>> found.draws.shape, found.convergence.r_hat.max().item() < 1.05
        (torch.Size([8, 100, 2]), True)
    """
    flow = frozen_copy(flow, chains, samples, warm_up)
    if not 0 < target_acceptance < 1:
        raise ValueError(f"expected target_acceptance between 0 and 1, got {target_acceptance}")
    energy = _Energy(flow, target)
    sample = _numpyro_sampler(energy, chains, samples, warm_up, target_acceptance, seed)
    starts = energy.starts(chains, seed)
    # JAX cannot be interrupted, so it runs in a thread. Ctrl-C, like an error of the target, makes the energy infinite
    # everywhere, after which the sampler ends soon.
    with ThreadPoolExecutor(1) as worker:
        try:
            eps, acceptance, divergences = worker.submit(sample, starts).result()
        except KeyboardInterrupt as interrupt:
            energy.failure = interrupt
            raise
    if energy.failure is not None:
        raise energy.failure
    with torch.no_grad():
        z = torch.cat([flow.transform(part)[0] for part in eps.flatten(0, 1).to(starts.device).split(MAX_POINTS)])
    z = z.reshape(chains, samples, -1)
    return Chains(z, acceptance, divergences, convergence(z), energy.evaluations)


def frozen_copy(flow: AnyFlow, chains: int, samples: int, warm_up: int) -> AnyFlow:
    """Check the arguments and return a float64 copy of the flow whose weights require no gradient."""
    if flow.context:
        raise ValueError(f"expected a flow without a context, got context={flow.context}")
    if chains < 1 or samples < 4 or warm_up < 0:
        raise ValueError(
            f"expected chains of at least 1, samples of at least 4 and warm_up of at least 0, got {chains}, {samples} "
            f"and {warm_up}"
        )
    frozen = copy.deepcopy(flow)
    frozen.double().eval().requires_grad_(False)
    return frozen


def _chunk_sizes(n: int) -> list[int]:
    return [min(MAX_POINTS, n - first) for first in range(0, n, MAX_POINTS)]


def _accept(log_w: Tensor, log_u: Tensor) -> tuple[Tensor, Tensor]:
    """Run the chains over all proposals: the index of each chain's current proposal, and whether it just moved there.

    All of log weights, log uniform numbers and results are (steps, chains).
    """
    current = log_w[0]
    chosen = torch.zeros(log_w.shape[1], dtype=torch.long)
    all_chosen = [chosen]
    all_accepted = [torch.ones_like(chosen, dtype=torch.bool)]
    for t in range(1, len(log_w)):
        accepted = log_u[t] < log_w[t] - current  # False if both are -inf, since the difference is NaN
        current = torch.where(accepted, log_w[t], current)
        chosen = torch.where(accepted, t, chosen)
        all_chosen.append(chosen)
        all_accepted.append(accepted)
    return torch.stack(all_chosen), torch.stack(all_accepted)


class _Energy:
    """Energy -log p(f(eps)) - log|det df/deps| - offset and its gradient, for a sampler in another thread."""

    def __init__(self, flow: Flow, target: LogDensity) -> None:
        self.flow = flow
        self.target = target
        self.offset = 0.0
        self.evaluations = 0
        self.device = torch.device("cpu")
        self.failure: BaseException | None = None  # error of the target in the sampler's thread, or an interrupt

    def starts(self, chains: int, seed: int) -> Tensor:
        """Draw points (chains, D) of the base at which the energy is finite, and make its mean there the offset."""
        with torch.no_grad(), seeded(seed, cuda=True):
            eps = self.flow().base.sample((16 * chains,))
        value, _ = self.evaluate(eps)
        finite = value.isfinite()
        if finite.sum() < chains:
            raise ValueError(
                f"expected a target that is finite where the flow draws, got {int(finite.sum())} of {len(eps)} draws "
                "with a finite log density; train the flow for longer"
            )
        self.offset = value[finite][:chains].mean().item()
        self.device = eps.device
        return eps[finite][:chains]

    def evaluate(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Compute values (B,) and gradients (B, D) at eps (B, D)."""
        self.evaluations += len(eps)
        with torch.enable_grad():
            leaf = eps.clone().requires_grad_()
            z, log_det = self.flow.transform(leaf)
            value, score = log_density_and_score(self.target, z)
            (gradient,) = torch.autograd.grad((score * z).sum() + log_det.sum(), leaf)
        return -(value + log_det.detach()) - self.offset, -gradient

    def __call__(self, eps: Any) -> tuple[Any, Any]:
        """Compute values (...) and gradients (..., D) for an array (..., D), in its dtype; infinite after a failure."""
        value = np.full(eps.shape[:-1], np.inf, eps.dtype)
        gradient = np.zeros(eps.shape, eps.dtype)
        if self.failure is None:
            try:
                rows = torch.tensor(np.asarray(eps), dtype=torch.float64, device=self.device)
                energies, slopes = self.evaluate(rows.reshape(-1, eps.shape[-1]))
                with np.errstate(over="ignore"):  # an energy beyond float32 is infinite
                    value[...] = energies.cpu().numpy().reshape(value.shape)
                    gradient[...] = slopes.cpu().numpy().reshape(gradient.shape)
            except BaseException as error:
                self.failure = error
        return value, gradient


def _numpyro_sampler(
    energy: _Energy, chains: int, samples: int, warm_up: int, target_acceptance: float, seed: int
) -> Callable[[Tensor], tuple[Tensor, float, int]]:
    """Build a function: starts (chains, D) -> draws (chains, samples, D), mean acceptance, number of divergences."""
    infer = require("numpyro.infer", "refine", "NUTS")
    jax = require("jax", "refine", "NUTS")

    def value_and_gradient(eps: Any) -> Any:
        shapes = (jax.ShapeDtypeStruct(eps.shape[:-1], eps.dtype), jax.ShapeDtypeStruct(eps.shape, eps.dtype))
        return jax.pure_callback(energy, shapes, eps, vmap_method="expand_dims")

    potential = jax.custom_vjp(lambda eps: value_and_gradient(eps)[0])
    potential.defvjp(value_and_gradient, lambda gradient, cotangent: (cotangent * gradient,))

    def sample(starts: Tensor) -> tuple[Tensor, float, int]:
        with jax.default_device(jax.devices("cpu")[0]):  # these small steps are slower on an accelerator
            nuts = infer.NUTS(potential_fn=potential, target_accept_prob=target_acceptance)
            chain = infer.MCMC(
                nuts,
                num_warmup=warm_up,
                num_samples=samples,
                num_chains=chains,
                chain_method="vectorized",
                progress_bar=False,
            )
            first = jax.numpy.asarray(starts.cpu().numpy())
            chain.run(jax.random.PRNGKey(seed), init_params=first, extra_fields=("accept_prob", "diverging"))
            extra = chain.get_extra_fields()
            eps = torch.tensor(np.asarray(chain.get_samples(group_by_chain=True)), dtype=torch.float64)
            return eps, float(extra["accept_prob"].mean()), int(extra["diverging"].sum())

    return sample
