"""The API process's side of an engine: hands each request to it, and its tokens to the request.

Imports no torch: the API process stays light and never blocks on a device.
"""

import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field

from server.wire.exchange import Answer, BrokenOutputError, EngineUnavailableError, Exchange, StateError
from server.wire.messages import (
    Abort,
    Generate,
    Input,
    Occupancy,
    SaveState,
    Score,
    Scored,
    StateSaved,
    StepOutput,
    Token,
)
from server.wire.supervisor import Supervisor


@dataclass(eq=False)
class EngineClient(Supervisor):
    """One engine process and the requests in it."""

    _: KW_ONLY
    on_step: Callable[[StepOutput], None]
    """Told of each step."""
    on_occupancy: Callable[[Occupancy], None]
    """Told of who is in the engine."""
    _requests: dict[str, Exchange] = field(default_factory=dict, init=False)

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
            self.send(message)
            yield exchange
        finally:
            del self._requests[request_id]
            if not exchange.finished:
                self._tell(Abort(request_id=request_id))
                exchange.finish()

    def _tell(self, message: Input) -> None:
        """Send a message that an engine that has gone away need not hear."""
        with contextlib.suppress(EngineUnavailableError):
            self.send(message)

    def _deliver(self, output: StepOutput | Occupancy) -> None:
        if isinstance(output, Occupancy):
            self.on_occupancy(output)
            return
        items: list[Answer] = [*output.tokens, *output.scored, *output.saved, *output.failed]
        for item in items:
            exchange = self._requests.get(item.request_id)
            if exchange is not None:  # else it was aborted while this was on its way
                exchange.put(item)
        self.on_step(output)
        self.on_occupancy(output.occupancy)

    def _lost(self) -> None:
        """Requests that were in the engine fail with EngineUnavailableError."""
        for exchange in self._requests.values():
            exchange.put(None)
