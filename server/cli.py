"""`lowkey-serve`: serve dense and reduced variants of a model side by side."""

import asyncio
import errno
import gc
import json
import logging
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import uvicorn

from lowkey.cli import Version
from modeling.sources import CheckpointError, check_source
from server.api.app import create_app
from server.api.http.protocol import HttpProtocol
from server.api.serving.service import Service
from server.logs import configure
from server.settings import ConfigurationError, Settings, load_settings

logger = logging.getLogger("lowkey.server")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

RELOADED = {"aliases": "[aliases]", "sticky": "[sticky]", "shadow": "shadow = []"}
"""Settings that SIGHUP reads again, and how a file says that there are none."""

EPILOG = """
Examples:

    lowkey-serve dense=demo/model reduced=out/demo-64

    lowkey-serve dense=fla-hub/delta_net-1.3B-100B reduced=./delta_net-64 --device cuda --port 9000

    lowkey-serve --config lowkey.toml --check-config

Every option can also be set in the environment, e.g. LOWKEY_MAX_REQUESTS=128, or in the file of --config; the command
line counts before the environment, and that before the file. SIGHUP re-reads aliases, stickiness and shadow rules.
"""


class Server(uvicorn.Server):
    """uvicorn that on SIGTERM or SIGINT refuses new work, lets the running requests end, and exits with 0.

    While it drains it still listens: /ready and new requests get their 503.

    Args:
        reload: reads the settings again, at SIGHUP.
        url: what to open in a browser.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, reload: Callable[[], Settings], url: str
    ) -> None:
        super().__init__(config)
        self._service = service
        self._reload = reload
        self._url = url
        self._drain_at = self._drain_until = 0.0
        self._announced = self._drain_announced = False
        self.failed: dict[str, str] = {}
        """The variants that could not be loaded, and why, if that is why the server stopped."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.handle_hangup)
        await super().startup(sockets)
        logger.info("running on %s (Ctrl-C to quit)", self._url)

    def handle_hangup(self) -> None:
        """Take over what may change while the server runs, and say what may not. Requests don't notice.

        What was set and is not any more keeps the old: a file that somebody is just writing looks like that.
        """
        old = self._service.settings
        try:
            new = self._reload()
            missing = [name for name in RELOADED if name in old.model_fields_set - new.model_fields_set]
            if missing:
                empty = ", ".join(RELOADED[name] for name in missing)
                raise ConfigurationError(
                    f"no more {', '.join(missing)} there; to do without, say so: {empty}"
                )
            self._service.routing.replace(new)
        except (ConfigurationError, ValueError) as e:
            logger.error("SIGHUP: the old configuration stays: %s", e)
            return
        others = sorted(
            name
            for name in Settings.model_fields
            if name not in RELOADED and getattr(old, name) != getattr(new, name)
        )
        taken = {name: getattr(new, name) for name in RELOADED if name in new.model_fields_set}
        self._service.settings = old.model_copy(update=taken)
        logger.info(
            "SIGHUP: read aliases %s, sticky and %d shadow rules", sorted(new.aliases), len(new.shadow)
        )
        dropped = sorted(old.aliases.keys() - new.aliases.keys())
        if dropped:
            logger.warning("SIGHUP: aliases that are gone, and answered with 404: %s", ", ".join(dropped))
        if others:
            logger.warning("SIGHUP: changed too, but read at the start only: %s", ", ".join(others))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not uvicorn's own: that one stops listening at once, and kills the process when all is done."""
        settings, now, again = self._service.settings, time.monotonic(), self._service.leaving
        self._service.leaving = True
        self._drain_at = now if again else now + settings.drain_delay_s
        self._drain_until = now if again else self._drain_at + settings.drain_s
        self._service.draining = self._drain_at <= now

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: say when all models are up, and once a drain is over, stop. Requests that outlast it get
        their error event first."""
        variants = list(self._service.variants)
        if not self._announced and all(variant.client.up for variant in variants):
            self._announced = True
            names = ", ".join(variant.name for variant in variants)
            logger.info("ready: %s; open %s", names, self._url)
            # What is there now stays. To look through it for garbage again and again would hold up all streams.
            gc.collect()
            gc.freeze()
        if self._service.leaving and time.monotonic() >= self._drain_at:
            self._service.draining = True
        if self._service.draining and not self.should_exit:
            await self._drain(sum(variant.answers for variant in variants))
        return await super().on_tick(counter)

    async def _drain(self, running: int) -> None:
        left = self._drain_until - time.monotonic()
        if running and left > 0:
            if not self._drain_announced:
                self._drain_announced = True
                logger.info("draining: %d requests run, up to %.0f s; once more to stop now", running, left)
            return
        if running:
            await self._service.variants.close()
        self.should_exit = True

    def fail(self, variant: str, reason: str) -> None:
        self.failed[variant] = reason
        self.should_exit = True


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to each address of the host, before models are loaded for nothing.

    Raises:
        ConfigurationError: there is no such address here, or its port is taken.
    """
    bound: list[socket.socket] = []
    problem: OSError | None = None
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in addresses:
            try:
                one = socket.socket(family, kind, protocol)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind(address)
                bound.append(one)
            except OSError as e:
                if e.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                problem = e  # localhost, say, where there is no IPv6
        if not bound and problem is not None:
            raise problem
    except OSError as e:
        for one in bound:
            one.close()
        if e.errno == errno.EADDRINUSE:
            other = port + 10 if port < 65000 else 8010
            raise ConfigurationError(
                f"port {port} of {host} is taken; choose another with --port {other}, or with LOWKEY_PORT={other} "
                f"before the command (LOWKEY_PORT={other} make demo)"
            ) from e
        raise ConfigurationError(f"can't listen on {host}, port {port}: {e.strerror}") from e
    return bound


