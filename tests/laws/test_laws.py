"""Laws that every transform of the registry obeys."""

from copy import deepcopy
from functools import cache
from itertools import product

import torch
from registry import TRANSFORMS, case, close, inputs, over, stir

import counterflow as cf
from counterflow.made.graph import ancestors

AUTOREGRESSIVE = [name for name, make in TRANSFORMS.items() if isinstance(make(), cf.Autoregressive)]
ALIVE = [name for name in AUTOREGRESSIVE if TRANSFORMS[name]().activation != "relu"]  # no slope is ever 0
DIRECTIONS = ("forward", "inverse")


@cache
def jacobian(name, direction):
    """(B, D, D), log_det (B,) and the point, for 16 points between -8 and 8."""
    t = TRANSFORMS[name]().requires_grad_(False)
    x, c = inputs(t, 16)
    x = x.clamp(-1, 1) * torch.linspace(0.5, 8, 16, dtype=x.dtype)[:, None]
    _, log_det = getattr(t, direction)(x, c)
    J = torch.autograd.functional.jacobian(lambda x: getattr(t, direction)(x, c)[0].sum(0), x)
    return J.movedim(1, 0), log_det


def spread(t, *batch):
    """Points of which one half lies within -8 and 8, evenly, and one half is normal."""
    x, c = inputs(t, *batch)
    return torch.where(torch.rand_like(x) < 0.5, x, 16 * torch.rand_like(x) - 8), c


@over(TRANSFORMS)
def test_round_trip(name):
    for first in DIRECTIONS:
        with case(first=first):
            t = TRANSFORMS[name]()
            there, back = (t, t.inverse) if first == "forward" else (t.inverse, t)
            x, c = spread(t, 64)
            y, log_det = there(x, c)
            again, log_det_back = back(y, c)
            assert log_det.shape == (64,)
            close(again, x)
            close(log_det_back, -log_det)


@over(TRANSFORMS)
def test_log_det_is_that_of_autograds_jacobian(name):
    for direction in DIRECTIONS:
        with case(direction=direction):
            J, log_det = jacobian(name, direction)
            close(log_det, torch.linalg.slogdet(J).logabsdet)


def sees(t, direction):
    """Return which features the parameters of each feature may depend on, (D, D)."""
    if t.parents is not None:
        return torch.tensor(t.adjacency if direction == "forward" else ancestors(t.parents)).bool()
    d = torch.tensor(t.degrees)
    return d[:, None] > d[None, :]


@over(AUTOREGRESSIVE)
def test_jacobian_is_exactly_zero_where_degrees_and_graphs_forbid(name):
    for direction in DIRECTIONS:
        with case(direction=direction):
            t = TRANSFORMS[name]()
            forbidden = ~(sees(t, direction) | torch.eye(t.features, dtype=torch.bool))
            J, _ = jacobian(name, direction)
            assert (J[:, forbidden] == 0.0).all()


@over(AUTOREGRESSIVE)
def test_jacobian_is_nonzero_where_the_masks_connect(name):
    t = TRANSFORMS[name]()
    paths, found = torch.eye(t.features), []
    for layer, skip in zip(t.made.layers, (*t.made.links.skips, None), strict=True):
        paths = layer.mask.to(paths) @ paths
        found.append(paths := paths if skip is None else paths + found[skip])
    paths = paths if t.made.skip_to_output is None else paths + t.made.skip_to_output.mask
    connected = paths.unflatten(0, (t.features, -1)).sum(1)[t.places][:, t.places] > 0
    J, _ = jacobian(name, "forward")
    found, expected = (J != 0).any(0), connected | torch.eye(t.features, dtype=torch.bool)
    assert not (found & ~expected).any()
    assert name not in ALIVE or torch.equal(found, expected)
    if min(t.hidden) >= max(t.degrees):  # then no degree is left out
        assert torch.equal(connected, sees(t, "forward"))


@over(TRANSFORMS)
def test_config_and_state_dict_rebuild_it(name):
    t = TRANSFORMS[name]()
    x, c = inputs(t, 4)
    rebuilt = stir(type(t)(**deepcopy(t).config()), seed=5)
    rebuilt.load_state_dict(t.state_dict())
    for other in (rebuilt, deepcopy(t)):
        for direction in DIRECTIONS:
            for came, expected in zip(getattr(other, direction)(x, c), getattr(t, direction)(x, c), strict=True):
                assert torch.equal(came, expected)


