"""Server-sent events."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.http.encoding import encoder
from server.api.http.tasks import Stepping

_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""Characters that `str.splitlines` takes for the end of a line, and how JSON writes them otherwise: some clients read
streams that way."""


def json_line(value: Any) -> bytes:
    """JSON in which nothing is taken for the end of a line."""
    text = encoder.encode(value)
    return text if text.isascii() else text.decode().translate(_LINE_ENDS).encode()


def sse(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json_line(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """An answer of server-sent events. Calls `on_end` once nothing more is sent, however that came about."""

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


CONNECTION = "lowkey.connection"
"""Where an ASGI scope has the `Connection` of a server that has one."""


class Connection(Protocol):
    """What a server gives to an answer that may write its body at once. ASGI's `send` goes through all that stands
    around a request, and needs a task to be woken; for one token that is most of the work."""

    on_writable: Callable[[], None] | None
    """Called when the connection takes more again."""

    write_paused: bool
    """Whether the client is behind, so that nothing more should be written."""

    def write_body(self, data: bytes) -> None:
        """Write a piece of a body of unknown length, whose headers have been sent. Nothing if the client is gone."""


class Source(Protocol):
    """What makes events."""

    ended: bool
    """Whether there is nothing more to take."""

    def begin(self, wake: Callable[[], None]) -> None:
        """Begin; `wake` is called each time that there is something to take."""

    def take(self) -> bytes:
        """The events of all that has come since the last call, possibly none."""

    def close(self) -> None:
        """Take nothing more."""


async def pushed(source: Source, connection: Connection | None) -> AsyncGenerator[bytes]:
    """Begin the source and see it to its end. What comes while the client is behind waits, and is taken at once.

    Args:
        connection: what all events are written to as they come, when all that was yielded before has been sent; None to
            have them yielded instead.
    """
    try:
        if connection is None:
            woken = asyncio.Event()
            source.begin(woken.set)
            while True:
                if data := source.take():
                    yield data
                if source.ended:
                    return
                await woken.wait()
                woken.clear()

        def write() -> bool:
            if not connection.write_paused and (data := source.take()):
                connection.write_body(data)
            return source.ended

        writing = Stepping(write)
        connection.on_writable = writing.step
        source.begin(writing.step)
        writing.step()
        await writing.ended
    finally:
        source.close()
        if connection is not None:
            connection.on_writable = None
