"""Experiment trackers: what the trainings log, and what a tracker that fails costs."""

import re

import pytest
import torch
from registry import over

import counterflow as cf
from counterflow.density.config import DensityConfig
from counterflow.distill.distill import distill_with_history
from counterflow.training.fit import fit
from counterflow.training.tracking import LOGGED

ROWS = torch.randn(80, 2, generator=torch.Generator().manual_seed(0))


class Recorder:
    """Tracker that keeps what it is given."""

    def __init__(self):
        self.metrics, self.params, self.flushed = [], {}, 0

    def log_metric(self, name, value, step=None):
        self.metrics.append((name, value, step))

    def log_metrics(self, metrics, step=None):
        self.metrics += [(name, value, step) for name, value in metrics.items()]

    def log_params(self, params):
        self.params |= params

    def add_figure(self, name, figure, step=None):
        raise AssertionError

    def flush(self):
        self.flushed += 1


def flow():
    return cf.MAF(features=2, layers=1, hidden=(8,), seed=0)


def fit_rows(**callbacks):
    config = cf.FitConfig(epochs=3, batch_size=32)
    history = fit(flow(), cf.log_likelihood, ROWS[:64], ROWS[64:], config, **callbacks)
    return {"training": history}, config


def fit_table(**callbacks):
    density = cf.FlowDensity(layers=1, hidden=(8,), epochs=2, members=1, kernels=False, random_state=0)
    density.fit(ROWS.numpy(), **callbacks)
    tasks = ("member 1", "member 1 without correlations")
    return dict(zip(tasks, density.histories_, strict=True)), DensityConfig()


def fit_student(**callbacks):
    config = cf.DistillConfig(layer_steps=20, flow_steps=10)
    made = distill_with_history(flow(), config=config, **callbacks)
    return made.histories, config


TRAININGS = {"fit": fit_rows, "FlowDensity": fit_table, "distill": fit_student}


@over(TRAININGS)
def test_a_tracker_is_given_settings_and_epochs(name):
    recorder, epochs = Recorder(), []
    histories, config = TRAININGS[name](tracker=recorder, on_epoch=lambda task, epoch: epochs.append(task))
    expected = [
        (f"{task}/{field}", getattr(epoch, field), epoch.epoch)
        for task, history in histories.items()
        for epoch in history.epochs
        for field in LOGGED
    ]
    assert recorder.metrics == expected and recorder.flushed == len(epochs) == len(expected) // len(LOGGED)
    assert recorder.params["learning_rate"] == config.learning_rate


def test_a_tracker_is_given_the_stages_of_a_posterior():
    recorder, stages = Recorder(), []
    config = cf.PosteriorConfig(layers=1, hidden=(8,), stages=1, starts=2, verdict_samples=1000)
    posterior = cf.fit_posterior(
        lambda x: -x.square().sum(-1) / 2, config, dim=2, tracker=recorder, on_stage=stages.append
    )
    logged = {metric: (value, step) for metric, value, step in recorder.metrics if metric.startswith("stages/")}
    assert logged["stages/elbo"] == (posterior.stages[0].elbo, 1) and logged["stages/k_hat"][0] == stages[0].k_hat
    last = [(value, step) for metric, value, step in recorder.metrics if metric == "stage 1/validation"][-1]
    assert last == (posterior.stages[0].elbos[-1], len(posterior.stages[0].elbos))
    assert recorder.params["verdict_samples"] == 1000


def test_a_tracker_that_fails_ends_the_tracking_not_the_training():
    class Failing(Recorder):
        def log_metrics(self, metrics, step=None):
            super().log_metrics(metrics, step)
            if step == 2:
                raise ConnectionError("no route to host")

    failing = Failing()
    expected = "Failing failed (ConnectionError: no route to host); the training goes on without it"
    with pytest.warns(RuntimeWarning, match=re.escape(expected)):
        histories, _ = fit_rows(tracker=failing)
    assert [step for metric, _, step in failing.metrics if metric == "training/train"] == [1, 2]
    assert len(histories["training"].epochs) == 3
