"""The page that several benchmarks write together: results/reliability.md, one section each."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

PAGE = Path(__file__).parent / "results" / "reliability.md"
TITLE = "# Reliability"


def write_section(title: str, lines: list[str]) -> None:
    """Put the lines under their title, in the place of those of an earlier run."""
    sections = _sections() | {title: "\n" + "\n".join(lines).strip("\n") + "\n"}
    PAGE.write_text(TITLE + "\n" + "".join(f"\n## {name}\n{sections[name]}" for name in sorted(sections)))


def section(title: str) -> list[str]:
    """The lines that an earlier run has put there, if any."""
    return _sections().get(title, "").splitlines()


def _sections() -> dict[str, str]:
    blocks = PAGE.read_text().split("\n## ")[1:] if PAGE.exists() else []
    return dict(block.split("\n", 1) for block in blocks)


def machine() -> str:
    """Describe the machine and the versions."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    )
