"""However its tokens come and however its reader takes them, a stream is the whole answer in pieces."""

import asyncio
import json
import random
from types import SimpleNamespace

import pytest
from checkpoints import byte_tokenizer

from server.api.completions import logprobs
from server.api.completions.choices import Choices
from server.api.completions.format import Format
from server.api.completions.prepare import Prompts
from server.api.completions.schemas import CompletionRequest, StreamOptions
from server.api.completions.stream import Events
from server.api.http.events import pushed, sse
from server.api.serving.metrics import Metrics
from server.api.serving.service import Origin
from server.text.detokenizer import TokenTexts
from server.wire import exchange
from server.wire.client import EngineClient
from server.wire.exchange import TOKEN_BYTES, BrokenOutputError, EngineUnavailableError
from server.wire.messages import (
    Abort,
    Answers,
    Failed,
    Generate,
    Pause,
    Resume,
    Sampling,
    Token,
    encoder,
    pack_top,
)

TOKENIZER = byte_tokenizer()
TEXTS = TokenTexts(TOKENIZER)
ALPHABET = [0, *TOKENIZER.encode('aab b.é漢\u2028\x85"\\\n').ids]
"""Few tokens, so that stop strings are met; bytes of characters, whole and broken, and what JSON has to escape."""
HEAD = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "dense"}


class Engine(EngineClient):
    """A client whose engine is the test."""

    def __init__(self):
        super().__init__("dense", "0")
        self.told = []
        self.asked = asyncio.Queue()

    def send(self, message):
        self.told.append(message)
        if isinstance(message, Generate):
            self.asked.put_nowait(message.request_id)

    def step(self, tokens, failed=()):
        """Tell of one step, as it comes over the wire."""
        self._deliver(encoder.encode(Answers(made_at=0.0, tokens=tokens, failed=list(failed))))
        asyncio.get_running_loop().call_soon(self._wake)  # all that has come is read


class Reader:
    """A connection that takes what is written when the test says so."""

    def __init__(self):
        self.on_writable = None
        self.write_paused = False
        self.pieces = []

    def write_body(self, data):
        assert not self.write_paused and data
        self.pieces.append(data)

    def go_on(self):
        self.write_paused = False
        if self.on_writable is not None:
            self.on_writable()


class Case:
    """A request with all that its engine will say, drawn from a seed."""

    def __init__(self, seed):
        draw = self.draw = random.Random(seed)
        self.options = StreamOptions(
            include_usage=draw.random() < 0.5,
            continuous_usage_stats=draw.random() < 0.3,
            stream_interval=draw.choice([None, 1, 1, 2, 7]),
        )
        self.fields = CompletionRequest(
            model="dense",
            stream_options=self.options,
            prompt="x",
            stream=True,
            n=draw.choice([1, 1, 2, 5]),
            max_tokens=draw.choice([1, 3, 40]),
            logprobs=draw.choice([None, None, 0, 2]),
            stop=draw.choice([None, None, ["ab"], ["b.", "aab b"], "é"]),
            include_stop_str_in_output=draw.random() < 0.3,
            min_tokens=draw.choice([0, 0, 1]),
            skip_special_tokens=draw.random() < 0.7,
        )
        self.buffer = draw.choice([100, 5000, 10**6])
        self.ids = [f"r{index}" for index in range(self.fields.choices_each)]
        self.tokens = {request_id: self._tokens(request_id) for request_id in self.ids}

    def _tokens(self, request_id):
        """One request's tokens: to the end of text or to the limit."""
        made = []
        for position in range(self.fields.max_tokens):
            token_id = self.draw.choice(ALPHABET if self.draw.random() < 0.2 else ALPHABET[1:])
            ends = position == self.fields.max_tokens - 1
            reason = "stop" if token_id == 0 else "length" if ends else None
            wanted = self.fields.logprobs
            made.append(
                Token(
                    request_id,
                    token_id,
                    position + self.draw.random(),
                    reason,
                    *((0.1, 0.2, 1) if position == 0 else ()),
                    logprob=None if wanted is None else -self.draw.random(),
                    top=None if wanted is None else pack_top([(i, -0.5) for i in range(wanted)]),
                )
            )
            if reason is not None:
                break
        return made

    def steps(self):
        """The tokens in steps: some requests begin later, or are left out for a while."""
        left = {request_id: list(tokens) for request_id, tokens in self.tokens.items()}
        while any(left.values()):
            yield [t.pop(0) for t in left.values() if t and self.draw.random() < 0.8]

    def choices(self, engine, metrics):
        messages = [
            Generate(
                request_id=request_id,
                token_ids=[1, 2],
                max_tokens=self.fields.max_tokens,
                sampling=Sampling(temperature=1, top_p=1, top_k=0, min_p=0, seed=1, choice=index),
                stop_token_ids=[0],
                min_tokens=self.fields.min_tokens,
                logprobs=self.fields.logprobs,
            )
            for index, request_id in enumerate(self.ids)
        ]
        info = SimpleNamespace(
            state_bytes_per_request=1, conv_bytes_per_request=0, bytes_per_page=0, state_dtype="float32"
        )
        variant = SimpleNamespace(
            name="dense",
            client=engine,
            metrics=metrics,
            text=SimpleNamespace(token_texts=TEXTS, tokenizer=TOKENIZER),
            info=info,
            d_k=16,
        )
        places = SimpleNamespace(variant=variant, leave=lambda: None)
        settings = SimpleNamespace(stream_buffer_bytes=self.buffer)
        return Choices(
            places, self.fields, Prompts([[1, 2]]), messages, Origin("completions", 0, 0, b""), [], settings
        )

    def shape(self, index, chunk, reason):
        listed = self.fields.logprobs is not None
        return {
            "index": index,
            "text": chunk.text,
            "logprobs": logprobs.legacy(TEXTS, chunk.entries) if listed else None,
            "finish_reason": reason,
        }


