"""One completion under way: from a validated request to text, with its timings and metrics."""

import contextlib
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from server.api.completions.schemas import SamplingFields
from server.api.http.errors import APIError
from server.api.serving.prompts import check_vocabulary
from server.api.serving.service import ServerState
from server.api.serving.variants import Variant
from server.text.detokenizer import Detokenizer, StopMatcher
from server.wire.exchange import EngineError
from server.wire.messages import (
    FinishReason,
    Generate,
    PackedTop,
    Sampling,
    Token,
    TopLogprobs,
    pack_top,
)

MIN_TIMED_TOKENS = 8
"""Tokens after the first that a speed needs: fewer are over in a few steps, and say more of chance than of speed."""


def checked_bias(fields: SamplingFields, variant: Variant) -> dict[int, float]:
    """Token id -> bias. 400 for an id that the model lacks. The variant has loaded."""
    bias = {int(token_id): value for token_id, value in (fields.logit_bias or {}).items()}
    check_vocabulary(bias, variant, "logit_bias")
    return bias


def checked_allowed(fields: SamplingFields, variant: Variant) -> list[int]:
    """The only ids that may be generated; empty for all. 400 for one that the model lacks, or if `min_tokens` leaves
    none of them. The variant has loaded."""
    allowed = fields.allowed_token_ids or []
    check_vocabulary(allowed, variant, "allowed_token_ids")
    if allowed and fields.min_tokens and set(allowed) <= stop_ids(fields, variant):
        message = "allowed_token_ids: each of them ends the completion, which min_tokens forbids"
        raise APIError(400, message, param="allowed_token_ids")
    return allowed


def stop_ids(fields: SamplingFields, variant: Variant) -> set[int]:
    """The tokens that end a completion. The variant has loaded."""
    own = [] if fields.ignore_eos else variant.info.eos_token_ids
    return {*(fields.stop_token_ids or []), *own}


@dataclass(frozen=True)
class Saved:
    """A saved state that a prompt goes on from."""

    path: Path
    tokens: int
    """How many tokens it stands for."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A token and what the model thought of it."""

    token_id: int
    offset: int
    """Where its text begins, in characters of all text up to here."""
    logprob: float | None
    """Natural; None for the first token of a prompt."""
    top: PackedTop | None = None
    """Alternatives; None: there are none."""


def _packed(top: TopLogprobs | None) -> PackedTop | None:
    return pack_top(top) if top else None


