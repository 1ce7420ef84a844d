"""POST /v1/compare and /v1/models against values computed from the checkpoints themselves."""

import itertools
import json
import math

import httpx
import pytest
import torch
from checkpoints import byte_tokenizer
from live_server import DEADLINE_S, ENDLESS, suspended

from modeling.checkpoint import open_checkpoint
from modeling.runtime import TorchRuntime
from modeling.spec import StateTypes
from modeling.state import PAGE_TOKENS, StatePool

PROMPT = "Once upon a time there was a small model"
FIELDS = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def models(checkpoints):
    """Each variant in float64."""
    return {name: open_checkpoint(path).load(dtype=torch.float64) for name, path in checkpoints.items()}


@torch.inference_mode()
def greedy(model, ids, n):
    types = StateTypes(torch.float64, torch.float64)
    pool = StatePool.with_room(model.spec, 1, len(ids) + n, types=types)
    slot = torch.tensor([0])
    hidden, state = model(torch.tensor(ids), [0, len(ids)])
    pool.scatter(slot, state)
    pool.advance(slot, [0, len(ids)])
    tokens = []
    hidden = hidden[-1:]
    while True:
        tokens.append(int(model.logits(hidden).argmax()))
        if len(tokens) == n:
            return tokens
        hidden = TorchRuntime(model).decode(torch.tensor(tokens[-1:]), pool, slot)


