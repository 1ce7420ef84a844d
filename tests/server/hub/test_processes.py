"""The life of front ends' processes, with processes that are not front ends in their place."""

import asyncio
import contextlib
import sys

import pytest
from engine_process import START_S, until

from server.hub import front_ends
from server.hub.front_ends import FrontEnds
from server.hub.hub import Hub
from server.listening import listen_together
from server.settings import Settings
from server.wire.hub import BeginShadow
from server.wire.link import Join, _encode

JOINS = """
import sys, json, time, zmq
start = json.loads(sys.stdin.readline())
socket = zmq.Context().socket(zmq.DEALER)
socket.setsockopt(zmq.IDENTITY, start["name"].encode())
socket.connect(start["hub_address"])
socket.send(bytes.fromhex(sys.argv[1]))
"""
IDLE = "import time\ntime.sleep(1000)\n"


@pytest.fixture
def made(monkeypatch):
    """Makes front ends whose processes run a script; what they are started with counts the starts."""

    @contextlib.asynccontextmanager
    async def making(script, count=1, **settings):
        started = []
        spawn = asyncio.create_subprocess_exec

        async def instead(*_, **options):
            started.append(None)
            if script is None:
                raise BlockingIOError("Resource temporarily unavailable")
            return await spawn(sys.executable, "-c", script, _encode(Join()).hex(), **options)

        monkeypatch.setattr(front_ends.asyncio, "create_subprocess_exec", instead)
        hub = Hub(Settings(variants={"a": "x/a"}, **settings), print)
        listening = listen_together("127.0.0.1", 0, count)
        own = FrontEnds(hub, listening)
        own.start()
        try:
            yield hub, own, started
        finally:
            await own.stop(hurry=lambda: True)
            for one in (one for sockets in listening for one in sockets):
                one.close()
            hub._runtime_dir.remove()

    return making


def run(work):
    asyncio.run(asyncio.wait_for(work(), START_S))


def test_one_that_can_not_be_started_is_tried_again(made, monkeypatch, caplog):
    monkeypatch.setattr(front_ends, "RESTART_S", 0.01)

    async def work():
        async with made(None) as (_, own, started):
            await until(lambda: len(started) >= 3)
            assert not own.complete

    run(work)
    assert "can't be started" in caplog.text and "temporarily unavailable" in caplog.text


def test_one_that_hangs_is_killed_and_started_again(made, monkeypatch, caplog):
    monkeypatch.setattr(front_ends, "RESTART_S", 0.01)

    async def work():
        async with made(JOINS + IDLE, hang_s=2.0) as (hub, own, started):
            await until(lambda: own.complete, START_S)
            assert "api_processes 1.0" in (await metrics(hub))
            await until(lambda: len(started) == 2, START_S)
            await until(lambda: own.complete, START_S)
            assert "restarts_total 1.0" in (await metrics(hub))

    run(work)
    assert "no sign of life for 2 s" in caplog.text and "pid" in caplog.text


async def metrics(hub):
    return "\n".join(
        f"{sample.name.removeprefix('lowkey_').replace('process_', '')} {sample.value}"
        for metric in hub.metrics.registry.collect()
        for sample in metric.samples
    )


def test_one_that_has_not_come_yet_is_not_waited_for_when_all_is_over(made):
    async def work():
        async with made(IDLE, count=2) as (_, own, started):
            await until(lambda: len(started) == 2, START_S)
            await own.stop(hurry=lambda: False)
            assert all(task.done() for task in own._tasks) and len(started) == 2

    run(work)


def test_one_that_does_not_end_is_killed_when_there_is_hurry(made):
    hurry = []

    async def work():
        async with made(JOINS + IDLE) as (_, own, _started):
            await until(lambda: own.complete, START_S)
            stopping = asyncio.create_task(own.stop(hurry=lambda: bool(hurry)))
            await asyncio.sleep(0.2)
            assert not stopping.done(), "it has work to finish"
            hurry.append(None)
            await stopping

    run(work)


def test_what_comes_of_one_that_is_gone_is_nobodys(made):
    async def work():
        async with made(JOINS + IDLE) as (hub, own, _):
            await until(lambda: own.complete, START_S)
            hub.engines["a"].process.up = True
            assert await own._ask("7", BeginShadow(variants=["a"])) is None
            own._join("7", print)
            assert own.complete and list(hub._front_ends) == list(own._living)
            assert await own._ask(next(iter(own._living)), BeginShadow(variants=["a"]))

    run(work)
