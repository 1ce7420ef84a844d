"""Saved states in the engine: going on from one is going on from its prompt, and nobody waits for a file but those who
asked for it."""

import os
import threading

import msgspec
import pytest
import torch
from checkpoints import GATED
from engines import Bench, generate, prompt, run, sampling, tokens_of

from modeling.state import StatePool
from server.engine import cache
from server.engine.state_file import host_tensors, load_state, save_state
from server.wire.messages import Abort, SaveState


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("m") / "c", GATED)


def save_message(ids, path):
    return SaveState(request_id="save", token_ids=ids, path=str(path), fingerprint={"a": "b"})


def save(engine, ids, path):
    message = save_message(ids, path)
    (answer,) = (s for o in run(engine, {0: [message]}) for s in o.saved)
    return answer


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_going_on_from_a_saved_state_is_going_on_from_its_prompt(bench, tmp_path, depth, prefix_cache):
    options = dict(prefill_tokens=64, depth=depth, prefix_cache=prefix_cache)
    before, after = prompt(150), prompt(75, seed=1)
    answer = save(bench.engine(**options), before, tmp_path / "state")
    assert (answer.request_id, answer.error) == ("save", None)
    engine = bench.engine(**options)
    run(engine, {0: [generate(after, 2)]})  # the cache must not take the rest for a whole prompt
    goes_on = [
        generate(after, 8, state_path=str(tmp_path / "state"), sampling=sampling(7, choice=i)) for i in (0, 1)
    ]
    fresh = generate(after, 8)
    tokens = tokens_of(run(engine, {0: [*goes_on, fresh]}))
    for i, m in enumerate(goes_on):
        whole = generate([*before, *after], 8, sampling=sampling(7, choice=i))
        assert bench.check_tokens(whole, tokens[m.request_id])
    bench.check_tokens(fresh, tokens[fresh.request_id])
    assert engine.occupancy.used_slots == 0


def test_errors_end_their_request_only(bench, tmp_path):
    engine = bench.engine(slots=1)
    lost = generate(prompt(5), 4, state_path=str(tmp_path / "none"))
    fine = generate(prompt(6), 4)
    outputs = run(engine, {0: [lost, fine]})
    tokens = {t.request_id: t for o in outputs for t in o.tokens}
    (failed,) = (f for o in outputs for f in o.failed)
    assert (failed.request_id, failed.reason) == (lost.request_id, "state")
    assert "can't be read" in failed.error and str(tmp_path) not in failed.error
    assert lost.request_id not in tokens
    assert tokens[fine.request_id].finish_reason == "length"
    # alone, it makes a step that runs nothing
    (output,) = run(engine, {0: [generate(prompt(5), 4, state_path=str(tmp_path / "none"))]})
    assert output.batch_size == 0 and not output.tokens and output.failed[0].reason == "state"
    answer = save(engine, prompt(5), tmp_path / "none" / "x")
    assert "can't be written" in answer.error
    assert engine.idle and engine.occupancy.used_slots == 0


class Disk:
    """Writes and reads files once they have been `let_go`, and notes what it did."""

    def __init__(self):
        self.done = []
        self._begun = {"write": threading.Semaphore(0), "read": threading.Semaphore(0)}
        self._may = {"write": threading.Event(), "read": threading.Event()}

    def let_go(self, *kinds):
        for kind in kinds or ("write", "read"):
            self._may[kind].set()

    def wait_until_begun(self, kind):
        """Once for each piece of work of that kind."""
        assert self._begun[kind].acquire(timeout=600), f"no {kind} began"

    def save_state(self, *arguments):
        self._hold("write")
        save_state(*arguments)

    def load_state(self, *arguments):
        self._hold("read")
        load_state(*arguments)

    def _hold(self, kind):
        self._begun[kind].release()
        assert self._may[kind].wait(600), "the disk held up those who were to let it go on"
        self.done.append(kind)


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr(cache, "save_state", disk.save_state)
    monkeypatch.setattr(cache, "load_state", disk.load_state)
    yield disk
    disk.let_go()


