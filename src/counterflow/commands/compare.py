"""counterflow compare: test whether the distribution of a table has moved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from counterflow.commands.options import FLAT, TableFile


@dataclass(frozen=True)
class Compare:
    """Test whether the distribution of a table has moved, and report which columns have.

    A and B are two tables with the columns of a trained density.
    A classifier is trained to tell the rows of the tables apart; its AUC on held-out rows is 0.5 if nothing has moved.
    The columns are compared one by one by the test of Kolmogorov and Smirnov, with Holm's correction for their number.
    The mean log density of both tables under the density says which of them is more like the training rows.

        counterflow compare run january.csv june.csv
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """run folder of counterflow density, or one of its files"""
    first: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """a table with the trained columns, and those to condition on"""
    second: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """another one"""
    table: Annotated[TableFile, FLAT] = TableFile()
    seed: int = 0
    """seed of the folds of the classifier"""
    device: str = "cpu"
    """cpu or cuda"""

    def run(self) -> int:
        """Print the comparison; return the exit code, 0 also where the distribution has moved."""
        from counterflow.checks import check_device
        from counterflow.commands.preflight import check_readable
        from counterflow.commands.requirements import require_packages, table_packages
        from counterflow.io.table_formats import TABLE

        check_readable(self.run_folder, "a run folder of counterflow density")
        for path in (self.first, self.second):
            check_readable(path, TABLE)
        check_device(self.device)
        require_packages("sklearn", *table_packages(self.first, self.second))
        from counterflow.commands.compare_run import compare

        return compare(self)
