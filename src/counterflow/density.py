"""FlowDensity: the density of a table, as scikit-learn's estimators are used."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from counterflow.checkpoint import load, save
from counterflow.columns import Columns, Context, check_cells, check_columns, detect
from counterflow.columns.context import is_numeric
from counterflow.columns.detection import Bounds, Kind
from counterflow.fit import Epoch, FitConfig, check_device, fit
from counterflow.flow import Flow
from counterflow.recipes import IAF, MAF, NSF, Coupling
from counterflow.transform import Compose, Inverse, Triangular
from counterflow.univariate import RationalQuadraticSpline

try:
    from sklearn.base import BaseEstimator, DensityMixin
    from sklearn.covariance import ledoit_wolf_shrinkage
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f"expected scikit-learn for FlowDensity, got: {error}; pip install 'counterflow[data]'"
    ) from error

Array = np.ndarray[Any, Any]
Recipe = Callable[[int, int], Flow]
Named = Literal["nsf", "maf", "coupling", "iaf"]

FORMAT = 1  # of density.json
MODEL, DESCRIPTION = "model.safetensors", "density.json"
WHITENED = 256  # columns up to which the linear layer has a matrix: its D^2 numbers stand in the file's header
EMA = 0.99  # decay of the averaged weights, which are the ones kept: it forgets within a hundred steps
CHUNK = 1 << 16  # numbers scored at a time: what a spline keeps of them stays within some tens of megabytes


@dataclass(frozen=True)
class DensityConfig:
    """The flow and its training."""

    flow: Named = "nsf"  # splines take the shape of a marginal that no affine map can
    layers: int = 3  # the order is reversed between them, so that every column sees every other one
    hidden: tuple[int, ...] = (64, 64)  # of each layer's network; more overfits tables of a few thousand rows
    bins: int = 8  # of a spline, as Durkan et al. 2019 have it
    epochs: int = 200  # at most; patience ends most trainings before
    batch_size: int = 256  # at most; small tables take a twentieth of their rows, so that an epoch has some steps
    learning_rate: float = 2e-3  # of Adam
    weight_decay: float = 1e-4  # an L2 penalty, which holds small tables near their Gaussian
    patience: int = 20  # epochs without a better validation part before stopping
    validation_fraction: float = 0.1  # of the rows, which training does not see
    draws: int = 16  # points in the cell of a recorded number, over which its density is averaged
    device: str = "cpu"  # cpu or cuda; mps has no float64, in which columns are mapped


DEFAULT = DensityConfig()


class FlowDensity(DensityMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """The density of the rows of a table, by a normalizing flow.

        x --columns--> z --linear--> whitened --flow--> eps ~ N(0, I),    log p(x) = log N(eps) + sum of the log_det

    The columns' maps are found from the data (`counterflow.columns.detect`), the linear layer is the Gaussian fitted to
    z, shrunk as by Ledoit and Wolf, and the flow, which starts at the identity, is trained from there by `cf.fit`;
    the weights that did best on a validation part are kept. All of them are one flow, `flow_`, in the
    units of the table, so densities are per unit of the columns and need no scaler before. It is trained in float32,
    and kept and scored in float64, so that a row's score does not depend on which rows stand beside it.

    Columns of whole numbers and of few values have masses: the score counts log P(the value). Numbers recorded to so
    many decimals have the density of their cell on average. For K such columns, with S = draws points u_s of a
    Sobol sequence in [0, 1]^K that is scrambled by the seed and the same for all rows,

        log p(x) = log (1/S) sum_s q(start + width u_s) + sum over the columns with masses of log width

    and, as each point is uniform, its mean over seeds is a lower bound of the log of the mass or mean density of
    the flow q. Training maximises log q at one uniform point of each cell, a lower bound as well. Samples are
    put back to the values that are recorded. Rows outside of the support (beyond bounds, beyond the values of an
    ordinal column) have log density -inf.

    Args:
        flow: "nsf", "maf", "coupling", "iaf", or a recipe (features, context) -> Flow, which gets whitened data.
        layers, hidden, bins: of the named flows; bins for "nsf" and "coupling".
        epochs, batch_size, learning_rate, weight_decay, patience: of the training.
        validation_fraction: of the rows, at random; at least one row.
        columns: "auto", or the kind of columns by name: "auto", "real", "integer" or "ordinal". Columns of
            arrays are called x0, x1, ...
        bounds: by name, (low, high), None for no bound: {"age": (0, None)}.
        draws: S, for tables with recorded numbers.
        random_state: of the validation part, initial weights, batches and noise.
        device: where it is trained and scored.

    Attributes:
        flow_: the whole `Flow`, log densities in the units of the table; float64.
        columns_: the `Columns` in it.
        context_: the `Context` that turns columns to condition on into numbers, or None.
        record_: the course of the training.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

    Raises:
        ValueError: from fit: missing and infinite cells, constant columns, copies of columns, text that is not named as
            context, all by name.

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

    def __init__(
        self,
        flow: Named | Recipe = DEFAULT.flow,
        *,
        layers: int = DEFAULT.layers,
        hidden: Sequence[int] = DEFAULT.hidden,
        bins: int = DEFAULT.bins,
        epochs: int = DEFAULT.epochs,
        batch_size: int = DEFAULT.batch_size,
        learning_rate: float = DEFAULT.learning_rate,
        weight_decay: float = DEFAULT.weight_decay,
        patience: int = DEFAULT.patience,
        validation_fraction: float = DEFAULT.validation_fraction,
        columns: Mapping[str, Kind] | Kind = "auto",
        bounds: Mapping[str, Bounds] | None = None,
        draws: int = DEFAULT.draws,
        random_state: Any = None,
        device: str = DEFAULT.device,
    ) -> None:
        self.flow = flow
        self.layers = layers
        self.hidden = hidden
        self.bins = bins
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.columns = columns
        self.bounds = bounds
        self.draws = draws
        self.random_state = random_state
        self.device = device

    # -- training --------------------------------------------------------------------------------------

    def fit(
        self,
        X: Any,
        y: Any = None,
        context: Any = None,
        sample_weight: Any = None,
        *,
        on_epoch: Callable[[Epoch], None] | None = None,
    ) -> FlowDensity:
        """Fit the density of the rows of X (N, D), or of X given context (N, ...), a table whose text is categories.

        A row of weight w counts as w rows do. Ctrl-C keeps the best weights so far. y is not used.
        """
        task = self._prepare(X, context, sample_weight)
        told = None if on_epoch is None else lambda epoch, _: on_epoch(epoch)
        columns = self.columns_.to(self.device)
        objective = _Objective(columns, self.context_ is not None, sample_weight is not None)
        self.record_ = fit(task.learner, objective, task.train, task.validation, task.config, on_epoch=told)
        learner = task.learner.cpu().double()
        self.flow_ = Flow(learner.base, Compose([learner.transform, Inverse(columns.cpu())])).eval()
        return self

    def rehearse(self, X: Any, context: Any = None, sample_weight: Any = None) -> None:
        """Raise what `fit` would raise for these data and settings, without training."""
        self._prepare(X, context, sample_weight)

    def _prepare(self, X: Any, context: Any, sample_weight: Any) -> _Task:
        """All of fit but the training."""
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"expected validation_fraction in (0, 1), got {self.validation_fraction}")
        if self.draws < 1:
            raise ValueError(f"expected draws of at least 1, got {self.draws}")
        check_device(self.device)
        if torch.device(self.device).type == "mps":
            raise ValueError("expected device as cpu or cuda, got 'mps', which has no float64")
        x = self._numbers(X, reset=True)
        names = self.get_feature_names_out().tolist()
        rng = check_random_state(self.random_state)
        self.seed_ = int(rng.randint(2**31 - 1))
        c = weights = self.context_ = None
        if context is not None:
            table = _table(context, len(x))
            self.context_ = Context.of(table)
            c = self.context_.encode(table)
        if sample_weight is not None:
            weights = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
            kept = weights > 0
            x, c, weights = x[kept], None if c is None else c[kept], weights[kept] / weights[kept].mean()
        if len(x) < 2:
            raise ValueError(f"expected at least two rows of a weight above 0, got n_samples={len(x)}; bring more data")
        self.columns_ = detect(x, names, self.columns, self.bounds, self.seed_)
        check_columns(x, names, self.columns_.quantised)
        parts = [_tensor(x), *(torch.from_numpy(part).float() for part in (c, weights) if part is not None)]
        order = torch.from_numpy(rng.permutation(len(x)))
        held_out = min(max(1, round(self.validation_fraction * len(x))), len(x) - 1)
        validation, train = (tuple(part[rows] for part in parts) for rows in (order[:held_out], order[held_out:]))
        flow, linear = self._recipe(c), _gaussian(self.columns_, parts[0], weights, self.seed_).float()
        rows = len(x) - held_out
        config = FitConfig(
            epochs=self.epochs,
            batch_size=min(self.batch_size, rows, max(32, rows // 20)),
            optimizer="adam",
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            ema=EMA,
            patience=self.patience,
            seed=self.seed_,
            device=self.device,
        )
        return _Task(Flow(flow.base, Compose([flow.transform, linear])), train, validation, config)

    def _recipe(self, c: Array | None) -> Flow:
        """The flow, whose initial weights the seed decides."""
        D, C = self.n_features_in_, 0 if c is None else c.shape[1]
        if callable(self.flow):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed_)
                flow = self.flow(D, C)
            if not isinstance(flow, Flow) or (flow.features, flow.context) != (D, C):
                raise ValueError(f"expected a recipe (features, context) -> Flow for {D} and {C}, got {flow!r}")
            return flow.float()
        spline = RationalQuadraticSpline(self.bins)
        shared: dict[str, Any] = {"layers": self.layers, "hidden": self.hidden, "seed": self.seed_}
        match self.flow:
            case "nsf":
                return NSF(D, C, univariate=spline, **shared)
            case "coupling":
                return Coupling(D, C, univariate=spline, **shared)
            case "maf":
                return MAF(D, C, **shared)
            case "iaf":
                return IAF(D, C, **shared)
        raise ValueError(f"expected flow as one of {', '.join(get_args(Named))}, or a recipe, got {self.flow!r}")

    # -- input -----------------------------------------------------------------------------------------

    def _numbers(self, X: Any, *, reset: bool) -> Array:
        """X as (N, D) float64, every cell finite."""
        _check_text(X)
        least = 2 if reset else 1
        x: Array = validate_data(
            self, X, reset=reset, dtype=np.float64, ensure_all_finite=False, ensure_min_samples=least
        )
        check_cells(x, self.get_feature_names_out().tolist())
        return x

    def get_feature_names_out(self, input_features: Any = None) -> Array:
        """The names of the columns: feature_names_in_, or x0, x1, ..."""
        names = getattr(self, "feature_names_in_", None)
        return np.array([f"x{i}" for i in range(self.n_features_in_)], dtype=object) if names is None else names

    def _encode(self, context: Any, rows: int | None) -> Tensor | None:
        """(rows, C), or None."""
        if (context is None) != (self.context_ is None):
            wanted = "no context" if self.context_ is None else f"a context of the columns {self.context_.names}"
            raise ValueError(f"expected {wanted}, as in fit, got {'none' if context is None else 'one'}")
        if self.context_ is None:
            return None
        return torch.from_numpy(self.context_.encode(_table(context, rows))).to(self.device)

    # -- what it is for --------------------------------------------------------------------------------

    def score_samples(self, X: Any, context: Any = None) -> Array:
        """log p of each row of X, (N,), in nats, with densities per unit of the columns; see the class."""
        check_is_fitted(self)
        return self.score_checked(self._numbers(X, reset=False), context)

    @torch.no_grad()
    def score_checked(self, X: Array, context: Any = None) -> Array:
        """`score_samples` of an array (N, D) of finite float64, its columns in the order of training: not looked at."""
        x = _tensor(X)
        c = self._encode(context, len(x))
        flow, columns = self.flow_.to(self.device), self.columns_
        points = self._points()
        step = max(1, CHUNK // (x.shape[1] * (1 if points is None else len(points))))
        scores = []
        for first in range(0, len(x), step):
            rows = x[first : first + step].to(self.device)
            given = None if c is None else c[first : first + step]
            scores.append(_log_density(flow, columns, rows, given, points).double().cpu())
        flow.cpu()
        return torch.cat(scores).numpy()

    def _points(self) -> Tensor | None:
        """S points (S, D) in the cells; 0 for columns without, and None where no column has them."""
        quantised = self.columns_.quantised
        if not quantised:
            return None
        sobol = torch.quasirandom.SobolEngine(len(quantised), scramble=True, seed=self.seed_)
        points = torch.zeros(self.draws, self.n_features_in_, dtype=torch.float64)
        points[:, quantised] = sobol.draw(self.draws, dtype=torch.float64)
        return points.to(self.device)

    def score(self, X: Any, y: Any = None, context: Any = None) -> float:
        """The mean of `score_samples`, nats a row, as that of GaussianMixture. y is not used."""
        return float(self.score_samples(X, context).mean())

    @torch.no_grad()
    def sample(self, n: int = 1, context: Any = None, random_state: Any = None) -> Array:
        """Draw n rows, (n, D); given context, of one row or of n, one for each of its rows."""
        check_is_fitted(self)
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise ValueError(f"expected n as a whole number of at least 1, got {n!r}")
        c = self._encode(context, None)
        if c is not None and len(c) not in (1, n):
            raise ValueError(f"expected a context of one row or of n={n} rows, got {len(c)}")
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        flow, step = self.flow_.to(self.device), max(1, CHUNK // self.n_features_in_)
        drawn = []
        cuda = list(range(torch.cuda.device_count())) if self.device.startswith("cuda") else []
        with torch.random.fork_rng(cuda):
            torch.manual_seed(seed)
            for first in range(0, n, step):
                rows = min(step, n - first)
                if c is None:
                    x = flow().sample((rows,))
                else:
                    given = c.expand(n, -1)[first : first + rows]
                    x = flow(given).sample()
                drawn.append(self.columns_.snap(x).double().cpu())
        flow.cpu()
        return torch.cat(drawn).numpy()

    @torch.no_grad()
    def noise(self, X: Any, context: Any = None, random_state: Any = None) -> Array:
        """eps (N, D) that the flow carries to the rows of X, recorded numbers put at random within their cells.

        N(0, I) where the density is right: Phi(eps) is then uniform, column by column, which shows where it is not.
        """
        check_is_fitted(self)
        x = _tensor(self._numbers(X, reset=False))
        c = self._encode(context, len(x))
        rng = check_random_state(random_state)
        flow, step, parts = self.flow_.to(self.device), max(1, CHUNK // x.shape[1]), []
        for first in range(0, len(x), step):
            rows = x[first : first + step].to(self.device)
            start, width = self.columns_.cells(rows)
            inside = start + width * torch.from_numpy(rng.random_sample(rows.shape)).to(rows)
            given = None if c is None or not flow.transform.context else c[first : first + step]
            parts.append(flow.transform.inverse(inside, given)[0].double().cpu())
        flow.cpu()
        return torch.cat(parts).numpy()

    # -- files -----------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors, which `cf.load` reads as a flow, and density.json. Never pickle."""
        check_is_fitted(self)
        settings = {name: value for name, value in self.get_params().items() if name != "random_state"}
        settings["flow"] = self.flow if isinstance(self.flow, str) else getattr(self.flow, "__name__", "a recipe")
        described = {
            "format": FORMAT,
            "settings": settings,
            "names": getattr(self, "feature_names_in_", np.array([])).tolist() or None,
            "features": self.n_features_in_,
            "context": None if self.context_ is None else self.context_.columns,
            "seed": self.seed_,
        }
        text = json.dumps(described, indent=2) + "\n"
        save(self.flow_, Path(folder) / MODEL)
        (Path(folder) / DESCRIPTION).write_text(text)

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> FlowDensity:
        """Read what `save` wrote: the same scores and samples.

        Raises:
            FileNotFoundError: a file of the two is not there.
            ValueError: the files are not those of a FlowDensity.
        """
        path = Path(folder) / DESCRIPTION
        if not path.is_file():
            raise FileNotFoundError(f"expected {path}, which FlowDensity.save writes, got no such file")
        flow = load(Path(folder) / MODEL)
        try:
            described = json.loads(path.read_text())
            settings = described["settings"] | {"hidden": tuple(described["settings"]["hidden"]), "device": device}
            density = cls(**settings)
            density.n_features_in_ = int(described["features"])
            density.seed_ = int(described["seed"])
            if described["names"]:
                density.feature_names_in_ = np.array(described["names"], dtype=object)
            density.context_ = None if described["context"] is None else Context.read(described["context"])
            density.flow_ = flow
            density.columns_ = list(flow.transform)[-1].transform
            if not isinstance(density.columns_, Columns):
                raise TypeError(f"its last layer is {density.columns_!r}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"expected {folder} to hold a FlowDensity as save writes it, got: {error!r}") from None
        return density


class _Task(NamedTuple):
    """What is trained on what, and how. Parts are rows, and their context and weights where there are any."""

    learner: Flow  # float32, from z to noise
    train: tuple[Tensor, ...]
    validation: tuple[Tensor, ...]
    config: FitConfig


@dataclass(frozen=True)
class _Objective:
    """log q of rows whose recorded numbers are put at random within their cells, times the weights of the rows."""

    columns: Columns
    has_context: bool
    has_weights: bool

    def __call__(self, flow: Flow, batch: tuple[Tensor, ...]) -> Tensor:
        x = batch[0]
        start, width = self.columns.cells(x)
        z, log_det = self.columns(start + width * torch.rand_like(x))
        log_q = flow(batch[1] if self.has_context else None).log_prob(z.float())
        terms: Tensor = log_q + log_det + self.columns.log_mass(width)
        return terms * batch[-1] if self.has_weights else terms


def _tensor(x: Array) -> Tensor:
    """x as a tensor; torch wants memory that may be written to."""
    return torch.from_numpy(np.require(x, requirements=["C", "W"]))


def _log_density(flow: Flow, columns: Columns, x: Tensor, c: Tensor | None, points: Tensor | None) -> Tensor:
    """log p of rows (B, D): the mean of the density over S points of their cells, times those widths that count."""
    if points is None:
        log_p = flow(c).log_prob(x)
    else:
        start, width = columns.cells(x)
        log_q = flow(c).log_prob(start + width * points[:, None])
        log_p = torch.logsumexp(log_q, 0) - math.log(len(points)) + columns.log_mass(width)
    # NaN comes of numbers that overflow, far beyond all data.
    return torch.where(columns.inside(x) & ~log_p.isnan(), log_p, -math.inf)


def _gaussian(columns: Columns, x: Tensor, weights: Array | None, seed: int) -> Triangular:
    """The linear layer: N(mean, L L^T) fitted to z, its correlations shrunk as by Ledoit and Wolf 2004."""
    start, width = columns.cells(x)
    noise = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
    z = columns(start + width * noise)[0].numpy()
    mean = np.average(z, axis=0, weights=weights)
    D = z.shape[1]
    if D > WHITENED:
        covariance = np.diag(np.average((z - mean) ** 2, axis=0, weights=weights))
    else:
        covariance = np.atleast_2d(np.cov(z, rowvar=False, bias=True, aweights=weights))
        shrunk = max(float(ledoit_wolf_shrinkage(z)), 1e-6)
        covariance = (1 - shrunk) * covariance + shrunk * np.diag(np.diagonal(covariance))
    diagonal = np.diagonal(covariance)
    covariance = covariance + np.diag(np.where(diagonal > 0, 1e-9 * diagonal, 1.0))
    return Triangular(torch.from_numpy(mean), torch.from_numpy(np.linalg.cholesky(covariance)))


def _check_text(X: Any) -> None:
    """Raise ValueError for the columns of a data frame that hold no numbers, by name."""
    if not (hasattr(X, "dtypes") and hasattr(X, "columns") and hasattr(X, "iloc")):
        return
    text = [
        name
        for name, dtype in zip(X.columns, X.dtypes, strict=True)
        if getattr(dtype, "kind", "O") not in "buif" and not is_numeric(X[name].to_numpy())
    ]
    if text:
        raise ValueError(
            f"expected numbers in every column, got text or categories in {', '.join(map(repr, text))}; give them as "
            "context, fit(X, context=table[names]), encode them as numbers, or drop them"
        )


def _table(context: Any, rows: int | None) -> dict[str, Array]:
    """Columns (N,) by name, of a data frame, a series or an array."""
    if hasattr(context, "iloc") and hasattr(context, "columns"):
        table = {str(name): context[name].to_numpy() for name in context.columns}
    elif hasattr(context, "iloc"):
        table = {str("c0" if context.name is None else context.name): context.to_numpy()}
    elif isinstance(context, dict):
        table = {str(name): np.asarray(column) for name, column in context.items()}
    else:
        array = np.asarray(context)
        array = array[:, None] if array.ndim == 1 else array
        if array.ndim != 2:
            raise ValueError(f"expected context of shape (N,) or (N, C), got {array.shape}")
        table = {f"c{i}": column for i, column in enumerate(array.T)}
    sizes = {len(column) for column in table.values()}
    if rows is not None and sizes != {rows}:
        raise ValueError(f"expected as many rows in context as in X, {rows}, got {sorted(sizes)}")
    return table
