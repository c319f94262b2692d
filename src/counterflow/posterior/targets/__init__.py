"""Targets for `fit_posterior`: log densities over unconstrained space, from torch functions and models of four tools.

A modelling tool is imported when one of its models is given.
"""

from counterflow.posterior.targets.function import as_target, from_torch
from counterflow.posterior.targets.numpyro import from_numpyro
from counterflow.posterior.targets.pymc import from_pymc
from counterflow.posterior.targets.pyro import from_pyro
from counterflow.posterior.targets.stan import from_stan
from counterflow.posterior.targets.target import Target

__all__ = ["Target", "as_target", "from_numpyro", "from_pymc", "from_pyro", "from_stan", "from_torch"]
