"""One process of gpu_check's load, made to cost little: it counts events and does not decode them.

    gpu_client.py '{"url": ..., "model": ..., "streams": 64, ...}'      fields of `Load`

It says `ready`, is told on standard input when to begin (time.monotonic()), and runs a closed loop: each stream sends
its next request when its last one has ended, until `ramp_s + seconds` have passed; the requests that then run are read
to their end. It prints its figures of the window, which is those `seconds`, as JSON, and writes the gaps between events
and the times to first tokens of the window to `times` (float64, .npz).
"""

import asyncio
import json
import random
import re
import sys
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import uvloop
from tokenizers import Tokenizer

EVENT = b"\ndata: "
"""Nothing else has this: a newline in a text is escaped."""
END = b"\n0\r\n\r\n"
ENDING = 2
"""Events behind those of the text: the usage, and [DONE]."""
TAIL = 2048
"""Bytes of an answer that are kept: its end has the usage."""


@dataclass(frozen=True)
class Load:
    """What is sent. `text`: a file from which prompts of `prompt` tokens are cut by `tokenizer`; without it they are
    random token ids below `vocab`."""

    url: str
    model: str
    streams: int
    prompt: int
    new_tokens: int
    ramp_s: float
    seconds: float
    times: str
    vocab: int
    seed: int
    fields: dict[str, Any]
    text: str | None = None
    tokenizer: str = ""


@dataclass
class Request:
    """When it was sent, and its events came; how many tokens it had, by the server's count."""

    sent: float
    events: list[float] = field(default_factory=list)
    tokens: int = 0


class Stream(asyncio.Protocol):
    """One connection that sends one request after the other."""

    def __init__(self, bodies: list[bytes], host: str, until: float) -> None:
        self.requests: list[Request] = []
        self.error: str | None = None
        self.ended = asyncio.get_running_loop().create_future()
        self._bodies = bodies
        self._host = host
        self._until = until
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._send()

    def _send(self) -> None:
        body = self._bodies[len(self.requests) % len(self._bodies)]
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        self._tail = b""
        self.requests.append(Request(time.monotonic()))
        self._transport.write(head.encode() + body)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        request = self.requests[-1]
        if not self._tail and not data.startswith(b"HTTP/1.1 200"):
            self._fail(data[:300])
            return
        events = (self._tail[1 - len(EVENT) :] + data).count(EVENT)
        request.events += [now] * events
        self._tail = (self._tail + data)[-TAIL:]
        if b'"error":' in data:
            self._fail(data[-300:])
        elif self._tail.endswith(END):
            usage = re.search(rb'"completion_tokens":\s*(\d+)', self._tail)
            if usage is None:
                self._fail(self._tail[-300:])
                return
            request.tokens = int(usage[1])
            request.events = request.events[:-ENDING]
            if now < self._until:
                self._send()
            else:
                self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None or (self.requests and not self.requests[-1].tokens):
            self.error = self.error or f"the connection ended early: {exc}"
        if not self.ended.done():
            self.ended.set_result(None)

    def _fail(self, answer: bytes) -> None:
        self.error = self.error or answer.decode(errors="replace")
        self._transport.abort()


def bodies(load: Load, draw: random.Random) -> list[bytes]:
    """A few requests; a stream takes them in turns, from its own place on."""
    if load.text is None:
        prompts: list[Any] = [[draw.randrange(load.vocab) for _ in range(load.prompt)] for _ in range(32)]
    else:
        tokenizer = Tokenizer.from_file(load.tokenizer)
        ids = tokenizer.encode(Path(load.text).read_text(), add_special_tokens=False).ids
        starts = [draw.randrange(len(ids) - load.prompt) for _ in range(32)]
        prompts = [tokenizer.decode(ids[at : at + load.prompt]) for at in starts]
    fixed = {
        "model": load.model,
        "max_tokens": load.new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **load.fields,
    }
    return [json.dumps({**fixed, "prompt": prompt}).encode() for prompt in prompts]


async def run(load: Load, began: float) -> list[Stream]:
    draw = random.Random(load.seed)
    made = bodies(load, draw)
    place = urlsplit(load.url)
    await asyncio.sleep(began - time.monotonic())
    streams: list[Stream] = []
    for _ in range(load.streams):
        at = draw.randrange(len(made))
        until = began + load.ramp_s + load.seconds
        stream = Stream(made[at:] + made[:at], place.netloc, until)
        await asyncio.get_running_loop().create_connection(lambda s=stream: s, place.hostname, place.port)
        streams.append(stream)
    await asyncio.gather(*(stream.ended for stream in streams))
    return streams


def figures(load: Load, streams: list[Stream], begin: float, end: float) -> dict[str, Any]:
    """Of the window. A request that is only in part within it counts by its events."""
    tokens, gaps, first = 0.0, [], []
    for request in (r for s in streams for r in s.requests if r.events and r.tokens):
        inside = bisect_left(request.events, end) - bisect_left(request.events, begin)
        tokens += request.tokens * inside / len(request.events)
        gaps += [b - a for a, b in pairwise(request.events) if begin <= a and b < end]
        if begin <= request.events[0] < end:
            first.append(request.events[0] - request.sent)
    np.savez(load.times, gaps=np.array(gaps), first=np.array(first))
    errors = [s.error for s in streams if s.error is not None]
    return {
        "tokens": tokens,
        "events": len(gaps),
        "errors": len(errors),
        "error": next(iter(errors), None),
        "all_running": max(
            (s.requests[0].events[0] for s in streams if s.requests and s.requests[0].events), default=end
        ),
    }


async def main() -> None:
    load = Load(**json.loads(sys.argv[1]))
    print("ready", flush=True)
    began = float(sys.stdin.readline())
    begin, end = began + load.ramp_s, began + load.ramp_s + load.seconds
    used: list[float] = []
    loop = asyncio.get_running_loop()
    for at in (begin, end):
        loop.call_at(loop.time() + at - time.monotonic(), lambda: used.append(time.process_time()))
    streams = await run(load, began)
    print(json.dumps({**figures(load, streams, begin, end), "cpu_seconds": used[1] - used[0]}))


if __name__ == "__main__":
    uvloop.run(main())
