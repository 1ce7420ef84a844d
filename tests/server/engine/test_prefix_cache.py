"""States of prompts are found again, and going on from one is as good as feeding the prompt."""

import time

import pytest
import torch
from checkpoints import DELTA, GATED
from engines import Bench, generate, prompt, run, sampling, score, tokens_of
from safetensors.torch import load_file

from modeling.families import family_of
from modeling.state import StatePool
from server.engine.cache import Prefix, StateCache
from server.engine.prefix_cache import PrefixIndex
from server.wire.messages import Abort, SaveState

SPEC = family_of(DELTA).spec(DELTA)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("m") / "c", GATED)


def prefix(ids, limit=None, salt=b""):
    data = memoryview(bytearray(4 * len(ids))).cast("I")
    for i, token in enumerate(ids):
        data[i] = token
    return Prefix(data.tobytes(), len(ids) - 1 if limit is None else limit, salt)


def test_the_longest_entry_that_the_prompt_begins_with_is_found():
    index = PrefixIndex()
    ids = prompt(300)
    for length, slot in ((64, 0), (128, 1), (130, 2), (191, 3), (200, 4)):
        index.add(prefix(ids), length, slot)
    for length, found in ((300, 200), (200, 191), (192, 191), (191, 130), (130, 128), (65, 64)):
        assert index.find(prefix(ids[:length])).length == found
    assert index.find(prefix(ids[:64])) is None, "one token must be fed"
    assert index.find(prefix(ids, limit=129)).length == 128
    assert index.find(prefix(prompt(300, seed=1))) is None
    other = [*ids[:150], 9999, *ids[151:]]
    assert index.find(prefix(other)).length == 130
    # The same blocks in another order, or further on, are no match.
    assert index.find(prefix(ids[64:128] + ids[:64] + ids[128:])) is None
    assert index.exact(prefix(ids), 130).slot == 2 and index.exact(prefix(ids), 131) is None


def test_entries_whose_hash_collides_are_told_apart_by_their_tokens():
    index = PrefixIndex()
    one, other = prefix([1] * 64 + [5]), prefix([2] * 64 + [5])
    other.digests[0] = one.digests[0]
    index.add(one, 64, 0)
    assert index.find(other) is None and index.exact(other, 64) is None
    index.add(other, 64, 1)
    assert (index.find(one).slot, index.find(other).slot) == (0, 1)


def test_prompts_of_different_salts_know_nothing_of_each_other():
    index = PrefixIndex()
    ids = prompt(300)
    salts = [b"", b"a", b"b"]
    for slot, salt in enumerate(salts):
        mine = prefix(ids, salt=salt)
        assert index.find(mine) is None and index.exact(mine, 200) is None and index.remember(mine) == 0
        index.add(mine, 200, slot)
        assert index.find(mine).slot == slot and index.exact(mine, 200).slot == slot
        assert index.remember(mine) == 256
    # Whatever a hash says.
    forged = prefix(ids, salt=b"c")
    forged.digests = prefix(ids, salt=b"a").digests
    assert index.find(forged) is None and index.exact(forged, 200) is None


def test_the_least_recently_used_goes_first():
    cache = StateCache(StatePool(SPEC, 4), prefix_cache=True)
    prompts = [prefix(prompt(65, seed=i)) for i in range(3)]
    for p in prompts:
        allocation = cache.allocate(p)
        assert allocation.cached == 0
        cache.snapshot(p, 64, allocation)
        cache.free(allocation)
    assert (cache.used, cache.cached, cache.available) == (0, 3, 4)
    first = cache.allocate(prompts[0])  # which is the oldest, and now the youngest
    second = cache.allocate()
    assert (first.cached, second.cached, cache.cached) == (64, 0, 2)
    assert cache.allocate(prompts[1]).cached == 0
    assert cache.cached == 1
    # The last one left is taken for the very request that it serves.
    assert cache.allocate(prompts[0]).cached == 64
    assert (cache.used, cache.cached) == (4, 0)
    assert cache.allocate(prompts[0]) is None


