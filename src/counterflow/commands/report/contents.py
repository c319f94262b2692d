"""Reports by command: the page of a run, and the numbers by which runs are compared."""

from __future__ import annotations

from types import ModuleType

from counterflow.commands.report import bench, density, distill, posterior, vae
from counterflow.commands.report.page import Cell, Page
from counterflow.commands.report.run_data import Run

REPORTS: dict[str, ModuleType] = {
    "vae": vae,
    "posterior": posterior,
    "density": density,
    "distill": distill,
    "bench": bench,
}


def page_of(run: Run) -> Page:
    """Return the page of a run.

    Raises:
        ValueError: its files are not those of a run of this version.
    """
    try:
        page: Page = REPORTS[run.command].page(run)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected the files of a run of counterflow {run.command} in {run.folder}, got: {error!r:.200}; the run "
            "may be of another version"
        ) from None
    return page


def key_numbers(run: Run) -> dict[str, Cell]:
    """Return the numbers by which runs of one command are compared."""
    numbers: dict[str, Cell] = REPORTS[run.command].key_numbers(run)
    return numbers
