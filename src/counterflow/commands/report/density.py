"""Report of counterflow density."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from counterflow.commands.progress import duration
from counterflow.commands.report.common import make_page
from counterflow.commands.report.page import Card, Cell, Page, Section, Table, number
from counterflow.commands.report.run_data import Run

CLEAR = 2.0  # standard errors that make a difference clear


def key_numbers(run: Run) -> dict[str, Cell]:
    """Return the numbers by which two runs are compared."""
    summary = run.summary
    return {
        "log density of test rows, nats": number(summary["test_log_density"], ".3f"),
        "standard error": number(summary["standard_error"], ".3f"),
        "gain over a Gaussian mixture, nats": number(summary.get("difference", {}).get("log_density"), "+.3f"),
        "parameters": number(summary["parameters"], ",.0f"),
        "training, s": number(summary["seconds"], ",.1f"),
    }


def page(run: Run) -> Page:
    """Return the page of a run."""
    summary = run.summary
    rows = summary["rows"]
    error = summary["standard_error"]
    plus_minus = "" if error is None else f" ± {error:.3f}"
    reached = summary["test_log_density"]  # None for minus infinity
    verdict = f"The density is 0 at some of {rows['test']:,} held-out rows, so their mean log density is -inf."
    if reached is not None:
        verdict = f"The mean log density of {rows['test']:,} held-out rows is {reached:.3f}{plus_minus} nats."
    good = None
    models = [[Cell("flow"), number(reached, ".3f"), number(error, ".3f")]]
    if "gaussian_mixture" in summary:
        mixture = summary["gaussian_mixture"]
        gain, gain_error = (summary["difference"][name] for name in ("log_density", "standard_error"))
        name = f"Gaussian mixture, {mixture['components']} by BIC"
        models.append(
            [Cell(name), number(mixture["test_log_density"], ".3f"), number(mixture["standard_error"], ".3f")]
        )
        if gain is not None:
            clear = gain_error is not None and abs(gain) > CLEAR * gain_error
            good = gain > 0 if clear else None
            judged = ("more than a" if gain > 0 else "less than a") if clear else "about as much as a"
            shown = f" ({gain:+.3f}{'' if gain_error is None else f' ± {gain_error:.3f}'} nats per row)"
            verdict += f" That is {judged} Gaussian mixture chosen by BIC gives them{shown}."
    warnings = []
    if summary["holds_rows"]:
        warnings.append("The model holds its training rows, as kernels. Fit with --no-kernels before you give it away.")
    warnings.append("This page shows rows of the table: give it only to people who may see them.")
    facts = {
        "rows": f"{rows['train and validation']:,} to train and validate, {rows['test']:,} to test",
        "columns": str(len(summary["columns"])),
        "given": ", ".join(summary["context"]),
        "parameters": f"{summary['parameters']:,}",
        "epochs": ", ".join(map(str, summary["epochs"])),
        "training": duration(summary["seconds"]),
    }
    header = ("model", "log density, nats per row", "standard error")
    cards = [_column_card(card) for card in summary.get("column_cards", [])]
    more = len(summary["columns"]) - len(cards)
    sections = [
        Section("Held-out rows", table=Table(header, models, "Higher is better.")),
        Section(
            "Columns",
            "Grey bars: held-out rows. Line: as many draws of the flow."
            + (f" {more} further columns are not shown." if cards and more else ""),
            cards=cards,
        ),
        Section(
            "Unusual rows",
            "The held-out rows with the lowest log density, and the cells that make them so: a usual value in the "
            "place of the cell would raise the log density by as many nats. Rows count from 0 over the rows that were "
            "read. counterflow score gives the log density of every row of a table.",
            table=_unusual_table(summary.get("unusual_rows", [])),
        ),
        Section(
            "Is the density right?",
            pictures=[
                run.picture(
                    "pairs",
                    "Rows and samples",
                    "Held-out rows and draws of the flow, column by column and in pairs. Both should look alike.",
                ),
                run.picture(
                    "calibration",
                    "Calibration",
                    "Held-out rows mapped to the flow's noise. A flat histogram is right; a hump in the middle means "
                    "that the flow is too wide there, a valley that it is too narrow.",
                ),
                run.picture(
                    "scores",
                    "Log densities",
                    "Log densities of held-out rows and of samples. Held-out rows far to the left of all samples are "
                    "unlike anything that the flow would draw.",
                ),
                run.picture(
                    "learning_curve",
                    "Training",
                    "Training and validation log density. A validation curve that falls while the other rises is "
                    "overfitting; the best weights are kept.",
                ),
            ],
        ),
    ]
    return make_page(run, summary["data"], verdict, good, warnings, facts, sections)


def _column_card(card: Mapping[str, Any]) -> Card:
    if "most" in card:
        facts = {name: f"{100 * share:.3g} %" for name, share in card["most"].items()}
    else:
        facts = {name: f"{card[name]:.4g}" for name in ("min", "5%", "median", "95%", "max")}
    return Card(
        card["column"], card["kind"], {"distinct": f"{card['distinct']:,}", **facts}, card["data"], card["samples"]
    )


def _unusual_table(rows: list[Any]) -> Table:
    lines = []
    for row in rows:
        cells = [
            f"{cell['column']} = {_value(cell['value'])} ({_gain(cell['gain'])} at {_value(cell['usual'])})"
            for cell in row["cells"]
        ]
        given = "; ".join(f"{name} = {value}" for name, value in row["given"].items())
        described = "; ".join(cells) or "no single cell"
        line = [Cell(str(row["row"]), order=row["row"]), number(row["log_density"], ".2f"), Cell(described)]
        lines.append([*line, Cell(given)] if row["given"] else line)
    has_context = any(row["given"] for row in rows)
    return Table(("row", "log density", "unusual cells", *(("given",) if has_context else ())), lines)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def _gain(nats: float | None) -> str:
    return "inside of the support" if nats is None else f"{nats:+.1f} nats"
