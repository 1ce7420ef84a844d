"""Restart two servers one after the other while clients load them: does any request fail?

    python benchmarks/rolling.py
    python benchmarks/rolling.py --drain-delay 0       # and why there is a delay

Clients keep their connections and see one address, as of a Kubernetes Service: a proxy sends each *connection* to one
of the servers whose /ready it last found to be 200, and finds out with a lag. Each restart is what happens to a pod:
SIGTERM, a wait for the process to end by itself, another one in its place. Every stream must come to its end.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from _serving import MODEL, Server, workload
from outputs import figures_file, write_figures

from loadtest.client import Completion, Result, closed_loop

WAIT_S = 180.0
"""The most seconds that a server may take to come up or to end."""


class Service:
    """One address for several servers.

    Args:
        lag_s: Seconds from a probe to the moment when connections go where it says. Probes are half a second apart.
    """

    def __init__(self, lag_s: float) -> None:
        self._lag_s = lag_s
        self._servers: list[str] = []
        self.endpoints: list[str] = []
        self._changed = asyncio.Event()
        self._turn = itertools.count()
        self.connections: Counter[str] = Counter()

    def add(self, url: str) -> None:
        self._servers.append(url)

    async def probe(self) -> None:
        """For ever: find out which servers are ready."""
        loop = asyncio.get_running_loop()
        async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:

            async def ready(url: str) -> bool:
                try:
                    return (await client.get(f"{url}/ready")).status_code == 200
                except httpx.HTTPError:
                    return False

            while True:
                asked = list(self._servers)
                answers = await asyncio.gather(*map(ready, asked))
                found = [url for url, yes in zip(asked, answers, strict=True) if yes]
                loop.call_later(self._lag_s, self._set, found)
                await asyncio.sleep(0.5)

    def _set(self, endpoints: list[str]) -> None:
        self.endpoints = endpoints
        self._changed.set()

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to one server, for its whole life."""
        url = self.endpoints[next(self._turn) % len(self.endpoints)] if self.endpoints else ""
        self.connections[url] += 1
        with contextlib.suppress(OSError):
            if url:
                there = await asyncio.open_connection(httpx.URL(url).host, httpx.URL(url).port)
                await asyncio.gather(_copy(reader, there[1]), _copy(there[0], writer))
        writer.close()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.endpoints) != count:
                self._changed.clear()
                await self._changed.wait()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
    target.close()


def start(checkpoints: dict[str, Path]) -> Server:
    return Server(checkpoints, "--max-requests", "16")


async def restart(service: Service, servers: list[Server], checkpoints: dict[str, Path]) -> None:
    """Restart each of the servers once, one after the other."""
    for i, old in enumerate(list(servers)):
        began = time.monotonic()
        old.process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(old.process.wait, WAIT_S)
        print(f"server {i}: SIGTERM, ended with {status} after {time.monotonic() - began:.1f} s", flush=True)
        servers[i] = await asyncio.to_thread(start, checkpoints)
        service.add(servers[i].url)
        await service.until(len(servers))
        print(f"server {i}: another one is in its place", flush=True)


def endless(seed: int, stop: asyncio.Event) -> Iterator[Completion]:
    for block in itertools.count(seed):
        for completion in workload(100, 256, (8, 120), (8, 60), block):
            if stop.is_set():
                return
            yield completion


async def test(options: argparse.Namespace, checkpoints: dict[str, Path]) -> dict[str, Any]:
    service, stop = Service(options.lag), asyncio.Event()
    servers = [await asyncio.to_thread(start, checkpoints) for _ in range(2)]
    for server in servers:
        service.add(server.url)
    probing = asyncio.create_task(service.probe())
    results: list[Result] = []
    try:
        listening = await asyncio.start_server(service.forward, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        await service.until(2)
        names = list(checkpoints)
        loads = [
            asyncio.create_task(
                closed_loop(url, name, endless(i, stop), options.clients, on_result=results.append)
            )
            for i, name in enumerate(names)
        ]
        await asyncio.sleep(options.settle)
        before = len(results)
        await restart(service, servers, checkpoints)
        during = len(results) - before
        await asyncio.sleep(options.settle)
        stop.set()
        await asyncio.gather(*loads)
        listening.close()
    finally:
        probing.cancel()
        for server in servers:
            await asyncio.to_thread(server.stop)
    return {
        "requests": len(results),
        "while_restarting": during,
        "failed": Counter(r.error for r in results if r.error),
        "connections": list(service.connections.values()),
        "slowest_s": max(r.ended - r.sent for r in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--drain-delay", type=float, default=10.0, help="LOWKEY_DRAIN_DELAY_S")
    parser.add_argument("--lag", type=float, default=1.0, help="seconds from a probe to the new endpoints")
    parser.add_argument("--settle", type=float, default=5.0, help="seconds of load before and after")
    parser.add_argument("--json", type=figures_file)
    options = parser.parse_args()
    os.environ["LOWKEY_DRAIN_DELAY_S"] = str(options.drain_delay)
    os.environ["LOWKEY_DRAIN_S"] = "60"
    figures = asyncio.run(test(options, {"dense": options.model}))
    for name, value in figures.items():
        print(f"{name}: {json.dumps(value)}")
    print("requests failed" if figures["failed"] else "no request failed")
    write_figures(options.json, figures)
    sys.exit(bool(figures["failed"]))


if __name__ == "__main__":
    main()
