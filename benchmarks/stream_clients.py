"""Clients for `benchmarks/frontend.py` that read streams with as little work as possible, in processes of their own.

Each connection asks for one stream after the other. The text that comes must be the text that the stand-in of an engine
generates for the request: from its length a client knows how many tokens it has, however many of them share a chunk.
"""

import asyncio
import gc
import json
import multiprocessing
import os
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec
import numpy as np
import uvloop
from stand_in_engine import text_from, text_ids

from modeling.tokenizer import TokenizerFile

PATIENCE_S = 300.0
PROMPT_TOKENS = 64
PLACES = 16
"""From how many places of the text streams start."""


class Logprobs(msgspec.Struct):
    tokens: list[msgspec.Raw] = []
    """One for each token in an event of /v1/completions."""
    content: list[msgspec.Raw] = []
    """One for each token in an event of /v1/chat/completions."""


class Delta(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    text: str = ""
    delta: Delta | None = None
    logprobs: Logprobs | None = None


class Usage(msgspec.Struct):
    completion_tokens: int


class Event(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


decode_event = msgspec.json.Decoder(Event).decode


@dataclass(frozen=True)
class Task:
    """What all streams ask for."""

    url: str
    streams: int
    """How many are open at the same time."""
    model: Path
    variant: str
    tokens: int
    """New tokens of each stream."""
    logprobs: int | None
    chat: bool


class Texts:
    """Prompts, and how long the answers to them are.

    `lengths(seed)[i]` is how many characters the first `i + 1` tokens of the answer have.
    """

    def __init__(self, task: Task) -> None:
        self._tokenizer, _ = TokenizerFile(task.model).open()
        self._ids = text_ids(task.model)
        self._tokens = task.tokens
        self._lengths: dict[int, list[int]] = {}

    def seed(self, stream: int) -> int:
        return stream % PLACES * (len(self._ids) // PLACES)

    def prompt(self, seed: int) -> str:
        """The text before the answer."""
        ids = text_from(self._ids, seed + len(self._ids) - PROMPT_TOKENS, PROMPT_TOKENS)
        text: str = self._tokenizer.decode(ids)
        return text

    def lengths(self, seed: int) -> list[int]:
        if seed not in self._lengths:
            ids = text_from(self._ids, seed, self._tokens)
            self._lengths[seed] = [len(self._tokenizer.decode(ids[: i + 1])) for i in range(self._tokens)]
        return self._lengths[seed]


class Seen:
    """What the streams of one process have seen. Times are time.monotonic() in seconds."""

    def __init__(self) -> None:
        self.at, self.gaps, self.tokens = array("d"), array("d"), array("d")
        """For each chunk of text, when it came, how long after the one before it (NaN for the first), its tokens."""
        self.first_at, self.ttft = array("d"), array("d")
        """For each stream, when its first chunk came, and how long after the request."""

    def between(self, begin: float, end: float) -> dict[str, np.ndarray]:
        """What was seen from `begin` to `end`."""
        at, first_at = np.array(self.at), np.array(self.first_at)
        here = (at >= begin) & (at < end)
        gaps = np.array(self.gaps)[here]
        return {
            "tokens": np.array(self.tokens)[here],
            "gaps": gaps[~np.isnan(gaps)],
            "ttft": np.array(self.ttft)[(first_at >= begin) & (first_at < end)],
        }


class Stream(asyncio.Protocol):
    """One connection, and the stream that it reads now.

    Args:
        number: Which of the task's streams. They start at different places of the text.
        on_warm: Called when the first stream has ended.
        on_error: Called with what was wrong.
    """

    def __init__(
        self,
        task: Task,
        texts: Texts,
        number: int,
        seen: Seen,
        on_warm: Callable[[], None],
        on_error: Callable[[str], None],
    ) -> None:
        self._task, self._seen, self._on_warm, self._on_error = task, seen, on_warm, on_error
        self._seed = texts.seed(number)
        self._prompt, self._lengths = texts.prompt(self._seed), texts.lengths(self._seed)
        # The first ones are of all lengths, so that from then on streams end one after the other, not all at once.
        self._first_tokens: int | None = task.tokens - number * task.tokens // task.streams
        self.closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closing:
            self._on_error(f"the server closed a connection: {exc}")

    def close(self) -> None:
        self.closing = True
        self._transport.abort()

    def _ask(self) -> None:
        task = self._task
        self._max_tokens = self._first_tokens or task.tokens
        body: dict[str, Any] = {
            "model": task.variant,
            "max_tokens": self._max_tokens,
            "seed": self._seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if task.chat:
            body["messages"] = [{"role": "user", "content": self._prompt}]
            if task.logprobs is not None:
                body |= {"logprobs": True, "top_logprobs": task.logprobs}
        else:
            body["prompt"] = self._prompt
            if task.logprobs is not None:
                body["logprobs"] = task.logprobs
        data = json.dumps(body).encode()
        path = "/v1/chat/completions" if task.chat else "/v1/completions"
        self._parser = httptools.HttpResponseParser(self)
        self._part = b""
        self._got = self._characters = self._entries = 0
        self._usage: Usage | None = None
        self._done = False
        self._sent, self._last = time.monotonic(), float("nan")
        self._transport.write(
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(data)}\r\n\r\n".encode()
            + data
        )

    def data_received(self, data: bytes) -> None:
        if not self.closing:
            self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Part of an answer, from which the transfer encoding has been taken."""
        if self._parser.get_status_code() != 200:
            self._on_error(f"status {self._parser.get_status_code()}: {body.decode()}")
            return
        *events, self._part = (self._part + body).split(b"\n\n")
        for event in events:
            if event == b"data: [DONE]":
                self._done = True
            else:
                self._take(decode_event(event[len(b"data: ") :]))

    def _take(self, event: Event) -> None:
        if event.error:
            self._on_error(bytes(event.error).decode())
        self._usage = event.usage or self._usage
        for choice in event.choices:
            text = choice.text if choice.delta is None else choice.delta.content
            if choice.logprobs is not None:
                self._entries += len(choice.logprobs.tokens) + len(choice.logprobs.content)
            if not text:
                continue
            now, seen = time.monotonic(), self._seen
            self._characters += len(text)
            tokens = bisect_right(self._lengths, self._characters)
            seen.at.append(now)
            seen.gaps.append(now - self._last)
            seen.tokens.append(tokens - self._got)
            if not self._got:
                seen.first_at.append(now)
                seen.ttft.append(now - self._sent)
            self._got, self._last = tokens, now

    def on_message_complete(self) -> None:
        """The answer has ended: is it all there? Then ask for the next one."""
        wanted = self._max_tokens
        counts = {
            "tokens of text": self._got,
            "characters": self._characters - self._lengths[wanted - 1] + wanted,
            "tokens of usage": self._usage.completion_tokens if self._usage is not None else 0,
            "log-probabilities": wanted if self._task.logprobs is None else self._entries,
        }
        if not self._done or self._part or set(counts.values()) != {wanted}:
            self._on_error(f"a stream of {wanted} tokens ended with {counts}, [DONE] {self._done}")
            return
        if self._first_tokens is not None:
            self._first_tokens = None
            self._on_warm()
        # The parser is still in the last answer when it says that it has ended.
        asyncio.get_running_loop().call_soon(self._ask_next)

    def _ask_next(self) -> None:
        if not self.closing:
            self._ask()


async def _read(task: Task, numbers: list[int], pipe: Connection) -> None:
    loop = asyncio.get_running_loop()
    texts, seen, cold = Texts(task), Seen(), len(numbers)
    ended: asyncio.Future[tuple[float, float]] = loop.create_future()

    def on_warm() -> None:
        nonlocal cold
        cold -= 1
        if not cold:
            pipe.send(None)

    def on_error(text: str) -> None:
        if not ended.done():
            ended.set_exception(RuntimeError(text))

    def on_exception(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        on_error(f"{context['message']}: {context.get('exception')!r}")

    def on_message() -> None:
        window = pipe.recv()
        if window is None:
            pipe.send(len(seen.at))
        elif not ended.done():
            ended.set_result(window)

    loop.set_exception_handler(on_exception)
    loop.add_reader(pipe.fileno(), on_message)
    address = urlsplit(task.url)
    streams = []
    for number in numbers:
        stream = Stream(task, texts, number, seen, on_warm, on_error)
        streams.append(stream)
        await loop.create_connection(lambda stream=stream: stream, address.hostname, address.port)
    gc.collect()
    gc.freeze()
    try:
        window = await ended
        loop.remove_reader(pipe.fileno())
        os.set_blocking(pipe.fileno(), True)  # the loop has changed that, and the answer is long
        pipe.send(seen.between(*window))
    except RuntimeError as e:
        pipe.send(str(e))
    finally:
        for stream in streams:
            stream.close()


def _main(task: Task, numbers: list[int], pipe: Connection) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_read(task, numbers, pipe))


class Clients:
    """Processes that keep streams open, all alike.

    Args:
        processes: How many client processes share the streams.

    Raises:
        RuntimeError: From each method. What was wrong with an answer.
    """

    def __init__(self, task: Task, processes: int) -> None:
        self._pipes: list[Connection] = []
        self.processes = []
        for i in range(min(processes, task.streams)):
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.Process(
                target=_main, args=(task, list(range(i, task.streams, processes)), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def wait_warm(self) -> None:
        """Until each connection has had its first answer."""
        for pipe in self._pipes:
            self._receive(pipe)

    def chunks(self) -> int:
        """How many chunks of text have come so far."""
        for pipe in self._pipes:
            pipe.send(None)
        return sum(self._receive(pipe) for pipe in self._pipes)

    def end(self, window: tuple[float, float]) -> dict[str, np.ndarray]:
        """Close all connections; what was seen within the window, of time.monotonic()."""
        for pipe in self._pipes:
            pipe.send(window)
        seen = [self._receive(pipe) for pipe in self._pipes]
        for process in self.processes:
            process.join()
        return {name: np.concatenate([each[name] for each in seen]) for name in seen[0]}

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    @staticmethod
    def _receive(pipe: Connection) -> Any:
        if not pipe.poll(PATIENCE_S):
            raise RuntimeError(f"a client process has said nothing for {PATIENCE_S:.0f} s")
        try:
            found = pipe.recv()
        except EOFError:
            raise RuntimeError("a client process died; what it said is above") from None
        if isinstance(found, str):
            raise RuntimeError(found)
        return found
