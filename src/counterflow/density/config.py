"""Densities of tables: their settings here, and in `estimator` FlowDensity, which needs scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RecipeName = Literal["nsf", "maf", "coupling", "iaf"]
MODEL, DESCRIPTION = "model.safetensors", "density.json"  # the files of a saved one


@dataclass(frozen=True)
class DensityConfig:
    """The flows and their training. The numbers were chosen on the first two splits of benchmarks/uci.py."""

    flow: RecipeName = "nsf"  # splines take the shape of a marginal that no affine map can
    layers: int = 3  # the order is reversed between them, so that every column sees every other one
    hidden: tuple[int, ...] = (64, 64)  # of each layer's network; more overfits tables of a few thousand rows
    bins: int = 8  # of a spline, as Durkan et al. 2019 have it
    members: int = 3  # flows of other seeds and validation parts, averaged; 0.1 to 1.3 nats a row over one of them
    kernels: bool = True  # at the training rows, where they gain 0.1 nats; the model then holds these rows
    epochs: int = 60  # at most: the cosine ends there, and patience ends most trainings before
    batch_size: int = 256  # at most; small tables take a twentieth of their rows, so that an epoch has some steps
    learning_rate: float = 1e-2  # of Adam; 2e-3 ends lower on every small table
    weight_decay: float = 1e-3  # an L2 penalty
    ema: float = 0.99  # decay of the averaged weights, which are the ones kept: an epoch has only 20 to 30 steps
    patience: int = 10  # epochs without a better validation part before stopping
    validation_fraction: float = 0.1  # of the rows, which the training of a member does not see
    cell_points: int = 16  # points in the cell of a recorded number, over which its density is averaged
    device: str = "cpu"  # cpu or cuda; mps has no float64, in which columns are mapped
