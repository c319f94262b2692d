"""A short list that must pass with every supported version of Python and of the dependencies: see .ci/versions.

One law per recipe, one fit, one save and load, and every command once, through the real command line.
"""

import subprocess
import sys

import pytest
import torch

import counterflow as cf

RECIPES = {"IAF": cf.IAF, "MAF": cf.MAF, "NSF": cf.NSF, "Coupling": cf.Coupling}


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip_log_det_and_gradients(name):
    flow = RECIPES[name](4, context=2, layers=2, hidden=(8, 8), seed=0).double()
    x, c = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    y, log_det = flow.transform(x, c)
    back, inverse_log_det = flow.transform.inverse(y, c)
    assert torch.allclose(back, x, atol=1e-10) and torch.allclose(inverse_log_det, -log_det, atol=1e-10)
    for row in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda v, row=row: flow.transform(v, c[row])[0], x[row])
        assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, log_det[row], atol=1e-10)
    flow(c).log_prob(y.detach()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.transform.parameters())


def test_fit_save_and_load(tmp_path):
    x = 3 + torch.randn(400, 2)
    flow = cf.MAF(2, layers=2, hidden=(16,), seed=0)
    before = flow().log_prob(x).mean()
    config = cf.FitConfig(epochs=5, batch_size=50, learning_rate=0.02, warm_up_steps=0, ema=0)
    history = cf.fit(flow, cf.log_likelihood, x[:300], x[300:], config)
    assert history.best.validation > before.item() + 1
    cf.save(flow, tmp_path / "flow.safetensors")
    again = cf.load(tmp_path / "flow.safetensors")
    assert torch.equal(again().log_prob(x), flow().log_prob(x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, in its compiler
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")  # and another one
def test_a_solve_inside_torch_compile():
    flow = cf.MAF(3, layers=1, hidden=(8,), seed=0)
    y = torch.randn(6, 3)
    expected = flow.transform(y)[0]
    assert torch.allclose(torch.compile(lambda v: flow.transform(v)[0], backend="eager")(y), expected)


def test_every_command(tmp_path):
    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "counterflow", *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    run("vae", "--epochs", 1, "--out", "vae")
    run("density", "--epochs", 2, "--members", 1, "--no-kernels", "--out", "density")
    run("posterior", "--steps", 20, "--stages", 1, "--layers", 1, "--verdict-samples", 1000, "--out", "posterior")
    run("distill", "density", "--layer-steps", 20, "--flow-steps", 20, "--samples", 100, "--out", "student")
    run("sample", "vae", "-n", 4)
    run("sample", "density", "-n", 10, "--out", "rows.csv")
    run("score", "density", "rows.csv", "--out", "scores.csv")
    run("export", "student", "flow.pt2")
    for path in ("vae/summary.json", "posterior/posterior.nc", "student/model.safetensors", "scores.csv", "flow.pt2"):
        assert (tmp_path / path).stat().st_size > 0
    assert "posterior" in run("--help")
