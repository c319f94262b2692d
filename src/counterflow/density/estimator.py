"""FlowDensity: the density of a table as a scikit-learn estimator."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np

from counterflow.checks import positive, require
from counterflow.density.categories import unseen_in
from counterflow.density.config import DensityConfig, RecipeName
from counterflow.density.detection import Bounds, Kind
from counterflow.density.fitting import DensityTrainer, Recipe
from counterflow.density.inputs import coded_table, columns_by_name
from counterflow.density.missing import masked
from counterflow.density.model import TableDensity, not_a_density
from counterflow.density.periods import Period
from counterflow.io.data.cells import check_cells
from counterflow.io.json import from_json
from counterflow.training.checkpoints import Checkpoints
from counterflow.training.distributed import Workers
from counterflow.training.history import OnEpoch, OnStep
from counterflow.training.tracking import Tracker

sklearn_base = require("sklearn.base", "data", "FlowDensity")
sklearn_utils = require("sklearn.utils", "data", "FlowDensity")
sklearn_validation = require("sklearn.utils.validation", "data", "FlowDensity")

Array = np.ndarray[Any, Any]

SETTINGS = get_type_hints(DensityConfig) | {  # types of the settings in density.json
    "flow": str,  # also the name of a recipe
    "columns": str | dict[str, str],
    "bounds": dict[str, tuple[float | None, float | None]] | None,
    "circular": dict[str, float | str] | None,
}


class Conditional:
    """Density of some columns of a table given the others, from `FlowDensity.conditional`."""

    def __init__(self, estimator: FlowDensity, columns: Sequence[str]) -> None:
        density = masked(estimator.density_)
        unknown = [name for name in columns if name not in density.names]
        if unknown or not 0 < len({*columns}) < len(density.names):
            raise ValueError(f"expected some of the columns {density.names}, but not all, got {list(columns)}")
        self._estimator = estimator
        self._density = density
        self.given = list(columns)

    def score_samples(self, X: Any, context: Any = None) -> Array:
        """Return log p(the other columns | the given columns) of each row of X (N, D), (N,), in nats.

        It is the difference of two log densities, so that it is consistent with `FlowDensity.score_samples`.
        """
        x = self._estimator._validated(X, reset=False)[:, self._density.kept]
        c = self._density.encode(context, len(x))
        given = np.where(np.isin(self._density.names, self.given), x, np.nan)
        return self._density.score(x, c) - self._density.score(given, c)

    def score(self, X: Any, context: Any = None) -> float:
        """Return the mean of `score_samples`."""
        return float(self.score_samples(X, context).mean())

    def sample(
        self,
        given: Any,
        samples: int | None = None,
        context: Any = None,
        random_state: Any = None,
        candidates: int = 1,
        return_ess: bool = False,
    ) -> Any:
        """Draw rows given some of their columns.

        Args:
            given: the given columns (N,) by name, in a data frame or a dictionary.
            samples: S, the number of draws for each row; None for one draw without an axis for it.
            context: of the N rows.
            random_state: seed of the draws.
            candidates: the number of draws of which one is kept, by importance weights.
            return_ess: also return the effective number of the candidates, the mean over the draws.

        Returns:
            The rows, (N, D), or with `samples` (S, N, D), and with return_ess a pair of them and a float.
        """
        density = self._density
        columns = columns_by_name(given, None)
        missing = [name for name in self.given if name not in columns]
        if missing:
            raise ValueError(f"expected the given columns {self.given}, got none called {', '.join(missing)}")
        x = density.coded({name: columns[name] for name in self.given})
        repeats = 1 if samples is None else positive(samples, "samples")
        c = density.encode(context, len(x))
        seed = int(sklearn_utils.check_random_state(random_state).randint(2**31 - 1))
        many = None if c is None else np.tile(c, (repeats, 1))
        done = density.complete(np.tile(x, (repeats, 1)), many, seed, candidates)
        values = density.values(done.rows)
        values = values if samples is None else values.reshape(repeats, len(x), -1)
        return (values, float(done.ess.mean())) if return_ess else values


class FlowDensity(sklearn_base.DensityMixin, sklearn_base.BaseEstimator):  # type: ignore[name-defined,misc]
    """Density of the rows of a table, by normalizing flows.

        x --columns--> z --quantile splines, whitening--> about N(0, I) --flow--> eps ~ N(0, I)
        log q_m(x) = log N(eps; 0, I) + sum of the log_dets,    q(x) = (1/M) sum_m q_m(x)

    The kinds and the maps of the columns are inferred from the data. Columns that are far from normal pass through a
    spline through their quantiles. Whitening removes the correlations, estimated as by Ledoit and Wolf, or only
    standardizes: the first member is trained with both, and the one with the higher validation log density is kept.
    The flow starts near the identity and is trained by `cf.fit`. M members, which differ in initial weights and
    validation rows, are averaged. Training is in float32, scoring in float64, so that the score of a row does not
    depend on the other rows of the call. Densities are per unit of the columns; the table needs no scaling.

    If rows repeat, or nearly so, kernels at the training rows, in the noise space of the flow, raise the density of new
    rows. `cf.bases.KernelMixture` replaces N(0, I) if it gains at least 0.1 nats per validation row. The model then
    holds the training rows, and whoever has the model can read them; `holds_rows_` says so, and kernels=False forbids
    it.

    The score of a row with whole numbers or ordinal values counts their probability mass, that of numbers with few
    decimals the mean density of their cell. `TableDensity` gives the formula. Training maximizes log q at one random
    point of each cell, a lower bound. Samples are rounded to the numbers that the columns record. Rows outside of the
    support, such as those beyond bounds, have log density -inf.

    Columns of texts are categories, and others that `columns` names as such. Their joint distribution is a network that
    starts as if they were independent; the flow of the numbers is conditioned on them. A category that training did not
    see has probability zero.

    Args:
        flow: "nsf", "maf", "coupling", "iaf", or a recipe (features, context) -> Flow of whitened data.
        layers: the number of layers of a named flow.
        hidden: the hidden sizes of each layer's network.
        bins: the number of bins of the splines of "nsf" and "coupling".
        members: M, the number of flows; with members=1, `flow_` is a plain `Flow`.
        kernels: whether kernels are tried. They never are for conditional densities, weighted rows or more than
            20,000 rows.
        epochs: the maximum number of passes over the rows; the cosine schedule ends there.
        batch_size: the maximum number of rows per step; small tables use a twentieth of their rows.
        learning_rate: the learning rate of Adam after the warm-up.
        weight_decay: the L2 penalty.
        ema: the decay of the averaged weights, which are kept.
        patience: epochs without a better validation log density that end the training of a member.
        validation_fraction: the share of the rows, drawn at random, that a member validates on.
        columns: "auto", or the kind of columns by name: "auto", "real", "integer", "ordinal" or "category". The columns
            of an array are called x0, x1, ...
        bounds: (low, high) by name, None for no bound, such as {"age": (0, None)}.
        circular: the periods of circular columns by name, such as {"hour": 24, "angle": 360}: 23 and 0 are neighbours.
            The period of dates and times is "day", "week" or "year"; samples are then the time within it.
        constant: "drop" to leave out constant columns, copies of others and linear functions of others, with a warning;
            the density is then that of the other columns, and samples have all of them. "error" to refuse them.
        missing: "error" to refuse missing cells; "model" for a density of every subset of the columns: rows with
            missing cells are trained on and scored by what is there, `impute` draws the rest, and `conditional` answers
            questions about some columns given others. Its flow is "nsf" or "maf", without correlations and kernels;
            drawing takes a pass per column and layer.
        cell_points: S, the number of points over which the density of a cell is averaged.
        random_state: seed of validation rows, initial weights, batches and noise.
        device: the torch device of training and scoring, "cpu" or "cuda".

    Attributes:
        density_: the `TableDensity`, which works without scikit-learn.
        flow_: its `FlowMixture` or `Flow`, in the units of the table and in float64.
        columns_: the `TableTransform` of the flow.
        histories_: the training histories, of the first member with correlations and without, then of the others.
        holds_rows_: True if the model holds training rows.
        n_features_in_, feature_names_in_: as in all scikit-learn estimators.

    Example:
        >>> import numpy as np, counterflow as cf
        >>> rng = np.random.default_rng(0)
        >>> X = rng.lognormal(size=(300, 2))
        >>> density = cf.FlowDensity(epochs=3, hidden=(8,), random_state=0).fit(X)
        >>> density.score_samples(X).shape, density.sample(5, random_state=0).shape
        ((300,), (5, 2))
        >>> bool(density.sample(1000, random_state=0).min() > 0)
        True
    """

    density_: TableDensity  # a `MaskedTableDensity` with missing="model"

    def __init__(
        self,
        flow: RecipeName | Recipe = DensityConfig.flow,
        *,
        layers: int = DensityConfig.layers,
        hidden: Sequence[int] = DensityConfig.hidden,
        bins: int = DensityConfig.bins,
        members: int = DensityConfig.members,
        kernels: bool = DensityConfig.kernels,
        epochs: int = DensityConfig.epochs,
        batch_size: int = DensityConfig.batch_size,
        learning_rate: float = DensityConfig.learning_rate,
        weight_decay: float = DensityConfig.weight_decay,
        ema: float = DensityConfig.ema,
        patience: int = DensityConfig.patience,
        validation_fraction: float = DensityConfig.validation_fraction,
        columns: Mapping[str, Kind] | Kind = "auto",
        bounds: Mapping[str, Bounds] | None = None,
        circular: Mapping[str, Period] | None = None,
        constant: Literal["drop", "error"] = DensityConfig.constant,
        missing: Literal["error", "model"] = DensityConfig.missing,
        cell_points: int = DensityConfig.cell_points,
        random_state: Any = None,
        device: str = DensityConfig.device,
    ) -> None:
        self.flow = flow
        self.layers = layers
        self.hidden = hidden
        self.bins = bins
        self.members = members
        self.kernels = kernels
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.ema = ema
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.columns = columns
        self.bounds = bounds
        self.circular = circular
        self.constant = constant
        self.missing = missing
        self.cell_points = cell_points
        self.random_state = random_state
        self.device = device

    def fit(
        self,
        X: Any,
        y: Any = None,
        context: Any = None,
        sample_weight: Any = None,
        *,
        on_epoch: OnEpoch | None = None,
        on_step: OnStep | None = None,
        checkpoints: Checkpoints | None = None,
        tracker: Tracker | None = None,
    ) -> FlowDensity:
        """Fit the density of the rows of X, or their conditional density given the context.

        Ctrl-C during training keeps the best weights of the members so far.

        Args:
            X: the table (N, D), a data frame or an array, of Python objects if some columns are texts.
            y: ignored.
            context: a data frame, series, dictionary or array of N rows to condition on. Columns of texts are
                categories.
            sample_weight: weights (N,) of the rows; a row of weight w counts as w rows.
            on_epoch: called as on_epoch(task, epoch). The tasks are "member 1", "member 1 without correlations",
                "member 2", ..., "categories".
            on_step: called as on_step(task, done, total).
            checkpoints: where checkpoints are kept, a folder for each task; random_state must then be an integer. The
                same call resumes from them.
            tracker: client of an experiment tracker, which logs the configuration and every epoch.

        Raises:
            ValueError: missing or infinite cells or texts that do not repeat, by name, no column of numbers that
                varies, or, with constant="error", a constant column or a copy; or settings that no training could have.
        """
        if checkpoints is not None and not isinstance(self.random_state, int | np.integer):
            raise ValueError(
                "expected random_state to be an integer, which a resumed training needs, got "
                f"random_state={self.random_state!r} with checkpoints"
            )
        trainer = self._trainer(X, context, sample_weight)
        self.density_ = trainer.fit(on_epoch, on_step, checkpoints, tracker)
        self.histories_ = trainer.histories
        return self

    def _trainer(self, X: Any, context: Any = None, sample_weight: Any = None) -> DensityTrainer:
        """Check data and settings and return the trainer."""
        x = self._validated(X, reset=True)
        rng = sklearn_utils.check_random_state(self.random_state)
        weights = None
        if sample_weight is not None:
            weights = sklearn_validation._check_sample_weight(
                sample_weight, x, dtype=np.float64, ensure_non_negative=True
            )
        settings: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(DensityConfig)}
        return DensityTrainer(
            x,
            getattr(self, "feature_names_in_", None),
            None if context is None else columns_by_name(context, len(x)),
            weights,
            DensityConfig(**settings),
            kinds=self.columns,
            bounds=self.bounds,
            circular=self.circular,
            types=self._types,
            categories=list(self._categories.values()),
            seed=int(Workers.current().broadcast_value(rng.randint(2**31 - 1))),
        )

    def _validated(self, X: Any, *, reset: bool) -> Array:
        """Return X as (N, D) float64, every cell of which is finite."""
        known = None if reset else self.density_.categories
        X, types, categories = coded_table(X, self.columns, known)
        if reset:
            self._types = types
            self._categories = categories
        rows = 2 if reset else 1
        x: Array = sklearn_validation.validate_data(
            self, X, reset=reset, dtype=np.float64, ensure_all_finite=False, ensure_min_samples=rows
        )
        finite = np.where(np.isnan(x), 0.0, x) if self.missing == "model" else x
        check_cells(finite, self.get_feature_names_out().tolist())
        return x

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self.missing == "model"
        return tags

    def get_feature_names_out(self, input_features: Any = None) -> Array:
        """Return the names of the columns: feature_names_in_, or x0, x1, ..."""
        names = getattr(self, "feature_names_in_", None)
        return np.array([f"x{i}" for i in range(self.n_features_in_)], dtype=object) if names is None else names

    @property
    def flow_(self) -> Any:
        """The `FlowMixture` or `Flow`, in the units of the table and in float64."""
        return self.density_.flow

    @property
    def columns_(self) -> Any:
        """The `TableTransform` of the flow."""
        return self.density_.columns

    @property
    def holds_rows_(self) -> bool:
        """True if the model holds training rows, as kernels."""
        return self.density_.holds_rows

    def score_samples(self, X: Any, context: Any = None) -> Array:
        """Return the log density of each row of X, (N,), in nats, given the context of N rows."""
        sklearn_validation.check_is_fitted(self)
        x = self._validated(X, reset=False)
        rows = x[:, self.density_.kept]
        unseen = unseen_in(rows[:, self.density_.category_places], self.density_.category_names)
        if unseen:
            warnings.warn(
                f"rows with categories that training did not see have log density -inf; such columns: {unseen}",
                stacklevel=2,
            )
        return self.density_.score(rows, self.density_.encode(context, len(x)))

    def score(self, X: Any, y: Any = None, context: Any = None) -> float:
        """Return the mean log density of the rows of X, in nats. y is ignored.

        It is -inf if a row is outside of the support; a warning says how many are.
        """
        scores = self.score_samples(X, context)
        outside = int(np.isneginf(scores).sum())
        if outside:
            warnings.warn(
                f"{outside} of {len(scores)} rows are outside of the support and have log density -inf; the mean of "
                f"the others is {scores[np.isfinite(scores)].mean() if outside < len(scores) else -np.inf:.3f}",
                stacklevel=2,
            )
        return float(scores.mean())

    def sample(self, n: int = 1, context: Any = None, random_state: Any = None, *, as_frame: bool = False) -> Any:
        """Draw n rows, (n, D), given a context of one row, or of n rows with one draw for each.

        With categories, the rows are an array of Python objects, which holds them as they were in fit.

        Args:
            n: the number of rows.
            context: of one row or of n rows.
            random_state: seed of the draw.
            as_frame: return a pandas frame whose columns have the types of the frame in `fit`, such as dates.
        """
        sklearn_validation.check_is_fitted(self)
        seed = int(sklearn_utils.check_random_state(random_state).randint(2**31 - 1))
        rows = self.density_.sample(n, self.density_.encode(context), seed)
        if not as_frame:
            return self.density_.values(rows)
        arrow = require("pyarrow", "data", "a data frame")
        return arrow.table(self.density_.to_arrow(rows)).to_pandas()

    def impute(
        self, X: Any, samples: int | None = None, context: Any = None, random_state: Any = None, candidates: int = 1
    ) -> Array:
        """Draw the missing cells of rows given those that are known, for a density with missing="model".

        Args:
            X: the rows (N, D), with missing cells.
            samples: S, the number of draws of each row; None for one draw without an axis for it.
            context: of the N rows.
            random_state: seed of the draws.
            candidates: the number of draws of which one is kept, by importance weights; 1 takes the network's word.

        Returns:
            The rows, (N, D), or with `samples` (S, N, D), of Python objects if there are categories.

        Raises:
            ValueError: the density was fitted with missing="error".

        Example:
            >>> import numpy as np, counterflow as cf
            >>> x = np.random.default_rng(0).normal(size=(300, 1))
            >>> X = np.hstack([x, x + 0.1 * np.random.default_rng(1).normal(size=(300, 1))])
            >>> X[::3, 1] = np.nan
            >>> density = cf.FlowDensity("maf", layers=2, hidden=(16,), members=1, missing="model", random_state=0)
            >>> drawn = density.fit(X).impute([[1.0, np.nan]], samples=500, random_state=0)
            >>> drawn.shape, bool(abs(drawn[:, 0, 1].mean() - 1.0) < 0.2)
            ((500, 1, 2), True)
        """
        sklearn_validation.check_is_fitted(self)
        density = masked(self.density_)
        x = self._validated(X, reset=False)[:, density.kept]
        repeats = 1 if samples is None else positive(samples, "samples")
        c = density.encode(context, len(x))
        rows = np.tile(x, (repeats, 1))
        seed = int(sklearn_utils.check_random_state(random_state).randint(2**31 - 1))
        drawn = density.complete(rows, None if c is None else np.tile(c, (repeats, 1)), seed, candidates).rows
        values = density.values(drawn)
        return values if samples is None else values.reshape(repeats, len(x), -1)

    def conditional(self, columns: Sequence[str]) -> Conditional:
        """Return the density of the other columns given some, for a density with missing="model".

        Args:
            columns: the names of the given columns; those of an array are called x0, x1, ...

        Raises:
            ValueError: unknown names, none or all of them, or a density that was fitted with missing="error".

        Example:
            >>> import numpy as np, counterflow as cf
            >>> x = np.random.default_rng(0).normal(size=(300, 1))
            >>> X = np.hstack([x, x + 0.1 * np.random.default_rng(1).normal(size=(300, 1))])
            >>> density = cf.FlowDensity("maf", layers=2, hidden=(16,), members=1, missing="model", random_state=0)
            >>> given = density.fit(X).conditional(["x0"])
            >>> drawn = given.sample({"x0": [-1.0, 1.0]}, random_state=0)
            >>> bool(abs(drawn[:, 1] - [-1.0, 1.0]).max() < 0.5)
            True
            >>> bool(given.score([[1.0, 1.0]]) > given.score([[1.0, -1.0]]) + 5)
            True
        """
        sklearn_validation.check_is_fitted(self)
        return Conditional(self, columns)

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors, which `cf.load` reads as a flow or a mixture, and density.json. Never pickle."""
        sklearn_validation.check_is_fitted(self)
        self.density_.save(folder)

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> FlowDensity:
        """Read a density that `save` or `counterflow density` wrote. Its scores are the same, bit for bit.

        Raises:
            FileNotFoundError: one of the two files does not exist.
            ValueError: the files do not hold a density.
        """
        density = TableDensity.load(folder, device)
        try:
            settings = {name: from_json(value, SETTINGS[name], name) for name, value in density.settings.items()}
            estimator = cls(**settings | {"device": device})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise not_a_density(folder, error) from None
        estimator.density_ = density
        estimator.n_features_in_ = len(density.all_names)
        if density.named:
            estimator.feature_names_in_ = np.array(density.all_names, dtype=object)
        return estimator
