"""Server-sent events, and several streams as one."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.http.encoding import encoder

T = TypeVar("T")

_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""Ends of lines to clients that read a stream by `str.splitlines`, in JSON's other way to write them."""


def sse(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    text = encoder.encode(data)
    if not text.isascii():
        text = text.decode().translate(_LINE_ENDS).encode()
    return b"data: " + text + b"\n\n"


DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events; calls `on_end` once nothing more is sent, however that came about."""

    def __init__(self, events: AsyncGenerator[bytes], *, on_end: Callable[[], None]) -> None:
        # Proxies must pass tokens on at once.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # A reader who leaves while an event waits to be sent would leave the rest to the garbage collector.
            async with contextlib.aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def merged(sources: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """The items of all sources as they come, each with its source's index. A source waits until its last item has been
    taken. When one fails, or the reader leaves, all are closed."""
    if len(sources) == 1:
        async with contextlib.aclosing(sources[0]) as source:
            async for item in source:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(maxsize=1)

    async def pump(index: int, source: AsyncGenerator[T]) -> None:
        end: Exception | None = None
        try:
            async with contextlib.aclosing(source):
                async for item in source:
                    await queue.put((index, item))
        except Exception as e:
            end = e
        await queue.put(end)

    tasks = [asyncio.create_task(pump(index, source)) for index, source in enumerate(sources)]
    try:
        running = len(tasks)
        while running:
            entry = await queue.get()
            if isinstance(entry, Exception):
                raise entry
            if entry is None:
                running -= 1
            else:
                yield entry
    finally:
        await _end(tasks)


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all. When one fails, or the caller is cancelled, the others are cancelled and have ended."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
