"""Variational autoencoders whose posterior is a flow: encoder, posterior q(z|x), decoder, likelihood p(x|z)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from counterflow.checks import positive
from counterflow.flows.bases import DiagonalNormal
from counterflow.flows.flow import Flow, FlowDistribution
from counterflow.flows.recipes import stack
from counterflow.objectives import DensityMode, Draws, draw_from
from counterflow.transforms.base import Transform
from counterflow.transforms.constant import Permute
from counterflow.univariate.affine import Gated
from counterflow.univariate.base import Univariate
from counterflow.vae.likelihoods import LIKELIHOODS, DiscretizedLogistic
from counterflow.vae.networks import conv_decoder, conv_encoder, mlp


class VAE(nn.Module):
    """Variational autoencoder with a flow as its posterior.

        h = encoder(x),  z ~ q(z|h),  p(x, z) = p(x|decoder(z)) N(z; 0, I)

    With posterior="iaf", q starts from a diagonal Gaussian whose mean and scale are linear in h, and carries its
    sample through `posterior_layers` autoregressive steps, each with h as context, the order reversed between them.

    Args:
        data_shape: of one datum: (D,) for rows, (channels, height, width) for images.
        latent: the size of z.
        posterior: "gaussian", "iaf", or a `Flow` with features=latent and context=context.
        likelihood: "bernoulli" (values in [0, 1]), "gaussian" (real) or "discretized_logistic" (whole numbers).
        levels: how many values the discretized logistic knows, 256 for 8-bit images.
        network: "conv" or "mlp"; "auto" takes conv for images from 16x16 up, mlp for smaller ones and for rows.
        hidden: sizes of the mlp's hidden layers, mirrored in the decoder.
        channels: of the first convolution; the later ones have twice as many.
        context: the size of h.
        posterior_layers: the number of steps of the IAF.
        posterior_hidden: the hidden sizes of each step's network.
        univariate: the map of one feature in each step.
        activation: the activation of each step's network.

    Raises:
        ValueError: a shape that is neither rows nor images, an unknown name, a posterior of another size.

    Source: Kingma et al. 2016, "Improving Variational Inference with Inverse Autoregressive Flow", algorithm 1.

    Example:
        >>> import torch, counterflow as cf
        >>> vae = cf.VAE(data_shape=(1, 8, 8), latent=6, network="conv", channels=4)
        >>> x = torch.rand(5, 1, 8, 8).round()
        >>> cf.objectives.elbo(vae, x, samples=3).shape, vae.sample(2).shape
        (torch.Size([3, 5]), torch.Size([2, 1, 8, 8]))
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        latent: int = 32,
        posterior: str | Flow = "iaf",
        likelihood: str = "bernoulli",
        *,
        levels: int = 256,
        network: Literal["auto", "conv", "mlp"] = "auto",
        hidden: Sequence[int] = (512, 512),
        channels: int = 32,
        context: int = 256,
        posterior_layers: int = 4,
        posterior_hidden: Sequence[int] = (320, 320),
        univariate: Univariate | None = None,
        activation: str = "elu",
    ) -> None:
        super().__init__()
        self._config: dict[str, Any] = {
            "data_shape": data_shape,
            "latent": latent,
            "posterior": posterior,
            "likelihood": likelihood,
            "levels": levels,
            "network": network,
            "hidden": hidden,
            "channels": channels,
            "context": context,
            "posterior_layers": posterior_layers,
            "posterior_hidden": posterior_hidden,
            "univariate": univariate,
            "activation": activation,
        }
        self.data_shape = tuple(positive(size, "data_shape") for size in data_shape)
        if len(self.data_shape) not in (1, 3):
            raise ValueError(
                f"expected data_shape to be (features,) or (channels, height, width), got {self.data_shape}"
            )
        if network == "auto":
            # On the 8x8 digits the MLP is ahead of the convolutions by 0.3 nats and several times as fast.
            network = "conv" if len(self.data_shape) == 3 and min(self.data_shape[1:]) >= 16 else "mlp"
        if network not in ("conv", "mlp") or (network == "conv" and len(self.data_shape) == 1):
            raise ValueError(f"expected network to be mlp, or conv for images, got {network!r}")
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"expected likelihood to be one of {', '.join(LIKELIHOODS)}, got {likelihood!r}")

        self.latent = positive(latent, "latent")
        positive(context, "context")
        positive(channels, "channels")
        if levels < 2:
            raise ValueError(f"expected levels of at least 2, got {levels}; 8-bit values have 256")
        self.likelihood = (
            DiscretizedLogistic(self.data_shape, levels)
            if likelihood == "discretized_logistic"
            else LIKELIHOODS[likelihood](self.data_shape)
        )
        if network == "conv":
            self.encoder = conv_encoder(self.data_shape, channels, context)
            self.decoder = conv_decoder(latent, self.data_shape, channels)
        else:
            sizes = [positive(size, "hidden") for size in hidden]
            size = math.prod(self.data_shape)
            self.encoder = nn.Sequential(nn.Flatten(), *mlp(size, [*sizes, context]))
            self.decoder = nn.Sequential(
                *mlp(latent, sizes[::-1]),
                nn.Linear((sizes or [latent])[0], size),
                nn.Unflatten(1, self.data_shape),
            )
        if isinstance(posterior, Flow):
            if (posterior.features, posterior.context) != (latent, context):
                raise ValueError(
                    f"expected a posterior with features={latent} and context={context}, got features="
                    f"{posterior.features} and context={posterior.context}"
                )
            self.posterior = posterior
        elif posterior in ("gaussian", "iaf"):
            transform: Transform = Permute(range(latent))  # the identity
            if posterior == "iaf":
                transform = stack(
                    latent,
                    context,
                    posterior_layers,
                    posterior_hidden,
                    univariate=univariate or Gated(),
                    activation=activation,
                )
            self.posterior = Flow(DiagonalNormal(latent, context), transform)
        else:
            raise ValueError(f"expected posterior to be gaussian, iaf or a Flow, got {posterior!r}")

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless x (B, *data_shape) has the shape and the values that the model was built for."""
        if tuple(x.shape[1:]) != self.data_shape or x.dim() == 0:
            raise ValueError(
                f"expected data of shape (B, {', '.join(map(str, self.data_shape))}), got {tuple(x.shape)}; "
                f"this VAE was built with data_shape={self.data_shape}"
            )
        if not x.is_floating_point():
            raise TypeError(f"expected data of a floating-point dtype, got {x.dtype}; convert them with .float()")
        self.likelihood.check(x)

    def encode(self, x: Tensor) -> FlowDistribution:
        """Return the posterior q(z|x) for x (B, *data_shape): a distribution of batch shape (B,)."""
        self.check(x)
        return self.posterior(self.encoder(self.likelihood.center(x)).to(x.dtype))

    def decode(self, z: Tensor) -> Distribution:
        """Return the likelihood p(x|z) for z (..., latent): a distribution of batch shape (...) over data."""
        batch = z.shape[:-1]
        out = self.decoder(z.reshape(math.prod(batch), self.latent)).to(z.dtype)  # lower under autocast
        return self.likelihood(out.reshape(*batch, *self.data_shape))

    def prior(self) -> Distribution:
        """Return the prior N(0, I) over the latent features, each an element of the batch shape (latent,)."""
        zero = next(self.parameters()).new_zeros(self.latent)
        return Normal(zero, torch.ones_like(zero), validate_args=False)

    def draw(self, x: Tensor, samples: int = 1, density: DensityMode = "joint") -> Draws:
        """Draw S samples of z for each x (B, *data_shape), with the three log densities of the ELBO.

        density says how log q is given: "joint" (S, B); "by_feature" (S, B, D), with the prior's alike, for free
        bits; "path" (S, B), with the gradient of the path derivative alone; "score" (S, B), with the gradient for q's
        parameters at draws that are held.
        """
        z, log_q = draw_from(self.encode(x), samples, density)
        log_prior = self.prior().log_prob(z)
        if density != "by_feature":
            log_prior = log_prior.sum(-1)
        each = self.decode(z).base_dist.log_prob(x)  # type: ignore[attr-defined]  # every Likelihood is an Independent
        return Draws(each.flatten(-len(self.data_shape)).sum(-1), log_prior, log_q, z)

    @torch.no_grad()
    def sample(self, n: int, mean: bool = False) -> Tensor:
        """Draw n data (n, *data_shape): z from the prior, then x from p(x|z), or its mean."""
        p = self.decode(self.prior().sample((n,)))
        return p.mean if mean else p.sample()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the mean of p(x'|z) with one z ~ q(z|x) for each x."""
        return self.decode(self.encode(x).sample()).mean

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return self._config
