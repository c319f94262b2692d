"""The command line: finds the command, runs it, and turns errors into one line.

Printing help imports neither torch nor the command's own modules beyond its options.
"""

from __future__ import annotations

import difflib
import errno
import inspect
import io
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from typing import Any

from counterflow import __version__
from counterflow.checks import require

COMMANDS = {  # group -> command -> its one line of help, the first of its docstring
    "fit": {
        "vae": "Train VAEs with a Gaussian and an IAF posterior, and compare them.",
        "posterior": "Fit the posterior of a Bayesian model, and report whether it can be trusted.",
        "density": "Fit the density of the rows of a table.",
        "distill": "Distil a trained flow into one that samples in one pass.",
    },
    "use": {
        "sample": "Draw from a trained model.",
        "score": "Score data under a trained model, in nats.",
        "compare": "Test whether the distribution of a table has moved, and report which columns have.",
        "export": "Write a trained model to ONNX or to an archive of torch.export.",
        "report": "Write the report of a run again, or compare several runs.",
    },
    "measure": {
        "bench": "Time both directions of an autoregressive layer, here and in other libraries.",
    },
}
BROKEN_PIPE = 141  # exit code of a process that SIGPIPE ends, as shells report it
CLASSES = {  # command -> the dataclass of its options, whose method `run` runs it
    "vae": "counterflow.commands.vae:Vae",
    "posterior": "counterflow.commands.posterior:Posterior",
    "density": "counterflow.commands.density:Density",
    "distill": "counterflow.commands.distill:Distill",
    "sample": "counterflow.commands.sample:Sample",
    "score": "counterflow.commands.score:Score",
    "compare": "counterflow.commands.compare:Compare",
    "export": "counterflow.commands.export:Export",
    "report": "counterflow.commands.report.command:Report",
    "bench": "counterflow.commands.bench.command:Bench",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line; those of the process if None.

    Returns:
        The exit code: 0 for success, 1 for a result that is not usable, 2 for bad input, 130 after Ctrl-C, 143 after
        SIGTERM, 141 if a reader of the output has closed it.
    """
    try:
        try:
            return _main(sys.argv[1:] if arguments is None else list(arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as in `counterflow --help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush on exit
        return BROKEN_PIPE


def _main(arguments: list[str]) -> int:
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"counterflow {__version__}")
        return 0
    if name == "--completion":
        return _print_completion()
    if name in CLASSES:
        return _run(name, arguments[1:])
    _note(_unknown(name) if name else help_text())
    return 2


def _print_completion() -> int:
    try:
        require("tyro", "cli", "the command line")
    except ImportError as error:
        _note(f"counterflow: {error}")
        return 2
    from counterflow.commands.completion import completion_script

    print(completion_script({name: _options_of(name) for name in CLASSES}), end="")
    return 0


def _options_of(name: str) -> Any:
    """Return the dataclass of a command's options."""
    module, _, options = CLASSES[name].partition(":")
    return getattr(import_module(module), options)


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, CLASSES, n=1)
    hint = f"did you mean {close[0]}?" if close else "see counterflow --help"
    return f"counterflow: expected a command ({', '.join(CLASSES)}), got {name}; {hint}"


def help_text() -> str:
    """Return the help, with one line for each command."""
    lines = ["usage: counterflow COMMAND [OPTIONS]", ""]
    for group, commands in COMMANDS.items():
        lines += [f"{group}:", *(f"  {name:<10} {line}" for name, line in commands.items()), ""]
    lines += [
        "options:",
        "  -h, --help    Show this help.",
        "  --version     Show the version.",
        "  --completion  Print a script that completes options in bash and zsh.",
        "",
        "counterflow COMMAND --help describes a command and its options.",
    ]
    return "\n".join(lines)


def _run(name: str, arguments: list[str]) -> int:
    verbose = False
    if os.environ.get("MPLBACKEND", "").startswith("module://"):  # a notebook's, whose package may be missing here
        del os.environ["MPLBACKEND"]
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _note(f"counterflow: {message}")
        try:
            command, session = _parse(name, arguments)
            verbose = session.verbose
            require("rich", "cli", "the command line")
            from counterflow.commands import console
            from counterflow.commands.signals import sigterm_as_interrupt
            from counterflow.commands.torchrun import joined_processes

            console.set_quiet(session.quiet)
            with sigterm_as_interrupt(), joined_processes(), _threads(getattr(session, "threads", None)):
                code: int = command.run()
                return code
        except BrokenPipeError:
            raise
        except (ValueError, OSError, ImportError) as error:
            if verbose:
                traceback.print_exc()
            _note(_one_line(f"counterflow: {_message(error)}", error))
            return 2
        except KeyboardInterrupt as error:
            _note(_one_line("interrupted", error))
            return 128 + (error.args[0] if error.args else signal.SIGINT)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Compute with this number of threads; with torch's own if None."""
    if number is None:
        yield
    elif "torch" not in sys.modules:  # read when torch is imported: a mistake in a path should not wait for that
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(number)
        yield
    else:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(number)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _parse(name: str, arguments: list[str]) -> tuple[Any, Any]:
    """Return the options of a command, and those of every command; print help and errors, and exit, as tyro does."""
    tyro = require("tyro", "cli", "the command line")
    if os.environ.get("NO_COLOR"):
        tyro._experimental_options["ansi_codes"] = False
    from counterflow.commands.options import with_session

    command = _options_of(name)
    boxed = io.StringIO()
    try:
        with redirect_stderr(boxed):
            invocation = tyro.cli(
                with_session(command),
                prog=f"counterflow {name}",
                description=inspect.getdoc(command),
                args=arguments,
                config=(tyro.conf.DisallowNone,),  # shows --key STR, not --key {None}|STR
            )
    except SystemExit as ended:
        if ended.code:
            _note(f"counterflow: {_unboxed(boxed.getvalue())}; see counterflow {name} --help")
        raise
    return invocation.command, invocation.session


def _unboxed(text: str) -> str:
    """Return the message in a box of tyro as one line, without the part that points to the help.

    Example:
        >>> _unboxed("╭─ Error ─╮\\n│ no --x, did you │\\n│ mean --y? │\\n│ ─── │\\n│ For full helptext, .. │")
        'no --x, did you mean --y?'
    """
    parts: list[list[str]] = [[]]
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        inner = line.strip("│ ")
        if inner and not set(inner) - {"─"}:
            parts.append([])
        elif inner and inner[0] not in "╭╰":
            parts[-1].append(inner)
    sentences = [" ".join(part).replace("'None', ", "").rstrip(".") for part in parts if part]
    return "; ".join(each for each in sentences if not each.startswith("For full helptext"))


def _message(error: Exception) -> str:
    """Return the text of an error; errors of the system are put in words, without their numbers."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    place = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"expected free space on the disk to write{place}, got none; free some"
    return f"expected access to{place or ' a file'}, got: {(error.strerror or 'an unknown error').lower()}"


def _one_line(text: str, error: BaseException) -> str:
    return " ".join("; ".join([text, *getattr(error, "__notes__", [])]).split())


def _note(text: str) -> None:
    """Print to stderr, through the console if it is in use: it moves progress bars, and is silent on all but rank 0."""
    console = sys.modules.get("counterflow.commands.console")
    if console is None:
        print(text, file=sys.stderr)
    else:
        console.warn(text)


if __name__ == "__main__":
    sys.exit(main())
