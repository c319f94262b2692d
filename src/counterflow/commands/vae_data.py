"""Data of a VAE on the scale of its likelihood, and as images for plots."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from counterflow.io.data import Dataset
from counterflow.io.data.images import PICTURES
from counterflow.vae.likelihoods import DiscretizedLogistic
from counterflow.vae.vae import VAE


def packages_for(source: str) -> list[str]:
    """Return the optional packages that reading a data source needs."""
    path = Path(source)
    if source == "digits":
        return ["sklearn"]
    if path.suffix.lower() in (".csv", ".parquet"):
        return ["pyarrow"]
    if path.is_dir() and any(file.suffix.lower() in PICTURES for file in path.rglob("*")):
        return ["PIL"]
    return []


def to_likelihood_scale(dataset: Dataset, likelihood: str) -> Dataset:
    """Return the data as float32: integers for the discretized logistic, else in [0, 1] if the levels are known."""
    scaled = dataset if likelihood == "discretized_logistic" else dataset.unit()
    test = None if scaled.test is None else scaled.test.float()
    return dataclasses.replace(scaled, values=scaled.values.float(), test=test)


def to_images(model: VAE, x: Tensor, like: Tensor | None = None) -> Any:
    """Return images (n, C, H, W) as an array in [0, 1]; values outside are scaled by the range of `like`, or of x."""
    if isinstance(model.likelihood, DiscretizedLogistic):
        return (x / (model.likelihood.levels - 1)).cpu().numpy()
    reference = x if like is None else like
    if len(x):
        low, high = reference.aminmax()
    else:
        low, high = x.new_zeros(()), x.new_ones(())
    low = low.clamp_max(0)
    high = high.clamp_min(1)
    return ((x - low) / (high - low)).cpu().numpy()
