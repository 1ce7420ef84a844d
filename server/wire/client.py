"""The API process's side of an engine: starts it, restarts it when it dies, and hands each request its tokens.

Imports no torch: the API process stays light and never blocks on a device.
"""

import asyncio
import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from server.wire.exchange import Answer, BrokenOutputError, EngineUnavailableError, Exchange, StateError
from server.wire.messages import (
    CANNOT_LOAD,
    Abort,
    EngineConfig,
    Generate,
    Input,
    Occupancy,
    Ready,
    SaveState,
    Score,
    Scored,
    StateSaved,
    StepOutput,
    Token,
    encoder,
    output_decoder,
)

logger = logging.getLogger("lowkey.supervisor")

MAX_BACKOFF_S = 30.0
HEALTHY_AFTER_S = 60.0


class EngineClient:
    """One engine process and the requests in it.

    Args:
        config: how to start the process; its addresses are filled in here, anew for every start.
        runtime_dir: a private directory for the sockets.
        hang_s: an engine that has loaded and then says nothing for this long is killed. It speaks every second, but
            for the length of a step.
        on_ready, on_down: told when the engine has loaded, and when it is gone.
        on_step, on_occupancy: told of each step, and of who is in the engine.
        on_fatal: told when the model can't be loaded at all, and why; the process is then not started again.
    """

    def __init__(
        self,
        config: EngineConfig,
        runtime_dir: Path,
        *,
        hang_s: float,
        on_ready: Callable[[Ready], None],
        on_step: Callable[[StepOutput], None],
        on_occupancy: Callable[[Occupancy], None],
        on_down: Callable[[], None],
        on_fatal: Callable[[str], None],
    ) -> None:
        self.config = config
        self.ready: Ready | None = None
        """What the engine said of itself when it last loaded; None until it first has."""
        self.up = False
        self._runtime_dir = runtime_dir
        self._reason = runtime_dir / f"{config.variant}.reason"
        self._hang_s = hang_s
        self._silent_s = 0.0
        """Since the engine's last message, while this process's loop ran."""
        self._on_ready, self._on_down, self._on_fatal = on_ready, on_down, on_fatal
        self._on_step, self._on_occupancy = on_step, on_occupancy
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._requests: dict[str, Exchange] = {}
        self._task: asyncio.Task[None] | None = None
        self._ready_at = math.inf
        """time.monotonic() of the last Ready; infinite until this start's."""

    def start(self) -> None:
        """Start the process and keep it running until `close`."""
        self._task = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        """Stop the process; requests still in it fail with EngineUnavailableError."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._context.destroy(linger=0)

    async def generate(
        self,
        message: Generate,
        *,
        most_unread: float = math.inf,
        on_sampled: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[list[Token]]:
        """The request's tokens as they come: each time all that have come since. Leaving the iterator early aborts the
        request.

        Args:
            most_unread: bytes of tokens that may wait to be taken from here. Beyond that the engine pauses the request
                until they have been.
            on_sampled: called once, when the engine is done with the request, whether or not its tokens have been
                taken.

        Raises:
            EngineUnavailableError: before or between tokens.
            BrokenOutputError: the model gave NaN or Inf.
            OutOfMemoryError: likewise.
            StateError: the saved state to go on from is no good.
        """
        with self._exchange(message, most_unread, on_sampled) as exchange:
            while True:
                tokens = await exchange.tokens()
                reason = tokens[-1].finish_reason
                if reason == "error":
                    if len(tokens) > 1:
                        yield tokens[:-1]
                    raise BrokenOutputError(
                        f"variant {self.config.variant!r} gave NaN or Inf for this prompt"
                    )
                yield tokens
                if reason is not None:
                    return

    async def score(self, message: Score) -> Scored:
        """Log-probabilities of given tokens. Raises EngineUnavailableError, OutOfMemoryError among them."""
        with self._exchange(message) as exchange:
            scored = await exchange.answer()
            assert isinstance(scored, Scored)
            return scored

    async def save_state(self, message: SaveState) -> None:
        """Have the state after a prompt written to a file.

        Raises:
            EngineUnavailableError: before the answer, OutOfMemoryError among them.
            StateError: it could not be written.
        """
        with self._exchange(message) as exchange:
            saved = await exchange.answer()
            assert isinstance(saved, StateSaved)
            if saved.error is not None:
                raise StateError(saved.error)

    @contextlib.contextmanager
    def _exchange(
        self,
        message: Generate | Score | SaveState,
        most_unread: float = math.inf,
        on_finish: Callable[[], None] = lambda: None,
    ) -> Iterator[Exchange]:
        """Send a request; it is aborted when this is left before its last answer."""
        request_id = message.request_id
        exchange = Exchange(request_id, self.config.variant, most_unread, self._tell, on_finish)
        self._requests[request_id] = exchange
        try:
            self._send(message)
            yield exchange
        finally:
            del self._requests[request_id]
            if not exchange.finished:
                self._tell(Abort(request_id=request_id))
                exchange.finish()

    def _tell(self, message: Input) -> None:
        """Send a message that an engine that has gone away need not hear."""
        with contextlib.suppress(EngineUnavailableError):
            self._send(message)

    def _send(self, message: Input) -> None:
        """Never blocks: the socket has no high-water mark, and without an engine behind it the answer is an error."""
        if self._socket is None or not self.up:
            raise EngineUnavailableError(f"variant {self.config.variant!r} is not up")
        try:
            self._socket.send(encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again as e:
            raise EngineUnavailableError(f"variant {self.config.variant!r} went away") from e

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
                self._mark_down()
            if code == CANNOT_LOAD and self.ready is None:
                reason = self._reason.read_text() if self._reason.is_file() else ""
                self._on_fatal(reason or "the log says why")
                return
            self._on_down()
            if time.monotonic() - self._ready_at > HEALTHY_AFTER_S:
                backoff = 1.0
            logger.info("%s: restarting in %.0f s", self.config.variant, backoff)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF_S)

    async def _run_once(self, generation: int) -> int:
        """Start one process, serve its messages until it ends; returns its exit code."""
        stem = self._runtime_dir / f"{self.config.variant}-{generation}"
        config = msgspec.structs.replace(
            self.config,
            input_address=f"ipc://{stem}.in",
            output_address=f"ipc://{stem}.out",
            reason_path=str(self._reason),
            devices=self.config.devices if self.ready is None else [],  # when it restarts, the others are up
        )
        inputs = self._context.socket(zmq.PUSH)
        outputs = zmq.asyncio.Context(self._context).socket(zmq.PULL)
        process: asyncio.subprocess.Process | None = None
        receiver: asyncio.Task[None] | None = None
        watchdog: asyncio.Task[None] | None = None
        try:
            for socket, address in ((inputs, config.input_address), (outputs, config.output_address)):
                socket.set_hwm(0)
                socket.setsockopt(zmq.LINGER, 0)
                socket.bind(address)
            self._socket = inputs
            threads = str(config.threads)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "server.engine.process",
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
            receiver = asyncio.create_task(self._receive(outputs))
            watchdog = asyncio.create_task(self._watch(process))
            ended = asyncio.create_task(process.wait())
            await asyncio.wait([receiver, ended], return_when=asyncio.FIRST_COMPLETED)
            if receiver.done():
                receiver.result()
            return await ended
        finally:
            for task in (receiver, watchdog):
                if task is not None:
                    task.cancel()
            if process is not None and process.returncode is None:
                process.kill()
                await process.wait()
            for socket in (inputs, outputs):
                socket.close(linger=0)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kill an engine that has stopped to answer. Counts ticks of this loop, not the clock: when this process was
        held up itself, the engine's messages are yet to be read."""
        self._silent_s = 0.0
        tick = min(1.0, self._hang_s / 4)
        while True:
            await asyncio.sleep(tick)
            self._silent_s += tick
            if self.up and self._silent_s >= self._hang_s:
                logger.error(
                    "%s: no sign of life for %.0f s; killing the engine", self.config.variant, self._hang_s
                )
                process.kill()
                return

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            message = output_decoder.decode(await socket.recv())
            self._silent_s = 0.0
            match message:
                case Ready():
                    self._on_ready(message)
                    self.ready, self.up, self._ready_at = message, True, time.monotonic()
                case StepOutput():
                    self._deliver(message)
                    self._on_step(message)
                    self._on_occupancy(message.occupancy)
                case Occupancy():
                    self._on_occupancy(message)

    def _deliver(self, output: StepOutput) -> None:
        items: list[Answer] = [*output.tokens, *output.scored, *output.saved, *output.failed]
        for item in items:
            exchange = self._requests.get(item.request_id)
            if exchange is not None:  # else it was aborted while this was on its way
                exchange.put(item)

    def _mark_down(self) -> None:
        self.up, self._socket = False, None
        for exchange in self._requests.values():
            exchange.put(None)
