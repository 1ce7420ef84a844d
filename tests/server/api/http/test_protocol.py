"""Headers are in memory before anyone asks for a key: they have an end. So has what comes after an answer."""

import asyncio

import pytest
import uvicorn
from uvicorn.server import ServerState

from server.api.http.protocol import MAX_HEADER_BYTES, MAX_UNREAD_BYTES, HttpProtocol


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
    """Reads the body of every request but those to /refused."""
    while scope["path"] != "/refused" and (await receive())["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


HEAD = "GET /health HTTP/1.1\r\nhost: x\r\n"
CHUNKED = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
HEADER = "x: " + "a" * 1000 + "\r\n"


class Connection:
    """A connection of a server in this process: `send` is one read of the server's."""

    def __init__(self):
        config = uvicorn.Config(app, log_config=None)
        config.load()
        self.protocol = HttpProtocol.with_timeouts(header_s=60, write_s=60, linger_s=2)(
            config, ServerState(), {}
        )
        self.transport = Transport()
        self.protocol.connection_made(self.transport)

    async def send(self, text):
        self.protocol.data_received(text.encode())
        for _ in range(10):  # turns of the loop for the answer
            await asyncio.sleep(0)

    @property
    def answers(self):
        return self.transport.written.count(b"HTTP/1.1 ")

    def due(self):
        """Seconds to the connection's end, if nothing comes; infinite while a request is being read."""
        timer = self.protocol._timer
        return float("inf") if timer is None else timer.when() - asyncio.get_running_loop().time()


def feed(*parts):
    """What a connection that gets these parts, each a read of its own, answered, and how many it took before it refused
    one or was closed."""

    async def work():
        connection = Connection()
        taken = 0
        while (
            taken < len(parts)
            and not connection.transport.closed
            and b" 400 " not in connection.transport.written
        ):
            await connection.send(parts[taken])
            taken += 1
        connection.protocol.connection_lost(None)
        return connection.transport.written.decode(), taken

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


REFUSED = "POST /refused HTTP/1.1\r\nhost: x\r\n"
LENGTH = REFUSED + f"content-length: {10**9}\r\n\r\n"
CLOSE = REFUSED + f"connection: close\r\ncontent-length: {10**9}\r\n\r\n"
REFUSED_CHUNKED = REFUSED + "transfer-encoding: chunked\r\n\r\n"
KEPT_S = 5
"""How long uvicorn keeps idle connections by default."""


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (LENGTH, "a" * 1000),
        (CLOSE, "a" * 1000),
        (REFUSED_CHUNKED, "3e8\r\n" + "a" * 1000 + "\r\n"),
        (CHUNKED + "nonsense\r\n", "a" * 1000),
    ],
    ids=["length", "last request", "chunks", "no HTTP"],
)
def test_little_is_read_of_a_body_after_its_answer(head, piece):
    async def work():
        connection = Connection()
        await connection.send(head)
        assert connection.answers == 1
        assert connection.due() < KEPT_S / 2
        due = connection.protocol._timer
        taken = 0
        while not connection.transport.closed:
            # Nothing that comes puts the end off, and no client loses its answer to the first bytes that come.
            assert connection.protocol._timer is due
            await connection.send(piece)
            taken += len(piece)
        assert MAX_UNREAD_BYTES < taken <= MAX_UNREAD_BYTES + len(piece)
        assert connection.answers == 1
        connection.protocol.connection_lost(None)
        assert due.cancelled()

    asyncio.run(work())


def test_a_body_that_ends_soon_after_its_answer_costs_nothing():
    async def work():
        connection = Connection()
        await connection.send(REFUSED + "content-length: 2000\r\n\r\n")
        for _ in range(2):
            assert connection.answers == 1 and connection.due() < KEPT_S / 2
            await connection.send("a" * 1000)
        assert KEPT_S / 2 < connection.due() <= KEPT_S
        # The next request may come with the end of the body.
        await connection.send(REFUSED + "content-length: 2\r\n\r\na")
        await connection.send("a" + HEAD + "\r\n" + HEAD)
        assert connection.answers == 3 and not connection.transport.closed
        assert connection.due() > KEPT_S, "headers may take as long as any"
        await connection.send("\r\n")
        assert connection.answers == 4 and KEPT_S / 2 < connection.due() <= KEPT_S

    asyncio.run(work())


def test_the_rest_of_a_body_that_needs_no_answer_any_more_ends_a_last_request():
    async def work():
        connection = Connection()
        await connection.send(REFUSED + "connection: close\r\ncontent-length: 2\r\n\r\naa")
        assert connection.answers == 1 and connection.transport.closed

    asyncio.run(work())


def test_bytes_that_begin_no_request_keep_no_connection():
    async def work():
        connection = Connection()
        await connection.send(HEAD + "\r\n")
        due = connection.protocol._timer
        assert connection.due() <= KEPT_S
        for _ in range(10):
            await connection.send("\r\n")
        assert connection.protocol._timer is due and not due.cancelled()
        await connection.send(HEAD + "\r\n")
        assert connection.answers == 2 and connection.protocol._timer is not due

    asyncio.run(work())
