"""Targets of torch functions: Jacobians, maps between the spaces, starting points, and every error."""

import math

import pytest
import torch
from torch.distributions import (
    Dirichlet,
    Exponential,
    HalfCauchy,
    LKJCholesky,
    LogNormal,
    Normal,
    Uniform,
    biject_to,
    constraints,
)

import counterflow as cf
from counterflow.posterior.targets import memory
from counterflow.posterior.targets.function import as_target, from_torch
from counterflow.posterior.targets.stan_data import declared_data
from counterflow.posterior.targets.target import Program, Target, float64_by_default


def bowl(theta):
    return -theta.square().sum(-1) / 2


def everything(mu, tau, p, u, chol, table):
    return (
        Normal(0.3, 2).log_prob(mu)
        + Exponential(1.5).log_prob(tau).sum(-1)
        + Dirichlet(torch.tensor([2.0, 3.0, 4.0])).log_prob(p)
        + Uniform(-1, 4).log_prob(u)
        + LKJCholesky(3, 2.0).log_prob(chol)
        + Normal(mu[:, None, None], 1).log_prob(table).sum((1, 2))
    )


SHAPES = {"mu": (), "tau": (2,), "p": (3,), "u": (), "chol": (3, 3), "table": (2, 2)}
CONSTRAINTS = {
    "tau": constraints.positive,
    "p": constraints.simplex,
    "u": constraints.interval(-1, 4),
    "chol": constraints.corr_cholesky,
}


def model():
    return from_torch(
        everything, shapes=SHAPES, constraints=CONSTRAINTS, derived=lambda tau, **_: {"total": tau.sum(-1)}
    )


def free_elements(values):
    """Return the elements of the variables over which the density is defined, (S, D)."""
    below = torch.tril_indices(3, 3, -1)
    parts = [values["mu"][:, None], values["tau"], values["p"][:, :2], values["u"][:, None]]
    return torch.cat([*parts, values["chol"][:, below[0], below[1]], values["table"].flatten(1)], 1)


