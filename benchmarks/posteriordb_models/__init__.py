"""The models of the 19 posteriors that benchmarks/posteriordb.py fits, and how their data are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

NAMES = (
    "arK-arK",
    "eight_schools-eight_schools_centered",
    "eight_schools-eight_schools_noncentered",
    "kidiq-kidscore_interaction",
    "kidiq-kidscore_momhs",
    "kidiq-kidscore_momiq",
    "earnings-earn_height",
    "earnings-logearn_interaction_z",
    "garch-garch11",
    "gp_pois_regr-gp_regr",
    "low_dim_gauss_mix-low_dim_gauss_mix",
    "mesquite-logmesquite",
    "mesquite-mesquite",
    "nes1972-nes",
    "nes2000-nes",
    "sblrc-blr",
    "kilpisjarvi_mod-kilpisjarvi",
    "hmm_example-hmm_example",
    "diamonds-diamonds",
)


def load_data(folder: Path, name: str) -> dict[str, Any]:
    """Return the data of a model: numbers unchanged, lists as arrays."""
    data = json.loads((folder / f"{name}.data.json").read_text("utf-8"))
    return {key: np.array(value) if isinstance(value, list) else value for key, value in data.items()}


def load_draws(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The reference draws, (10000,) for each scalar: mu, beta[1], beta[2], ..."""
    with np.load(folder / f"{name}.draws.npz") as draws:
        return dict(draws)


def stack_draws(draws: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The draws by variable: beta[1], beta[2], ..., each (n,), become beta (n, 2)."""
    names = dict.fromkeys(key.partition("[")[0] for key in draws)
    return {
        name: draws[name] if name in draws else np.stack([draws[k] for k in draws if k.startswith(f"{name}[")], 1)
        for name in names
    }
