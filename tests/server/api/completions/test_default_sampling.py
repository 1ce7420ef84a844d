"""Sampling that a request says nothing of is the checkpoint's own, unless a setting turns that off."""

import json

import pytest
from scripted import SCRIPTS, scripted_api

GENERATION = {
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "max_new_tokens": 3,
    "eos_token_id": 0,
}
OWN = {name: GENERATION[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
BODIES = {
    "/v1/completions": {"model": "dense", "prompt": "Hi", "max_tokens": 5},
    "/v1/chat/completions": {
        "model": "dense",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 5,
    },
}


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The API, where the dense variant's checkpoint names its sampling."""

    def serve(config=GENERATION, **settings):
        (tmp_path / "states").mkdir(exist_ok=True)
        with scripted_api(tmp_path, monkeypatch) as client:
            client.get("/health")
        (tmp_path / "dense" / "generation_config.json").write_text(json.dumps(config))
        SCRIPTS["dense"].seen.clear()
        return scripted_api(tmp_path, monkeypatch, state_dir=tmp_path / "states", **settings)

    return serve


def sampled(api, path, **fields):
    response = api.post(path, json={**BODIES[path], **fields})
    assert response.status_code == 200, response.text
    how = SCRIPTS["dense"].seen[-1].sampling
    return {name: getattr(how, name) for name in PLAIN}


@pytest.mark.parametrize("path", BODIES)
def test_a_silent_request_is_sampled_as_the_checkpoint_says(served, path):
    with served() as api:
        assert sampled(api, path) == OWN
        assert sampled(api, path, temperature=None, top_k=None) == OWN, "null says nothing"
        said = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
        assert sampled(api, path, **said) == PLAIN, "also where it says what is the API's default"
        assert sampled(api, path, temperature=0) == {**OWN, "temperature": 0}
        assert SCRIPTS["dense"].seen[-1].max_tokens == 5
        model = api.get("/v1/models/dense").json()["lowkey"]
        assert model["default_sampling"] == OWN
        assert api.get("/v1/models/reduced").json()["lowkey"]["default_sampling"] == {}


@pytest.mark.parametrize("path", BODIES)
def test_a_setting_turns_it_off(served, path):
    with served(generation_config="none") as api:
        assert sampled(api, path) == PLAIN
        assert api.get("/v1/models/dense").json()["lowkey"]["default_sampling"] == {}


def test_a_comparison_is_sampled_as_it_says_itself(served):
    with served() as api:
        response = api.post("/v1/compare", json={"prompt": "Hi", "max_tokens": 3})
        assert response.status_code == 200, response.text
        how = next(m for m in SCRIPTS["dense"].seen if hasattr(m, "sampling")).sampling
        assert {name: getattr(how, name) for name in PLAIN} == PLAIN


def test_a_saved_state_has_no_tokens_to_punish(served):
    with served() as api:
        state = api.post("/v1/states", json={"model": "dense", "prompt": "Hi"}).json()
        assert sampled(api, "/v1/completions", state_id=state["id"]) == {**OWN, "repetition_penalty": 1.0}


def test_what_is_wrong_with_the_file_is_in_the_log(served, caplog):
    with served({"temperature": "hot", "top_k": 7}) as api:
        assert sampled(api, "/v1/completions") == {**PLAIN, "top_k": 7}
    assert "dense: " in caplog.text and "temperature is left out: 'hot'" in caplog.text
