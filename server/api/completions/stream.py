"""The events of a stream of completions."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from server.api.completions.choices import Choices
from server.api.completions.echo import in_parts, shifted
from server.api.completions.format import Format
from server.api.completions.generation import NOTHING, Chunk
from server.api.completions.schemas import StreamOptions
from server.api.http.errors import from_engine
from server.api.http.events import json_line, sse
from server.text.answers.parts import Arguments, Call, Part

_MARK = secrets.token_hex(16)
"""A text that is nowhere else in an event."""


class Events:
    """An event for each chunk of each choice, one with the finish reason of each, the usage if it was asked for; or the
    error that ends all. The last event but for an error has the `lowkey` block.

    Take its `opening`. Then `begin` it, `take` once, and again each time that it is woken, until it has `ended`.
    However that comes about, `close` it.
    """

    def __init__(self, choices: Choices, form: Format, options: StreamOptions) -> None:
        self.ended = False
        """Whether there is nothing more to take."""
        self._choices = choices
        self._form = form
        self._options = options
        self._before: list[Chunk] = []
        """What stands before each choice."""
        self._running = len(choices.messages)
        self._around: dict[int, tuple[bytes, bytes]] = {}
        """What stands around the text in an event of a choice that has nothing else to tell, by choice."""
        self._around_parts: dict[tuple[int, type[Part]], list[bytes]] = {}
        """What stands around its text, once or twice, in an event of a part that has nothing else to tell."""

    async def opening(self) -> AsyncGenerator[bytes]:
        """The events before any token: what the format wants to be first, and what is given back of the prompts.

        Raises:
            EngineError: the engine went away, or the model's output is broken.
        """
        for entry in self._form.first:
            yield self._event([entry])
        self._before = await self._choices.echo()
        if self._choices.prompts.echo is None:
            return
        for index, before in enumerate(self._before):
            for part in in_parts(before):
                yield self._event([self._form.part(index, part, None)])
                await asyncio.sleep(0)  # let others run: a fast reader never makes this wait

    def begin(self, wake: Callable[[], None]) -> None:
        """Have the engine generate.

        Args:
            wake: called each time that there is something to take.
        """
        for generation in self._choices.generations:
            generation.begin(wake)

    def take(self) -> bytes:
        """The events of all that has come since the last call, possibly none."""
        events: list[bytes] = []
        for index, generation in enumerate(self._choices.generations):
            if generation.ended:
                continue
            chunk = generation.take()
            if chunk.text:
                events.append(self._chunk(index, chunk))
                chunk = NOTHING
            elif chunk.parts:
                events += self._parts(index, chunk)
                chunk = NOTHING
            if generation.error is not None:
                events.append(sse(from_engine(generation.error).body()))
                self.close()
                break
            if generation.finish_reason is not None:
                events.append(self._end(index, chunk, generation.answer_reason or generation.finish_reason))
        return b"".join(events)

    def close(self) -> None:
        """Take nothing more; what has not ended is aborted. May be called again."""
        self.ended = True
        for generation in self._choices.generations:
            generation.end()

    def _chunk(self, index: int, chunk: Chunk) -> bytes:
        if chunk.entries or self._options.continuous_usage_stats:
            return self._event([self._form.part(index, self._shifted(index, chunk), None)])
        around = self._around.get(index)
        if around is None:
            event = self._event([self._form.part(index, Chunk(_MARK, []), None)])
            before, _, after = event.partition(json_line(_MARK))
            around = self._around[index] = before, after
        return around[0] + json_line(chunk.text) + around[1]

    def _parts(self, index: int, chunk: Chunk) -> Iterator[bytes]:
        """An event for each part. The tokens go with the first."""
        entries = self._shifted(index, chunk).entries
        for part in chunk.parts:
            if entries or self._options.continuous_usage_stats or isinstance(part, Call | Arguments):
                yield self._event([self._form.part(index, Chunk("", entries, [part]), None)])
                entries = []
                continue
            kind = type(part)
            around = self._around_parts.get((index, kind))
            if around is None:
                event = self._event([self._form.part(index, Chunk("", [], [kind(_MARK)]), None)])
                around = self._around_parts[index, kind] = event.split(json_line(_MARK))
            yield json_line(part.text).join(around)

    def _end(self, index: int, rest: Chunk, reason: str) -> bytes:
        self._running -= 1
        self.ended = not self._running
        with_usage = bool(self._options.include_usage)
        block = {"lowkey": self._choices.lowkey} if self.ended else {}
        listed = [self._form.part(index, self._shifted(index, rest), reason)]
        if not (self.ended and with_usage):
            return self._event(listed, **block)
        return self._event(listed) + self._event([], usage=self._choices.usage, **block)

    def _shifted(self, index: int, chunk: Chunk) -> Chunk:
        return Chunk(chunk.text, shifted(chunk.entries, self._before[index]))

    def _event(self, listed: list[dict[str, Any]], **extra: Any) -> bytes:
        if self._options.continuous_usage_stats:
            extra = {"usage": self._choices.usage, **extra}
        elif self._options.include_usage:
            extra = {"usage": None, **extra}
        return sse({**self._form.head, "choices": listed, **extra})
