"""/metrics: the series of the contract, moved by exactly what happened, with labels from the configuration only."""

import socket
import urllib.parse

import httpx
import pytest
from live_server import CONTEXT, DEADLINE_S, ENDLESS, FAMILY, poll
from prometheus_client.parser import text_string_to_metric_families

from modeling.checkpoint import open_checkpoint
from modeling.state import PAGE_TOKENS

SERIES = {
    "lowkey_requests": "counter",
    "lowkey_requests_rejected": "counter",
    "lowkey_prompt_tokens": "counter",
    "lowkey_generation_tokens": "counter",
    "lowkey_cached_prompt_tokens": "counter",
    "lowkey_prefix_cache_queries": "counter",
    "lowkey_prefix_cache_hits": "counter",
    "lowkey_requests_running": "gauge",
    "lowkey_requests_paused": "gauge",
    "lowkey_requests_waiting": "gauge",
    "lowkey_requests_preempted": "gauge",
    "lowkey_preemptions": "counter",
    "lowkey_request_state_bytes": "histogram",
    "lowkey_state_bytes_per_request": "gauge",
    "lowkey_state_slots": "gauge",
    "lowkey_state_pool_bytes": "gauge",
    "lowkey_kv_pages": "gauge",
    "lowkey_kv_pool_bytes": "gauge",
    "lowkey_request_tokens_per_second": "histogram",
    "lowkey_time_to_first_token_seconds": "histogram",
    "lowkey_inter_token_latency_seconds": "histogram",
    "lowkey_request_queue_seconds": "histogram",
    "lowkey_request_prefill_seconds": "histogram",
    "lowkey_request_decode_seconds": "histogram",
    "lowkey_request_seconds": "histogram",
    "lowkey_engine_step_seconds": "histogram",
    "lowkey_batch_size": "histogram",
    "lowkey_engine_up": "gauge",
    "lowkey_engine_restarts": "counter",
    "lowkey_model_load_seconds": "gauge",
    "lowkey_weights_bytes": "gauge",
    "lowkey_variant_info": "gauge",
    "lowkey_compare_kl": "histogram",
    "lowkey_compare_top1_agreement": "histogram",
    "lowkey_shadow_requests": "counter",
    "lowkey_api_keys": "gauge",
    "lowkey_api_processes": "gauge",
    "lowkey_answers_lost": "counter",
    "lowkey_api_process_restarts": "counter",
    "lowkey_config_last_reload_success_timestamp_seconds": "gauge",
    "lowkey_config_last_reload_successful": "gauge",
}

VARIANT = {"variant": "dense"}
ENGINE = {"variant": "dense", "engine": "0"}


def moved(server, work):
    """What `work` changed, by sample name and labels, histograms' buckets left out."""
    server.wait_idle()
    before = server.samples()
    work()
    server.wait_idle()
    after = server.samples()
    return {
        key: after[key] - before.get(key, 0.0)
        for key in after
        if after[key] != before.get(key, 0.0) and not key[0].endswith(("_bucket", "_created"))
    }


def key(name, **labels):
    return name, frozenset(labels.items())


def test_every_series_is_there_with_its_type_and_help(server):
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {f.name: f for f in text_string_to_metric_families(response.text)}
    assert {name: f.type for name, f in families.items() if not name.endswith("_created")} == SERIES
    assert all(f.documentation.endswith(".") for f in families.values() if not f.name.endswith("_created"))


