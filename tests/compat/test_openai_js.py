"""OpenAI's JavaScript SDK from npm, unmodified, on a page of another origin in a real Chromium."""

import http.server
import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from live_server import DEADLINE_S, LiveServer

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
)

NPM = Path(__file__).parents[2] / ".cache" / "compat-npm"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,  # needs what `make compat` installs
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed: apt-get install npm"),
]

KEY = "browser-0123456789abcdef"
PAGE = """<!doctype html><title>page</title><script type="module">
import OpenAI from "./openai.js";
window.client = (baseURL, apiKey) =>
  new OpenAI({ baseURL, apiKey, maxRetries: 0, dangerouslyAllowBrowser: true });
</script>"""

STREAM = """async ([url, key]) => {
  const stream = await client(url, key).completions.create(
    { model: "dense", prompt: "Once upon", max_tokens: 20, temperature: 0, stream: true,
      stream_options: { include_usage: true } });
  let text = "", usage;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.text ?? "";
    usage = chunk.usage ?? usage;
  }
  return { text, usage };
}"""

CHAT = """async ([url, key]) => {
  const { data, response } = await client(url, key).chat.completions.create(
    { model: "dense", messages: [{ role: "user", content: "Hello" }], max_tokens: 5 }).withResponse();
  return { count: data.usage.completion_tokens, state: response.headers.get("x-lowkey-state-bytes"),
           id: response.headers.get("x-request-id") };
}"""

FAIL = """async ([url, key, fields]) => {
  try {
    await client(url, key).completions.create(fields);
  } catch (e) {
    return { kind: e.constructor.name, status: e.status, param: e.param, message: e.message };
  }
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Address of a web server with a page that has loaded the SDK."""
    if not (NPM / ".installed").exists():
        pytest.fail("the clients are not installed; run `make compat`")
    directory = tmp_path_factory.mktemp("site")
    (directory / "index.html").write_text(PAGE)
    bundle = ["--bundle", "--format=esm", "--platform=browser", f"--outfile={directory / 'openai.js'}"]
    sdk = NPM / "node_modules" / "openai" / "index.mjs"
    subprocess.run([NPM / "node_modules" / ".bin" / "esbuild", sdk, *bundle], check=True, capture_output=True)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=directory)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield web.server_port
        web.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def guarded(checkpoints, site, tmp_path_factory):
    """A server that wants a key, takes few requests a minute of another, and lets one origin in."""
    directory = tmp_path_factory.mktemp("guarded")
    (directory / "lowkey.toml").write_text(
        f'cors_origins = ["http://127.0.0.1:{site}"]\n[api_keys]\nbrowser = "{KEY}"\n'
        f'[api_keys.slow]\nkey = "slow-{KEY}"\nrequests_per_minute = 1\n'
    )
    server = LiveServer(directory / "log", f"dense={checkpoints['dense']}", "--config", "lowkey.toml")
    try:
        yield server.wait_ready()
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def open_page(site):
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def open_it(host="127.0.0.1"):
            page = browser.new_page()
            page.set_default_timeout(1000 * DEADLINE_S)
            page.goto(f"http://{host}:{site}/")
            page.wait_for_function("() => window.client")
            return page

        yield open_it
        browser.close()


def test_a_page_of_another_origin_streams_a_completion(open_page, guarded):
    page = open_page()
    asked = []
    page.on("request", lambda r: asked.append(r.headers) if r.method == "POST" else None)
    streamed = page.evaluate(STREAM, [f"{guarded.url}/v1", KEY])
    assert any(name.startswith("x-stainless-") for name in asked[0])
    guarded.http.headers["authorization"] = f"Bearer {KEY}"
    whole = guarded.http.post(
        "/v1/completions", json={"model": "dense", "prompt": "Once upon", "max_tokens": 20, "temperature": 0}
    ).json()
    assert streamed["text"] == whole["choices"][0]["text"]
    assert streamed["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_a_page_can_read_our_headers(open_page, guarded):
    answer = open_page().evaluate(CHAT, [f"{guarded.url}/v1", KEY])
    assert 1 <= answer["count"] <= 5 and int(answer["state"]) > 0 and answer["id"]


def test_errors_are_the_sdks_own(open_page, guarded):
    page, url = open_page(), f"{guarded.url}/v1"
    fields = {"model": "dense", "prompt": "x", "max_tokens": 1}

    def failed(key, **more):
        return page.evaluate(FAIL, [url, key, {**fields, **more}])

    unknown = failed("wrong")
    assert (unknown["kind"], unknown["status"]) == ("AuthenticationError", 401)
    bad = failed(KEY, temperature=5)
    assert (bad["kind"], bad["status"], bad["param"]) == ("BadRequestError", 400, "temperature")
    assert failed(f"slow-{KEY}") is None, "its preflight was not the one request of a minute"
    assert failed(f"slow-{KEY}")["status"] == 429


def test_a_page_of_an_origin_that_is_not_configured_is_refused(open_page, guarded):
    page = open_page("localhost")
    fields = {"model": "dense", "prompt": "x"}
    answer = page.evaluate(FAIL, [f"{guarded.url}/v1", KEY, fields])
    assert answer["kind"] == "APIConnectionError", json.dumps(answer)
