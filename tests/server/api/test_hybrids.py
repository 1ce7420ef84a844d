"""What the API says and keeps of models with softmax attention, whose states grow with their tokens."""

import json
import struct

import numpy as np
import pytest
from checkpoints import byte_tokenizer
from safetensors.numpy import load
from safetensors.numpy import save as safetensors_bytes
from scripted import CONTEXT, CONV_BYTES, D_K, KV_NAMES, KV_SHAPE, PAGE_BYTES, SCRIPTS, scripted_api

from modeling.state import PAGE_TOKENS as MODEL_PAGE_TOKENS
from server.api.states.schemas import State
from server.wire.messages import PAGE_TOKENS, layout_after

TOKENIZER = byte_tokenizer()
FIXED = {name: d_k * 24 * 4 for name, d_k in D_K.items()}
"""Bytes of the states of linear layers."""
PER_TOKEN = 2 * 2 * 8 * 4
"""Bytes of a token's keys and values."""


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "states"


@pytest.fixture
def api(tmp_path, directory, monkeypatch):
    with scripted_api(tmp_path, monkeypatch, hybrid=True, state_dir=directory) as client:
        for script in SCRIPTS.values():
            script.seen.clear()
            monkeypatch.setattr(script, "pages", None)
        yield client


def complete(api, status=200, **fields):
    body = {"model": "dense", "prompt": [5] * 60, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    answer = api.post("/v1/completions", json={**body, **fields})
    assert answer.status_code == status, answer.text
    return answer


def sizes(lowkey):
    return [lowkey[key] for key in ("state_bytes", "recurrent_bytes", "conv_bytes", "kv_bytes")]


def expected(pages, variant="dense", choices=1):
    parts = [FIXED[variant] - CONV_BYTES, CONV_BYTES, pages * PAGE_BYTES]
    return [choices * size for size in (sum(parts), *parts)]


def test_a_page_has_as_many_tokens_everywhere():
    assert PAGE_TOKENS == MODEL_PAGE_TOKENS


def test_only_the_dimension_of_tokens_is_filled_in():
    # A short convolution of one token has no last inputs: its tensor is empty, and stays so.
    layout = {"keys": ("F32", [0, 2, 8]), "conv": ("F32", [96, 0]), "recurrent": ("F32", [1, 4, 4])}
    assert layout_after(layout, 9) == {**layout, "keys": ("F32", [9, 2, 8])}


def test_state_bytes_are_what_the_request_held_at_its_end(api, monkeypatch):
    # After 60 tokens and 4 more the last one has not been fed: 63 tokens, one page.
    answer = complete(api)
    assert sizes(answer.json()["lowkey"]) == expected(1)
    assert answer.headers["x-lowkey-state-bytes"] == str(expected(1)[0])
    assert sizes(complete(api, max_tokens=6).json()["lowkey"]) == expected(2)
    assert sizes(complete(api, model="reduced", max_tokens=6).json()["lowkey"]) == expected(2, "reduced")
    # It is the engine that says so.
    monkeypatch.setattr(SCRIPTS["dense"], "pages", 7)
    assert sizes(complete(api).json()["lowkey"]) == expected(7)
    assert sizes(complete(api, n=3, temperature=1).json()["lowkey"]) == expected(7, choices=3)


def test_what_the_engine_did_not_end_is_counted_by_its_tokens(api, monkeypatch):
    monkeypatch.setattr(SCRIPTS["dense"], "pages", 7)
    for written, pages in ((63, 1), (64, 2)):
        ids = TOKENIZER.encode("a" * written + "b" + "c" * 60).ids
        monkeypatch.setattr(SCRIPTS["dense"], "queue", [ids])
        stopped = complete(api, prompt=[5], max_tokens=100, stop="b").json()
        assert stopped["usage"]["completion_tokens"] == written + 1
        assert sizes(stopped["lowkey"]) == expected(pages), "the prompt and all but the last one were fed"
    only_prompt = complete(api, prompt=[5] * 129, max_tokens=0, echo=True).json()
    assert sizes(only_prompt["lowkey"]) == expected(3)


def test_a_stream_says_it_last(api):
    answer = complete(api, stream=True, max_tokens=70)
    *_, last, done = [line[6:] for line in answer.text.splitlines() if line]
    assert done == "[DONE]"
    assert sizes(json.loads(last)["lowkey"]) == expected(3)


def test_metrics_have_each_requests_own_bytes(api):
    def observed(name):
        lines = api.get("/metrics").text.splitlines()
        (line,) = (x for x in lines if x.startswith(f'lowkey_request_state_bytes_{name}{{variant="dense"}}'))
        return float(line.rpartition(" ")[2])

    before = observed("sum"), observed("count")
    complete(api, max_tokens=70)
    assert (observed("sum") - before[0], observed("count") - before[1]) == (expected(3)[0], 1)


def test_models_say_what_tokens_cost(api):
    told = api.get("/v1/models/dense").json()["lowkey"]
    assert (told["state_bytes"], told["conv_bytes"]) == (FIXED["dense"], CONV_BYTES)
    assert (told["kv_bytes_per_token"], told["kv_bytes_per_page"]) == (PER_TOKEN, PAGE_BYTES)
    assert (told["slots"], told["pages"], told["context_length"]) == (4, CONTEXT // 64, CONTEXT)
    summary = api.get("/v1/ab/summary").json()["variants"]["dense"]
    assert summary == {**summary, "state_bytes": FIXED["dense"], "kv_bytes_per_token": PER_TOKEN}
    assert (summary["slots"], summary["pages"]) == (4, CONTEXT // 64)


def test_a_comparison_is_of_what_both_held(api, monkeypatch):
    monkeypatch.setattr(SCRIPTS["reduced"], "pages", 5)
    body = {"prompt": [5] * 60, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    answer = api.post("/v1/compare", json=body).json()
    base, other = (result["lowkey"] for result in answer["results"])
    assert (sizes(base), sizes(other)) == (expected(2), expected(5, "reduced"))
    ratio = answer["results"][1]["against_baseline"]["state_bytes_ratio"]
    assert ratio == pytest.approx(expected(5, "reduced")[0] / expected(2)[0])


def save(api, tokens=9, status=200, **fields):
    answer = api.post("/v1/states", json={"model": "dense", "prompt": [5] * tokens, **fields})
    assert answer.status_code == status, answer.text
    if status == 200:
        State.model_validate(answer.json(), extra="forbid")
    return answer.json()


def content(api, state):
    return api.get(f"/v1/states/{state['id']}/content").content


def upload(api, data, status, *mentions):
    answer = api.post("/v1/states/import", content=data)
    assert answer.status_code == status, answer.text
    for mention in mentions:
        assert mention in answer.json()["error"]["message"], answer.text
    return answer.json()


def test_a_saved_state_grows_with_its_tokens(api):
    short, long = save(api, 9), save(api, 109)
    assert abs(long["bytes"] - short["bytes"] - 100 * PER_TOKEN) < 64, "the headers differ by a few digits"
    for state, tokens in ((short, 9), (long, 109)):
        data = content(api, state)
        assert load(data)[KV_NAMES[0]].shape == (tokens, *KV_SHAPE)
        assert upload(api, data, 200)["tokens"] == tokens
        complete(api, state_id=state["id"], prompt=[5])
        assert SCRIPTS["dense"].seen[-1].state_tokens == tokens


def test_going_on_holds_the_tokens_of_the_state(api):
    state = save(api, 100)
    answer = complete(api, state_id=state["id"], prompt=[5] * 29, max_tokens=1).json()
    assert sizes(answer["lowkey"]) == expected(3)
    assert answer["usage"]["prompt_tokens"] == 129
    assert complete(api, prompt=[5]).json()["usage"]["prompt_tokens"] == 1
    assert SCRIPTS["dense"].seen[-1].state_tokens == 0
    # Prompt and completion have the rest of the context.
    complete(api, 400, state_id=state["id"], prompt=[5], max_tokens=CONTEXT - 100)
    complete(api, state_id=state["id"], prompt=[5], max_tokens=CONTEXT - 101)


def changed(data, tokens=None, shape=None, **tensors):
    """The file with other metadata, with another shape for the keys in its header, or with other tensors."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = header["__metadata__"]
    if tensors:
        return safetensors_bytes({**load(data), **tensors}, metadata=metadata)
    if tokens is not None:
        metadata["tokens"] = str(tokens)
    if shape is not None:
        header[KV_NAMES[0]]["shape"] = shape
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def test_an_import_must_have_the_tokens_that_it_names(api, directory):
    data = content(api, save(api, 9))

    def rows(count):
        return np.zeros((count, *KV_SHAPE), np.float32)

    upload(api, changed(data), 200)
    upload(api, changed(data, tokens=8), 400, "layers.1.keys is F32 [9, 2, 8] there and F32 [8, 2, 8] here")
    upload(api, changed(data, tokens=10), 400, "F32 [10, 2, 8] here")
    upload(api, changed(data, tokens=9_999_999_999), 400, "other tensors")
    upload(api, changed(data, tokens=0), 400, "tokens")
    upload(api, changed(data, tokens=-9), 400, "tokens")
    upload(api, changed(data, shape=[9, 8, 2]), 400, "[9, 8, 2] there")
    upload(api, changed(data, shape=[9, 16]), 400, "[9, 16] there")
    upload(api, changed(data, shape=[0, 2, 8]), 400, "[0, 2, 8] there")
    upload(api, changed(data, shape=[1, 9, 2, 8]), 400, "[1, 9, 2, 8] there")
    upload(api, changed(data, **{KV_NAMES[1]: rows(10)}), 400, "layers.1.values")
    upload(api, changed(data, **{KV_NAMES[1]: rows(0)}), 400, "layers.1.values")
    upload(api, changed(data, **{KV_NAMES[1]: rows(9).astype(np.float16)}), 400, "F16")
    upload(api, changed(data, **{"layers.2.keys": rows(9)}), 400, "layers.2.keys", "missing here")
    assert len(list(directory.iterdir())) == 2

    fits = {name: rows(CONTEXT - 1) for name in KV_NAMES}
    too_long = {name: rows(CONTEXT) for name in KV_NAMES}
    assert upload(api, changed(changed(data, tokens=CONTEXT - 1), **fits), 200)["tokens"] == CONTEXT - 1
    upload(api, changed(changed(data, tokens=CONTEXT), **too_long), 400, f"{CONTEXT} tokens, which fill")


def test_a_state_that_would_be_over_the_budget_is_not_even_made(tmp_path, directory, monkeypatch):
    budget = FIXED["dense"] + 100 * PER_TOKEN
    with scripted_api(
        tmp_path, monkeypatch, hybrid=True, state_dir=directory, state_budget_bytes=budget
    ) as api:
        SCRIPTS["dense"].seen.clear()
        said = save(api, 101, status=413)["error"]["message"]
        assert f"a state of {budget + PER_TOKEN} bytes" in said and not SCRIPTS["dense"].seen
        save(api, 90)
