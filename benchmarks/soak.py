"""Mixed traffic for a long time, with clients that leave and engines that are killed; then: is everything as it was?

    python benchmarks/soak.py --minutes 30 --json soak.json
    python benchmarks/soak.py --model demo/hybrid --context-tokens 64 --state-memory 14MiB    # preempts all the time

Streams and single answers, short and long prompts that often begin alike, on a real `lowkey-serve` with a dense and a
reduced variant. One client in eight leaves at a random moment. Two engines die of SIGKILL on the way. At the end, with
no load: no slot and no page is in use, the pages that prefixes have and the free ones are all there are, nothing waits,
every request has been answered or has failed in time, and the memory of each process is flat over the second half.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from _serving import MODEL, Server, table, variants
from outputs import figures_file, write_figures

from lowkey.words import counted

LEAVE = 1 / 8
REQUEST_S = 120.0
"""The most seconds that an answer may take: a request that takes longer is stuck."""

GROWTH = 0.05
"""Memory may grow by this share, or by `SLACK` bytes, over the second half."""

SLACK = 16 * 2**20


Memory = dict[str, list[tuple[float, int]]]
"""Process -> (seconds since the start, resident bytes). An engine that is started again counts as another one."""


@dataclass
class Tally:
    """What came of the requests, and what the processes held."""

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    stuck: list[str] = field(default_factory=list)
    memory: Memory = field(default_factory=dict)


def request_body(draw: random.Random, names: list[str], longest: int) -> dict[str, Any]:
    shared = [1 + i % 200 for i in range(512)]
    prompt = shared[: draw.choice((0, 64, 200, 512))]
    prompt += [draw.randrange(1, 250) for _ in range(draw.randint(1, 60))]
    max_tokens = draw.choice((1, 8, 40, 120))
    return {
        "model": draw.choice(names),
        "prompt": prompt[: longest - max_tokens],
        "max_tokens": max_tokens,
        "temperature": draw.choice((0, 0.8)),
        "stream": draw.random() < 0.7,
        "ignore_eos": draw.random() < 0.5,
        "top_p": draw.choice((1, 0.9)),
    }


async def ask(client: httpx.AsyncClient, body: dict[str, Any], tally: Tally) -> str:
    """One request to its end; how it ended."""
    if not body["stream"]:
        response = await client.post("/v1/completions", json=body)
        if response.status_code == 200:
            tally.tokens += response.json()["usage"]["completion_tokens"]
        return str(response.status_code)
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            return str(response.status_code)
        last, error = "", False
        async for line in response.aiter_lines():
            if line:
                last = line
                tally.tokens += 1
                error = error or line.startswith('data: {"error"')
        if last != "data: [DONE]":
            return "cut off"
        return "error event" if error else "200"


def longest_request(server: Server, name: str) -> int:
    """Tokens of the longest request that a variant takes."""
    return int(server.http.get(f"/v1/models/{name}").json()["lowkey"]["context_length"])


async def client_loop(
    server: Server, names: list[str], longest: int, seed: int, until: float, tally: Tally
) -> None:
    draw = random.Random(seed)
    async with httpx.AsyncClient(base_url=server.url, timeout=REQUEST_S) as client:
        while time.monotonic() < until:
            body = request_body(draw, names, longest)
            work = asyncio.create_task(ask(client, body, tally))
            leaves = draw.random() < LEAVE
            patience = draw.expovariate(2.0) if leaves else REQUEST_S
            done, _ = await asyncio.wait([work], timeout=patience)
            if done:
                tally.outcomes[outcome(work)] += 1
                if work.exception() is None and work.result() == "503":
                    await asyncio.sleep(0.5)
                continue
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
                await work
            tally.outcomes["left" if leaves else "stuck"] += 1
            if not leaves:
                tally.stuck.append(json.dumps(body)[:200])


def outcome(work: asyncio.Task[str]) -> str:
    error = work.exception()
    return work.result() if error is None else type(error).__name__


async def watch(server: Server, until: float, memory: Memory) -> None:
    """Sample resident memory until then (time.monotonic())."""
    began = time.monotonic()
    while time.monotonic() < until:
        processes = {"api": psutil.Process(server.process.pid)}
        processes |= {f"{name} ({p.pid})": p for name, p in server.engines().items()}
        for name, process in processes.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                sample = (time.monotonic() - began, process.memory_info().rss)
                memory.setdefault(name, []).append(sample)
        await asyncio.sleep(max(0.5, (until - began) / 400))


async def kill_engines(server: Server, names: list[str], seconds: float) -> None:
    """One engine after a quarter of the time, another one a little later."""
    for name in (names[0], names[-1]):
        await asyncio.sleep(seconds * 0.2)
        print(f"killing the engine of {name}", flush=True)
        server.engines()[name].kill()


async def soak(server: Server, names: list[str], options: argparse.Namespace, tally: Tally) -> None:
    seconds = options.minutes * 60
    until = time.monotonic() + seconds
    longest = min(longest_request(server, name) for name in names)
    loops = [client_loop(server, names, longest, seed, until, tally) for seed in range(options.clients)]

    async def report() -> None:
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, max(10.0, seconds / 20)))
            print(f"{max(until - time.monotonic(), 0):5.0f} s left, {dict(tally.outcomes)}", flush=True)

    await asyncio.gather(
        *loops, watch(server, until, tally.memory), kill_engines(server, names, seconds), report()
    )


Samples = dict[tuple[str, str, str], float]
"""Value of each gauge and counter of an engine, by its name, its variant, and the label `state` (or nothing)."""


def samples(server: Server) -> Samples:
    """What /metrics says of the engines now."""
    found: Samples = {}
    for line in server.http.get("/metrics").text.splitlines():
        match = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line)
        if match and 'engine="0"' in match[2]:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            found[match[1], labels["variant"], labels.get("state", "")] = float(match[3])
    return found


def settled(server: Server, names: list[str]) -> list[str]:
    """What is still held once nobody asks for anything, after up to 30 s."""
    pages = {name: server.http.get(f"/v1/models/{name}").json()["lowkey"].get("pages") or 0 for name in names}
    deadline = time.monotonic() + 30
    while True:
        found = samples(server)
        wrong = []
        for name in names:
            for series, state in (
                ("lowkey_state_slots", "used"),
                ("lowkey_kv_pages", "used"),
                ("lowkey_requests_running", ""),
                ("lowkey_requests_waiting", ""),
                ("lowkey_requests_preempted", ""),
            ):
                value = found.get((series, name, state))
                if value != 0:
                    wrong.append(f"{series} {state} of {name} is {'missing' if value is None else value}")
            unused = sum(found.get(("lowkey_kv_pages", name, state), 0) for state in ("cached", "free"))
            if unused != pages[name]:
                wrong.append(f"{unused:g} pages of {name} are cached or free, of {pages[name]}")
        if not wrong or time.monotonic() > deadline:
            return wrong
        time.sleep(0.5)


def growth(samples: list[tuple[float, int]]) -> tuple[int, int]:
    """Median bytes of the third and of the last quarter of a process's life."""
    values = [rss for _, rss in samples]
    quarter = max(len(values) // 4, 1)

    def median(part: list[int]) -> int:
        return sorted(part)[len(part) // 2]

    return median(values[-2 * quarter : -quarter] or values), median(values[-quarter:])


def grown(memory: Memory, seconds: float) -> list[str]:
    """Processes whose memory was not flat over the second half, of those that lived long enough to tell."""
    wrong = []
    for process, samples in memory.items():
        before, after = growth(samples)
        long_enough = samples[-1][0] - samples[0][0] >= 0.4 * seconds
        if long_enough and after > before + max(GROWTH * before, SLACK):
            wrong.append(f"memory of {process} grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")
    return wrong


def memory_table(memory: Memory) -> str:
    rows = [
        (name, *(f"{x / 2**20:.0f}" for x in growth(samples)), str(len(samples)))
        for name, samples in memory.items()
    ]
    return table(("process", "MiB, third quarter", "last quarter", "samples"), rows)


def verdict(server: Server, names: list[str], options: argparse.Namespace, tally: Tally) -> list[str]:
    """Everything that is not as it should be."""
    wrong = settled(server, names)
    wrong += [f"stuck: {body}" for body in tally.stuck]
    expected = {"200", "left", "503", "error event"}
    wrong += [
        f"{n} requests ended as {o!r}" for o, n in tally.outcomes.items() if o not in expected | {"stuck"}
    ]
    for name in names:
        # The longest request that there may be: of a hybrid with few pages, it needs all of them.
        longest = longest_request(server, name)
        body = {"model": name, "prompt": [5] * (longest - 2), "max_tokens": 2, "ignore_eos": True}
        if (status := server.http.post("/v1/completions", json=body).status_code) != 200:
            wrong.append(f"{name} answers {status}")
    wrong += grown(tally.memory, options.minutes * 60)
    text = server.log.read_text()
    restarts = len(re.findall(r"engine process ended with code", text))
    if restarts != 2:
        wrong.append(f"engines ended {restarts} times, and 2 were killed")
    traceback = re.search(r"Traceback.*?^\S[^\n]*", text, re.DOTALL | re.MULTILINE)
    if traceback or "IntegrityError" in text:
        wrong.append(f"the log has an error: {traceback[0] if traceback else 'IntegrityError'}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--state-memory", default="24MiB", help="Memory for the states of each variant.")
    parser.add_argument(
        "--context-tokens",
        type=int,
        default=4096,
        help="Few of them are few pages for a hybrid. Requests have up to 692 tokens, or as many as fit.",
    )
    parser.add_argument("--json", type=figures_file)
    options = parser.parse_args()
    tally = Tally()
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = variants(Path(directory), options.model)
        names = list(checkpoints)
        server = Server(
            checkpoints,
            *("--max-requests", "8", "--max-queue", "16"),
            *("--state-memory", options.state_memory, "--context-tokens", str(options.context_tokens)),
        )
        try:
            asyncio.run(soak(server, names, options, tally))
            wrong = verdict(server, names, options, tally)
            at_the_end = samples(server)
        finally:
            server.stop()
    print("\n" + memory_table(tally.memory))
    print("\n" + table(("requests ended", "n"), [(o, str(n)) for o, n in tally.outcomes.most_common()]))
    print(f"\n{tally.tokens} tokens and events in {options.minutes:g} minutes")
    preemptions = {name: at_the_end.get(("lowkey_preemptions_total", name, ""), 0) for name in names}
    print("preemptions: " + ", ".join(f"{name} {n:,.0f}" for name, n in preemptions.items()))
    for problem in wrong:
        print(f"WRONG: {problem}")
    print("all as it should be" if not wrong else f"{counted(len(wrong), 'fault')}")
    record = {
        "minutes": options.minutes,
        "clients": options.clients,
        "outcomes": tally.outcomes,
        "tokens": tally.tokens,
        "preemptions": preemptions,
        "memory": tally.memory,
        "wrong": wrong,
    }
    write_figures(options.json, record)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
