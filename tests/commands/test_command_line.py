"""The command line itself: help, typing mistakes, missing packages, errors of the system, closed pipes."""

import errno
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
from command_line import COMMAND, ENVIRONMENT, ONE_FLOW, everything, real
from registry import over

import counterflow as cf
from counterflow.cli import CLASSES, COMMANDS, help_text
from counterflow.commands.requirements import PACKAGES, require_packages

WORDS = {
    "vae": "--data --key --levels --posterior gaussian,iaf --likelihood --latent --network --free-bits --test-samples "
    "--out --resume --epochs --batch-size --learning-rate --optimizer --ema --patience --seed --device --precision",
    "posterior": "[MODEL] --data --tool {torch,pymc,pyro,numpyro} --dim -n --out --stages --seconds --steps --seed the "
    "exit code is 0",
    "density": "[DATA] --context COLUMN --drop --key --test --out --epochs --hidden --flow --no-kernels",
    "distill": "[RUN] --comparison-samples --layer-steps --flow-steps --samples --forward-kl-weight --out",
    "sample": "RUN -n --context --seed --out --mean --device",
    "score": "RUN DATA --key --levels --samples --seed --out --device",
    "compare": "RUN A B --seed --device --sep CHARACTER --sheet --query",
    "export": "RUN FILE --direction {sample,log_prob,decode,encode} --batch --double --seed",
    "report": "RUN --out --open",
    "bench": "--sizes D/H/B --growth --peers --threads --repeats --budget --cap --memory --quick --out",
}


def test_the_help_has_one_line_for_each_command(here):
    code, out, err = here("--help")
    assert (code, err) == (0, "") and here("-h") == (0, out, "")
    assert len(out.splitlines()) <= 24 and all(len(line) <= 100 for line in out.splitlines())
    for group, commands in COMMANDS.items():
        assert f"\n{group}:\n" in out
        for name, line in commands.items():
            assert f"\n  {name:<10} {line}\n" in out
    assert [name for commands in COMMANDS.values() for name in commands] == list(CLASSES)


@over(CLASSES, "name")
def test_the_line_of_a_command_begins_its_own_help(name, here):
    (line,) = (commands[name] for commands in COMMANDS.values() if name in commands)
    module, _, options = CLASSES[name].partition(":")
    assert getattr(import_module(module), options).__doc__.splitlines()[0] == line
    code, out, err = here(name, "--help")
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", out).split())
    assert (code, err) == (0, "") and out.startswith(f"usage: counterflow {name} ")
    assert [word for word in [line, *WORDS[name].split()] if word not in text] == []
    assert "None" not in out


@pytest.mark.system
@over(["", *CLASSES], "name")
def test_printing_help_does_not_import_torch(name):
    code = f"import sys; from counterflow.cli import main; main([{name!r}, '--help'] if {name!r} else ['--help'])"
    check = "print(*{'torch', 'numpy', 'rich', 'numba'} & set(sys.modules))"
    code = f"import atexit, sys; atexit.register(lambda: {check}); {code}"
    ran = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("usage: counterflow") and ran.stdout.splitlines()[-1] == ""


def test_the_completion_knows_every_command_and_option(here):
    code, script, err = here("--completion")
    assert (code, err) == (0, "")
    typed = "source /dev/stdin; COMP_WORDS=(counterflow density --no); COMP_CWORD=2; _counterflow; echo ${COMPREPLY[@]}"
    ran = subprocess.run(["bash", "-c", typed], input=script, capture_output=True, text=True, check=True)
    assert ran.stdout == "--no-kernels\n" and "--test-rows" in script and "vae posterior density" in script


def test_the_version(here):
    assert here("--version") == (0, f"counterflow {cf.__version__}\n", "")


UNREADABLE = {
    "likelihood": ("vae --likelihood poisson", "--likelihood"),
    "posterior": ("vae --posterior maf", "--posterior"),
    "number": ("vae --epochs many", "--epochs"),
    "flag": ("vae --colour red", "--colour"),
    "misspelt flag": ("vae --latnt 3", "--latent"),
    "command": (
        "train",
        "expected a command (vae, posterior, density, distill, sample, score, compare, export, report",
    ),
    "misspelt command": ("postrior", "did you mean posterior?"),
    "nothing": ("", "usage: counterflow COMMAND [OPTIONS]"),
    "no run": ("sample", "RUN"),
    "no data": ("score run", "DATA"),
}


