"""The nginx of docs/operations.md, a real one: TLS, streams that come as they are made, no metrics."""

import re
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import httpx
import pytest
from live_server import DEADLINE_S, poll

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"

pytestmark = pytest.mark.skipif(
    shutil.which("nginx") is None or shutil.which("openssl") is None,
    reason="needs both (apt install nginx-light openssl)",
)


class Upstream(threading.Thread):
    """In the server's place: it sends the second event of a stream once the first has reached the client."""

    def __init__(self):
        super().__init__(daemon=True)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.seen = threading.Event()

    def run(self):
        connection, _ = self._listening.accept()
        with connection:
            connection.recv(65536)
            head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
            connection.sendall(f"{head}data: 1\n\n".encode())
            if self.seen.wait(DEADLINE_S):
                connection.sendall(b"data: [DONE]\n\n")


@pytest.fixture
def upstream():
    upstream = Upstream()
    upstream.start()
    return upstream


@pytest.fixture
def proxy(upstream, tmp_path):
    """Its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    files = ["-keyout", tmp_path / "lowkey.key", "-out", tmp_path / "lowkey.crt"]
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=lowkey.example",
        *files,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (text,) = re.findall(r"^```nginx\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for there, here in {
        "127.0.0.1:8000": upstream.address,
        "listen 443": f"listen 127.0.0.1:{port}",
        "/etc/ssl/": f"{tmp_path}/",
    }.items():
        assert there in text
        text = text.replace(there, here)
    places = "".join(
        f"{name}_temp_path {tmp_path}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off;\npid {tmp_path}/pid;\nerror_log {tmp_path}/error;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{places}{text}}}\n"
    )
    process = subprocess.Popen(["nginx", "-c", config, "-e", tmp_path / "error"])
    try:
        url = f"https://127.0.0.1:{port}"
        poll(lambda: process.poll() is not None or answers(url), "nginx answers")
        assert process.poll() is None, (tmp_path / "error").read_text()
        yield url
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def answers(url):
    try:
        return httpx.get(f"{url}/metrics", verify=False).status_code == 404
    except httpx.TransportError:
        return False


def test_streams_pass_as_they_come_and_metrics_do_not(upstream, proxy):
    with httpx.Client(base_url=proxy, verify=False, timeout=DEADLINE_S) as client:
        assert client.get("/metrics").status_code == 404
        with client.stream("POST", "/v1/completions", json={"stream": True}) as response:
            pieces = response.iter_text()
            assert next(pieces) == "data: 1\n\n"
            upstream.seen.set()
            assert "".join(pieces) == "data: [DONE]\n\n"
