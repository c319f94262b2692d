"""Configuration of a posterior fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from counterflow.checks import one_of

Estimator = Literal["reparameterised", "path", "dreg", "forward_kl", "renyi"]
Refiner = Literal["nuts", "neutra", "imh"]  # Markov chains through the flow


@dataclass(frozen=True)
class PosteriorConfig:
    """Configuration of `fit_posterior`. The defaults are meant for every model."""

    layers: int = 4  # autoregressive layers of the first stage; a later stage may add as many
    hidden: tuple[int, ...] = ()  # hidden sizes of each layer; empty means two of 2 D, between 32 and 256
    activation: str = "elu"  # smooth, since the path gradient differentiates the flow's density
    df: float = 25.0  # maximum degrees of freedom of the Student t base, whose heavy tails bound the importance weights
    starts: int = 8  # starting points; as many again, far around the best one, search for other modes
    modes: int = 8  # maximum number of flows; one is fitted to each mode that is found
    estimator: Estimator = "path"  # gradient estimator; the path derivative has no variance if the flow is exact
    samples: int = 128  # S, draws of the flow in each step of the first stage; later stages take more
    steps: int = 50  # steps of the first stage, which is enough for almost normal posteriors; later stages take more
    learning_rate: float = 1e-2  # at the start of the first two stages, decaying to a hundredth; half of it later on
    stages: int = 5  # maximum number of stages; a good verdict ends the fit earlier
    seconds: float = 200.0  # no further stage starts that is expected to end later than this
    verdict_samples: int = 10_000  # draws that judge each stage; the last ones are resampled
    seed: int = 0  # seed of starting points, initial weights and all noise

    def __post_init__(self) -> None:
        for name in ("layers", "starts", "modes", "samples", "steps", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("df", "learning_rate", "seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} above 0, got {getattr(self, name)}")
        if self.verdict_samples < 1000:
            raise ValueError(
                f"expected verdict_samples of at least 1000, got {self.verdict_samples}; k-hat needs a tail"
            )
        one_of(self.estimator, "estimator", get_args(Estimator))