def test_snapshots_never_take_a_slot_from_a_request():
    cache = StateCache(StatePool(SPEC, 1), prefix_cache=True)
    p = prefix(prompt(65))
    allocation = cache.allocate(p)
    assert cache.snapshot(p, 65, allocation) is None and cache.cached == 0


def test_where_a_prompt_parts_from_earlier_ones():
    index = PrefixIndex()
    ids = prompt(300)
    assert index.remember(prefix(ids)) == 0
    assert index.remember(prefix(ids)) == 256
    assert index.remember(prefix(ids[:200] + prompt(100, seed=1))) == 192
    assert index.remember(prefix(ids[:128])) == 64, "the last token must be fed"
    assert index.remember(prefix(prompt(300, seed=2))) == 0


def cached_tokens(outputs):
    """Cached tokens of each request, as its first token says."""
    cached = {}
    for output in outputs:
        for token in output.tokens:
            cached.setdefault(token.request_id, token.cached_tokens)
    return cached


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("invariant", [False, True])
def test_tokens_with_and_without_the_cache_agree(bench, depth, invariant):
    shared = prompt(200)
    messages = [
        generate(
            shared[:cut] + prompt(n, seed=n),
            6,
            sampling=sampling(seed=n) if n % 2 else sampling(seed=0, temperature=0.0),
        )
        for cut, n in ((200, 1), (200, 30), (200, 31), (128, 70), (150, 9), (200, 30), (64, 64), (200, 30))
    ]
    options = dict(slots=24, prefill_tokens=128, depth=depth, batch_invariant=invariant)
    engine = bench.engine(**options, prefix_cache=True)
    with_cache, cached = {}, {}
    for m in messages:
        outputs = run(engine, {0: [m]})
        with_cache |= tokens_of(outputs)
        cached |= cached_tokens(outputs)
    for m in messages:
        if invariant:
            alone = tokens_of(run(bench.engine(**options), {0: [m]}))
            assert with_cache[m.request_id] == alone[m.request_id]
        bench.check_tokens(m, with_cache[m.request_id])
    # That prompts part at 64 is only known since the seventh.
    assert [i for i, m in enumerate(messages) if not cached[m.request_id]] == [0, 6]
    assert cached[messages[5].request_id] >= 192


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("depth", [0, 1])
def test_many_prompts_that_begin_alike_through_few_slots(bench, slots, depth):
    shared = [prompt(130, seed=100), prompt(260, seed=101)]
    messages = [generate(shared[i % 2][: 60 + 7 * i] + prompt(1 + 5 * i, seed=i), 4) for i in range(20)]
    engine = bench.engine(slots=slots, prefill_tokens=64, depth=depth, prefix_cache=True)
    tokens = tokens_of(run(engine, {3 * i: [m] for i, m in enumerate(messages)}))
    for m in messages:
        assert len(tokens[m.request_id]) == 4
        bench.check_tokens(m, tokens[m.request_id])
    assert engine.occupancy.used_slots == 0 and engine.occupancy.cached_slots <= slots


def test_the_choices_of_one_prompt_are_prefilled_once(bench):
    ids = prompt(300)
    messages = [generate(ids, 5, sampling=sampling(seed=3, choice=i)) for i in range(6)]
    for depth in (0, 1):
        for prefix_cache in (False, True):
            engine = bench.engine(slots=8, prefill_tokens=128, depth=depth, prefix_cache=prefix_cache)
            outputs = run(engine, {0: messages})
            tokens = tokens_of(outputs)
            for m in messages:
                bench.check_tokens(m, tokens[m.request_id])
            assert len({tuple(t) for t in tokens.values()}) > 1
            # Three chunks, then decodes of all six.
            assert [o.batch_size for o in outputs] == [1, 1, 6, 6, 6, 6, 6]
            cached = cached_tokens(outputs)
            assert [cached[m.request_id] for m in messages] == [0, *[300] * 5]


