"""counterflow sample: draw from a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from counterflow.commands.options import optional


@dataclass(frozen=True)
class Sample:
    """Draw from a trained model.

    Of a run of counterflow density: rows of the table, in the types of its columns, written to a .csv, .parquet,
    .feather, .npy or .npz file; with --context, n rows for each row of a table of the columns to condition on. Of a run
    of counterflow vae: draws of z from the prior and of x from p(x|z), written to an .npy file, with a plot of images.

    If --out has no suffix, it is a folder of parts: part-00000.parquet and so on, or .npy for a VAE, without a plot. A
    part depends only on the seed and its number. Parts that exist are not drawn again, so that the same command
    completes an interrupted one. Under torchrun the processes share the parts.
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """run folder of counterflow density or vae, or one of its .safetensors files"""
    n: Annotated[int | None, tyro.conf.arg(aliases=["-n"], metavar="INT", help_behavior_hint="")] = None
    """number of draws; by default 64, or 1 for each row of --context"""
    context: Annotated[Path | None, optional("FILE")] = None
    """density only: table of the columns to condition on, any table that counterflow density reads"""
    mean: bool = False
    """VAE only: write the mean of p(x|z) in place of a draw from it"""
    seed: int = 0
    """seed of the draws"""
    out: Annotated[Path | None, optional("FILE")] = None
    """new file, - for standard output, or folder of parts; by default samples.npy (VAE) or samples.csv in the run
    folder"""
    device: str = "cpu"
    """cpu, cuda or mps; a density needs float64, which mps does not have"""

    def run(self) -> int:
        """Write the samples; return the exit code."""
        default = 1 if self.context else 64
        n = default if self.n is None else self.n
        if n < 1:
            raise ValueError(f"expected -n to be at least 1, got {n}")
        from counterflow.checks import check_device
        from counterflow.commands.preflight import check_new_file_or_parts, check_readable
        from counterflow.commands.requirements import require_packages
        from counterflow.commands.trained import kind_of_run

        check_readable(self.run_folder, "a run folder of counterflow density or vae")
        if self.context is not None:
            check_readable(self.context, "a table of the columns to condition on")
        check_new_file_or_parts(self.out)
        check_device(self.device)
        if kind_of_run(self.run_folder) == "density":
            require_packages("sklearn", "pyarrow")
            from counterflow.commands.density_output import sample_table

            return sample_table(self.run_folder, n, self.context, self.seed, self.device, self.out)
        if self.context is not None:
            raise ValueError(f"expected no --context for a VAE, got {self.context}; leave it out")
        from counterflow.commands.vae_output import sample_from_vae

        return sample_from_vae(self.run_folder, n, self.mean, self.seed, self.device, self.out)
