"""Keys, rate limits, time-outs and the log of a server that has keys; aliases and SIGHUP on the same server."""

import contextlib
import json
import signal
import socket
import time
import urllib.parse
from types import SimpleNamespace

import httpx
import openai
import pytest
from live_server import DEADLINE_S, ENDLESS, LiveServer, poll, suspended

from server.api.http.auth import capped_priority
from server.hub.limits import Bucket

KEYS = {name: f"{name}-0123456789abcdef" for name in ("alice", "bob", "few", "slow")}
PROMPT = "Abracadabra"
BODY = {"model": "dense", "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "ignore_eos": True}
HEADER_S, TOTAL_S = 3, 6

CONFIG = """
log_format = "json"
state_dir = "states"
cors_origins = ["https://lab.example"]

[api_keys]
alice = "{alice}"
bob = "{bob}"

[api_keys.slow]
key = "{slow}"
requests_per_minute = 2

[api_keys.few]
key = "{few}"
tokens_per_minute = 10

[aliases.gdn]
dense = {dense}
reduced = {reduced}

[sticky]
by = ["user", "header"]
"""


def config(dense=0.5, reduced=0.5):
    return CONFIG.format(**KEYS, dense=dense, reduced=reduced)


@pytest.fixture(scope="module")
def guarded(arguments, tmp_path_factory):
    directory = tmp_path_factory.mktemp("guarded")
    (directory / "lowkey.toml").write_text(config())
    server = LiveServer(directory / "log", *arguments, "--config", "lowkey.toml")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def impatient(arguments, tmp_path_factory):
    """For the tests of time limits alone: others would meet them on a busy machine."""
    limits = {"HEADER_TIMEOUT": HEADER_S, "BODY_TIMEOUT": 1.5, "REQUEST_TIMEOUT": TOTAL_S}
    environment = {f"LOWKEY_{name}_S": str(seconds) for name, seconds in limits.items()}
    server = LiveServer(tmp_path_factory.mktemp("impatient") / "log", arguments[0], **environment)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def auth(name):
    return {"authorization": f"Bearer {KEYS[name]}"}


def post(server, name="alice", path="/v1/completions", headers=None, **fields):
    return server.http.post(path, json={**BODY, **fields}, headers={**auth(name), **(headers or {})})


def error(response, status):
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert body["code"] == status and response.headers["x-request-id"]
    return body


def request_lines(server):
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["logger"] == "lowkey.request"]


def test_only_what_is_public_needs_no_key(guarded):
    for path in ("/", "/health", "/ready", "/metrics"):
        assert guarded.http.get(path).status_code == 200, path
    for path in (
        "/docs",
        "/openapi.json",
        "/v1/models",
        "/v1/models/dense",
        "/version",
        "/no/such/path",
        "/health/",
    ):
        assert error(guarded.http.get(path), 401)["type"] == "authentication_error", path
        assert guarded.http.get(path, headers=auth("bob")).status_code != 401, path
    for path in ("/v1/completions", "/v1/compare"):
        response = guarded.http.post(path, content=b"not even JSON")
        error(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer wrong", "Basic {key}", "{key}", "Bearer {key}x", "Bearer \xff"],
)
def test_what_is_no_key(guarded, header):
    headers = {"authorization": header.format(key=KEYS["alice"]).encode("latin-1")}
    error(guarded.http.get("/v1/models", headers=headers), 401)


def raw(server, data):
    url = urllib.parse.urlsplit(server.url)
    connection = socket.create_connection((url.hostname, url.port), timeout=DEADLINE_S)
    connection.sendall(data)
    return connection


def test_an_empty_bearer_is_no_key_and_needs_none_where_none_is_set(server, guarded):
    # Clients send it when they have no key; httpx would not.
    for header in ("", "Bearer ", "Bearer none"):
        request = f"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: {header}\r\n\r\n".encode()
        for where, status in ((server, b"HTTP/1.1 200 "), (guarded, b"HTTP/1.1 401 ")):
            with raw(where, request) as connection:
                assert connection.recv(100).startswith(status)


