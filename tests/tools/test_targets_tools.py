"""The same model in five tools makes the same target: density, gradient and variables; and each tool's constraints."""

from functools import cache

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Dirichlet, HalfCauchy, LKJCholesky, Normal, Uniform, constraints

from counterflow.posterior.targets.function import from_torch
from counterflow.posterior.targets.numpyro import from_numpyro
from counterflow.posterior.targets.pymc import from_pymc
from counterflow.posterior.targets.pyro import from_pyro
from counterflow.posterior.targets.stan import from_stan

# Numba warns so about the code that PyTensor generates, if its cache does not hold that code.
pytestmark = pytest.mark.filterwarnings("ignore:.*is faster on contiguous arrays")

Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
X = np.random.default_rng(0).normal(size=(21, 3))
HIT = (np.random.default_rng(1).uniform(size=21) < 1 / (1 + np.exp(-X[:, 0]))).astype(int)

SCHOOLS_STAN = """
data {
  int<lower=0, upper=1> centered;
  int<lower=1> J;
  vector[J] y;
  vector<lower=0>[J] sigma;
}
parameters {
  real mu;
  real<lower=0> tau;
  vector[J] z;
}
transformed parameters {
  vector[J] theta = centered ? z : mu + tau * z;
}
model {
  mu ~ normal(0, 5);
  tau ~ cauchy(0, 5);
  if (centered) z ~ normal(mu, tau);
  else z ~ std_normal();
  y ~ normal(theta, sigma);
}
generated quantities {
  vector[J] y_rep = to_vector(normal_rng(theta, sigma));
  vector[J] log_lik;
  for (j in 1:J) log_lik[j] = normal_lpdf(y[j] | theta[j], sigma[j]);
}
"""
LOGISTIC_STAN = """
data {
  int<lower=0> N;
  matrix[N, 3] X;
  array[N] int<lower=0, upper=1> hit;
}
parameters {
  real a;
  vector[3] b;
}
model {
  a ~ normal(0, 2);
  b ~ std_normal();
  hit ~ bernoulli_logit_glm(X, a, b);
}
"""
CONSTRAINED_STAN = """
parameters {
  simplex[3] p;
  ordered[3] c;
  real<lower=-1, upper=4> u;
  cholesky_factor_corr[3] chol;
  matrix[2, 3] table;
}
transformed parameters {
  array[2] matrix[2, 3] twice = {table, 2 * table};
}
model {
  p ~ dirichlet([2, 3, 4]');
  c ~ std_normal();
  chol ~ lkj_corr_cholesky(2);
  to_vector(table) ~ normal(1, 2);
  print("a program that talks");
}
"""

# -- eight schools and a logistic regression -----------------------------------------------------------


def schools_torch(centered):
    y, sigma = torch.tensor(Y), torch.tensor(SIGMA)

    def log_density(mu, tau, **group):
        prior = Normal(0, 5).log_prob(mu) + HalfCauchy(5).log_prob(tau)
        mean, scale = (mu[:, None], tau[:, None]) if centered else (0.0, 1.0)
        theta = group["theta"] if centered else mu[:, None] + tau[:, None] * group["z"]
        (free,) = group.values()
        return prior + Normal(mean, scale).log_prob(free).sum(-1) + Normal(theta, sigma).log_prob(y).sum(-1)

    def derived(mu, tau, **group):
        return {} if centered else {"theta": mu[:, None] + tau[:, None] * group["z"]}

    shapes = {"mu": (), "tau": (), "theta" if centered else "z": (8,)}
    return from_torch(log_density, shapes=shapes, constraints={"tau": constraints.positive}, derived=derived)


def schools_pymc(centered):
    import pymc as pm

    with pm.Model(coords={"school": list("ABCDEFGH")}) as model:
        mu, tau = pm.Normal("mu", 0, 5), pm.HalfCauchy("tau", 5)
        if centered:
            theta = pm.Normal("theta", mu, tau, dims="school")
        else:
            theta = pm.Deterministic("theta", mu + tau * pm.Normal("z", 0, 1, dims="school"), dims="school")
        pm.Normal("y", theta, SIGMA, observed=Y, dims="school")
    return from_pymc(model)


def schools_pyro(centered):
    import pyro
    from pyro import distributions as dist

    def model(y, sigma):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(y)):
            if centered:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = pyro.deterministic("theta", mu + tau * pyro.sample("z", dist.Normal(0.0, 1.0)))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return from_pyro(model, torch.tensor(Y).float(), sigma=torch.tensor(SIGMA).float())


