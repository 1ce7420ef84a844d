"""`lowkey-loadtest`: the same load on dense and reduced, in turns."""

import asyncio
import inspect
import ipaddress
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtest.client import Result
from loadtest.facts import circumstances, without_password
from loadtest.figures import Objectives
from loadtest.run import Load, Probe, Target, paired, sweep
from loadtest.workload import Lengths, Workload, WorkloadError, read_trace
from lowkey import how_to_install
from lowkey.cli import Version
from lowkey.files import Found, OutputError, check_new_file, write_or_keep
from lowkey.publishing import remove_working_directories
from lowkey.signals import ending_on_signals

try:
    from loadtest import plots, report
except ModuleNotFoundError as e:  # before any load, not after it
    raise SystemExit(f"error: {e}: {how_to_install('loadtest')}") from e

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
console = Console(stderr=True)


@app.callback()
def main(version: Version = False) -> None:
    """The same load on each variant of a running server, in turns."""


MAX_REQUESTS = 100_000
"""The most requests of a test, warm-up aside."""

OUT = typer.Option(help="Directory for loadtest.json, loadtest.md and loadtest.html.")


def _lengths(text: str | Lengths) -> Lengths:
    if isinstance(text, Lengths):  # typer parses defaults too
        return text
    try:
        return Lengths(text)
    except WorkloadError as e:
        raise typer.BadParameter(str(e)) from e


PROMPTS = Lengths("64-256")
OUTPUTS = Lengths("32-96")


@dataclass(frozen=True)
class Common:
    """The options that both commands have."""

    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000"
    variants: Annotated[
        str, typer.Option(help="Variants with commas between; the first is the baseline. [default: all]")
    ] = ""
    prompt_tokens: Annotated[
        Lengths,
        typer.Option(
            parser=_lengths,
            metavar="LENGTHS",
            help="Prompt tokens: 128, 32-256 or lognormal:MEDIAN,SIGMA,MOST.",
        ),
    ] = PROMPTS
    output_tokens: Annotated[
        Lengths, typer.Option(parser=_lengths, metavar="LENGTHS", help="Generated tokens, likewise.")
    ] = OUTPUTS
    trace: Annotated[
        Path | None,
        typer.Option(
            help="JSONL with prompt (text or ids) or prompt_tokens, and max_tokens, instead of drawn lengths."
        ),
    ] = None
    vocab: Annotated[int, typer.Option(min=2, help="Token ids are drawn below this.")] = 256
    seed: Annotated[int, typer.Option(help="Seed of lengths and arrivals.")] = 0
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature.")] = 0.0
    slo_ttft: Annotated[float, typer.Option(min=0, help="Objective: seconds to the first token.")] = 0.5
    slo_itl: Annotated[
        float, typer.Option(min=0, help="Objective: mean seconds between a request's tokens.")
    ] = 0.05
    slo_total: Annotated[
        float | None, typer.Option(min=0, help="Objective: seconds end to end. [default: none]")
    ] = None
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds after which a request counts as an error.")
    ] = 60.0
    max_seconds: Annotated[float, typer.Option(min=1, help="No round begins after this.")] = 900.0
    api_key: Annotated[
        str, typer.Option(envvar="LOWKEY_LOADTEST_API_KEY", help="API key.", show_default=False)
    ] = ""
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Load a server that is not on this machine.")
    ] = False

    @property
    def objectives(self) -> Objectives:
        return Objectives(self.slo_ttft, self.slo_itl, self.slo_total)

    @property
    def lengths(self) -> str:
        """The lengths of what is sent, in words."""
        if self.trace:
            return f"trace {self.trace.name}"
        return f"prompts of {self.prompt_tokens} tokens, {self.output_tokens} new"

    def target(self) -> tuple[Target, dict[str, Any]]:
        """Where to send requests, and the circumstances of the test for its report. Raises typer.BadParameter."""
        local = check_target(self.url, self.allow_remote)
        names, models, version = find_variants(self.url, self.variants, self.api_key)
        target = Target(self.url, names, self.api_key, self.timeout, self.temperature)
        return target, circumstances(self.url, version, models, local=local)

    def workload(self) -> Workload:
        """What to send. Raises typer.BadParameter."""
        try:
            trace = read_trace(self.trace, self.vocab, self.seed) if self.trace else ()
            salt = secrets.token_hex(8)
            return Workload(self.prompt_tokens, self.output_tokens, self.vocab, self.seed, trace, salt)
        except WorkloadError as e:
            raise typer.BadParameter(str(e)) from e

    def record(self) -> dict[str, Any]:
        """The options by name, as the JSON shows them: without the API key."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "api_key"}
        plain = {name: str(v) if isinstance(v, Lengths) else v for name, v in values.items()}
        trace = str(self.trace) if self.trace else None
        return plain | {"trace": trace, "url": without_password(self.url)}


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose first parameter is a `Common`: its fields become options beside the command's own."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def run_with_options(**given: Any) -> None:
            common = Common(**{f.name: given.pop(f.name) for f in fields(Common)})
            with ending_on_signals(remove_working_directories):
                function(common, **given)

        shared = list(inspect.signature(Common).parameters.values())
        own = list(inspect.signature(function).parameters.values())[1:]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *shared)]
        run_with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run_with_options.__annotations__ = {p.name: p.annotation for p in parameters}
        run_with_options.__doc__ = function.__doc__
        return app.command(name)(run_with_options)

    return register


def check_target(url: str, allow_remote: bool) -> bool:
    """Whether the host is a loopback address. Raises typer.BadParameter unless it is, or `allow_remote`."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as e:
        raise typer.BadParameter(f"--url {url!r}: {e}") from e
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise typer.BadParameter(f"--url {url!r} is no http:// or https:// address")
    try:
        local = ipaddress.ip_address(parsed.host).is_loopback
    except ValueError:
        local = parsed.host == "localhost"
    if not local and not allow_remote:
        raise typer.BadParameter(
            f"--url: {parsed.host} is not this machine; --allow-remote if you may load it"
        )
    return local


