"""Flows of other libraries and what `convert` makes of them: the same numbers."""

import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nflows.transforms as T
import normflows as nf
import pyro.distributions as dist
import pyro.distributions.transforms as pt
import pytest
import torch
import torch.nn.functional as F
import zuko.flows as zf
import zuko.transforms as zt
from nflows import distributions as nd
from nflows.flows import Flow as NFlow
from nflows.flows import MaskedAutoregressiveFlow, SimpleRealNVP
from nflows.nn.nets import ResidualNet
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN, ConditionalDenseNN, DenseNN
from registry import case, close, over
from torch import Tensor, nn
from zuko.distributions import BoxUniform, DiagNormal
from zuko.lazy import UnconditionalDistribution, UnconditionalTransform

import counterflow as cf

D, C = 5, 3
MASK = torch.tensor([1, -1, 1, -1, 1])
ORDER = torch.tensor([3, 0, 4, 2, 1])


def stir(foreign: nn.Module) -> nn.Module:
    """Weights, and running statistics, that are far from the start; float64."""
    generator = torch.Generator().manual_seed(0)
    for name, p in foreign.double().named_parameters():
        p.data = torch.randn(p.shape, generator=generator).double() * (0.6 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.3)
        if name == "gamma":  # of Pyro's batch norm, which takes the positive part
            p.data += 1.5
    for name, b in foreign.named_buffers():
        if "running" in name or "moving" in name:
            b.copy_(torch.rand(b.shape, generator=generator) + 0.5)
        if name.endswith(("initialized", "init_done")):  # ActNorm has seen data
            b.fill_(1)
    return foreign


@dataclass(frozen=True)
class Case:
    """A flow, and its own log_prob and way from standard normal noise to the data."""

    make: Callable[[], Any]
    log_prob: Callable[..., Tensor]
    to_data: Callable[..., Tensor]
    context: int = 0


def of_nflows(transforms: Callable[[int | None], Any], context: int = 0, base: Callable[[], Any] | None = None) -> Case:
    def make() -> nn.Module:
        found = transforms(context or None)
        t = T.CompositeTransform(found) if isinstance(found, list) else found
        return stir(t if isinstance(t, NFlow) else NFlow(t, base() if base else nd.StandardNormal([D])))

    def to_data(flow: Any, eps: Tensor, c: Tensor | None) -> Tensor:
        q = flow._distribution
        if isinstance(q, nd.DiagonalNormal):
            eps = q.mean_ + q.log_std_.exp() * eps
        elif isinstance(q, nd.ConditionalDiagonalNormal):
            mean, log_std = q._compute_params(c)
            eps = mean + log_std.exp() * eps
        return flow._transform.inverse(eps, c)[0]

    return Case(make, lambda flow, x, c: flow.log_prob(x, c), to_data, context)


def masked(kind: type, context: int | None, **more: Any) -> Any:
    return kind(D, 13, context, **more)


MAF, RQS = T.MaskedAffineAutoregressiveTransform, T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
LINEAR = {"tails": "linear", "tail_bound": 3.0, "num_bins": 6}


def coupled(kind: type, context: int | None, norm: bool = False, **more: Any) -> Any:
    def net(i: int, o: int) -> nn.Module:
        return ResidualNet(i, o, hidden_features=9, context_features=context, use_batch_norm=norm, activation=F.elu)

    return kind(MASK, net, **more)


def of_zuko(make: Callable[[int], Any], context: int = 0) -> Case:
    def to_data(flow: Any, eps: Tensor, c: Tensor | None) -> Tensor:
        base = flow.base().base_dist
        return flow.transform(c).inv(base.loc + base.scale * eps)

    return Case(lambda: stir(make(context)), lambda flow, x, c: flow(c).log_prob(x), to_data, context)


ADJACENCY = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 0, 1]]).bool()


