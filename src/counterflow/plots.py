"""Plots of arrays, written to PNG files. A plot knows no model: numbers come in, a file goes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from counterflow.checks import require

Array = np.ndarray[Any, Any]
COLORS = ("#4c6a92", "#d1603d", "#5b8e5a", "#8a5a9e", "#b08d2e", "#4aa3a2", "#7d7d7d", "#c06c9b")
DASHED = (0, (4, 2))
FILLED = {"histtype": "stepfilled", "color": COLORS[1], "alpha": 0.45}
OUTLINED = {"histtype": "step", "color": COLORS[0], "lw": 1.2}
_on_figure: ContextVar[Callable[[str, Any], None]] = ContextVar("on_figure", default=lambda name, figure: None)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure and its axes (rows, columns), without pyplot, which would need a screen and global state."""
    canvas = require("matplotlib.backends.backend_agg", "plots", "plots")
    figure = require("matplotlib.figure", "plots", "plots").Figure(figsize=(width, height), layout="constrained")
    canvas.FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _grid(panels: int, columns: int, width: float, height: float, margin: float) -> tuple[Any, Any]:
    """Return a figure of panels of a size in inches, `columns` in a row, and their axes (panels,)."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure, axes = _figure(rows, columns, max(width * columns + 0.4, 5.5), height * rows + margin)
    for axis in axes.flat[panels:]:
        axis.axis("off")
    return figure, axes.flat[:panels]


@contextmanager
def figures_to(on_figure: Callable[[str, Any], None]) -> Iterator[None]:
    """Call on_figure(name, figure) with each figure that is saved in the block; the name is plots/STEM."""
    before = _on_figure.set(on_figure)
    try:
        yield
    finally:
        _on_figure.reset(before)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    _on_figure.get()(f"plots/{path.stem}", figure)
    return path


def _save_grid(figure: Any, axes: Any, title: str, path: Path) -> Path:
    """Save a figure of panels with a title and one legend, that of the first panel."""
    handles, labels = axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    for handle in legend.legend_handles:
        handle.set_alpha(0.9)
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)


def _equal_weights(values: Array) -> Array:
    return np.full(len(values), 1 / len(values))


def _limit_to(axis: Any, points: Array, outside: float, margin: float) -> None:
    """Set the limits of a scatter plot of points (n, 2), leaving out the outermost `outside` % on every side."""
    low, high = np.percentile(points, [outside, 100 - outside], axis=0)
    room = margin * (high - low) + 1e-6
    axis.set(xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]))


def learning_curves(
    path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], objective: str = "ELBO, nats per row"
) -> Path:
    """Plot the validation (thick) and training (thin) objective by epoch: name -> (train, validation)."""
    figure, ((axis,),) = _figure(1, 1, 7, 4.2)
    shown = []
    for (name, (train, validation)), color in zip(curves.items(), COLORS, strict=False):
        epochs = np.arange(1, len(validation) + 1)
        style = {"color": color, "marker": "o" if len(epochs) == 1 else ""}
        axis.plot(epochs, train, lw=0.8, alpha=0.5, **style)
        axis.plot(epochs, validation, lw=2, label=f"{name}: best {max(validation, default=np.nan):.4g}", **style)
        shown += [value for value in (*train[len(train) // 2 :], *validation[1:]) if np.isfinite(value)]
    if shown:  # the first epochs, and the small KL term of a warm-up, would flatten the rest
        low, high = np.percentile(shown, 8), max(shown)
        axis.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low) + 1e-6)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="epoch", ylabel=objective, title="validation (thick) and training (thin, warm-up included)")
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right")
    return _save(figure, path)


def _show(axis: Any, image: Array) -> None:
    """Show one image (C, H, W) in [0, 1]."""
    pixels = np.moveaxis(np.clip(image, 0, 1), 0, -1)
    if pixels.shape[-1] not in (1, 3):
        pixels = pixels.mean(-1, keepdims=True)
    axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray_r", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])


def image_rows(path: Path, rows: Mapping[str, Array], title: str) -> Path:
    """Show rows of images below each other, name -> (n, C, H, W) in [0, 1]."""
    n = max(len(images) for images in rows.values())
    figure, axes = _figure(len(rows), n, 1.0 * n + 1.2, 1.05 * len(rows) + 0.5)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            _show(axis, image)
        for axis in line[len(images) :]:
            axis.axis("off")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle(title)
    return _save(figure, path)


def image_grids(path: Path, grids: Mapping[str, Array], title: str, columns: int = 8) -> Path:
    """Show grids of images side by side, name -> (n, C, H, W) in [0, 1]."""
    figure, axes = _figure(1, len(grids), 4.4 * len(grids), 4.6)
    figure.get_layout_engine().set(w_pad=0.15)
    for axis, (name, images) in zip(axes[0], grids.items(), strict=True):
        _show(axis, _tile(np.asarray(images), columns))
        axis.set_title(name)
        axis.set_frame_on(False)
    figure.suptitle(title)
    return _save(figure, path)


def _tile(images: Array, columns: int) -> Array:
    """Return images (n, C, H, W) as one image (C, rows H, columns W), separated by white lines."""
    padded = np.pad(images, ((0, -len(images) % columns), (0, 0), (1, 1), (1, 1)))
    n, c, h, w = padded.shape
    rows = n // columns
    return padded.reshape(rows, columns, c, h, w).transpose(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)


def pairs(
    path: Path,
    tables: Mapping[str, Array],
    title: str,
    max_features: int = 4,
    names: Sequence[str] | None = None,
) -> Path:
    """Plot the first features of tables against each other: histograms on the diagonal, scatter plots below.

    Args:
        path: PNG file to write.
        tables: name -> (n, D); the first one sets the limits.
        title: of the figure.
        max_features: number of features at most.
        names: of the features.
    """
    size = min(max_features, *(table.shape[1] for table in tables.values()))
    names = [f"feature {i}" for i in range(size)] if names is None else names
    figure, axes = _figure(size, size, 2.2 * size + 1.5, 2.2 * size)
    first = next(iter(tables.values()))
    spans = [np.percentile(first[:, i], [0.5, 99.5]) for i in range(size)]
    limits = [(low - 0.2 * (high - low) - 1e-6, high + 0.2 * (high - low) + 1e-6) for low, high in spans]
    for i in range(size):
        for j in range(size):
            axis = axes[i][j]
            if j > i:
                axis.axis("off")
                continue
            for (name, table), color in zip(tables.items(), COLORS, strict=False):
                if i == j:
                    bins = {"bins": 40, "range": limits[i], "weights": _equal_weights(table)}
                    axis.hist(table[:, i], **bins, histtype="step", color=color, label=name)
                else:
                    axis.scatter(table[:, j], table[:, i], s=5, alpha=0.5, color=color, lw=0, zorder=-len(table))
            axis.set_xlim(limits[j])
            if i != j:
                axis.set_ylim(limits[i])
            axis.set(xlabel=names[j] if i == size - 1 else "", ylabel=names[i] if j == 0 and i else "")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right")
    figure.suptitle(title)
    return _save(figure, path)


def histograms(path: Path, samples: Mapping[str, Array], label: str, title: str) -> Path:
    """Plot histograms of numbers (n,) over each other, as shares; the legend counts the values below the axis."""
    figure, ((axis,),) = _figure(1, 1, 7, 4.2)
    finite = np.concatenate([values[np.isfinite(values)] for values in samples.values()])
    low, high = np.percentile(finite, [0.5, 99.9]) if len(finite) else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    bins = int(np.clip(min(map(len, samples.values())) / 6, 10, 60))
    for k, (name, values) in enumerate(samples.items()):
        below = int((values < low).sum())
        note = f" ({below} below)" if below else ""
        style = OUTLINED if k else FILLED
        shares = _equal_weights(values)
        axis.hist(values, bins=bins, range=(low, high), weights=shares, label=f"{name}: {len(values):,}{note}", **style)
    axis.set(xlabel=label, yticks=[], ylabel="share", xlim=(low, high), title=title)
    axis.legend(loc="upper left")
    return _save(figure, path)


def uniform_histograms(
    path: Path,
    u: Array,
    names: Sequence[str],
    title: str,
    label: str = "held-out rows",
    max_panels: int = 20,
    columns: int = 5,
) -> Path:
    """Plot histograms of the columns of u (n, D) in [0, 1], with the band of nine of ten bars of uniform numbers.

    Of more than `max_panels` columns the least uniform ones are shown, by the Kolmogorov distance.
    """
    ranks = (np.arange(len(u)) + 0.5)[:, None] / len(u)
    distance = np.abs(np.sort(u, 0) - ranks).max(0)
    chosen = sorted(np.argsort(-distance, kind="stable")[:max_panels])
    figure, axes = _grid(len(chosen), columns, 2.2, 1.7, margin=1.1)
    bins = int(np.clip(len(u) // 20, 4, 20))
    spread = 1.645 * np.sqrt((bins - 1) / len(u))  # of a bar of mean 1: the binomial's, in the normal approximation
    for axis, i in zip(axes, chosen, strict=True):
        axis.axhspan(max(1 - spread, 0), 1 + spread, color="0.88", label="nine of ten bars of uniform numbers")
        axis.hist(u[:, i], bins=bins, range=(0, 1), density=True, label=label, **OUTLINED)
        axis.set(xlim=(0, 1), ylim=(0, None), xticks=[0, 1], yticks=[])
        axis.set_title(names[i] if len(names[i]) <= 22 else names[i][:20] + "..", fontsize=8)
    if len(chosen) < u.shape[1]:
        title += f", the {len(chosen)} least uniform of {u.shape[1]}"
    return _save_grid(figure, axes, title, path)


class LatentPanel(NamedTuple):
    """One model's posterior of one datum over two latent coordinates."""

    model: str
    draws: Array  # (n, 2), from q(z|x)
    truth: Array  # (n, 2), importance-resampled to follow p(z|x)
    coordinates: tuple[int, int]
    note: str  # accuracy of `truth`


