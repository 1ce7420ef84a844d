"""What an engine answers to one request, as it comes, and how requests fail.

Tokens wait here for whoever reads them. When too many wait, the engine is told to pause the request.
"""

import asyncio
from collections.abc import Callable

from server.wire.messages import Abort, Failed, FailureReason, Input, Pause, Resume, Scored, StateSaved, Token

TOKEN_BYTES = 300
"""Bytes of memory that a token takes here while it waits for its reader, without alternatives."""
TOP_GROWTH = 4
"""How much longer than packed alternatives the JSON is, about, that will be made of them."""
MOST_TAKEN = 256
"""Most tokens that are taken at once: what a slow reader has let wait must not keep others waiting."""

Answer = Scored | StateSaved


class EngineError(Exception):
    """A request that an engine could not answer."""


class BrokenOutputError(EngineError):
    """The model's output is not finite."""


class StateError(EngineError):
    """A saved state that can't be read or written, or is of another model."""


class EngineUnavailableError(EngineError):
    """The engine is not there (loading, down), or died with this request in it."""


class UnkeptGrammarError(EngineError):
    """A grammar that the engine can't hold a completion to, or not any further."""


class OutOfMemoryError(EngineUnavailableError):
    """The engine's device had no memory for the request. It goes on with the others."""


FAILURES: dict[FailureReason, type[EngineError]] = {
    "state": StateError,
    "memory": OutOfMemoryError,
    "grammar": UnkeptGrammarError,
}
"""The error that a request ends with, by what the engine calls the reason."""


def _size_of(token: Token) -> int:
    """Bytes of memory that a waiting token takes."""
    return TOKEN_BYTES if token.top is None else TOKEN_BYTES + TOP_GROWTH * len(token.top)


class Exchange:
    """The answers to one request, as they come. Whoever opened it closes it.

    Args:
        wake: what the reader wants to be called each time that something has come.
        most_unread: bytes of tokens that may wait for the reader before the engine is told to pause the request.
        tell: sends a message to the engine, if it is there.
        on_finish: called once, when nothing more is to come, whether or not anybody has read what came.
        on_close: called once, when the reader wants nothing more.
    """

    def __init__(
        self,
        request_id: str,
        variant: str,
        wake: Callable[[], None],
        most_unread: float,
        tell: Callable[[Input], None],
        on_finish: Callable[[], None],
        on_close: "Callable[[Exchange], None]",
    ) -> None:
        self.request_id = request_id
        self.wake = wake
        self.finished = False
        """Whether nothing more is to come."""
        self.closed = False
        self._variant = variant
        self._most_unread = most_unread
        self._tell = tell
        self._on_finish = on_finish
        self._on_close = on_close
        self._answer: Answer | None = None
        self._error: EngineError | None = None
        self._tokens: list[Token] = []
        self._waiting_bytes = 0
        """Size of the tokens that wait."""
        self._paused = False

    def put(self, token: Token) -> None:
        """Take in a token that has come."""
        reason = token.finish_reason
        if reason == "error":
            self.fail(BrokenOutputError(f"variant {self._variant!r} gave NaN or Inf for this prompt"))
            return
        self._tokens.append(token)
        if reason is not None:
            self._finish()
            return
        self._waiting_bytes += _size_of(token)
        if self._waiting_bytes > self._most_unread and not self._paused:
            self._paused = True
            self._tell(Pause(request_id=self.request_id))

    def put_answer(self, answer: Answer) -> None:
        """Take in what has come instead of tokens."""
        self._answer = answer
        self._finish()

    def put_failure(self, failed: Failed) -> None:
        """Take in that the engine can't answer."""
        self.fail(FAILURES[failed.reason](failed.error))

    def lose(self) -> None:
        """Take in that the engine is gone."""
        self.fail(EngineUnavailableError(f"variant {self._variant!r} went down while it served this request"))

    def fail(self, error: EngineError) -> None:
        """Nothing more comes, for this reason; unless everything has come already."""
        if not self.finished:
            self._error = error
            self._finish()

    def has(self, count: int) -> bool:
        """Whether so many tokens wait, or all that will come before they are taken."""
        return len(self._tokens) >= count or self._paused or self.finished

    def take(self) -> list[Token]:
        """The tokens that have come since the last call, possibly none. Of very many the first ones, and `wake` is
        called for the rest."""
        tokens, self._tokens = self._tokens, []
        self._waiting_bytes = 0
        if len(tokens) > MOST_TAKEN:
            tokens, self._tokens = tokens[:MOST_TAKEN], tokens[MOST_TAKEN:]
            self._waiting_bytes = sum(map(_size_of, self._tokens))
            asyncio.get_running_loop().call_soon(self.wake)
        if self._paused and not self.finished and self._waiting_bytes <= self._most_unread / 2:
            self._paused = False
            self._tell(Resume(request_id=self.request_id))
        return tokens

    @property
    def error(self) -> EngineError | None:
        """Why there is nothing more to take; None if that is no error, or if there is."""
        return None if self._tokens else self._error

    def answer(self) -> Answer:
        """The answer that has come instead of tokens. Raises the error that came in its place."""
        if self._answer is None:
            raise self._error or RuntimeError(f"request {self.request_id} has not been answered")
        return self._answer

    def close(self) -> None:
        """Take nothing more. The engine forgets the request if it is not done with it. May be called again."""
        if self.closed:
            return
        self.closed = True
        self._on_close(self)
        if not self.finished:
            self._tell(Abort(request_id=self.request_id))
            self._finish()

    def _finish(self) -> None:
        if not self.finished:
            self.finished = True
            self._on_finish()
