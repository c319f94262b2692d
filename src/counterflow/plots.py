"""Pictures of arrays. No plot knows a model: what is drawn comes in as numbers, and a PNG goes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
COLORS = ("#4c6a92", "#d1603d", "#5b8e5a", "#8a5a9e")


def check_installed() -> None:
    """Raise ImportError where there is no matplotlib, for who would rather know before an hour's work."""
    _figure(1, 1, 1, 1)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure without any global state (and so without a screen)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("expected matplotlib for pictures; pip install 'counterflow[plots]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def learning_curves(
    path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], objective: str = "ELBO, nats a datum"
) -> Path:
    """Validation (thick) and training (thin) objective by epoch: name -> (train, validation)."""
    figure, ((axis,),) = _figure(1, 1, 7, 4.2)
    values = []
    for (name, (train, validation)), color in zip(curves.items(), COLORS, strict=False):
        epochs = np.arange(1, len(validation) + 1)
        marker = "o" if len(epochs) == 1 else ""
        axis.plot(epochs, train, marker=marker, color=color, lw=0.8, alpha=0.5)
        axis.plot(
            epochs,
            validation,
            marker=marker,
            color=color,
            lw=2,
            label=f"{name}: {max(validation, default=np.nan):.2f} at best",
        )
        values += [v for v in (*train[len(train) // 2 :], *validation[1:]) if np.isfinite(v)]
    if values:  # the first epochs, and a warm-up's light KL, would flatten what matters
        low, high = np.percentile(values, 8), max(values)
        axis.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low) + 1e-6)
    axis.set(xlabel="epoch", ylabel=objective, title="validation (thick) and training (thin, with its warm-up)")
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right")
    return _save(figure, path)


def _show(axis: Any, image: Array) -> None:
    """One image (C, H, W) in [0, 1]."""
    picture = np.moveaxis(np.clip(image, 0, 1), 0, -1)
    if picture.shape[-1] not in (1, 3):
        picture = picture.mean(-1, keepdims=True)
    axis.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray_r", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])


def image_rows(path: Path, rows: Mapping[str, Array], title: str) -> Path:
    """Rows of images, each name -> (n, C, H, W) in [0, 1], under each other."""
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
    """Grids of images side by side, each name -> (n, C, H, W) in [0, 1]."""
    figure, axes = _figure(1, len(grids), 4.4 * len(grids), 4.6)
    figure.get_layout_engine().set(w_pad=0.15)
    for axis, (name, images) in zip(axes[0], grids.items(), strict=True):
        _show(axis, _tile(np.asarray(images), columns))
        axis.set_title(name)
        axis.set_frame_on(False)
    figure.suptitle(title)
    return _save(figure, path)


def _tile(images: Array, columns: int) -> Array:
    """(n, C, H, W) -> one image (C, rows H, columns W), a white line between."""
    padded = np.pad(images, ((0, -len(images) % columns), (0, 0), (1, 1), (1, 1)))
    n, c, h, w = padded.shape
    return (
        padded.reshape(n // columns, columns, c, h, w)
        .transpose(2, 0, 3, 1, 4)
        .reshape(c, n // columns * h, columns * w)
    )


def pairs(path: Path, sets: Mapping[str, Array], title: str, most: int = 4, names: Sequence[str] | None = None) -> Path:
    """Scatter plots of the first features of tables (n, D) against each other, histograms on the diagonal."""
    size = min(most, *(table.shape[1] for table in sets.values()))
    names = [f"feature {i}" for i in range(size)] if names is None else names
    figure, axes = _figure(size, size, 2.2 * size + 1.5, 2.2 * size)
    spans = [np.percentile(next(iter(sets.values()))[:, i], [0.5, 99.5]) for i in range(size)]
    limits = [(low - 0.2 * (high - low) - 1e-6, high + 0.2 * (high - low) + 1e-6) for low, high in spans]
    for i in range(size):
        for j in range(size):
            axis = axes[i][j]
            for (name, table), color in zip(sets.items(), COLORS, strict=False):
                if i == j:
                    share = np.full(len(table), 1 / len(table))
                    bins = {"bins": 40, "range": limits[i], "weights": share}
                    axis.hist(table[:, i], **bins, histtype="step", color=color, label=name)
                elif j < i:
                    axis.scatter(table[:, j], table[:, i], s=5, alpha=0.5, color=color, lw=0, zorder=-len(table))
            if j > i:
                axis.axis("off")
                continue
            axis.set_xlim(limits[j])
            if i != j:
                axis.set_ylim(limits[i])
            axis.set(xlabel=names[j] if i == size - 1 else "", ylabel=names[i] if j == 0 and i else "")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right")
    figure.suptitle(title)
    return _save(figure, path)


def histograms(path: Path, sets: Mapping[str, Array], label: str, title: str) -> Path:
    """Histograms of numbers (n,) over each other, as shares; what is not finite is counted in the legend."""
    figure, ((axis,),) = _figure(1, 1, 7, 4.2)
    finite = np.concatenate([values[np.isfinite(values)] for values in sets.values()])
    span = tuple(np.percentile(finite, [0.5, 99.9])) if len(finite) else (0.0, 1.0)
    span = span if span[0] < span[1] else (span[0] - 0.5, span[0] + 0.5)
    bins = int(np.clip(min(map(len, sets.values())) / 6, 10, 60))
    for k, (name, values) in enumerate(sets.items()):
        style = _FILLED_AND_LINE[min(k, 1)]
        beyond = int((values < span[0]).sum())
        note = f" ({beyond} below)" if beyond else ""
        share = np.full(len(values), 1 / len(values))
        axis.hist(values, bins=bins, range=span, weights=share, label=f"{name}: {len(values):,}{note}", **style)
    axis.set(xlabel=label, yticks=[], ylabel="share", xlim=span, title=title)
    axis.legend(loc="upper left")
    return _save(figure, path)


def uniforms(path: Path, u: Array, names: Sequence[str], title: str, most: int = 20, columns: int = 5) -> Path:
    """Histograms of the columns of u (n, D) in [0, 1], the least uniform ones, and what chance alone would do.

    The band holds nine of ten bars of uniform numbers. Least uniform is what strays furthest by Kolmogorov's distance.
    """
    ranks = (np.arange(len(u)) + 0.5)[:, None] / len(u)
    distance = np.abs(np.sort(u, 0) - ranks).max(0)
    chosen = sorted(np.argsort(-distance, kind="stable")[:most])
    columns = min(columns, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = _figure(rows, columns, max(2.2 * columns + 0.3, 5.5), 1.7 * rows + 1.1)
    bins = int(np.clip(len(u) // 20, 4, 20))
    spread = 1.645 * np.sqrt((bins - 1) / len(u))  # of a bar of mean 1: binomial, as a normal
    for axis, i in zip(axes.flat, chosen, strict=False):
        axis.axhspan(max(1 - spread, 0), 1 + spread, color="0.88", label="nine of ten bars, were they uniform")
        axis.hist(u[:, i], bins=bins, range=(0, 1), density=True, label="held-out rows", **_FILLED_AND_LINE[1])
        axis.set(xlim=(0, 1), ylim=(0, None), xticks=[0, 1], yticks=[])
        axis.set_title(names[i] if len(names[i]) <= 22 else names[i][:20] + "..", fontsize=8)
    which = f", the {len(chosen)} of {u.shape[1]} that stray most" if len(chosen) < u.shape[1] else ""
    _finish_panels(figure, axes, len(chosen), title + which)
    return _save(figure, path)


class PosteriorPanel(NamedTuple):
    """One model's posterior of one datum over two latent coordinates."""

    model: str
    draws: Array  # (n, 2), from q(z|x)
    truth: Array  # (n, 2), importance-resampled towards p(z|x)
    coordinates: tuple[int, int]
    note: str  # how far the truth can be trusted


def posteriors(path: Path, data: Sequence[Array], panels: Sequence[Sequence[PosteriorPanel]]) -> Path:
    """For each datum (an image (C, H, W), or a row) what each model's q(z|x) says, beside its own true posterior."""
    columns = 1 + 2 * len(panels[0])
    figure, axes = _figure(len(data), columns, 2.7 * columns - 0.8, 2.9 * len(data) + 0.6)
    for line, datum, models in zip(axes, data, panels, strict=True):
        if datum.ndim == 3:
            _show(line[0], datum)
        else:
            line[0].bar(np.arange(len(datum)), datum, color="0.5")
        line[0].set_title("held-out datum x", fontsize=9)
        for k, panel in enumerate(models):
            color = COLORS[k]
            both = np.concatenate([panel.draws, panel.truth])
            low, high = np.percentile(both, 0.3, axis=0), np.percentile(both, 99.7, axis=0)
            margin = 0.12 * (high - low) + 1e-6
            pictures = ((panel.draws, f"{panel.model}: q(z|x)"), (panel.truth, f"{panel.model}: p(z|x), {panel.note}"))
            for axis, (points, label) in zip(line[1 + 2 * k : 3 + 2 * k], pictures, strict=True):
                axis.scatter(*points.T, s=4, alpha=0.25, color=color, lw=0, rasterized=True)
                _ellipse(axis, panel.draws)
                axis.set_title(label, fontsize=9)
                axis.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
                axis.set(xlabel=f"z[{panel.coordinates[0]}]", ylabel=f"z[{panel.coordinates[1]}]")
    figure.suptitle(
        "Posterior over two latent coordinates: each model's q beside the truth under its own decoder. "
        "Line: the axis-aligned Gaussian with q's means and deviations, at 2 deviations",
        fontsize=10,
    )
    return _save(figure, path)


def _ellipse(axis: Any, points: Array) -> None:
    angle = np.linspace(0, 2 * np.pi, 100)
    center, spread = points.mean(0), points.std(0)
    axis.plot(
        center[0] + 2 * spread[0] * np.cos(angle), center[1] + 2 * spread[1] * np.sin(angle), color="0.25", lw=0.8
    )


class Directions(NamedTuple):
    """What the direction of one pass and the other one cost at each D: (D, cost) each."""

    parallel: tuple[Sequence[float], Sequence[float]]
    sequential: tuple[Sequence[float], Sequence[float]]


def directions(path: Path, lines: Mapping[str, Directions], unit: str, title: str) -> Path:
    """Cost of both directions against D, on logarithmic axes; the first contestant is drawn thick."""
    figure, ((axis,),) = _figure(1, 1, 9, 5)
    colors = ("#d1603d", "#4c6a92", "#5b8e5a", "#8a5a9e", "#b08d2e", "#4aa3a2", "#7d7d7d", "#c06c9b")
    dashed = (0, (4, 2))
    for (name, line), color in zip(lines.items(), colors, strict=False):
        first = name == next(iter(lines))
        style = {"color": color, "marker": "o", "ms": 5 if first else 3.5, "zorder": 3 if first else 2}
        axis.plot(*line.sequential, lw=2.6 if first else 1.3, label=name, **style)
        axis.plot(*line.parallel, lw=1.6 if first else 0.8, ls=dashed, alpha=0.8, **style)
    axis.plot([], [], color="0.4", lw=1, label="sequential direction")
    axis.plot([], [], color="0.4", lw=1, ls=dashed, label="parallel direction")
    ticks = sorted({D for line in lines.values() for D in line.parallel[0]})
    axis.set(xscale="log", yscale="log", xlabel="D", ylabel=unit, title=title)
    axis.set_xticks(ticks, [str(D) for D in ticks])
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False)
    return _save(figure, path)


class Marginal(NamedTuple):
    """One number of a posterior: draws of the approximation, and their importance weights."""

    name: str
    draws: Array  # (S,)
    weights: Array  # (S,), summing to one
    note: str


def marginals(path: Path, panels: Sequence[Marginal], title: str, columns: int = 4) -> Path:
    """Histograms of each number: the draws weighted towards the posterior (filled), and as they are (line)."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _figure(rows, columns, max(2.6 * columns + 0.3, 5.5), 2.0 * rows + 0.9)
    for axis, panel in zip(axes.flat, panels, strict=False):
        low, high = _span(panel.draws, panel.weights)
        as_they_are = np.full(len(panel.draws), 1 / len(panel.draws))
        both = (("posterior, by importance weights", panel.weights), ("approximation as it is", as_they_are))
        for (label, weights), style in zip(both, _FILLED_AND_LINE, strict=True):
            axis.hist(panel.draws, bins=40, range=(low, high), weights=weights, label=label, **style)
        axis.set(yticks=[], xlim=(low, high))
        axis.set_title(panel.name, fontsize=10)
        axis.text(0.98, 0.95, panel.note, transform=axis.transAxes, ha="right", va="top", fontsize=7, color="0.35")
    _finish_panels(figure, axes, len(panels), title)
    return _save(figure, path)


_FILLED_AND_LINE = (
    {"histtype": "stepfilled", "color": COLORS[1], "alpha": 0.45},
    {"histtype": "step", "color": COLORS[0], "lw": 1.2},
)


def _span(draws: Array, weights: Array) -> tuple[float, float]:
    """Where nearly all of the draws are, with and without their weights."""
    order = np.argsort(draws)
    places = np.searchsorted(np.cumsum(weights[order]), [0.003, 0.997]).clip(max=len(draws) - 1)
    low, high = draws[order][places]
    plain = np.percentile(draws, [0.3, 99.7])
    low, high = min(low, plain[0]), max(high, plain[1])
    margin = 0.03 * (high - low) or 1.0
    return low - margin, high + margin


def _finish_panels(figure: Any, axes: Any, used: int, title: str) -> None:
    """Hide what is left over of a grid of panels, and write the legend of the first one and the title."""
    for axis in axes.flat[used:]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    for handle in legend.legend_handles:
        handle.set_alpha(0.9)
    figure.suptitle(title, fontsize=11)


class PairPanel(NamedTuple):
    """Two coordinates of a posterior: draws of the approximation and of the posterior."""

    names: tuple[str, str]
    approximation: Array  # (n, 2)
    posterior: Array  # (n, 2)
    note: str


def crosses(path: Path, panels: Sequence[PairPanel], title: str, columns: int = 3) -> Path:
    """Scatter plots of pairs: the approximation's draws as they are, and those of the posterior over them."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _figure(rows, columns, max(3.3 * columns + 0.4, 5.5), 3.1 * rows + 1.0)
    for axis, panel in zip(axes.flat, panels, strict=False):
        sets = (("approximation as it is", panel.approximation), ("posterior, resampled by weights", panel.posterior))
        for (label, points), color in zip(sets, COLORS, strict=False):
            axis.scatter(*points.T, s=6, alpha=0.4, color=color, lw=0, label=label, rasterized=True)
        both = np.concatenate([panel.approximation, panel.posterior])
        low, high = np.percentile(both, [0.2, 99.8], axis=0)
        margin = 0.1 * (high - low) + 1e-9
        axis.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
        axis.set(xlabel=panel.names[0], ylabel=panel.names[1])
        axis.set_title(panel.note, fontsize=9)
    _finish_panels(figure, axes, len(panels), title)
    return _save(figure, path)


class StageCurve(NamedTuple):
    """What one stage of a fit reached, and the verdict on its draws."""

    name: str
    steps: int
    elbo: Sequence[float]  # evenly spaced over the steps, nats
    note: str


def stages(path: Path, courses: Sequence[StageCurve]) -> Path:
    """The ELBO of a fit, stage after stage."""
    figure, ((axis,),) = _figure(1, 1, 7.5, 4.2)
    begun, shown = 0, []
    for k, course in enumerate(courses):
        at = begun + course.steps * np.arange(1, len(course.elbo) + 1) / max(len(course.elbo), 1)
        style = {"color": COLORS[k % len(COLORS)], "marker": "o", "ms": 3.5, "lw": 1.8}
        axis.plot(at, course.elbo, label=f"{course.name}: {course.note}", **style)
        if k:
            axis.axvline(begun, color="0.8", lw=0.8, zorder=0)
        begun += course.steps
        shown += [value for value in course.elbo[1 if k == 0 else 0 :] if np.isfinite(value)]
    if shown:  # where a fit begins says little, and would flatten the rest
        low, high = min(shown), max(shown)
        room = max(high - low, 0.02)
        axis.set_ylim(low - 0.15 * room, high + 0.15 * room)
    axis.set(xlabel="steps", ylabel="ELBO, nats", xlim=(0, None), title="ELBO by stage, each on noise of its own")
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right", fontsize=9)
    return _save(figure, path)


def weight_tail(path: Path, log_weights: Array, smoothed: Array, note: str) -> Path:
    """The importance weights in order, on logarithmic axes: those of the draws, and the Pareto tail fitted to them.

    Both (S,), in nats, smoothed as they come from `psis`; shown in units of the mean weight. A line of slope -k is a
    Pareto tail of shape k.
    """
    figure, ((axis,),) = _figure(1, 1, 7.5, 4.4)
    order = np.argsort(-log_weights)
    raw, smooth = (np.exp(values[order] - _log_mean(values)) for values in (log_weights, smoothed))
    rank = np.arange(1, len(order) + 1)
    tail = int(np.ceil(min(len(order) / 5, 3 * len(order) ** 0.5)))
    axis.plot(rank, raw, ".", color=COLORS[0], ms=4, label="weights of the draws")
    axis.plot(rank[:tail], np.sort(smooth[:tail])[::-1], color=COLORS[1], lw=2, label="fitted Pareto tail, " + note)
    axis.axvline(tail, color="0.7", lw=0.8, ls=(0, (4, 2)))
    axis.axhline(1, color="0.7", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="draws, the heaviest first", ylabel="weight / mean weight")
    shown = raw[: max(1, int(0.99 * len(raw)))]  # the lightest may be as light as they like
    axis.set_ylim(max(shown.min(), 1e-4) / 1.5, max(raw.max(), smooth.max()) * 1.8)
    axis.set_title(f"the heaviest draw has {100 * raw[0] / len(raw):.2g} % of the weight, all alike would have "
                   f"{100 / len(raw):.2g} %", fontsize=10)  # fmt: skip
    axis.grid(alpha=0.25)
    axis.legend(loc="lower left", fontsize=9)
    return _save(figure, path)


def _log_mean(log_values: Array) -> float:
    top = log_values.max()
    return float(top + np.log(np.exp(log_values - top).mean()))
