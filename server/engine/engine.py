"""The step loop: schedule, launch, collect."""

import time
from collections import deque
from dataclasses import dataclass

from server.engine.messages import (
    Abort,
    FinishReason,
    Generate,
    Input,
    Occupancy,
    Score,
    Scored,
    StepOutput,
    Token,
)
from server.engine.request import Request
from server.engine.runner import BROKEN, PendingStep, Runner
from server.engine.scheduler import Scheduler


@dataclass(frozen=True)
class _Launched:
    step: PendingStep
    at: float


class Engine:
    """Takes requests, gives tokens.

    `depth` is how many steps may be launched ahead of the one being collected: 0 runs one after the other, 1 overlaps
    the host's work with the device's.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, depth: int = 0) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._depth = depth
        self._launched: deque[_Launched] = deque()
        self._collected_at = 0.0

    @property
    def idle(self) -> bool:
        """Nothing to run and nothing to collect."""
        return not (self._scheduler.running or self._scheduler.waiting or self._launched)

    @property
    def occupancy(self) -> Occupancy:
        """Who is in here now."""
        return Occupancy(
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            used_slots=self._scheduler.used_slots,
        )

    def handle(self, message: Input) -> None:
        """Take in one message."""
        match message:
            case Generate() | Score():
                self._scheduler.add(Request(message, arrived=time.monotonic()))
            case Abort():
                self._scheduler.abort(message.request_id)

    def step(self) -> StepOutput | None:
        """Launch the next step if there is one, collect the oldest if it is due. None when nothing was collected."""
        batch = self._scheduler.next_batch()
        if batch is not None:
            now = time.monotonic()
            for request in batch.requests:
                request.started = request.started or now
            self._launched.append(_Launched(self._runner.launch(batch), now))
        if not self._launched or (batch is not None and len(self._launched) <= self._depth):
            return None
        return self._collect(self._launched.popleft())

    def _collect(self, launched: _Launched) -> StepOutput:
        result = launched.step.collect()
        now = time.monotonic()
        tokens = [
            t for request, token in result.tokens if (t := self._accept(request, token, now)) is not None
        ]
        for rows in result.scores:
            rows.request.logprobs += rows.logprobs.tolist()
            rows.request.kl += rows.kl.tolist()
            rows.request.agree += rows.agree.tolist()
        step_s = now - max(launched.at, self._collected_at)  # a step launched ahead waits for the one before
        self._collected_at = now
        batch = launched.step.batch
        scored = [
            self._scored(chunk.request)
            for chunk in batch.prefills
            if isinstance(chunk.request.message, Score)
            and chunk.is_last
            and chunk.request.finish_reason is None
        ]
        for request in batch.requests:
            self._scheduler.collected(request)
        return StepOutput(
            tokens=tokens,
            scored=scored,
            phase="mixed" if batch.decodes and batch.prefills else "decode" if batch.decodes else "prefill",
            step_s=step_s,
            batch_size=len(batch.requests),
            occupancy=self.occupancy,
        )

    def _accept(self, request: Request, token: int, now: float) -> Token | None:
        """A sampled token of a request, or None when it has ended meanwhile (aborted, or stopped a step ago)."""
        if request.finish_reason is not None or not isinstance(request.message, Generate):
            return None
        request.accepted += 1
        reason: FinishReason | None = None
        if token == BROKEN:
            reason = "error"
        elif token in request.message.stop_token_ids:
            reason = "stop"
        elif request.accepted == request.message.max_tokens:
            reason = "length"
        timings: tuple[float | None, float | None] = (None, None)
        if request.accepted == 1 and request.started is not None:
            timings = (request.started - request.arrived, now - request.started)
        if reason is not None:
            self._scheduler.finish(request, reason)
        return Token(request.id, token, reason, *timings)

    def _scored(self, request: Request) -> Scored:
        self._scheduler.finish(request, "stop")
        return Scored(request_id=request.id, logprobs=request.logprobs, kl=request.kl, agree=request.agree)
