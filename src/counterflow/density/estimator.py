"""FlowDensity: the density of a table, as scikit-learn's estimators are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

from counterflow.checks import check_device
from counterflow.density.config import DESCRIPTION, MODEL, DensityConfig, RecipeName
from counterflow.density.context import Context
from counterflow.density.detection import Bounds, Kind, detect
from counterflow.density.inputs import check_text, named_columns
from counterflow.density.learner import preprocessing, torch_init, with_kernels
from counterflow.density.validation import check_columns, check_sizes
from counterflow.flows.bases import KernelMixture
from counterflow.flows.flow import Flow
from counterflow.flows.mixture import FlowMixture
from counterflow.flows.recipes import IAF, MAF, NSF, Coupling
from counterflow.io.data.cells import check_cells
from counterflow.io.json import MAX_QUOTED, from_json, read_json, write_json
from counterflow.io.serialization import load, save
from counterflow.random import seeded
from counterflow.training.checkpoints import Checkpoints
from counterflow.training.config import FitConfig
from counterflow.training.distributed import Workers
from counterflow.training.fit import fit
from counterflow.training.history import History, OnEpoch, OnStep
from counterflow.transforms.compose import Compose, Inverse
from counterflow.transforms.table.table import TableTransform
from counterflow.univariate.spline import RationalQuadraticSpline

try:
    from sklearn.base import BaseEstimator, DensityMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f"expected scikit-learn for FlowDensity, got: {error}; pip install 'counterflow[data]'"
    ) from error

Array = np.ndarray[Any, Any]
Recipe = Callable[[int, int], Flow]

FORMAT = 1  # of density.json
HINTS = get_type_hints(DensityConfig) | {  # of the settings in it
    "flow": str,  # "a recipe", too
    "columns": str | dict[str, str],
    "bounds": dict[str, tuple[float | None, float | None]] | None,
}
WHITENED = 256  # columns up to which the linear layer has a matrix: its D^2 numbers stand in the file's header
CHUNK = 1 << 16  # numbers scored at a time: what a spline keeps of them stays within some tens of megabytes


class FlowDensity(DensityMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """The density of the rows of a table, by a normalizing flow.

        x --columns--> z --curves, linear--> about N(0, I) --flow--> eps ~ N(0, I)
        log q_m(x) = log N(eps) + sum of the log_det,    q(x) = (1/M) sum_m q_m(x)

    The columns' maps are found from the data (`counterflow.columns.detect`). Columns that are far from normal pass a
    curve through their quantiles (`cf.transforms.QuantileSpline`). The linear layer is the Gaussian fitted to what comes then, shrunk
    as by Ledoit and Wolf, with all correlations or with none: the first member is trained with both, and what does
    better on its validation part is taken. The flow starts at the identity and is trained from there by `cf.fit`; the
    weights that did best on the validation part are kept. M members, which differ in initial weights and validation
    part, are averaged. All is in the units of the table, so densities are per unit of the columns and need no scaler
    before. It is trained in float32, and kept and scored in float64, so that a row's score does not depend on which
    rows stand beside it.

    Where rows come twice or nearly so, kernels at the training rows, seen through the flow, gain: where it is 0.1
    nats a row on the validation part, `cf.bases.KernelMixture` takes the place of N(0, I). The model then holds these rows,
    readable by whoever has it; kernels=False forbids it, and `holds_rows_` says whether it is so.

    Columns of whole numbers and of few values have masses: the score counts log P(the value). Numbers recorded to so
    many decimals have the density of their cell on average. For K such columns, with S = cell_points points u_s of a
    Sobol sequence in [0, 1]^K that is scrambled by the seed and the same for all rows,

        log p(x) = log (1/S) sum_s q(start + width u_s) + sum over the columns with masses of log width

    and, as each point is uniform, its mean over seeds is a lower bound of the log of the mass or mean density of
    the flow q. Training maximises log q at one uniform point of each cell, a lower bound as well. Samples are
    put back to the values that are recorded. Rows outside of the support (beyond bounds, beyond the values of an
    ordinal column) have log density -inf.

    Args:
        flow: "nsf", "maf", "coupling", "iaf", or a recipe (features, context) -> Flow, which gets whitened data.
        layers, hidden, bins: of the named flows; bins for "nsf" and "coupling".
        members: M, the number of flows; one makes `flow_` a plain `Flow`, in a third of the time.
        kernels: whether they are tried; never for conditional densities, weighted rows or more than 20,000 rows.
        epochs, batch_size, learning_rate, weight_decay, ema, patience: of the training; see `DensityConfig`.
        validation_fraction: of the rows, at random; at least one row.
        columns: "auto", or the kind of columns by name: "auto", "real", "integer" or "ordinal". Columns of
            arrays are called x0, x1, ...
        bounds: by name, (low, high), None for no bound: {"age": (0, None)}.
        cell_points: S, for tables with recorded numbers.
        random_state: of the validation part, initial weights, batches and noise.
        device: where it is trained and scored.

    Attributes:
        flow_: the whole `FlowMixture`, or `Flow`, log densities in the units of the table; float64.
        columns_: the `TableTransform` in it.
        context_: the `Context` that turns columns to condition on into numbers, or None.
        records_: the courses of all trainings; the first two are of the first member, with correlations and without.
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
        self.cell_points = cell_points
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
        on_epoch: OnEpoch | None = None,
        on_step: OnStep | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> FlowDensity:
        """Fit the density of the rows of X (N, D), or of X given context (N, ...), a table whose text is categories.

        A row of weight w counts as w rows do. Ctrl-C keeps the best weights of the members so far. The callbacks
        are on_epoch(task, epoch) and on_step(task, done, total); the tasks are "member 1",
        "member 1 without correlations", "member 2", ...
        checkpoints is where to keep what it takes to go on after a kill, as `cf.fit` does: a folder for each training,
        with a random_state that is a number. y is not used.
        """
        if checkpoints is not None and not isinstance(self.random_state, int | np.integer):
            raise ValueError(
                f"expected random_state as a whole number, with which a training can go on, got {self.random_state!r}"
            )
        table = self._prepare(X, context, sample_weight)
        columns = self.columns_.to(self.device)
        objective = _Objective(columns, self.context_ is not None, sample_weight is not None)
        self.records_: list[History] = []

        def train(member: int, correlated: bool) -> Flow:
            """Train one more flow."""
            task = self._task(table, member, correlated)
            second = not correlated and member == 0 and len(self.records_) == 1
            name = f"member {member + 1}" + (" without correlations" if second else "")
            record = fit(
                task.learner,
                objective,
                task.train,
                task.validation,
                task.config,
                on_step=on_step,
                on_epoch=on_epoch,
                checkpoints=None if checkpoints is None else checkpoints.for_task(name),
                task=name,
            )
            self.records_.append(record)
            if not self.kernels or len(task.train) > 1:
                return task.learner
            return with_kernels(task.learner, self.columns_, task.train[0], task.validation[0], task.config.seed)

        def goes_on() -> bool:
            return self.records_[-1].stopped != "interrupted"

        correlated = self.trainings > self.members
        learners = [train(0, correlated)]
        if correlated and goes_on():
            other = train(0, False)
            correlated = _reached(self.records_[1]) <= _reached(self.records_[0])
            learners = learners if correlated else [other]
        for member in range(1, self.members):
            if goes_on():
                learner = train(member, correlated)
                learners += [learner] if self.records_[-1].best is not None else []
        flows = [_whole(learner, columns.cpu()) for learner in learners]
        self.flow_ = flows[0] if len(flows) == 1 else FlowMixture(flows).eval()
        return self

    @property
    def holds_rows_(self) -> bool:
        """Whether the model holds training rows, as kernels."""
        return any(isinstance(member.base, KernelMixture) for member in _members(self.flow_))

    @property
    def trainings(self) -> int:
        """How many flows `fit` trains: the members, and the first one a second time where there are correlations."""
        return self.members + (1 < self.n_features_in_ <= WHITENED)

    def rehearse(self, X: Any, context: Any = None, sample_weight: Any = None) -> None:
        """Raise what `fit` would raise for these data and settings, without training."""
        self._prepare(X, context, sample_weight)

    def _prepare(self, X: Any, context: Any, sample_weight: Any) -> _Rows:
        """The rows that members are trained on; sets columns_, context_ and seed_."""
        if isinstance(self.members, bool) or self.members != int(self.members) or self.members < 1:
            raise ValueError(f"expected members as a whole number of at least 1, got {self.members!r}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"expected validation_fraction in (0, 1), got {self.validation_fraction}")
        if self.cell_points < 1:
            raise ValueError(f"expected cell_points to be at least 1, got {self.cell_points}")
        check_device(self.device)
        if torch.device(self.device).type == "mps":
            raise ValueError("expected device as cpu or cuda, got 'mps', which has no float64")
        x = self._numbers(X, reset=True)
        names = self.get_feature_names_out().tolist()
        rng = check_random_state(self.random_state)
        self.seed_ = int(Workers.current().broadcast_value(rng.randint(2**31 - 1)))
        c = weights = self.context_ = None
        if context is not None:
            table = named_columns(context, len(x))
            self.context_ = Context.of(table)
            c = self.context_.encode(table)
        if sample_weight is not None:
            weights = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
            kept = weights > 0
            x, c, weights = x[kept], None if c is None else c[kept], weights[kept] / weights[kept].mean()
        if len(x) < 2:
            raise ValueError(f"expected at least two rows of a weight above 0, got n_samples={len(x)}; bring more data")
        check_sizes(x, names)
        self.columns_ = detect(x, names, self.columns, self.bounds, self.seed_)
        check_columns(x, names, self.columns_.quantized)
        parts = [torch.from_numpy(part).float() for part in (c, weights) if part is not None]
        rows = _Rows((_tensor(x), *parts), 0 if c is None else c.shape[1], weights)
        self._task(rows, 0, False)  # which refuses settings that no training could have
        return rows

    def _task(self, table: _Rows, member: int, correlated: bool) -> _Task:
        """What a member is trained on: its validation part, its first weights, and what stands before the flow."""
        seed, N = self.seed_ + 1009 * member, len(table.parts[0])
        order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
        held_out = min(max(1, round(self.validation_fraction * N)), N - 1)
        validation, train = (tuple(p[rows] for p in table.parts) for rows in (order[:held_out], order[held_out:]))
        weights = None if table.weights is None else table.weights[order[held_out:].numpy()]
        flow = self._recipe(table.context, seed)
        before = preprocessing(self.columns_, train[0], weights, seed, correlated).float()
        rows, processes = N - held_out, Workers.current().size
        batch_size = min(self.batch_size, rows, max(32, rows // 20))
        config = FitConfig(
            epochs=self.epochs,
            batch_size=max(1, batch_size - batch_size % processes),
            optimizer="adam",
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            ema=self.ema,
            patience=self.patience,
            seed=seed,
            device=self.device,
        )
        return _Task(Flow(flow.base, Compose([flow.transform, before])), train, validation, config)

    def _recipe(self, C: int, seed: int) -> Flow:
        """The flow, whose initial weights the seed decides."""
        D = self.n_features_in_
        with seeded(seed):
            if not callable(self.flow):
                return torch_init(self._named(D, C))
            flow = self.flow(D, C)
            if not isinstance(flow, Flow) or (flow.features, flow.context) != (D, C):
                raise ValueError(f"expected a recipe (features, context) -> Flow for {D} and {C}, got {flow!r}")
            return flow.float()

    def _named(self, D: int, C: int) -> Flow:
        spline = RationalQuadraticSpline(self.bins)
        shared: dict[str, Any] = {"layers": self.layers, "hidden": self.hidden}
        match self.flow:
            case "nsf":
                return NSF(D, C, univariate=spline, **shared)
            case "coupling":
                return Coupling(D, C, univariate=spline, **shared)
            case "maf":
                return MAF(D, C, **shared)
            case "iaf":
                return IAF(D, C, **shared)
        raise ValueError(f"expected flow as one of {', '.join(get_args(RecipeName))}, or a recipe, got {self.flow!r}")

    # -- input -----------------------------------------------------------------------------------------

    def _numbers(self, X: Any, *, reset: bool) -> Array:
        """X as (N, D) float64, every cell finite."""
        check_text(X)
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
        return torch.from_numpy(self.context_.encode(named_columns(context, rows))).to(self.device)

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
        quantized = self.columns_.quantized
        if not quantized:
            return None
        sobol = torch.quasirandom.SobolEngine(len(quantized), scramble=True, seed=self.seed_)
        points = torch.zeros(self.cell_points, self.n_features_in_, dtype=torch.float64)
        points[:, quantized] = sobol.draw(self.cell_points, dtype=torch.float64)
        return points.to(self.device)

    def score(self, X: Any, y: Any = None, context: Any = None) -> float:
        """The mean of `score_samples`, nats a row, as that of GaussianMixture. y is not used."""
        return float(self.score_samples(X, context).mean())

    def sample(self, n: int = 1, context: Any = None, random_state: Any = None) -> Array:
        """Draw n rows, (n, D); given context, of one row or of n, one for each of its rows."""
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        with seeded(seed, cuda=self.device.startswith("cuda")):
            return self.draw(n, context)

    @torch.no_grad()
    def draw(self, n: int, context: Any = None) -> Array:
        """`sample` with the noise of torch's global generator, so that no two calls have the same."""
        check_is_fitted(self)
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise ValueError(f"expected n as a whole number of at least 1, got {n!r}")
        c = self._encode(context, None)
        if c is not None and len(c) not in (1, n):
            raise ValueError(f"expected a context of one row or of n={n} rows, got {len(c)}")
        flow, step = self.flow_.to(self.device), max(1, CHUNK // self.n_features_in_)
        drawn = []
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
        Of a mixture, the part that a row came from is drawn in proportion to its density there.
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
            given = None if c is None else c[first : first + step]
            log_q = torch.stack([member(given).log_prob(inside) for member in _members(flow)])
            u = torch.from_numpy(rng.random_sample(len(rows))).to(log_q)
            picked = (log_q.softmax(0).cumsum(0) < u).sum(0).clamp_max(len(log_q) - 1)
            with seeded(int(rng.randint(2**31 - 1)), cuda=self.device.startswith("cuda")):
                each = [_noise_of(member, inside, given) for member in _members(flow)]
            parts.append(torch.stack(each)[picked, torch.arange(len(rows))].double().cpu())
        flow.cpu()
        return torch.cat(parts).numpy()

    # -- files -----------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors, which `cf.load` reads as a flow or a mixture, and density.json. Never pickle."""
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
        save(self.flow_, Path(folder) / MODEL)
        write_json(Path(folder) / DESCRIPTION, described)

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
        flow, described = load(Path(folder) / MODEL), read_json(path, "what FlowDensity.save writes")
        try:
            settings = {name: from_json(value, HINTS[name], name) for name, value in described["settings"].items()}
            density = cls(**settings | {"device": device})
            density.n_features_in_ = from_json(described["features"], int, "features")
            density.seed_ = from_json(described["seed"], int, "seed")
            names = from_json(described["names"], tuple[str, ...] | None, "names")
            if names:
                density.feature_names_in_ = np.array(names, dtype=object)
            density.context_ = None if described["context"] is None else Context.read(described["context"])
            density.flow_ = flow
            # a chain can be gone through; where it is none, that is the TypeError below
            density.columns_ = list(_members(flow)[0].transform)[-1].transform  # type: ignore[call-overload]
            if not isinstance(density.columns_, TableTransform):
                raise TypeError(f"its last layer is {density.columns_!r}")
            context = 0 if density.context_ is None else density.context_.size
            came = (density.n_features_in_, len(names or range(flow.features)), context)
            if came != (flow.features, flow.features, flow.context):
                raise ValueError(f"features, names and context of {came} for a flow of {flow.features, flow.context}")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(
                f"expected {folder} to hold a FlowDensity as save writes it, got: {error!r:.{MAX_QUOTED}}"
            ) from None
        return density


class _Rows(NamedTuple):
    """All rows: x, and their context and weights where there are any."""

    parts: tuple[Tensor, ...]
    context: int  # C
    weights: Array | None


class _Task(NamedTuple):
    """What is trained on what, and how."""

    learner: Flow  # float32, from z to noise
    train: tuple[Tensor, ...]
    validation: tuple[Tensor, ...]
    config: FitConfig


@dataclass(frozen=True)
class _Objective:
    """log q of rows whose recorded numbers are put at random within their cells, times the weights of the rows."""

    columns: TableTransform
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


def _log_density(
    flow: Flow | FlowMixture, columns: TableTransform, x: Tensor, c: Tensor | None, points: Tensor | None
) -> Tensor:
    """log p of rows (B, D): the mean of the density over S points of their cells, times those widths that count."""
    if points is None:
        log_p = flow(c).log_prob(x)
    else:
        start, width = columns.cells(x)
        log_q = flow(c).log_prob(start + width * points[:, None])
        log_p = torch.logsumexp(log_q, 0) - math.log(len(points)) + columns.log_mass(width)
    # NaN comes of numbers that overflow, far beyond all data.
    return torch.where(columns.inside(x) & ~log_p.isnan(), log_p, -math.inf)


def _noise_of(member: Flow, x: Tensor, c: Tensor | None) -> Tensor:
    """eps (B, D) that a member carries to rows x, N(0, I) where its base is one of kernels as well."""
    eps = member.transform.inverse(x, c if member.transform.context else None)[0]
    return member.base.standardized(eps) if isinstance(member.base, KernelMixture) else eps


def _reached(record: History) -> float:
    """On the validation part."""
    return -math.inf if record.best is None else record.best.validation


def _members(flow: Flow | FlowMixture) -> list[Flow]:
    return list(flow.flows) if isinstance(flow, FlowMixture) else [flow]  # type: ignore[arg-type]  # a ModuleList


def _whole(learner: Flow, columns: TableTransform) -> Flow:
    """A trained flow and what stands before it, in float64 and in the units of the table."""
    learner = learner.cpu().double()
    return Flow(learner.base, Compose([learner.transform, Inverse(columns)])).eval()