def test_requests_of_different_salts_share_no_prefill(bench, tmp_path):
    """Neither at the same time nor one after the other, whatever kind of request it is."""
    ids = prompt(300)
    kinds = [
        lambda salt: generate([*ids, 5], 1, cache_salt=salt),
        lambda salt: score([*ids, 5], 290, cache_salt=salt),
        lambda salt: SaveState(
            request_id="save",
            token_ids=[*ids, 5],
            path=str(tmp_path / "x"),
            fingerprint={},
            cache_salt=salt,
        ),
    ]
    for kind in kinds:
        engine = bench.engine(slots=12, prefill_tokens=128, prefix_cache=True)
        together = [generate(ids, 2, cache_salt=salt) for salt in (b"a", b"b", b"a")]
        cached = cached_tokens(run(engine, {0: together}))
        assert [cached[m.request_id] for m in together] == [0, 0, 300]
        hits = [sum(o.cache_hits for o in run(engine, {0: [kind(salt)]})) for salt in (b"c", b"a")]
        assert hits[0] == 0 and hits[1] >= 256


def test_choices_beyond_the_slots_and_after_an_abort(bench):
    ids = prompt(150)
    messages = [generate(ids, 3, sampling=sampling(seed=3, choice=i)) for i in range(5)]
    engine = bench.engine(slots=2, prefill_tokens=64)
    outputs = run(engine, {0: messages, 1: [Abort(request_id=messages[0].request_id)]})
    tokens = tokens_of(outputs)
    for m in messages[1:]:
        assert len(tokens[m.request_id]) == 3
        bench.check_tokens(m, tokens[m.request_id])


def test_a_score_takes_what_its_positions_allow(bench):
    ids = prompt(260)
    plain = {first: scores(bench.engine(), score(ids, first)) for first in (1, 64, 65, 129, 200, 259)}
    engine = bench.engine(prefill_tokens=64, prefix_cache=True)
    run(engine, {0: [generate(ids, 2)]})
    for first, expected in plain.items():
        message = score(ids, first)
        outputs = run(engine, {0: [message]})
        (answer,) = (s for o in outputs for s in o.scored)
        assert answer.logprobs == pytest.approx(expected, abs=1e-4)
        hits = sum(o.cache_hits for o in outputs)
        assert hits <= first - 1 and (hits > 0) == (first > 192)
        assert sum(o.cache_queries for o in outputs) == first - 1, (
            "shadow traffic must not water the rate down"
        )


def scores(engine, message):
    (answer,) = (s for o in run(engine, {0: [message]}) for s in o.scored)
    return answer.logprobs


def test_saving_a_state_uses_the_cache_and_feeds_it(bench, tmp_path):
    ids = prompt(200)
    engine = bench.engine(prefix_cache=True)
    path = tmp_path / "state"
    for i in range(2):
        message = SaveState(request_id=f"s{i}", token_ids=ids, path=str(path), fingerprint={})
        outputs = run(engine, {0: [message]})
        assert outputs[-1].saved[0].error is None
    assert sum(o.cache_hits for o in outputs) >= 128
    assert cached_tokens(run(engine, {0: [generate([*ids, 5], 1)]})).popitem()[1] == 200
    with torch.inference_mode():
        _, state = bench.model(torch.tensor(ids), [0, 200])
    saved = load_file(path)
    for i, layer in enumerate(state):
        torch.testing.assert_close(saved[f"layers.{i}.recurrent"], layer.recurrent[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(saved[f"layers.{i}.conv"], layer.conv[0], rtol=1e-4, atol=1e-5)


def test_a_shared_prefix_of_1024_tokens_makes_the_first_token_come_much_sooner(bench):
    """Measured as the engine's CPU time to the first token, the best of several in turns, whatever else the machine
    does; 35 times less is fed."""
    shared = prompt(1024, seed=50)
    engines = {on: bench.engine(slots=24, prefill_tokens=512, prefix_cache=on) for on in (False, True)}
    waits = {False: [], True: []}
    fed = {False: [], True: []}
    for i in range(8):
        ids = shared + prompt(30, seed=i)
        for on, engine in engines.items():
            began = time.process_time()
            outputs = run(engine, {0: [generate(ids, 1)]})
            waits[on].append(time.process_time() - began)
            fed[on].append(len(ids) - sum(o.cache_hits for o in outputs))
    assert fed[False] == [1054] * 8 and fed[True] == [1054, *[30] * 7]
    without, with_cache = (min(waits[on][1:]) for on in (False, True))
    assert without > 5 * with_cache
