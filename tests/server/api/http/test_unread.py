"""Clients that don't read: the engine stops for them, what they hold is bounded, and in the end they are let go."""

import asyncio
import contextlib
import json
import random
import signal
import socket
from urllib.parse import urlsplit

import psutil
import pytest
from checkpoints import GATED
from engine_process import Harness, engine_config, generated, until
from engines import Bench, generate, prompt, run, tokens_of
from live_server import LiveServer, poll

from server.api.http.unread import LEAST_TAKEN, CountingTransport, UnreadWatch
from server.wire.exchange import (
    TOKEN_BYTES,
)
from server.wire.messages import Abort, Pause, Resume

CONFIG = {**GATED, "max_position_embeddings": 65536}
LONG = 20_000
"""Tokens of a choice that, with log-probabilities, no buffer holds."""
HELD = 50
"""Tokens without alternatives that may wait for a reader in these tests."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("m") / "c", CONFIG)


@pytest.fixture(scope="module")
def harness(bench, tmp_path_factory):
    harness = Harness(engine_config(bench.checkpoint.path), tmp_path_factory.mktemp("run"))
    harness.wait_until_up()
    yield harness
    harness.close()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_paused_request_waits_with_its_state_and_goes_on_where_it_was(bench, depth, at):
    engine = bench.engine(slots=3, depth=depth)
    paused, other = generate(prompt(70), 12), generate(prompt(9), 12)
    engine.handle(paused)
    engine.handle(other)
    outputs = [output for _ in range(at) if (output := engine.step()) is not None]
    engine.handle(Pause(request_id=paused.request_id))
    while not engine.blocked:
        output = engine.step()
        outputs += [] if output is None else [output]
    made = [token for output in outputs for token in output.tokens]
    assert sum(token.request_id == other.request_id for token in made) == 12
    assert sum(token.request_id == paused.request_id for token in made) <= max(at + depth, 1)
    assert engine.occupancy.running == engine.occupancy.used_slots == engine.occupancy.paused == 1
    assert not engine.idle and not engine.in_threads  # the process sleeps until a message comes
    outputs += run(engine, {0: [Resume(request_id=paused.request_id)]})
    tokens = tokens_of(outputs)
    for message in (paused, other):
        bench.check_tokens(message, tokens[message.request_id])
    assert engine.occupancy.paused == 0


def test_a_paused_request_can_be_aborted_and_unknown_ids_are_no_error(bench):
    engine = bench.engine(slots=1)
    message = generate(prompt(5), 50)
    engine.handle(message)
    engine.step()
    for each in (Pause, Pause, Abort, Resume, Pause, Resume):
        engine.handle(each(request_id=message.request_id))
    assert engine.occupancy.running == engine.occupancy.paused == engine.occupancy.used_slots == 0
    waiting = generate(prompt(5), 3)
    outputs = run(engine, {0: [waiting]})
    assert len(tokens_of(outputs)[waiting.request_id]) == 3


def test_an_engine_stops_for_a_reader_who_is_behind(harness, bench):
    message = generate(prompt(5), 2000)

    def made():
        harness.supervisor.catch_up()
        return sum(step.phase == "decode" for step in harness.steps)

    async def work():
        steps = generated(harness.client, message, most_unread=HELD * TOKEN_BYTES)
        async with contextlib.aclosing(steps):
            tokens = await anext(steps)
            await until(lambda: harness.occupancies[-1].paused == 1)
            before = made()
            other = await harness.tokens(generate(prompt(6), 50))
            # What the engine says of a step comes by another way than the step's answers.
            await until(lambda: made() >= before + 49)
            assert len(other) == 50 and made() == before + 49 < 2000
            async for more in steps:
                tokens += more
        return tokens

    tokens = harness.run(work())
    assert [t.finish_reason for t in tokens] == [None] * 1999 + ["length"]
    bench.check_tokens(message, [t.token_id for t in tokens])
    times = [t.at for t in tokens]
    assert times == sorted(times)


@pytest.mark.parametrize("held", [0, 3])
def test_readers_of_any_pace_get_every_token(harness, bench, held):
    """A pause that no resume follows would let one of them wait for ever."""
    paces = random.Random(held)

    async def read(message):
        tokens = []
        steps = generated(harness.client, message, most_unread=held * TOKEN_BYTES)
        async with contextlib.aclosing(steps):
            async for more in steps:
                tokens += more
                for _ in range(paces.choice([0, 0, 1, 5])):
                    await asyncio.sleep(paces.choice([0, 0.001]))
        return tokens

    async def work():
        return await asyncio.gather(*map(read, messages))

    messages = [generate(prompt(n), paces.choice([1, 2, 60])) for n in range(3, 23)]
    for message, tokens in zip(messages, harness.run(work()), strict=True):
        bench.check_tokens(message, [t.token_id for t in tokens])
        times = [t.at for t in tokens]
        assert times == sorted(times)
    assert not harness.client._requests


def test_a_request_is_off_the_engines_hands_when_its_last_token_is_sampled(harness):
    sampled = []

    async def work():
        steps = generated(harness.client, generate(prompt(5), 20), on_sampled=lambda: sampled.append(True))
        async with contextlib.aclosing(steps):
            await anext(steps)
            await until(lambda: bool(sampled))
            assert harness.client._requests
        left = generated(
            harness.client, generate(prompt(5), 60_000), on_sampled=lambda: sampled.append(False)
        )
        async with contextlib.aclosing(left):
            await anext(left)
            assert sampled == [True]
        assert sampled == [True, False]
        await until(lambda: harness.occupancies[-1].used_slots == 0)

    harness.run(work())


class Clock:
    """An event loop's clock and timers, moved by hand."""

    def __init__(self):
        self.now = 0.0
        self.timers = []

    def time(self):
        return self.now

    def call_later(self, delay, call):
        timer = Timer(self.now + delay, call)
        self.timers.append(timer)
        return timer

    def run_until(self, end):
        while due := [t for t in self.timers if t.at <= end]:
            timer = min(due, key=lambda t: t.at)
            self.timers.remove(timer)
            self.now = timer.at
            timer.call()
        self.now = end