def schools_numpyro(centered):
    import numpyro
    from numpyro import distributions as dist

    def model(y, sigma):
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("school", len(y)):
            if centered:
                theta = numpyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = numpyro.deterministic("theta", mu + tau * numpyro.sample("z", dist.Normal(0, 1)))
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return from_numpyro(model, Y, sigma=SIGMA)


def schools_stan(centered):
    data = {"centered": centered, "J": 8, "y": Y, "sigma": SIGMA}
    return from_stan(SCHOOLS_STAN, data, observed=["y"], dims={"theta": ["school"], "y": ["school"]})


def logistic_torch():
    features, hit = torch.tensor(X), torch.tensor(HIT).double()

    def log_density(a, b):
        prior = Normal(0, 2).log_prob(a) + Normal(0, 1).log_prob(b).sum(-1)
        return prior + Bernoulli(logits=a[:, None] + b @ features.T).log_prob(hit).sum(-1)

    return from_torch(log_density, shapes={"a": (), "b": (3,)})


def logistic_pymc():
    import pymc as pm

    with pm.Model() as model:
        features = pm.Data("features", X)
        a, b = pm.Normal("a", 0, 2), pm.Normal("b", 0, 1, shape=3)
        pm.Bernoulli("hit", logit_p=a + features @ b, observed=HIT)
    return from_pymc(model)


def logistic_pyro():
    import pyro
    from pyro import distributions as dist

    def model(features, hit):
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("row", len(features)):
            pyro.sample("hit", dist.Bernoulli(logits=a + features @ b), obs=hit)

    return from_pyro(model, torch.tensor(X), torch.tensor(HIT).float())


def logistic_numpyro():
    import numpyro
    from numpyro import distributions as dist

    def model(features, hit):
        a = numpyro.sample("a", dist.Normal(0, 2))
        b = numpyro.sample("b", dist.Normal(0, 1).expand([3]).to_event(1))
        with numpyro.plate("row", len(features)):
            numpyro.sample("hit", dist.Bernoulli(logits=a + features @ b), obs=hit)

    return from_numpyro(model, X, HIT)


def logistic_stan():
    return from_stan(LOGISTIC_STAN, {"N": 21, "X": X, "hit": HIT})


# -- constrained variables -----------------------------------------------------------------------------


def constrained_torch():
    shapes = {"p": (3,), "u": (), "chol": (3, 3), "table": (2, 3)}
    supports = {"p": constraints.simplex, "u": constraints.interval(-1, 4), "chol": constraints.corr_cholesky}
    return from_torch(lambda **values: joint(values), shapes=shapes, constraints=supports)


def constrained_pymc():
    import pymc as pm

    with pm.Model() as model:
        pm.Dirichlet("p", [2, 3, 4])
        pm.Normal("c", 0, 1, shape=3, transform=pm.distributions.transforms.ordered, initval=[-1, 0, 1])
        pm.Uniform("u", -1, 4)
        pm.Normal("table", 1, 2, shape=(2, 3))
    return from_pymc(model)


def constrained_pyro():
    import pyro
    from pyro import distributions as dist

    def model():
        pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
        c = pyro.sample("c", dist.ImproperUniform(dist.constraints.ordered_vector, torch.Size([]), torch.Size([3])))
        pyro.factor("prior of c", dist.Normal(0.0, 1.0).log_prob(c).sum())
        pyro.sample("u", dist.Uniform(-1.0, 4.0))
        pyro.sample("chol", dist.LKJCholesky(3, 2.0))
        pyro.sample("table", dist.Normal(1.0, 2.0).expand([2, 3]).to_event(2))

    return from_pyro(model)


def constrained_numpyro():
    import numpyro
    from jax import numpy as jnp
    from numpyro import distributions as dist

    def model():
        numpyro.sample("p", dist.Dirichlet(jnp.array([2.0, 3.0, 4.0])))
        c = numpyro.sample("c", dist.ImproperUniform(dist.constraints.ordered_vector, (), (3,)))
        numpyro.factor("prior of c", dist.Normal(0, 1).log_prob(c).sum())
        numpyro.sample("u", dist.Uniform(-1, 4))
        numpyro.sample("chol", dist.LKJCholesky(3, 2.0))
        numpyro.sample("table", dist.Normal(1, 2).expand([2, 3]).to_event(2))

    return from_numpyro(model)


def constrained_stan():
    return from_stan(CONSTRAINED_STAN)


def joint(values):
    """Return the log density (S,) of the constrained variables that a tool has."""
    weights = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)
    terms = {
        "p": lambda p: Dirichlet(weights).log_prob(p),
        "c": lambda c: Normal(0, 1).log_prob(c).sum(-1),
        "u": lambda u: Uniform(-1, 4).log_prob(u),
        "chol": lambda chol: LKJCholesky(3, 2.0).log_prob(chol),
        "table": lambda table: Normal(1, 2).log_prob(table).sum((-1, -2)),
    }
    return sum(term(values[name]) for name, term in terms.items() if name in values)


