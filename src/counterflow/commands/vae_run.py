"""One run of `counterflow vae`: train the VAEs, test them, plot and print the comparison."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from counterflow.commands import console, vae_plots
from counterflow.commands.requirements import require_packages
from counterflow.commands.run_folder import checkpoints, mark_done, metrics, resolve_run, running
from counterflow.commands.signals import Stop
from counterflow.commands.vae import Vae
from counterflow.commands.vae_data import packages_for, to_likelihood_scale
from counterflow.io.data import Dataset, Splits, load, split
from counterflow.io.json import write_json
from counterflow.io.serialization import save
from counterflow.objectives import Evaluation, elbo, evaluate, iw_elbo, path_elbo, warm_up
from counterflow.training.checkpoints import Checkpoints
from counterflow.training.distributed import Workers
from counterflow.training.fit import fit
from counterflow.training.history import Epoch, History
from counterflow.univariate.affine import Affine, Gated
from counterflow.univariate.base import Univariate
from counterflow.univariate.spline import RationalQuadraticSpline
from counterflow.vae.vae import VAE

MAPS: dict[str, Univariate] = {"gated": Gated(), "affine": Affine(), "spline": RationalQuadraticSpline()}
OBJECTIVES = {"iw_elbo": iw_elbo, "path_elbo": path_elbo}


def run(command: Vae) -> int:
    """Train, test and plot; return the exit code: 130 after Ctrl-C, 143 after SIGTERM."""
    options, resumed = resolve_run(command, "vae")
    require_packages("matplotlib", *packages_for(options.data))
    _check(options)
    dataset = load(options.data, options.key, options.levels)
    parts = split(to_likelihood_scale(dataset, options.likelihood), seed=options.fit.seed)
    names = [options.posterior] if options.posterior else ["gaussian", "iaf"]
    models = {name: _model(options, name, dataset) for name in names}
    _check_data(options, models, parts)
    with running(options, resumed, "vae") as (folder, stop):
        rows = {part: len(values) for part, values in vars(parts).items()}
        shape = " x ".join(map(str, parts.train.shape[1:]))
        sizes = f"{rows['train']} to train, {rows['validation']} to validate, {rows['test']} to test"
        console.note(f"{options.data}: {shape}, {sizes}; run folder {folder}")
        try:
            code = _compare(options, models, parts, folder, {"data": options.data, "rows": rows, "results": []}, stop)
        except KeyboardInterrupt as error:
            kept = ", ".join(str(file) for file in sorted(folder.glob("*.safetensors"))) or "none, as no epoch finished"
            error.add_note(f"best weights so far: {kept}")
            raise
        if Workers.current().rank == 0:
            mark_done(folder)
    return code


def _check(options: Vae) -> None:
    if options.test_samples < 1:
        raise ValueError(f"expected --test-samples to be at least 1, got {options.test_samples}")
    if not options.warm_up >= 0:
        raise ValueError(f"expected --warm-up to be at least 0, got {options.warm_up}")
    if options.free_bits and options.objective != "elbo":
        raise ValueError(
            f"expected --objective elbo with --free-bits, got {options.objective}; leave one of the two out"
        )


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
    options: Vae, models: Mapping[str, VAE], parts: Splits, folder: Path, summary: dict[str, Any], stop: Stop
) -> int:
    """Train and test one model after the other, then write and print the results."""
    torch.manual_seed(options.fit.seed)
    test = next(iter(models.values())).likelihood.observe(parts.test).to(options.fit.device)
    histories: dict[str, History] = {}
    with metrics(folder) as write:
        saved = checkpoints(folder, options.folder, write)
        for name, model in models.items():
            file = folder / ("model.safetensors" if name == list(models)[-1] else f"model-{name}.safetensors")
            histories[name] = _train(options, name, model, parts, saved.for_task(name), write, stop)
            if histories[name].best is not None and Workers.current().rank == 0:
                save(model, file)
            if histories[name].stopped == "interrupted":
                raise KeyboardInterrupt
            if histories[name].best is None:
                console.note(f"training of {name} ended before its first epoch: no weights are kept")
                return 1
    if Workers.current().rank:  # rank 0 tests and plots
        return 0
    for name, model in models.items():
        with console.err.status(f"testing {name} with {options.test_samples} samples per row"):
            evaluation = evaluate(model, test, options.test_samples)
        summary["results"].append(_result(options, name, model, histories[name], evaluation))
    vae_plots.plot_run(folder / "plots", models, histories, test[:64], options.fit.seed)
    write_json(folder / "summary.json", summary)  # last, as it marks the run as complete
    console.out.print(_table(summary["results"]))
    console.say(f"run folder: {folder}  (plots in {folder / 'plots'})")
    return 0


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
) -> History:
    def validate(model: VAE, x: Tensor) -> Tensor:
        return elbo(model, model.likelihood.observe(x))

    with console.progress("images" if parts.train.dim() == 4 else "rows") as bar:
        line = bar.add_task(name, total=None, epoch="1", elbo="...", rate="...")

        def on_step(task: str, done: int, total: int) -> None:
            bar.update(line, completed=done, total=total)

        def on_epoch(task: str, epoch: Epoch) -> None:
            write({"task": task, **dataclasses.asdict(epoch)})
            number = f"{epoch.epoch}/{options.fit.epochs}"
            bar.update(line, epoch=number, elbo=f"{epoch.validation:.2f}", rate=f"{epoch.rows_per_second:,.0f}")

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
            task=name,
        )


def _result(options: Vae, name: str, model: VAE, history: History, evaluation: Evaluation) -> dict[str, Any]:
    result: dict[str, Any] = {
        "posterior": name,
        "test_elbo": evaluation.elbo.mean().item(),
        "test_log_likelihood": evaluation.log_likelihood.mean().item(),
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


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="test part, nats per row")
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("posterior", lambda result: result["posterior"]),
        ("test ELBO", lambda result: f"{result['test_elbo']:.2f}"),
        (f"log-likelihood ({results[0]['samples']} samples)", lambda result: f"{result['test_log_likelihood']:.2f}"),
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
