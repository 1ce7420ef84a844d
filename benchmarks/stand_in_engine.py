"""An engine process without a model, for `benchmarks/frontend.py`: it answers every request with tokens of a real text.

Everything but the engine is the server's own: the loop, the messages, the wire. `benchmarks/stand_in_serve.py` has
`lowkey-serve` start this module in place of `server.engine.process`. STAND_IN_RATE in the environment says how many
steps there are a second; 0, the default, for as many as possible.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from modeling.checkpoint import open_checkpoint
from modeling.tokenizer import TokenizerFile
from server.engine import process
from server.engine.output import StepOutput
from server.wire.messages import (
    Abort,
    EngineConfig,
    Generate,
    Input,
    Occupancy,
    Pause,
    Ready,
    Resume,
    Token,
    TopLogprobs,
    pack_top,
)

RATE = "STAND_IN_RATE"
"""Name of the environment variable."""
TEXT = Path(__file__).parents[1] / "README.md"


@cache
def text_ids(model: Path) -> list[int]:
    """Token ids of the text that is generated. It has ASCII characters only, so that each token is some characters."""
    tokenizer, _ = TokenizerFile(model).open()
    text = TEXT.read_bytes().decode("ascii", "ignore")
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def text_from(ids: Sequence[int], seed: int, count: int) -> list[int]:
    """The `count` tokens that answer a request: the text from token `seed` on, and again from its beginning."""
    return [ids[(seed + i) % len(ids)] for i in range(count)]


@dataclass
class Request:
    message: Generate
    tokens: list[int]
    arrived: float
    generated: int = 0


class StandInEngine:
    """What `server.engine.process.serve` asks of an Engine, at a given pace and without a model.

    A new request is prefilled in the step after it has come. Nobody makes this engine wait: it takes no notice of
    readers that are behind.

    Args:
        ids: The text that is generated, as token ids.
        rate: Steps a second; 0 for as many as possible.
        max_running: Requests that run at the same time.
    """

    blocked = False
    in_threads = False

    def __init__(self, ids: Sequence[int], rate: float, max_running: int) -> None:
        self._ids = ids
        self._step_s = 1 / rate if rate else 0.0
        self._max_running = max_running
        self._waiting: dict[str, Request] = {}
        self._running: dict[str, Request] = {}
        self._due = 0.0
        """time.monotonic() at which the next step ends."""

    @property
    def idle(self) -> bool:
        return not (self._running or self._waiting)

    @property
    def occupancy(self) -> Occupancy:
        running = len(self._running)
        return Occupancy(running=running, waiting=len(self._waiting), used_slots=running)

    def handle(self, message: Input) -> None:
        """Take in one message. Raises ValueError for those that need a model."""
        match message:
            case Generate():
                tokens = text_from(self._ids, message.sampling.seed, message.max_tokens)
                self._waiting[message.request_id] = Request(message, tokens, time.monotonic())
            case Abort():
                self._waiting.pop(message.request_id, None)
                self._running.pop(message.request_id, None)
            case Pause() | Resume():
                pass
            case _:
                raise ValueError(f"the stand-in of an engine only generates, got {type(message).__name__}")

    def step(self) -> StepOutput | None:
        """A token of each request, when it is time for them. None when there are no requests."""
        if self.idle:
            return None
        began = time.monotonic()
        new = list(self._waiting)[: self._max_running - len(self._running)]
        decodes = len(self._running)
        for request_id in new:
            self._running[request_id] = self._waiting.pop(request_id)
        # A step that is late does not make those after it come sooner.
        self._due = max(self._due + self._step_s, began)
        time.sleep(max(0.0, self._due - began))
        now = time.monotonic()
        tokens = [self._next(request, began, now) for request in self._running.values()]
        for token in tokens:
            if token.finish_reason is not None:
                del self._running[token.request_id]
        return StepOutput(
            tokens=tokens,
            scored=[],
            phase="mixed" if decodes and new else "decode" if decodes else "prefill",
            step_s=now - began,
            batch_size=len(tokens),
            occupancy=self.occupancy,
        )

    def _next(self, request: Request, began: float, now: float) -> Token:
        message, first = request.message, request.generated == 0
        token_id = request.tokens[request.generated]
        request.generated += 1
        return Token(
            message.request_id,
            token_id,
            now,
            "length" if request.generated == message.max_tokens else None,
            queue_s=began - request.arrived if first else None,
            prefill_s=now - began if first else None,
            logprob=None if message.logprobs is None else -0.25,
            top=None
            if message.logprobs is None
            else pack_top(self._alternatives(token_id, message.logprobs)),
        )

    def _alternatives(self, token_id: int, count: int) -> TopLogprobs:
        """The token as the most likely one, and other tokens of the text."""
        start = token_id % len(self._ids)
        others = self._ids[start : start + count] + self._ids[:count]
        return [(token_id, -0.25), *((other, -1.6180339 - 0.7 * i) for i, other in enumerate(others))][:count]


def build(config: EngineConfig) -> tuple[StandInEngine, Ready]:
    """In place of `server.engine.process.build`. Loads no weights. Raises CheckpointError, ConfigError."""
    checkpoint = open_checkpoint(config.source)
    spec = checkpoint.spec
    slots = config.max_requests or 64
    engine = StandInEngine(text_ids(checkpoint.path), float(os.environ.get(RATE, "0")), slots)
    ready = Ready(
        family=spec.family,
        d_k=list(spec.d_k),
        d_v=[mixer.d_v for mixer in spec.deltas.values()],
        vocab_size=spec.vocab_size,
        context_length=spec.context_length,
        eos_token_ids=list(spec.eos_token_ids),
        checkpoint_path=str(checkpoint.path.resolve()),
        method=None,
        state_bytes_per_request=0,
        state_dtype="float32",
        device="cpu",
        backend="stand-in",
        weights_bytes=0,
        load_s=0.0,
        slots=slots,
        max_running=slots,
    )
    return engine, ready


if __name__ == "__main__":
    process.build = build  # type: ignore[assignment]
    process.main()