class Timer:
    def __init__(self, at, call):
        self.at, self.call = at, call

    def cancel(self):
        self.call = lambda: None


class Pipe:
    """A transport whose reader takes bytes when it is told to."""

    def __init__(self):
        self.unread, self.aborted = 0, False

    def write(self, data):
        self.unread += len(data)

    def get_write_buffer_size(self):
        return self.unread

    def abort(self):
        self.aborted = True


@pytest.fixture
def watched(monkeypatch):
    clock, pipe = Clock(), Pipe()
    monkeypatch.setattr("server.api.http.unread.asyncio.get_running_loop", lambda: clock)
    counting = CountingTransport(pipe)
    return clock, pipe, counting, UnreadWatch(counting, 20.0)


def test_who_takes_nothing_loses_the_connection(watched):
    clock, pipe, counting, _ = watched
    clock.run_until(1000)
    assert not pipe.aborted, "nothing was there to be taken"
    counting.write(bytes(10**6))
    clock.run_until(1019)
    assert not pipe.aborted
    clock.run_until(1025)
    assert pipe.aborted and not clock.timers


def test_who_takes_a_byte_now_and_then_loses_it_too(watched):
    clock, pipe, counting, _ = watched
    counting.write(bytes(10**6))
    for second in range(26):
        clock.run_until(second)
        pipe.unread -= 10
    assert pipe.aborted


def test_who_is_slow_keeps_it(watched):
    clock, pipe, counting, watch = watched
    counting.write(bytes(10**6))
    for second in range(0, 19 * 60, 19):
        clock.run_until(second)
        pipe.unread -= LEAST_TAKEN
    assert not pipe.aborted
    # A stream, whose buffer is never empty because the server goes on writing.
    for second in range(1140, 3000, 10):
        clock.run_until(second)
        counting.write(bytes(LEAST_TAKEN))
        pipe.unread = 5000
    assert not pipe.aborted
    watch.stop()
    clock.run_until(10_000)
    assert not clock.timers


