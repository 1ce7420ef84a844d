"""The API process's side of an engine: hands each request to it, and its tokens to the request.

Imports no torch: the API process stays light and never blocks on a device.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field

from server.wire.exchange import Answer, EngineUnavailableError, Exchange, StateError
from server.wire.messages import (
    Generate,
    Input,
    Occupancy,
    SaveState,
    Score,
    Scored,
    StateSaved,
    StepOutput,
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
    _woken: dict[Callable[[], None], None] = field(default_factory=dict, init=False)
    """What is to be called for the readers of those that something has come for, in order."""
    _waking: asyncio.Handle | None = field(default=None, init=False)
    """The call of `_wake` to come, if there is one."""

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
            self.config.variant,
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

    def _deliver(self, output: StepOutput | Occupancy) -> None:
        if isinstance(output, Occupancy):
            self.on_occupancy(output)
            return
        requests = self._requests  # those that are not there were aborted while this was on its way
        for token in output.tokens:
            if (exchange := requests.get(token.request_id)) is not None:
                exchange.put(token)
                self._woken[exchange.wake] = None
        answers: list[Answer] = [*output.scored, *output.saved]
        for answer in answers:
            if (exchange := requests.get(answer.request_id)) is not None:
                exchange.put_answer(answer)
                self._woken[exchange.wake] = None
        for failed in output.failed:
            if (exchange := requests.get(failed.request_id)) is not None:
                exchange.put_failure(failed)
                self._woken[exchange.wake] = None
        self._wake_soon()
        self.on_step(output)
        self.on_occupancy(output.occupancy)

    def _lost(self) -> None:
        """Requests that were in the engine fail with EngineUnavailableError."""
        for exchange in self._requests.values():
            exchange.lose()
            self._woken[exchange.wake] = None
        self._wake_soon()

    def _wake_soon(self) -> None:
        """Wake the readers once all messages that have come are read: each takes what all of them brought."""
        if self._waking is None and self._woken:
            self._waking = asyncio.get_running_loop().call_soon(self._wake)

    def _wake(self) -> None:
        woken, self._woken, self._waking = self._woken, {}, None
        for wake in woken:
            wake()
