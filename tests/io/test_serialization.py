"""Save and load: the same numbers come back, and an invalid file is a clear error. Never pickle."""

import json
import pickle
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from registry import SPLINE, over, stir
from safetensors import safe_open

import counterflow as cf

F32, F64 = torch.float32, torch.float64
SMALL = {"layers": 2, "hidden": (5, 4)}
TINY = {"latent": 2, "hidden": (8,), "channels": 2, "context": 4, "posterior_layers": 2, "posterior_hidden": (5,)}
RECIPES = {"IAF": cf.IAF, "MAF": cf.MAF, "NSF": cf.NSF, "Coupling": cf.Coupling}


def recipe(name, context):
    return lambda: RECIPES[name](3, context, **SMALL)


FLOWS: dict[str, Callable[[], cf.Flow]] = {
    **{f"{name} context {context}": recipe(name, context) for name in RECIPES for context in (0, 2)},
    "gated, random order": lambda: cf.IAF(3, univariate=cf.Gated(), order="random", activation="elu", **SMALL),
    "spline of its own": lambda: cf.IAF(3, 2, univariate=SPLINE, **SMALL),
    "affine of its own": lambda: cf.MAF(3, univariate=cf.Affine(bound=1.5), **SMALL),
    "diagonal": lambda: cf.Flow(cf.bases.DiagonalNormal(3, 2), cf.Permute([2, 0, 1])),
    "constants": lambda: cf.Flow(cf.bases.DiagonalNormal(3), cf.Standardize([0.1, 2.0, -3.0], [0.3, 1.0, 7.0])),
    "everything": lambda: cf.Flow(
        cf.bases.DiagonalNormal(3, 2),
        cf.Compose(
            [
                cf.Inverse(cf.Compose([cf.Standardize([0.1, 0.0, 1.0], [0.3, 1.0, 2.0]), cf.Permute([1, 2, 0])])),
                cf.Autoregressive(3, 2, [6], cf.Gated(), degrees=(2, 1, 2), activation="tanh"),
                cf.Inverse(cf.Autoregressive(3, 0, [6], activation="silu")),
            ]
        ),
    ),
}
POSTERIORS = {
    "gaussian": lambda: "gaussian",
    "iaf": lambda: "iaf",
    "flow": lambda: cf.Flow(cf.bases.DiagonalNormal(2, 4), cf.NSF(2, 4, bins=3, **SMALL).transform),
}


def again(module, path):
    cf.save(module, path)
    loaded = cf.load(path)
    assert type(loaded) is type(module) and not loaded.training
    assert repr(loaded) == repr(module)
    tensors, expected = loaded.state_dict(), module.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
    return loaded


@over(FLOWS)
@over([F32, F64], "dtype")
def test_a_loaded_flow_has_the_same_bits(name, dtype, tmp_path):
    flow = stir(FLOWS[name]()).to(dtype)
    loaded = again(flow, tmp_path / "flow.safetensors")
    x, c = torch.randn(7, 3, dtype=dtype), torch.randn(7, 2, dtype=dtype) if flow.context else None
    assert torch.equal(loaded(c).log_prob(x), flow(c).log_prob(x))
    c = c if flow.transform.context else None
    for came, expected in zip(loaded.transform(x, c), flow.transform(x, c), strict=True):
        assert came.dtype == dtype and torch.equal(came, expected)


@over(POSTERIORS)
@pytest.mark.parametrize(
    ("shape", "likelihood", "more"),
    [
        ((3,), "gaussian", {}),
        ((1, 5, 4), "bernoulli", {"network": "conv"}),
        ((2, 3, 3), "discretized_logistic", {"levels": 17, "network": "mlp", "activation": "tanh"}),
        ((3,), "gaussian", {"univariate": SPLINE}),
    ],
)
def test_a_loaded_vae_has_the_same_bits(name, shape, likelihood, more, tmp_path):
    vae = cf.VAE(shape, posterior=POSTERIORS[name](), likelihood=likelihood, **TINY, **more)
    loaded = again(vae, tmp_path / "vae.safetensors")
    came = []
    for model in (vae, loaded):
        torch.manual_seed(1)
        came.append((model.sample(5), cf.objectives.elbo(model, torch.ones(2, *shape), samples=3)))
    assert all(torch.equal(one, other) for one, other in zip(*came, strict=True))


def test_two_dtypes_are_kept(tmp_path):
    constants = cf.Standardize(torch.tensor([1 / 3, 2.0], dtype=F64), torch.tensor([0.1, 1.0], dtype=F64))
    again(cf.Flow(cf.bases.DiagonalNormal(2), constants), tmp_path / "flow.safetensors")


def test_a_layer_used_twice_is_loaded_with_the_same_bits(tmp_path):
    t = cf.Autoregressive(2, hidden=(5,))
    twice, x = stir(cf.Compose([t, cf.Permute([1, 0]), t])), torch.randn(4, 2, dtype=F64)
    cf.save(twice, tmp_path / "twice.safetensors")
    for came, expected in zip(cf.load(tmp_path / "twice.safetensors")(x), twice(x), strict=True):
        assert torch.equal(came, expected)


def test_training_after_loading_changes_the_loaded_weights(tmp_path):
    cf.save(cf.MAF(2, **SMALL), tmp_path / "flow.safetensors")
    flow = cf.load(tmp_path / "flow.safetensors")
    assert all(p.requires_grad and p.is_leaf for p in flow.parameters())
    flow().log_prob(torch.zeros(3, 2)).sum().backward()
    assert all(p.grad is not None for p in flow.parameters())


class Mine(cf.Permute):
    """Class that `load` does not know."""


