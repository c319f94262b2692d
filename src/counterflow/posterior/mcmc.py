"""Chains that turn an imperfect flow into exact draws of its target.

| | proposals | asks of the target | serves where |
|---|---|---|---|
| `independence_metropolis` | draws of the flow | its values | the flow covers the target: k-hat below 0.7 |
| `neutra` | NUTS in the flow's latent space | values, gradients | the flow has the target's shape, if not its tails |

Both run many chains at once, since a flow takes hardly longer for 64 rows than for one. Neither finds a mode that the
flow and the chains' starts have missed.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.diagnostics.chains import Convergence, convergence
from counterflow.diagnostics.importance import check_log_weights
from counterflow.flows.flow import Flow
from counterflow.posterior.starts import ROWS, LogDensity, log_density, log_density_and_score
from counterflow.random import seeded

MIXED = 1.01  # R-hat above which chains have not forgotten their starts (Vehtari et al. 2021)


@dataclass(frozen=True)
class Chains:
    """Draws of a target by Markov chains, and how far they can be trusted."""

    draws: Tensor  # (chains, draws, D), after the warm-up
    acceptance: float  # the share of proposals that were accepted; for NUTS the mean acceptance statistic
    divergences: int  # draws after the warm-up in which NUTS lost the energy; 0 for Metropolis
    convergence: Convergence  # R-hat and effective sample sizes of each feature

    @property
    def sentence(self) -> str:
        """The convergence in plain words, with the numbers that it rests on."""
        r_hat = self.convergence.r_hat.max().item()
        ess = min(self.convergence.ess_bulk.min().item(), self.convergence.ess_tail.min().item())
        mixed = "have mixed" if r_hat < MIXED else "have not mixed: draw more, or train the flow for longer"
        return (
            f"{len(self.draws)} chains of {self.draws.shape[1]:,} draws {mixed}; R-hat is at most {r_hat:.3f}, the "
            f"effective sample size at least {ess:,.0f}, {self.acceptance:.0%} were accepted and {self.divergences:,} "
            "diverged."
        )


def independence_metropolis(
    flow: Flow, target: LogDensity, *, chains: int = 16, draws: int = 1000, warm_up: int = 100, seed: int = 0
) -> Chains:
    """Metropolis-Hastings whose proposals are independent draws of the flow.

        z -> z' ~ q with probability min(1, w(z') / w(z)),    w = p / q

    A chain repeats the draws of large weight. With weights of mean 1 it forgets its start as (1 - 1 / max w)^n, so that
    weights without a bound, k-hat above 0.7, hold it up. All proposals are made and scored beforehand.

    Args:
        flow: q, without a context; it is left as it is.
        target: log p up to a constant, theta (B, D) -> (B,) in float64; a value that is not a number counts as -inf.
        chains: how many run beside each other.
        draws: of each chain, after warm_up that are dropped.
        seed: of proposals and acceptances.

    Raises:
        ValueError: a flow with a context, fewer than four draws, or a target that is -inf for all proposals of a chain.
        ImportError: ArviZ is not installed, which computes R-hat.

    Source: Tierney 1994, "Markov Chains for Exploring Posterior Distributions", for the chain; Mengersen and Tweedie
    1996, "Rates of convergence of the Hastings and Metropolis algorithms", for its rate.

    Example:
        >>> import torch, counterflow as cf
        >>> wide = cf.Flow(cf.bases.StudentT(2, max_df=3.0), cf.IAF(2, layers=1, hidden=(8,)).transform)
        >>> found = independence_metropolis(wide, lambda z: -z.square().sum(-1) / 2, chains=4, draws=500)
        >>> found.draws.shape, found.acceptance > 0.5, found.convergence.r_hat.max().item() < 1.05
        (torch.Size([4, 500, 2]), True, True)
    """
    flow = _prepared(flow, chains, draws, warm_up)
    steps = warm_up + draws
    with torch.no_grad(), seeded(seed, cuda=True):
        parts = [flow().rsample_and_log_prob((n,)) for n in _split(steps * chains)]
        log_u = torch.rand(steps, chains, dtype=torch.float64).log()
    z, log_q = (torch.cat(part) for part in zip(*parts, strict=True))
    log_w = (log_density(target, z) - log_q).reshape(steps, chains).cpu()
    check_log_weights(log_w)
    at, moved = _walk(log_w, log_u)
    kept = z.reshape(steps, chains, -1)[at[warm_up:], torch.arange(chains)].transpose(0, 1)
    return Chains(kept, moved[warm_up:].double().mean().item(), 0, convergence(kept))


def neutra(
    flow: Flow,
    target: LogDensity,
    *,
    chains: int = 16,
    draws: int = 250,
    warm_up: int = 300,
    target_acceptance: float = 0.8,
    seed: int = 0,
) -> Chains:
    """NUTS in the latent space of the flow z = f(eps), in which the target is near to the flow's base.

        log p(f(eps)) + log|det df/deps|

    is its log density there, and the gradient is one pass forward and one back in the direction in which the flow
    samples, for all chains at once. The sampler is NumPyro's, with vectorised chains, which adapt step size and
    diagonal mass in the warm-up. It computes in JAX's float32, on energies from which their size at the start is taken
    off; flow and target compute in float64.

    Args:
        flow: f and its base, without a context; it is left as it is. Chains start from draws of the base.
        target: log p up to a constant, theta (B, D) -> (B,) in float64, differentiable once; a value or gradient that
            is not finite is a divergence.
        chains: how many run in step, each waiting for the longest trajectory.
        draws: of each chain, after warm_up that are dropped.
        target_acceptance: what the step size is adapted to; nearer to 1 means smaller steps and fewer divergences.
        seed: of starts and sampler.

    Raises:
        ValueError: a flow with a context, fewer than four draws, target_acceptance outside (0, 1), or a target that is
            -inf wherever the flow draws.
        ImportError: NumPyro or ArviZ is not installed.

    Source: Hoffman et al. 2019, "NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport".

    Example:
        >>> import torch, counterflow as cf
        >>> flow = cf.IAF(2, layers=1, hidden=(8,))
        >>> found = neutra(flow, lambda z: -z.square().sum(-1) / 8, chains=8, draws=100, warm_up=50)
        >>> found.draws.shape, found.convergence.r_hat.max().item() < 1.05
        (torch.Size([8, 100, 2]), True)
    """
    flow = _prepared(flow, chains, draws, warm_up)
    if not 0 < target_acceptance < 1:
        raise ValueError(f"expected target_acceptance between 0 and 1, got {target_acceptance}")
    energy = _Energy(flow, target)
    sample = _numpyro_sampler(energy, chains, draws, warm_up, target_acceptance, seed)
    starts = energy.starts(chains, seed)
    # JAX cannot be interrupted. It runs in a thread of its own, and Ctrl-C reaches it as an error of the target does:
    # as an energy that is infinite everywhere, with which it ends soon.
    with ThreadPoolExecutor(1) as worker:
        try:
            eps, acceptance, diverging = worker.submit(sample, starts).result()
        except KeyboardInterrupt as interrupt:
            energy.failure = interrupt
            raise
    if energy.failure is not None:
        raise energy.failure
    with torch.no_grad():
        z = torch.cat([flow.transform(part)[0] for part in eps.flatten(0, 1).to(starts.device).split(ROWS)])
    z = z.reshape(chains, draws, -1)
    return Chains(z, acceptance, diverging, convergence(z))


def _prepared(flow: Flow, chains: int, draws: int, warm_up: int) -> Flow:
    """A copy in float64 whose weights ask for no gradient."""
    if flow.context:
        raise ValueError(f"expected a flow without a context, got context={flow.context}")
    if chains < 1 or draws < 4 or warm_up < 0:
        raise ValueError(
            f"expected chains of at least 1, draws of at least 4 and warm_up of at least 0, got {chains}, {draws} and "
            f"{warm_up}"
        )
    return copy.deepcopy(flow).double().eval().requires_grad_(False)


def _split(n: int) -> list[int]:
    return [min(ROWS, n - first) for first in range(0, n, ROWS)]


def _walk(log_w: Tensor, log_u: Tensor) -> tuple[Tensor, Tensor]:
    """Which proposal each chain stands on after each step, and whether it moved there: both (steps, chains)."""
    here, at = log_w[0], torch.zeros(log_w.shape[1], dtype=torch.long)
    path, moves = [at], [torch.ones_like(at, dtype=torch.bool)]
    for t in range(1, len(log_w)):
        moved = log_u[t] < log_w[t] - here  # never where both are -inf, whose difference is NaN
        here, at = torch.where(moved, log_w[t], here), torch.where(moved, t, at)
        path.append(at)
        moves.append(moved)
    return torch.stack(path), torch.stack(moves)


class _Energy:
    """-log p(f(eps)) - log|det df/deps| - offset and its gradient for a sampler in another thread, as arrays."""

    def __init__(self, flow: Flow, target: LogDensity) -> None:
        self.flow, self.target = flow, target
        self.offset = 0.0
        self.device = torch.device("cpu")
        self.failure: BaseException | None = None  # of the target, in the sampler's thread

    def starts(self, chains: int, seed: int) -> Tensor:
        """Draws of the base (chains, D) where the energy is finite; its mean there becomes the offset."""
        with torch.no_grad(), seeded(seed, cuda=True):
            eps = self.flow().base.sample((16 * chains,))
        value, _ = self.of(eps)
        finite = value.isfinite()
        if finite.sum() < chains:
            raise ValueError(
                f"expected a target that is finite where the flow draws, got {int(finite.sum())} of {len(eps)} draws "
                "with a finite log density; train the flow for longer"
            )
        self.offset, self.device = value[finite][:chains].mean().item(), eps.device
        return eps[finite][:chains]

    def of(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Values (B,) and gradients (B, D) for eps (B, D)."""
        with torch.enable_grad():
            leaf = eps.clone().requires_grad_()
            z, log_det = self.flow.transform(leaf)
            value, score = log_density_and_score(self.target, z)
            (gradient,) = torch.autograd.grad((score * z).sum() + log_det.sum(), leaf)
        return -(value + log_det.detach()) - self.offset, -gradient

    def __call__(self, eps: Any) -> tuple[Any, Any]:
        """Values (...) and gradients (..., D) for an array (..., D), in its precision; infinite after a failure."""
        value, gradient = np.full(eps.shape[:-1], np.inf, eps.dtype), np.zeros(eps.shape, eps.dtype)
        if self.failure is None:
            try:
                rows = torch.tensor(np.asarray(eps), dtype=torch.float64, device=self.device)
                energies, slopes = self.of(rows.reshape(-1, eps.shape[-1]))
                with np.errstate(over="ignore"):  # an energy beyond float32 is infinite
                    value[...] = energies.cpu().numpy().reshape(value.shape)
                    gradient[...] = slopes.cpu().numpy().reshape(gradient.shape)
            except BaseException as error:
                self.failure = error
        return value, gradient


