"""From a request that is ready to run to its HTTP answer, whole or as a stream: all its choices, the prompt's own
tokens before each."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from server.api.completions.echo import echoed, in_parts, joined, shifted
from server.api.completions.generation import MIN_TIMED_TOKENS, Chunk, Generation, Observer, usage
from server.api.completions.prepare import Prompts
from server.api.completions.schemas import ChoiceFields, StreamOptions
from server.api.http.aside import aside
from server.api.http.encoding import json_response
from server.api.http.errors import from_engine
from server.api.http.events import DONE, EventStream, sse
from server.api.http.tasks import merged, together, unless_disconnected
from server.api.serving.service import Origin, Places
from server.settings import Settings
from server.wire.exchange import EngineError
from server.wire.messages import Generate

NOTHING = Chunk("", [])


@dataclass(frozen=True)
class Choices:
    """All choices of one request. Take their `chunks` or `run` them, once."""

    places: Places
    """Places in the variant's queue, one for each choice, that are left when the engine is done with each."""
    fields: ChoiceFields
    prompts: Prompts
    messages: list[Generate]
    """What the engine is asked for, for each choice (`generate_messages`)."""
    origin: Origin
    observers: Sequence[Observer]
    """Who is told of each choice that has ended."""
    settings: Settings

    @cached_property
    def generations(self) -> list[Generation]:
        """One generation for each choice."""
        saved = self.prompts.saved
        # A reader who keeps up leaves a token or two waiting. A whole answer takes each token as it comes.
        most_unread = self.settings.stream_buffer_bytes / len(self.messages)
        return [
            Generation(
                self.places.variant,
                self.fields,
                message,
                self.origin,
                observers=self.observers,
                saved_tokens=0 if saved is None else saved.header.tokens,
                most_unread=most_unread,
                on_sampled=self.places.leave,
            )
            for message in self.messages
        ]

    async def run(self) -> list[Chunk]:
        """Run all choices to their end: one chunk for each.

        Raises:
            EngineError: the engine went away, or the model's output is broken.
        """
        echo = await self._echo()
        chunks = await together([generation.run() for generation in self.generations])

        def whole() -> list[Chunk]:
            return [joined(before, chunk) for before, chunk in zip(echo, chunks, strict=True)]

        return whole() if self.fields.alternatives is None else await aside(whole)

    async def chunks(self) -> AsyncGenerator[tuple[int, Chunk, str | None]]:
        """(choice, what is new, finish reason) as they come; the reason with the last chunk of each, whose text is
        empty. Leaving early aborts all. Raises as `run` does."""
        echo = await self._echo()
        streams = [self._stream(*each) for each in zip(self.generations, echo, strict=True)]
        async with aclosing(merged(streams)) as items:
            async for index, (chunk, reason) in items:
                yield index, chunk, reason

    async def _echo(self) -> list[Chunk]:
        """What stands before each choice."""
        if self.prompts.echo is None:
            return [NOTHING for _ in self.generations]
        chunks = await echoed(
            self.places.variant, self.fields, self.origin, self.prompts.ids, self.prompts.echo
        )
        return [chunk for chunk in chunks for _ in range(self.fields.choices_each)]

    async def _stream(
        self, generation: Generation, before: Chunk
    ) -> AsyncGenerator[tuple[Chunk, str | None]]:
        if self.prompts.echo is not None:
            for part in in_parts(before):
                yield part, None
                await asyncio.sleep(0)  # let others run: a fast reader never makes this wait
        rest = NOTHING
        async with aclosing(generation.chunks()) as chunks:
            async for chunk in chunks:
                after = Chunk(chunk.text, shifted(chunk.entries, before))
                if chunk.text:
                    yield after, None
                else:
                    rest = after
        yield rest, generation.finish_reason

    @property
    def usage(self) -> dict[str, Any]:
        """The tokens of all choices; a prompt counts once, however many choices it has."""
        firsts = self.generations[:: self.fields.choices_each]
        return usage(
            sum(g.prompt_tokens for g in firsts),
            sum(len(g.token_ids) for g in self.generations),
            sum(g.cached_tokens for g in firsts),
        )

    @property
    def lowkey(self) -> dict[str, Any]:
        """What the request held and how fast it was. Of several choices: the memory of all, the time of the first
        token and of the last, and a finish reason if they have the same."""
        blocks = [g.lowkey for g in self.generations]
        if len(blocks) == 1:
            return blocks[0]
        times = [g.times for g in self.generations if g.times is not None]
        decode_s = None if not times else max(last for _, last in times) - min(first for first, _ in times)
        lengths = [len(g.token_ids) for g in self.generations]
        speed = None
        if decode_s and max(lengths) > MIN_TIMED_TOKENS:
            speed = (sum(lengths) - 1) / decode_s
        reasons = {block["finish_reason"] for block in blocks}
        return {
            **blocks[0],
            "state_bytes": sum(block["state_bytes"] for block in blocks),
            "queue_s": min((b["queue_s"] for b in blocks if b["queue_s"] is not None), default=None),
            "ttft_s": min((b["ttft_s"] for b in blocks if b["ttft_s"] is not None), default=None),
            "decode_s": decode_s,
            "tokens_per_second": speed,
            "cached_tokens": self.usage["prompt_tokens_details"]["cached_tokens"],
            "finish_reason": reasons.pop() if len(reasons) == 1 else None,
        }

    @property
    def headers(self) -> dict[str, str]:
        """Two numbers of the `lowkey` block, as headers of answers that are no stream."""
        block = self.lowkey
        speed = block["tokens_per_second"]
        return {
            "x-lowkey-state-bytes": str(block["state_bytes"]),
            "x-lowkey-tokens-per-second": "null" if speed is None else f"{speed:.3f}",
        }


Shape = Callable[[int, Chunk, str | None], dict[str, Any]]
"""Makes the entry of `choices` from a choice's index, its chunk, and its finish reason."""


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
