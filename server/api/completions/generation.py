"""One completion under way: from the engine's tokens to text, with its timings and metrics."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from server.api.completions.schemas import SamplingFields
from server.api.http.context import current
from server.api.http.tasks import Stepping
from server.api.serving.service import Origin
from server.api.serving.sizes import Held, held, pages_for
from server.api.serving.variants import Variant
from server.text.answers.parts import Part
from server.text.answers.reader import AnswerReader
from server.text.detokenizer import Detokenizer, StopMatcher
from server.wire.exchange import EngineError, Exchange
from server.wire.messages import FinishReason, Generate, PackedTop, Token

MIN_TIMED_TOKENS = 8
"""Tokens after the first that a speed needs: fewer are over in a few steps, and say more of chance than of speed."""


Observer = Callable[["Generation"], None]
"""A function that is told of each generation that has ended, well or not."""


class TokenEntry(msgspec.Struct, frozen=True, gc=False):
    """A token and what the model thought of it."""

    token_id: int
    offset: int
    """Where the token's text begins, in characters of all text before it."""
    logprob: float | None
    """Natural log-probability; None for the first token of a prompt."""
    top: PackedTop | None = None
    """The most likely tokens at this position; None: they were not asked for."""


class Chunk(NamedTuple):
    """What a choice goes on by, and the tokens since the last chunk if log-probabilities were asked for."""

    text: str
    entries: list[TokenEntry]
    parts: Sequence[Part] = ()
    """What it goes on by where the text is read for thoughts and calls; there is no `text` then."""


