"""Both substitutions in torch operations, in blocks of degrees: any device, any univariate map.

Hidden units are sorted by degree, so the weights are staircases, and a block of degrees is a block of rows and columns
of each of them. As in a blocked triangular solve, one product per layer adds to a block the contributions of all
finished degrees. What is left, the diagonal block, is a smaller system of the same kind. It is solved by Jacobi's
iteration: run its network on a guess of its features, and solve for all of them at once. Each sweep makes at least one
more degree exact, and usually a few settle all of them to rounding. A block that half as many sweeps as degrees do not
settle is solved degree by degree, and so are all that follow.

Buffers are feature-major, (units, N): a block is contiguous. Each weight is read once, except in diagonal blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from counterflow.engine.contract import Adjoints, Layout, Solution, System
from counterflow.engine.solve import is_transformed

BLOCK = 128  # units of the widest hidden layer; benchmarks/results/sliced.md has the times of smaller and larger blocks
MAX_DEGREES = 64  # of a block, for narrow networks
ROUNDINGS = 4  # a row has settled if a sweep changes it by no more roundings of its largest value
# Largest number of values that a sweep computes on a CPU; with more, its arithmetic costs more than the launches that
# it saves (measured as above). On other devices launches are what a solve waits for.
MAX_SWEPT = 1 << 17


class Span(NamedTuple):
    """Rows and columns of each weight that belong to a range of degrees, `skip_to_output` left out."""

    rows: tuple[slice, ...]  # the units of each hidden layer, then params
    columns: tuple[slice, ...]  # features, then the units of each hidden layer


class Block(NamedTuple):
    """A range of degrees, each of its degrees, and the masks of its diagonal block of each weight."""

    span: Span
    degrees: tuple[Span, ...]
    masks: tuple[Tensor, ...]

    def can_iterate(self, like: Tensor) -> bool:
        """Return True if sweeps over rows like y (N, D) are the faster way, and their end can be checked."""
        if is_transformed():  # what is recorded should not depend on the values of this call
            return False
        if like.device.type == "cpu":
            return len(like) * sum(row.stop - row.start for row in self.span.rows) <= MAX_SWEPT
        return not like.is_meta

    def diagonals(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the diagonal block of each weight, masked."""
        rows, columns = self.span
        each = zip(weights, (*rows, rows[-1]), (*columns, columns[0]), self.masks, strict=False)
        return [weight[row, column] * mask for weight, row, column, mask in each]


