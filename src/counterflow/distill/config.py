"""Configuration of a distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from counterflow.training.config import FitConfig

EPOCH = 50  # steps between two evaluations


@dataclass(frozen=True)
class DistillConfig:
    """How to distil. The defaults are meant for any teacher."""

    start: int = 2000  # steps layer by layer, each a quarter to half the price of one of the whole; 0 for none
    steps: int = 2000  # of the whole student
    draws: int = 256  # a step
    forward: float = 0.0  # weight of KL(teacher || student), which presses the student to cover all of the teacher
    hidden: tuple[int, ...] = ()  # sizes of each student layer; empty takes the teacher's, and its hidden weights too
    learning_rate: float = 2e-3  # of the start; half of it for the whole, which is near its end by then
    clip_norm: float = 5.0  # bound of the gradient: where the teacher's scale is tiny, one draw may outweigh all
    ema: float = 0.998  # decay of the averaged weights
    seed: int = 0  # of initial weights and all noise
    device: str = "cpu"  # cpu, cuda or mps

    def __post_init__(self) -> None:
        for name in ("start", "steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"expected {name} of at least 0, got {getattr(self, name)}")
        if self.draws < 2:
            raise ValueError(f"expected draws of at least 2, got {self.draws}")
        if not (math.isfinite(self.forward) and self.forward >= 0):
            raise ValueError(f"expected forward, a weight, of at least 0, got {self.forward}")
        self.fit(1, 1.0)  # the rest is checked there

    def fit(self, steps: int, rate: float) -> FitConfig:
        """How a stage of so many steps is trained."""
        return FitConfig(
            epochs=math.ceil(steps / EPOCH),
            batch_size=self.draws,
            optimizer="adam",
            learning_rate=rate * self.learning_rate,
            warm_up_steps=min(100, steps // 10),
            clip_norm=self.clip_norm,
            ema=self.ema,
            seed=self.seed,
            device=self.device,
        )
