"""Options of `counterflow report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from counterflow.commands.options import optional

REPORT = "report.html"  # in a run folder
COMPARISON = Path("comparison.html")


@dataclass(frozen=True)
class Report:
    """Write the report of a run again, or compare several runs.

    A report is one HTML file that holds its pictures and needs no network: the result in words, tables, pictures,
    options and versions. Every run folder has one, report.html, written at the end of the run. Several runs of one
    command are compared side by side.

        counterflow report run --open
        counterflow report run1 run2 --out comparison.html
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """run folders; several are compared"""
    out: Annotated[Path | None, optional("FILE")] = None
    """file to write; by default report.html in the run folder, or a new comparison.html for several runs"""
    open: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """open the report in the browser"""

    def run(self) -> int:
        """Write the report; return the exit code."""
        from counterflow.commands.preflight import check_can_create, check_new_file, check_readable
        from counterflow.commands.requirements import require_packages

        if not self.runs:
            raise ValueError("expected at least one run folder, got none")
        for run in self.runs:
            check_readable(run, "a run folder")
        compares = len(self.runs) > 1
        out = self.out or (COMPARISON if compares else self.runs[0] / REPORT)
        if self.out is not None or compares:
            check_new_file(out)
        else:
            check_can_create(out)
        require_packages("jinja2")
        from counterflow.commands import console
        from counterflow.commands.report.write import write_comparison, write_report

        path = write_comparison(self.runs, out) if compares else write_report(self.runs[0], out)
        console.say(f"wrote {path}")
        if self.open:
            import webbrowser

            if not webbrowser.open(path.resolve().as_uri()):
                console.warn(f"expected a browser to open {path}, found none; open the file yourself")
        return 0
