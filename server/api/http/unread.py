"""Ends connections whose client does not take what is sent to it."""

import asyncio
import logging
from typing import Any

logger = logging.getLogger("lowkey.api")

LEAST_TAKEN = 2**14
"""Bytes that a client must take within the time limit while more wait for it. One that takes a byte now and then would
hold its answer's memory, and a stream's state slots, for as long as it likes."""


class CountingTransport:
    """A connection's transport that counts what is written to it; everything else is the transport's own."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.written = 0
        """Bytes that were written to the connection so far."""

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class UnreadWatch:
    """Aborts a connection once `LEAST_TAKEN` bytes were not taken within the time limit, although there were more.

    What the system's own buffers hold counts as taken: that memory is bounded for each connection already.
    """

    def __init__(self, transport: CountingTransport, timeout_s: float) -> None:
        self._transport = transport
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._taken, self._since = 0, self._loop.time()
        self._timer = self._next()

    def stop(self) -> None:
        """Watch no more: the connection is gone."""
        self._timer.cancel()

    def _next(self) -> asyncio.TimerHandle:
        return self._loop.call_later(self._timeout_s / 4, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        unread = self._transport.get_write_buffer_size()
        taken = self._transport.written - unread
        if not unread or taken - self._taken >= LEAST_TAKEN:
            self._taken, self._since = taken, now
        elif now - self._since >= self._timeout_s:
            logger.info(
                "a client took %d bytes in %.0f s while %d more waited: its connection is closed",
                taken - self._taken,
                now - self._since,
                unread,
            )
            self._transport.abort()
            return
        self._timer = self._next()
