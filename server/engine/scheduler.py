"""What runs in the next step: all running decodes first, then prompt chunks up to a token budget, first come first
served."""

from collections import deque
from dataclasses import dataclass

from server.engine.cache import StateCache
from server.engine.messages import FinishReason
from server.engine.request import Request

PREFILL_ALIGN = 64
"""A prompt is cut at multiples of the chunk that the prefill kernels work in."""


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens `start` to `end` of a request's prompt."""

    request: Request
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == self.request.prompt_length


@dataclass(frozen=True)
class Batch:
    """One step's work."""

    decodes: list[Request]
    prefills: list[PrefillChunk]

    @property
    def requests(self) -> list[Request]:
        return [*self.decodes, *(chunk.request for chunk in self.prefills)]


class Scheduler:
    """Queues of waiting and running requests over a StateCache."""

    def __init__(self, cache: StateCache, prefill_tokens: int) -> None:
        if prefill_tokens < PREFILL_ALIGN or prefill_tokens % PREFILL_ALIGN:
            raise ValueError(
                f"prefill_tokens={prefill_tokens} must be a positive multiple of {PREFILL_ALIGN}"
            )
        self._cache = cache
        self._prefill_tokens = prefill_tokens
        self._requests: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def used_slots(self) -> int:
        return self._cache.used

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError for an id that is already here."""
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r} is already in use")
        self._requests[request.id] = request
        self._waiting.append(request)

    def abort(self, request_id: str) -> None:
        """Drop a request wherever it is; an id that is not here (it may just have finished) is no error."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.allocation is None:
            self._waiting.remove(request)
            del self._requests[request_id]
        else:
            self.finish(request, "abort")

    def finish(self, request: Request, reason: FinishReason) -> None:
        """No more steps for this request; its slot is freed once no launched step uses it."""
        if request.finish_reason is None:
            request.finish_reason = reason
        self._release_if_idle(request)

    def next_batch(self) -> Batch | None:
        """Plan a step and count it as launched. None when there is nothing to run."""
        decodes = [request for request in self._running if request.wants_decode]
        prefills: list[PrefillChunk] = []
        budget = self._prefill_tokens
        for request in self._running:
            if not request.prefill_done and request.finish_reason is None and budget:
                budget = self._plan_prefill(request, prefills, budget)
        while self._waiting and budget:
            allocation = self._cache.allocate()
            if allocation is None:
                break
            request = self._waiting.popleft()
            request.allocation = allocation
            self._running.append(request)
            budget = self._plan_prefill(request, prefills, budget)
        if not decodes and not prefills:
            return None
        batch = Batch(decodes, prefills)
        for request in decodes:
            request.sampled += 1
        for chunk in prefills:
            chunk.request.prefilled = chunk.end
            chunk.request.sampled += chunk.is_last
        for request in batch.requests:
            request.steps_in_flight += 1
        return batch

    def collected(self, request: Request) -> None:
        """A launched step of this request has been collected."""
        request.steps_in_flight -= 1
        self._release_if_idle(request)

    def _plan_prefill(self, request: Request, prefills: list[PrefillChunk], budget: int) -> int:
        """Append the request's next chunk; returns the budget that is left."""
        remaining = request.prompt_length - request.prefilled
        take = remaining if remaining <= budget else budget // PREFILL_ALIGN * PREFILL_ALIGN
        if take == 0:
            return 0
        prefills.append(PrefillChunk(request, request.prefilled, request.prefilled + take))
        return budget - take

    def _release_if_idle(self, request: Request) -> None:
        if request.finish_reason is None or request.steps_in_flight or request.allocation is None:
            return
        self._cache.free(request.allocation)
        request.allocation = None
        self._running.remove(request)
        del self._requests[request.id]
