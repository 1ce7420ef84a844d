"""What runs in each step: budgets, cuts, order, and a state machine that looks for any slip in the bookkeeping."""

import itertools

import pytest
import torch
from checkpoints import DELTA
from engines import generate, score
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from modeling.families import family_of
from modeling.state import StatePool
from server.engine.cache import StateCache
from server.engine.engine import Engine
from server.engine.messages import Abort, Generate
from server.engine.request import Request
from server.engine.runner import StepResult
from server.engine.scheduler import PREFILL_ALIGN, Scheduler

SPEC = family_of(DELTA).spec(DELTA)


def scheduler(slots=4, prefill_tokens=128):
    return Scheduler(StateCache(StatePool(SPEC, slots)), prefill_tokens)


def add(target, length, max_tokens=4, **fields):
    request = Request(generate([1] * length, max_tokens, **fields), arrived=0.0)
    target.add(request)
    return request


def step(target):
    """Plan and at once collect a step. The chunks as (request, start, end), and the decodes."""
    batch = target.next_batch()
    if batch is None:
        return None
    for request in batch.requests:
        target.collected(request)
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
    assert (s.running, s.waiting, s.used_slots) == (1, 2, 1)
    s.finish(a, "stop")
    assert step(s) == ([(b, 0, 3)], [])
    s.abort(b.id)
    assert step(s) == ([(c, 0, 1)], [])
    s.abort(c.id)
    assert step(s) is None
    assert (s.running, s.waiting, s.used_slots) == (0, 0, 0)


def test_a_slot_is_freed_only_once_no_launched_step_uses_it():
    s = scheduler(slots=1)
    a, b = add(s, 5), add(s, 5)
    first = s.next_batch()
    second = s.next_batch()
    assert second.decodes == [a]
    s.abort(a.id)
    assert s.used_slots == 1 and s.next_batch() is None
    for batch in (first, second):
        assert s.used_slots == 1
        (request,) = batch.requests
        s.collected(request)
    assert s.used_slots == 0
    assert s.next_batch().prefills[0].request is b


def test_aborting_twice_or_after_the_end_is_no_error():
    s = scheduler()
    a, b = add(s, 5), add(s, 5)
    s.abort(b.id)
    s.abort(b.id)
    batch = s.next_batch()
    s.abort(a.id)
    s.abort(a.id)
    s.collected(batch.requests[0])
    s.abort(a.id)
    s.abort("never seen")
    assert (s.running, s.waiting, s.used_slots) == (0, 0, 0)


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
    s.collected(batch.requests[0])
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


class FakeStep:
    """A launched step whose tokens are known: the index of each."""

    def __init__(self, batch, runner):
        self.batch, self._runner = batch, runner
        self._slots = {request: request.slot for request in batch.requests}
        self._tokens = [(r, r.sampled - 1) for r in batch.decodes] + [
            (c.request, 0) for c in batch.prefills if c.is_last and isinstance(c.request.message, Generate)
        ]

    def collect(self):
        self._runner.launched.remove(self)
        for request, slot in self._slots.items():
            assert request.slot == slot, "a slot changed hands under a launched step"
        return StepResult(self._tokens, [])


class FakeRunner:
    def __init__(self, prefill_tokens):
        self.prefill_tokens = prefill_tokens
        self.launched = []
        self.order = []

    def launch(self, batch):
        requests = batch.requests
        assert requests and len(set(requests)) == len(requests)
        assert all(r.finish_reason is None for r in requests), "work for a request that has ended"
        assert len({r.slot for r in requests}) == len(requests)
        assert sum(c.end - c.start for c in batch.prefills) <= self.prefill_tokens
        for chunk in batch.prefills:
            assert chunk.start < chunk.end
            assert chunk.is_last or chunk.end % PREFILL_ALIGN == 0
            assert chunk.start % PREFILL_ALIGN == 0
            if chunk.start == 0:
                self.order.append(chunk.request.id)
        result = FakeStep(batch, self)
        self.launched.append(result)
        return result