def latent_posteriors(path: Path, data: Sequence[Array], panels: Sequence[Sequence[LatentPanel]]) -> Path:
    """Show for each datum, an image (C, H, W) or a row (D,), each model's q(z|x) beside its true posterior."""
    columns = 1 + 2 * len(panels[0])
    figure, axes = _figure(len(data), columns, 2.7 * columns - 0.8, 2.9 * len(data) + 0.6)
    for line, datum, models in zip(axes, data, panels, strict=True):
        if datum.ndim == 3:
            _show(line[0], datum)
        else:
            line[0].bar(np.arange(len(datum)), datum, color="0.5")
        line[0].set_title("held-out datum x", fontsize=9)
        for k, panel in enumerate(models):
            both = np.concatenate([panel.draws, panel.truth])
            clouds = ((panel.draws, f"{panel.model}: q(z|x)"), (panel.truth, f"{panel.model}: p(z|x), {panel.note}"))
            for axis, (points, label) in zip(line[1 + 2 * k : 3 + 2 * k], clouds, strict=True):
                axis.scatter(*points.T, s=4, alpha=0.25, color=COLORS[k], lw=0, rasterized=True)
                _ellipse(axis, panel.draws)
                _limit_to(axis, both, outside=0.3, margin=0.12)
                axis.set_title(label, fontsize=9)
                axis.set(xlabel=f"z[{panel.coordinates[0]}]", ylabel=f"z[{panel.coordinates[1]}]")
    figure.suptitle(
        "Posterior over two latent coordinates: each model's q beside the true posterior under its own decoder\n"
        "line: the axis-aligned Gaussian with the means and deviations of q, at 2 deviations",
        fontsize=10,
    )
    return _save(figure, path)


