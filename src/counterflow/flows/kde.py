"""Kernels at the rows that a flow was trained on, as wide and of such a share as validates best."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from counterflow.checks import check_finite
from counterflow.flows.bases import PAIRS, KernelMixture, StandardNormal
from counterflow.flows.flow import Flow

WIDTHS = (0.03, 0.05, 0.08, 0.12, 0.17, 0.25, 0.35, 0.5, 0.7, 1.0)  # 1 is as wide as the base itself
SHARES = (0.001, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # the first leaves the flow as it is, in effect

Rows = Tensor | tuple[Tensor, Tensor]  # x (N, D), or (x, c)


@torch.no_grad()
def with_kernel_base(
    flow: Flow,
    train: Rows,
    validation: Rows,
    *,
    widths: Sequence[float] = WIDTHS,
    shares: Sequence[float] = SHARES,
    max_points: int = 20_000,
) -> Flow:
    """The trained flow with a `KernelMixture` for its base, whose points are the training rows seen through the flow.

        q(x) = |det dz/dx| ((1 - share) N(z; 0, I) + share / N sum_n N(z; z_n, width^2 I)),    z = f^-1(x)

    Of all pairs of a width and a share the one with the highest mean log q of the validation rows is taken. That finds
    rows that come twice or nearly so, and clusters too small for a network. The transform is the same object.

    The flow then holds its training rows, one for one: whoever has it can read them. Scoring takes N D more
    multiplications a row, and a conditional flow pools the rows of all contexts.

    Args:
        flow: one that starts from a standard normal, trained.
        train: rows x (N, D), or (x, c).
        validation: rows that were not trained on, alike.
        widths, shares: what is tried.
        max_points: number of training rows that become points, the first of them.

    Raises:
        ValueError: a flow with another base, no rows, or numbers that are not finite.

    Source: Hjort and Glad 1995, "Nonparametric density estimation with a parametric start", for the idea of the start.

    Example:
        >>> import torch, counterflow as cf
        >>> twice = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
        >>> flow = cf.Flow(cf.bases.StandardNormal(2), cf.Permute([1, 0]))
        >>> kept = cf.flows.with_kernel_base(flow, twice[:80], twice[80:])
        >>> bool(kept().log_prob(twice[80:]).mean() > 1 + flow().log_prob(twice[80:]).mean())
        True
    """
    if not isinstance(flow.base, StandardNormal):
        raise ValueError(f"expected a flow that starts from StandardNormal, got {flow.base!r}")
    points = _seen(flow, train, "the training rows")[:max_points]
    checked = _seen(flow, validation, "the validation rows")
    D = flow.features
    normal = flow.base().base_dist.log_prob(checked).sum(-1)
    near = _kernels(checked, points, widths)
    best, chosen = -math.inf, (widths[0], shares[0])
    for log_kernels, width in zip(near, widths, strict=True):
        for share in shares:
            reached = torch.logaddexp(math.log1p(-share) + normal, math.log(share) + log_kernels).mean().item()
            if reached > best:
                best, chosen = reached, (width, share)
    return Flow(KernelMixture(D, points, *chosen), flow.transform)


def _seen(flow: Flow, rows: Rows, what: str) -> Tensor:
    """Where the flow takes rows (N, D) to."""
    x, c = rows if isinstance(rows, tuple) else (rows, None)
    if not len(x):
        raise ValueError(f"expected at least one row in {what}, got none")
    z: Tensor = flow.transform.inverse(x, c)[0]
    check_finite(z, what)
    return z


def _kernels(rows: Tensor, points: Tensor, widths: Sequence[float]) -> Tensor:
    """log (1/N) sum_n N(row; point_n, width^2 I) for each width, (W, V)."""
    N, D = points.shape
    parts = []
    for some in rows.split(max(1, PAIRS // N)):
        squares = torch.cdist(some, points, compute_mode="donot_use_mm_for_euclid_dist").square()
        parts.append(torch.stack([torch.logsumexp(-squares / (2 * width**2), 1) for width in widths]))
    scale = torch.tensor([D * math.log(width) for width in widths], dtype=rows.dtype, device=rows.device)
    return torch.cat(parts, 1) - scale[:, None] - (math.log(N) + D / 2 * math.log(2 * math.pi))
