"""What a variant thinks of another one's completion: one teacher-forced pass per variant over the full vocabulary.

The baseline leaves its log-probabilities in a file in shared memory, where the others' engines read them; only scalars
come back here.
"""

import asyncio
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from server.api.http.errors import unavailable
from server.api.serving.variants import Variant
from server.wire.exchange import BrokenOutputError
from server.wire.hub import Pair, Source
from server.wire.messages import KLReference, Score

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Scores:
    """What one variant makes of a prompt and of the baseline's completion."""

    tokens: int
    """A hash of the prompt's and the completion's tokens."""
    prompt_nll: float | None
    """Mean negative log-likelihood of the prompt's tokens after the first, in nats; None where there are none."""
    kl: list[float]
    """KL(baseline || variant) at each token of the completion, in nats; empty for the baseline itself."""
    agree: list[bool]
    """Whether both have the same most likely token, at each token of the completion."""

    @property
    def prompt_perplexity(self) -> float | None:
        # No more than e^700: a broken model's perplexity must still be a number.
        return None if self.prompt_nll is None else math.exp(min(self.prompt_nll, 700.0))

    @property
    def mean_kl(self) -> float:
        return sum(self.kl) / len(self.kl)

    @property
    def top1_agreement(self) -> float:
        return sum(self.agree) / len(self.agree)


def pair_of(
    baseline: str, variant: str, scores: Mapping[str, Scores], source: Source, **timings: float | None
) -> Pair:
    """Two variants' scores of the same tokens as a pair for the A/B figures. `timings` are fields of Pair."""
    base, other = scores[baseline], scores[variant]
    nlls = base.prompt_nll, other.prompt_nll
    return Pair(
        variant=variant,
        baseline=baseline,
        source=source,
        tokens=other.tokens,
        kl=other.mean_kl,
        top1_agreement=other.top1_agreement,
        prompt_nll_difference=None if nlls[0] is None or nlls[1] is None else nlls[1] - nlls[0],
        **timings,
    )


def score_bytes(tokens: int, variant: Variant) -> int:
    """Shared memory that log-probabilities of so many tokens take."""
    return tokens * variant.info.vocab_size * FLOAT_BYTES


def same_vocabulary(a: Variant, b: Variant) -> bool:
    """Whether the log-probabilities of one can be read as those of the other. Both have loaded."""
    return a.text.sha256 == b.text.sha256 and a.info.vocab_size == b.info.vocab_size


async def score(
    runtime_dir: Path,
    variants: list[Variant],
    prompt_ids: list[int],
    completion_ids: list[int],
    *,
    salt: bytes,
    priority: int = 0,
) -> dict[str, Scores]:
    """Scores of `variants`, of which the first is the baseline, by name.

    Args:
        runtime_dir: where the shared log-probabilities lie meanwhile.
        salt: what the prompt's prefixes are kept under (`cache_salt`).
        priority: of these passes in the engines; lower runs first.

    Raises:
        APIError: 503, there is no room for the log-probabilities.
        EngineError: an engine went away, or its output is broken.
    """
    path = runtime_dir / f"{secrets.token_hex(8)}.logprobs"
    try:
        await asyncio.to_thread(_allocate, path, score_bytes(len(completion_ids), variants[0]))
        scores: dict[str, Scores] = {}
        for variant in variants:
            mode: Literal["write", "compare"] = "compare" if scores else "write"
            message = Score(
                request_id=secrets.token_hex(8),
                token_ids=prompt_ids + completion_ids,
                from_position=1,
                kl_reference=KLReference(path=str(path), mode=mode, from_position=len(prompt_ids)),
                priority=priority,
                cache_salt=salt,
            )
            scores[variant.name] = await _one(variant, message, len(prompt_ids) - 1)
        return scores
    finally:
        path.unlink(missing_ok=True)


async def _one(variant: Variant, message: Score, prompt: int) -> Scores:
    """Scores of one variant. `prompt` is how many of the scored tokens are the prompt's."""
    scored = await variant.client.score(message)
    if not all(map(math.isfinite, [*scored.logprobs, *scored.kl])):
        raise BrokenOutputError(f"variant {variant.name!r} gave NaN or Inf for these tokens")
    return Scores(
        tokens=hash(tuple(message.token_ids)),
        prompt_nll=-sum(scored.logprobs[:prompt]) / prompt if prompt else None,
        kl=scored.kl,
        agree=scored.agree,
    )


def _allocate(path: Path, size: int) -> None:
    """A file of `size` bytes that really has its memory: writing past what is left would kill the engine (SIGBUS)."""
    with path.open("xb") as f:
        try:
            os.posix_fallocate(f.fileno(), 0, size)
        except OSError as e:
            raise unavailable(f"no room for {size} bytes of log-probabilities in {path.parent}: {e}") from e
