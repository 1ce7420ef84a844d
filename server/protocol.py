"""HTTP/1.1 as uvicorn speaks it, with the limits that it lacks: on the time and the size of a request's headers, and on
the time for which an answer waits for its reader."""

import asyncio
from typing import ClassVar, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.unread import CountingTransport, UnreadWatch

MAX_HEADER_BYTES = 2**16
"""Of headers, or trailers, that have not ended; those that end within one read may be longer."""


class HttpProtocol(HttpToolsProtocol):
    """Closes connections that begin no request, or don't finish its headers: each holds a file descriptor, and
    headers lie in memory before anyone asks for a key. Closes those whose client does not take its answer, too."""

    header_timeout_s: ClassVar[float]
    write_timeout_s: ClassVar[float]
    _unread: UnreadWatch | None = None
    _header_timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    """Received since the last headers were complete, or the last piece of a body came."""

    @classmethod
    def with_timeouts(cls, header_s: float, write_s: float) -> "type[HttpProtocol]":
        return type("HttpProtocol", (cls,), {"header_timeout_s": header_s, "write_timeout_s": write_s})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        counting = CountingTransport(transport)
        super().connection_made(cast(asyncio.Transport, counting))
        self._unread = UnreadWatch(counting, self.write_timeout_s)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        self._header_bytes += len(data)
        super().data_received(data)
        if self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The headers are over {MAX_HEADER_BYTES} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_headers()

    def on_body(self, body: bytes) -> None:
        self._header_bytes = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._header_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._unread is not None:
            self._unread.stop()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
