"""One run of `counterflow distill`: train the student, compare it with its teacher."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from counterflow import plots
from counterflow.commands import console
from counterflow.commands.distill import Distill
from counterflow.commands.progress import Progress
from counterflow.commands.report.write import write_report
from counterflow.commands.run_folder import checkpoints, mark_done, metrics, resolve_run, running
from counterflow.commands.signals import Stop
from counterflow.commands.trained import load_trained
from counterflow.density.config import DESCRIPTION
from counterflow.diagnostics.agreement import Agreement, agreement
from counterflow.distill.distill import Distilled, distill_with_history
from counterflow.flows.flow import Flow
from counterflow.flows.mixture import FlowMixture
from counterflow.io.json import write_json
from counterflow.io.serialization import save
from counterflow.training.distributed import Workers
from counterflow.training.history import Epoch
from counterflow.training.tracking import Tracker

OBJECTIVES = {"layers": "- loss of all layers, nats", "flow": "- KL, nats"}
SHOWN = 1000  # draws of each flow in the plot


def run(command: Distill) -> int:
    """Distil, compare and plot; return the exit code: 130 after Ctrl-C, 143 after SIGTERM."""
    options, resumed = resolve_run(command, "distill")
    if options.comparison_samples < 2:
        raise ValueError(f"expected --comparison-samples to be at least 2, got {options.comparison_samples}")
    if options.run_folder is None:
        raise ValueError("expected the run folder of a teacher, or --resume with that of a distillation, got none")
    teacher, teacher_folder = load_trained(options.run_folder)
    _check_teacher(teacher, options.run_folder)
    with running(options, resumed, "distill") as (folder, stop, tracker):
        made = _train(options, teacher, folder, stop, tracker)
        interrupted = any(history.stopped == "interrupted" for history in made.histories.values())
        if any(history.best is None for history in made.histories.values()):
            if interrupted:
                raise KeyboardInterrupt
            console.warn("training ended before its first epoch: no weights are kept")
            return 1
        if Workers.current().rank:  # rank 0 compares and plots
            return 0
        save(made.student, folder / "model.safetensors")
        if (teacher_folder / DESCRIPTION).is_file():  # of a table: the student scores and samples such tables as well
            shutil.copyfile(teacher_folder / DESCRIPTION, folder / DESCRIPTION)
        torch.manual_seed(options.distill.seed)
        with stop.at_once(handled=interrupted), Progress(f"comparing {options.comparison_samples:,} draws of each"):
            found = agreement(teacher, made.student, samples=options.comparison_samples)
            _plot(folder / "plots", teacher, made)
        write_json(folder / "summary.json", _summary(options, made, found))  # last, as it marks the run as complete
        write_report(folder)
        if not interrupted:
            mark_done(folder)
        _print(options, found, folder, interrupted)
    return stop.code if interrupted else 0


def _check_teacher(teacher: Any, run_folder: Path) -> None:
    if isinstance(teacher, FlowMixture):
        raise ValueError(f"expected a single flow in {run_folder}, got a mixture; fit the density with --members 1")
    if not isinstance(teacher, Flow):
        raise ValueError(f"expected a flow in {run_folder}, got a {type(teacher).__name__}")
    if teacher.context:
        raise ValueError(
            f"expected a flow without a context, got one with context={teacher.context}; in Python: "
            "cf.distill(flow, contexts)"
        )


def _train(options: Distill, teacher: Flow, folder: Path, stop: Stop, tracker: Tracker | None) -> Distilled:
    facts = ""
    steps = {"layers": options.distill.layer_steps, "flow": options.distill.flow_steps}
    total = sum(steps.values())
    tasks: list[str] = []

    with Progress("first step", "steps") as progress, metrics(folder) as write:

        def on_step(task: str, done: int, _: int) -> None:
            done += steps["layers"] if task == "flow" else 0
            if not tasks:
                progress.start_at(done - 1)
            if task not in tasks:
                tasks.append(task)
            progress.update(done, total, task, facts)

        def on_epoch(task: str, epoch: Epoch) -> None:
            nonlocal facts
            write({"task": task, **dataclasses.asdict(epoch)})
            facts = f"{OBJECTIVES[task].removeprefix('- ')} {-epoch.validation:.3f}"
            if tasks == [task] and epoch.epoch == 1:
                progress.announce(f"{total:,} steps")

        return distill_with_history(
            teacher,
            config=options.distill,
            on_epoch=on_epoch,
            on_step=stop.after_step(on_step),
            checkpoints=checkpoints(folder, options.folder, tracker, write),
            tracker=tracker,
        )


def _summary(options: Distill, made: Distilled, found: Agreement) -> dict[str, Any]:
    return {
        "teacher": str(options.run_folder),
        **{name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(found).items()},
        "reverse_per_feature": found.reverse / made.student.features,
        "parameters": sum(p.numel() for p in made.student.parameters()),
        "seconds": {task: round(history.seconds, 2) for task, history in made.histories.items()},
        "stopped": {task: history.stopped for task, history in made.histories.items()},
    }


def _plot(folder: Path, teacher: Flow, made: Distilled) -> None:
    for task, history in made.histories.items():
        curve = ([epoch.train for epoch in history.epochs], [epoch.validation for epoch in history.epochs])
        plots.learning_curves(folder / f"learning_curve_{task}.png", {task: curve}, OBJECTIVES[task])
    tables = {"teacher": teacher().sample((SHOWN,)).numpy(), "student": made.student().sample((SHOWN,)).numpy()}
    plots.pairs(folder / "samples.png", tables, "draws of teacher and student")


def _print(options: Distill, found: Agreement, folder: Path, interrupted: bool) -> None:
    console.say(
        f"KL(student || teacher) {found.reverse:.3f} ± {found.reverse_error:.2g} nats; KL(teacher || student) "
        f"{found.forward_trimmed:.3f} nats without the largest 1 % of its terms; {options.comparison_samples:,} draws "
        f"of the student are worth {found.ess:,.0f} of the teacher; p-value of a difference {found.p_value:.3g}"
    )
    if interrupted:
        console.warn(f"interrupted; these are the best weights so far; continue with --resume {folder}")
    console.say(f"run folder: {folder}  (plots in {folder / 'plots'})")
