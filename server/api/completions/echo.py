"""What a choice gives back of its prompt: the text and, if they were asked for, its log-probabilities."""

import math
import secrets
from itertools import pairwise

from server.api.completions.generation import Chunk, TokenEntry
from server.api.completions.schemas import ChoiceFields
from server.api.http.aside import aside
from server.api.http.tasks import together
from server.api.serving.service import Origin
from server.api.serving.variants import Variant
from server.text.detokenizer import Detokenizer
from server.wire.exchange import BrokenOutputError
from server.wire.messages import Score, Scored

PART_ENTRIES = 100
"""Most tokens with log-probabilities in one event of a stream."""


async def echoed(
    variant: Variant, fields: ChoiceFields, origin: Origin, prompts: list[list[int]], texts: list[str]
) -> list[Chunk]:
    """Each prompt's text, with its tokens and what the model thinks of each if log-probabilities were asked for.

    Args:
        prompts: token ids of each prompt.
        texts: what is given back of each.

    Raises:
        EngineError: the engine went away, or the model's output is broken.
    """
    if fields.alternatives is None:
        return [Chunk(text, []) for text in texts]
    scored = await together([_scored(variant, fields, origin, ids) for ids in prompts])
    return [Chunk(text, entries) for text, entries in zip(texts, scored, strict=True)]


async def _scored(variant: Variant, fields: ChoiceFields, origin: Origin, ids: list[int]) -> list[TokenEntry]:
    scored: Scored | None = None
    if len(ids) > 1:
        message = Score(
            request_id=secrets.token_hex(8),
            token_ids=ids,
            from_position=1,
            top_logprobs=fields.alternatives or 0,
            priority=origin.priority,
            cache_salt=origin.salt,
        )
        scored = await variant.client.score(message)
    return await aside(_entries, variant, fields, ids, scored)


def _entries(
    variant: Variant, fields: ChoiceFields, ids: list[int], scored: Scored | None
) -> list[TokenEntry]:
    """A prompt's tokens, each with what the model thinks of it. Raises BrokenOutputError."""
    logprobs = [] if scored is None else scored.logprobs
    tops = [None for _ in logprobs] if scored is None or not scored.top else scored.top
    if not all(map(math.isfinite, logprobs)):
        raise BrokenOutputError(f"variant {variant.name!r} gave NaN or Inf for this prompt")
    skip = fields.skip_special_tokens is not False
    detokenizer = Detokenizer(variant.text.token_texts, skip_special_tokens=skip)
    offsets = [0]
    for token_id in ids:
        offsets.append(offsets[-1] + len(detokenizer.add(token_id)))
    return [
        TokenEntry(token_id, at, logprob, top)
        for token_id, (at, _), logprob, top in zip(
            ids, pairwise(offsets), [None, *logprobs], [None, *tops], strict=True
        )
    ]


def in_parts(chunk: Chunk) -> list[Chunk]:
    """A chunk, whose entries' offsets count from its first character, as chunks of few entries: to encode a long one
    would hold up all streams."""
    parts = [chunk.entries[at : at + PART_ENTRIES] for at in range(0, len(chunk.entries), PART_ENTRIES)]
    cuts = [0, *(part[0].offset for part in parts[1:]), len(chunk.text)]
    return [Chunk(chunk.text[a:b], part) for (a, b), part in zip(pairwise(cuts), parts or [[]], strict=True)]


def joined(before: Chunk, after: Chunk) -> Chunk:
    """Two chunks that follow each other as one."""
    return Chunk(before.text + after.text, before.entries + shifted(after.entries, before), after.parts)


def shifted(entries: list[TokenEntry], before: Chunk) -> list[TokenEntry]:
    """The entries with offsets that count from the beginning of the chunk that stands before them."""
    if not before.text:
        return entries
    return [TokenEntry(e.token_id, e.offset + len(before.text), e.logprob, e.top) for e in entries]
