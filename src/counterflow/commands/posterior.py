"""Options of `counterflow posterior`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from counterflow.commands.model_names import DEFAULT_MODEL, check_model
from counterflow.commands.model_tool import Tool
from counterflow.commands.options import FLAT, RunFolder, optional
from counterflow.posterior.config import PosteriorConfig, Refiner


@dataclass(frozen=True)
class Posterior:
    """Fit the posterior of a Bayesian model, and report whether it can be trusted.

    MODEL is FILE.py:NAME or FILE.stan; naming a FILE.py runs it, as Python would. NAME is a PyMC model, a
    counterflow.targets.Target or a function: a Pyro or NumPyro model, a function that returns a PyMC model or a target,
    or a log density in torch, theta (B, D) -> (B,), with an attribute dim or --dim. Without MODEL the eight schools
    example is fitted.

        counterflow posterior model.py:schools --data schools.json

    With --refine, refined.nc holds 4 chains of n / 4 draws, and summary.json their R-hat, effective sample sizes and
    divergences.

    With --calibrate R, R data sets are simulated from the model in place of a fit, and each is fitted, in --processes
    processes: the run folder then holds the ranks of the true parameters in their posteriors (plots/ranks.png,
    ranks.parquet) and, in summary.json, tests of their uniformity. --stages 2 and the like make each fit short.

    The run folder holds posterior.nc (for ArviZ), draws.parquet, summary.json, metrics.jsonl, plots/, report.html and
    the files of counterflow.Posterior.load. A bad verdict is also printed to stderr; the exit code is 0 all the same.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = DEFAULT_MODEL
    """FILE.py:NAME, FILE.stan, or eight-schools, which is bundled"""
    data: Annotated[Path | None, optional("FILE")] = None
    """JSON file with one object, whose entries are the arguments of the model by name; lists become arrays"""
    inits: Annotated[Path | None, optional("FILE")] = None
    """JSON file with values of variables by name at which to start as well, such as Stan's inits"""
    tool: Annotated[Tool | None, optional("{torch,pymc,pyro,numpyro}")] = None
    """tool that a function is written for; by default found from its code"""
    dim: Annotated[int | None, optional("INT")] = None
    """D, for a log density in torch without an attribute dim"""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 4000
    """number of draws in posterior.nc and draws.parquet"""
    refine: Annotated[Refiner | None, optional("{nuts,neutra,imh}")] = None
    """Markov chains through the flow after the fit: NUTS by nutpie or by NumPyro, or independence Metropolis"""
    calibrate: Annotated[int | None, optional("INT")] = None
    """number of data sets to simulate and fit, for simulation-based calibration of the whole procedure; 100 is usual"""
    processes: Annotated[int | None, optional("INT")] = None
    """processes of --calibrate; by default one for each core"""
    folder: Annotated[RunFolder, FLAT] = RunFolder()
    fit: Annotated[PosteriorConfig, FLAT] = PosteriorConfig()  # frozen

    def __post_init__(self) -> None:
        if self.calibrate is not None and self.calibrate < 2:
            raise ValueError(f"expected --calibrate to be at least 2 data sets, got {self.calibrate}; 100 is usual")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"expected --processes to be at least 1, got {self.processes}")
        if self.calibrate is None and self.processes is not None:
            raise ValueError("expected --processes only with --calibrate, got it without")
        if self.calibrate is not None and (self.refine or self.folder.resume or self.folder.tracker):
            raise ValueError("expected --calibrate without --refine, --resume and --tracker, got one of them")

    def run(self) -> int:
        """Fit, write and plot; return the exit code: 130 after Ctrl-C, 143 after SIGTERM."""
        from counterflow.commands.preflight import check_readable, check_run_folder
        from counterflow.commands.requirements import require_packages

        check_run_folder(self.folder)
        if self.model != DEFAULT_MODEL and self.folder.resume is None:
            check_model(self.model, self.data)
        if self.inits is not None:
            check_readable(self.inits, "a JSON file with starting values")
        from counterflow.diagnostics.arviz import NETCDF_MODULES, chains_modules

        sampler = {"nuts": ("nutpie",), "neutra": ("numpyro",)}.get(self.refine or "", ())
        chains = chains_modules() if self.refine else ()
        require_packages(*NETCDF_MODULES, "pyarrow", "matplotlib", *chains, *sampler)
        if self.calibrate is not None:
            from counterflow.commands.posterior_calibration import calibrate

            return calibrate(self, self.calibrate)
        from counterflow.commands.posterior_run import run

        return run(self)