STRANGE = {
    "a subclass": (lambda: Mine([1, 0]), "expected a class that counterflow can load .*, got Mine"),
    "a part": (lambda: cf.Compose([cf.Permute([1, 0]), Mine([1, 0])]), "got Mine"),
    "another library's": (lambda: torch.nn.Linear(2, 2), "expected a class .*, got Linear"),
}


@pytest.mark.parametrize(("make", "message"), STRANGE.values(), ids=STRANGE)
def test_an_unknown_class_is_refused_and_leaves_no_file(make, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        cf.save(make(), tmp_path / "new" / "flow.safetensors")
    assert not list(tmp_path.iterdir())


def fails(error):
    """Return a function that raises an error."""

    def failing(*args, **more):
        raise error

    return failing


@pytest.mark.parametrize("function", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")], ids=["interrupted", "disk full"])
def test_an_interrupted_save_leaves_the_old_file_whole(function, error, tmp_path, monkeypatch):
    path = tmp_path / "flow.safetensors"
    cf.save(cf.MAF(2, **SMALL), path)
    before = path.read_bytes()
    monkeypatch.setattr(function, fails(error))
    with pytest.raises(type(error)):
        cf.save(cf.MAF(3, **SMALL), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_new_folder_is_made_and_an_old_file_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "flow.safetensors"
    for features in (2, 3):
        cf.save(cf.MAF(features, **SMALL), str(path))
        assert cf.load(str(path)).features == features
    assert list(path.parent.iterdir()) == [path]


def test_a_saved_file_has_the_usual_permissions(tmp_path):
    path, plain = tmp_path / "flow.safetensors", tmp_path / "plain"
    plain.touch()
    cf.save(cf.MAF(2, **SMALL), path)
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "flow.safetensors"
    cf.save(cf.MAF(2, **SMALL), path)
    return path


def change(path, header=lambda header: header, tensors=lambda tensors: tensors):
    """Rewrite the file with another header or other tensors."""
    with safe_open(path, "pt") as file:
        known = file.metadata()
    loaded = tensors(safetensors.torch.load_file(path))
    changed = header(json.loads(known["counterflow"]))
    text = changed if isinstance(changed, str) else json.dumps(changed)
    safetensors.torch.save_file(loaded, path, metadata={"counterflow": text})


def without_one(tensors):
    return dict(list(tensors.items())[1:])


def of_another_shape(tensors):
    name = next(iter(tensors))
    return {**tensors, name: torch.zeros(99)}


NOT_SAFETENSORS = r"expected a safetensors file, got .*flow\.safetensors, which does not read as one"
DESCRIBES = r"expected .*flow\.safetensors to hold what its header describes, got: .*"
BROKEN = {
    "random bytes": (lambda p: p.write_bytes(bytes(range(256)) * 9), NOT_SAFETENSORS),
    "empty": (lambda p: p.write_bytes(b""), NOT_SAFETENSORS),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-40]), NOT_SAFETENSORS),
    "truncated early": (lambda p: p.write_bytes(p.read_bytes()[:30]), NOT_SAFETENSORS),
    "a pickle": (lambda p: torch.save({"a": torch.zeros(2)}, p), NOT_SAFETENSORS),
    "of someone else": (
        lambda p: safetensors.torch.save_file({"a": torch.zeros(1)}, p),
        r"expected a file written by counterflow\.save, got .*flow\.safetensors, whose header has no 'counterflow'",
    ),
    "unknown type": (lambda p: change(p, lambda h: {**h, "type": "Evil"}), DESCRIBES + "type.*'?Evil'?"),
    "no type": (lambda p: change(p, lambda h: {"arguments": {}}), DESCRIBES + "type"),
    "type that is a list": (lambda p: change(p, lambda h: {**h, "type": ["Flow"]}), DESCRIBES),
    "a function for a type": (lambda p: change(p, lambda h: {**h, "type": "os.system"}), DESCRIBES),
    "unknown argument": (lambda p: change(p, lambda h: {**h, "arguments": {"colour": 1}}), DESCRIBES + "colour"),
    "argument out of range": (
        lambda p: change(p, lambda h: {"type": "StandardNormal", "arguments": {"features": 0}}),
        DESCRIBES + "features",
    ),
    "header that is no object": (lambda p: change(p, lambda h: [1, 2]), DESCRIBES),
    "header that is no JSON": (lambda p: change(p, lambda h: '{"type": '), DESCRIBES),
    "another model": (
        lambda p: change(p, lambda h: {"type": "StandardNormal", "arguments": {"features": 2}}),
        DESCRIBES,
    ),
    "missing tensor": (lambda p: change(p, tensors=without_one), DESCRIBES + "Missing key"),
    "tensor too many": (
        lambda p: change(p, tensors=lambda t: {**t, "a": torch.zeros(1)}),
        DESCRIBES + "Unexpected key",
    ),
    "tensor of another shape": (lambda p: change(p, tensors=of_another_shape), DESCRIBES + "size mismatch"),
}


@pytest.mark.parametrize(("breaks", "message"), BROKEN.values(), ids=BROKEN)
def test_an_invalid_file_is_refused(breaks, message, saved):
    breaks(saved)
    with pytest.raises(ValueError, match="(?s)" + message):
        cf.load(saved)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a file written by .*, got .*nowhere, which does not exist"):
        cf.load(tmp_path / "nowhere")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"expected a file written by .*, got"):
        cf.load(tmp_path)


def test_nothing_is_unpickled(saved, monkeypatch):
    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, fails(AssertionError("pickle")))
    assert cf.load(saved).features == 2
