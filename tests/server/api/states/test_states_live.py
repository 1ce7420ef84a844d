"""Saved states of real engines, over HTTP."""

import contextlib
import json
import resource
import struct

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
    expected = info["state_bytes"] + 79 * info["kv_bytes_per_token"]
    assert state["tokens"] == 79 and 0 < state["bytes"] - expected < 4096
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


def header_of(data):
    length = struct.unpack("<Q", data[:8])[0]
    return data[8 : 8 + length].decode().rstrip(), data[8 + length :]


def test_what_an_engine_could_not_read_is_refused_when_it_comes(live):
    """Python takes more for JSON than the engines' library does."""
    made = live.http.post("/v1/states", json={"model": "dense", "prompt": "Once upon"}).json()
    text, tensors = header_of(live.http.get(f"/v1/states/{made['id']}/content").content)
    before = live.http.get("/v1/states").json()
    name, entry = next((k, v) for k, v in json.loads(text).items() if k != "__metadata__")
    shape, offsets = json.dumps(entry["shape"]), '"data_offsets":[0,'
    compact = json.dumps(json.loads(text), separators=(",", ":"))
    assert compact.count(offsets) == 1 and '"__metadata__":{' in compact
    headers = {
        "UTF-16": text.encode("utf-16"),
        "UTF-16 without a mark": text.encode("utf-16-le"),
        "UTF-32": text.encode("utf-32"),
        "a byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "Latin-1": compact.replace('"__metadata__":{', '"__metadata__":{"n":"\xe9",').encode("latin-1"),
        "half a surrogate pair": compact.replace(
            '"__metadata__":{', '"__metadata__":{"n":"\\ud800",'
        ).encode(),
        "half a pair as a key": compact.replace(
            '"__metadata__":{', '"__metadata__":{"\\udfff":"n",'
        ).encode(),
        "NaN": compact.replace(offsets, '"more":NaN,' + offsets).encode(),
        "Infinity": compact.replace(offsets, '"more":-Infinity,' + offsets).encode(),
        "minus zero": compact.replace(offsets, '"data_offsets":[-0,').encode(),
        "a key twice": compact.replace(offsets, '"dtype":"F32",' + offsets).encode(),
        "a dtype of another case": compact.replace('"F32"', '"f32"').encode(),
        "a boolean in a shape": compact.replace(shape.replace(" ", ""), "[true,4]").encode(),
        "another size than its shape": compact.replace(f'"{name}":', f'"{name}x":').encode(),
    }
    for what, header in headers.items():
        assert header != text.encode() and header != compact.encode(), what
        body = struct.pack("<Q", len(header)) + header + tensors
        answer = live.http.post("/v1/states/import", content=body)
        assert answer.status_code == 400, (what, answer.text)
        assert answer.json()["error"]["message"].startswith("the body "), answer.text
    assert live.http.get("/v1/states").json() == before, "nothing stays"
    good = compact.encode()
    answer = live.http.post("/v1/states/import", content=struct.pack("<Q", len(good)) + good + tensors)
    assert answer.status_code == 200, answer.text
    assert live.complete(model="dense", prompt=" a time", state_id=answer.json()["id"], max_tokens=2)


@contextlib.contextmanager
def full_disk(server):
    """No process of the server can write to a file in this block."""
    processes = [server.process.pid, *(engine.pid for engine in server.engines().values())]
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in processes}
    for pid, (_, hard) in limits.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        for pid, limit in limits.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)


def test_a_state_is_there_to_go_on_from_while_the_disk_is_full(checkpoints, tmp_path):
    server = LiveServer(
        tmp_path / "log", f"dense={checkpoints['dense']}", LOWKEY_STATE_DIR=str(tmp_path / "states")
    )
    try:
        server.wait_ready()
        body = {"model": "dense", "prompt": "Once upon"}
        state = server.http.post("/v1/states", json=body).json()
        with full_disk(server):
            assert server.http.post("/v1/states", json=body).status_code == 503, "it is full"
            fields = dict(prompt=" a time", max_tokens=4, seed=3)
            rest = server.complete(**fields, state_id=state["id"])["choices"][0]
        whole = server.complete(**{**fields, "prompt": "Once upon a time"})["choices"][0]
        assert rest["text"] == whole["text"]
    finally:
        server.stop()


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
