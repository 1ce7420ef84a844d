"""The documentation as a site: built without a broken link, with all that the pages say, and fetching nothing."""

import difflib
import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
OUTSIDE = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "demo" / "README.md",
    ROOT / "benchmarks" / "ladder" / "README.md",
]
"""Pages that are not part of the site and link to each other and to those that are."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
GITHUB = MarkdownIt("commonmark").enable("table")


def build(folder):
    return subprocess.run(
        [Path(sys.executable).with_name("zensical"), "build", "--strict"],
        cwd=folder,
        env={"NO_COLOR": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


def sources(folder):
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "zensical.toml", folder)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site. That it is built at all says that no link between pages is broken."""
    folder = sources(tmp_path_factory.mktemp("site"))
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.mark.parametrize("link", ["none.md", "api.md#none", "#none"])
def test_a_broken_link_breaks_the_build(tmp_path, link):
    page = sources(tmp_path) / "docs" / "ray.md"
    page.write_text(page.read_text() + f"\nA [link]({link}).\n")
    done = build(tmp_path)
    assert done.returncode != 0 and "does not exist" in done.stdout + done.stderr


def test_each_page_is_in_the_navigation():
    def pages(nav):
        for entry in nav:
            for target in entry.values():
                yield from pages(target) if isinstance(target, list) else [target]

    config = tomllib.loads((ROOT / "zensical.toml").read_text())
    assert sorted(pages(config["project"]["nav"])) == PAGES


class Parts(HTMLParser):
    """Pieces of a page's text, each with how many lists it is in; anchors of headings; what it links to and loads."""

    BLOCKS = frozenset(
        {"p", "li", "ul", "ol", "h1", "h2", "h3", "h4", "table", "tr", "th", "td", "pre", "blockquote"}
    )

    def __init__(self, html):
        super().__init__()
        self.pieces, self.anchors, self.links, self.loads = [], [], [], []
        self._lists, self._text, self._of_the_site = 0, "", False
        self.feed(html)
        self._end_piece()

    def _end_piece(self):
        text = " ".join(self._text.split())
        if text:
            self.pieces.append(f"{self._lists} {text}")
        self._text = ""

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag in self.BLOCKS:
            self._end_piece()
        self._lists += tag in ("ul", "ol")
        if re.fullmatch("h[1-6]", tag):
            self.anchors.append(found.get("id"))
        self._of_the_site = found.get("class") == "headerlink"
        if tag == "a" and "href" in found and not self._of_the_site:
            self.links.append(found["href"])
        elif tag in ("script", "img", "iframe", "source"):
            self.loads += filter(None, (found.get("src"), found.get("srcset")))
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(found["href"])

    def handle_endtag(self, tag):
        if tag in self.BLOCKS:
            self._end_piece()
        self._lists -= tag in ("ul", "ol")
        self._of_the_site = False

    def handle_data(self, data):
        if not self._of_the_site:  # the mark beside a heading that links to it
            self._text += data


def article(site, name):
    html = (site / name).with_suffix(".html").read_text()
    return Parts(html[html.index("<article") : html.index("</article>")])


def github_anchors(text):
    """Anchors that GitHub gives the headings of a page, for links to them."""
    anchors = []
    for token, inside in zip(tokens := GITHUB.parse(text), tokens[1:], strict=False):
        if token.type == "heading_open":
            words = "".join(part.content for part in inside.children)
            anchors.append(re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-"))
    assert len(set(anchors)) == len(anchors), "GitHub would number the second of two equal headings"
    return anchors


def test_each_alert_links_to_what_to_do(site):
    alerts = (ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text()
    linked = re.findall(r'runbook_url: "\{\{ \$externalLabels\.runbooks \}\}#(\w+)"', alerts)
    anchors = article(site, "operations.md").anchors
    assert len(linked) == alerts.count("- alert:") and set(linked) <= set(anchors)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_on_the_site_what_it_says_on_github(site, name):
    """The site's Markdown is another one than CommonMark: it knows other lists, code in lists, and fences."""
    text = (ROOT / "docs" / name).read_text()
    there, here = Parts(GITHUB.render(text)), article(site, name)
    differences = list(difflib.unified_diff(there.pieces, here.pieces, "GitHub", "site", lineterm="", n=0))
    assert not differences, "\n".join(differences)
    assert here.anchors == github_anchors(text)


def test_the_site_loads_and_links_to_nothing_that_is_not_there(site):
    pages = sorted(site.glob("*.html"))
    assert len(pages) == len(PAGES) + 1, "and the one of what is not found"
    for page in pages:
        parts = Parts(page.read_text())
        for target in parts.loads:
            assert not urlsplit(target).scheme and not target.startswith("//"), (page.name, target)
        if page.name == "404.html":
            continue  # a server shows it at any address, and so its links are from the root
        for target in (*parts.loads, *parts.links):
            url = urlsplit(target)
            if not url.scheme:
                assert not url.path or (page.parent / unquote(url.path)).exists(), (page.name, target)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import", sheet.read_text()), sheet.name


@pytest.mark.parametrize("page", OUTSIDE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_pages_that_are_not_on_the_site(page):
    parts = Parts(GITHUB.render(page.read_text()))
    for target in (*parts.links, *parts.loads):
        url = urlsplit(target)
        if url.scheme:
            continue
        file = (page.parent / unquote(url.path)).resolve() if url.path else page
        assert file.exists(), target
        if url.fragment:
            assert url.fragment in github_anchors(file.read_text()), target


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_site_is_read_and_searched_from_a_disk(site, scheme):
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
    )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
        page.set_default_timeout(240_000)
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else wrong.append(r.url),
        )
        for name in PAGES:
            page.goto((site / name).with_suffix(".html").as_uri())
            assert page.evaluate("() => document.documentElement.scrollWidth") <= 360, name
        colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", colour)[:3])) > 128) == (scheme == "light")
        page.goto((site / "index.html").as_uri())
        page.locator("label.md-header__button[for=__search]").click()
        page.get_by_role("combobox").or_(page.get_by_role("textbox")).first.fill("batch-invariant")
        page.locator("a").filter(has_text="Scheduling").first.click()
        page.wait_for_url("**/serving.html*#scheduling")
        browser.close()
    assert not wrong
