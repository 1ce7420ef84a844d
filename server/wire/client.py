"""A front end's side of an engine: hands each request to it, and its answers to the request.

Imports no torch: a front end stays light and never waits for a device.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable

import zmq

from server.wire.exchange import Answer, EngineUnavailableError, Exchange, StateError
from server.wire.inbox import Inbox
from server.wire.messages import (
    Generate,
    Input,
    Ready,
    SaveState,
    Score,
    Scored,
    StateSaved,
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
        self.last_step = 0.0
        """`made_at` of the last step of the engine that brought an answer."""
        self._variant = variant
        self._front_end = front_end
        self._inbox: Inbox | None = None
        self._requests: dict[str, Exchange] = {}
        self._woken: dict[Callable[[], None], None] = {}
        """What is to be called for the readers of those that something has come for, in order."""

    @property
    def up(self) -> bool:
        """Whether the engine takes requests now."""
        return self._inbox is not None

    def engine_up(self, ready: Ready, address: str) -> None:
        """The engine has loaded, and takes requests there."""
        self.engine_down()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self._front_end.encode())
        socket.set_hwm(0)
        socket.connect(address)
        # Readers are woken once all messages that have come are read: they take the tokens of all of them.
        self.ready, self._inbox = ready, Inbox(socket, self._deliver, self._wake)

    def engine_down(self) -> None:
        """The engine is gone: nothing more comes of what was sent to it, and its requests fail."""
        if self._inbox is not None:
            self._inbox.close()
            self._inbox = None
        for exchange in self._requests.values():
            exchange.lose()
            self._woken[exchange.wake] = None
        if self._woken:
            asyncio.get_running_loop().call_soon(self._wake)

    def generate(
        self,
        message: Generate,
        wake: Callable[[], None],
        *,
        most_unread: float = math.inf,
        on_sampled: Callable[[], None] = lambda: None,
    ) -> Exchange:
        """Have the engine generate. Closing what is returned before its last token aborts the request.

        Args:
            wake: called, and it must not raise, when tokens or an error have come: once for all that have come by then,
                also if several requests share it. It may be called once after they are closed.
            most_unread: bytes of tokens that may wait to be taken from there. Beyond that the engine pauses the request
                until they have been.
            on_sampled: called once, when the engine is done with the request, whether or not its tokens have been
                taken.

        Raises:
            EngineUnavailableError: the engine is not there.
        """
        return self._open(message, wake, most_unread, on_sampled)

    async def score(self, message: Score) -> Scored:
        """Log-probabilities of given tokens. Raises EngineUnavailableError, OutOfMemoryError among them."""
        scored = await self._answer(message)
        assert isinstance(scored, Scored)
        return scored

    async def save_state(self, message: SaveState) -> None:
        """Have the state after a prompt written to a file.

        Raises:
            EngineUnavailableError: before the answer, OutOfMemoryError among them.
            StateError: it could not be written.
        """
        saved = await self._answer(message)
        assert isinstance(saved, StateSaved)
        if saved.error is not None:
            raise StateError(saved.error)

    async def _answer(self, message: Score | SaveState) -> Answer:
        arrived = asyncio.Event()
        with contextlib.closing(self._open(message, arrived.set)) as exchange:
            await arrived.wait()
            return exchange.answer()

    def _open(
        self,
        message: Generate | Score | SaveState,
        wake: Callable[[], None],
        most_unread: float = math.inf,
        on_finish: Callable[[], None] = lambda: None,
    ) -> Exchange:
        """Send a request. Raises EngineUnavailableError."""
        exchange = Exchange(
            message.request_id,
            self._variant,
            wake,
            most_unread,
            self._tell,
            on_finish,
            on_close=self._forget,
        )
        self._requests[message.request_id] = exchange
        try:
            self.send(message)
        except EngineUnavailableError:
            exchange.close()
            raise
        return exchange

    def _forget(self, exchange: Exchange) -> None:
        del self._requests[exchange.request_id]

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
        self.last_step = answers.made_at
        requests = self._requests  # those that are not there were aborted while this was on its way
        for token in answers.tokens:
            if (exchange := requests.get(token.request_id)) is not None:
                exchange.put(token)
                self._woken[exchange.wake] = None
        others: list[Answer] = [*answers.scored, *answers.saved]
        for answer in others:
            if (exchange := requests.get(answer.request_id)) is not None:
                exchange.put_answer(answer)
                self._woken[exchange.wake] = None
        for failed in answers.failed:
            if (exchange := requests.get(failed.request_id)) is not None:
                exchange.put_failure(failed)
                self._woken[exchange.wake] = None

    def _wake(self) -> None:
        woken, self._woken = self._woken, {}
        for wake in woken:
            wake()
