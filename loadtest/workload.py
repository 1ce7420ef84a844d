"""What is sent, and when: drawn once per round from a seed, the same for every variant."""

import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loadtest.client import Completion

MAX_TRACE = 100_000
MAX_TOKENS = 1_000_000


class WorkloadError(Exception):
    """A distribution or a trace that can't be read; the message names the place."""


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts: `128`, `32-256` (uniform) or `lognormal:128,0.7,2048` (median, sigma, most)."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __post_init__(self) -> None:
        low, high = self._bounds()
        if not 1 <= low <= high <= MAX_TOKENS:
            raise WorkloadError(f"{self.text!r}: lengths are from 1 to {MAX_TOKENS}, the smaller one first")

    def _lognormal(self) -> tuple[int, float, int] | None:
        match = re.fullmatch(r"lognormal:(\d+),(\d+\.?\d*),(\d+)", self.text)
        return (int(match[1]), float(match[2]), int(match[3])) if match else None

    def _bounds(self) -> tuple[int, int]:
        if lognormal := self._lognormal():
            return lognormal[0], lognormal[2]
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", self.text)
        if match is None:
            raise WorkloadError(f"{self.text!r} is no distribution; 128, 32-256 or lognormal:128,0.7,2048 is")
        return int(match[1]), int(match[2] or match[1])

    def draw(self, source: random.Random) -> int:
        if lognormal := self._lognormal():
            median, sigma, most = lognormal
            return max(1, min(most, round(median * math.exp(sigma * source.gauss(0, 1)))))
        return source.randint(*self._bounds())


@dataclass(frozen=True)
class Workload:
    """Requests of drawn lengths with random token ids, or those of a trace from the beginning, over and over."""

    prompt: Lengths
    output: Lengths
    vocab: int
    """Token ids are drawn from 1 to vocab - 1."""
    seed: int
    trace: tuple[Completion, ...] = ()
    salt: str = ""
    """A text that token ids depend on, while lengths and arrivals do not: with another one no prefix cache knows the
    prompts."""

    def requests(self, block: int, count: int) -> list[Completion]:
        """The requests of one block of the test: the same for each variant, others in each block."""
        draw = random.Random(f"{self.seed} {block} requests")
        ids = random.Random(f"{self.seed} {block} {self.salt} ids")
        if self.trace:
            start = block * count
            return list(
                itertools.islice(
                    itertools.cycle(self.trace), start % len(self.trace), start % len(self.trace) + count
                )
            )
        return [
            Completion(
                [ids.randrange(1, self.vocab) for _ in range(self.prompt.draw(draw))],
                self.output.draw(draw),
                draw.randrange(2**31),
            )
            for _ in range(count)
        ]

    def arrivals(self, block: int, count: int, rate: float) -> list[float]:
        """Seconds of a Poisson process. At another rate they are the same, stretched."""
        draw = random.Random(f"{self.seed} {block} arrivals")
        return list(itertools.accumulate(draw.expovariate(1.0) / rate for _ in range(count)))


def read_trace(path: Path, vocab: int, seed: int) -> tuple[Completion, ...]:
    """One request per line: {"prompt": text or ids, "max_tokens": n}, or {"prompt_tokens": n, "max_tokens": n}.

    Raises:
        WorkloadError: the file can't be read, is empty or too long, or a line is no request.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise WorkloadError(f"{path}: {e}") from e
    lines = [line for line in lines if line.strip()]
    if not 1 <= len(lines) <= MAX_TRACE:
        raise WorkloadError(f"{path}: has {len(lines)} requests; 1 to {MAX_TRACE} are right")
    return tuple(_parse(path, lines, vocab, random.Random(seed)))


def _parse(path: Path, lines: list[str], vocab: int, draw: random.Random) -> Iterator[Completion]:
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            prompt, output = entry.get("prompt"), entry.get("max_tokens")
            if prompt is None and isinstance(length := entry.get("prompt_tokens"), int):
                if not 1 <= length <= MAX_TOKENS:
                    raise WorkloadError(
                        f"{path}:{number}: prompt_tokens={length} is not from 1 to {MAX_TOKENS}"
                    )
                prompt = [draw.randrange(1, vocab) for _ in range(length)]
            if isinstance(prompt, str):
                prompt.encode()  # JSON may hold half a surrogate pair, which can't be sent
        except UnicodeEncodeError as e:
            raise WorkloadError(f"{path}:{number}: prompt holds half a surrogate pair: {e}") from e
        except (ValueError, AttributeError, RecursionError) as e:
            raise WorkloadError(f"{path}:{number}: is no JSON object: {e}") from e
        ids = isinstance(prompt, list) and all(isinstance(i, int) for i in prompt)
        if not prompt or not (isinstance(prompt, str) or ids):
            raise WorkloadError(f"{path}:{number}: needs a prompt (text or token ids) or prompt_tokens")
        if not isinstance(output, int) or not 1 <= output <= MAX_TOKENS:
            raise WorkloadError(f"{path}:{number}: max_tokens={output!r} is not from 1 to {MAX_TOKENS}")
        yield Completion(prompt, output, draw.randrange(2**31))