def free_elements(values):
    """Return the elements of the constrained variables over which their densities are defined, (S, D)."""
    below = torch.tril_indices(3, 3, -1)
    pick = {"p": lambda p: p[:, :2], "chol": lambda chol: chol[:, below[0], below[1]]}
    columns = [pick.get(name, lambda x: x)(value) for name, value in values.items() if name != "twice"]
    return torch.cat([column.reshape(len(column), -1) for column in columns], 1)


# -- the laws ------------------------------------------------------------------------------------------

slow = pytest.mark.slow  # PyTensor and Stan compile each model once per machine
TOOLS = ["torch", pytest.param("pymc", marks=slow), "pyro", "numpyro", pytest.param("stan", marks=slow)]
MODELS = [
    pytest.param(f"{model} {tool}", marks=slow if tool in ("pymc", "stan") else ())
    for tool in ("pymc", "pyro", "numpyro", "stan")
    for model in ("centered", "non-centered", "logistic")
]
TORCH = {
    "centered": lambda: schools_torch(True),
    "non-centered": lambda: schools_torch(False),
    "logistic": logistic_torch,
}


@cache
def build(name):
    """Return the target of a model in a tool, such as "centered pyro", and that of the same model in torch."""
    model, tool = name.split()
    function = globals()[f"{model if model == 'logistic' else 'schools'}_{tool}"]
    return function(*([] if model == "logistic" else [model == "centered"])), TORCH[model]()


@cache
def constrained(tool):
    return globals()[f"constrained_{tool}"]()


