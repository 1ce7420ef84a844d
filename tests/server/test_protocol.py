"""Headers are in memory before anyone asks for a key: they have an end."""

import asyncio

import pytest
import uvicorn
from uvicorn.server import ServerState

from server.protocol import MAX_HEADER_BYTES, HttpProtocol


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self):
        super().__init__()
        self.written, self.closed = b"", False

    def write(self, data):
        self.written += data

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


async def app(scope, receive, send):
    while (await receive())["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


HEAD = "GET /health HTTP/1.1\r\nhost: x\r\n"
CHUNKED = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
HEADER = "x: " + "a" * 1000 + "\r\n"


def feed(*parts):
    """What a connection that gets these parts, each a read of its own, answered, and how many it took."""

    async def work():
        config = uvicorn.Config(app, log_config=None)
        config.load()
        protocol = HttpProtocol.with_timeouts(60, 60)(config, ServerState(), {})
        transport = Transport()
        protocol.connection_made(transport)
        taken = 0
        while taken < len(parts) and not transport.closed:
            protocol.data_received(parts[taken].encode())
            taken += 1
            await asyncio.sleep(0)
        for _ in range(100):  # turns of the loop for the answer
            await asyncio.sleep(0)
        protocol.connection_lost(None)
        return transport.written.decode(), taken

    return asyncio.run(work())


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (HEAD, HEADER),
        (HEAD + "x: ", "a" * 1000),
        ("GET /", "a" * 1000),
        (CHUNKED + "1\r\n \r\n0\r\n", HEADER),
        (CHUNKED + "1;x=", "a" * 1000),
    ],
    ids=["many", "one", "path", "trailers", "chunk extension"],
)
def test_headers_without_an_end_end_the_connection(begin, more):
    answer, taken = feed(begin, *[more] * 1000)
    assert answer.startswith("HTTP/1.1 400 ") and str(MAX_HEADER_BYTES) in answer
    assert 60 < taken < 70


@pytest.mark.parametrize(
    ("parts", "answers"),
    [
        ([HEAD, *[HEADER] * 60, "\r\n"], 1),
        ([HEAD + "\r\n"] * 5000, 5000),
        ([CHUNKED, *["3e8\r\n" + "a" * 1000 + "\r\n"] * 1000, "0\r\n\r\n"], 1),
        ([HEAD + f"content-length: {10**6}\r\n\r\n", *["a" * 1000] * 1000], 1),
        ([HEAD + "\r\n", CHUNKED, "1\r\n \r\n0\r\n", *[HEADER] * 60, "\r\n"], 2),
    ],
    ids=["headers", "one request after another", "chunks", "body", "trailers"],
)
def test_what_has_an_end_is_answered(parts, answers):
    answer, taken = feed(*parts)
    assert taken == len(parts)
    assert answer.count("HTTP/1.1 204 ") == answer.count("HTTP/1.1 ") == answers
