"""Does an IAF posterior pay? The same VAE on MNIST with a Gaussian and an IAF posterior, several seeds.

    python benchmarks/vae_mnist.py --data PATH/TO/mnist

Dynamic binarisation, the standard test split, 5,000 of the 60,000 training images for validation. Both posteriors have
the same encoder, decoder, optimiser and number of epochs. A run is one process' work; finished runs are kept in
results/vae_mnist.json and not done again, so that the command can be given again after an interruption.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

import counterflow as cf
from counterflow.io.data import load, split

HERE = Path(__file__).parent / "results"


def run(posterior: str, seed: int, data: Path, args: argparse.Namespace) -> dict:
    """Train and test one model."""
    dataset = load(data)
    parts = split(dataset, seed=0, validation=5000 / 60000)
    train, validation, test = (part.float() / 255 for part in (parts.train, parts.validation, parts.test))
    torch.manual_seed(seed)
    vae = cf.VAE(
        (1, 28, 28),
        args.latent,
        posterior,
        network="mlp",
        hidden=args.hidden,
        context=args.context,
        posterior_layers=args.layers,
        posterior_hidden=args.posterior_hidden,
    )
    config = cf.FitConfig(
        epochs=args.epochs,
        batch_size=args.batch_size,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        seed=seed,
    )

    def objective(model: cf.VAE, x: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
        return cf.objectives.elbo(model, model.likelihood.observe(x), beta=beta)

    def report(task: str, epoch: cf.training.Epoch) -> None:
        print(
            f"{posterior} seed {seed} epoch {epoch.epoch} elbo {epoch.validation:.2f} {epoch.seconds:.0f} s", flush=True
        )

    record = cf.fit(
        vae,
        objective,
        train,
        validation,
        config,
        anneal=lambda epoch: {"beta": cf.objectives.warm_up(epoch, args.warm_up)},
        on_epoch=report,
    )
    torch.manual_seed(0)  # every model is tested on the same binary images
    begun = time.perf_counter()
    result = cf.objectives.evaluate(vae, vae.likelihood.observe(test), args.samples)
    return {
        "posterior": posterior,
        "seed": seed,
        "test_elbo": result.elbo.mean().item(),
        "test_log_likelihood": result.log_likelihood.mean().item(),
        "kl": result.kl.mean().item(),
        "parameters": sum(p.numel() for p in vae.parameters()),
        "seconds": record.seconds,
        "test_seconds": time.perf_counter() - begun,
        "curve": [round(e.validation, 3) for e in record.epochs],
    }


def table(results: list[dict], settings: dict) -> str:
    """The report, in Markdown."""
    lines = [
        "# VAE on MNIST: Gaussian against IAF posterior",
        "",
        "Made by `python benchmarks/vae_mnist.py " + settings["arguments"] + "` on " + settings["machine"] + ".",
        f"Test figures in nats per image; log-likelihood by importance sampling with {settings['samples']} samples.",
        "",
        "| posterior | seed | test ELBO | test log-likelihood | KL | parameters | minutes of training |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(results, key=lambda r: (r["posterior"], r["seed"])):
        lines.append(
            f"| {r['posterior']} | {r['seed']} | {r['test_elbo']:.2f} | {r['test_log_likelihood']:.2f} | {r['kl']:.2f} "
            f"| {r['parameters']:,} | {r['seconds'] / 60:.1f} |"
        )
    by = {p: [r for r in results if r["posterior"] == p] for p in ("gaussian", "iaf")}
    if all(by.values()):
        lines.append("")
        for key, name in (("test_elbo", "ELBO"), ("test_log_likelihood", "log-likelihood")):
            means = {p: statistics.mean(r[key] for r in rows) for p, rows in by.items()}
            seeds = sorted({r["seed"] for r in by["iaf"]} & {r["seed"] for r in by["gaussian"]})
            gaps = [
                next(r[key] for r in by["iaf"] if r["seed"] == s)
                - next(r[key] for r in by["gaussian"] if r["seed"] == s)
                for s in seeds
            ]
            lines.append(
                f"Mean test {name}: Gaussian {means['gaussian']:.2f}, IAF {means['iaf']:.2f}; IAF is better by "
                f"{statistics.mean(gaps):.2f} (by seed: {', '.join(f'{g:.2f}' for g in gaps)})."
            )
            lines.append("")
        lines += ["Validation ELBO by epoch, mean over seeds:", "", "| epoch | Gaussian | IAF |", "|---|---|---|"]
        length = min(len(r["curve"]) for r in results)
        for epoch in sorted({1, 2, 5, *range(10, length + 1, 10), length} & set(range(1, length + 1))):
            means = [statistics.mean(r["curve"][epoch - 1] for r in by[p]) for p in ("gaussian", "iaf")]
            lines.append(f"| {epoch} | {means[0]:.2f} | {means[1]:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's IDX files")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--posteriors", nargs="+", default=["gaussian", "iaf"])
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 512])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--posterior-hidden", type=int, nargs="+", default=[320, 320])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--optimizer", default="adamax")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--warm-up", type=float, default=5.0, help="epochs until the KL has its full weight")
    parser.add_argument("--samples", type=int, default=500, help="of the importance sampling")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "vae_mnist.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shown = {k: v for k, v in vars(args).items() if k not in ("data", "out", "threads", "seeds", "posteriors")}
    settings = {
        **shown,
        "arguments": "--data PATH "
        + " ".join(
            f"--{k.replace('_', '-')} {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in shown.items()
        ),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}, Python {platform.python_version()}",
    }
    state = json.loads(args.out.read_text()) if args.out.exists() else {"settings": settings, "results": []}
    if {k: state["settings"][k] for k in shown} != {k: settings[k] for k in shown}:
        raise SystemExit(f"{args.out} holds runs with other settings; give another --out or remove it")
    for seed in args.seeds:
        for posterior in args.posteriors:
            if any((r["posterior"], r["seed"]) == (posterior, seed) for r in state["results"]):
                continue
            state["results"].append(run(posterior, seed, args.data, args))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(state, indent=1))
            args.out.with_suffix(".md").write_text(table(state["results"], settings))


if __name__ == "__main__":
    main()
