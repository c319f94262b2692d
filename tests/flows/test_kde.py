"""Parts of the densities of tables: curves through quantiles, kernels at rows, averages of flows."""

import math

import pytest
import torch
from registry import close, kernels, stir

import counterflow as cf


def spiked(rows: int = 600) -> torch.Tensor:
    """Half of the rows in a spike of width 1e-3, the others exponential; float64."""
    generator = torch.Generator().manual_seed(0)
    u, long = torch.rand(rows, generator=generator).double(), torch.empty(rows).exponential_(generator=generator)
    spike = torch.arange(rows) % 2 == 0
    return torch.where(spike, 1e-3 * u, 1 + long.double())[:, None]


def test_marginals_of_a_spike_give_new_rows_nearly_their_own_density():
    rows = spiked()
    train, test = rows[:400], rows[400:]
    y, log_det = cf.transforms.QuantileSpline.from_data(train)(test)
    reached = (log_det - y[:, 0].square() / 2 - math.log(2 * math.pi) / 2).mean()
    truth = math.log(0.5) + 0.5 * -math.log(1e-3) + 0.5 * -1.0  # half of them uniform on 1e-3, half exponential
    best_normal = -math.log(train.std()) - 0.5 - math.log(2 * math.pi) / 2
    assert best_normal + 2 < truth - 0.9 < reached < truth + 0.1  # about 0.7 are lost at the edge of the spike


def test_marginals_carry_the_levels_to_those_of_a_normal():
    rows = torch.randn(5000, 2, generator=torch.Generator().manual_seed(1)).double().exp()
    y, _ = cf.transforms.QuantileSpline.from_data(rows)(rows)
    for level in (0.1, 0.25, 0.5, 0.75, 0.9):
        expected = torch.special.ndtri(torch.tensor(level, dtype=torch.float64))
        assert (y.quantile(level, dim=0) - expected).abs().max() < 0.02


def test_marginals_take_repeated_values_and_features_of_few_knots():
    rows = torch.stack([torch.arange(200) % 3, torch.arange(200)], 1).double()
    t = cf.transforms.QuantileSpline.from_data(rows)
    x = torch.linspace(-5, 300, 40, dtype=torch.float64)[:, None].expand(-1, 2)
    y, log_det = t(x)
    assert (y.diff(dim=0) > 0).all() and log_det.isfinite().all()
    close(t.inverse(y)[0], x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cf.transforms.QuantileSpline([[0.0, 1.0]], [[0.0, 1.0]], [[1.0]]), r"of one shape \(D, K\)"),
        (
            lambda: cf.transforms.QuantileSpline([[0.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]]),
            "something else at feature 0; merge knots",
        ),
        (
            lambda: cf.transforms.QuantileSpline.from_data(torch.zeros(1, 2)),
            r"at least two rows \(N, D\), got shape \(1, 2\)",
        ),
        (
            lambda: cf.transforms.QuantileSpline.from_data(torch.ones(9, 1)),
            "at least two values, got 1.0 in all 9 rows",
        ),
        (lambda: cf.bases.KernelMixture(2, torch.zeros(4, 3)), r"points of shape \(N, 2\), got \(4, 3\)"),
        (lambda: cf.bases.KernelMixture(2, 4, width=0.0), "got width=0.0 and share=0.3"),
        (lambda: cf.bases.KernelMixture(2, 4, share=1.0), "got width=0.3 and share=1.0"),
        (lambda: cf.flows.FlowMixture([]), r"expected flows of one \(features, context\), got \[\]"),
        (lambda: cf.flows.FlowMixture([cf.MAF(2, layers=1), cf.MAF(3, layers=1)]), r"got \[\(2, 0\), \(3, 0\)\]"),
        (lambda: cf.Flow(kernels(2), cf.IAF(2).transform)().rsample_and_log_prob_by_feature(), "independent features"),
    ],
)
def test_invalid_arguments_are_refused(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_kernels_are_the_mixture_that_their_formula_says():
    base = kernels(2)
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(2))
    parts = [(1 - 0.6, torch.zeros(2), 1.0)] + [(0.2, point, 0.4) for point in base.points]
    normal = torch.distributions.Normal
    each = [math.log(w) + normal(mean, std).log_prob(z).sum(-1) for w, mean, std in parts]
    close(base().log_prob(z), torch.logsumexp(torch.stack(each), 0), 1e-6)


def test_kernels_are_scored_in_blocks_as_in_one(monkeypatch):
    base, z = kernels(3), torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(3))
    whole = base().log_prob(z)
    monkeypatch.setattr("counterflow.flows.bases.MAX_PAIRS", 7)
    close(base().log_prob(z), whole, 1e-7)
    assert base().log_prob(z[:0]).shape == (0, 5)