def steps_until_all_end(engine, messages):
    outputs, running = [], {m.request_id for m in messages}
    for message in messages:
        engine.handle(message)
    while running:
        output = engine.step()
        if output is not None:
            outputs.append(output)
            running -= {t.request_id for t in output.tokens if t.finish_reason}
    return outputs


@pytest.mark.parametrize("depth", [0, 1])
def test_nobody_waits_for_a_file(bench, tmp_path, disk, depth):
    engine = bench.engine(slots=2, depth=depth)
    ids, together, later = prompt(70), generate(prompt(5), 20), generate(prompt(6), 3)
    engine.handle(save_message(ids, tmp_path / "state"))
    outputs = steps_until_all_end(engine, [together])
    outputs += steps_until_all_end(engine, [later])  # in the other slot: the state's own is still held
    assert not any(output.saved for output in outputs) and not (tmp_path / "state").exists()
    while (output := engine.step()) is not None or not engine.blocked:
        assert output is None or not output.saved
    assert engine.occupancy.running == engine.occupancy.used_slots == 1
    disk.let_go()
    outputs += run(engine, {0: []})
    assert [(s.request_id, s.error) for o in outputs for s in o.saved] == [("save", None)]
    assert outputs[-1].occupancy.used_slots == 0
    tokens = tokens_of(outputs)
    for message in (together, later):
        bench.check_tokens(message, tokens[message.request_id])
    goes_on = generate(prompt(9), 5, state_path=str(tmp_path / "state"))
    tokens = tokens_of(run(engine, {0: [goes_on]}))
    bench.check_tokens(generate(ids + prompt(9), 5), tokens[goes_on.request_id])


def test_a_file_that_nobody_waits_for_any_more_is_removed(bench, tmp_path, disk):
    engine = bench.engine(slots=1)
    engine.handle(save_message(prompt(5), tmp_path / "state"))
    engine.step()
    disk.wait_until_begun("write")
    engine.handle(Abort(request_id="save"))
    assert engine.occupancy.used_slots == 1, "the slot is still being read"
    disk.let_go()
    outputs = run(engine, {0: [generate(prompt(5), 2)]})
    assert not any(output.saved for output in outputs)
    assert engine.idle and engine.occupancy.used_slots == 0 and os.listdir(tmp_path) == []


def steps_until_blocked(engine):
    """Step until there is nothing to do but to wait for a file."""
    while (output := engine.step()) is not None or not engine.blocked:
        assert output is None or not (output.tokens or output.failed)
    assert engine.in_threads and not engine.idle


@pytest.fixture
def state(bench, tmp_path):
    """(tokens, file of the state after them)."""
    ids = prompt(70)
    pool = StatePool(bench.model.spec, 1)
    slot = torch.tensor([pool.allocate()])
    with torch.inference_mode():
        pool.scatter(slot, bench.model(torch.tensor(ids), [0, len(ids)])[1])
    save_state(host_tensors(pool, int(slot), 0), tmp_path / "state", {})
    return ids, str(tmp_path / "state")


@pytest.mark.parametrize("depth", [0, 1])
def test_nobody_waits_for_a_state_that_is_being_read(bench, state, disk, depth):
    engine = bench.engine(slots=2, depth=depth)
    ids, path = state
    goes_on, together, later = (
        generate(prompt(9), 5, state_path=path),
        generate(prompt(5), 20),
        generate([7], 3),
    )
    engine.handle(goes_on)
    outputs = steps_until_all_end(engine, [together])
    outputs += steps_until_all_end(engine, [later])  # in the other slot: one is kept for the state
    steps_until_blocked(engine)
    assert goes_on.request_id not in tokens_of(outputs) and disk.done == []
    assert engine.occupancy.running == engine.occupancy.used_slots == 1
    disk.let_go()
    outputs += run(engine, {0: []})
    tokens = tokens_of(outputs)
    for message in (together, later):
        bench.check_tokens(message, tokens[message.request_id])
    bench.check_tokens(generate(ids + prompt(9), 5), tokens[goes_on.request_id])
    assert engine.occupancy.used_slots == 0