def find_variants(url: str, wanted: str, key: str) -> tuple[tuple[str, ...], list[dict[str, Any]], str]:
    """Names to test, what the server says of them, and its version. Raises typer.BadParameter."""
    try:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
            listed, said = (client.get(path).raise_for_status().json() for path in ("/v1/models", "/version"))
        models = [m for m in listed["data"] if "alias" not in m["lowkey"]]
        version = str(said["version"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as e:
        raise typer.BadParameter(f"--url {url}: {e}; is the server up? `make demo` starts one") from e
    known = [m["id"] for m in models]
    names = tuple(dict.fromkeys(filter(None, wanted.split(",")))) or tuple(known)
    if missing := [n for n in names if n not in known]:
        raise typer.BadParameter(f"--variants: no {missing}; the server has {known}")
    return names, [m for m in models if m["id"] in names], version


def _show(rows: list[list[str]]) -> None:
    table = Table(*map(escape, rows[0]))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    Console(width=max(80, console.width)).print(table)


def _check_out(out: Path) -> dict[str, Found | None]:
    """What an earlier test left in the directory, by name: what is going to be replaced. Called before any load.

    Raises:
        typer.BadParameter: nothing can be written there.
    """
    try:
        return {name: check_new_file(out / name, "out", overwrite=True) for name in report.FILES}
    except OutputError as e:
        raise typer.BadParameter(f"--out: {e}") from e


def _finish(
    out: Path,
    data: dict[str, Any],
    rows: list[list[str]],
    drawn: list[plots.Plot],
    title: str,
    finding: str,
    caption: str,
    *,
    replaces: dict[str, Found | None],
) -> None:
    _show(rows)
    typer.echo(f"{title}\n{finding}")
    try:
        write_or_keep(
            out,
            lambda folder: report.write(
                folder, data, rows, drawn, title, finding, caption, replaces=replaces
            ),
        )
    except OutputError as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(2) from e
    typer.echo(f"{out}/loadtest.html, .json, .md")


@command("run")
def run(
    common: Common,
    rate: Annotated[
        float | None, typer.Option(min=0.01, help="Open loop: requests a second, Poisson.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Closed loop: clients. [default: 8]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds; variants take turns in each.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="Requests per round and variant.")] = 40,
    warm_up: Annotated[int, typer.Option(min=1, max=1000, help="Requests per variant that don't count.")] = 8,
    out: Annotated[Path, OUT] = Path("out/loadtest"),
) -> None:
    """Rounds of the same requests to each variant, one variant at a time."""
    if rate is not None and concurrency is not None:
        raise typer.BadParameter("--rate is an open loop, --concurrency a closed one: give one of them")
    target, seen = common.target()
    replaces = _check_out(out)
    if rounds * requests * len(target.variants) > MAX_REQUESTS:
        raise typer.BadParameter(f"--rounds x --requests x variants is over {MAX_REQUESTS}")
    workload = common.workload()
    load = Load(rate, None if rate is not None else concurrency or 8)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=rounds * requests) for name in target.variants}

        def on_result(variant: str, result: Result) -> None:
            progress.advance(tasks[variant])
            if result.error:
                progress.console.print(
                    f"{variant}: {result.error}", style="red", highlight=False, markup=False
                )

        until = time.monotonic() + common.max_seconds
        try:
            slices = asyncio.run(paired(target, load, workload, rounds, requests, warm_up, until, on_result))
        except ConnectionError as e:
            raise typer.BadParameter(str(e)) from e
    described = report.describe(slices, target.variants, common.objectives)
    done = len({s.round for s in slices})
    how = f"{rate:g} requests/s, Poisson" if rate is not None else f"{load.concurrency} clients, closed loop"
    title = f"{how}; {common.lengths}; {done} rounds of {requests}"
    options = {**common.record(), **asdict(load), "rounds": done, "requests": requests, "warm_up": warm_up}
    data = {**seen, "options": options, **described, "requests": report.requests_of(slices)}
    drawn = plots.paired(slices, target.variants, common.objectives)
    finding = report.finding(described)
    _finish(out, data, report.table(described), drawn, title, finding, report.PAIRED, replaces=replaces)


@command("sweep")
def sweep_command(
    common: Common,
    start: Annotated[float, typer.Option(min=0.01, help="Requests a second to begin with.")] = 2.0,
    seconds: Annotated[float, typer.Option(min=1, max=600, help="Seconds that each probe lasts.")] = 15.0,
    attain: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of requests that must keep the objectives.")
    ] = 0.95,
    precision: Annotated[
        float, typer.Option(min=0.01, help="Stop when the bracket is this narrow, relative.")
    ] = 0.1,
    steps: Annotated[int, typer.Option(min=1, max=40, help="Most probes of each variant.")] = 10,
    max_requests: Annotated[
        int, typer.Option(min=20, max=MAX_REQUESTS, help="Most requests of one probe.")
    ] = 2000,
    out: Annotated[Path, OUT] = Path("out/loadtest-sweep"),
) -> None:
    """The highest rate that each variant holds within the objectives: bisection, variants in turns."""
    target, seen = common.target()
    replaces = _check_out(out)
    workload, objectives = common.workload(), common.objectives

    def on_probe(p: Probe) -> None:
        verdict = "held" if p.held else "not held"
        console.print(
            f"{p.variant}: {p.rate:.2f} requests/s {verdict}, {p.share:.1%} within the objectives",
            highlight=False,
        )

    try:
        searches, probes = asyncio.run(
            sweep(target, workload, objectives, start, seconds, attain, precision, steps, max_requests,
                  time.monotonic() + common.max_seconds, on_probe)
        )  # fmt: skip
    except ConnectionError as e:
        raise typer.BadParameter(str(e)) from e
    probing = {
        "start": start,
        "seconds": seconds,
        "attain": attain,
        "precision": precision,
        "steps": steps,
        "max_requests": max_requests,
    }
    title = (
        f"{attain:.0%} of requests within TTFT {objectives.ttft_s:g} s and mean ITL {1e3 * objectives.itl_s:g} ms; "
        f"{common.lengths}"
    )
    data = {
        **seen,
        "options": {**common.record(), **probing},
        "searches": {name: {"holds": s.low, "does_not_hold": s.high} for name, s in searches.items()},
        "probes": [{"variant": p.variant, "rate": p.rate, "held": p.held, "share": p.share} for p in probes],
    }
    drawn = plots.sweep(probes, objectives, attain)
    finding = report.sweep_finding(searches)
    _finish(out, data, report.sweep_table(searches), drawn, title, finding, report.SWEPT, replaces=replaces)
