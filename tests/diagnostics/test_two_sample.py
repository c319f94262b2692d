"""Two-sample test by energy distance."""

import pytest
import torch

from counterflow.diagnostics.two_sample import energy_test


def correlated(n, rho):
    x = torch.randn(n, 2)
    return torch.stack([x[:, 0], rho * x[:, 0] + (1 - rho**2) ** 0.5 * x[:, 1]], 1)


def test_the_energy_test_holds_its_level():
    p = torch.tensor([energy_test(torch.randn(40, 2), torch.randn(50, 2), 99).p_value for _ in range(200)])
    assert abs((p <= 0.1).float().mean().item() - 0.1) < 4 * (0.09 / 200) ** 0.5
    assert abs(p.mean().item() - 0.505) < 4 / (12 * 200) ** 0.5


def test_the_energy_test_finds_shifts_scales_and_dependence():
    x = torch.randn(400, 2)
    for other in (x + 0.4, 1.6 * torch.randn(400, 2), correlated(400, 0.8)):
        assert energy_test(x, other).p_value == 0.001
    assert energy_test(x, correlated(400, 0.0)).p_value > 0.01


def test_the_energy_test_depends_only_on_ranks():
    x, y = torch.randn(60, 3), torch.randn(50, 3) + 0.2
    plain, stretched = energy_test(x, y), energy_test((3 * x).exp(), (3 * y).exp())
    assert plain.distance == pytest.approx(stretched.distance)
    x[0] = torch.inf  # such as an overflowing draw of a flow
    assert 0 < energy_test(x, y).distance < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: energy_test(torch.randn(50, 2), torch.randn(50, 1)),
            r"samples \(N, D\) and \(M, D\) of at least two rows, got \(50, 2\)",
        ),
        (lambda: energy_test(torch.randn(50, 2), torch.randn(1, 2)), r"at least two rows, got \(50, 2\) and \(1, 2\)"),
        (lambda: energy_test(torch.randn(50, 2), torch.randn(50, 2), 0), "permutations of at least 1, got 0"),
        (
            lambda: energy_test(torch.randn(50, 2), torch.randn(50, 2) * torch.nan),
            "expected numbers, got 100 NaN of 200",
        ),
    ],
    ids=["features", "rows", "permutations", "nan"],
)
def test_errors_of_the_energy_test(call, message):
    with pytest.raises(ValueError, match=message):
        call()
