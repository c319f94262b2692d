"""Types and docstrings as tools read them: mypy on a user's code, griffe on ours."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

import counterflow

HERE = Path(__file__).parent
SOURCE = Path(counterflow.__file__).parent


def test_mypy_knows_the_types_of_a_users_code():
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", str(HERE / "user_code.py")]  # with the settings, and the cache, of `mypy`
    ran = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_griffe_finds_no_warning(caplog):
    """The reference is made from the docstrings; a misspelt argument or a missing type is a warning."""
    griffe = pytest.importorskip("griffe")
    package = griffe.load("counterflow", search_paths=[str(SOURCE.parent)], docstring_parser="google")
    with caplog.at_level(logging.WARNING):
        for thing in _all_of(package):
            if thing.docstring is not None:
                _ = thing.docstring.parsed
    assert not caplog.text


def _all_of(thing):
    yield thing
    for member in thing.members.values():
        if not member.is_alias and member.path != "counterflow.engine.cpu":  # kernels have no annotations
            yield from _all_of(member)
