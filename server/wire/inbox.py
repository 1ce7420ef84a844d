"""Messages of a ZeroMQ socket in an asyncio loop, handed over as they come."""

import asyncio
from collections.abc import Callable

import zmq

AT_ONCE = 64
"""Messages that are taken before others of the loop have their turn."""


class Inbox:
    """Calls `take` with the frames of each message that comes to a socket, without a task and a future for each, as
    `zmq.asyncio` has them.

    Args:
        took: called whenever all messages that had come have been taken.
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
        self._loop.add_reader(self._descriptor, self.read)
        self._loop.call_soon(self.read)

    def send(self, *frames: bytes) -> None:
        """Send a message on the socket. Raises zmq.Again if it would have to wait."""
        self._socket.send_multipart(frames, zmq.NOBLOCK)
        # The descriptor tells of new events only, and sending may have taken notice of one.
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self.read)

    def close(self) -> None:
        """Take no more, and close the socket."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._descriptor)
            self._socket.close(linger=0)

    def read(self) -> None:
        """Take what has come."""
        for _ in range(AT_ONCE):
            if self._closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._take(*frames)
        else:
            self._loop.call_soon(self.read)
        self._took()
