"""Saved states: made, used, shared, exported and imported; refused where they don't fit, gone when they should be."""

import json
import os
import struct
import time
from types import SimpleNamespace

import pytest
from checkpoints import byte_tokenizer
from live_server import poll
from scripted import CONTEXT, SCRIPTS, scripted_api, state_in

from server.api.http import auth
from server.api.states.schemas import State
from server.api.states.store import (
    FORMAT,
    MAX_HEADER_BYTES,
    StateFileError,
    StateStore,
    header_length,
    parse_header,
    weights_sha256,
)
from server.settings import ConfigurationError

TOKENIZER = byte_tokenizer()
ODD_IDS = [
    "state-" + "0" * 32,
    "state-" + "0" * 31,
    "..",
    "%2e%2e%2fetc",
    "state-" + "G" * 32,
    "x" * 64,
    "state-*",
]


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "states"


@pytest.fixture
def api(tmp_path, directory, monkeypatch):
    with scripted_api(tmp_path, monkeypatch, state_dir=directory) as client:
        SCRIPTS["dense"].seen.clear()
        yield client


def save(api, **fields):
    response = api.post("/v1/states", json={"model": "dense", "prompt": "Once upon", **fields})
    assert response.status_code == 200, response.text
    State.model_validate(response.json(), extra="forbid")
    return response.json()


def complete(api, **fields):
    body = {"model": "dense", "prompt": " a time", "max_tokens": 6, "temperature": 0, **fields}
    return api.post("/v1/completions", json=body)


def refused(response, status, param, *mentions):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param and error["code"] == status
    for mention in mentions:
        assert mention in error["message"], error["message"]


def upload(api, data, **params):
    return api.post("/v1/states/import", content=data, params=params)


def test_what_a_state_says_of_itself(api, directory):
    before = time.time()
    state = save(api)
    assert state["object"] == "state" and state["variant"] == "dense" and state["tokens"] == 9
    (file,) = directory.iterdir()
    assert state["bytes"] == file.stat().st_size
    assert before + 86400 - 1 <= state["expires"] <= time.time() + 86400
    assert api.get(f"/v1/states/{state['id']}").json() == state
    assert api.get("/v1/states").json() == {"object": "list", "data": [state]}
    assert state_in(str(file)) == TOKENIZER.encode("n").ids[0]
    assert save(api, prompt=[5, 6])["tokens"] == 2
    assert [s["tokens"] for s in api.get("/v1/states").json()["data"]].count(2) == 1


def test_going_on_equals_sending_the_ids_together(api):
    state = save(api)
    whole = complete(api, prompt="Once upon a time").json()
    rest = complete(api, state_id=state["id"]).json()
    assert rest["choices"] == whole["choices"]
    assert rest["usage"] == {**whole["usage"], "prompt_tokens_details": {"cached_tokens": 9}}
    assert rest["lowkey"]["cached_tokens"] == 9
    message = SCRIPTS["dense"].seen[-1]
    assert message.token_ids == TOKENIZER.encode(" a time").ids
    assert state_in(message.state_path) == TOKENIZER.encode("n").ids[0]
    several = complete(api, state_id=state["id"], prompt=[" a time", " there"], n=2).json()
    assert [c["text"] for c in several["choices"]][:2] == [whole["choices"][0]["text"]] * 2
    stream = complete(api, state_id=state["id"], stream=True)
    assert stream.status_code == 200 and stream.text.endswith("data: [DONE]\n\n")


def test_what_a_state_is_not_good_for(api):
    state_id = save(api)["id"]
    refused(complete(api, state_id=state_id, prompt=""), 400, "prompt", "empty")
    refused(complete(api, state_id=state_id, prompt=[]), 400, "prompt", "empty")
    refused(complete(api, state_id=state_id, echo=True), 400, "echo", "state_id")
    refused(complete(api, state_id=state_id, repetition_penalty=1.5), 400, "repetition_penalty", "state_id")
    assert complete(api, state_id=state_id, repetition_penalty=1, echo=False).status_code == 200
    # The tokens that it stands for count.
    too_many = complete(api, state_id=state_id, prompt=[5], max_tokens=CONTEXT - 9)
    refused(too_many, 400, "max_tokens", str(CONTEXT), "10 ")
    assert complete(api, state_id=state_id, prompt=[5], max_tokens=CONTEXT - 10).status_code == 200


