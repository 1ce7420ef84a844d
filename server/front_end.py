"""A front end: HTTP as uvicorn serves it. It runs in the hub's process, or in one of its own (`main`)."""

import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI

from server.api.app import create_app
from server.api.http.protocol import HttpProtocol
from server.api.serving.service import Service
from server.handover import from_json
from server.logs import configure
from server.wire.hub import FrontEndStart
from server.wire.link import RemoteLink

T = TypeVar("T")

TOTALS_S = 2.0
"""Seconds between two times that a front end tells the hub what it has counted. What it has counted since is lost when
it is killed."""


class FrontEnd(uvicorn.Server):
    """uvicorn with the limits of `HttpProtocol`. It ends when it is told to (`stop`), not by signals of its own.

    Args:
        on_start: called when requests are taken.
        on_signal: called at SIGTERM and SIGINT.
        on_tick: called ten times a second.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        on_start: Callable[[], None] = lambda: None,
        on_signal: Callable[[], None] = lambda: None,
        on_tick: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._service: Service = app.state.service
        settings = self._service.settings
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpProtocol.with_timeouts(
                    header_s=settings.header_timeout_s,
                    write_s=settings.write_timeout_s,
                    linger_s=settings.linger_s,
                ),
                log_config=None,
                access_log=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=5,  # the drain itself is over by then
                server_header=False,
            )
        )
        self._service.on_stop = self.stop
        self._on_start, self._on_signal, self._on_tick = on_start, on_signal, on_tick
        self._frozen = False

    def stop(self) -> None:
        """Take no more requests, and end."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not uvicorn's own: that one stops listening at once, and kills the process when all is done."""
        self._on_signal()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if not self._frozen and all(variant.loaded for variant in self._service.variants):
            self._frozen = True
            # What is there now stays. To look through it for garbage again and again would hold up all streams.
            gc.collect()
            gc.freeze()
        if self._on_tick is not None:
            await self._on_tick()
        return await super().on_tick(counter)


def run_in_loop(main: Coroutine[Any, Any, T]) -> T:
    """What `main` returns, run in a loop of the kind that uvicorn chooses."""
    with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
        return runner.run(main)


async def serve(start: FrontEndStart) -> None:
    """Answer requests until the hub says to stop."""
    # The hub starts another one, which begins with how things are.
    link = RemoteLink(
        start.hub_address, start.name, start.started, Path(start.runtime_dir), fail=lambda: os._exit(1)
    )
    app = create_app(from_json(start.settings), link)
    service: Service = app.state.service
    told = asyncio.get_running_loop().time()

    async def tell_totals() -> None:
        nonlocal told
        now = asyncio.get_running_loop().time()
        if now - told >= min(TOTALS_S, service.settings.hang_s / 4):
            told = now
            link.tell(service.totals())

    # When the hub is gone, however it went, its end of our standard input is closed.
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), lambda: os._exit(1))
    front_end = FrontEnd(app, on_tick=tell_totals)
    await front_end.serve(sockets=[socket.socket(fileno=descriptor) for descriptor in start.listening])
    link.close()


def main() -> None:
    """`python -P -m server.front_end`, started by `server.hub.front_ends` only."""
    start = FrontEndStart.read(sys.stdin.buffer.readline())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the hub's
    settings = from_json(start.settings)
    configure(settings.log_level, settings.log_format)
    run_in_loop(serve(start))


if __name__ == "__main__":
    main()
