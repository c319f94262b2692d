"""Every transform and flow that obeys the laws: name -> constructor. A new one is one line and inherits them all."""

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import counterflow as cf

M = TypeVar("M", bound=nn.Module)
SPLINE = cf.RationalQuadraticSpline(bins=5, bound=5.0)
ARCHITECTURES = {  # for hidden layers of these sizes, four features or more
    "residual": ((6,) * 5, cf.transforms.Architecture.residual(blocks=2)),
    "residual, unactivated": ((7, 5, 7), cf.transforms.Architecture(skips=(None, None, 0), linear=(0, 2))),
    "skip to output": ((9, 8), cf.transforms.Architecture(skip_to_output=True)),
    "all": (
        (5, 4, 5, 5),
        cf.transforms.Architecture(
            hidden_degrees=[[0, 1, 1, 2, 3], [1, 2, 3, 3], [0, 1, 1, 2, 3], [0, 1, 1, 2, 3]],
            skips=(None, None, 0, 0),
            linear=(2,),
            contexts=(0, 2, 1),
            activated_contexts=(0,),
            skip_to_output=True,
        ),
    ),
}
GRAPH = [  # row i marks the parents of feature i; the longest path is 3, 2, 4
    [0, 0, 0, 0, 0],
    [1, 0, 0, 0, 0],
    [0, 0, 0, 1, 0],
    [0, 0, 0, 0, 0],
    [0, 1, 1, 0, 0],
]
UNIVARIATES = {
    "affine": cf.Affine(),
    "gated": cf.Gated(),
    "sinh-arcsinh": cf.transforms.SinhArcsinh(),
    "spline": SPLINE,
}
FOREIGN = {  # what flows of other libraries are converted to
    "softplus scale": cf.transforms.ForeignAffine("softplus"),
    "sigmoid scale": cf.transforms.ForeignAffine("sigmoid"),
    "softclip scale": cf.transforms.ForeignAffine("softclip"),
    "clamp scale": cf.transforms.ForeignAffine("clamp"),
    "clipped spline": cf.RationalQuadraticSpline(bins=5, bound=5.0, clipped=True),
}


