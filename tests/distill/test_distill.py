"""Distillation: what a student has before it is trained, what it learns, and what says how well."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from registry import FLOWS, TRANSFORMS, over, stir

import counterflow as cf
from counterflow.cli import main
from counterflow.distill.distill import distill_with_history
from counterflow.distill.losses import _layer_loss
from counterflow.distill.student import Trace, _linear, _mirrored, mirror

UNTRAINED = cf.DistillConfig(layer_steps=0, flow_steps=0)
SHORT = cf.DistillConfig(layer_steps=60, flow_steps=40, samples=128, ema=0.9)


def teacher_of(D=4, context=0, **more):
    return stir(cf.MAF(D, context, layers=2, hidden=(16, 16), **more), gain=0.6).float()


def contexts_for(flow, n=64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    like = next(flow.parameters())
    return torch.randn(n, flow.context, generator=generator).to(like) if flow.context else None


def found(teacher, student, contexts=None, samples=2000):
    torch.manual_seed(11)
    return cf.diagnostics.agreement(teacher, student, contexts, samples=samples, test_samples=100)


def affine_layer(D=4):
    """A layer that is linear: its parameters are constants."""
    layer = stir(cf.Autoregressive(D, 0, (8,)))
    with torch.no_grad():
        layer.made.masked_layers()[-1].weight.zero_()
    return layer


# -- before training ---------------------------------------------------------------------------------


def test_a_teacher_that_samples_in_one_pass_is_copied():
    teacher = stir(cf.IAF(4, layers=2, hidden=(9,)))
    made = distill_with_history(teacher, config=SHORT)
    student = made.student
    x = torch.randn(5, 4, dtype=torch.float64)
    assert torch.equal(student().log_prob(x), teacher().log_prob(x))
    assert not made.histories  # there is nothing to learn
    assert not {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}


def test_a_linear_teacher_is_matched_before_any_training():
    order, scale = cf.Permute([2, 0, 3, 1]), cf.Standardize([1.0, 2, 3, 4], [0.5, 1, 2, 3]).double()
    stack = cf.Compose([scale, affine_layer(), order, affine_layer()])
    teacher = cf.Flow(cf.bases.StandardNormal(4).double(), cf.Inverse(stack))
    student = cf.distill(teacher, config=UNTRAINED)
    assert student.transform.forward_cost == "one pass"
    eps = torch.randn(50, 4, dtype=torch.float64)
    (x, log_det), (y, of_teacher) = student.transform(eps), teacher.transform(eps)
    # A new layer is within 1e-2 of the identity, and the least squares have a ridge of 1e-6.
    torch.testing.assert_close(x, y, rtol=0, atol=3e-2)
    torch.testing.assert_close(log_det, of_teacher, rtol=0, atol=1e-2)


def test_the_linear_map_follows_the_draws():
    layer = affine_layer()
    v = torch.randn(4000, 4, dtype=torch.float64)
    u = layer.inverse(v)[0]
    trace = Trace(v, u, layer.made(u))
    close_to, _ = _linear(layer, trace)(v)
    torch.testing.assert_close(close_to, u, rtol=0, atol=1e-4)
    assert _layer_loss(layer, _linear(layer, trace), trace, None).max() < 1e-6


def test_a_layer_takes_the_hidden_weights_of_its_teacher_and_its_order():
    for degrees in ((1, 2, 3), (2, 1, 2)):
        layer = stir(cf.Autoregressive(3, 0, (6, 5), degrees=degrees))
        v = torch.randn(100, 3, dtype=torch.float64)
        u = layer.inverse(v)[0]
        made = _mirrored(layer, Trace(v, u, layer.made(u[:, layer.order])), ())
        inner = list(made)[-1] if isinstance(made, cf.Compose) else made
        assert inner.degrees == degrees
        assert isinstance(made, cf.Compose) == (degrees == (1, 2, 3))
        for ours, theirs in zip(inner.made.masked_layers()[:-1], layer.made.masked_layers(), strict=False):
            assert torch.equal(ours.weight, theirs.weight)
    other = _mirrored(layer, Trace(v, u, layer.made(u[:, layer.order])), (7,))
    assert other.hidden == (7,)


def test_a_layer_of_a_graph_becomes_one_of_all_ancestors():
    layer = TRANSFORMS["graph"]()
    v = torch.randn(100, 5, dtype=torch.float64)
    u = layer.inverse(v)[0]
    made = _mirrored(layer, Trace(v, u, layer.made(u[:, layer.order])), ())
    dependent = torch.autograd.functional.jacobian(lambda v: layer.inverse(v)[0].sum(0), v).ne(0).any(1).int()
    dependent.fill_diagonal_(0)
    assert made.adjacency == dependent.tolist() != layer.adjacency


def test_the_layers_loss_is_its_kl_to_second_order():
    layer = affine_layer(1)
    r, shift = 1.05, 0.03
    ours = cf.Compose([cf.Inverse(layer)])  # exact, so that a change of v is one of w

    class Off(cf.transforms.Transform):
        features = 1

        def forward(self, x, c=None):
            raise AssertionError("only by feature")

        inverse = config = forward

        def forward_by_feature(self, x, total, c=None):
            u, log_det = ours(r * x + shift)
            return u, total + (log_det + math.log(r))[:, None]

    v = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    v = torch.special.ndtri(v)[:, None]
    u = layer.inverse(v)[0]
    root = _layer_loss(layer, Off(), Trace(v, u, layer.made(u)), None)
    e = ((1 + root).square() - 1) / 2
    kl = (r * r + shift * shift - 1) / 2 - math.log(r)
    assert e.mean().item() == pytest.approx(kl, rel=0.05)


# -- training ----------------------------------------------------------------------------------------


@over(FLOWS, quick=["MAF", "diagonal context"])
def test_a_student_of_every_flow_improves(name):
    teacher = FLOWS[name]()
    contexts = contexts_for(teacher)
    before = found(teacher, cf.distill(teacher, contexts, UNTRAINED), contexts)
    student = cf.distill(teacher, contexts, SHORT)
    after = found(teacher, student, contexts)
    assert student.transform.forward_cost == "one pass"
    assert {p.dtype for p in student.parameters()} <= {torch.float64}
    assert after.reverse < 0.75 * before.reverse or after.reverse < 1e-3
    assert math.isfinite(after.reverse_error)


@pytest.mark.slow
def test_each_stage_learns_and_the_first_one_helps_the_second():
    teacher = stir(cf.MAF(6, layers=2, hidden=(16, 16)), gain=0.8).float()
    stages = {"nothing": (0, 0), "layers": (100, 0), "flow": (0, 100), "both": (100, 50)}
    reached = {
        name: found(
            teacher, cf.distill(teacher, config=cf.DistillConfig(layer_steps=layer_steps, flow_steps=flow_steps))
        )
        for name, (layer_steps, flow_steps) in stages.items()
    }
    kl = {name: agreement.reverse for name, agreement in reached.items()}
    assert kl["layers"] < kl["nothing"] / 2
    assert kl["flow"] < kl["nothing"] / 2
    assert kl["both"] < kl["flow"]
    assert reached["both"].ess > reached["nothing"].ess


@pytest.mark.slow
def test_the_forward_kl_is_lower_where_it_is_asked_for():
    teacher = teacher_of(3)
    bare = cf.IAF(3, layers=1, hidden=(4,), seed=0)  # too small to be exact
    steps = {"layer_steps": 0, "flow_steps": 150}
    reverse = found(teacher, cf.distill(teacher, config=cf.DistillConfig(**steps), student=bare), samples=3000)
    both = found(
        teacher,
        cf.distill(teacher, config=cf.DistillConfig(**steps, forward_kl_weight=5.0), student=bare),
        samples=3000,
    )
    assert both.forward_trimmed < reverse.forward_trimmed


def test_contexts_are_rows_or_a_function():
    teacher = teacher_of(3, 2)
    rows, asked = contexts_for(teacher), []

    def draw(n):
        asked.append(n)
        return torch.randn(n, 2)

    for contexts in (rows, draw):
        assert found(teacher, cf.distill(teacher, contexts, SHORT), contexts).reverse < 0.1
    assert set(asked) >= {128}


def test_the_teacher_is_unchanged():
    teacher = teacher_of().train()
    before = copy.deepcopy(teacher.state_dict())
    torch.manual_seed(5)
    cf.distill(teacher, config=SHORT)
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(()))
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in before.items())
    assert teacher.training
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_student():
    teacher = teacher_of()
    one, two = (cf.distill(teacher, config=SHORT).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_teacher_whose_draws_explode():
    teacher = stir(cf.MAF(6, layers=4, hidden=(16, 16)), gain=1.3).float()
    x = teacher().sample((4000,))
    assert x.abs().max() > 100 * x.abs().median()
    made = distill_with_history(teacher, config=dataclasses.replace(SHORT, forward_kl_weight=0.5))
    assert all(epoch.skipped == 0 for record in made.histories.values() for epoch in record.epochs)
    assert all(p.isfinite().all() for p in made.student.parameters())
    before = found(teacher, cf.distill(teacher, config=UNTRAINED))
    assert found(teacher, made.student).reverse < before.reverse / 10


def test_a_user_defined_student():
    teacher, iaf = teacher_of(), cf.IAF(4, layers=1, hidden=(8,), seed=0)
    before = copy.deepcopy(iaf.state_dict())
    made = distill_with_history(teacher, config=SHORT, student=iaf)
    assert list(made.histories) == ["flow"]
    assert made.student.transform.forward_cost == "one pass"
    assert all(torch.equal(value, iaf.state_dict()[key]) for key, value in before.items())
    assert found(teacher, made.student).reverse < found(teacher, iaf).reverse


def test_an_interrupted_stage_is_the_last():
    def stop(task, epoch):
        raise KeyboardInterrupt

    made = distill_with_history(teacher_of(), config=SHORT, on_epoch=stop)
    assert {stage: record.stopped for stage, record in made.histories.items()} == {"layers": "interrupted"}
    assert made.student().sample((3,)).isfinite().all()


def test_a_student_is_saved_and_loaded(tmp_path):
    student = cf.distill(teacher_of(), config=SHORT)
    cf.save(student, tmp_path / "student.safetensors")
    x = torch.randn(5, 4)
    assert torch.equal(cf.load(tmp_path / "student.safetensors")().log_prob(x), student().log_prob(x))


# -- how well it went --------------------------------------------------------------------------------


def test_agreement_of_two_gaussians():
    shift, D = 0.5, 2
    one = cf.Flow(cf.bases.StandardNormal(D), cf.Inverse(cf.transforms.Whiten([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])))
    two = cf.Flow(cf.bases.StandardNormal(D), cf.Inverse(cf.transforms.Whiten([shift, 0.0], [[1.0, 0.0], [0.0, 1.0]])))
    torch.manual_seed(0)
    came = cf.diagnostics.agreement(one, two, samples=20_001, test_samples=500)
    kl = shift**2 / 2
    assert abs(came.reverse - kl) < 4 * came.reverse_error
    assert abs(came.forward - kl) < 4 * came.forward_error
    assert came.reverse_error == pytest.approx(shift / 20_001**0.5, rel=0.05)
    assert came.forward_trimmed < came.forward
    assert came.ess / 20_001 == pytest.approx(math.exp(-(shift**2)), abs=0.03)
    assert came.p_value < 0.01


class Solved(cf.Permute):
    forward_cost = "forward substitution"


REFUSED = {
    "no contexts": (lambda: cf.distill(teacher_of(3, 2)), r"expected contexts \(N, 2\), got none"),
    "contexts": (lambda: cf.distill(teacher_of(3), torch.zeros(4, 2)), "expected no contexts, got some"),
    "shape": (lambda: cf.distill(teacher_of(3, 2), torch.zeros(4, 3)), r"contexts \(N, 2\), got \(4, 3\)"),
    "drawn": (
        lambda: cf.distill(teacher_of(3, 2), lambda n: torch.zeros(n + 1, 2)),
        r"contexts \(8192, 2\), got \(8193, 2\)",
    ),
    "finite": (lambda: cf.distill(teacher_of(3, 2), torch.full((4, 2), math.nan)), "finite numbers in the contexts"),
    "student": (
        lambda: cf.distill(teacher_of(3), student=cf.IAF(4)),
        "student with features=3 and context=0, got features=4",
    ),
    "solved": (lambda: cf.distill(teacher_of(3), student=cf.MAF(3)), "expected a student that samples in one pass"),
    "unknown": (
        lambda: cf.distill(cf.Flow(cf.bases.StandardNormal(2), cf.Compose([Solved([1, 0]), cf.Autoregressive(2)]))),
        r"maps of one pass, got Solved; give student=cf\.IAF",
    ),
    "steps": (lambda: cf.DistillConfig(flow_steps=-1), "expected flow_steps to be at least 0, got -1"),
    "samples": (lambda: cf.DistillConfig(samples=1), "expected samples to be at least 2, got 1"),
    "forward": (
        lambda: cf.DistillConfig(forward_kl_weight=-0.1),
        "expected forward_kl_weight to be at least 0, got -0.1",
    ),
    "rate": (lambda: cf.DistillConfig(learning_rate=0), "expected learning_rate to be above 0"),
    "compared": (
        lambda: cf.diagnostics.agreement(teacher_of(), teacher_of(), samples=1),
        "samples and test_samples to be at least 2",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- the command -------------------------------------------------------------------------------------


def command(folder, monkeypatch, capsys, *arguments):
    monkeypatch.chdir(folder)
    code = main(list(arguments))
    return code, *capsys.readouterr()


def test_a_run_of_the_command(tmp_path, monkeypatch, capsys):
    teacher = teacher_of()
    (tmp_path / "run").mkdir()
    cf.save(teacher, tmp_path / "run" / "model.safetensors")
    short = ["--layer-steps", "100", "--flow-steps", "50", "--comparison-samples", "500", "--out", "student"]
    code, out, err = command(tmp_path, monkeypatch, capsys, "distill", "run", *short)
    assert code == 0, err
    assert "KL(student || teacher)" in out
    run = tmp_path / "student"
    names = {path.name for path in run.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "summary.json", "report.html", "model.safetensors", "plots"}
    pictures = {path.name for path in (run / "plots").iterdir()}
    assert pictures == {"learning_curve_layers.png", "learning_curve_flow.png", "samples.png"}
    config, summary = (json.loads((run / name).read_text()) for name in ("config.json", "summary.json"))
    assert config["command"] == "distill"
    assert config["distill"]["layer_steps"] == 100
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["layers", "layers", "flow"]
    student = cf.load(run / "model.safetensors")
    torch.manual_seed(0)
    expected = cf.diagnostics.agreement(teacher, student, samples=500)
    assert summary["reverse"] == pytest.approx(expected.reverse, rel=1e-4)
    assert summary["reverse_per_feature"] == pytest.approx(summary["reverse"] / 4)
    assert 1 < summary["ess"] <= 500


def test_the_command_refuses_invalid_input(tmp_path, monkeypatch, capsys):
    cf.save(cf.VAE((3,), 2, likelihood="gaussian", hidden=(4,), context=4), tmp_path / "vae.safetensors")
    cf.save(cf.MAF(3, 2, layers=1, hidden=(4,)), tmp_path / "context.safetensors")
    cf.save(cf.MAF(3, layers=1, hidden=(4,)), tmp_path / "flow.safetensors")
    for arguments, message in (
        (
            ["nothing"],
            "expected a run folder of counterflow density, or a .safetensors file, got nothing, which does not exist",
        ),
        (["vae.safetensors"], "expected a flow in vae.safetensors, got a VAE"),
        (["context.safetensors"], "without a context, got one with context=2; in Python: cf.distill(flow, contexts)"),
        (["flow.safetensors", "--comparison-samples", "1"], "expected --comparison-samples to be at least 2, got 1"),
        (["flow.safetensors", "--out", "."], "which exists; give another --out"),
    ):
        code, out, err = command(tmp_path, monkeypatch, capsys, "distill", *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_the_students_parts_are_its_teachers():
    teacher = cf.MAF(3, layers=2, hidden=(5,), seed=0)
    parts = teacher.transform.flattened()
    made = mirror(teacher, parts, lambda n: None, ())
    assert [type(part).__name__ for part in made.transform] == ["Compose", "Permute", "Compose"]
