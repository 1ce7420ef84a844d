"""What runs in the next step: all running decodes first, then prompt chunks up to a cap, by priority and then first
come first served."""

import itertools
from bisect import insort
from collections.abc import Callable
from pathlib import Path

from modeling.spec import TOKEN_BLOCK
from server.engine.batch import Batch, PrefillChunk, Swap
from server.engine.cache import Allocation, StateCache
from server.engine.request import Request
from server.engine.twins import Twins
from server.wire.messages import Failed, FailureReason, FinishReason, Generate, Occupancy, SaveState, Score

MAX_PROMPTS = 512
"""Most prompts in one step. While a layer runs, a GPU holds copies of its states of all of them, a megabyte each and
more, for which the memory plan leaves room."""

SNAPSHOTS = 2
"""How many states are kept of the inside of one prompt, those after its last steps. The state after its end is kept
besides."""


def _order(request: Request) -> tuple[int, int]:
    return request.order


class Scheduler:
    """Queues of waiting and running requests over a StateCache.

    Args:
        cache: where the slots come from.
        prefill_tokens: most prompt tokens in one step, so that a long prompt does not hold up running streams.
        max_running: requests that hold a slot at the same time; None for as many as there are slots.
    """

    def __init__(self, cache: StateCache, prefill_tokens: int, max_running: int | None = None) -> None:
        if prefill_tokens < TOKEN_BLOCK or prefill_tokens % TOKEN_BLOCK:
            raise ValueError(f"prefill_tokens={prefill_tokens} must be a positive multiple of {TOKEN_BLOCK}")
        self._cache = cache
        self._prefill_tokens = prefill_tokens
        self._max_running = max_running
        self._places = itertools.count()
        self._requests: dict[str, Request] = {}
        self._waiting: list[Request] = []
        """Requests that have no slot, in order: new ones, and those that have been preempted, which have a state in the
        host's memory and go on from there."""
        self._prefilling: list[Request] = []
        """Requests that have a slot and a part of their prompt still to feed, in order; those that go on from a saved
        state only once it is in the slot."""
        self._twins = Twins()
        self._decoding: list[Request] = []
        """Requests that have at least one more token to decode, and a reader who keeps up."""
        self._paused: set[str] = set()
        """Ids of requests whose reader is behind: nothing is decoded for them."""
        self.cache_queries = 0
        """Prompt tokens so far that the prefix cache might have had: all but those whose logits are needed."""
        self.cache_hits = 0
        """Prompt tokens among them that it had."""
        self.preemptions = 0
        """How often a request was preempted so far."""
        self._swaps: list[Swap] = []
        """What the next batch tells of."""
        self.failed: list[Failed] = []
        """Requests that can't go on, and why; the engine reports them and clears the list."""

    @property
    def running(self) -> int:
        return len(self._requests) - len(self._waiting)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def occupancy(self) -> Occupancy:
        """Who is in the engine now."""
        return Occupancy(
            running=self.running,
            waiting=self.waiting,
            paused=len(self._paused),
            used_slots=self._cache.used,
            cached_slots=self._cache.cached,
            used_pages=self._cache.used_pages,
            cached_pages=self._cache.cached_pages,
            preempted=sum(r.swapped is not None for r in self._waiting) if self.preemptions else 0,
        )

    def pages_of(self, request: Request) -> int:
        """How many pages a request has, or had when it was preempted."""
        if request.swapped is not None:
            return request.swapped.pages
        return 0 if request.allocation is None else self._cache.pages_of(request.allocation)

    def add(self, request: Request) -> None:
        """Queue a request; one that could never be held is `failed`. Raises ValueError for an id that is already
        here."""
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r} is already in use")
        most = self._cache.longest
        if most is not None and request.longest > most:
            error = (
                f"its state of up to {request.longest} tokens is too long: this engine holds at most {most}"
            )
            self.refuse(request, "memory", error)
            return
        message = request.message
        priority = 0 if isinstance(message, SaveState) else message.priority
        request.order = (priority, next(self._places))
        if isinstance(message, Score):
            limit = message.from_position - 1
            request.prefix = self._cache.prefix(request.token_bytes, limit, message.cache_salt)
        elif request.state_path is None:
            limit = request.prompt_length - 1
            request.prefix = self._cache.prefix(request.token_bytes, limit, message.cache_salt)
            request.cut = 0 if request.prefix is None else self._cache.remember(request.prefix)
        self._requests[request.id] = request
        insort(self._waiting, request, key=_order)

    def refuse(self, request: Request, reason: FailureReason, error: str) -> None:
        """Say that a request which has not been queued can't be run."""
        self.failed.append(Failed(request_id=request.id, reason=reason, error=error))

    def abort(self, request_id: str) -> None:
        """Drop a request wherever it is; an id that is not here (it may just have finished) is no error."""
        self.failed[:] = [failed for failed in self.failed if failed.request_id != request_id]
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.allocation is None and request.swapped is None:
            self._waiting.remove(request)
            self._forget(request)
        else:
            self.finish(request, "abort")

    def pause(self, request_id: str, now: float) -> None:
        """Decode nothing more of a request until `resume`. An id that is not here is no error, as in `abort`."""
        request = self._requests.get(request_id)
        if request is not None and request_id not in self._paused:
            self._paused.add(request_id)
            request.paused_at = now
            if request in self._decoding:
                self._decoding.remove(request)

    def resume(self, request_id: str, now: float) -> None:
        """Go on with a paused request. An id that is not here is no error, as in `abort`."""
        if request_id in self._paused:
            self._paused.remove(request_id)
            request = self._requests[request_id]
            # Tokens of steps that had been launched still came after the pause: until then it was not idle.
            request.paused_s += now - max(request.paused_at, request.accepted_at)
            if request.decodable and request.allocation is not None:
                self._decoding.append(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """No more steps for this request; its slot is freed once no work in flight uses it."""
        if request.finish_reason is None:
            request.finish_reason = reason
            for queue in (self._prefilling, self._decoding):
                if request in queue:
                    queue.remove(request)
            self._twins.fed(request)
            if request.swapped is not None:
                request.swapped = request.sampler_row = None
                self._waiting.remove(request)
                self._forget(request)
        self._release_if_idle(request)

    def fail(self, request: Request, reason: FailureReason, error: str) -> None:
        """This request can't go on, and its state is of no use any more. One that has ended meanwhile has been told
        of."""
        if request.finish_reason is None:
            self.refuse(request, reason, error)
            self.finish(request, "error")

    def start_loads(self) -> list[tuple[Request, Callable[[], None]]]:
        """Give slots to the waiting requests that go on from a saved state, as far as their turn has come and nobody
        else is feeding their prompt.

        Returns:
            These requests, each with the function that reads its state into its slot (`StateCache.load`); that is work
            in flight. Once it is done, `loaded` lets the prompt be fed.
        """
        loads: list[tuple[Request, Callable[[], None]]] = []
        pages = self._cache.available_pages
        for request in self._next_in_line():
            pages -= self._cache.pages_for(request.to_start)
            if pages < 0:
                break  # whoever goes first is not to lack them
            if (
                request.state_path is None
                or request.swapped is not None
                or self._twins.wait_for_another(request)
            ):
                continue
            allocation = self._admit(request)
            if allocation is not None:
                request.in_flight += 1
                load = self._cache.load(allocation, request.state_path, request.state_tokens)
                loads.append((request, load))
        return loads

    def loaded(self, request: Request) -> None:
        """The saved state of a request is in its slot: its prompt can be fed, unless it has ended meanwhile."""
        if request.finish_reason is None:
            insort(self._prefilling, request, key=_order)

    def next_batch(self) -> Batch | None:
        """Plan a step and count it as launched. None when there is nothing to run."""
        self._have_pages()
        self._go_on()
        decodes = list(self._decoding)
        prefills = self._plan_prefills()
        if not decodes and not prefills:
            return None
        batch = Batch(decodes, prefills, self._swaps)
        self._swaps = []
        for request in decodes:
            request.sampled += 1
            if request.sampled == request.max_tokens:
                self._decoding.remove(request)
        for chunk in prefills:
            chunk.request.prefilled = chunk.end
            if chunk.is_last:
                self._prefilling.remove(chunk.request)
                for sampling in (chunk.request, *chunk.forks):
                    sampling.sampled += isinstance(sampling.message, Generate)
                    if sampling.decodable and sampling.id not in self._paused:
                        self._decoding.append(sampling)
        for request in batch.requests:
            request.in_flight += 1
        return batch

    def launched(self, batch: Batch) -> None:
        """The step is on its way: keep the states that it leaves for prompts that begin alike."""
        for chunk in batch.prefills:
            request = chunk.request
            if request.finish_reason is not None or request.prefix is None or request.allocation is None:
                continue
            if isinstance(request.message, Score):
                continue
            if chunk.is_last:
                self._cache.snapshot(request.prefix, chunk.end, request.allocation)
            elif not request.cut or chunk.end == request.cut:
                entry = self._cache.snapshot(request.prefix, chunk.end, request.allocation)
                request.snapshots += [] if entry is None else [entry]
                if len(request.snapshots) > SNAPSHOTS:
                    self._cache.drop(request.snapshots.pop(0))

    def save(self, request: Request, message: SaveState) -> Callable[[], None]:
        """The function that writes the state of a request whose prompt has been fed (`StateCache.save`); that is work
        in flight. To be asked for before the request's last step is `work_done`. Raises MemoryError."""
        if request.allocation is None:
            raise RuntimeError(f"request {request.id} has no state to save")
        write = self._cache.save(request.allocation, request.held, Path(message.path), message.fingerprint)
        request.in_flight += 1
        return write

    def work_done(self, request: Request) -> None:
        """A piece of work in flight no longer uses the request's slot: a launched step has been collected, or the
        reading or writing of a file has ended or was cancelled."""
        request.in_flight -= 1
        self._release_if_idle(request)

    def _have_pages(self) -> None:
        """Have a page for the next token of every request that decodes. Where there are not enough, requests whose
        reader is behind are preempted, which make no use of theirs, and then those that come last for those that come
        first."""
        if not self._cache.pages_for(1):
            return
        for request in sorted(
            (r for r in self._decoding if self._cache.pages_for(r.held + 1) > self.pages_of(r)), key=_order
        ):
            # It may have been preempted itself: by one before it, or as the last one of all.
            while request in self._decoding and not self._grow(request):
                paused = (self._requests[request_id] for request_id in self._paused)
                behind = [r for r in paused if r.decodable and r.allocation is not None]
                self._preempt(max(behind or self._decoding + self._prefilling, key=_order))

    def _grow(self, request: Request) -> bool:
        assert request.allocation is not None
        return self._cache.grow(request.allocation, request.held + 1)

    def _preempt(self, request: Request) -> None:
        """Take slot and pages from a request that no file is read or written for. It waits to go on."""
        assert request.allocation is not None
        slot = request.slot
        for queue in (self._prefilling, self._decoding):
            if request in queue:
                queue.remove(request)
        try:
            request.swapped = self._cache.swap_out(request.allocation, request.held)
        except MemoryError as e:
            # Freed at once, also while a launched step uses it (that step goes first on the device): else all others
            # would be preempted, and fail, for a page that is free after the step.
            self._cache.free(request.allocation)
            request.allocation = None
            self._fail_preempted(request, e)
            self._forget(request)
            return
        request.allocation = None
        self._swaps.append(Swap(request, slot, out=True))
        self.preemptions += 1
        insort(self._waiting, request, key=_order)

    def _go_on(self) -> None:
        """Let preempted requests go on where they were, as far as their turn has come."""
        if not self._waiting or self._waiting[0].swapped is None:
            return
        for request in list(self._waiting):
            if request.swapped is None:
                return
            if self._reader_is_behind(request):
                continue
            if self._room <= 0:
                return
            try:
                allocation = self._cache.swap_in(request.swapped, request.cached, request.to_start)
            except MemoryError as e:
                self._fail_preempted(request, e)
                continue
            if allocation is None:
                return
            self._waiting.remove(request)
            request.allocation, request.swapped = allocation, None
            self._swaps.append(Swap(request, request.slot, out=False))
            if request.prefill_done:
                self._decoding.append(request)
            else:
                insort(self._prefilling, request, key=_order)

    def _fail_preempted(self, request: Request, e: MemoryError) -> None:
        error = f"no memory is left for the state of a preempted request: {e}"
        self.fail(request, "memory", error)

    def _reader_is_behind(self, request: Request) -> bool:
        """Whether a preempted request would decode nothing if it went on."""
        return request.swapped is not None and request.prefill_done and request.id in self._paused

    def _next_in_line(self) -> list[Request]:
        """The waiting requests that can get a slot now: the first ones that have use for it."""
        able = (request for request in self._waiting if not self._reader_is_behind(request))
        return list(itertools.islice(able, max(self._room, 0)))

    def _plan_prefills(self) -> list[PrefillChunk]:
        chunks: list[PrefillChunk] = []
        budget = self._prefill_tokens
        # Those that go on from a saved state get their slot in `start_loads`.
        lacking = False
        for request in sorted(self._prefilling + self._next_in_line(), key=_order):
            if not budget or len(chunks) == MAX_PROMPTS:
                break
            if request.prefill_done and request.allocation is not None:  # a fork of one before it
                continue
            if request.allocation is None:
                if lacking or self._twins.wait_for_another(request):
                    continue
                if request.swapped is not None or request.state_path is not None or not self._admit(request):
                    # Those after it are not to take the pages that it waits for, bit by bit.
                    lacking = self._cache.pages_for(request.to_start) > 0
                    continue
                insort(self._prefilling, request, key=_order)
            end = request.chunk_end(budget)
            if end == request.prefilled:
                break
            chunk = PrefillChunk(request, request.prefilled, end)
            chunks.append(chunk)
            budget -= end - request.prefilled
            if chunk.is_last and self._twins.fed(request):
                self._fork(chunk)
        return chunks

    @property
    def _room(self) -> int:
        """How many more requests may start now."""
        slots = self._cache.available
        return slots if self._max_running is None else min(slots, self._max_running - self.running)

    def _admit(self, request: Request) -> Allocation | None:
        """Give a waiting request a slot, with as much of its prompt as is cached. None when there is no slot."""
        allocation = self._cache.allocate(request.prefix, request.to_start) if self._room > 0 else None
        if allocation is None:
            return None
        self._start(request, allocation)
        self._twins.feed(request)
        if request.prefix is not None:
            self.cache_queries += request.prefix.limit
            self.cache_hits += allocation.cached
        if request.cut <= allocation.cached:
            request.cut = 0
        return allocation

    def _start(self, request: Request, allocation: Allocation) -> None:
        self._waiting.remove(request)
        request.allocation = allocation
        request.cached = request.prefilled = allocation.cached

    def _fork(self, chunk: PrefillChunk) -> None:
        """Let waiting requests with the same prompt go on from the state that this chunk makes."""
        assert chunk.request.allocation is not None
        key = chunk.request.twin_key
        seen = chunk.request.state_tokens + chunk.end
        pages = 0  # those that are left for requests which came before
        for request in self._next_in_line():
            allocation = None
            if request.twin_key == key and request.swapped is None:
                tokens = request.to_start
                allocation = self._cache.fork(chunk.request.allocation, seen, chunk.end, tokens, pages)
            if allocation is None:
                pages += self._cache.pages_for(request.to_start)
            else:
                self._start(request, allocation)
                chunk.forks.append(request)

    def _release_if_idle(self, request: Request) -> None:
        if request.finish_reason is None or request.in_flight:
            return
        if request.allocation is not None:
            self._cache.free(request.allocation)
            request.allocation = None
            self._forget(request)

    def _forget(self, request: Request) -> None:
        del self._requests[request.id]
        self._paused.discard(request.id)
