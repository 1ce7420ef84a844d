"""From a request that is ready to run to its HTTP answer, whole or as a stream."""

from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from server.api.completions.choices import Choices
from server.api.completions.generation import Chunk
from server.api.completions.schemas import ChoiceFields, StreamOptions
from server.api.http.aside import aside
from server.api.http.encoding import json_response
from server.api.http.errors import from_engine
from server.api.http.events import DONE, EventStream, sse
from server.api.http.tasks import unless_disconnected
from server.wire.exchange import EngineError

Shape = Callable[[int, Chunk, str | None], dict[str, Any]]
"""(choice's index, its chunk, finish reason) -> the entry of `choices`."""


@dataclass(frozen=True)
class Format:
    """How an endpoint writes its answers."""

    head: dict[str, Any]
    """Fields of the answer, and of each event of a stream, before `choices`."""
    whole: Shape
    """How it writes a choice in a whole answer."""
    part: Shape
    """How it writes what is new of a choice in an event."""
    first: list[dict[str, Any]] = field(default_factory=list)
    """Entries of `choices` to send in events of their own before any text."""


async def answer(
    request: Request, body: ChoiceFields, choices: Choices, form: Format, stack: ExitStack
) -> Response:
    """The answer to a request for completions.

    Args:
        stack: what is held until the answer has ended.

    Raises:
        APIError: an engine could not answer.
    """
    if body.stream:
        events = _events(choices, form, body.stream_options or StreamOptions())
        return EventStream(events, on_end=stack.pop_all().close)
    try:
        chunks = await unless_disconnected(request, choices.run())
    except EngineError as e:
        raise from_engine(e) from e
    if body.alternatives is None:
        return _whole(choices, chunks, form)
    return await aside(_whole, choices, chunks, form)


def _whole(choices: Choices, chunks: list[Chunk], form: Format) -> Response:
    listed = [
        form.whole(index, chunk, generation.finish_reason)
        for index, (chunk, generation) in enumerate(zip(chunks, choices.generations, strict=True))
    ]
    return json_response(
        {**form.head, "choices": listed, "usage": choices.usage, "lowkey": choices.lowkey}, choices.headers
    )


async def _events(choices: Choices, form: Format, options: StreamOptions) -> AsyncGenerator[bytes]:
    """Text events, one with the finish reason of each choice, the usage if asked for, [DONE]. The last event before
    [DONE] has the `lowkey` block."""

    def event(listed: list[dict[str, Any]], **extra: Any) -> bytes:
        if options.continuous_usage_stats:
            extra = {"usage": choices.usage, **extra}
        elif options.include_usage:
            extra = {"usage": None, **extra}
        return sse({**form.head, "choices": listed, **extra})

    running = len(choices.generations)
    try:
        for entry in form.first:
            yield event([entry])
        async with aclosing(choices.chunks()) as chunks:
            async for index, chunk, reason in chunks:
                running -= reason is not None
                last = not running and not options.include_usage
                extra = {"lowkey": choices.lowkey} if last else {}
                yield event([form.part(index, chunk, reason)], **extra)
    except EngineError as e:
        yield sse(from_engine(e).body())
        yield DONE
        return
    if options.include_usage:
        yield event([], usage=choices.usage, lowkey=choices.lowkey)
    yield DONE
