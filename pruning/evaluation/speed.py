"""Decode speed of models side by side: rounds take turns, so that what else the machine does hits all alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from modeling.runtime import Runtime
from modeling.spec import StateTypes
from modeling.state import StatePool

BATCHES = (1, 16)
ROUNDS = 9
ROUND_SECONDS = 0.25
MAX_STEPS = 256


@dataclass(frozen=True)
class Speed:
    """Greedy decode, embedding to next token, of `batch` requests at once."""

    batch: int
    steps: int
    """Tokens that each request decodes in a round."""
    rounds: int
    back_end: str
    tokens_per_second: float
    """Speed of all requests together, the median over rounds."""
    quartiles: tuple[float, float]
    ratio: float
    """Speed over the baseline's, median over rounds; 1 for the baseline itself."""
    ratio_quartiles: tuple[float, float]


@torch.no_grad()
def decode_speed(
    runtimes: Sequence[Runtime],
    batch: int,
    *,
    rounds: int = ROUNDS,
    round_seconds: float = ROUND_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Speed]:
    """Speeds of the models that the runtimes compute, the first being the baseline; `rounds` at least 2."""
    decoders = [_Decoder(runtime, batch) for runtime in runtimes]
    for decoder in decoders:
        decoder.run(2)
    slowest = max(_timed(decoder, 2, clock) for decoder in decoders) / 2
    steps = min(max(int(round_seconds / max(slowest, 1e-9)), 1), MAX_STEPS)
    speeds: list[list[float]] = [[] for _ in runtimes]
    for i in range(rounds):
        order = range(len(runtimes)) if i % 2 == 0 else reversed(range(len(runtimes)))
        for m in order:
            speeds[m].append(batch * steps / _timed(decoders[m], steps, clock))
    return [
        _speed(runtime, batch, steps, own, [a / b for a, b in zip(own, speeds[0], strict=True)])
        for runtime, own in zip(runtimes, speeds, strict=True)
    ]


def _speed(runtime: Runtime, batch: int, steps: int, speeds: list[float], ratios: list[float]) -> Speed:
    return Speed(
        batch,
        steps,
        len(speeds),
        runtime.name,
        statistics.median(speeds),
        _quartiles(speeds),
        statistics.median(ratios),
        _quartiles(ratios),
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _timed(decoder: "_Decoder", steps: int, clock: Callable[[], float]) -> float:
    began = clock()
    decoder.run(steps)
    return clock() - began


class _Decoder:
    def __init__(self, runtime: Runtime, batch: int) -> None:
        model, weight = runtime.model, runtime.model.embeddings.weight
        self._runtime = runtime
        types = StateTypes(inputs=weight.dtype)
        self._pool = StatePool.with_room(model.spec, batch, MAX_STEPS, device=weight.device, types=types)
        self._slots = torch.arange(batch, device=weight.device)
        self._ids = torch.arange(batch, device=weight.device) % model.spec.vocab_size

    def run(self, steps: int) -> None:
        """Decode `steps` tokens of each request, at most `MAX_STEPS`, from the first position on."""
        self._pool.pages.lengths.zero_()
        for _ in range(steps):
            hidden = self._runtime.decode(self._ids, self._pool, self._slots)
            self._ids = self._runtime.logits(hidden).argmax(-1)
        if self._ids.is_cuda:
            torch.cuda.synchronize(self._ids.device)
