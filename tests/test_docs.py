"""Runs the Python in README.md and docs/, each page from top to bottom in one namespace, and checks what pages promise.

A block that cannot run here says why on its fence: ```python no-run: needs MNIST

COUNTERFLOW_PICTURES=1 keeps the pictures that the pages in docs/learn and docs/tutorials make, in docs/images.
"""

import os
import re
import shutil
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

import counterflow as cf

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
TIERS = {  # of the pages that do not belong to the default tier
    "tools": ("interop", "tutorials/nuts.md", "tutorials/pymc.md", "tutorials/stan.md"),
    "system": ("tutorials/torchrun.md",),
    "docs": (  # they train for more than a few seconds
        "density.md",
        "distill.md",
        "first-steps.md",
        "howto/bounded-data.md",
        "howto/conditional-densities.md",
        "howto/k-hat.md",
        "learn/change-of-variables.md",
        "learn/made-vae-distillation.md",
        "learn/maf-or-iaf.md",
        "learn/variational-inference.md",
        "posterior.md",
        "tutorials/anomalies.md",
        "tutorials/slow-maf.md",
        "tutorials/vae.md",
    ),
}
ALL = [README, *sorted(DOCS.glob("**/*.md"))]  # symbolic links included
CHINESE = [ROOT / "README.zh-CN.md", *(page for page in ALL if page.name.endswith(".zh.md"))]
PAGES = [page for page in ALL if page not in CHINESE and not page.is_symlink()]

BLOCK = re.compile(r"^( *)```(?P<info>py[^\n]*)\n(?P<code>.*?)^\1```$", re.M | re.S | re.I)
PICTURE = re.compile(r"!\[[^\]]+\]\(\.\./images/((?:learn|tutorials)/[\w.-]+)\)")
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]*))?\)")


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


def english(page: Path) -> Path:
    """The page of which a Chinese one has the code."""
    return README if page.parent == ROOT else page.with_name(page.name.removesuffix(".zh.md") + ".md")


def tier(page: Path) -> tuple[pytest.MarkDecorator, ...]:
    """The marker of a page that does not belong to the default tier."""
    of_page = (name for name, paths in TIERS.items() if any(page.is_relative_to(DOCS / path) for path in paths))
    return tuple(getattr(pytest.mark, name) for name in of_page)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=tier(page)) for page in PAGES],
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
    for shown in map(Path, PICTURE.findall(page.read_text("utf-8"))):
        made = tmp_path / shown.name
        assert made.stat().st_size > 1000, f"expected the code of {page.name} to make {shown.name}"
        if os.environ.get("COUNTERFLOW_PICTURES"):
            shutil.copy(made, DOCS / "images" / shown)


def test_a_fence_that_would_be_skipped_in_silence_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n```python no-run: needs a GPU\ny = 2\n```\n  ```python\n  z = 3\n  ```\n")
    assert blocks(page) == [(1, "x = 1\n"), (7, "z = 3\n")]
    for fence in ("```py", "```Python", "```python no-run", "```python no-run: "):
        page.write_text(f"{fence}\nx = 1\n```\n")
        with pytest.raises(ValueError, match=r"page\.md:1: expected the fence"):
            blocks(page)


@pytest.mark.parametrize("page", CHINESE, ids=[str(page.relative_to(ROOT)) for page in CHINESE])
def test_chinese_pages_have_the_code_of_the_english_ones(page):
    def code(path: Path) -> list[str]:
        return [block["code"] for block in BLOCK.finditer(path.read_text("utf-8"))]

    assert code(page) == code(english(page))
    assert PICTURE.findall(page.read_text("utf-8")) == PICTURE.findall(english(page).read_text("utf-8"))


def test_every_learn_chapter_has_its_parts():
    for page in (DOCS / "learn").glob("*.md"):
        if page not in CHINESE:
            text = page.read_text("utf-8")
            for part in ("## Exercise", "<summary>Solution</summary>", "## What the usual statement gets wrong", "$$"):
                assert part in text, f"expected {part!r} in {page.name}"
            assert PICTURE.search(text), f"expected a picture made by the code in {page.name}"


def test_links_lead_to_files():
    broken = []
    for page in [*ALL, ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md"]:
        real = page.resolve()
        for path, _ in LINK.findall(real.read_text("utf-8")):
            if path and not (real.parent / path).exists():
                broken.append(f"{page.relative_to(ROOT)}: {path}")
    for path in re.findall(r"\]\((?![a-z]+:)([^)]+)\)", (DOCS / "llms.txt").read_text("utf-8")):
        if not (DOCS / path).exists():
            broken.append(f"llms.txt: {path}")
    assert not broken


def public_objects() -> dict[str, object]:
    """Everything that `cf.` and its public submodules show, by dotted name."""
    found = {}
    for name in cf.__all__:
        thing = getattr(cf, name)
        if not isinstance(thing, ModuleType):
            found[f"counterflow.{name}"] = thing
            continue
        own = [n for n, value in vars(thing).items() if getattr(value, "__module__", "") == thing.__name__]
        for inner in getattr(thing, "__all__", [n for n in own if not n.startswith("_")]):
            found[f"counterflow.{name}.{inner}"] = getattr(thing, inner)
    return found


def test_the_reference_has_every_public_name():
    text = "".join(page.read_text("utf-8") for page in (DOCS / "reference").glob("*.md"))
    listed = re.findall(r"^::: (counterflow[\w.]*)$", text, re.M)
    assert len(listed) == len(set(listed)), "expected each name once"
    public = public_objects()
    shown = [public[name] for name in listed if name in public]
    missing = [name for name, thing in public.items() if not any(thing is other for other in shown)]
    assert not missing, f"expected `::: NAME` in docs/reference for {sorted(missing)}"


def test_troubleshooting_quotes_messages_that_exist():
    """Quoted messages are those of the source, with ... for what varies."""
    source = "".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that are joined over lines
    source = re.sub(r"\{[^{}]*\}", "\0", source)
    quotes = re.findall(r"^## `(.+)`$", (DOCS / "troubleshooting.md").read_text("utf-8"), re.M)
    unknown = [quote for quote in quotes if not all(part.strip() in source for part in quote.split("..."))]
    assert quotes
    assert not unknown, f"no message of the source reads {unknown}"
