"""A flow for nessai 0.15, a nested sampler."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from counterflow.checks import one_of, require
from counterflow.flows.recipes import RECIPES

require("nessai", "nessai", "flows of nessai's kind")
from nessai.flows.base import BaseFlow  # noqa: E402


class CounterflowFlow(BaseFlow):  # type: ignore[misc]  # nessai is not imported by the type checker
    """Flow of ours for `FlowSampler(flow_config={"flow": CounterflowFlow})`.

    nessai trains the flow on its live points, scores them, and draws new ones; each takes about one pass.

    Args:
        n_inputs: D.
        n_neurons: size of the hidden layers of each layer's network.
        n_blocks: number of layers of the flow.
        n_layers: number of hidden layers of each layer's network.
        kind: "maf" (affine), "nsf" (splines), "iaf" or "coupling".
        context_features: C, the number of conditional parameters; 0 for none.
        settings: further arguments of the flow, such as bins or activation.

    Raises:
        ValueError: an unknown kind, or a size below 1.

    Example:
        >>> import torch
        >>> from counterflow.interop.nessai import CounterflowFlow
        >>> flow = CounterflowFlow(3, n_neurons=16, n_blocks=2, n_layers=1, kind="nsf")
        >>> x, log_q = flow.sample_and_log_prob(7)
        >>> torch.allclose(flow.log_prob(x), log_q, atol=1e-4)
        True
    """

    def __init__(
        self,
        n_inputs: int,
        n_neurons: int = 32,
        n_blocks: int = 4,
        n_layers: int = 2,
        *,
        kind: Literal["maf", "nsf", "iaf", "coupling"] = "maf",
        context_features: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        one_of(kind, "kind", RECIPES)
        self._recipe = (kind, n_inputs, context_features, n_blocks, (n_neurons,) * n_layers, settings)
        self.flow = self._build()

    def _build(self) -> Any:
        kind, features, context, layers, hidden, settings = self._recipe
        return RECIPES[kind](features, context, layers, hidden, **settings)

    def reset_parameters(self) -> None:
        """Draw new initial weights; called by nessai after it has reset each layer on its own."""
        self.flow.load_state_dict(self._build().state_dict())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the latent z (N, D) of x (N, D), and log|det dz/dx|."""
        return self.flow.transform.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x (N, D) of z (N, D), and log|det dx/dz|."""
        return self.flow.transform(z, context)

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        """Return n samples (n, D); a context has a row for each."""
        return self.sample_and_log_prob(n, context)[0]

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the log density (N,) of x (N, D)."""
        return self.forward_and_log_prob(x, context)[1]

    def sample_latent_distribution(self, n: int, context: Tensor | None = None) -> Tensor:
        """Return n latent samples (n, D)."""
        return self.flow.base().sample((n,))

    def base_distribution_log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the log density (N,) of latent points z (N, D)."""
        return self.flow.base().log_prob(z)

    def forward_and_log_prob(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the latent z (N, D) of x, and the log density (N,) of x."""
        z, log_det = self.forward(x, context)
        return z, self.base_distribution_log_prob(z) + log_det

    def sample_and_log_prob(self, n: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return n samples (n, D) and their log density (n,)."""
        z = self.sample_latent_distribution(n)
        x, log_det = self.inverse(z, context)
        return x, self.base_distribution_log_prob(z) - log_det

    def freeze_transform(self) -> None:
        """Stop training the transform."""
        self.flow.transform.requires_grad_(False)

    def unfreeze_transform(self) -> None:
        """Train the transform again."""
        self.flow.transform.requires_grad_(True)
