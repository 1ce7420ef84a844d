"""What front ends and the hub tell each other. A front end answers HTTP requests; the hub is what all front ends of a
server share: its engines, limits, figures and what may change while it runs. This module imports no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import msgspec

from server.wire.messages import Ready

Source = Literal["compare", "shadow"]
"""What measured a pair of variants."""

ShadowOutcome = Literal["scored", "dropped", "failed"]
"""What becomes of shadow traffic: figures, nothing for want of room, or an error."""


class TakeRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Count a request against its client's limits.

    The answer is 0, or the seconds to wait if it is one too many and not counted.
    """

    client: str


class Admit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Take places in a variant's queue, which this front end calls by `place` from then on.

    The answer is a `Refusal`, or None if the places are taken.
    """

    place: int
    variant: str
    count: int


class RenderMetrics(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer is all metrics of the server in Prometheus' text format, as bytes."""


class Summarise(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer is the A/B figures of the last `window_s` seconds (`server.hub.window`)."""

    window_s: float
    points: int = 0
    """In how many equal parts of the window the figures are wanted, too; 0: none."""


class BeginScoring(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Wait for the turn to take up `compare_bytes` of shared memory, which ends with `EndScoring`. The answer, None,
    comes once it is this front end's."""


class NextOrder(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer is how many comparisons ran one variant after the other, this one among them: their order
    alternates."""


class BeginShadow(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer is whether a request may be repeated on `variants` as shadow traffic now; if so, until `EndShadow`."""

    variants: list[str]


class Waiting(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer is whether requests wait in the queue of an engine of `variants`."""

    variants: list[str]


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Whether the hub does anything. The answer is None."""


Question = (
    Ping | TakeRequest | Admit | RenderMetrics | Summarise | BeginScoring | NextOrder | BeginShadow | Waiting
)
"""What a front end asks the hub, and waits for the answer to."""


class Refusal(msgspec.Struct, frozen=True):
    """Why there are no places in a variant's queue."""

    reason: Literal["queue_full", "draining", "engine_down", "too_many"]
    message: str


class LeavePlace(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine is done with one of the requests for which `place` was taken. Its tokens may still be on their way to
    the client."""

    place: int


class EndAnswer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer for which `place` was taken has ended; or was never begun, if the places were refused."""

    place: int


class Charge(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Count tokens that were run against a client's limits."""

    client: str
    tokens: int


class EndedRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One request of a variant's traffic that has ended. What it did not get to is None."""

    variant: str
    completion_tokens: int
    decode_s: float | None
    """Seconds from the first token to the last, as the engine made them."""
    ttft_s: float | None
    gaps_s: list[float]
    failed: bool


class Pair(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How a variant differed from a baseline on one prompt. What a source can't tell is None."""

    variant: str
    baseline: str
    source: Source
    tokens: int
    """A hash of the prompt's tokens and the baseline's completion. What two pairs of the same tokens say of quality is
    one piece of evidence; their timings are two."""
    kl: float
    """Mean KL(baseline || variant) over the tokens of the baseline's completion, in nats."""
    top1_agreement: float
    prompt_nll_difference: float | None
    """The variant's value less the baseline's: mean negative log-likelihood of the prompt's tokens, in nats. Not of
    the completion's: those are the baseline's own choice, which any other model finds less likely."""
    speed_ratio: float | None = None
    """The variant's tokens per second divided by the baseline's."""
    ttft_difference_s: float | None = None
    """The variant's time to the first token less the baseline's, in seconds."""


class Shadowed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What came of a request of a baseline that a rule drew, to be repeated on a variant as shadow traffic."""

    variant: str
    baseline: str
    outcome: ShadowOutcome


class EndScoring(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The front end whose turn it was takes up no shared memory any more."""


class EndShadow(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The shadow traffic that was let begin is over."""


class Family(msgspec.Struct, frozen=True):
    """One metric with all its samples, as Prometheus' client library collects it."""

    name: str
    documentation: str
    type: str
    samples: list[tuple[str, dict[str, str], float]]
    """Name, labels and value of each."""


class Totals(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All that a front end has counted since it began."""

    families: list[Family]
    steps: dict[str, float] = {}
    """By variant: `made_at` of the last step of its engine that the front end has an answer of."""
    answers: int = 0
    """The `AskTotals` that it answers; 0 for none."""


News = LeavePlace | EndAnswer | Charge | EndedRequest | Pair | Shadowed | EndScoring | EndShadow | Totals
"""What a front end tells the hub, and goes on."""


class EngineUp(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An engine has loaded, and takes requests at `address`."""

    variant: str
    ready: Ready
    address: str


class EngineDown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An engine is gone."""

    variant: str


class Reload(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The settings have been read again. What may change while the server runs is taken over from them."""

    settings: str
    """All settings, as `server.handover.to_json` writes them."""


class Leaving(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The server has been asked to stop."""


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Nothing more is to be answered: end."""


class AskTotals(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Tell `Totals` now, with this number."""

    number: int


Update = EngineUp | EngineDown | Reload | Leaving | Stop | AskTotals
"""What the hub tells each front end."""


class HubSilentError(Exception):
    """The hub does not answer."""


class FrontEndStart(msgspec.Struct, frozen=True, kw_only=True):
    """What a front end's process is told at its start, as a line of JSON on its standard input. The input is held open
    for as long as the hub lives."""

    name: str
    hub_address: str
    started: int
    runtime_dir: str
    listening: list[int]
    """File descriptors of the sockets to listen on."""
    settings: str
    """`server.handover.to_json`."""

    def line(self) -> bytes:
        """The line that says it."""
        return msgspec.json.encode(self) + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Self:
        """What a line says."""
        return msgspec.json.decode(line, type=cls)


class Link(Protocol):
    """A front end's way to the hub."""

    front_end: str
    """What the hub and all engines know this front end by."""
    started: int
    """When the server was started, in seconds since 1970."""
    runtime_dir: Path
    """The server's private directory, in memory where the system has a place for that."""

    def listen(self, receive: Callable[[Update], None]) -> None:
        """Have `receive` called with all updates, beginning with those that lead to what is so now."""

    async def ask(self, question: Question) -> Any:
        """The hub's answer. A question whose asker is cancelled is forgotten. Raises HubSilentError."""

    def tell(self, news: News) -> None:
        """Tell the hub something."""