def url_of(host: str, port: int) -> str:
    """What a browser on this machine opens to get to a server that listens there."""
    here = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}"


def parse_variants(arguments: list[str]) -> dict[str, str]:
    """`name=PATH_OR_HUB_ID` arguments, in order. Raises typer.BadParameter."""
    variants: dict[str, str] = {}
    for argument in arguments:
        name, separator, source = argument.partition("=")
        if not separator or not source or not name:
            raise typer.BadParameter(f"{argument!r} is not name=PATH_OR_HUB_ID, e.g. dense=demo/model")
        if name in variants:
            raise typer.BadParameter(f"the variant name {name!r} is given twice")
        variants[name] = source
    return variants


def check_sources(settings: Settings) -> None:
    """Raises typer.BadParameter unless the files of all local checkpoints are there (`check_source`)."""
    problems = []
    for name, variant in settings.variants.items():
        try:
            check_source(variant.source)
        except CheckpointError as e:
            problems.append(f"variants.{name}: {e}")
    if problems:
        raise typer.BadParameter("; ".join(problems))


@app.command(epilog=EPILOG)
def serve(
    variants: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=PATH_OR_HUB_ID ...", help="The models to serve.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one. [default: 8000]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. [default: auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16. [default: auto]")] = None,
    max_requests: Annotated[
        int | None,
        typer.Option(help="Requests that run at once in each variant. [default: one per state slot]"),
    ] = None,
    state_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|SHARE",
            help="Memory of each variant's state slots, as 2GiB or as a share of the free memory like 0.5. "
            "[default: on a GPU all of it; on a CPU a slot for each of --max-requests, else 64 slots]",
        ),
    ] = None,
    state_dtype: Annotated[
        str | None, typer.Option(help="The recurrent state: float32 or bfloat16. [default: float32]")
    ] = None,
    prefix_cache: Annotated[
        bool | None,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Keep states of prompts for prompts that begin alike. [default: on]",
        ),
    ] = None,
    batch_invariant: Annotated[
        bool | None,
        typer.Option(
            "--batch-invariant/--no-batch-invariant",
            help="Tokens are bit for bit the same whatever else runs; slower. [default: off]",
        ),
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(help="Requests that may wait in each variant. [default: 256]")
    ] = None,
    prefill_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most prompt tokens in one step, a multiple of 64. [default: 128 on a CPU, 512 on a GPU]"
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each engine process. [default: 1]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any of the settings, e.g. lowkey.toml.")
    ] = None,
    check_config: Annotated[
        bool,
        typer.Option(
            "--check-config",
            help="Print the settings that would be used as JSON, and exit. Local models must be there; hub ids are not "
            "looked up.",
        ),
    ] = False,
    version: Version = False,
) -> None:
    """Serve models over the OpenAI API, each as a *variant* behind an engine process of its own."""
    options: dict[str, Any] = {
        "variants": parse_variants(variants) if variants else None,
        "host": host,
        "port": port,
        "device": device,
        "dtype": dtype,
        "max_requests": max_requests,
        "state_memory": state_memory,
        "state_dtype": state_dtype,
        "prefix_cache": prefix_cache,
        "batch_invariant": batch_invariant,
        "max_queue": max_queue,
        "prefill_tokens": prefill_tokens,
        "threads": threads,
    }
    given = {name: value for name, value in options.items() if value is not None}
    try:
        settings = load_settings(config, **given)
    except ConfigurationError as e:
        raise typer.BadParameter(str(e)) from e
    if not settings.variants:
        raise typer.BadParameter("no model to serve; give at least one as name=PATH_OR_HUB_ID")
    check_sources(settings)
    if check_config:
        # Settings that were left alone are shown too. Of keys there is only the hash.
        typer.echo(json.dumps(settings.model_dump(mode="json", by_alias=True), indent=2))
        return
    try:
        run(settings, lambda: load_settings(config, **given))
    except ConfigurationError as e:
        raise typer.BadParameter(str(e)) from e


def run(settings: Settings, reload: Callable[[], Settings]) -> None:
    """Serve until SIGTERM or SIGINT. Exits with 1 if a checkpoint can't be loaded.

    Args:
        reload: reads the settings again, at SIGHUP.

    Raises:
        ConfigurationError: the port is taken, or `state_dir` can't be written to.
    """
    configure(settings.log_level, settings.log_format)
    sockets = listen(settings.host, settings.port)
    fastapi_app = create_app(settings, on_fatal=lambda variant, reason: server.fail(variant, reason))
    config = uvicorn.Config(
        fastapi_app,
        host=settings.host,
        port=settings.port,
        http=HttpProtocol.with_timeouts(
            header_s=settings.header_timeout_s, write_s=settings.write_timeout_s, linger_s=settings.linger_s
        ),
        log_config=None,
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,  # the drain itself is over by then
        server_header=False,
    )
    url = url_of(settings.host, sockets[0].getsockname()[1])
    server = Server(config, fastapi_app.state.service, reload, url)
    server.run(sockets=sockets)
    for variant, reason in server.failed.items():
        logger.error("variant %r could not be loaded: %s", variant, reason)
    if server.failed:
        raise typer.Exit(1)
