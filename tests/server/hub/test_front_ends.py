"""A server whose requests are answered by three processes: every figure, limit and split is as of one."""

import contextlib
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from live_server import DEADLINE_S, ENDLESS, LiveServer, poll, suspended

COUNT = 3
LIMIT = 60
CONFIG = """
api_processes = {count}
max_requests = 2
max_queue = 4
state_dir = "states"

[variants]
dense = "{dense}"
reduced = "{reduced}"

[aliases.split]
dense = 1
reduced = 0

[api_keys]
free = "free-of-all-limits"
bounded = {{ key = "bound-to-a-number", requests_per_minute = {limit} }}
"""
FREE = {"authorization": "Bearer free-of-all-limits"}
LENGTH = {"variant": "dense", "endpoint": "completions", "finish_reason": "length"}
BOUNDED = {"authorization": "Bearer bound-to-a-number"}


@pytest.fixture(scope="module")
def several(checkpoints, tmp_path_factory):
    directory = tmp_path_factory.mktemp("several")
    (directory / "lowkey.toml").write_text(CONFIG.format(count=COUNT, limit=LIMIT, **checkpoints))
    server = LiveServer(directory / "log", "--config", "lowkey.toml")
    server.http.headers.update(FREE)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def front_ends(server):
    """The processes that answer requests."""
    return [p for p in psutil.Process(server.process.pid).children() if "server.front_end" in p.cmdline()]


def answering(server, response):
    """The process that a response comes from, whose connection is still open."""
    port = response.extensions["network_stream"].get_extra_info("client_addr")[1]
    return next(
        p
        for p in front_ends(server)
        for connection in p.net_connections("tcp")
        if connection.raddr and connection.raddr.port == port
    )


def connected(server, headers=FREE):
    """A client with connections of its own."""
    return httpx.Client(base_url=server.url, timeout=DEADLINE_S, headers=headers)


def on_each(server, ask):
    """What `ask` gives for a client of each front end: whose connection is whose, chance says."""
    answers = {}
    while len(answers) < COUNT:
        with connected(server) as client:
            process = answering(server, client.get("/health")).pid
            if process not in answers:
                answers[process] = ask(client)
    return list(answers.values())


def complete(client, **fields):
    body = {"model": "dense", "prompt": "Once upon", "max_tokens": 3, "ignore_eos": True, **fields}
    return client.post("/v1/completions", json=body)


@contextlib.contextmanager
def stream(server, **fields):
    """A stream on a connection of its own: the process that it comes from, and its lines."""
    body = {"model": "dense", "prompt": "Hi", "stream": True, "ignore_eos": True, **fields}
    with connected(server) as client, client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        yield answering(server, response), (line for line in response.iter_lines() if line)


def test_all_answer_on_one_port_and_each_request_is_counted_once(several):
    before = several.sample("lowkey_requests_total", **LENGTH)
    tokens = several.sample("lowkey_generation_tokens_total", variant="dense")
    answers = on_each(several, complete)
    assert [answer.status_code for answer in answers] == [200] * COUNT
    seen = on_each(several, lambda client: client.get("/metrics").text)
    line = 'lowkey_requests_total{endpoint="completions",finish_reason="length",variant="dense"}'
    assert {float(text.split(line)[1].split("\n")[0]) for text in seen} == {before + COUNT}
    assert several.sample("lowkey_generation_tokens_total", variant="dense") == tokens + 3 * COUNT
    assert several.sample("lowkey_api_processes") == COUNT


def test_the_figures_of_the_window_are_those_of_all(several):
    before = several.http.get("/v1/ab/summary").json()["variants"]["dense"]["requests"]
    on_each(several, complete)
    summaries = on_each(several, lambda client: client.get("/v1/ab/summary").json())
    assert [s["variants"]["dense"]["requests"] for s in summaries] == [before + COUNT] * COUNT


def test_a_limit_is_one_for_all(several):
    began = time.monotonic()

    def ask(_):
        with connected(several, BOUNDED) as client:
            return client.post("/v1/completions", json={"model": "nobody", "prompt": "x"}).status_code

    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(ask, range(LIMIT + 30)))
    allowed, refused = statuses.count(404), statuses.count(429)
    assert allowed + refused == LIMIT + 30
    # One more is allowed for each second that this takes.
    assert LIMIT <= allowed <= LIMIT + time.monotonic() - began
    assert several.sample("lowkey_requests_rejected_total", variant="", reason="rate_limit") == refused


