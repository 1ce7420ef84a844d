"""What clients see when queues are full, engines die, and the server is told to stop or is killed."""

import asyncio
import contextlib
import fcntl
import json
import shutil
import signal
import threading
import time

import httpx
import psutil
import pytest
from checkpoints import GATED, random_tensors, write_checkpoint
from live_server import DEADLINE_S, ENDLESS, LiveServer, poll, suspended, withheld

from server.hub.engines import RuntimeDir

DENSE = {"variant": "dense", "engine": "0"}
BODY = {"model": "dense", "prompt": "Hi", "max_tokens": ENDLESS, "ignore_eos": True}


@pytest.fixture(scope="module")
def small(checkpoints, tmp_path_factory):
    """Room for one request, and one that waits; its dense checkpoint is a copy, so that a test may withhold it. The
    last test of those that use it stops it."""
    directory = tmp_path_factory.mktemp("small")
    shutil.copytree(checkpoints["dense"], directory / "dense")
    arguments = ["dense=dense", f"reduced={checkpoints['reduced']}"]
    server = LiveServer(directory / "log", *arguments, "--max-requests", "1", "--max-queue", "1")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@contextlib.contextmanager
def stream(server, **fields):
    """A streamed completion: an iterator over the data of its events."""
    with (
        httpx.Client(base_url=server.url, timeout=DEADLINE_S) as client,
        client.stream("POST", "/v1/completions", json={**BODY, "stream": True, **fields}) as response,
    ):
        assert response.status_code == 200
        yield (line.removeprefix("data: ") for line in response.iter_lines() if line)


class InBackground:
    """A request in a thread."""

    def __init__(self, server, **fields):
        self.response = None
        self._fields = {**BODY, **fields}
        self._url = server.url
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        self.response = httpx.post(f"{self._url}/v1/completions", json=self._fields, timeout=DEADLINE_S)

    def join(self):
        self._thread.join(DEADLINE_S)
        assert self.response is not None
        return self.response


def refused(response, *mentions):
    assert response.status_code == 503, response.text
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert error["code"] == 503 and error["type"] == "service_unavailable" and error["param"] is None
    for mention in mentions:
        assert mention in error["message"]


def test_a_full_queue_is_a_503(small):
    with stream(small) as running:
        next(running)
        waiting = InBackground(small, max_tokens=3)
        poll(lambda: small.sample("lowkey_requests_waiting", **DENSE) == 1, "one waits")
        for fields in ({}, {"stream": True}):
            refused(small.http.post("/v1/completions", json={**BODY, **fields}), "dense", "queue")
        refused(small.http.post("/v1/compare", json={"prompt": "x"}), "dense")
        rejected = {"variant": "dense", "reason": "queue_full"}
        assert small.sample("lowkey_requests_rejected_total", **rejected) == 3
        # The other variant has a queue of its own.
        assert small.complete(model="reduced", max_tokens=2)["usage"]["completion_tokens"] == 2
    assert waiting.join().json()["usage"]["completion_tokens"] == 3
    small.wait_idle()
    assert small.complete(max_tokens=2)["usage"]["completion_tokens"] == 2


def test_a_killed_engine_costs_its_variant_only_and_comes_back(small):
    with withheld(small.log.parent / "dense" / "config.json"):  # it is down as long as we look
        _kill_and_look_around(small)
    poll(lambda: small.http.get("/ready", params={"variant": "dense"}).status_code == 200, "it is back")
    assert small.complete(max_tokens=4)["usage"]["completion_tokens"] == 4
    assert small.sample("lowkey_engine_up", **DENSE) == 1
    assert small.sample("lowkey_engine_restarts_total", **DENSE) == 1


def _kill_and_look_around(small):
    waiting = InBackground(small)
    poll(lambda: small.sample("lowkey_state_slots", **DENSE, state="used") == 1, "it runs")
    with stream(small) as events:
        poll(lambda: small.sample("lowkey_requests_waiting", **DENSE) == 1, "the stream waits")
        small.engines()["dense"].kill()
        refused(waiting.join(), "dense")
        *_, error, done = events
        assert done == "[DONE]"
        error = json.loads(error)["error"]
        assert error["code"] == 503 and "dense" in error["message"]
    assert small.http.get("/health").status_code == 200
    refused(small.http.post("/v1/completions", json=BODY), "dense", "down")
    refused(small.http.post("/v1/compare", json={"prompt": "x"}), "dense")
    refused(small.http.get("/ready", params={"variant": "dense"}), "dense")
    assert small.http.get("/ready").status_code == 200
    assert small.http.get("/ready", params={"variant": "reduced"}).status_code == 200
    assert small.http.get("/v1/models/dense").json()["lowkey"]["status"] == "down"
    assert small.complete(model="reduced", max_tokens=2)["usage"]["completion_tokens"] == 2
    samples = small.samples()

    def sample(name, **labels):
        return samples.get((name, frozenset(labels.items())))

    assert sample("lowkey_engine_up", **DENSE) == 0
    assert sample("lowkey_engine_up", variant="reduced", engine="0") == 1
    assert sample("lowkey_engine_restarts_total", **DENSE) == 1
    assert sample("lowkey_state_slots", **DENSE, state="used") == 0
    assert sample("lowkey_requests_waiting", **DENSE) == 0
    ended = {"variant": "dense", "endpoint": "completions"}
    assert sample("lowkey_requests_total", **ended, finish_reason="error") == 2
    assert sample("lowkey_requests_rejected_total", variant="dense", reason="engine_down") == 2


