"""Prometheus metrics of the API process. Label values come from configuration only, never from a request."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from server.wire.messages import FinishReason, Occupancy, Phase, Ready, StepOutput, one_or_all

Rejection = Literal["queue_full", "rate_limit", "draining", "engine_down", "too_long"]

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series of time stamps beside every counter and histogram

ENGINE = "0"
"""The label `engine`, which is the index of a variant's engine: each variant has one."""

SLOT_USES = ("used", "cached", "free")

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ITL_SECONDS = (
    0.0005,
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
)
MOST_UNSETTLED = 10_000
"""Gaps between tokens that are kept before they are put into the series."""
TOKENS_PER_SECOND = (1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 2000, 5000)
STATE_BYTES = tuple(2.0**n for n in range(16, 33))
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
KL = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
AGREEMENT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)


@dataclass
class Metrics:
    """All series that this version serves, in a registry of their own."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    _variants: "list[VariantMetrics]" = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        variant, engine = ["variant"], ["variant", "engine"]

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def gauge(name: str, text: str, labels: list[str]) -> Gauge:
            return Gauge(name, text, labels, registry=self.registry)

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
        self.prefix_queries = counter(
            "lowkey_prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", engine
        )
        self.prefix_hits = counter(
            "lowkey_prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", engine
        )
        self.running = gauge("lowkey_requests_running", "Requests that hold a state slot.", engine)
        self.paused = gauge(
            "lowkey_requests_paused", "Running requests that wait for a client who is slow to read.", engine
        )
        self.waiting = gauge("lowkey_requests_waiting", "Requests that wait for a state slot.", engine)
        self.request_state_bytes = histogram(
            "lowkey_request_state_bytes", "State memory of each request that ended.", STATE_BYTES
        )
        self.state_bytes_per_request = gauge(
            "lowkey_state_bytes_per_request", "State memory that every request of the variant holds.", variant
        )
        self.state_slots = gauge("lowkey_state_slots", "State slots by use.", [*engine, "state"])
        self.state_pool_bytes = gauge("lowkey_state_pool_bytes", "State memory by use.", [*engine, "state"])
        self.request_tokens_per_second = histogram(
            "lowkey_request_tokens_per_second", "Decode speed of each request that ended.", TOKENS_PER_SECOND
        )
        self.ttft = histogram(
            "lowkey_time_to_first_token_seconds", "From the HTTP request to its first token.", SECONDS
        )
        self.itl = histogram(
            "lowkey_inter_token_latency_seconds",
            "Between two tokens of a request, as the engine made them.",
            ITL_SECONDS,
        )
        self.queue = histogram("lowkey_request_queue_seconds", "From arrival to the first step.", SECONDS)
        self.prefill = histogram(
            "lowkey_request_prefill_seconds", "From the first step to the first token.", SECONDS
        )
        self.decode = histogram("lowkey_request_decode_seconds", "From the first token to the last.", SECONDS)
        self.request_seconds = histogram(
            "lowkey_request_seconds", "From the HTTP request to its end.", SECONDS
        )
        self.step = histogram(
            "lowkey_engine_step_seconds", "One step of the engine.", ITL_SECONDS, [*engine, "phase"]
        )
        self.batch_size = histogram("lowkey_batch_size", "Requests in one step.", BATCH, engine)
        self.engine_up = gauge("lowkey_engine_up", "1 while the engine answers.", engine)
        self.engine_restarts = counter(
            "lowkey_engine_restarts_total", "Times that the engine process was started again.", engine
        )
        self.load_seconds = gauge("lowkey_model_load_seconds", "Time that the last load took.", engine)
        self.weights_bytes = gauge("lowkey_weights_bytes", "Memory of the model's parameters.", engine)
        self.info = gauge(
            "lowkey_variant_info",
            "What the variant is; always 1.",
            ["variant", "model", "family", "d_k", "d_v", "method", "state_dtype", "device", "backend"],
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

    def add_variant(self, name: str) -> "VariantMetrics":
        """Make the variant's series exist from the start, so that a rate over them is defined."""
        for reason in get_args(Rejection):
            if reason != "rate_limit":
                self.rejected.labels(name, reason)
        self._variants.append(VariantMetrics(self, name))
        return self._variants[-1]

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        for variant in self._variants:
            variant.settle()
        return generate_latest(self.registry)