NOTHING = Chunk("", [])


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """The counts of tokens as OpenAI's API gives them."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Generation:
    """A completion by one variant. Iterate `chunks`, or `begin` it and `take` what comes; then read the rest.

    The time to the first token counts from the HTTP request, in this process. All speeds are of the times at which the
    engine made the tokens: when they come through here depends on what else this process does.

    Args:
        message: what the variant's engine is asked for (`generate_message`).
        observers: told of it once it has ended.
        saved_tokens: how many tokens the saved state stands for that it goes on from.
        most_unread: bytes of tokens that may wait to be taken before the engine pauses.
        on_sampled: called once, when the engine is done with the request; or never, if it is never begun.
        interval: how many tokens make a chunk, at least; the first one is a chunk, and fewer are if no more come.
        reader: takes thoughts and calls out of the text; None: it is text and nothing else.
    """

    def __init__(
        self,
        variant: Variant,
        fields: SamplingFields,
        message: Generate,
        origin: Origin,
        *,
        observers: Sequence[Observer] = (),
        saved_tokens: int = 0,
        most_unread: float = math.inf,
        on_sampled: Callable[[], None] = lambda: None,
        interval: int = 1,
        reader: AnswerReader | None = None,
    ) -> None:
        self.variant = variant
        self.prompt_ids = message.token_ids
        self.origin = origin
        self.token_ids: list[int] = []
        self.cached_tokens = 0
        """Tokens of the prompt that were not computed: those of a saved state or a cached prefix."""
        self.finish_reason: FinishReason | None = None
        self.gaps_s: list[float] = []
        """Seconds between the tokens, as the engine made them."""
        self.ttft_s: float | None = None
        """Seconds from the arrival of the HTTP request to the first token; None before that."""
        self.error: EngineError | None = None
        """Why it ended, if that is no good."""
        self.ended = False
        """Whether nothing more is to be taken."""
        self._context = current.get()
        self._began = False
        self._exchange: Exchange | None = None
        self._pieces: list[str] = []
        """The text so far, in pieces."""
        self._entries: list[TokenEntry] = []
        """Tokens that wait for text to go with, if log-probabilities were asked for."""
        self._message = message
        self._observers = observers
        self._most_unread = most_unread
        self._on_sampled = on_sampled
        self._interval = interval
        self._first: float | None = None
        """When the engine made the first token (`Token.at`)."""
        self._last: float | None = None
        """When the engine made the last token so far."""
        self._queue_s: float | None = None
        self._saved_tokens = saved_tokens
        self._pages: int | None = None
        """Pages that the request held at its end, as the engine said; None before it has."""
        self._decoded = 0
        """Characters so far, those that are held back for a stop string included."""
        stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        self._keep_stop = bool(fields.include_stop_str_in_output)
        self._matcher = StopMatcher(stops, keep=self._keep_stop) if stops else None
        skip = fields.skip_special_tokens is not False
        self._reader = reader
        tags = () if reader is None else reader.tags
        self._detokenizer = Detokenizer(variant.text.token_texts, skip_special_tokens=skip, shown=tags)

    def begin(self, wake: Callable[[], None]) -> None:
        """Send the request to the engine. Whoever calls this calls `end`, and `take` once now and each time that it is
        woken.

        Args:
            wake: called when there is something to take.
        """
        self._began = True
        if self._message.max_tokens == 0:  # the prompt alone was asked for
            self.finish_reason = "length"
            return
        try:
            self._exchange = self.variant.client.generate(
                self._message, wake, most_unread=self._most_unread, on_sampled=self._on_sampled
            )
        except EngineError as e:
            self.error, self.finish_reason = e, "error"

    def take(self) -> Chunk:
        """What has come since the last call: of one token, or of all that have come while nobody called. Tokens without
        text (bytes of a character, what may begin a stop string) wait for the next text; what is left at the end may be
        a chunk without text. Once `finish_reason` is set, this was the last one, and `error` may say why."""
        text, exchange = "", self._exchange
        if exchange is not None:
            if self.token_ids and not exchange.has(self._interval):
                return NOTHING
            if tokens := exchange.take():
                text = self._add(tokens)
            if exchange.error is not None and self.finish_reason is None:
                self.error, self.finish_reason = exchange.error, "error"
        if self.finish_reason is not None:
            self.end()
        if self._reader is not None:
            return self._read(self._reader)
        if not text and (self.finish_reason is None or self.error is not None):
            return NOTHING
        chunk = Chunk(text, self._entries)
        if self._entries:
            self._entries = []
        return chunk

    def _read(self, reader: AnswerReader) -> Chunk:
        """What the reader has made of the text since the last time."""
        if self.finish_reason is not None:
            reader.end()
        parts = reader.take()
        if not parts and (self.finish_reason is None or self.error is not None):
            return NOTHING
        entries, self._entries = self._entries, []
        return Chunk("", entries, parts)

    def end(self) -> None:
        """Take nothing more; a request that has not ended is aborted. May be called again, and at any time."""
        if not self._began or self.ended:
            return
        self.ended = True
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None
        self.finish_reason = self.finish_reason or "abort"
        self._record(self.finish_reason)

    async def chunks(self) -> AsyncGenerator[Chunk]:
        """The chunks as they come, those with nothing in them left out. Leaving early aborts the request.

        Raises:
            EngineError: the engine went away, or the model's output is broken.
        """
        arrived = asyncio.Event()
        self.begin(arrived.set)
        try:
            while True:
                chunk = self.take()
                if chunk is not NOTHING:
                    yield chunk
                if self.error is not None:
                    raise self.error
                if self.finish_reason is not None:
                    return
                await arrived.wait()
                arrived.clear()
        finally:
            self.end()

    async def run(self) -> Chunk:
        """Run to the end: the whole text. Raises as `chunks` does."""
        entries: list[TokenEntry] = []
        parts: list[Part] = []

        def step() -> bool:
            chunk = self.take()
            entries.extend(chunk.entries)
            parts.extend(chunk.parts)
            return self.finish_reason is not None

        stepping = Stepping(step)
        self.begin(stepping.step)
        try:
            stepping.step()
            await stepping.ended
        finally:
            self.end()
        if self.error is not None:
            raise self.error
        return Chunk(self.text if self._reader is None else "", entries, parts)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    def _add(self, tokens: list[Token]) -> str:
        """Account for tokens, up to the one that completes a stop string; returns the text to show. Keeps what the
        model thought of each, if log-probabilities were asked for."""
        text = ""
        ids, last = self.token_ids, self._last
        gaps: list[float] = []
        before = len(ids)
        for token in tokens:
            if last is None:
                self._on_first(token)
            else:
                gaps.append(token.at - last)
            last = token.at
            ids.append(token.token_id)
            if token.logprob is not None:
                entry = TokenEntry(token.token_id, self._decoded, token.logprob, token.top)
                self._entries.append(entry)
            reason = token.finish_reason
            if reason is None:
                piece = self._detokenizer.add(token.token_id)
            else:
                self._pages = token.pages
                piece = self._last_piece(token)
            self._decoded += len(piece)
            if self._matcher is not None and len(ids) >= self._message.min_tokens:
                piece = self._matcher.add(piece)
                if self._matcher.matched:
                    reason = "stop"
                elif reason is not None:
                    piece += self._matcher.flush()
            text += piece
            if self._reader is not None:
                self._reader.add(piece)
                if self._reader.done:
                    reason = "stop"
            if reason is not None:
                self.finish_reason = reason
                break
        self._last = last
        self.gaps_s += gaps
        self.variant.metrics.on_tokens(len(ids) - before, gaps)
        self._pieces.append(text)
        return text

    def _last_piece(self, token: Token) -> str:
        # The token that ends a request by its id is counted, but it is not text unless that is asked for.
        shown = token.finish_reason != "stop" or self._keep_stop
        return (self._detokenizer.add(token.token_id) if shown else "") + self._detokenizer.flush()

    def _on_first(self, token: Token) -> None:
        metrics = self.variant.metrics
        self._first = token.at
        self.ttft_s = time.monotonic() - self.origin.arrived
        self.cached_tokens = self._saved_tokens + token.cached_tokens
        metrics.prompt_tokens.inc(self.prompt_tokens)
        metrics.cached_prompt_tokens.inc(token.cached_tokens)
        self._queue_s = token.queue_s
        metrics.ttft.observe(self.ttft_s)
        if token.queue_s is not None and token.prefill_s is not None:
            metrics.queue.observe(token.queue_s)
            metrics.prefill.observe(token.prefill_s)

    def _record(self, reason: FinishReason) -> None:
        metrics = self.variant.metrics
        metrics.on_end(self.origin.endpoint, reason)
        metrics.request_seconds.observe(time.monotonic() - self.origin.arrived)
        if self.decode_s is not None:
            metrics.request_state_bytes.observe(self.held.total)
            metrics.decode.observe(self.decode_s)
        speed = self.tokens_per_second
        if speed is not None:
            metrics.request_tokens_per_second.observe(speed)
        self._account(reason)
        for tell in self._observers:
            tell(self)

    def _account(self, reason: FinishReason) -> None:
        """Charge the HTTP request that this was a part of."""
        context = self._context
        if context is None:
            return
        context.add(
            self.variant.name,
            prompt_tokens=0
            if self._message.sampling.choice
            else len(self.prompt_ids),  # a prompt counts once
            completion_tokens=len(self.token_ids),
            finish_reason=reason,
            ttft_s=self.ttft_s,
        )
        if context.log_texts:
            prompt = self.variant.text.tokenizer.decode(self.prompt_ids, skip_special_tokens=False)
            context.texts.append({"variant": self.variant.name, "prompt": prompt, "completion": self.text})

    @property
    def answer_reason(self) -> str | None:
        """`finish_reason` as chat has it: an answer that ends with calls of tools ended for them."""
        called = self.finish_reason == "stop" and self._reader is not None and self._reader.called
        return "tool_calls" if called else self.finish_reason

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
    def held(self) -> Held:
        """What the request holds, in bytes; once it has ended, what it held then. Pages that choices share count in
        each of them."""
        info, pages = self.variant.info, self._pages
        if pages is None:
            # It has not ended yet, or its engine did not end it: what its tokens need, the last of which was not fed.
            pages = pages_for(info, self.prompt_tokens + max(len(self.token_ids) - 1, 0))
        return held(info, pages)

    @property
    def usage(self) -> dict[str, Any]:
        return usage(self.prompt_tokens, len(self.token_ids), self.cached_tokens)

    @property
    def lowkey(self) -> dict[str, Any]:
        """The block that says what this request held and how fast it was."""
        own = self.held
        return {
            "variant": self.variant.name,
            "state_bytes": own.total,
            "recurrent_bytes": own.recurrent,
            "conv_bytes": own.conv,
            "kv_bytes": own.kv,
            "state_dtype": self.variant.info.state_dtype,
            "d_k": self.variant.d_k,
            "queue_s": self._queue_s,
            "ttft_s": self.ttft_s,
            "decode_s": self.decode_s,
            "tokens_per_second": self.tokens_per_second,
            "cached_tokens": self.cached_tokens,
            "finish_reason": self.finish_reason,
        }