def test_a_request_that_leaves_while_its_state_is_read_frees_its_slot_after_that(bench, state, disk):
    engine = bench.engine(slots=1)
    engine.handle(generate(prompt(9), 5, request_id="gone", state_path=state[1]))
    steps_until_blocked(engine)
    disk.wait_until_begun("read")
    engine.handle(Abort(request_id="gone"))
    assert engine.occupancy.used_slots == 1, "it is still being read for"
    disk.let_go()
    waiting = generate(prompt(5), 2)
    tokens = tokens_of(run(engine, {0: [waiting]}))
    assert tokens.keys() == {waiting.request_id} and disk.done == ["read"]
    bench.check_tokens(waiting, tokens[waiting.request_id])
    assert engine.idle and engine.occupancy.used_slots == 0


def test_choices_wait_for_the_one_that_reads_their_state(bench, state, disk):
    engine = bench.engine(slots=3)
    ids, path = state
    choices = [generate(prompt(9), 5, state_path=path, sampling=sampling(7, choice=i)) for i in range(3)]
    for message in choices:
        engine.handle(message)
    steps_until_blocked(engine)
    assert (engine.occupancy.running, engine.occupancy.waiting) == (1, 2)
    disk.let_go()
    tokens = tokens_of(run(engine, {0: []}))
    assert disk.done == ["read"]
    for i, message in enumerate(choices):
        whole = generate(ids + prompt(9), 5, sampling=sampling(7, choice=i))
        bench.check_tokens(whole, tokens[message.request_id])


def test_whoever_waits_for_one_that_leaves_reads_the_state_itself(bench, state, disk):
    engine = bench.engine(slots=3)
    ids, path = state
    first, second = (generate(prompt(9), 5, state_path=path) for _ in range(2))
    engine.handle(first)
    engine.handle(second)
    steps_until_blocked(engine)
    disk.wait_until_begun("read")
    engine.handle(Abort(request_id=first.request_id))
    steps_until_blocked(engine)
    assert engine.occupancy.used_slots == 2
    disk.let_go()
    tokens = tokens_of(run(engine, {0: []}))
    assert tokens.keys() == {second.request_id} and disk.done == ["read", "read"]
    bench.check_tokens(generate(ids + prompt(9), 5), tokens[second.request_id])
    assert engine.occupancy.used_slots == 0


def test_a_broken_file_fails_all_that_go_on_from_it_and_nobody_else(bench, tmp_path, disk):
    engine = bench.engine(slots=2)
    (tmp_path / "broken").write_bytes(b"no safetensors")
    lost = [generate(prompt(9), 5, state_path=str(tmp_path / "broken")) for _ in range(3)]
    for message in lost:
        engine.handle(message)
    steps_until_blocked(engine)
    disk.let_go()
    fine = generate(prompt(5), 3)
    outputs = run(engine, {0: [fine]})
    failed = {f.request_id: f for o in outputs for f in o.failed}
    assert failed.keys() == {message.request_id for message in lost}
    assert all(f.reason == "state" and "the saved state can't be read: " in f.error for f in failed.values())
    assert tokens_of(outputs).keys() == {fine.request_id}
    assert engine.idle and engine.occupancy.used_slots == 0


