"""All choices of one request: several prompts, several choices for each, the prompt's own tokens before them."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from server.api.completions.echo import echoed, in_parts, joined, shifted
from server.api.completions.generation import MIN_TIMED_TOKENS, Chunk, Generation, Origin, usage
from server.api.completions.schemas import ChoiceFields
from server.api.http.aside import aside
from server.api.http.errors import APIError
from server.api.http.tasks import merged, together
from server.api.serving.service import Places
from server.api.states.store import SavedState
from server.settings import Settings

NOTHING = Chunk("", [])


@dataclass(frozen=True)
class Prompts:
    """What is completed: prompts of which each has room in the context, and what stands before them."""

    ids: list[list[int]]
    """Token ids of each, that `encode_prompt` has checked."""
    echo: list[str] | None = None
    """What to give back before each one's choices; None to give nothing."""
    saved: SavedState | None = None
    """The state that all go on from."""


def per_choice(settings: Settings, fields: ChoiceFields, prompts: int = 1) -> int:
    """How many tokens each choice may have, so that an answer with log-probabilities of all keeps to
    `max_answer_entries`."""
    each = 1 + (fields.alternatives or 0)
    return settings.max_answer_entries // (prompts * fields.choices_each * each)


def _check_size(settings: Settings, fields: ChoiceFields, prompts: Prompts) -> None:
    """400 for an answer of more entries than `max_answer_entries`."""
    alternatives = fields.alternatives
    listed = 0 if alternatives is None else fields.token_limit * len(prompts.ids)
    echoed_tokens = 0 if prompts.echo is None else sum(map(len, prompts.ids))
    tokens = fields.choices_each * (listed + echoed_tokens)
    each = 1 + (alternatives or 0)
    if tokens * each > settings.max_answer_entries:
        param = "n" if alternatives is None else "logprobs"
        raise APIError(
            400,
            f"{param}: {tokens} tokens in all, with {each} entries for each, are {tokens * each} entries; one answer "
            f"may have {settings.max_answer_entries} (max_answer_entries)",
            param=param,
        )


class Choices:
    """Choice p * n + i is the i-th of prompt p. Take their `chunks` or `run` them, once.

    Args:
        places: in the variant's queue, one for each choice, that are left when the engine is done with each.

    Raises:
        APIError: 400, the answer may come to more than `max_answer_entries`, or a field has token ids that the model
            lacks.
    """

    def __init__(
        self, settings: Settings, places: Places, fields: ChoiceFields, prompts: Prompts, origin: Origin
    ) -> None:
        _check_size(settings, fields, prompts)
        self._variant = places.variant
        self._each = fields.choices_each
        self._fields = fields
        self._origin = origin
        self._prompts = prompts
        # A reader who keeps up leaves a token or two waiting. A whole answer takes each token as it comes.
        most_unread = settings.stream_buffer_bytes / (len(prompts.ids) * self._each)
        self.generations = [
            Generation(
                places.variant,
                fields,
                ids,
                origin,
                choice=choice,
                saved=prompts.saved,
                most_unread=most_unread,
                on_sampled=places.leave,
            )
            for ids in prompts.ids
            for choice in range(self._each)
        ]

    async def run(self) -> list[Chunk]:
        """Everything, one chunk for each choice.

        Raises:
            EngineError: the engine went away, or the model's output is broken.
        """
        echo = await self._echo()
        chunks = await together([generation.run() for generation in self.generations])

        def whole() -> list[Chunk]:
            return [joined(before, chunk) for before, chunk in zip(echo, chunks, strict=True)]

        return whole() if self._fields.alternatives is None else await aside(whole)

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
        if self._prompts.echo is None:
            return [NOTHING for _ in self.generations]
        chunks = await echoed(
            self._variant, self._fields, self._origin, self._prompts.ids, self._prompts.echo
        )
        return [chunk for chunk in chunks for _ in range(self._each)]

    async def _stream(
        self, generation: Generation, before: Chunk
    ) -> AsyncGenerator[tuple[Chunk, str | None]]:
        if self._prompts.echo is not None:
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
        """Over all choices; a prompt counts once, however many choices it has."""
        firsts = self.generations[:: self._each]
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
        """Two numbers of the block, for answers that are no stream."""
        block = self.lowkey
        speed = block["tokens_per_second"]
        return {
            "x-lowkey-state-bytes": str(block["state_bytes"]),
            "x-lowkey-tokens-per-second": "null" if speed is None else f"{speed:.3f}",
        }