def state_bytes(spec, tokens):
    """Bytes of a request that has fed so many tokens; its pages are whole."""
    return spec.state_bytes(-(-tokens // PAGE_TOKENS) * PAGE_TOKENS)


@torch.inference_mode()
def logprobs(model, ids):
    hidden, _ = model(torch.tensor(ids), [0, len(ids)])
    return model.logits(hidden).log_softmax(-1)


def post(server, **fields):
    response = server.http.post("/v1/compare", json={**FIELDS, **fields})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("baseline", ["dense", "reduced"])
def test_the_figures_are_those_of_the_checkpoints(server, models, baseline):
    other = "reduced" if baseline == "dense" else "dense"
    answer = post(server, baseline=baseline)
    assert answer["object"] == "compare" and answer["baseline"] == baseline and answer["parallel"] is False
    assert [r["variant"] for r in answer["results"]] == [baseline, other]
    prompt = byte_tokenizer().encode(PROMPT).ids
    tokens = {name: greedy(model, prompt, 40) for name, model in models.items()}
    for result in answer["results"]:
        name = result["variant"]
        assert result["text"] == byte_tokenizer().decode(tokens[name])
        assert result["usage"]["prompt_tokens_details"]["cached_tokens"] <= len(prompt)
        assert {k: v for k, v in result["usage"].items() if k != "prompt_tokens_details"} == {
            "prompt_tokens": len(prompt),
            "completion_tokens": 40,
            "total_tokens": len(prompt) + 40,
        }
        assert result["lowkey"]["variant"] == name and result["finish_reason"] == "length"
        own = logprobs(models[name], prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])
        assert result["prompt_perplexity"] == pytest.approx(math.exp(-own.mean()), rel=1e-4)
    assert answer["results"][0]["against_baseline"] is None
    # Teacher forced: both models on the prompt and the baseline's own completion.
    ids = prompt + tokens[baseline]
    p, q = (logprobs(models[name], ids)[len(prompt) - 1 : -1] for name in (baseline, other))
    against = answer["results"][1]["against_baseline"]
    assert against["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), abs=1e-3)
    assert against["mean_kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-4)
    assert against["agree"] == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert answer["results"][0]["tokens"] == [byte_tokenizer().decode([t]) for t in tokens[baseline]]
    agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert 0 < agreement < 1, "tells nothing"
    assert against["top1_agreement"] == pytest.approx(agreement)
    divergence = next(i for i, (a, b) in enumerate(zip(*tokens.values(), strict=True)) if a != b)
    assert against["first_divergence"] == divergence
    held = {name: state_bytes(models[name].spec, len(ids) - 1) for name in models}
    assert against["state_bytes_ratio"] == pytest.approx(held[other] / held[baseline])
    speeds = [r["lowkey"]["tokens_per_second"] for r in answer["results"]]
    assert against["tokens_per_second_ratio"] == pytest.approx(speeds[1] / speeds[0])


def test_parallel_gives_no_speed_ratio(server):
    serial, parallel = post(server), post(server, parallel=True)
    assert parallel["parallel"] is True
    assert parallel["results"][1]["against_baseline"]["tokens_per_second_ratio"] is None
    for a, b in zip(serial["results"], parallel["results"], strict=True):
        assert a["text"] == b["text"]
        assert b["prompt_perplexity"] == pytest.approx(a["prompt_perplexity"], rel=1e-4)


def test_one_seed_for_all(server):
    fields = {"temperature": 1.0, "max_tokens": 12}
    answers = [post(server, **fields, seed=4), post(server, **fields, seed=4), post(server, **fields)]
    texts = [[r["text"] for r in a["results"]] for a in answers]
    assert texts[0] == texts[1] != texts[2]


def events(server, **fields):
    """All events of a streamed comparison but the last, [DONE]."""
    with server.http.stream("POST", "/v1/compare", json={**FIELDS, "stream": True, **fields}) as response:
        text = response.read().decode()
        assert response.status_code == 200, text
    *blocks, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


@pytest.mark.parametrize("parallel", [False, True])
def test_a_stream_has_the_pieces_of_each_variant_then_the_whole_answer(server, parallel):
    whole = post(server, parallel=parallel)
    *pieces, answer = events(server, parallel=parallel)
    assert set(answer) == set(whole) and answer["object"] == "compare" and answer["parallel"] is parallel
    for one, other in zip(answer["results"], whole["results"], strict=True):
        name = one["variant"]
        assert one["text"] == other["text"] and set(one) == set(other)
        own = [event for event in pieces if event["variant"] == name]
        assert [event["object"] for event in own] == ["compare.chunk"] * (len(own) - 1) + ["compare.end"]
        assert "".join(event["text"] for event in own[:-1]) == one["text"]
        counts = [event["usage"]["completion_tokens"] for event in own]
        assert counts == sorted(counts) and counts[-1] == 40
        assert own[-1]["lowkey"] == one["lowkey"] and own[-1]["finish_reason"] == "length"
        assert own[0]["lowkey"]["ttft_s"] > 0
    if not parallel:
        order = [event["variant"] for event in pieces]
        assert sum(a != b for a, b in itertools.pairwise(order)) == 1, "one after the other"


def test_in_parallel_no_variant_waits_for_another(server):
    """With one engine held, the other one's answer comes to its end; then the held one's comes."""
    held = server.engines()["reduced"]
    fields = {**FIELDS, "max_tokens": 12, "stream": True, "parallel": True}
    for _ in range(2):  # the variants take turns in going first
        order = []
        with suspended(held), server.http.stream("POST", "/v1/compare", json=fields) as response:
            for line in response.iter_lines():
                event = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
                if event.get("object", "").startswith("compare."):
                    order.append((event["variant"], event["object"]))
                if order[-1:] == [("dense", "compare.end")]:
                    held.resume()
        ends = order.index(("dense", "compare.end"))
        assert {variant for variant, _ in order[:ends]} == {"dense"}
        assert {variant for variant, _ in order[ends + 1 :]} == {"reduced"}
        assert order[-1] == ("reduced", "compare.end")


def test_a_stream_that_can_not_begin_is_an_ordinary_error(server):
    for fields, status in (({"prompt": ""}, 400), ({"variants": ["dense", "x"]}, 404)):
        response = server.http.post("/v1/compare", json={**FIELDS, "stream": True, **fields})
        assert response.status_code == status and response.json()["error"]["code"] == status


def test_leaving_a_stream_frees_everything(server):
    fields = {**FIELDS, "max_tokens": ENDLESS, "stream": True, "parallel": True}
    with httpx.Client(base_url=server.url, timeout=DEADLINE_S) as client:
        with client.stream("POST", "/v1/compare", json=fields) as response:
            next(response.iter_lines())
    for name in ("dense", "reduced"):
        server.wait_idle(name)
    assert not list(server.runtime_dir().glob("*.logprobs"))


def test_variants_and_order(server):
    answer = post(server, variants=["reduced", "dense"], max_tokens=2)
    assert answer["baseline"] == "reduced"
    assert [r["variant"] for r in answer["results"]] == ["reduced", "dense"]


def test_a_prompt_of_one_token_has_no_perplexity(server):
    answer = post(server, prompt=[5], max_tokens=3)
    assert [r["prompt_perplexity"] for r in answer["results"]] == [None, None]
    assert answer["results"][1]["against_baseline"]["mean_kl"] >= 0


def test_completions_that_stop_at_once(server):
    first = post(server, max_tokens=1)["results"][0]["text"]
    answer = post(server, stop=first)
    assert answer["results"][0]["text"] == "" and answer["results"][0]["finish_reason"] == "stop"
    assert answer["results"][0]["usage"]["completion_tokens"] == 1
    assert answer["results"][1]["against_baseline"]["mean_kl"] > 0


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"variants": ["dense"]}, 400, "variants"),
        ({"variants": ["dense", "dense"]}, 400, "variants"),
        ({"variants": ["dense", "reduced", "dense"]}, 400, "variants"),
        ({"variants": ["dense", "gpt-4"]}, 404, "variants"),
        ({"variants": [1, 2]}, 400, "variants"),
        ({"variants": "dense"}, 400, "variants"),
        ({"baseline": "gpt-4"}, 404, "baseline"),
        ({"baseline": 5}, 400, "baseline"),
        ({"parallel": "yes"}, 400, "parallel"),
        ({"stream": "yes"}, 400, "stream"),
        ({"prompt": ""}, 400, "prompt"),
        ({"max_tokens": 10**9}, 400, "max_tokens"),
        ({"n": 2}, 400, "n"),
        ({"temperature": 3}, 400, "temperature"),
    ],
    ids=str,
)
def test_errors(server, fields, status, param):
    response = server.http.post("/v1/compare", json={**FIELDS, **fields})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param and error["code"] == status


