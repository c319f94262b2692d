"""Export: the file gives the same numbers as the module, and holds each weight once."""

import json
import re
import sys
from importlib.util import find_spec

import pytest
import torch
from registry import FLOWS, over, stir

import counterflow as cf
from counterflow.cli import main
from counterflow.io.export import graph_of, largest_difference

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # looked for, not imported: that takes seconds
pytestmark = [pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed") for name in PACKAGES]

CURVES = cf.Inverse(
    cf.transforms.QuantileSpline.from_data(torch.rand(200, 2, generator=torch.Generator().manual_seed(0)).square())
)
CORRELATED = cf.Inverse(cf.transforms.Whiten([1.0, 2.0], [[2.0, 0.0], [1.0, 0.5]]))
MIXING = (
    cf.transforms.ActNorm(2),
    cf.transforms.LULinear(2),
    cf.transforms.Linear([0.5, -1.0], [[0.2, -1.5], [1.0, 0.3]]),
)
SMALL = {"hidden": (8,), "context": 6, "posterior_layers": 2, "posterior_hidden": (9,)}
VAES = {
    "conv": lambda: cf.VAE((1, 9, 8), 3, network="conv", channels=2, **SMALL),
    "mlp logistic": lambda: cf.VAE((2, 4, 4), 3, likelihood="discretized_logistic", network="mlp", **SMALL),
    "rows gaussian": lambda: cf.VAE((5,), 3, "gaussian", "gaussian", **SMALL),
}
ONE_PASS = [name for name in FLOWS if name not in ("both ways", "kernels")]
ARCHIVED = ["IAF gated", "MAF context random", "Coupling", "diagonal context", "student"]  # one takes a second or two
# ONNX Runtime knows neither softplus nor elu in float64, and one export takes two seconds, of a spline five.
IN_ONNX = {
    "IAF context": lambda: stir(cf.IAF(5, 2, layers=2, hidden=(9,), activation="elu")).float(),
    "MAF float64": lambda: stir(cf.MAF(3, layers=2, hidden=(9, 7))),
    "NSF": lambda: stir(cf.NSF(3, layers=1, hidden=(9,), bins=3)).float(),
    "IAF of a table": lambda: cf.Flow(
        cf.bases.StandardNormal(2), cf.Compose([stir(cf.IAF(2, layers=1, hidden=(9,))).transform, CURVES])
    ).float(),
    "MAF of correlated columns": lambda: cf.Flow(
        cf.bases.StandardNormal(2), cf.Compose([stir(cf.MAF(2, layers=1)).transform, CORRELATED])
    ).float(),
    "MAF of mixed features": lambda: cf.Flow(
        cf.bases.StandardNormal(2), cf.Compose([stir(cf.MAF(2, layers=1)).transform, *(stir(t) for t in MIXING)])
    ).float(),
}


def draws(vae):
    torch.manual_seed(1)
    return {"x": torch.rand(7, *vae.data_shape).round(), "eps": torch.randn(7, vae.latent)}


@over(ARCHIVED, quick=["student"])
def test_an_archive_gives_the_same_numbers(name, tmp_path):
    flow = FLOWS[name]()
    path = cf.export(flow, tmp_path / "flow.pt2")
    assert largest_difference(flow, path, rows=20) < 1e-12
    assert largest_difference(flow, path, rows=1) < 1e-12


@over(ONE_PASS)
def test_the_graph_is_the_flow(name):
    flow = FLOWS[name]()
    graph = graph_of(flow)
    inputs = graph.example(6)
    c = inputs.get("context")
    with torch.no_grad():
        if graph.direction == "sample":
            z, log_q = graph(**inputs)
            torch.testing.assert_close(flow(c).log_prob(z), log_q)
            start = flow(c).base.base_dist
            if not isinstance(flow.base, cf.bases.StudentT):
                eps = (flow.transform.inverse(z, c if flow.transform.context else None)[0] - start.loc) / start.scale
                torch.testing.assert_close(eps, inputs["eps"])
        else:
            log_prob, eps = graph(**inputs)
            torch.testing.assert_close(flow(c).log_prob(inputs["x"]), log_prob)
            assert eps.shape == inputs["x"].shape


SOLVED = {
    "MAF": (lambda: stir(cf.MAF(3, 2, layers=2, hidden=(9,))), "sample"),
    "IAF": (lambda: stir(cf.IAF(3, layers=1, hidden=(9,), order="same")), "log_prob"),
    "mixed": (lambda: stir(mixed()), "sample"),
}


@over(SOLVED, quick=["IAF"])
def test_a_solved_direction_in_an_archive(name, tmp_path):
    make, direction = SOLVED[name]
    flow = make()
    path = cf.export(flow, tmp_path / "flow.pt2", direction)
    assert largest_difference(flow, path, direction, rows=20) < 1e-10


@pytest.mark.slow
def test_a_solved_direction_in_onnx(tmp_path):
    flow = stir(cf.MAF(2, layers=1, hidden=(5,))).float()
    path = cf.export(flow, tmp_path / "flow.onnx", "sample")
    assert largest_difference(flow, path, "sample", rows=20) < 1e-5


@over(IN_ONNX, quick=["IAF context"])
def test_onnx_gives_the_same_numbers(name, tmp_path):
    flow = IN_ONNX[name]()
    path = cf.export(flow, tmp_path / "flow.onnx")
    for rows in (1, 33):
        assert largest_difference(flow, path, rows=rows) < 1e-5
    assert [file.name for file in tmp_path.iterdir()] == ["flow.onnx"]


@pytest.mark.parametrize(
    ("name", "file", "direction"),
    [
        pytest.param("conv", "vae.onnx", "encode", marks=pytest.mark.slow),
        pytest.param("mlp logistic", "vae.onnx", "decode", marks=pytest.mark.slow),
        pytest.param("conv", "vae.pt2", "decode", marks=pytest.mark.slow),
        ("rows gaussian", "vae.pt2", "encode"),
    ],
)
def test_both_parts_of_a_vae(name, file, direction, tmp_path):
    vae = VAES[name]().eval()
    path = cf.export(vae, tmp_path / file, direction)
    for rows in (1, 5):
        assert largest_difference(vae, path, direction, rows) < 1e-5


@over(VAES)
def test_exported_encoders_and_decoders_give_the_vaes_numbers(name):
    vae = VAES[name]().eval()
    x, eps = draws(vae).values()
    with torch.no_grad():
        z, log_q = graph_of(vae, "encode")(x, eps)
        torch.testing.assert_close(vae.encode(x).log_prob(z), log_q, rtol=1e-4, atol=1e-4)
        (mean,) = graph_of(vae)(z)
        torch.testing.assert_close(mean, vae.decode(z).mean)
        start = vae.encode(x).base.base_dist
        back = vae.encode(x).transform.inverse(z, vae.encode(x).context)[0]
        torch.testing.assert_close((back - start.loc) / start.scale, eps, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_metadata_of_an_exported_file(tmp_path):
    flow = cf.IAF(4, 2, layers=2, hidden=(9, 7), seed=0)
    import onnx

    model = onnx.load(cf.export(flow, tmp_path / "flow.onnx"))
    onnx.checker.check_model(model)
    assert {p.key: p.value for p in model.metadata_props} == {
        "counterflow": cf.__version__,
        "direction": "sample",
        "inputs": '{"eps": [4], "context": [2]}',
        "outputs": '["z", "log_q"]',
    }
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    assert shapes == {"eps": ["batch", 4], "context": ["batch", 2]}
    assert [o.name for o in model.graph.output] == ["z", "log_q"]
    assert not any(node.metadata_props or node.domain for node in model.graph.node)

    cf.export(flow, tmp_path / "flow.pt2")
    files = {"counterflow.json": ""}
    torch.export.load(tmp_path / "flow.pt2", extra_files=files)
    assert json.loads(files["counterflow.json"])["direction"] == "sample"


def test_weights_are_written_once_and_with_their_zeros(tmp_path):
    flow = stir(cf.MAF(64, layers=1, hidden=(512, 512))).float()  # large enough for staircases
    program = torch.export.load(cf.export(flow, tmp_path / "flow.pt2"))
    tensors = {**program.state_dict, **program.constants}
    numbers = sum(t.numel() for t in tensors.values())
    assert numbers < 1.01 * sum(p.numel() for p in flow.parameters())
    layers = next(m for m in flow.modules() if isinstance(m, cf.Autoregressive)).made.masked_layers()
    written = [t for t in tensors.values() if t.dim() == 2]
    assert len(written) == len(layers)
    for layer, weight in zip(layers, written, strict=True):
        assert torch.equal(weight, layer.masked_weight())
    assert not [node for node in program.graph.nodes if "higher_order" in str(node.target)]


def test_a_fixed_batch(tmp_path):
    flow = cf.IAF(3, layers=1, hidden=(4,), seed=0)
    run = torch.export.load(cf.export(flow, tmp_path / "flow.pt2", batch=5)).module()
    assert run(torch.zeros(5, 3))[0].shape == (5, 3)
    with pytest.raises(AssertionError, match="Guard failed"):
        run(torch.zeros(4, 3))


def test_exporting_leaves_the_module_unchanged(tmp_path):
    flow = cf.MAF(3, layers=1, hidden=(4,), seed=0).train()
    before = {name: type(m) for name, m in flow.named_modules()}
    largest_difference(flow, cf.export(flow, tmp_path / "flow.pt2"))
    assert {name: type(m) for name, m in flow.named_modules()} == before
    assert flow.training
    assert all(p.requires_grad for p in flow.parameters())


def mixed():
    t = cf.Autoregressive(2, 0, (4,))
    return cf.Flow(cf.bases.StandardNormal(2), cf.Compose([t, cf.Inverse(t)]))


class Quantiles(cf.Permute):
    """A transform with an operator that ONNX lacks."""

    def __init__(self):
        super().__init__([1, 0])

    def forward(self, x, c=None):
        y, log_det = super().forward(x, c)
        return torch.special.ndtri(torch.sigmoid(y)), log_det


REFUSED = {
    "suffix": (cf.IAF(2), "flow.bin", {}, ValueError, r"ends in \.onnx or \.pt2, got .*flow\.bin"),
    "module": (cf.Permute([0]), "flow.pt2", {}, TypeError, "expected a Flow or a VAE, got Permute"),
    "mixture": (
        cf.flows.FlowMixture([cf.IAF(2), cf.IAF(2)]),
        "flow.pt2",
        {},
        ValueError,
        "one flow, got a mixture of 2; fit",
    ),
    "base": (
        cf.Flow(cf.bases.KernelMixture(2, 3), cf.IAF(2).transform),
        "flow.pt2",
        {},
        ValueError,
        "got KernelMixture; for a table, fit the density with kernels=False",
    ),
    "operator": (
        cf.Flow(cf.bases.StandardNormal(2), cf.Compose([cf.IAF(2, layers=1).transform, Quantiles()])),
        "flow.onnx",
        {},
        ValueError,
        "operators that ONNX has, got: .*ndtri.*; export to .pt2, which has all",
    ),
    "name": (cf.IAF(2), "flow.pt2", {"direction": "decode"}, ValueError, "sample, log_prob for a Flow, got 'decode'"),
    "IAF": (
        cf.IAF(65, layers=1, hidden=(4,)),
        "flow.pt2",
        {"direction": "log_prob"},
        ValueError,
        r"at most 64 features for a direction that is solved, got 65 and 'log_prob': .* cf\.distill\(flow\)",
    ),
    "MAF": (cf.MAF(70, layers=1, hidden=(4,)), "flow.onnx", {"direction": "sample"}, ValueError, "got 70 and 'sample'"),
    "batch": (cf.IAF(2), "flow.pt2", {"batch": 0}, ValueError, "expected batch to be at least 1, got 0"),
}


@pytest.mark.parametrize(("module", "name", "more", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_errors(module, name, more, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        cf.export(module, tmp_path / name, **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_onnx(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"expected {package} for ONNX files, .* 'counterflow\[export\]'"):
        cf.export(cf.IAF(2, layers=1, hidden=(4,)), tmp_path / "flow.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """The command in tmp_path, where there is a run: arguments -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    cf.save(cf.MAF(3, layers=2, hidden=(9,), seed=0), tmp_path / "run" / "model.safetensors")

    def run(*arguments):
        code = main(["export", *arguments])
        return code, *capsys.readouterr()

    return run


def test_the_command(here, tmp_path):
    code, out, err = here("run", "flow.onnx")
    assert code == 0, err
    assert "wrote flow.onnx: x -> log_prob, eps" in out
    assert "largest difference to the model on random input: " in out
    assert (tmp_path / "flow.onnx").exists()


@pytest.mark.slow
def test_the_command_without_onnx_runtime(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, out, err = here("run", "flow.onnx")
    assert (code, "wrote flow.onnx" in out) == (0, True)
    assert re.search(r"not compared: expected onnxruntime for ONNX files, got: .*'counterflow\[export\]'", err)


def test_the_command_says_where_numbers_differ(here, monkeypatch):
    monkeypatch.setattr("counterflow.io.export.largest_difference", lambda *_: 1e-3)
    code, _, err = here("run", "flow.pt2")
    assert code == 1
    assert "expected a difference of at most 1e-05; the file is kept, but differs from the model" in err


@pytest.mark.slow
def test_float64_that_onnx_runtime_lacks(here, tmp_path):
    cf.save(cf.MAF(3, layers=1, hidden=(9,), activation="elu").double(), tmp_path / "double.safetensors")
    code, _, err = here("double.safetensors", "flow.onnx", "--double")
    assert code == 1
    assert "not compared: expected operators that ONNX Runtime knows in this dtype" in err
    assert "export a flow in float32" in err
    assert here("double.safetensors", "single.onnx")[0] == 0


def test_the_command_refuses_invalid_input(here, tmp_path):
    (tmp_path / "there.onnx").write_text("")
    for arguments, message in (
        (["nothing", "flow.onnx"], "expected a run folder, or a .safetensors file, got nothing, which does not exist"),
        (["run", "there.onnx"], "expected a new file, got there.onnx, which exists"),
        (["run", "flow.onnx", "--direction", "decode"], "sample, log_prob for a Flow, got 'decode'"),
        (["run", "flow.txt"], "expected a path that ends in .onnx or .pt2, got flow.txt"),
    ):
        code, out, err = here(*arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1
