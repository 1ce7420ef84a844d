"""HTTP/1.1 as uvicorn speaks it, with the limits that it lacks: on the time and the size of a request's headers, on
what is left of a request once it has been answered, and on the time for which an answer waits for its reader."""

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.api.http.events import CONNECTION
from server.api.http.unread import CountingTransport, UnreadWatch

MAX_HEADER_BYTES = 2**16
"""How long headers, or trailers, may be that have not ended; those that end within one read may be longer."""

MAX_UNREAD_BYTES = 2**20
"""How much is read of a request that has been answered already before its connection is closed. Some of it must be
read: most clients send all of a request before they look for the answer, and a connection that is closed while bytes
arrive is reset, which may cost its client the answer."""


class _Transport(CountingTransport):
    """A connection's transport as uvicorn gets it: its `close` is the protocol's."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        super().__init__(transport)
        self.close = close


class HttpProtocol(HttpToolsProtocol):
    """Closes connections that begin no request, don't finish its headers, don't end it although it has been answered,
    don't take their answer, or idle. Each holds a file descriptor, and headers lie in memory before anyone asks for a
    key.

    While a request is read, or its answer made, there is no time limit here: the application has its own.
    """

    header_timeout_s: ClassVar[float]
    write_timeout_s: ClassVar[float]
    linger_s: ClassVar[float]
    """How long the rest of a request that has been answered already may take."""
    on_writable: Callable[[], None] | None = None
    """Called when the connection takes more again; of the answer that is being written."""
    write_paused = False
    """Whether the client is behind, so that nothing more should be written."""
    _connection: asyncio.Transport
    """The transport itself, whose `close` closes the connection."""
    _untaken: UnreadWatch | None = None
    _timer: asyncio.TimerHandle | None = None
    """The timer that closes the connection."""
    _reading: Literal["headers", "body"] | None = None
    """The part of a request that has begun and not ended; None between requests."""
    _header_bytes = 0
    """Bytes received since the last headers were complete, or the last piece of a body came."""
    _unread_bytes = 0
    """Bytes of a request that were received after its answer."""
    _body_left = 0
    """Bytes of the request's body that have not come, if it said how long it is."""
    _ended = False
    """Whether the last answer has been written: what still comes is thrown away."""

    @classmethod
    def with_timeouts(cls, *, header_s: float, write_s: float, linger_s: float) -> "type[HttpProtocol]":
        limits = {"header_timeout_s": header_s, "write_timeout_s": write_s, "linger_s": linger_s}
        return type("HttpProtocol", (cls,), limits)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._connection = transport
        counting = _Transport(transport, self._close)
        super().connection_made(cast(asyncio.Transport, counting))
        self._untaken = UnreadWatch(counting, self.write_timeout_s)
        self._close_in(self.header_timeout_s)

    def ends_unread(self, scope: Scope) -> bool:
        """Whether an answer to the request of this scope, given now, ends the connection: too much of the request has
        not come."""
        return scope is self.scope and self._reading == "body" and self._body_left > MAX_UNREAD_BYTES

    def write_body(self, data: bytes) -> None:
        """Write a piece of a body of unknown length, whose headers have been sent. Nothing if the client is gone."""
        if data and not self._connection.is_closing():
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def pause_writing(self) -> None:
        super().pause_writing()
        self.write_paused = True

    def resume_writing(self) -> None:
        super().resume_writing()
        self.write_paused = False
        if self.on_writable is not None:
            self.on_writable()

    def data_received(self, data: bytes) -> None:
        early = self._answered_early()
        if not self._ended:
            self._header_bytes += len(data)
            super().data_received(data)
            if self._header_bytes > MAX_HEADER_BYTES and not self._ended:
                self.send_400_response(f"The headers are over {MAX_HEADER_BYTES} bytes.")
        # Unless the request has ended in there: the next one may be in there, too.
        if self._ended or (early and self._answered_early()):
            self._unread_bytes += len(data)
            if self._unread_bytes > MAX_UNREAD_BYTES:
                self._connection.close()

    def send_400_response(self, msg: str) -> None:
        self._reading = "headers"  # so that the rest of whatever it is does not cost the client this answer
        super().send_400_response(msg)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast(dict[str, Any], self.scope)[CONNECTION] = self
        self._reading = "headers"
        self._close_in(self.header_timeout_s)

    def on_headers_complete(self) -> None:
        self._header_bytes = 0
        self._reading = "body"
        self._stop_timer()
        lengths = [int(value) for name, value in self.headers if name == b"content-length"]
        self._body_left = sum(lengths)  # there is one at most, and the parser has read it
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._header_bytes = 0
        self._body_left -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        early = self._answered_early()
        self._reading = None
        super().on_message_complete()
        if early:
            self._close_in(self.timeout_keep_alive)

    def on_response_complete(self) -> None:
        if self._ended:  # uvicorn would wait for the next request
            self.server_state.total_requests += 1
            return
        super().on_response_complete()
        # Any byte stops uvicorn's own timer, also a line end, which begins no request.
        self._unset_keepalive_if_required()
        if self._answered_early():
            self._unread_bytes = 0
            self._close_in(self.linger_s)
        elif self._reading is None and self.cycle.response_complete:
            self._close_in(self.timeout_keep_alive)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        if self._untaken is not None:
            self._untaken.stop()
        super().connection_lost(exc)
        if self.scope is not None:  # a circle, which would wait for the garbage collector
            cast(dict[str, Any], self.scope).pop(CONNECTION, None)
        self._stop_timer()

    def _answered_early(self) -> bool:
        """Whether the request that is being read has been answered."""
        cycle: RequestResponseCycle | None = self.cycle
        return self._reading == "body" and cycle is not None and cycle.response_complete

    def _close(self) -> None:
        """Called once the connection's last answer has been written."""
        if self._ended or self._reading is None:
            self._connection.close()
            return
        self._ended = True
        self.flow.resume_reading()
        self._close_in(self.linger_s)

    def _close_in(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._connection.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
