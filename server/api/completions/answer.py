"""From a request that is ready to run to its HTTP answer, whole or as a stream."""

from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing

from fastapi import Request
from fastapi.responses import Response

from server.api.completions.choices import Choices
from server.api.completions.format import Format
from server.api.completions.generation import Chunk
from server.api.completions.schemas import ChoiceFields, StreamOptions
from server.api.completions.stream import Events
from server.api.http.aside import aside
from server.api.http.encoding import json_response
from server.api.http.errors import from_engine
from server.api.http.events import CONNECTION, DONE, Connection, EventStream, pushed, sse
from server.api.http.tasks import unless_disconnected
from server.wire.exchange import EngineError


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
        events = Events(choices, form, body.stream_options or StreamOptions())
        stream = _stream(events, request.scope.get(CONNECTION))
        return EventStream(stream, on_end=stack.pop_all().close)
    try:
        chunks = await unless_disconnected(request, choices.run())
    except EngineError as e:
        raise from_engine(e) from e
    if body.alternatives is None:
        return _whole(choices, chunks, form)
    return await aside(_whole, choices, chunks, form)


def _whole(choices: Choices, chunks: list[Chunk], form: Format) -> Response:
    listed = [
        form.whole(index, chunk, generation.answer_reason)
        for index, (chunk, generation) in enumerate(zip(chunks, choices.generations, strict=True))
    ]
    return json_response(
        {**form.head, "choices": listed, "usage": choices.usage, "lowkey": choices.lowkey}, choices.headers
    )


async def _stream(events: Events, connection: Connection | None) -> AsyncGenerator[bytes]:
    """What is sent by itself of a stream of completions: its first events, those of tokens where there is no connection
    to write them to, and its end."""
    try:
        async with aclosing(events.opening()) as opening:
            async for event in opening:
                yield event
        async with aclosing(pushed(events, connection)) as rest:
            async for data in rest:
                yield data
    except EngineError as e:
        yield sse(from_engine(e).body())
    yield DONE