def test_draws_of_kernels_have_their_moments():
    torch.manual_seed(0)
    base = kernels(1)
    z = base().sample((100_000,))
    mean = 0.6 * base.points.mean()
    second = 0.4 + 0.6 * (base.points.square().mean() + 0.4**2)
    assert abs(z.mean() - mean) < 0.01 and abs(z.square().mean() - second) < 0.02


def pair(context: int = 0) -> cf.flows.FlowMixture:
    return cf.flows.FlowMixture([stir(cf.MAF(2, context, 2, (9,), activation="tanh"), seed) for seed in (0, 1)])


def test_a_mixture_is_the_average_of_its_flows():
    mixture, z = pair(3), torch.randn(7, 2, dtype=torch.float64)
    c = torch.randn(7, 3, dtype=torch.float64)
    each = [flow(c).log_prob(z).exp() for flow in mixture.flows]
    close(mixture(c).log_prob(z).exp(), (each[0] + each[1]) / 2)


def test_a_mixture_draws_from_each_of_its_flows():
    torch.manual_seed(0)
    mixture = pair()
    drawn = mixture().sample((40_000,))
    means = [flow().sample((40_000,)).mean(0) for flow in mixture.flows]
    assert (drawn.mean(0) - (means[0] + means[1]) / 2).abs().max() < 0.05
    assert pair(3)(torch.zeros(5, 3).double()).sample((4,)).shape == (4, 5, 2)


@pytest.mark.parametrize("build", [pair, lambda: cf.Flow(kernels(2), cf.MAF(2, layers=1, hidden=(8,)).transform)])
def test_saved_and_loaded_flows_give_the_same_numbers(build, tmp_path):
    module = build()
    z = torch.randn(6, 2, dtype=next(module.parameters()).dtype)
    cf.save(module, tmp_path / "flow.safetensors")
    assert torch.equal(cf.load(tmp_path / "flow.safetensors")().log_prob(z), module().log_prob(z))


def test_features_whose_curve_gains_little_are_standardised():
    normal = 3 + 2 * torch.randn(600, 1, generator=torch.Generator().manual_seed(4)).double()
    rows = torch.cat([spiked(), normal], 1)
    t = cf.transforms.QuantileSpline.from_data(rows, min_gain=0.5)
    y, _ = t(rows)
    close(y[:, 1], (normal[:, 0] - normal.mean()) / normal.std(correction=0), 1e-9)
    close(y[:, :1], cf.transforms.QuantileSpline.from_data(rows[:, :1])(rows[:, :1])[0])


def blobs(rows: int, seed: int) -> torch.Tensor:
    """Eight small clusters; float64."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[i, j] for i in (-1.5, -0.5, 0.5, 1.5) for j in (-1.0, 1.0)], dtype=torch.float64)
    picked = torch.randint(8, (rows,), generator=generator)
    return corners[picked] + 0.05 * torch.randn(rows, 2, generator=generator, dtype=torch.float64)


def test_useful_kernels_get_weight_and_others_hardly_any():
    start = cf.Flow(cf.bases.StandardNormal(2), cf.Permute([1, 0])).double()
    train, validation, test = blobs(800, 0), blobs(200, 1), blobs(500, 2)
    kept = cf.flows.with_kernel_base(start, train, validation)
    assert kept().log_prob(test).mean() > start().log_prob(test).mean() + 1
    normal = [torch.randn(n, 2, generator=torch.Generator().manual_seed(n)).double() for n in (800, 200, 500)]
    kept = cf.flows.with_kernel_base(start, normal[0], normal[1])
    assert (kept().log_prob(normal[2]).mean() - start().log_prob(normal[2]).mean()).abs() < 0.02


def test_kernels_of_a_conditional_flow_see_rows_through_their_context():
    flow = stir(cf.MAF(2, 1, 2, (9,), activation="tanh"))
    c = torch.randn(60, 1, dtype=torch.float64)
    x = flow(c).sample()
    kept = cf.flows.with_kernel_base(flow, (x[:40], c[:40]), (x[40:], c[40:]), max_points=30)
    close(kept.base.points, flow.transform.inverse(x[:30], c[:30])[0])
    assert kept(c).log_prob(x).mean() > -math.inf


def test_kernels_are_refused_for_flows_that_they_do_not_fit():
    start = cf.Flow(kernels(2), cf.Permute([1, 0]))
    with pytest.raises(ValueError, match="with a StandardNormal base, got KernelMixture"):
        cf.flows.with_kernel_base(start, torch.zeros(3, 2), torch.zeros(3, 2))
    start = cf.Flow(cf.bases.StandardNormal(2), cf.Permute([1, 0]))
    with pytest.raises(ValueError, match="at least one row in the validation rows, got none"):
        cf.flows.with_kernel_base(start, torch.zeros(3, 2), torch.zeros(0, 2))
