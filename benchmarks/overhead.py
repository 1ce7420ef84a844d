"""What the server adds to a request: routing, keys, limits, validation, metrics and HTTP around the bare engine call.

    python benchmarks/overhead.py demo/model

In one process, with one engine behind it, a request of one token goes through the application without a socket (ASGI):
without keys, then with 21 keys, an alias and rate limits. Of each request the time inside `EngineClient.generate` is
taken off, and what httpx itself costs is shown beside: an empty route.
"""

import argparse
import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI

from server.api.app import create_app
from server.api.serving.variants import Variant
from server.settings import load_settings
from server.wire.messages import Generate, Token

KEY = secrets.token_hex(16)
WARM_UP = 50


class EngineTime:
    """Adds up the seconds that requests spend in a variant's engine call."""

    def __init__(self, variant: Variant) -> None:
        self.seconds = 0.0
        generate = variant.client.generate

        async def timed(message: Generate, **options: Any) -> AsyncGenerator[list[Token]]:
            start = time.perf_counter()
            async for tokens in generate(message, **options):
                self.seconds += time.perf_counter() - start
                yield tokens
                start = time.perf_counter()

        variant.client.generate = timed  # type: ignore[method-assign]


def create_apps(source: str) -> tuple[FastAPI, FastAPI]:
    """The application as it comes, and with keys, an alias and limits; one engine for both."""
    plain = create_app(load_settings(variants={"dense": source}), fatal)
    settings = load_settings(
        variants={"dense": source},
        aliases={"gdn": {"dense": 1.0}},
        api_keys={"me": KEY, **{f"other{i}": secrets.token_hex(16) for i in range(20)}},
        requests_per_minute=10**9,
        tokens_per_minute=10**9,
    )
    full = create_app(settings, fatal)
    full.state.service.variants = plain.state.service.variants
    for app in (plain, full):
        app.get("/nothing")(nothing)
    return plain, full


async def nothing() -> None:
    """The empty route."""


def fatal(name: str, reason: str) -> None:
    raise SystemExit(f"variant {name!r} can't be loaded: {reason}")


async def measure(source: str, requests: int) -> dict[str, np.ndarray]:
    """Milliseconds of each way, `[requests]`, run in turn."""
    plain, full = create_apps(source)
    async with plain.router.lifespan_context(plain):
        (variant,) = plain.state.service.variants
        while not variant.client.up:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        engine = EngineTime(variant)
        clients = {
            "application": (client(plain), "dense"),
            "  with keys, alias, limits": (client(full), "gdn"),
        }
        times: dict[str, list[float]] = {name: [] for name in ("engine call", *clients, "httpx, empty route")}
        for i in range(-WARM_UP, requests):
            row = {}
            for name, (http, model) in clients.items():
                before, start = engine.seconds, time.perf_counter()
                body = {"model": model, "prompt": [5, 6, 7, 8], "max_tokens": 1, "user": "someone"}
                (await http.post("/v1/completions", json=body)).raise_for_status()
                inside = engine.seconds - before
                row["engine call"], row[name] = inside, time.perf_counter() - start - inside
            start = time.perf_counter()
            (await clients["application"][0].get("/nothing")).raise_for_status()
            row["httpx, empty route"] = time.perf_counter() - start
            if i >= 0:
                for name, seconds in row.items():
                    times[name].append(1000 * seconds)
    return {name: np.array(values) for name, values in times.items()}


def client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://x", headers={"authorization": f"Bearer {KEY}"}
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="checkpoint directory or hub id")
    parser.add_argument("--requests", type=int, default=500)
    arguments = parser.parse_args()
    figures = asyncio.run(measure(arguments.source, arguments.requests))
    print(f"{'ms, ' + str(arguments.requests) + ' requests':30}{'p50':>8}{'p99':>8}")
    for name, values in figures.items():
        print(f"{name:30}" + "".join(f"{x:8.2f}" for x in np.percentile(values, [50, 99])))