def test_a_stream_that_runs_when_its_engine_dies_ends_in_an_error(small):
    with stream(small, model="reduced") as events:
        first = json.loads(next(events))
        assert first["choices"][0]["finish_reason"] is None
        small.engines()["reduced"].kill()
        *rest, error, done = events
    assert done == "[DONE]" and json.loads(error)["error"]["code"] == 503
    assert all(json.loads(e)["choices"][0]["finish_reason"] is None for e in rest)
    poll(lambda: small.http.get("/ready", params={"variant": "reduced"}).status_code == 200, "it is back")


def test_sigterm_lets_the_running_requests_end(small):
    engines = small.engines()
    assert len(engines) == 2
    keep_alive = httpx.Client(base_url=small.url, timeout=DEADLINE_S)
    assert keep_alive.get("/ready").status_code == 200
    with contextlib.ExitStack() as stack:
        with suspended(engines["dense"]):  # the request does not end meanwhile
            options = {"stream_options": {"include_usage": True}}
            events = stack.enter_context(stream(small, max_tokens=300, **options))
            small.process.send_signal(signal.SIGTERM)
            poll(lambda: keep_alive.get("/ready").status_code == 503, "it refuses new work")
        with pytest.raises(httpx.TransportError):
            poll(lambda: httpx.get(f"{small.url}/health", timeout=DEADLINE_S) is None, "it no longer listens")
        *_, usage, done = events
    assert done == "[DONE]"
    assert json.loads(usage)["usage"]["completion_tokens"] == 300
    assert small.process.wait(DEADLINE_S) == 0
    for engine in engines.values():
        poll(lambda engine=engine: not engine.is_running(), "the engine has ended")
    assert "Traceback" not in small.log.read_text()
    keep_alive.close()


def test_sigterm_does_not_wait_for_an_endless_request(arguments, tmp_path):
    server = LiveServer(tmp_path / "log", arguments[0], LOWKEY_DRAIN_S="1")
    try:
        server.wait_ready()
        with stream(server) as events:
            next(events)
            sent = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            *_, error, last = events
            assert '"code":503' in error.replace(" ", "") and last == "[DONE]"
        assert server.process.wait(DEADLINE_S) == 0
        assert time.monotonic() - sent >= 0.9
    finally:
        server.stop()


def test_engines_end_when_the_server_is_killed(arguments, tmp_path):
    server = LiveServer(tmp_path / "log", arguments[0])
    runtime_dir = tmp_path / "unknown"
    try:
        server.wait_ready()
        (engine,) = server.engines().values()
        runtime_dir = server.runtime_dir()
        with stream(server) as events:
            next(events)
            server.process.kill()
            server.process.wait()
            poll(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, "it has ended")
            with contextlib.suppress(httpx.TransportError):
                list(events)
    finally:
        server.stop()
        # Nobody was left to remove its sockets.
        shutil.rmtree(runtime_dir, ignore_errors=True)


def test_a_server_whose_checkpoint_cannot_be_loaded_ends_with_1(tmp_path):
    path = write_checkpoint(tmp_path / "bad", GATED)
    (path / "config.json").write_text(json.dumps({**GATED, "hidden_size": 72}))
    with contextlib.ExitStack() as stack:
        with withheld(path / "config.json"):
            server = LiveServer(tmp_path / "log", f"bad={path}")
            stack.callback(server.stop)
            response = server.http.get("/ready")
            assert response.status_code == 503 and "still loading: bad" in response.json()["error"]["message"]
            refused(server.http.post("/v1/completions", json={**BODY, "model": "bad"}), "still loading")
            assert server.http.get("/v1/models/bad").json()["lowkey"] == {"status": "loading"}
        assert server.process.wait(DEADLINE_S) == 1
    log = server.log.read_text()
    assert "cannot load" in log
    last = log.splitlines()[-1]
    assert "variant 'bad' could not be loaded" in last and "shape" in last, "the reason is what is seen"
    assert "Traceback" not in log


