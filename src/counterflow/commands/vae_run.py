"""One run of `counterflow vae`: train the VAEs, test them, plot and print the comparison."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from counterflow.commands import console, vae_plots
from counterflow.commands.progress import Progress
from counterflow.commands.report.write import write_report
from counterflow.commands.requirements import require_packages
from counterflow.commands.run_folder import checkpoints, mark_done, metrics, resolve_run, running
from counterflow.commands.signals import Stop
from counterflow.commands.vae import Vae
from counterflow.commands.vae_data import packages_for, to_likelihood_scale
from counterflow.io.data import Dataset, Splits, load, split
from counterflow.io.json import write_json
from counterflow.io.serialization import save
from counterflow.objectives import Evaluation, elbo, evaluate, iw_elbo, path_elbo, warm_up
from counterflow.random import seeded
from counterflow.training.checkpoints import Checkpoints
from counterflow.training.distributed import Workers
from counterflow.training.fit import fit
from counterflow.training.history import Epoch, History
from counterflow.training.tracking import Tracker
from counterflow.univariate.affine import Affine, Gated
from counterflow.univariate.base import Univariate
from counterflow.univariate.spline import RationalQuadraticSpline
from counterflow.vae.vae import VAE

MAPS: dict[str, Univariate] = {"gated": Gated(), "affine": Affine(), "spline": RationalQuadraticSpline()}
TEST_SHARE = 0.1  # of the training's time, for the test
MIN_TEST_SECONDS = 10.0  # for the test of a model, however short its training was
MIN_TEST_ROWS = 100  # a smaller test would say little
PROBE_ROWS = 8  # rows and draws from which the duration of the test is estimated
PROBE_DRAWS = 64
OBJECTIVES = {"iw_elbo": iw_elbo, "path_elbo": path_elbo}


def run(command: Vae) -> int:
    """Train, test and plot; return the exit code: 130 after Ctrl-C, 143 after SIGTERM."""
    options, resumed = resolve_run(command, "vae")
    require_packages("matplotlib", *packages_for(options.data))
    dataset = load(options.data, options.key, options.levels)
    parts = split(to_likelihood_scale(dataset, options.likelihood), seed=options.fit.seed)
    names = [options.posterior] if options.posterior else ["gaussian", "iaf"]
    models = {name: _model(options, name, dataset) for name in names}
    _check_data(options, models, parts)
    with running(options, resumed, "vae") as (folder, stop, tracker):
        rows = {part: len(values) for part, values in vars(parts).items()}
        shape = " x ".join(map(str, parts.train.shape[1:]))
        sizes = f"{rows['train']} to train, {rows['validation']} to validate, {rows['test']} to test"
        console.note(f"{options.data}: {shape}, {sizes}; run folder {folder}")
        try:
            code = _compare(
                options, models, parts, folder, {"data": options.data, "rows": rows, "results": []}, stop, tracker
            )
        except KeyboardInterrupt as error:
            kept = ", ".join(str(file) for file in sorted(folder.glob("*.safetensors"))) or "none, as no epoch finished"
            error.add_note(f"best weights so far: {kept}")
            raise
        if Workers.current().rank == 0:
            mark_done(folder)
    return code


def _check_data(options: Vae, models: Mapping[str, VAE], parts: Splits) -> None:
    """Check the data and evaluate each objective once: an error should come before there is a run folder."""
    for part in dataclasses.astuple(parts):
        next(iter(models.values())).check(part)
    if len(parts.train) < options.fit.batch_size:
        raise ValueError(
            f"expected at least one batch of {options.fit.batch_size} training rows, got {len(parts.train)}; set "
            f"--batch-size to at most {len(parts.train)}"
        )
    for model in models.values():
        model.likelihood.adapt(parts.train)
        _objective(options)(model, parts.train[:2])


def _compare(
    options: Vae,
    models: Mapping[str, VAE],
    parts: Splits,
    folder: Path,
    summary: dict[str, Any],
    stop: Stop,
    tracker: Tracker | None,
) -> int:
    """Train and test one model after the other, then write and print the results."""
    torch.manual_seed(options.fit.seed)
    test = next(iter(models.values())).likelihood.observe(parts.test).to(options.fit.device)
    histories: dict[str, History] = {}
    with metrics(folder) as write:
        saved = checkpoints(folder, options.folder, tracker, write)
        for name, model in models.items():
            file = folder / ("model.safetensors" if name == list(models)[-1] else f"model-{name}.safetensors")
            histories[name] = _train(
                options, name, model, parts, saved.for_task(name), write, stop, tracker, not histories
            )
            if histories[name].best is not None and Workers.current().rank == 0:
                save(model, file)
            if histories[name].stopped == "interrupted":
                raise KeyboardInterrupt
            if histories[name].best is None:
                console.warn(f"training of {name} ended before its first epoch: no weights are kept")
                return 1
    if Workers.current().rank:  # rank 0 tests and plots
        return 0
    with stop.at_once():
        tested = _rows_to_test(options, models, histories, test)
        summary["rows"]["tested"] = len(tested)
        for name, model in models.items():
            with Progress(f"testing {name}", "draws") as progress:
                evaluation = evaluate(model, tested, options.test_samples, on_batch=progress.update)
            summary["results"].append(_result(options, name, model, histories[name], evaluation))
        vae_plots.plot_run(folder / "plots", models, histories, test[:64], options.fit.seed)
    write_json(folder / "summary.json", summary)  # last, as it marks the run as complete
    write_report(folder)
    console.show(_table(summary))
    if len(tested) < len(test) and options.test_rows is None:
        console.say(f"to test all rows: --test-rows {len(test)}")
    console.say(f"run folder: {folder}  (plots in {folder / 'plots'})")
    return 0


def _rows_to_test(options: Vae, models: Mapping[str, VAE], histories: Mapping[str, History], test: Tensor) -> Tensor:
    """Return the rows of the test, drawn at random; by default as many as a tenth of the training's time allows."""
    rows = options.test_rows
    if rows is None:
        rows = len(test)
        for name, model in models.items():
            probe = test[:PROBE_ROWS]
            draws = min(PROBE_DRAWS, options.test_samples)
            started = time.perf_counter()
            with seeded(options.fit.seed):  # the test itself draws the same numbers with a probe and without
                evaluate(model, probe, draws)
            seconds_per_row = (time.perf_counter() - started) / len(probe) * options.test_samples / draws
            budget = max(MIN_TEST_SECONDS, TEST_SHARE * histories[name].seconds)
            rows = min(rows, max(MIN_TEST_ROWS, int(budget / seconds_per_row)))
    if rows >= len(test):
        return test
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(options.fit.seed))
    return test[order[:rows].sort().values.to(test.device)]


