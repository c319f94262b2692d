"""Write a module's graph to a file, and compare the file with the module."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from counterflow.flows.flow import Flow
from counterflow.io.atomic import atomic_write
from counterflow.io.export.formats import Run, Write, run_archive, run_onnx, write_archive, write_onnx
from counterflow.io.export.graphs import Direction, DynamicAxes, graph_of
from counterflow.vae.vae import VAE


class Format(NamedTuple):
    """Format of a file: how to write a graph to it, and how to run it."""

    write: Write
    run: Run


FORMATS = {".onnx": Format(write_onnx, run_onnx), ".pt2": Format(write_archive, run_archive)}
EXAMPLE_ROWS = 3  # of the input that a graph for any number of rows is recorded with


def export(module: Flow | VAE, path: str | Path, direction: Direction | None = None, batch: int | None = None) -> Path:
    """Export a flow or a VAE to a file that other runtimes read, atomically.

    The file holds one graph of plain tensor operations: masks are multiplied into the weights, triangular systems into
    products, and none of this library's code is needed to run it.

    | direction | module | inputs | outputs |
    |---|---|---|---|
    | "sample" | a flow | eps, context | z, log_q |
    | "log_prob" | a flow | x, context | log_prob, eps |
    | "decode" | a VAE | z | mean of p(x given z) |
    | "encode" | a VAE | x, eps | z, log_q: a draw from q(z given x) |

    A direction that is solved, such as sampling from a MAF, becomes one pass per feature.

    eps (B, D) are draws of N(0, I), or of a Student t base's own t distributions. context (B, C) is an input only if
    the flow takes one. log_q and log_prob (B,) are in nats. The metadata of the ONNX file, and counterflow.json in the
    archive, hold the version, the sizes and the direction.

    Args:
        module: its dtype and weights are those of the graph; it is not changed.
        path: ends in .onnx, or in .pt2 for `torch.export.load`.
        direction: default: the flow's one-pass direction, or "decode".
        batch: the number of rows B of every call; default: any number.

    Returns:
        The path.

    Raises:
        TypeError: the module is neither a flow nor a VAE.
        ValueError: another suffix, an unknown direction, or a solved one of more than 64 features.
        ImportError: onnx or onnxscript is not installed, for .onnx.

    Example:
        >>> import torch, counterflow as cf, tempfile, os
        >>> flow = cf.IAF(features=3, layers=2, hidden=(16,), seed=0)
        >>> path = cf.export(flow, os.path.join(tempfile.mkdtemp(), "flow.pt2"))
        >>> z, log_q = torch.export.load(path).module()(torch.zeros(5, 3))
        >>> z.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"expected a path that ends in {' or '.join(FORMATS)}, got {path}")
    graph = graph_of(module, direction)
    rows = EXAMPLE_ROWS if batch is None else batch
    if rows < 1:
        raise ValueError(f"expected batch to be at least 1, got {batch}")
    inputs = graph.example(rows)
    axes: DynamicAxes = None if batch is not None else {name: {0: torch.export.Dim("batch")} for name in inputs}
    with torch.no_grad():
        program = torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=axes, strict=False)
    with atomic_write(path, suffix=f".part{path.suffix}") as temporary:  # torch looks at the suffix
        FORMATS[path.suffix].write(program, graph, temporary, axes)
    return path


def largest_difference(
    module: Flow | VAE, path: str | Path, direction: Direction | None = None, rows: int = 64
) -> float:
    """Run an exported file and the module on random rows, and compare their outputs.

    The difference of outputs a and b is max |a - b| / (1 + max |b|); the largest one is returned. ONNX Runtime runs
    ONNX files on the CPU.

    Args:
        module: the exported flow or VAE.
        path: the file.
        direction: as in `export`.
        rows: the number of random rows.

    Raises:
        ImportError: onnxruntime is not installed, for .onnx.
        ValueError: ONNX Runtime lacks an operator in the module's dtype: in float64, those of splines and of some
            activations.
    """
    path = Path(path)
    graph = graph_of(module, direction, fold=False)
    inputs = graph.example(rows)
    with torch.no_grad():
        expected = graph(**inputs)
    pairs = zip(FORMATS[path.suffix].run(path, inputs), expected, strict=True)
    return max(((a - b).abs().max() / (1 + b.abs().max())).item() for a, b in pairs)
