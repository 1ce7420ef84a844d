"""Several streams as one: nothing is lost, and nothing goes on when one fails or the reader leaves."""

import asyncio
import gc
import json
from contextlib import aclosing

import pytest

from server.api.http.events import EventStream, sse
from server.api.http.tasks import merged, together


class Source:
    """Counts up, one number at each turn of the loop; knows whether it was closed."""

    def __init__(self, count, fail_at=None):
        self.closed = False
        self._count, self._fail_at = count, fail_at

    async def items(self):
        try:
            for i in range(self._count):
                if i == self._fail_at:
                    raise ValueError("broken")
                await asyncio.sleep(0)
                yield i
        finally:
            self.closed = True


async def collect(sources, leave_after=None):
    taken = []
    async with aclosing(merged([source.items() for source in sources])) as items:
        async for item in items:
            taken.append(item)
            if len(taken) == leave_after:
                break
    # At once, without waiting for the garbage collector or the loop.
    assert all(source.closed for source in sources)
    return taken


@pytest.mark.parametrize("counts", [[5], [3, 5], [0, 2, 9], [1] * 20])
def test_each_item_comes_once_and_in_order(counts):
    taken = asyncio.run(collect([Source(count) for count in counts]))
    for index, count in enumerate(counts):
        assert [item for i, item in taken if i == index] == list(range(count))
    assert len(taken) == sum(counts)


@pytest.mark.parametrize("others", [[], [1000], [1000, 1000]])
def test_leaving_closes_all(others):
    assert len(asyncio.run(collect([Source(1000), *map(Source, others)], leave_after=4))) == 4


@pytest.mark.parametrize("others", [[], [1000], [1000, 1]])
def test_the_failure_of_one_ends_all(others):
    sources = [Source(1000, fail_at=3), *map(Source, others)]

    async def work():
        with pytest.raises(ValueError, match="broken"):
            await collect(sources)
        assert all(source.closed for source in sources)

    asyncio.run(work())


def test_together_cancels_the_others():
    ended = []

    async def slow():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("slow")

    async def broken():
        await asyncio.sleep(0)
        raise ValueError("broken")

    async def quick(value):
        return value

    async def work():
        assert await together([quick(1), quick(2)]) == [1, 2]
        with pytest.raises(ValueError, match="broken"):
            await together([slow(), broken()])
        assert ended == ["slow"]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await together([slow()])
        assert ended == ["slow", "slow"]

    asyncio.run(work())


def test_an_event_is_compact_and_keeps_its_order():
    assert sse({"b": 1, "a": [None, True, 0.5], "text": 'a "b"\n'}) == (
        b'data: {"b":1,"a":[null,true,0.5],"text":"a \\"b\\"\\n"}\n\n'
    )


@pytest.mark.parametrize("text", ["é", "😀", "\x00\x0b\x0c\x1c", "a\x85b\u2028c\u2029d", "\u2027\u202a"])
def test_an_event_is_one_line_however_lines_are_told_apart(text):
    line, *rest = sse({"text": text}).decode().splitlines()
    assert rest == [""]
    assert json.loads(line.removeprefix("data: ")) == {"text": text}


def test_a_reader_who_leaves_while_an_event_waits_ends_the_stream_at_once():
    said = []

    async def events():
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            said.append("closed")

    async def work():
        stuck = asyncio.Event()

        async def receive():
            await stuck.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.body":
                stuck.set()
                await asyncio.Event().wait()

        stream = EventStream(events(), on_end=lambda: said.append("end"))
        await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)

    gc.disable()
    try:
        asyncio.run(asyncio.wait_for(work(), 60))
    finally:
        gc.enable()
    assert said == ["closed", "end"]
