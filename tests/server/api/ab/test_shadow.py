"""A server with three variants and shadow traffic: what is measured, when it is given up, and what the summary says."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest
from engine_process import until
from live_server import ENDLESS, LiveServer, poll, suspended

from server.api.ab.record import ABRecord
from server.api.ab.shadow import Shadow
from server.api.serving.metrics import Metrics
from server.api.serving.routing import Routing
from server.api.serving.service import Service
from server.hub.hub import Hub, LocalLink
from server.settings import Settings
from server.wire.exchange import EngineUnavailableError

CONFIG = """
log_texts = true

[variants]
dense = "{dense}"
reduced = "{reduced}"
again = "{dense}"

[[shadow]]
from = "dense"
to = "reduced"
fraction = 1.0

[[shadow]]
from = "dense"
to = "again"
fraction = 1.0
"""
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def lab(checkpoints, tmp_path_factory):
    directory = tmp_path_factory.mktemp("lab")
    (directory / "lowkey.toml").write_text(CONFIG.format(**checkpoints))
    server = LiveServer(directory / "log", "--config", "lowkey.toml", "--max-requests", "1")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def outcomes(server, variant, outcome):
    return server.sample("lowkey_shadow_requests_total", variant=variant, baseline="dense", outcome=outcome)


def test_three_variants_are_compared_with_one_baseline(lab):
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = lab.http.post("/v1/compare", json={**body, "baseline": "reduced"}).json()
    first, *others = answer["results"]
    assert first["variant"] == "reduced" and [r["variant"] for r in others] == ["dense", "again"]
    assert others[0]["text"] == others[1]["text"] != first["text"]
    assert others[0]["against_baseline"]["kl"] == pytest.approx(others[1]["against_baseline"]["kl"], rel=1e-3)
    two = lab.http.post("/v1/compare", json={**body, "variants": ["dense", "again"]}).json()
    against = two["results"][1]["against_baseline"]
    assert against["mean_kl"] == pytest.approx(0, abs=1e-6) and against["top1_agreement"] == 1
    assert against["first_divergence"] is None and against["state_bytes_ratio"] == 1


def test_shadow_traffic_measures_the_answer_of_the_user_on_the_others(lab):
    before = outcomes(lab, "reduced", "scored")
    answer = lab.complete(prompt=PROMPT, max_tokens=20, temperature=0)
    poll(lambda: outcomes(lab, "reduced", "scored") == before + 1, "a shadow was scored")
    labels = {"baseline": "dense", "source": "shadow"}
    kl = lab.sample("lowkey_compare_kl_sum", variant="reduced", **labels)
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    compared = lab.http.post("/v1/compare", json=body).json()
    assert compared["results"][0]["text"] == answer["choices"][0]["text"]
    assert kl == pytest.approx(compared["results"][1]["against_baseline"]["mean_kl"], rel=1e-3)
    assert lab.sample("lowkey_compare_kl_count", variant="again", **labels) == before + 1
    assert lab.sample("lowkey_compare_kl_sum", variant="again", **labels) == pytest.approx(0, abs=1e-6)
    # Only metrics: no request, no token of the user's is counted twice.
    assert (
        lab.sample("lowkey_requests_total", variant="reduced", endpoint="completions", finish_reason="stop")
        == 0
    )
    assert not list(lab.runtime_dir().glob("*.logprobs"))


def test_shadow_traffic_is_dropped_while_a_request_waits(lab):
    poll(lambda: outcomes(lab, "reduced", "scored") > 0, "the test before is over")
    dropped, scored = outcomes(lab, "reduced", "dropped"), outcomes(lab, "reduced", "scored")
    engine = lab.engines()["dense"]

    def stream(max_tokens):
        fields = {"model": "dense", "prompt": "Hi", "ignore_eos": True, "stream": True}
        return lab.http.stream("POST", "/v1/completions", json={**fields, "max_tokens": max_tokens})

    def end(response):
        assert list(filter(None, response.iter_lines()))[-1] == "data: [DONE]"

    with contextlib.ExitStack() as stack:
        with contextlib.ExitStack() as second, suspended(engine):
            # There is one slot, and all three are in the queue before the first gets it.
            first = stack.enter_context(stream(20))
            second.enter_context(stream(ENDLESS))
            third = stack.enter_context(stream(5))
            assert lab.http.get("/health").status_code == 200
            engine.resume()
            end(first)
            poll(lambda: outcomes(lab, "reduced", "dropped") == dropped + 1, "not the first: the third waits")
        end(third)
    poll(lambda: outcomes(lab, "reduced", "scored") == scored + 1, "the third: nothing waits behind it")
    assert outcomes(lab, "reduced", "dropped") == dropped + 1


class Stub:
    """A variant whose scores come when the test says so, or never."""

    def __init__(self, name):
        self.name = name
        self.text = SimpleNamespace(sha256="a")
        self.info = SimpleNamespace(vocab_size=8, context_length=100)
        self.client = self
        self.up = True
        self.answer = asyncio.Event()
        self.error = None

    async def score(self, message):
        assert message.priority >= 2**31, "behind all that a request may ask for"
        assert message.cache_salt == b"alice's", "with the user's prefixes, if with any"
        await self.answer.wait()
        if self.error:
            raise self.error
        return SimpleNamespace(logprobs=[-1.0, -1.0, -1.0], kl=[0.1, 0.3], agree=[True, False])


@pytest.fixture
def bench(tmp_path):
    """(service, shadow, generation, variants, hub) of a server with stubs for engines."""
    rules = [{"from": "a", "to": "b", "fraction": 1}]
    settings = Settings(variants={"a": "x/a", "b": "x/b"}, shadow=rules)
    variants = {name: Stub(name) for name in "ab"}
    metrics, hub = Metrics(), Hub(settings, print)
    for engine in hub.engines.values():
        engine.process.up = True
    link = LocalLink(hub)
    link.listen(lambda _: None)
    link.runtime_dir = tmp_path
    running = SimpleNamespace(get=variants.get)
    service = Service(settings, running, metrics, Routing(settings), link)
    shadow = Shadow(service, ABRecord(metrics, link))
    generation = SimpleNamespace(
        finish_reason="stop",
        from_state=False,
        origin=SimpleNamespace(salt=b"alice's"),
        variant=variants["a"],
        prompt_ids=[1, 2],
        token_ids=[3, 4],
    )
    yield service, shadow, generation, variants, hub
    hub._runtime_dir.remove()


def counted(service):
    samples = next(iter(service.metrics.shadow_requests.collect())).samples
    return {s.labels["outcome"]: s.value for s in samples if s.name.endswith("_total")}


def test_a_shadow_under_way_is_given_up_as_soon_as_a_request_waits(bench, tmp_path):
    service, shadow, generation, _, hub = bench

    async def work():
        shadow.offer(generation)
        await until(lambda: any(tmp_path.iterdir()))
        assert counted(service) == {}
        shadow.offer(generation)  # one at a time
        assert counted(service) == {"dropped": 1}
        hub.engines["b"].waiting = 1
        await until(lambda: counted(service) == {"dropped": 2})

    asyncio.run(work())
    assert counted(service) == {"dropped": 2} and not list(tmp_path.iterdir()) and hub._window.pairs(60) == []


def test_a_shadow_that_fails_is_counted_and_hurts_nobody(bench, tmp_path, caplog):
    service, shadow, generation, variants, hub = bench

    async def work():
        variants["a"].error = EngineUnavailableError("gone")
        variants["a"].answer.set()
        shadow.offer(generation)
        await until(lambda: counted(service) == {"failed": 1})
        variants["a"].error = None
        variants["b"].answer.set()
        shadow.offer(generation)
        await until(lambda: counted(service) == {"failed": 1, "scored": 1})
        await shadow.close()

    asyncio.run(work())
    assert counted(service) == {"failed": 1, "scored": 1} and "gone" in caplog.text
    (pair,) = hub._window.pairs(60)
    assert pair["kl"]["mean"] == pytest.approx(0.2) and pair["top1_agreement"]["mean"] == 0.5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda service, generation, variants: setattr(variants["b"], "up", False),
        lambda service, generation, variants: setattr(variants["b"].text, "sha256", "b"),
        lambda service, generation, variants: setattr(variants["b"].info, "context_length", 3),
        lambda service, generation, variants: setattr(generation, "token_ids", [1] * 2**24),
    ],
)
def test_what_can_not_be_repeated_is_dropped_at_once(bench, spoil):
    service, shadow, generation, variants, _ = bench
    spoil(service, generation, variants)
    shadow.offer(generation)  # would need an event loop to do more
    assert counted(service) == {"dropped": 1}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda hub: setattr(hub.engines["a"], "waiting", 1),
        lambda hub: setattr(hub.engines["b"].process, "up", False),
        lambda hub: setattr(hub, "draining", True),
        lambda hub: hub._begin_shadow("another front end", ["a", "b"]),
    ],
)
def test_what_the_hub_does_not_let_begin_is_dropped_too(bench, spoil):
    service, shadow, generation, _, hub = bench
    spoil(hub)

    async def work():
        shadow.offer(generation)
        await until(lambda: counted(service) == {"dropped": 1})

    asyncio.run(work())


@pytest.mark.parametrize(
    ("field", "value"), [("finish_reason", "abort"), ("finish_reason", "error"), ("from_state", True)]
)
def test_what_is_no_traffic_is_not_even_counted(bench, field, value):
    service, shadow, generation, *_ = bench
    setattr(generation, field, value)
    shadow.offer(generation)
    assert counted(service) == {}


def test_the_summary_counts_traffic_and_pairs(lab):
    seen = lab.http.get("/v1/ab/summary", params={"window": 600}).json()
    before = seen["variants"]["dense"]["requests"]
    tokens = seen["variants"]["dense"]["completion_tokens"]
    ended = sum(outcomes(lab, "reduced", outcome) for outcome in ("scored", "dropped", "failed"))
    lab.complete(max_tokens=7)
    poll(
        lambda: (
            lab.http.get("/v1/ab/summary").json()["variants"]["dense"]["requests"] == before + 1
            and sum(outcomes(lab, "reduced", o) for o in ("scored", "dropped", "failed")) == ended + 1
        ),
        "counted, and its shadow",
    )
    summary = lab.http.get("/v1/ab/summary", params={"window": 600}).json()
    dense = summary["variants"]["dense"]
    assert dense["completion_tokens"] == tokens + 7 and dense["errors"] == 0 and dense["complete"]
    assert 0 < dense["itl_s"]["p50"] <= dense["itl_s"]["p99"] and dense["ttft_s"]["p50"] > 0
    models = {m["id"]: m["lowkey"] for m in lab.http.get("/v1/models").json()["data"]}
    for name, variant in summary["variants"].items():
        assert all(variant[key] == models[name][key] for key in ("state_bytes", "state_dtype"))
    assert summary["variants"].keys() == models.keys()
    pairs = {(p["variant"], p["baseline"]): p for p in summary["pairs"]}
    assert pairs["reduced", "dense"]["pairs"]["shadow"] == outcomes(lab, "reduced", "scored")
    assert pairs["dense", "reduced"]["pairs"] == {"compare": 1}
    assert "too little data" in summary["verdict"]


@pytest.mark.parametrize("window", ["0", "-1", "x", "1e9", "nan"])
def test_a_window_that_makes_no_sense(lab, window):
    response = lab.http.get("/v1/ab/summary", params={"window": window})
    assert response.status_code == 400 and response.json()["error"]["param"] == "window"


def test_texts_are_logged_where_the_settings_ask_for_them(lab):
    answer = lab.complete(prompt="A secret recipe", max_tokens=4)
    poll(lambda: "A secret recipe" in lab.log.read_text(), "the prompt is logged")
    (line,) = [line for line in lab.log.read_text().splitlines() if "A secret recipe" in line]
    assert "POST /v1/completions status" not in line and "status=200" in line
    assert answer["choices"][0]["text"][:2] in line
