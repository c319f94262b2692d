"""Distillation: a student that samples in one pass, such as an IAF, learns the distribution of a teacher that does not.

The teacher carries eps to x through layers that are solved, v -> u with v_i = g(u_i; theta_i(u_j, j < i)). Each of
these maps is itself triangular, in the same order: so a layer of the student, one pass from v to u, can equal it.

    start    every layer of the student learns its layer of the teacher, on the teacher's own draws, all at once
    finish   the student as a whole: KL(student || teacher), by the path gradient
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from counterflow.autoregressive import Autoregressive
from counterflow.diagnostics import effective_sample_size, energy_test
from counterflow.fit import Epoch, FitConfig, Record, fit
from counterflow.flow import Flow
from counterflow.group import Group
from counterflow.noise import seeded
from counterflow.rows import check_finite
from counterflow.states import States
from counterflow.transform import Compose, Inverse, Permute, Transform, Triangular
from counterflow.univariate import Affine, RationalQuadraticSpline, SinhArcsinh, Univariate

Contexts = Tensor | Callable[[int], Tensor]  # (N, C) rows to pick from, or n -> (n, C)
Stage = Literal["start", "finish"]
EPOCH = 50  # steps between two evaluations
EVALUATIONS = 8  # batches of draws in each of them
EXTREME = 0.02  # of the teacher's draws are left out of what the student learns from them
PLAIN = ("features", "context", "univariate", "degrees", "activation")  # what fits to hidden layers of any size
PILOT = 8192  # draws that the student's linear maps are fitted to


@dataclass(frozen=True)
class DistillConfig:
    """How to distil. The defaults are meant for any teacher."""

    start: int = 2000  # steps layer by layer, each a quarter to half the price of one of the whole; 0 for none
    steps: int = 2000  # of the whole student
    draws: int = 256  # a step
    forward: float = 0.0  # weight of KL(teacher || student), which presses the student to cover all of the teacher
    hidden: tuple[int, ...] = ()  # sizes of each student layer; empty takes the teacher's, and its hidden weights too
    learning_rate: float = 2e-3  # of the start; half of it for the whole, which is near its end by then
    clip_norm: float = 5.0  # bound of the gradient: where the teacher's scale is tiny, one draw may outweigh all
    ema: float = 0.998  # decay of the averaged weights
    seed: int = 0  # of initial weights and all noise
    device: str = "cpu"  # cpu, cuda or mps

    def __post_init__(self) -> None:
        for name in ("start", "steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"expected {name} of at least 0, got {getattr(self, name)}")
        if self.draws < 2:
            raise ValueError(f"expected draws of at least 2, got {self.draws}")
        if not (math.isfinite(self.forward) and self.forward >= 0):
            raise ValueError(f"expected forward, a weight, of at least 0, got {self.forward}")
        self.fit(1, 1.0)  # the rest is checked there

    def fit(self, steps: int, rate: float) -> FitConfig:
        """How a stage of so many steps is trained."""
        return FitConfig(
            epochs=math.ceil(steps / EPOCH),
            batch_size=self.draws,
            optimizer="adam",
            learning_rate=rate * self.learning_rate,
            warm_up_steps=min(100, steps // 10),
            clip_norm=self.clip_norm,
            ema=self.ema,
            seed=self.seed,
            device=self.device,
        )


class Distilled(NamedTuple):
    """A student, and how its stages went."""

    student: Flow
    records: dict[Stage, Record]


def distill(
    teacher: Flow,
    contexts: Contexts | None = None,
    config: DistillConfig = DistillConfig(),
    *,
    student: Flow | None = None,
    on_epoch: Callable[[Stage, Epoch], None] | None = None,
    states: States | None = None,
) -> Flow:
    """A flow that samples in one pass and has the teacher's distribution, or nearly: for a `MAF` an `IAF`.

        KL(student || teacher) = E[log q(z | c) - log p(z | c)],  z ~ q        plus forward times
        KL(teacher || student) = E[log p(x | c) - log q(x | c)],  x ~ p

    in nats, over the contexts. Both densities are exact and about one pass, so no data are needed. The student has the
    teacher's layers, orders, base and constant maps. Where the teacher solves v -> u, it has a linear map fitted to
    the teacher's draws and an autoregressive layer with the teacher's hidden weights, and these first learn

        E sum_i ((w_i - v_i)^2 + (log dw_i/dv_i)^2) / 2,    w_i = g(u'_i; theta_i(u_j, j < i))

    where u' is the student's output and g, theta are the teacher's layer. For a normal v this is the layer's KL to
    second order, and has no noise where the student is exact; a square root bounds the pull of a single draw.

    Where the teacher's scale is tiny or its draws explode, as a MAF's do now and then, a Monte Carlo KL has a
    variance without bound: the trap of Parallel WaveNet, which ClariNet meets with a regularised KL. Here the log
    scales of both flows are softly bounded; the path gradient has no noise where the student is exact; the two
    in a hundred draws of the teacher that lie farthest out are left out of the start and of the forward KL; and the
    gradient's norm is clipped.

    Args:
        teacher: a flow of this library; it is not changed.
        contexts: c (N, C), whose rows are picked at random, or a function n -> (n, C); None where C = 0.
        config: how to distil.
        student: a flow that samples in one pass, of another make; trained as a whole from where it stands, on a copy.
        on_epoch: called with the stage and the epoch.
        states: where to keep what it takes to go on after a kill, as `cf.fit` does: a folder for each stage.

    Raises:
        ValueError: contexts that are missing, not wanted or not finite; a student of other sizes, or one whose samples
            are solved; a teacher with a part of an unknown make and without a student.

    Source: van den Oord et al. 2018, "Parallel WaveNet: Fast High-Fidelity Speech Synthesis", section 4, for the
    distillation; Ping et al. 2019, "ClariNet", section 3.2, for its trap; Vaitl et al. 2024 for the path gradient.
    The start is ours.

    Example:
        >>> import torch, counterflow as cf
        >>> teacher = cf.MAF(features=3, layers=2, hidden=(16,), seed=0)
        >>> student = cf.distill(teacher, config=cf.DistillConfig(start=50, steps=50))
        >>> student.transform.forward_cost, student().rsample((5,)).shape
        ('one pass', torch.Size([5, 3]))
    """
    return distilled(teacher, contexts, config, student=student, on_epoch=on_epoch, states=states).student


def distilled(
    teacher: Flow,
    contexts: Contexts | None = None,
    config: DistillConfig = DistillConfig(),
    *,
    student: Flow | None = None,
    on_epoch: Callable[[Stage, Epoch], None] | None = None,
    on_step: Callable[[Stage, int, int], None] | None = None,
    states: States | None = None,
) -> Distilled:
    """What `distill` does, with the records of its stages. An interrupted stage is the last one."""
    draw = _contexts(teacher, contexts)
    home = _device(teacher)
    teacher = copy.deepcopy(teacher).to(config.device).eval().requires_grad_(False)
    parts = _parts(teacher.transform)
    share = Group.here().share(config.draws, "draws")  # of each process, with noise of its own
    with seeded(config.seed, cuda=True):
        made = _student(teacher, parts, draw, config.hidden) if student is None else _checked(student, teacher)
    made.to(config.device)
    stages: list[tuple[Stage, int, float, Callable[..., Tensor]]] = []
    learns = student is not None or any(_solved(part) is not None for part in parts)  # else it is a copy
    if learns and student is None and config.start:
        stages.append(("start", config.start, 1.0, _by_layer(teacher, parts, draw, share)))
    if learns and config.steps:
        stages.append(("finish", config.steps, 0.5, _as_a_whole(teacher, parts, draw, share, config.forward)))
    records: dict[Stage, Record] = {}
    for stage, steps, rate, objective in stages:

        def told(row: Epoch, _: nn.Module, stage: Stage = stage) -> None:
            if on_epoch is not None:
                on_epoch(stage, row)

        def stepped(done: int, steps: int, stage: Stage = stage) -> None:
            if on_step is not None:
                on_step(stage, done, steps)

        records[stage] = fit(
            made,
            objective,
            min(steps, EPOCH),
            EVALUATIONS,
            config.fit(steps, rate),
            on_step=stepped,
            on_epoch=told,
            states=None if states is None else states.of(stage),
        )
        if records[stage].stopped == "interrupted":
            break
    return Distilled(made.to(home).eval(), records)


# -- contexts ----------------------------------------------------------------------------------------


def _contexts(teacher: Flow, contexts: Contexts | None) -> Callable[[int], Tensor | None]:
    """N -> (n, C) on the teacher's device, or None for a teacher without a context."""
    if (contexts is None) != (teacher.context == 0):
        wanted = f"contexts (N, {teacher.context})" if teacher.context else "no contexts"
        came = "none" if contexts is None else "some"
        raise ValueError(f"expected {wanted}, got {came}; the teacher was built with context={teacher.context}")
    if contexts is None:
        return lambda n: None
    if isinstance(contexts, Tensor):
        _check_contexts(contexts, teacher)
        rows = contexts
        return lambda n: rows[torch.randint(len(rows), (n,))]
    drawn = contexts

    def draw(n: int) -> Tensor:
        c = drawn(n)
        _check_contexts(c, teacher, n)
        return c

    return draw


def _check_contexts(c: Tensor, teacher: Flow, rows: int | None = None) -> None:
    if c.dim() != 2 or c.shape[1] != teacher.context or not len(c) or rows not in (None, len(c)):
        raise ValueError(f"expected contexts ({rows or 'N'}, {teacher.context}), got {tuple(c.shape)}")
    check_finite(c, "the contexts")


def _drawn(draw: Callable[[int], Tensor | None], n: int, device: torch.device) -> tuple[Tensor | None, tuple[int, ...]]:
    """Contexts of n draws on the device, and the sample shape that makes n draws with them."""
    c = draw(n)
    return (None, (n,)) if c is None else (c.to(device), ())


def _device(flow: Flow) -> torch.device:
    return next(chain(flow.parameters(), flow.buffers())).device


# -- the student -------------------------------------------------------------------------------------


def _parts(t: Transform) -> list[Transform]:
    """The maps that t is a chain of, from eps to x; an inverse stands at single maps only."""
    if isinstance(t, Compose):
        return [part for each in t for part in _parts(each)]
    if isinstance(t, Inverse) and isinstance(t.transform, Compose):
        return [part for each in reversed(list(t.transform)) for part in _parts(Inverse(each))]
    if isinstance(t, Inverse) and isinstance(t.transform, Inverse):
        return _parts(t.transform.transform)
    if isinstance(t, Inverse) and isinstance(t.transform, Permute):
        return [Permute(t.transform.places)]
    return [t]


def _solved(part: Transform) -> Autoregressive | None:
    """The layer that a part solves, if it does."""
    if isinstance(part, Inverse) and isinstance(part.transform, Autoregressive):
        return part.transform
    return None


class _Trace(NamedTuple):
    """What one part of the teacher does to N draws."""

    v: Tensor  # before it, (N, D)
    u: Tensor  # after it, (N, D)
    params: Tensor | None  # of a solved layer, (N, D, P), its features sorted by degree


@torch.no_grad()
def _traces(
    teacher: Flow, parts: list[Transform], draw: Callable[[int], Tensor | None], n: int
) -> tuple[list[_Trace], Tensor | None]:
    """Draws of the teacher through all its parts, and their contexts, without those that lie farthest out."""
    c, shape = _drawn(draw, n, _device(teacher))
    v = teacher(c).base.sample(torch.Size(shape))
    far, traces = v.new_zeros(n), []
    for part in parts:
        given = c if part.context else None
        u, layer = part(v, given)[0], _solved(part)
        params = None if layer is None else layer.made(u[..., layer.order], given)
        far = torch.maximum(far, u.abs().amax(1).nan_to_num(math.inf))
        traces.append(_Trace(v, u, params))
        v = u
    kept = far <= torch.quantile(far, 1 - EXTREME, interpolation="lower")
    picked = [_Trace(v[kept], u[kept], None if params is None else params[kept]) for v, u, params in traces]
    return picked, None if c is None else c[kept]


def _student(
    teacher: Flow, parts: list[Transform], draw: Callable[[int], Tensor | None], hidden: tuple[int, ...]
) -> Flow:
    """The teacher with each solved layer replaced by a layer that is one pass, and near it."""
    strange = [part for part in parts if _solved(part) is None and part.forward_cost != "one pass"]
    if strange:
        raise ValueError(
            f"expected a teacher of autoregressive layers and maps of one pass, got {type(strange[0]).__name__}; give "
            "student=cf.IAF(...)"
        )
    traces, _ = _traces(teacher, parts, draw, PILOT)
    made = [
        copy.deepcopy(part) if (layer := _solved(part)) is None else _mirrored(layer, trace, hidden)
        for part, trace in zip(parts, traces, strict=True)
    ]
    return Flow(copy.deepcopy(teacher.base), Compose(made)).requires_grad_()


def _mirrored(layer: Autoregressive, trace: _Trace, hidden: tuple[int, ...]) -> Transform:
    """A layer of one pass from v to u: where its degrees ascend, a linear map and what that leaves over."""
    config = {**layer.config(), "univariate": _univariate(layer.univariate)}
    if hidden and hidden != layer.hidden:
        config = {k: v for k, v in config.items() if k in PLAIN} | {"hidden": hidden}
    made = Autoregressive(**config).to(trace.v)
    if made.hidden == layer.hidden:
        # The teacher's parameters are linear in its last hidden units: these know what matters in u, and after the
        # linear map the student sees nearly u. What leads to the parameters themselves starts anew.
        last = f"layers.{len(layer.hidden)}."
        theirs = {k: v for k, v in layer.made.state_dict().items() if not k.startswith((last, "direct"))}
        made.made.load_state_dict(theirs, strict=False)
    if list(layer.degrees) != sorted(layer.degrees):
        return made
    return Compose([_linear(layer, trace), made])


def _univariate(univariate: Univariate) -> Univariate:
    """The map of the student's layers: its own where inverses are like it, else affine, as for a gate."""
    return univariate if isinstance(univariate, Affine | RationalQuadraticSpline | SinhArcsinh) else Affine()


def _linear(layer: Autoregressive, trace: _Trace) -> Triangular:
    """U = mean + L v: L_ii the geometric mean of du_i/dv_i, the rest of row i by least squares on lower degrees."""
    v, u = trace.v.double(), trace.u.double()
    slope = -layer.univariate.forward(trace.u, _known(trace))[1].double().mean(0)
    ones = torch.cat([v.new_ones(len(v), 1), v], 1)
    gram, rest = ones.T @ ones / len(v), ones.T @ (u - v * slope.exp()) / len(v)
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    mean, factor = torch.zeros_like(slope), torch.diag(slope.exp())
    for i, d in enumerate(layer.degrees):
        seen = 1 + sum(other < d for other in layer.degrees)
        row = torch.linalg.solve(gram[:seen, :seen], rest[:seen, i])
        mean[i], factor[i, : seen - 1] = row[0], row[1:]
    return Triangular(mean.to(trace.v), factor.to(trace.v))


def _known(trace: _Trace) -> Tensor:
    if trace.params is None:
        raise ValueError("expected the trace of a solved layer, got one without parameters")
    return trace.params


def _checked(student: Flow, teacher: Flow) -> Flow:
    """A copy of a student that somebody brings along."""
    if (student.features, student.context) != (teacher.features, teacher.context):
        raise ValueError(
            f"expected a student with features={teacher.features} and context={teacher.context}, got features="
            f"{student.features} and context={student.context}"
        )
    if student.transform.forward_cost != "one pass":
        raise ValueError(f"expected a student that samples in one pass, such as an IAF, got\n{student!r}")
    return copy.deepcopy(student)


# -- objectives --------------------------------------------------------------------------------------


def _by_layer(
    teacher: Flow, parts: list[Transform], draw: Callable[[int], Tensor | None], n: int
) -> Callable[[Flow, None], Tensor]:
    """All layers at once, each fed by the teacher: minus the sum of their losses, (N,), in nats near the end."""

    def objective(student: Flow, _: None) -> Tensor:
        traces, c = _traces(teacher, parts, draw, n)
        total = traces[0].v.new_zeros(len(traces[0].v))
        # the student's transform is a chain of as many parts
        for part, ours, trace in zip(parts, student.transform, traces, strict=True):  # type: ignore[call-overload]
            if (layer := _solved(part)) is not None:
                total = total - _layer_loss(layer, ours, trace, c)
        return total

    return objective


def _layer_loss(layer: Autoregressive, ours: Transform, trace: _Trace, c: Tensor | None) -> Tensor:
    """How far the teacher's layer takes the student's u' from v: sqrt(1 + 2 e) - 1, e as in `distill`, (N,)."""
    v = trace.v
    u, ours_slope = ours.forward_by_feature(v, torch.zeros_like(v), c if ours.context else None)
    w, slope = layer.univariate.forward(u[..., layer.order], _known(trace))
    squares = (w - v[..., layer.order]).square() + (slope + ours_slope[..., layer.order]).square()
    return torch.sqrt(1 + squares.sum(-1)) - 1


def _as_a_whole(
    teacher: Flow, parts: list[Transform], draw: Callable[[int], Tensor | None], n: int, forward: float
) -> Callable[[Flow, None], Tensor]:
    """One term: -KL(student || teacher), with the path gradient, less forward times KL(teacher || student)."""

    def objective(student: Flow, _: None) -> Tensor:
        c, shape = _drawn(draw, n, _device(teacher))
        z, log_q = student(c).rsample_and_path_log_prob(shape)
        terms = (teacher(c).log_prob(z) - log_q).mean()
        if forward:
            traces, c = _traces(teacher, parts, draw, n)
            x = traces[-1].u
            terms = terms + forward * (student(c).log_prob(x) - teacher(c).log_prob(x)).mean()
        return terms

    return objective


# -- how well it went --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How far a student is from its teacher; in nats, with standard errors."""

    draws: int  # of each
    reverse: float  # KL(student || teacher)
    reverse_error: float
    forward: float  # KL(teacher || student); a few exploding draws of the teacher may decide it
    forward_error: float
    forward_trimmed: float  # the same without the largest hundredth of its terms
    ess: float  # of the student's draws, weighted to be the teacher's, as a share of them
    energy: float  # distance between draws of both; see `energy_test`
    p_value: float  # of that distance if both had one distribution


@torch.no_grad()
def agreement(
    teacher: Flow, student: Flow, contexts: Contexts | None = None, draws: int = 10_000, tested: int = 1000
) -> Agreement:
    """Compare both flows by their own draws and exact densities; noise comes from torch's global generator.

    Args:
        teacher, student: of the same features and context.
        contexts: as `distill` takes them; one for each draw. The two-sample test is then one of (c, x).
        draws: of each flow, for the KLs.
        tested: of each flow, for the two-sample test, whose cost grows with their square.

    Raises:
        ValueError: as `distill` does for contexts; fewer than two draws.

    Example:
        >>> import torch, counterflow as cf
        >>> _ = torch.manual_seed(0)
        >>> teacher = cf.MAF(features=3, layers=2, hidden=(16,), seed=0)
        >>> found = cf.agreement(teacher, teacher, draws=1000)
        >>> found.ess > 0.999, found.p_value > 0.01
        (True, True)
    """
    if min(draws, tested) < 2:
        raise ValueError(f"expected draws and tested of at least 2, got {draws} and {tested}")
    draw, device = _contexts(teacher, contexts), _device(teacher)
    reverse, forward, ours, theirs = [], [], [], []
    for n in [2048] * (draws // 2048) + [draws % 2048] * (draws % 2048 > 0):
        c, shape = _drawn(draw, n, device)
        z, log_q = student(c).rsample_and_log_prob(shape)
        reverse.append(log_q - teacher(c).log_prob(z))
        ours.append(z if c is None else torch.cat([c, z], 1))
        c, shape = _drawn(draw, n, device)
        x, log_p = teacher(c).rsample_and_log_prob(shape)
        forward.append(log_p - student(c).log_prob(x))
        theirs.append(x if c is None else torch.cat([c, x], 1))
    back, ahead = (torch.cat(each).double().nan_to_num(math.inf, math.inf) for each in (reverse, forward))
    kept = ahead.sort().values[: max(1, int(0.99 * len(ahead)))]
    test = energy_test(torch.cat(ours)[:tested], torch.cat(theirs)[:tested])
    return Agreement(
        draws=draws,
        reverse=back.mean().item(),
        reverse_error=back.std().item() / draws**0.5,
        forward=ahead.mean().item(),
        forward_error=ahead.std().item() / draws**0.5,
        forward_trimmed=kept.mean().item(),
        ess=effective_sample_size(-back).item() / draws,
        energy=test.distance,
        p_value=test.p_value,
    )
