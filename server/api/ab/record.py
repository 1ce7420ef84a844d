"""What is known of how variants compare: recorded by everything that measures them, read by the summary."""

import asyncio
from dataclasses import dataclass, field

from fastapi import Request

from server.api.ab.window import ABWindow, EndedRequest, Pair, Source
from server.api.completions.generation import Generation
from server.api.serving.metrics import Metrics


@dataclass
class ABRecord:
    """What a server knows of how its variants compare, and what its comparisons share; lives in
    `app.state.ab_record`."""

    metrics: Metrics
    window: ABWindow
    scoring: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one comparison that may take up `compare_bytes` of shared memory now."""
    timed: int = 0
    """How many /v1/compare have run one variant after the other: their order alternates."""

    def add_pair(self, variant: str, baseline: str, source: Source, pair: Pair) -> None:
        """A variant was measured against a baseline on one prompt."""
        self.metrics.compare_kl.labels(variant, baseline, source).observe(pair.kl)
        self.metrics.compare_agreement.labels(variant, baseline, source).observe(pair.top1_agreement)
        self.window.add_pair(variant, baseline, source, pair)

    def add_generation(self, generation: Generation) -> None:
        """A generation of a variant's traffic has ended, well or not."""
        request = EndedRequest(
            completion_tokens=len(generation.token_ids),
            decode_s=generation.decode_s,
            ttft_s=generation.ttft_s,
            gaps_s=generation.gaps_s,
            failed=generation.finish_reason == "error",
        )
        self.window.add_request(generation.variant.name, request)


def record_of(request: Request) -> ABRecord:
    """The A/B record of the server that the request came to."""
    record: ABRecord = request.app.state.ab_record
    return record
