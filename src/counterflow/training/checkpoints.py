"""Checkpoints of trainings in files: a killed training resumes from the last one, bit for bit. Never pickle."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from counterflow.io.atomic import write_bytes
from counterflow.io.json import from_json
from counterflow.io.tensors import contiguous_copies
from counterflow.training.distributed import Workers

NUMBERS = "numbers"  # the tensor that holds the JSON
KEPT = 2  # of a training; where the newest does not read, the one before does


@dataclass(frozen=True)
class Checkpoint:
    """All that a training needs to go on from between two steps as if it had never stopped, bit by bit."""

    tensors: dict[str, Tensor]  # weights, averaged and best weights, the optimizer's moments, generators, order of rows
    numbers: dict[str, Any]  # position, sums, epochs: what JSON can hold

    @property
    def steps(self) -> int:
        """The steps that are done."""
        return int(self.numbers["steps"])


@dataclass(frozen=True)
class Checkpoints:
    """Where the checkpoints of a training are kept: give it to the same call again, and the training goes on.

    A state is written to a temporary file, synced and renamed, so that there is always a whole one; the last two are
    kept. Several trainings of one name each have a folder within it. Where torch.distributed has a process group, the
    first process writes, and reads for all.

    Args:
        folder: made when there is something to write; remove it to begin anew.
        every: seconds between two checkpoints; one more is written at the end and on an interruption.
        on_resume: called as on_resume(task, checkpoint) when a training resumes from a checkpoint.

    Example:
        >>> import counterflow as cf, tempfile, torch
        >>> x, checkpoints = torch.randn(200, 2), cf.Checkpoints(tempfile.mkdtemp())
        >>> def train():
        ...     flow = cf.MAF(2, layers=1, hidden=(8,), seed=0)
        ...     config = cf.FitConfig(epochs=2, batch_size=50)
        ...     return cf.fit(flow, cf.log_likelihood, x, x, config, checkpoints=checkpoints)
        >>> record = train()
        >>> checkpoints.load().steps
        8
        >>> train().epochs == record.epochs  # nothing was left to do
        True
    """

    folder: Path
    every: float = 60.0
    on_resume: Callable[[str, Checkpoint], None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    def for_task(self, task: str) -> Checkpoints:
        """Return the checkpoints of one of several trainings, kept in a subfolder named after the task."""
        return Checkpoints(self.folder / task.replace(" ", "-"), self.every, self.on_resume)

    def load(self) -> Checkpoint | None:
        """The newest one that reads; None where there is none."""
        content = Workers.here().broadcast(self._newest())
        if not content:
            return None
        tensors = safetensors.torch.load(content)
        return Checkpoint(tensors, _numbers(tensors))

    def save(self, state: Checkpoint) -> None:
        """Write one, and remove all but the last two."""
        if Workers.here().rank:
            return
        text = json.dumps(state.numbers).encode()
        text = text.ljust(1 << len(text).bit_length())  # safetensors keeps some 10 KB for every new length
        tensors = {**contiguous_copies(state.tensors), NUMBERS: torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        write_bytes(self.folder / f"{state.steps:012d}.safetensors", safetensors.torch.save(tensors))
        for old in [*self._files()[KEPT:], *self.folder.glob("*.part")]:  # and what a killed process left half-written
            old.unlink()

    def _newest(self) -> bytes:
        """What the newest file that reads holds; nothing where there is none, or another process reads."""
        for path in [] if Workers.here().rank else self._files():
            content = path.read_bytes()
            try:
                _numbers(safetensors.torch.load(content))
                return content
            except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:  # too deep is one as well
                warnings.warn(
                    f"{path} does not read ({error}); taking the state before it", RuntimeWarning, stacklevel=3
                )
        return b""

    def _files(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob("*.safetensors"), reverse=True)


def _numbers(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The JSON among the tensors, which is taken out of them."""
    numbers: dict[str, Any] = json.loads(tensors.pop(NUMBERS).numpy().tobytes())
    if from_json(numbers["steps"], int, "steps") < 0:
        raise ValueError(f"expected steps of at least 0, got {numbers['steps']}")
    return numbers
