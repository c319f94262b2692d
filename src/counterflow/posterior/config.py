"""Configuration of a posterior fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Estimator = Literal["reparameterised", "path", "dreg", "forward_kl", "renyi"]


@dataclass(frozen=True)
class PosteriorConfig:
    """How to fit a posterior. The defaults are meant for every model."""

    layers: int = 4  # of the flow at first; a stage may add as many
    hidden: tuple[int, ...] = ()  # sizes of each layer's network; empty takes two of 2 D, at least 32 and at most 256
    activation: str = "elu"  # smooth, since the path gradient takes the derivative of the flow's density
    df: float = 25.0  # at most, of the Student t base: tails heavier than normal ones bound the importance weights
    starts: int = 8  # points to climb from; as many again, far around the best, look for other modes
    estimator: Estimator = "path"  # of the gradient; the path derivative's variance is 0 where the flow is exact
    samples: int = 256  # S, draws of the flow in each step
    steps: int = 250  # of the first stage; the later ones take more
    learning_rate: float = 1e-2  # of the first stage, falling to a hundredth; half of it in the later ones
    stages: int = 4  # at most; a good verdict ends them sooner
    seconds: float = 200.0  # no stage starts that is expected to end later
    verdict_samples: int = 10_000  # which judge each stage, and which are resampled in the end
    seed: int = 0  # of starting points, initial weights and all noise

    def __post_init__(self) -> None:
        for name in ("layers", "starts", "samples", "steps", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("df", "learning_rate", "seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} above 0, got {getattr(self, name)}")
        if self.verdict_samples < 1000:
            raise ValueError(
                f"expected verdict_samples of at least 1000, got {self.verdict_samples}; k-hat needs a tail"
            )
        known = get_args(Estimator)
        if self.estimator not in known:
            raise ValueError(f"expected estimator to be one of {', '.join(known)}, got {self.estimator!r}")