@over(TRANSFORMS)
def test_rows_do_not_see_each_other(name):
    for direction in DIRECTIONS:
        with case(direction=direction):
            t = TRANSFORMS[name]()
            x, c = inputs(t, 5)
            x.requires_grad_()
            y, log_det = getattr(t, direction)(x, c)
            others = torch.arange(5) != 2
            (slope,) = torch.autograd.grad(y[2].sum() + log_det[2], x)
            assert (slope[others] == 0).all() and (slope[2] != 0).any()
            with torch.no_grad():
                x[others] = torch.nan
                y_alone, log_det_alone = getattr(t, direction)(x, c)
            assert torch.equal(y_alone[2], y[2]) and torch.equal(log_det_alone[2], log_det[2])


@over(TRANSFORMS)
def test_dtype_and_device_are_kept(name):
    for direction, dtype in product(DIRECTIONS, (torch.float32, torch.float64)):
        with case(direction=direction, dtype=dtype):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            t = TRANSFORMS[name]().to(device, dtype)
            x, c = (v if v is None else v.to(device, dtype) for v in inputs(t, 5))
            results = [*getattr(t, direction)(x, c), *t.push_score(x, x, c)]
            assert {(v.dtype, v.device.type) for v in results} == {(dtype, device)}
            t.float()(*(v if v is None else v.float() for v in (x, c)))  # and back again
            t.double()(*(v if v is None else v.double() for v in (x, c)))


def gradients(t, direction):
    x, c = spread(t, 64)
    y, log_det = getattr(t, direction)(x, c)
    loss = (y * torch.randn_like(y)).sum() + (log_det * torch.randn_like(log_det)).sum()
    return torch.autograd.grad(loss, tuple(t.parameters()))


@over([name for name, make in TRANSFORMS.items() if any(True for _ in make().parameters())])
def test_every_parameter_receives_a_gradient(name):
    for direction in DIRECTIONS:
        with case(direction=direction):
            t = TRANSFORMS[name]()
            for grad in gradients(t, direction):
                assert torch.isfinite(grad).all()


@over(ALIVE)
def test_gradients_are_nonzero_where_the_masks_connect_and_zero_elsewhere(name):
    for direction in DIRECTIONS:
        with case(direction=direction):
            t = TRANSFORMS[name]()
            grads = dict(zip((n for n, _ in t.named_parameters()), gradients(t, direction), strict=True))
            all_heard = torch.ones(
                len(t.made.layers[-1].mask), dtype=torch.bool
            )  # units that some output sees, from the last
            heard = {len(t.hidden): all_heard}
            for k in reversed(range(len(t.made.layers))):
                mask = t.made.layers[k].mask.bool() & heard[k][:, None]
                heard[k - 1] = torch.stack(
                    [mask.any(0), *(heard[later] for later in t.made.links.added_to(k - 1))]
                ).any(0)
                assert torch.equal(grads.pop(f"made.layers.{k}.bias") != 0, heard[k])
                assert torch.equal(grads.pop(f"made.layers.{k}.weight") != 0, mask)
            if t.made.skip_to_output is not None:
                assert torch.equal(grads.pop("made.skip_to_output.bias") != 0, all_heard)
                assert torch.equal(grads.pop("made.skip_to_output.weight") != 0, t.made.skip_to_output.mask.bool())
            for key, grad in grads.items():
                unit = heard[int(key.split(".")[2])] if "contexts" in key else all_heard  # or the direct context
                assert torch.equal(grad != 0, unit.view(-1, *[1] * (grad.dim() - 1)).expand_as(grad))


SHAPES = {  # batch shape of x, of c, of y
    "none": ((), (), ()),
    "empty": ((0,), (0,), (0,)),
    "one": ((1,), (1,), (1,)),
    "three ranks": ((2, 3, 4), (2, 3, 4), (2, 3, 4)),
    "no samples": ((0, 3), (3,), (0, 3)),
    "samples of a batch": ((5, 3), (3,), (5, 3)),
    "one x, many c": ((), (3,), (3,)),
    "many x, one c": ((3,), (), (3,)),
    "both": ((4, 1), (3,), (4, 3)),
}