def _model(options: Vae, posterior: str, dataset: Dataset) -> VAE:
    torch.manual_seed(options.fit.seed)
    return VAE(
        dataset.values.shape[1:],
        options.latent,
        posterior,
        options.likelihood,
        levels=dataset.levels or 256,
        network=options.network,
        hidden=options.hidden,
        channels=options.channels,
        context=options.context,
        posterior_layers=options.iaf_layers,
        posterior_hidden=options.iaf_hidden,
        univariate=MAPS[options.iaf_map],
        activation=options.iaf_activation,
    )


def _objective(options: Vae) -> Callable[..., Tensor]:
    """Return the training objective: (model, x, beta) -> terms (B,)."""

    def objective(model: VAE, x: Tensor, beta: float = 1.0) -> Tensor:
        x = model.likelihood.observe(x)
        if options.objective != "elbo":
            return OBJECTIVES[options.objective](model, x, options.samples)
        return elbo(model, x, options.samples, beta=beta, free_bits=options.free_bits, groups=options.groups)

    return objective


def _train(
    options: Vae,
    name: str,
    model: VAE,
    parts: Splits,
    saved: Checkpoints,
    write: Callable[[dict[str, Any]], None],
    stop: Stop,
    tracker: Tracker | None,
    is_first: bool,
) -> History:
    def validate(model: VAE, x: Tensor) -> Tensor:
        return elbo(model, model.likelihood.observe(x))

    unit = "images" if parts.train.dim() == 4 else "rows"
    facts = ""
    first_done = None

    with Progress(name, "steps") as progress:

        def on_step(task: str, done: int, total: int) -> None:
            nonlocal first_done
            if first_done is None:
                first_done = done - 1
                progress.start_at(first_done)
            progress.update(done, total, task, facts)

        def on_epoch(task: str, epoch: Epoch) -> None:
            write({"task": task, **dataclasses.asdict(epoch)})
            nonlocal facts
            number = f"epoch {epoch.epoch} of {options.fit.epochs}"
            facts = f"{number}, ELBO {epoch.validation:.2f}, {epoch.rows_per_second:,.0f} {unit}/s"
            if is_first and epoch.epoch == 1:
                trainings, which = (1, "") if options.posterior else (2, " of each posterior")
                progress.announce(f"{options.fit.epochs} epochs{which}", trainings)

        return fit(
            model,
            _objective(options),
            parts.train,
            parts.validation,
            options.fit,
            validate=validate,
            anneal=lambda epoch: {"beta": warm_up(epoch, options.warm_up * options.fit.epochs)},
            on_step=stop.after_step(on_step),
            on_epoch=on_epoch,
            checkpoints=saved,
            tracker=tracker,
            task=name,
        )


