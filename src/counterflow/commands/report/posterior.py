"""Report of counterflow posterior, and of its calibration."""

from __future__ import annotations

from counterflow.commands.progress import duration
from counterflow.commands.report.common import MIN_P, make_page, yes
from counterflow.commands.report.page import Cell, Page, Section, Table, number
from counterflow.commands.report.run_data import Run

MAX_K_HAT = 0.7  # above it importance weights are unusable
GOOD_K_HAT = 0.5


def key_numbers(run: Run) -> dict[str, Cell]:
    """Return the numbers by which two runs are compared."""
    summary = run.summary
    if "calibration" in summary:
        return {
            "calibrated": yes(summary["calibrated"]),
            "smallest p-value": number(summary["p_value"], ".2g"),
            "trusted fits": number(summary["trusted_fits"], ",.0f"),
            "data sets": number(summary["replications"], ",.0f"),
            "time, s": number(summary["seconds"], ",.1f"),
        }
    return {
        "trusted": yes(summary["trusted"]),
        "k-hat": number(summary["k_hat"], ".2f"),
        "effective sample size": number(summary["ess"], ",.0f"),
        "ELBO, nats": number(summary["elbo"], ".3f"),
        "fit, s": number(summary["seconds"], ",.1f"),
    }


def page(run: Run) -> Page:
    """Return the page of a run."""
    if "calibration" in run.summary:
        return _calibration(run)
    summary = run.summary
    weights = summary.get("mode_weights", [])
    facts = {
        "k-hat": f"{summary['k_hat']:.2f}" if summary["k_hat"] is not None else "not finite",
        "effective draws": f"{summary['ess']:,.0f} of {summary['samples']:,}",
        "ELBO": f"{summary['elbo']:.3f} nats" if summary["elbo"] is not None else "not finite",
        "log evidence, at least about": f"{summary['iw_elbo']:.3f} nats" if summary["iw_elbo"] is not None else "",
        "stages": str(summary["stages"]),
        "weights of the modes": ", ".join(f"{w:.2f}" for w in weights) if len(weights) > 1 else "",
        "time": duration(summary["seconds"]),
    }
    warnings = []
    if not summary["trusted"]:
        warnings.append(
            "Do not use these draws as the posterior's. Try --refine nuts, more --stages and --seconds, or another "
            "parameterisation of the model."
        )
    if summary["unreliable"]:
        warnings.append(f"The standard deviation of {', '.join(summary['unreliable'])} rests on a few draws.")
    if summary["missed"]:
        warnings.append(f"{100 * summary['missed']:.1f} % of the mass was found where the approximation has none.")
    columns = {"mean": ".4g", "mcse_mean": ".2g", "sd": ".4g", "mcse_sd": ".2g", "5%": ".4g", "95%": ".4g"}
    rows = [
        [
            Cell(row["variable"]),
            *(number(row[name], form) for name, form in columns.items()),
            number(row["ess"], ",.0f"),
            number(row["k_hat"], ".2f", _k_hat_mark(row["k_hat"])),
        ]
        for row in summary["table"]
    ]
    table = Table(
        ("variable", "mean", "MCSE", "sd", "MCSE", "5%", "95%", "ESS", "k-hat"),
        rows,
        "Click a header to sort; rest the pointer on a number for all its digits. MCSE is the Monte Carlo standard "
        "error of the number before it. ESS is the number of exact draws that estimate the mean equally well. Above a "
        "k-hat of 0.7, a few draws decide the standard deviation.",
    )
    sections = [Section("Parameters", table=table)]
    refined = summary.get("refined")
    if refined is not None:
        sections.append(Section("Markov chains through the flow", refined["sentence"]))
    sections.append(
        Section(
            "Is the approximation right?",
            pictures=[
                run.picture(
                    "marginals",
                    "Marginals",
                    "Draws of the flow, and the same draws with importance weights, which correct them. Where both "
                    "agree the approximation is right for that number; the share of misplaced mass stands in each "
                    "panel.",
                ),
                run.picture(
                    "pairs",
                    "Pairs",
                    "The pairs of unconstrained coordinates that fit worst: draws of the flow beside draws of the "
                    "posterior. A corner or an arm that only one of them has is a part of the posterior that is wrong.",
                ),
                run.picture(
                    "weights",
                    "Importance weights",
                    "The largest weights against the number of draws that have them. A steep fall is good; a straight "
                    "line with a small slope is a heavy tail, which k-hat measures.",
                ),
                run.picture(
                    "elbo",
                    "Training",
                    "The ELBO of each stage. It should be flat at the end; one that still rises asks for more --steps.",
                ),
            ],
        )
    )
    stages = [
        [
            Cell(f"{line['stage']}", order=line["stage"]),
            Cell(line["estimator"]),
            number(line["layers"], "d"),
            number(line["steps"], "d"),
            number(line["elbo"], ".3f"),
            number(line["k_hat"], ".2f", _k_hat_mark(line["k_hat"])),
            number(line["ess"], ",.0f"),
            number(line["seconds"], ".1f"),
        ]
        for line in run.metrics()
    ]
    header = ("stage", "estimator", "layers", "steps", "ELBO", "k-hat", "ESS", "s")
    sections.append(Section("Stages of the fit", table=Table(header, stages)))
    return make_page(run, summary["model"], summary["verdict"], summary["trusted"], warnings, facts, sections)


def _calibration(run: Run) -> Page:
    summary = run.summary
    facts = {
        "data sets": f"{summary['replications']:,}",
        "trusted fits": f"{summary['trusted_fits']:,}",
        "smallest p-value": f"{summary['p_value']:.2g}",
        "time": duration(summary["seconds"]),
    }
    rows = [
        [
            Cell(row["variable"]),
            number(row["mean_rank"], ".3f"),
            *(number(row[name], ".2g", "bad" if row[name] < MIN_P else "") for name in ("bias", "spread")),
        ]
        for row in summary["table"]
    ]
    note = (
        "Ranks of the true parameters among the draws of their posteriors. They are uniform, with mean 0.5, if the "
        "procedure is exact. A small p-value of bias means posteriors to one side of the truth, one of spread "
        "posteriors that are too narrow or too wide."
    )
    ranks = run.picture("ranks", "Ranks", "Histograms of the ranks. Bars outside of the grey band are unlikely.")
    sections = [
        Section("Parameters", table=Table(("variable", "mean rank", "p of bias", "p of spread"), rows, note)),
        Section("Are the ranks uniform?", pictures=[ranks]),
    ]
    return make_page(run, summary["model"], summary["calibration"], summary["calibrated"], [], facts, sections)


def _k_hat_mark(k_hat: float | None) -> str:
    if k_hat is None or k_hat > MAX_K_HAT:
        return "bad"
    return "good" if k_hat < GOOD_K_HAT else ""
