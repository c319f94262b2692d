"""Size and time of both directions of a flow in ONNX Runtime: the one-pass graph beside the solved one.

    python benchmarks/onnx_directions.py

One thread; a time is the median of 20 runs. Writes benchmarks/results/onnx_directions.md.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import counterflow as cf

FEATURES, HIDDEN, LAYERS, ROWS = 32, 128, 1, 256


def median_ms(path: Path, inputs: dict[str, np.ndarray]) -> float:
    """Return the median time of a run, in ms."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, inputs)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        session.run(None, inputs)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    flow = cf.MAF(FEATURES, layers=LAYERS, hidden=(HIDDEN,) * 2, seed=0)
    x = np.random.default_rng(0).normal(size=(ROWS, FEATURES)).astype(np.float32)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for direction, name in (("log_prob", "x"), ("sample", "eps")):
            path = Path(folder) / f"{direction}.onnx"
            start = time.perf_counter()
            cf.export(flow, path, direction=direction)
            exported = time.perf_counter() - start
            size = sum(file.stat().st_size for file in Path(folder).glob(f"{direction}.onnx*")) / 1e6
            cost = "one pass" if direction == "log_prob" else f"{FEATURES} passes"
            rows.append(f"| {direction} | {cost} | {size:.2f} | {median_ms(path, {name: x}):.1f} | {exported:.0f} |")
            print(rows[-1], flush=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime"))
    text = (
        "# Both directions in ONNX\n\n"
        f"Made by `python benchmarks/onnx_directions.py` ({platform.machine()}, one thread, Python "
        f"{platform.python_version()}, {packages}).\n\n"
        f"MAF with D = {FEATURES}, layers: {LAYERS}, of two hidden layers of {HIDDEN}, {ROWS} rows, ONNX Runtime. The "
        "solved direction has one pass for each feature.\n\n"
        "| direction | graph | file, MB | run, ms | export, s |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    (Path(__file__).parent / "results" / "onnx_directions.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