def _ellipse(axis: Any, points: Array) -> None:
    angle = np.linspace(0, 2 * np.pi, 100)
    center = points.mean(0)
    radius = 2 * points.std(0)
    axis.plot(center[0] + radius[0] * np.cos(angle), center[1] + radius[1] * np.sin(angle), color="0.25", lw=0.8)


class DirectionCosts(NamedTuple):
    """Cost of the one-pass direction and of the other one: (D, cost) each."""

    parallel: tuple[Sequence[float], Sequence[float]]
    sequential: tuple[Sequence[float], Sequence[float]]


def direction_costs(path: Path, curves: Mapping[str, DirectionCosts], unit: str, title: str) -> Path:
    """Plot the cost of both directions against D on logarithmic axes; the first curves are thick."""
    figure, ((axis,),) = _figure(1, 1, 9, 5)
    colors = (COLORS[1], COLORS[0], *COLORS[2:])
    for k, ((name, costs), color) in enumerate(zip(curves.items(), colors, strict=False)):
        style = {"color": color, "marker": "o", "ms": 3.5 if k else 5, "zorder": 2 if k else 3}
        axis.plot(*costs.sequential, lw=1.3 if k else 2.6, label=name, **style)
        axis.plot(*costs.parallel, lw=0.8 if k else 1.6, ls=DASHED, alpha=0.8, **style)
    axis.plot([], [], color="0.4", lw=1, label="sequential direction")
    axis.plot([], [], color="0.4", lw=1, ls=DASHED, label="parallel direction")
    ticks = sorted({D for costs in curves.values() for D in costs.parallel[0]})
    axis.set(xscale="log", yscale="log", xlabel="D", ylabel=unit, title=title)
    axis.set_xticks(ticks, [str(D) for D in ticks])
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False)
    return _save(figure, path)