@pytest.mark.parametrize("depth", [0, 1])
def test_nobody_waits_for_the_files_of_others_to_be_written(bench, state, tmp_path, disk, depth):
    engine = bench.engine(slots=3, depth=depth)
    ids, path = state
    for i in range(2):
        save = save_message(prompt(5, seed=i), tmp_path / f"saved{i}")
        engine.handle(msgspec.structs.replace(save, request_id=f"save{i}"))
    steps_until_blocked(engine)
    disk.wait_until_begun("write")
    disk.let_go("read")
    goes_on = generate(prompt(9), 5, state_path=path)
    outputs = steps_until_all_end(engine, [goes_on])
    assert disk.done == ["read"] and not any(output.saved for output in outputs)
    bench.check_tokens(generate(ids + prompt(9), 5), tokens_of(outputs)[goes_on.request_id])
    disk.let_go("write")
    outputs = run(engine, {0: []})
    assert sorted(s.request_id for o in outputs for s in o.saved) == ["save0", "save1"]


@pytest.mark.parametrize("work", ["read", "write"])
def test_work_on_a_file_that_has_not_begun_is_dropped_when_its_request_leaves(
    bench, state, tmp_path, disk, work
):
    engine = bench.engine(slots=3)
    for i in range(3):
        if work == "read":
            engine.handle(generate(prompt(9 + i), 5, request_id=f"{i}", state_path=state[1]))
        else:
            save = save_message(prompt(9 + i), tmp_path / f"saved{i}")
            engine.handle(msgspec.structs.replace(save, request_id=f"{i}"))
    steps_until_blocked(engine)
    disk.wait_until_begun(work)
    assert engine.occupancy.used_slots == 3
    engine.handle(Abort(request_id="1"))
    assert engine.occupancy.used_slots == engine.occupancy.running == 2
    engine.handle(Abort(request_id="0"))
    assert engine.occupancy.used_slots == 2, "this one has begun"
    disk.let_go()
    outputs = run(engine, {0: []})
    assert disk.done == [work, work] and engine.occupancy.used_slots == 0
    ended = [t.request_id for o in outputs for t in o.tokens if t.finish_reason]
    assert ended + [s.request_id for o in outputs for s in o.saved] == ["2"]
    assert not (tmp_path / "saved0").exists() and not (tmp_path / "saved1").exists()


def test_states_are_read_while_the_prompts_before_them_are_still_being_fed(bench, state, disk):
    engine = bench.engine(slots=3, prefill_tokens=64)
    ids, path = state
    long, goes_on, last = generate(prompt(640), 1), generate(prompt(9), 5, state_path=path), generate([7], 1)
    for message in (long, goes_on, last):
        engine.handle(message)
    engine.step()
    disk.wait_until_begun("read")
    assert (engine.occupancy.used_slots, engine.occupancy.waiting) == (2, 1)
    disk.let_go()
    tokens = tokens_of(run(engine, {0: []}))
    bench.check_tokens(generate(ids + prompt(9), 5), tokens[goes_on.request_id])
    assert tokens.keys() == {long.request_id, goes_on.request_id, last.request_id}


def test_no_slot_is_given_to_one_that_reads_before_the_turn_of_those_who_came_earlier(bench, state, disk):
    engine = bench.engine(slots=2, prefill_tokens=64)
    for message in (generate(prompt(640), 1), generate(prompt(5), 1)):
        engine.handle(message)
    engine.handle(generate(prompt(9), 5, state_path=state[1]))
    engine.step()
    assert (engine.occupancy.running, engine.occupancy.waiting) == (1, 2) and not engine.in_threads
    disk.let_go()
    assert len(tokens_of(run(engine, {0: []}))) == 3


def test_a_host_without_memory_for_a_state_fails_its_request_only(bench, state, monkeypatch):
    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr(cache, "load_state", full)
    engine = bench.engine()
    lost, fine = generate(prompt(9), 5, state_path=state[1]), generate(prompt(5), 3)
    outputs = run(engine, {0: [lost, fine]})
    (failed,) = (f for o in outputs for f in o.failed)
    assert (failed.request_id, failed.reason) == (lost.request_id, "memory")
    assert tokens_of(outputs).keys() == {fine.request_id}
    assert engine.idle and engine.occupancy.used_slots == 0
