"""Contents of the report of each command, from the files of its run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from counterflow.commands.progress import duration
from counterflow.commands.report.page import Card, Cell, Page, Section, Table, number
from counterflow.commands.report.run_data import Run

MAX_K_HAT = 0.7  # above it importance weights are unusable
GOOD_K_HAT = 0.5
CLEAR = 2.0  # standard errors that make a difference clear
MIN_P = 0.01  # p-value of a two-sample test below which a difference is found


def page_of(run: Run) -> Page:
    """Return the page of a run.

    Raises:
        ValueError: its files are not those of a run of this version.
    """
    try:
        return CONTENTS[run.command](run)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected the files of a run of counterflow {run.command} in {run.folder}, got: {error!r:.200}; the run "
            "may be of another version"
        ) from None


def key_numbers(run: Run) -> dict[str, Cell]:
    """Return the numbers by which runs of one command are compared."""
    summary = run.summary
    if run.command == "posterior" and "calibration" in summary:
        return {
            "calibrated": _yes(summary["calibrated"]),
            "smallest p-value": number(summary["p_value"], ".2g"),
            "trusted fits": number(summary["trusted_fits"], ",.0f"),
            "data sets": number(summary["replications"], ",.0f"),
            "time, s": number(summary["seconds"], ",.1f"),
        }
    if run.command == "posterior":
        return {
            "trusted": _yes(summary["trusted"]),
            "k-hat": number(summary["k_hat"], ".2f"),
            "effective sample size": number(summary["ess"], ",.0f"),
            "ELBO, nats": number(summary["elbo"], ".3f"),
            "fit, s": number(summary["seconds"], ",.1f"),
        }
    if run.command == "density":
        return {
            "log density of test rows, nats": number(summary["test_log_density"], ".3f"),
            "standard error": number(summary["standard_error"], ".3f"),
            "gain over a Gaussian mixture, nats": number(summary.get("difference", {}).get("log_density"), "+.3f"),
            "parameters": number(summary["parameters"], ",.0f"),
            "training, s": number(summary["seconds"], ",.1f"),
        }
    if run.command == "vae":
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
    if run.command == "distill":
        return {
            "KL(student || teacher), nats": number(summary["reverse"], ".4f"),
            "KL(teacher || student), nats, trimmed": number(summary["forward_trimmed"], ".4f"),
            "effective sample size": number(summary["ess"], ",.0f"),
            "p-value of a difference": number(summary["p_value"], ".3g"),
            "training, s": number(sum(summary["seconds"].values()), ",.0f"),
        }
    return {
        f"{aim['what']}, {aim['map']}, {aim['size']}": number(aim["value"], ".2f", "good" if aim["met"] else "bad")
        for aim in summary["aims"]
    }


def _about(run: Run) -> dict[str, str]:
    """Return versions, time and place of a run."""
    config = run.config
    about = {"run folder": str(run.folder.resolve())}
    if "started" in config:
        about["started"] = str(config["started"])
    about["counterflow"] = str(config["version"])
    return about | {str(name): str(version) for name, version in config.get("versions", {}).items()}


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
    return _page(run, summary["model"], summary["calibration"], summary["calibrated"], [], facts, sections)


def _posterior(run: Run) -> Page:
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
    return _page(run, summary["model"], summary["verdict"], summary["trusted"], warnings, facts, sections)


def _k_hat_mark(k_hat: float | None) -> str:
    if k_hat is None or k_hat > MAX_K_HAT:
        return "bad"
    return "good" if k_hat < GOOD_K_HAT else ""


def _density(run: Run) -> Page:
    summary = run.summary
    rows = summary["rows"]
    error = summary["standard_error"]
    plus_minus = "" if error is None else f" ± {error:.3f}"
    reached = summary["test_log_density"]  # None for minus infinity
    verdict = f"The density is 0 at some of {rows['test']:,} held-out rows, so their mean log density is -inf."
    if reached is not None:
        verdict = f"The mean log density of {rows['test']:,} held-out rows is {reached:.3f}{plus_minus} nats."
    good = None
    models = [[Cell("flow"), number(reached, ".3f"), number(error, ".3f")]]
    if "gaussian_mixture" in summary:
        mixture = summary["gaussian_mixture"]
        gain, gain_error = (summary["difference"][name] for name in ("log_density", "standard_error"))
        name = f"Gaussian mixture, {mixture['components']} by BIC"
        models.append(
            [Cell(name), number(mixture["test_log_density"], ".3f"), number(mixture["standard_error"], ".3f")]
        )
        if gain is not None:
            clear = gain_error is not None and abs(gain) > CLEAR * gain_error
            good = gain > 0 if clear else None
            judged = ("more than a" if gain > 0 else "less than a") if clear else "about as much as a"
            shown = f" ({gain:+.3f}{'' if gain_error is None else f' ± {gain_error:.3f}'} nats per row)"
            verdict += f" That is {judged} Gaussian mixture chosen by BIC gives them{shown}."
    warnings = []
    if summary["holds_rows"]:
        warnings.append("The model holds its training rows, as kernels. Fit with --no-kernels before you give it away.")
    warnings.append("This page shows rows of the table: give it only to people who may see them.")
    facts = {
        "rows": f"{rows['train and validation']:,} to train and validate, {rows['test']:,} to test",
        "columns": str(len(summary["columns"])),
        "given": ", ".join(summary["context"]),
        "parameters": f"{summary['parameters']:,}",
        "epochs": ", ".join(map(str, summary["epochs"])),
        "training": duration(summary["seconds"]),
    }
    header = ("model", "log density, nats per row", "standard error")
    cards = [_column_card(card) for card in summary.get("column_cards", [])]
    more = len(summary["columns"]) - len(cards)
    sections = [
        Section("Held-out rows", table=Table(header, models, "Higher is better.")),
        Section(
            "Columns",
            "Grey bars: held-out rows. Line: as many draws of the flow."
            + (f" {more} further columns are not shown." if cards and more else ""),
            cards=cards,
        ),
        Section(
            "Unusual rows",
            "The held-out rows with the lowest log density, and the cells that make them so: a usual value in the "
            "place of the cell would raise the log density by as many nats. Rows count from 0 over the rows that were "
            "read. counterflow score gives the log density of every row of a table.",
            table=_unusual_table(summary.get("unusual_rows", [])),
        ),
        Section(
            "Is the density right?",
            pictures=[
                run.picture(
                    "pairs",
                    "Rows and samples",
                    "Held-out rows and draws of the flow, column by column and in pairs. Both should look alike.",
                ),
                run.picture(
                    "calibration",
                    "Calibration",
                    "Held-out rows mapped to the flow's noise. A flat histogram is right; a hump in the middle means "
                    "that the flow is too wide there, a valley that it is too narrow.",
                ),
                run.picture(
                    "scores",
                    "Log densities",
                    "Log densities of held-out rows and of samples. Held-out rows far to the left of all samples are "
                    "unlike anything that the flow would draw.",
                ),
                run.picture(
                    "learning_curve",
                    "Training",
                    "Training and validation log density. A validation curve that falls while the other rises is "
                    "overfitting; the best weights are kept.",
                ),
            ],
        ),
    ]
    return _page(run, summary["data"], verdict, good, warnings, facts, sections)


def _column_card(card: Mapping[str, Any]) -> Card:
    if "most" in card:
        facts = {name: f"{100 * share:.3g} %" for name, share in card["most"].items()}
    else:
        facts = {name: f"{card[name]:.4g}" for name in ("min", "5%", "median", "95%", "max")}
    return Card(
        card["column"], card["kind"], {"distinct": f"{card['distinct']:,}", **facts}, card["data"], card["samples"]
    )


def _unusual_table(rows: list[Any]) -> Table:
    lines = []
    for row in rows:
        cells = [
            f"{cell['column']} = {_value(cell['value'])} ({_gain(cell['gain'])} at {_value(cell['usual'])})"
            for cell in row["cells"]
        ]
        given = "; ".join(f"{name} = {value}" for name, value in row["given"].items())
        described = "; ".join(cells) or "no single cell"
        line = [Cell(str(row["row"]), order=row["row"]), number(row["log_density"], ".2f"), Cell(described)]
        lines.append([*line, Cell(given)] if row["given"] else line)
    has_context = any(row["given"] for row in rows)
    return Table(("row", "log density", "unusual cells", *(("given",) if has_context else ())), lines)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def _gain(nats: float | None) -> str:
    return "inside of the support" if nats is None else f"{nats:+.1f} nats"


def _vae(run: Run) -> Page:
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
    return _page(run, summary["data"], verdict, good, warnings, facts, sections)


def _distill(run: Run) -> Page:
    summary = run.summary
    draws = run.config["comparison_samples"]
    found = summary["p_value"] is not None and summary["p_value"] < MIN_P
    ess = summary["ess"] or 0.0
    verdict = (
        f"{draws:,} draws of the student are worth {ess:,.0f} of the teacher. A two-sample test finds "
        f"{'a difference' if found else 'no difference'} (p = {_maybe(summary['p_value'], '.3g')})."
    )
    rows = [
        [Cell(label), number(summary[key], form), Cell(meaning)]
        for key, label, form, meaning in (
            ("reverse", "KL(student || teacher), nats", ".3g", "0 if both are equal; large where the student is wrong"),
            ("reverse_error", "its standard error", ".2g", ""),
            ("forward_trimmed", "KL(teacher || student), nats", ".3g", "without the largest 1 % of its terms"),
            ("ess", "effective sample size", ",.0f", f"of {draws:,} draws of the student"),
            ("p_value", "p-value", ".3g", "of a two-sample test; small means that a difference was found"),
        )
    ]
    pictures = [
        run.picture("samples", "Draws", "Draws of teacher and student, in pairs of features. Both should look alike."),
        *(
            run.picture(f"learning_curve_{task}", f"Training, {task}", "The objective of this part of the training.")
            for task in summary["seconds"]
        ),
    ]
    facts = {
        "KL per feature": f"{_maybe(summary['reverse_per_feature'], '.3g')} nats",
        "parameters": f"{summary['parameters']:,}",
        "training": duration(sum(summary["seconds"].values())),
    }
    sections = [
        Section("How far the student is from its teacher", table=Table(("", "value", "meaning"), rows)),
        Section("Pictures", pictures=pictures),
    ]
    good = None if summary["ess"] is None else ess >= draws / 2
    return _page(run, summary["teacher"], verdict, good, [], facts, sections)


def _bench(run: Run) -> Page:
    summary = run.summary
    met = sum(bool(aim["met"]) for aim in summary["aims"])
    verdict = f"{met} of {len(summary['aims'])} ratios keep to their goals."
    rows = [
        [
            Cell(aim["what"]),
            Cell(aim["map"]),
            Cell(aim["size"]),
            number(aim["value"], ".2f", "good" if aim["met"] else "bad"),
            Cell(f"{'at most' if aim['at_most'] else 'at least'} {aim['bound']:g}", order=aim["bound"]),
        ]
        for aim in summary["aims"]
    ]
    growth = [
        [Cell(name), number(sides["parallel"], ".2f"), number(sides["sequential"], ".2f")]
        for name, sides in summary["exponents"].items()
    ]
    pictures = [
        run.picture("time", "Time", "Both directions against the number of features D, on logarithmic axes."),
        run.picture("memory", "Memory", "Peak memory of both directions with gradients."),
    ]
    sections = [
        Section("Ratios and their goals", "bench.md in the run folder holds every figure.", _ratios(rows)),
        Section("Growth with D", "time = D^exponent", Table(("", "parallel", "sequential"), growth), pictures=pictures),
    ]
    warnings = [f"{name} was left out: {failure}" for name, failure in summary["failed"].items()]
    facts = {"threads": str(run.config["threads"])}
    return _page(run, "Both directions of an autoregressive layer", verdict, None, warnings, facts, sections)


def _ratios(rows: list[list[Cell]]) -> Table:
    return Table(("ratio", "map", "D/H/B", "measured", "goal"), rows)


def _page(
    run: Run,
    title: str,
    verdict: str,
    good: bool | None,
    warnings: list[str],
    facts: Mapping[str, str],
    sections: list[Section],
) -> Page:
    stopped = run.summary.get("stopped")
    if stopped == "interrupted" or (isinstance(stopped, dict) and "interrupted" in stopped.values()):
        folder = run.folder
        warnings = [f"The run was interrupted: these are its best weights so far; --resume {folder}", *warnings]
    return Page(
        f"counterflow {run.command}",
        title,
        verdict,
        good,
        warnings,
        {name: value for name, value in facts.items() if value},
        [section for section in sections if section.table or section.cards or section.pictures or section.note],
        run.command_line(),
        _about(run),
    )


def _yes(value: bool) -> Cell:
    return Cell("yes" if value else "no", mark="good" if value else "bad")


def _maybe(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


CONTENTS: dict[str, Callable[[Run], Page]] = {
    "vae": _vae,
    "posterior": _posterior,
    "density": _density,
    "distill": _distill,
    "bench": _bench,
}
