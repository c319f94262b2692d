"""The one training loop: it learns, it repeats, and nothing that is not finite reaches the weights."""

import copy
import json
import math
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
import torch
from registry import over
from torch import nn
from torch.distributions import MultivariateNormal

import counterflow as cf
from counterflow.training.batches import picked, placed
from counterflow.training.checkpoints import Checkpoint, Checkpoints

ROWS, HELD_OUT = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).split([40, 20])
PLAIN = cf.FitConfig(epochs=3, batch_size=10, ema=0, warm_up_steps=0, schedule="constant", learning_rate=0.05)


class Center(nn.Module):
    """Two numbers that look for the middle of the rows; the smallest model there is."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0, -1.0]))


def closeness(model, x, beta=1.0):
    return -beta * (x - model.w).square().sum(-1)


def fit(model=None, objective=closeness, train=ROWS, validation=HELD_OUT, config=PLAIN, **more):
    model = Center() if model is None else model
    return model, cf.fit(model, objective, train, validation, config, **more)


def keep(weights, objective=closeness):
    """Arguments for fit that append the evaluated weights of every epoch to a list."""
    latest = {}

    def validate(model, x):
        latest.update(copy.deepcopy(model.state_dict()))
        return objective(model, x)

    return {"validate": validate, "on_epoch": lambda task, epoch: weights.append(dict(latest))}


def same(state, model):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# -- what it learns ----------------------------------------------------------------------------------

LEARNING = cf.FitConfig(epochs=20, batch_size=100, learning_rate=5e-2, warm_up_steps=10, ema=0.9)


def test_a_maf_learns_a_gaussian_to_its_entropy():
    truth = MultivariateNormal(torch.tensor([1.0, -0.5]), torch.tensor([[1.0, 0.8], [0.8, 1.5]]))
    flow = cf.MAF(2, layers=1, hidden=(8,), seed=0)
    record = cf.fit(flow, cf.log_likelihood, truth.sample((1_500,)), truth.sample((500,)), LEARNING)
    unseen = truth.sample((5_000,))
    gap = (truth.log_prob(unseen) - flow().log_prob(unseen)).mean().item()
    assert -0.02 < gap < 0.1
    assert record.stopped == "finished" and [e.epoch for e in record.epochs] == list(range(1, 21))
    assert record.epochs[-1].train > record.epochs[0].train and record.seconds > 0


def test_rows_with_a_context_are_learnt_together():
    c = torch.randn(1_500, 1)
    x = torch.cat([2 * c, -c], 1) + 0.5 * torch.randn(1_500, 2)
    flow = cf.MAF(2, context=1, layers=1, hidden=(16,), activation="elu", seed=0)
    cf.fit(flow, cf.log_likelihood, (x[:1_000], c[:1_000]), (x[1_000:], c[1_000:]), LEARNING)
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.5))
    assert cf.log_likelihood(flow, (x[1_000:], c[1_000:])).mean().item() == pytest.approx(-entropy, abs=0.15)


@over(["adam", "adamax", "adamw"], "optimizer")
@over(["constant", "cosine"], "schedule")
def test_every_optimizer_and_schedule(optimizer, schedule):
    model, record = fit(config=replace(PLAIN, optimizer=optimizer, schedule=schedule, epochs=8))
    assert record.epochs[-1].validation > record.epochs[0].validation
    assert record.epochs[-1].learning_rate == pytest.approx(0.05 if schedule == "constant" else 0.0005)
    assert not model.training


@over(["adam", "adamax", "adamw"], "optimizer")
def test_a_step_is_the_optimizers(optimizer):
    kinds = {"adam": torch.optim.Adam, "adamax": torch.optim.Adamax, "adamw": torch.optim.AdamW}
    config = replace(PLAIN, optimizer=optimizer, epochs=1, batch_size=40, weight_decay=0.3, clip_norm=1.5)
    model, expected = fit(config=config)[0], Center()
    by_hand = kinds[optimizer](expected.parameters(), lr=0.05, weight_decay=0.3)
    (-closeness(expected, ROWS).mean()).backward()
    nn.utils.clip_grad_norm_(expected.parameters(), 1.5)
    by_hand.step()
    assert torch.allclose(model.w, expected.w, atol=1e-6)


def test_the_whole_gradient_is_clipped():
    norms, model = [], Center()
    fit(
        model,
        config=replace(PLAIN, clip_norm=2.5, epochs=20),
        on_step=lambda *_: norms.append(model.w.grad.norm().item()),
    )
    assert max(norms) == pytest.approx(2.5, rel=1e-4) and min(norms) < 29


def test_the_learning_rate_warms_up():
    record = fit(config=replace(PLAIN, warm_up_steps=16, epochs=6))[1]  # 4 steps an epoch
    rates = [e.learning_rate / 0.05 for e in record.epochs]
    assert rates == pytest.approx([5 / 16, 9 / 16, 13 / 16, 1, 1, 1])  # of the step that comes next


@over(["float32", "bf16"], "precision")
def test_a_vae_trains_in_either_precision(precision):
    vae = cf.VAE((3,), latent=2, likelihood="gaussian", hidden=(8,), context=4, posterior_hidden=(8,))
    rows = torch.randn(100, 3)
    _, record = fit(
        vae, cf.objectives.elbo, rows[:80], rows[80:], replace(PLAIN, precision=precision, learning_rate=5e-3)
    )
    assert record.stopped == "finished" and record.epochs[-1].validation > record.epochs[0].validation
    assert {p.dtype for p in vae.parameters()} == {torch.float32}


def test_float64_is_kept():
    flow = cf.MAF(2, layers=1, hidden=(4,)).double()
    _, record = fit(flow, cf.log_likelihood, ROWS.double(), HELD_OUT.double())
    assert flow().sample((1,)).dtype == torch.float64
    expected = cf.log_likelihood(flow, HELD_OUT.double()).mean().item()
    assert record.best.validation == pytest.approx(expected, rel=1e-12)  # float32 would keep 7 digits


# -- what it repeats ---------------------------------------------------------------------------------


def noisy(model, x, beta=1.0):
    return closeness(model, x + 0.1 * torch.randn_like(x), beta)


def test_the_seed_determines_everything_bit_for_bit():
    def trained(seed):
        torch.manual_seed(torch.seed() % 2**31)  # wherever the global generator stands
        model, record = fit(objective=noisy, config=replace(PLAIN, seed=seed, ema=0.9))
        return model.w, [e.validation for e in record.epochs]

    one, again, other = trained(1), trained(1), trained(2)
    assert torch.equal(one[0], again[0]) and one[1] == again[1]
    assert not torch.equal(one[0], other[0])


def test_the_global_generator_is_unchanged():
    before = torch.get_rng_state()
    fit(objective=noisy)
    fit(objective=noisy, on_step=interrupt_at(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_noise_is_the_same_in_every_epoch():
    seen = []

    def objective(model, x):
        seen.append(torch.randn(()).item())
        return closeness(model, x)

    record = fit(objective=objective, validate=lambda model, x: torch.randn(len(x)))[1]
    assert len({e.validation for e in record.epochs}) == 1
    assert len(set(seen)) == len(seen) == 12
    assert record.best.epoch == 1  # what is not better is not the best


def test_each_epoch_uses_every_row_once_in_a_new_order():
    batches = []

    def objective(model, x):
        batches.append(x) if model.training else None
        return closeness(model, x)

    fit(objective=objective, train=torch.arange(23.0)[:, None].expand(-1, 2))
    assert [len(batch) for batch in batches] == [10] * 6  # 2 full batches of 23 rows, 3 epochs
    epochs = [torch.cat(batches[k : k + 2])[:, 0].tolist() for k in (0, 2, 4)]
    assert all(len(set(epoch)) == 20 for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_validation_is_the_mean_over_all_rows():
    model, record = fit(validation=HELD_OUT[:13])  # 10 and 3
    assert record.best.validation == pytest.approx(closeness(model, HELD_OUT[:13]).mean().item(), rel=1e-5)


def test_the_arguments_of_the_callbacks():
    steps, epochs, betas = [], [], []

    def objective(model, x, beta):
        betas.append(beta)
        assert model.training
        return closeness(model, x, beta)

    def validate(model, x):
        assert not model.training and not torch.is_grad_enabled()
        return closeness(model, x)

    record = fit(
        objective=objective,
        validate=validate,
        anneal=lambda epoch: {"beta": cf.objectives.warm_up(epoch, 2)},
        on_step=lambda *step: steps.append(step),
        on_epoch=lambda *epoch: epochs.append(epoch),
        task="centers",
    )[1]
    assert steps == [("centers", k, 12) for k in range(1, 13)]
    assert betas == [min(1, k / 8) for k in range(12)]
    assert epochs == [("centers", epoch) for epoch in record.epochs]
    assert all(epoch.rows_per_second > 0 and epoch.skipped == 0 for epoch in record.epochs)


# -- which weights are kept --------------------------------------------------------------------------


def scores(*values):
    """Validation objectives that come out as asked for, one call an epoch."""
    rest = iter(values)
    return lambda model, x: torch.full((len(x),), next(rest))


ENDS = {
    "patience": ([1.0, 3.0, 2.0, 1.0, 9.0], 2, "patience", 4, 2),
    "patience that starts again": ([1.0, 0.0, 2.0, 0.0, 0.0], 2, "patience", 5, 3),
    "no patience": ([1.0, 3.0, 2.0, 1.0, 0.0], 0, "finished", 5, 2),
    "a validation that is not finite": ([1.0, math.nan, -math.inf, 0.5, 0.0], 0, "finished", 5, 1),
    "at the end": ([1.0, 2.0, 3.0, 4.0, 5.0], 1, "finished", 5, 5),
}


@pytest.mark.parametrize(("values", "patience", "stopped", "ran", "best"), ENDS.values(), ids=ENDS)
@over([0.0, 0.9], "ema", quick=[0.9])
def test_the_best_weights_are_kept(values, patience, stopped, ran, best, ema):
    weights = []
    config = replace(PLAIN, epochs=5, batch_size=20, patience=patience, ema=ema)
    model, record = fit(config=config, validation=HELD_OUT[:9], **keep(weights, scores(*values)))
    assert (record.stopped, len(record.epochs), record.best.epoch) == (stopped, ran, best)
    assert [e.best for e in record.epochs] == [v > max([-math.inf, *values[:k]]) for k, v in enumerate(values)][:ran]
    assert same(weights[best - 1], model)


def test_weights_are_averaged_as_the_docstring_says():
    raw, model = [], Center()
    fit(model, config=replace(PLAIN, epochs=1, ema=0.5), on_step=lambda *_: raw.append(model.w.detach().clone()))
    average = raw[0]
    for n, w in enumerate(raw[1:], 1):
        decay = min(0.5, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * w
    assert len(raw) == 4 and torch.allclose(model.w, average, atol=1e-6) and not torch.allclose(model.w, raw[-1])


def test_without_averaging_the_weights_are_the_last_ones():
    raw, model = [], Center()
    fit(model, config=replace(PLAIN, epochs=1), on_step=lambda *_: raw.append(model.w.detach().clone()))
    assert torch.equal(model.w, raw[-1])


# -- how it ends early -------------------------------------------------------------------------------


def interrupt_at(step):
    def on_step(task, done, total):
        if done == step:
            raise KeyboardInterrupt

    return on_step


def test_an_interruption_keeps_the_best_weights():
    weights = []
    model, record = fit(on_step=interrupt_at(10), **keep(weights))
    assert record.stopped == "interrupted" and len(record.epochs) == 2
    assert same(weights[record.best.epoch - 1], model) and not model.training


def test_an_interruption_in_the_first_epoch():
    model, record = fit(on_step=interrupt_at(2))
    assert (record.stopped, record.epochs, record.best) == ("interrupted", [], None)
    assert not torch.equal(model.w, Center().w) and model.w.isfinite().all()


# Each adds something to the terms that leaves the loss or the gradient not finite. They get w - w = 0.
FAULTS = {
    "nan loss": lambda terms, zero: terms * math.nan,
    "infinite loss": lambda terms, zero: terms - math.inf,
    "minus infinite loss": lambda terms, zero: terms + math.inf,
    "one term": lambda terms, zero: torch.cat([terms[1:], terms[:1] * math.nan]),
    "infinite gradient": lambda terms, zero: terms + zero.sqrt(),
    "nan gradient": lambda terms, zero: terms + (0 * zero).sqrt(),
    "norm that overflows": lambda terms, zero: terms + 1e38 * zero,
}


class Faulty:
    """The objective, but for chosen training steps (from 0 on)."""

    def __init__(self, fault, steps):
        self.fault, self.steps, self.step, self.model = FAULTS[fault], steps, -1, None

    def __call__(self, model, x):
        terms = closeness(model, x)
        if not model.training:
            return terms
        assert model.w.isfinite().all()
        self.step += 1
        zero = (model.w - model.w.detach()).sum()
        return self.fault(terms, zero) if self.step in self.steps else terms


@over(FAULTS)
def test_a_step_that_is_not_finite_is_skipped_and_counted(name):
    weights = []
    record = fit(objective=Faulty(name, {0, 1, 5, 10, 11}), **keep(weights))[1]
    assert [e.skipped for e in record.epochs] == [2, 1, 2] and record.stopped == "finished"
    assert all(state["w"].isfinite().all() for state in weights)
    assert all(math.isfinite(e.train) for e in record.epochs)
    assert record.epochs[-1].validation > record.epochs[0].validation


@over(FAULTS)
def test_a_skipped_step_leaves_no_trace(name):
    raw, model = [], Center()
    fit(model, Faulty(name, {1, 2}), on_step=lambda *_: raw.append(model.w.detach().clone()))
    assert torch.equal(raw[0], raw[1]) and torch.equal(raw[1], raw[2]) and not torch.equal(raw[2], raw[3])


@over(FAULTS)
@over([0.0, 0.9], "ema", quick=[0.9])
def test_too_many_skipped_steps_in_a_row_end_the_training(name, ema):
    weights = []
    objective = Faulty(name, {1, 2, *range(6, 100)})
    with pytest.warns(RuntimeWarning, match="3 steps in a row .* best weights so far are kept. Try a smaller learn"):
        model, record = fit(objective=objective, config=replace(PLAIN, max_skipped=3, ema=ema), **keep(weights))
    assert record.stopped == "not finite" and objective.step == 8
    assert [e.skipped for e in record.epochs] == [2, 2]
    assert same(weights[record.best.epoch - 1], model) and model.w.isfinite().all()


def test_a_training_whose_every_step_is_skipped():
    with pytest.warns(RuntimeWarning, match="20 steps in a row"):
        model, record = fit(objective=Faulty("nan loss", range(100)), config=replace(PLAIN, epochs=9))
    assert record.stopped == "not finite" and torch.equal(model.w, Center().w)
    assert all(math.isnan(e.train) for e in record.epochs)


@over([1e15, 1e25, 3e38], "size")
@over(["IAF", "MAF"], "recipe")
def test_rows_that_overflow_in_the_model(recipe, size):
    """Large finite numbers are accepted. At 1e15 the gradient's norm overflows, then the loss, then the network."""
    rows = ROWS.clone()
    rows[::20] = size
    flow = getattr(cf, recipe)(2, layers=2, hidden=(8,), seed=0)
    before = copy.deepcopy(flow.state_dict())
    record = cf.fit(flow, cf.log_likelihood, rows, HELD_OUT, replace(PLAIN, batch_size=5, epochs=4))
    skipped = [e.skipped for e in record.epochs]
    assert record.stopped == "finished" and all(1 <= k <= 2 for k in skipped)
    assert all(p.isfinite().all() for p in flow.parameters()) and not same(before, flow)
    assert all(math.isfinite(e.validation) for e in record.epochs)


