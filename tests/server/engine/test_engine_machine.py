"""Requests in any order and number: the bookkeeping never slips (`engine_machine`)."""

import random

import pytest
from engine_machine import HYBRID, SPEC, EngineMachine
from engines import generate, run
from fake_runner import FakeRunner
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from modeling.state import StatePool
from server.engine.cache import StateCache
from server.engine.engine import Engine, IntegrityError
from server.engine.scheduler import Scheduler

# Shrinking would take minutes; the steps of a failure are printed as they are.
EngineMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, phases=[Phase.generate])
TestEngineMachine = EngineMachine.TestCase


class Drawn:
    """What a rule asks of hypothesis, by a generator's choice."""

    def __init__(self, generator, most):
        self.draw = lambda strategy: generator.randint(1, most)


def crowd(seed):
    """Requests that grow over more pages than there are, in a random schedule. How often one was preempted."""
    r = random.Random(seed)
    m = EngineMachine()
    m.begin(
        slots=r.randint(2, 6),
        depth=r.randint(0, 1),
        prefill_tokens=r.choice([64, 128, 192]),
        prefix_cache=r.random() < 0.6,
        aligned=r.random() < 0.3,
        limit=r.choice([None, None, None, 3]),
        pages=r.choice([4, 5, 7, 10, 16]),
    )

    def add():
        ids = m.prompt(r.choice([1, 2, 60, 63, 64, 65, 128]), r.randint(0, 2))
        priority = r.choice([0, 0, 0, -1, 2])
        for _ in range(r.choice([1, 1, 2, 3])):
            m.take(generate(ids, r.choice([1, 5, 64, 65, 130, 200]), request_id=m.id(), priority=priority))

    def add_score():
        length = r.choice([2, 64, 150])
        m.add_score(length, r.randint(0, 2), Drawn(r, length))

    def steps():
        for _ in range(r.choice([1, 5, 30, 80])):
            m.step()
            check()

    def check():
        m.every_page_has_holders()
        m.every_slot_has_one_holder()

    def lose_or_find_memory():
        m.cache.memory = not m.cache.memory

    def pick():
        return r.randint(0, 10**6)

    actions = {
        add: 35,
        steps: 26,
        add_score: 3,
        lambda: m.add_save(r.choice([1, 64, 100, 200]), r.randint(0, 2)): 7,
        lambda: m.go_on_from_a_saved_state(r.choice([1, 60, 100]), pick(), r.randint(1, 2)): 8,
        lambda: m.abort(pick()): 5,
        lambda: m.pause(pick()): 5,
        lambda: m.resume(pick()): 5,
        lambda: m.write_or_read_a_file(r.randint(0, 1)): 5,
        lose_or_find_memory: 2,
        lambda: m.crash(r.choice(["launch", "collect"])): 1,
    }
    try:
        for action in r.choices(list(actions), list(actions.values()), k=r.randint(5, 40)):
            action()
            check()
        m.teardown()
    finally:
        m.directory.cleanup()
    return m.scheduler.preemptions


@settings(max_examples=40, deadline=None, phases=[Phase.generate])
@given(st.integers(0, 2**32))
def test_requests_for_which_there_are_too_few_pages(seed):
    crowd(seed)


def test_such_requests_are_preempted_and_go_on():
    assert sum(map(crowd, range(1000, 1020))) > 10


def test_the_youngest_gives_way_and_goes_on_first():
    pool = StatePool(HYBRID, 3, pages=5)
    scheduler = Scheduler(StateCache(pool), 128)
    engine = Engine(scheduler, FakeRunner(pool, 128))
    for i in range(2):
        engine.handle(generate([i + 1] * 64, 70, request_id=f"r{i}"))
    engine.handle(generate([9] * 250, 2, request_id="large"))
    ended = []
    for _ in range(200):
        output = engine.step()
        if output is None:
            break
        ended += [token.request_id for token in output.tokens if token.finish_reason is not None]
        if output.occupancy.preempted and output.occupancy.running:
            # Both have seen 128 tokens; a third page is there for one of them.
            assert output.occupancy.running == 1 and output.occupancy.used_pages == 3
    assert ended == ["r0", "r1", "large"] and scheduler.preemptions == 1


def test_a_leaked_slot_is_noticed_when_nothing_runs():
    pool = StatePool(SPEC, 3)
    engine = Engine(Scheduler(StateCache(pool), 64), FakeRunner(pool, 64))
    pool.allocate()
    with pytest.raises(IntegrityError, match="1 state slots and 0 pages are in use and no request runs"):
        run(engine, {0: [generate([1], 2)]})


def test_a_request_that_no_pool_of_pages_could_hold_fails_alone():
    pool = StatePool(HYBRID, 2, pages=2)
    engine = Engine(Scheduler(StateCache(pool), 64), FakeRunner(pool, 64))
    outputs = run(engine, {0: [generate([1] * 100, 30, request_id="long"), generate([1] * 100, 29)]})
    (failed,) = (failed for output in outputs for failed in output.failed)
    assert failed.request_id == "long" and "129 tokens" in failed.error
    assert sum(len(output.tokens) for output in outputs) == 29