def gradient(target, theta):
    leaf = theta.clone().requires_grad_()
    return torch.autograd.grad(target(leaf).sum(), leaf)[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_density_is_that_of_torch_up_to_a_constant(name):
    target, reference = build(name)
    theta = reference.initial(33, seed=0)
    difference = target(theta) - reference(theta)
    assert (difference - difference[0]).abs().max() < 1e-6
    assert (gradient(target, theta) - gradient(reference, theta)).abs().max() < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_the_variables_are_those_of_torch(name):
    target, reference = build(name)
    theta = reference.initial(5, seed=1)
    values, expected = target.constrain(theta), reference.constrain(theta)
    for variable in {"mu", "tau", "theta", "a", "b"} & set(expected):
        torch.testing.assert_close(values[variable], expected[variable], rtol=1e-12, atol=1e-12)
    assert list(values)[: len(target.parameters)] == list(target.parameters)


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_independent_and_any_number_is_allowed(name):
    target, _ = build(name)
    theta = target.initial(9, seed=2)
    value, slope = target(theta), gradient(target, theta)
    for i in (0, 8):
        torch.testing.assert_close(target(theta[i : i + 1]), value[i : i + 1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient(target, theta[i : i + 1]), slope[i : i + 1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(target(theta.flip(0)), value.flip(0), rtol=1e-12, atol=1e-12)
    assert target(theta[:0]).shape == (0,) and gradient(target, theta[:0]).shape == (0, target.dim)
    for variable, values in target.constrain(theta[:0]).items():
        assert values.shape == (0, *target.constrain(theta)[variable].shape[1:])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_finite_differences(name):
    target, _ = build(name)
    assert torch.autograd.gradcheck(target, target.initial(3, seed=3).requires_grad_())


@pytest.mark.parametrize("name", [param for param in MODELS if "centered" in param.values[0]])
def test_data_and_dimensions_are_those_of_the_model(name):
    target, _ = build(name)
    np.testing.assert_array_equal(target.observed["y"], Y)
    assert list(target.dims["y"]) == ["school"]
    if name.endswith("pymc"):
        assert target.coords == {"school": list("ABCDEFGH")}


@pytest.mark.parametrize("name", [param for param in MODELS if "stan" not in param.values[0]])
def test_predictive_draws_have_the_shape_and_the_law_of_the_data(name):
    target, _ = build(name)
    theta = target.initial(1, seed=4).expand(400, -1)
    ((data, draws),) = target.predictive(theta, seed=0).items()
    np.testing.assert_array_equal(draws, target.predictive(theta, seed=0)[data])
    assert not np.array_equal(draws, target.predictive(theta, seed=1)[data])
    values = {name: value[0].numpy() for name, value in target.constrain(theta).items()}
    if data == "y":
        mean, sd = values["theta"], SIGMA
    else:
        mean = 1 / (1 + np.exp(-(values["a"] + X @ values["b"])))
        sd = np.sqrt(mean * (1 - mean))
    assert draws.shape == (400, *mean.shape)
    assert (np.abs(draws.mean(0) - mean) / sd * 20).max() < 4.5  # standard errors; 400 = 20^2


@pytest.mark.parametrize("name", [param for param in MODELS if "centered" in param.values[0]])
def test_the_log_likelihood_of_each_observation(name):
    target, reference = build(name)
    theta = reference.initial(5, seed=5)
    ((data, found),) = target.log_likelihood(theta).items()
    expected = Normal(target.constrain(theta)["theta"], torch.tensor(SIGMA)).log_prob(torch.tensor(Y))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert data == ("log_lik" if "stan" in name else "y")


@pytest.mark.parametrize("name", [param for param in MODELS if "centered" in param.values[0]])
def test_parameters_and_data_are_drawn_from_the_model(name):
    target, reference = build(name)
    if "stan" in name:
        with pytest.raises(TypeError, match="expected a model from which parameters and data can be drawn, got one of"):
            target.simulate(0)
        return
    theta = reference.initial(3, seed=6)
    before = target.log_likelihood(theta)["y"]
    scores = []
    for seed in range(12 if "numpyro" in name else 40):
        truth, simulated = target.simulate(seed)
        assert set(truth) == set(target.parameters)
        effects = target.constrain(target.unconstrain({k: v[None] for k, v in truth.items()}))["theta"][0].numpy()
        scores += [*(simulated.observed["y"] - effects) / SIGMA, truth["mu"].item() / 5]
    assert abs(np.mean(scores)) < 4 / len(scores) ** 0.5 and np.std(scores) == pytest.approx(1, abs=0.25)
    assert torch.equal(target.simulate(seed)[0]["mu"], truth["mu"])
    expected = Normal(target.constrain(theta)["theta"], torch.tensor(SIGMA))
    y = torch.as_tensor(np.array(simulated.observed["y"])).double()
    torch.testing.assert_close(
        simulated.log_likelihood(theta)["y"].double(), expected.log_prob(y), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(target.log_likelihood(theta)["y"], before)
    difference = expected.log_prob(y).sum(-1) - before.sum(-1)
    torch.testing.assert_close(simulated(theta) - target(theta), difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tool", TOOLS)
def test_the_jacobian_is_that_of_the_tools_transforms(tool):
    target = constrained(tool)
    theta = target.initial(7, seed=0)
    h = 1e-5 * torch.eye(target.dim, dtype=torch.float64)
    ahead, behind = (target.constrain((theta[:, None] + side * h).flatten(0, 1)) for side in (1, -1))
    columns = (free_elements(ahead) - free_elements(behind)).reshape(7, target.dim, target.dim) / 2e-5
    expected = joint(target.constrain(theta)) + torch.linalg.slogdet(columns).logabsdet
    difference = target(theta) - expected
    assert (difference - difference[0]).abs().max() < 1e-6


@pytest.mark.parametrize("tool", TOOLS)
def test_constrained_variables_obey_their_constraints(tool):
    target = constrained(tool)
    values = target.constrain(target.initial(7, seed=1))
    shapes = {"p": (3,), "c": (3,), "u": (), "chol": (3, 3), "table": (2, 3)}
    assert {name: tuple(values[name].shape[1:]) for name in target.parameters} == {
        name: shape for name, shape in shapes.items() if name in target.parameters
    }
    torch.testing.assert_close(values["p"].sum(-1), torch.ones(7, dtype=torch.float64))
    assert (values["p"] > 0).all() and ((values["u"] > -1) & (values["u"] < 4)).all()
    if "c" in values:
        assert (values["c"].diff() > 0).all()
    if "chol" in values:
        product = values["chol"] @ values["chol"].mT
        torch.testing.assert_close(product.diagonal(dim1=1, dim2=2), torch.ones(7, 3, dtype=torch.float64))


@pytest.mark.parametrize("tool", TOOLS)
def test_unconstrain_undoes_constrain(tool):
    target = constrained(tool)
    theta = target.initial(5, seed=2)
    values = {name: value.numpy() for name, value in target.constrain(theta).items()}
    torch.testing.assert_close(target.unconstrain(values), theta, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("tool", TOOLS)
def test_coordinates_are_named_in_the_order_of_theta(tool):
    target = constrained(tool)
    places = {name: i for i, name in enumerate(target.coordinates)}
    assert len(places) == target.dim
    theta = torch.zeros(1, target.dim, dtype=torch.float64)
    theta[0, places["table[1]" if tool == "stan" else "table[1,0]"]] = 2.5  # Stan's go column by column
    expected = torch.tensor([[[0.0, 0.0, 0.0], [2.5, 0.0, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(target.constrain(theta)["table"], expected)
