"""Normalizing flows: a base distribution and a transform, recipes, mixtures and kernel densities."""

from counterflow.flows.flow import Flow, FlowDistribution
from counterflow.flows.kde import with_kernel_base
from counterflow.flows.mixture import FlowMixture
from counterflow.flows.recipes import IAF, MAF, NSF, Coupling

__all__ = ["Coupling", "Flow", "FlowDistribution", "FlowMixture", "IAF", "MAF", "NSF", "with_kernel_base"]
