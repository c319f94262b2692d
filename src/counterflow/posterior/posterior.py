"""Posterior of a Bayesian model, fitted by an inverse autoregressive flow and judged by its own draws."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from counterflow.checks import one_of
from counterflow.diagnostics.arviz import approximate_loo, arviz_data, draws_tree
from counterflow.diagnostics.importance import MIN_SAMPLES, psis, resample
from counterflow.diagnostics.verdict import Verdict
from counterflow.flows.flow import Flow
from counterflow.flows.mixture import FlowMixture
from counterflow.io.atomic import write_bytes
from counterflow.io.json import MAX_QUOTED, from_json, read_json, write_json
from counterflow.io.serialization import load, save
from counterflow.io.tensors import contiguous_copies, read_tensors
from counterflow.posterior.config import PosteriorConfig, Refiner
from counterflow.posterior.mcmc import Chains, independence_metropolis, neutra
from counterflow.posterior.nuts import nuts
from counterflow.posterior.stages import FlowFit, Stage, WeightedDraws, draw_with_densities
from counterflow.posterior.summary import Summary, summary_rows
from counterflow.posterior.targets.function import as_target
from counterflow.posterior.targets.layout import variables_of
from counterflow.posterior.targets.target import Target

REFINERS: dict[str, Callable[..., Chains]] = {"nuts": nuts, "neutra": neutra, "imh": independence_metropolis}
FLOW_FILE, DRAWS_FILE, FACTS_FILE = "model.safetensors", "draws.safetensors", "posterior.json"
FACTS: dict[str, Any] = {  # the keys of FACTS_FILE and the types of their values
    "config": PosteriorConfig,
    "verdict": Verdict,
    "stages": tuple[Stage, ...],
    "variables": tuple[str, ...],
    "seconds": float,
}


@dataclass(frozen=True)
class Refined:
    """Draws of a posterior by Markov chains that use its flow."""

    values: dict[str, Tensor]  # name -> (chains, draws, *shape), constrained
    chains: Chains  # the unconstrained draws and their convergence

    def to_xarray(self) -> Any:
        """Put the chains into an xarray DataTree with the group posterior."""
        groups = {"posterior": {name: value.numpy() for name, value in self.values.items()}}
        return draws_tree(groups, {"verdict": self.chains.sentence}, {}, {})

    def to_arviz(self) -> Any:
        """Convert the chains to ArviZ's data structure: see `Posterior.to_arviz`."""
        return arviz_data(self.to_xarray())

    def __repr__(self) -> str:
        return f"Refined({', '.join(self.values)})\n  {self.chains.sentence}"


