"""What an engine's slots, pages and preemptions become in Prometheus' series."""

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ready import ready

from server.hub.metrics import EngineMetrics, HubMetrics
from server.wire.messages import Occupancy, Step

BUSY = Occupancy(
    running=5, waiting=4, preempted=3, used_slots=6, cached_slots=1, used_pages=70, cached_pages=20
)


HYBRID = ready(bytes_per_page=1000, pages=100)


@pytest.fixture
def metrics():
    return HubMetrics()


def value(metrics, name, **labels):
    text = generate_latest(metrics.registry).decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    (found,) = (s.value for s in samples if s.name == name and labels.items() <= s.labels.items())
    return found


def by_use(metrics, name):
    return [value(metrics, name, variant="a", engine="0", state=use) for use in ("used", "cached", "free")]


def test_pages_are_told_by_use(metrics):
    engine = EngineMetrics(metrics, "a")
    engine.on_ready("x/a", HYBRID)
    assert by_use(metrics, "lowkey_kv_pages") == [0, 0, 100]
    engine.on_occupancy(HYBRID, BUSY)
    assert by_use(metrics, "lowkey_state_slots") == [6, 1, 1]
    assert by_use(metrics, "lowkey_state_pool_bytes") == [6 * 64, 64, 64]
    assert by_use(metrics, "lowkey_kv_pages") == [70, 20, 10]
    assert by_use(metrics, "lowkey_kv_pool_bytes") == [70_000, 20_000, 10_000]
    assert value(metrics, "lowkey_requests_waiting", variant="a") == 4
    assert value(metrics, "lowkey_requests_preempted", variant="a") == 3
    engine.on_down(HYBRID)
    assert by_use(metrics, "lowkey_kv_pages") == [0, 0, 100]
    assert value(metrics, "lowkey_requests_preempted", variant="a") == 0


def test_preemptions_are_counted_also_of_steps_that_ran_nothing(metrics):
    engine = EngineMetrics(metrics, "a")
    assert value(metrics, "lowkey_preemptions_total", variant="a", engine="0") == 0, "from the start"
    for batch_size, preemptions in ((4, 1), (0, 2), (4, 0)):
        step = dict(made_at=1.0, phase="decode", step_s=0.1, occupancy=BUSY)
        engine.on_step(Step(batch_size=batch_size, preemptions=preemptions, **step))
    assert value(metrics, "lowkey_preemptions_total", variant="a", engine="0") == 3


def test_a_model_without_softmax_attention_has_no_pages(metrics):
    engine = EngineMetrics(metrics, "a")
    engine.on_ready("x/a", ready())
    engine.on_occupancy(ready(), Occupancy(running=1, waiting=0, used_slots=1))
    assert by_use(metrics, "lowkey_kv_pages") == by_use(metrics, "lowkey_kv_pool_bytes") == [0, 0, 0]
