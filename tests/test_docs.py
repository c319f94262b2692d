"""Runs the Python in README.md and docs/, each page from top to bottom in one namespace.

A block that cannot run here says why on its fence: ```python no-run: needs MNIST
"""

import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [page for page in (README, *sorted((ROOT / "docs").glob("**/*.md"))) if page.exists()]

BLOCK = re.compile(r"^( *)```(?P<info>py[^\n]*)\n(?P<code>.*?)^\1```$", re.M | re.S | re.I)


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line, code) of every block to run.

    Raises ValueError for a fence that means Python but is neither `python` nor `python no-run: why`.
    """
    text = page.read_text("utf-8")
    to_run = []
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("code"))
        info = block["info"].strip()
        if info == "python":
            to_run.append((line, textwrap.dedent(block["code"])))
        elif not re.fullmatch(r"python no-run: \S.*", info):
            raise ValueError(
                f"{page.name}:{line}: expected the fence ```python, or ```python no-run: and the reason; got ```{info}"
            )
    return to_run


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.tools if page.parent.name == "interop" else ()) for page in PAGES],
    ids=[str(page.relative_to(ROOT)) for page in PAGES],
)
def test_page_runs(page, tmp_path, monkeypatch):
    to_run = blocks(page)
    assert to_run or page != README, "expected Python to run in README.md, got none"
    namespace = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", namespace)  # where a dataclass looks for its module
    monkeypatch.chdir(tmp_path)
    for line, code in to_run:
        exec(compile("\n" * line + code, page, "exec"), vars(namespace))  # a traceback names the page's line


def test_a_fence_that_would_be_skipped_in_silence_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n```python no-run: needs a GPU\ny = 2\n```\n  ```python\n  z = 3\n  ```\n")
    assert blocks(page) == [(1, "x = 1\n"), (7, "z = 3\n")]
    for fence in ("```py", "```Python", "```python no-run", "```python no-run: "):
        page.write_text(f"{fence}\nx = 1\n```\n")
        with pytest.raises(ValueError, match=r"page\.md:1: expected the fence"):
            blocks(page)
