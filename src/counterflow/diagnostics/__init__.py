"""Diagnostics: importance weights and the verdict, chains, two-sample tests, calibration, agreement of two flows."""

from counterflow.diagnostics.agreement import Agreement, agreement
from counterflow.diagnostics.calibration import Calibration, simulation_based_calibration
from counterflow.diagnostics.chains import Convergence, convergence
from counterflow.diagnostics.divergence import KLEstimate, kl_divergence
from counterflow.diagnostics.estimates import Estimates, weighted_estimates
from counterflow.diagnostics.importance import (
    SmoothedWeights,
    effective_sample_size,
    effective_sample_size_of_means,
    k_hat,
    k_hat_threshold,
    psis,
    resample,
)
from counterflow.diagnostics.two_sample import TwoSamples, energy_test
from counterflow.diagnostics.verdict import Verdict, diagnose

__all__ = [
    "Agreement",
    "Calibration",
    "Convergence",
    "Estimates",
    "KLEstimate",
    "SmoothedWeights",
    "TwoSamples",
    "Verdict",
    "agreement",
    "convergence",
    "diagnose",
    "effective_sample_size",
    "effective_sample_size_of_means",
    "energy_test",
    "k_hat",
    "k_hat_threshold",
    "kl_divergence",
    "psis",
    "resample",
    "simulation_based_calibration",
    "weighted_estimates",
]