@pytest.mark.parametrize(("line", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_arguments_that_cannot_be_parsed(line, message, here, tmp_path):
    code, out, err = here(*line.split())
    assert (code, out) == (2, "") and message in err and "Traceback" not in err
    assert not everything(tmp_path)


def test_suggestions_come_from_the_same_command(here):
    _, _, err = here("score", "run", "data", "--sampels", "3")
    assert "--samples" in err and "posterior" not in err and "vae" not in err.replace("VAE", "")


@over(["tyro", "rich"], "package")
def test_the_help_works_without_the_packages_of_the_command_line(package, here, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert here("--help") == (0, help_text() + "\n", "")
    code, out, err = here("sample", "run")
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"counterflow: expected {package} for .*; pip install 'counterflow\[cli\]'\n", err), err


def test_all_missing_packages_are_named_at_once(here, tmp_path, monkeypatch):
    for package in ("pyarrow", "matplotlib", "openpyxl"):
        monkeypatch.setitem(sys.modules, package, None)
    assert here("density", "--help")[0] == 0
    code, out, err = here("density")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search("expected matplotlib for plots.*; expected pyarrow for tables", err)
    assert err.endswith("; pip install 'counterflow[plots,data]'\n") and not everything(tmp_path)
    (tmp_path / "sales.xlsx").touch()
    err = here("density", "sales.xlsx")[2]
    assert "expected openpyxl for .xlsx files" in err and err.endswith("'counterflow[plots,data,excel]'\n")


def test_every_package_has_its_extra(monkeypatch):
    for package, (extra, _) in PACKAGES.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"^expected \S+ for .*pip install 'counterflow\[{extra}\]'$"):
            require_packages(package)


ERRORS = {
    "no permission": (errno.EACCES, "run", "expected access to run, got: permission denied"),
    "no such file": (errno.ENOENT, "run", "expected access to run, got: no such file or directory"),
    "no file": (errno.EIO, None, "expected access to a file, got: input/output error"),
    "full": (errno.ENOSPC, "run", "expected free space on the disk to write run, got none; free some"),
    "quota": (errno.EDQUOT, None, "expected free space on the disk to write, got none; free some"),
}


@pytest.mark.parametrize(("number", "path", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_of_the_system_are_put_in_words(number, path, message, here, tmp_path, monkeypatch):
    def fail(run):
        raise OSError(number, os.strerror(number), path)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr("counterflow.commands.trained.kind_of_run", fail)
    assert here("sample", "run") == (2, "", f"counterflow: {message}\n")


PATHS = {
    "folder in a file": ("density --out file/run", "expected a folder for file/run, got .*file, which is a file; give"),
    "old folder": ("vae --out old", "expected a new folder for the run, got old, which exists; give another --out"),
    "nothing to resume": ("vae --resume runs", "expected a run folder to resume, got runs, which does not exist"),
    "misspelt data": ("density tabel.csv", "got tabel.csv, which does not exist; did you mean table.csv?"),
    "data in no folder": ("vae --data no/where/x.npy", r"got no/where/x.npy, which does not exist \(nor does no\)"),
    "misspelt run": ("sample odl", "got odl, which does not exist; did you mean old?"),
    "old file": (
        "score old table.csv --out table.csv",
        "expected a new file, got table.csv, which exists; give",
    ),
    "a file for parts": (
        "score old table.csv --out file",
        "without a suffix to be a folder of parts, got file, which",
    ),
    "a folder for a file": (
        "sample old --out old.csv",
        "expected --out to be a new file, got old.csv, which is a",
    ),
    "old export": ("export old file", "expected a new file, got file, which exists"),
    "misspelt teacher": ("distill odl", "got odl, which does not exist; did you mean old?"),
    "misspelt name": (
        "posterior model.py:schols",
        "a name in model.py, got schols, .* it holds schools, other$",
    ),
    "no name": ("posterior model.py", "expected model.py:NAME, got no name; it holds schools, other"),
    "misspelt model": ("posterior modl.py:schools", "got modl.py, which does not exist; did you mean model.py?"),
    "misspelt json": ("posterior model.py:schools --data dta.json", "got dta.json, .* did you mean data.json?"),
    "a syntax error": ("posterior wrong.py:model", r"to run, got SyntaxError: .* \(line 2 of wrong.py: return 1\)$"),
    "no data for Stan": (
        "posterior program.stan --data data.json",
        "data that fit the program, got none, without y, ",
    ),
    "no epochs": ("density table.csv --epochs 0", "expected epochs to be a whole number of at least 1, got 0"),
    "no members": ("density table.csv --members 0", "expected members to be a whole number of at least 1, got 0"),
    "no float64": (
        "density table.csv --device mps",
        "expected device to be cpu or cuda, got 'mps', which has no",
    ),
    "no layers": ("posterior --layers 0", "expected layers of at least 1, got 0"),
    "no run to report": ("report odl", "expected a run folder, got odl, which does not exist; did you mean old?"),
    "no threads": ("vae --threads 0", "expected --threads to be at least 1, got 0"),
}


@pytest.mark.parametrize(("line", "message"), PATHS.values(), ids=PATHS)
def test_paths_and_names_are_checked_before_torch_is_imported(line, message, here, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old.csv").mkdir()
    (tmp_path / "program.stan").write_text("data { vector[3] y; } parameters { real mu; }")
    (tmp_path / "wrong.py").write_text("import pymc\nreturn 1\n")
    for name in ("old/config.json", "file", "table.csv", "data.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.py").write_text("import pymc\n\ndef schools(): ...\n\nother = pymc.Model()\n")
    before = everything(tmp_path)
    code, out, err = here(*line.split())
    assert (code, out, err.count("\n")) == (2, "", 1) and re.search(message, err.strip()), err
    assert everything(tmp_path) == before


def test_a_command_in_a_notebook_does_not_need_its_plots(here, monkeypatch):
    for backend, left in (("module://matplotlib_inline.backend_inline", None), ("Agg", "Agg")):
        monkeypatch.setenv("MPLBACKEND", backend)
        assert here("report", "nowhere")[0] == 2 and os.environ.get("MPLBACKEND") == left


@pytest.mark.system
def test_a_mistake_in_a_path_does_not_wait_for_torch(tmp_path):
    code = "import sys; from counterflow.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    (tmp_path / "program.stan").write_text("data { vector[3] y; } parameters { real mu; }")
    (tmp_path / "wrong.py").write_text("return 1")
    lines = ("density no.csv", "vae --data no.npy", "posterior no.py:model", "sample no", "distill no", "report no")
    for line in (*lines, "posterior wrong.py:x", "posterior program.stan", "density --epochs 0", "vae --epochs 0"):
        command = [sys.executable, "-c", code, *line.split()]
        ran = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
        assert (ran.stdout, ran.stderr.startswith("counterflow: expected")) == ("False\n", True), ran.stderr


def test_no_permission_and_a_full_disk(here, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)  # the superuser may write everywhere
        assert "expected permission to write to" in here("density", "--out", "run")[2]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1_000_000))
    assert "expected at least 10 MB of free disk space for" in here("vae")[2]
    assert not everything(tmp_path)


def test_quiet_verbose_and_threads(here):
    np.save("rows.npy", np.random.default_rng(0).normal(size=(60, 2)))
    code, out, err = here("density", "rows.npy", *ONE_FLOW, "-q", "--threads", 1, "--out", "run")
    assert (code, err) == (0, "") and "run folder: run" in out
    _, _, err = here("score", "run", "rows.npy", "-v", "--device", "toaster")
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith("counterflow: expected device to be")


@pytest.mark.system
@over(["--help", "vae --help", "--version"], "line")
def test_a_reader_that_closes_the_pipe_gets_no_error(line):
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, *line.split()]
    ran = subprocess.run(command, env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, "")


@pytest.mark.system
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@over([{}, {"NO_COLOR": "1"}], "variables")
def test_no_color(variables):
    import pty

    outer, inner = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm-256color", **variables}
    with subprocess.Popen([*COMMAND, "sample", "--help"], env=environment, stdout=inner) as process:
        os.close(inner)
        text = b""
        try:
            while part := os.read(outer, 65536):
                text += part
        except OSError:  # Linux reports the end of a terminal as an error
            pass
    os.close(outer)
    assert process.returncode == 0 and b"--context" in text
    assert (b"\x1b[" in text) == (not variables)


@pytest.mark.system
def test_module_and_script_are_the_same_command(tmp_path):
    ran = subprocess.run([sys.executable, "-m", "counterflow", "--help"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, real(tmp_path, "--help").stdout)
