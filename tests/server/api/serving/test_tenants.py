"""Whose prompts' states a request may be answered from: those of its own key, and of its own salt."""

import itertools
import json

import pytest
from live_server import LiveServer

KEYS = {name: f"{name}-0123456789abcdef" for name in ("alice", "bob")}
JSON = {"content-type": "application/json"}
HITS = {"variant": "dense", "engine": "0"}
_starts = itertools.count()


@pytest.fixture(scope="module", params=["keys", "shared", "open"])
def tenants(request, arguments, tmp_path_factory):
    """A server with keys, one with keys that share, one without keys."""
    directory = tmp_path_factory.mktemp(request.param)
    environment = {"LOWKEY_STATE_DIR": str(directory / "states")}
    if request.param != "open":
        environment["LOWKEY_API_KEYS"] = ",".join(f"{name}={key}" for name, key in KEYS.items())
    if request.param == "shared":
        environment["LOWKEY_SHARED_PREFIX_CACHE"] = "true"
    server = LiveServer(directory / "log", *arguments, **environment)
    server.kind = request.param
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def post(server, name, path="/v1/completions", **fields):
    body = {"model": "dense", "max_tokens": 1, "ignore_eos": True, **fields}
    response = server.http.post(path, json=body, headers={"authorization": f"Bearer {KEYS[name]}"})
    assert response.status_code == 200, response.text
    return response.json()


def text():
    """200 tokens that no other text of these tests begins with."""
    return f"{next(_starts):04d}" + "x" * 196


def complete(server, name, prompt, **fields):
    return post(server, name, prompt=prompt, **fields)["usage"]["prompt_tokens_details"]["cached_tokens"]


def chat(server, name, prompt, **fields):
    messages = [{"role": "user", "content": prompt}]
    answer = post(server, name, "/v1/chat/completions", messages=messages, **fields)
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def compare(server, name, prompt, **fields):
    answer = post(server, name, "/v1/compare", prompt=prompt, **fields)
    return min(result["lowkey"]["cached_tokens"] for result in answer["results"])


def hits_of(server, action):
    before = server.sample("lowkey_prefix_cache_hits_total", **HITS)
    cached = action()
    return cached, server.sample("lowkey_prefix_cache_hits_total", **HITS) - before


@pytest.mark.parametrize("ask", [complete, chat, compare])
def test_another_key_is_told_of_no_hit_and_has_none(tenants, ask):
    prompt = text()
    assert hits_of(tenants, lambda: ask(tenants, "alice", prompt)) == (0, 0)
    cached, hits = hits_of(tenants, lambda: ask(tenants, "bob", prompt + "y"))
    assert (cached >= 128 and hits >= 128) if tenants.kind != "keys" else (cached, hits) == (0, 0)
    cached, hits = hits_of(tenants, lambda: ask(tenants, "alice", prompt + "y"))
    assert cached >= 128 and hits >= 128, "its own are there"


def save(server, name, prompt, **fields):
    return post(server, name, "/v1/states", prompt=prompt, **fields)["tokens"]


def test_the_state_of_a_prompt_is_made_without_another_keys_prefix(tenants):
    prompt = text()
    assert hits_of(tenants, lambda: save(tenants, "alice", prompt))[1] == 0
    _, hits = hits_of(tenants, lambda: save(tenants, "bob", prompt))
    assert (hits >= 128) if tenants.kind != "keys" else hits == 0
    assert hits_of(tenants, lambda: save(tenants, "alice", prompt))[1] >= 128


@pytest.mark.parametrize("ask", [complete, chat, compare])
def test_a_salt_of_ones_own_keeps_apart_and_is_no_other_keys(tenants, ask):
    prompt = text()
    assert ask(tenants, "alice", prompt, cache_salt="one") == 0
    assert ask(tenants, "alice", prompt + "y", cache_salt="one") >= 128
    assert ask(tenants, "alice", prompt + "y", cache_salt="two") == 0
    assert ask(tenants, "alice", prompt + "y") == 0
    if tenants.kind != "open":
        assert ask(tenants, "bob", prompt + "y", cache_salt="one") == 0


def test_a_state_has_a_salt_too(tenants):
    prompt = text()
    save(tenants, "alice", prompt, cache_salt="one")
    for salt, found in (("two", False), ("one", True)):
        hits = hits_of(tenants, lambda salt=salt: save(tenants, "alice", prompt, cache_salt=salt))[1]
        assert (hits >= 128) == found


@pytest.mark.parametrize("salt", ["", "x" * 257, 5, ["x"], "\ud800"])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/compare", {"prompt": "x"}),
        ("/v1/states", {"prompt": "x"}),
    ],
)
def test_what_is_no_salt_is_refused(server, path, fields, salt):
    body = {"model": "dense", "cache_salt": salt, **fields}
    response = server.http.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "cache_salt"
    assert server.http.post(path, json={**body, "cache_salt": None}).status_code in (200, 404)