@dataclass(frozen=True)
class Chunk:
    """Text that a choice goes on by, and the tokens since the last chunk if log-probabilities were asked for."""

    text: str
    entries: list[Entry]


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """OpenAI's usage."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Generation:
    """A completion by one variant of a prompt that `encode_prompt` has checked. Iterate `chunks`, then read the rest.

    The time to the first token counts from the HTTP request, in this process. All speeds are of the times at which the
    engine made the tokens: when they come through here depends on what else this process does.

    Args:
        most_unread: bytes of tokens that may wait for the reader of `chunks` before the engine pauses.
        on_sampled: called once, when the engine is done with the request; or never, if `chunks` is never begun.
    """

    def __init__(
        self,
        state: ServerState,
        variant: Variant,
        fields: SamplingFields,
        prompt_ids: list[int],
        *,
        endpoint: str,
        arrived: float,
        salt: bytes,
        choice: int = 0,
        priority: int = 0,
        saved: Saved | None = None,
        most_unread: float = math.inf,
        on_sampled: Callable[[], None] = lambda: None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        self.text = ""
        self.cached_tokens = 0
        """Tokens of the prompt that were not computed: those of a saved state or a cached prefix."""
        self.finish_reason: FinishReason | None = None
        self.variant = variant
        self.endpoint = endpoint
        self.choice = choice
        self.gaps_s: list[float] = []
        """Seconds between the tokens, as the engine made them."""
        self.ttft_s: float | None = None
        """Seconds from the arrival of the HTTP request to the first token; None before that."""
        self._on_finish = state.on_finish
        self._most_unread = most_unread
        self._on_sampled = on_sampled
        self._arrived = arrived
        self._first: float | None = None
        """When the engine made the first token, and the last one so far (`Token.at`)."""
        self._last: float | None = None
        self._queue_s: float | None = None
        self._saved_tokens = 0 if saved is None else saved.tokens
        self._decoded = 0
        """Characters so far, those that are held back for a stop string included."""
        stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        self._keep_stop = bool(fields.include_stop_str_in_output)
        self._matcher = StopMatcher(stops, keep=self._keep_stop)
        skip = fields.skip_special_tokens is not False
        self._detokenizer = Detokenizer(variant.tokenizer, skip_special_tokens=skip)
        self._message = Generate(
            request_id=secrets.token_hex(8),
            token_ids=self.prompt_ids,
            max_tokens=fields.token_limit,
            sampling=Sampling(
                temperature=1.0 if fields.temperature is None else fields.temperature,
                top_p=1.0 if fields.top_p is None else fields.top_p,
                top_k=max(fields.top_k or 0, 0),
                min_p=fields.min_p or 0.0,
                seed=secrets.randbits(63) if fields.seed is None else fields.seed,
                choice=choice,
                presence_penalty=fields.presence_penalty or 0.0,
                frequency_penalty=fields.frequency_penalty or 0.0,
                repetition_penalty=1.0 if fields.repetition_penalty is None else fields.repetition_penalty,
                logit_bias=checked_bias(fields, variant),
                allowed_token_ids=checked_allowed(fields, variant),
            ),
            stop_token_ids=sorted(stop_ids(fields, variant)),
            min_tokens=fields.min_tokens or 0,
            logprobs=fields.alternatives,
            priority=priority,
            state_path=None if saved is None else str(saved.path),
            cache_salt=salt,
        )

    async def chunks(self) -> AsyncGenerator[Chunk]:
        """The text as it comes: of one token at a time, or of all that have come while the reader was busy. Tokens
        without text (bytes of a character, what may begin a stop string) wait for the next text; what is left at the
        end may be a chunk without text. Leaving early aborts the request.

        Raises:
            EngineError: the engine went away, or the model's output is broken.
        """
        try:
            if self._message.max_tokens == 0:  # the prompt alone was asked for
                self.finish_reason = "length"
                return
            entries: list[Entry] = []
            steps = self.variant.client.generate(
                self._message, most_unread=self._most_unread, on_sampled=self._on_sampled
            )
            async with contextlib.aclosing(steps) as steps:
                async for tokens in steps:
                    text = self._take(tokens, entries)
                    self.text += text
                    if text or (entries and self.finish_reason is not None):
                        yield Chunk(text, entries)
                        entries = []
                    if self.finish_reason is not None:
                        return
        except EngineError:
            self.finish_reason = "error"
            raise
        finally:
            self.finish_reason = self.finish_reason or "abort"
            self._record(self.finish_reason)

    async def run(self) -> Chunk:
        """All of it at once. Raises as `chunks` does."""
        entries: list[Entry] = []
        async with contextlib.aclosing(self.chunks()) as chunks:
            async for chunk in chunks:
                entries += chunk.entries
        return Chunk(self.text, entries)

    def _take(self, tokens: list[Token], entries: list[Entry]) -> str:
        """Account for tokens, up to the one that completes a stop string; returns the text to show. Adds what the
        model thought of each to `entries`, if log-probabilities were asked for."""
        pieces: list[str] = []
        for token in tokens:
            self._measure(token)
            if token.logprob is not None:
                entries.append(Entry(token.token_id, self._decoded, token.logprob, _packed(token.top)))
            pieces.append(self._text_of(token))
            if self.finish_reason is not None:
                break
        return "".join(pieces)

    def _text_of(self, token: Token) -> str:
        self.token_ids.append(token.token_id)
        self.finish_reason = token.finish_reason
        # The token that ends a request by its id is counted, but it is not text unless that is asked for.
        shown = token.finish_reason != "stop" or self._keep_stop
        text = self._detokenizer.add(token.token_id) if shown else ""
        if token.finish_reason is not None:
            text += self._detokenizer.flush()
        self._decoded += len(text)
        if len(self.token_ids) < self._message.min_tokens:
            return text
        piece = self._matcher.add(text)
        if self._matcher.matched:
            self.finish_reason = "stop"
        elif token.finish_reason is not None:
            piece += self._matcher.flush()
        return piece

    def _measure(self, token: Token) -> None:
        metrics = self.variant.metrics
        if self._last is None:
            self._first = token.at
            self.ttft_s = time.monotonic() - self._arrived
            self.cached_tokens = self._saved_tokens + token.cached_tokens
            metrics.prompt_tokens.inc(self.prompt_tokens)
            metrics.cached_prompt_tokens.inc(token.cached_tokens)
            self._queue_s = token.queue_s
            metrics.ttft.observe(self.ttft_s)
            if token.queue_s is not None and token.prefill_s is not None:
                metrics.queue.observe(token.queue_s)
                metrics.prefill.observe(token.prefill_s)
        else:
            gap = token.at - self._last
            self.gaps_s.append(gap)
            metrics.itl.observe(gap)
        self._last = token.at
        metrics.generation_tokens.inc()

    def _record(self, reason: FinishReason) -> None:
        metrics = self.variant.metrics
        metrics.on_end(self.endpoint, reason)
        metrics.request_seconds.observe(time.monotonic() - self._arrived)
        if self.decode_s is not None:
            metrics.request_state_bytes.observe(self.variant.info.state_bytes_per_request)
            metrics.decode.observe(self.decode_s)
        speed = self.tokens_per_second
        if speed is not None:
            metrics.request_tokens_per_second.observe(speed)
        for tell in self._on_finish:
            tell(self)

    @property
    def salt(self) -> bytes:
        """What its prefixes are kept under (`cache_salt`)."""
        return self._message.cache_salt

    @property
    def from_state(self) -> bool:
        """Whether it goes on from a saved state."""
        return self._message.state_path is not None

    @property
    def times(self) -> tuple[float, float] | None:
        """When the engine made the first and the last token (`Token.at`); None before the first."""
        return None if self._first is None or self._last is None else (self._first, self._last)

    @property
    def decode_s(self) -> float | None:
        """Seconds from the first token to the last; None before the first."""
        return None if self.times is None else self.times[1] - self.times[0]

    @property
    def tokens_per_second(self) -> float | None:
        """(tokens - 1) / decode_s; None for fewer than `MIN_TIMED_TOKENS` after the first."""
        after_first = len(self.token_ids) - 1
        if after_first < MIN_TIMED_TOKENS or not self.decode_s:
            return None
        return after_first / self.decode_s

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, those that a saved state stands for included."""
        return self._saved_tokens + len(self.prompt_ids)

    @property
    def usage(self) -> dict[str, Any]:
        return usage(self.prompt_tokens, len(self.token_ids), self.cached_tokens)

    @property
    def lowkey(self) -> dict[str, Any]:
        """The block that says what this request held and how fast it was."""
        info = self.variant.info
        return {
            "variant": self.variant.name,
            "state_bytes": info.state_bytes_per_request,
            "state_dtype": info.state_dtype,
            "d_k": self.variant.d_k,
            "queue_s": self._queue_s,
            "ttft_s": self.ttft_s,
            "decode_s": self.decode_s,
            "tokens_per_second": self.tokens_per_second,
            "cached_tokens": self.cached_tokens,
            "finish_reason": self.finish_reason,
        }
