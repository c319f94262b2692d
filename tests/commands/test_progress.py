"""Progress in a log, and signals: what is said, and when a run ends."""

import os
import signal
import time

import pytest

from counterflow.commands import console, progress
from counterflow.commands.progress import Progress
from counterflow.commands.signals import stopping


@pytest.fixture
def log(monkeypatch, capsys):
    """Print the first line after 50 ms; return the lines printed so far."""
    monkeypatch.setattr(progress, "FIRST_LINE", 0.05)
    monkeypatch.setattr(progress, "MIN_ANNOUNCED", 0.0)
    return lambda: capsys.readouterr().err.splitlines()


def lines_of(log, expected):
    """Wait for the first lines."""
    found = []
    deadline = time.monotonic() + 20
    while len(found) < expected and time.monotonic() < deadline:
        time.sleep(0.01)
        found += log()
    return found


def test_a_log_gets_lines_with_the_time_left(log):
    with Progress("scoring", "rows") as progress:
        progress.update(1_000, 4_000, facts="ELBO -1.00")
        first = lines_of(log, 1)
    assert first[0] == "scoring: 1,000 of 4,000 rows, ELBO -1.00, under 1 s left"


def test_work_that_cannot_be_counted_says_the_seconds_so_far(log):
    with Progress("exporting"):
        assert lines_of(log, 1)[0] == "exporting: under 1 s so far"


def test_a_resumed_run_is_timed_from_where_it_went_on(log, monkeypatch):
    progress = Progress("training", "steps")
    progress.start_at(90)
    later = time.monotonic() + 10
    monkeypatch.setattr("time.monotonic", lambda: later)
    progress.update(95, 100)
    assert progress.seconds_left == pytest.approx(10, rel=0.1)
    progress.announce("10 steps", times=2)
    assert log() == ["estimated time: 40 s for 10 steps"]


def test_quiet_work_says_nothing(log):
    console.set_quiet(True)
    try:
        with Progress("scoring", "rows") as progress:
            progress.update(1, 2)
            time.sleep(0.1)
    finally:
        console.set_quiet(False)
    assert log() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_a_step_of_a_training_only(number, log):
    with stopping() as stop:
        with pytest.raises(KeyboardInterrupt):  # before the first step
            os.kill(os.getpid(), number)
            time.sleep(5)
        done = []
        step = stop.after_step(done.append)
        step(1)
        os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            step(2)
        assert done == [1, 2] and stop.code == 128 + number
        with stop.at_once(handled=True), pytest.raises(KeyboardInterrupt):  # the test after the training
            os.kill(os.getpid(), number)
            time.sleep(5)
    assert log() == ["stopping after this step; interrupt again to stop at once, without a checkpoint"]
