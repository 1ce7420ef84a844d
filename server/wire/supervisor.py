"""The life of one engine process: it is started, watched, killed when it hangs, and started again when it dies."""

import asyncio
import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import zmq

from server.wire.inbox import Inbox
from server.wire.messages import (
    CANNOT_LOAD,
    EngineConfig,
    FrontEndGone,
    Occupancy,
    Ready,
    Step,
    encoder,
    report_decoder,
)

logger = logging.getLogger("lowkey.supervisor")

ENGINE_MODULE = "server.engine.process"
"""The module that an engine process runs."""
MAX_BACKOFF_S = 30.0
"""The longest wait before an engine is started again. The first is a second, and each is twice the one before."""
HEALTHY_AFTER_S = 60.0
"""An engine that was up for this long is started again after a second, however often it has died before."""


@dataclass(eq=False)
class Supervisor:
    """Keeps one engine process running, and listens to what it says of itself."""

    config: EngineConfig
    """How to start the process; its addresses are filled in here, anew for every start."""
    runtime_dir: Path
    """A private directory for the sockets."""
    _: KW_ONLY
    hang_s: float
    """An engine that has loaded and then says nothing for this long is killed. It speaks every second, but for the
    length of a step."""
    on_ready: Callable[[Ready, str], None]
    """Told when the engine has loaded, before it counts as up, and at which address it takes requests."""
    on_step: Callable[[Step], None]
    """Told of each step."""
    on_occupancy: Callable[[Occupancy], None]
    """Told of who is in the engine."""
    on_down: Callable[[], None]
    """Told when the engine is gone, or could not be started: nothing more comes of what was sent to it."""
    on_restart: Callable[[], None]
    """Told when an engine that is gone will be started again."""
    on_fatal: Callable[[str], None]
    """Told when the model can't be loaded at all, and why; the process is then not started again."""
    ready: Ready | None = field(default=None, init=False)
    """What the engine said of itself when it last loaded; None until it first has."""
    up: bool = field(default=False, init=False)
    """Whether the engine takes requests now."""
    _silent_s: float = field(default=0.0, init=False)
    """Seconds since the engine's last message in which this process's loop ran."""
    _ready_at: float = field(default=math.inf, init=False)
    """time.monotonic() of the last Ready; infinite until this start's."""
    _requests: "zmq.Socket[bytes] | None" = field(default=None, init=False)
    """The socket on which the engine takes requests."""
    _reports: Inbox | None = field(default=None, init=False)
    _task: "asyncio.Task[None] | None" = field(default=None, init=False)

    def start(self) -> None:
        """Start the process and keep it running until `close`."""
        self._task = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        """Stop the process."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def catch_up(self) -> None:
        """Take in what the engine has said until now."""
        while self._reports is not None and self._reports.read():
            pass

    def front_end_gone(self, front_end: str) -> None:
        """Have the engine forget the requests of a front end that has ended."""
        if self._requests is not None and self.up:
            with contextlib.suppress(zmq.Again):  # the engine is going away itself
                self._requests.send(encoder.encode(FrontEndGone(front_end=front_end)), zmq.NOBLOCK)

    @property
    def _reason(self) -> Path:
        """The file in which an engine that can't load leaves the reason."""
        return self.runtime_dir / f"{self.config.variant}.reason"

    async def _supervise(self) -> None:
        backoff, generation = 1.0, 0
        while True:
            generation += 1
            self._ready_at = math.inf
            code: int | None = None
            try:
                code = await self._run_once(generation)
                logger.error("%s: engine process ended with code %s", self.config.variant, code)
            except Exception:  # whatever it was, a supervisor that ends would leave the variant down for good
                logger.exception("%s: the engine can't be started or understood", self.config.variant)
            finally:
                self.up, self._requests = False, None
                self.on_down()
            if code == CANNOT_LOAD and self.ready is None:
                reason = self._reason.read_text() if self._reason.is_file() else ""
                self.on_fatal(reason or "the log says why")
                return
            self.on_restart()
            if time.monotonic() - self._ready_at > HEALTHY_AFTER_S:
                backoff = 1.0
            logger.info("%s: restarting in %.0f s", self.config.variant, backoff)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF_S)

    async def _run_once(self, generation: int) -> int:
        """Start one process, serve its messages until it ends; returns its exit code."""
        stem = self.runtime_dir / f"{self.config.variant}-{generation}"
        config = msgspec.structs.replace(
            self.config,
            request_address=f"ipc://{stem}.requests",
            report_address=f"ipc://{stem}.reports",
            reason_path=str(self._reason),
            devices=self.config.devices if self.ready is None else [],  # when it restarts, the others are up
        )
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        requests, reports = context.socket(zmq.DEALER), context.socket(zmq.PULL)
        process: asyncio.subprocess.Process | None = None
        watchdog: asyncio.Task[None] | None = None
        trouble: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            for socket in (requests, reports):
                socket.set_hwm(0)
                socket.setsockopt(zmq.LINGER, 0)
            requests.connect(config.request_address)
            reports.bind(config.report_address)
            self._requests = requests
            threads = str(config.threads)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                ENGINE_MODULE,
                msgspec.json.encode(config).decode(),
                stdin=asyncio.subprocess.PIPE,
                # Read by OpenMP when torch is loaded: idle threads must sleep, not spin on a shared core.
                env={
                    **os.environ,
                    "OMP_WAIT_POLICY": "PASSIVE",
                    "GOMP_SPINCOUNT": "0",
                    "OMP_NUM_THREADS": threads,
                    "MKL_NUM_THREADS": threads,
                },
                start_new_session=True,
            )
            self._reports = Inbox(reports, lambda data: self._receive(data, config.request_address, trouble))
            watchdog = asyncio.create_task(self._watch(process))
            ended = asyncio.ensure_future(process.wait())
            first: set[asyncio.Future[Any]] = {trouble, ended}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if trouble.done():
                trouble.result()
            return await ended
        finally:
            if watchdog is not None:
                watchdog.cancel()
            if self._reports is not None:
                self._reports.close()
                self._reports = None
            if process is not None and process.returncode is None:
                process.kill()
                await process.wait()
            for socket in (requests, reports):
                socket.close(linger=0)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kill an engine that has stopped to answer. Counts ticks of this loop, not the clock: when this process was
        held up itself, the engine's messages are yet to be read."""
        self._silent_s = 0.0
        tick = min(1.0, self.hang_s / 4)
        while True:
            await asyncio.sleep(tick)
            self._silent_s += tick
            if self.up and self._silent_s >= self.hang_s:
                logger.error(
                    "%s: no sign of life for %.0f s; killing the engine", self.config.variant, self.hang_s
                )
                process.kill()
                return

    def _receive(self, data: bytes, address: str, trouble: "asyncio.Future[None]") -> None:
        """Take in a message of the engine that takes requests at `address`. What is wrong with it, or with what is done
        about it, ends up in `trouble`."""
        try:
            message = report_decoder.decode(data)
            self._silent_s = 0.0
            if isinstance(message, Ready):
                self.on_ready(message, address)
                self.ready, self.up, self._ready_at = message, True, time.monotonic()
                return
            if isinstance(message, Step):
                self.on_step(message)
                message = message.occupancy
            self.on_occupancy(message)
        except Exception as e:
            if not trouble.done():
                trouble.set_exception(e)