def make(seed):
    metrics = Metrics()
    own = metrics.add_variant("dense")
    return Case(seed), Engine(), own


async def whole(case, engine, metrics):
    """The choices of the answer that is no stream, and its usage."""
    choices = case.choices(engine, metrics)
    running = asyncio.create_task(choices.run())
    assert [await engine.asked.get() for _ in case.ids] == case.ids
    for request_id in case.ids:  # a token at a time
        for token in case.tokens[request_id]:
            engine.step([token])
            await asyncio.sleep(0)
    chunks = await running
    reasons = [generation.finish_reason for generation in choices.generations]
    shapes = [case.shape(i, *each) for i, each in enumerate(zip(chunks, reasons, strict=True))]
    return json.loads(json.dumps(shapes)), choices.usage


async def streamed(case, engine, metrics, connected, fail=None):
    """The bytes of the stream, written by a reader who stops now and then, to an engine that is ahead now and then."""
    reader = Reader()
    sent = []

    async def read():
        events = Events(case.choices(engine, metrics), Format(HEAD, case.shape, case.shape), case.options)
        async for event in events.opening():
            sent.append(event)
        async for data in pushed(events, reader if connected else None):
            sent.append(data)
            for _ in range(case.draw.choice([0, 0, 2])):
                await asyncio.sleep(0)

    reading = asyncio.create_task(read())
    assert [await engine.asked.get() for _ in case.ids] == case.ids
    for number, tokens in enumerate(case.steps()):
        engine.step(tokens)
        if number == fail:
            engine.step(
                [], [Failed(request_id=case.draw.choice(case.ids), reason="memory", error="none left")]
            )
        if connected and case.draw.random() < 0.2:
            reader.write_paused = True
        elif reader.write_paused and case.draw.random() < 0.3:
            reader.go_on()
        for _ in range(case.draw.choice([0, 1, 1, 3])):
            await asyncio.sleep(0)
    for _ in range(3):
        await asyncio.sleep(0)
    reader.go_on()
    await reading
    assert reader.on_writable is None
    return b"".join(sent + reader.pieces)