def test_one_completion_moves_exactly_its_own_samples(server):
    changes = moved(server, lambda: server.complete(prompt=[5] * 7, max_tokens=11))
    expected = {
        key("lowkey_requests_total", **VARIANT, endpoint="completions", finish_reason="length"): 1,
        key("lowkey_prompt_tokens_total", **VARIANT): 7,
        key("lowkey_generation_tokens_total", **VARIANT): 11,
        key("lowkey_request_state_bytes_count", **VARIANT): 1,
        key("lowkey_request_tokens_per_second_count", **VARIANT): 1,
        key("lowkey_time_to_first_token_seconds_count", **VARIANT): 1,
        key("lowkey_inter_token_latency_seconds_count", **VARIANT): 10,
        key("lowkey_request_queue_seconds_count", **VARIANT): 1,
        key("lowkey_request_prefill_seconds_count", **VARIANT): 1,
        key("lowkey_request_decode_seconds_count", **VARIANT): 1,
        key("lowkey_request_seconds_count", **VARIANT): 1,
        key("lowkey_engine_step_seconds_count", **ENGINE, phase="prefill"): 1,
        key("lowkey_engine_step_seconds_count", **ENGINE, phase="decode"): 10,
        key("lowkey_batch_size_count", **ENGINE): 11,
        key("lowkey_batch_size_sum", **ENGINE): 11,
    }
    sums = {k: v for k, v in changes.items() if k[0].endswith("_sum")}
    assert {k: v for k, v in changes.items() if k not in sums or k in expected} == expected
    assert all(value > 0 for value in sums.values())
    assert {k[0].removesuffix("_sum") for k in sums} == {
        k[0].removesuffix("_count") for k in expected if k[0].endswith("_count")
    }


def test_state_bytes_are_the_variants(server, checkpoints):
    for name, path in checkpoints.items():
        spec = open_checkpoint(path).spec
        held = spec.state_bytes(0)
        changes = moved(server, lambda name=name: server.complete(model=name, max_tokens=1))
        assert changes[key("lowkey_request_state_bytes_sum", variant=name)] == spec.state_bytes(PAGE_TOKENS)
        assert server.sample("lowkey_state_bytes_per_request", variant=name) == held
        labels = {"variant": name, "engine": "0"}
        for metric, each in (("lowkey_state_pool_bytes", held), ("lowkey_state_slots", 1)):
            uses = {
                state: server.sample(metric, **labels, state=state) for state in ("used", "cached", "free")
            }
            assert uses["used"] == 0 and sum(uses.values()) == 8 * each
        assert server.sample("lowkey_weights_bytes", **labels) > 0
        assert server.sample("lowkey_model_load_seconds", **labels) > 0
        assert server.sample("lowkey_engine_up", **labels) == 1


def test_finish_reasons_and_endpoints(server):
    def count(reason, endpoint="completions"):
        return key("lowkey_requests_total", **VARIANT, endpoint=endpoint, finish_reason=reason)

    text = server.complete(max_tokens=1, temperature=0)["choices"][0]["text"]
    assert count("stop") in moved(server, lambda: server.complete(max_tokens=5, temperature=0, stop=text))
    assert count("length") in moved(server, lambda: server.events(max_tokens=2))
    changes = moved(server, lambda: server.http.post("/v1/compare", json={"prompt": "Hi", "max_tokens": 2}))
    assert sum(v for k, v in changes.items() if k[0] == "lowkey_requests_total") == 2
    compared = {"variant": "reduced", "baseline": "dense", "source": "compare"}
    assert changes[key("lowkey_compare_kl_count", **compared)] == 1
    assert changes[key("lowkey_compare_top1_agreement_count", **compared)] == 1


def test_a_refused_request_is_not_counted_as_one_that_ended(server):
    changes = moved(
        server,
        lambda: server.http.post("/v1/completions", json={"model": "dense", "prompt": "x" * (CONTEXT + 1)}),
    )
    assert changes == {key("lowkey_requests_rejected_total", **VARIANT, reason="too_long"): 1}
    assert (
        moved(server, lambda: server.http.post("/v1/completions", json={"model": "dense", "prompt": ""}))
        == {}
    )


def test_info_says_what_a_variant_is(server, checkpoints):
    info = [dict(labels) for name, labels in server.samples() if name == "lowkey_variant_info"]
    assert sorted(i["variant"] for i in info) == ["dense", "reduced"]
    dense = next(i for i in info if i["variant"] == "dense")
    assert dense["model"] == str(checkpoints["dense"]) and dense["family"] == FAMILY
    assert (dense["d_k"], dense["d_v"], dense["method"]) == ("32", "24", "none")
    assert (dense["state_dtype"], dense["device"]) == ("float32", "cpu") and dense["backend"]


