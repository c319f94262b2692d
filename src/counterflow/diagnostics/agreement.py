"""Agreement of two flows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from counterflow.diagnostics.importance import effective_sample_size
from counterflow.diagnostics.two_sample import energy_test
from counterflow.flows.contexts import Contexts, contexts_of, device_of, draw_contexts
from counterflow.flows.flow import Flow


@dataclass(frozen=True)
class Agreement:
    """How far a student is from its teacher; in nats, with standard errors."""

    samples: int  # S, draws of each flow
    reverse: float  # KL(student || teacher)
    reverse_error: float
    forward: float  # KL(teacher || student); a few exploding draws of the teacher may decide it
    forward_error: float
    forward_trimmed: float  # the same without the largest hundredth of its terms
    ess: float  # effective sample size of the student's S draws, weighted to follow the teacher; at most S
    energy: float  # distance between draws of both; see `energy_test`
    p_value: float  # of that distance if both had one distribution


@torch.no_grad()
def agreement(
    teacher: Flow, student: Flow, contexts: Contexts | None = None, samples: int = 10_000, tested: int = 1000
) -> Agreement:
    """Compare both flows by their own draws and exact densities; noise comes from torch's global generator.

    Args:
        teacher, student: of the same features and context.
        contexts: as `distill` takes them; one for each draw. The two-sample test is then one of (c, x).
        samples: S, draws of each flow, for the KLs.
        tested: of each flow, for the two-sample test, whose cost grows with their square.

    Raises:
        ValueError: as `distill` does for contexts; fewer than two samples.

    Example:
        >>> import torch, counterflow as cf
        >>> _ = torch.manual_seed(0)
        >>> teacher = cf.MAF(features=3, layers=2, hidden=(16,), seed=0)
        >>> found = cf.diagnostics.agreement(teacher, teacher, samples=1000)
        >>> found.ess > 999, found.p_value > 0.01
        (True, True)
    """
    if min(samples, tested) < 2:
        raise ValueError(f"expected samples and tested to be at least 2, got {samples} and {tested}")
    draw, device = contexts_of(teacher, contexts), device_of(teacher)
    reverse, forward, ours, theirs = [], [], [], []
    for n in [2048] * (samples // 2048) + [samples % 2048] * (samples % 2048 > 0):
        c, shape = draw_contexts(draw, n, device)
        z, log_q = student(c).rsample_and_log_prob(shape)
        reverse.append(log_q - teacher(c).log_prob(z))
        ours.append(z if c is None else torch.cat([c, z], 1))
        c, shape = draw_contexts(draw, n, device)
        x, log_p = teacher(c).rsample_and_log_prob(shape)
        forward.append(log_p - student(c).log_prob(x))
        theirs.append(x if c is None else torch.cat([c, x], 1))
    back, ahead = (torch.cat(each).double().nan_to_num(math.inf, math.inf) for each in (reverse, forward))
    kept = ahead.sort().values[: max(1, int(0.99 * len(ahead)))]
    test = energy_test(torch.cat(ours)[:tested], torch.cat(theirs)[:tested])
    return Agreement(
        samples=samples,
        reverse=back.mean().item(),
        reverse_error=back.std().item() / samples**0.5,
        forward=ahead.mean().item(),
        forward_error=ahead.std().item() / samples**0.5,
        forward_trimmed=kept.mean().item(),
        ess=effective_sample_size(-back).item(),
        energy=test.distance,
        p_value=test.p_value,
    )
