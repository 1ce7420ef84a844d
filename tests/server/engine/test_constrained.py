"""Requests that are held to a grammar, in the engine: every answer keeps to it, and is the same however steps overlap,
whatever else runs, through forks, preemption, pauses and aborts. Requests without one notice nothing."""

import itertools
import json
import re
import threading

import jsonschema
import pytest
import torch
from checkpoints import GATED, byte_tokenizer
from engines import GREEDY, Bench, generate, prompt, run, sampling, tokens_of
from fake_device import FakeDevice, NoWaitingMode
from formats import FINITE
from hybrids import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.runtime import TorchRuntime
from modeling.runtime.gpu.graphs import DecodeGraphs
from modeling.state import StatePool
from server.engine.cache import StateCache
from server.engine.engine import Engine
from server.engine.grammars import Grammars
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.text import grammar
from server.wire.messages import Abort, Pause, Resume

TOKENIZER = byte_tokenizer()
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["a", "bc"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}
JSON = grammar.json_schema(SCHEMA, compact=True)
ROOM = 120
"""Tokens that any answer of SCHEMA has room in."""


def grammars(threads=1):
    return Grammars(byte_tokenizer(), 257, threads=threads, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("m") / "c", GATED)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("h") / "c", next(iter(CASES.values())))


def held(number=0, *, length=9, text=JSON, max_tokens=ROOM, **fields):
    """A request that draws, and ends by token 0."""
    fields = {"sampling": sampling(seed=number), "stop_token_ids": [0], **fields}
    return generate(prompt(length, seed=number), max_tokens, grammar=text, **fields)


def text_of(tokens):
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def check(tokens, schema=SCHEMA):
    """The answer ended by its stop token, and is JSON of the schema."""
    assert tokens[-1] == 0
    value = json.loads(bytes(token_bytes(tokens[:-1])))
    jsonschema.validate(value, schema)
    return value


def token_bytes(tokens):
    return b"".join(TOKENIZER_BYTES[t] for t in tokens)


def _alphabet():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(b): b for b in printable}
    letters |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    return {TOKENIZER.token_to_id(c): bytes([b]) for c, b in letters.items()}


TOKENIZER_BYTES = _alphabet()


@pytest.mark.parametrize("depth", [0, 1])
def test_every_answer_is_json_of_the_schema_beside_requests_without_one(bench, depth):
    free = [generate(prompt(n, seed=n), 25, sampling=s) for n, s in ((5, GREEDY), (70, sampling(seed=4)))]
    alone = tokens_of(run(bench.engine(slots=8, depth=depth), {0: free}))
    messages = [held(i, length=3 + 40 * i) for i in range(5)]
    together = tokens_of(
        run(
            bench.engine(slots=8, depth=depth, grammars=grammars()), {0: messages[:3], 4: free + messages[3:]}
        )
    )
    for message in messages:
        check(together[message.request_id])
    for message in free:
        bench.check_tokens(message, together[message.request_id])
        assert len(alone[message.request_id]) == len(together[message.request_id])


@settings(max_examples=25, deadline=None)
@given(schema=FINITE, seed=st.integers(0, 2**40), depth=st.integers(0, 1), hot=st.booleans())
def test_answers_of_random_schemas_validate(bench, schema, seed, depth, hot):
    how = sampling(seed=seed, temperature=2.0 if hot else 0.7)
    messages = [held(i, text=grammar.json_schema(schema), sampling=how, max_tokens=600) for i in range(2)]
    outputs = run(bench.engine(slots=2, depth=depth, grammars=grammars()), {0: messages})
    assert not [failed for output in outputs for failed in output.failed]
    for tokens in tokens_of(outputs).values():
        if tokens[-1] == 0:  # whitespace may have taken all the room
            check(tokens, schema)


def test_an_answer_does_not_depend_on_depth_batch_or_threads(bench):
    messages = [held(i, length=20 + i) for i in range(6)]
    found = []
    for depth, slots, threads in ((0, 8, 1), (1, 8, 3), (1, 2, 1), (0, 1, 1)):
        engine = bench.engine(slots=slots, depth=depth, grammars=grammars(threads), batch_invariant=True)
        found.append(tokens_of(run(engine, {0: messages})))
    assert found[1:] == found[:1] * 3


