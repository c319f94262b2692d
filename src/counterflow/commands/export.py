"""counterflow export: write the one-pass direction of a trained model, for programs without Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from counterflow.commands.options import optional

TOLERANCE = 1e-5  # of a number, relative to 1 + the largest of its output


@dataclass(frozen=True)
class Export:
    """Write a trained model to ONNX or to an archive of torch.export.

    The one-pass direction of a flow, or a part of a VAE, is written. The file is then run on random input beside the
    model, an ONNX file by ONNX Runtime, and the results are compared.
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """run folder of any command, or a .safetensors file"""
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """new file to write: .onnx, or .pt2 for torch.export.load"""
    direction: Annotated[
        Literal["sample", "log_prob", "decode", "encode"] | None, optional("{sample,log_prob,decode,encode}")
    ] = None
    """of a flow, sample or log_prob, by default the one that takes one pass; of a VAE, decode (default) or encode"""
    batch: Annotated[int | None, optional("INT")] = None
    """fixed number of rows per call; by default any number"""
    double: bool = False
    """keep float64, which ONNX Runtime supports in part; by default the model is rounded to float32"""
    seed: int = 0
    """seed of the random input"""

    def run(self) -> int:
        """Write the file and compare; return the exit code, 1 if the results differ."""
        from counterflow.commands.preflight import check_new_file, check_readable
        from counterflow.commands.requirements import require_packages

        check_readable(self.run_folder, "a run folder, or a .safetensors file")
        check_new_file(self.path)
        if self.path.suffix == ".onnx":
            require_packages("onnx", "onnxscript")
        import torch

        from counterflow.commands import console
        from counterflow.commands.progress import Progress
        from counterflow.commands.trained import load_trained
        from counterflow.io.export import OUTPUTS, export, graph_of, largest_difference

        model, _ = load_trained(self.run_folder)
        console.new_file(self.path)
        model = model if self.double else model.float()
        graph = graph_of(model, self.direction)
        with Progress(f"exporting {graph.direction}"):
            path = export(model, self.path, self.direction, self.batch)
        inputs, outputs = ", ".join(graph.sizes), ", ".join(OUTPUTS[graph.direction])
        console.say(f"wrote {path}: {inputs} -> {outputs}, {path.stat().st_size:,} bytes")
        torch.manual_seed(self.seed)
        try:
            with Progress("comparing with the model"):
                difference = largest_difference(model, path, self.direction, self.batch or 64)
        except ImportError as error:
            console.warn(f"not compared: {error}")
            return 0
        except ValueError as error:
            console.warn(f"not compared: {error}")
            return 1
        console.say(f"largest difference to the model on random input: {difference:.1e}, relative to the largest value")
        if not difference <= TOLERANCE:
            console.warn(
                f"expected a difference of at most {TOLERANCE:g}; the file is kept, but differs from the model"
            )
            return 1
        return 0
