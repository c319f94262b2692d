"""Distance of a distilled student from its teacher: a MAF of image patches, and an IAF that learns from it.

    python benchmarks/distill.py --data /path/to/bsds300_patches8x8_uint8.npz --work /tmp/distill

The teacher is a MAF of five layers (two hidden layers of 512 each) on patches of 8 x 8 grey values: dequantised, the
patch's mean subtracted, the last pixel dropped, 63 numbers. It trains for --teacher-seconds and is kept in --work,
where the next run finds it. The student learns twice: from the start that `cf.distill` makes, and, for comparison, by
the KL alone, from an IAF of the same size at the identity, for as many seconds. Written to results/distill.md, .json.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import counterflow as cf

HERE = Path(__file__).parent / "results"
MARK = 0.02  # nats per dimension of KL(student || teacher)
BATCH = 256
PILOT = 20  # steps that say how long one takes


def patches(path: Path, part: str, side: int) -> Tensor:
    """Rows of side^2 - 1 numbers by the usual recipe, of the middle side x side pixels of each patch."""
    with np.load(path) as file:
        raw = torch.from_numpy(file[part]).unflatten(1, (8, 8))
    first = (8 - side) // 2
    x = raw[:, first : first + side, first : first + side].flatten(1).float()
    x = (x + torch.rand(x.shape, generator=torch.Generator().manual_seed(0))) / 256
    return (x - x.mean(1, keepdim=True))[:, :-1].contiguous()


def teacher(args: argparse.Namespace) -> tuple[cf.Flow, dict[str, float]]:
    """The MAF of the work folder, trained if it is not there yet, and its mean log densities in nats."""
    train, held_out = (patches(args.data, part, args.side) for part in ("train", "test"))
    path = args.work / f"teacher-{args.side}x{args.side}-{args.hidden}.safetensors"
    if not path.exists():
        cf.save(trained(train, patches(args.data, "val", args.side), args), path)
    flow = cf.load(path, args.device)
    with torch.no_grad():
        reached = torch.cat([flow().log_prob(rows.to(args.device)) for rows in held_out.split(1000)]).double()
    return flow, {"test_log_likelihood": reached.mean().item(), "error": reached.std().item() / len(reached) ** 0.5}


def trained(train: Tensor, validation: Tensor, args: argparse.Namespace) -> cf.Flow:
    """A MAF on standardised patches, for as many epochs as the seconds allow."""
    D = train.shape[1]
    maf = cf.MAF(D, layers=5, hidden=(args.hidden, args.hidden), seed=0)
    scale = cf.Inverse(cf.Standardize(train.mean(0), train.std(0)))
    flow = cf.Flow(maf.base, cf.Compose([maf.transform, scale]))
    steps = len(train) // BATCH

    def fit(epochs: int, rows: int) -> float:
        config = cf.FitConfig(
            epochs=epochs, batch_size=BATCH, optimizer="adam", learning_rate=5e-4, weight_decay=1e-6, device=args.device
        )
        return cf.fit(flow, cf.log_likelihood, train[:rows], validation[:5000], config, on_epoch=report).seconds

    def report(task: str, epoch: cf.training.Epoch) -> None:
        print(f"teacher, epoch {epoch.epoch}: {epoch.train:.2f} train, {epoch.validation:.2f} validation", flush=True)

    each = fit(1, PILOT * BATCH) / PILOT
    fit(max(1, round(args.teacher_seconds / (each * steps))), len(train))
    return flow


def report(task: str, epoch: cf.training.Epoch) -> None:
    if epoch.epoch % 10 == 0:
        print(f"{task}, epoch {epoch.epoch}: {-epoch.validation:.3f} nats, {epoch.seconds:.1f} s", flush=True)


def distilled(flow: cf.Flow, config: cf.DistillConfig, student: cf.Flow | None, args: argparse.Namespace) -> dict:
    begun = time.perf_counter()
    made = cf.distill(flow, config=config, student=student, on_epoch=report)
    seconds = time.perf_counter() - begun
    if student is None:
        cf.save(made, args.work / "student.safetensors")
    torch.manual_seed(1)
    agreement = asdict(cf.diagnostics.agreement(flow, made, samples=args.samples))
    found = {name: value if math.isfinite(value) else None for name, value in agreement.items()}
    print(json.dumps({"seconds": seconds, **found}), flush=True)
    return {"seconds": seconds, "reverse_per_dim": found["reverse"] / flow.features, **found}


def scratch(flow: cf.Flow, args: argparse.Namespace, seconds: float, config: cf.DistillConfig) -> dict:
    """An IAF at the identity, on the teacher's scale, and the KL alone for about as many seconds."""
    iaf = cf.IAF(flow.features, layers=5, hidden=(args.hidden, args.hidden), seed=0)
    scale = list(flow.transform)[-1]
    student = cf.Flow(iaf.base, cf.Compose([iaf.transform, scale]))
    begun = time.perf_counter()
    pilot = {**asdict(config), "layer_steps": 0, "flow_steps": PILOT}
    cf.distill(flow, config=cf.DistillConfig(**pilot), student=student)
    each = (time.perf_counter() - begun) / PILOT
    longer = {**asdict(config), "layer_steps": 0, "flow_steps": max(1, round(seconds / each))}
    return {"steps": longer["flow_steps"], **distilled(flow, cf.DistillConfig(**longer), student, args)}