def zuko_of_all_kinds(context: int) -> Any:
    base = UnconditionalDistribution(DiagNormal, torch.linspace(-1, 1, D), torch.linspace(0.5, 2, D), buffer=True)
    scale = torch.linspace(0.5, 2, D)
    additive = {"univariate": zt.AdditiveTransform, "shapes": [()]}
    layers = [
        zf.MaskedAutoregressiveTransform(D, context, adjacency=ADJACENCY, hidden_features=(16, 12)),
        zf.GeneralCouplingTransform(D, context, **additive).inv,
        UnconditionalTransform(zt.PermutationTransform, ORDER, buffer=True),
        UnconditionalTransform(zt.RotationTransform, torch.eye(D)),
        UnconditionalTransform(zt.LULinearTransform, torch.eye(D)),
        UnconditionalTransform(torch.distributions.AffineTransform, loc=scale, scale=scale, buffer=True),
    ]
    return zf.Flow(layers, base)


def of_normflows(layers: Callable[[int | None], Any], context: int = 0, q0: Callable[[], Any] | None = None) -> Case:
    def make() -> nn.Module:
        kind = nf.ConditionalNormalizingFlow if context else nf.NormalizingFlow
        return stir(kind(q0() if q0 else nf.distributions.DiagGaussian(D), layers(context or None)))

    def given(c: Tensor | None) -> dict[str, Tensor]:
        return {} if c is None else {"context": c}

    def to_data(flow: Any, eps: Tensor, c: Tensor | None) -> Tensor:
        if isinstance(flow.q0, nf.distributions.DiagGaussian):
            mean, log_scale = flow.q0.loc, flow.q0.log_scale
        else:
            mean, log_scale = flow.q0.context_encoder(c).chunk(2, -1)
        return flow.forward(mean + log_scale.exp() * eps, **given(c))

    return Case(make, lambda flow, x, c: flow.log_prob(x, **given(c)), to_data, context)


def mlp(*sizes: int) -> nn.Module:
    return nf.nets.MLP(list(sizes))


def of_pyro(transforms: Callable[[], list[Any]], context: int = 0) -> Case:
    def make() -> Any:
        kind = dist.ConditionalTransformedDistribution if context else dist.TransformedDistribution
        found = transforms()
        for t in found:
            inner = getattr(t, "_inv", None) or t
            if isinstance(inner, nn.Module):
                stir(inner).to(torch.get_default_dtype()).eval()
        return kind(dist.Normal(torch.linspace(-1, 1, D), torch.linspace(0.5, 2, D)), found)

    def given(flow: Any, c: Tensor | None) -> Any:
        return flow if c is None else flow.condition(c)

    def to_data(flow: Any, eps: Tensor, c: Tensor | None) -> Tensor:
        x = torch.linspace(-1, 1, D) + torch.linspace(0.5, 2, D) * eps
        for t in given(flow, c).transforms:
            x = t(x)
        return x

    return Case(make, lambda flow, x, c: given(flow, c).log_prob(x), to_data, context)


def arn(**more: Any) -> AutoRegressiveNN:
    return AutoRegressiveNN(D, [12, 11], permutation=ORDER, **more)


def conditional_arn(**more: Any) -> ConditionalAutoRegressiveNN:
    return ConditionalAutoRegressiveNN(D, C, [12, 11], permutation=ORDER, **more)


NFLOWS: dict[str, Case] = {}
for context in (0, C):
    of = f"context {context}"
    for blocks in ("residual", "feedforward"):
        for norm in (False, True):
            how = {"use_residual_blocks": blocks == "residual", "use_batch_norm": norm}
            NFLOWS[f"nflows affine, {blocks}, batch norm {norm}, {of}"] = of_nflows(
                lambda c, how=how: [
                    masked(MAF, c, activation=F.elu, **how),
                    T.RandomPermutation(D),
                    masked(MAF, c, **how),
                ],
                context,
            )
        NFLOWS[f"nflows spline, {blocks}, {of}"] = of_nflows(
            lambda c, how=how: [masked(RQS, c, **how, **LINEAR), T.ReversePermutation(D)], context
        )
    for norm in (False, True):
        NFLOWS[f"nflows couplings, batch norm {norm}, {of}"] = of_nflows(
            lambda c, norm=norm: [
                coupled(T.AffineCouplingTransform, c, norm),
                coupled(T.AdditiveCouplingTransform, c, norm),
                coupled(T.PiecewiseRationalQuadraticCouplingTransform, c, norm, **LINEAR),
            ],
            context,
        )