def stir(module: M, seed: int = 0, gain: float = 0.8) -> M:
    """Random weights far from the start, where every map is the identity; float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.double().parameters():
            p.normal_(std=gain / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.3, generator=generator)
    return module


def autoregressive(
    features: int, context: int = 0, hidden: Iterable[int] = (7, 5), univariate: str = "affine", **more: object
) -> Callable[[], cf.Autoregressive]:
    return lambda: stir(cf.Autoregressive(features, context, hidden, (UNIVARIATES | FOREIGN)[univariate], **more))


def coupling_layer(
    features: int,
    moved: tuple[int, ...],
    context: int = 0,
    hidden: tuple[int, ...] = (7, 5),
    *more: object,
    **kw: object,
) -> Callable[[], cf.transforms.CouplingLayer]:
    return lambda: stir(cf.transforms.CouplingLayer(features, moved, context, hidden, *more, **kw))


def _several() -> cf.Compose:
    """Every kind of transform, solved layers in both directions, with and without a context."""
    mean, std = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.5, 2.0, 1.5])
    layers = [
        cf.Standardize(mean, std),
        cf.Autoregressive(3, 2, (9,), activation="tanh"),
        cf.Permute([2, 0, 1]),
        cf.Inverse(cf.Autoregressive(3, 0, (8, 6), cf.Gated(), activation="silu")),
        cf.Autoregressive(3, 2, (7,), SPLINE, (2, 1, 2)),
    ]
    return stir(cf.Compose(layers))


TRANSFORMS: dict[str, Callable[[], cf.transforms.Transform]] = {
    "affine 1": autoregressive(1),
    "affine 1 context": autoregressive(1, 2, (4,), activation="tanh"),
    "affine 2": autoregressive(2, 0, (9,), activation="silu"),
    "affine 3 context": autoregressive(3, 2, (11, 7, 5), activation="softplus"),
    "affine 17": autoregressive(17, 0, (29, 23)),
    "affine 17 context": autoregressive(17, 3, (31,), activation="leaky_relu"),
    "affine few hidden": autoregressive(17, 0, (3, 5, 4), activation="tanh"),
    "affine few hidden context": autoregressive(17, 2, (6,), activation="sigmoid"),
    "affine one hidden": autoregressive(3, 0, (1,), activation="elu"),
    "gated 1 context": autoregressive(1, 2, (5, 3), "gated", activation="elu"),
    "gated 3": autoregressive(3, 0, (10,), "gated", activation="softplus"),
    "gated 17 context": autoregressive(17, 2, (19, 13, 18), "gated", activation="tanh"),
    "spline 1": autoregressive(1, 0, (3,), "spline", activation="elu"),
    "spline 2 context": autoregressive(2, 1, (7, 5), "spline", activation="sigmoid"),
    "spline 3": autoregressive(3, 0, (8, 8, 8), "spline"),
    "spline 17": autoregressive(17, 0, (21, 17), "spline", activation="silu"),
    "shared degrees": autoregressive(5, 0, (9, 8), degrees=(1, 1, 2, 3, 3), activation="elu"),
    "unsorted degrees": autoregressive(4, 2, (9,), "gated", degrees=(3, 1, 4, 2), activation="silu"),
    "unsorted spline": autoregressive(5, 0, (6, 7), "spline", degrees=(2, 3, 1, 3, 2), activation="tanh"),
    "coupling": autoregressive(5, 0, (8, 6), degrees=(1, 1, 2, 2, 2), activation="tanh"),
    "coupling context": autoregressive(4, 2, (8,), degrees=(2, 1, 2, 1), activation="leaky_relu"),
    "sinh-arcsinh 3": autoregressive(3, 0, (10,), "sinh-arcsinh", activation="elu"),
    "graph": autoregressive(5, 0, (9, 8), adjacency=GRAPH, activation="tanh"),
    "graph context": autoregressive(5, 2, (7, 9), "gated", adjacency=GRAPH, activation="silu"),
    "graph residual": autoregressive(
        5, 2, (9,) * 5, "spline", adjacency=GRAPH, activation="elu", architecture=ARCHITECTURES["residual"][1]
    ),
    "graph skip to output": autoregressive(
        5, 0, (9, 8), adjacency=GRAPH, activation="elu", architecture=ARCHITECTURES["skip to output"][1]
    ),
    "graph without edges": autoregressive(3, 0, (4,), adjacency=[[0] * 3] * 3, activation="elu"),
    "one degree": autoregressive(3, 0, (4,), degrees=(1, 1, 1), activation="softplus"),
    "one degree context": autoregressive(3, 2, (4, 6), "gated", degrees=(1, 1, 1), activation="tanh"),
    "softplus 3": autoregressive(3, 0, (10,), "softplus scale", activation="elu"),
    "sigmoid 3 context": autoregressive(3, 2, (10,), "sigmoid scale", activation="silu"),
    "softclip 17": autoregressive(17, 0, (21, 17), "softclip scale", activation="tanh"),
    "clamp 3": autoregressive(3, 0, (8, 6), "clamp scale", activation="softplus"),
    "clipped spline 3": autoregressive(3, 0, (8, 8), "clipped spline", activation="elu"),
    "coupling layer": coupling_layer(5, (1, 4)),
    "coupling layer, spline, gated residual": coupling_layer(
        4, (2, 0), 2, (6, 5, 6, 6), SPLINE, "silu", skips=(None, None, 0, None), linear=(3,), gates=(2,)
    ),
    "coupling layer, linear": coupling_layer(3, (2, 1), 1, (), activation="elu"),
    "coupling layer, of the context": coupling_layer(2, (0, 1), 2, (7,), cf.Gated(), "softplus"),
    "coupling layer, constant": coupling_layer(3, (0, 2, 1), 0, (), SPLINE),
    **{
        f"{name} {D} {univariate}": autoregressive(
            D, context, hidden, univariate, activation="elu", architecture=architecture
        )
        for D, context, univariate in ((4, 0, "affine"), (4, 2, "gated"), (17, 2, "affine"))
        for name, (hidden, architecture) in ARCHITECTURES.items()
    },
    "permute": lambda: cf.Permute([3, 0, 2, 1]),
    "standardize": lambda: cf.Standardize([0.5, -1.0, 2.0], [0.5, 2.0, 1.5]).double(),
    "triangular": lambda: cf.Inverse(
        cf.transforms.Whiten([0.5, -1.0, 2.0], [[0.5, 0, 0], [2.0, 3.0, 0], [-1.0, 0.3, 0.7]])
    ).double(),
    "act norm": lambda: stir(cf.transforms.ActNorm(3)),
    "inverse of LU": lambda: cf.Inverse(stir(cf.transforms.LULinear(4))),
    "compose of trained maps": lambda: stir(
        cf.Compose(
            [
                cf.transforms.ActNorm(3),
                cf.Permute([2, 0, 1]),
                cf.transforms.LULinear(3),
                cf.Autoregressive(3, 2, (9,), activation="tanh"),
                cf.Inverse(cf.transforms.ActNorm(3)),
            ]
        )
    ),
    "marginals": lambda: cf.transforms.QuantileSpline(
        [[-1.0, 0.0, 0.5, 2.0], [-2.0, -1.9, 0.1, 0.2]],
        [[-2.0, -0.5, 1.0, 1.5], [-1.0, 0.0, 0.1, 1.0]],
        [[1.0, 2.0, 0.7, 0.3], [0.5, 6.0, 0.2, 3.0]],
    ).double(),
    "inverse": lambda: cf.Inverse(autoregressive(3, 2, (9,), activation="tanh")()),
    "inverse spline": lambda: cf.Inverse(autoregressive(3, 0, (9,), "spline", activation="elu")()),
    "inverse of linear": lambda: cf.Inverse(cf.transforms.Linear([0.5, -1.0], [[0.2, -1.5], [1.0, 0.3]]).double()),
    "standardized context": lambda: cf.transforms.StandardizedContext(
        autoregressive(3, 2, (9,), activation="tanh")(), [1.0, -2.0], [0.5, 3.0]
    ).double(),
    "compose": _several,
    "inverse of compose": lambda: cf.Inverse(_several()),
    "compose of compose": lambda: cf.Compose([cf.Inverse(_several()), cf.Permute([1, 0, 2]), _several()]),
}

MORE = {"layers": 2, "hidden": (9, 7), "activation": "tanh"}


def kernels(D: int) -> cf.bases.KernelMixture:
    points = torch.tensor([[0.5], [-1.0], [0.7]]).expand(3, D)
    return cf.bases.KernelMixture(D, points, width=0.4, share=0.6)


# D is 3 unless it is given; quadrature asks for 1 and 2.
FLOWS: dict[str, Callable[..., cf.Flow]] = {
    "IAF": lambda D=3: stir(cf.IAF(D, **MORE)),
    "IAF context": lambda D=3: stir(cf.IAF(D, 2, **MORE)),
    "IAF gated": lambda D=3: stir(cf.IAF(D, univariate=cf.Gated(), **MORE)),
    "IAF spline context": lambda D=3: stir(cf.IAF(D, 2, univariate=SPLINE, **MORE)),
    "MAF": lambda D=3: stir(cf.MAF(D, **MORE)),
    "MAF context random": lambda D=3: stir(cf.MAF(D, 2, order="random", seed=1, **MORE)),
    "MAF relu": lambda D=3: stir(cf.MAF(D, layers=2, hidden=(9, 7))),
    "NSF": lambda D=3: stir(cf.NSF(D, bins=5, **MORE)),
    "NSF context": lambda D=3: stir(cf.NSF(D, 2, bins=5, **MORE)),
    "Coupling": lambda D=3: stir(cf.Coupling(D, **MORE)),
    "Coupling context": lambda D=3: stir(cf.Coupling(D, 2, **MORE)),
    "diagonal": lambda D=3: stir(cf.Flow(cf.bases.DiagonalNormal(D), cf.IAF(D, **MORE).transform)),
    "diagonal context": lambda D=3: stir(cf.Flow(cf.bases.DiagonalNormal(D, 2), cf.MAF(D, 2, **MORE).transform)),
    "diagonal alone with context": lambda D=3: stir(
        cf.Flow(cf.bases.DiagonalNormal(D, 2), cf.IAF(D, **MORE).transform)
    ),
    "student": lambda D=3: stir(cf.Flow(cf.bases.StudentT(D, max_df=9.0), cf.IAF(D, **MORE).transform)),
    "kernels": lambda D=3: stir(cf.Flow(kernels(D), cf.MAF(D, **MORE).transform)),
    "permuted diagonal": lambda D=3: stir(cf.Flow(cf.bases.DiagonalNormal(D, 2), cf.Permute(range(D)[::-1]))),
    "both ways": lambda D=3: stir(
        cf.Flow(cf.bases.StandardNormal(D), cf.Compose([cf.IAF(D, 2, **MORE).transform, cf.MAF(D, **MORE).transform]))
    ),
}


def seed_all(seed: int) -> None:
    """Seed torch's generators; torch.manual_seed takes a stack trace each time if there is no GPU."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def case(**labels: object) -> Iterator[None]:
    """Run one case of a loop as a test of its own: from seed 0, and named in the report of a failure."""
    seed_all(0)
    try:
        yield
    except Exception as error:
        error.add_note(f"in the case {labels}")
        raise


def over(
    names: Iterable[object], argument: str = "name", quick: Container[object] | None = None
) -> pytest.MarkDecorator:
    """Run a test once for each name; if `quick` is given, the names that are not in it run in the slow tier.

    A test over pairs takes one argument, the pair.
    """
    values = [name if quick is None or name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
    return pytest.mark.parametrize(argument, values, ids=str)


def inputs(module: cf.transforms.Transform | cf.Flow, *batch: int, seed: int = 1, dtype: torch.dtype = torch.float64):
    """Normal x (batch, D), and c (batch, C) or None."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, module.features, generator=generator, dtype=dtype)
    return x, torch.randn(*batch, module.context, generator=generator, dtype=dtype) if module.context else None


def close(came: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal in shape and dtype, and in value within tolerance * (1 + the largest one expected)."""
    size = expected.detach().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(came, expected, rtol=0, atol=tolerance * (1 + size))


class Launches(TorchDispatchMode):
    """Count the operations that are no views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))
