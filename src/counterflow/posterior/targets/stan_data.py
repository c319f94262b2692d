"""Check of a Stan program's data against its data block, which takes no compiler."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

COMMENTS = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
NAME = re.compile(r"([A-Za-z]\w*)\s*(\[[^\]]*\]\s*)?$")  # of a declaration; the brackets are those of old arrays


def check_data_names(code: str, given: Iterable[str]) -> None:
    """Raise ValueError if the data block of a program declares names that the data lack.

    Example:
        >>> check_data_names("data { int N; vector[N] y; } parameters { real mu; }", ["N"])
        Traceback (most recent call last):
        ValueError: expected data that fit the program, got N, without y, which its data block declares
    """
    names = list(given)
    missing = [name for name in declared_data(code) if name not in names]
    if missing:
        raise ValueError(
            f"expected data that fit the program, got {', '.join(names) or 'none'}, without {', '.join(missing)}, "
            "which its data block declares"
        )


def declared_data(code: str) -> Iterator[str]:
    """Yield the names that the data block of a program declares; none if it includes other files.

    Example:
        >>> list(declared_data("data { int<lower=0> J; array[J] real y; real s[J]; /* real z; */ } model { }"))
        ['J', 'y', 's']
    """
    text = COMMENTS.sub(" ", code)
    block = re.search(r"(?<!\w)data\s*\{([^}]*)\}", re.sub(r"transformed\s+data", "transformed_data", text))
    if block is None or "#include" in text:
        return
    for declaration in block[1].split(";"):
        found = NAME.search(declaration.partition("=")[0] if "<" not in declaration else declaration.strip())
        if found:
            yield found[1]
