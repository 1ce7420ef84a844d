"""Log-probabilities as OpenAI's two formats have them."""

from typing import Any

from server.api.completions.generation import TokenEntry
from server.api.http.encoding import json_list
from server.text.detokenizer import TokenTexts
from server.wire.messages import TopLogprobs, unpack_top

LEAST = -9999.0
"""The log-probability that stands for minus infinity, which JSON has not."""


def legacy(texts: TokenTexts, entries: list[TokenEntry]) -> dict[str, Any]:
    """Log-probabilities as completions have them: parallel lists. The token itself is among its alternatives,
    however few were asked for; of two tokens of one text the likelier one stands there."""
    return {
        "tokens": json_list(entries, lambda e: texts.text(e.token_id)),
        "token_logprobs": json_list(entries, lambda e: None if e.logprob is None else max(e.logprob, LEAST)),
        "top_logprobs": json_list(entries, lambda e: _alternatives(texts, e)),
        "text_offset": json_list(entries, lambda e: e.offset),
    }


def _top(entry: TokenEntry) -> TopLogprobs:
    return [] if entry.top is None else unpack_top(entry.top)


def _alternatives(texts: TokenTexts, entry: TokenEntry) -> dict[str, float] | None:
    if entry.logprob is None:
        return None
    found: dict[str, float] = {}
    for token_id, logprob in [*_top(entry), (entry.token_id, entry.logprob)]:
        text = texts.text(token_id)
        found[text] = max(found.get(text, LEAST), logprob)
    return found


def chat(texts: TokenTexts, entries: list[TokenEntry]) -> dict[str, Any]:
    """Log-probabilities as chat has them: a table for each token."""

    def one(token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": texts.text(token_id),
            "logprob": LEAST if logprob is None else max(logprob, LEAST),
            "bytes": list(texts.bytes(token_id)),
        }

    def table(e: TokenEntry) -> dict[str, Any]:
        return {**one(e.token_id, e.logprob), "top_logprobs": [one(*alternative) for alternative in _top(e)]}

    return {"content": json_list(entries, table), "refusal": None}