class Posterior:
    """Fitted posterior: draws of the model's variables, and a verdict on them.

    Attributes:
        flow: the approximation q over unconstrained theta (D,): a `Flow`, or a `FlowMixture` of one flow per mode.
        draws: the S draws of q that were judged, with log p, log q and their Pareto-smoothed importance weights.
        values: the draws as the model's variables, name -> (S, *shape), constrained.
        verdict: quality of q: see `counterflow.diagnostics.Verdict`.
        stages: settings and results of each stage of the fit.
        seconds: wall-clock time of the fit.
        config: configuration of the fit.
        target: the fitted target; None after loading without it.
    """

    def __init__(
        self,
        target: Target | None,
        config: PosteriorConfig,
        fitted: FlowFit,
        values: dict[str, Tensor],
        seconds: float,
    ) -> None:
        self.target = target
        self.config = config
        self.flow = fitted.flow
        self.draws = fitted.draws
        self.verdict = fitted.verdict
        self.stages = fitted.stages
        self.values = values
        self.seconds = seconds

    @property
    def log_weights(self) -> Tensor:
        """Pareto-smoothed log weights of the draws, normalised, (S,)."""
        return self.draws.log_weights

    @property
    def k_hat(self) -> float:
        """Shape of the importance weights' tail: below 0.5 q is close to the posterior, above 0.7 it is unusable."""
        return self.verdict.k_hat

    @property
    def ess(self) -> float:
        """Effective sample size of the verdict's draws, by their importance weights."""
        return self.verdict.ess

    @property
    def elbo(self) -> float:
        """Evidence lower bound, nats."""
        return self.verdict.elbo

    @property
    def mode_weights(self) -> tuple[float, ...]:
        """Weights of the modes, one for each flow of q: their shares of the evidence."""
        return self.flow.weights or (1.0,) if isinstance(self.flow, FlowMixture) else (1.0,)

    @property
    def missed(self) -> float:
        """Share of the posterior mass that was found where q has next to none: other modes."""
        return self.verdict.missed

    @property
    def trusted(self) -> bool:
        """True if the draws and the summary can be used as the posterior's: see `counterflow.diagnostics.Verdict`."""
        return self.verdict.trusted

    @property
    def sentence(self) -> str:
        """The verdict in plain words."""
        return self.verdict.sentence

    def sample(self, n: int) -> dict[str, Tensor]:
        """Draw n times from the posterior: name -> (n, *shape), constrained.

        If the weights are usable, the verdict's draws are resampled by them; otherwise these are uncorrected draws of
        q. Noise comes from torch's global generator.

        Raises:
            ValueError: n below 1, or more than the verdict's draws after loading without the target.
        """
        if n < 1:
            raise ValueError(f"expected n of at least 1, got {n}")
        if n <= len(self.log_weights):
            index = self._pick(self.log_weights, n)
            return {name: value[index] for name, value in self.values.items()}
        target = self._require_target()
        theta, log_p, log_q = draw_with_densities(target, self.flow, n)
        return target.constrain(theta[self._pick(psis(log_p - log_q).log_weights, n)])

    def _pick(self, log_weights: Tensor, n: int) -> Tensor:
        """Indices (n,) of the draws to return: resampled by the weights if they are usable, else the first n."""
        index = torch.arange(len(log_weights))
        return resample(index, log_weights, n) if self.verdict.usable_weights else index[:n]

    def _require_target(self) -> Target:
        if self.target is None:
            raise ValueError(
                f"expected the target, got a posterior that was loaded without it, with {len(self.log_weights)} draws; "
                "sample at most that many, or load it with Posterior.load(folder, target)"
            )
        return self.target

    @torch.no_grad()
    def log_prob(self, theta: Tensor) -> Tensor:
        """Log density log q (...) at unconstrained theta (..., D), nats; one forward substitution per layer."""
        return self.flow().log_prob(theta.double())

    def summary(self) -> Summary:
        """Estimate mean, standard deviation and quantiles of each element of each variable, with their reliability.

        The estimates are importance-weighted if the weights are usable; otherwise they are those of q's own draws.
        """
        log_weights = self.log_weights if self.verdict.usable_weights else torch.zeros_like(self.log_weights)
        return Summary(summary_rows(self.values, log_weights), self.sentence)

    def to_arviz(self, samples: int = 4000, *, predictive: bool = True, log_likelihood: bool = False) -> Any:
        """Convert draws to ArviZ's data structure: InferenceData in version 0, an xarray DataTree from version 1 on.

        The groups are those of `to_xarray`.

        Args:
            samples: number of draws, chosen as in `sample`.
            predictive: draw new data, for the group posterior_predictive.
            log_likelihood: compute the log likelihood of each observation, for the group of this name.

        Raises:
            ImportError: ArviZ is not installed.
        """
        return arviz_data(self.to_xarray(samples, predictive=predictive, log_likelihood=log_likelihood))

    def to_xarray(self, samples: int = 4000, *, predictive: bool = True, log_likelihood: bool = False) -> Any:
        """Put draws into an xarray DataTree with the groups of ArviZ's schema.

        Groups: posterior (one chain), sample_stats (log_weight, lp, log_q), and with the target unconstrained_posterior
        and, if the target has them, posterior_predictive, log_likelihood, observed_data and constant_data. The
        attributes of posterior contain the verdict. ArviZ is not needed, and reads the file that
        `tree.to_netcdf(path, engine="h5netcdf")` writes.

        Args:
            samples: number of draws, chosen as in `sample`.
            predictive: draw new data, for the group posterior_predictive.
            log_likelihood: compute the log likelihood of each observation, for the group of this name: an array of
                samples x observations.

        Raises:
            ImportError: xarray is not installed.
        """
        return self._tree(self._pick(self.log_weights, samples), predictive, log_likelihood)

    def _tree(self, index: Tensor, predictive: bool, log_likelihood: bool) -> Any:
        """Put the draws with these indices into the groups of `to_xarray`."""
        log_p, log_q, target = self.draws.log_p, self.draws.log_q, self.target
        theta = self.draws.theta[index]
        groups: dict[str, Mapping[str, Any]] = {
            "posterior": {name: value[index] for name, value in self.values.items()},
            "sample_stats": {
                name: value[index] for name, value in {"lp": log_p, "log_q": log_q, "log_weight": log_p - log_q}.items()
            },
        }
        if target is not None:
            groups["unconstrained_posterior"] = variables_of(theta, target.coordinates)
            groups["posterior_predictive"] = target.predictive(theta, self.config.seed) if predictive else {}
            groups["log_likelihood"] = target.log_likelihood(theta) if log_likelihood else {}
        chains = {
            group: {name: np.asarray(value)[None] for name, value in variables.items()}
            for group, variables in groups.items()
        }
        data = {} if target is None else {"observed_data": target.observed, "constant_data": target.constants}
        return draws_tree(
            {name: group for name, group in {**chains, **data}.items() if group},
            {"verdict": self.sentence, "k_hat": self.k_hat, "trusted": int(self.trusted)},
            {} if target is None else target.dims,
            {} if target is None else target.coords,
        )

    def loo(self, var_name: str | None = None, *, samples: int = 4000) -> Any:
        """Estimate by leave-one-out cross-validation how well the model predicts each observation.

        The draws are those of q, and log p - log q corrects for the difference to the posterior, together with the
        weights that leave an observation out: see `counterflow.diagnostics.arviz.approximate_loo`. It needs memory for
        an array of samples x observations.

        Args:
            var_name: the observed variable; needed if there are several.
            samples: number of draws of q, at most that of the verdict's draws.

        Returns:
            ArviZ's `ELPDData`, pointwise, which `az.compare` takes. k-hat of each observation is in `pareto_k`.

        Raises:
            ValueError: a target that does not give the log likelihood of each observation, several observed variables
                without var_name, samples below 25, or a posterior that was loaded without its target.
            ImportError: ArviZ is not installed.

        Warns:
            RuntimeWarning: the approximation cannot be trusted.
            UserWarning: k-hat is too large at some observations.

        Source: Magnusson et al. 2019, "Bayesian leave-one-out cross-validation for large data".

        Example:
            >>> import torch, counterflow as cf
            >>> y = torch.tensor([0.2, 1.1, -0.4], dtype=torch.float64)
            >>> def log_likelihood(mu):
            ...     return {"y": torch.distributions.Normal(mu[:, None], 1.0).log_prob(y)}
            >>> def model(mu):
            ...     return -mu.square() / 2 + log_likelihood(mu)["y"].sum(-1)
            >>> target = cf.targets.from_torch(model, shapes={"mu": ()}, log_likelihood=log_likelihood)
            >>> loo = cf.fit_posterior(target, cf.PosteriorConfig(layers=1, steps=20)).loo()
            >>> round(float(loo.elpd_loo), 1)
            -4.0
        """
        self._require_target()
        if samples < MIN_SAMPLES:
            raise ValueError(f"expected samples of at least {MIN_SAMPLES}, got {samples}; k-hat needs a tail")
        possible = (self.draws.log_p > -math.inf).nonzero()[:, 0]  # the other draws have a weight of zero
        tree = self._tree(possible[:samples], predictive=False, log_likelihood=True)
        names = list(tree["log_likelihood"].data_vars) if "log_likelihood" in tree else []
        if not names:
            raise ValueError(
                "expected a target that gives the log likelihood of each observation, got one that does not; write it "
                "as a generated quantity log_lik in Stan, or pass log_likelihood= to from_torch; with discrete "
                "variables that are summed out there is none"
            )
        if var_name not in names and (var_name is not None or len(names) > 1):
            raise ValueError(f"expected var_name to be one of {', '.join(names)}, got {var_name}")
        if not self.verdict.usable_weights:
            warnings.warn(self.sentence, RuntimeWarning, stacklevel=2)
        return approximate_loo(tree, var_name or names[0])

    def refine(
        self,
        method: Refiner = "neutra",
        *,
        chains: int = 16,
        samples: int = 500,
        seed: int = 0,
    ) -> Refined:
        """Draw from the posterior by Markov chains that use the flow: see `counterflow.posterior.mcmc`.

        The draws are exact in the limit of long chains, but no chain finds a mode that q leaves out. With flows for
        several modes, only "imh" moves between the modes.

        Args:
            method: "nuts", nutpie's NUTS in the flow's latent space, in coordinates that each chain scales;
                "neutra", NumPyro's NUTS there; or "imh", independence Metropolis-Hastings.
            chains: number of chains.
            samples: draws of each chain after its warm-up.
            seed: seed of the chains.

        Raises:
            ValueError: an unknown method, one other than "imh" for several modes, or a posterior that was loaded
                without its target.
            ImportError: nutpie for "nuts", NumPyro for "neutra", or ArviZ, which computes R-hat, is not installed.
        """
        one_of(method, "method", REFINERS)
        target = self._require_target()
        if isinstance(self.flow, FlowMixture) and method != "imh":
            raise ValueError(
                f"expected method imh for a posterior with flows for {len(self.flow.flows)} modes, got {method}, whose "
                "chains do not move between modes"
            )
        found = REFINERS[method](self.flow, target, chains=chains, samples=samples, seed=seed)
        values = target.constrain(found.draws.flatten(0, 1))
        return Refined({name: value.unflatten(0, (chains, samples)) for name, value in values.items()}, found)

    def save(self, folder: str | Path) -> None:
        """Write the flow, the draws and the verdict to a folder: safetensors and JSON, never pickle.

        Raises:
            ValueError: a variable with values that safetensors cannot hold.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FACTS_FILE).unlink(missing_ok=True)  # written last: a folder that contains it is complete
        save(self.flow, folder / FLOW_FILE)
        tensors = {f"values/{name}": value for name, value in self.values.items()} | self.draws._asdict()
        write_bytes(folder / DRAWS_FILE, safetensors.torch.save(contiguous_copies(tensors)))
        facts = {
            "config": asdict(self.config),
            "verdict": asdict(self.verdict),
            "stages": [asdict(stage) for stage in self.stages],
            "variables": list(self.values),
            "seconds": self.seconds,
        }
        write_json(folder / FACTS_FILE, facts)

    @classmethod
    def load(cls, folder: str | Path, target: Target | Callable[[Tensor], Tensor] | None = None) -> Posterior:
        """Read the folder that `save` wrote.

        Without the target, the posterior has its draws, summary and density, but makes no new draws.

        Raises:
            FileNotFoundError: the folder lacks a file.
            ValueError: files that are not those of a posterior, or a target of another size than the flow.
        """
        folder = Path(folder)
        missing = [name for name in (FLOW_FILE, DRAWS_FILE, FACTS_FILE) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"expected a folder written by Posterior.save, got {folder} without {missing[0]}")
        facts = read_json(folder / FACTS_FILE, "the facts that Posterior.save writes")
        tensors, _ = read_tensors(folder / DRAWS_FILE)
        flow: Flow | FlowMixture = load(folder / FLOW_FILE)
        try:
            config, verdict, stages, variables, seconds = (
                from_json(facts[name], hint, name) for name, hint in FACTS.items()
            )
            draws = WeightedDraws(*(tensors[name] for name in WeightedDraws._fields))
            values = {name: tensors[f"values/{name}"] for name in variables}
            S = len(draws.theta)
            shapes = [tuple(tensor.shape) for tensor in draws]
            if shapes != [(S, flow.features), (S,), (S,), (S,)] or any(v.shape[:1] != (S,) for v in values.values()):
                raise ValueError(f"draws of shapes {shapes} for a flow of {flow.features} features")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"expected {folder} to be a folder written by Posterior.save, got: {error!r:.{MAX_QUOTED}}"
            ) from None
        known = None if target is None else as_target(target, flow.features)
        return cls(known, config, FlowFit(flow, draws, verdict, stages), values, seconds)

    def _repr_html_(self) -> str:
        """Return the summary and the verdict as a table, for notebooks."""
        return self.summary()._repr_html_()

    def __repr__(self) -> str:
        usable = self.verdict.usable_weights
        how = "resampled by importance weights" if usable else "of the approximation itself, NOT corrected"
        stages = f"{len(self.stages)} stage{'s' if len(self.stages) > 1 else ''}"
        weights = ", ".join(f"{weight:.2f}" for weight in self.mode_weights)
        modes = f"  {len(self.mode_weights)} modes of weights {weights}\n" if len(self.mode_weights) > 1 else ""
        return (
            f"Posterior({self.flow.features} dimensions: {', '.join(self.values)}; {stages}, {self.seconds:.1f} s)\n"
            f"{modes}"
            f"  {self.sentence}\n"
            f"  draws: {how}"
        )
