"""Verdict on an approximation q of a density p, from the importance weights of draws of q.

Weights cannot detect a part of p in which no draw fell: a k-hat of 0.1 says that q is right where it draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterflow.diagnostics.estimates import unreliable_features
from counterflow.diagnostics.importance import (
    K_HAT_CLOSE,
    K_HAT_USABLE,
    SmoothedWeights,
    effective_sample_size,
    k_hat_threshold,
    psis,
)

MAX_MISSED_MASS = 0.02  # share of the posterior mass that was found which a trusted approximation may leave out


@dataclass(frozen=True)
class Verdict:
    """Quality of an approximation q of p, with the numbers that it rests on. `sentence` says it in words."""

    samples: int  # S, number of draws that were weighted
    k_hat: float  # shape of the weights' tail
    ess: float  # effective sample size of the smoothed weights
    elbo: float  # mean log weight, nats
    elbo_error: float  # its standard error
    iw_elbo: float  # log of the mean weight, nats; tends to log Z from below as S grows
    missed: float = 0.0  # share of the posterior mass, found by a search for modes, where q has next to no density
    unreliable: tuple[str, ...] = ()  # features whose standard deviation a few draws in a heavy tail decide

    @property
    def threshold(self) -> float:
        """Largest k-hat that S draws allow: see `k_hat_threshold`."""
        return k_hat_threshold(self.samples)

    @property
    def usable_weights(self) -> bool:
        """True if weighted draws follow p: a good k-hat, and no known mode left out."""
        return self.k_hat < self.threshold and self.missed < MAX_MISSED_MASS

    @property
    def trusted(self) -> bool:
        """True if weighted draws follow p and their means and standard deviations are reliable."""
        return self.usable_weights and not self.unreliable

    @property
    def samples_needed(self) -> float:
        """Number of draws that a k-hat like this one requires: 10^(1 / (1 - k-hat)).

        Source: Vehtari et al. 2024, "Pareto smoothed importance sampling", section 3.2.3.
        """
        return 10 ** (1 / (1 - max(self.k_hat, 0))) if self.k_hat < 1 else math.inf

    @property
    def sentence(self) -> str:
        """The verdict in plain words, with the numbers that it rests on.

        Example:
            >>> print(Verdict(4000, 0.21, 3105.2, -12.34, 0.011, -12.21).sentence)
            The approximation is close to the posterior: k-hat 0.21 is below 0.5, 4,000 draws are worth 3,105 exact \
ones, and the ELBO is -12.34 ± 0.011 nats.
        """
        if self.missed >= MAX_MISSED_MASS:
            return (
                f"The approximation cannot be trusted: {100 * self.missed:.0f} % of the posterior mass that was found "
                "lies where it has next to none, as with separate modes or a funnel that it does not reach; look at "
                f"the model for a symmetry or a better parameterisation (k-hat {self.k_hat:.2f} describes only the "
                "part that is covered)."
            )
        if self.usable_weights and self.unreliable:
            return (
                f"The standard deviation of {listed(self.unreliable)} cannot be trusted: a few draws in a heavy tail "
                f"decide it. The weighted draws are good (k-hat {self.k_hat:.2f} is below {self.threshold:.2f}), so "
                "report medians and intervals, or choose a prior with lighter tails."
            )
        if self.elbo == -math.inf:
            elbo = "minus infinity, because some draws lie where the density is zero"
        else:
            elbo = f"{self.elbo:.2f} ± {self.elbo_error:.2g} nats"
        return f"{self._judgement_of_weights()}, and the ELBO is {elbo}."

    def _judgement_of_weights(self) -> str:
        worth = f"{self.samples:,} draws are worth {self.ess:,.0f} exact ones"
        if self.usable_weights and self.k_hat < K_HAT_CLOSE:
            return (
                f"The approximation is close to the posterior: k-hat {self.k_hat:.2f} is below {K_HAT_CLOSE}, {worth}"
            )
        if self.usable_weights:
            return (
                f"The approximation is useful, with its importance weights: k-hat {self.k_hat:.2f} lies between "
                f"{K_HAT_CLOSE} and {self.threshold:.2f}, {worth}"
            )
        if self.k_hat < K_HAT_USABLE:
            return (
                f"{self.samples:,} draws are too few to judge: k-hat {self.k_hat:.2f} requires "
                f"{math.ceil(self.samples_needed):,} or more; draw again"
            )
        reason = f"above {self.threshold:.2f}" if self.k_hat < 1 else "above 1, where weights have no mean"
        return (
            f"The approximation cannot be trusted: k-hat {self.k_hat:.2f} is {reason}; train for longer, take a larger "
            "flow, or refine the draws by MCMC"
        )


def listed(names: Sequence[str], max_count: int = 6) -> str:
    """Join names by commas, at most max_count of them.

    Example:
        >>> listed(["mu", "tau"]), listed(["mu", "tau", "z[0]", "z[1]"], 2)
        ('mu, tau', 'mu, tau and 2 more')
    """
    more = f" and {len(names) - max_count} more" if len(names) > max_count else ""
    return ", ".join(names[:max_count]) + more


def diagnose(
    log_weights: Tensor,
    draws: Tensor | None = None,
    names: Sequence[str] | None = None,
    *,
    smoothed: SmoothedWeights | None = None,
) -> Verdict:
    """Judge q by the log weights of its draws, and the estimates for each feature of the draws if they are given.

    Args:
        log_weights: log p - log q of S draws of q, (S,), nats.
        draws: the draws, or what is reported of them, (S, D).
        names: names of the D features; by default "[0]", "[1]", ...
        smoothed: `psis` of the log weights, if it was computed before.

    Raises:
        ValueError: as `psis` does; draws that are not (S, D).

    Source: Vehtari et al. 2024, "Pareto smoothed importance sampling", and Yao et al. 2018, "Yes, but did it work?:
    Evaluating variational inference", for the thresholds.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> z = 1.1 * torch.randn(1000, 2)                                     # q is a little wider than p = N(0, I)
        >>> log_weights = -z.square().sum(-1) / 2 + (z / 1.1).square().sum(-1) / 2
        >>> diagnose(log_weights, z).trusted
        True
    """
    smoothed = psis(log_weights) if smoothed is None else smoothed
    raw = log_weights.detach().double()
    error = raw.std().item() / len(raw) ** 0.5
    unreliable = [] if draws is None else unreliable_features(draws, smoothed.log_weights)
    return Verdict(
        samples=len(raw),
        k_hat=smoothed.k_hat,
        ess=effective_sample_size(smoothed.log_weights).item(),
        elbo=raw.mean().item(),
        elbo_error=error if math.isfinite(error) else math.inf,
        iw_elbo=torch.logsumexp(raw, 0).item() - math.log(len(raw)),
        unreliable=tuple(f"[{i}]" if names is None else names[i] for i in unreliable),
    )
