"""`lowkey-loadtest`: the same load on dense and reduced, in turns."""

import asyncio
import ipaddress
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtest.client import Result
from loadtest.figures import Objectives
from loadtest.run import Load, Probe, Target, paired, sweep
from loadtest.workload import Lengths, Workload, WorkloadError, read_trace

try:
    from loadtest import report
except ModuleNotFoundError as e:  # before any load, not after it
    raise SystemExit(f"error: {e}; pip install 'lowkey[loadtest]'") from e

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
console = Console(stderr=True)

MAX_REQUESTS = 100_000
"""Of a test, warm-up aside."""


def _lengths(text: str | Lengths) -> Lengths:
    if isinstance(text, Lengths):  # typer parses defaults too
        return text
    try:
        return Lengths(text)
    except WorkloadError as e:
        raise typer.BadParameter(str(e)) from e


PROMPTS = Lengths("64-256")
OUTPUTS = Lengths("32-96")

Url = Annotated[str, typer.Option(help="The server.")]
Variants = Annotated[
    str, typer.Option(help="Variants with commas between; the first is the baseline. [default: all]")
]
Prompt = Annotated[
    Lengths,
    typer.Option(
        parser=_lengths, metavar="LENGTHS", help="Prompt tokens: 128, 32-256 or lognormal:MEDIAN,SIGMA,MOST."
    ),
]
Output = Annotated[
    Lengths, typer.Option(parser=_lengths, metavar="LENGTHS", help="Generated tokens, likewise.")
]
Trace = Annotated[
    Path | None,
    typer.Option(
        help="JSONL with prompt (text or ids) or prompt_tokens, and max_tokens, instead of drawn lengths."
    ),
]
Vocab = Annotated[int, typer.Option(min=2, help="Token ids are drawn below this.")]
Seed = Annotated[int, typer.Option(help="Of prompts and arrivals.")]
Temperature = Annotated[float, typer.Option(min=0, help="Sampling temperature.")]
SloTtft = Annotated[float, typer.Option(min=0, help="Objective: seconds to the first token.")]
SloItl = Annotated[float, typer.Option(min=0, help="Objective: mean seconds between a request's tokens.")]
SloTotal = Annotated[float | None, typer.Option(min=0, help="Objective: seconds end to end. [default: none]")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds after which a request counts as an error.")]
MaxSeconds = Annotated[float, typer.Option(min=1, help="No round begins after this.")]
Out = Annotated[Path, typer.Option(help="Directory for loadtest.json, loadtest.md and loadtest.html.")]
Key = Annotated[str, typer.Option(envvar="LOWKEY_LOADTEST_API_KEY", help="API key.", show_default=False)]
Remote = Annotated[bool, typer.Option("--allow-remote", help="Load a server that is not on this machine.")]


def check_target(url: str, allow_remote: bool) -> None:
    """Raises typer.BadParameter unless the host is a loopback address or `allow_remote`."""
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


def find_variants(url: str, wanted: str, key: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Names to test, and what the server says of them. Raises typer.BadParameter."""
    try:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        response = httpx.get(f"{url}/v1/models", headers=headers, timeout=60, trust_env=False)
        response.raise_for_status()
        models = [m for m in response.json()["data"] if "alias" not in m["lowkey"]]
    except (httpx.HTTPError, ValueError, KeyError) as e:
        raise typer.BadParameter(f"--url {url}: {e}; is the server up? `make demo` starts one") from e
    known = [m["id"] for m in models]
    names = tuple(dict.fromkeys(filter(None, wanted.split(",")))) or tuple(known)
    if missing := [n for n in names if n not in known]:
        raise typer.BadParameter(f"--variants: no {missing}; the server has {known}")
    return names, [m for m in models if m["id"] in names]


def _workload(prompt: Lengths, output: Lengths, trace: Path | None, vocab: int, seed: int) -> Workload:
    try:
        return Workload(prompt, output, vocab, seed, read_trace(trace, vocab, seed) if trace else ())
    except WorkloadError as e:
        raise typer.BadParameter(str(e)) from e


def _show(rows: list[list[str]]) -> None:
    table = Table(*(rows[0]))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=max(80, console.width)).print(table)


@app.command()
def run(
    url: Url = "http://127.0.0.1:8000",
    variants: Variants = "",
    rate: Annotated[
        float | None, typer.Option(min=0.01, help="Open loop: requests a second, Poisson.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Closed loop: clients. [default: 8]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds; variants take turns in each.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="Requests per round and variant.")] = 40,
    warm_up: Annotated[int, typer.Option(min=1, max=1000, help="Requests per variant that don't count.")] = 8,
    prompt_tokens: Prompt = PROMPTS,
    output_tokens: Output = OUTPUTS,
    trace: Trace = None,
    vocab: Vocab = 256,
    seed: Seed = 0,
    temperature: Temperature = 0.0,
    slo_ttft: SloTtft = 0.5,
    slo_itl: SloItl = 0.05,
    slo_total: SloTotal = None,
    timeout: Timeout = 60.0,
    max_seconds: MaxSeconds = 900.0,
    out: Out = Path("out/loadtest"),
    api_key: Key = "",
    allow_remote: Remote = False,
) -> None:
    """Rounds of the same requests to each variant, one variant at a time."""
    check_target(url, allow_remote)
    if rate is not None and concurrency is not None:
        raise typer.BadParameter("--rate is an open loop, --concurrency a closed one: give one of them")
    names, models = find_variants(url, variants, api_key)
    if rounds * requests * len(names) > MAX_REQUESTS:
        raise typer.BadParameter(f"--rounds x --requests x variants is over {MAX_REQUESTS}")
    workload = _workload(prompt_tokens, output_tokens, trace, vocab, seed)
    load = Load(rate, None if rate is not None else concurrency or 8)
    objectives = Objectives(slo_ttft, slo_itl, slo_total)
    target = Target(url, names, api_key, timeout, temperature)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=rounds * requests) for name in names}

        def on_result(variant: str, result: Result) -> None:
            progress.advance(tasks[variant])
            if result.error:
                progress.console.print(
                    f"{variant}: {result.error}", style="red", highlight=False, markup=False
                )

        try:
            slices = asyncio.run(
                paired(
                    target,
                    load,
                    workload,
                    rounds,
                    requests,
                    warm_up,
                    time.monotonic() + max_seconds,
                    on_result,
                )
            )
        except ConnectionError as e:
            raise typer.BadParameter(str(e)) from e
    described = report.describe(slices, names, objectives)
    how = f"{rate:g} requests/s, Poisson" if rate is not None else f"{load.concurrency} clients, closed loop"
    lengths = (
        f"trace {trace.name}"
        if trace
        else f"prompts of {prompt_tokens.text} tokens, {output_tokens.text} new"
    )
    done = len({s.round for s in slices})
    title = f"{how}; {lengths}; {done} rounds of {requests}"
    options = {"url": url, **asdict(load), "rounds": done, "requests": requests, "prompt_tokens": prompt_tokens.text,
               "output_tokens": output_tokens.text, "trace": str(trace) if trace else None, "seed": seed,
               "temperature": temperature, **asdict(objectives)}  # fmt: skip
    data = {"options": options, "models": models, **described, "requests": report.requests_of(slices)}
    rows = report.table(described)
    report.write(
        out,
        data,
        f"{title}.\n\n{report.markdown(rows)}",
        report.plot_paired(slices, names, objectives),
        title,
    )
    _show(rows)
    typer.echo(f"{title}\n{out}/loadtest.html, .json, .md")


@app.command("sweep")
def sweep_command(
    url: Url = "http://127.0.0.1:8000",
    variants: Variants = "",
    start: Annotated[float, typer.Option(min=0.01, help="Requests a second to begin with.")] = 2.0,
    seconds: Annotated[float, typer.Option(min=1, max=600, help="Of each probe.")] = 15.0,
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
    prompt_tokens: Prompt = PROMPTS,
    output_tokens: Output = OUTPUTS,
    trace: Trace = None,
    vocab: Vocab = 256,
    seed: Seed = 0,
    temperature: Temperature = 0.0,
    slo_ttft: SloTtft = 0.5,
    slo_itl: SloItl = 0.05,
    slo_total: SloTotal = None,
    timeout: Timeout = 60.0,
    max_seconds: MaxSeconds = 900.0,
    out: Out = Path("out/loadtest-sweep"),
    api_key: Key = "",
    allow_remote: Remote = False,
) -> None:
    """The highest rate that each variant holds within the objectives: bisection, variants in turns."""
    check_target(url, allow_remote)
    names, models = find_variants(url, variants, api_key)
    workload = _workload(prompt_tokens, output_tokens, trace, vocab, seed)
    objectives = Objectives(slo_ttft, slo_itl, slo_total)
    target = Target(url, names, api_key, timeout, temperature)

    def on_probe(p: Probe) -> None:
        verdict = "held" if p.held else "not held"
        console.print(
            f"{p.variant}: {p.rate:.2f} requests/s {verdict}, {p.share:.1%} within the objectives",
            highlight=False,
        )

    try:
        searches, probes = asyncio.run(
            sweep(target, workload, objectives, start, seconds, attain, precision, steps, max_requests,
                  time.monotonic() + max_seconds, on_probe)
        )  # fmt: skip
    except ConnectionError as e:
        raise typer.BadParameter(str(e)) from e
    rows = report.sweep_table(searches)
    title = f"{attain:.0%} of requests within TTFT {slo_ttft:g} s and mean ITL {1e3 * slo_itl:g} ms"
    data = {
        "objectives": asdict(objectives), "attain": attain, "models": models,
        "searches": {name: {"holds": s.low, "does_not_hold": s.high} for name, s in searches.items()},
        "probes": [{"variant": p.variant, "rate": p.rate, "held": p.held, "share": p.share} for p in probes],
    }  # fmt: skip
    report.write(
        out,
        data,
        f"{title}.\n\n{report.markdown(rows)}",
        report.plot_sweep(probes, objectives, attain),
        title,
    )
    _show(rows)
    typer.echo(f"{title}\n{out}/loadtest.html, .json, .md")
