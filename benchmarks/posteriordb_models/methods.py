"""Methods that are compared: each takes a PyMC model and a seed, and returns draws, its own verdict and its seconds.

Pareto k-hat of the peers is that of log p - log q over their draws before any resampling, by `cf.diagnostics.k_hat`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pymc as pm

N = 10_000  # draws that each method is asked for: as many as the reference has


@dataclass(frozen=True)
class Fit:
    """draws: name -> (n, *shape) in the natural parameters. trusted: what the method says of them, k-hat below 0.7.

    Seconds are without the compilation of the model, by the clock on the wall and of the process' CPU time. log_weights
    (n,) are given where the method leaves the draws as they come from its approximation.
    """

    draws: dict[str, np.ndarray]
    k_hat: float
    trusted: bool
    seconds: float
    cpu_seconds: float
    build_seconds: float
    log_weights: np.ndarray | None = None
    stages: tuple[str, ...] = ()


def clocks() -> np.ndarray:
    """Seconds on the wall and of CPU time; differences count."""
    return np.array([time.perf_counter(), time.process_time()])


def counterflow(model: pm.Model, seed: int) -> Fit:
    """Counterflow's default configuration. Draws are resampled by importance where the library does so by itself."""
    import torch

    import counterflow as cf

    begun = clocks()
    target = cf.targets.from_pymc(model)
    theta = torch.zeros(2, target.dim, dtype=torch.float64, requires_grad=True)
    target(theta).sum().backward()  # whatever compiles at the first call
    built = clocks()
    posterior = cf.fit_posterior(target, cf.PosteriorConfig(seed=seed))
    draws = {name: value.numpy() for name, value in posterior.sample(N).items()}
    stages = tuple(f"{stage.estimator} {stage.steps} steps, k-hat {stage.k_hat:.2f}" for stage in posterior.stages)
    seconds = clocks() - built
    return Fit(draws, posterior.k_hat, posterior.trusted, *seconds, (built - begun)[0], stages=stages)


def fullrank_advi(model: pm.Model, seed: int) -> Fit:
    """PyMC's full-rank ADVI: 40,000 iterations, four times the default; all else as it comes."""
    begun = clocks()
    with model:
        inference = pm.FullRankADVI(random_seed=seed)
        inference.fit(1, progressbar=False)  # compiles
        built = clocks()
        approximation = inference.fit(40_000, progressbar=False)
    mean, cov = approximation.mean.eval(), approximation.cov.eval()
    seconds = clocks() - built
    z = np.random.default_rng(seed).multivariate_normal(mean, cov, N)
    whitened = np.linalg.solve(np.linalg.cholesky(cov), (z - mean).T).T
    log_q = -0.5 * (whitened**2).sum(1)  # up to a constant
    where = [approximation.ordering[value.name][1] for value in model.value_vars]
    log_p, constrain = jaxified(model)
    z = np.concatenate([z[:, columns] for columns in where], 1)
    log_weights = np.array(log_p(z) - log_q)
    k = k_hat(log_weights)
    return Fit(constrain(z), k, k < 0.7, *seconds, (built - begun)[0], log_weights)


def auto_iaf_normal(model: pm.Model, seed: int) -> Fit:
    """NumPyro's AutoIAFNormal over the unconstrained parameters: defaults, Adam 1e-3, 20,000 steps of one particle."""
    import jax
    import numpyro
    from numpyro import distributions as dist
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoIAFNormal

    numpyro.enable_x64()
    log_p, constrain = jaxified(model)
    dim = sum(np.size(value) for value in model.initial_point().values())

    def program() -> None:
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (dim,)))
        numpyro.factor("log_p", log_p(z[None])[0])

    begun = clocks()
    guide = AutoIAFNormal(program)
    svi = SVI(program, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    fit_key, draw_key = jax.random.split(jax.random.key(seed))
    result = svi.run(fit_key, 20_000, progress_bar=False, stable_update=True)
    jax.block_until_ready(result.params)
    seconds = clocks() - begun  # with XLA's compilation, which is a second or two
    q = numpyro.handlers.substitute(guide._get_posterior, result.params)()
    z = q.sample(draw_key, (N,))
    log_weights = np.array(log_p(z) - q.log_prob(z))
    k = k_hat(log_weights)
    return Fit(constrain(z), k, k < 0.7, *seconds, 0.0, log_weights)


def pathfinder(model: pm.Model, seed: int) -> Fit:
    """PyMC's multi-path Pathfinder at its defaults, but for as many draws as the others give (default 1,000)."""
    from pymc_extras import fit_pathfinder

    found = fit_pathfinder(
        model,
        num_draws=N,
        num_draws_per_path=N,
        random_seed=seed,
        concurrent=None,
        progressbar=False,
        display_summary=False,
    )
    draws = {str(name): value.values[0] for name, value in found.posterior.data_vars.items()}
    stats = found.sample_stats
    k, seconds = float(stats.pareto_k), float(stats.compute_time)
    return Fit(draws, k, k < 0.7, seconds, seconds, float(stats.compile_time))  # it tells no CPU time


METHODS: dict[str, Callable[[pm.Model, int], Fit]] = {
    "counterflow": counterflow,
    "fullrank_advi": fullrank_advi,
    "auto_iaf_normal": auto_iaf_normal,
    "pathfinder": pathfinder,
}


def k_hat(log_weights: np.ndarray) -> float:
    """Pareto k-hat of the importance weights, infinity where they are not numbers."""
    import torch

    import counterflow as cf

    return cf.diagnostics.k_hat(torch.from_numpy(log_weights)) if np.isfinite(log_weights).all() else np.inf


def jaxified(model: pm.Model) -> tuple[Callable, Callable]:
    """(log density, natural parameters by name) of flat unconstrained parameters (n, D), in JAX."""
    import jax
    from pymc.sampling.jax import get_jaxified_graph

    jax.config.update("jax_enable_x64", True)
    start = model.initial_point()
    shapes = [np.shape(start[value.name]) for value in model.value_vars]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    reported = model.free_RVs + model.deterministics
    density = get_jaxified_graph(model.value_vars, [model.logp()])
    natural = get_jaxified_graph(model.value_vars, model.replace_rvs_by_values(reported))

    def parts(z: jax.Array) -> list[jax.Array]:
        return [part.reshape(shape) for part, shape in zip(jax.numpy.split(z, ends[:-1]), shapes, strict=True)]

    log_p = jax.jit(jax.vmap(lambda z: density(*parts(z))[0]))
    values = jax.jit(jax.vmap(lambda z: natural(*parts(z))))

    def constrain(z: np.ndarray) -> dict[str, np.ndarray]:
        return {rv.name: np.asarray(value) for rv, value in zip(reported, values(z), strict=True)}

    return log_p, constrain
