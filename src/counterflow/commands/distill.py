"""Options of `counterflow distill`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from counterflow.commands.options import FLAT, RunFolder, optional
from counterflow.distill.config import DistillConfig


@dataclass(frozen=True)
class Distill:
    """Distil a trained flow into one that samples in one pass.

    The teacher is a flow that is solved for its samples, such as a MAF; the student is one such as an IAF. No data are
    needed. The run folder holds the student's weights, metrics.jsonl, plots/, report.html and summary.json, which
    reports how far the student is from its teacher: both KL divergences in nats, effective sample size and a two-sample
    test. Ctrl-C keeps the best weights so far.
    """

    run_folder: Annotated[Path | None, tyro.conf.Positional, optional("[RUN]")] = None
    """run folder of the teacher, or its .safetensors file; a flow without a context"""
    comparison_samples: int = 10_000
    """draws of teacher and student for the comparison at the end"""
    folder: Annotated[RunFolder, FLAT] = RunFolder()
    distill: Annotated[DistillConfig, FLAT] = DistillConfig()  # frozen

    def run(self) -> int:
        """Distil, compare and plot; return the exit code: 130 after Ctrl-C, 143 after SIGTERM."""
        from counterflow.commands.preflight import check_readable, check_run_folder
        from counterflow.commands.requirements import require_packages

        check_run_folder(self.folder)
        if self.run_folder is not None:
            check_readable(self.run_folder, "a run folder of counterflow density, or a .safetensors file")
        require_packages("matplotlib")
        from counterflow.commands.distill_run import run

        return run(self)
