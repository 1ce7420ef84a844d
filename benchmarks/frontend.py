"""What the API's side of `lowkey-serve` costs a token: CPU time, tokens/s, gaps between chunks. Needs no GPU.

    python benchmarks/frontend.py --json frontend.json
    python benchmarks/frontend.py --rate 200 --streams 256 --logprobs 5

A real server with real HTTP clients in processes of their own. Only the engine is a stand-in: it sends steps of as many
tokens as there are streams at a given pace (`benchmarks/stand_in_engine.py`) and never waits for anybody. Connections
ask for one stream after the other. A window begins when each connection has had its first answer, and ends before they
are closed: ramp and tail are not in the figures. The CPU time is that of all processes of the server but the engines;
requests' own cost, from headers to tokenising, is in it.

Of a pace that the server keeps up with, the figure is its CPU time a token; of a pace that it does not, the tokens/s.

`--serve` compares commands, in turns within each round, for example with the server of another checkout:

    python benchmarks/frontend.py --serve "before=../before/.venv/bin/python benchmarks/stand_in_serve.py" \\
        --serve "after=.venv/bin/python benchmarks/stand_in_serve.py"
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from _serving import MODEL, table
from measure import machine, spread, summary
from outputs import figures_file, write_figures
from server_process import ServerProcess, cpu_seconds
from stand_in_engine import RATE
from stream_clients import Clients, Task

LAUNCHER = Path(__file__).with_name("stand_in_serve.py")
VARIANT = "dense"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def command(given: str) -> tuple[str, list[str]]:
    """NAME=COMMAND."""
    name, separator, words = given.partition("=")
    if not (name and separator and words):
        raise argparse.ArgumentTypeError(
            f"{given!r} is not NAME=COMMAND, e.g. 'now=python benchmarks/stand_in_serve.py'"
        )
    return name, [str(Path(word).absolute()) if Path(word).is_file() else word for word in shlex.split(words)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="whose tokenizer and config are used")
    parser.add_argument("--streams", type=int, nargs="+", default=[32, 256, 512])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each request")
    parser.add_argument("--rate", type=float, default=20.0, help="steps a second; 0: as many as possible")
    parser.add_argument("--logprobs", type=int, help="alternatives asked for with each token")
    parser.add_argument("--chat", action="store_true", help="/v1/chat/completions instead of /v1/completions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each window")
    parser.add_argument("--clients", type=int, default=max(2, (os.cpu_count() or 2) // 4), help="processes")
    parser.add_argument("--api-processes", type=int, help="an option of lowkey-serve")
    parser.add_argument("--serve", type=command, action="append", metavar="NAME=COMMAND")
    parser.add_argument("--json", type=figures_file)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds: quartiles need at least 2, got {options.rounds}")
    options.serve = dict(options.serve or [("server", [sys.executable, str(LAUNCHER)])])
    return options


@contextmanager
def serving(command: list[str], options: argparse.Namespace, directory: Path) -> Iterator[ServerProcess]:
    """A server that is ready, with a stand-in for its engine."""
    most = str(max(options.streams))
    given = [f"{VARIANT}={checkpoint(options, directory)}", "--max-requests", most, "--max-queue", most]
    if options.api_processes is not None:
        given += ["--api-processes", str(options.api_processes)]
    environment = {RATE: str(options.rate)}
    server = ServerProcess(given, directory / "log", command=command, environment=environment)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def checkpoint(options: argparse.Namespace, directory: Path) -> Path:
    """The model's directory; for chat a copy that has a chat template, since the demo model has none."""
    model: Path = options.model.absolute()
    if options.chat:
        model = shutil.copytree(model, directory / "model")
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return model


