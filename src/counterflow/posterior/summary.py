"""Table of the estimates of all variables of a posterior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from counterflow.diagnostics.estimates import weighted_estimates
from counterflow.notebook import html_table
from counterflow.posterior.targets.layout import element_names


class SummaryRow(NamedTuple):
    """Estimates for one element of a variable: see `counterflow.diagnostics.weighted_estimates`."""

    mean: float
    mcse_mean: float  # Monte Carlo standard error of the mean
    sd: float
    mcse_sd: float  # Monte Carlo standard error of the standard deviation
    low: float  # 5 % quantile
    high: float  # 95 % quantile
    ess: float  # number of exact draws that would estimate the mean equally well
    k_hat: float  # tail shape of the terms of the variance; above 0.7, a few draws decide the standard deviation


@dataclass(frozen=True)
class Summary:
    """Table of all variables, and the verdict. Printing it shows both."""

    rows: dict[str, SummaryRow]  # by element label, such as "theta[3]", in the model's order
    verdict: str

    def __str__(self) -> str:
        width = max(map(len, self.rows), default=0)
        columns = ("mean", "mcse", "sd", "mcse", "5%", "95%")
        lines = [f"{'':{width}} {' '.join(f'{name:>11}' for name in columns)} {'ess':>8} {'k-hat':>6}"]
        for name, row in self.rows.items():
            numbers = " ".join(f"{value:11.4g}" for value in row[:6])
            lines.append(f"{name:{width}} {numbers} {row.ess:8.0f} {row.k_hat:6.2f}")
        return "\n".join([*lines, self.verdict])

    def _repr_html_(self) -> str:
        """Return the table and the verdict, for notebooks."""
        rows = [
            (name, *(f"{value:.4g}" for value in row[:6]), f"{row.ess:,.0f}", f"{row.k_hat:.2f}")
            for name, row in self.rows.items()
        ]
        header = ("", "mean", "MCSE", "sd", "MCSE", "5%", "95%", "ESS", "k-hat")
        return html_table(header, rows, note=self.verdict)


def summary_rows(values: Mapping[str, Tensor], log_weights: Tensor) -> dict[str, SummaryRow]:
    """Summarise variables (S, *shape) under log weights (S,): one row per element."""
    rows: dict[str, SummaryRow] = {}
    for name, value in values.items():
        estimates = weighted_estimates(value.flatten(1) if value.dim() > 1 else value[:, None], log_weights)
        columns = (column.tolist() for column in estimates)
        labels = element_names(name, value.shape[1:])
        rows |= {label: SummaryRow(*row) for label, *row in zip(labels, *columns, strict=True)}
    return rows
