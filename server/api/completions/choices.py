"""All choices of one request: several prompts, several choices for each, the prompt's own tokens before them."""

import asyncio
import math
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import pairwise
from typing import Any

from server.api.completions.generation import MIN_TIMED_TOKENS, Chunk, Entry, Generation, Saved, usage
from server.api.completions.schemas import ChoiceFields
from server.api.http.aside import aside
from server.api.http.errors import APIError
from server.api.http.streaming import merged, together
from server.api.serving.service import Places, ServerState
from server.settings import Settings
from server.text.detokenizer import Detokenizer
from server.wire.exchange import BrokenOutputError
from server.wire.messages import Score, Scored

NOTHING = Chunk("", [])

PART_ENTRIES = 100
"""Tokens with log-probabilities in one event of a stream, at most."""


def _parts(chunk: Chunk) -> list[Chunk]:
    """A chunk, whose entries' offsets count from its first character, as chunks of few entries: to encode a long one
    would hold up all streams."""
    parts = [chunk.entries[at : at + PART_ENTRIES] for at in range(0, len(chunk.entries), PART_ENTRIES)]
    cuts = [0, *(part[0].offset for part in parts[1:]), len(chunk.text)]
    return [Chunk(chunk.text[a:b], part) for (a, b), part in zip(pairwise(cuts), parts or [[]], strict=True)]


def per_choice(settings: Settings, fields: ChoiceFields, prompts: int = 1) -> int:
    """How many tokens each choice may have, so that an answer with log-probabilities of all keeps to
    `max_answer_entries`."""
    each = 1 + (fields.alternatives or 0)
    return settings.max_answer_entries // (prompts * fields.choices_each * each)


def _check_size(settings: Settings, fields: ChoiceFields, prompts: list[list[int]], *, echo: bool) -> None:
    """400 for an answer of more entries than `max_answer_entries`."""
    alternatives = fields.alternatives
    listed = 0 if alternatives is None else fields.token_limit * len(prompts)
    tokens = fields.choices_each * (listed + (sum(map(len, prompts)) if echo else 0))
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
    """Choice p * n + i is the i-th of prompt p.

    Args:
        places: in the variant's queue, one for each choice, that are left when the engine is done with each.
        prompts: token ids that `encode_prompt` has checked.
        salt: what their prefixes are kept under (`cache_salt`).
        echo: what to give back before each prompt's choices: the text of each prompt, or None to give nothing.

    Raises:
        APIError: 400, the answer may come to more than `max_answer_entries`.
    """

    def __init__(
        self,
        state: ServerState,
        places: Places,
        fields: ChoiceFields,
        prompts: list[list[int]],
        *,
        endpoint: str,
        arrived: float,
        priority: int,
        salt: bytes,
        saved: Saved | None = None,
        echo: list[str] | None = None,
    ) -> None:
        _check_size(state.settings, fields, prompts, echo=echo is not None)
        self.variant = variant = places.variant
        self.each = fields.choices_each
        self._fields = fields
        self._priority = priority
        self._salt = salt
        self._prompts = prompts
        self._echo = echo
        self._echoed: list[Chunk] = []
        # A reader who keeps up leaves a token or two waiting. A whole answer takes each token as it comes.
        most_unread = state.settings.stream_buffer_bytes / (len(prompts) * self.each)
        self.generations = [
            Generation(
                state,
                variant,
                fields,
                ids,
                endpoint=endpoint,
                arrived=arrived,
                salt=salt,
                choice=choice,
                priority=priority,
                saved=saved,
                most_unread=most_unread,
                on_sampled=places.leave,
            )
            for ids in prompts
            for choice in range(self.each)
        ]

    async def run(self) -> list[Chunk]:
        """Everything, one chunk for each choice.

        Raises:
            EngineError: the engine went away, or the model's output is broken.
        """
        await self._read_prompts()
        chunks = await together([generation.run() for generation in self.generations])

        def joined() -> list[Chunk]:
            echoed = [self._before(index) for index in range(len(self.generations))]
            return [
                Chunk(before.text + chunk.text, before.entries + self._shifted(chunk.entries, before))
                for before, chunk in zip(echoed, chunks, strict=True)
            ]

        return joined() if self._fields.alternatives is None else await aside(joined)

    async def chunks(self) -> AsyncGenerator[tuple[int, Chunk, str | None]]:
        """(choice, what is new, finish reason) as they come; the reason with the last chunk of each, whose text is
        empty. Leaving early aborts all. Raises as `run` does."""
        await self._read_prompts()
        async with aclosing(merged([self._one(i) for i in range(len(self.generations))])) as items:
            async for index, (chunk, reason) in items:
                yield index, chunk, reason

    async def _one(self, index: int) -> AsyncGenerator[tuple[Chunk, str | None]]:
        generation, before = self.generations[index], self._before(index)
        if self._echo is not None:
            for part in _parts(before):
                yield part, None
                await asyncio.sleep(0)  # let others run: a fast reader never makes this wait
        rest = NOTHING
        async with aclosing(generation.chunks()) as chunks:
            async for chunk in chunks:
                shifted = Chunk(chunk.text, self._shifted(chunk.entries, before))
                if chunk.text:
                    yield shifted, None
                else:
                    rest = shifted
        yield rest, generation.finish_reason

    def _before(self, index: int) -> Chunk:
        return NOTHING if self._echo is None else self._echoed[index // self.each]

    @staticmethod
    def _shifted(entries: list[Entry], before: Chunk) -> list[Entry]:
        if not before.text:
            return entries
        return [Entry(e.token_id, e.offset + len(before.text), e.logprob, e.top) for e in entries]

    async def _read_prompts(self) -> None:
        """With echo, the prompts' own tokens; with log-probabilities too, what the model thinks of each."""
        if self._echo is None:
            return
        if self._fields.alternatives is None:
            self._echoed = [Chunk(text, []) for text in self._echo]
            return
        scored = await together([self._entries(ids) for ids in self._prompts])
        self._echoed = [Chunk(text, entries) for text, entries in zip(self._echo, scored, strict=True)]

    async def _entries(self, ids: list[int]) -> list[Entry]:
        scored: Scored | None = None
        if len(ids) > 1:
            message = Score(
                request_id=secrets.token_hex(8),
                token_ids=ids,
                from_position=1,
                top_logprobs=self._fields.alternatives or 0,
                priority=self._priority,
                cache_salt=self._salt,
            )
            scored = await self.variant.client.score(message)
        return await aside(self._listed, ids, scored)

    def _listed(self, ids: list[int], scored: Scored | None) -> list[Entry]:
        """A prompt's tokens. Raises BrokenOutputError."""
        logprobs = [] if scored is None else scored.logprobs
        tops = [None for _ in logprobs] if scored is None or not scored.top else scored.top
        if not all(map(math.isfinite, logprobs)):
            raise BrokenOutputError(f"variant {self.variant.name!r} gave NaN or Inf for this prompt")
        skip = self._fields.skip_special_tokens is not False
        detokenizer = Detokenizer(self.variant.tokenizer, skip_special_tokens=skip)
        offsets = [0]
        for token_id in ids:
            offsets.append(offsets[-1] + len(detokenizer.add(token_id)))
        return [
            Entry(token_id, at, logprob, top)
            for token_id, (at, _), logprob, top in zip(
                ids, pairwise(offsets), [None, *logprobs], [None, *tops], strict=True
            )
        ]

    @property
    def usage(self) -> dict[str, Any]:
        """Over all choices; a prompt counts once, however many choices it has."""
        firsts = self.generations[:: self.each]
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
