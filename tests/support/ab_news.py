"""What front ends tell the hub of traffic and of comparisons."""

from collections.abc import Iterable
from typing import Any

from server.wire.hub import EndedRequest, Pair, Source


def request(
    variant: str = "dense",
    *,
    tokens: int = 20,
    decode: float | None = 0.2,
    ttft: float | None = 0.1,
    gaps: Iterable[float] = (),
    failed: bool = False,
) -> EndedRequest:
    """A request of a variant that has ended."""
    return EndedRequest(
        variant=variant,
        completion_tokens=tokens,
        decode_s=decode,
        ttft_s=ttft,
        gaps_s=list(gaps),
        failed=failed,
    )


def pair_of(variant: str, baseline: str, source: Source, **fields: Any) -> Pair:
    """How a variant differed from a baseline on one prompt."""
    return Pair(variant=variant, baseline=baseline, source=source, **fields)
