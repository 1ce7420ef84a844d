"""Speeds are of the times at which the engine made the tokens, and of nothing that happens to them later."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
from checkpoints import GATED
from engines import Bench, generate, prompt
from prometheus_client.parser import text_string_to_metric_families
from scripted import SCRIPTS, STEP_S, scripted_api

from server.wire.messages import Pause, Resume

LENGTHS = [1, 2, 8, 9, 20]


@pytest.fixture
def api(tmp_path, monkeypatch):
    with scripted_api(tmp_path, monkeypatch) as client:
        yield client


def complete(api, max_tokens, **fields):
    body = {"model": "dense", "prompt": "Hi", "max_tokens": max_tokens, "ignore_eos": True, **fields}
    return api.post("/v1/completions", json=body)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_speed_is_of_the_engines_times_and_short_answers_have_none(api, tokens):
    response = complete(api, tokens)
    lowkey = response.json()["lowkey"]
    assert lowkey["decode_s"] == pytest.approx((tokens - 1) * STEP_S)
    header = response.headers["x-lowkey-tokens-per-second"]
    if tokens < 9:
        assert lowkey["tokens_per_second"] is None and header == "null"
    else:
        assert lowkey["tokens_per_second"] == pytest.approx(1 / STEP_S) == float(header)
    with api.stream(
        "POST",
        "/v1/completions",
        json={"model": "dense", "prompt": "Hi", "max_tokens": tokens, "ignore_eos": True, "stream": True},
    ) as stream:
        last = [line for line in stream.iter_lines() if line.startswith("data: {")][-1]
    streamed = json.loads(last.removeprefix("data: "))["lowkey"]
    assert streamed["tokens_per_second"] == lowkey["tokens_per_second"]
    assert streamed["decode_s"] == lowkey["decode_s"]


def test_several_short_choices_have_no_speed_either(api):
    assert complete(api, 8, n=4).json()["lowkey"]["tokens_per_second"] is None
    lowkey = complete(api, 9, n=4).json()["lowkey"]
    assert lowkey["tokens_per_second"] == pytest.approx(35 / (8 * STEP_S))


def test_metrics_and_summary_are_of_the_same_times(api):
    for tokens in LENGTHS:
        complete(api, tokens)
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(api.get("/metrics").text)
        for sample in family.samples
        if sample.labels.get("variant") == "dense" and "le" not in sample.labels
    }
    gaps = sum(LENGTHS) - len(LENGTHS)
    assert found["lowkey_inter_token_latency_seconds_count"] == gaps
    assert found["lowkey_inter_token_latency_seconds_sum"] == pytest.approx(gaps * STEP_S)
    assert found["lowkey_request_decode_seconds_sum"] == pytest.approx(gaps * STEP_S)
    assert found["lowkey_request_tokens_per_second_count"] == 2
    assert found["lowkey_request_tokens_per_second_sum"] == pytest.approx(2 / STEP_S)
    traffic = api.get("/v1/ab/summary").json()["variants"]["dense"]
    assert traffic["itl_s"] == pytest.approx(dict.fromkeys(("mean", "p50", "p95", "p99"), STEP_S))
    speed = traffic["tokens_per_second"]
    assert speed == pytest.approx(dict.fromkeys(("mean", "p50", "p95", "p99"), 1 / STEP_S))


def test_a_comparison_of_short_answers_has_no_speed_ratio(api):
    body = {"prompt": "Hi", "max_tokens": 8, "temperature": 0}
    short = api.post("/v1/compare", json=body).json()["results"][1]["against_baseline"]
    assert short["tokens_per_second_ratio"] is None


def events(api, **fields):
    body = {"model": "dense", "prompt": "Hi", "max_tokens": 30, "temperature": 0, "stream": True, **fields}
    with api.stream("POST", "/v1/completions", json=body) as stream:
        lines = [line for line in stream.iter_lines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("together", [2, 7, 100])
def test_tokens_that_wait_share_an_event_and_nothing_else_changes(api, monkeypatch, together):
    fields = {"logprobs": 2, "n": 2, "stream_options": {"continuous_usage_stats": True}}
    text = "".join(event["choices"][0]["text"] for event in events(api))
    for stop in (None, text[10:12]):
        told = []
        for count in (1, together):
            monkeypatch.setattr(SCRIPTS["dense"], "together", count)
            chunks = events(api, **fields, stop=stop)
            by_choice = [[e["choices"][0] for e in chunks if e["choices"][0]["index"] == i] for i in range(2)]
            told.append(
                [
                    {
                        "text": "".join(c["text"] for c in own),
                        **{
                            key: [value for c in own for value in c["logprobs"][key]]
                            for key in ("tokens", "token_logprobs", "text_offset", "top_logprobs")
                        },
                        "reasons": [c["finish_reason"] for c in own if c["finish_reason"]],
                    }
                    for own in by_choice
                ]
            )
            counts = [e["usage"]["completion_tokens"] for e in chunks]
            assert counts == sorted(counts)
        alone, shared = told
        assert shared == alone and len(chunks) < len(alone[0]["tokens"]) * 2
        assert shared[0]["reasons"] == ["length" if stop is None else "stop"]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("collected", [True, False])
def test_a_pause_is_no_time_between_tokens(tmp_path, depth, collected, monkeypatch):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("server.engine.engine.time", clock)
    engine = Bench(tmp_path / "c", GATED).engine(slots=1, depth=depth)
    message = generate(prompt(5), 12)
    engine.handle(message)
    times = []

    def step():
        clock.now += 1
        output = engine.step()
        times.extend(token.at for token in ([] if output is None else output.tokens))

    for _ in range(3):
        step()
        step()
        engine.handle(Pause(request_id=message.request_id))
        engine.handle(Pause(request_id=message.request_id))
        if collected:  # what had been launched at the pause
            step()
        clock.now += 1000
        engine.handle(Resume(request_id=message.request_id))
    while not engine.idle:
        step()
    assert len(times) == 12
    # A step takes a second; the first one after a pause may have begun before it.
    assert all(0 <= b - a <= 2 for a, b in pairwise(times)), times