def test_the_openai_client_sees_its_own_exceptions(guarded):
    def client(key):
        return openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0, timeout=DEADLINE_S)

    fields = {"model": "dense", "prompt": PROMPT, "max_tokens": 1}
    assert client(KEYS["alice"]).completions.create(**fields).model == "dense"
    with pytest.raises(openai.AuthenticationError, match="not known"):
        client("wrong").completions.create(**fields)
    for _ in range(2):
        post(guarded, "slow", max_tokens=1)
    with pytest.raises(openai.RateLimitError, match="try again in"):
        client(KEYS["slow"]).completions.create(**fields)


def test_too_many_requests_of_one_key_are_refused_and_counted(guarded):
    labels = {"variant": "", "reason": "rate_limit"}
    before = guarded.sample("lowkey_requests_rejected_total", **labels)
    responses = [post(guarded, "slow", max_tokens=1) for _ in range(4)]
    refused = [r for r in responses if r.status_code != 200]
    assert len(refused) >= 2
    for response in refused:
        assert error(response, 429)["type"] == "rate_limit_error"
        assert 1 <= int(response.headers["retry-after"]) <= 31
    assert guarded.sample("lowkey_requests_rejected_total", **labels) == before + len(refused)
    assert post(guarded, "bob").status_code == 200
    assert guarded.http.get("/v1/models", headers=auth("slow")).status_code == 200


def test_too_many_tokens_are_paid_off_by_waiting(guarded):
    assert post(guarded, "few", max_tokens=20).status_code == 200  # 31 tokens: known afterwards only
    response = post(guarded, "few", max_tokens=1)
    error(response, 429)
    assert 100 < int(response.headers["retry-after"]) < 140


def test_one_line_for_each_request_without_keys_or_text(guarded):
    ids = ["mine-1", "mine-2", "mine-3"]
    answer = post(guarded, "bob", headers={"x-request-id": ids[0]}).json()
    refused = post(guarded, "bob", model="nobody's", headers={"x-request-id": ids[1]})
    guarded.http.get("/nothing/%0aforged", headers={"x-request-id": ids[2]})

    def lines():
        found = [line for line in request_lines(guarded) if line["id"] in ids]
        return found if len(found) >= 3 else None

    served, unknown, odd = poll(lines, "three lines")
    assert served["id"] == "mine-1" and served["status"] == 200 and served["level"] == "info"
    assert (
        served["message"] == "POST /v1/completions"
        and served["key"] == "bob"
        and served["variant"] == "dense"
    )
    assert (served["prompt_tokens"], served["completion_tokens"]) == (len(PROMPT), 3)
    assert 0 < served["ttft_s"] <= served["seconds"] and served["finish_reason"] == "length"
    assert unknown["status"] == 404 == refused.status_code and "variant" not in unknown
    assert odd["message"] == "GET -" and odd["status"] == 401
    text = guarded.log.read_text()
    assert not any(key in text for key in KEYS.values())
    assert PROMPT not in text and answer["choices"][0]["text"] not in text and "forged" not in text


def test_every_line_of_the_log_is_json_those_of_the_engines_too(guarded):
    lines = [json.loads(line) for line in guarded.log.read_text().splitlines()]
    assert {"lowkey.engine", "uvicorn.error"} <= {line["logger"] for line in lines}


