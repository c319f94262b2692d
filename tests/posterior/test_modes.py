"""Search for modes that the flow leaves out."""

import pytest
from log_densities import QUICK, modes
from registry import over

import counterflow as cf


@over([0.5, 0.9], "share")
def test_a_mode_that_the_flow_leaves_out_is_flagged(share):
    posterior = cf.fit_posterior(lambda theta: modes(theta, 8.0, share), QUICK, dim=2)
    assert posterior.k_hat < 0.7  # so k-hat alone is not enough
    assert posterior.missed == pytest.approx(1 - share, abs=0.1)
    assert not posterior.trusted
    assert "The approximation cannot be trusted" in repr(posterior) and "NOT corrected" in repr(posterior)
    assert f"{100 * posterior.missed:.0f} % of the posterior mass" in str(posterior.summary())