def test_an_objective_that_is_nan_in_a_region():
    """Beyond 1.5 there is no number: batches without such rows still train, and a validation with one is never best."""

    def log_gap(model, x):
        return torch.log(1.5 - x[:, 0]) + closeness(model, x)

    beyond = [bool((rows[:, 0] > 1.5).any()) for rows in (ROWS, HELD_OUT)]
    assert beyond == [True, True]
    inside = HELD_OUT[HELD_OUT[:, 0] < 1.5]
    model, record = fit(objective=log_gap, validation=inside, config=replace(PLAIN, batch_size=4))
    assert model.w.isfinite().all() and not torch.equal(model.w, Center().w)
    assert all(0 < e.skipped < 10 and math.isfinite(e.train) for e in record.epochs) and record.best is not None
    model, record = fit(objective=log_gap, config=replace(PLAIN, batch_size=4))
    assert record.best is None and all(math.isnan(e.validation) for e in record.epochs) and model.w.isfinite().all()


# -- without data ------------------------------------------------------------------------------------


def around_one(model, batch):
    """An objective that draws for itself: it is highest where w is (1, 1)."""
    assert batch is None
    return -(1 + 0.1 * torch.randn(5, 2) - model.w).square().sum(-1)


def test_an_objective_that_needs_no_data():
    steps, model = [], Center()
    record = cf.fit(model, around_one, 25, 2, replace(PLAIN, epochs=4), on_step=lambda *step: steps.append(step))
    assert steps[-1] == ("training", 100, 100) and len(record.epochs) == 4
    assert torch.allclose(model.w, torch.ones(2), atol=0.1)


