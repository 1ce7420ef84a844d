"""What an engine answers to one request, as it comes, and how requests fail.

Tokens wait here for whoever reads them. When too many wait, the engine is told to pause the request.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from server.wire.messages import Failed, Input, Pause, Resume, Scored, StateSaved, Token

TOKEN_BYTES = 300
"""Bytes of memory that a token takes here while it waits for its reader."""
ALTERNATIVE_BYTES = 120
"""Bytes that each alternative adds, if alternatives are reported with the token."""

Answer = Token | Scored | StateSaved | Failed


class EngineError(Exception):
    """A request that an engine could not answer."""


class BrokenOutputError(EngineError):
    """The model's output is not finite."""


class StateError(EngineError):
    """A saved state that can't be read or written, or is of another model."""


class EngineUnavailableError(EngineError):
    """The engine is not there (loading, down), or died with this request in it."""


class OutOfMemoryError(EngineUnavailableError):
    """The engine's device had no memory for the request. It goes on with the others."""


def _size_of(token: Token) -> int:
    """Bytes of memory that a waiting token takes."""
    return TOKEN_BYTES + ALTERNATIVE_BYTES * len(token.top or ())


class Exchange:
    """The answers to one request, as they come.

    Args:
        most_unread: bytes of tokens that may wait for the reader before the engine is told to pause the request.
        tell: sends a message to the engine, if it is there.
        on_finish: called once, when nothing more is to come, whether or not anybody has read what came.
    """

    def __init__(
        self,
        request_id: str,
        variant: str,
        most_unread: float,
        tell: Callable[[Input], None],
        on_finish: Callable[[], None],
    ) -> None:
        self.finished = False
        """Whether nothing more is to come."""
        self._id = request_id
        self._variant = variant
        self._most_unread = most_unread
        self._tell = tell
        self._on_finish = on_finish
        self._answers: deque[Answer | None] = deque()
        self._arrived = asyncio.Event()
        self._waiting_bytes = 0
        """Size of the tokens in `_answers`."""
        self._taken_bytes = 0
        """Size of the tokens that the reader has taken and is still busy with."""
        self._paused = False

    def put(self, answer: Answer | None) -> None:
        """Take in an answer that has come; None says that the engine is gone."""
        self._answers.append(answer)
        self._arrived.set()
        if not isinstance(answer, Token) or answer.finish_reason is not None:
            self.finish()
            return
        self._waiting_bytes += _size_of(answer)
        if self._waiting_bytes + self._taken_bytes > self._most_unread and not self._paused:
            self._paused = True
            self._tell(Pause(request_id=self._id))

    def finish(self) -> None:
        """Take nothing more: the last answer has come, or no more are wanted."""
        if not self.finished:
            self.finished = True
            self._on_finish()

    async def tokens(self) -> list[Token]:
        """All tokens that have come since the last call, at least one. A call says that the reader is done with those
        before. Raises as `answer` does."""
        self._taken_bytes = 0
        if self._paused and not self.finished and self._waiting_bytes <= self._most_unread / 2:
            self._paused = False
            self._tell(Resume(request_id=self._id))
        first = await self.answer()
        assert isinstance(first, Token)
        tokens = [first]
        while self._answers and isinstance(token := self._answers[0], Token):
            tokens.append(token)
            self._answers.popleft()
        self._taken_bytes, self._waiting_bytes = self._waiting_bytes, 0
        return tokens

    async def answer(self) -> Token | Scored | StateSaved:
        """The next answer. Raises EngineUnavailableError, OutOfMemoryError among them, and StateError."""
        while not self._answers:
            self._arrived.clear()
            await self._arrived.wait()
        answer = self._answers.popleft()
        if answer is None:
            raise EngineUnavailableError(f"variant {self._variant!r} went down while it served this request")
        if isinstance(answer, Failed):
            raise (StateError if answer.reason == "state" else OutOfMemoryError)(answer.error)
        return answer