class MarginalPanel(NamedTuple):
    """One number of a posterior: draws of the approximation and their importance weights."""

    name: str
    draws: Array  # (S,)
    weights: Array  # (S,), summing to one
    note: str


def marginals(path: Path, panels: Sequence[MarginalPanel], title: str, columns: int = 4) -> Path:
    """Plot histograms of each number: the draws weighted towards the posterior (filled) and unweighted (line)."""
    figure, axes = _grid(len(panels), columns, 2.6, 2.0, margin=0.9)
    for axis, panel in zip(axes, panels, strict=True):
        limits = _span(panel.draws, panel.weights)
        bins = {"bins": 40, "range": limits}
        axis.hist(panel.draws, weights=panel.weights, label="posterior, by importance weights", **bins, **FILLED)
        axis.hist(panel.draws, weights=_equal_weights(panel.draws), label="approximation", **bins, **OUTLINED)
        axis.set(yticks=[], xlim=limits)
        axis.set_title(panel.name, fontsize=10)
        axis.text(0.98, 0.95, panel.note, transform=axis.transAxes, ha="right", va="top", fontsize=7, color="0.35")
    return _save_grid(figure, axes, title, path)


def _span(draws: Array, weights: Array) -> tuple[float, float]:
    """Return limits that hold nearly all of the draws, with and without their weights."""
    order = np.argsort(draws)
    places = np.searchsorted(np.cumsum(weights[order]), [0.003, 0.997]).clip(max=len(draws) - 1)
    weighted = draws[order][places]
    plain = np.percentile(draws, [0.3, 99.7])
    low = min(weighted[0], plain[0])
    high = max(weighted[1], plain[1])
    margin = 0.03 * (high - low) or 1.0
    return low - margin, high + margin


class PairPanel(NamedTuple):
    """Two coordinates of a posterior: draws of the approximation and of the posterior."""

    names: tuple[str, str]
    approximation: Array  # (n, 2)
    posterior: Array  # (n, 2)
    note: str


