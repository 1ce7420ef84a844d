"""The load client counts what a stream brings, however its bytes are cut, and reports every failure."""

import asyncio
import json
import math

import httpx
import pytest

from loadtest.client import Completion, Result, quantile, stream, summarise


def event(text=None, usage=None, **extra):
    choices = [] if text is None else [{"text": text}]
    return f"data: {json.dumps({'choices': choices, 'usage': usage, **extra})}\n\n"


class Bytes(httpx.AsyncByteStream):
    def __init__(self, data, size):
        self.pieces = [data[i : i + size] for i in range(0, len(data), size)]

    async def __aiter__(self):
        for piece in self.pieces:
            yield piece


def ask(text, size=10**6, status=200):
    def answer(request):
        body = json.loads(request.content)
        assert body["stream"] and body["prompt"] == [1, 2] and body["max_tokens"] == 3 and body["seed"] == 4
        return httpx.Response(status, stream=Bytes(text.encode(), size))

    async def work():
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://x") as client:
            return await stream(client, "dense", Completion([1, 2], 3), seed=4)

    return asyncio.run(work())


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_tokens_are_counted_however_the_bytes_are_cut(size):
    end = event("") + event(usage={"completion_tokens": 3}) + "data: [DONE]\n\n"
    result = ask(event("Ä") + event("b\n\n") + event("c") + end, size)
    assert result.error is None and result.tokens == 3 and len(result.token_times) == 3
    assert result.ttft_s > 0 and len(result.itl_s) == 2 and min(result.itl_s) >= 0


def test_failures_are_told():
    assert "503: later" in ask("later", status=503).error
    assert ask('data: {"error": {"message": "down"}}\n\ndata: [DONE]\n\n').error == "down"
    assert "without [DONE]" in ask(event("a")).error


def test_figures():
    results = [
        Result(0.0, token_times=[1.0, 1.5, 2.5], tokens=3),
        Result(1.0, token_times=[4.0, 4.25], tokens=2),
        Result(2.0, error="broken"),
    ]
    s = summarise(results, 5.0)
    assert (s.requests, s.errors, s.tokens, s.tokens_per_second) == (2, 1, 5, 1.0)
    assert (s.ttft_median_s, s.ttft_p99_s) == (1.0, 3.0)
    assert (s.itl_median_s, s.itl_p99_s) == (0.5, 1.0)


def test_quantiles():
    assert [quantile([3, 1, 2, 4], q) for q in (0, 0.25, 0.5, 0.75, 0.99, 1)] == [1, 1, 2, 3, 4, 4]
    assert math.isnan(quantile([], 0.5))


def test_the_mean_gap_counts_tokens_and_not_pieces_of_text():
    assert Result(0.0, token_times=[1.0, 1.5, 2.5], tokens=3).mean_itl_s == 0.75
    assert Result(0.0, token_times=[1.0, 2.5], tokens=4).mean_itl_s == 0.5  # three tokens came together
    assert Result(0.0, token_times=[1.0, 1.5, 2.5]).mean_itl_s == 0.75  # of a server that counts nothing
    assert Result(0.0, token_times=[1.0], tokens=3).mean_itl_s == 0.0
