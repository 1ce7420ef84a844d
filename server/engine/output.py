"""What a step brings, and how it leaves the engine's process: to each front end what it asked for, to the supervisor
what the step was."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import zmq

from server.wire.messages import (
    Abort,
    Answers,
    Failed,
    FrontEndGone,
    Generate,
    Input,
    Occupancy,
    Phase,
    Received,
    SaveState,
    Score,
    Scored,
    StateSaved,
    Step,
    Token,
    encoder,
)


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """All that one step of the engine brought. The fields of the step itself are those of `Step`."""

    tokens: list[Token]
    scored: list[Scored]
    saved: list[StateSaved] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    phase: Phase
    step_s: float
    batch_size: int
    occupancy: Occupancy
    cache_queries: int = 0
    cache_hits: int = 0
    preemptions: int = 0
    made_at: float = field(default_factory=time.monotonic)

    @property
    def step(self) -> Step:
        """What the supervisor is told of it."""
        return Step(
            made_at=self.made_at,
            phase=self.phase,
            step_s=self.step_s,
            batch_size=self.batch_size,
            occupancy=self.occupancy,
            cache_queries=self.cache_queries,
            cache_hits=self.cache_hits,
            preemptions=self.preemptions,
        )


class FrontEnds:
    """The front ends that have sent requests: which request is whose, and the way of the answers back.

    Args:
        socket: a ROUTER socket, which knows each front end by the identity of its own socket. What is sent to one that
            is gone is dropped, and none is ever waited for.
    """

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket
        self._owners: dict[str, bytes] = {}
        """Identity of the front end by request id, until the request's last answer."""
        self._gone: set[bytes] = set()
        """Those that have ended. What they had sent before may come after that is told, by another way."""

    def received(self, front_end: bytes, message: Received) -> Iterator[Input]:
        """What the engine is to take in for a message of a front end, or of the supervisor."""
        match message:
            case FrontEndGone():
                gone = message.front_end.encode()
                self._gone.add(gone)
                for request_id in [r for r, owner in self._owners.items() if owner == gone]:
                    del self._owners[request_id]
                    yield Abort(request_id=request_id)
                return
            case _ if front_end in self._gone:
                return
            case Generate() | Score() | SaveState():
                self._owners[message.request_id] = front_end
            case Abort():
                self._owners.pop(message.request_id, None)
        yield message

    def answer(self, output: StepOutput) -> None:
        """Send each front end what the step brought for it, as one message, in which each answer is encoded once."""
        answers: dict[bytes, Answers] = {}

        def of(request_id: str, *, last: bool) -> Answers | None:
            owner = self._owners.pop(request_id, None) if last else self._owners.get(request_id)
            if owner is None:  # it was aborted meanwhile
                return None
            return answers.get(owner) or answers.setdefault(owner, Answers(made_at=output.made_at))

        for token in output.tokens:
            if (mine := of(token.request_id, last=token.finish_reason is not None)) is not None:
                mine.tokens.append(token)
        for scored in output.scored:
            if (mine := of(scored.request_id, last=True)) is not None:
                mine.scored.append(scored)
        for saved in output.saved:
            if (mine := of(saved.request_id, last=True)) is not None:
                mine.saved.append(saved)
        for failed in output.failed:
            if (mine := of(failed.request_id, last=True)) is not None:
                mine.failed.append(failed)
        for front_end, mine in answers.items():
            self._socket.send_multipart([front_end, encoder.encode(mine)])
