"""The API process's side of an engine: hands each request to it, and its tokens to the request.

Imports no torch: the API process stays light and never blocks on a device.
"""

import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path

from server.wire.exchange import Answer, BrokenOutputError, EngineUnavailableError, Exchange, StateError
from server.wire.messages import (
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
)
from server.wire.supervisor import Supervisor


class EngineClient:
    """One engine process and the requests in it.

    Args:
        config, runtime_dir, hang_s, on_ready, on_down, on_fatal: as for a Supervisor.
        on_step, on_occupancy: told of each step, and of who is in the engine.
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
        self._on_step, self._on_occupancy = on_step, on_occupancy
        self._requests: dict[str, Exchange] = {}
        self._supervisor = Supervisor(
            config,
            runtime_dir,
            hang_s=hang_s,
            on_ready=on_ready,
            on_output=self._deliver,
            on_lost=self._fail_all,
            on_down=on_down,
            on_fatal=on_fatal,
        )

    @property
    def ready(self) -> Ready | None:
        """What the engine said of itself when it last loaded; None until it first has."""
        return self._supervisor.ready

    @property
    def up(self) -> bool:
        """Whether the engine takes requests now."""
        return self._supervisor.up

    def start(self) -> None:
        """Start the process and keep it running until `close`."""
        self._supervisor.start()

    async def close(self) -> None:
        """Stop the process; requests still in it fail with EngineUnavailableError."""
        await self._supervisor.close()

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
            self._supervisor.send(message)
            yield exchange
        finally:
            del self._requests[request_id]
            if not exchange.finished:
                self._tell(Abort(request_id=request_id))
                exchange.finish()

    def _tell(self, message: Input) -> None:
        """Send a message that an engine that has gone away need not hear."""
        with contextlib.suppress(EngineUnavailableError):
            self._supervisor.send(message)

    def _deliver(self, output: StepOutput | Occupancy) -> None:
        if isinstance(output, Occupancy):
            self._on_occupancy(output)
            return
        items: list[Answer] = [*output.tokens, *output.scored, *output.saved, *output.failed]
        for item in items:
            exchange = self._requests.get(item.request_id)
            if exchange is not None:  # else it was aborted while this was on its way
                exchange.put(item)
        self._on_step(output)
        self._on_occupancy(output.occupancy)

    def _fail_all(self) -> None:
        """The engine is gone, and all requests that were in it with it."""
        for exchange in self._requests.values():
            exchange.put(None)
