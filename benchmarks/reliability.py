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
    blocks = PAGE.read_text().split("\n## ") if PAGE.exists() else [TITLE + "\n"]
    head, sections = blocks[0], {block.split("\n", 1)[0]: block.split("\n", 1)[1] for block in blocks[1:]}
    sections[title] = "\n" + "\n".join(lines).strip("\n") + "\n"
    PAGE.write_text(head + "".join(f"\n## {name}\n{sections[name]}" for name in sorted(sections)))


def machine() -> str:
    """What it ran on."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    )
