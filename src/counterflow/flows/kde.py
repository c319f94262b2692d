"""Kernel density estimate in the base space of a trained flow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from counterflow.checks import check_finite
from counterflow.flows.bases import MAX_PAIRS, KernelMixture, StandardNormal
from counterflow.flows.flow import Flow

WIDTHS = (0.03, 0.05, 0.08, 0.12, 0.17, 0.25, 0.35, 0.5, 0.7, 1.0)  # candidate widths; 1 is as wide as the base
SHARES = (0.001, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # candidate shares; 0.001 hardly changes the flow

Rows = Tensor | tuple[Tensor, Tensor]  # x (N, D), or (x, c) with contexts c (N, C)


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
    """Replace the base of a trained flow by a `KernelMixture` at the base-space images of its training rows.

        q(x) = |det dz/dx| ((1 - share) N(z; 0, I) + share / N sum_n N(z; z_n, width^2 I)),    z = f^-1(x)

    The width and the share are the pair with the highest mean log q of the validation rows. This helps with rows that
    occur nearly twice, and with clusters too small for a network. A conditional flow pools the rows of all contexts.

    The new flow contains its training rows: anybody who has the flow can read them. Scoring takes N D more
    multiplications per row. The transform is shared with the old flow.

    Args:
        flow: a trained flow whose base is a `StandardNormal`.
        train: training rows x (N, D), or (x, c) with contexts c (N, C).
        validation: rows that the flow was not trained on, in the same form.
        widths: candidates for the width.
        shares: candidates for the share.
        max_points: only the first max_points training rows are used.

    Returns:
        A new flow.

    Raises:
        ValueError: a flow with another base, no rows, or numbers that are not finite.

    Source: Hjort and Glad 1995, "Nonparametric density estimation with a parametric start".

    Example:
        >>> import torch, counterflow as cf
        >>> twice = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
        >>> flow = cf.Flow(cf.bases.StandardNormal(2), cf.Permute([1, 0]))
        >>> kept = cf.flows.with_kernel_base(flow, twice[:80], twice[80:])
        >>> bool(kept().log_prob(twice[80:]).mean() > 1 + flow().log_prob(twice[80:]).mean())
        True
    """
    if not isinstance(flow.base, StandardNormal):
        raise ValueError(f"expected a flow with a StandardNormal base, got {flow.base!r}")
    points = _to_base(flow, train, "the training rows")[:max_points]
    held_out = _to_base(flow, validation, "the validation rows")
    normal = flow.base().base_dist.log_prob(held_out).sum(-1)
    best = -math.inf
    chosen = (widths[0], shares[0])
    for kernels, width in zip(_log_kernels(held_out, points, widths), widths, strict=True):
        for share in shares:
            log_q = torch.logaddexp(math.log1p(-share) + normal, math.log(share) + kernels).mean().item()
            if log_q > best:
                best = log_q
                chosen = (width, share)
    return Flow(KernelMixture(flow.features, points, *chosen), flow.transform)


def _to_base(flow: Flow, rows: Rows, what: str) -> Tensor:
    """Return the base-space images of rows, (N, D)."""
    x, c = rows if isinstance(rows, tuple) else (rows, None)
    if not len(x):
        raise ValueError(f"expected at least one row in {what}, got none")
    z: Tensor = flow.transform.inverse(x, c)[0]
    check_finite(z, what)
    return z


def _log_kernels(rows: Tensor, points: Tensor, widths: Sequence[float]) -> Tensor:
    """Return log (1/N) sum_n N(row; point_n, width^2 I) for each of W widths and V rows, (W, V)."""
    N, D = points.shape
    parts = []
    for block in rows.split(max(1, MAX_PAIRS // N)):
        squares = torch.cdist(block, points, compute_mode="donot_use_mm_for_euclid_dist").square()
        parts.append(torch.stack([torch.logsumexp(-squares / (2 * width**2), 1) for width in widths]))
    scale = torch.tensor([D * math.log(width) for width in widths], dtype=rows.dtype, device=rows.device)
    return torch.cat(parts, 1) - scale[:, None] - (math.log(N) + D / 2 * math.log(2 * math.pi))
