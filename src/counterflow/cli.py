"""The command line: puts the commands together, and turns what goes wrong into one line."""

from __future__ import annotations

import errno
import signal
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from counterflow import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when all went well, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM."""
    try:
        import tyro

        from counterflow.commands import console
        from counterflow.commands.bench.command import Bench
        from counterflow.commands.density import Density
        from counterflow.commands.distill import Distill
        from counterflow.commands.export import Export
        from counterflow.commands.posterior import Posterior
        from counterflow.commands.sample import Sample
        from counterflow.commands.score import Score
        from counterflow.commands.training import together
        from counterflow.commands.vae import Vae
    except ImportError as error:
        print(f"counterflow: {error.name} is not installed; pip install 'counterflow[all]'", file=sys.stderr)
        return 2
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: console.note(f"counterflow: {message}")
        try:
            command = tyro.extras.subcommand_cli_from_dict(
                {
                    "vae": Vae,
                    "posterior": Posterior,
                    "density": Density,
                    "distill": Distill,
                    "sample": Sample,
                    "score": Score,
                    "export": Export,
                    "bench": Bench,
                },
                prog="counterflow",
                description=f"Autoregressive normalizing flows: VAEs, posteriors, tables. Version {__version__}.",
                args=arguments,
            )
            with _ended_by_sigterm(), together():
                return command.run()
        except (ValueError, OSError, ImportError) as error:
            console.note(f"counterflow: {_in_one_line(_explained(error), error)}")
            return 2
        except KeyboardInterrupt as error:
            console.note(_in_one_line("interrupted", error))
            return 128 + (error.args[0] if error.args else signal.SIGINT)


def _explained(error: Exception) -> str:
    """A full disk is the one error of the system that has to be told in other words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"expected room on the disk to write to, got none left ({error}); make some"
    return str(error)


def _in_one_line(text: str, error: BaseException) -> str:
    return " ".join("; ".join([text, *getattr(error, "__notes__", [])]).split())


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, which tidies up."""

    def end(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():  # only that one is given signals
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