class EngineMachine(RuleBasedStateMachine):
    """Requests come, go and step in any order; each gets its tokens in order and ends once, and no slot is lost."""

    @initialize(
        slots=st.integers(1, 3), depth=st.integers(0, 1), prefill_tokens=st.sampled_from([64, 128, 192])
    )
    def start(self, slots, depth, prefill_tokens):
        self.scheduler = scheduler(slots, prefill_tokens)
        self.runner = FakeRunner(prefill_tokens)
        self.engine = Engine(self.scheduler, self.runner, depth)
        self.depth = depth
        self.slots = slots
        self.ids = itertools.count()
        self.added, self.aborted = {}, set()
        self.tokens, self.ended = {}, {}

    @rule(length=st.sampled_from([1, 2, 63, 64, 65, 128, 200, 400]), max_tokens=st.integers(1, 6))
    def add_generate(self, length, max_tokens):
        message = generate([1] * length, max_tokens, request_id=f"r{next(self.ids)}")
        self.added[message.request_id] = message
        self.engine.handle(message)

    @rule(length=st.sampled_from([1, 70]), stop=st.integers(0, 4))
    def add_stopping(self, length, stop):
        # Tokens are their own index, so that this one stops after `stop` tokens.
        message = generate([1] * length, 6, request_id=f"r{next(self.ids)}", stop_token_ids=[stop])
        self.added[message.request_id] = message
        self.engine.handle(message)

    @rule(length=st.sampled_from([2, 64, 150]))
    def add_score(self, length):
        message = score([1] * length)
        self.added[message.request_id] = message
        self.engine.handle(message)

    @rule(pick=st.integers(0, 10**6))
    def abort(self, pick):
        if self.added:
            request_id = sorted(self.added)[pick % len(self.added)]
            if request_id not in self.ended:
                self.aborted.add(request_id)
            self.engine.handle(Abort(request_id=request_id))

    @rule()
    def step(self):
        ready = [r for r in self.scheduler._running if r.wants_decode]
        before = list(self.runner.launched)
        output = self.engine.step()
        new = [s for s in self.runner.launched if s not in before]
        if ready and new:
            assert new[0].batch.decodes == ready, "a decode was left out of a step"
        assert len(self.runner.launched) <= self.depth
        if output is not None:
            self.check(output)

    def check(self, output):
        for token in output.tokens:
            assert token.request_id not in self.ended and token.request_id not in self.aborted
            tokens = self.tokens.setdefault(token.request_id, [])
            assert token.token_id == len(tokens)
            tokens.append(token.token_id)
            if token.finish_reason is not None:
                self.ended[token.request_id] = token.finish_reason
        for scored in output.scored:
            assert scored.request_id not in self.ended and scored.request_id not in self.aborted
            self.ended[scored.request_id] = "stop"
        occupancy = output.occupancy
        assert occupancy.used_slots == occupancy.running <= self.slots

    @invariant()
    def every_slot_has_one_holder(self):
        if not hasattr(self, "scheduler"):
            return
        held = [r.slot for r in self.scheduler._requests.values() if r.allocation is not None]
        assert len(set(held)) == len(held) == self.scheduler.used_slots == self.scheduler.running
        assert self.scheduler.waiting == len(self.scheduler._requests) - len(held)
        # A free slot is never left idle while a request waits, unless the prompt budget is what is short.
        assert self.engine.idle == (not self.scheduler._requests and not self.runner.launched)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(5_000):
            if self.engine.idle:
                break
            self.step()
        assert self.engine.idle
        assert self.scheduler.used_slots == 0 and not self.scheduler._requests
        assert set(self.ended) | self.aborted == set(self.added)
        assert not set(self.ended) & self.aborted
        for request_id, reason in self.ended.items():
            message = self.added[request_id]
            if isinstance(message, Generate):
                stop = message.stop_token_ids[0] if message.stop_token_ids else 99
                assert len(self.tokens[request_id]) == min(message.max_tokens, stop + 1)
                assert reason == ("stop" if stop < message.max_tokens else "length")
        order = [r for r in self.added if r in self.runner.order]
        assert self.runner.order == order, "not first come first served"


EngineMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestEngineMachine = EngineMachine.TestCase


def test_a_step_is_launched_ahead_at_depth_1_only():
    for depth in (0, 1):
        runner = FakeRunner(64)
        engine = Engine(scheduler(prefill_tokens=64), runner, depth)
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
    for t in (*pool.recurrent, *pool.conv):
        t.fill_(1.0)
    held = [cache.allocate(), cache.allocate()]
    assert cache.allocate() is None and cache.used == 2
    assert {a.slot for a in held} == {0, 1}
    assert all(not torch.any(t) for t in (*pool.recurrent, *pool.conv))
