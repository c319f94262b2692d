"""Configuration of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from counterflow.checks import check_device, one_of

TrackerName = Literal["tensorboard", "wandb", "mlflow"]  # of counterflow.interop.trackers


@dataclass(frozen=True)
class FitConfig:
    """Configuration of a training."""

    epochs: int = 100  # the cosine schedule ends there
    """passes over the training rows"""
    batch_size: int = 128  # small enough for many steps per epoch, large enough to fill a core
    """rows per step; rows that do not fill a batch wait for the order of the next epoch"""
    optimizer: Literal["adam", "adamax", "adamw"] = "adamax"  # the most stable with flows (Kingma et al. 2016)
    """adam, adamax or adamw"""
    learning_rate: float = 2e-3  # the default of Adamax in Kingma and Ba 2015
    """learning rate after the warm-up steps"""
    weight_decay: float = 0.0  # the weights that validate best are kept, which regularizes already
    """weight decay, decoupled for adamw, an L2 penalty otherwise"""
    schedule: Literal["cosine", "constant"] = "cosine"  # small last steps take the noise out of the weights
    """cosine, which falls to a hundredth of the learning rate, or constant"""
    warm_up_steps: int = 100  # the first moments of Adam are mostly noise
    """steps over which the learning rate rises linearly"""
    clip_norm: float = 50.0  # high, so that only outliers are clipped
    """bound on the norm of the gradient of all weights"""
    ema: float = 0.999  # an average over about 1,000 steps
    """decay of the averaged weights, which are evaluated and kept; 0 turns averaging off"""
    patience: int = 0  # with a cosine schedule the last epochs are mostly the best
    """epochs without a better validation objective that end the training; 0 never does"""
    max_skipped: int = 20  # a few outliers are harmless, a longer row is not
    """non-finite steps in a row that end the training"""
    seed: int = 0
    """seed of splits, initial weights, the order of the rows and all noise"""
    device: str = "cpu"
    """cpu, cuda or mps"""
    precision: Literal["float32", "bf16"] = "float32"  # bf16 autocast; substitution stays in float32
    """float32 or bf16"""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1, got {getattr(self, name)}")
        for name in ("weight_decay", "warm_up_steps", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} to be at least 0, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} to be above 0, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"expected ema to be in [0, 1), got {self.ema}")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            one_of(getattr(self, name), name, known)
        check_device(self.device)


OPTIMIZERS = ("adam", "adamax", "adamw")
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("float32", "bf16")
