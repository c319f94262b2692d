"""Agreement of two flows with the same features and context."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from counterflow.diagnostics.importance import effective_sample_size
from counterflow.diagnostics.two_sample import energy_test
from counterflow.flows.contexts import Contexts, contexts_of, device_of, draw_contexts
from counterflow.flows.flow import Flow

CHUNK = 2048  # draws at once, which bounds the memory


@dataclass(frozen=True)
class Agreement:
    """Distance of a student from its teacher, in nats, with standard errors."""

    samples: int  # S, number of draws of each flow
    reverse: float  # KL(student || teacher)
    reverse_error: float  # its standard error
    forward: float  # KL(teacher || student); a few extreme draws of the teacher may dominate it
    forward_error: float  # its standard error
    forward_trimmed: float  # forward without the largest 1 % of its terms
    ess: float  # effective sample size of the student's S draws when weighted towards the teacher
    energy: float  # energy distance between draws of both; see `energy_test`
    p_value: float  # of that distance, if both flows had the same distribution


@torch.no_grad()
def agreement(
    teacher: Flow, student: Flow, contexts: Contexts | None = None, samples: int = 10_000, test_samples: int = 1000
) -> Agreement:
    """Compare two flows by their own draws and exact densities. Noise comes from torch's global generator.

    Args:
        teacher: the reference flow.
        student: a flow with the same features and context.
        contexts: as in `distill`, one per draw. The two-sample test then compares pairs (c, x).
        samples: number of draws of each flow for the KL divergences.
        test_samples: number of draws of each flow for the two-sample test, whose cost is quadratic in it.

    Raises:
        ValueError: contexts that `distill` would refuse; samples or test_samples below 2.

    Example:
        >>> import torch, counterflow as cf
        >>> _ = torch.manual_seed(0)
        >>> teacher = cf.MAF(features=3, layers=2, hidden=(16,), seed=0)
        >>> found = cf.diagnostics.agreement(teacher, teacher, samples=1000)
        >>> found.ess > 999, found.p_value > 0.01
        (True, True)
    """
    if min(samples, test_samples) < 2:
        raise ValueError(f"expected samples and test_samples to be at least 2, got {samples} and {test_samples}")
    draw = contexts_of(teacher, contexts)
    device = device_of(teacher)
    reverse_terms, forward_terms, student_draws, teacher_draws = [], [], [], []
    for first in range(0, samples, CHUNK):
        n = min(CHUNK, samples - first)
        c, shape = draw_contexts(draw, n, device)
        z, log_q = student(c).rsample_and_log_prob(shape)
        reverse_terms.append(log_q - teacher(c).log_prob(z))
        student_draws.append(z if c is None else torch.cat([c, z], 1))
        c, shape = draw_contexts(draw, n, device)
        x, log_p = teacher(c).rsample_and_log_prob(shape)
        forward_terms.append(log_p - student(c).log_prob(x))
        teacher_draws.append(x if c is None else torch.cat([c, x], 1))
    reverse = torch.cat(reverse_terms).double().nan_to_num(math.inf, math.inf)
    forward = torch.cat(forward_terms).double().nan_to_num(math.inf, math.inf)
    trimmed = forward.sort().values[: max(1, int(0.99 * samples))]
    test = energy_test(torch.cat(student_draws)[:test_samples], torch.cat(teacher_draws)[:test_samples])
    return Agreement(
        samples=samples,
        reverse=reverse.mean().item(),
        reverse_error=reverse.std().item() / samples**0.5,
        forward=forward.mean().item(),
        forward_error=forward.std().item() / samples**0.5,
        forward_trimmed=trimmed.mean().item(),
        ess=effective_sample_size(-reverse).item(),
        energy=test.distance,
        p_value=test.p_value,
    )
