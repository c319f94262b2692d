"""Pictures of arrays. No plot knows a model: what is drawn comes in as numbers, and a PNG goes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
COLORS = ("#4c6a92", "#d1603d", "#5b8e5a", "#8a5a9e")


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


def learning_curves(path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Path:
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
    axis.set(
        xlabel="epoch", ylabel="ELBO, nats a datum", title="validation (thick) and training (thin, with its warm-up)"
    )
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


def pairs(path: Path, sets: Mapping[str, Array], title: str, most: int = 4) -> Path:
    """Scatter plots of the first features of tables (n, D) against each other, histograms on the diagonal."""
    size = min(most, *(table.shape[1] for table in sets.values()))
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
            axis.set(xlabel=f"feature {j}" if i == size - 1 else "", ylabel=f"feature {i}" if j == 0 and i else "")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right")
    figure.suptitle(title)
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
