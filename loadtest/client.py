"""A closed loop of streaming completions: each of n clients sends its next request when its last one has ended."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(frozen=True)
class Completion:
    """One request: token ids in, exactly `max_tokens` tokens out."""

    prompt: list[int]
    max_tokens: int


@dataclass
class Result:
    """What a client saw of one request. Times are time.perf_counter() in seconds."""

    sent: float
    token_times: list[float] = field(default_factory=list)
    """When each piece of text arrived; one token each, but for those whose text was held back."""
    tokens: int = 0
    """By the server's count."""
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.sent

    @property
    def itl_s(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]


@dataclass(frozen=True)
class Summary:
    """Over all requests without an error. Rates per second, times in seconds."""

    requests: int
    errors: int
    tokens: int
    tokens_per_second: float
    ttft_median_s: float
    ttft_p99_s: float
    itl_median_s: float
    itl_p99_s: float


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least a share q does not exceed; NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(math.ceil(q * len(ordered)) - 1, 0)] if ordered else math.nan


def summarise(results: Sequence[Result], seconds: float) -> Summary:
    """Figures of a run that took `seconds`."""
    good = [r for r in results if r.error is None and r.token_times]
    gaps = [gap for r in good for gap in r.itl_s]
    first = [r.ttft_s for r in good]
    tokens = sum(r.tokens for r in good)
    return Summary(
        requests=len(good),
        errors=len(results) - len(good),
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        ttft_median_s=quantile(first, 0.5),
        ttft_p99_s=quantile(first, 0.99),
        itl_median_s=quantile(gaps, 0.5),
        itl_p99_s=quantile(gaps, 0.99),
    )


async def events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of each server-sent event."""
    rest = b""
    async for piece in response.aiter_raw():
        *whole, rest = (rest + piece).split(b"\n\n")
        for event in whole:
            yield event.removeprefix(b"data: ").decode()


async def stream(client: httpx.AsyncClient, model: str, completion: Completion, **fields: Any) -> Result:
    """Send one request and read its stream to the end. Failures are in the result."""
    body = {
        "model": model,
        "prompt": completion.prompt,
        "max_tokens": completion.max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    result = Result(sent=time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                result.error = f"{response.status_code}: {(await response.aread()).decode()[:300]}"
                return result
            done = False
            async for data in events(response):
                if data == "[DONE]":
                    done = True
                    continue  # to the end, so that the connection can be used again
                event = json.loads(data)
                if "error" in event:
                    result.error = event["error"]["message"]
                elif event["choices"] and event["choices"][0]["text"]:
                    result.token_times.append(time.perf_counter())
                elif event.get("usage"):
                    result.tokens = event["usage"]["completion_tokens"]
            if not done:
                result.error = result.error or "the stream ended without [DONE]"
    except httpx.HTTPError as e:
        result.error = f"{type(e).__name__}: {e}"
    return result


async def closed_loop(
    url: str,
    model: str,
    completions: Iterable[Completion],
    concurrency: int,
    *,
    on_result: Callable[[Result], None] = lambda _: None,
    timeout_s: float = 300.0,
    **fields: Any,
) -> tuple[list[Result], float]:
    """Run all completions, `concurrency` at a time.

    Args:
        url: of the server.
        fields: go into every request's body.

    Returns:
        The results, and the seconds from the first request to the last one's end.
    """
    queue = iter(completions)
    results: list[Result] = []
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(
        base_url=url, timeout=timeout_s, limits=limits, headers={"accept-encoding": "identity"}
    ) as client:

        async def worker() -> None:
            for completion in queue:
                result = await stream(client, model, completion, **fields)
                results.append(result)
                on_result(result)

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return results, time.perf_counter() - began