def test_a_burst_gets_the_places_that_there_are(arguments, tmp_path):
    """Eight streams at once where two fit: places are taken when a request is let in, not when it starts. The engine is
    held until the others have been refused, so that none of them finds a place that has become free."""
    server = LiveServer(tmp_path / "log", arguments[0], "--max-requests", "1", "--max-queue", "1")
    try:
        server.wait_ready()

        async def burst():
            async with httpx.AsyncClient(base_url=server.url, timeout=DEADLINE_S) as client:
                body = {**BODY, "max_tokens": 200, "stream": True}
                asked = asyncio.as_completed([client.post("/v1/completions", json=body) for _ in range(8)])
                with suspended(server.engines()["dense"]):
                    first = [await next(asked) for _ in range(6)]
                return first, [await answer for answer in asked]

        first, last = asyncio.run(burst())
        assert [r.status_code for r in first] == [503] * 6 and [r.status_code for r in last] == [200, 200]
        server.wait_idle()
        assert server.complete(max_tokens=2)["usage"]["completion_tokens"] == 2
    finally:
        server.stop()


def test_a_draining_server_says_so_until_its_last_request_ends(arguments, tmp_path):
    server = LiveServer(tmp_path / "log", arguments[0])
    try:
        server.wait_ready()
        with contextlib.ExitStack() as stack:
            with suspended(server.engines()["dense"]):  # the request does not end meanwhile
                events = stack.enter_context(stream(server, max_tokens=200))
                server.process.send_signal(signal.SIGTERM)
                poll(lambda: server.http.get("/ready").status_code == 503, "it is not ready any more")
                refused(server.http.post("/v1/completions", json=BODY), "shutting down")
                assert server.http.get("/health").status_code == 200
            *_, done = events
            assert done == "[DONE]"
        assert server.process.wait(DEADLINE_S) == 0
    finally:
        server.stop()


def test_requests_are_taken_until_the_load_balancer_has_noticed(arguments, tmp_path):
    server = LiveServer(tmp_path / "log", arguments[0], LOWKEY_DRAIN_DELAY_S=str(DEADLINE_S))
    try:
        server.wait_ready()
        short = {**BODY, "max_tokens": 2}
        assert "connection" not in server.http.post("/v1/completions", json=short).headers
        server.process.send_signal(signal.SIGTERM)
        poll(lambda: httpx.get(f"{server.url}/ready").status_code == 503, "it is not ready any more")
        answer = server.http.post("/v1/completions", json=short)
        assert answer.status_code == 200, answer.text
        assert answer.headers["connection"] == "close", "the next request goes elsewhere"
        server.process.send_signal(signal.SIGTERM)  # we need not wait so long
        assert server.process.wait(DEADLINE_S) == 0
    finally:
        server.stop()


def test_a_model_that_gives_nan_is_an_error_and_not_a_text(tmp_path):
    tensors = random_tensors(GATED)
    tensors["model.norm.weight"][3] = float("nan")
    path = write_checkpoint(tmp_path / "broken", GATED, tensors)
    server = LiveServer(tmp_path / "log", f"broken={path}")
    try:
        server.wait_ready()
        body = {**BODY, "model": "broken", "max_tokens": 4}
        response = server.http.post("/v1/completions", json=body)
        assert response.status_code == 500 and "NaN" in response.json()["error"]["message"]
        with stream(server, model="broken", max_tokens=4) as events:
            error, done = events
            assert "NaN" in json.loads(error)["error"]["message"] and done == "[DONE]"
        sample = server.sample(
            "lowkey_requests_total", variant="broken", endpoint="completions", finish_reason="error"
        )
        assert sample == 2
        server.wait_idle()
    finally:
        server.stop()


def test_a_second_signal_ends_a_drain_and_the_next_server_sweeps_up_after_a_killed_one(arguments, tmp_path):
    killed = LiveServer(tmp_path / "killed", arguments[0])
    left_behind = killed.wait_ready().runtime_dir()
    assert left_behind.exists()
    killed.process.kill()
    killed.process.wait()
    server = LiveServer(tmp_path / "log", arguments[0])
    try:
        server.wait_ready()
        assert not left_behind.exists() and server.runtime_dir().exists()
        with stream(server) as events:
            next(events)
            server.process.send_signal(signal.SIGINT)
            poll(lambda: "draining: 1 requests" in server.log.read_text(), "it says that it drains")
            server.process.send_signal(signal.SIGINT)
            *_, error, done = events
            assert json.loads(error)["error"]["code"] == 503 and done == "[DONE]"
        assert server.process.wait(DEADLINE_S) == 0
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop()


def test_two_servers_that_start_at_once_leave_each_other_alone(monkeypatch):
    flock = fcntl.flock
    made = []

    def late(file, operation):
        if not operation & fcntl.LOCK_NB and not made:
            made.append(None)
            made.append(RuntimeDir())
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    made[:1] = [RuntimeDir()]
    assert len(made) == 2
    for directory in made:
        assert [path.name for path in directory.path.iterdir()] == ["lock"]
        directory.remove()
