"""Whatever is wrong with a request, the answer is an error in the one shape that names the field."""

import http.client
import json
import socket
import urllib.parse

import pytest
from live_server import CONTEXT, DEADLINE_S

OK = {"model": "dense", "prompt": "Hi", "max_tokens": 1}


def refused(response, status, param=None, *mentions):
    """Check the shape of an error; returns its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status and error["param"] == param
    for mention in mentions:
        assert mention in error["message"]
    return error["message"]


def post(server, path="/v1/completions", **fields):
    return server.http.post(path, json={**OK, **fields})


UNSUPPORTED = {
    # field: (values that change something, values that change nothing)
    "best_of": ([2, 0], [None, 1]),
    "suffix": (["end", ""], [None]),
    "tools": ([[{"type": "function"}], {}], [None, []]),
    "structural_tag": ([{"type": "structural_tag"}, {}], [None]),
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_a_field_that_is_not_supported_is_refused_unless_it_changes_nothing(server, field):
    changing, no_ops = UNSUPPORTED[field]
    for value in changing:
        refused(post(server, **{field: value}), 400, field, f"{field} is not supported")
    for value in no_ops:
        assert post(server, **{field: value}).status_code == 200, (field, value)


BAD = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 2.5),
    ("max_tokens", "16"),
    ("max_tokens", True),
    ("max_tokens", 10**30),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_k", 2**63),
    ("top_k", 10**30),
    ("min_p", -0.01),
    ("min_p", 1.1),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", 1.5),
    ("seed", False),
    ("stop", ""),
    ("stop", [""]),
    ("stop", ["a"] * 17),
    ("stop", "a" * 1001),
    ("stop", 5),
    ("stop", [None]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [2**31]),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", 5),
    ("stop_token_ids", [1] * 65),
    ("ignore_eos", "yes"),
    ("ignore_eos", 1),
    ("skip_special_tokens", 0),
    ("n", 0),
    ("n", 129),
    ("n", "1"),
    ("n", True),
    ("n", 1.0),
    ("best_of", "2"),
    ("echo", 0),
    ("echo", "no"),
    ("logprobs", -1),
    ("logprobs", 21),
    ("logprobs", True),
    ("logprobs", 1.5),
    ("logit_bias", []),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"5": "1"}),
    ("logit_bias", {"5": None}),
    ("logit_bias", {"257": 1}),
    ("logit_bias", {"9" * 10: 1}),
    ("logit_bias", {str(i): 0 for i in range(1025)}),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", "0"),
    ("frequency_penalty", False),
    ("presence_penalty", 2.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1),
    ("repetition_penalty", 101),
    ("min_tokens", -1),
    ("min_tokens", 2),  # max_tokens is 1
    ("priority", "high"),
    ("priority", 2**31),
    ("state_id", 5),
    ("state_id", "x" * 65),
    ("stream", "true"),
    ("stream", 1),
    ("stream_options", []),
    ("stream_options", {"include_usage": "yes"}),
    ("stream_options", {"include_usage": True}),  # without stream: true
    ("stream_options", {}),
    ("user", 5),
    ("model", None),
    ("model", 5),
    ("model", ["dense"]),
    ("model", "m" * 257),
    ("prompt", None),
    ("prompt", 5),
    ("prompt", {}),
    ("prompt", [1.5]),
    ("prompt", [True]),
    ("prompt", [-1]),
    ("prompt", [2**70]),
    ("prompt", ["a", 5]),
    ("prompt", [5, "a"]),
    ("prompt", ["a", [5]]),
    ("prompt", [[5], 5]),
    ("prompt", [[5], "a"]),
    ("prompt", [[[5]]]),
    ("prompt", ["a", ""]),
    ("prompt", [[1], []]),
    ("prompt", [[]]),
    ("prompt", [""]),
    ("prompt", ["x"] * 2000),
    ("prompt", ""),
    ("prompt", []),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda x: repr(x)[:24])
def test_a_bad_value_is_a_400_that_names_its_field(server, field, value):
    message = refused(post(server, **{field: value}), 400, field, field if field != "prompt" else "prompt")
    assert len(message) < 1200


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "frequency_penalty", "seed", "top_k"])
@pytest.mark.parametrize(
    "literal", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000], ids=lambda x: x[:9]
)
def test_numbers_that_are_none(server, field, literal):
    body = f'{{"model": "dense", "prompt": "Hi", "max_tokens": 1, "{field}": {literal}}}'
    refused(
        server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"}),
        400,
        field,
    )


def test_missing_fields_are_named(server):
    message = refused(server.http.post("/v1/completions", json={}), 400, "model")
    assert "prompt: Field required" in message and "model: Field required" in message


def test_an_unknown_field_is_ignored(server):
    assert post(server, guide={"a": 1}, extra=None, best_friend=5).status_code == 200


def test_at_most_ten_errors_are_listed_and_echoes_are_cut(server):
    message = refused(post(server, prompt=["x" * 5000] + [1.5] * 5), 400, "prompt")
    assert "xxxx" not in message or len(message) < 1000
    fields = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos")
    fields += ("skip_special_tokens", "stream", "stream_options", "user")
    long = [["y" * 5000]]
    message = refused(post(server, **dict.fromkeys(fields, long)), 400, "max_tokens")
    parts = message.split("; ")
    assert len(parts) == 11 and parts[-1].endswith(" more")
    assert all(part.count("y") <= 210 and part.endswith("...") for part in parts[:10])
    # A list fails at its first bad entry: a million of them would make a million errors.
    assert len(refused(post(server, prompt=[-1] * 100_000), 400, "prompt")) < 1000
    message = refused(post(server, model="z" * 250), 404, "model")
    assert message.count("z") == 200


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nonsense",
        '{"model": "dense", "prompt": "Hi"',
        "[" * 100_000,
        '{"a":' * 50_000,
        "[1, 2]",
        '"text"',
        "null",
        "5",
    ],
    ids=lambda x: x[:20] or "empty",
)
def test_a_body_that_is_no_request_is_a_400(server, text):
    response = server.http.post("/v1/completions", content=text, headers={"content-type": "application/json"})
    refused(response, 400)


@pytest.mark.parametrize(
    ("data", "param"), [(b"\xff\xfe{", None), (b'{"model": "\xff"}', "model"), (bytes(range(256)), None)]
)
def test_a_body_that_is_no_text_is_a_400(server, data, param):
    response = server.http.post("/v1/completions", content=data, headers={"content-type": "application/json"})
    refused(response, 400, param)


def test_a_body_of_another_type_is_a_400(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "image/png"):
        refused(
            server.http.post("/v1/completions", content=json.dumps(OK), headers={"content-type": kind}), 400
        )


@pytest.mark.parametrize("field", ["prompt", "stop", "model"])
def test_half_a_surrogate_pair_is_no_text(server, field):
    body = json.dumps({**OK, field: "a\ud800"})
    response = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    refused(response, 400, field, field)


def test_half_a_surrogate_pair_in_a_list(server):
    body = json.dumps({**OK, "stop": ["\udfff"]})
    response = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    refused(response, 400, "stop")
    body = json.dumps({"prompt": "x", "variants": ["\ud800", "dense"]})
    response = server.http.post("/v1/compare", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 404)
    refused(response, response.status_code, "variants")


def test_over_the_context(server):
    # The message states limit and count.
    prompt = [5] * 100
    counts = (str(CONTEXT), "100 ", str(CONTEXT + 1))
    refused(post(server, prompt=prompt, max_tokens=CONTEXT - 99), 400, "max_tokens", *counts)
    refused(post(server, prompt=[5] * CONTEXT), 400, "prompt", str(CONTEXT), str(CONTEXT + 1))
    refused(post(server, prompt="x" * (CONTEXT + 7)), 400, "prompt", str(CONTEXT + 7))


def test_token_ids_outside_the_vocabulary(server):
    assert post(server, prompt=[0, 256]).status_code == 200
    refused(post(server, prompt=[5, 257]), 400, "prompt", "257")
    assert post(server, stop_token_ids=[2**31 - 1]).status_code == 200


def test_unknown_model_path_and_method(server):
    refused(post(server, model="gpt-4"), 404, "model", "'gpt-4'", "dense, reduced")
    refused(server.http.get("/v1/models/gpt-4"), 404, "model", "'gpt-4'")
    refused(server.http.get("/v1/nothing"), 404, None, "GET /v1/nothing")
    refused(server.http.post("/v1/nothing", json={}), 404)
    for method, path, allowed in (
        ("GET", "/v1/completions", "POST"),
        ("PUT", "/v1/compare", "POST"),
        ("POST", "/health", "GET"),
        ("DELETE", "/v1/models", "GET"),
    ):
        response = server.http.request(method, path)
        refused(response, 405, None, f"{method} {path}")
        assert allowed in response.headers["allow"]
    refused(server.http.get("/" + "x" * 3000), 404)
    refused(server.http.get("/v1/%ff%00%0a"), 404)


def test_stop_strings_at_the_limits(server):
    assert post(server, stop=["a" * 1000] * 16).status_code == 200
    assert post(server, stop=[]).status_code == 200


def test_request_ids(server):
    def echoed(value):
        return server.http.get("/health", headers={"x-request-id": value}).headers["x-request-id"]

    for good in ("abc", "A-1_b.2", "x" * 64):
        assert echoed(good) == good
    for bad in ("", "x" * 65, "a b", "a/b", "é".encode("latin-1").decode("latin-1"), "a;b"):
        value = echoed(bad.encode("latin-1"))
        assert value != bad and len(value) == 16
    assert (
        server.http.get("/health").headers["x-request-id"]
        != server.http.get("/health").headers["x-request-id"]
    )


def test_a_body_over_the_limit_by_its_length(server):
    big = json.dumps({**OK, "user": "x" * 4 * 2**20})
    response = server.http.post("/v1/completions", content=big, headers={"content-type": "application/json"})
    refused(response, 413, None, str(4 * 2**20))


def test_a_body_over_the_limit_without_a_length(server):
    def chunks():
        yield b'{"model": "dense", "prompt": "'
        for _ in range(70):
            yield b"x" * 2**16
        yield b'"}'

    response = server.http.post(
        "/v1/completions", content=chunks(), headers={"content-type": "application/json"}
    )
    refused(response, 413, None, str(4 * 2**20))
    assert server.http.get("/health").status_code == 200


def test_an_early_413_does_not_wait_for_the_body(server):
    url = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=DEADLINE_S)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", str(10**12))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == 413
    connection.close()


def raw(server, data):
    url = urllib.parse.urlsplit(server.url)
    with socket.create_connection((url.hostname, url.port), timeout=DEADLINE_S) as s:
        s.sendall(data)
        answer = b""
        while part := s.recv(65536):
            answer += part
        return answer


def test_odd_host_headers_change_nothing(server):
    for host in (b"[", b"", b"a b", b"\xff"):
        answer = raw(server, b"GET /nothing HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
        assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")), answer


def test_what_is_no_http_does_not_bring_the_server_down(server):
    assert raw(server, b"\x16\x03\x01\x02\x00 nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert server.http.get("/health").status_code == 200


def test_an_empty_bearer_is_normal(server):
    # httpx does not send an empty value of this form by itself.
    assert raw(
        server, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \r\nConnection: close\r\n\r\n"
    ).startswith(b"HTTP/1.1 200")


def test_the_server_is_still_well(server):
    # Last in this file: nothing of the above reached an engine's process or its state.
    server.wait_idle()
    assert server.sample("lowkey_engine_restarts_total", variant="dense", engine="0") == 0
    assert "Traceback" not in server.log.read_text()
