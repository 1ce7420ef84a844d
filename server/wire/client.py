"""A front end's side of an engine: hands each request to it, and its answers to the request.

Imports no torch: a front end stays light and never waits for a device.
"""

import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Iterator

import zmq

from server.wire.exchange import Answer, BrokenOutputError, EngineUnavailableError, Exchange, StateError
from server.wire.inbox import Inbox
from server.wire.messages import (
    Abort,
    Generate,
    Input,
    Ready,
    SaveState,
    Score,
    Scored,
    StateSaved,
    Token,
    answers_decoder,
    encoder,
)


class EngineClient:
    """The requests of one front end in one engine.

    Args:
        variant: the engine's, for messages.
        front_end: what the engine knows this front end by.
    """

    def __init__(self, variant: str, front_end: str) -> None:
        self.ready: Ready | None = None
        """What the engine said of itself when it last loaded; None until it first has."""
        self._variant = variant
        self._front_end = front_end
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._inbox: Inbox | None = None
        self._requests: dict[str, Exchange] = {}

    @property
    def up(self) -> bool:
        """Whether the engine takes requests now."""
        return self._inbox is not None

    def engine_up(self, ready: Ready, address: str) -> None:
        """The engine has loaded, and takes requests there."""
        self.engine_down()
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self._front_end.encode())
        socket.set_hwm(0)
        socket.connect(address)
        self.ready, self._inbox = ready, Inbox(socket, self._deliver)

    def engine_down(self) -> None:
        """The engine is gone: nothing more comes of what was sent to it, and its requests fail."""
        if self._inbox is not None:
            self._inbox.close()
            self._inbox = None
        for exchange in self._requests.values():
            exchange.put(None)

    def close(self) -> None:
        """Have no more to do with the engine."""
        self.engine_down()
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
                    raise BrokenOutputError(f"variant {self._variant!r} gave NaN or Inf for this prompt")
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
        exchange = Exchange(request_id, self._variant, most_unread, self._tell, on_finish)
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

    def send(self, message: Input) -> None:
        """Send a message to the engine. Never blocks: the socket has no high-water mark, and without an engine behind
        it the answer is an error.

        Raises:
            EngineUnavailableError: the engine is not up.
        """
        if self._inbox is None:
            raise EngineUnavailableError(f"variant {self._variant!r} is not up")
        try:
            self._inbox.send(encoder.encode(message))
        except zmq.Again as e:
            raise EngineUnavailableError(f"variant {self._variant!r} went away") from e

    def _deliver(self, data: bytes) -> None:
        """Hand the answers of one step to their requests."""
        answers = answers_decoder.decode(data)
        items: list[Answer] = [*answers.tokens, *answers.scored, *answers.saved, *answers.failed]
        for item in items:
            exchange = self._requests.get(item.request_id)
            if exchange is not None:  # else it was aborted while this was on its way
                exchange.put(item)
