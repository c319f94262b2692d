"""Training: configuration, the loop, its history, checkpoints, and several processes."""

from counterflow.training.checkpoints import Checkpoint, Checkpoints
from counterflow.training.config import FitConfig
from counterflow.training.fit import fit
from counterflow.training.history import Epoch, History

__all__ = ["Checkpoint", "Checkpoints", "Epoch", "FitConfig", "History", "fit"]
