"""Time the gradient of a small flow's ELBO: the compiled chain against the same layers in torch operations.

    COUNTERFLOW_COMPILE=foreground python benchmarks/small_step.py

An IAF of 10 features, 4 layers of 32 x 32, 256 draws and a target in torch, on one thread. The sides take turns; the
time is the process's own CPU time. Written to results/small_step.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import counterflow as cf

RESULT = Path(__file__).parent / "results" / "small_step.md"
D, ROUNDS, STEPS = 10, 15, 20


def make_step(solver: str, path: bool) -> Callable[[], None]:
    """Return one step without an optimizer: draws, the loss and its gradient."""
    flow = cf.IAF(D, layers=4, hidden=(32, 32), seed=0)
    for layer in flow.modules():
        if isinstance(layer, cf.Autoregressive):
            layer.solver = solver
    parameters = list(flow.parameters())

    def log_p(z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(-1) - 0.1 * z[..., 0] ** 4

    def step() -> None:
        q = flow()
        z, log_q = q.rsample_and_path_log_prob(256) if path else q.rsample_and_log_prob(256)
        torch.autograd.grad((log_q - log_p(z)).mean(), parameters)

    return step


def main() -> None:
    """Measure all sides and write the table."""
    torch.set_num_threads(1)
    names = {(s, p): make_step(s, p) for s in ("auto", "sliced") for p in (True, False)}
    seconds: dict[tuple[str, bool], list[float]] = {name: [] for name in names}
    for k in range(ROUNDS + 1):
        for name, step in names.items():
            begun = time.process_time()
            for _ in range(STEPS):
                step()
            if k:
                seconds[name].append((time.process_time() - begun) / STEPS)
    lines = [
        "# Gradient of a small flow's ELBO",
        "",
        f"Made by `{(__doc__ or '').splitlines()[2].strip()}`; ms of CPU time.",
    ]
    lines += ["", "| | compiled, median (minimum) | torch, median (minimum) | ratio of medians |", "|---|---|---|---|"]
    for path, label in ((True, "path gradient"), (False, "reparameterised")):
        ours, other = seconds["auto", path], seconds["sliced", path]
        cells = [f"{1e3 * statistics.median(s):.2f} ({1e3 * min(s):.2f})" for s in (ours, other)]
        lines.append(f"| {label} | {' | '.join(cells)} | {statistics.median(ours) / statistics.median(other):.2f} |")
    lines += ["", "Shared two-core machine under load: read the ratios, and the times as upper bounds.", ""]
    RESULT.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
