"""Completion of commands and options in a shell."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import tyro

from counterflow.commands.options import with_session

SCRIPT = """\
# Completion of counterflow for bash; zsh reads it after `autoload -U bashcompinit; bashcompinit`.
_counterflow() {{
    local words
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then words="{commands} --help --version"; fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _counterflow counterflow
"""


def completion_script(commands: Mapping[str, Any]) -> str:
    """Return a script for bash that completes commands and their options; other words are completed as files.

    Args:
        commands: dataclasses of options by command.

    Example:
        >>> from counterflow.commands.compare import Compare
        >>> print(completion_script({"compare": Compare}).splitlines()[4][:60])
                compare) words="--help --key --sep --decimal --encod
    """
    cases = "\n".join(
        f'        {name}) words="{" ".join(["--help", *_flags(with_session(command))])}" ;;'
        for name, command in commands.items()
    )
    return SCRIPT.format(cases=cases, commands=" ".join(commands))


def _flags(options: Any) -> Iterator[str]:
    """Yield the flags of a dataclass of options, and of those nested in it."""
    hints = typing.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        inner = hint.__origin__ if hasattr(hint, "__metadata__") else hint
        if dataclasses.is_dataclass(inner):
            yield from _flags(inner)
        elif tyro.conf.Positional not in getattr(hint, "__metadata__", ()):
            flag = field.name.replace("_", "-")
            yield f"--no-{flag}" if field.default is True else f"--{flag}"