NFLOWS |= {
    "nflows spline coupling, the rest moved": of_nflows(
        lambda c: coupled(
            T.PiecewiseRationalQuadraticCouplingTransform, c, apply_unconditional_transform=True, **LINEAR
        )
    ),
    "nflows random masks, dropout": of_nflows(
        lambda c: masked(MAF, c, use_residual_blocks=False, random_mask=True, dropout_probability=0.5), C
    ),
    "nflows no blocks": of_nflows(lambda c: masked(MAF, c, num_blocks=0)),
    "nflows constants": of_nflows(
        lambda c: [
            T.LULinear(D),
            T.BatchNorm(D),
            T.ActNorm(D),
            T.PointwiseAffineTransform(torch.linspace(-1, 1, D), torch.linspace(0.5, 2, D)),
            T.InverseTransform(T.CompositeTransform([T.LULinear(D), T.IdentityTransform()])),
            T.PointwiseAffineTransform(0.3, 0.2),
            T.QRLinear(D, 3),
            T.SVDLinear(D, 2),
        ]
    ),
    "nflows MaskedAutoregressiveFlow": of_nflows(
        lambda c: MaskedAutoregressiveFlow(D, 12, 2, 2, batch_norm_between_layers=True, use_random_permutations=True)
    ),
    "nflows SimpleRealNVP": of_nflows(lambda c: SimpleRealNVP(D, 12, 2, 2, batch_norm_within_layers=True)),
    "nflows diagonal base": of_nflows(lambda c: masked(MAF, c), base=lambda: nd.DiagonalNormal([D])),
    "nflows base of the context": of_nflows(
        lambda c: masked(MAF, c),
        C,
        lambda: nd.ConditionalDiagonalNormal([D], nn.Sequential(nn.Linear(C, 8), nn.Tanh(), nn.Linear(8, 2 * D))),
    ),
}

NFLOWS["nflows base that is given as the context"] = of_nflows(
    lambda c: T.LULinear(D), 2 * D, lambda: nd.ConditionalDiagonalNormal([D])
)

ZUKO: dict[str, Case] = {}
for context in (0, C):
    for residual in (False, True):
        net = {"hidden_features": (16, 16, 12), "residual": residual}
        ZUKO |= {
            f"zuko {name}, residual {residual}, context {context}": of_zuko(make, context)
            for name, make in {
                "MAF": lambda c, net=net: zf.MAF(D, c, transforms=2, activation=nn.ELU, **net),
                "MAF, random order": lambda c, net=net: zf.MAF(D, c, transforms=2, randperm=True, **net),
                "NSF": lambda c, net=net: zf.NSF(D, c, transforms=2, bins=6, **net),
                "NSF, two passes": lambda c, net=net: zf.NSF(D, c, transforms=2, passes=2, slope=1e-2, **net),
            }.items()
        }
    ZUKO |= {
        f"zuko MAF, few units, context {context}": of_zuko(lambda c: zf.MAF(D, c, hidden_features=(3, 2)), context),
        f"zuko NICE, context {context}": of_zuko(lambda c: zf.NICE(D, c, transforms=2, activation=nn.SiLU), context),
        f"zuko RealNVP, random masks, context {context}": of_zuko(lambda c: zf.RealNVP(D, c, randmask=True), context),
        f"zuko MAF of one feature, context {context}": of_zuko(lambda c: zf.MAF(1, c), context),
        f"zuko of all kinds, context {context}": of_zuko(zuko_of_all_kinds, context),
    }