@pytest.mark.parametrize("depth", [0, 1])
def test_choices_of_one_prompt_go_their_own_ways(bench, depth):
    ids = prompt(90)
    messages = [
        generate(ids, ROOM, grammar=JSON, stop_token_ids=[0], sampling=sampling(seed=7, choice=i))
        for i in range(4)
    ]
    engine = bench.engine(slots=8, depth=depth, grammars=grammars(), batch_invariant=True)
    outputs = run(engine, {0: messages})
    tokens = tokens_of(outputs)
    texts = {m.request_id: token_bytes(tokens[m.request_id][:-1]) for m in messages}
    assert len(set(texts.values())) == 4
    for message in messages:
        check(tokens[message.request_id])
        single = bench.engine(slots=1, depth=depth, grammars=grammars(), batch_invariant=True)
        assert tokens_of(run(single, {0: [message]}))[message.request_id] == tokens[message.request_id]
    firsts = [t for o in outputs for t in o.tokens if t.prefill_s is not None]
    assert sorted(t.cached_tokens for t in firsts) == [0, 90, 90, 90], (
        "one of them has fed the prompt for all"
    )


@pytest.mark.parametrize("depth", [0, 1])
def test_a_preempted_request_goes_on_in_its_grammar(hybrid, depth):
    messages = [
        generate(
            prompt(60, seed=i),
            150,
            grammar=grammar.regex("[a-z]{140}!"),
            stop_token_ids=[0],
            sampling=sampling(seed=i),
        )
        for i in range(3)
    ]
    roomy = tokens_of(
        run(hybrid.engine(slots=3, depth=depth, grammars=grammars(), batch_invariant=True), {0: messages})
    )
    tight = hybrid.engine(slots=3, pages=5, depth=depth, grammars=grammars(), batch_invariant=True)
    outputs = run(tight, {0: messages})
    assert sum(o.preemptions for o in outputs) > 0
    assert tokens_of(outputs) == roomy
    assert all(text_of(tokens[:-1])[-1] == "!" for tokens in roomy.values())


@pytest.mark.parametrize("depth", [0, 1])
def test_pauses_change_nothing(bench, depth):
    message = held(3)
    (plain,) = tokens_of(run(bench.engine(depth=depth, grammars=grammars()), {0: [message]})).values()
    engine = bench.engine(depth=depth, grammars=grammars())
    pauses = {
        at: [kind(request_id=message.request_id)]
        for at, kind in zip((20, 24, 30, 33), itertools.cycle((Pause, Resume)), strict=False)
    }
    other = generate(prompt(4), 60)  # keeps the engine at work meanwhile
    tokens = tokens_of(run(engine, {0: [message, other], **pauses}))
    assert len(tokens[message.request_id]) == len(plain)
    check(tokens[message.request_id])


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("at", [0, 1, 3, 8, 20])
def test_abort_at_any_step_leaves_the_others_alone(bench, at, depth):
    victim, other = held(1, length=150), held(2)
    engine = bench.engine(slots=2, prefill_tokens=64, depth=depth, grammars=grammars())
    arrivals = {0: [victim, other]}
    arrivals.setdefault(at, []).append(Abort(request_id=victim.request_id))
    outputs = run(engine, arrivals)
    check([t.token_id for o in outputs for t in o.tokens if t.request_id == other.request_id])
    assert outputs[-1].occupancy.used_slots == 0


def test_prompts_that_begin_alike_share_their_states(bench):
    ids = prompt(130)
    first, second = (held(i, text=text) for i, text in enumerate((JSON, grammar.regex("[ab]{4}"))))
    messages = [
        generate(ids, ROOM, grammar=m.grammar, stop_token_ids=[0], sampling=m.sampling)
        for m in (first, second)
    ]
    engine = bench.engine(prefix_cache=True, grammars=grammars())
    outputs = run(engine, {0: messages[:1], 200: messages[1:]})
    tokens = tokens_of(outputs)
    check(tokens[messages[0].request_id])
    assert text_of(tokens[messages[1].request_id]).strip("ab") == ""
    assert [t.cached_tokens for o in outputs for t in o.tokens if t.prefill_s is not None] == [0, 128]


