"""Requests that have been answered and still go on: clients have their answer, and the server is done."""

import http.client
import json
import socket
import urllib.parse

import pytest
from live_server import DEADLINE_S, LiveServer, poll

KEY = "alice-0123456789abcdef"
AUTH = f"authorization: Bearer {KEY}"
LENGTH = "content-length: 4000000"
JSON = "content-type: application/json"
CHUNKED = "transfer-encoding: chunked"

CASES = {
    # What is sent at once; the trickle follows.
    401: (["POST /v1/completions", LENGTH, JSON], b""),
    404: (["POST /v1/nothing", LENGTH, JSON, AUTH], b""),
    405: (["PUT /v1/completions", LENGTH, JSON, AUTH], b""),
    408: (["POST /v1/completions", LENGTH, JSON, AUTH], b"{"),
    413: (["POST /v1/completions", f"content-length: {10**9}", JSON, AUTH], b""),
    "413, chunked": (
        ["POST /v1/completions", CHUNKED, JSON, AUTH],
        b"fffffff\r\n" + b" " * 5 * 2**20,
    ),
    "405, a probe": (["POST /health", LENGTH], b""),
    "405, a chunked probe": (["POST /health", CHUNKED], b"fffffff\r\n"),
    "200, GET": (["GET /health", LENGTH], b""),
    "200, the last one": (["GET /health", LENGTH, "connection: close"], b""),
    "400, import": (["POST /v1/states/import", CHUNKED, AUTH], b"fffffff\r\n" + b"x" * 64),
    "401, import": (["POST /v1/states/import", CHUNKED], b"fffffff\r\n"),
    "401, only asks": (["POST /v1/completions", LENGTH, "expect: 100-continue"], b""),
}


def serve(arguments, directory, **limits):
    server = LiveServer(
        directory / "log",
        arguments[0],
        LOWKEY_API_KEYS=f"alice={KEY}",
        LOWKEY_STATE_DIR="states",
        **limits,
    )
    try:
        yield server.wait_ready()
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def guarded(arguments, tmp_path_factory):
    """A server that soon has enough of a client."""
    yield from serve(arguments, tmp_path_factory.mktemp("early"), LOWKEY_BODY_TIMEOUT_S="2")


@pytest.fixture(scope="module")
def patient(arguments, tmp_path_factory):
    """A server that waits for its clients, however busy they are."""
    yield from serve(arguments, tmp_path_factory.mktemp("patient"), LOWKEY_LINGER_S=str(DEADLINE_S))


def connect(server, lines, begin=b""):
    url = urllib.parse.urlsplit(server.url)
    connection = socket.create_connection((url.hostname, url.port), timeout=DEADLINE_S)
    first, *headers = lines
    head = "\r\n".join([f"{first} HTTP/1.1", "host: x", *headers, "", ""])
    connection.sendall(head.encode() + begin)
    return connection


def answered(connection):
    """The answer's status and body, while the request is still being sent."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


def is_closed(connection):
    """After one more byte."""
    try:
        connection.sendall(b"a")
        return connection.recv(1, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_body_that_trickles_in_after_the_answer_ends_the_connection(guarded, case):
    lines, begin = CASES[case]
    with connect(guarded, lines, begin) as connection:
        status, body = answered(connection)
        assert status == int(str(case)[:3])
        assert status == 200 or body["error"]["code"] == status
        poll(lambda: is_closed(connection), "the connection is closed")


def test_a_body_that_never_comes_after_the_answer_ends_the_connection(guarded):
    with connect(guarded, CASES[401][0]) as connection:
        assert answered(connection)[0] == 401
        assert connection.recv(1) == b""


@pytest.mark.parametrize("status", [401, 404, 413])
def test_an_answer_says_that_a_long_rest_will_not_be_read(guarded, status):
    """A client that did not know would send its next request on a connection that is about to be closed."""
    with connect(guarded, CASES[status][0]) as connection:
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == status and response.getheader("connection") == "close"


@pytest.mark.parametrize("size", [100, 10**5, 10**6])
def test_a_client_that_sends_all_before_it_reads_has_its_answer_and_its_connection(patient, size):
    url = urllib.parse.urlsplit(patient.url)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=DEADLINE_S)
    connection.connect()
    mine = connection.sock
    for _ in range(3):
        connection.request("POST", "/v1/completions", b"x" * size, {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.status == 401 and json.loads(response.read())["error"]["code"] == 401
        assert response.getheader("connection") is None
        assert connection.sock is mine
    connection.close()


def test_a_refused_import_is_not_read_to_its_end(guarded):
    """The server takes what its own and the system's buffers hold, and no more."""
    piece = b"x" * 2**20
    with connect(guarded, *CASES["400, import"]) as connection:
        assert answered(connection)[0] == 400
        sent = 0
        try:
            while sent < 200:
                connection.sendall(piece)
                sent += 1
        except OSError:
            pass
    assert sent < 64


def test_an_answer_does_not_speak_of_the_rest_of_a_request_behind_it(guarded):
    behind = "\r\n".join(["POST /v1/completions HTTP/1.1", "host: x", LENGTH, JSON, "", ""]).encode()
    with connect(guarded, ["GET /health"], behind) as connection:
        received = b""
        while received.count(b"HTTP/1.1 ") < 2 or not received.endswith(b"}"):
            piece = connection.recv(2**16)
            assert piece, received
            received += piece
    first, second = received.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200") and b"connection: close" not in first
    assert second.startswith(b"401") and b"connection: close" in second


def test_pipelined_requests_behind_an_answered_one_are_answered(patient):
    body = b"{}" * 1000
    refused = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2000\r\n\r\n"
    with connect(patient, ["GET /health"], refused + body[:999]) as connection:
        received = b""
        while received.count(b"HTTP/1.1 ") < 2 or not received.endswith(b"}"):
            received += connection.recv(2**16)
        connection.sendall(body[999:] + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        while piece := connection.recv(2**16):
            received += piece
    statuses = [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"401", b"200"]
