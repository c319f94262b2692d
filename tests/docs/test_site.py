"""The built site: links and images, and pages in headless Chromium. Needs the extra `docs` and a Chromium."""

import functools
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import chromium
import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
OPENED = (
    "",
    "learn/substitution/",
    "reference/flows/",
    "tutorials/pymc/",
    "tutorials/vae/",
    "troubleshooting/",
    "zh/",
    "zh/learn/substitution/",
    "zh/tutorials/pymc/",
    "zh/glossary/",
)


class Page(HTMLParser):
    """Links, images, scripts and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if "src" in given or (tag == "link" and given.get("rel") in ("stylesheet", "icon")):
            self.loaded.append(given.get("src") or given["href"])


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory, worker_id):
    """The built site, one for all workers of the test run."""
    pytest.importorskip("mkdocs", reason="needs pip install 'counterflow[docs]'")
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "site"
    # --quiet would hide the warnings from --strict
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
            assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium.find() is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    opened = chromium.Chromium(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def target(page: Path, url: str, site: Path) -> Path:
    asked = unquote(urlsplit(url).path)
    folder = site if asked.startswith("/") else page.parent
    path = (folder / asked.lstrip("/")).resolve() if asked else page
    return path / "index.html" if path.is_dir() else path


def test_links_and_pictures_lead_somewhere(site, pages):
    broken = []
    for path, page in pages.items():
        for url in page.links + page.loaded:
            if urlsplit(url).scheme or url.startswith("//"):
                continue
            found, anchor = target(path, url, site), unquote(urlsplit(url).fragment)
            if not found.is_file() or (anchor and found in pages and anchor not in pages[found].anchors):
                broken.append(f"{path.relative_to(site)}: {url}")
    assert not broken


def test_the_pages_of_llms_txt_are_there_as_markdown(site):
    named = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text("utf-8"))
    assert named
    for name in named:
        assert (site / name).read_text("utf-8").startswith("# ")


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_links_of_the_readme_lead_to_pages_of_the_site(site, readme):
    linked = re.findall(r"\]\(docs/([\w/-]+)(\.zh)?\.md\)", (ROOT / readme).read_text("utf-8"))
    assert len(linked) > 10
    for path, chinese in linked:
        page = path.removesuffix("index").rstrip("/")
        assert (site / ("zh" if chinese else "") / page / "index.html").is_file()


def test_a_page_without_a_translation_says_so(site):
    for path, says in (("zh/reference/flows", True), ("zh/learn/iaf", False), ("reference/flows", False)):
        assert ("本页目前只有英文版" in (site / path / "index.html").read_text("utf-8")) == says


def test_nothing_is_loaded_from_elsewhere(site, pages):
    elsewhere = {url for page in pages.values() for url in page.loaded if urlsplit(url).netloc}
    assert not elsewhere, f"expected a site that is read without a network, got {elsewhere}"


@pytest.mark.parametrize("width", [1300, 390])
@pytest.mark.parametrize("path", OPENED)
def test_pages_open_without_errors(browser, address, path, width):
    browser.open(address + path, width)
    if "substitution" in path:
        browser.wait_for("document.querySelectorAll('mjx-container').length > 3")
    assert not browser.errors
    assert browser.evaluate("document.documentElement.scrollWidth") <= width, "expected no scrolling to the side"
    assert browser.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


@pytest.mark.parametrize(
    ("start", "query", "expected"),
    [
        ("", "inverse autoregressive flow", "/learn/iaf/"),
        ("", "forward substitution", "/learn/substitution/"),
        ("zh/", "逆自回归流", "/zh/learn/iaf/"),
        ("zh/", "前代法", "/zh/learn/substitution/"),
    ],
)
def test_search_finds(browser, address, start, query, expected):
    browser.open(address + start)
    browser.evaluate(
        f"""(() => {{
            document.querySelector("#__search").checked = true;
            const input = document.querySelector(".md-search__input");
            input.focus();
            input.value = {query!r};
            input.dispatchEvent(new Event("keyup", {{bubbles: true}}));
        }})()"""
    )
    browser.wait_for("document.querySelectorAll('.md-search-result__item').length > 0")
    found = browser.evaluate("[...document.querySelectorAll('.md-search-result__link')].map(link => link.pathname)")
    assert expected in found
    assert not browser.errors