def test_the_jacobian_is_that_of_the_bijections():
    target = model()
    theta = target.initial(5, seed=1)
    layout = {name: biject_to(CONSTRAINTS[name]) for name in CONSTRAINTS}

    def row(theta):
        mu, tau, p, u, chol, table = theta[None].split((1, 2, 2, 1, 3, 4), -1)
        values = {"mu": mu[:, 0], "table": table.reshape(1, 2, 2)}
        for name, piece in {"tau": tau, "p": p, "u": u[:, 0], "chol": chol}.items():
            values[name] = layout[name](piece)
        return free_elements(values)[0]

    jacobians = torch.stack([torch.autograd.functional.jacobian(row, point) for point in theta])
    values = {name: value for name, value in target.constrain(theta).items() if name in SHAPES}
    with float64_by_default():
        expected = everything(**values)
    expected += torch.linalg.slogdet(jacobians).logabsdet
    torch.testing.assert_close(target(theta), expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    target = model()
    assert torch.autograd.gradcheck(target, target.initial(3, seed=0).requires_grad_())


def test_rows_are_independent_and_any_number_is_allowed():
    target = model()
    theta = target.initial(7, seed=0)
    one_by_one = torch.cat([target(theta[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(target(theta), one_by_one, rtol=1e-13, atol=1e-13)
    none = theta[:0].clone().requires_grad_()
    assert target(none).shape == (0,)
    (gradient,) = torch.autograd.grad(target(none).sum(), none)
    assert gradient.shape == (0, 13)
    assert {name: value.shape for name, value in target.constrain(none).items()} == {
        name: (0, *shape) for name, shape in {**SHAPES, "total": ()}.items()
    }


def test_constrain_and_unconstrain_are_inverse():
    target = model()
    theta = target.initial(5, seed=2)
    values = target.constrain(theta)
    assert list(values) == [*SHAPES, "total"]
    assert target.parameters == tuple(SHAPES)
    torch.testing.assert_close(target.unconstrain(values), theta, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(values["total"], values["tau"].sum(-1))
    arrays = {name: value.numpy() for name, value in values.items()}
    torch.testing.assert_close(target.unconstrain(arrays), theta, rtol=1e-9, atol=1e-9)


def test_coordinates_are_named():
    assert model().coordinates == (
        "mu",
        *("log(tau)[0]", "log(tau)[1]"),
        *("unconstrained(p)[0]", "unconstrained(p)[1]"),
        "unconstrained(u)",
        *(f"unconstrained(chol)[{i}]" for i in range(3)),
        *("table[0,0]", "table[0,1]", "table[1,0]", "table[1,1]"),
    )


def test_a_function_of_theta_is_a_target():
    target = as_target(bowl, dim=3)
    theta = torch.randn(4, 3)  # a float32 point is scored in float64
    torch.testing.assert_close(target(theta), bowl(theta.double()), rtol=0, atol=0)
    torch.testing.assert_close(target.constrain(theta), {"theta": theta.double()}, rtol=0, atol=0)
    assert (target.dim, target.coordinates) == (3, ("theta[0]", "theta[1]", "theta[2]"))
    assert as_target(target) is target and as_target(target, 3) is target
    assert target.predictive(theta, seed=0) == {} and target.observed == {}


def test_dim_may_be_an_attribute_of_the_function():
    class Funnel:
        dim = 2

        def __call__(self, theta):
            scale = torch.exp(theta[:, 0] / 2)
            return Normal(0, 3).log_prob(theta[:, 0]) + Normal(0, scale).log_prob(theta[:, 1])

    assert as_target(Funnel()).dim == 2


def test_vmap_makes_a_function_of_a_batch():
    target = from_torch(torch.func.vmap(lambda point: -point.square().sum() / 2), dim=3)
    theta = target.initial(5, seed=0)
    torch.testing.assert_close(target(theta), bowl(theta))


def test_constants_of_torch_are_float64_while_the_function_runs():
    # torch computes HalfCauchy(5.0) in the default dtype, whatever the dtype of the value.
    target = from_torch(
        lambda tau: HalfCauchy(5.0).log_prob(tau), shapes={"tau": ()}, constraints={"tau": constraints.positive}
    )
    theta = torch.linspace(-1.7, 2.1, 5, dtype=torch.float64)[:, None]
    tau = theta[:, 0].exp()
    expected = math.log(2 / (math.pi * 5)) - torch.log1p((tau / 5) ** 2) + theta[:, 0]
    torch.testing.assert_close(target(theta), expected, rtol=0, atol=1e-14)


def test_starting_points_are_uniform_and_seeded():
    target = from_torch(bowl, dim=2)
    points = target.initial(4000, seed=0)
    assert points.dtype == torch.float64 and points.abs().max() < 2
    torch.testing.assert_close(points.var(0), torch.full((2,), 4 / 3, dtype=torch.float64), rtol=0.05, atol=0)
    assert torch.equal(points[:3], target.initial(4000, seed=0)[:3])
    assert not torch.equal(points, target.initial(4000, seed=1))
    assert target.initial(0, seed=0).shape == (0, 2)


def test_starting_points_keep_to_where_the_density_is_finite():
    target = from_torch(lambda theta: theta.log().sum(-1), dim=1)
    assert (target.initial(50, seed=0) > 0).all()


def test_repr_names_the_size_and_the_parameters():
    assert repr(from_torch(bowl, dim=2)) == "Target(dim=2, parameters=('theta',))"


def regression(rows, seen):
    """Return the log density of 3 coefficients given `rows` data; `seen` gets the size of each batch."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, 3, generator=generator, dtype=torch.float64)

    def log_density(theta):
        seen.append(len(theta))
        return bowl(theta) + Normal(theta @ X.T, 1).log_prob(X.sum(1)).sum(-1)

    return log_density


def test_many_data_are_evaluated_in_parts_with_the_same_values_and_gradients(monkeypatch):
    monkeypatch.setattr(memory, "BUDGET", 10_000_000)  # below what 64 points take
    seen = []
    target = from_torch(regression(5_000, seen), dim=3)
    assert 5 < target.max_points < 50  # a point takes 40 kB for each operation on the data
    theta = torch.linspace(-1, 1, 3 * (2 * target.max_points + 5), dtype=torch.float64).reshape(-1, 3)
    seen.clear()
    value = target(theta)
    assert max(seen) == target.max_points and sum(seen) - 1 == len(theta)  # one more, to see whether it repeats
    leaf = theta.clone().requires_grad_()
    weight = torch.rand(len(theta), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weight * target(leaf)).sum(), leaf)
    target.max_points = len(theta)
    whole = theta[:20].clone().requires_grad_()
    torch.testing.assert_close(target(whole), value[:20])
    (expected,) = torch.autograd.grad((weight[:20] * target(whole)).sum(), whole)
    torch.testing.assert_close(gradient[:20], expected)
    torch.testing.assert_close(target.constrain(theta)["theta"], theta, rtol=0, atol=0)


def test_few_data_are_evaluated_by_1024_points():
    assert from_torch(bowl, dim=3).max_points == model().max_points == 1024


def test_values_derived_from_many_draws_are_computed_in_parts():
    seen = []

    def derived(x):
        seen.append(len(x))
        return {"twice": 2 * x}

    target = from_torch(lambda x: bowl(x), shapes={"x": (2,)}, derived=derived)
    theta = torch.randn(2500, 2, dtype=torch.float64)
    torch.testing.assert_close(target.constrain(theta), {"x": theta, "twice": 2 * theta}, rtol=0, atol=0)
    assert seen == [1024, 1024, 452]


def outside(x):
    return LogNormal(0, 1, validate_args=False).log_prob(-x.abs())


def kinked(a, b):
    return bowl(a) - b.abs().sqrt() - (b - b.detach()).abs().sqrt()


class Minimal(Program):
    """A program with the abstract methods alone."""

    coordinates = ("x",)
    parameters = ("x",)

    def log_density(self, theta):
        return bowl(theta)

    def constrain(self, theta):
        return {"x": theta[:, 0]}


def test_a_program_needs_a_density_and_constrain_only():
    target = Target(Minimal())
    theta = target.initial(3, seed=0)
    assert target.predictive(theta, seed=0) == {} and target.observed == target.dims == target.coords == {}
    torch.testing.assert_close(target.constrain(theta), {"x": theta[:, 0]})


HALF, POINTS = torch.zeros(3), torch.zeros(2, 3, dtype=torch.float64)

# The call, the error's type, and a pattern of its text.
ERRORS = {
    "neither dim nor shapes": (
        lambda: from_torch(bowl),
        ValueError,
        r"expected either dim, for a log density of theta \(B, dim\), or shapes, .* got dim=None and shapes=None; ",
    ),
    "dim and shapes": (
        lambda: from_torch(bowl, 1, shapes={"mu": ()}),
        ValueError,
        r"got dim=1 and shapes={'mu': \(\)}",
    ),
    "dim of zero": (lambda: from_torch(bowl, 0), ValueError, r"expected dim to be a whole number of at least 1, got 0"),
    "dim as a float": (lambda: from_torch(bowl, 2.0), ValueError, r"expected dim .* at least 1, got 2\.0"),
    "no variables": (
        lambda: from_torch(bowl, shapes={}),
        ValueError,
        r"expected a model with a free continuous variable, got none; leave one unobserved",
    ),
    "a constraint of a stranger": (
        lambda: from_torch(bowl, shapes={"mu": ()}, constraints={"tau": constraints.positive}),
        ValueError,
        r"expected constraints of mu, got one of tau",
    ),
    "a discrete variable": (
        lambda: from_torch(bowl, shapes={"k": ()}, constraints={"k": constraints.nonnegative_integer}),
        ValueError,
        r"expected continuous variables, got k, which is discrete \(.*\); sum it out .*logsumexp",
    ),
    "a constraint without a bijection": (
        lambda: from_torch(bowl, shapes={"A": (2, 2)}, constraints={"A": constraints.symmetric}),
        ValueError,
        r"expected a support that biject_to knows, got Symmetric\(\) for A; write the variable as a function",
    ),
    "too few axes": (
        lambda: from_torch(bowl, shapes={"p": ()}, constraints={"p": constraints.simplex}),
        ValueError,
        r"expected p to have 1 axes or more under its constraint Simplex\(\), got \(\)",
    ),
    "not summed": (
        lambda: from_torch(lambda theta: -theta.square(), 3)(POINTS),
        ValueError,
        r"expected a log density of shape \(2,\), one for each row of theta, got \(2, 3\); sum over all other axes",
    ),
    "summed too far": (
        lambda: from_torch(lambda theta: -theta.square().sum(), 3)(POINTS),
        ValueError,
        r"expected a log density of shape \(2,\), .*, got \(\)",
    ),
    "float32 comes out": (
        lambda: from_torch(lambda theta: -theta.float().square().sum(-1), 3)(POINTS),
        TypeError,
        r"expected the log density to be a float64 tensor, got torch\.float32; convert the data with \.double\(\)",
    ),
    "an array comes out": (
        lambda: from_torch(lambda theta: theta.sum(-1).numpy(), 3)(POINTS),
        TypeError,
        r"expected the log density to be a float64 tensor, got ndarray",
    ),
    "data in float32": (
        lambda: from_torch(lambda theta: theta @ HALF, 3)(POINTS),
        RuntimeError,
        r"dtype",
    ),
    "NaN everywhere": (
        lambda: from_torch(lambda theta: theta.sum(-1) * math.nan, 2).initial(3, 0),
        ValueError,
        r"expected a finite log density and gradient at one of 100 random points in \(-2, 2\)\^2, got none; it is nan "
        r"with parameters theta; look for data outside of a support",
    ),
    "outside of a support": (
        lambda: from_torch(outside, shapes={"x": ()}).initial(1, 0),
        ValueError,
        r"got none; it is nan with parameters x;",
    ),
    "no gradient": (
        lambda: from_torch(kinked, shapes={"a": (2,), "b": ()}).initial(1, 0),
        ValueError,
        r"got none; the gradient is not finite for b;",
    ),
    "a new part of the data at every call": (
        lambda: from_torch(lambda theta: bowl(theta - torch.randn(3, dtype=torch.float64)), 3)(POINTS),
        ValueError,
        r"expected the same log density at every call, got -\d.* and then -\d.* at one point: it draws "
        r"random numbers, such as a part of the data, .*; use all data and no noise",
    ),
    "rows that depend on each other": (
        lambda: from_torch(lambda theta: bowl(theta) - theta.square().sum(), 3)(POINTS + torch.eye(2, 3)),
        ValueError,
        r"expected the same log density at every call, .* or the rows of a batch depend on each other",
    ),
    "no points at once": (lambda: setattr(model(), "max_points", 0), ValueError, r"expected max_points to be a whole"),
    "theta too wide": (
        lambda: from_torch(bowl, 2)(POINTS),
        ValueError,
        r"expected theta of shape \(B, 2\), got \(2, 3\)",
    ),
    "theta without a batch": (lambda: from_torch(bowl, 3)(POINTS[0]), ValueError, r"expected theta .*, got \(3,\)"),
    "theta is whole": (
        lambda: from_torch(bowl, 3)(POINTS.long()),
        TypeError,
        r"expected theta to be a floating-point tensor, got a tensor of torch\.int64",
    ),
    "theta is an array": (lambda: from_torch(bowl, 3)(POINTS.numpy()), TypeError, r"got ndarray; .*torch\.as_tensor"),
    "another dim": (
        lambda: as_target(from_torch(bowl, 3), 2),
        ValueError,
        r"expected dim=3, which the target has, got dim=2; leave dim out",
    ),
    "no dim": (lambda: as_target(bowl), ValueError, r"expected either dim"),
    "not a function": (
        lambda: as_target([1.0], 1),
        TypeError,
        r"expected a target or a function of theta \(B, D\), got builtins's list; .*counterflow\.targets\.from_pymc",
    ),
    "a class": (lambda: as_target(Target), TypeError, r"expected a target or a function of theta"),
    "values are missing": (
        lambda: model().unconstrain({"mu": [0.0], "tau": [[1.0, 1.0]]}),
        ValueError,
        r"expected values of mu, tau, p, u, chol, table, got none of p, u, chol, table",
    ),
    "values of different number": (
        lambda: from_torch(bowl, shapes={"a": (2,), "b": ()}).unconstrain({"a": [[0.0, 0.0]], "b": 0.0}),
        ValueError,
        r"expected values of shape \(S, \*shape\), with one S for all, got a \(1, 2\), b \(\)",
    ),
    "no way back": (
        lambda: Target(Minimal()).unconstrain({"x": [0.0]}),
        TypeError,
        r"expected a target whose modelling tool maps values back",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected_what_came_and_what_to_do(case):
    call, kind, pattern = ERRORS[case]
    with pytest.raises(kind, match=pattern):
        call()


def test_float32_data_are_named_in_a_note():
    with pytest.raises(RuntimeError) as caught:
        ERRORS["data in float32"][0]()
    assert caught.value.__notes__ == [
        "theta is float64, and tensors that meet it have to be float64 as well: convert with x.double()"
    ]


def test_the_targets_are_public():
    assert cf.targets.Target is Target
    assert {"from_torch", "from_pymc", "from_pyro", "from_numpyro", "from_stan", "as_target"} <= set(cf.targets.__all__)


STAN_BLOCKS = {
    "none": ("parameters { real mu; }", []),
    "bounds": ("data { int<lower=0, upper=9> N; vector<lower=0>[N] y; matrix[N, 2 * N] X; }", ["N", "y", "X"]),
    "arrays": ("data { array[2, 3] real a; real b[2, 3]; array[2] vector[3] c; }", ["a", "b", "c"]),
    "comments": ("// data { int x; }\ndata { int N; // int z;\n /* int w; */ }", ["N"]),
    "transformed": ("transformed data { int k = 2; } data{int N;}", ["N"]),
    "included": ("#include more.stan\ndata { int N; }", []),
}


@pytest.mark.parametrize("name", STAN_BLOCKS)
def test_the_data_block_of_a_stan_program(name):
    code, names = STAN_BLOCKS[name]
    assert list(declared_data(code)) == names


def test_missing_data_of_a_stan_program_need_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr("counterflow.posterior.targets.stan.open_library", None)
    with pytest.raises(ValueError, match="expected data that fit the program, got N, without y, which its data block"):
        cf.targets.from_stan("data { int N; vector[N] y; } parameters { real mu; }", {"N": 2})
