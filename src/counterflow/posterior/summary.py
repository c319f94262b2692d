"""Table of the estimates of all variables of a posterior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class SummaryRow(NamedTuple):
    """Estimates for one element of a variable."""

    mean: float
    sd: float
    low: float  # 5 % quantile
    high: float  # 95 % quantile
    ess: float  # number of exact draws that would estimate the mean equally well


@dataclass(frozen=True)
class Summary:
    """Table of all variables, and the verdict. Printing it shows both."""

    rows: dict[str, SummaryRow]  # by element label, such as "theta[3]", in the model's order
    verdict: str

    def __str__(self) -> str:
        width = max(map(len, self.rows), default=0)
        lines = [f"{'':{width}} {'mean':>12} {'sd':>12} {'5%':>12} {'95%':>12} {'ess':>8}"]
        for name, row in self.rows.items():
            numbers = " ".join(f"{value:12.5g}" for value in row[:4])
            lines.append(f"{name:{width}} {numbers} {row.ess:8.0f}")
        return "\n".join([*lines, self.verdict])


def summary_row(x: Tensor, weights: Tensor, ess: float) -> SummaryRow:
    """Summarise draws x (S,) under weights (S,) that sum to one."""
    mean = (weights * x).sum()
    sd = (weights * (x - mean).square()).sum().sqrt()
    order = x.argsort()
    levels = torch.tensor([0.05, 0.95], dtype=weights.dtype)
    places = torch.searchsorted(weights[order].cumsum(0), levels).clamp_max(len(x) - 1)
    low, high = x[order][places].tolist()
    return SummaryRow(mean.item(), sd.item(), low, high, ess)
