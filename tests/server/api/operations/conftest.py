"""A server that wants a key, and its page in a browser."""

import shutil

import pytest
from live_server import LiveServer


@pytest.fixture(scope="module")
def lab(checkpoints, tmp_path_factory):
    """A server that wants a key; its reduced checkpoint is a copy, so that a test may take it away, and its states are
    narrower, too."""
    from compare_page import KEY

    directory = tmp_path_factory.mktemp("ui")
    reduced = shutil.copytree(checkpoints["reduced"], directory / "reduced")
    config = directory / "lowkey.toml"
    config.write_text(
        f'[variants]\ndense = "{checkpoints["dense"]}"\n'
        f'[variants.reduced]\nsource = "{reduced}"\nstate_dtype = "bfloat16"\n'
    )
    server = LiveServer(directory / "log", "--config", str(config), LOWKEY_API_KEYS=f"browser={KEY}")
    server.http.headers["authorization"] = f"Bearer {KEY}"
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def browser():
    from browser import launched

    with launched() as found:
        yield found


@pytest.fixture
def open_page(browser, lab):
    """Opens the page; at the end nothing may have gone wrong in it, and nothing been asked of another host."""
    from browser import Pages
    from compare_page import KEY
    from playwright.sync_api import expect

    pages = Pages(browser, lab.url)

    def open_it(tab="", *, key=KEY, **options):
        page = pages.open(tab, key=key, **options)
        if key:
            expect(page.locator("#fleet li")).to_have_count(2)
        return page

    yield open_it
    pages.close()
    assert not pages.wrong
