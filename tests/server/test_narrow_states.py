"""One checkpoint with states in float32 and in int8, side by side over HTTP: what is told of them, and that they are
never taken for each other's."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from live_server import LiveServer, poll
from safetensors.torch import load, save

from modeling.checkpoint import open_checkpoint
from modeling.spec import StateTypes
from modeling.state import PAGE_TOKENS

CONFIG = """
batch_invariant = true
state_dir = "states"
max_requests = 6

[variants]
full = "{dense}"

[variants.narrow]
source = "{dense}"
state_dtype = "int8"

[[shadow]]
from = "full"
to = "narrow"
fraction = 1.0
"""
DTYPES = {"full": "float32", "narrow": "int8"}
PROMPT = "Once upon a time " * 8
"""136 tokens, two whole blocks among them."""


@pytest.fixture(scope="module")
def lab(checkpoints, tmp_path_factory):
    directory = tmp_path_factory.mktemp("narrow")
    (directory / "lowkey.toml").write_text(CONFIG.format(**checkpoints))
    server = LiveServer(directory / "log", "--config", "lowkey.toml")
    try:
        yield server.wait_ready("full", "narrow")
    finally:
        server.stop()


@pytest.fixture(scope="module")
def held(checkpoints):
    """Bytes of a request's state, by variant and tokens: those of its pages, which a hybrid has besides its slot."""
    spec = open_checkpoint(checkpoints["dense"]).spec
    types = {name: StateTypes.named(state_dtype, torch.float32) for name, state_dtype in DTYPES.items()}
    return lambda name, tokens=0: spec.state_bytes(tokens, types[name])


def test_every_place_tells_the_same_bytes(lab, held):
    samples = lab.samples()
    for name, state_dtype in DTYPES.items():
        told = lab.http.get(f"/v1/models/{name}").json()["lowkey"]
        assert (told["state_dtype"], told["state_bytes"]) == (state_dtype, held(name))
        assert told["memory"]["states"] == (told["slots"] + 1) * held(name)
        body = {"model": name, "prompt": "Once", "max_tokens": 2, "n": 2}
        answer = lab.http.post("/v1/completions", json=body)
        block = answer.json()["lowkey"]
        assert (block["state_dtype"], block["state_bytes"]) == (state_dtype, 2 * held(name, PAGE_TOKENS))
        assert answer.headers["x-lowkey-state-bytes"] == str(2 * held(name, PAGE_TOKENS))
        assert lab.sample("lowkey_state_bytes_per_request", variant=name) == held(name)
        pool = [
            value
            for (metric, labels), value in samples.items()
            if metric == "lowkey_state_pool_bytes" and ("variant", name) in labels
        ]
        assert sum(pool) == told["slots"] * held(name)
        (info,) = (
            dict(labels)
            for metric, labels in samples
            if metric == "lowkey_variant_info" and ("variant", name) in labels
        )
        assert info["state_dtype"] == state_dtype
    assert held("narrow") < held("full") / 2.5


def test_int8_completions_are_the_same_whatever_else_runs(lab):
    fields = dict(model="narrow", max_tokens=40, temperature=1.0, logprobs=2)

    def choices(seed, **more):
        answer = lab.complete(**fields, **more, prompt=PROMPT, seed=seed)
        cached.append(answer["lowkey"]["cached_tokens"])
        return [(c["text"], c["logprobs"]) for c in answer["choices"]]

    cached = []
    alone = [choices(seed) for seed in range(5)]
    assert choices(0, cache_salt="its own: nothing is cached") == alone[0]
    assert cached[1:] == [128] * 4 + [0]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda seed: choices(seed, n=2), range(5)))
    assert [both[0] for both in together] == [one for (one,) in alone]
    assert all(first != second for first, second in together)


def saved(lab, model, prompt):
    response = lab.http.post("/v1/states", json={"model": model, "prompt": prompt})
    assert response.status_code == 200, response.text
    return response.json()["id"]


def content(lab, state_id):
    return lab.http.get(f"/v1/states/{state_id}/content").content


def imported(lab, data, **params):
    return lab.http.post("/v1/states/import", content=data, params=params)


