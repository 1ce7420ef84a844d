"""What runs in each step: budgets, cuts, order, twins, snapshots."""

import itertools

import pytest
import torch
from checkpoints import DELTA
from engines import generate, score
from fake_runner import FakeRunner
from states import tensors

from modeling.families import family_of
from modeling.state import StatePool
from server.engine.cache import StateCache
from server.engine.engine import Engine
from server.engine.request import Request
from server.engine.scheduler import Scheduler

_tokens = itertools.count(1)
SPEC = family_of(DELTA).spec(DELTA)


def scheduler(slots=4, prefill_tokens=128):
    return Scheduler(StateCache(StatePool(SPEC, slots)), prefill_tokens)


def add(target, length, max_tokens=4, **fields):
    fresh = next(_tokens)  # no two prompts alike, unless a test asks for it
    request = Request(generate([fresh] * length, max_tokens, **fields), arrived=0.0)
    target.add(request)
    return request


def step(target):
    """Plan and at once collect a step. The chunks as (request, start, end), and the decodes."""
    batch = target.next_batch()
    if batch is None:
        return None
    for request in batch.requests:
        target.work_done(request)
    return [(c.request, c.start, c.end) for c in batch.prefills], batch.decodes


def test_a_long_prompt_is_cut_at_the_budget():
    s = scheduler(prefill_tokens=128)
    a = add(s, 300)
    assert step(s) == ([(a, 0, 128)], [])
    assert step(s) == ([(a, 128, 256)], [])
    assert step(s) == ([(a, 256, 300)], [])
    assert step(s) == ([], [a])


def test_a_chunk_that_does_not_end_its_prompt_ends_at_a_multiple_of_64():
    s = scheduler(prefill_tokens=192)
    a, b, c = add(s, 70), add(s, 200), add(s, 60)
    # 122 of the budget are left for b, of which 64 are used; 58 are too few for c to begin with.
    assert step(s) == ([(a, 0, 70), (b, 0, 64)], [])
    assert step(s) == ([(b, 64, 200)], [a])
    assert step(s) == ([(c, 0, 60)], [a, b])
    assert step(s) == ([], [a, b, c])


def test_a_short_prompt_uses_what_a_cut_one_leaves():
    s = scheduler(prefill_tokens=192)
    a, b, c = add(s, 70), add(s, 200), add(s, 10)
    assert step(s) == ([(a, 0, 70), (b, 0, 64), (c, 0, 10)], [])


def test_a_step_takes_no_more_prompts_than_their_copied_states_have_room_for(monkeypatch):
    monkeypatch.setattr("server.engine.scheduler.MAX_PROMPTS", 2)
    s = scheduler(prefill_tokens=128)
    a, b, c = add(s, 10), add(s, 20), add(s, 30)
    assert step(s) == ([(a, 0, 10), (b, 0, 20)], [])
    assert step(s) == ([(c, 0, 30)], [a, b])


def test_no_chunk_is_planned_from_less_than_64_tokens_of_budget():
    s = scheduler(prefill_tokens=64)
    a, b = add(s, 10), add(s, 100)
    assert step(s) == ([(a, 0, 10)], [])
    assert step(s) == ([(b, 0, 64)], [a])


def test_decodes_run_in_every_step_beside_a_long_prompt():
    s = scheduler(prefill_tokens=64)
    short = add(s, 1, max_tokens=100)
    step(s)
    long = add(s, 640)
    for i in range(10):
        assert step(s) == ([(long, 64 * i, 64 * (i + 1))], [short])


def test_first_come_first_served_when_slots_are_short():
    s = scheduler(slots=1)
    a, b, c = add(s, 5), add(s, 3), add(s, 1)
    assert step(s) == ([(a, 0, 5)], [])
    assert (s.running, s.waiting, s.occupancy.used_slots) == (1, 2, 1)
    s.finish(a, "stop")
    assert step(s) == ([(b, 0, 3)], [])
    s.abort(b.id)
    assert step(s) == ([(c, 0, 1)], [])
    s.abort(c.id)
    assert step(s) is None
    assert (s.running, s.waiting, s.occupancy.used_slots) == (0, 0, 0)


def test_a_slot_is_freed_only_once_no_launched_step_uses_it():
    s = scheduler(slots=1)
    a, b = add(s, 5), add(s, 5)
    first = s.next_batch()
    second = s.next_batch()
    assert second.decodes == [a]
    s.abort(a.id)
    assert s.occupancy.used_slots == 1 and s.next_batch() is None
    for batch in (first, second):
        assert s.occupancy.used_slots == 1
        (request,) = batch.requests
        s.work_done(request)
    assert s.occupancy.used_slots == 0
    assert s.next_batch().prefills[0].request is b


def test_aborting_twice_or_after_the_end_is_no_error():
    s = scheduler()
    a, b = add(s, 5), add(s, 5)
    s.abort(b.id)
    s.abort(b.id)
    batch = s.next_batch()
    s.abort(a.id)
    s.abort(a.id)
    s.work_done(batch.requests[0])
    s.abort(a.id)
    s.abort("never seen")
    assert (s.running, s.waiting, s.occupancy.used_slots) == (0, 0, 0)