def test_penalties_biases_and_least_lengths_work_within_the_grammar(bench):
    a, b = (TOKENIZER.token_to_id(c) for c in "ab")
    text = grammar.regex("[abc]{1,40}")
    biased = held(1, text=text, sampling=sampling(seed=1, logit_bias={a: 100.0}), min_tokens=15)
    penal = held(
        1,
        text=text,
        sampling=sampling(
            seed=1, logit_bias={a: 50.0, b: 50.0}, presence_penalty=2.0, repetition_penalty=1.2, top_k=2
        ),
        min_tokens=15,
    )
    narrow = held(2, text=text, sampling=sampling(seed=1, temperature=1.9, top_p=1e-9))
    tokens = tokens_of(run(bench.engine(grammars=grammars()), {0: [biased, penal, narrow]}))
    assert text_of(tokens[biased.request_id]) == "a" * 40
    assert len(tokens[penal.request_id]) >= 15 and set(tokens[penal.request_id]) <= {a, b, 0}
    greedy = held(2, text=text, sampling=GREEDY)
    assert (
        tokens_of(run(bench.engine(grammars=grammars()), {0: [greedy]}))[greedy.request_id]
        == tokens[narrow.request_id]
    )


def test_log_probabilities_are_the_models_own(bench):
    message = held(1, text=grammar.regex("z{3}"), logprobs=3)
    free = generate(message.token_ids, 1, logprobs=3)
    outputs = run(bench.engine(slots=2, grammars=grammars()), {0: [message, free]})
    first = {t.request_id: t for o in reversed(outputs) for t in o.tokens}
    assert first[message.request_id].top == first[free.request_id].top
    assert first[message.request_id].logprob < first[free.request_id].logprob, (
        "z is not the likeliest by chance"
    )


def test_the_last_token_that_there_is_room_for(bench):
    outputs = run(bench.engine(grammars=grammars()), {0: [held(0, text=grammar.regex("a{9}"), max_tokens=4)]})
    assert [t.finish_reason for o in outputs for t in o.tokens] == [None, None, None, "length"]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_grammar_that_fails_ends_its_own_request_only(bench, depth):
    bad = held(1, text="start: nobody")
    unspelt = held(2, text=grammar.regex("a{3}"), stop_token_ids=[])
    good = held(3)
    outputs = run(bench.engine(depth=depth, grammars=grammars()), {0: [bad, unspelt, good]})
    failed = {f.request_id: f for o in outputs for f in o.failed}
    assert failed.keys() == {bad.request_id, unspelt.request_id}
    assert {f.reason for f in failed.values()} == {"grammar"}
    assert "nobody" in failed[bad.request_id].error and "go on" in failed[unspelt.request_id].error
    mine = [t for o in outputs for t in o.tokens if t.request_id == unspelt.request_id]
    assert [t.finish_reason for t in mine] == [None] * 3, (
        "it has the tokens before the failure, and no end besides it"
    )
    check([t.token_id for o in outputs for t in o.tokens if t.request_id == good.request_id])
    assert outputs[-1].occupancy.used_slots == 0


@pytest.mark.parametrize("depth", [0, 1])
def test_broken_logits_end_their_own_request_only(bench, depth):
    class Breaks(TorchRuntime):
        def logits(self, hidden):
            logits = super().logits(hidden)
            if len(logits) == 3:
                logits[1, 5] = float("nan")
            return logits

    messages = [held(i) for i in range(3)]
    outputs = run(bench.engine(depth=depth, grammars=grammars(), runtime=Breaks), {0: messages})
    ends = {t.request_id: t.finish_reason for o in outputs for t in o.tokens if t.finish_reason}
    assert [ends[m.request_id] for m in messages] == ["stop", "error", "stop"]


def test_others_go_on_while_a_grammar_is_compiled(bench, monkeypatch):
    go_on = threading.Event()

    class Slow(Grammars):
        def constrain(self, request):
            assert go_on.wait(60)
            super().constrain(request)

    slow = Slow(byte_tokenizer(), 257, threads=1, device=torch.device("cpu"))
    engine = bench.engine(grammars=slow)
    message, free, aborted = held(1), generate(prompt(5), 6), held(2)
    for m in (message, free, aborted):
        engine.handle(m)
    assert engine.occupancy.waiting == 3
    tokens = []
    while len(tokens) < 6:
        if (output := engine.step()) is not None:
            tokens += output.tokens
    assert {t.request_id for t in tokens} == {free.request_id}
    assert engine.step() is None and engine.blocked and engine.in_threads and not engine.idle
    with pytest.raises(ValueError, match="already in use"):
        engine.handle(message)
    engine.handle(Abort(request_id=aborted.request_id))
    assert engine.occupancy.waiting == 1
    go_on.set()
    outputs = run(engine, {0: []})
    check(tokens_of(outputs)[message.request_id])
    assert tokens_of(outputs).keys() == {message.request_id}