def _result(options: Vae, name: str, model: VAE, history: History, evaluation: Evaluation) -> dict[str, Any]:
    result: dict[str, Any] = {
        "posterior": name,
        "test_elbo": evaluation.elbo.mean().item(),
        "test_elbo_error": _standard_error(evaluation.elbo),
        "test_log_likelihood": evaluation.log_likelihood.mean().item(),
        "test_log_likelihood_error": _standard_error(evaluation.log_likelihood),
        "samples": options.test_samples,
        "kl": evaluation.kl.mean().item(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(history.seconds, 2),
        "epochs": len(history.epochs),
        "stopped": history.stopped,
    }
    if options.likelihood == "discretized_logistic":
        result["bits_per_dim"] = -result["test_log_likelihood"] / (math.prod(model.data_shape) * math.log(2))
    return result


def _standard_error(values: Tensor) -> float | None:
    """Return the standard error of a mean over test rows."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.2f}" + ("" if error is None else f" ± {error:.2f}")


def _table(summary: dict[str, Any]) -> Table:
    results = summary["results"]
    tested, rows = summary["rows"]["tested"], summary["rows"]["test"]
    some = "" if tested == rows else f"{tested:,} rows of the "
    table = Table(title=f"{some}test part, nats per row, ± standard error")
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("posterior", lambda result: result["posterior"]),
        ("test ELBO", lambda result: _with_error(result["test_elbo"], result["test_elbo_error"])),
        (
            f"log-likelihood ({results[0]['samples']} samples)",
            lambda result: _with_error(result["test_log_likelihood"], result["test_log_likelihood_error"]),
        ),
        ("KL", lambda result: f"{result['kl']:.2f}"),
        ("parameters", lambda result: f"{result['parameters']:,}"),
        ("seconds", lambda result: f"{result['seconds']:.0f}"),
    ]
    if "bits_per_dim" in results[0]:
        columns.insert(3, ("bits per dim", lambda result: f"{result['bits_per_dim']:.3f}"))
    for name, _ in columns:
        table.add_column(name, justify="left" if name == "posterior" else "right")
    for result in results:
        table.add_row(*(show(result) for _, show in columns))
    return table
