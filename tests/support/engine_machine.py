"""An engine without a model, whose requests come, go, step and crash in any order: each gets its tokens in order and
ends exactly once, no slot and no page is lost, and no state is mixed up with another, however often requests are
preempted."""

import itertools
import tempfile
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path

from checkpoints import DELTA
from engines import generate, score
from fake_runner import CrashError, FakeRunner, fed
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from modeling.families import family_of
from modeling.spec import AttentionSpec
from modeling.state import StatePool
from server.engine.cache import StateCache
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.state_file import StateLoadError
from server.engine.thread_work import ThreadWork
from server.wire.messages import Abort, Generate, Pause, Resume, SaveState

SPEC = family_of(DELTA).spec({**DELTA, "num_hidden_layers": 1, "hidden_size": 8, "expand_v": 1.0})
ATTENTION = AttentionSpec(1, 1, 2, rope=None, qk_norm="none", gated=False, norm_eps=1e-6)
HYBRID = replace(SPEC, layers=(*SPEC.layers, replace(SPEC.layers[0], mixer=ATTENTION)))

LENGTHS = st.sampled_from([1, 2, 63, 64, 65, 128, 200, 400])
PRIORITIES = st.sampled_from([0, 0, 0, -1, 2])


class OnDemand(Executor):
    """Does its work when it is told to, in this thread."""

    def __init__(self):
        self.work = []

    def submit(self, work):
        future = Future()
        self.work.append((future, work))
        return future

    def run_one(self):
        future, work = self.work.pop(0)
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except StateLoadError as e:
            future.set_exception(e)


class WatchedScheduler(Scheduler):
    """Keeps its last step's batch, and how many more requests might have started when it was planned."""

    def next_batch(self):
        self.batch = super().next_batch()
        self.room_left = self._room
        return self.batch


