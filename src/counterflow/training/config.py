"""Configuration of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from counterflow.checks import check_device


@dataclass(frozen=True)
class FitConfig:
    """How to train."""

    epochs: int = 100  # passes over the training rows
    batch_size: int = 128  # rows a step; those left over wait for the next epoch's order
    optimizer: Literal["adam", "adamax", "adamw"] = "adamax"  # adamax is the calmest with flows (Kingma et al. 2016)
    learning_rate: float = 2e-3  # at its highest, after the warm-up steps
    weight_decay: float = 0.0  # decoupled for adamw, an L2 penalty for the others
    schedule: Literal["cosine", "constant"] = "cosine"  # cosine ends at a hundredth of the learning rate
    warm_up_steps: int = 100  # until the learning rate is reached: Adam's first moments are noise
    clip_norm: float = 50.0  # bound of the whole gradient's norm; high, so that only outliers are cut
    ema: float = 0.999  # decay of the averaged weights, which are the ones evaluated and kept; 0 turns it off
    patience: int = 0  # epochs without a better validation objective before stopping; 0 never stops
    max_skipped: int = 20  # non-finite steps in a row that end the run
    seed: int = 0  # of splits, initial weights, the order of rows and all noise
    device: str = "cpu"  # cpu, cuda or mps
    precision: Literal["float32", "bf16"] = "float32"  # bf16 is autocast; substitution keeps to float32

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("weight_decay", "warm_up_steps", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} of at least 0, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} above 0, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"expected ema in [0, 1), got {self.ema}")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"expected {name} as one of {', '.join(known)}, got {getattr(self, name)!r}")
        check_device(self.device)


OPTIMIZERS = ("adam", "adamax", "adamw")
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("float32", "bf16")
