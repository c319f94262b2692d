"""Configuration of a table density and of its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from counterflow.checks import one_of
from counterflow.training.config import FitConfig

RecipeName = Literal["nsf", "maf", "coupling", "iaf"]

MODEL = "model.safetensors"  # the files of a saved density
DESCRIPTION = "density.json"
CATEGORIES = "categories.safetensors"  # of a density with categories


@dataclass(frozen=True)
class DensityConfig:
    """Configuration of a table density. The defaults were chosen on the first two splits of benchmarks/uci.py."""

    flow: RecipeName = "nsf"  # splines fit marginals that no affine map fits
    layers: int = 3  # autoregressive layers; the order of the columns is reversed between them
    hidden: tuple[int, ...] = (64, 64)  # hidden sizes of each layer's network; more overfits a few thousand rows
    bins: int = 8  # bins of a spline, as in Durkan et al. 2019
    constant: Literal["drop", "error"] = "drop"  # leave out constant columns and copies with a warning, or refuse them
    missing: Literal["error", "model"] = "error"  # refuse missing cells, or model all subsets of the columns
    members: int = 3  # flows averaged, each with its own seed and validation rows; gains 0.1 to 1.3 nats per row
    kernels: bool = True  # allow kernels at the training rows if they gain 0.1 nats; the model then holds these rows
    epochs: int = 60  # at most; the cosine schedule ends there, and patience ends most trainings before
    batch_size: int = 256  # at most; small tables use a twentieth of their rows, so that an epoch has enough steps
    learning_rate: float = 1e-2  # of Adam; 2e-3 ends with a lower log density on every small table
    weight_decay: float = 1e-3  # L2 penalty
    ema: float = 0.99  # decay of the averaged weights, which are kept; an epoch has only 20 to 30 steps
    patience: int = 10  # epochs without a better validation log density before stopping
    validation_fraction: float = 0.1  # share of the rows that a member validates on
    cell_points: int = 16  # points in the cell of a recorded number over which the density is averaged
    device: str = "cpu"  # cpu or cuda; mps has no float64, which the column maps need

    def __post_init__(self) -> None:
        for name in ("layers", "members", "epochs", "batch_size", "cell_points"):
            value = getattr(self, name)
            if isinstance(value, bool) or value != int(value) or value < 1:
                raise ValueError(f"expected {name} to be a whole number of at least 1, got {value!r}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"expected validation_fraction in (0, 1), got {self.validation_fraction}")
        one_of(self.constant, "constant", ("drop", "error"))
        one_of(self.missing, "missing", ("error", "model"))
        if self.device.startswith("mps"):
            raise ValueError(f"expected device to be cpu or cuda, got {self.device!r}, which has no float64")
        FitConfig(  # checks the other fields
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            ema=self.ema,
            patience=self.patience,
            device=self.device,
        )
