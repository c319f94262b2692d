"""Report of counterflow distill."""

from __future__ import annotations

from counterflow.commands.progress import duration
from counterflow.commands.report.common import MIN_P, make_page, maybe
from counterflow.commands.report.page import Cell, Page, Section, Table, number
from counterflow.commands.report.run_data import Run


def key_numbers(run: Run) -> dict[str, Cell]:
    """Return the numbers by which two runs are compared."""
    summary = run.summary
    return {
        "KL(student || teacher), nats": number(summary["reverse"], ".4f"),
        "KL(teacher || student), nats, trimmed": number(summary["forward_trimmed"], ".4f"),
        "effective sample size": number(summary["ess"], ",.0f"),
        "p-value of a difference": number(summary["p_value"], ".3g"),
        "training, s": number(sum(summary["seconds"].values()), ",.0f"),
    }


def page(run: Run) -> Page:
    """Return the page of a run."""
    summary = run.summary
    draws = run.config["comparison_samples"]
    found = summary["p_value"] is not None and summary["p_value"] < MIN_P
    ess = summary["ess"] or 0.0
    verdict = (
        f"{draws:,} draws of the student are worth {ess:,.0f} of the teacher. A two-sample test finds "
        f"{'a difference' if found else 'no difference'} (p = {maybe(summary['p_value'], '.3g')})."
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
        "KL per feature": f"{maybe(summary['reverse_per_feature'], '.3g')} nats",
        "parameters": f"{summary['parameters']:,}",
        "training": duration(sum(summary["seconds"].values())),
    }
    sections = [
        Section("How far the student is from its teacher", table=Table(("", "value", "meaning"), rows)),
        Section("Pictures", pictures=pictures),
    ]
    good = None if summary["ess"] is None else ess >= draws / 2
    return make_page(run, summary["teacher"], verdict, good, [], facts, sections)