def test_going_on_from_a_saved_int8_state_is_going_on(lab, held):
    fields = dict(model="narrow", max_tokens=40, temperature=1.0, seed=3)
    whole = lab.complete(**fields, prompt=PROMPT)
    state_id = saved(lab, "narrow", PROMPT[:128])
    data = content(lab, state_id)
    assert 0 < len(data) - held("narrow", 128) < 4096
    again = imported(lab, data).json()
    assert again["variant"] == "narrow"
    for each in (state_id, again["id"]):
        rest = lab.complete(**fields, prompt=PROMPT[128:], state_id=each, n=2)
        assert rest["choices"][0]["text"] == whole["choices"][0]["text"]


@pytest.mark.parametrize("mine", DTYPES)
def test_a_state_of_another_dtype_is_a_409_both_ways(lab, mine):
    (other,) = DTYPES.keys() - {mine}
    state_id = saved(lab, mine, "Once upon")
    body = {"model": other, "prompt": " a time", "state_id": state_id}
    for answer in (
        imported(lab, content(lab, state_id), model=other),
        lab.http.post("/v1/completions", json=body),
    ):
        message = answer.json()["error"]["message"]
        assert answer.status_code == 409, message
        assert f"state dtype (state_dtype) '{DTYPES[mine]}' there, '{DTYPES[other]}' here" in message


def uploaded(lab, change):
    """The answer to the import of a state in int8 that has been changed."""
    data = content(lab, saved(lab, "narrow", "Once upon"))
    tensors = load(data)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    change(tensors)
    return imported(lab, save(tensors, metadata))


def drop(tensors):
    del tensors["layers.1.scales"]


def add(tensors):
    tensors["layers.9.scales"] = tensors["layers.1.scales"].clone()


def in_bfloat16(tensors):
    tensors["layers.1.scales"] = tensors["layers.1.scales"].bfloat16()


def per_key_channel(tensors):
    tensors["layers.1.scales"] = torch.ones(4, 32)


def in_float32(tensors):
    tensors["layers.0.recurrent"] = tensors["layers.0.recurrent"].float()


@pytest.mark.parametrize("change", [drop, add, in_bfloat16, per_key_channel, in_float32])
def test_an_upload_with_other_scales_is_refused(lab, change):
    answer = uploaded(lab, change)
    assert answer.status_code == 400
    assert "has other tensors than variant 'narrow' keeps" in answer.json()["error"]["message"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_upload_with_scales_that_are_no_numbers_harms_its_own_requests_only(lab, value):
    answer = uploaded(lab, lambda tensors: tensors["layers.2.scales"].fill_(value))
    assert answer.status_code == 200, answer.text
    fields = dict(model="narrow", prompt=" a time", max_tokens=20, temperature=0)
    expected = lab.complete(**fields)["choices"]
    with ThreadPoolExecutor(3) as threads:
        body = {**fields, "state_id": answer.json()["id"]}
        odd = threads.submit(lab.http.post, "/v1/completions", json=body)
        beside = [threads.submit(lab.complete, **fields) for _ in range(2)]
        assert odd.result().status_code == 500 and "NaN or Inf" in odd.result().text
        assert all(each.result()["choices"] == expected for each in beside)
    assert lab.complete(**fields)["choices"] == expected
    assert lab.sample("lowkey_engine_restarts_total", variant="narrow", engine="0") == 0


def test_both_are_compared_and_one_is_the_others_shadow(lab, held):
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "baseline": "full"}
    _, narrow = lab.http.post("/v1/compare", json=body).json()["results"]
    against = narrow["against_baseline"]
    pages = 3 * PAGE_TOKENS  # of a prompt of 136 tokens and twelve more
    assert against["state_bytes_ratio"] == pytest.approx(held("narrow", pages) / held("full", pages))
    assert 0 < against["mean_kl"] < 0.1
    lab.complete(model="full", prompt="Hi", max_tokens=4)
    labels = dict(variant="narrow", baseline="full", outcome="scored")
    poll(lambda: lab.sample("lowkey_shadow_requests_total", **labels), "a shadow was scored")
    summary = lab.http.get("/v1/ab/summary").json()
    assert {name: v["state_dtype"] for name, v in summary["variants"].items()} == DTYPES
