"""Requests that share too few pages: who gives way and who goes on, and what if the host has no memory either."""

import time

import pytest
import torch
from engine_machine import HYBRID
from engines import generate, run
from fake_runner import FakeRunner

from modeling.state import StatePool
from server.engine.cache import StateCache
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.wire.messages import Pause, Resume, SaveState


def engine_of(slots, pages, depth=0, prefill_tokens=512):
    pool = StatePool(HYBRID, slots, pages=pages)
    runner = FakeRunner(pool, prefill_tokens)
    return Engine(Scheduler(StateCache(pool), prefill_tokens), runner, depth), runner


def step(engine, times, ended, failed=None):
    """Step so often; the requests that ended meanwhile, in order, go to `ended`, failures to `failed`."""
    for _ in range(times):
        while (output := engine.step()) is None and engine.blocked and engine.in_threads:
            time.sleep(0.001)
        if output is not None:
            ended += [token.request_id for token in output.tokens if token.finish_reason is not None]
            ended += [saved.request_id for saved in output.saved]
            assert failed is not None or not output.failed
            if failed is not None:
                failed += output.failed


def no_memory(*_):
    raise MemoryError("none left")


@pytest.mark.parametrize("depth", [0, 1])
def test_one_request_fails_where_the_host_has_no_memory_for_it(depth, monkeypatch):
    """Its pages serve the others at once, also while a step that uses them is under way."""
    monkeypatch.setattr(StatePool, "to_host", no_memory)
    engine, _ = engine_of(3, 6, depth)
    for name in "abc":
        engine.handle(generate([ord(name)] * 64, 120, request_id=name))
    ended, failed = [], []
    step(engine, 200, ended, failed)
    assert [(f.request_id, f.reason) for f in failed] == [("c", "memory")] and "none left" in failed[0].error
    assert ended == ["a", "b"] and engine.idle


def test_a_state_that_can_not_come_back_fails_alone(monkeypatch):
    monkeypatch.setattr(StatePool, "load", no_memory)
    engine, _ = engine_of(3, 6)
    for name in "abc":
        engine.handle(generate([ord(name)] * 64, 120, request_id=name))
    ended, failed = [], []
    step(engine, 200, ended, failed)
    assert [f.request_id for f in failed] == ["c"] and "none left" in failed[0].error
    assert ended == ["a", "b"] and engine.idle


def test_a_state_is_not_kept_in_memory_that_the_host_does_not_have(monkeypatch):
    """The system would end the process, and all requests with it."""
    free = []
    monkeypatch.setattr("server.engine.cache.host_memory", lambda: free.pop(0) if free else 10**12)
    for memory, expected in ((10**12, []), (100, ["c"])):
        free[:] = [memory]
        engine, _ = engine_of(3, 6)
        for name in "abc":
            engine.handle(generate([ord(name)] * 64, 120, request_id=name))
        ended, failed = [], []
        step(engine, 400, ended, failed)
        assert [f.request_id for f in failed] == expected
        assert engine.idle and not free


def test_pinned_memory_is_taken_in_powers_of_two(monkeypatch):
    pool = StatePool(HYBRID, 2, pages=2)
    cache = StateCache(pool)
    allocation = cache.allocate(tokens=70)
    enough = HYBRID.state_bytes(70, pool.types)
    monkeypatch.setattr("server.engine.cache.host_memory", lambda: 2 * enough - 1)
    pool.device = torch.device("cuda")
    with pytest.raises(MemoryError, match=f"{2 * enough:,} bytes are needed"):
        cache.swap_out(allocation, 70)
    pool.device = torch.device("cpu")
    assert cache.swap_out(allocation, 70).tokens == 70


def behind(engine, ended):
    """An engine with 6 pages, 3 of which "running" has or will have; "behind" has been preempted for it, and its reader
    takes nothing."""
    engine.handle(generate([1] * 60, 100, request_id="running"))
    engine.handle(generate([2] * 190, 100, request_id="behind"))
    step(engine, 5, ended)
    engine.handle(Pause(request_id="behind"))
    step(engine, 67, ended)
    assert engine.occupancy.preempted == engine.occupancy.running == 1 and not ended


def test_who_can_not_go_on_takes_no_place_in_line():
    engine, _ = engine_of(2, 6)
    ended = []
    behind(engine, ended)
    engine.handle(generate([3] * 10, 2, request_id="short"))
    step(engine, 2, ended)
    assert ended == ["short"], "there was a slot and a page for it"
    engine.handle(Resume(request_id="behind"))
    step(engine, 200, ended)
    assert ended == ["short", "running", "behind"] and engine.idle


def test_who_can_not_go_on_keeps_no_saved_state_from_its_turn(tmp_path):
    engine, runner = engine_of(2, 6)
    ended, path = [], str(tmp_path / "state")
    runner.base[path] = [7] * 64
    engine.handle(SaveState(request_id="save", token_ids=[7] * 64, path=path, fingerprint={}))
    step(engine, 2, ended)
    assert ended == ["save"]
    ended.clear()
    behind(engine, ended)
    engine.handle(generate([3], 2, request_id="saved", state_path=path, state_tokens=64))
    step(engine, 40, ended)
    assert ended == ["saved", "running"]
    engine.handle(Resume(request_id="behind"))
    step(engine, 200, ended)
    assert ended == ["saved", "running", "behind"] and engine.idle


def test_a_prompt_goes_on_though_nobody_reads_what_comes_of_it():
    """Others with the same prompt wait for its state, and their readers keep up."""
    engine, _ = engine_of(3, 7, prefill_tokens=64)
    ended = []
    engine.handle(generate([1] * 64, 100, request_id="first"))
    step(engine, 62, ended)
    for name in ("leader", "twin"):
        engine.handle(generate([2] * 300, 2, request_id=name))
    engine.handle(Pause(request_id="leader"))
    step(engine, 60, ended)
    assert ended == ["first", "twin"]
    engine.handle(Resume(request_id="leader"))
    step(engine, 5, ended)
    assert ended[2:] == ["leader"] and engine.idle


def test_a_request_that_is_too_long_is_told_how_long_it_may_be():
    engine, _ = engine_of(2, 2)
    outputs = run(engine, {0: [generate([1] * 100, 30, request_id="long")]})
    (failed,) = (failed for output in outputs for failed in output.failed)
    assert "129 tokens" in failed.error and "at most 128" in failed.error


def test_those_whose_reader_is_behind_give_way_first():
    """They make no use of their pages, and a slow reader may take hours."""
    engine, _ = engine_of(2, 4)
    ended = []
    engine.handle(generate([1] * 60, 130, request_id="slow"))
    engine.handle(generate([2] * 60, 130, request_id="fast"))
    step(engine, 5, ended)
    engine.handle(Pause(request_id="slow"))
    step(engine, 130, ended)
    assert ended == ["fast"]
    engine.handle(Resume(request_id="slow"))
    step(engine, 130, ended)
    assert ended == ["fast", "slow"] and engine.idle