def test_a_request_that_is_aborted_while_its_grammar_is_compiled_never_runs(bench):
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Grammars):
        def constrain(self, request):
            begun.set()
            assert go_on.wait(60)
            super().constrain(request)

    engine = bench.engine(grammars=Slow(byte_tokenizer(), 257, threads=1, device=torch.device("cpu")))
    message = held(1)
    engine.handle(message)
    assert begun.wait(60)
    engine.handle(Abort(request_id=message.request_id))
    assert engine.idle and engine.occupancy.waiting == 0
    go_on.set()
    again = held(1)
    outputs = run(engine, {0: [again]})
    assert tokens_of(outputs).keys() == {again.request_id}


class Watched(Grammars):
    """Writes down when masks are made."""

    device: FakeDevice

    def masks(self, requests):
        self.device.log("masks", len(requests))
        return super().masks(requests)


def on_a_device(bench, slots=4):
    """An engine that overlaps steps, and the device whose events tell how."""
    device = FakeDevice()
    pool = StatePool(bench.model.spec, slots)
    runtime = TorchRuntime(bench.model)
    graphs = DecodeGraphs(runtime, pool, (1, 2, 4), device.recorder())
    device.events.clear()
    runner = Runner(runtime, pool, device=device, graphs=graphs)
    watched = Watched(byte_tokenizer(), 257, threads=1, device=torch.device("cpu"))
    watched.device = device
    return Engine(Scheduler(StateCache(pool), 128), runner, 1, watched), device


def test_masks_are_made_behind_the_forward_and_before_the_sampling(bench):
    engine, device = on_a_device(bench)
    run(engine, {0: [held(1, text=grammar.regex("a{5}"))]})
    # The prompt's step is number 0. From then on: the forward, the step before, its masks, the sampling.
    events = [e for e in device.events if e[0] in ("replay", "wait", "masks", "seal")]
    kinds = [kind for kind, _ in events]
    assert kinds[:2] == ["masks", "seal"]
    assert kinds[2:] == ["replay", "wait", "masks", "seal"] * 5 + ["wait"] or kinds[2:] == (
        ["replay", "wait", "masks", "seal"] * 6 + ["wait"]
    )


@pytest.mark.parametrize("depth", [0, 1])
def test_what_is_complete_ends_before_min_tokens(bench, depth):
    message = held(1, text=grammar.choice(["abc"]), min_tokens=50)
    outputs = run(bench.engine(depth=depth, grammars=grammars()), {0: [message]})
    assert text_of(tokens_of(outputs)[message.request_id]) == "abc"
    assert [t.finish_reason for o in outputs for t in o.tokens][-1] == "stop"


def test_a_batch_of_several_pieces_of_logits(bench):
    engine, device = on_a_device(bench, slots=8)
    assert device.logit_rows == 4
    texts = ["[a-c]{3}", "[d-f]{3}", "", "[g-i]{3}", "[j-l]{3}", "", "[m-o]{3}", "[p-r]{3}"]
    messages = [
        held(number, text=grammar.regex(text)) if text else generate(prompt(3, seed=number), 4)
        for number, text in enumerate(texts)
    ]
    tokens = tokens_of(run(engine, {0: messages}))
    for message, text in zip(messages, texts, strict=True):
        assert not text or re.fullmatch(text, text_of(tokens[message.request_id]))


def test_without_grammars_steps_are_launched_ahead_as_ever(bench):
    engine, device = on_a_device(bench)
    run(engine, {0: [generate(prompt(5), 8)]})
    kinds = [kind for kind, _ in device.events if kind in ("replay", "wait", "masks", "seal")]
    assert kinds == ["seal"] + ["replay", "seal", "wait"] * 7 + ["wait"]


def test_nothing_in_a_step_waits_for_the_device_but_its_collect(bench):
    engine, _ = on_a_device(bench)
    runner = engine._runner
    launch, sample = runner.launch, runner.sample

    def launched(batch):
        with NoWaitingMode():
            return launch(batch)

    def sampled(forward, masks=None):
        with NoWaitingMode():
            return sample(forward, masks)

    runner.launch, runner.sample = launched, sampled
    messages = [held(1), held(2, logprobs=2), generate(prompt(5), 20, sampling=sampling(seed=1, top_k=5))]
    tokens = tokens_of(run(engine, {0: messages}))
    for message in messages[:2]:
        check(tokens[message.request_id])
