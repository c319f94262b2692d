"""TableDensity: a fitted density of the rows of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.checks import positive, require
from counterflow.density.categories import UNSEEN, CategoryColumn
from counterflow.density.config import CATEGORIES, DESCRIPTION, MODEL
from counterflow.density.context import ContextEncoder
from counterflow.density.inputs import columns_by_name
from counterflow.density.left_out import LeftOut, restored
from counterflow.flows.bases import KernelMixture
from counterflow.flows.categories import CategoryNetwork
from counterflow.flows.flow import Flow
from counterflow.flows.mixture import FlowMixture
from counterflow.io.data.types import encode
from counterflow.io.json import MAX_QUOTED, from_json, read_json, write_json
from counterflow.io.serialization import load, save
from counterflow.random import seeded
from counterflow.transforms.compose import Inverse
from counterflow.transforms.constant import Permute
from counterflow.transforms.table.circular import LIFTS
from counterflow.transforms.table.table import TableTransform

Array = np.ndarray[Any, Any]

FORMAT = 2  # version of density.json
CHUNK = 1 << 16  # numbers scored in one step: the tensors that a spline keeps for them take tens of megabytes


class TableDensity:
    """Density of the rows of a table: the maps of its columns, the encoder of its context, and a flow.

        x --columns--> z --quantile splines, whitening, layers of the flow--> eps ~ N(0, I)
        log q_m(x) = log N(eps; 0, I) + sum of the log_dets,    q(x) = (1/M) sum_m q_m(x)

    Each of the M members of the flow is Flow(base, Inverse(to_noise)), whose to_noise begins with the columns. Rows x
    are (N, D) float64 arrays in the units of the table; densities are per unit of the columns.

    Columns of categories hold codes. Their joint distribution comes first, and the numbers x follow given their
    indicators, which are the first part of the context of the flow:

        log p(k, x | c) = log p(k | c) + log q(x | k, c)

    Numbers that fill a cell, such as whole numbers, have the density

        log p(x) = log (1/S) sum_s q(start + width u_s) + sum of log width over the columns whose mass is counted,

    with S points u_s of a Sobol sequence in [0, 1]^K over the K columns with cells, scrambled by the seed and equal for
    all rows. As each point is uniform, the mean of log p over seeds is a lower bound of the log of the mass, or of the
    mean density, that q gives to the cell. The density of circular columns is summed over the lifts of their numbers,
    x + k P; see `CircularColumn`. Rows outside of the support, and rows with a category that training did not
    see, have log density -inf.

    Args:
        flow: the density q of continuous rows, a `Flow` or `FlowMixture` in float64.
        names: the names of the D columns, numbers and categories; None for x0, x1, ...
        context: the encoder of the columns that the density is conditioned on; None without context.
        seed: seed of the points in cells.
        cell_points: S.
        device: where rows are scored and drawn.
        settings: the settings of the fit, which are saved with the density.
        types: the recorded types of columns by name, such as "int64" or "date32[day]"; see `counterflow.io.data.types`.
        left_out: columns of the table that the D columns determine.
        categories: the columns of categories among all columns of the table.
        network: their joint distribution, those left out excepted; None without categories.

    Attributes:
        columns: the `TableTransform` of the flow, for the columns of numbers.
        named: True if names were given.
        kept: the places of the D columns among all columns of the table, those left out included.

    Raises:
        ValueError: names or a context that do not fit the flow, a flow that does not begin with columns, or cell_points
            that is not a whole number of at least 1.
    """

    categories: Mapping[str, CategoryColumn] = MappingProxyType({})  # defaults for densities that were pickled before
    network: CategoryNetwork | None = None

    def __init__(
        self,
        flow: Flow | FlowMixture,
        names: Sequence[str] | None = None,
        context: ContextEncoder | None = None,
        *,
        seed: int = 0,
        cell_points: int = 16,
        device: str = "cpu",
        settings: Mapping[str, Any] | None = None,
        types: Mapping[str, str] | None = None,
        left_out: Sequence[LeftOut] = (),
        categories: Sequence[CategoryColumn] = (),
        network: CategoryNetwork | None = None,
    ) -> None:
        self.named = names is not None
        self.left_out = list(left_out)
        places = {each.index for each in left_out}
        sizes = () if network is None else network.sizes
        features = flow.features + len(sizes)
        self.kept = [i for i in range(features + len(places)) if i not in places]
        names = [f"x{i}" for i in self.kept] if names is None else list(names)
        size = sum(sizes) + (0 if context is None else context.size) + self._mask_size(flow.features, features)
        if (len(names), size) != (features, flow.context):
            raise ValueError(
                f"expected {features} names and a context of size {flow.context}, as the flow has, got "
                f"{len(names)} names and a context of size {size}"
            )
        self.names = names
        self.categories = {each.name: each for each in categories}
        found = tuple(len(self.categories[names[i]].values) for i in self.category_places)
        if found != sizes:
            raise ValueError(f"expected columns of {sizes} categories, as the network has, got {found}")
        self.network = network
        self.flow = flow
        self.columns = _columns_of(self.members[0])
        self.context = context
        self.seed = seed
        self.cell_points = positive(cell_points, "cell_points")
        self.device = device
        self.settings = dict(settings or {})
        self.types = dict(types or {})

    @staticmethod
    def _mask_size(numbers: int, columns: int) -> int:
        """Return the size of the part of the flow's context that says which cells are known."""
        return 0

    @property
    def members(self) -> list[Flow]:
        """Flows whose densities are averaged."""
        return list(self.flow.flows) if isinstance(self.flow, FlowMixture) else [self.flow]  # type: ignore[arg-type]

    @property
    def holds_rows(self) -> bool:
        """True if the model holds training rows, as kernels."""
        return any(isinstance(member.base, KernelMixture) for member in self.members)

    @property
    def all_names(self) -> list[str]:
        """Names of all columns of the table, those left out included."""
        names = dict(zip(self.kept, self.names, strict=True)) | {each.index: each.name for each in self.left_out}
        return [names[i] for i in sorted(names)]

    @property
    def category_places(self) -> list[int]:
        """Places of the columns of categories among the D columns."""
        return [i for i, name in enumerate(self.names) if name in self.categories]

    @property
    def category_names(self) -> list[str]:
        """Names of the columns of categories among the D columns."""
        return [self.names[i] for i in self.category_places]

    @property
    def number_places(self) -> list[int]:
        """Places of the columns of numbers among the D columns."""
        return [i for i, name in enumerate(self.names) if name not in self.categories]

    @property
    def kinds(self) -> dict[str, str]:
        """Name of the map of each of the D columns, "category" for those of categories."""
        maps = dict(zip(self.number_places, (column.map for column in self.columns.columns), strict=True))
        return {name: maps.get(i, "category") for i, name in enumerate(self.names)}

    def restored(self, rows: Array) -> Array:
        """Return rows (N, D) with the columns that were left out."""
        return restored(rows, self.left_out)

    def values(self, rows: Array) -> Array:
        """Return rows (N, D) with the columns that were left out, and with categories instead of their codes."""
        every = self.restored(rows)
        if not self.categories:
            return every
        decoded = every.astype(object)
        for i, name in enumerate(self.all_names):
            if name in self.categories:
                decoded[:, i] = self.categories[name].decode(every[:, i])
        return decoded

    def to_arrow(self, rows: Array, typed: bool = True) -> dict[str, Any]:
        """Return the columns of rows (N, D), those left out included, by name: as Arrow arrays of the recorded types.

        Args:
            rows: rows, such as draws.
            typed: whether the types are those of the table; if not, numbers are float64.
        """
        arrow = require("pyarrow", "data", "columns of a table")
        found = {}
        for name, column in zip(self.all_names, self.restored(rows).T, strict=True):
            category = self.categories.get(name)
            type = self.types.get(name, "double") if typed else "double"
            if category is None or not category.is_text:
                numbers = column if category is None else category.decode(column).astype(np.float64)
                found[name] = encode(np.ascontiguousarray(numbers), type)
            else:
                found[name] = arrow.array(category.decode(column), arrow.string())
        return found

    @property
    def noise_names(self) -> list[str]:
        """Names of the columns that the components of the noise come from: the layers of a flow permute them."""
        order = torch.arange(self.flow.features)
        for transform in Inverse(self.members[0].transform).flattened():  # the members permute alike
            if isinstance(transform, Permute):
                order = order[transform.order]
        return [self.names[self.number_places[i]] for i in order.tolist()]

    def encode(self, context: Any, rows: int | None = None, first: int | None = None) -> Array | None:
        """Encode the columns to condition on as (N, C) float64; None for a density without context.

        Args:
            context: a data frame, a series, columns by name, or an array.
            rows: the expected number of rows; None for any.
            first: the number of the first row, if these rows are one batch of a longer table; for errors.

        Raises:
            ValueError: a context that is missing or not expected, or one that does not fit that of training.
        """
        if (context is None) != (self.context is None):
            wanted = "no context" if self.context is None else f"a context of the columns {self.context.names}"
            raise ValueError(f"expected {wanted}, as in fit, got {'none' if context is None else 'one'}")
        if self.context is None:
            return None
        return self.context.encode(columns_by_name(context, rows), first)

    @torch.no_grad()
    def score(self, x: Array, c: Array | None = None) -> Array:
        """Return the log density of each row, (N,), in nats.

        Args:
            x: rows (N, D), float64, finite; this is not checked.
            c: the encoded context (N, C), from `encode`; None without context.
        """
        rows, given = _tensor(x), self._context_tensor(c)
        points = self._cell_points()

        def log_joint(part: slice) -> Tensor:
            return self._log_joint(rows[part].to(self.device), None if given is None else given[part], points)

        return self._in_chunks(len(rows), log_joint, points)

    def _in_chunks(self, rows: int, run: Callable[[slice], Tensor], points: Tensor | None = None) -> Array:
        """Return run(part) for slices of the rows, with the flow on its device; each row may have several points."""
        lifts = len(LIFTS) ** len(self.columns.circular)
        step = max(1, CHUNK // (len(self.names) * lifts * (1 if points is None else len(points))))
        self.flow.to(self.device)
        if self.network is not None:
            self.network.to(self.device)
        done = [run(slice(first, min(first + step, rows))).double().cpu() for first in range(0, rows, step)]
        self.flow.cpu()
        if self.network is not None:
            self.network.cpu()
        return torch.cat(done).numpy()

    def _log_joint(self, rows: Tensor, c: Tensor | None, points: Tensor | None) -> Tensor:
        """Return the log density of rows (B, D) of numbers and codes."""
        x, k = self._split(rows)
        log_p = self._log_density(x, self._given(k, c), points)
        if self.network is None:
            return log_p
        return torch.where((k == UNSEEN).any(-1), -math.inf, log_p + self.network.log_prob(k, c))

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers (B, F) and the codes (B, J) of rows (B, D)."""
        if self.network is None:
            return rows, rows[:, :0]
        return rows[:, self.number_places], rows[:, self.category_places]

    def _given(self, k: Tensor, c: Tensor | None) -> Tensor | None:
        """Return the context of the flow: the indicators of codes (B, J) and the context (B, C)."""
        if self.network is None:
            return c
        indicators = self.network.indicators(k)
        return indicators if c is None else torch.cat([indicators, c], -1)

    def _log_density(self, x: Tensor, c: Tensor | None, points: Tensor | None) -> Tensor:
        """Return log p of rows x (B, D), averaged over points (S, D) of their cells, if any have cells."""
        if points is None and not self.columns.circular:
            log_p = self.flow(c).log_prob(x)
        else:
            at, width = self._points_of(x, points)
            log_q = self.flow(c).log_prob(at)
            S = 1 if points is None else len(points)
            log_p = torch.logsumexp(log_q, (0, 1)) - math.log(S) + self.columns.log_mass(width)
        # The log density is NaN only for numbers far beyond all data, whose images overflow.
        return torch.where(self.columns.inside(x) & ~log_p.isnan(), log_p, -math.inf)

    def _points_of(self, x: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return points in the cells of rows x (B, F), lifted, (L, S, B, F), and the widths of the cells (B, F)."""
        x = self.columns.wrapped(x)
        start, width = self.columns.cells(x)
        at = x[None] if points is None else start + width * points[:, None]
        return at + self.columns.lifts(x)[:, None, None], width

    def _cell_points(self) -> Tensor | None:
        """Return S points (S, D) in [0, 1]^D, zero for columns without cells, or None if no column has cells."""
        quantized = self.columns.quantized
        if not quantized:
            return None
        sobol = torch.quasirandom.SobolEngine(len(quantized), scramble=True, seed=self.seed)
        points = torch.zeros(self.cell_points, self.flow.features, dtype=torch.float64)
        points[:, quantized] = sobol.draw(self.cell_points, dtype=torch.float64)
        return points.to(self.device)

    @torch.no_grad()
    def sample(self, n: int, c: Array | None = None, seed: int | None = None) -> Array:
        """Draw n rows (n, D), rounded to the numbers that the columns record.

        Args:
            n: the number of rows.
            c: the encoded context of one row, (1, C), or of each row, (n, C); None without context.
            seed: seed of the draw; None to draw from torch's global generator.

        Raises:
            ValueError: n is not a whole number of at least 1, or c has another number of rows.
        """
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise ValueError(f"expected n to be a whole number of at least 1, got {n!r}")
        if c is not None and len(c) not in (1, n):
            raise ValueError(f"expected a context of one row or of n={n} rows, got {len(c)}")
        if seed is not None:
            with seeded(seed, cuda=self.device.startswith("cuda")):
                return self.sample(n, c)
        given = self._context_tensor(c)

        def draw(part: slice) -> Tensor:
            return self._draw(part.stop - part.start, None if given is None else given.expand(n, -1)[part])

        return self._in_chunks(n, draw)

    def _draw(self, n: int, c: Tensor | None) -> Tensor:
        """Draw n rows (n, D) of numbers and codes."""
        if self.network is None:
            return self.columns.snap(self.flow(c).sample((n,) if c is None else ()))
        rows = torch.empty(n, len(self.names), dtype=torch.float64, device=self.device)
        k = self.network.sample(torch.ones(n, len(self.network.sizes), dtype=torch.bool, device=self.device), c)
        rows[:, self.category_places] = k
        rows[:, self.number_places] = self.columns.snap(self.flow(self._given(k, c)).sample()).double()
        return rows

    @torch.no_grad()
    def to_noise(self, x: Array, c: Array | None = None, seed: int = 0) -> Array:
        """Map rows to the noise eps (N, F) from which the flow would draw their F numbers, dequantized.

        If the density is right, eps ~ N(0, I), and Phi(eps) is uniform in each component, see `noise_names`. For a
        mixture, one member is drawn for each row, with probability proportional to its density of the row.

        Args:
            x: rows (N, D), float64, finite; this is not checked.
            c: the encoded context (N, C); None without context.
            seed: seed of the noise within cells and of the choice of members.
        """
        rows, given = _tensor(x), self._context_tensor(c)
        rng = np.random.default_rng(seed)

        def noise(part: slice) -> Tensor:
            B = part.stop - part.start
            jitter = torch.from_numpy(rng.random((B, self.flow.features))).to(self.device)
            u = torch.from_numpy(rng.random(B)).to(self.device)
            with seeded(int(rng.integers(2**31 - 1)), cuda=self.device.startswith("cuda")):
                each, log_q = self._noise(rows[part].to(self.device), None if given is None else given[part], jitter)
            picked = (log_q.softmax(0).cumsum(0) < u).sum(0).clamp_max(len(log_q) - 1)
            return each[picked, torch.arange(B, device=each.device)]

        return self._in_chunks(len(rows), noise)

    def _noise(self, rows: Tensor, c: Tensor | None, jitter: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise of rows (B, D) under each member, (M, B, F), and their log densities, (M, B)."""
        x, k = self._split(rows)
        given = self._given(k, c)
        x = self.columns.wrapped(x)
        start, width = self.columns.cells(x)
        lifted = start + width * jitter + self.columns.lifts(x)[:, None]  # (L, B, F)
        noise, log_q = [], []
        for member in self.members:
            each = member(given).log_prob(lifted)
            lift = (
                torch.distributions.Categorical(logits=each.T).sample() if len(each) > 1 else torch.zeros(len(x)).long()
            )
            point = lifted[lift, torch.arange(len(x))]
            noise.append(_normal_noise(member, point, given))
            log_q.append(torch.logsumexp(each, 0))
        return torch.stack(noise), torch.stack(log_q)

    def _context_tensor(self, c: Array | None) -> Tensor | None:
        """Return the encoded context on the device."""
        return None if c is None else torch.from_numpy(c).to(self.device)

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors, which `cf.load` reads as a flow or a mixture, and density.json. Never pickle.

        A density of categories writes their network to categories.safetensors.
        """
        description = {
            "format": FORMAT,
            "names": self.names if self.named else None,
            "context": None if self.context is None else self.context.columns,
            "seed": self.seed,
            "cell_points": self.cell_points,
            "settings": self.settings,
            "types": self.types,
            "left_out": [each.config() for each in self.left_out],
            "categories": [asdict(each) for each in self.categories.values()],
        }
        save(self.flow, Path(folder) / MODEL)
        if self.network is not None:
            save(self.network, Path(folder) / CATEGORIES)
        write_json(Path(folder) / DESCRIPTION, description)

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> TableDensity:
        """Read a density that `save` wrote. Its scores are the same, bit for bit.

        Raises:
            FileNotFoundError: one of the two files does not exist.
            ValueError: the files do not hold a density.
        """
        from counterflow.density.missing import MaskedTableDensity  # a subclass

        path = Path(folder) / DESCRIPTION
        if not path.is_file():
            raise FileNotFoundError(f"expected {path}, which FlowDensity.save writes, got no such file")
        flow = load(Path(folder) / MODEL)
        description = read_json(path, "the description that FlowDensity.save writes")
        try:
            context = description["context"]
            categories = from_json(description.get("categories", []), tuple[CategoryColumn, ...], "categories")
            network = Path(folder) / CATEGORIES
            kind = MaskedTableDensity if description["settings"].get("missing") == "model" else cls
            return kind(
                flow,
                from_json(description["names"], tuple[str, ...] | None, "names"),
                None if context is None else ContextEncoder.from_json(context),
                seed=from_json(description["seed"], int, "seed"),
                cell_points=from_json(description["cell_points"], int, "cell_points"),
                device=device,
                settings=from_json(description["settings"], dict[str, Any], "settings"),
                types=from_json(description.get("types", {}), dict[str, str], "types"),
                left_out=from_json(description.get("left_out", []), tuple[LeftOut, ...], "left_out"),
                categories=categories,
                network=load(network, kind=CategoryNetwork) if network.is_file() else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise not_a_density(folder, error) from None


def not_a_density(folder: str | Path, error: Exception) -> ValueError:
    """Return the error for a folder whose files do not hold a density."""
    return ValueError(f"expected {folder} to hold a FlowDensity as save writes it, got: {error!r:.{MAX_QUOTED}}")


def _columns_of(member: Flow) -> TableTransform:
    """Return the columns, the first transform from the rows to the noise."""
    first = Inverse(member.transform).flattened()[0]
    if not isinstance(first, TableTransform):
        raise ValueError(f"expected a flow from noise to rows that ends with columns, got {type(first).__name__}")
    return first


def _normal_noise(member: Flow, x: Tensor, c: Tensor | None) -> Tensor:
    """Return the noise (B, D) that a member maps to rows x, N(0, I) also for a base with kernels."""
    eps = member.transform.inverse(x, c if member.transform.context else None)[0]
    return member.base.standardized(eps) if isinstance(member.base, KernelMixture) else eps


def _tensor(x: Array) -> Tensor:
    """Return x as a tensor. Arrays that torch cannot share, such as read-only ones, are copied."""
    return torch.from_numpy(np.require(x, requirements=["C", "W"]))