def test_a_state_of_another_variant_is_a_409_that_explains_itself(api):
    state_id = save(api)["id"]
    for stream in (False, True):
        answer = complete(api, model="reduced", state_id=state_id, stream=stream)
        refused(answer, 409, "state_id", "'dense'", "'reduced'", "d_k", "'32,32,32'", "'16,16,16'")
    assert complete(api, model="reduced", state_id=save(api, model="reduced")["id"]).status_code == 200


def test_a_state_of_other_weights_is_a_409(api, directory):
    state_id = save(api)["id"]
    (file,) = directory.iterdir()
    data = file.read_bytes()
    digest = weights_sha256(directory.parent / "dense")
    assert digest.encode() in data
    file.write_bytes(data.replace(digest.encode(), b"0" * 64))
    refused(complete(api, state_id=state_id), 409, "state_id", "weights", "0000")


@pytest.mark.parametrize("state_id", ODD_IDS)
def test_an_id_that_is_none_is_a_404_and_no_path(api, directory, state_id):
    save(api)
    (directory.parent / "secret.safetensors").write_bytes(b"x")
    if "/" not in state_id and "%2f" not in state_id and state_id != "..":
        for path in (f"/v1/states/{state_id}", f"/v1/states/{state_id}/content"):
            refused(api.get(path), 404, "state_id", "no state")
        refused(api.delete(f"/v1/states/{state_id}"), 404, "state_id")
    refused(complete(api, state_id=state_id), 404, "state_id")
    assert len(list(directory.iterdir())) == 1


def test_no_other_name_of_a_file_is_its_id(api, directory):
    state_id = save(api)["id"]
    store = api.app.state.saved_states.store
    assert store.find(state_id, "") is not None
    for other in (
        f"../{directory.name}/{state_id}",
        f"./{state_id}",
        f"{directory}/{state_id}",
        state_id + "\n",
    ):
        assert store.find(other, "") is None
        assert not store.delete(other, "")
    assert len(list(directory.iterdir())) == 1


def test_deleted_is_gone(api, directory):
    state_id = save(api)["id"]
    assert api.delete(f"/v1/states/{state_id}").json() == {"id": state_id, "object": "state", "deleted": True}
    for answer in (api.get(f"/v1/states/{state_id}"), complete(api, state_id=state_id)):
        refused(answer, 404, "state_id", state_id)
    assert not list(directory.iterdir())


def test_a_state_is_its_owners_alone(api, monkeypatch):
    mine = save(api)["id"]
    other = SimpleNamespace(name="somebody else", max_priority=0)
    monkeypatch.setattr(auth, "client_of", lambda _: other)
    refused(api.get(f"/v1/states/{mine}"), 404, "state_id")
    refused(api.get(f"/v1/states/{mine}/content"), 404, "state_id")
    refused(api.delete(f"/v1/states/{mine}"), 404, "state_id")
    refused(complete(api, state_id=mine), 404, "state_id")
    assert api.get("/v1/states").json()["data"] == []
    theirs = save(api)["id"]
    monkeypatch.undo()
    assert [s["id"] for s in api.get("/v1/states").json()["data"]] != [theirs]


def test_a_file_goes_out_and_comes_in_again(api, directory):
    state = save(api)
    answer = api.get(f"/v1/states/{state['id']}/content")
    assert answer.status_code == 200 and len(answer.content) == state["bytes"]
    assert state["id"] in answer.headers["content-disposition"]
    header = parse_header(answer.content[8 : 8 + header_length(answer.content[:8])])
    assert header.metadata["variant"] == "dense" and header.metadata["d_k"] == "32,32,32"
    again = upload(api, answer.content).json()
    assert again["id"] != state["id"] and again["tokens"] == 9 and again["variant"] == "dense"
    same = [complete(api, state_id=s).json()["choices"] for s in (state["id"], again["id"])]
    assert same[0] == same[1]
    assert upload(api, answer.content, model="dense").status_code == 200
    refused(upload(api, answer.content, model="reduced"), 409, None, "'dense'", "'reduced'", "d_k")
    refused(upload(api, answer.content, model="gpt-4"), 404, "model")


