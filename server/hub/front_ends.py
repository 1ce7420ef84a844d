"""Front ends in processes of their own: they are started, watched, and started again when they die."""

import asyncio
import contextlib
import itertools
import logging
import socket
import sys
import time
from collections.abc import Callable

from server.handover import to_json
from server.hub.hub import Hub
from server.wire.hub import FrontEndStart, News, Update
from server.wire.link import LinkServer

logger = logging.getLogger("lowkey.hub")

MAX_BACKOFF_S = 30.0
"""The longest wait before a front end is started again. The first is none, and then each is twice the one before."""
HEALTHY_AFTER_S = 60.0
"""A front end that was up for this long is started again at once, however often it has died before."""
BACKLOG = 2048
"""Connections that may wait to be accepted by a front end; uvicorn's own number."""
STOP_S = 15.0
"""How long front ends may take to end once they have been told to."""


class FrontEnds:
    """The front ends of a server, each a process that listens on sockets of its own.

    The sockets stay open here: who connects while a front end is started again is answered once it is back.

    Args:
        listening: what each of the front ends listens on, bound to the same addresses (SO_REUSEPORT): the system gives
            each connection to one of them.
    """

    def __init__(self, hub: Hub, listening: list[list[socket.socket]]) -> None:
        self._hub = hub
        self._listening = listening
        self._names = itertools.count()
        self._address = f"ipc://{hub.runtime_dir}/hub"
        self._joined: set[str] = set()
        self._heard: dict[str, float] = {}
        """When each of them has last told something, which it does every few seconds; time.monotonic()."""
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._server = LinkServer(self._address, self._join, hub.ask, self._told)
        for one in (one for sockets in listening for one in sockets):
            one.listen(BACKLOG)  # now, so that nobody is refused whose front end is yet to come

    @property
    def complete(self) -> bool:
        """Whether all of them take requests."""
        return len(self._joined) == len(self._listening)

    def start(self) -> None:
        """Start all processes, and keep them running until `stop`."""
        self._tasks = [asyncio.create_task(self._keep(sockets)) for sockets in self._listening]

    async def stop(self) -> None:
        """Have all of them end, and wait for that."""
        self._stopping = True
        self._hub.stop_front_ends()
        await asyncio.wait(self._tasks, timeout=STOP_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server.close()

    def _join(self, name: str, receive: Callable[[Update], None]) -> None:
        self._joined.add(name)
        self._hub.join(name, receive)

    def _told(self, name: str, news: News) -> None:
        self._heard[name] = time.monotonic()
        self._hub.tell(name, news)

    async def _keep(self, sockets: list[socket.socket]) -> None:
        """Keep a front end on these sockets running."""
        backoff_s = 0.0
        while True:
            began, name = time.monotonic(), f"{next(self._names)}"
            try:
                code = await self._run(name, sockets)
            finally:
                self._joined.discard(name)
                self._heard.pop(name, None)
                self._server.gone(name)
                self._hub.gone(name)
            if self._stopping:
                return
            if time.monotonic() - began > HEALTHY_AFTER_S:
                backoff_s = 0.0
            self._hub.metrics.api_restarts.inc()
            logger.error("API process %s ended with code %s; restarting in %.0f s", name, code, backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(max(1.0, 2 * backoff_s), MAX_BACKOFF_S)

    async def _run(self, name: str, sockets: list[socket.socket]) -> int:
        """Run one process to its end; returns its exit code."""
        listening = [one.fileno() for one in sockets]
        start = FrontEndStart(
            name=name,
            hub_address=self._address,
            started=self._hub.started,
            runtime_dir=str(self._hub.runtime_dir),
            listening=listening,
            settings=to_json(self._hub.settings),
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "server.front_end"),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=listening,
            start_new_session=True,  # Ctrl-C is the hub's
        )
        try:
            assert process.stdin is not None
            with contextlib.suppress(ConnectionError):  # it has died already
                process.stdin.write(start.line())
                await process.stdin.drain()
            self._heard[name] = time.monotonic()
            return await self._end_of(name, process)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _end_of(self, name: str, process: asyncio.subprocess.Process) -> int:
        """The exit code of a process, which is killed if it gives no sign of life."""
        hang_s = self._hub.settings.hang_s
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(hang_s / 4):
                    return await process.wait()
            if time.monotonic() - self._heard[name] >= hang_s:
                logger.error("API process %s: no sign of life for %.0f s; killing it", name, hang_s)
                process.kill()