def _numpyro_sampler(
    energy: _Energy, chains: int, draws: int, warm_up: int, target_acceptance: float, seed: int
) -> Any:
    """A function: starts (chains, D) -> draws (chains, draws, D), mean acceptance, divergences."""
    try:
        import jax
        from numpyro.infer import MCMC, NUTS
    except ImportError as error:
        raise ImportError(f"expected numpyro for NUTS, got: {error}; pip install 'counterflow[refine]'") from error

    def both(eps: Any) -> Any:
        shapes = (jax.ShapeDtypeStruct(eps.shape[:-1], eps.dtype), jax.ShapeDtypeStruct(eps.shape, eps.dtype))
        return jax.pure_callback(energy, shapes, eps, vmap_method="expand_dims")

    potential = jax.custom_vjp(lambda eps: both(eps)[0])
    potential.defvjp(both, lambda gradient, cotangent: (cotangent * gradient,))

    def sample(starts: Tensor) -> tuple[Tensor, float, int]:
        with jax.default_device(jax.devices("cpu")[0]):  # steps this small are not worth a way to another device
            nuts = NUTS(potential_fn=potential, target_accept_prob=target_acceptance)
            chain = MCMC(
                nuts,
                num_warmup=warm_up,
                num_samples=draws,
                num_chains=chains,
                chain_method="vectorized",
                progress_bar=False,
            )
            key, first = jax.random.PRNGKey(seed), jax.numpy.asarray(starts.cpu().numpy())
            chain.run(key, init_params=first, extra_fields=("accept_prob", "diverging"))
            extra = chain.get_extra_fields()
            eps = torch.tensor(np.asarray(chain.get_samples(group_by_chain=True)), dtype=torch.float64)
            return eps, float(extra["accept_prob"].mean()), int(extra["diverging"].sum())

    return sample
