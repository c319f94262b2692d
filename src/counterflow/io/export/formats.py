"""Writers and runners of exported graphs, for torch.export archives and ONNX."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from counterflow.checks import require
from counterflow.io.export.graphs import OUTPUTS, DynamicAxes, Graph

Write = Callable[[torch.export.ExportedProgram, Graph, Path, DynamicAxes], None]
Run = Callable[[Path, dict[str, Tensor]], tuple[Tensor, ...]]


def write_archive(program: torch.export.ExportedProgram, graph: Graph, path: Path, axes: DynamicAxes) -> None:
    """Write an archive that `torch.export.load` reads."""
    torch.export.save(program, path, extra_files={"counterflow.json": json.dumps(graph.metadata())})


def run_archive(path: Path, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Run an archive."""
    outputs: tuple[Tensor, ...] = torch.export.load(path).module()(*inputs.values())
    return outputs


def write_onnx(program: torch.export.ExportedProgram, graph: Graph, path: Path, axes: DynamicAxes) -> None:
    """Write an ONNX file.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: ONNX lacks an operator.
    """
    for package in ("onnx", "onnxscript"):
        require(package, "export", "ONNX files")
    try:
        with _without_notes():
            written = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                input_names=list(graph.sizes),
                output_names=OUTPUTS[graph.direction],
                dynamic_shapes=axes,  # for the name of the axis
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"expected operators that ONNX has, got: {cause}; export to .pt2, which has all") from error
    if written is None:
        raise RuntimeError("expected an ONNX program from torch.onnx.export, got None")
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()  # the lines of source code, with paths on this machine: half of a small file
    written.model.metadata_props.update(graph.metadata())
    written.save(path)


def run_onnx(path: Path, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Run an ONNX file by ONNX Runtime, on the CPU.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: ONNX Runtime lacks an operator in this dtype.
    """
    runtime = require("onnxruntime", "export", "ONNX files")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except runtime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise ValueError(
            f"expected operators that ONNX Runtime knows in this dtype, got {error}; export a flow in float32"
        ) from error
    outputs = session.run(None, {name: value.cpu().numpy() for name, value in inputs.items()})
    return tuple(torch.from_numpy(value) for value in outputs)


@contextmanager
def _without_notes() -> Iterator[None]:
    """Silence torch's ONNX exporter about packages that are not used here, and about its own internals."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = registration.level
    registration.setLevel(logging.ERROR)  # it warns of each torchvision operator where torchvision is not installed
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", ".*The axis name: .* will not be used", UserWarning)  # both axes are one
            yield
    finally:
        registration.setLevel(before)
