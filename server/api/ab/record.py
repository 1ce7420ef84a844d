"""What is known of how variants compare: counted in this front end's metrics, and told to the hub, which has the A/B
figures of all front ends."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fastapi import Request

from server.api.completions.generation import Generation
from server.api.serving.metrics import Metrics
from server.wire.hub import BeginScoring, EndedRequest, EndScoring, Link, Pair


@dataclass
class ABRecord:
    """Where everything goes that measures variants, and the turn of comparisons; lives in `app.state.ab_record`."""

    metrics: Metrics
    link: Link
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one comparison of this front end for which the hub is asked: to the hub a turn is a front end's."""

    @contextlib.asynccontextmanager
    async def scoring(self) -> AsyncIterator[None]:
        """The one comparison of the server that may take up `compare_bytes` of shared memory now is in this block."""
        async with self._turn:
            try:
                await self.link.ask(BeginScoring())
                yield
            finally:
                self.link.tell(EndScoring())

    def add_pair(self, pair: Pair) -> None:
        """A variant was measured against a baseline on one prompt."""
        labels = pair.variant, pair.baseline, pair.source
        self.metrics.compare_kl.labels(*labels).observe(pair.kl)
        self.metrics.compare_agreement.labels(*labels).observe(pair.top1_agreement)
        self.link.tell(pair)

    def add_generation(self, generation: Generation) -> None:
        """A generation of a variant's traffic has ended, well or not."""
        self.link.tell(
            EndedRequest(
                variant=generation.variant.name,
                completion_tokens=len(generation.token_ids),
                decode_s=generation.decode_s,
                ttft_s=generation.ttft_s,
                gaps_s=generation.gaps_s,
                failed=generation.finish_reason == "error",
            )
        )


def record_of(request: Request) -> ABRecord:
    """The A/B record of the server that the request came to."""
    record: ABRecord = request.app.state.ab_record
    return record