def open_stream(server, **fields):
    """A connection that has asked for a stream and reads nothing of it. Its window is small, so that little is on the
    way."""
    url = urlsplit(server.url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((url.hostname, url.port))
    body = json.dumps({"model": "dense", "prompt": "Once upon", "ignore_eos": True, **fields}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    if fields.get("stream"):
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    return connection


def gauge(server, name, variant="dense"):
    return server.sample(f"lowkey_requests_{name}", variant=variant, engine="0")


def test_a_stream_that_nobody_reads_is_decoded_no_further(server):
    connection = open_stream(server, stream=True, n=4, max_tokens=LONG, logprobs=20)
    poll(lambda: gauge(server, "paused") == gauge(server, "running") == 4, "all of it is paused")
    generated = server.sample("lowkey_generation_tokens_total", variant="dense")
    # The others are served, and this one has not moved when they have been.
    body = server.complete(max_tokens=50, seed=1)
    assert body["usage"]["completion_tokens"] == 50
    assert server.sample("lowkey_generation_tokens_total", variant="dense") == generated + 50
    connection.close()
    server.wait_idle()
    assert gauge(server, "paused") == 0


def test_a_reader_who_comes_back_gets_every_token(server):
    fields = {"max_tokens": 12_000, "logprobs": 20, "temperature": 0, "stream": True}
    connection = open_stream(server, **fields)
    poll(lambda: gauge(server, "paused") == 1, "it is paused")
    connection.settimeout(240)
    received = b""
    while b"data: [DONE]" not in received[-100:]:
        received += connection.recv(2**16)
    connection.close()
    lines = [line for line in received.split(b"\n") if line.startswith(b"data: {")]
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    tokens = [t for e in events for t in e["choices"][0]["logprobs"]["tokens"]]
    whole = server.complete(**{**fields, "stream": False})["choices"][0]
    assert tokens == whole["logprobs"]["tokens"] and len(tokens) == 12_000
    assert "".join(e["choices"][0]["text"] for e in events) == whole["text"]


@pytest.fixture(scope="module")
def impatient(checkpoints, tmp_path_factory):
    server = LiveServer(
        tmp_path_factory.mktemp("impatient") / "log",
        f"dense={checkpoints['dense']}",
        *("--max-requests", "3", "--max-queue", "3"),
        LOWKEY_WRITE_TIMEOUT_S="1",
    )
    yield server.wait_ready()
    server.stop()


def test_who_reads_nothing_for_long_is_let_go_with_all_that_it_held(impatient):
    connections = [open_stream(impatient, stream=True, n=3, max_tokens=LONG, logprobs=20) for _ in range(2)]
    ended = {"variant": "dense", "endpoint": "completions", "finish_reason": "abort"}
    poll(lambda: impatient.sample("lowkey_requests_total", **ended) == 6, "all six have ended")
    impatient.wait_idle()
    assert impatient.complete(max_tokens=5)["usage"]["completion_tokens"] == 5
    assert "more waited: its connection is closed" in impatient.log.read_text()
    for connection in connections:
        connection.close()


def test_a_whole_answer_that_nobody_takes_is_let_go(impatient):
    labels = {"variant": "dense", "endpoint": "completions", "finish_reason": "length"}
    before = impatient.sample("lowkey_requests_total", **labels)
    connection = open_stream(impatient, n=3, max_tokens=4000, logprobs=20)
    port = connection.getsockname()[1]

    def connected():
        found = psutil.Process(impatient.process.pid).net_connections("tcp")
        return any(c.raddr and c.raddr.port == port and c.status == "ESTABLISHED" for c in found)

    poll(lambda: impatient.sample("lowkey_requests_total", **labels) == before + 3, "it has been computed")
    poll(lambda: not connected(), "the connection is closed")
    connection.close()


@pytest.fixture(scope="module")
def roomy(checkpoints, tmp_path_factory):
    """A server that holds whole streams for their readers."""
    server = LiveServer(
        tmp_path_factory.mktemp("roomy") / "log",
        f"dense={checkpoints['dense']}",
        *("--max-requests", "3", "--max-queue", "0"),
        LOWKEY_STREAM_BUFFER_BYTES=str(2**30),
    )
    yield server.wait_ready()
    server.stop()


def test_places_are_free_once_the_last_token_is_sampled_and_a_drain_waits_for_the_reader(roomy):
    connection = open_stream(roomy, stream=True, n=3, max_tokens=4000, logprobs=20)
    begun = "lowkey_time_to_first_token_seconds_count"
    poll(lambda: roomy.sample(begun, variant="dense") == 3, "it has begun")
    roomy.wait_idle()
    taken = roomy.sample("lowkey_generation_tokens_total", variant="dense")
    assert taken < 3 * 4000, "nothing is left to be read"
    roomy.complete(n=3, max_tokens=2)  # all the places that there are
    roomy.process.send_signal(signal.SIGTERM)
    poll(lambda: roomy.http.get("/ready").status_code == 503, "it drains")
    connection.settimeout(240)
    received = b""
    while b"data: [DONE]" not in received[-100:]:
        piece = connection.recv(2**20)
        assert piece, "the stream was cut"
        received += piece
    connection.close()
    assert b'"finish_reason":"length"' in received and roomy.process.wait(240) == 0