def table(rows: dict[str, dict]) -> str:
    lines = [
        "| student | KL(s, t) | per dim | KL(t, s), trimmed | ESS | energy p | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        lines.append(
            f"| {name} | {r['reverse']:.3f} ± {r['reverse_error']:.3f} | {r['reverse_per_dim']:.4f} "
            f"| {r['forward_trimmed']:.3f} | {r['ess']:,.0f} | {r['p_value']:.3f} | {r['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="bsds300_patches8x8_uint8.npz: train, val, test")
    parser.add_argument("--work", type=Path, required=True, help="folder where teacher and student are kept")
    parser.add_argument("--side", type=int, default=8, help="of the patches, in pixels; a smaller one for a trial")
    parser.add_argument("--hidden", type=int, default=512, help="units of both hidden layers of each network")
    parser.add_argument("--teacher-seconds", type=float, default=900)
    parser.add_argument("--layer-steps", type=int, default=6000, help="steps layer by layer")
    parser.add_argument("--flow-steps", type=int, default=4000, help="steps of the whole student")
    parser.add_argument("--forward-kl-weight", type=float, default=0.5, help="weight of KL(teacher || student)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--samples", type=int, default=20_000, help="draws of each flow, for the comparison")
    parser.add_argument("--scratch", action=argparse.BooleanOptionalAction, default=True, help="the KL alone as well")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    flow, reached = teacher(args)
    print(json.dumps(reached), flush=True)
    config = cf.DistillConfig(
        layer_steps=args.layer_steps,
        flow_steps=args.flow_steps,
        forward_kl_weight=args.forward_kl_weight,
        learning_rate=args.learning_rate,
        device=args.device,
    )
    rows = {"layer by layer, then the KL": distilled(flow, config, None, args)}
    if args.scratch:
        rows["the KL alone, from the identity"] = scratch(flow, args, next(iter(rows.values()))["seconds"], config)
    machine = f"{platform.machine()}, {args.device}, torch {torch.__version__}, {args.threads} threads"
    found = {"teacher": reached, "config": asdict(config), "students": rows, "machine": machine}
    best = next(iter(rows.values()))["reverse_per_dim"]
    text = (
        "# Distilling a MAF of image patches into an IAF\n\n"
        f"`python benchmarks/distill.py --side {args.side} --hidden {args.hidden} --layer-steps {args.layer_steps} "
        f"--flow-steps {args.flow_steps} --forward-kl-weight {args.forward_kl_weight}` on {machine}. Teacher: a MAF of "
        f"5 layers, {flow.features} numbers, test log-likelihood {reached['test_log_likelihood']:.2f} ± "
        f"{reached['error']:.2f} nats. KLs in nats from "
        f"{args.samples:,} draws, with standard errors; KL(t, s) without the largest hundredth of its terms, which a "
        "few exploding draws of the teacher make up; ESS of the student's draws, weighted to follow the teacher; p of "
        f"the energy test of 1,000 draws each.\n\n{table(rows)}\n\nThe mark is {MARK} nats per dimension of "
        "KL(student || teacher): "
        f"{'reached' if best <= MARK else 'missed'} with {best:.4f}.\n"
    )
    name = "distill" if args.side == 8 else f"distill-{args.side}x{args.side}"
    HERE.mkdir(exist_ok=True)
    (HERE / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    (HERE / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