class WatchedCache(StateCache):
    """The host has memory for preempted requests for as long as `memory` says so."""

    memory = True

    def swap_out(self, allocation, tokens):
        if not self.memory:
            raise MemoryError
        return super().swap_out(allocation, tokens)


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        slots=st.integers(1, 5),
        depth=st.integers(0, 1),
        prefill_tokens=st.sampled_from([64, 128, 192]),
        prefix_cache=st.booleans(),
        aligned=st.booleans(),
        limit=st.sampled_from([None, None, 1, 3]),
    )
    def start(self, slots, depth, prefill_tokens, prefix_cache, aligned, limit):
        self.begin(slots, depth, prefill_tokens, prefix_cache, aligned, limit)

    def begin(self, slots, depth, prefill_tokens, prefix_cache, aligned, limit, pages=0):
        self.directory = tempfile.TemporaryDirectory()
        self.options = slots, depth, prefill_tokens, prefix_cache, aligned, limit
        self.pages = pages
        self.ids = itertools.count()
        self.added, self.aborted, self.lost = {}, set(), set()
        self.tokens, self.ended = {}, {}
        self.saved = {}
        self.make_engine()

    def make_engine(self):
        slots, self.depth, prefill_tokens, prefix_cache, aligned, limit = self.options
        self.pool = StatePool(HYBRID if self.pages else SPEC, slots, pages=self.pages, max_tokens=10_000)
        self.cache = WatchedCache(self.pool, prefix_cache=prefix_cache, aligned=aligned)
        self.scheduler = WatchedScheduler(self.cache, prefill_tokens, limit)
        self.runner = FakeRunner(self.pool, prefill_tokens)
        self.runner.base = self.saved
        self.engine = Engine(self.scheduler, self.runner, self.depth)
        self.disks = [OnDemand(), OnDemand()]
        self.engine._reads = ThreadWork(self.disks[0], StateLoadError)
        self.engine._writes = ThreadWork(self.disks[1], OSError)
        self.slots = slots

    def prompt(self, length, family):
        """Few families: prompts often begin alike, and are often the same."""
        return ([1] * 64 + [family] * length)[-length:] if family % 2 else [family] * length

    def take(self, message):
        self.added[message.request_id] = message
        self.engine.handle(message)

    def id(self):
        return f"r{next(self.ids):04}"

    @rule(
        length=LENGTHS,
        family=st.integers(0, 2),
        max_tokens=st.integers(1, 6),
        priority=PRIORITIES,
        n=st.sampled_from([1, 1, 1, 3]),
    )
    def add_generate(self, length, family, max_tokens, priority, n):
        for _ in range(n):
            self.take(
                generate(self.prompt(length, family), max_tokens, request_id=self.id(), priority=priority)
            )

    @rule(length=st.sampled_from([1, 70]), stop=st.integers(0, 4))
    def add_stopping(self, length, stop):
        # Tokens are their own index, so that this one stops after `stop` tokens.
        self.take(generate([1] * length, 6, request_id=self.id(), stop_token_ids=[stop]))

    @rule(length=st.sampled_from([2, 64, 150]), family=st.integers(0, 2), data=st.data())
    def add_score(self, length, family, data):
        first = data.draw(st.integers(1, length))
        self.take(score(self.prompt(length, family), first, request_id=self.id()))

    @rule(length=LENGTHS, family=st.integers(0, 2))
    def add_save(self, length, family):
        request_id = self.id()
        path = str(Path(self.directory.name) / request_id)
        ids = self.prompt(length, family)
        self.take(SaveState(request_id=request_id, token_ids=ids, path=path, fingerprint={"of": "test"}))

    @rule(length=st.sampled_from([1, 100]), pick=st.integers(0, 10**6), n=st.integers(1, 2))
    def go_on_from_a_saved_state(self, length, pick, n):
        paths = [*sorted(self.saved), str(Path(self.directory.name) / "none")]
        for _ in range(n):
            path = paths[pick % len(paths)]
            seen = len(self.saved.get(path, ()))
            self.take(
                generate([1] * length, 3, request_id=self.id(), state_path=path, state_tokens=seen),
            )

    @rule(pick=st.integers(0, 10**6))
    def abort(self, pick):
        if self.added:
            request_id = sorted(self.added)[pick % len(self.added)]
            if request_id not in self.ended:
                self.aborted.add(request_id)
            self.engine.handle(Abort(request_id=request_id))

    @rule(pick=st.integers(0, 10**6))
    def pause(self, pick):
        if self.added:
            self.engine.handle(Pause(request_id=sorted(self.added)[pick % len(self.added)]))

    @rule(pick=st.integers(0, 10**6))
    def resume(self, pick):
        if self.added:
            self.engine.handle(Resume(request_id=sorted(self.added)[pick % len(self.added)]))

    def resume_all(self):
        for request_id in self.added:
            self.engine.handle(Resume(request_id=request_id))

    @rule(pick=st.integers(0, 1))
    def write_or_read_a_file(self, pick):
        if self.disks[pick].work:
            self.disks[pick].run_one()

    def write_or_read_all_that_began(self):
        for disk in self.disks:
            while disk.work:
                disk.run_one()

    @rule(where=st.sampled_from(["launch", "collect"]))
    def crash(self, where):
        """The process dies of it, its requests end with an error in the client, and another is started."""
        if self.engine.idle:
            return
        self.resume_all()
        self.runner.fail = where
        for _ in range(50):
            try:
                output = self.engine.step()
            except CrashError:
                break
            if output is not None:
                self.check(output)  # a step that only refused, or told of a file
            if self.engine.blocked and self.engine.in_threads:
                self.write_or_read_all_that_began()
            if self.engine.idle:
                break
        else:
            raise AssertionError("the failure was swallowed")
        for request_id in set(self.added) - set(self.ended) - self.aborted:
            self.ended[request_id] = "error"
        self.lost |= self.aborted  # by the engine: files of theirs stay
        self.make_engine()

    @rule()
    def step(self):
        ready = list(self.scheduler._decoding)
        assert not {request.id for request in ready} & self.scheduler._paused
        waiting = list(self.scheduler._waiting)
        output = self.engine.step()
        batch = self.scheduler.batch
        if batch is not None:
            if not self.pages:
                assert batch.decodes == ready, "a decode was left out of a step"
            self.check_order(waiting, [chunk.request for chunk in batch.prefills])
        self.check_slots(waiting)
        assert len(self.runner.launched) <= self.depth
        if output is not None:
            self.check(output)

    def check_order(self, waiting, fed):
        """No prompt was begun before that of a request which goes first, unless that one waits for its twin."""
        for request in set(fed) & set(waiting):
            for other in waiting:
                if other.order < request.order and not self.admitted(other):
                    assert self.has_twin(other), "a later prompt went first"

    def check_slots(self, waiting):
        """Who has got a slot has left one for everybody who goes first: they may wait for the step's prompt tokens
        meanwhile, or for a twin, but not for its end."""
        for request in (r for r in waiting if self.admitted(r) and r.swapped is None):
            before = [r for r in waiting if r.order < request.order and not self.admitted(r)]
            assert len(before) <= self.scheduler.room_left, "a later request has taken a slot"

    def admitted(self, request):
        if request.swapped is not None:
            return request.id in self.scheduler._paused  # it is not to go on before its reader does
        return request.started is not None or request.allocation is not None

    def has_twin(self, request):
        """Its prompt is being fed, or has just been: it was to be served by that, but there was no slot."""
        twins = (r for r in self.scheduler._requests.values() if r.twin_key == request.twin_key)
        return request.twin_key is not None and any(r.allocation for r in twins)

    def check(self, output):
        for token in output.tokens:
            assert token.request_id not in self.ended and token.request_id not in self.aborted
            tokens = self.tokens.setdefault(token.request_id, [])
            assert token.token_id == len(tokens)
            tokens.append(token.token_id)
            if token.finish_reason is not None:
                self.ended[token.request_id] = token.finish_reason
        for failure in output.failed:
            assert failure.request_id not in self.ended and failure.request_id not in self.aborted
            message = self.added[failure.request_id]
            if failure.reason == "memory":
                too_long = self.longest(message) > self.pages * 64
                assert self.pages and (too_long or "preempted" in failure.error)
            else:
                assert failure.reason == "state" and "can't be read" in failure.error
                assert message.state_path.endswith("none")
            self.ended[failure.request_id] = "error"
        for answer in (*output.scored, *output.saved):
            assert answer.request_id not in self.ended and answer.request_id not in self.aborted
            self.ended[answer.request_id] = "stop"
        for answer in output.saved:
            assert answer.error is None
            message = self.added[answer.request_id]
            assert Path(message.path).exists()
            self.saved[message.path] = message.token_ids
        occupancy = output.occupancy
        assert occupancy.used_slots == occupancy.running
        assert occupancy.used_slots + occupancy.cached_slots <= self.slots
        assert occupancy.used_pages + occupancy.cached_pages <= self.pages
        assert 0 <= output.cache_hits <= output.cache_queries

    def longest(self, message):
        generated = message.max_tokens - 1 if isinstance(message, Generate) else 0
        seen = message.state_tokens if isinstance(message, Generate) else 0
        return seen + len(message.token_ids) + generated

    @invariant()
    def every_page_has_holders(self):
        """Pages are free, or those of slots; full ones may be those of several, the last ones are one slot's own."""
        if not hasattr(self, "scheduler") or not self.pages:
            return
        pages = self.pool.pages
        running = [r for r in self.scheduler._requests.values() if r.allocation is not None]
        entries = list(self.cache._index._entries)
        own = [set(pages.of(r.slot)) for r in running]
        used = set().union(*own)
        kept = set().union(*(pages.of(entry.slot) for entry in entries))
        assert pages.used == len(used) and pages.cached == len(kept - used)
        assert sorted([*pages._free, *(used | kept)]) == list(range(self.pages))
        for slot in range(self.slots + 1):
            table = pages.blocks[slot].tolist()
            assert table == [*pages.of(slot), *[pages.null_page] * (len(table) - len(pages.of(slot)))]
        for request in running:
            full = request.held // 64  # what it may still write to
            others = [pages.of(r.slot) for r in running if r is not request]
            others += [pages.of(entry.slot) for entry in entries]
            assert not set(pages.of(request.slot)[full:]).intersection(*[set().union(*others)])
        assert all(r.allocation is None for r in self.scheduler._waiting)

    @invariant()
    def every_slot_has_one_holder(self):
        if not hasattr(self, "scheduler"):
            return
        held = [r.slot for r in self.scheduler._requests.values() if r.allocation is not None]
        held += self.cache._index.slots
        assert len(set(held)) == len(held) == self.pool.used_slots == self.slots - self.pool.free_slots
        assert self.cache.used == self.scheduler.running
        limit = self.options[5]
        assert limit is None or self.scheduler.running <= limit
        for entry in self.cache._index._entries:
            ids = memoryview(entry.token_bytes).cast("I").tolist()
            assert self.runner.read(entry.slot) == fed((0, 0), ids), "a prefix's state has been written over"
            assert not self.options[4] or entry.length % 64 == 0
        assert self.engine.idle == (
            not self.scheduler._requests and not self.runner.launched and not self.scheduler.failed
        )

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.resume_all()
        for _ in range(30_000):
            if self.engine.idle:
                break
            self.step()
            if self.engine.blocked and self.engine.in_threads:
                self.write_or_read_all_that_began()
        assert self.engine.idle and self.engine.occupancy.paused == 0
        assert self.scheduler.occupancy.used_slots == 0 and not self.scheduler._requests
        assert not self.scheduler._twins and not self.scheduler._prefilling and not self.scheduler._decoding
        assert set(self.ended) | self.aborted == set(self.added)
        assert not set(self.ended) & self.aborted
        for request_id, reason in self.ended.items():
            message = self.added[request_id]
            if isinstance(message, Generate) and reason != "error":
                stop = message.stop_token_ids[0] if message.stop_token_ids else 10**6
                assert len(self.tokens[request_id]) == min(message.max_tokens, stop + 1)
                assert reason == ("stop" if stop < message.max_tokens else "length")
        written = {str(path) for path in Path(self.directory.name).iterdir()}
        aborted = [self.added[request_id] for request_id in self.aborted - self.lost]
        assert not written & {message.path for message in aborted if isinstance(message, SaveState)}
        self.directory.cleanup()
