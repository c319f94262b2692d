"""Reports of runs: self-contained, safe with hostile names, readable in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from command_line import ONE_FLOW

import counterflow as cf
from counterflow.cli import CLASSES
from counterflow.commands.options import command_line, from_config
from counterflow.commands.report.run_data import COMMANDS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script>{{ 7 * 7 }}</td>'


class Tags(HTMLParser):
    """The tags of a page with their attributes, and the texts outside of style and script."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.words = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.words.append(data)

    def named(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def page_of(path):
    return Tags(path.read_text("utf-8"))


@pytest.fixture(scope="session")
def runs(vae_run, posterior_run, density_runs, once, tables):
    """The run folders by command."""
    once("teacher", "density", tables / "table.csv", "--drop", "id", "colour", *ONE_FLOW)
    steps = ("--layer-steps", 20, "--flow-steps", 20)
    folder, _ = once("student", "distill", "teacher", *steps, "--comparison-samples", 500)
    return {
        "vae": vae_run[0] / "digits",
        "posterior": posterior_run[0],
        "density": density_runs[0] / "plain",
        "given": density_runs[0] / "given",
        "distill": folder / "student",
    }


WORDS = {
    "vae": "counterflow vae|with the IAF posterior is|test ELBO|Samples|Posteriors of z|Run it again|torch",
    "posterior": "counterflow posterior|eight-schools|k-hat|theta[7]|Importance weights|Stages of the fit|torch",
    "density": "counterflow density|held-out rows is|Gaussian mixture|median|Unusual rows|Calibration|--drop id colour",
    "given": "held-out rows is|colour = |Calibration",
    "distill": "counterflow distill|draws of the student|KL(student || teacher)|Training, flow|--layer-steps 20",
}


@pytest.mark.parametrize("kind", WORDS)
def test_a_report_is_one_file_with_everything(kind, runs):
    page = page_of(runs[kind] / "report.html")
    assert [word for word in WORDS[kind].split("|") if word not in page.text] == []
    pictures = page.named("img")
    assert len(pictures) >= 3 and all(each["src"].startswith("data:image/png;base64,") for each in pictures)
    assert not page.named("link") and all("src" not in each for each in page.named("script"))
    assert "http" not in re.sub(r'http-equiv|data:[^"]*', "", (runs[kind] / "report.html").read_text())


def test_the_command_line_repeats_the_run(runs):
    for folder in runs.values():
        config = json.loads((folder / "config.json").read_text())
        command = from_config(COMMANDS[config["command"]](), config, folder)
        shown = command_line(config["command"], command)
        assert shown in page_of(folder / "report.html").text
    assert set(COMMANDS) < set(CLASSES)


def hostile_copy(folder, run):
    """Copy a run whose every text is markup."""

    def spoil(value):
        if isinstance(value, dict):
            return {key: value[key] if key in ("command",) else spoil(value[key]) for key in value}
        if isinstance(value, list):
            return [spoil(each) for each in value]
        return value + HOSTILE if isinstance(value, str) and value not in ("gaussian", "iaf", "high", "low") else value

    shutil.copytree(run, folder)
    for name in ("config.json", "summary.json"):
        (folder / name).write_text(json.dumps(spoil(json.loads((run / name).read_text()))))
    return folder


@pytest.mark.parametrize("kind", WORDS)
def test_hostile_names_inject_no_markup(kind, runs, here, tmp_path):
    run = hostile_copy(tmp_path / "<b>run", runs[kind])
    code, out, err = here("report", run)
    assert (code, err) == (0, "") and out == f"wrote {run / 'report.html'}\n"
    page = page_of(run / "report.html")
    assert "<img src=x onerror=alert(1)>" in page.text and "{{ 7 * 7 }}" in page.text
    assert len(page.named("script")) == 1 and all(set(each) == {"src", "alt"} for each in page.named("img"))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in page_of(runs[kind] / "report.html").tags}


def test_runs_are_compared_side_by_side(runs, here, tmp_path):
    other = shutil.copytree(runs["density"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["fit"]["hidden"] = [99]
    (other / "config.json").write_text(json.dumps(config))
    code, out, err = here("report", runs["density"], other)
    assert (code, err, out) == (0, "", "wrote comparison.html\n")
    page = page_of(tmp_path / "comparison.html")
    for word in ("2 runs", "Comparison of plain, other", "log density of test rows", "hidden", "[99]", "Calibration"):
        assert word in page.text, word
    assert len(page.named("img")) == 8 and page.text.count("Calibration") >= 1
    code, _, err = here("report", runs["density"], runs["vae"])
    assert code == 2 and "comparison.html, which exists" in err
    code, _, err = here("report", runs["density"], runs["vae"], "--out", "both.html")
    assert code == 2 and re.match(
        r"counterflow: expected runs of one command to compare, got .*\(density\), .*\(vae\)", err
    )


BROKEN = {
    "no run": ({}, "expected a run folder, got run, without a config.json"),
    "no results": (
        {"config.json": '{"command": "vae"}'},
        "expected a run with results, got run, without a summary.json",
    ),
    "another program": (
        {"config.json": '{"command": "rm"}'},
        "expected run/config.json to name a command of counterflow",
    ),
    "a list": (
        {"config.json": "[]"},
        "expected run/config.json to be the configuration of a run, a JSON object, got l",
    ),
    "other results": (
        {"config.json": '{"command": "vae"}', "summary.json": "{}"},
        "expected the files of a run of counterflow vae in run, got: KeyError",
    ),
}


@pytest.mark.parametrize(("contents", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_run_ends_in_one_line(contents, message, here, tmp_path):
    (tmp_path / "run").mkdir()
    for name, text in contents.items():
        (tmp_path / "run" / name).write_text(text)
    code, out, err = here("report", "run")
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err, err
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.system
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("kind", WORDS)
def test_a_browser_opens_it_without_errors(kind, runs, tmp_path):
    run = hostile_copy(tmp_path / "run", runs[kind])
    cf.cli.main(["report", str(run)])
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/p",
    ]
    command = [CHROMIUM, *options, "--dump-dom", (run / "report.html").as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in ran.stderr, ran.stderr
    assert "</footer>" in ran.stdout and ran.stdout.count("<script>") == 1