def with_header(data, **changes):
    """The file with changed metadata or tensors; None leaves an entry of the metadata out."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    for key, value in changes.items():
        if key in header:
            header[key] = value
        else:
            header["__metadata__"][key] = value
    header["__metadata__"] = {k: v for k, v in header["__metadata__"].items() if v is not None}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def test_an_upload_that_is_no_state_is_refused_and_leaves_nothing(api, directory):
    data = api.get(f"/v1/states/{save(api)['id']}/content").content
    length = struct.unpack("<Q", data[:8])[0]
    tensor = json.loads(data[8 : 8 + length])["recurrent.0"]
    bad = [
        b"",
        b"abc",
        b"\0" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b" " * 100,
        struct.pack("<Q", 4) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        data[:20],
        data[:-1],
        data + b"x",
        with_header(data, format="other"),
        with_header(data, tokens="0"),
        with_header(data, tokens="-5"),
        with_header(data, tokens="1e9"),
        with_header(data, tokens=9),
        with_header(data, tokens=str(CONTEXT)),
        with_header(data, created="soon"),
        with_header(data, variant="x" * 20_000),
        with_header(data, variant=None),
        with_header(data, variant=""),
        with_header(data, variant="\ud800"),
        with_header(data, **{"recurrent.0": {**tensor, "shape": [1, 24, 32]}}),
        with_header(data, **{"recurrent.0": {**tensor, "dtype": "I32"}}),
        with_header(data, **{"recurrent.0": {**tensor, "data_offsets": [0, 2**50]}}),
        with_header(data, **{"recurrent.0": {**tensor, "data_offsets": [-8, 3064]}}),
        with_header(data, **{"recurrent.0": {**tensor, "data_offsets": [8, 0]}}),
        with_header(data, **{"recurrent.0": {**tensor, "data_offsets": "ab"}}),
        with_header(data, **{"recurrent.0": [1]}),
    ]
    for body in bad:
        answer = upload(api, body)
        assert answer.status_code in (400, 413), (body[:120], answer.text)
        assert answer.json()["error"]["message"]
    refused(upload(api, with_header(data, model="0" * 64)), 409, None, "weights")
    refused(upload(api, with_header(data, d_k="64,64,64")), 409, None, "d_k")
    refused(upload(api, with_header(data, state_dtype="bfloat16")), 409, None, "state_dtype", "bfloat16")
    refused(upload(api, with_header(data, layout="v first")), 409, None, "layout")
    assert len(list(directory.iterdir())) == 1
    assert len(api.get("/v1/states").json()["data"]) == 1


def test_an_import_waits_for_no_variant_that_it_does_not_need(api):
    dense, reduced = (
        api.get(f"/v1/states/{save(api, model=name)['id']}/content").content for name in ("dense", "reduced")
    )
    api.app.state.hub.engines["dense"].process.up = False
    assert upload(api, reduced).json()["variant"] == "reduced"
    refused(upload(api, dense), 503, None, "'dense' is down")
    refused(upload(api, dense, model="reduced"), 409, None, "d_k")


def test_tokens_of_a_prompt_that_is_run_for_itself_count_for_the_limit(tmp_path, directory, monkeypatch):
    keys = {name: {"key": name * 16, "tokens_per_minute": 12} for name in "abc"}
    with scripted_api(tmp_path, monkeypatch, state_dir=directory, api_keys=keys) as api:
        for name, path, fields in (
            ("a", "/v1/states", {}),
            ("b", "/v1/completions", {"max_tokens": 0, "echo": True, "logprobs": 1}),
            ("c", "/v1/completions", {"max_tokens": 0, "echo": True, "n": 3}),
        ):
            api.headers["authorization"] = f"Bearer {name * 16}"
            body = {"model": "dense", "prompt": "Once upon", **fields}
            answers = [api.post(path, json=body) for _ in range(3)]
            assert [answer.status_code for answer in answers] == [200, 200, 429], name
            assert 0 < int(answers[2].headers["retry-after"]) <= 40, "6 tokens too many, and one more"


def test_what_has_expired_goes_where_nobody_saves_anything(tmp_path, directory, monkeypatch):
    monkeypatch.setattr("server.api.states.saved.SWEEP_S", 0.01)
    with scripted_api(tmp_path, monkeypatch, state_dir=directory) as api:
        kept, old = path_of(api, save(api)), path_of(api, save(api))
        failures = []

        def fail(_):
            failures.append(None)
            raise OSError("for a while")

        with monkeypatch.context() as patch:
            patch.setattr(StateStore, "sweep", fail)
            poll(lambda: len(failures) >= 2, "a disk that fails does not end it")
        os.utime(old, (0, 0))
        poll(lambda: not old.exists(), "the expired one is removed")
        assert kept.exists()


def test_a_directory_that_can_not_be_written_to_is_known_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=f"state_dir: .* {tmp_path}/file/states: Not a directory"):
        with scripted_api(tmp_path, monkeypatch, state_dir=tmp_path / "file" / "states"):
            pass


def test_no_other_user_of_the_machine_reads_states(api, directory):
    save(api)
    assert directory.stat().st_mode & 0o077 == 0


def test_states_are_off_without_a_directory(tmp_path, monkeypatch):
    with scripted_api(tmp_path, monkeypatch) as api:
        for answer in (
            api.post("/v1/states", json={"model": "dense", "prompt": "x"}),
            api.get("/v1/states"),
            api.get("/v1/states/" + ODD_IDS[0]),
            upload(api, b"x"),
        ):
            refused(answer, 404, None, "state_dir")
        refused(complete(api, state_id=ODD_IDS[0]), 404, None, "state_dir")


def test_a_full_disk_is_a_503_that_names_no_file(api, directory, monkeypatch):
    from server.wire.exchange import StateError

    async def full(_self, message):
        raise StateError(f"{message.path}: No space left on device")

    client = api.app.state.service.variants.get("dense").client
    monkeypatch.setattr(type(client), "save_state", full)
    answer = api.post("/v1/states", json={"model": "dense", "prompt": "x"})
    refused(answer, 503, None, "could not be written")
    assert str(directory) not in answer.text and not list(directory.iterdir())


def test_a_state_over_the_budget_is_a_413(tmp_path, directory, monkeypatch):
    with scripted_api(tmp_path, monkeypatch, state_dir=directory, state_budget_bytes=2000) as api:
        refused(api.post("/v1/states", json={"model": "dense", "prompt": "x"}), 413, None, "2000")
        assert save(api, model="reduced")["variant"] == "reduced"


@pytest.fixture
def make(api):
    """Makes states of 9 tokens, each used `age` seconds ago."""

    def make(age):
        state = save(api)
        os.utime(path_of(api, state), (time.time() - age,) * 2)
        return state

    return make


def path_of(api, state):
    return api.app.state.saved_states.store.find(state["id"], "").path


def test_what_nobody_uses_expires_and_each_use_puts_it_off(api, make, directory):
    used, old = make(86_000), make(86_500)
    refused(complete(api, state_id=old["id"]), 404, "state_id", "expired")
    refused(api.get(f"/v1/states/{old['id']}"), 404, "state_id")
    assert complete(api, state_id=used["id"]).status_code == 200
    assert api.get(f"/v1/states/{used['id']}").json()["expires"] > time.time() + 86_300
    save(api)
    assert len(list(directory.iterdir())) == 2, "the next save sweeps"


def test_the_least_recently_used_go_when_the_budget_is_full(api, make, directory):
    size = save(api)["bytes"]
    (first,) = directory.iterdir()
    store = StateStore(directory, 86_400, 3 * size)
    states = [make(age) for age in (30, 20, 10)]
    first.unlink()
    complete(api, state_id=states[0]["id"])
    half = directory / f".{'0' * 32}.part"
    half.write_bytes(b"x")
    old_half = directory / f"..{'1' * 32}.part.00000000"
    old_half.write_bytes(b"x")
    os.utime(old_half, (0, 0))
    other = directory / "notes.txt"
    other.write_bytes(b"x" * 10 * size)
    written = store.new_file()
    written.write_bytes(path_of(api, states[0]).read_bytes())
    new = store.keep(written, "")
    left = {path.name.partition(".")[0] for path in directory.glob("state-*")}
    assert left == {states[0]["id"], states[2]["id"], new.id}, "the second was the one that nobody used"
    assert half.exists() and other.exists() and not old_half.exists()


def test_two_stores_on_one_directory_see_the_same(api, directory):
    state = save(api)
    other = StateStore(directory, 86_400, 2**30)
    found = other.find(state["id"], "")
    assert found is not None and found.describe() == state
    assert [s.id for s in other.list("")] == [state["id"]]
    assert other.delete(state["id"], "")
    refused(complete(api, state_id=state["id"]), 404, "state_id")


def test_headers_are_read_with_care():
    with pytest.raises(StateFileError, match="first eight"):
        header_length(b"1234567")
    for length in (0, 1, MAX_HEADER_BYTES + 1, 2**64 - 1):
        with pytest.raises(StateFileError, match="header"):
            header_length(struct.pack("<Q", length))
    good = {"format": FORMAT, "variant": "dense", "tokens": "5", "created": "5"}
    table = {
        "__metadata__": good,
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    header = parse_header(json.dumps(table).encode())
    assert header.size == header.data_at + 8 and set(header.tensors) == {"a", "b"}
    for change in (
        {"a": {}},
        {"a": None},
        {"a": {"data_offsets": [1, 4]}},
        {"a": {"data_offsets": [0.0, 4]}},
    ):
        with pytest.raises(StateFileError):
            parse_header(json.dumps({**table, **change}).encode())
