"""What the scheduler has run: one step's work."""

from dataclasses import dataclass, field

from server.engine.request import Request


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens `start` to `end` of a request's prompt."""

    request: Request
    start: int
    end: int
    forks: list[Request] = field(default_factory=list)
    """Waiting requests with the same prompt, which go on from copies of the state after this chunk, its last."""

    @property
    def is_last(self) -> bool:
        return self.end == self.request.prompt_length


@dataclass(frozen=True)
class Swap:
    """A request that is preempted, or goes on. Its state has been copied already; where its sampling is has not."""

    request: Request
    slot: int
    """The slot that it had, or has now."""
    out: bool


@dataclass(frozen=True)
class Batch:
    """One step's work."""

    decodes: list[Request]
    prefills: list[PrefillChunk]
    swaps: list[Swap] = field(default_factory=list)
    """Requests that were preempted or that go on since the last step, in the order in which that happened."""

    @property
    def requests(self) -> list[Request]:
        requests = list(self.decodes)
        for chunk in self.prefills:
            requests += (chunk.request, *chunk.forks)
        return requests
