"""counterflow vae: train VAEs that differ in their posterior, test them, and draw what came out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.table import Table
from torch import Tensor

from counterflow import plots
from counterflow.commands import console, training
from counterflow.commands.model import observed, picture
from counterflow.diagnostics.importance import effective_sample_size, resample
from counterflow.io.data import Dataset, Splits, load, split
from counterflow.io.json import write_json
from counterflow.io.serialization import save
from counterflow.objectives import Evaluation, elbo, evaluate, iw_elbo, path_elbo, warm_up
from counterflow.training.checkpoints import Checkpoints
from counterflow.training.config import FitConfig
from counterflow.training.distributed import Workers
from counterflow.training.fit import fit
from counterflow.training.history import Epoch, History
from counterflow.univariate.affine import Affine, Gated
from counterflow.univariate.base import Univariate
from counterflow.univariate.spline import RationalQuadraticSpline
from counterflow.vae.vae import VAE

MAPS: dict[str, Univariate] = {"gated": Gated(), "affine": Affine(), "spline": RationalQuadraticSpline()}
OBJECTIVES = {"iw_elbo": iw_elbo, "path_elbo": path_elbo}


@dataclass(frozen=True)
class Vae:
    """Train a VAE with a Gaussian and one with an IAF posterior on the same data, and compare them.

    The data are cut into training, validation and test parts by the seed; the test part is used once, at the end. Each
    posterior writes its weights to the run folder, with metrics.jsonl, summary.json and plots/. Ctrl-C keeps the best
    weights so far.
    """

    data: str = "digits"
    """digits (8x8, from scikit-learn), a folder of MNIST-style IDX files or of images, .npy, .npz, .csv or .parquet"""
    key: str | None = None
    """which array of an .npz"""
    levels: int | None = None
    """checkpoints that an array holds whole numbers 0..levels-1 (256 for 8-bit images)"""
    posterior: Literal["gaussian", "iaf"] | None = None
    """of q(z|x); both, one after the other, when not given"""
    likelihood: Literal["bernoulli", "gaussian", "discretized_logistic"] = "bernoulli"
    """bernoulli: binarised anew at each step; gaussian: real numbers; discretized_logistic: 8-bit values"""
    latent: int = 8
    """size of z"""
    network: Literal["auto", "conv", "mlp"] = "auto"
    """auto takes gated convolutions for images from 16x16 up, else a gated MLP"""
    hidden: tuple[int, ...] = (256, 256)
    """layers of the MLP"""
    channels: int = 16
    """of the first convolution; van den Berg et al. 2018 take 32 for 28x28"""
    context: int = 128
    """size of the encoder's output h"""
    iaf_layers: int = 4
    """IAF steps"""
    iaf_hidden: tuple[int, ...] = (128, 128)
    """layers of each IAF step's network"""
    iaf_map: Literal["gated", "affine", "spline"] = "gated"
    """of one feature in each IAF step"""
    iaf_activation: str = "elu"
    """of the IAF's hidden units: elu, leaky_relu, relu, sigmoid, silu, softplus or tanh"""
    objective: Literal["elbo", "iw_elbo", "path_elbo"] = "elbo"
    """elbo; iw_elbo: importance-weighted over --samples; path_elbo: the ELBO with the path-derivative gradient"""
    free_bits: float = 0.0
    """nats that each group of latent features may cost for free; with --objective elbo"""
    groups: int | None = None
    """of latent features, for --free-bits; each feature its own when not given"""
    warm_up: float = 0.4
    """part of the training after which the KL has its full weight, growing from 0; with --objective elbo"""
    samples: int = 1
    """draws of z for each datum in training"""
    test_samples: int = 500
    """draws of z for each test datum in the importance sampling of its log-likelihood"""
    folder: training.Place = training.RunFolder()
    """where the run is written"""
    fit: Annotated[FitConfig, tyro.conf.arg(name="")] = FitConfig(  # frozen
        epochs=150, batch_size=64, learning_rate=5e-3, ema=0.995
    )
    """how to train"""

    def run(self) -> int:
        """Train, test, draw; 130 after Ctrl-C, 143 after SIGTERM."""
        command, run = training.opened(self, "vae")
        return command._run(run)

    def _run(self, run: Path | None) -> int:
        """A new run, or one to go on with."""
        if self.test_samples < 1:
            raise ValueError(f"expected test-samples of at least 1, got {self.test_samples}")
        if not self.warm_up >= 0:
            raise ValueError(f"expected warm-up of at least 0, got {self.warm_up}")
        if self.free_bits and self.objective != "elbo":
            raise ValueError(f"expected --objective elbo with free bits, got {self.objective}; leave one of them out")
        dataset = load(self.data, self.key, self.levels)
        values = observed(dataset, self.likelihood)
        parts = split(values, seed=self.fit.seed)
        wanted: list[str] = [self.posterior] if self.posterior else ["gaussian", "iaf"]
        models = {name: self._model(name, dataset) for name in wanted}
        for part in dataclasses.astuple(parts):
            next(iter(models.values())).check(part)
        if len(parts.train) < self.fit.batch_size:
            raise ValueError(
                f"expected at least a batch of {self.fit.batch_size} training rows, got {len(parts.train)} of "
                f"{len(values.values)}; set --batch-size to at most {len(parts.train)}"
            )
        for model in models.values():  # a rehearsal: what is refused is refused before there is a run folder
            model.likelihood.adapt(parts.train)
            self._objective(model, parts.train[:2])
        run = training.begun(self, run, "vae")
        rows = {part: len(values) for part, values in vars(parts).items()}
        shape = " x ".join(map(str, parts.train.shape[1:]))
        sizes = f"{rows['train']} to train, {rows['validation']} to validate, {rows['test']} to test"
        console.note(f"{self.data}: {shape}, {sizes}; run folder {run}")
        with training.under_way(run) as stop:
            try:
                code = self._compare(models, parts, run, {"data": self.data, "rows": rows, "results": []}, stop)
            except KeyboardInterrupt as error:
                kept = ", ".join(str(file) for file in sorted(run.glob("*.safetensors"))) or "none: no epoch was over"
                error.add_note(f"the best weights so far: {kept}")
                raise
        if Workers.current().rank == 0:
            training.finish(run)
        return code

    def _compare(
        self, models: Mapping[str, VAE], parts: Splits, run: Path, summary: dict[str, Any], stop: training.Stop
    ) -> int:
        """Train and test one model after the other, then the table and the pictures."""
        torch.manual_seed(self.fit.seed)
        test = next(iter(models.values())).likelihood.observe(parts.test).to(self.fit.device)
        records: dict[str, History] = {}
        with training.metrics(run) as write:
            checkpoints = training.checkpoints(run, self.folder, write)
            for name, model in models.items():
                file = run / ("model.safetensors" if name == list(models)[-1] else f"model-{name}.safetensors")
                records[name] = self._train(name, model, parts, checkpoints.for_task(name), write, stop)
                if records[name].best is not None and Workers.current().rank == 0:
                    save(model, file)
                if records[name].stopped == "interrupted":
                    raise KeyboardInterrupt
                if records[name].best is None:
                    console.note(f"training of {name} ended before its first epoch was over: no weights are kept")
                    return 1
        if Workers.current().rank:  # the first process alone tests and draws
            return 0
        for name, model in models.items():
            with console.err.status(f"testing {name} with {self.test_samples} samples a datum"):
                reached = evaluate(model, test, self.test_samples)
            summary["results"].append(self._result(name, model, records[name], reached))
        self._draw(run / "plots", models, records, test[:64])
        write_json(run / "summary.json", summary)  # the last of all: a folder that has one is whole
        console.out.print(_table(summary["results"]))
        console.say(f"run folder: {run}  (pictures in {run / 'plots'})")
        return 0

    def _model(self, posterior: str, dataset: Dataset) -> VAE:
        torch.manual_seed(self.fit.seed)
        return VAE(
            dataset.values.shape[1:],
            self.latent,
            posterior,
            self.likelihood,
            levels=dataset.levels or 256,
            network=self.network,
            hidden=self.hidden,
            channels=self.channels,
            context=self.context,
            posterior_layers=self.iaf_layers,
            posterior_hidden=self.iaf_hidden,
            univariate=MAPS[self.iaf_map],
            activation=self.iaf_activation,
        )

    def _objective(self, model: VAE, x: Tensor, beta: float = 1.0) -> Tensor:
        x = model.likelihood.observe(x)
        if self.objective != "elbo":
            return OBJECTIVES[self.objective](model, x, self.samples)
        return elbo(model, x, self.samples, beta=beta, free_bits=self.free_bits, groups=self.groups)

    def _train(
        self,
        name: str,
        model: VAE,
        parts: Splits,
        checkpoints: Checkpoints,
        write: Callable[[dict[str, Any]], None],
        stop: training.Stop,
    ) -> History:
        unit = "images" if parts.train.dim() == 4 else "rows"

        def validate(model: VAE, x: Tensor) -> Tensor:
            return elbo(model, model.likelihood.observe(x))

        with console.progress(unit) as bar:
            line = bar.add_task(name, total=None, epoch="1", elbo="...", rate="...")

            def on_step(task: str, done: int, total: int) -> None:
                bar.update(line, completed=done, total=total)

            def on_epoch(task: str, epoch: Epoch) -> None:
                write({"task": task, **dataclasses.asdict(epoch)})
                shown, rate = f"{epoch.epoch}/{self.fit.epochs}", f"{epoch.rows_per_second:,.0f}"
                bar.update(line, epoch=shown, elbo=f"{epoch.validation:.2f}", rate=rate)

            return fit(
                model,
                self._objective,
                parts.train,
                parts.validation,
                self.fit,
                validate=validate,
                anneal=lambda epoch: {"beta": warm_up(epoch, self.warm_up * self.fit.epochs)},
                on_step=stop.after_step(on_step),
                on_epoch=on_epoch,
                checkpoints=checkpoints,
                task=name,
            )

    def _result(self, name: str, model: VAE, record: History, reached: Evaluation) -> dict[str, Any]:
        result: dict[str, Any] = {
            "posterior": name,
            "test_elbo": reached.elbo.mean().item(),
            "test_log_likelihood": reached.log_likelihood.mean().item(),
            "samples": self.test_samples,
            "kl": reached.kl.mean().item(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": round(record.seconds, 2),
            "epochs": len(record.epochs),
            "stopped": record.stopped,
        }
        if self.likelihood == "discretized_logistic":
            result["bits_per_dim"] = -result["test_log_likelihood"] / (math.prod(model.data_shape) * math.log(2))
        return result

    def _draw(self, folder: Path, models: Mapping[str, VAE], records: Mapping[str, History], test: Tensor) -> None:
        curves = {n: ([e.train for e in r.epochs], [e.validation for e in r.epochs]) for n, r in records.items()}
        plots.learning_curves(folder / "learning_curves.png", curves)
        torch.manual_seed(self.fit.seed)
        first = next(iter(models.values()))
        if len(first.data_shape) == 3:
            shown = {"data": picture(first, test[:12], test)}
            shown |= {name: picture(model, model.reconstruct(test[:12]), test) for name, model in models.items()}
            plots.image_rows(
                folder / "reconstructions.png", shown, "held-out data, and the mean of p(x'|z), z ~ q(z|x)"
            )
            grids = {name: picture(model, model.sample(64, mean=True), test) for name, model in models.items()}
            plots.image_grids(folder / "samples.png", grids, "samples: the mean of p(x|z), z from the prior")
        else:
            tables = {"data": test.cpu().numpy()}
            tables |= {name: model.reconstruct(test).cpu().numpy() for name, model in models.items()}
            plots.pairs(folder / "reconstructions.png", tables, "held-out rows, and the mean of p(x'|z), z ~ q(z|x)")
            tables |= {name: model.sample(512).cpu().numpy() for name, model in models.items()}
            plots.pairs(folder / "samples.png", tables, "held-out rows, and samples of the model")
        chosen = test[:: max(1, len(test) // 2)][:2]
        panels = [[posterior_panel(name, model, x) for name, model in models.items()] for x in chosen]
        data = picture(first, chosen, test) if len(first.data_shape) == 3 else chosen.cpu().numpy()
        plots.latent_posteriors(folder / "posterior.png", list(data), panels)


@torch.no_grad()
def posterior_panel(name: str, model: VAE, x: Tensor, draws: int = 20_000, shown: int = 2_000) -> plots.LatentPanel:
    """q(z|x) of one datum beside its importance-resampled truth, over the two coordinates most dependent in truth."""
    x = x[None]
    q = model.encode(x)
    z, log_q = (part[:, 0] for part in q.rsample_and_log_prob((draws,)))
    log_p = torch.cat([model.decode(part).log_prob(x) for part in z.split(4096)])
    log_weights = log_p + model.prior().log_prob(z).sum(-1) - log_q
    truth = resample(z, log_weights, shown)
    active = truth.std(0) < 0.7  # of the prior's deviation 1: the others say nothing of x
    correlation = torch.corrcoef(truth.T).reshape(len(active), -1).nan_to_num().abs().triu(1) * (
        0.1 + (active[:, None] & active[None, :])
    )
    i, j = divmod(int(correlation.argmax()), len(correlation))
    ess = effective_sample_size(log_weights).item()
    pick = torch.tensor([i, j])
    return plots.LatentPanel(
        name, z[:shown, pick].cpu().numpy(), truth[:, pick].cpu().numpy(), (i, j), f"ESS {ess:,.0f} of {draws:,}"
    )


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="test part, nats a datum")
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("posterior", lambda r: r["posterior"]),
        ("test ELBO", lambda r: f"{r['test_elbo']:.2f}"),
        (f"log-likelihood ({results[0]['samples']} samples)", lambda r: f"{r['test_log_likelihood']:.2f}"),
        ("KL", lambda r: f"{r['kl']:.2f}"),
        ("parameters", lambda r: f"{r['parameters']:,}"),
        ("seconds", lambda r: f"{r['seconds']:.0f}"),
    ]
    if "bits_per_dim" in results[0]:
        columns.insert(3, ("bits per dim", lambda r: f"{r['bits_per_dim']:.3f}"))
    for name, _ in columns:
        table.add_column(name, justify="left" if name == "posterior" else "right")
    for result in results:
        table.add_row(*(show(result) for _, show in columns))
    return table
