"""Engines on hybrids: the same tokens as a plain loop, whatever the cache, forks, saved states and too few pages do."""

import pytest
import torch
from engines import Bench, generate, prompt, run, sampling, score, tokens_of
from hybrids import CASES
from safetensors.torch import load_file

from modeling.layers import MoE
from modeling.ops import chunked_gated_delta_rule
from modeling.runtime import TorchRuntime
from modeling.runtime.cpu import CpuRuntime
from modeling.runtime.gpu.runtime import GpuRuntime
from server.engine.forward import ROWS
from server.engine.sampler import Sampler
from server.wire.messages import Pause, Resume, SaveState

NAMES = ["vl-dense-three-value-heads", "vl-moe-fused", "next-some-dense", "olmo-odd-irregular"]
"""A checkpoint of each kind: attention with its norms, gates and rotations, experts, norms behind."""


@pytest.fixture(scope="module", params=NAMES)
def bench(request, tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("m") / "c", CASES[request.param])


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("m") / "c", CASES[NAMES[0]])


@pytest.mark.parametrize(
    "options",
    [{"runtime": TorchRuntime}, {}, {"depth": 1}, {"prefix_cache": True, "depth": 1}],
    ids=["torch", "cpu", "ahead", "cached"],
)
def test_tokens_are_those_of_a_plain_loop(bench, options):
    shared = prompt(130)
    messages = [generate(prompt(n, seed=n), 9) for n in (1, 2, 63, 64, 65, 128, 200)]
    messages += [generate([*shared, i], 7, sampling=sampling(3, choice=i)) for i in (1, 2, 3)]
    messages += [generate(shared, 6, sampling=sampling(5, choice=i)) for i in range(3)]
    engine = bench.engine(**{"slots": 5, "prefill_tokens": 64, "runtime": CpuRuntime, **options})
    for _ in range(2):  # the second time the cache is warm
        tokens = tokens_of(run(engine, {i: [message] for i, message in enumerate(messages)}))
        for message in messages:
            assert bench.check_tokens(message, tokens[message.request_id]) == message.max_tokens
    occupancy = engine.occupancy
    assert (occupancy.used_slots, occupancy.used_pages) == (0, 0)
    assert (occupancy.cached_pages > 0) == bool(options.get("prefix_cache"))


def test_every_length_of_prompt_warm_and_cold(dense):
    engine = dense.engine(slots=12, prefill_tokens=128, prefix_cache=True, runtime=CpuRuntime, pages=60)
    ids = prompt(200)
    for length in [*range(200, 0, -7), *range(1, 201, 9)]:
        message = generate(ids[:length], 3)
        tokens = tokens_of(run(engine, {0: [message]}))
        assert dense.check_tokens(message, tokens[message.request_id]) == 3


@pytest.mark.parametrize("depth", [0, 1])
def test_requests_that_are_preempted_go_on_with_the_same_bits(bench, depth):
    check_preemption(bench, CpuRuntime, depth)


def test_so_they_do_in_plain_torch(dense):
    check_preemption(dense, TorchRuntime, 0)


