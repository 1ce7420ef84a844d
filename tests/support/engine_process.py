"""An engine's supervisor and a client of it, with everything that they report, on an event loop that lives as long as
the harness."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import psutil

from server.wire.client import EngineClient
from server.wire.messages import EngineConfig, Generate, Occupancy, Ready, Step, Token
from server.wire.supervisor import Supervisor

T = TypeVar("T")

START_S = 240.0
"""How long an engine may take to load on a busy machine."""


def engine_config(source: Path, **fields: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "variant": "dense",
        "source": str(source),
        "device": "cpu",
        "dtype": "float32",
        "max_requests": 4,
        "prefill_tokens": 64,
        "threads": 1,
    }
    return EngineConfig(**{**defaults, **fields})


async def until(condition: Callable[[], bool], seconds: float = START_S) -> None:
    """Poll until the condition holds. Raises AssertionError at the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)


async def generated(client: EngineClient, message: Generate, **how: Any) -> AsyncGenerator[list[Token]]:
    """The request's tokens as they come: each time all that have come since. Leaving early aborts the request."""
    arrived = asyncio.Event()
    with contextlib.closing(client.generate(message, arrived.set, **how)) as exchange:
        while True:
            await arrived.wait()
            arrived.clear()
            if tokens := exchange.take():
                yield tokens
            if exchange.error is not None:
                raise exchange.error
            if tokens and tokens[-1].finish_reason is not None:
                return


class Harness:
    """One engine, its supervisor and a client; `run` runs a coroutine on its loop."""

    def __init__(
        self, config: EngineConfig, runtime_dir: Path, on_ready: Any = None, hang_s: float = START_S
    ) -> None:
        self.readies: list[Ready] = []
        self.steps: list[Step] = []
        self.occupancies: list[Occupancy] = []
        self.downs = 0
        self.fatals: list[str] = []
        self.on_ready = on_ready
        self._runner = asyncio.Runner()
        self.supervisor, self.client = self.run(self._make(config, runtime_dir, hang_s))

    async def _make(
        self, config: EngineConfig, runtime_dir: Path, hang_s: float
    ) -> tuple[Supervisor, EngineClient]:
        client = EngineClient(config.variant, "0")

        def ready(message: Ready, address: str) -> None:
            self.readies.append(message)
            if self.on_ready is not None:
                self.on_ready()
            client.engine_up(message, address)

        def restart() -> None:
            self.downs += 1

        supervisor = Supervisor(
            config,
            runtime_dir,
            hang_s=hang_s,
            on_ready=ready,
            on_step=self.steps.append,
            on_occupancy=self.occupancies.append,
            on_down=client.engine_down,
            on_restart=restart,
            on_fatal=self.fatals.append,
        )
        supervisor.start()
        return supervisor, client

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def wait_until_up(self) -> None:
        self.run(until(lambda: self.supervisor.up and self.client.up, START_S))

    def engine(self) -> psutil.Process:
        """The engine's process."""
        (process,) = (
            p
            for p in psutil.Process().children()
            if f'"variant":"{self.supervisor.config.variant}"' in " ".join(p.cmdline())
        )
        return process

    def close(self) -> None:
        self.run(self.supervisor.close())
        self.client.engine_down()
        self._runner.close()

    async def tokens(self, message: Generate) -> list[Token]:
        return [token async for tokens in generated(self.client, message) for token in tokens]
