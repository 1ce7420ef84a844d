"""Prometheus metrics that a front end counts: of requests and their tokens. Label values come from configuration only,
never from a request."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
)

from server.series import STEP_SECONDS
from server.wire.hub import Family
from server.wire.messages import FinishReason

Rejection = Literal["queue_full", "rate_limit", "draining", "engine_down", "too_long"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
MOST_UNSETTLED = 10_000
"""Gaps between tokens that are kept before they are put into the series."""
TOKENS_PER_SECOND = (1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 2000, 5000)
STATE_BYTES = tuple(2.0**n for n in range(16, 33))
KL = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
AGREEMENT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)


@dataclass
class Metrics:
    """The series that front ends count, in a registry of their own. The hub adds up those of all front ends: there is
    no gauge among them."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    _variants: "list[VariantMetrics]" = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        variant = ["variant"]

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(
            name: str, text: str, buckets: tuple[float, ...], labels: list[str] = variant
        ) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

        self.requests = counter(
            "lowkey_requests_total", "Requests that ended.", ["variant", "endpoint", "finish_reason"]
        )
        self.rejected = counter(
            "lowkey_requests_rejected_total",
            "Requests that were refused before they ran.",
            ["variant", "reason"],
        )
        self.prompt_tokens = counter("lowkey_prompt_tokens_total", "Prompt tokens taken in.", variant)
        self.generation_tokens = counter("lowkey_generation_tokens_total", "Tokens generated.", variant)
        self.cached_prompt_tokens = counter(
            "lowkey_cached_prompt_tokens_total",
            "Prompt tokens whose state came from the prefix cache.",
            variant,
        )
        self.request_state_bytes = histogram(
            "lowkey_request_state_bytes", "State memory of each request that ended.", STATE_BYTES
        )
        self.request_tokens_per_second = histogram(
            "lowkey_request_tokens_per_second", "Decode speed of each request that ended.", TOKENS_PER_SECOND
        )
        self.ttft = histogram(
            "lowkey_time_to_first_token_seconds", "From the HTTP request to its first token.", SECONDS
        )
        self.itl = histogram(
            "lowkey_inter_token_latency_seconds",
            "Between two tokens of a request, as the engine made them.",
            STEP_SECONDS,
        )
        self.queue = histogram("lowkey_request_queue_seconds", "From arrival to the first step.", SECONDS)
        self.prefill = histogram(
            "lowkey_request_prefill_seconds", "From the first step to the first token.", SECONDS
        )
        self.decode = histogram("lowkey_request_decode_seconds", "From the first token to the last.", SECONDS)
        self.request_seconds = histogram(
            "lowkey_request_seconds", "From the HTTP request to its end.", SECONDS
        )
        self.compare_kl = histogram(
            "lowkey_compare_kl",
            "Mean KL from the baseline per token of a comparison, in nats.",
            KL,
            ["variant", "baseline", "source"],
        )
        self.compare_agreement = histogram(
            "lowkey_compare_top1_agreement",
            "Share of tokens whose most likely successor is the baseline's.",
            AGREEMENT,
            ["variant", "baseline", "source"],
        )
        self.shadow_requests = counter(
            "lowkey_shadow_requests_total",
            "Requests that were to be repeated on the variant as shadow traffic.",
            ["variant", "baseline", "outcome"],
        )
        self.on_rate_limit()

    def on_rate_limit(self, requests: int = 0) -> None:
        """Requests came too soon. They are refused before they are read: for which variant they were is not known."""
        self.rejected.labels("", "rate_limit").inc(requests)

    def families(self) -> list[Family]:
        """All that has been counted."""
        for variant in self._variants:
            variant.settle()
        return [
            Family(m.name, m.documentation, m.type, [(s.name, s.labels, s.value) for s in m.samples])
            for m in self.registry.collect()
        ]

    def add_variant(self, name: str) -> "VariantMetrics":
        """Make the variant's series exist from the start, so that a rate over them is defined."""
        for reason in get_args(Rejection):
            if reason != "rate_limit":
                self.rejected.labels(name, reason)
        self._variants.append(VariantMetrics(self, name))
        return self._variants[-1]


class VariantMetrics:
    """The series of one variant that tokens move, looked up once: that takes longer than to move one."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._metrics, self._name = metrics, name
        for reason in get_args(FinishReason):
            metrics.requests.labels(name, "completions", reason)
        self.prompt_tokens = metrics.prompt_tokens.labels(name)
        self.generation_tokens = metrics.generation_tokens.labels(name)
        self.cached_prompt_tokens = metrics.cached_prompt_tokens.labels(name)
        self.request_state_bytes = metrics.request_state_bytes.labels(name)
        self.request_tokens_per_second = metrics.request_tokens_per_second.labels(name)
        self.ttft = metrics.ttft.labels(name)
        self.itl = metrics.itl.labels(name)
        self.queue = metrics.queue.labels(name)
        self.prefill = metrics.prefill.labels(name)
        self.decode = metrics.decode.labels(name)
        self.request_seconds = metrics.request_seconds.labels(name)
        self._tokens = 0
        """Tokens that are not in the series yet."""
        self._gaps_s: list[float] = []
        """Seconds between tokens that are not in the series yet."""

    def on_tokens(self, count: int, gaps_s: list[float]) -> None:
        """Tokens have been generated, with these gaps before them. The series get many at once: to move them for each
        token would take longer than all else that a token needs."""
        self._tokens += count
        self._gaps_s += gaps_s
        if len(self._gaps_s) >= MOST_UNSETTLED:
            self.settle()

    def settle(self) -> None:
        """Put into the series what is not there yet."""
        tokens, gaps_s = self._tokens, self._gaps_s
        self._tokens, self._gaps_s = 0, []
        self.generation_tokens.inc(tokens)
        if not gaps_s:
            return
        # What `observe` does for one value, for all of them.
        counts = np.bincount(np.searchsorted(STEP_SECONDS, gaps_s), minlength=len(STEP_SECONDS) + 1)
        for bucket, count in zip(self.itl._buckets, counts.tolist(), strict=True):
            bucket.inc(count)
        self.itl._sum.inc(math.fsum(gaps_s))

    def on_rejected(self, reason: Rejection) -> None:
        """A request was refused before it ran."""
        self._metrics.rejected.labels(self._name, reason).inc()

    def on_end(self, endpoint: str, reason: FinishReason) -> None:
        """A request has ended."""
        self._metrics.requests.labels(self._name, endpoint, reason).inc()