HALF = torch.tensor([1.0, 0, 1, 0, 1])
NORMFLOWS = {
    "normflows affine": of_normflows(
        lambda c: [
            nf.flows.MaskedAffineAutoregressive(D, 11),
            nf.flows.LULinearPermute(D),
            nf.flows.MaskedAffineAutoregressive(D, 11, use_batch_norm=True, use_residual_blocks=False),
        ]
    ),
    "normflows spline": of_normflows(
        lambda c: [
            nf.flows.AutoregressiveRationalQuadraticSpline(D, 2, 11, permute_mask=True),
            nf.flows.LULinearPermute(D),
            nf.flows.AutoregressiveRationalQuadraticSpline(D, 1, 11),
        ]
    ),
    **{
        f"normflows spline coupling, context {context}": of_normflows(
            lambda c: [
                nf.flows.CoupledRationalQuadraticSpline(D, 2, 11, c, reverse_mask=True),
                nf.flows.LULinearPermute(D),
                nf.flows.CoupledRationalQuadraticSpline(D, 1, 11, c),
            ],
            context,
        )
        for context in (0, C)
    },
    "normflows masked affine": of_normflows(
        lambda c: [
            nf.flows.MaskedAffineFlow(HALF, mlp(D, 9, 8, D), mlp(D, 7, 6, D)),
            nf.flows.ActNorm(D),
            nf.flows.MaskedAffineFlow(1 - HALF, mlp(D, 9, D)),
            nf.flows.MaskedAffineFlow(1 - HALF, None, mlp(D, 9, D)),
            nf.flows.AffineConstFlow(D),
        ]
    ),
    "normflows blocks": of_normflows(
        lambda c: [
            nf.flows.AffineCouplingBlock(mlp(3, 9, 4)),
            nf.flows.Permute(D, "swap"),
            nf.flows.AffineCouplingBlock(mlp(2, 9, 6), scale_map="sigmoid_inv", split_mode="channel_inv"),
            nf.flows.Permute(D),
            nf.flows.AffineCouplingBlock(mlp(3, 9, 2), scale=False),
            nf.flows.InvertibleAffine(D),
            nf.flows.InvertibleAffine(D, use_lu=False),
        ]
    ),
    "normflows base of the context": of_normflows(
        lambda c: [nf.flows.LULinearPermute(D)],
        C,
        lambda: nf.distributions.base.ConditionalDiagGaussian(D, nn.Linear(C, 2 * D)),
    ),
}

PYRO: dict[str, Case] = {}
for skip in (False, True):
    for stable in (False, True):
        how = {"stable": stable, "log_scale_max_clip": 0.3, "sigmoid_bias": 1.5}
        PYRO |= {
            f"pyro affine, skip {skip}, stable {stable}": of_pyro(
                lambda skip=skip, how=how: [
                    pt.AffineAutoregressive(arn(skip_connections=skip, nonlinearity=nn.ELU()), **how),
                    pt.Permute(ORDER),
                    pt.AffineAutoregressive(arn()),
                ]
            ),
            f"pyro conditional affine, skip {skip}, stable {stable}": of_pyro(
                lambda skip=skip, how=how: [
                    pt.ConditionalAffineAutoregressive(conditional_arn(skip_connections=skip), **how),
                    pt.AffineAutoregressive(arn()),
                ],
                C,
            ),
        }
PYRO |= {
    "pyro coupling, batch norm, inverses": of_pyro(
        lambda: [
            pt.AffineCoupling(2, DenseNN(2, [9, 8], [3, 3])),
            pt.BatchNorm(D),
            pt.Permute(ORDER).inv,
            pt.AffineAutoregressive(arn()).inv,
            pt.LowerCholeskyAffine(torch.ones(D), torch.ones(D, D).tril()),
        ]
    ),
    "pyro conditional coupling": of_pyro(
        lambda: [pt.ConditionalAffineCoupling(2, ConditionalDenseNN(2, C, [9, 8], [3, 3]), log_scale_min_clip=-0.2)], C
    ),
}

CASES = NFLOWS | ZUKO | NORMFLOWS | PYRO


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, cf.Flow, Tensor, Tensor | None]:
    """Theirs in eval mode, ours, noise, and a context."""
    torch.manual_seed(0)
    if name.startswith("pyro"):  # which makes numbers of the default dtype
        torch.set_default_dtype(dtype)
    theirs = CASES[name].make()
    if isinstance(theirs, nn.Module):
        theirs.to(dtype).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = cf.convert(theirs)
    x = torch.randn(64, ours.features, dtype=dtype) * 1.5
    return theirs, ours, x, torch.randn(64, ours.context, dtype=dtype) if ours.context else None


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