def measure(server: ServerProcess, streams: int, options: argparse.Namespace) -> dict[str, float]:
    """One window with so many streams. Raises SystemExit if an answer is not as it should be."""
    task = Task(server.url, streams, options.model, VARIANT, options.tokens, options.logprobs, options.chat)
    clients = Clients(task, options.clients)

    def spent() -> tuple[float, float, float, np.ndarray, float]:
        engines = sum(cpu_seconds(engine.pid) for engine in server.engines().values())
        each = np.array([cpu_seconds(process.pid) for process in clients.processes])
        return time.monotonic(), server.cpu_seconds(), server.kernel_seconds(), each, engines

    try:
        clients.wait_warm()
        chunks = clients.chunks()
        begin, *before = spent()
        time.sleep(options.seconds)
        while clients.chunks() == chunks:  # a window with nothing in it says nothing
            time.sleep(0.1)
        end, *after = spent()
        seen = clients.end((begin, end))
    except RuntimeError as e:
        raise SystemExit(f"error: {e}\n{server.log.read_text()}") from None
    finally:
        clients.kill()
    seconds = end - begin
    api, kernel, client, engine = (b - a for a, b in zip(before, after, strict=True))
    tokens = float(seen["tokens"].sum())
    figures = {
        "api_us_per_token": 1e6 * api / tokens,
        "kernel_us_per_token": 1e6 * kernel / tokens,
        "tokens_per_second": tokens / seconds,
        "chunks_per_token": len(seen["tokens"]) / tokens,
        "api_cores": api / seconds,
        "busiest_client_cores": client.max() / seconds,
        "client_us_per_token": 1e6 * client.sum() / tokens,
        "engine_cores": engine / seconds,
    }
    for name in ("gaps", "ttft"):
        p50, p99 = np.percentile(seen[name], [50, 99]) if len(seen[name]) else (float("nan"),) * 2
        figures |= {f"{name}_p50_ms": 1e3 * p50, f"{name}_p99_ms": 1e3 * p99}
    return {name: float(value) for name, value in figures.items()}


COLUMNS = {
    "api_us_per_token": ("API us/token", ".1f"),
    "kernel_us_per_token": ("the kernel's", ".1f"),
    "tokens_per_second": ("tokens/s", ".0f"),
    "chunks_per_token": ("chunks/token", ".2f"),
    "gaps_p50_ms": ("gap p50, ms", ".1f"),
    "gaps_p99_ms": ("p99", ".1f"),
    "ttft_p50_ms": ("TTFT p50, ms", ".0f"),
    "ttft_p99_ms": ("p99", ".0f"),
    "api_cores": ("API cores", ".2f"),
    "busiest_client_cores": ("a client's", ".2f"),
    "engine_cores": ("engine's", ".2f"),
}
SPREAD = ("api_us_per_token", "tokens_per_second", "gaps_p99_ms", "ttft_p99_ms")
"""Figures that are printed with their quartiles."""


def report(results: list[dict[str, Any]]) -> str:
    """The figures as text."""

    def cells(found: dict[str, dict[str, float]]) -> list[str]:
        return [
            spread(found[name], form) if name in SPREAD else f"{found[name]['median']:{form}}"
            for name, (_, form) in COLUMNS.items()
        ]

    header = ("server", "streams", *(title for title, _ in COLUMNS.values()))
    return table(header, [(r["server"], str(r["streams"]), *cells(r["figures"])) for r in results])


def main() -> None:
    options = arguments()
    rounds: dict[tuple[int, str], list[dict[str, float]]] = defaultdict(list)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {}
        for name, words in options.serve.items():
            directory = root / str(len(servers))
            directory.mkdir()
            servers[name] = stack.enter_context(serving(words, options, directory))
        for i in range(options.rounds):
            for streams in options.streams:
                for name, server in servers.items():
                    found = measure(server, streams, options)
                    rounds[streams, name].append(found)
                    said = ", ".join(
                        f"{title} {found[figure]:{form}}" for figure, (title, form) in COLUMNS.items()
                    )
                    print(f"round {i + 1}, {streams} streams, {name}: {said}", flush=True)
    results = [
        {
            "server": name,
            "streams": streams,
            "rounds": found,
            "figures": {figure: summary([each[figure] for each in found]) for figure in found[0]},
        }
        for (streams, name), found in rounds.items()
    ]
    pace = f"{options.rate:g} steps/s" if options.rate else "as many steps as possible"
    print(f"\n{pace}, {options.tokens} tokens a request; medians of {options.rounds} rounds (quartiles)\n")
    print(report(results))
    given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    write_figures(options.json, {"options": given, "machine": machine(), "results": results})


if __name__ == "__main__":
    main()
