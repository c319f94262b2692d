"""Hooks of MkDocs: links out of docs/, MathJax, links to other libraries, and the help of the commands."""

import ast
import posixpath
import re
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
INSIDE = {  # a path from the root of the repository -> where docs/ has it, as a link
    "benchmarks/results/": "results/",
    "docs/": "",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
OTHERS = {  # names in signatures -> their own documentation
    "torch.Tensor": "https://docs.pytorch.org/docs/stable/tensors.html",
    "torch.Size": "https://docs.pytorch.org/docs/stable/size.html",
    "torch.dtype": "https://docs.pytorch.org/docs/stable/tensor_attributes.html",
    "torch.device": "https://docs.pytorch.org/docs/stable/tensor_attributes.html",
    "torch.nn.Module": "https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html",
    "torch.distributions.Distribution": "https://docs.pytorch.org/docs/stable/distributions.html",
    "numpy.ndarray": "https://numpy.org/doc/stable/reference/generated/numpy.ndarray.html",
    "numpy.typing.NDArray": "https://numpy.org/doc/stable/reference/typing.html",
    "numpy.typing.ArrayLike": "https://numpy.org/doc/stable/reference/typing.html",
    "sklearn.base.BaseEstimator": "https://scikit-learn.org/stable/modules/generated/sklearn.base.BaseEstimator.html",
    "sklearn.base.DensityMixin": "https://scikit-learn.org/stable/modules/generated/sklearn.base.DensityMixin.html",
    "pathlib.Path": "https://docs.python.org/3/library/pathlib.html#pathlib.Path",
    "collections.abc.Sequence": "https://docs.python.org/3/library/collections.abc.html#collections.abc.Sequence",
    "collections.abc.Callable": "https://docs.python.org/3/library/collections.abc.html#collections.abc.Callable",
    "collections.abc.Mapping": "https://docs.python.org/3/library/collections.abc.html#collections.abc.Mapping",
}
HELP = re.compile(r"```console\n\$ (counterflow .*--help)\n```")
SEARCH = {"learn": {"boost": 4}, "results": {"exclude": True}}  # explanations first, tables of numbers never
EVERY_MESSAGE = "<!-- every message -->"
WIDTH = 90  # characters of a line of help, which is the width of the page
MIN_MESSAGE = 30  # characters; shorter ones hold nothing but what varies
AS_IT_IS = str.maketrans({mark: f"&#{ord(mark)};" for mark in "<*_[`$"})  # marks of Markdown and of formulas
ONLY_ENGLISH = "*本页目前只有英文版。*{ .only-english data-search-exclude }"
TITLE = re.compile(r"^# .*$", re.M)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s]+)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links that leave docs/ find the same file inside it, and fill in what is made here.

    Links in the repository must work too. A page without a translation says so.
    """
    source = (ROOT / "docs" / page.file.src_uri).resolve().relative_to(ROOT).parent.as_posix()
    here = posixpath.dirname(page.file.src_uri)
    page.meta.setdefault("search", SEARCH.get(here.partition("/")[0], {}))

    def inside(link: re.Match[str]) -> str:
        path, hash_sign, anchor = link[1].partition("#")
        from_root = posixpath.normpath(posixpath.join(source, path))
        for outside, there in INSIDE.items():
            if path and from_root.startswith(outside):
                return posixpath.relpath(there + from_root.removeprefix(outside), here or ".") + hash_sign + anchor
        return link[1]

    if page.file.locale_alternate_of != page.file.locale:  # the page of another language stands in
        markdown = TITLE.sub(lambda title: f"{title[0]}\n\n{ONLY_ENGLISH}\n", markdown, count=1)
    markdown = LINK.sub(inside, markdown).replace(EVERY_MESSAGE, every_message() if EVERY_MESSAGE in markdown else "")
    return HELP.sub(lambda command: f"```text\n$ {command[1]}\n\n{help_of(command[1])}\n```", markdown)


@cache
def help_of(command: str) -> str:
    """Return the help that a command prints."""
    words = [sys.executable, "-m", *command.split()]
    lines = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip().splitlines()
    return "\n".join(textwrap.fill(line, WIDTH) if len(line) > WIDTH else line for line in lines)


@cache
def every_message() -> str:
    """List the messages of all errors that the source raises, by module, with ... for what varies."""
    source = ROOT / "src"
    lines = []
    for path in sorted(source.rglob("*.py")):
        raised = (node.exc for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Raise))
        texts = {text_of(call.args[0]) for call in raised if isinstance(call, ast.Call) and call.args}
        messages = sorted(text for text in texts if len(text) >= MIN_MESSAGE)
        if messages:
            module = ".".join(path.relative_to(source).with_suffix("").parts)
            lines += [f"**{module}**", "", *(f"* {text.translate(AS_IT_IS)}" for text in messages), ""]
    return "\n".join(lines)


def text_of(expression: ast.expr) -> str:
    """Return the text of a string in the source, with ... for what varies in it; "" for anything else."""
    parts = expression.values if isinstance(expression, ast.JoinedStr) else [expression]
    texts = [str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts]
    return " ".join("".join(texts).split())


def on_env(env: Any, config: Any, **_: Any) -> Any:
    """Link the types of other libraries in signatures to the documentation of those libraries."""
    for name, url in OTHERS.items():
        config.plugins["autorefs"].register_url(name, url)
    return env


def on_post_page(output: str, **_: Any) -> str:
    """Drop the links to a page in other languages from its head: the theme looks for a sitemap beside each of them."""
    return re.sub(r'\s*<link rel="alternate" [^>]*hreflang="[^"]*">', "", output)


def on_post_build(config: Any, **_: Any) -> None:
    """Copy MathJax and its fonts from the package that brings them, and the pages that llms.txt names, as Markdown."""
    mathjax = Path(str(files("mathjax"))) / "static" / "mathjax" / "es5"
    site = Path(config.site_dir) / "assets" / "mathjax"
    fonts = Path("output", "chtml", "fonts", "woff-v2")
    shutil.copytree(mathjax / fonts, site / fonts, dirs_exist_ok=True)
    shutil.copy(mathjax / "tex-chtml.js", site)
    docs = ROOT / "docs"
    for name in LINK.findall((docs / "llms.txt").read_text("utf-8")):
        page = Path(config.site_dir, name)
        page.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(docs / name, page)
