"""Options of `counterflow vae`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from counterflow.commands.options import FLAT, RunFolder, optional
from counterflow.training.config import FitConfig


@dataclass(frozen=True)
class Vae:
    """Train VAEs with a Gaussian and an IAF posterior, and compare them.

    The seed splits the data into training, validation and test parts; the test part is used once, at the end. The run
    folder holds the weights of each VAE, metrics.jsonl, summary.json, plots/ and report.html. Ctrl-C keeps the best
    weights so far.
    """

    data: str = "digits"
    """digits (8x8, from scikit-learn), a folder of MNIST-style IDX files or of images, .npy, .npz, .csv or .parquet"""
    key: Annotated[str | None, optional("NAME")] = None
    """array of an .npz file"""
    levels: Annotated[int | None, optional("INT")] = None
    """number of levels, if an array holds integers 0..levels-1 (256 for 8-bit images)"""
    posterior: Annotated[Literal["gaussian", "iaf"] | None, optional("{gaussian,iaf}")] = None
    """posterior q(z|x); by default both, one after the other"""
    likelihood: Literal["bernoulli", "gaussian", "discretized_logistic"] = "bernoulli"
    """bernoulli: values in [0, 1], binarised anew in each step; gaussian: real numbers; discretized_logistic: 8 bits"""
    latent: int = 8
    """number of latent features z"""
    network: Literal["auto", "conv", "mlp"] = "auto"
    """auto: gated convolutions for images of at least 16x16, otherwise a gated MLP"""
    hidden: tuple[int, ...] = (256, 256)
    """hidden sizes of the MLP"""
    channels: int = 16
    """channels of the first convolution; van den Berg et al. 2018 use 32 for 28x28"""
    context: int = 128
    """size of the encoder's output h"""
    iaf_layers: int = 4
    """number of IAF steps"""
    iaf_hidden: tuple[int, ...] = (128, 128)
    """hidden sizes of each IAF step"""
    iaf_map: Literal["gated", "affine", "spline"] = "gated"
    """univariate map of each IAF step"""
    iaf_activation: str = "elu"
    """activation of the IAF steps: elu, leaky_relu, relu, sigmoid, silu, softplus or tanh"""
    objective: Literal["elbo", "iw_elbo", "path_elbo"] = "elbo"
    """elbo; iw_elbo: importance-weighted over --samples; path_elbo: ELBO with the path-derivative gradient"""
    free_bits: float = 0.0
    """nats of KL that each group of latent features may cost for free; only for --objective elbo"""
    groups: Annotated[int | None, optional("INT")] = None
    """number of groups for --free-bits; by default each latent feature is a group"""
    warm_up: float = 0.4
    """fraction of the epochs over which the weight of the KL grows from 0 to 1; only for --objective elbo"""
    samples: int = 1
    """draws of z per row in training"""
    test_samples: int = 500
    """draws of z per test row, for the importance-sampled log-likelihood"""
    test_rows: Annotated[int | None, optional("INT")] = None
    """rows of the test, drawn at random; by default all, or as many as a tenth of the training's time allows"""
    folder: Annotated[RunFolder, FLAT] = RunFolder()
    fit: Annotated[FitConfig, FLAT] = FitConfig(epochs=150, batch_size=64, learning_rate=5e-3, ema=0.995)

    def __post_init__(self) -> None:
        if self.test_samples < 1:
            raise ValueError(f"expected --test-samples to be at least 1, got {self.test_samples}")
        if self.test_rows is not None and self.test_rows < 1:
            raise ValueError(f"expected --test-rows to be at least 1, got {self.test_rows}")
        if not self.warm_up >= 0:
            raise ValueError(f"expected --warm-up to be at least 0, got {self.warm_up}")
        if self.free_bits and self.objective != "elbo":
            raise ValueError(
                f"expected --objective elbo with --free-bits, got {self.objective}; leave one of the two out"
            )

    def run(self) -> int:
        """Train, test and plot; return the exit code: 130 after Ctrl-C, 143 after SIGTERM."""
        from counterflow.commands.preflight import check_readable, check_run_folder

        check_run_folder(self.folder)
        if self.data != "digits" and self.folder.resume is None:
            check_readable(Path(self.data).expanduser(), "digits, a folder or a file of data")
        from counterflow.commands.vae_run import run

        return run(self)
