"""Clients that read or write slowly, and small requests that ask for much: what do they cost everybody else?

    python benchmarks/slow_clients.py --json slow.json

Three trials, each against a `lowkey-serve` of its own with the demo model:

- unread: streams of 100 choices with log-probabilities that nobody reads, beside a client who asks for short answers.
- trickle: requests that are answered at once and whose bodies come a byte at a time; a refused import that goes on.
- work: single requests below the limit on bodies that make a server work hard.

Printed for each: resident memory of the API process before, at its most and at the end, open connections, and the
longest that GET /health took meanwhile, measured from a process of its own. `--serve OTHER/.venv/bin/lowkey-serve`
shows another checkout's figures.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
from _serving import MODEL, Server, table
from outputs import figures_file, write_figures

MIB = 2**20
KEY = "slow-clients-benchmark"
STREAMS = 3
CONNECTIONS = 300
BYTE_EVERY_S = 5.0
IMPORT_BYTES = 256 * MIB
"""How many bytes of an import are sent at the most."""


def _probe(url: str, worst: Any, ended: Any) -> None:
    """Ask for /health again and again; keep the longest time."""
    with httpx.Client(base_url=url, timeout=300) as http:
        while not ended.is_set():
            began = time.perf_counter()
            http.get("/health")
            worst.value = max(worst.value, time.perf_counter() - began)
            time.sleep(0.01)


class Watch:
    """What the API process holds, and how long /health takes, while this runs."""

    def __init__(self, server: Server) -> None:
        self._process = psutil.Process(server.process.pid)
        self._worst = multiprocessing.Value("d", 0.0)
        self._ended = multiprocessing.Event()
        self._prober = multiprocessing.Process(target=_probe, args=(server.url, self._worst, self._ended))
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self.before = self.most = self.end = self._process.memory_info().rss

    def _sample(self) -> None:
        while not self._ended.is_set():
            self.most = max(self.most, self._process.memory_info().rss)
            time.sleep(0.02)

    def __enter__(self) -> "Watch":
        self._prober.start()
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end = self._process.memory_info().rss
        self._ended.set()
        self._prober.join()
        self._sampler.join()

    @property
    def worst_health_s(self) -> float:
        return float(self._worst.value)

    def figures(self) -> dict[str, float]:
        return {
            "rss_before_mib": self.before / MIB,
            "rss_most_mib": self.most / MIB,
            "rss_end_mib": self.end / MIB,
            "worst_health_s": self.worst_health_s,
        }


@contextlib.contextmanager
def serving(script: Path | None) -> Iterator[Server]:
    server = Server({"dense": MODEL}, script=script)
    try:
        yield server
    finally:
        server.stop()


def send(
    server: Server, path: str, body: bytes, length: int | None = None, method: str = "POST"
) -> socket.socket:
    """A connection that has sent a request and reads nothing.

    Args:
        length: bytes that the body is said to have, if it ends early.
    """
    url = urlsplit(server.url)
    connection = socket.create_connection((url.hostname or "", url.port or 0))
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {length or len(body)}\r\n\r\n".encode() + body)
    return connection


def alive(server: Server, held: list[socket.socket]) -> int:
    """How many of the connections the server still has open."""
    ours = {connection.getsockname()[1] for connection in held}
    found = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(c.status == "ESTABLISHED" and bool(c.raddr) and c.raddr.port in ours for c in found)


def unread(script: Path | None, seconds: float) -> dict[str, Any]:
    fields = {"model": "dense", "prompt": "import os\n", "n": 100, "max_tokens": 1900, "ignore_eos": True}
    body = json.dumps({**fields, "logprobs": 5, "stream": True}).encode()
    outcomes: Counter[str] = Counter()
    longest = 0.0
    served_at: float | None = None
    with serving(script) as server, Watch(server) as watch:
        streams = [send(server, "/v1/completions", body) for _ in range(STREAMS)]
        began = time.monotonic()
        small = {"model": "dense", "prompt": "import re\n", "max_tokens": 8}
        while (now := time.monotonic() - began) < seconds:
            try:
                left = max(seconds - now, 1)
                status = str(server.http.post("/v1/completions", json=small, timeout=left).status_code)
            except httpx.TimeoutException:
                status = "no answer"
            took = time.monotonic() - began - now
            outcomes[status] += 1
            longest = max(longest, took)
            if status == "200" and served_at is None:
                served_at = now + took
            time.sleep(1)
        for stream in streams:
            stream.close()
        time.sleep(3)  # what is held for them is freed now
    return {**watch.figures(), "others": dict(outcomes), "first_served_s": served_at, "longest_s": longest}


ANSWERED_AT_ONCE = [
    ("POST", "/v1/completions"),  # 401
    ("POST", "/nowhere"),  # 404
    ("PUT", "/v1/completions"),  # 405
    ("GET", "/health"),  # 200
]
"""Requests that are answered before their body has come."""


def trickle(script: Path | None, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as states:
        environment = {"LOWKEY_API_KEYS": f"bench={KEY}", "LOWKEY_STATE_DIR": states}
        with _environment(environment), serving(script) as server, Watch(server) as watch:
            held = [
                send(server, path, b"{", 4_000_000, method)
                for method, path in ANSWERED_AT_ONCE
                for _ in range(CONNECTIONS // len(ANSWERED_AT_ONCE))
            ]
            began = time.monotonic()
            while time.monotonic() - began < seconds:
                time.sleep(BYTE_EVERY_S)
                for connection in held:
                    with contextlib.suppress(OSError):
                        connection.send(b" ")
            still = alive(server, held)
            for connection in held:
                connection.close()
            sent = _refused_import(server)
    return {**watch.figures(), "connections": len(held), "alive": still, "import_bytes": sent}


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _refused_import(server: Server) -> int:
    """Bytes of a body that is refused for its first ones, and that the server takes all the same."""
    url = urlsplit(server.url)
    sent = 0
    with socket.create_connection((url.hostname or "", url.port or 0)) as connection:
        connection.settimeout(10)
        head = f"POST /v1/states/import HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        connection.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        piece = b"%x\r\n" % MIB + b"\xff" * MIB + b"\r\n"
        with contextlib.suppress(OSError):
            while sent < IMPORT_BYTES:
                connection.sendall(piece)
                sent += MIB
    return sent


def requests() -> dict[str, tuple[str, bytes]]:
    """Name -> path and body of a request that asks for much."""
    ids = [5 + i % 200 for i in range(2000)]
    prompts = {"model": "dense", "prompt": [ids] * 160, "echo": True, "logprobs": 20, "max_tokens": 0}
    plain = {"model": "dense", "prompt": "x", "max_tokens": 1}
    lists = b"[" + b"[]," * 900_000 + b"[]]"
    chat = b'{"model": "dense", "messages": [{"role": "user", "content": "x", "unknown": ' + lists + b"}]}"
    return {
        "160 x 2,000 ids, echo, logprobs 20": ("/v1/completions", json.dumps(prompts).encode()),
        "200,000 bad entries of logit_bias": (
            "/v1/completions",
            json.dumps({**plain, "logit_bias": {f"x{i}": 1 for i in range(200_000)}}).encode(),
        ),
        "900,000 lists in an unknown field": ("/v1/chat/completions", chat),
        "/tokenize of 2 MB with strings": (
            "/tokenize",
            json.dumps(
                {"model": "dense", "prompt": "import os\n" * 200_000, "return_token_strs": True}
            ).encode(),
        ),
        "a prompt of 1,000,000 ids": (
            "/v1/completions",
            json.dumps({**plain, "prompt": [5] * 1_000_000}).encode(),
        ),
    }


def work(script: Path | None) -> list[dict[str, Any]]:
    found = []
    for name, (path, body) in requests().items():
        with serving(script) as server:
            server.http.post("/v1/completions", json={"model": "dense", "prompt": "x", "max_tokens": 1})
            with Watch(server) as watch:
                time.sleep(0.5)
                began = time.monotonic()
                headers = {"content-type": "application/json"}
                response = server.http.post(path, content=body, headers=headers, timeout=300)
                took = time.monotonic() - began
        figures = {"status": response.status_code, "answer_bytes": len(response.content), "seconds": took}
        found.append({"request": name, "body_bytes": len(body), **figures, **watch.figures()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=75.0, help="of the first two trials, each")
    parser.add_argument("--serve", type=Path, help="another checkout's lowkey-serve")
    parser.add_argument("--json", type=figures_file)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name, trial in (("unread", unread), ("trickle", trickle)):
        print(f"{name}: {options.seconds:.0f} s ...", flush=True)
        found[name] = trial(options.serve, options.seconds)
    print("work ...", flush=True)
    found["work"] = work(options.serve)
    print("\n" + report(found))
    write_figures(options.json, found)


def _memory(figures: dict[str, Any]) -> str:
    return " => ".join(f"{figures[f'rss_{when}_mib']:.0f}" for when in ("before", "most", "end"))


def report(found: dict[str, Any]) -> str:
    """The figures as text."""
    slow, late = found["unread"], found["trickle"]
    served = "never" if slow["first_served_s"] is None else f"after {slow['first_served_s']:.0f} s"
    unread_line = (
        f"unread: API process {_memory(slow)} MiB; longest /health {slow['worst_health_s']:.2f} s; others got "
        f"{slow['others']}, the first 200 {served}, the longest took {slow['longest_s']:.1f} s"
    )
    trickle_line = (
        f"trickle: {late['alive']} of {late['connections']} connections alive; "
        f"{late['import_bytes'] / MIB:.0f} MiB of a refused import taken; "
        f"API process {_memory(late)} MiB; longest /health {late['worst_health_s']:.2f} s"
    )
    lines = [
        unread_line,
        trickle_line,
        "",
        table(
            ("request", "status", "answer, MB", "seconds", "longest /health, s", "API process, MiB"),
            [
                (
                    row["request"],
                    str(row["status"]),
                    f"{row['answer_bytes'] / 1e6:.1f}",
                    f"{row['seconds']:.2f}",
                    f"{row['worst_health_s']:.2f}",
                    _memory(row),
                )
                for row in found["work"]
            ],
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