def test_label_values_come_from_the_configuration_only(server):
    server.complete(max_tokens=1)
    server.http.post("/v1/completions", json={"model": "dense", "prompt": ""})
    before = set(server.samples())
    odd = ["gpt-4", "dense\n", 'x"} 1\nlowkey_evil 1', "DENSE", "", "../dense"]
    for name in odd:
        server.http.post(
            "/v1/completions", json={"model": name, "prompt": "Hi", "max_tokens": 1, "user": name}
        )
        server.http.post("/v1/compare", json={"prompt": "Hi", "variants": [name, "dense"], "baseline": name})
        server.http.get("/ready", params={"variant": name})
        server.http.get(f"/v1/models/{urllib.parse.quote(name, safe='')}")
        server.http.get("/" + urllib.parse.quote(name, safe=""))
    assert set(server.samples()) == before


def aborts(server, endpoint="completions", variant="dense"):
    return server.sample("lowkey_requests_total", variant=variant, endpoint=endpoint, finish_reason="abort")


def test_leaving_a_stream_aborts_it(server):
    before = aborts(server)
    body = {"model": "dense", "prompt": "Hi", "max_tokens": ENDLESS, "stream": True, "ignore_eos": True}
    with (
        httpx.Client(base_url=server.url, timeout=DEADLINE_S) as client,
        client.stream("POST", "/v1/completions", json=body) as r,
    ):
        lines = r.iter_lines()  # held: httpx closes the connection when the iterator goes
        next(lines)
        assert server.sample("lowkey_state_slots", **ENGINE, state="used") == 1
    poll(lambda: aborts(server) == before + 1, "the abort is counted")
    server.wait_idle()


def test_leaving_a_stream_that_nobody_reads_aborts_it(server):
    # The server is held up in writing when the client goes.
    before = aborts(server)
    generated = server.sample("lowkey_generation_tokens_total", **VARIANT)
    url = urllib.parse.urlsplit(server.url)
    body = (
        b'{"model": "dense", "prompt": "Hi", "max_tokens": %d, "stream": true, "ignore_eos": true}' % ENDLESS
    )
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect((url.hostname, url.port))
        s.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        poll(
            lambda: server.sample("lowkey_generation_tokens_total", **VARIANT) > generated + 200,
            "tokens flow",
        )
    poll(lambda: aborts(server) == before + 1, "the abort is counted")
    server.wait_idle()


@pytest.mark.parametrize("path", ["completions", "compare"])
def test_leaving_before_the_answer_aborts(server, path):
    endpoint = path
    before = aborts(server, endpoint)
    body = {"model": "dense", "prompt": "Hi", "max_tokens": ENDLESS, "ignore_eos": True}
    url = urllib.parse.urlsplit(server.url)
    data = httpx.Request("POST", server.url, json=body).content
    with socket.create_connection((url.hostname, url.port)) as s:
        s.sendall(
            b"POST /v1/%s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % (path.encode(), len(data))
            + data
        )
        poll(
            lambda: sum(
                server.sample("lowkey_state_slots", variant=v, engine="0", state="used")
                for v in ("dense", "reduced")
            ),
            "it runs",
        )
    poll(
        lambda: sum(aborts(server, endpoint, v) for v in ("dense", "reduced")) > before,
        "the abort is counted",
    )
    for variant in ("dense", "reduced"):
        server.wait_idle(variant)
    assert "Traceback" not in server.log.read_text(), "a client that leaves is no error"


def test_a_finished_stream_whose_client_closes_at_once_is_no_abort(server):
    before = aborts(server)
    for _ in range(5):
        body = {"model": "dense", "prompt": "Hi", "max_tokens": 3, "stream": True, "ignore_eos": True}
        with (
            httpx.Client(base_url=server.url, timeout=DEADLINE_S) as client,
            client.stream("POST", "/v1/completions", json=body) as r,
        ):
            for line in r.iter_lines():
                if line == "data: [DONE]":
                    break
    server.wait_idle()
    assert aborts(server) == before
