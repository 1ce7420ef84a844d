"""Serving, in one process or in several."""

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from server.api.states.saved import SavedStates
from server.front_end import FrontEnd, run_in_loop
from server.hub.conductor import TICK_S, Conductor
from server.hub.front_ends import FrontEnds
from server.hub.hub import Hub
from server.listening import listen_together, url_of
from server.settings import Settings
from server.single import create_server

MOST_PROCESSES = 4
"""API processes by default, at most: as many as a GPU of today needs."""
CORES_PER_PROCESS = 4
"""Cores of the machine for each API process, by default."""


def has_gpu() -> bool:
    """Whether this machine lets us have an NVIDIA GPU, as far as can be told without loading CUDA."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def count_processes(settings: Settings) -> int:
    """How many processes answer HTTP requests. One can encode what a CPU's models generate, and several what a GPU's
    do."""
    if settings.api_processes is not None:
        return settings.api_processes
    devices = {variant.device or settings.device for variant in settings.variants.values()}
    on_gpu = any(device.startswith("cuda") for device in devices) or ("auto" in devices and has_gpu())
    cores = len(os.sched_getaffinity(0))
    return max(1, min(MOST_PROCESSES, cores // CORES_PER_PROCESS)) if on_gpu else 1


def serve_until_over(settings: Settings, reload: Callable[[], Settings]) -> dict[str, str]:
    """Serve until SIGTERM or SIGINT.

    Args:
        reload: reads the settings again, at SIGHUP.

    Returns:
        The variants that could not be loaded, and why, if that is why the server stopped.

    Raises:
        ConfigurationError: the port is taken, or `state_dir` can't be written to.
    """
    signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGHUP}
    )  # until there is a handler, it would end the process
    listening = listen_together(settings.host, settings.port, count_processes(settings))
    url = url_of(settings.host, listening[0][0].getsockname()[1])
    if len(listening) == 1:
        return run_in_loop(_in_one(settings, reload, listening[0], url))
    return run_in_loop(_in_several(settings, reload, listening, url))


def _hang_ups_go_to(conductor: Conductor) -> None:
    """Have SIGHUP answered, also one that has come already."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, conductor.hang_up)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


async def _in_one(
    settings: Settings, reload: Callable[[], Settings], sockets: list[socket.socket], url: str
) -> dict[str, str]:
    """The hub and the only front end in this process."""
    failed: dict[str, str] = {}

    def fail(variant: str, reason: str) -> None:
        failed[variant] = reason
        front_end.stop()

    app, hub = create_server(settings, fail)
    conductor = Conductor(hub, reload, url)

    def started() -> None:
        _hang_ups_go_to(conductor)
        conductor.listening()

    async def tick() -> None:
        await conductor.tick()
        if conductor.over:
            front_end.stop()

    front_end = FrontEnd(app, on_start=started, on_signal=conductor.exit, on_tick=tick)
    await front_end.serve(sockets)
    return failed


async def _in_several(
    settings: Settings, reload: Callable[[], Settings], listening: list[list[socket.socket]], url: str
) -> dict[str, str]:
    """The hub in this process, and front ends in others."""
    failed: dict[str, str] = {}
    SavedStates(settings)  # says now what each front end would find wrong with `state_dir`
    hub = Hub(settings, failed.__setitem__)
    front_ends = FrontEnds(hub, listening)
    conductor = Conductor(hub, reload, url, lambda: front_ends.complete)
    loop, is_listening = asyncio.get_running_loop(), False
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, conductor.exit)
    _hang_ups_go_to(conductor)
    async with hub.running():
        front_ends.start()
        while not conductor.over and not failed:
            await asyncio.sleep(TICK_S)
            if front_ends.complete and not is_listening:
                is_listening = True
                conductor.listening()
            await conductor.tick()
        signals = conductor.signals
        await front_ends.stop(hurry=lambda: conductor.signals > signals)
    return failed
