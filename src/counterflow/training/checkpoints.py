"""Checkpoints of a training in safetensors files, from which the same call resumes bit for bit; no pickle."""

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
from counterflow.training.history import Epoch, History, Stopped

NUMBERS = "numbers"  # name of the uint8 tensor that holds the JSON of Checkpoint.numbers
KEPT = 2  # files kept per training: if the newest cannot be read, the one before it is used


@dataclass(frozen=True)
class Checkpoint:
    """The complete state of a training between two steps."""

    tensors: dict[str, Tensor]
    """weights, averaged and best weights, the optimizer's moments, random generators, order of the rows"""
    numbers: dict[str, Any]
    """position, sums, history and configuration, as JSON can hold them"""

    @property
    def steps(self) -> int:
        """The number of steps that are done."""
        return int(self.numbers["steps"])

    @property
    def history(self) -> History:
        """The finished epochs. An interruption is not part of it: the training is about to resume."""
        values = self.numbers["history"]
        stopped: Stopped = "patience" if values["stopped"] == "patience" else "finished"
        return History([Epoch(**epoch) for epoch in values["epochs"]], stopped, values["seconds"])


@dataclass(frozen=True)
class Checkpoints:
    """A folder of checkpoints. The same call with the same checkpoints resumes the training.

    Each checkpoint is written to a temporary file, synced and renamed, so that a complete one always exists; the last
    two are kept. If torch.distributed has a process group, rank 0 writes, and reads for all processes.

    Args:
        folder: created when the first checkpoint is written; remove it to start again.
        every: seconds between two checkpoints; one more is written after an interruption and at the end.
        on_resume: called as on_resume(task, checkpoint) when a training resumes from a checkpoint.

    Example:
        >>> import counterflow as cf, tempfile, torch
        >>> x, checkpoints = torch.randn(200, 2), cf.Checkpoints(tempfile.mkdtemp())
        >>> def train():
        ...     flow = cf.MAF(2, layers=1, hidden=(8,), seed=0)
        ...     config = cf.FitConfig(epochs=2, batch_size=50)
        ...     return cf.fit(flow, cf.log_likelihood, x, x, config, checkpoints=checkpoints)
        >>> history = train()
        >>> checkpoints.load().steps
        8
        >>> train().epochs == history.epochs  # resumes at the end, where nothing is left to do
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
        """Return the newest checkpoint that can be read, or None."""
        content = Workers.current().broadcast_bytes(self._newest())
        if not content:
            return None
        tensors = safetensors.torch.load(content)
        return Checkpoint(tensors, _pop_numbers(tensors))

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and remove all but the last two."""
        if Workers.current().rank:
            return
        text = json.dumps(checkpoint.numbers).encode()
        text = text.ljust(1 << len(text).bit_length())  # safetensors leaks some 10 KB for every new length
        tensors = contiguous_copies(checkpoint.tensors)
        tensors[NUMBERS] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        write_bytes(self.folder / f"{checkpoint.steps:012d}.safetensors", safetensors.torch.save(tensors))
        for old in [*self._files()[KEPT:], *self.folder.glob("*.part")]:  # .part: left by a killed process
            old.unlink()

    def _newest(self) -> bytes:
        """Return the content of the newest file that can be read; empty if there is none, and on other ranks."""
        for path in [] if Workers.current().rank else self._files():
            content = path.read_bytes()
            try:
                _pop_numbers(safetensors.torch.load(content))
                return content
            except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:  # incl. RecursionError
                warnings.warn(
                    f"cannot read {path} ({error}); using the checkpoint before it", RuntimeWarning, stacklevel=3
                )
        return b""

    def _files(self) -> list[Path]:
        """Return the checkpoint files, newest first."""
        return sorted(self.folder.glob("*.safetensors"), reverse=True)


def _pop_numbers(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Remove the tensor that holds the JSON and return what it says."""
    numbers: dict[str, Any] = json.loads(tensors.pop(NUMBERS).numpy().tobytes())
    if from_json(numbers["steps"], int, "steps") < 0:
        raise ValueError(f"expected steps to be at least 0, got {numbers['steps']}")
    return numbers
