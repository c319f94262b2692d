"""Densities of rows with missing cells: a flow and a network that are given random cells and asked for others.

A row has cells that are given, cells that are asked for, and others, which are left out. Given and asked cells are
known in training. The context of the networks says which cells are which:

    context of the categories: given (D), z of the given numbers (F), indicators of the given categories, context
    context of the flow: asked numbers (F), given (D), z of the given numbers (F), indicators of the known categories,
        context
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from counterflow.checks import positive
from counterflow.density.categories import UNSEEN
from counterflow.density.model import TableDensity
from counterflow.flows.categories import MISSING, CategoryNetwork
from counterflow.flows.flow import Flow
from counterflow.io.data.cells import to_numbers
from counterflow.random import seeded
from counterflow.transforms.table.table import TableTransform

Array = np.ndarray[Any, Any]

NOTHING_GIVEN = 0.5  # share of the training rows of which all cells are asked for, none given
SOME_LEFT_OUT = 0.3  # share of those of which some known cells are neither


@dataclass(frozen=True)
class Places:
    """Places of the columns of numbers and of categories among the D columns, as `TableDensity` has them."""

    numbers: list[int]
    categories: list[int]

    @property
    def D(self) -> int:
        """Number of columns."""
        return len(self.numbers) + len(self.categories)

    @property
    def flow_context(self) -> int:
        """Size of the context of the flow, without categories and context columns."""
        return 2 * len(self.numbers) + self.D

    @property
    def network_context(self) -> int:
        """Size of the context of the network of categories, without categories and context columns."""
        return len(self.numbers) + self.D


def filled_at_random(x: Array, names: Sequence[str], seed: int) -> Array:
    """Return rows (N, D) with a random known cell of its column in the place of each missing cell.

    The distribution of each column stays that of its known cells.

    Raises:
        ValueError: a column has no known cell.
    """
    rng = np.random.default_rng(seed)
    x = x.copy()
    for name, column in zip(names, x.T, strict=True):
        missing = np.isnan(column)
        if missing.all():
            raise ValueError(f"expected at least one value in column {name!r}, got missing cells only; drop it")
        column[missing] = rng.choice(column[~missing], missing.sum())
    return x


class Completed(NamedTuple):
    """Result of `MaskedTableDensity.complete`."""

    rows: Array  # (N, D), without missing cells
    ess: Array  # (N,), how many of the candidates count; all of them if the two networks agree


class Question(NamedTuple):
    """Rows with given and asked cells, as the networks take them."""

    asked: Tensor  # (B, F), 1 for the numbers that are asked for
    codes: Tensor  # (B, J), the categories that are asked for, others missing
    flow_context: Tensor
    network_context: Tensor


def question(
    places: Places,
    network: CategoryNetwork | None,
    z: Tensor,
    k: Tensor,
    given: Tensor,
    asked: Tensor,
    c: Tensor | None,
    dtype: torch.dtype,
) -> Question:
    """Return the contexts of the networks.

    Args:
        places: places of the columns.
        network: the network of the categories, if any.
        z: images of the numbers (B, F), on a scale near 1; anything where they are not given.
        k: codes (B, J).
        given: True for the given cells (B, D).
        asked: True for the cells that are asked for (B, D).
        c: context columns (B, C).
        dtype: of the networks.
    """
    z_given = torch.where(given[:, places.numbers], z, 0.0)
    parts = [given, z_given]
    more = [] if c is None else [c]
    asked_numbers = asked[:, places.numbers].to(dtype)
    asked_codes = k
    known_indicators, given_indicators = [], []
    if network is not None:
        asked_codes = torch.where(asked[:, places.categories], k, MISSING).to(dtype)
        known = (given | asked)[:, places.categories]
        known_indicators = [network.indicators(torch.where(known, k, MISSING))]
        given_indicators = [network.indicators(torch.where(given[:, places.categories], k, MISSING))]

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.to(dtype) for tensor in tensors], -1)

    return Question(
        asked_numbers,
        asked_codes,
        joined([asked_numbers, *parts, *known_indicators, *more]),
        joined([*parts, *given_indicators, *more]),
    )


def random_cells(known: Tensor) -> tuple[Tensor, Tensor]:
    """Return random given cells and random asked cells (B, D) among those that are known."""
    B = len(known)

    def per_row() -> Tensor:
        return torch.rand(B, 1, device=known.device)

    def per_cell() -> Tensor:
        return torch.rand(known.shape, device=known.device)

    given = known & (per_cell() < per_row()) & (per_row() > NOTHING_GIVEN)
    left_out = (per_cell() < per_row()) & (per_row() < SOME_LEFT_OUT)
    return given, known & ~given & ~left_out


def log_density_of_asked(flow: Flow, x: Tensor, c: Tensor, asked: Tensor) -> Tensor:
    """Return the log density (...) of the asked numbers of x (..., F) under a flow of masked layers."""
    eps, terms = flow.transform.inverse_by_feature(x, torch.zeros_like(x), c)
    normal = -0.5 * (eps * eps + math.log(2 * math.pi))
    return torch.where(asked > 0, normal + terms, 0.0).sum(-1)


def log_lifted(lifts: Tensor, asked: Tensor) -> Tensor:
    """Return 0 for the lifts (..., F) of asked numbers (B, F) alone, (..., B), and -inf for the others."""
    return torch.where(((lifts != 0) & (asked == 0)).any(-1), -math.inf, 0.0)


@dataclass(frozen=True)
class LogConditional:
    """Objective: the weighted log density of random cells given random others, of the flow or of the network.

    A batch holds numbers (B, F), True for known cells (B, D), codes (B, J), and context and weights, if any.
    """

    columns: TableTransform
    places: Places
    network: CategoryNetwork | None  # for the indicators
    of_categories: bool
    has_context: bool
    has_weights: bool

    def __call__(self, model: Any, batch: tuple[Tensor, ...]) -> Tensor:
        x, known, k = batch[0], batch[1] > 0, batch[2]
        start, width = self.columns.cells(x)
        lifts = self.columns.lifts(x)[:, None]
        point = start + width * torch.rand_like(x) + lifts
        z, log_slope = self.columns.forward_by_feature(point, torch.zeros_like(point))
        given, asked = random_cells(known)
        c = batch[3] if self.has_context else None
        q = question(self.places, self.network, self.columns(x)[0], k, given, asked, c, torch.float32)
        if self.of_categories:
            terms = model.log_prob(q.codes, q.network_context)
        else:
            terms = log_density_of_asked(model, z.float(), q.flow_context, q.asked)
            terms = terms + torch.where(q.asked > 0, log_slope, 0.0).sum(-1) + log_lifted(lifts, q.asked)
            terms = torch.logsumexp(terms, 0) + self.columns.log_mass(_asked_width(width, q.asked))
        return terms * batch[-1] if self.has_weights else terms


def _asked_width(width: Tensor, asked: Tensor) -> Tensor:
    """Return the widths of the cells that count: 1, whose logarithm is 0, for those that are not asked for."""
    return torch.where(asked > 0, width, 1.0)


def masked(density: TableDensity) -> MaskedTableDensity:
    """Return the density; raise ValueError if it is not one of every subset of the columns."""
    if not isinstance(density, MaskedTableDensity):
        raise ValueError('expected a density that was fitted with missing="model", got missing="error"; fit it again')
    return density


class MaskedTableDensity(TableDensity):
    """Density of every subset of the columns of a table, given every other: for rows with missing cells.

        log p(asked | given) = log p(asked categories | given) + log q(asked numbers | asked categories, given)

    The layers of the flow are masked: the numbers that are not asked for neither change nor matter. NaN is a missing
    cell. `score` is that of the known cells, nothing given.
    """

    @property
    def places(self) -> Places:
        """Places of the columns."""
        return Places(self.number_places, self.category_places)

    @staticmethod
    def _mask_size(numbers: int, columns: int) -> int:
        return 2 * numbers + columns

    def coded(self, columns: Mapping[str, Array]) -> Array:
        """Return rows (N, D) of some columns (N,) by name, with codes for categories, and NaN for the other columns."""
        x = np.full((len(next(iter(columns.values()))), len(self.names)), np.nan)
        for name, column in columns.items():
            category = self.categories.get(name)
            numbers = to_numbers(column, name, "X") if category is None else category.encode(category.cells(column))
            x[:, self.names.index(name)] = numbers
        return x

    @torch.no_grad()
    def score_given(self, x: Array, given: Array, c: Array | None = None) -> Array:
        """Return log p(the other known cells | the given cells) of each row, (N,), in nats.

        Args:
            x: rows (N, D), NaN for missing cells.
            given: True for the given columns, (D,), or cells, (N, D).
            c: the encoded context (N, C).
        """
        rows, context, points = torch.from_numpy(x), self._context_tensor(c), self._cell_points()
        mask = torch.from_numpy(np.broadcast_to(given, x.shape).copy())

        def log_conditional(part: slice) -> Tensor:
            here, given = rows[part].to(self.device), mask[part].to(self.device)
            known = ~here.isnan()
            return self._log_conditional(here, known & given, known & ~given, _part(context, part), points)

        return self._in_chunks(len(rows), log_conditional, points)

    def _log_joint(self, rows: Tensor, c: Tensor | None, points: Tensor | None) -> Tensor:
        known = ~rows.isnan()
        return self._log_conditional(rows, torch.zeros_like(known), known, c, points)

    def _log_conditional(
        self, rows: Tensor, given: Tensor, asked: Tensor, c: Tensor | None, points: Tensor | None
    ) -> Tensor:
        """Return log p(asked cells | given cells) of rows (B, D), averaged over points (S, F) of the cells."""
        x, k = self._filled(rows)
        q = self._question(x, k, given, asked, c)
        at, width = self._points_of(x, points)
        each = torch.stack([log_density_of_asked(member, at, q.flow_context, q.asked) for member in self.members])
        each = each + log_lifted(self.columns.lifts(x)[:, None, None], q.asked)
        log_p = torch.logsumexp(each, (0, 1, 2)) - math.log(each.shape[0] * each.shape[2])
        log_p = log_p + self.columns.log_mass(_asked_width(width, q.asked))
        if self.network is not None:
            log_p = log_p + self.network.log_prob(q.codes, q.network_context)
        unseen = (rows[:, self.category_places] == UNSEEN) & asked[:, self.category_places]
        inside = self.columns.inside(torch.where(q.asked > 0, x, self._middle(x)))
        return torch.where(inside & ~log_p.isnan() & ~unseen.any(-1), log_p, -math.inf)

    @torch.no_grad()
    def complete(self, x: Array, c: Array | None = None, seed: int | None = None, candidates: int = 1) -> Completed:
        """Draw the missing cells of rows, given those that are known.

        Of several candidates, one is drawn in proportion to its importance weight,

            w = p(x) / p(drawn cells | known cells),

        which corrects the network of the conditional density by that of the joint density.

        Args:
            x: rows (N, D), NaN for missing cells.
            c: the encoded context (N, C).
            seed: seed of the draws; None to draw from torch's global generator.
            candidates: the number of draws of which one is kept.
        """
        if seed is not None:
            with seeded(seed, cuda=self.device.startswith("cuda")):
                return self.complete(x, c, None, candidates)
        rows = torch.from_numpy(np.repeat(x, positive(candidates, "candidates"), 0))
        every = None if c is None else np.repeat(c, candidates, 0)
        given = self._context_tensor(every)
        drawn = self._in_chunks(len(rows), lambda part: self._completed(rows[part].to(self.device), _part(given, part)))
        if candidates == 1:
            return Completed(drawn, np.ones(len(x)))
        known = ~np.isnan(np.repeat(x, candidates, 0))
        log_w = torch.from_numpy(self.score(drawn, every) - self.score_given(drawn, known, every)).reshape(
            -1, candidates
        )
        w = log_w.nan_to_num(-math.inf, -math.inf).softmax(1).nan_to_num(1 / candidates)
        kept = torch.multinomial(w, 1)[:, 0].numpy()
        ess = (1 / w.square().sum(1)).numpy()
        return Completed(drawn.reshape(len(x), candidates, -1)[np.arange(len(x)), kept], ess)

    def _draw(self, n: int, c: Tensor | None) -> Tensor:
        return self._completed(torch.full((n, len(self.names)), math.nan, dtype=torch.float64, device=self.device), c)

    def _completed(self, rows: Tensor, c: Tensor | None) -> Tensor:
        """Return rows (B, D) with draws in the place of the missing cells."""
        known = ~rows.isnan()
        x, k = self._filled(rows)
        if self.network is not None:
            q = self._question(x, k, known, ~known, c)
            missing = ~known[:, self.category_places]
            k = torch.where(missing, self.network.sample(missing, q.network_context), k)
        q = self._question(x, k, known, ~known, c)
        drawn = self.columns.snap(self.flow(q.flow_context).sample())
        complete = torch.empty_like(rows)
        complete[:, self.number_places] = drawn
        complete[:, self.category_places] = k
        return torch.where(known, rows, complete)

    def _noise(self, rows: Tensor, c: Tensor | None, jitter: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise of rows, NaN for missing cells; see `TableDensity`."""
        known = ~rows.isnan()
        x, k = self._filled(rows)
        q = self._question(x, k, torch.zeros_like(known), known, c)
        start, width = self.columns.cells(x)
        lifts = self.columns.lifts(x)[:, None]
        lifted = start + width * jitter + lifts
        noise, log_q = [], []
        for member in self.members:
            each = log_density_of_asked(member, lifted, q.flow_context, q.asked) + log_lifted(lifts, q.asked)
            lift = torch.distributions.Categorical(logits=each.T).sample()
            noise.append(member.transform.inverse(lifted[lift, torch.arange(len(x))], q.flow_context)[0])
            log_q.append(torch.logsumexp(each, 0))
        return torch.where(q.asked > 0, torch.stack(noise), math.nan), torch.stack(log_q)

    def _question(self, x: Tensor, k: Tensor, given: Tensor, asked: Tensor, c: Tensor | None) -> Question:
        return question(self.places, self.network, self.columns(x)[0], k, given, asked, c, torch.float64)

    def _middle(self, x: Tensor) -> Tensor:
        """Return a number in the support of each column, like x (B, F)."""
        return self.columns.snap(self.columns.inverse(torch.zeros_like(x))[0])

    def _filled(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers (B, F), those that are missing filled, and the codes (B, J), those that are missing -1."""
        x, k = rows[:, self.number_places], rows[:, self.category_places]
        return self.columns.wrapped(torch.where(x.isnan(), self._middle(x), x)), k.nan_to_num(MISSING)


def _part(c: Tensor | None, part: slice) -> Tensor | None:
    return None if c is None else c[part]
