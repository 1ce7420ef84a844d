"""Shadow traffic: a fraction of one variant's requests is measured on another in the background, for metrics only.

Both variants score the user's completion, teacher forced, once the user has it. Nobody waits for that: it runs at the
lowest priority, one at a time, and is given up as soon as anything else is waiting.
"""

import asyncio
import logging

from server.api.ab.record import ABRecord
from server.api.ab.scoring import pair_of, same_vocabulary, score, score_bytes
from server.api.completions.generation import Generation
from server.api.http.context import current
from server.api.http.errors import APIError
from server.api.serving.service import Service
from server.api.serving.variants import Variant
from server.wire.exchange import EngineError
from server.wire.hub import BeginShadow, EndShadow, Shadowed, ShadowOutcome, Waiting

logger = logging.getLogger("lowkey.shadow")

PRIORITY = 2**31
"""Priority of shadow passes in the engine: behind everything that a request may ask for (`SamplingFields.priority`)."""
POLL_S = 0.01
"""How long shadow traffic may go on after something else began to wait."""


class Shadow:
    """Is offered every generation of completions and chat that ends, and repeats those that the rules draw.

    Args:
        record: told what was measured.
    """

    def __init__(self, service: Service, record: ABRecord) -> None:
        self._service = service
        self._record = record
        self._running: asyncio.Task[None] | None = None

    def offer(self, generation: Generation) -> None:
        """Take a generation that has ended, if a rule draws it and there is room. Never raises and never waits."""
        if generation.finish_reason not in ("stop", "length"):
            return
        if generation.from_state or not generation.token_ids:  # a state is no other variant's
            return
        base, targets = generation.variant, []
        for name in self._service.routing.shadows(base.name):
            target = self._service.variants.get(name)
            if target is not None and self._has_room(generation, target):
                targets.append(target)
            else:
                self._count(name, base.name, "dropped")
        if targets:
            token = current.set(None)  # the user's request is over
            self._running = asyncio.create_task(self._run(generation, targets))
            current.reset(token)

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    def _has_room(self, generation: Generation, target: Variant) -> bool:
        pair = (generation.variant, target)
        return (
            (self._running is None or self._running.done())
            and all(variant.client.up for variant in pair)
            and same_vocabulary(*pair)
            and score_bytes(len(generation.token_ids), target) <= self._service.settings.shadow_bytes
            and len(generation.prompt_ids) + len(generation.token_ids) <= target.info.context_length
        )

    async def _run(self, generation: Generation, targets: list[Variant]) -> None:
        variants = [generation.variant, *targets]
        names = [variant.name for variant in variants]
        outcome: ShadowOutcome = "dropped"
        try:
            if await self._service.link.ask(BeginShadow(variants=names)):
                outcome = "failed"
                outcome = await self._measure(generation, variants)
        except (APIError, EngineError) as e:
            logger.warning("shadow of %s: %s", generation.variant.name, e)
        finally:
            self._service.link.tell(EndShadow())
            for target in targets:
                self._count(target.name, generation.variant.name, outcome)

    async def _measure(self, generation: Generation, variants: list[Variant]) -> ShadowOutcome:
        """Score the completion by all variants; returns "scored", or "dropped" when something else waits."""
        names = [variant.name for variant in variants]
        passes = asyncio.create_task(
            score(
                self._service.link.runtime_dir,
                variants,
                generation.prompt_ids,
                generation.token_ids,
                salt=generation.origin.salt,
                priority=PRIORITY,
            )
        )
        try:
            while not (await asyncio.wait([passes], timeout=POLL_S))[0]:
                if await self._service.link.ask(Waiting(variants=names)):
                    return "dropped"
            scores = passes.result()
        finally:
            passes.cancel()
        base, *targets = names
        for name in targets:
            self._record.add_pair(pair_of(base, name, scores, "shadow"))
        return "scored"

    def _count(self, variant: str, baseline: str, outcome: ShadowOutcome) -> None:
        self._service.metrics.shadow_requests.labels(variant, baseline, outcome).inc()
        self._service.link.tell(Shadowed(variant=variant, baseline=baseline, outcome=outcome))
