"""`lowkey-serve`: serve dense and reduced variants of a model side by side."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lowkey.cli import Version
from modeling.sources import CheckpointError, check_source
from server.logs import configure
from server.run import serve_until_over
from server.settings import ConfigurationError, Settings, load_settings

logger = logging.getLogger("lowkey.server")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

EPILOG = """
Examples:

    lowkey-serve dense=demo/model reduced=out/demo-64

    lowkey-serve dense=fla-hub/delta_net-1.3B-100B reduced=./delta_net-64 --device cuda --port 9000

    lowkey-serve --config lowkey.toml --check-config

Every option can also be set in the environment, e.g. LOWKEY_MAX_REQUESTS=128, or in the file of --config; the command
line counts before the environment, and that before the file. SIGHUP re-reads aliases, stickiness, shadow rules and API
keys.
"""


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
            help="Memory of each variant's states, as 2GiB or as a share of the free memory like 0.5. "
            "[default: on a GPU all of it; on a CPU what --max-requests need, else 64 requests]",
        ),
    ] = None,
    context_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens that a request of a model with softmax attention is expected to hold. [default: 4096]"
        ),
    ] = None,
    state_dtype: Annotated[
        str | None,
        typer.Option(
            help="The recurrent state: float32, bfloat16 (half of it) or int8 (about a quarter). [default: float32]"
        ),
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
            help="Most prompt tokens in one step, a multiple of 64. [default: 128 on a CPU, 4096 on a GPU]"
        ),
    ] = None,
    api_processes: Annotated[
        int | None,
        typer.Option(
            help="Processes that answer HTTP requests, on one port. [default: 1, with a model on a GPU up to 4]"
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
        "context_tokens": context_tokens,
        "state_dtype": state_dtype,
        "prefix_cache": prefix_cache,
        "batch_invariant": batch_invariant,
        "max_queue": max_queue,
        "prefill_tokens": prefill_tokens,
        "api_processes": api_processes,
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
    failed = serve_until_over(settings, reload)
    for variant, reason in failed.items():
        logger.error("variant %r could not be loaded: %s", variant, reason)
    if failed:
        raise typer.Exit(1)
