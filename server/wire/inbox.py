"""Messages of a ZeroMQ socket in an asyncio loop, handed over as they come."""

import asyncio
import logging
from collections.abc import Callable

import zmq

logger = logging.getLogger("lowkey.wire")

AT_ONCE = 64
"""Messages that are taken before others of the loop have their turn."""


class Inbox:
    """Calls `take` with the frames of each message that comes to a socket, without a task and a future for each, as
    `zmq.asyncio` has them.

    Args:
        take: what it raises is logged, and costs that message alone.
        took: called whenever messages that had come have been taken.
    """

    def __init__(
        self,
        socket: "zmq.Socket[bytes]",
        take: Callable[..., None],
        took: Callable[[], None] = lambda: None,
    ) -> None:
        self._socket, self._take, self._took = socket, take, took
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(socket.getsockopt(zmq.FD))
        self._closed = False
        self._due = False
        """Whether a call of `read` is due."""
        self._loop.add_reader(self._descriptor, self.read)
        self._read_soon()

    def send(self, *frames: bytes) -> None:
        """Send a message on the socket; nothing once it is closed. Raises zmq.Again if it would have to wait."""
        if self._closed:
            return
        self._socket.send_multipart(frames, zmq.NOBLOCK)
        # The descriptor tells of new events only, and sending may have taken notice of one.
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._read_soon()

    def close(self) -> None:
        """Take no more, and close the socket."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._descriptor)
            self._socket.close(linger=0)

    def read(self) -> bool:
        """Take what has come, as much as may be taken at once. Returns whether there may be more."""
        self._due = False
        more = True
        for _ in range(AT_ONCE):
            more = self._read_one()
            if not more:
                break
        else:
            self._read_soon()
        self._took()
        return more

    def _read_one(self) -> bool:
        if self._closed:
            return False
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        try:
            self._take(*frames)
        except Exception:  # the descriptor would not tell of those behind it
            logger.exception("a message of %d bytes could not be taken in", sum(map(len, frames)))
        return True

    def _read_soon(self) -> None:
        if not self._due:
            self._due = True
            self._loop.call_soon(self.read)
