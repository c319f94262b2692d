"""Options of `counterflow density`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from counterflow.commands.options import FLAT, RunFolder, TableFile, optional
from counterflow.density.config import DensityConfig
from counterflow.io.table_formats import STREAM, TABLE

BUNDLED = "breast-cancer"


@dataclass(frozen=True)
class Density:
    """Fit the density of the rows of a table.

    DATA is a .csv file (also .tsv, .csv.gz, .csv.zst; with or without a line of names), or a .parquet, .feather,
    .xlsx, .sqlite, .duckdb, .npy or .npz file. The dialect of a CSV file is found from its first lines and reported. By
    default DATA is the table of 569 breast tumours with 30 columns that scikit-learn ships. The seed sets rows apart
    for a test at the end, which compares the flow with scikit-learn's GaussianMixture, its number of components chosen
    by BIC.

        counterflow density table.csv --context country --out run
        counterflow score run more.csv --out scores.csv
        counterflow sample run -n 1000 --out samples.csv

    Columns of text are categories; the density is that of categories and numbers together.

    The run folder holds model.safetensors and density.json (for counterflow.FlowDensity.load), metrics.jsonl,
    summary.json and plots/, and categories.safetensors if there are categories.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[DATA]")] = BUNDLED
    """a table file, - for a table on standard input, or breast-cancer"""
    table: Annotated[TableFile, FLAT] = TableFile()
    context: Annotated[tuple[str, ...], optional("COLUMN [COLUMN ...]")] = ()
    """columns to condition on, numbers or categories"""
    drop: Annotated[tuple[str, ...], optional("COLUMN [COLUMN ...]")] = ()
    """columns to leave out"""
    drop_missing: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """leave out rows with a missing cell"""
    categories: Annotated[tuple[str, ...], optional("COLUMN [COLUMN ...]")] = ()
    """columns of numbers that are categories, such as codes of regions; columns of text always are"""
    ordinal: Annotated[tuple[str, ...], optional("COLUMN [COLUMN ...]")] = ()
    """columns of ordered grades, at most a few dozen numbers; by default found from the data"""
    bounds: Annotated[tuple[str, ...], optional("COLUMN=LOW:HIGH [..]")] = ()
    """bounds of columns, such as share=0:1 or income=0:; the density is zero outside"""
    circular: Annotated[tuple[str, ...], optional("COLUMN=PERIOD [..]")] = ()
    """periods of columns whose ends meet, such as hour=24 or angle=360; day, week or year for dates and times"""
    test: float = 0.2
    """fraction of the rows that is set apart for the test"""
    seed: int = 0
    """seed of the split, initial weights, batches and noise"""
    folder: Annotated[RunFolder, FLAT] = RunFolder()
    fit: Annotated[DensityConfig, FLAT] = DensityConfig()  # frozen

    def run(self) -> int:
        """Fit, test and plot; return the exit code: 130 after Ctrl-C, 143 after SIGTERM."""
        from counterflow.commands.preflight import check_readable, check_run_folder
        from counterflow.commands.requirements import require_packages, table_packages

        check_run_folder(self.folder)
        if self.data not in (BUNDLED, STREAM) and self.folder.resume is None:
            check_readable(Path(self.data), TABLE)
        require_packages("sklearn", "matplotlib", *table_packages(self.data))
        from counterflow.commands.density_run import run

        return run(self)
