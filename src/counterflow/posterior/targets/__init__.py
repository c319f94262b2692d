"""Targets for `fit_posterior`: log densities over unconstrained space, from torch functions and models of four tools.

A modelling tool is imported when one of its models is given.
"""

from typing import TYPE_CHECKING

from counterflow.lazy import on_first_use

if TYPE_CHECKING:
    from counterflow.posterior.targets.function import as_target as as_target
    from counterflow.posterior.targets.function import from_torch as from_torch
    from counterflow.posterior.targets.numpyro import from_numpyro as from_numpyro
    from counterflow.posterior.targets.pymc import from_pymc as from_pymc
    from counterflow.posterior.targets.pyro import from_pyro as from_pyro
    from counterflow.posterior.targets.stan import from_stan as from_stan
    from counterflow.posterior.targets.target import Target as Target

_NAMES = {
    "Target": "counterflow.posterior.targets.target:Target",
    "as_target": "counterflow.posterior.targets.function:as_target",
    "from_numpyro": "counterflow.posterior.targets.numpyro:from_numpyro",
    "from_pymc": "counterflow.posterior.targets.pymc:from_pymc",
    "from_pyro": "counterflow.posterior.targets.pyro:from_pyro",
    "from_stan": "counterflow.posterior.targets.stan:from_stan",
    "from_torch": "counterflow.posterior.targets.function:from_torch",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = on_first_use(__name__, _NAMES)
