"""A front end's way to a hub in another process, over ZeroMQ: both its ends."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import zmq

from server.wire.hub import (
    Admit,
    HubSilentError,
    News,
    NextOrder,
    Ping,
    Question,
    Refusal,
    TakeRequest,
    Update,
)
from server.wire.inbox import Inbox

logger = logging.getLogger("lowkey.hub")


class Join(msgspec.Struct, frozen=True, tag=True):
    """A front end is there, and wants to be told updates."""


class Asked(msgspec.Struct, frozen=True, tag=True):
    """A question. Its answer has the same number."""

    number: int
    question: Question


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for the answer of that number any more."""

    number: int


class Answered(msgspec.Struct, frozen=True, tag=True):
    """The answer to a question."""

    number: int
    answer: msgspec.Raw
    failed: bool = False
    """Whether there is none, for a reason that the hub has logged."""


_encode = msgspec.msgpack.encode
_to_hub = msgspec.msgpack.Decoder(Join | Asked | Forget | News)
_to_front_end = msgspec.msgpack.Decoder(Answered | Update)
PROMPT = (TakeRequest, Admit, NextOrder, Ping)
"""Questions that are answered at once by a hub that does anything."""
PROMPT_S = 10.0
"""How long the answer to one of those may take."""
_ANSWERS: dict[type, Any] = {Admit: Refusal | None}
"""The types of answers that are more than what msgpack has by itself."""


class RemoteLink:
    """The front end's end (`server.wire.hub.Link`). Make it in the loop that it is used in.

    Args:
        address: where the hub's `LinkServer` listens.
        fail: called when an update could not be taken in, so that this front end does not know how things are.
    """

    def __init__(
        self, address: str, front_end: str, started: int, runtime_dir: Path, fail: Callable[[], None]
    ) -> None:
        self.front_end = front_end
        self.started = started
        self.runtime_dir = runtime_dir
        self._fail = fail
        self._receive: Callable[[Update], None] = lambda _: None
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[msgspec.Raw]] = {}
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, front_end.encode())
        socket.set_hwm(0)
        socket.connect(address)
        self._inbox = Inbox(socket, self._take)

    def listen(self, receive: Callable[[Update], None]) -> None:
        self._receive = receive
        self._inbox.send(_encode(Join()))

    async def ask(self, question: Question) -> Any:
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._inbox.send(_encode(Asked(number, question)))
            async with asyncio.timeout(PROMPT_S if isinstance(question, PROMPT) else None):
                data = await answer
            return msgspec.msgpack.decode(data, type=_ANSWERS.get(type(question), Any))
        except TimeoutError as e:
            raise HubSilentError(f"the hub has not answered within {PROMPT_S:.0f} s") from e
        finally:
            del self._waiting[number]
            if not answer.done() or answer.cancelled():
                self._inbox.send(_encode(Forget(number)))

    def tell(self, news: News) -> None:
        self._inbox.send(_encode(news))

    def close(self) -> None:
        """Have no more to do with the hub."""
        self._inbox.close()

    def _take(self, data: bytes) -> None:
        message = _to_front_end.decode(data)
        if not isinstance(message, Answered):
            try:
                self._receive(message)
            except Exception:
                logger.exception("an update of the hub could not be taken in: %s", type(message).__name__)
                self._fail()
            return
        waiting = self._waiting.get(message.number)
        if waiting is None or waiting.done():
            return
        if message.failed:
            waiting.set_exception(RuntimeError("the hub could not answer; the log says why"))
        else:
            waiting.set_result(message.answer)


class LinkServer:
    """The hub's end, for all front ends in processes of their own.

    Args:
        join: called with the name of a front end that has come, and the function that tells it updates.
        ask: answers the question of a front end.
        tell: takes in the news of a front end.
    """

    def __init__(
        self,
        address: str,
        join: Callable[[str, Callable[[Update], None]], None],
        ask: Callable[[str, Question], Coroutine[Any, Any, Any]],
        tell: Callable[[str, News], None],
    ) -> None:
        self._join, self._ask, self._tell = join, ask, tell
        self._questions: dict[tuple[str, int], asyncio.Task[None]] = {}
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        socket = context.socket(zmq.ROUTER)
        socket.set_hwm(0)
        socket.bind(address)
        self._inbox = Inbox(socket, self._take)

    def gone(self, front_end: str) -> None:
        """A front end has ended: nobody waits for its answers any more."""
        for (asker, _), task in list(self._questions.items()):
            if asker == front_end:
                task.cancel()

    def close(self) -> None:
        """Listen no more."""
        for task in self._questions.values():
            task.cancel()
        self._inbox.close()

    def _send(self, front_end: str, message: Answered | Update) -> None:
        self._inbox.send(front_end.encode(), _encode(message))

    def _take(self, identity: bytes, data: bytes) -> None:
        front_end, message = identity.decode(), _to_hub.decode(data)
        match message:
            case Join():
                self._join(front_end, lambda update: self._send(front_end, update))
            case Asked():
                key = front_end, message.number
                task = asyncio.create_task(self._answer(front_end, message))
                self._questions[key] = task
                task.add_done_callback(lambda _: self._questions.pop(key, None))
            case Forget():
                asked = self._questions.get((front_end, message.number))
                if asked is not None:
                    asked.cancel()
            case _:
                self._tell(front_end, message)

    async def _answer(self, front_end: str, asked: Asked) -> None:
        try:
            answer = await self._ask(front_end, asked.question)
        except Exception:
            logger.exception("a front end's question could not be answered: %r", asked.question)
            self._send(front_end, Answered(asked.number, msgspec.Raw(_encode(None)), failed=True))
        else:
            self._send(front_end, Answered(asked.number, msgspec.Raw(_encode(answer))))