@over(TRANSFORMS, quick=list(TRANSFORMS)[::2])
def test_batch_shapes(name):
    for shapes in SHAPES:
        with case(shapes=shapes):
            t = TRANSFORMS[name]()
            of_x, of_c, of_y = SHAPES[shapes]
            x, c = inputs(t, *of_x)[0], inputs(t, *of_c, seed=2)[1]
            if not t.context:
                of_y = of_x
            rows = x.expand(*of_y, -1).flatten(0, -2) if of_y else x[None]
            rows_c = None if c is None else c.expand(*of_y, -1).flatten(0, -2) if of_y else c[None]
            for method in (t.forward, t.inverse, lambda x, c, t=t: t.push_score(x, 2 * x, c)):
                for came, flat in zip(method(x, c), method(rows, rows_c), strict=True):
                    close(came, flat.reshape(of_y + flat.shape[1:]), 1e-12)


@over(TRANSFORMS)
def test_strides_do_not_matter(name):
    for direction in DIRECTIONS:
        with case(direction=direction):
            t = TRANSFORMS[name]()
            x, c = inputs(t, 6)
            expanded = x[:1].expand(6, -1)
            for given, same in (
                (x.T.contiguous().T, x),
                (x.repeat(1, 2)[:, : t.features], x),
                (expanded, expanded.clone()),
            ):
                given, same = given.detach().requires_grad_(), same.clone().requires_grad_()
                results = [(v, *getattr(t, direction)(v, c)) for v in (given, same)]
                grads = [torch.autograd.grad((y * x).sum() + log_det.sum(), v)[0] for v, y, log_det in results]
                close(results[0][1], results[1][1], 1e-12)
                close(*grads, 1e-12)


@over(TRANSFORMS)
def test_push_score_is_the_transposed_solve(name):
    t = TRANSFORMS[name]()
    x, c = spread(t, 6)
    score = torch.randn_like(x)
    y, log_det, score_y = t.push_score(x, score, c)
    assert not score_y.requires_grad

    frozen = deepcopy(t).requires_grad_(False)
    J = torch.autograd.functional.jacobian(lambda x: frozen(x, c)[0].sum(0), x).movedim(1, 0)
    dl_dx = torch.autograd.functional.jacobian(lambda x: frozen(x, c)[1].sum(), x)
    close(score_y, torch.linalg.solve(J.mT, score - dl_dx), 1e-9)
    for came, expected in zip((y, log_det, score_y), cf.transforms.Transform.push_score(t, x, score, c), strict=True):
        close(came, expected)


@over(TRANSFORMS)
def test_push_score_has_the_graph_of_forward(name):
    t = TRANSFORMS[name]()
    x, c = spread(t, 6)
    wanted = [v.requires_grad_() for v in (x, c) if v is not None] + list(t.parameters())
    came, expected = (
        torch.autograd.grad((y * torch.ones_like(y).cumsum(-1)).sum() + log_det.sum(), wanted)
        for y, log_det in (t.push_score(x, x.detach(), c)[:2], t(x, c))
    )
    for one, other in zip(came, expected, strict=True):
        close(one, other)


BY_FEATURE = [name for name in TRANSFORMS if "inverse" not in name and "compose" not in name]


@over(BY_FEATURE)
def test_log_det_by_feature_sums_to_log_det(name):
    t = TRANSFORMS[name]()
    x, c = inputs(t, 6)
    total = torch.randn_like(x)
    y, log_det = t(x, c)
    y_too, by_feature = t.forward_by_feature(x, total, c)
    assert torch.equal(y_too, y)
    close(by_feature.sum(-1), total.sum(-1) + log_det)
    if name != "permute":  # each term is the slope of its own feature
        J = torch.autograd.functional.jacobian(lambda x: t(x, c)[0].sum(0), x).movedim(1, 0)
        close(by_feature - total, J.diagonal(dim1=1, dim2=2).log())


def test_log_det_by_feature_travels_with_its_feature():
    parts = [TRANSFORMS["unsorted degrees"](), cf.Permute([3, 0, 2, 1]), TRANSFORMS["coupling context"]()]
    t = cf.Compose(parts)
    x, c = inputs(t, 6)
    _, by_feature = t.forward_by_feature(x, torch.zeros_like(x), c)
    middle, first = parts[0].forward_by_feature(x, torch.zeros_like(x), c)
    _, last = parts[2].forward_by_feature(middle[:, [3, 0, 2, 1]], torch.zeros_like(x), c)
    close(by_feature, first[:, [3, 0, 2, 1]] + last)