def test_validation_without_data_has_the_same_noise_in_every_epoch():
    frozen = replace(PLAIN, learning_rate=1e-12)
    record = fit(objective=around_one, train=1, validation=3, config=frozen)[1]
    assert len({round(e.validation, 9) for e in record.epochs}) == 1
    again, other = (fit(objective=around_one, train=1, validation=n, config=frozen)[1] for n in (3, 4))
    assert again.epochs[0].validation == record.epochs[0].validation != other.epochs[0].validation


# -- errors ------------------------------------------------------------------------------------------


def with_one(value, row, *place):
    rows = ROWS.clone()
    rows[(row, *place)] = value
    return rows


SHORT = r"expected at least 10 rows in the training data, got 9; set batch_size to at most 9 or bring more data"
REFUSED = {
    "fewer rows than a batch": ({"train": ROWS[:9]}, SHORT),
    "no rows": ({"train": ROWS[:0]}, r"expected at least 10 rows in the training data, got 0; bring more data$"),
    "no validation": ({"validation": ROWS[:0]}, r"at least 1 row.? in the validation data, got 0; bring more data$"),
    "nan": ({"train": with_one(math.nan, 3, 1)}, r"the training data, got 1 .* \(nan\) at row 3, column 1 \(counted"),
    "infinity": ({"validation": with_one(-math.inf, 0, 0)}, r"the validation data, .* \(-inf\) at row 0, column 0 "),
    "nan row": ({"train": with_one(math.nan, 7)}, "got 2 non-finite of 80, the first .* row 7, column 0 .* 1 of 40 r"),
    "nan in context": ({"train": (ROWS, with_one(math.nan, 1, 0))}, "at row 1, column 0"),
    "no steps": ({"train": 0}, r"expected the training data to be a whole number of at least 1, got 0"),
    "no evaluations": ({"validation": 0}, r"expected the validation data to be a whole number of at least 1, got 0"),
    "tuple of two lengths": ({"train": (ROWS, ROWS[:30])}, r"as many rows in each part of the training .* \[30, 40\]"),
    "validation of two lengths": ({"validation": (ROWS, ROWS[:3])}, r"each part of the validation data, got \[3, 40\]"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_data_are_refused(data, message):
    model = Center()
    with pytest.raises(ValueError, match=message):
        fit(model, **data)
    assert torch.equal(model.w, Center().w)


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="expected terms that depend on the model's weights, got an objective without"):
        fit(Center(), lambda model, x: -x.square().sum(-1))
    with pytest.raises(ValueError, match="expected a model with weights to train, got Center without any"):
        fit(Center().requires_grad_(False))


def test_non_finite_images_are_named_by_their_index():
    images = torch.zeros(20, 1, 4, 5)
    images[6, 0, 2, 3] = math.nan
    with pytest.raises(ValueError, match=r"got 1 non-finite of 400, the first \(nan\) at row 6, index \(0, 2, 3\)"):
        fit(train=images)


@over(["toaster", "cuda:99"], "device")
def test_an_unavailable_device_is_refused(device):
    with pytest.raises(ValueError, match=f"expected .*device.* got '{device}'"):
        fit(config=replace(PLAIN, device=device))


CONFIGS = {
    "epochs": (0, "expected epochs to be at least 1, got 0"),
    "batch_size": (-3, "expected batch_size to be at least 1, got -3"),
    "max_skipped": (0, "expected max_skipped to be at least 1, got 0"),
    "learning_rate": (0.0, "expected learning_rate to be above 0, got 0"),
    "clip_norm": (math.nan, "expected clip_norm to be above 0, got nan"),
    "ema": (1.0, r"expected ema to be in \[0, 1\), got 1"),
    "optimizer": ("sgd", "expected optimizer to be one of adam, adamax, adamw, got 'sgd'"),
    "schedule": ("linear", "expected schedule to be one of cosine, constant, got 'linear'"),
    "precision": ("float16", "expected precision to be one of float32, bf16, got 'float16'"),
    "warm_up_steps": (-1, "expected warm_up_steps .* got -1"),
    "patience": (-1, "expected patience .* got -1"),
    "weight_decay": (-0.1, "expected weight_decay .* got -0.1"),
}


@pytest.mark.parametrize(("name", "value", "message"), [(k, *v) for k, v in CONFIGS.items()], ids=CONFIGS)
def test_invalid_configurations_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        cf.FitConfig(**{name: value})


# -- checkpoints, from which a training goes on -----------------------------------------------------------


class Conditional(nn.Module):
    """A flow whose objective draws noise: the generator's state counts."""

    def __init__(self):
        super().__init__()
        self.flow = cf.MAF(2, 1, layers=2, hidden=(9,), seed=0)


def jittered(model, batch, beta=1.0):
    x, c = batch
    return beta * model.flow(c).log_prob(x + 0.1 * torch.randn_like(x))


class InMemory(Checkpoints):
    """Checkpoints that are kept in memory, all of them."""

    def __init__(self, resume=None, every=0.0):
        super().__init__("nowhere", every)
        object.__setattr__(self, "resume", resume)
        object.__setattr__(self, "taken", [])

    def load(self):
        return self.resume

    def save(self, state):
        tensors = {k: v.clone() for k, v in state.tensors.items()}
        self.taken.append(Checkpoint(tensors, json.loads(json.dumps(state.numbers))))


def course(checkpoints, stop_after=None, config=MappingProxyType({})):
    """A short training: the weights and the record that it ended with."""
    torch.manual_seed(1)
    x, c = torch.randn(103, 2), torch.randn(103, 1)
    model, config = Conditional(), cf.FitConfig(epochs=5, batch_size=20, warm_up_steps=3, **config)

    def on_step(task, done, total):
        if done == stop_after:
            raise KeyboardInterrupt

    anneal = lambda epoch: {"beta": 1 + epoch / 7}  # noqa: E731
    more = {"anneal": anneal, "on_step": on_step, "checkpoints": checkpoints}
    record = cf.fit(model, jittered, (x, c), (x[:30], c[:30]), config, **more)
    return model.state_dict(), record


@over(["adam", "adamax", "adamw"], "optimizer")
@over([0.0, 0.9], "ema", quick=[0.9])
def test_a_training_resumes_from_any_step_bit_for_bit(optimizer, ema, tmp_path):
    config, checkpoints = {"optimizer": optimizer, "ema": ema, "patience": 3}, InMemory()
    weights, record = course(checkpoints, config=config)
    assert [state.steps for state in checkpoints.taken] == [*range(1, 26), 25]
    for state in checkpoints.taken[::3]:
        kept = cf.Checkpoints(tmp_path / str(state.steps))
        kept.save(state)
        again, second = course(kept, config=config)
        assert all(torch.equal(again[k], weights[k]) for k in weights)
        assert [(e.train, e.validation, e.best) for e in second.epochs] == [
            (e.train, e.validation, e.best) for e in record.epochs
        ]


def test_an_interruption_between_two_steps_loses_nothing():
    weights, _ = course(None)
    checkpoints = InMemory(every=1e9)
    _, record = course(checkpoints, stop_after=13)
    assert record.stopped == "interrupted" and [state.steps for state in checkpoints.taken] == [13]
    again, second = course(InMemory(checkpoints.taken[0]))
    assert second.stopped == "finished" and all(torch.equal(again[k], weights[k]) for k in weights)


def test_a_checkpoint_of_another_training_is_refused():
    checkpoints = InMemory()
    course(checkpoints, stop_after=3)
    state = InMemory(checkpoints.taken[-1])
    with pytest.raises(ValueError, match="got other settings"):
        course(state, config={"seed": 1})
    rows = [(torch.zeros(n, 2),) * 2 for n in (400, 4)]
    with pytest.raises(ValueError, match="got other data"):
        cf.fit(Conditional(), jittered, *rows, cf.FitConfig(), checkpoints=state)
    del state.resume.tensors["shuffle"]
    with pytest.raises(
        ValueError, match="expected a complete checkpoint of this training in nowhere, got KeyError: 'shuf"
    ):
        course(state)


def test_the_last_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path):
    taken, checkpoints = InMemory(), cf.Checkpoints(tmp_path)
    assert checkpoints.load() is None
    course(taken, stop_after=4)
    for state in taken.taken:
        checkpoints.save(state)
    (tmp_path / "000000000004.safetensors.77.part").write_bytes(b"half")  # as a killed process leaves it
    checkpoints.save(taken.taken[-1])
    newest, other = sorted(tmp_path.iterdir(), reverse=True)
    assert checkpoints.load().steps == 4
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match="cannot read"):
        assert checkpoints.load().steps == 3
    other.unlink()
    newest.unlink()
    assert checkpoints.load() is None


