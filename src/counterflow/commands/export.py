"""counterflow export: the one-pass direction of a trained model, for programs without Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from counterflow.commands import console
from counterflow.commands.model import trained
from counterflow.io.export import OUTPUTS, export, graph_of, largest_difference

TOLERANCE = 1e-5  # of a number, relative to 1 + the largest of its output


@dataclass(frozen=True)
class Export:
    """Write the one-pass direction of a flow, or a part of a VAE, to an ONNX file or an archive of torch.export.

    The file is then run on random input beside the model, ONNX by ONNX Runtime, and must give the same numbers.
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """run folder of any command, or a .safetensors file"""
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """the file to write, which must be new: .onnx, or .pt2 for torch.export.load"""
    direction: Literal["sample", "log_prob", "decode", "encode"] | None = None
    """of a flow sample or log_prob, the one that is one pass when not given; of a VAE decode (the default) or encode"""
    batch: int | None = None
    """rows at each call; any number when not given"""
    double: bool = False
    """keep float64, which ONNX Runtime knows in part; else the model is rounded to float32"""
    seed: int = 0
    """of the random input"""

    def run(self) -> int:
        """Write the file and compare; 1 where the numbers differ."""
        model, _ = trained(self.run_folder)
        console.new_file(self.path)
        model = model if self.double else model.float()
        graph = graph_of(model, self.direction)
        with console.err.status(f"exporting {graph.direction}"):
            path = export(model, self.path, self.direction, self.batch)
        inputs, outputs = ", ".join(graph.sizes), ", ".join(OUTPUTS[graph.direction])
        console.say(f"wrote {path}: {inputs} -> {outputs}, {path.stat().st_size:,} bytes")
        torch.manual_seed(self.seed)
        try:
            difference = largest_difference(model, path, self.direction, self.batch or 64)
        except ImportError as error:
            console.note(f"not compared: {error}")
            return 0
        except ValueError as error:
            console.note(f"not compared: {error}")
            return 1
        console.say(f"largest difference to the model on random input: {difference:.1e}, relative to the largest value")
        if not difference <= TOLERANCE:
            console.note(f"expected at most {TOLERANCE:g}; the file is kept, but is not the model")
            return 1
        return 0
