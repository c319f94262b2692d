"""TableDensity and DensityTrainer, which work without the estimator."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import counterflow as cf
from counterflow.density.config import DensityConfig
from counterflow.density.context import ContextEncoder
from counterflow.density.fitting import DensityTrainer
from counterflow.density.model import TableDensity
from counterflow.density.split import split_rows

RNG = np.random.default_rng(0)
NAMES = ["a", "b", "c"]
X = np.stack([RNG.normal(size=200), RNG.lognormal(size=200), RNG.poisson(9, 200)], 1)
TINY = DensityConfig(layers=2, hidden=(8,), epochs=2, members=2)


@pytest.fixture(scope="module")
def density():
    return DensityTrainer(X, NAMES, config=TINY).fit()


def test_the_flow_maps_rows_to_noise_by_columns_splines_whitening_and_layers(density):
    member = density.members[0]
    assert isinstance(member.transform, cf.Inverse) and isinstance(member.transform.transform, cf.Compose)
    kinds = [type(t).__name__ for t in member.transform.transform.flattened()]
    assert kinds == ["TableTransform", "QuantileSpline", "Whiten", "Autoregressive", "Permute", "Autoregressive"]
    assert kinds == [type(t).__name__ for t in member.transform.transform]


@pytest.mark.parametrize("flow", ["nsf", "iaf"])
def test_noise_names_are_those_of_the_columns_that_move_the_noise(flow):
    """With one layer less than a Permute, and weights near zero, each component of the noise is one column."""
    trainer = DensityTrainer(X, NAMES, config=DensityConfig(flow=flow, layers=2, hidden=(8,), epochs=1, members=1))
    density = trainer.fit()
    x = torch.from_numpy(X[:1])
    moved = [
        (density.members[0].transform.inverse(x + step)[0] - density.members[0].transform.inverse(x)[0]).abs()[0]
        for step in torch.eye(3, dtype=torch.float64)
    ]
    assert [NAMES[int(k)] for k in torch.stack(moved).argmax(0)] == density.noise_names
    assert density.noise_names == ["c", "b", "a"]


def test_tasks_and_histories():
    trainer = DensityTrainer(X, NAMES, config=TINY)
    assert trainer.tasks == ["member 1", "member 1 without correlations", "member 2"] and trainer.histories == []
    seen = []
    trainer.fit(on_epoch=lambda task, epoch: seen.append((task, epoch.epoch)))
    assert seen == [(task, epoch) for task in trainer.tasks for epoch in (1, 2)]
    assert [len(history.epochs) for history in trainer.histories] == [2, 2, 2]
    assert DensityTrainer(X[:, :1], config=TINY).tasks == ["member 1", "member 2"]


def test_save_and_load(density, tmp_path):
    density.save(tmp_path)
    again = TableDensity.load(tmp_path)
    np.testing.assert_array_equal(again.score(X), density.score(X))
    np.testing.assert_array_equal(again.sample(7, seed=1), density.sample(7, seed=1))
    assert (again.names, again.named, again.seed, again.settings["layers"]) == (NAMES, True, 0, 2)
    estimator = cf.FlowDensity.load(tmp_path)
    assert estimator.get_params()["members"] == 2 and list(estimator.feature_names_in_) == NAMES
    unnamed = DensityTrainer(X, config=TINY).fit()
    unnamed.save(tmp_path / "unnamed")
    assert not hasattr(cf.FlowDensity.load(tmp_path / "unnamed"), "feature_names_in_")


@pytest.mark.system
def test_a_saved_density_scores_and_draws_without_scikit_learn(density, tmp_path):
    density.save(tmp_path)
    code = f"""
import sys
sys.modules["sklearn"] = None
import numpy as np
from counterflow.density.model import TableDensity
density = TableDensity.load({str(tmp_path)!r})
print(density.score(density.sample(5, seed=0)).shape)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "(5,)\n", ran.stderr


def test_rows_that_do_not_fit_the_flow_are_refused(density):
    with pytest.raises(ValueError, match="expected 3 names and a context of size 0, as the flow has, got 2 names"):
        TableDensity(density.flow, ["a", "b"])
    with pytest.raises(ValueError, match=r"expected 3 names .* of size 0, .* and a context of size 1"):
        TableDensity(density.flow, NAMES, ContextEncoder((("year", None, 0.0, 1.0),)))
    with pytest.raises(ValueError, match="a flow from noise to rows that ends with columns, got Autoreg"):
        TableDensity(cf.MAF(3), NAMES)


def test_every_category_is_in_training():
    context = {"kind": np.array(["x"] * 40 + ["y"] * 2 + ["z"] * 8), "year": np.arange(50.0)}
    for seed in range(30):
        train, test = split_rows(50, 0.3, seed, context)
        assert sorted([*train, *test]) == list(range(50)) and 13 <= len(test) <= 15
        assert {*context["kind"][train]} == {"x", "y", "z"}
    train, test = split_rows(50, 0.3, 0)
    assert test.tolist() == np.random.default_rng(0).permutation(50)[:15].tolist()
    with pytest.raises(ValueError, match=r"got none; leave out of the context \(id\) columns with another category"):
        split_rows(50, 0.3, 0, {"id": np.arange(50).astype(str)})