FOREIGN = {
    "array": ROWS.double().numpy(),
    "integers": (4 * ROWS).long().numpy(),
    "list": ROWS.tolist(),
    "data frame": pd.DataFrame(ROWS.numpy(), columns=["a", "b"]),
}


@over(FOREIGN)
def test_data_of_other_libraries_are_converted(name):
    converted = torch.tensor(np.asarray(FOREIGN[name]), dtype=torch.float32)
    _, expected = fit(train=converted)
    _, record = fit(train=FOREIGN[name], validation=HELD_OUT.numpy())
    assert record.best.validation == expected.best.validation


def test_each_part_of_a_tuple_is_converted():
    flow = cf.MAF(2, context=1, layers=1, hidden=(4,), seed=0)
    data = (ROWS.numpy(), pd.Series(ROWS[:, 0].numpy()).to_frame())
    assert len(fit(flow, cf.log_likelihood, data, data)[1].epochs) == 3


@over([["a", "b"], {"a": 1}, None, "table.csv"], "data")
def test_data_that_are_not_numbers_are_refused(data):
    with pytest.raises(TypeError, match="expected the training data to be a tensor, or an array, a list or a data fra"):
        fit(train=data)


def test_data_go_to_the_device_at_once_if_they_fit():
    """Take the meta device for one with memory of its own."""
    meta = torch.device("meta")
    rows = torch.randn(10, 3)  # 120 bytes
    for free, there in ((480, "meta"), (479, "cpu")):
        assert placed(rows, meta, free).device.type == there
    together = placed((rows, rows), meta, 960)
    assert [part.device.type for part in together] == ["meta", "meta"]
    assert placed(rows, torch.device("cpu")) is rows and placed(7, meta, 0) == 7


def test_rows_are_picked_from_each_part_of_the_data():
    rows, c = torch.arange(6.0)[:, None], torch.arange(6)
    index = torch.tensor([4, 1])
    assert torch.equal(picked(rows, index), rows[[4, 1]])
    assert all(torch.equal(a, b[[4, 1]]) for a, b in zip(picked((rows, c), index), (rows, c), strict=True))
