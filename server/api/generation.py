"""One completion under way: from a validated request to text, with its timings and metrics."""

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.api.errors import APIError
from server.api.schemas import SamplingFields
from server.api.serving import ServerState
from server.engine.client import EngineError
from server.engine.messages import FinishReason, Generate, Sampling, Token, TopLogprobs
from server.text import Detokenizer, StopMatcher
from server.variants import Variant


def checked_bias(fields: SamplingFields, variant: Variant) -> dict[int, float]:
    """Token id -> bias. 400 for an id that the model lacks. The variant has loaded."""
    bias = {int(token_id): value for token_id, value in (fields.logit_bias or {}).items()}
    vocab = variant.info.vocab_size
    if bias and max(bias) >= vocab:
        raise APIError(
            400,
            f"logit_bias: token id {max(bias)} is not below the vocabulary size {vocab}",
            param="logit_bias",
        )
    return bias


@dataclass(frozen=True)
class Saved:
    """A saved state that a prompt goes on from."""

    path: Path
    tokens: int
    """How many tokens it stands for."""


@dataclass(frozen=True)
class Entry:
    """A token and what the model thought of it."""

    token_id: int
    offset: int
    """Where its text begins, in characters of all text up to here."""
    logprob: float | None
    """Natural; None for the first token of a prompt."""
    top: TopLogprobs


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """OpenAI's usage."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Generation:
    """A completion by one variant of a prompt that `encode_prompt` has checked. Iterate `pieces`, then read the rest.

    Times are time.monotonic() in this process, so that they are what the client sees.
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
    ) -> None:
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        self.text = ""
        self.entries: list[Entry] = []
        """Of each token, if the request asks for log-probabilities."""
        self.cached_tokens = 0
        """Tokens of the prompt that were not computed: those of a saved state or a cached prefix."""
        self.finish_reason: FinishReason | None = None
        self.variant = variant
        self.endpoint = endpoint
        self.choice = choice
        self.gaps_s: list[float] = []
        """Between the tokens."""
        self._on_finish = state.on_finish
        self._arrived = arrived
        self._first: float | None = None
        self._last: float | None = None
        self._queue_s: float | None = None
        self._saved_tokens = 0 if saved is None else saved.tokens
        self._decoded = 0
        """Characters so far, those that are held back for a stop string included."""
        stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        self._matcher = StopMatcher(stops)
        skip = fields.skip_special_tokens is not False
        self._detokenizer = Detokenizer(variant.tokenizer, skip_special_tokens=skip)
        stop_ids = set(fields.stop_token_ids or [])
        if not fields.ignore_eos:
            stop_ids |= set(variant.info.eos_token_ids)
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
            ),
            stop_token_ids=sorted(stop_ids),
            min_tokens=fields.min_tokens or 0,
            logprobs=fields.alternatives,
            priority=priority,
            state_path=None if saved is None else str(saved.path),
            cache_salt=salt,
        )

    async def pieces(self) -> AsyncGenerator[str]:
        """The text as it comes, in pieces that are never empty. Leaving early aborts the request.

        Raises:
            EngineError: the engine went away, or the model's output is broken.
        """
        try:
            if self._message.max_tokens == 0:  # the prompt alone was asked for
                self.finish_reason = "length"
                return
            async with contextlib.aclosing(self.variant.client.generate(self._message)) as tokens:
                async for token in tokens:
                    piece = self._take(token)
                    if piece:
                        self.text += piece
                        yield piece
                    if self.finish_reason is not None:
                        return
        except EngineError:
            self.finish_reason = "error"
            raise
        finally:
            self.finish_reason = self.finish_reason or "abort"
            self._record(self.finish_reason)

    async def run(self) -> None:
        """All of it at once."""
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for _ in pieces:
                pass

    def _take(self, token: Token) -> str:
        """Account for a token; the text that it lets out."""
        self._measure(token)
        self.token_ids.append(token.token_id)
        self.finish_reason = token.finish_reason
        if token.logprob is not None:
            self.entries.append(Entry(token.token_id, self._decoded, token.logprob, token.top or []))
        # The token that ends a request by its id is counted, but it is not text.
        text = "" if token.finish_reason == "stop" else self._detokenizer.add(token.token_id)
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
        now, metrics = time.monotonic(), self.variant.metrics
        if self._last is None:
            self._first = now
            self.cached_tokens = self._saved_tokens + token.cached_tokens
            metrics.prompt_tokens.inc(self.prompt_tokens)
            metrics.cached_prompt_tokens.inc(token.cached_tokens)
            self._queue_s = token.queue_s
            metrics.ttft.observe(now - self._arrived)
            if token.queue_s is not None and token.prefill_s is not None:
                metrics.queue.observe(token.queue_s)
                metrics.prefill.observe(token.prefill_s)
        else:
            gap = now - self._last
            self.gaps_s.append(gap)
            metrics.itl.observe(gap)
        self._last = now
        metrics.generation_tokens.inc()

    def _record(self, reason: FinishReason) -> None:
        metrics = self.variant.metrics
        metrics.on_end(self.endpoint, reason)
        metrics.request_seconds.observe(time.monotonic() - self._arrived)
        if self._first is not None and self._last is not None:
            metrics.request_state_bytes.observe(self.variant.info.state_bytes_per_request)
            metrics.decode.observe(self._last - self._first)
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
    def ttft_s(self) -> float | None:
        """From the arrival to the first token; None before that."""
        return None if self._first is None else self._first - self._arrived

    @property
    def times(self) -> tuple[float, float] | None:
        """time.monotonic() of the first and the last token; None before the first."""
        return None if self._first is None or self._last is None else (self._first, self._last)

    @property
    def tokens_per_second(self) -> float | None:
        """(tokens - 1) / (time of the last - time of the first); None for fewer than two."""
        if self._first is None or self._last is None or self._last <= self._first:
            return None
        return (len(self.token_ids) - 1) / (self._last - self._first)

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt, those that a saved state stands for included."""
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
            "decode_s": None if self._first is None or self._last is None else self._last - self._first,
            "tokens_per_second": self.tokens_per_second,
            "cached_tokens": self.cached_tokens,
            "finish_reason": self.finish_reason,
        }
