"""Report of counterflow bench."""

from __future__ import annotations

from counterflow.commands.report.common import make_page
from counterflow.commands.report.page import Cell, Page, Section, Table, number
from counterflow.commands.report.run_data import Run


def key_numbers(run: Run) -> dict[str, Cell]:
    """Return the numbers by which two runs are compared."""
    summary = run.summary
    return {
        f"{aim['what']}, {aim['map']}, {aim['size']}": number(aim["value"], ".2f", "good" if aim["met"] else "bad")
        for aim in summary["aims"]
    }


def page(run: Run) -> Page:
    """Return the page of a run."""
    summary = run.summary
    met = sum(bool(aim["met"]) for aim in summary["aims"])
    verdict = f"{met} of {len(summary['aims'])} ratios keep to their goals."
    rows = [
        [
            Cell(aim["what"]),
            Cell(aim["map"]),
            Cell(aim["size"]),
            number(aim["value"], ".2f", "good" if aim["met"] else "bad"),
            Cell(f"{'at most' if aim['at_most'] else 'at least'} {aim['bound']:g}", order=aim["bound"]),
        ]
        for aim in summary["aims"]
    ]
    growth = [
        [Cell(name), number(sides["parallel"], ".2f"), number(sides["sequential"], ".2f")]
        for name, sides in summary["exponents"].items()
    ]
    pictures = [
        run.picture("time", "Time", "Both directions against the number of features D, on logarithmic axes."),
        run.picture("memory", "Memory", "Peak memory of both directions with gradients."),
    ]
    sections = [
        Section(
            "Ratios and their goals",
            "bench.md in the run folder holds every figure.",
            Table(("ratio", "map", "D/H/B", "measured", "goal"), rows),
        ),
        Section("Growth with D", "time = D^exponent", Table(("", "parallel", "sequential"), growth), pictures=pictures),
    ]
    warnings = [f"{name} was left out: {failure}" for name, failure in summary["failed"].items()]
    facts = {"threads": str(run.config["threads"])}
    return make_page(run, "Both directions of an autoregressive layer", verdict, None, warnings, facts, sections)
