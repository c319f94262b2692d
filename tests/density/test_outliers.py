"""The outlier detector as scikit-learn users meet it."""

import numpy as np
import pandas as pd
import pytest
from sklearn.mixture import GaussianMixture
from sklearn.utils.estimator_checks import parametrize_with_checks

import counterflow as cf
from counterflow.density.outliers import DensityOutlierDetector

RNG = np.random.default_rng(0)
A = RNG.normal(size=(300, 1))
TABLE = pd.DataFrame(np.hstack([A, A + 0.1 * RNG.normal(size=(300, 1))]), columns=["a", "b"])
TINY = cf.FlowDensity(layers=1, hidden=(8,), members=1, epochs=15, kernels=False, random_state=0)


@pytest.mark.slow
@parametrize_with_checks(
    [DensityOutlierDetector(cf.FlowDensity(layers=1, hidden=(8,), epochs=2, kernels=False, random_state=0))]
)
def test_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("density", [TINY, GaussianMixture(random_state=0)], ids=["flow", "mixture"])
def test_rows_that_contradict_themselves_are_outliers(density):
    detector = DensityOutlierDetector(density, contamination=0.04).fit(TABLE)
    labels = detector.predict(TABLE)
    assert (labels == -1).sum() == 12 and list(detector.feature_names_in_) == ["a", "b"]
    assert detector.predict(pd.DataFrame({"a": [0.5, 0.5], "b": [0.5, -0.9]})).tolist() == [1, -1]
    np.testing.assert_array_equal(labels, np.where(detector.decision_function(TABLE) < 0, -1, 1))
    np.testing.assert_array_equal(detector.score_samples(TABLE), detector.density_.score_samples(TABLE))
    assert not hasattr(density, "n_features_in_")  # a clone was fitted


@pytest.mark.parametrize("contamination", [0.0, -0.1, 0.6, float("nan")])
def test_a_contamination_out_of_range_is_refused(contamination):
    with pytest.raises(ValueError, match=r"expected contamination above 0 and at most 0\.5, got"):
        DensityOutlierDetector(TINY, contamination=contamination).fit(TABLE)
