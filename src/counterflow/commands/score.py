"""counterflow score: score data under a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from counterflow.commands.options import FLAT, TableFile, optional
from counterflow.io.table_formats import STREAM


@dataclass(frozen=True)
class Score:
    """Score data under a trained model, in nats.

    For a run of counterflow density, a column log_density is added to the table, in a file of the same format; the
    table is read in batches, so that it may be larger than memory. Columns are matched by name, in any order, and other
    columns are copied. For a run of counterflow vae, the ELBO and the log-likelihood of each row go to a CSV file.

    If --out has no suffix, it is a folder of parts: part-00000.parquet and so on. Parts that exist are not scored
    again, so that the same command completes an interrupted one. Under torchrun the processes share the parts. A
    Parquet table is then read by row groups, and the noise of a VAE depends on the seed and the part.
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """run folder of counterflow density or vae, or one of its .safetensors files"""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """table, - for standard input, folder of Parquet files, or any --data of counterflow vae; all rows are scored"""
    table: Annotated[TableFile, FLAT] = TableFile()
    levels: Annotated[int | None, optional("INT")] = None
    """VAE only: number of levels, if an array holds integers 0..levels-1 (256 for 8-bit images)"""
    samples: int = 500
    """VAE only: draws of z per row"""
    seed: int = 0
    """VAE only: seed of the draws and of the binarisation"""
    device: str = "cpu"
    """cpu, cuda or mps"""
    out: Annotated[Path | None, optional("FILE")] = None
    """new file, - for standard output, or folder of parts; by default scores.csv (or the table's format) in the run
    folder"""

    def run(self) -> int:
        """Write the scores; return the exit code."""
        from counterflow.checks import check_device
        from counterflow.commands.preflight import check_new_file_or_parts, check_readable
        from counterflow.commands.requirements import require_packages, table_packages
        from counterflow.commands.trained import kind_of_run

        check_readable(self.run_folder, "a run folder of counterflow density or vae")
        if self.data not in ("digits", STREAM):
            check_readable(Path(self.data).expanduser(), "a table or other data to score")
        check_new_file_or_parts(self.out)
        check_device(self.device)
        if kind_of_run(self.run_folder) == "density":
            require_packages("sklearn", *table_packages(self.data))
            from counterflow.commands.density_output import score_table

            return score_table(self.run_folder, self.data, self.table.options(), self.device, self.out)
        from counterflow.commands.vae_output import score_by_vae

        return score_by_vae(self)
