"""One completion under way: from a validated request to text, with its timings and metrics."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from fastapi import Request

from server.api.errors import APIError, unavailable
from server.api.schemas import SamplingFields
from server.engine.client import EngineError
from server.engine.messages import Generate, Sampling, Token
from server.metrics import Metrics, Rejection
from server.settings import Settings
from server.text import Detokenizer, StopMatcher
from server.variants import Variant, Variants

T = TypeVar("T")


@dataclass
class ServerState:
    """What every route needs; lives in `app.state.lowkey`."""

    settings: Settings
    variants: Variants
    metrics: Metrics
    draining: bool = False
    scoring: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One comparison at a time may hold `compare_bytes` of shared memory."""
    comparisons: int = 0
    """How many /v1/compare have run: the order of the variants alternates."""


def server_state(request: Request) -> ServerState:
    state: ServerState = request.app.state.lowkey
    return state


def find_variant(state: ServerState, name: str, param: str) -> Variant:
    """The variant of that name. 404 if there is none."""
    variant = state.variants.get(name)
    if variant is None:
        known = ", ".join(state.variants.names)
        raise APIError(404, f"{param}: no model {name[:200]!r}; there are: {known}", param=param)
    return variant


@contextlib.contextmanager
def admitted(state: ServerState, variant: Variant) -> Iterator[None]:
    """A place in the variant's queue, from here to the end of the answer. 503 if there is none now."""
    _check_admission(state, variant)
    variant.admitted += 1
    try:
        yield
    finally:
        variant.admitted -= 1


def _check_admission(state: ServerState, variant: Variant) -> None:
    reason: Rejection
    if state.draining:
        reason, message = "draining", "the server is shutting down"
    elif not variant.client.up:
        reason, message = (
            "engine_down",
            f"variant {variant.name!r} is {'down' if variant.loaded else 'still loading'}",
        )
    elif variant.admitted >= variant.info.max_running + state.settings.max_queue:
        reason, message = (
            "queue_full",
            f"variant {variant.name!r} has {variant.admitted} requests in its queue",
        )
    else:
        return
    state.metrics.rejected.labels(variant.name, reason).inc()
    raise unavailable(message)


async def encode_prompt(state: ServerState, variant: Variant, fields: SamplingFields) -> list[int]:
    """Token ids of the prompt. 400 if it is empty, has ids that the model lacks, or leaves no room."""
    if isinstance(fields.prompt, str):
        # No need to tokenise what can't fit. The rest in a thread, as a batch: `encode` would hold the GIL.
        least = len(fields.prompt) // variant.longest_token
        if least > variant.info.context_length:
            counts = f"the prompt has at least {least}"
            raise _too_long(state, variant, counts, "prompt")
        ids: list[int] = (await asyncio.to_thread(variant.tokenizer.encode_batch, [fields.prompt]))[0].ids
    else:
        ids = fields.prompt
    vocab = variant.info.vocab_size
    if ids and max(ids) >= vocab:  # of a text too: a tokenizer may know more tokens than the model
        raise APIError(
            400, f"prompt: token id {max(ids)} is not below the vocabulary size {vocab}", param="prompt"
        )
    if not ids:
        raise APIError(400, "prompt: is empty; at least one token is needed", param="prompt")
    limit, max_tokens = variant.info.context_length, fields.token_limit
    if len(ids) + max_tokens > limit:
        param = "max_tokens" if len(ids) < limit else "prompt"
        counts = f"the prompt has {len(ids)} and max_tokens is {max_tokens}, {len(ids) + max_tokens} together"
        raise _too_long(state, variant, counts, param)
    return ids


def _too_long(state: ServerState, variant: Variant, counts: str, param: str) -> APIError:
    state.metrics.rejected.labels(variant.name, "too_long").inc()
    limit = variant.info.context_length
    message = f"prompt and max_tokens: the context length is {limit} tokens, but {counts}"
    return APIError(400, message, param=param)


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
    ) -> None:
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: Literal["stop", "length", "abort", "error"] | None = None
        self.variant = variant
        self._metrics = state.metrics
        self._endpoint = endpoint
        self._arrived = arrived
        self._first: float | None = None
        self._last: float | None = None
        self._queue_s: float | None = None
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
            ),
            stop_token_ids=sorted(stop_ids),
        )

    async def pieces(self) -> AsyncGenerator[str]:
        """The text as it comes, in pieces that are never empty. Leaving early aborts the request.

        Raises:
            EngineError: the engine went away, or the model's output is broken.
        """
        try:
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
            self._record()

    async def run(self) -> None:
        """All of it at once."""
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for _ in pieces:
                pass

    def _take(self, token: Token) -> str:
        """Account for a token; the text that it lets out."""
        now = time.monotonic()
        if self._last is None:
            self._first = now
            self._metrics.prompt_tokens.labels(self.variant.name).inc(len(self.prompt_ids))
            self._queue_s = token.queue_s
            self._metrics.ttft.labels(self.variant.name).observe(now - self._arrived)
            if token.queue_s is not None and token.prefill_s is not None:
                self._metrics.queue.labels(self.variant.name).observe(token.queue_s)
                self._metrics.prefill.labels(self.variant.name).observe(token.prefill_s)
        else:
            self._metrics.itl.labels(self.variant.name).observe(now - self._last)
        self._last = now
        self._metrics.generation_tokens.labels(self.variant.name).inc()
        self.token_ids.append(token.token_id)
        self.finish_reason = token.finish_reason
        # The token that ends a request by its id is counted, but it is not text.
        text = "" if token.finish_reason == "stop" else self._detokenizer.add(token.token_id)
        if token.finish_reason is not None:
            text += self._detokenizer.flush()
        piece = self._matcher.add(text)
        if self._matcher.matched:
            self.finish_reason = "stop"
        elif token.finish_reason is not None:
            piece += self._matcher.flush()
        return piece

    def _record(self) -> None:
        name, metrics = self.variant.name, self._metrics
        metrics.requests.labels(name, self._endpoint, self.finish_reason).inc()
        metrics.request_seconds.labels(name).observe(time.monotonic() - self._arrived)
        if self._first is not None and self._last is not None:
            metrics.request_state_bytes.labels(name).observe(self.variant.info.state_bytes_per_request)
            metrics.decode.labels(name).observe(self._last - self._first)
        speed = self.tokens_per_second
        if speed is not None:
            metrics.request_tokens_per_second.labels(name).observe(speed)

    @property
    def tokens_per_second(self) -> float | None:
        """(tokens - 1) / (time of the last - time of the first); None for fewer than two."""
        if self._first is None or self._last is None or self._last <= self._first:
            return None
        return (len(self.token_ids) - 1) / (self._last - self._first)

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = len(self.prompt_ids), len(self.token_ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

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
            "ttft_s": None if self._first is None else self._first - self._arrived,
            "decode_s": None if self._first is None or self._last is None else self._last - self._first,
            "tokens_per_second": self.tokens_per_second,
            "cached_tokens": 0,
            "finish_reason": self.finish_reason,
        }


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, but cancel it when the client goes away. Nobody reads the error that is then raised."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise APIError(499, "the client closed the connection")
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
