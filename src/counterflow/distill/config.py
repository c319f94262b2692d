"""Configuration of a distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from counterflow.training.config import FitConfig

EPOCH = 50  # steps between two evaluations


@dataclass(frozen=True)
class DistillConfig:
    """Configuration of a distillation. The defaults are meant for every teacher."""

    layer_steps: int = 2000  # a step costs a quarter to half of one of the whole flow
    """steps that train the student layer by layer; 0 skips them"""
    flow_steps: int = 2000  # near its end already, so no more than before
    """steps that train the student as one flow; 0 skips them"""
    samples: int = 256  # enough for a quiet gradient, and one matrix product's worth
    """S, draws in each step"""
    forward_kl_weight: float = 0.0  # the reverse KL alone has no noise where the student is exact
    """weight of KL(teacher || student), which makes the student cover all of the teacher"""
    hidden: tuple[int, ...] = ()  # the teacher's sizes allow its hidden weights to be copied
    """hidden sizes of each student layer; empty copies the teacher's sizes and hidden weights"""
    learning_rate: float = 2e-3  # of Adam, falling to a hundredth
    """learning rate of the layer steps; the flow steps take half of it"""
    clip_norm: float = 5.0  # where the teacher's scale is tiny, a single draw may outweigh all others
    """bound on the norm of the gradient"""
    ema: float = 0.998  # an average over about 500 steps
    """decay of the averaged weights, which are the ones kept"""
    seed: int = 0
    """seed of the initial weights and of all noise"""
    device: str = "cpu"
    """cpu, cuda or mps"""

    def __post_init__(self) -> None:
        for name in ("layer_steps", "flow_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"expected {name} to be at least 0, got {getattr(self, name)}")
        if self.samples < 2:
            raise ValueError(f"expected samples to be at least 2, got {self.samples}")
        if not (math.isfinite(self.forward_kl_weight) and self.forward_kl_weight >= 0):
            raise ValueError(f"expected forward_kl_weight to be at least 0, got {self.forward_kl_weight}")
        self.fit_config(1, 1.0)  # checks the other fields

    def fit_config(self, steps: int, rate: float) -> FitConfig:
        """Return the training configuration for a number of steps, at rate times the learning rate."""
        return FitConfig(
            epochs=math.ceil(steps / EPOCH),
            batch_size=self.samples,
            optimizer="adam",
            learning_rate=rate * self.learning_rate,
            warm_up_steps=min(100, steps // 10),
            clip_norm=self.clip_norm,
            ema=self.ema,
            seed=self.seed,
            device=self.device,
        )