def block_size(layout: Layout) -> int:
    """Return the number of degrees of a block."""
    widest = max(ends[-1] for ends in layout.ends[1:])
    return max(1, min(MAX_DEGREES, BLOCK * layout.groups // widest))


def blocks(layout: Layout, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Block, ...]:
    """Return the blocks of `size` degrees each, in ascending order; hidden units of degree 0 are in the first."""
    # Masks that are made under a mode of torch, such as that of fake tensors, belong to it.
    make = _blocks.__wrapped__ if is_transformed() else _blocks
    return make(layout, size, dtype, device)


@lru_cache(maxsize=64)
def _blocks(layout: Layout, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Block, ...]:
    P = layout.univariate.parameters
    begins = [(0, *ends[:-1]) for ends in layout.ends]  # how many units have a degree below g

    def span(low: int, high: int) -> Span:
        features, *units = (slice(begin[low], ends[high - 1]) for begin, ends in zip(begins, layout.ends, strict=True))
        return Span((*units, slice(features.start * P, features.stop * P)), (features, *units))

    def masks(low: int, high: int) -> tuple[Tensor, ...]:
        features, *units = (
            torch.tensor(
                [g for g in range(low, high) for _ in range(begin[g], ends[g])], dtype=torch.long, device="cpu"
            )
            for begin, ends in zip(begins, layout.ends, strict=True)
        )
        params = features[:, None].expand(-1, P).reshape(-1, 1)
        found = [after[:, None] >= before for before, after in pairwise((features, *units))]
        return tuple(m.to(device, dtype) for m in (*found, params > units[-1], params > features))

    G = layout.groups
    return tuple(
        Block(span(low, high), tuple(span(g, g + 1) for g in range(low, high)), masks(low, high))
        for low, high in pairwise((0, *range(size + 1, G + 1, size), G + 1))
    )


def _settled(new: Tensor, old: Tensor) -> bool:
    """Return True if two estimates (units, N) differ by no more than rounding; False where one is NaN."""
    change = torch.linalg.vector_norm(new - old, torch.inf, 0)
    size = torch.linalg.vector_norm(new, torch.inf, 0)
    return bool((change <= ROUNDINGS * torch.finfo(new.dtype).eps * size).all())


@torch.no_grad()
def forward_substitution(system: System, y: Tensor, *, keep: bool = True, iterate: bool = True) -> Solution:
    """Go through the blocks in ascending order; see `Body`. Without `iterate`, each block goes degree by degree."""
    solve = _Forward(system, y.T)
    for block in blocks(system.layout, block_size(system.layout), y.dtype, y.device):
        solve.add_finished(block.span)
        iterate = iterate and block.can_iterate(y) and solve.by_iteration(block)
        if not iterate:
            solve.by_degree(block)
    *hidden, params = solve.into
    params = params.T.unflatten(1, (y.shape[1], system.layout.univariate.parameters))
    return Solution(solve.x.T, solve.log_slope.sum(0), params, tuple(a.T for a in hidden))


@torch.no_grad()
def back_substitution(system: System, solution: Solution, v: Tensor, w: Tensor, *, iterate: bool = True) -> Adjoints:
    """Go through the blocks in descending order; see `Body`. Without `iterate`, each block goes degree by degree."""
    solve = _Back(system, solution, v, w)
    for block in reversed(blocks(system.layout, block_size(system.layout), v.dtype, v.device)):
        solve.add_finished(block.span)
        iterate = iterate and block.can_iterate(v) and solve.by_iteration(block)
        if not iterate:
            solve.by_degree(block)
    return Adjoints(solve.u.T, solve.params.permute(2, 0, 1), tuple(a.T for a in solve.sent[1:]))


class _Forward:
    """Values of a forward substitution: weight k takes fed[k], x or a hidden layer, to into[k], the next or params."""

    def __init__(self, system: System, y: Tensor) -> None:
        self.layout = system.layout
        self.weights = system.weights
        self.y = y
        self.biases = [b.T if b.dim() == 2 else b[:, None] for b in system.biases]
        self.into = [y.new_empty(len(b), y.shape[1]) for b in self.biases]
        self.x = y.new_empty(y.shape)
        self.log_slope = y.new_empty(y.shape)
        self.fed = [self.x, *map(torch.empty_like, self.into[:-1])]

    def add_finished(self, span: Span) -> None:
        """Fill the rows of a block with the biases and the contributions of the finished degrees."""
        for k, (row, column) in enumerate(zip(*span, strict=True)):
            seen = slice(column.start)
            torch.addmm(self.biases[k][row], self.weights[k][row, seen], self.fed[k][seen], out=self.into[k][row])
        self._add_direct(span.rows[-1], slice(span.columns[0].start))

    def by_iteration(self, block: Block) -> bool:
        """Sweep through the diagonal block, from x = y, until x settles; return False if it does not."""
        rows, columns = block.span
        known = [into[row] for into, row in zip(self.into, rows, strict=True)]
        diagonals = block.diagonals(self.weights)
        links, P = self.layout.links, self.layout.univariate.parameters
        y = self.y[columns[0]]
        x = y
        for _ in range(len(block.degrees) // 2):  # as many take about as long as half of the degrees, one by one
            guess = x
            hidden, last = links.propagate(
                lambda k, v: torch.addmm(known[k], diagonals[k], v), guess, self.layout.activation.f
            )
            params = torch.addmm(known[-1], diagonals[len(hidden)], last)
            if links.skip_to_output:
                params.addmm_(diagonals[-1], guess)
            x, log_slope = self.layout.univariate.inverse(y, _by_feature(params, P))
            if _settled(x, guess):
                break
        else:
            return False
        self.x[columns[0]] = x
        self.log_slope[columns[0]] = log_slope
        known[-1].copy_(params)
        for k, before in enumerate(hidden):
            known[k].copy_(before)
            self.fed[k + 1][rows[k]] = self.layout.output(k, before)
        return True

    def by_degree(self, block: Block) -> None:
        """Solve the diagonal block degree by degree: params of the features, x, the hidden units layer by layer."""
        for rows, columns in block.degrees:
            new, params = columns[0], self.into[-1][rows[-1]]
            if new.start < new.stop:
                last = slice(block.span.columns[-1].start, columns[-1].start)
                params.addmm_(self.weights[len(self.fed) - 1][rows[-1], last], self.fed[-1][last])
                self._add_direct(rows[-1], slice(block.span.columns[0].start, new.start))
                P = self.layout.univariate.parameters
                self.x[new], self.log_slope[new] = self.layout.univariate.inverse(self.y[new], _by_feature(params, P))
            for k, skip in enumerate(self.layout.links.skips):
                row = rows[k]
                if row.start < row.stop:
                    seen = slice(block.span.columns[k].start, columns[k].stop)
                    before = self.into[k][row].addmm_(self.weights[k][row, seen], self.fed[k][seen])
                    if skip is not None:
                        before += self.into[skip][row]
                    self.fed[k + 1][row] = self.layout.output(k, before)

    def _add_direct(self, row: slice, seen: slice) -> None:
        """Add what features contribute to params without a hidden layer."""
        if self.layout.links.skip_to_output:
            self.into[-1][row].addmm_(self.weights[-1][row, seen], self.x[seen])


class _Back:
    """Adjoints of a back substitution: weight k takes received[k] to sent[k], of the features or of a hidden layer."""

    def __init__(self, system: System, solution: Solution, v: Tensor, w: Tensor) -> None:
        self.layout = system.layout
        self.weights = system.weights
        partials = self.layout.univariate.partials(solution.x.T, solution.params.transpose(0, 1))
        self.slopes = [self.layout.slope(k, a.T) for k, a in enumerate(solution.hidden)]
        self.target = v.T - w * partials.dl_dx
        self.dy_dx = partials.dy_dx
        self.dy_dparams = partials.dy_dparams.transpose(1, 2).contiguous()
        self.from_w = (w * partials.dl_dparams.transpose(1, 2)).contiguous()
        self.u = v.new_empty(self.target.shape)
        self.params = v.new_empty(self.dy_dparams.shape)
        self.sent = [torch.empty_like(self.u), *(v.new_empty(slope.shape) for slope in self.slopes)]
        self.received = [*self.sent[1:], self.params.flatten(0, 1)]

    def add_finished(self, span: Span) -> None:
        """Fill the columns of a block with what they receive from the finished degrees."""
        for k, (row, column) in enumerate(zip(*span, strict=True)):
            seen_by = slice(row.stop, None)
            torch.mm(self.weights[k][seen_by, column].T, self.received[k][seen_by], out=self.sent[k][column])
        self._add_direct(slice(span.rows[-1].stop, None), span.columns[0])

    def by_iteration(self, block: Block) -> bool:
        """Sweep through the diagonal block, from u = target / dy_dx, until u settles; return False if it does not."""
        features, *units = block.span.columns
        first, *later = (weight.T for weight in block.diagonals(self.weights))
        known = [hidden[unit] for hidden, unit in zip(self.sent[1:], units, strict=True)]
        slopes = [slope[unit] for slope, unit in zip(self.slopes, units, strict=True)]
        target = self.target[features] - self.sent[0][features]
        dy_dx = self.dy_dx[features]
        dy_dparams = self.dy_dparams[features]
        from_w = self.from_w[features]
        u = target / dy_dx
        for _ in range(len(block.degrees) // 2):  # as many take about as long as half of the degrees, one by one
            guess = u
            params = torch.addcmul(from_w, guess[:, None], dy_dparams)
            received = theta = params.flatten(0, 1)
            hidden: dict[int, Tensor] = {}
            for k in reversed(range(len(units))):
                received = torch.addmm(known[k], later[k], received) * slopes[k]
                for other in self.layout.links.added_to(k):
                    received += hidden[other]
                hidden[k] = received
            rest = torch.addmm(target, first, received, alpha=-1)
            if self.layout.links.skip_to_output:
                rest.addmm_(later[-1], theta, alpha=-1)
            u = rest / dy_dx
            if _settled(u, guess):
                break
        else:
            return False
        self.u[features] = u
        self.params[features] = params
        for k, adjoint in hidden.items():
            known[k].copy_(adjoint)
        return True

    def by_degree(self, block: Block) -> None:
        """Solve the diagonal block degree by degree: the hidden units, last layer first, u of the features, params."""
        for rows, columns in reversed(block.degrees):
            for k in reversed(range(len(rows))):
                column = columns[k]
                if column.start < column.stop:
                    begin = rows[k].stop if k == len(rows) - 1 else rows[k].start  # params see lower degrees only
                    seen_by = slice(begin, block.span.rows[k].stop)
                    sent = self.sent[k][column].addmm_(self.weights[k][seen_by, column].T, self.received[k][seen_by])
                    if k:
                        sent *= self.slopes[k - 1][column]
                        for other in self.layout.links.added_to(k - 1):
                            sent += self.sent[other + 1][column]
            new = columns[0]
            if new.start < new.stop:
                self._add_direct(slice(rows[-1].stop, block.span.rows[-1].stop), new)
                u = torch.div(self.target[new] - self.sent[0][new], self.dy_dx[new], out=self.u[new])
                torch.addcmul(self.from_w[new], u[:, None], self.dy_dparams[new], out=self.params[new])

    def _add_direct(self, seen_by: slice, column: slice) -> None:
        """Add what features receive from params without a hidden layer."""
        if self.layout.links.skip_to_output:
            self.sent[0][column].addmm_(self.weights[-1][seen_by, column].T, self.received[-1][seen_by])


def _by_feature(params: Tensor, P: int) -> Tensor:
    """Reshape (features P, N) to (features, N, P)."""
    return params.unflatten(0, (-1, P)).transpose(1, 2)
