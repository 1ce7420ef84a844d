"""Prometheus metrics of engines, and all metrics of a server together. Label values come from configuration only, never
from a request."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)

from server.series import STEP_SECONDS
from server.settings import Settings
from server.wire.hub import Family
from server.wire.messages import Occupancy, Phase, Ready, Step, one_or_all

ENGINE = "0"
"""The label `engine`, which is the index of a variant's engine: each variant has one."""

USES = ("used", "cached", "free")
"""What a slot or a page may be: a request's, a prefix's that gives way, or nobody's."""

BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass
class HubMetrics:
    """The series of what all front ends share, in a registry of their own."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        variant, engine = ["variant"], ["variant", "engine"]

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def gauge(name: str, text: str, labels: list[str]) -> Gauge:
            return Gauge(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: list[str]) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

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
        self.waiting = gauge(
            "lowkey_requests_waiting", "Requests that wait for a state slot or for pages.", engine
        )
        self.preempted = gauge(
            "lowkey_requests_preempted",
            "Waiting requests that have begun: their states are in the host's memory.",
            engine,
        )
        self.preemptions = counter(
            "lowkey_preemptions_total",
            "Times that a running request gave its slot and pages away for others.",
            engine,
        )
        self.state_bytes_per_request = gauge(
            "lowkey_state_bytes_per_request",
            "State memory that every request of the variant holds, whatever its length.",
            variant,
        )
        self.state_slots = gauge("lowkey_state_slots", "State slots by use.", [*engine, "state"])
        self.state_pool_bytes = gauge(
            "lowkey_state_pool_bytes", "Memory of state slots by use.", [*engine, "state"]
        )
        self.kv_pages = gauge(
            "lowkey_kv_pages", "Pages of 64 tokens' keys and values by use.", [*engine, "state"]
        )
        self.kv_pool_bytes = gauge(
            "lowkey_kv_pool_bytes", "Memory of pages of keys and values by use.", [*engine, "state"]
        )
        self.step = histogram(
            "lowkey_engine_step_seconds", "One step of the engine.", STEP_SECONDS, [*engine, "phase"]
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
        self.api_processes = Gauge(
            "lowkey_api_processes", "API processes that answer requests.", registry=self.registry
        )
        self.lost_answers = counter(
            "lowkey_answers_lost_total", "Answers that ended because their API process died.", variant
        )
        self.api_restarts = Counter(
            "lowkey_api_process_restarts_total",
            "Times that an API process was started again.",
            registry=self.registry,
        )
        self.api_keys = gauge("lowkey_api_keys", "Clients that have an API key; 0: no key is asked for.", [])
        self.reload_successful = gauge(
            "lowkey_config_last_reload_successful",
            "0 if the settings could not be taken over at the last SIGHUP, and the old ones stay.",
            [],
        )
        self.reload_success_time = gauge(
            "lowkey_config_last_reload_success_timestamp_seconds",
            "When settings were last taken over, at the start or at a SIGHUP.",
            [],
        )

    def on_reload(self, settings: Settings) -> None:
        """Settings have been taken over, at the start or at a SIGHUP."""
        self.api_keys.set(len(settings.api_keys))
        self.reload_successful.set(1)
        self.reload_success_time.set_to_current_time()

    def on_reload_failed(self) -> None:
        """Settings could not be taken over."""
        self.reload_successful.set(0)


class EngineMetrics:
    """The series of one engine that steps move, looked up once: that takes longer than to move one."""

    def __init__(self, metrics: HubMetrics, name: str) -> None:
        self._metrics, self._name = metrics, name
        metrics.lost_answers.labels(name)
        engine = name, ENGINE
        self._prefix_queries = metrics.prefix_queries.labels(*engine)
        self._prefix_hits = metrics.prefix_hits.labels(*engine)
        self._running = metrics.running.labels(*engine)
        self._paused = metrics.paused.labels(*engine)
        self._waiting = metrics.waiting.labels(*engine)
        self._preempted = metrics.preempted.labels(*engine)
        self._preemptions = metrics.preemptions.labels(*engine)
        self._state_slots = {use: metrics.state_slots.labels(*engine, use) for use in USES}
        self._state_pool_bytes = {use: metrics.state_pool_bytes.labels(*engine, use) for use in USES}
        self._kv_pages = {use: metrics.kv_pages.labels(*engine, use) for use in USES}
        self._kv_pool_bytes = {use: metrics.kv_pool_bytes.labels(*engine, use) for use in USES}
        self._step = {phase: metrics.step.labels(*engine, phase) for phase in get_args(Phase)}
        self._batch_size = metrics.batch_size.labels(*engine)
        self._engine_up = metrics.engine_up.labels(*engine)
        self._engine_restarts = metrics.engine_restarts.labels(*engine)

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

    def on_step(self, step: Step) -> None:
        """The engine has run a step."""
        self._prefix_queries.inc(step.cache_queries)
        self._prefix_hits.inc(step.cache_hits)
        self._preemptions.inc(step.preemptions)
        if not step.batch_size:
            return
        self._step[step.phase].observe(step.step_s)
        self._batch_size.observe(step.batch_size)

    def on_occupancy(self, ready: Ready, occupancy: Occupancy) -> None:
        """The engine has said who is in it."""
        self._running.set(occupancy.running)
        self._paused.set(occupancy.paused)
        self._waiting.set(occupancy.waiting)
        self._preempted.set(occupancy.preempted)
        for use, slots in by_use(ready.slots, occupancy.used_slots, occupancy.cached_slots):
            self._state_slots[use].set(slots)
            self._state_pool_bytes[use].set(slots * ready.state_bytes_per_request)
        for use, pages in by_use(ready.pages, occupancy.used_pages, occupancy.cached_pages):
            self._kv_pages[use].set(pages)
            self._kv_pool_bytes[use].set(pages * ready.bytes_per_page)

    def on_down(self, ready: Ready | None) -> None:
        """The engine is gone."""
        self._engine_up.set(0)
        if ready is not None:
            self.on_occupancy(ready, Occupancy(running=0, waiting=0, used_slots=0))

    def on_restart(self) -> None:
        """The engine will be started again."""
        self._engine_restarts.inc()


def by_use(total: int, used: int, cached: int) -> Iterable[tuple[str, int]]:
    """How many slots or pages there are of each of `USES`."""
    return zip(USES, (used, cached, total - used - cached), strict=True)


def widths_label(widths: list[int]) -> str:
    """Widths per layer as a label: "64" when all layers agree, else "48,48,128"."""
    value = one_or_all(widths)
    return str(value) if isinstance(value, int) else ",".join(map(str, value))


def summed(parts: Iterable[list[Family]]) -> list[Family]:
    """Counters and histograms of several processes as one: samples of one name and the same labels are added up."""
    sums: dict[str, tuple[Family, dict[tuple[str, frozenset[tuple[str, str]]], float]]] = {}
    for family in (family for families in parts for family in families):
        _, values = sums.setdefault(family.name, (family, {}))
        for name, labels, value in family.samples:
            key = name, frozenset(labels.items())
            values[key] = values.get(key, 0.0) + value
    return [
        Family(
            family.name,
            family.documentation,
            family.type,
            [(name, dict(labels), value) for (name, labels), value in values.items()],
        )
        for family, values in sums.values()
    ]


def as_metrics(families: list[Family]) -> list[Metric]:
    """Families as Prometheus' client library has them."""
    metrics = []
    for family in families:
        metric = Metric(family.name, family.documentation, family.type)
        for name, labels, value in family.samples:
            metric.add_sample(name, labels, value)
        metrics.append(metric)
    return metrics


class _Collected:
    """Metrics in the place of a registry."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def render(metrics: list[Metric]) -> bytes:
    """Metrics in Prometheus' text format."""
    return generate_latest(_Collected(metrics))