# Theirs use functions of torch that are going away.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@over(CASES)
@over([torch.float64, torch.float32], "dtype")
@torch.no_grad()
def test_same_log_prob_and_same_samples(name, dtype):
    theirs, ours, eps, c = made(name, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    expected = CASES[name].to_data(theirs, eps, c)
    samples, log_det = ours.transform(eps, c if ours.transform.context else None)
    assert samples.dtype == dtype
    close(samples, expected, tolerance)
    for x in (expected, eps):  # where the flow has its mass, and elsewhere
        came = ours(c).log_prob(x)
        assert came.dtype == dtype
        close(came, CASES[name].log_prob(theirs, x, c).to(dtype), tolerance)
    if dtype == torch.float64:
        assert (ours(c).log_prob(expected) - CASES[name].log_prob(theirs, expected, c)).abs().max() < tolerance
    again, log_det_back = ours.transform.inverse(samples, c if ours.transform.context else None)
    close(again, eps, 10 * tolerance)
    close(log_det_back, -log_det, 10 * tolerance)


@over(CASES)
@torch.no_grad()
def test_saved_and_loaded_again(name, tmp_path):
    _, ours, x, c = made(name)
    assert not ours.training
    cf.save(ours, tmp_path / "flow.safetensors")
    loaded = cf.load(tmp_path / "flow.safetensors")
    assert torch.equal(loaded(c).log_prob(x), ours(c).log_prob(x))


@over(
    [
        "nflows affine, residual, batch norm True, context 3",
        "nflows random masks, dropout",
        "zuko NSF, residual True, context 3",
    ]
)
def test_conversion_leaves_the_flow_unchanged(name):
    theirs = CASES[name].make().train()
    state, seed = copy.deepcopy(theirs.state_dict()), torch.get_rng_state()
    ours = cf.convert(theirs)
    assert torch.equal(torch.get_rng_state(), seed)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(1)
    assert theirs.training and all(torch.equal(v, state[k]) for k, v in theirs.state_dict().items())


@over(
    [
        "nflows couplings, batch norm True, context 3",
        "nflows affine, residual, batch norm True, context 3",
        "pyro affine, skip True, stable True",
    ]
)
def test_converted_flows_can_be_trained(name):
    _, ours, x, c = made(name)
    before = (-ours(c).log_prob(x)).mean()
    optimizer = torch.optim.Adam(ours.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        (-ours(c).log_prob(x)).mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
        optimizer.step()
    assert (-ours(c).log_prob(x)).mean() < before


def test_a_dense_matrix_whose_inverse_nflows_takes_with_a_function_that_torch_has_no_more():
    theirs = stir(NFlow(T.NaiveLinear(D), nd.StandardNormal([D])))
    ours, x = cf.convert(theirs), torch.randn(64, D).double()
    close(ours().log_prob(x), theirs.log_prob(x))
    close(ours.transform(theirs._transform(x)[0])[0], x)


def test_both_directions_are_named():
    maf = cf.convert(NFLOWS["nflows affine, residual, batch norm False, context 0"].make())
    iaf = cf.convert(PYRO["pyro affine, skip False, stable False"].make())
    costs = ("forward substitution", "one pass")
    assert (maf.transform.forward_cost, maf.transform.inverse_cost) == costs
    assert (iaf.transform.forward_cost, iaf.transform.inverse_cost) == costs[::-1]


class Ours(NFlow):
    def _log_prob(self, inputs, context):
        return super()._log_prob(inputs, context)


def nflow(*transforms: Any, **more: Any) -> NFlow:
    return NFlow(T.CompositeTransform(transforms), nd.StandardNormal([D]), **more)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "something else": (
        lambda: nn.Linear(2, 2),
        TypeError,
        r"expected a flow of nflows, .*, got torch\.nn.*Linear; give",
    ),
    "nothing": (
        lambda: None,
        TypeError,
        r"expected a flow of nflows, normflows, pyro, sbi, zuko, got builtins.NoneType$",
    ),
    "a transform of nflows": (lambda: T.LULinear(D), TypeError, "expected an nflows Flow, got LULinear; wrap"),
    "a flow with its own log_prob": (
        lambda: Ours(T.LULinear(D), nd.StandardNormal([D])),
        TypeError,
        "got Ours, which has its own _log_prob",
    ),
    "a layer of nflows": (
        lambda: nflow(T.LULinear(D), T.MaskedPiecewiseCubicAutoregressiveTransform(4, D, 8)),
        TypeError,
        r"cannot convert the transform 1, nflows\.transforms\.autoregressive\.MaskedPiecewiseCubic.*: expected one "
        "of .*LULinear.*, got MaskedPiecewiseCubicAutoregressiveTransform, whose map has no counterpart here; train",
    ),
    "a nested layer": (
        lambda: nflow(T.LULinear(D), T.CompositeTransform([T.IdentityTransform(), T.LeakyReLU()])),
        TypeError,
        "cannot convert the transform 1 1, .*LeakyReLU",
    ),
    "tails": (
        lambda: nflow(masked(RQS, None)),
        ValueError,
        "MaskedPiece.*: expected tails='linear', got None, a map of",
    ),
    "floors that differ": (
        lambda: nflow(masked(RQS, None, min_derivative=1e-2, **LINEAR)),
        ValueError,
        r"expected one number as min_bin_width, .*, got \[0.001, 0.01\]",
    ),
    "an activation": (
        lambda: nflow(masked(MAF, None, activation=F.gelu)),
        TypeError,
        "cannot convert the transform 0, .*: expected an activation of torch among elu, .*, got <built-in .* gelu>",
    ),
    "an activation with settings": (
        lambda: nflow(masked(MAF, None, activation=nn.ELU(alpha=0.5))),
        TypeError,
        r"with torch's defaults, got ELU\(alpha=0.5\)",
    ),
    "a network of one's own": (
        lambda: nflow(T.AffineCouplingTransform(MASK, lambda i, o: nn.Linear(i, o))),
        TypeError,
        "expected nflows.nn.nets.ResidualNet as the network of a coupling layer, got Linear; what",
    ),
    "a layer of one's own with a name of theirs": (
        lambda: nflow(type("LULinear", (T.LULinear,), {"__module__": "mine"})(D)),
        TypeError,
        r"cannot convert the transform 0, mine\.LULinear: expected one of",
    ),
    "a masked network of one's own": (
        lambda: nflow(T.autoregressive.AutoregressiveTransform(nn.Linear(D, D))),
        TypeError,
        "got AutoregressiveTransform, whose map",
    ),
    "ActNorm before training": (lambda: nflow(T.ActNorm(D)), ValueError, "expected ActNorm that has seen data"),
    "an embedding": (
        lambda: nflow(masked(MAF, C), embedding_net=nn.Linear(9, C)),
        TypeError,
        r"cannot convert the embedding net, .*expected no embedding .*, got Linear; set it to torch.nn.Identity\(\)",
    ),
    "a base of nflows": (
        lambda: NFlow(T.LULinear(D), nd.MADEMoG(D, 8, None)),
        TypeError,
        "cannot convert the base distribution, .*expected the base StandardNormal, .*, got MADEMoG; train",
    ),
    "a zuko flow of other maps": (
        lambda: zf.SOSPF(D),
        TypeError,
        "cannot convert the transform 0, .*: expected MonotonicAffineTransform, MonotonicRQS.*, got functools",
    ),
    "a zuko flow on circles": (lambda: zf.NCSF(D), TypeError, "cannot convert the base distribution.*, got Uncond"),
    "a zuko flow in continuous time": (
        lambda: zf.CNF(D),
        TypeError,
        "FFJTransform: expected one of ElementWise.*, got FFJ",
    ),
    "a box": (
        lambda: zf.Flow([], UnconditionalDistribution(BoxUniform, -torch.ones(2), torch.ones(2), buffer=True)),
        TypeError,
        r"expected UnconditionalDistribution\(DiagNormal, ...\) as the base, got",
    ),
    "a normalized network": (
        lambda: zf.NICE(D, normalize=True),
        TypeError,
        "expected linear layers, each with at most one activation, got LayerNorm",
    ),
    "gates in a masked network": (
        lambda: nf.ConditionalNormalizingFlow(
            nf.distributions.DiagGaussian(D), [nf.flows.Permute(D), nf.flows.MaskedAffineAutoregressive(D, 8, C)]
        ),
        ValueError,
        r"cannot convert layer 1, .*expected a context that is added .*, got one that gates its layers \(GLU\)",
    ),
    "Glow's scale": (
        lambda: nf.NormalizingFlow(
            nf.distributions.DiagGaussian(4), [nf.flows.AffineCouplingBlock(mlp(2, 4, 4), scale_map="sigmoid")]
        ),
        ValueError,
        "expected scale_map='exp' or 'sigmoid_inv', got 'sigmoid'",
    ),
    "a planar flow": (
        lambda: nf.NormalizingFlow(nf.distributions.DiagGaussian(D), [nf.flows.Planar((D,))]),
        TypeError,
        "cannot convert layer 0, normflows.flows.planar.Planar: expected one of ActNorm",
    ),
    "batch norm by the batch": (
        lambda: nf.NormalizingFlow(nf.distributions.DiagGaussian(D), [nf.flows.BatchNorm()]),
        TypeError,
        "cannot convert layer 0, normflows.flows.normalization.BatchNorm",
    ),
    "circles of normflows": (
        lambda: nf.NormalizingFlow(
            nf.distributions.DiagGaussian(D), [nf.flows.CircularAutoregressiveRationalQuadraticSpline(D, 1, 8, [0])]
        ),
        TypeError,
        "cannot convert layer 0, .*, got CircularAutoregressiveRationalQuadraticSpline",
    ),
    "a spline of Pyro": (
        lambda: dist.TransformedDistribution(dist.Normal(torch.zeros(D), torch.ones(D)), [pt.spline_autoregressive(D)]),
        TypeError,
        "cannot convert transform 0, .*SplineAutoregressive: expected another transform, got a spline of Pyro",
    ),
    "another map of Pyro": (
        lambda: dist.TransformedDistribution(
            dist.Normal(torch.zeros(D), torch.ones(D)), [pt.Permute(ORDER), pt.neural_autoregressive(D)]
        ),
        TypeError,
        "cannot convert transform 1, .*NeuralAutoregressive: expected one of AffineAutoregressive",
    ),
    "a base of Pyro": (
        lambda: dist.TransformedDistribution(dist.Uniform(torch.zeros(D), torch.ones(D)), [pt.Permute(ORDER)]),
        TypeError,
        r"cannot convert the base distribution.*expected Normal\(loc, scale\) of shape \(D,\)",
    ),
}


@over(REFUSED)
def test_refused_with_the_layer_and_the_reason(name):
    make, error, message = REFUSED[name]
    torch.manual_seed(0)
    foreign = make()
    with pytest.raises(error, match=message):
        cf.convert(foreign)


ESTIMATORS = {
    f"{model}, {z_score}": (model, z_score, {})
    for model in ("maf", "maf_rqs", "nsf", "zuko_maf", "zuko_nsf", "zuko_nice")
    for z_score in ("independent", "structured", "none")
} | {"maf, batch norm": ("maf", "independent", {"use_batch_norm": True})}


def estimator(model: str, z_score: str, features: int = 4, **more: Any) -> tuple[Any, Tensor, Tensor]:
    """A density estimator of sbi with weights that are not the first ones, in eval mode, parameters and data."""
    from sbi.neural_nets import posterior_nn

    torch.manual_seed(0)
    theta, x = 3 * torch.randn(100, features) + 1, 2 * torch.randn(100, C) - 5
    found = posterior_nn(model, z_score_theta=z_score, z_score_x=z_score, hidden_features=20, **more)(theta, x)
    with torch.no_grad():
        for p in found.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return found.eval(), theta, x


@over(ESTIMATORS)
@torch.no_grad()
def test_density_estimators_of_sbi(name):
    model, z_score, more = ESTIMATORS[name]
    for features in (4, 1) if more == {} and z_score == "independent" else (4,):
        theirs, theta, x = estimator(model, z_score, features, **more)
        ours = cf.convert(theirs)
        close(ours(x).log_prob(theta), theirs.log_prob(theta[None], x)[0], 1e-4)
        torch.manual_seed(1)
        expected = theirs.sample((3,), x)
        torch.manual_seed(1)
        zuko = model.startswith("zuko")
        noise = torch.randn(3, 100, features) if zuko else torch.randn(100, 3, features).transpose(0, 1)
        close(ours.transform(noise, x)[0], expected, 1e-4)

        theirs, theta, x = theirs.double(), theta.double(), x.double()
        if not zuko:  # sbi keeps this number in float32
            theirs.net._distribution._log_z = 0.5 * features * torch.tensor(2 * torch.pi, dtype=torch.float64).log()
        close(cf.convert(theirs)(x).log_prob(theta), theirs.log_prob(theta[None], x)[0])


def _priors() -> dict[str, tuple[Any, int]]:
    """Priors of D features with the supports that sbi maps to all numbers, and whether some numbers are outside."""
    from sbi.utils import BoxUniform, MultipleIndependent

    one, d = torch.ones(1), torch.distributions
    return {
        "box": (BoxUniform(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([1.0, 3.0, 7.0])), True),
        "several": (
            MultipleIndependent([d.Gamma(2 * one, one), d.Beta(2 * one, 3 * one), d.Normal(0 * one, one)]),
            True,
        ),
        "positive": (d.Independent(d.LogNormal(torch.zeros(3), torch.ones(3)), 1), True),
        "normal": (d.MultivariateNormal(torch.ones(3), 2 * torch.eye(3)), False),
    }


def test_an_estimator_on_the_support_of_the_prior():
    from sbi.neural_nets import posterior_nn

    for (name, (prior, bounded)), model in itertools.product(_priors().items(), ("zuko_maf", "zuko_nsf")):
        with case(name=name, model=model), torch.no_grad():
            theta = prior.sample((200,))
            x = theta + torch.randn_like(theta)
            settings = {"z_score_theta": "transform_to_unconstrained", "x_dist": prior, "hidden_features": 20}
            theirs = posterior_nn(model, **settings)(theta, x).eval().double()
            ours, theta, x = cf.convert(theirs), theta.double(), x.double()
            close(ours(x).log_prob(theta), theirs.log_prob(theta[None], x)[0])
            noise = torch.randn_like(theta)
            close(ours.transform(noise, x)[0], theirs.net(theirs.embedding_net(x)).transform.inv(noise))
            outside = theta - 100
            assert not bounded or (ours(x).log_prob(outside) == -torch.inf).all()


@torch.no_grad()
def test_batch_norm_between_the_layers_of_a_network():
    def net(*middle):
        return nn.Sequential(nn.Linear(2, 7), *middle, nn.Linear(7, 4))

    for middle in ([nn.BatchNorm1d(7), nn.Tanh()], [nn.Tanh(), nn.BatchNorm1d(7)]):
        with case(middle=middle):
            param_map = net(*middle)
            param_map.train()(torch.randn(50, 2) * 3 + 1)  # running statistics
            t = nf.flows.AffineCouplingBlock(param_map, scale_map="exp")
            theirs = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), [t]).eval().double()
            x = torch.randn(20, 4).double()
            close(cf.convert(theirs)().log_prob(x), theirs.log_prob(x))