def check_preemption(bench, runtime, depth):
    """In batch-invariant mode, where nothing else changes a bit either."""
    penalised = sampling(2, temperature=0.8, presence_penalty=0.5, repetition_penalty=1.2)
    messages = [
        generate(
            prompt(40 + 20 * i, seed=i),
            150,
            sampling=penalised if i % 2 else sampling(i),
            logprobs=2,
            request_id=f"r{depth}{i}",
        )
        for i in range(5)
    ]
    found = {}
    for pages in (8, 60):
        engine = bench.engine(slots=5, batch_invariant=True, depth=depth, runtime=runtime, pages=pages)
        outputs = run(engine, {0: messages})
        preemptions = sum(output.preemptions for output in outputs)
        assert (preemptions > 0) == (pages == 8)
        found[pages] = [(t.request_id, t.token_id, t.logprob, t.top) for o in outputs for t in o.tokens]
        assert engine.idle and engine.occupancy.used_pages == 0
        ends = {t.request_id: t.pages for o in outputs for t in o.tokens if t.finish_reason}
        assert ends == {m.request_id: -(-(len(m.token_ids) + 149) // 64) for m in messages}
    assert sorted(found[8], key=lambda t: t[0]) == sorted(found[60], key=lambda t: t[0])


@pytest.mark.parametrize("out", [True, False])
def test_a_device_without_memory_for_a_preempted_request_s_sampling_fails_no_others(dense, monkeypatch, out):
    """Penalties have rows over the whole vocabulary: where these are copied, memory may be short."""
    engine = dense.engine(slots=3, depth=1, runtime=CpuRuntime, pages=8)
    name, seen = "save" if out else "load", []
    original = getattr(Sampler, name)

    def fails_once(sampler, *arguments):
        seen.append(arguments)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(sampler, *arguments)

    monkeypatch.setattr(Sampler, name, fails_once)
    first = [generate(prompt(40 + 20 * i, seed=i), 150, request_id=f"r{out}{i}") for i in range(3)]
    later = generate(prompt(30, seed=9), 20)
    outputs = run(engine, {0: first, 600: [later]})
    failed = {f.request_id: f.reason for o in outputs for f in o.failed}
    tokens: dict[str, list[int]] = {}
    for token in (t for o in outputs for t in o.tokens):
        tokens.setdefault(token.request_id, []).append(token.token_id)
    assert seen and list(failed.values()) == ["memory"]
    ended = {t.request_id for o in outputs for t in o.tokens if t.finish_reason}
    assert ended | set(failed) == {m.request_id for m in (*first, later)} and not ended & set(failed)
    for message in (*first, later):
        if message.request_id in ended:
            dense.check_tokens(message, tokens[message.request_id])
    assert later.request_id in ended
    assert engine.idle and engine.occupancy.used_pages == engine.occupancy.used_slots == 0


def test_a_state_for_whose_copy_there_is_no_memory_is_not_saved_and_nothing_else_is_lost(
    dense, monkeypatch, tmp_path
):
    def no_memory(*_):
        raise MemoryError("none left")

    monkeypatch.setattr("server.engine.cache.host_tensors", no_memory)
    engine, other = dense.engine(slots=2), generate(prompt(40), 9)
    saved = SaveState(request_id="s", token_ids=prompt(70), path=str(tmp_path / "state"), fingerprint={})
    outputs = run(engine, {0: [other, saved]})
    (failed,) = (f for o in outputs for f in o.failed)
    assert (failed.request_id, failed.reason) == ("s", "memory") and "none left" in failed.error
    assert dense.check_tokens(other, tokens_of(outputs)[other.request_id]) == 9
    assert engine.idle and engine.occupancy.used_pages == 0 and not list(tmp_path.iterdir())


def test_a_request_whose_reader_is_behind_is_preempted_too_and_goes_on_once_it_reads(dense):
    slow, fast = generate(prompt(60), 90, priority=1), generate(prompt(60, seed=1), 90)
    engine = dense.engine(slots=2, pages=4, runtime=CpuRuntime)
    outputs = run(
        engine,
        {0: [slow, fast], 5: [Pause(request_id=slow.request_id)], 200: [Resume(request_id=slow.request_id)]},
    )
    assert sum(output.preemptions for output in outputs) == 1
    tokens = tokens_of(outputs)
    for message in (slow, fast):
        assert dense.check_tokens(message, tokens[message.request_id]) == 90


def test_a_saved_state_holds_the_keys_and_values_of_its_tokens(bench, tmp_path):
    before, after, path = prompt(150), prompt(70, seed=1), str(tmp_path / "state")
    engine = bench.engine(prefix_cache=True)
    saved = SaveState(request_id="s", token_ids=before, path=path, fingerprint={})
    (answer,) = (s for o in run(engine, {0: [saved]}) for s in o.saved)
    assert answer.error is None
    lengths = {len(t) for name, t in load_file(path).items() if name.endswith((".keys", ".values"))}
    assert lengths == {150}
    messages = [
        generate(after, 8, state_path=path, state_tokens=150, sampling=sampling(1, choice=i))
        for i in range(3)
    ]
    outputs = run(engine, {0: messages})
    tokens = tokens_of(outputs)
    for message in messages:
        whole = replace_ids(message, before + after)
        assert bench.check_tokens(whole, tokens[message.request_id]) == 8
    wrong = generate(after, 8, state_path=path, state_tokens=149)
    (failed,) = (f for o in run(engine, {0: [wrong]}) for f in o.failed)
    assert failed.reason == "state" and "[149, " in failed.error
    assert engine.occupancy.used_pages == 0


def replace_ids(message, ids):
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return type(message)(**{**fields, "token_ids": ids, "state_path": None, "state_tokens": 0})


def test_scores_are_those_of_a_whole_forward(bench):
    ids = prompt(180)
    with torch.inference_mode():
        hidden, _ = bench.model(torch.tensor(ids), [0, len(ids)])
        expected = bench.model.logits(hidden).log_softmax(-1)[range(99, 179), ids[100:]]
    engine = bench.engine(prefill_tokens=64, prefix_cache=True, runtime=CpuRuntime, pages=9)
    messages = [score(ids, 100), generate(prompt(100, seed=1), 60), generate(prompt(100, seed=2), 60)]
    (answer,) = (s for o in run(engine, {0: messages}) for s in o.scored)
    assert answer.logprobs == pytest.approx(expected.tolist(), abs=2e-4)


def test_a_prefix_shares_its_full_pages(dense):
    engine = dense.engine(slots=8, prefix_cache=True, pages=60)
    shared = prompt(256)
    run(engine, {0: [generate(shared, 1)]})
    alone = engine.occupancy.cached_pages
    messages = [generate([*shared, i], 30) for i in range(1, 4)]
    first = run(engine, {0: messages})[0]
    # Four pages of the prompt that all share, and one of its own for each.
    assert first.occupancy.used_pages == 4 + 3 and alone == 4
    assert sum(o.cache_hits for o in [first]) == 3 * 256


def test_batch_invariant_tokens_do_not_depend_on_what_else_runs(bench):
    target = generate(prompt(100), 12, logprobs=1)
    others = [generate(prompt(30 + 9 * i, seed=i), 20) for i in range(4)]

    def reported(messages):
        engine = bench.engine(batch_invariant=True, runtime=CpuRuntime, prefix_cache=True)
        outputs = run(engine, {0: messages})
        return [
            (t.token_id, t.logprob) for o in outputs for t in o.tokens if t.request_id == target.request_id
        ]

    alone = reported([target])
    assert len(alone) == 12 and reported([*others, target]) == alone


class SeesRows(TorchRuntime):
    """Notes how many rows its decode steps have."""

    def __init__(self, model):
        super().__init__(model)
        self.rows = set()

    def decode(self, input_ids, pool, slots):
        self.rows.add(len(input_ids))
        return super().decode(input_ids, pool, slots)


class SeesIndependentRows(SeesRows):
    """Says that its rows are independent, whatever the layers are."""

    independent_rows = True


def test_batch_invariant_requests_go_alone_only_where_their_rows_would_depend_on_others(bench):
    messages = [generate(prompt(30 + i, seed=i), 5) for i in range(3)]
    runtimes = SeesRows(bench.model), SeesIndependentRows(bench.model)
    for runtime in runtimes:
        engine = bench.engine(batch_invariant=True, runtime=lambda model, runtime=runtime: runtime)
        tokens = tokens_of(run(engine, {0: messages}))
        assert [bench.check_tokens(m, tokens[m.request_id]) for m in messages] == [5, 5, 5]
    has_experts = any(isinstance(block.ffn, MoE) for block in bench.model.blocks)
    assert [runtime.rows for runtime in runtimes] == [{1} if has_experts else {ROWS}, {ROWS}]
    assert GpuRuntime(bench.model, chunked_gated_delta_rule).independent_rows


def test_a_state_in_bfloat16_keeps_its_keys_so_too(dense):
    engine = dense.engine(state_dtype="bfloat16", runtime=CpuRuntime)
    message = generate(prompt(100), 5)
    assert len(tokens_of(run(engine, {0: [message]}))[message.request_id]) == 5
    pool = engine._runner._pool
    assert pool.types.inputs == torch.bfloat16 and pool.layers[3].keys.dtype == torch.bfloat16
