"""One process of gpu_check's load, made to cost little: it counts events and does not decode them.

    gpu_client.py '{"url": ..., "model": ..., "streams": 64, ...}'      fields of `Load`

It says `ready`, is told on standard input when to begin (time.monotonic()), and runs a closed loop: each stream sends
its next request when its last one has ended, until `ramp_s + seconds` have passed, and then hangs up. It prints its
figures of the window, which is those `seconds`, as JSON, and writes the gaps between events and the times to first
tokens of the window to `times` (float64, .npz).
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

    def __init__(self, bodies: list[bytes], host: str) -> None:
        self.requests: list[Request] = []
        self.error: str | None = None
        self._hung_up = False
        self._bodies = bodies
        self._host = host
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
        if b'data: {"error":' in data:  # a token among the log-probabilities may be called so
            self._fail(data[-300:])
        elif self._tail.endswith(END):
            usage = re.search(rb'"completion_tokens":\s*(\d+)', self._tail)
            if usage is None:
                self._fail(self._tail[-300:])
                return
            request.tokens = int(usage[1])
            request.events = request.events[:-ENDING]
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._hung_up:
            self.error = self.error or f"the connection ended early: {exc}"

    def hang_up(self) -> None:
        self._hung_up = True
        self._transport.abort()

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
        stream = Stream(made[at:] + made[:at], place.netloc)
        await asyncio.get_running_loop().create_connection(lambda s=stream: s, place.hostname, place.port)
        streams.append(stream)
    await asyncio.sleep(began + load.ramp_s + load.seconds - time.monotonic())
    for stream in streams:
        stream.hang_up()
    return streams


def figures(load: Load, streams: list[Stream], begin: float, end: float) -> dict[str, Any]:
    """The figures of the window. An event may have several tokens, and counts as many as events had in those requests
    that ended."""
    requests = [r for s in streams for r in s.requests if r.events]
    whole = [r for r in requests if r.tokens]
    tokens_per_event = sum(r.tokens for r in whole) / max(sum(len(r.events) for r in whole), 1)
    events = sum(bisect_left(r.events, end) - bisect_left(r.events, begin) for r in requests)
    gaps = [b - a for r in requests for a, b in pairwise(r.events) if begin <= a and b < end]
    first = [r.events[0] - r.sent for r in requests if begin <= r.events[0] < end]
    np.savez(load.times, gaps=np.array(gaps), first=np.array(first))
    errors = [s.error for s in streams if s.error is not None]
    return {
        "tokens": events * tokens_per_event,
        "tokens_per_event": tokens_per_event,
        "ended": len(whole),
        "errors": len(errors),
        "error": next(iter(errors), None),
        "all_running": max((s.requests[0].events or [end])[0] for s in streams),
    }


async def main() -> None:
    load = Load(**json.loads(sys.argv[1]))
    print("ready", flush=True)
    began = float(sys.stdin.readline())
    begin, end = began + load.ramp_s, began + load.ramp_s + load.seconds
    used: list[float] = []
    loop = asyncio.get_running_loop()
    loop.call_at(loop.time() + begin - time.monotonic(), lambda: used.append(time.process_time()))
    streams = await run(load, began)
    used.append(time.process_time())
    print(json.dumps({**figures(load, streams, begin, end), "cpu_seconds": used[1] - used[0]}))


if __name__ == "__main__":
    uvloop.run(main())