def test_a_posterior_of_sbi_is_its_density_estimator():
    from sbi.inference.posteriors import DirectPosterior
    from sbi.utils import BoxUniform

    theirs, theta, x = estimator("maf", "independent")
    prior = BoxUniform(-20 * torch.ones(4), 20 * torch.ones(4))
    posterior = DirectPosterior(theirs, prior)
    flow = cf.convert(posterior)
    with torch.no_grad():
        unnormalized = posterior.log_prob(theta[:5], x[:1], norm_posterior=False)
        close(flow(x[0]).log_prob(theta[:5]), unnormalized, 1e-4)


def test_other_estimators_of_sbi_are_refused():
    theirs, _, _ = estimator("mdn", "independent")
    with pytest.raises(TypeError, match="expected a DirectPosterior or its estimator NFlowsFlow or ZukoFlow, got Mix"):
        cf.convert(theirs)
    theirs, _, _ = estimator("made", "independent")
    with pytest.raises(TypeError, match=r"cannot convert the base distribution, .*, got MADEMoGWrapper"):
        cf.convert(theirs)
    theirs, _, _ = estimator("maf", "independent", embedding_net=nn.Linear(C, 2))
    with pytest.raises(TypeError, match=r"cannot convert the embedding net, .*got Linear; set it"):
        cf.convert(theirs)


def test_a_context_embedded_as_the_message_says():
    theirs, theta, x = estimator("maf", "independent", embedding_net=nn.Linear(C, 2))
    without = copy.deepcopy(theirs.net)
    without._embedding_net = nn.Identity()
    flow = cf.convert(without)
    with torch.no_grad():
        close(flow(theirs.embedding_net(x)).log_prob(theta), theirs.log_prob(theta[None], x)[0], 1e-4)
