"""Server-sent events."""

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.http.encoding import encoder

_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""Characters that `str.splitlines` takes for the end of a line, and how JSON writes them otherwise: some clients read
streams that way."""


def sse(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    text = encoder.encode(data)
    if not text.isascii():
        text = text.decode().translate(_LINE_ENDS).encode()
    return b"data: " + text + b"\n\n"


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
