"""Posteriors to fit: log densities over unconstrained space, of torch functions and the models of four other tools.

A modelling tool is imported when one of its models is given.
"""

from counterflow.targets.function import as_target, from_torch
from counterflow.targets.numpyro import from_numpyro
from counterflow.targets.pymc import from_pymc
from counterflow.targets.pyro import from_pyro
from counterflow.targets.stan import from_stan
from counterflow.targets.target import Target

__all__ = ["Target", "as_target", "from_numpyro", "from_pymc", "from_pyro", "from_stan", "from_torch"]
