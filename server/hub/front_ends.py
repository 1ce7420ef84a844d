"""Front ends in processes of their own: they are started, watched, and started again when they die."""

import asyncio
import contextlib
import itertools
import logging
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server.handover import to_json
from server.hub.hub import Hub
from server.wire.hub import FrontEndStart, News, Question, Update
from server.wire.link import LinkServer

logger = logging.getLogger("lowkey.hub")

RESTART_S = 1.0
"""How long to wait before a front end is started again that was not up for `HEALTHY_AFTER_S`. Not longer each time:
whoever connects to it waits meanwhile."""
HEALTHY_AFTER_S = 60.0
"""A front end that was up for this long is started again at once."""
STOP_S = 8.0
"""How long front ends may take to end once they have been told to: uvicorn gives connections five seconds."""


@dataclass(eq=False)
class _Process:
    """One process of a front end."""

    name: str
    joined: bool = False
    """Whether it has told the hub that it is there."""
    silent_s: float = 0.0
    """Seconds since it last told something, as far as this process's loop ran in them."""


class FrontEnds:
    """The front ends of a server, each a process that listens on sockets of its own.

    The sockets stay open here: who connects while a front end is started again is answered once it is back.

    Args:
        listening: what each of the front ends listens on (`listen_together`).
    """

    def __init__(self, hub: Hub, listening: list[list[socket.socket]]) -> None:
        self._hub = hub
        self._listening = listening
        self._names = map(str, itertools.count())
        """Each process has a name of its own, so that what comes late of one that is gone is nobody else's."""
        self._address = f"ipc://{hub.runtime_dir}/hub"
        self._living: dict[str, _Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._server = LinkServer(self._address, self._join, self._ask, self._tell)

    @property
    def complete(self) -> bool:
        """Whether all of them take requests."""
        return sum(process.joined for process in self._living.values()) == len(self._listening)

    def start(self) -> None:
        """Start all processes, and keep them running until `stop`."""
        self._tasks = [asyncio.create_task(self._keep(sockets)) for sockets in self._listening]

    async def stop(self, hurry: Callable[[], bool]) -> None:
        """Have all of them end, and wait for that.

        Args:
            hurry: says whether to wait no longer.
        """
        self._stopping.set()
        self._hub.stop_front_ends()
        deadline = time.monotonic() + STOP_S
        while not all(task.done() for task in self._tasks):
            if hurry() or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.05)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server.close()

    def _join(self, name: str, receive: Callable[[Update], None]) -> None:
        if (process := self._living.get(name)) is not None:
            process.joined = True
            self._hub.join(name, receive)

    async def _ask(self, name: str, question: Question) -> Any:
        return await self._hub.ask(name, question) if name in self._living else None

    def _tell(self, name: str, news: News) -> None:
        if (process := self._living.get(name)) is not None:
            process.silent_s = 0.0
            self._hub.tell(name, news)

    async def _keep(self, sockets: list[socket.socket]) -> None:
        """Keep a front end on these sockets running."""
        while not self._stopping.is_set():
            began, process = time.monotonic(), _Process(next(self._names))
            self._living[process.name] = process
            try:
                await self._run(process, sockets)
            except Exception:  # whatever it was, nobody would answer on these sockets any more
                logger.exception("API process %s can't be started", process.name)
            finally:
                del self._living[process.name]
                self._server.gone(process.name)
                self._hub.gone(process.name)
            if self._stopping.is_set():
                return
            self._hub.metrics.api_restarts.inc()
            if time.monotonic() - began < HEALTHY_AFTER_S:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), RESTART_S)

    async def _run(self, own: _Process, sockets: list[socket.socket]) -> None:
        """Run one process to its end."""
        listening = [one.fileno() for one in sockets]
        start = FrontEndStart(
            name=own.name,
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
        watching = [
            asyncio.create_task(watch) for watch in (self._watch(own, process), self._end(own, process))
        ]
        try:
            assert process.stdin is not None
            with contextlib.suppress(ConnectionError):  # it has died already
                process.stdin.write(start.line())
                await process.stdin.drain()
            code = await process.wait()
            if not self._stopping.is_set():
                logger.error("API process %s (pid %d) ended with code %s", own.name, process.pid, code)
        finally:
            for task in watching:
                task.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _watch(self, own: _Process, process: asyncio.subprocess.Process) -> None:
        """Kill a process that has joined and gives no sign of life. Counts ticks of this loop, not the clock: when this
        process was held up itself, what that one has told is yet to be read."""
        hang_s = self._hub.settings.hang_s
        tick_s = min(1.0, hang_s / 4)
        while own.silent_s < hang_s:
            await asyncio.sleep(tick_s)
            own.silent_s += tick_s if own.joined else 0.0
        logger.error(
            "API process %s (pid %d): no sign of life for %.0f s; killing it", own.name, process.pid, hang_s
        )
        process.kill()

    async def _end(self, own: _Process, process: asyncio.subprocess.Process) -> None:
        """Kill a process that has not joined by the time when all are to end: it has nothing to finish."""
        await self._stopping.wait()
        if not own.joined:
            process.kill()
