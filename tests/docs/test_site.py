"""The built site: links and images, and pages in headless Chromium. Needs the extra `docs` and a Chromium."""

import functools
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPENED = (
    "",
    "learn/substitution/",
    "reference/flows/",
    "tutorials/pymc/",
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
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
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


@pytest.fixture
def opened(address, tmp_path):
    """Return (DOM after its scripts, messages of the console) of an address below the site's."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs Chromium: apt-get install chromium")

    def open_page(path: str) -> tuple[str, list[str]]:
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
        words += ["--enable-logging=stderr", "--virtual-time-budget=15000", address + path]
        ran = subprocess.run(words, capture_output=True, text=True, timeout=120)
        return ran.stdout, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]

    return open_page


def target(page: Path, url: str, site: Path) -> Path:
    path = (page.parent / unquote(urlsplit(url).path)).resolve() if urlsplit(url).path else page
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


def test_nothing_is_loaded_from_elsewhere(site, pages):
    elsewhere = {url for page in pages.values() for url in page.loaded if urlsplit(url).netloc}
    assert not elsewhere, f"expected a site that is read without a network, got {elsewhere}"


@pytest.mark.parametrize("path", OPENED)
def test_pages_open_without_errors(opened, path):
    dom, console = opened(path)
    assert not console
    assert "</html>" in dom
    if "substitution" in path:
        assert "mjx-container" in dom, "expected formulas set by MathJax"


@pytest.mark.parametrize(
    ("start", "query", "expected"),
    [
        ("", "inverse autoregressive flow", "learn/iaf/"),
        ("zh/", "逆自回归流", "learn/iaf/"),
        ("zh/", "前代法", "learn/substitution/"),
    ],
)
def test_search_finds(opened, start, query, expected):
    dom, console = opened(f"{start}?q={quote(query)}")
    results = [part.split('"')[0] for part in dom.partition("md-search-result__list")[2].split('href="')[1:]]
    assert any(expected in url for url in results), f"expected {expected} among the results, got {results[:10]}"
    assert not console
