"""Columns of a table: their maps are exact, their densities integrate to one, and their arguments are checked."""

import pytest
import torch
from registry import close, over

import counterflow as cf
from counterflow.transforms import (
    AsinhColumn,
    GridColumn,
    LinearColumn,
    LogColumn,
    LogitColumn,
    OrdinalColumn,
    SpikedColumn,
    TableTransform,
)

COLUMNS = {
    "linear": LinearColumn("a", center=1.0, scale=3.0),
    "low": LogColumn("a", low=-1.0, min_distance=1e-9, center=0.3, scale=2.0),
    "high": LogColumn("a", high=2.0, min_distance=1e-9),
    "both": LogitColumn("a", -1.0, 3.0, min_distance=1e-9, scale=1.7),
    "tails": AsinhColumn("a", 0.5, unit=0.7, center=0.1, scale=0.8),
    "ordinal": OrdinalColumn("a", (0.0, 1.0, 5.0), (0.2, 0.5, 0.3)),
    "tails of ordinal": OrdinalColumn("a", (0.0, 1.0, 3.0), (0.2, 0.4, 0.3), tail=0.05, recorded=(0.0, 3.0)),
    "spikes": SpikedColumn(LinearColumn("a"), (0.0, 1.0), (2.0, 0.5), width=0.1),
    "spikes in bounds": SpikedColumn(LogitColumn("a", -0.05, 4.0, min_distance=1e-9), (0.0,), (2.0,), width=0.1),
    "grid": GridColumn(LogColumn("a", low=-0.5, scale=2.0), 1.0, mass=True, minimum=0.0),
}


@over(COLUMNS)
def test_round_trip_and_log_det_of_columns(name):
    t = TableTransform([COLUMNS[name], LinearColumn("b", scale=2.0)])
    y = torch.randn(200, 2, dtype=torch.float64) * 1.5
    x, log_det = t.inverse(y)
    again, log_det_back = t(x)
    close(again, y)
    close(log_det_back, -log_det)
    assert t.inside(x).all()
    J = torch.autograd.functional.jacobian(lambda x: t(x)[0].sum(0), x).movedim(1, 0)
    close(torch.linalg.slogdet(J).logabsdet, log_det_back)


@over(COLUMNS)
def test_a_flow_with_columns_is_saved_and_its_density_integrates_to_one(name, tmp_path):
    flow = cf.Flow(cf.bases.StandardNormal(1), cf.Inverse(TableTransform([COLUMNS[name]]))).double()
    cf.save(flow, tmp_path / "flow.safetensors")
    loaded = cf.load(tmp_path / "flow.safetensors").double()
    x = flow.transform(torch.linspace(-8, 8, 200_001, dtype=torch.float64)[:, None])[0]
    p = loaded().log_prob(x).exp()
    assert torch.equal(p, flow().log_prob(x).exp())
    assert abs(torch.trapezoid(p, x[:, 0]).item() - 1) < 1e-3


BAD = {
    "scale": (lambda: LinearColumn("a", scale=0.0), "expected scale of column 'a' to be positive, got 0.0"),
    "no bound": (lambda: LogColumn("a"), "expected one bound, low or high, for column 'a', got low=None, high=None"),
    "two bounds": (lambda: LogColumn("a", 0.0, 1.0), "expected one bound, low or high"),
    "order of bounds": (lambda: LogitColumn("a", 1.0, 0.0), "expected low < high for column 'a', got low=1.0, high=0"),
    "unit": (lambda: AsinhColumn("a", 0.0, 0.0), "expected unit of column 'a' to be positive, got 0.0"),
    "one value": (lambda: OrdinalColumn("a", [1.0], [1.0]), "expected at least two ascending values for column 'a'"),
    "order of values": (lambda: OrdinalColumn("a", [2.0, 1.0], [0.5, 0.5]), "expected at least two ascending values"),
    "shares": (lambda: OrdinalColumn("a", [1.0, 2.0], [1.0]), r"expected 2 positive shares for .* got \[1.0\]"),
    "no share": (lambda: OrdinalColumn("a", [1.0, 2.0], [1.0, 0.0]), "expected 2 positive shares for column 'a'"),
    "step": (lambda: GridColumn(LinearColumn("a"), 0.0), "expected step of column 'a' to be positive, got 0.0"),
    "no spikes": (lambda: SpikedColumn(LinearColumn("a"), [], [], 1.0), "expected spikes and one room for each .* 'a'"),
    "room": (lambda: SpikedColumn(LinearColumn("a"), [0.0], [], 1.0), "got 1 spikes and 0 rooms"),
    "width": (lambda: SpikedColumn(LinearColumn("a"), [0.0], [1.0], 0.0), "expected width of the spikes of column 'a'"),
    "no columns": (lambda: TableTransform([]), "expected at least one column"),
    "other columns": (lambda: TableTransform(["a"]), "expected at least one column, and columns only"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_repr_counts_the_maps():
    t = TableTransform(list(COLUMNS.values()))
    assert repr(t) == "TableTransform(2 linear, 3 log, 2 logit, 1 asinh, 2 ordinal; 5 with cells)"
    assert repr(COLUMNS["tails"]) == "AsinhColumn(name='a', middle=0.5, unit=0.7, center=0.1, scale=0.8)"


def test_a_spike_has_a_cell_of_exactly_its_width():
    start, width = COLUMNS["spikes"].cells(torch.tensor([0.0, 0.5], dtype=torch.float64))
    assert width.tolist() == [0.1, 0.0] and start.tolist() == [-0.05, 0.5]


def test_the_dtype_is_kept():
    for name in ("linear", "low", "high", "both", "tails", "grid"):
        y, log_det = TableTransform([COLUMNS[name]])(torch.rand(5, 1))
        assert y.dtype == log_det.dtype == torch.float32