def test_finishing_keeps_the_first_reason():
    s = scheduler()
    a = add(s, 5)
    s.next_batch()
    s.finish(a, "stop")
    s.abort(a.id)
    assert a.finish_reason == "stop"


def test_an_id_in_use_is_refused_until_its_request_has_gone():
    s = scheduler()
    a = add(s, 5, request_id="x")
    with pytest.raises(ValueError, match="'x' is already in use"):
        add(s, 5, request_id="x")
    batch = s.next_batch()
    s.abort("x")
    with pytest.raises(ValueError, match="already in use"):
        add(s, 5, request_id="x")
    s.work_done(batch.requests[0])
    add(s, 5, request_id="x")
    assert a.allocation is None


def test_no_more_tokens_are_planned_than_asked_for():
    s = scheduler()
    a = add(s, 5, max_tokens=2)
    assert s.next_batch().prefills[0].request is a
    assert s.next_batch().decodes == [a]
    assert s.next_batch() is None  # though nothing has been collected yet


def test_a_score_is_never_decoded():
    s = scheduler()
    request = Request(score([1] * 5), arrived=0.0)
    s.add(request)
    assert step(s) == ([(request, 0, 5)], [])
    assert step(s) is None


@pytest.mark.parametrize("tokens", [0, 1, 63, 65, 100, -64])
def test_a_budget_that_is_no_multiple_of_64_is_refused(tokens):
    with pytest.raises(ValueError, match=f"prefill_tokens={tokens} must be a positive multiple of 64"):
        scheduler(prefill_tokens=tokens)


def test_a_step_is_launched_ahead_at_depth_1_only():
    for depth in (0, 1):
        pool = StatePool(SPEC, 4)
        runner = FakeRunner(pool, 64)
        engine = Engine(Scheduler(StateCache(pool), 64), runner, depth)
        engine.handle(generate([1] * 3, 3))
        assert (engine.step() is None) == (depth == 1)
        assert len(runner.launched) == depth
        indices = []
        while not engine.idle:
            output = engine.step()
            indices += [] if output is None else [t.token_id for t in output.tokens]
        assert indices == [1, 2] if depth == 0 else [0, 1, 2]
        assert engine.step() is None


def test_the_pool_refuses_to_free_a_slot_twice():
    cache = StateCache(StatePool(SPEC, 2))
    allocation = cache.allocate()
    cache.free(allocation)
    with pytest.raises(ValueError, match="not in use"):
        cache.free(allocation)
    assert cache.used == 0


def test_a_cache_hands_out_zeroed_states_until_it_is_full():
    pool = StatePool(SPEC, 2)
    cache = StateCache(pool)
    for t in tensors(pool):
        t.fill_(1.0)
    held = [cache.allocate(), cache.allocate()]
    assert cache.allocate() is None and cache.used == 2
    assert {a.slot for a in held} == {0, 1}
    assert all(not torch.any(t[:2]) for t in tensors(pool))


def test_lower_priority_numbers_go_first_and_equals_as_they_came():
    s = scheduler(slots=2)
    a, b, c, d = (add(s, 5, priority=p) for p in (1, 0, 1, -3))
    assert step(s) == ([(d, 0, 5), (b, 0, 5)], [])
    for request in (d, b):
        s.finish(request, "stop")
    assert step(s) == ([(a, 0, 5), (c, 0, 5)], [])


def test_an_urgent_prompt_overtakes_one_that_is_half_fed():
    s = scheduler(prefill_tokens=64)
    long = add(s, 200)
    assert step(s) == ([(long, 0, 64)], [])
    urgent = add(s, 70, priority=-1)
    assert step(s) == ([(urgent, 0, 64)], [])
    # What it leaves of the budget goes to the other one.
    assert step(s) == ([(urgent, 64, 70)], [])
    assert step(s) == ([(long, 64, 128)], [urgent])


def test_no_more_run_at_once_than_allowed():
    s = Scheduler(StateCache(StatePool(SPEC, 4)), 128, max_running=2)
    a, b, c = (add(s, 5) for _ in range(3))
    assert step(s) == ([(a, 0, 5), (b, 0, 5)], [])
    assert (s.running, s.waiting) == (2, 1)
    s.abort(a.id)
    assert step(s) == ([(c, 0, 5)], [b])


def test_a_twin_waits_for_the_prompt_that_is_being_fed_and_others_do_not_wait_for_it():
    s = scheduler(slots=4, prefill_tokens=64)
    ids = [9] * 100
    first, second = (Request(generate(ids), arrived=0.0) for _ in range(2))
    s.add(first)
    s.add(second)
    other = add(s, 3)
    assert step(s) == ([(first, 0, 64)], [])
    assert second.allocation is None and s.running == 1
    batch = s.next_batch()
    assert [(c.request, c.start, c.end, c.forks) for c in batch.prefills] == [
        (first, 64, 100, [second]),
        (other, 0, 3, []),
    ]
    assert second.sampled == 1 and second.cached == 100 and batch.requests == [first, second, other]
