"""Four fifths of the highest rate that the server holds, for a long time: no error, flat memory, a stable p99?

    python benchmarks/steady.py --minutes 30 --json steady.json
    python benchmarks/steady.py --minutes 30 --rate 3           # requests a second, instead of a search for it

A real `lowkey-serve` with a dense and a reduced variant behind one alias, half of the requests each. The search is
`lowkey-loadtest sweep`'s, over the alias; the load is an open loop (Poisson): latencies count from when a request was
due. benchmarks/soak.py has the other kind of long test: clients that leave, engines that are killed.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from _serving import MODEL, Server, table, variants
from outputs import figures_file, write_figures
from soak import Memory, grown, memory_table, settled, watch

from loadtest.client import Result, open_loop, quantile
from loadtest.figures import Objectives
from loadtest.run import Probe, Target, sweep
from loadtest.workload import Lengths, Workload
from lowkey.words import counted

ALIAS = "both"
SHARE = 0.8
"""The rate that is sent, as a share of the highest one that was held."""

WINDOWS = 10
STABLE = 1.5
"""The median p99 of the last third of the windows may be that many times the first third's."""

OBJECTIVES = Objectives(0.5, 0.05)
SOAK_BLOCK = 1
"""Number of the workload's block that the soak sends; the search sends block 0."""


@dataclass(frozen=True)
class Window:
    """Requests that were due in one part of the time."""

    requests: int
    errors: int
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p99_s: float
    total_p99_s: float


def highest_rate(server: Server, workload: Workload, options: argparse.Namespace) -> float:
    """Requests a second that the alias holds."""

    def say(probe: Probe) -> None:
        print(f"{probe.rate:.2f} requests/s: {probe.share:.1%} within the objectives", flush=True)

    searches, _ = asyncio.run(
        sweep(Target(server.url, (ALIAS,)), workload, OBJECTIVES, start=2.0, seconds=options.probe, attain=0.95,
              precision=0.1, steps=12, max_requests=2000, until=time.monotonic() + 900, on_probe=say)
    )  # fmt: skip
    return searches[ALIAS].low


async def load(
    server: Server, workload: Workload, rate: float, seconds: float, memory: Memory
) -> list[Result]:
    """The open loop, with progress and samples of memory."""
    count = max(round(rate * seconds), 1)
    arrivals = workload.arrivals(SOAK_BLOCK, count, rate)
    done: list[Result] = []

    async def report() -> None:
        while True:
            await asyncio.sleep(max(10.0, seconds / 20))
            errors = sum(bool(r.error) for r in done)
            print(f"{len(done)} of {count} requests, {errors} errors", flush=True)

    watching = asyncio.create_task(watch(server, time.monotonic() + arrivals[-1], memory))
    reporting = asyncio.create_task(report())
    results, _ = await open_loop(
        server.url,
        ALIAS,
        workload.requests(SOAK_BLOCK, count),
        arrivals,
        on_result=done.append,
        temperature=0.0,
    )
    reporting.cancel()
    await watching
    return results


def windows(results: list[Result]) -> list[Window]:
    """Equal parts of the time by when requests were due."""
    first, last = min(r.sent for r in results), max(r.sent for r in results)
    parts: list[list[Result]] = [[] for _ in range(WINDOWS)]
    for r in results:
        parts[min(int(WINDOWS * (r.sent - first) / max(last - first, 1e-9)), WINDOWS - 1)].append(r)
    return [_window(part) for part in parts if part]


def _window(part: list[Result]) -> Window:
    good = [r for r in part if r.error is None and r.token_times]
    first = [r.ttft_s for r in good]
    return Window(
        requests=len(part),
        errors=len(part) - len(good),
        ttft_p50_s=quantile(first, 0.5),
        ttft_p99_s=quantile(first, 0.99),
        itl_p99_s=quantile([gap for r in good for gap in r.itl_s], 0.99),
        total_p99_s=quantile([r.ended - r.sent for r in good], 0.99),
    )


def drift(seen: list[Window], name: str) -> float:
    """Median of the last third of the windows over that of the first third."""
    third = max(len(seen) // 3, 1)
    values = [getattr(w, name) for w in seen]
    return quantile(values[-third:], 0.5) / quantile(values[:third], 0.5)


def verdict(
    server: Server, names: list[str], results: list[Result], memory: Memory, seconds: float
) -> list[str]:
    """Everything that is not as it should be."""
    errors = [r.error or "no token" for r in results if r.error or not r.token_times]
    wrong = (
        [f"{len(errors)} of {len(results)} requests failed, the first with {errors[0]!r}"] if errors else []
    )
    wrong += grown(memory, seconds)
    seen = windows(results)
    for name in ("ttft_p99_s", "itl_p99_s", "total_p99_s"):
        if not drift(seen, name) <= STABLE:
            wrong.append(f"{name} is {drift(seen, name):.2f} times what it was at first")
    if "Traceback" in server.log.read_text() or len(memory) != 1 + len(names):
        wrong.append(f"a process was started again, or the log has an error: {sorted(memory)}")
    return wrong + settled(server, names)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument(
        "--rate", type=float, help="requests a second; default: 80 %% of the highest that is held"
    )
    parser.add_argument(
        "--probe", type=float, default=60.0, help="seconds of each probe: short ones miss a slow queue"
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--json", type=figures_file)
    options = parser.parse_args()
    workload = Workload(Lengths("64-256"), Lengths("32-96"), 256, seed=0, salt="steady")
    memory: Memory = {}
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = variants(Path(directory), options.model)
        names = list(checkpoints)
        os.environ["LOWKEY_ALIASES"] = json.dumps({ALIAS: dict.fromkeys(names, 1)})
        server = Server(checkpoints)
        try:
            highest = None if options.rate else highest_rate(server, workload, options)
            rate = options.rate or SHARE * (highest or 0.0)
            if rate == 0.0:
                sys.exit("no rate was held: is the machine busy?")
            print(f"{rate:.2f} requests/s for {options.minutes:g} minutes", flush=True)
            results = asyncio.run(load(server, workload, rate, options.minutes * 60, memory))
            wrong = verdict(server, names, results, memory, options.minutes * 60)
        finally:
            server.stop()
    seen = windows(results)
    rows = [
        (str(i + 1), str(w.requests), str(w.errors),
         *(f"{1e3 * s:.0f}" for s in (w.ttft_p50_s, w.ttft_p99_s, w.itl_p99_s, w.total_p99_s)))
        for i, w in enumerate(seen)
    ]  # fmt: skip
    header = ("window", "requests", "errors", "TTFT p50, ms", "TTFT p99", "ITL p99", "end to end p99")
    print("\n" + table(header, rows) + "\n\n" + memory_table(memory))
    for problem in wrong:
        print(f"WRONG: {problem}")
    print("all as it should be" if not wrong else f"{counted(len(wrong), 'fault')}")
    record = {
        "minutes": options.minutes, "highest": highest, "rate": rate, "requests": len(results),
        "windows": [asdict(w) for w in seen], "memory": memory, "wrong": wrong,
    }  # fmt: skip
    write_figures(options.json, record)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
