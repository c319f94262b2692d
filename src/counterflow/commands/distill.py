"""counterflow distill: a student that samples in one pass, from a trained flow that does not."""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from counterflow import plots
from counterflow.commands import console, training
from counterflow.commands.model import trained
from counterflow.density.config import DESCRIPTION
from counterflow.diagnostics.agreement import Agreement, agreement
from counterflow.distill.config import EPOCH, DistillConfig
from counterflow.distill.distill import Distilled, distill_with_history
from counterflow.flows.flow import Flow
from counterflow.flows.mixture import FlowMixture
from counterflow.io.json import write_json
from counterflow.io.serialization import save
from counterflow.training.distributed import Workers
from counterflow.training.history import Epoch

OBJECTIVES = {"layers": "- loss of all layers, nats", "flow": "- KL, nats"}
SHOWN = 1000  # draws of each in the picture


@dataclass(frozen=True)
class Distill:
    """Distil a flow that is solved for its samples, such as a MAF, into one that samples in one pass, such as an IAF.

    Needs no data. Writes the student's weights to the run folder, with metrics.jsonl, summary.json (how far it is from
    its teacher: both KLs in nats, effective sample size, a two-sample test) and plots/. Ctrl-C keeps what is learnt.
    """

    run_folder: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None
    """run folder of the teacher, or its .safetensors file; a flow without a context"""
    samples: int = 10_000
    """of teacher and student, for the comparison at the end"""
    folder: training.Place = training.RunFolder()
    """where the run is written"""
    distill: Annotated[DistillConfig, tyro.conf.arg(name="train")] = DistillConfig()  # frozen
    """how to distil"""

    def run(self) -> int:
        """Distil, compare, draw; 130 after Ctrl-C, 143 after SIGTERM, with what is learnt so far."""
        command, run = training.opened(self, "distill")
        return command._run(run)

    def _run(self, run: Path | None) -> int:
        """A new run, or one to go on with."""
        if self.samples < 2:
            raise ValueError(f"expected samples to be at least 2, got {self.samples}")
        if self.run_folder is None:
            raise ValueError("expected the run folder of a teacher, or --resume with that of a distillation, got none")
        teacher, folder = trained(self.run_folder)
        if isinstance(teacher, FlowMixture):
            raise ValueError(f"expected one flow in {self.run_folder}, got a mixture; fit the density with --members 1")
        if not isinstance(teacher, Flow):
            raise ValueError(f"expected a flow in {self.run_folder}, got a {type(teacher).__name__}")
        if teacher.context:
            raise ValueError(
                f"expected a flow without a context, got one with context={teacher.context}; in Python: "
                "cf.distill(flow, contexts)"
            )
        run = training.begun(self, run, "distill")
        with training.under_way(run) as stop:
            made = self._train(teacher, run, stop)
            interrupted = any(record.stopped == "interrupted" for record in made.histories.values())
            if any(record.best is None for record in made.histories.values()):
                if interrupted:
                    raise KeyboardInterrupt
                console.note("training ended before its first epoch was over: no weights are kept")
                return 1
            if Workers.current().rank:  # the first process alone compares and draws
                return 0
            self._finish(teacher, folder, made, run)
        if interrupted:
            console.note(f"interrupted; go on with --resume {run}")
            return stop.code
        training.finish(run)
        return 0

    def _finish(self, teacher: Flow, folder: Path, made: Distilled, run: Path) -> None:
        """The student's weights, and how far it is from its teacher; the summary last of all."""
        save(made.student, run / "model.safetensors")
        if (folder / DESCRIPTION).is_file():  # of a table: the student scores and samples such tables as well
            shutil.copyfile(folder / DESCRIPTION, run / DESCRIPTION)
        torch.manual_seed(self.distill.seed)
        with console.err.status(f"comparing {self.samples} draws of each"):
            found = agreement(teacher, made.student, samples=self.samples)
        self._draw(run / "plots", teacher, made)
        write_json(run / "summary.json", self._summary(made, found))
        console.say(
            f"KL(student || teacher) {found.reverse:.3f} ± {found.reverse_error:.2g} nats, KL(teacher || student) "
            f"{found.forward_trimmed:.3f} without the largest hundredth of its terms; {self.samples:,} draws of the "
            f"student are worth {found.ess:,.0f} of the teacher; p-value of a difference "
            f"{found.p_value:.3g}"
        )
        console.say(f"run folder: {run}  (pictures in {run / 'plots'})")

    def _train(self, teacher: Flow, run: Path, stop: training.Stop) -> Distilled:
        columns = (TextColumn("[bold]{task.description:<9}"), BarColumn(bar_width=None))
        text = TextColumn("step {task.completed}/{task.total}  {task.fields[reached]} nats")
        with (
            Progress(*columns, text, TimeRemainingColumn(compact=True), console=console.err) as bar,
            training.metrics(run) as write,
        ):
            steps = {"layers": self.distill.layer_steps, "flow": self.distill.flow_steps}
            lines = {name: bar.add_task(name, total=total, reached="...", start=False) for name, total in steps.items()}

            def on_epoch(task: str, epoch: Epoch) -> None:
                write({"task": task, **dataclasses.asdict(epoch)})
                bar.start_task(lines[task])
                bar.update(lines[task], completed=epoch.epoch * EPOCH, reached=f"{-epoch.validation:.3f}")

            checkpoints = training.checkpoints(run, self.folder, write)
            on_step = stop.after_step(lambda *_: None)
            return distill_with_history(
                teacher, config=self.distill, on_epoch=on_epoch, on_step=on_step, checkpoints=checkpoints
            )

    def _summary(self, made: Distilled, found: Agreement) -> dict[str, Any]:
        return {
            "teacher": str(self.run_folder),
            **{name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(found).items()},
            "reverse_per_feature": found.reverse / made.student.features,
            "parameters": sum(p.numel() for p in made.student.parameters()),
            "seconds": {stage: round(record.seconds, 2) for stage, record in made.histories.items()},
            "stopped": {stage: record.stopped for stage, record in made.histories.items()},
        }

    def _draw(self, folder: Path, teacher: Flow, made: Distilled) -> None:
        for stage, record in made.histories.items():
            curve = ([e.train for e in record.epochs], [e.validation for e in record.epochs])
            plots.learning_curves(folder / f"learning_curve_{stage}.png", {stage: curve}, OBJECTIVES[stage])
        tables = {"teacher": teacher().sample((SHOWN,)).numpy(), "student": made.student().sample((SHOWN,)).numpy()}
        plots.pairs(folder / "samples.png", tables, "draws of teacher and student")