class VariantMetrics:
    """The series of one variant that tokens and steps move, looked up once: that takes longer than to move one."""

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
        engine = name, ENGINE
        self._prefix_queries = metrics.prefix_queries.labels(*engine)
        self._prefix_hits = metrics.prefix_hits.labels(*engine)
        self._running = metrics.running.labels(*engine)
        self._paused = metrics.paused.labels(*engine)
        self._waiting = metrics.waiting.labels(*engine)
        self._state_slots = {use: metrics.state_slots.labels(*engine, use) for use in SLOT_USES}
        self._state_pool_bytes = {use: metrics.state_pool_bytes.labels(*engine, use) for use in SLOT_USES}
        self._step = {phase: metrics.step.labels(*engine, phase) for phase in get_args(Phase)}
        self._batch_size = metrics.batch_size.labels(*engine)
        self._engine_up = metrics.engine_up.labels(*engine)
        self._engine_restarts = metrics.engine_restarts.labels(*engine)
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
        counts = np.bincount(np.searchsorted(ITL_SECONDS, gaps_s), minlength=len(ITL_SECONDS) + 1)
        for bucket, count in zip(self.itl._buckets, counts.tolist(), strict=True):
            bucket.inc(count)
        self.itl._sum.inc(math.fsum(gaps_s))

    def on_rejected(self, reason: Rejection) -> None:
        """A request was refused before it ran."""
        self._metrics.rejected.labels(self._name, reason).inc()

    def on_end(self, endpoint: str, reason: FinishReason) -> None:
        """A request has ended."""
        self._metrics.requests.labels(self._name, endpoint, reason).inc()

    def on_ready(self, model: str, ready: Ready) -> None:
        """The engine has loaded."""
        name, metrics = self._name, self._metrics
        self._engine_up.set(1)
        metrics.load_seconds.labels(name, ENGINE).set(ready.load_s)
        metrics.weights_bytes.labels(name, ENGINE).set(ready.weights_bytes)
        metrics.state_bytes_per_request.labels(name).set(ready.state_bytes_per_request)
        labels = (
            name,
            model,
            ready.family,
            widths_label(ready.d_k),
            widths_label(ready.d_v),
            ready.method or "none",
            ready.state_dtype,
            ready.device,
            ready.backend,
        )
        # A checkpoint may have been replaced before a restart.
        metrics.info.remove_by_labels({"variant": name})
        metrics.info.labels(*labels).set(1)
        self.on_occupancy(ready, Occupancy(running=0, waiting=0, used_slots=0))

    def on_step(self, output: StepOutput) -> None:
        """The engine has run a step."""
        self._prefix_queries.inc(output.cache_queries)
        self._prefix_hits.inc(output.cache_hits)
        if not output.batch_size:
            return
        self._step[output.phase].observe(output.step_s)
        self._batch_size.observe(output.batch_size)

    def on_occupancy(self, ready: Ready, occupancy: Occupancy) -> None:
        """The engine has said who is in it."""
        self._running.set(occupancy.running)
        self._paused.set(occupancy.paused)
        self._waiting.set(occupancy.waiting)
        used, cached = occupancy.used_slots, occupancy.cached_slots
        for use, slots in (("used", used), ("cached", cached), ("free", ready.slots - used - cached)):
            self._state_slots[use].set(slots)
            self._state_pool_bytes[use].set(slots * ready.state_bytes_per_request)

    def on_down(self, ready: Ready | None) -> None:
        """The engine is gone and will be started again."""
        self._engine_up.set(0)
        self._engine_restarts.inc()
        if ready is not None:
            self.on_occupancy(ready, Occupancy(running=0, waiting=0, used_slots=0))


def widths_label(widths: list[int]) -> str:
    """Widths per layer as a label: "64" when all layers agree, else "48,48,128"."""
    value = one_or_all(widths)
    return str(value) if isinstance(value, int) else ",".join(map(str, value))