def test_a_prompt_counts_once_however_many_choices_it_has(guarded):
    answer = post(guarded, n=3, temperature=1, headers={"x-request-id": "three"}).json()
    lines = poll(lambda: [x for x in request_lines(guarded) if x["id"] == "three"], "its line")
    counts = lines[0]["prompt_tokens"], lines[0]["completion_tokens"]
    assert (
        counts == (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (len(PROMPT), 9)
    )


def test_a_saved_state_belongs_to_its_key(guarded):
    body = {"model": "dense", "prompt": PROMPT}
    saved = guarded.http.post("/v1/states", json=body, headers=auth("alice"))
    assert saved.status_code == 200, saved.text
    path = f"/v1/states/{saved.json()['id']}"
    assert guarded.http.get(path, headers=auth("alice")).status_code == 200
    error(guarded.http.get(path, headers=auth("bob")), 404)
    error(post(guarded, "bob", state_id=saved.json()["id"]), 404)
    error(guarded.http.delete(path, headers=auth("bob")), 404)
    assert guarded.http.delete(path, headers=auth("alice")).status_code == 200


@pytest.mark.parametrize(
    ("cap", "asked", "given"), [(0, -5, 0), (0, 0, 0), (0, 7, 7), (-2, -5, -2), (3, 0, 3)]
)
def test_a_priority_is_no_more_urgent_than_the_key_allows(cap, asked, given):
    request = SimpleNamespace(scope={"lowkey.client": SimpleNamespace(max_priority=cap)})
    assert capped_priority(request, asked) == given


def test_a_bucket_fills_at_its_rate_and_no_higher(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("server.hub.limits.time.monotonic", lambda: now[0])
    bucket = Bucket(60)
    bucket.take(60)
    assert bucket.wait_s() == pytest.approx(1)
    now[0] = 0.5
    assert bucket.wait_s() == pytest.approx(0.5)
    bucket.take(30)
    assert bucket.wait_s() == pytest.approx(30.5)
    now[0] = 1000.0
    assert bucket.wait_s() == 0
    bucket.take(60)
    assert bucket.wait_s() == pytest.approx(1), "an hour's rest is worth no more than a minute's"


def test_headers_that_take_too_long_end_the_connection(impatient):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
    start = time.monotonic()
    with raw(impatient, b"") as silent, raw(impatient, head) as slow:
        assert silent.recv(100) == b"" and slow.recv(100) == b""
    assert time.monotonic() - start > 0.9 * HEADER_S


def test_a_body_that_takes_too_long_is_a_408(impatient):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with raw(impatient, head + b"content-length: 10\r\n\r\n{") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_keep_alive_connection_may_idle(impatient):
    with httpx.Client(base_url=impatient.url, timeout=DEADLINE_S) as client:
        first = client.get("/health")
        time.sleep(HEADER_S + 1)
        stream = first.extensions["network_stream"].get_extra_info("client_addr")
        again = client.get("/health")
        assert again.extensions["network_stream"].get_extra_info("client_addr") == stream


def test_a_request_that_takes_too_long_is_ended(impatient):
    endless = {"max_tokens": ENDLESS, "n": 8}
    response = post(impatient, **endless)
    assert f"took longer than {TOTAL_S} s" in error(response, 504)["message"]
    response = post(impatient, **endless, stream=True)
    *_, last, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == 504
    impatient.wait_idle()


def test_cors_is_off_unless_an_origin_is_set(server, guarded):
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    ours = {"origin": "https://lab.example"}
    allowed = guarded.http.options("/v1/completions", headers={**asks, **ours})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://lab.example"
    refused = guarded.http.post("/v1/completions", json=BODY, headers=ours)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://lab.example", (
        "else no page could read why"
    )
    other = guarded.http.options("/v1/completions", headers={**asks, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in server.http.get("/v1/models", headers=ours).headers
    assert server.http.options("/v1/completions", headers={**asks, **ours}).status_code == 405


def test_an_alias_is_answered_by_one_of_its_variants_and_sticks(guarded):
    def variant(**how):
        answer = post(guarded, model="gdn", max_tokens=1, **how).json()
        assert answer["model"] == answer["lowkey"]["variant"]
        return answer["model"]

    users = [variant(user=f"u{i}") for i in range(12)]
    assert set(users) == {"dense", "reduced"} and users == [variant(user=f"u{i}") for i in range(12)]
    # A header stands in for the user where there is none; they are dealt apart.
    by_header = [variant(headers={"x-lowkey-user": f"u{i}"}) for i in range(12)]
    assert by_header == [variant(headers={"x-lowkey-user": f"u{i}"}) for i in range(12)] != users
    assert users == [variant(user=f"u{i}", headers={"x-lowkey-user": "u0"}) for i in range(12)]
    assert {variant() for _ in range(20)} == {"dense", "reduced"}


def test_aliases_are_listed(guarded):
    listed = guarded.http.get("/v1/models", headers=auth("bob")).json()["data"]
    assert [m["id"] for m in listed] == ["dense", "reduced", "gdn"]
    assert listed[2]["lowkey"] == {"alias": {"dense": 0.5, "reduced": 0.5}}
    assert guarded.http.get("/v1/models/gdn", headers=auth("bob")).json() == listed[2]
    message = error(post(guarded, model="gpt-4"), 404)["message"]
    assert "dense, reduced, gdn" in message
    # A comparison is between variants; an alias is none.
    body = {"prompt": "x", "variants": ["dense", "gdn"]}
    response = guarded.http.post("/v1/compare", json=body, headers=auth("bob"))
    assert error(response, 404)["param"] == "variants"


SDK_HEADERS = (
    "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-package-version,"
    "x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout"
)
"""What OpenAI's JavaScript SDK sends, as a browser asks for it."""


def test_a_page_may_send_whatever_headers_its_client_sends(guarded):
    ours = {"origin": "https://lab.example"}
    for method, headers in (("POST", SDK_HEADERS), ("GET", "x-next-year"), ("DELETE", "authorization")):
        asks = {"access-control-request-method": method, "access-control-request-headers": headers}
        allowed = guarded.http.options("/v1/completions", headers={**asks, **ours})
        assert allowed.status_code == 200, allowed.text
        assert allowed.headers["access-control-allow-headers"] == headers
        assert method in allowed.headers["access-control-allow-methods"]
        other = guarded.http.options("/v1/completions", headers={**asks, "origin": "https://evil.example"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


def test_preflights_need_no_key_and_are_not_counted(guarded):
    asks = {
        "origin": "https://lab.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": SDK_HEADERS,
    }
    labels = {"variant": "", "reason": "rate_limit"}
    before = guarded.sample("lowkey_requests_rejected_total", **labels)
    # Twenty times what this key may ask for in a minute.
    for header in (auth("slow"), {}):
        for _ in range(20):
            assert guarded.http.options("/v1/completions", headers={**asks, **header}).status_code == 200
    assert guarded.sample("lowkey_requests_rejected_total", **labels) == before
    exposed = guarded.http.get("/health", headers={"origin": "https://lab.example"}).headers
    for name in ("x-request-id", "retry-after", "x-lowkey-state-bytes", "x-lowkey-tokens-per-second"):
        assert name in exposed["access-control-expose-headers"]


def hang_up(server, text, says):
    (server.log.parent / "lowkey.toml").write_text(text)
    already = len(server.log.read_text())
    server.process.send_signal(signal.SIGHUP)
    poll(lambda: says in server.log.read_text()[already:], f"the log says {says!r}")
    return server.log.read_text()[already:]


def test_sighup_takes_over_new_weights_without_dropping_a_request(guarded):
    def variants():
        return {post(guarded, model="gdn", max_tokens=1, user=f"u{i}").json()["model"] for i in range(12)}

    fields = {**BODY, "max_tokens": 150, "stream": True, "stream_options": {"include_usage": True}}
    with contextlib.ExitStack() as stack:
        with suspended(guarded.engines()["dense"]):  # the request does not end meanwhile
            streaming = guarded.http.stream("POST", "/v1/completions", json=fields, headers=auth("bob"))
            response = stack.enter_context(streaming)
            hang_up(guarded, config(dense=0, reduced=1), "SIGHUP: read aliases")
        *_, usage, done = (line for line in response.iter_lines() if line)
    assert done == "data: [DONE]"
    assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 150
    assert variants() == {"reduced"}
    for bad in (config(dense=-1), config() + "[aliases.more]\nnobody = 1\n", "port = "):
        assert "lowkey.toml" in hang_up(guarded, bad, "the old configuration stays") or "aliases" in bad
        assert variants() == {"reduced"}
    more = "max_queue = 3\n" + config(dense=1, reduced=0) + '[variants]\nthird = "org/x"\n'
    text = hang_up(guarded, more, "at the start only")
    assert "max_queue, variants" in text
    assert variants() == {"dense"}