def test_a_queue_has_as_many_places_as_it_has(several):
    refused, threads = [], []

    def ask():
        with connected(several) as client:
            answer = complete(client)
            if answer.status_code == 503:
                refused.append(answer.json()["error"]["message"])

    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(stream(several, max_tokens=ENDLESS))
        threads = [threading.Thread(target=ask) for _ in range(7)]
        for thread in threads:
            thread.start()
        poll(lambda: len(refused) == 3, "two run, four wait, and three have no place")
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(refused) == 3 and all("has 6 requests in its queue" in message for message in refused)


def test_states_are_shared(several):
    saved = several.http.post("/v1/states", json={"model": "dense", "prompt": "Once upon a time"}).json()
    found = on_each(several, lambda client: client.get(f"/v1/states/{saved['id']}").json()["tokens"])
    assert found == [saved["tokens"]] * COUNT
    answers = on_each(several, lambda client: complete(client, state_id=saved["id"], temperature=0).json())
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1


def test_comparisons_alternate_over_all(several):
    def first(client):
        body = {"prompt": "Hi", "max_tokens": 1, "temperature": 0, "stream": True}
        event = client.post("/v1/compare", json=body).text.split("\n\n")[0]
        return json.loads(event.removeprefix("data: "))["variant"]

    order = on_each(several, first) + on_each(several, first)
    assert order in (["dense", "reduced"] * COUNT, ["reduced", "dense"] * COUNT)


def test_a_killed_front_end_loses_its_streams_only_and_comes_back(several):
    restarts = several.sample("lowkey_api_process_restarts_total")
    requests = several.sample("lowkey_requests_total", **LENGTH)
    with contextlib.ExitStack() as stack:
        victim, lost = stack.enter_context(stream(several, max_tokens=ENDLESS))
        next(lost)
        while True:
            with contextlib.ExitStack() as attempt:
                process, kept = attempt.enter_context(stream(several, max_tokens=3000))
                next(kept)
                if process.pid != victim.pid:
                    stack.push(attempt.pop_all())
                    break
        victim.kill()
        with pytest.raises(httpx.RemoteProtocolError):
            list(lost)
        assert list(kept)[-1] == "data: [DONE]"
    poll(lambda: several.sample("lowkey_api_processes") == COUNT, "it is back")
    assert len(front_ends(several)) == COUNT and victim.pid not in {p.pid for p in front_ends(several)}
    several.wait_idle()  # what the engine did for the lost stream is over
    assert several.sample("lowkey_api_process_restarts_total") == restarts + 1
    assert several.sample("lowkey_requests_total", **LENGTH) == requests + 1, (
        "nothing that was counted is lost"
    )
    assert [answer.status_code for answer in on_each(several, complete)] == [200] * COUNT


def test_a_new_split_reaches_all(several):
    def split(client):
        return complete(client, model="split").json()["lowkey"]["variant"]

    assert on_each(several, split) == ["dense"] * COUNT
    file = several.log.with_name("lowkey.toml")
    file.write_text(file.read_text().replace("dense = 1\nreduced = 0", "dense = 0\nreduced = 1"))
    several.process.send_signal(signal.SIGHUP)
    poll(lambda: "SIGHUP: read aliases" in several.log.read_text(), "it is read")
    poll(lambda: on_each(several, split) == ["reduced"] * COUNT, "all know")


def test_a_drain_waits_for_the_streams_of_all_and_answers_meanwhile(checkpoints, tmp_path):
    server = LiveServer(tmp_path / "log", f"dense={checkpoints['dense']}", "--api-processes", "2")
    try:
        server.wait_ready()
        with contextlib.ExitStack() as stack:
            with suspended(server.engines()["dense"]):  # the request does not end meanwhile
                _, lines = stack.enter_context(stream(server, max_tokens=200))
                server.process.send_signal(signal.SIGTERM)
                poll(lambda: "draining: 1 requests" in server.log.read_text(), "it drains")
                for _ in range(6):  # whichever of the two it reaches
                    with connected(server) as client:
                        refused = complete(client)
                        assert refused.status_code == 503 and "shutting down" in refused.text
                        assert client.get("/ready").status_code == 503
            assert list(lines)[-1] == "data: [DONE]"
        assert server.process.wait(DEADLINE_S) == 0
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop()


def test_front_ends_and_engines_end_with_a_hub_that_is_killed(checkpoints, tmp_path):
    server = LiveServer(tmp_path / "log", f"dense={checkpoints['dense']}", "--api-processes", "2")
    try:
        server.wait_ready()
        children = psutil.Process(server.process.pid).children()
        assert len(children) == 3
        server.process.kill()
        server.process.wait()
        psutil.wait_procs(children, DEADLINE_S)
        assert not any(child.is_running() for child in children)
    finally:
        server.stop()
