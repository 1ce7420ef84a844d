"""A request inside the engine."""

from dataclasses import dataclass, field

from server.engine.cache import Allocation
from server.engine.messages import FinishReason, Generate, Score


@dataclass(eq=False)
class Request:
    """Progress of one Generate or Score.

    Counters move when a step is launched, not when its results are read, so that the next step can be planned while
    one is still running.
    """

    message: Generate | Score
    arrived: float
    """time.monotonic() at which the engine took it in."""
    allocation: Allocation | None = None
    prefilled: int = 0
    """Tokens of the prompt that launched steps have fed."""
    sampled: int = 0
    """Tokens that launched steps have sampled."""
    accepted: int = 0
    """Sampled tokens that collected steps have brought."""
    steps_in_flight: int = 0
    """Launched and not yet collected. The slot is freed only at 0."""
    finish_reason: FinishReason | None = None
    started: float | None = None
    """time.monotonic() at the first launch."""
    logprobs: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.message.request_id

    @property
    def prompt_length(self) -> int:
        return len(self.message.token_ids)

    @property
    def prefill_done(self) -> bool:
        return self.prefilled == self.prompt_length

    @property
    def wants_decode(self) -> bool:
        """There is a token to feed and at least one more to sample."""
        return (
            isinstance(self.message, Generate)
            and self.prefill_done
            and self.finish_reason is None
            and self.sampled < self.message.max_tokens
        )

    @property
    def slot(self) -> int:
        if self.allocation is None:
            raise RuntimeError(f"request {self.id} has no allocation")
        return self.allocation.slot
