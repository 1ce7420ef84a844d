"""The step loop: schedule, launch, collect.

A step has two parts, the model's forward and the sampling. Both are launched at once, ahead of the collect of the step
before, unless a request of the batch is held to a grammar: which token it may have depends on the one before. Then the
forward alone is launched ahead. While it runs on the device, the step before is collected and the masks are made.
"""

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
from torch import Tensor

from server.engine.batch import Batch
from server.engine.grammars import Grammars
from server.engine.output import StepOutput
from server.engine.request import Request
from server.engine.runner import BROKEN, NewToken, PendingStep, Runner
from server.engine.scheduler import Scheduler
from server.engine.state_file import StateLoadError
from server.engine.thread_work import ThreadWork
from server.text.grammar import GrammarError, compiler
from server.wire.messages import (
    Abort,
    FinishReason,
    Generate,
    Input,
    Occupancy,
    Pause,
    Resume,
    SaveState,
    Score,
    Scored,
    StateSaved,
    Token,
    pack_top,
)


class IntegrityError(RuntimeError):
    """The bookkeeping of slots has slipped. Only a fresh process is sure to be right again."""


@dataclass(frozen=True)
class _Launched:
    step: PendingStep
    at: float


class Engine:
    """Takes requests and gives tokens.

    Args:
        depth: how many steps may be launched ahead of the one being collected: 0 runs one after the other, 1 overlaps
            the host's work with the device's.
        grammars: compiles the grammars of requests; None where no request has one.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, depth: int = 0, grammars: Grammars | None = None
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._depth = depth
        self._grammars = grammars
        self._launched: deque[_Launched] = deque()
        # A thread each: whoever goes on from a saved state does not wait until those of others are on the disk.
        self._reads: ThreadWork[StateLoadError | MemoryError] = ThreadWork(
            ThreadPoolExecutor(1, "reads"), StateLoadError, MemoryError
        )
        self._writes = ThreadWork(ThreadPoolExecutor(1, "writes"), OSError)
        self._compiles = ThreadWork(compiler(), GrammarError)
        self._compiling: dict[str, Request] = {}
        """Requests whose grammars are being compiled, by id. The scheduler does not know them yet."""
        self._collected_at = 0.0
        self._blocked = False
        self._reported = 0, 0, 0
        """The scheduler's counts (queries of the prefix cache, its hits, preemptions) that outputs have reported
        already."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to run, nothing to collect and nothing to tell."""
        s = self._scheduler
        return not (s.running or s.waiting or self._launched or s.failed or self._compiling)

    @property
    def blocked(self) -> bool:
        """Whether the last step found nothing to do until work in a thread has ended, or a message comes."""
        return self._blocked

    @property
    def in_threads(self) -> bool:
        """Whether a file is being written or read, or a grammar compiled."""
        return bool(self._reads or self._writes or self._compiles)

    @property
    def occupancy(self) -> Occupancy:
        """Who is in the engine now."""
        occupancy = self._scheduler.occupancy
        if not self._compiling:
            return occupancy
        return msgspec.structs.replace(occupancy, waiting=occupancy.waiting + len(self._compiling))

    def handle(self, message: Input) -> None:
        """Take in one message."""
        now = time.monotonic()
        match message:
            case Abort():
                self._scheduler.abort(message.request_id)
                for request in (
                    self._reads.cancel(message.request_id),
                    self._writes.cancel(message.request_id),
                ):
                    if request is not None:
                        self._scheduler.work_done(request)
                if self._compiling.pop(message.request_id, None) is not None:
                    self._compiles.cancel(message.request_id)
            case Pause():
                self._scheduler.pause(message.request_id, now)
            case Resume():
                self._scheduler.resume(message.request_id, now)
            case Generate() if message.grammar:
                self._compile(Request(message, arrived=now))
            case _:
                self._scheduler.add(Request(message, arrived=now))

    def _compile(self, request: Request) -> None:
        """Have a request's grammar compiled; then it gets its place in the queue."""
        if self._grammars is None:
            raise ValueError(f"request {request.id!r} has a grammar, and this engine can't compile any")
        if request.id in self._compiling:
            raise ValueError(f"request id {request.id!r} is already in use")
        self._compiling[request.id] = request
        self._compiles.begin(request, partial(self._grammars.constrain, request))

    def _compiled(self, request: Request, failure: GrammarError | None) -> None:
        """A request's grammar has been compiled, or can't be. One that was aborted meanwhile is not here any more."""
        if self._compiling.get(request.id) is not request:
            return
        del self._compiling[request.id]
        if failure is None:
            self._scheduler.add(request)
        else:
            self._scheduler.refuse(request, "grammar", str(failure))

    def step(self) -> StepOutput | None:
        """Launch the next step if there is one, collect the oldest if it is due. None when there is nothing to tell.

        Raises:
            IntegrityError: nothing is running, and yet slots are in use.
        """
        for request, refused in self._compiles.ended():
            self._compiled(request, refused)
        for request, failure in self._reads.ended():
            self._loaded(request, failure)
        for request, read in self._scheduler.start_loads():
            self._reads.begin(request, read)
        output: StepOutput | None = None
        batch = self._scheduler.next_batch()
        if batch is not None:
            now = time.monotonic()
            for chunk in batch.prefills:
                for request in (chunk.request, *chunk.forks):
                    request.started = request.started or now
            forward = self._runner.launch(batch)
            masks: Tensor | None = None
            if constrained := forward.constrained:
                if self._launched:
                    output = self._collect(self._launched.popleft())
                masks = self._masks(constrained)
            pending = self._runner.sample(forward, masks)
            self._launched.append(_Launched(pending, now))
            for request in pending.failed:
                error = f"the device has no memory left for this request (a prompt of {request.prompt_length} tokens)"
                self._scheduler.fail(request, "memory", error)
            self._scheduler.launched(batch)
        if output is not None:
            pass  # the step before this one has been collected already
        elif self._launched and (batch is None or len(self._launched) > self._depth):
            output = self._collect(self._launched.popleft())
        elif self._scheduler.failed or self._writes.due:
            output = self._output([], [], Batch([], []), 0.0)
        self._blocked = batch is None and output is None and not self._launched
        if self.idle:
            self._check()
        return output

    def _check(self) -> None:
        """Slots and pages in use must be those of running requests and cached prefixes; of the former there are none
        now."""
        occupancy = self.occupancy
        if occupancy.used_slots or occupancy.used_pages:
            raise IntegrityError(
                f"{occupancy.used_slots} state slots and {occupancy.used_pages} pages are in use and no request runs "
                f"({occupancy.cached_slots} slots hold prefixes)"
            )

    def _masks(self, constrained: list[Request]) -> Tensor:
        """Which tokens these requests may have next, all steps before being collected."""
        assert self._grammars is not None
        masks, failed = self._grammars.masks(constrained)
        for request, error in failed.items():
            self._scheduler.fail(request, "grammar", error)
        return masks

    def _collect(self, launched: _Launched) -> StepOutput:
        result = launched.step.collect()
        now = time.monotonic()
        tokens = [t for new in result.tokens if (t := self._accept(new, now)) is not None]
        step_s = now - max(launched.at, self._collected_at)  # a step launched ahead waits for the one before
        self._collected_at = now
        batch = launched.step.batch
        done = [c.request for c in batch.prefills if c.is_last and c.request.finish_reason is None]
        scored = [self._scored(request) for request in done if isinstance(request.message, Score)]
        for request in done:
            if isinstance(request.message, SaveState):
                try:
                    self._writes.begin(request, self._scheduler.save(request, request.message))
                except MemoryError as e:
                    self._scheduler.fail(request, "memory", f"no memory is left to save the state: {e}")
        for request in batch.requests:
            self._scheduler.work_done(request)
        return self._output(tokens, scored, batch, step_s)

    def _output(self, tokens: list[Token], scored: list[Scored], batch: Batch, step_s: float) -> StepOutput:
        saved = [s for ended in self._writes.ended() if (s := self._saved(*ended)) is not None]
        failed = list(self._scheduler.failed)
        self._scheduler.failed.clear()
        scheduler = self._scheduler
        counts = scheduler.cache_queries, scheduler.cache_hits, scheduler.preemptions
        queries, hits, preemptions = (
            now - before for now, before in zip(counts, self._reported, strict=True)
        )
        self._reported = counts
        return StepOutput(
            tokens=tokens,
            scored=scored,
            saved=saved,
            failed=failed,
            phase="mixed" if batch.decodes and batch.prefills else "decode" if batch.decodes else "prefill",
            step_s=step_s,
            batch_size=len(batch.requests),
            occupancy=self.occupancy,
            cache_queries=queries,
            cache_hits=hits,
            preemptions=preemptions,
        )

    def _accept(self, new: NewToken, now: float) -> Token | None:
        """A sampled token of a request, or None when it has ended meanwhile (aborted, or stopped a step ago)."""
        request = new.request
        if request.finish_reason is not None:
            return None
        request.accepted += 1
        request.accepted_at = now
        at = now - request.paused_s
        reason: FinishReason | None = None
        if new.token == BROKEN:
            reason = "error"
        elif new.token in request.stop_token_ids:
            reason = "stop"
        elif request.constraint is not None and (error := request.constraint.advance(new.token)):
            self._scheduler.fail(request, "grammar", error)
            return None
        elif request.accepted == request.max_tokens:
            reason = "length"
        pages = 0
        if reason is not None:
            pages = self._scheduler.pages_of(request)
            self._scheduler.finish(request, reason)
        top = None if new.top is None else pack_top(new.top)
        if request.accepted > 1 or request.started is None:
            return Token(request.id, new.token, at, reason, logprob=new.logprob, top=top, pages=pages)
        return Token(
            request.id,
            new.token,
            at,
            reason,
            queue_s=request.started - request.arrived,
            prefill_s=now - request.started,
            cached_tokens=request.cached,
            logprob=new.logprob,
            top=top,
            pages=pages,
        )

    def _scored(self, request: Request) -> Scored:
        self._scheduler.finish(request, "stop")
        return Scored(
            request_id=request.id,
            logprobs=request.logprobs,
            kl=request.kl,
            agree=request.agree,
            top=request.top,
        )

    def _loaded(self, request: Request, failure: StateLoadError | MemoryError | None) -> None:
        """A saved state has been read into the request's slot, or can't be."""
        if failure is None:
            self._scheduler.loaded(request)
        elif isinstance(failure, StateLoadError):
            self._scheduler.fail(request, "state", str(failure))
        else:
            self._scheduler.fail(request, "memory", f"no memory is left to read the saved state: {failure}")
        self._scheduler.work_done(request)

    def _saved(self, request: Request, failure: OSError | None) -> StateSaved | None:
        """A file has been written, or can't be. None when it was aborted meanwhile: nobody will want the file."""
        aborted = request.finish_reason is not None
        error = None if failure is None else f"the state can't be written: {failure}"
        if aborted and error is None and isinstance(request.message, SaveState):
            Path(request.message.path).unlink(missing_ok=True)
        self._scheduler.finish(request, "stop")
        self._scheduler.work_done(request)
        return None if aborted else StateSaved(request_id=request.id, error=error)
