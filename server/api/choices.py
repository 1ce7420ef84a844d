"""All choices of one request: several prompts, several choices for each, the prompt's own tokens before them."""

import math
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from server.api.generation import Entry, Generation, Saved, usage
from server.api.schemas import ChoiceFields
from server.api.serving import ServerState
from server.api.streaming import merged, together
from server.engine.client import BrokenOutputError
from server.engine.messages import Score
from server.text import Detokenizer
from server.variants import Variant


@dataclass(frozen=True)
class Chunk:
    """Text that a choice goes on by, and the tokens since the last chunk if log-probabilities were asked for."""

    text: str
    entries: list[Entry]


NOTHING = Chunk("", [])


class Choices:
    """Choice p * n + i is the i-th of prompt p.

    Args:
        prompts: token ids that `encode_prompt` has checked.
        salt: what their prefixes are kept under (`cache_salt`).
        echo: what to give back before each prompt's choices: the text of each prompt, or None to give nothing.
    """

    def __init__(
        self,
        state: ServerState,
        variant: Variant,
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
        self.variant = variant
        self.each = fields.choices_each
        self._fields = fields
        self._priority = priority
        self._salt = salt
        self._prompts = prompts
        self._echo = echo
        self._echoed: list[Chunk] = []
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
        await together([generation.run() for generation in self.generations])
        echoed = [self._before(index) for index in range(len(self.generations))]
        return [
            Chunk(before.text + g.text, before.entries + self._shifted(g.entries, before))
            for before, g in zip(echoed, self.generations, strict=True)
        ]

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
            yield before, None
        sent = 0
        async with aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                new = generation.entries[sent:]
                sent += len(new)
                yield Chunk(piece, self._shifted(new, before)), None
        yield Chunk("", self._shifted(generation.entries[sent:], before)), generation.finish_reason

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
        logprobs: list[float] = []
        tops: list[list[tuple[int, float]]] = []
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
            logprobs, tops = scored.logprobs, scored.top or [[] for _ in scored.logprobs]
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
                ids, pairwise(offsets), [None, *logprobs], [[], *tops], strict=True
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
        tokens = sum(len(g.token_ids) for g in self.generations)
        reasons = {block["finish_reason"] for block in blocks}
        return {
            **blocks[0],
            "state_bytes": sum(block["state_bytes"] for block in blocks),
            "queue_s": min((b["queue_s"] for b in blocks if b["queue_s"] is not None), default=None),
            "ttft_s": min((b["ttft_s"] for b in blocks if b["ttft_s"] is not None), default=None),
            "decode_s": decode_s,
            "tokens_per_second": (tokens - 1) / decode_s if decode_s else None,
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
