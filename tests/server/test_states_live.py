"""Saved states of real engines, over HTTP."""

import pytest
from live_server import LiveServer


@pytest.fixture(scope="module")
def live(arguments, tmp_path_factory):
    directory = tmp_path_factory.mktemp("live")
    server = LiveServer(directory / "log", *arguments, LOWKEY_STATE_DIR=str(directory / "states"))
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.mark.parametrize("model", ["dense", "reduced"])
def test_a_real_engine_goes_on_from_a_state(live, model):
    prompt = "x" * 70 + "Once upon"
    state = live.http.post("/v1/states", json={"model": model, "prompt": prompt}).json()
    info = live.http.get(f"/v1/models/{model}").json()["lowkey"]
    assert state["tokens"] == 79 and 0 < state["bytes"] - info["state_bytes"] < 4096
    fields = dict(model=model, max_tokens=40, seed=3, logprobs=1)
    whole = live.complete(**fields, prompt=prompt + " a time")["choices"][0]
    rest = live.complete(**fields, prompt=" a time", state_id=state["id"])["choices"][0]
    assert rest["text"] == whole["text"]
    pairs = zip(rest["logprobs"]["token_logprobs"], whole["logprobs"]["token_logprobs"], strict=True)
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in pairs)
    data = live.http.get(f"/v1/states/{state['id']}/content").content
    again = live.http.post("/v1/states/import", content=data).json()
    assert again["variant"] == model
    assert (
        live.complete(**fields, prompt=" a time", state_id=again["id"])["choices"][0]["text"] == rest["text"]
    )
    other = "reduced" if model == "dense" else "dense"
    answer = live.http.post(
        "/v1/completions", json={**fields, "model": other, "prompt": "x", "state_id": state["id"]}
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (409, "state_id")
    assert f"'{model}'" in error["message"] and f"'{other}'" in error["message"]
    live.wait_idle(model)


@pytest.mark.slow
def test_a_replica_that_shares_the_directory_goes_on_from_a_state(live, checkpoints, tmp_path):
    fields = dict(model="dense", max_tokens=20, seed=3)
    state = live.http.post("/v1/states", json={"model": "dense", "prompt": "Once upon"}).json()
    expected = live.complete(**fields, prompt=" a time", state_id=state["id"])["choices"]
    directory = live.log.parent / "states"
    replica = LiveServer(tmp_path / "log", f"dense={checkpoints['dense']}", LOWKEY_STATE_DIR=str(directory))
    try:
        replica.wait_ready()
        assert replica.complete(**fields, prompt=" a time", state_id=state["id"])["choices"] == expected
        assert replica.http.get(f"/v1/states/{state['id']}").json()["id"] == state["id"]
    finally:
        replica.stop()
