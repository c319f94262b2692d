"""Training: configuration, the loop (`counterflow.fit`), its history, checkpoints, and several processes."""

from typing import TYPE_CHECKING

from counterflow.lazy import on_first_use

if TYPE_CHECKING:
    from counterflow.training.checkpoints import Checkpoint as Checkpoint
    from counterflow.training.checkpoints import Checkpoints as Checkpoints
    from counterflow.training.config import FitConfig as FitConfig
    from counterflow.training.history import Epoch as Epoch
    from counterflow.training.history import History as History

_NAMES = {
    "Checkpoint": "counterflow.training.checkpoints:Checkpoint",
    "Checkpoints": "counterflow.training.checkpoints:Checkpoints",
    "Epoch": "counterflow.training.history:Epoch",
    "FitConfig": "counterflow.training.config:FitConfig",
    "History": "counterflow.training.history:History",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = on_first_use(__name__, _NAMES)
