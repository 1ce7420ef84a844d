"""A request inside the engine."""

from array import array
from dataclasses import dataclass, field
from pathlib import Path

from modeling.spec import TOKEN_BLOCK
from modeling.state import PAGE_TOKENS
from server.engine.cache import Allocation, SwappedState
from server.engine.constraint import Constraint
from server.engine.prefix_cache import CachedPrefix, Prefix
from server.engine.sampler_row import SamplerRow
from server.wire.messages import FinishReason, Generate, PackedTop, SaveState, Score

TwinKey = tuple[bytes, bytes, str | None]
"""What two requests must have in common for one prefill to serve both: salt, prompt, and the path of the saved state
that they go on from."""


@dataclass(eq=False)
class Request:
    """Progress of one Generate, Score or SaveState.

    Counters move when a step is launched, not when its results are read, so that the next step can be planned while
    one is still running.
    """

    message: Generate | Score | SaveState
    arrived: float
    """time.monotonic() at which the engine took it in."""
    order: tuple[int, int] = (0, 0)
    """(priority, place in the queue): the smaller goes first."""
    allocation: Allocation | None = None
    swapped: SwappedState | None = None
    """Its state while it is preempted: it waits to go on where it was."""
    constraint: Constraint | None = None
    """Where it is in the grammar that it is held to, after the tokens that collected steps have brought; None for a
    request without one."""
    sampler_row: SamplerRow | None = None
    """Where its sampling was when it was preempted."""
    prefix: Prefix | None = None
    """The prompt as the prefix cache knows it; None where the cache can't serve it."""
    cut: int = 0
    """Where the prompt leaves one that was seen before: prefill stops there for a snapshot."""
    snapshots: list[CachedPrefix] = field(default_factory=list)
    """The cached prefixes that were made of states within the prompt, the oldest first."""
    cached: int = 0
    """Tokens of the prompt whose state came from the prefix cache or from a sibling."""
    prefilled: int = 0
    """Tokens of the prompt that launched steps have fed, or that were cached."""
    sampled: int = 0
    """Tokens that launched steps have sampled."""
    accepted: int = 0
    """Sampled tokens that collected steps have brought."""
    accepted_at: float = 0.0
    """time.monotonic() at which the last of them was collected."""
    paused_at: float = 0.0
    """time.monotonic() of the last pause."""
    paused_s: float = 0.0
    """Seconds for which it was paused and no token of it was being made, up to when it was last resumed."""
    in_flight: int = 0
    """How many pieces of work use its slot now: steps that have been launched and not collected yet, and a file that
    its state is being read from or written to. The slot is freed only at 0."""
    finish_reason: FinishReason | None = None
    started: float | None = None
    """time.monotonic() at the first launch."""
    logprobs: list[float] = field(default_factory=list)
    top: list[PackedTop] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.message.token_ids)
        self.state_tokens = self.message.state_tokens if isinstance(self.message, Generate) else 0
        """How many tokens the saved state that it goes on from has seen."""
        self.token_bytes = array("I", self.message.token_ids).tobytes()
        self.max_tokens = self.message.max_tokens if isinstance(self.message, Generate) else 0
        self.stop_token_ids: frozenset[int] = frozenset(
            self.message.stop_token_ids if isinstance(self.message, Generate) else ()
        )

    @property
    def id(self) -> str:
        return self.message.request_id

    @property
    def twin_key(self) -> TwinKey | None:
        """Equal for requests that one prefill can serve (the choices of one prompt); never for different salts, whose
        owners could tell by the time and by `cached`."""
        m = self.message
        return (m.cache_salt, self.token_bytes, m.state_path) if isinstance(m, Generate) else None

    @property
    def state_path(self) -> Path | None:
        """The file of the saved state that it goes on from; None for one that begins with an empty state."""
        path = self.message.state_path if isinstance(self.message, Generate) else None
        return None if path is None else Path(path)

    @property
    def prefill_done(self) -> bool:
        return self.prefilled == self.prompt_length

    def chunk_end(self, budget: int) -> int:
        """Where its prompt's next chunk, of at most `budget` tokens, ends: where the prompt does, at its cut, or at a
        multiple of TOKEN_BLOCK. Where it begins, if that is too far."""
        start, end = self.prefilled, self.prompt_length
        if start < self.cut < end:
            end = self.cut
        if end - start > budget:
            end = (start + budget) // TOKEN_BLOCK * TOKEN_BLOCK
        return max(start, end)

    @property
    def decodable(self) -> bool:
        """Whether a decode step can sample its next token."""
        return self.finish_reason is None and self.prefill_done and 0 < self.sampled < self.max_tokens

    @property
    def held(self) -> int:
        """How many tokens its state has seen after all launched steps. The last token that was sampled is not among
        them: the next step feeds it."""
        return self.state_tokens + self.prefilled + max(self.sampled - 1, 0)

    @property
    def longest(self) -> int:
        """How many tokens its state sees at most."""
        return self.state_tokens + self.prompt_length + max(self.max_tokens - 1, 0)

    @property
    def to_start(self) -> int:
        """How many tokens it must have pages for when it gets its slot: those of its prompt, or, if it was preempted,
        those that it has seen, and a page more, unless it can't use it."""
        seen = self.held if self.swapped is not None else 0
        tokens = max(seen, self.state_tokens + self.prompt_length)
        return min(tokens + PAGE_TOKENS, self.longest)

    @property
    def slot(self) -> int:
        if self.allocation is None:
            raise RuntimeError(f"request {self.id} has no allocation")
        return self.allocation.slot
