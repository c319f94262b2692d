"""Pictures: every function writes a PNG that shows something, with no screen and no global state."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from registry import over

from counterflow import plots

RNG = np.random.default_rng(0)
FALLING = ([1.0, 2.0, 2.5], [0.5, 1.0, 0.9])
BOTH = plots.DirectionCosts(([8, 64], [1.0, 2.0]), ([8], [30.0]))


def rows(n, d, shift=0.0):
    return RNG.normal(shift, 1, (n, d)).astype(np.float32)


def images(n, *shape):
    return RNG.random((n, *(shape or (1, 8, 8))), dtype=np.float32)


def panel(name="iaf"):
    return plots.LatentPanel(name, rows(50, 2), rows(50, 2), (0, 3), "ESS 12 of 50")


PICTURES = {
    "curves": lambda path: plots.learning_curves(path, {"gaussian": FALLING, "iaf": FALLING}),
    "curves of one epoch": lambda path: plots.learning_curves(path, {"iaf": ([1.0], [0.5])}),
    "curves without an epoch": lambda path: plots.learning_curves(path, {"iaf": ([], [])}),
    "curves that do not move": lambda path: plots.learning_curves(path, {"iaf": ([1.0] * 9, [1.0] * 9)}),
    "curves with gaps": lambda path: plots.learning_curves(path, {"iaf": ([np.nan, 1, -np.inf, 2], [1, np.nan, 2, 3])}),
    "nothing finite": lambda path: plots.learning_curves(path, {"iaf": ([np.nan] * 3, [np.nan] * 3)}),
    "rows of images": lambda path: plots.image_rows(path, {"data": images(12), "iaf": images(12)}, "title"),
    "rows of colour images": lambda path: plots.image_rows(path, {"data": images(3, 3, 5, 7)}, "title"),
    "rows of unequal length": lambda path: plots.image_rows(path, {"data": images(4), "iaf": images(2)}, "title"),
    "rows of two channels": lambda path: plots.image_rows(path, {"data": images(1, 2, 4, 4)}, "title"),
    "grids": lambda path: plots.image_grids(path, {"gaussian": images(64), "iaf": images(64)}, "title"),
    "grid of one": lambda path: plots.image_grids(path, {"iaf": images(1, 3, 1, 1)}, "title"),
    "grid with a rest": lambda path: plots.image_grids(path, {"iaf": images(9)}, "title", columns=4),
    "out of range": lambda path: plots.image_grids(path, {"iaf": 300 * images(4) - 99}, "title"),
    "pairs": lambda path: plots.pairs(path, {"data": rows(80, 6), "iaf": rows(90, 6)}, "title"),
    "pairs of one feature": lambda path: plots.pairs(path, {"data": rows(80, 1), "iaf": rows(80, 1)}, "title"),
    "pairs of one row": lambda path: plots.pairs(path, {"data": rows(1, 2), "iaf": rows(1, 2)}, "title"),
    "pairs, constant": lambda path: plots.pairs(path, {"data": np.ones((9, 2)), "iaf": rows(9, 2)}, "title"),
    "pairs far apart": lambda path: plots.pairs(path, {"data": rows(50, 2), "iaf": rows(50, 2, 1e3)}, "title"),
    "named pairs": lambda path: plots.pairs(path, {"data": rows(80, 2)}, "title", names=["a", "b"]),
    "histograms": lambda path: plots.histograms(
        path, {"rows": rows(90, 1)[:, 0], "samples": rows(500, 1)[:, 0]}, "", ""
    ),
    "histograms of one number": lambda path: plots.histograms(path, {"rows": np.ones(1)}, "nats", "title"),
    "histograms, not finite": lambda path: plots.histograms(path, {"rows": np.array([-np.inf, 1.0, 2.0])}, "", ""),
    "uniforms": lambda path: plots.uniform_histograms(path, RNG.random((200, 3)), ["a", "b", "c" * 40], "title"),
    "uniforms, many": lambda path: plots.uniform_histograms(
        path, RNG.random((9, 50)), list(map(str, range(50))), "title"
    ),
    "posteriors": lambda path: plots.latent_posteriors(path, list(images(2)), [[panel("gaussian"), panel()]] * 2),
    "directions": lambda path: plots.direction_costs(path, {"ours": BOTH, "peer": BOTH}, "ms", "title"),
    "directions, nothing solved": lambda path: plots.direction_costs(
        path, {"ours": BOTH._replace(sequential=([], []))}, "", ""
    ),
    "posterior of a row": lambda path: plots.latent_posteriors(path, list(rows(1, 5)), [[panel()]]),
}


QUICK = [
    *("curves", "curves with gaps", "rows of images", "rows of two channels", "grid with a rest", "pairs of one row"),
    *("pairs, constant", "named pairs", "histograms, not finite", "uniforms", "posterior of a row", "directions"),
]


@over(PICTURES, quick=QUICK)
def test_a_picture_opens_and_is_not_blank(name, tmp_path):
    path = tmp_path / "new" / "picture.png"
    assert PICTURES[name](path) == path
    with Image.open(path) as picture:
        assert picture.format == "PNG" and min(picture.size) > 100
        assert np.asarray(picture.convert("L")).std() > 1
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def test_no_screen_and_no_global_state(tmp_path):
    code = "; ".join(
        [
            "import pathlib, sys",
            "from counterflow import plots",
            f"plots.learning_curves(pathlib.Path({str(tmp_path / 'a.png')!r}), {{'a': ([1], [1])}})",
            "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules",
        ]
    )
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in screens}
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, check=True)


def test_a_missing_matplotlib_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"expected matplotlib .* pip install 'counterflow\[plots\]'"):
        plots.learning_curves(tmp_path / "a.png", {"a": FALLING})
    assert not list(tmp_path.iterdir())
