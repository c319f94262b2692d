"""Attribution of unusual rows to their cells."""

import numpy as np

from counterflow.density.attribution import cell_gains
from counterflow.density.config import DensityConfig
from counterflow.density.fitting import DensityTrainer

RNG = np.random.default_rng(0)
A = RNG.normal(size=400)
TABLE = np.stack([A, A + RNG.normal(0, 0.1, 400), RNG.poisson(5, 400), RNG.random(400)], 1)
USUAL = np.quantile(TABLE, [0.1, 0.3, 0.5, 0.7, 0.9], axis=0, method="nearest")


def test_gains_are_those_of_the_formula_and_name_the_cells():
    config = DensityConfig(layers=1, hidden=(16,), members=1, epochs=15)
    density = DensityTrainer(TABLE, config=config, bounds={"x3": (0, 1)}).fit()
    rows = np.array([[1.0, -1.0, 5.0, 0.5], [0.5, 0.52, 40.0, 0.5], [0.0, 0.0, 5.0, 1.5], [9.0, 9.0, 5.0, -2.0]])
    gains, values = cell_gains(density, rows, USUAL)
    own = density.score(rows)
    for i, row in enumerate(rows[:2]):
        for j in range(4):
            changed = np.tile(row, (5, 1))
            changed[:, j] = USUAL[:, j]
            scores = density.score(changed)
            np.testing.assert_allclose(gains[i, j], max(0.0, scores.max() - own[i]), atol=1e-9)
            assert values[i, j] == (USUAL[scores.argmax(), j] if scores.max() > own[i] else row[j])
    assert set(gains[0].argsort()[2:]) == {0, 1} and gains[0, :2].min() > 3 * gains[0, 2:].max()
    assert gains[1].argmax() == 2 and gains[1, 2] > 3
    assert own[2] == -np.inf and gains[2, 3] == np.inf and (gains[2, :3] == 0).all()
    assert own[3] == -np.inf and gains[3, 3] == np.inf and np.isfinite(values).all()
