"""Comparison of two tables with the same columns: has the distribution moved, and in which columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from counterflow.checks import require

Array = np.ndarray[Any, Any]

MAX_ROWS = 5_000  # of each table that the classifier sees: it then takes seconds
FOLDS = 5
WORDS = (  # the largest AUC of each verdict, and the verdict
    (0.55, "hardly told apart"),
    (0.65, "told apart a little better than by chance"),
    (0.8, "often told apart"),
    (0.95, "mostly told apart"),
    (1.0, "nearly always told apart"),
)


class ClassifierTest(NamedTuple):
    """Result of `classifier_test`."""

    auc: float  # area under the ROC curve on rows that the classifier was not trained on; 0.5 for equal distributions
    p_value: float  # of an AUC as large under equal distributions


class ColumnShift(NamedTuple):
    """Distance between the values of one column in two tables."""

    name: str
    distance: float  # the largest difference of the distribution functions, or for categories of probabilities of sets
    p_value: float  # of this distance or a larger one in any column, by Holm's correction
    medians: tuple[float, float]  # for categories, the most frequent codes


def classifier_test(a: Array, b: Array, seed: int = 0) -> ClassifierTest:
    """Test by cross-validated gradient boosting whether rows a (N, D) and b (M, D) can be told apart.

    The p-value is that of Mann and Whitney's test on the scores of held-out rows, at least one in a thousand million.
    It takes the scores of the folds as independent, which they are nearly. Rows that both tables hold tell nothing.

    Args:
        a: rows, such as those of a table.
        b: rows, such as samples of a density of the table.
        seed: seed of the folds, and of the choice of at most 5,000 rows of each.

    Source: Lopez-Paz and Oquab 2017, "Revisiting classifier two-sample tests".

    Example:
        >>> rng = np.random.default_rng(0)
        >>> classifier_test(rng.normal(size=(200, 2)), rng.normal(3.0, size=(200, 2))).auc > 0.9
        True
    """
    ensemble, selection, metrics, stats = (
        require(package, "data", "a classifier two-sample test")
        for package in ("sklearn.ensemble", "sklearn.model_selection", "sklearn.metrics", "scipy.stats")
    )
    rng = np.random.default_rng(seed)
    parts = [part[rng.permutation(len(part))[:MAX_ROWS]] for part in (a, b)]
    x = np.concatenate(parts)
    label = np.repeat([0, 1], [len(part) for part in parts])
    # Copies of a row share a fold: a classifier that had seen one of them would take the other for its opposite.
    _, copies = np.unique(x, axis=0, return_inverse=True)
    folds = selection.StratifiedGroupKFold(min(FOLDS, *np.bincount(label)), shuffle=True, random_state=seed)
    classifier = ensemble.HistGradientBoostingClassifier(max_iter=50, random_state=seed)
    score = selection.cross_val_predict(classifier, x, label, groups=copies, cv=folds, method="decision_function")
    test = stats.mannwhitneyu(score[label == 1], score[label == 0], alternative="greater")
    return ClassifierTest(float(metrics.roc_auc_score(label, score)), max(float(test.pvalue), 1e-9))


def in_words(auc: float) -> str:
    """Return what an AUC means for two sets of rows.

    Example:
        >>> in_words(0.52), in_words(0.99)
        ('hardly told apart', 'nearly always told apart')
    """
    return next(words for limit, words in WORDS if auc <= limit)


def column_shifts(a: Array, b: Array, names: Sequence[str], categories: Collection[str] = ()) -> list[ColumnShift]:
    """Return how far each column has moved from rows a (N, D) to rows b (M, D), the farthest first.

    The tests are those of Kolmogorov and Smirnov for numbers and the chi-squared test for codes of categories.

    Args:
        a: rows, such as those of a table.
        b: rows, such as those of a later table.
        names: the names of the D columns.
        categories: the names of the columns of codes.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a, b = rng.normal(size=(2, 500, 2))
        >>> [shift.name for shift in column_shifts(a, b + [0.0, 1.0], ["still", "moved"]) if shift.p_value < 0.01]
        ['moved']
    """
    stats = require("scipy.stats", "data", "a comparison of columns")
    tests = []
    for name, first, second in zip(names, a.T, b.T, strict=True):
        if name in categories:
            tests.append(_category_shift(stats, first, second))
        else:
            test = stats.ks_2samp(first, second)
            medians = float(np.median(first)), float(np.median(second))
            tests.append((float(test.statistic), float(test.pvalue), medians))
    corrected = _holm([p_value for _, p_value, _ in tests])
    shifts = [
        ColumnShift(name, distance, p_value, middles)
        for name, (distance, _, middles), p_value in zip(names, tests, corrected, strict=True)
    ]
    return sorted(shifts, key=lambda shift: -shift.distance)


def _category_shift(stats: Any, first: Array, second: Array) -> tuple[float, float, tuple[float, float]]:
    """Return the total variation distance of two columns of codes, its p-value, and their most frequent codes."""
    codes, place = np.unique(np.concatenate([first, second]), return_inverse=True)
    counts = np.stack([np.bincount(part, minlength=len(codes)) for part in (place[: len(first)], place[len(first) :])])
    distance = float(np.abs(counts[0] / len(first) - counts[1] / len(second)).sum() / 2)
    p_value = float(stats.chi2_contingency(counts).pvalue) if len(codes) > 1 else 1.0
    most = codes[counts.argmax(1)].tolist()
    return distance, p_value, (most[0], most[1])


def _holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for the number of tests, as by Holm 1979."""
    corrected = np.empty(len(p_values))
    largest = 0.0
    for rank, k in enumerate(np.argsort(p_values).tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[k]))
        corrected[k] = largest
    return [float(p_value) for p_value in corrected]