def posterior_pairs(path: Path, panels: Sequence[PairPanel], title: str, columns: int = 3) -> Path:
    """Plot pairs of coordinates: draws of the approximation, and draws of the posterior over them."""
    figure, axes = _grid(len(panels), columns, 3.3, 3.1, margin=1.0)
    for axis, panel in zip(axes, panels, strict=True):
        clouds = (("approximation", panel.approximation), ("posterior, by importance resampling", panel.posterior))
        for (label, points), color in zip(clouds, COLORS, strict=False):
            axis.scatter(*points.T, s=6, alpha=0.4, color=color, lw=0, label=label, rasterized=True)
        _limit_to(axis, np.concatenate([panel.approximation, panel.posterior]), outside=0.2, margin=0.1)
        axis.set(xlabel=panel.names[0], ylabel=panel.names[1])
        axis.set_title(panel.note, fontsize=9)
    return _save_grid(figure, axes, title, path)


class StageCurve(NamedTuple):
    """ELBO of one stage of a posterior fit, and the verdict on its draws."""

    name: str
    steps: int
    elbo: Sequence[float]  # evenly spaced over the steps, nats
    note: str


def stage_curves(path: Path, curves: Sequence[StageCurve]) -> Path:
    """Plot the ELBO of a posterior fit, stage after stage."""
    figure, ((axis,),) = _figure(1, 1, 7.5, 4.2)
    first_step = 0
    shown: list[float] = []
    for k, curve in enumerate(curves):
        steps = first_step + curve.steps * np.arange(1, len(curve.elbo) + 1) / max(len(curve.elbo), 1)
        style = {"color": COLORS[k % 4], "marker": "o", "ms": 3.5, "lw": 1.8}
        axis.plot(steps, curve.elbo, label=f"{curve.name}: {curve.note}", **style)
        if k:
            axis.axvline(first_step, color="0.8", lw=0.8, zorder=0)
        first_step += curve.steps
        shown += [value for value in curve.elbo[0 if k else 1 :] if np.isfinite(value)]
    if shown:  # the first value of a fit would flatten the rest
        low, high = min(shown), max(shown)
        room = 0.15 * max(high - low, 0.02)
        axis.set_ylim(low - room, high + room)
    axis.set(xlabel="steps", ylabel="ELBO, nats", xlim=(0, None), title="ELBO by stage; every stage has its own noise")
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right", fontsize=9)
    return _save(figure, path)


def weight_tail(path: Path, log_weights: Array, smoothed: Array, note: str) -> Path:
    """Plot importance weights in decreasing order on logarithmic axes, and the Pareto tail fitted to them.

    A line of slope -k is a Pareto tail of shape k. Weights are shown relative to their mean.

    Args:
        path: PNG file to write.
        log_weights: of the draws (S,), in nats.
        smoothed: log weights with the fitted tail (S,), as `psis` returns them.
        note: appended to the label of the tail.
    """
    figure, ((axis,),) = _figure(1, 1, 7.5, 4.4)
    order = np.argsort(-log_weights)
    raw, smooth = (np.exp(values[order] - _log_mean(values)) for values in (log_weights, smoothed))
    rank = np.arange(1, len(order) + 1)
    tail = int(np.ceil(min(len(order) / 5, 3 * len(order) ** 0.5)))  # the length that `psis` takes
    axis.plot(rank, raw, ".", color=COLORS[0], ms=4, label="weights of the draws")
    axis.plot(rank[:tail], np.sort(smooth[:tail])[::-1], color=COLORS[1], lw=2, label="fitted Pareto tail, " + note)
    axis.axvline(tail, color="0.7", lw=0.8, ls=DASHED)
    axis.axhline(1, color="0.7", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="draws, the heaviest first", ylabel="weight / mean weight")
    shown = raw[: max(1, int(0.99 * len(raw)))]  # the lightest weights can be arbitrarily small
    axis.set_ylim(max(shown.min(), 1e-4) / 1.5, max(raw.max(), smooth.max()) * 1.8)
    heaviest = f"{100 * raw[0] / len(raw):.2g} %"
    axis.set_title(
        f"the heaviest draw has {heaviest} of the weight; equal weights: {100 / len(raw):.2g} %", fontsize=10
    )
    axis.grid(alpha=0.25)
    axis.legend(loc="lower left", fontsize=9)
    return _save(figure, path)


def _log_mean(log_values: Array) -> float:
    top = log_values.max()
    return float(top + np.log(np.exp(log_values - top).mean()))