def events_of(data):
    raw = [event + b"\n\n" for event in data.split(b"\n\n")[:-1]]
    events = [json.loads(event.removeprefix(b"data: ")) for event in raw]
    # Pieces that were made beforehand are put together as the encoder would have done it.
    assert [sse(event) for event in events] == raw
    assert all(len(event.decode().splitlines()) == 2 for event in raw)
    return events


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize("seed", range(80))
def test_a_stream_is_the_whole_answer_however_it_is_cut(monkeypatch, seed, connected):
    monkeypatch.setattr(exchange, "MOST_TAKEN", 2 if seed % 3 == 0 else 256)

    async def work():
        case, engine, metrics = make(seed)
        expected, usage = await whole(case, engine, metrics)
        counted = metrics._tokens, len(metrics._gaps_s)
        assert counted[0] == usage["completion_tokens"]
        assert not engine._requests
        engine.told.clear()
        events = events_of(await streamed(case, engine, metrics, connected))
        assert (metrics._tokens, len(metrics._gaps_s)) == (2 * counted[0], 2 * counted[1])
        assert not engine._requests
        check(case, events, expected, usage)
        for request_id, choice in zip(case.ids, expected, strict=True):
            told = [type(m) for m in engine.told if m.request_id == request_id]
            pauses = [kind for kind in told if kind in (Pause, Resume)]
            assert pauses == [Pause, Resume] * (len(pauses) // 2) + [Pause] * (len(pauses) % 2)
            # Who has met a stop string wants no more of what the engine still makes.
            assert told.count(Abort) == 0 or (choice["finish_reason"] == "stop" and told[-1] is Abort)

    asyncio.run(work())


def check(case, events, expected, usage):
    assert ["lowkey" in event for event in events] == [False] * (len(events) - 1) + [True]
    assert all({key: event[key] for key in HEAD} == HEAD for event in events)
    if case.options.include_usage:
        *events, last = events
        assert last["choices"] == [] and last["usage"] == usage
    for index, choice in enumerate(expected):
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        *chunks, end = own
        assert "".join(c["text"] for c in chunks) == choice["text"] and end["text"] == ""
        assert all(c["text"] and c["finish_reason"] is None for c in chunks)
        assert end["finish_reason"] == choice["finish_reason"]
        if case.fields.logprobs is None:
            assert all(c["logprobs"] is None for c in own)
        else:
            for key, values in choice["logprobs"].items():
                assert [value for c in own for value in c["logprobs"][key]] == values
    if case.options.continuous_usage_stats:
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts) and events[-1]["usage"] == usage
    else:
        assert all(("usage" in e) == bool(case.options.include_usage) for e in events)
        assert all(e.get("usage") is None for e in events)


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_what_came_before_an_error_is_told_and_nothing_after_it(seed, connected):
    async def work():
        case, engine, metrics = make(seed)
        expected, _ = await whole(case, engine, metrics)
        engine.told.clear()
        events = events_of(await streamed(case, engine, metrics, connected, fail=0))
        assert not engine._requests
        if "error" not in events[-1]:  # it had ended by then
            check(case, events, *(await whole(*make(seed))))
            return
        assert events[-1]["error"]["code"] == 503 and "none left" in events[-1]["error"]["message"]
        for index, choice in enumerate(expected):
            own = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == index]
            assert choice["text"].startswith("".join(c["text"] for c in own))

    asyncio.run(work())


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize(
    ("interval", "buffer", "steps", "texts"),
    [
        (1, 10**6, [1, 1, 4, 3], ["a", "b", "cdef", "ghi", ""]),  # several that wait are one chunk
        (3, 10**6, [1] * 9, ["a", "bcd", "efg", "hi", ""]),
        (3, 10**6, [2, 2, 5], ["ab", "cdefghi", ""]),
        (9, 10**6, [1] * 9, ["a", "bcdefghi", ""]),
        (9, TOKEN_BYTES, [1] * 9, ["a", "bc", "de", "fg", "hi", ""]),  # a paused engine would wait for ever
    ],
)
def test_a_chunk_has_as_many_tokens_as_wait_or_as_were_asked_for(connected, interval, buffer, steps, texts):
    async def work():
        case, engine, metrics = make(1)
        options = StreamOptions(stream_interval=interval)
        fields = {"model": "dense", "prompt": "x", "max_tokens": 9, "stream": True}
        case.fields, case.options = CompletionRequest(**fields, stream_options=options), options
        case.ids, case.buffer = ["r"], buffer
        ids = TOKENIZER.encode("abcdefghi").ids
        left = [Token("r", i, float(n), "length" if n == 8 else None) for n, i in enumerate(ids)]
        reader, sent = Reader(), []

        async def read():
            events = Events(case.choices(engine, metrics), Format(HEAD, case.shape, case.shape), case.options)
            async for _ in events.opening():
                pass
            async for data in pushed(events, reader if connected else None):
                sent.append(data)

        reading = asyncio.create_task(read())
        await engine.asked.get()
        for together in steps:  # the loop comes round after so many
            for _ in range(together):
                engine.step([left.pop(0)])
            for _ in range(3):
                await asyncio.sleep(0)
        await reading
        events = events_of(b"".join(sent + reader.pieces))
        assert [e["choices"][0]["text"] for e in events] == texts

    asyncio.run(work())


def test_an_engine_that_goes_away_or_breaks_ends_a_whole_answer():
    async def work(kind):
        case, engine, metrics = make(0)
        choices = case.choices(engine, metrics)
        running = asyncio.create_task(choices.run())
        for _ in case.ids:
            await engine.asked.get()
        if kind is EngineUnavailableError:
            engine.engine_down()
        else:
            engine.step([Token(case.ids[0], -1, 1.0, "error")])
        with pytest.raises(kind):
            await running
        assert not engine._requests

    for kind in (EngineUnavailableError, BrokenOutputError):
        asyncio.run(work(kind))
