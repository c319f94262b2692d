"""DensityOutlierDetector: rows of low density as a scikit-learn outlier detector."""

from __future__ import annotations

from typing import Any

import numpy as np

from counterflow.checks import require
from counterflow.density.estimator import FlowDensity

sklearn_base = require("sklearn.base", "data", "DensityOutlierDetector")
sklearn_validation = require("sklearn.utils.validation", "data", "DensityOutlierDetector")

Array = np.ndarray[Any, Any]


class DensityOutlierDetector(sklearn_base.OutlierMixin, sklearn_base.BaseEstimator):  # type: ignore[name-defined,misc]
    """Outlier detector: a row is an outlier if its log density is among the lowest of the training rows.

        decision(x) = log q(x) - offset,    offset = the quantile of log q(x_i), i = 1..N, at `contamination`

    The density is that of all columns together, so that rows are found whose cells are usual one by one but not
    together. `counterflow.density.attribution.cell_gains` names the cells.

    Args:
        density: the density, a `FlowDensity` or another estimator with score_samples; a clone of it is fitted. None is
            `FlowDensity(kernels=False, random_state=0)`; kernels at the training rows would hide their outliers.
        contamination: the share of the training rows that are outliers, above 0 and at most 0.5.

    Attributes:
        density_: the fitted density.
        offset_: the log density below which a row is an outlier, nats.
        n_features_in_, feature_names_in_: as in all scikit-learn estimators.

    Raises:
        ValueError: contamination that is not above 0 and at most 0.5.

    Example:
        >>> import numpy as np, counterflow as cf
        >>> x = np.random.default_rng(0).normal(size=(200, 1))
        >>> X = np.hstack([x, x + 0.1 * np.random.default_rng(1).normal(size=(200, 1))])
        >>> density = cf.FlowDensity(layers=1, hidden=(8,), members=1, epochs=20, kernels=False, random_state=0)
        >>> detector = DensityOutlierDetector(density, contamination=0.05).fit(X)
        >>> detector.predict([[1.0, 1.0], [1.0, -1.0]]).tolist()  # 1: usual, -1: an outlier
        [1, -1]
    """

    def __init__(self, density: Any = None, *, contamination: float = 0.1) -> None:
        self.density = density
        self.contamination = contamination

    def fit(self, X: Any, y: Any = None) -> DensityOutlierDetector:
        """Fit the density and the offset. y is ignored."""
        if not 0 < self.contamination <= 0.5:
            raise ValueError(f"expected contamination above 0 and at most 0.5, got {self.contamination!r}")
        default = FlowDensity(kernels=False, random_state=0)
        self.density_ = (default if self.density is None else sklearn_base.clone(self.density)).fit(X)
        self.n_features_in_ = self.density_.n_features_in_
        if hasattr(self.density_, "feature_names_in_"):
            self.feature_names_in_ = self.density_.feature_names_in_
        self.offset_ = float(np.quantile(self.score_samples(X), self.contamination))
        return self

    def score_samples(self, X: Any) -> Array:
        """Return the log density of each row, (N,), in nats."""
        sklearn_validation.check_is_fitted(self)
        scores: Array = self.density_.score_samples(X)
        return scores

    def decision_function(self, X: Any) -> Array:
        """Return the log density minus the offset, (N,); negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> Array:
        """Return -1 for outliers and 1 for the others, (N,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)
