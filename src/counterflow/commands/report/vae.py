"""Report of counterflow vae."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from counterflow.commands.progress import duration
from counterflow.commands.report.common import make_page
from counterflow.commands.report.page import Cell, Page, Section, Table, number
from counterflow.commands.report.run_data import Run


def key_numbers(run: Run) -> dict[str, Cell]:
    """Return the numbers by which two runs are compared."""
    summary = run.summary
    return {
        f"{result['posterior']}: {label}": number(result[key], form)
        for result in summary["results"]
        for key, label, form in (
            ("test_elbo", "test ELBO, nats", ".2f"),
            ("test_log_likelihood", "test log-likelihood, nats", ".2f"),
            ("kl", "KL, nats", ".2f"),
            ("seconds", "training, s", ",.0f"),
        )
    }


def page(run: Run) -> Page:
    """Return the page of a run."""
    summary = run.summary
    results = {result["posterior"]: result for result in summary["results"]}
    rows = summary["rows"]
    good = None
    if len(results) == 2:
        gaussian, iaf = results["gaussian"], results["iaf"]
        gain = iaf["test_elbo"] - gaussian["test_elbo"]
        more = "higher" if gain >= 0 else "lower"
        verdict = (
            f"The ELBO with the IAF posterior is {abs(gain):.2f} nats per row {more} than with the Gaussian one: "
            f"{iaf['test_elbo']:.2f} against {gaussian['test_elbo']:.2f}."
        )
        good = gain > 0 or None
    else:
        (result,) = results.values()
        verdict = f"The test ELBO is {result['test_elbo']:.2f} nats per row."
    sampled = results[next(iter(results))]["samples"]
    columns: list[tuple[str, Callable[[Mapping[str, Any]], Cell]]] = [
        ("posterior", lambda result: Cell(result["posterior"])),
        ("test ELBO", lambda result: number(result["test_elbo"], ".2f")),
        ("standard error", lambda result: number(result["test_elbo_error"], ".2f")),
        (f"log-likelihood, {sampled} samples", lambda result: number(result["test_log_likelihood"], ".2f")),
        ("standard error", lambda result: number(result["test_log_likelihood_error"], ".2f")),
        ("KL", lambda result: number(result["kl"], ".2f")),
        ("parameters", lambda result: number(result["parameters"], ",d")),
        ("epochs", lambda result: number(result["epochs"], "d")),
        ("training, s", lambda result: number(result["seconds"], ",.0f")),
    ]
    if all("bits_per_dim" in result for result in results.values()):
        columns.insert(5, ("bits per dim", lambda result: number(result["bits_per_dim"], ".3f")))
    table = Table(
        [name for name, _ in columns],
        [[show(result) for _, show in columns] for result in results.values()],
        f"Nats per row, over {rows['tested']:,} of {rows['test']:,} test rows. The log-likelihood is estimated by "
        "importance sampling; its distance to the ELBO is the KL divergence of q(z|x) from the true posterior.",
    )
    facts = {part: f"{rows[part]:,} rows" for part in ("train", "validation", "test")}
    facts["training"] = duration(sum(result["seconds"] for result in results.values()))
    warnings = []
    if rows["tested"] < rows["test"]:
        warnings.append(
            f"{rows['tested']:,} test rows were drawn at random; --test-rows {rows['test']} tests them all."
        )
    pictures = [
        run.picture(
            "samples",
            "Samples",
            "What the models draw: the mean of p(x|z) for z from the prior. Compare with the data.",
        ),
        run.picture(
            "reconstructions",
            "Reconstructions",
            "Held-out data, and what is left of them after encoding and decoding.",
        ),
        run.picture(
            "posterior",
            "Posteriors of z",
            "q(z|x) of two held-out data beside the true posterior, over the two latent features that are most "
            "correlated. An ellipse cannot bend; an IAF can.",
        ),
        run.picture(
            "learning_curves",
            "Training",
            "Training and validation ELBO. A validation curve that falls is overfitting; the best weights are kept.",
        ),
    ]
    sections = [Section("Test", table=table), Section("Pictures", pictures=pictures)]
    return make_page(run, summary["data"], verdict, good, warnings, facts, sections)
