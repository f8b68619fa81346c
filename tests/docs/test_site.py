"""The pages of docs/ build to a site without a warning, which needs nothing from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from support import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml"]
        + ["--quiet", "-d", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    return folder


class Page(HTMLParser):
    """The links of a page, and the names that it can be linked by."""

    def __init__(self, file):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key == "id":
                self.names.add(value)
            elif key in ("href", "src") and value:
                self.links.append(value)


def broken(file, links, pages):
    """Those of a file's local links that lead nowhere."""
    for link in links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
        if not target.exists():
            yield link
        elif parts.fragment and target in pages and parts.fragment not in pages[target].names:
            yield link


def test_no_link_is_broken(site):
    pages = {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}
    assert len(pages) == 1 + len([*ROOT.glob("docs/*.md")])  # and the page of all models
    for file, page in pages.items():
        assert len(page.links) > 10 or file.name == "all-models.html"
        assert not [*broken(file, page.links, pages)], file.name


def test_no_link_of_the_readme_is_broken(site):
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 20
    pages = {f: Page(site / f.with_suffix(".html").name) for f in ROOT.glob("docs/*.md")}
    assert not [*broken(ROOT / "README.md", links, pages)]


@pytest.fixture(scope="module")
def address(site):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_in_a_browser(browser, address, site):
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.set_default_timeout(240_000)  # ms; a busy machine takes long
    requests, faults = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("response", lambda answer: answer.status < 400 or faults.append(answer.url))
    page.on("pageerror", lambda error: faults.append(error))

    page.goto(f"{address}/index.html")
    assert page.inner_text("h1").startswith("detbackbones")
    page.click("nav >> text=Training on your data")
    page.wait_for_url("**/training.html")
    assert page.locator("table").count() >= 3

    for file in sorted(Path(site).glob("*.html")):
        page.goto(f"{address}/{file.name}")
        pictures = page.locator("img").evaluate_all("all => all.map(i => i.naturalWidth)")
        assert all(pictures), file.name
        if file.name != "404.html":
            wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, file.name

    page.goto(f"{address}/all-models.html")
    page.fill("#search", "resnet18")
    assert "resnet18" in page.locator("tbody td").all_inner_texts()
    page.click("text=detbackbones")
    page.wait_for_url("**/index.html")

    assert not [fault for fault in faults if fault != f"{address}/favicon.ico"]
    assert all(url.startswith((address, "data:", "blob:")) for url in requests), requests
