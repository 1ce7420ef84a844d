"""The page in a real Chromium, watched for what may never happen in it."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

from live_server import DEADLINE_S
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE_MS = 1000 * DEADLINE_S
expect.set_options(timeout=PATIENCE_MS)


@contextlib.contextmanager
def launched() -> Iterator[Browser]:
    """A browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Pages:
    """Pages of one server.

    Args:
        url: the server's.
    """

    def __init__(self, browser: Browser, url: str) -> None:
        self._browser = browser
        self._url = url
        self._contexts: list[Any] = []
        self.wrong: list[str] = []
        """Errors of scripts, what the content security policy forbade, and requests to other hosts."""

    def open(self, tab: str, *, width: int = 1280, height: int = 900, key: str = "", **options: Any) -> Page:
        """The page with one of its tabs open. `key` is given to the dialog that asks for one."""
        context = self._browser.new_context(viewport={"width": width, "height": height}, **options)
        self._contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on(
            "console", lambda m: self.wrong.append(m.text) if "Content Security Policy" in m.text else None
        )
        page.on("request", lambda r: None if r.url.startswith(self._url) else self.wrong.append(r.url))
        page.goto(f"{self._url}/#{tab}")
        if key:
            page.get_by_label("Key", exact=True).fill(key)
            page.get_by_role("button", name="Use key").click()
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()