def test_comparisons_leave_nothing_in_shared_memory(server):
    post(server, max_tokens=3)
    directory = server.runtime_dir()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert not list(directory.glob("*.logprobs"))
    assert list(directory.iterdir())


def test_models(server, checkpoints, models):
    listed = server.http.get("/v1/models").json()
    assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == ["dense", "reduced"]
    for model, d_k in zip(listed["data"], (32, 16), strict=True):
        name = model["id"]
        assert server.http.get(f"/v1/models/{name}").json() == model
        assert model["object"] == "model" and model["max_model_len"] == models[name].spec.context_length
        lowkey = model["lowkey"]
        assert (
            lowkey["status"] == "up" and lowkey["source"] == str(checkpoints[name]) and lowkey["d_k"] == d_k
        )
        assert lowkey["context_length"] == models[name].spec.context_length
        # What one request really holds, in tensors.
        pool = StatePool(models[name].spec, 1, pages=1)
        held = sum(t.nbytes for t in pool.tensors(0, 0).values())
        assert lowkey["state_bytes"] == held == models[name].spec.state_bytes(0)
        told = server.complete(model=name, max_tokens=1)["lowkey"]
        assert told["state_bytes"] == held + pool.bytes_per_page and told["kv_bytes"] == pool.bytes_per_page


def test_probes(server):
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/ready").json() == {"status": "ready"}
    assert server.http.get("/ready", params={"variant": "reduced"}).status_code == 200
    missing = server.http.get("/ready", params={"variant": "gpt-4"})
    assert missing.status_code == 404 and missing.json()["error"]["param"] == "variant"
    assert server.http.get("/version").json()["version"]
    paths = server.http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/compare", "/v1/models", "/metrics", "/ready"} <= set(paths)
    assert server.http.get("/docs", follow_redirects=True).json()["info"]["title"] == "Lowkey"
