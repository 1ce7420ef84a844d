"""The server on the card, over HTTP: `lowkey-serve` with dense and reduced variants, against the bare engine."""

import json
import math
import os
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
from gpu_common import FAMILIES, Run, large_checkpoint
from gpu_engine import Kind, closed_loop, closed_loop_sizes, lengths, make_engine, named, served, window
from gpu_models import free

from benchmarks.server_process import ServerProcess

CLIENTS = 8
"""Processes of the load: one alone would be what limits the server."""
TEXT = "docs/api.md"
"""What prompts of real text are cut from."""


class CpuClock:
    """Processor time of a server's HTTP processes, looked at several times a second."""

    def __init__(self, server: ServerProcess) -> None:
        self._seen: list[tuple[float, float, float]] = []
        self._stop = Event()
        self._thread = Thread(target=self._look, args=(server,), daemon=True)
        self._thread.start()

    def _look(self, server: ServerProcess) -> None:
        while not self._stop.wait(0.2):
            self._seen.append((time.monotonic(), server.cpu_seconds(), server.kernel_seconds()))

    def between(self, begin: float, end: float) -> tuple[float, float]:
        """Seconds of this time, and those of them that the kernel took; of the time between the first look and the last
        one in it, for as long as all of it."""
        self._stop.set()
        self._thread.join()
        times = [when for when, *_ in self._seen]
        inside = self._seen[bisect_left(times, begin) : bisect_left(times, end)]
        (first, *before), (last, *after) = inside[0], inside[-1]
        scale = (end - begin) / (last - first)
        return (after[0] - before[0]) * scale, (after[1] - before[1]) * scale


def serve(
    run: Run, variants: dict[str, Kind], streams: int, environment: dict[str, str] | None = None
) -> ServerProcess:
    """A server with these models."""
    settings = {
        name: {
            "source": str(large_checkpoint(run, FAMILIES[0], d_k).path),
            "state_dtype": state_dtype,
        }
        for name, (state_dtype, d_k) in variants.items()
    }
    return start_server(run, settings, streams, environment)


def start_server(
    run: Run, variants: dict[str, dict[str, str]], streams: int, environment: dict[str, str] | None = None
) -> ServerProcess:
    """A `lowkey-serve` of this checkout, which need not be installed. `variants` has the settings of each."""
    settings = run.folder / "lowkey.toml"
    tables = [
        "\n".join([f"[variants.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in fields.items())])
        for name, fields in variants.items()
    ]
    settings.write_text("\n\n".join(tables) + "\n")
    arguments = ["--config", str(settings), "--device", run.device, "--max-requests", str(streams)]
    arguments += ["--max-queue", str(4 * streams), "--no-prefix-cache"]
    arguments += ["--prefill-tokens", "64"] if run.small else []
    if run.api_processes is not None:
        arguments += ["--api-processes", str(run.api_processes)]
    root = Path(__file__).parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return ServerProcess(
        arguments,
        run.folder / "server.log",
        command=[sys.executable, "-c", "from server.cli import app; app()"],
        environment={"PYTHONPATH": os.pathsep.join(paths), **(environment or {})},
        waiting=lambda: run.small or run.need(1),
    )


def load(
    run: Run, server: ServerProcess, model: str, vocab: int, streams: int, **changes: Any
) -> dict[str, Any]:
    """`streams` clients in a closed loop, over several processes: figures of the window."""
    clients = 1 if run.small else CLIENTS
    prompt, new = lengths(run)
    ramp, seconds = window(run, streams)
    processes = []
    for n in range(clients):
        settings = {
            "url": server.url,
            "model": model,
            "streams": streams // clients,
            "prompt": prompt,
            "new_tokens": new,
            "ramp_s": ramp,
            "seconds": seconds,
            "times": str(run.folder / f"client-{n}.npz"),
            "vocab": vocab,
            "seed": n,
            "fields": {},
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, Path(__file__).with_name("gpu_client.py"), json.dumps(settings | changes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    try:
        for process in processes:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise RuntimeError("a client did not start")
        clock = CpuClock(server)
        began = time.monotonic() + 0.5
        results = [json.loads(out) for out, _ in _told(processes, f"{began}\n")]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    begin, end = began + ramp, began + ramp + seconds
    api, kernel = clock.between(begin, end)
    tokens = sum(r["tokens"] for r in results)
    times = [np.load(run.folder / f"client-{n}.npz") for n in range(clients)]
    gaps, first = (np.concatenate([t[name] for t in times]) for name in ("gaps", "first"))

    def milliseconds(values: Any, q: float) -> float:
        return float(np.quantile(values, q)) * 1e3 if len(values) else math.nan

    return {
        "streams": streams,
        "tokens_per_second": tokens / seconds,
        "tokens_per_event": float(np.mean([r["tokens_per_event"] for r in results])),
        "ended": sum(r["ended"] for r in results),
        "api_cores": api / seconds,
        "api_us_per_token": 1e6 * api / max(tokens, 1),
        "kernel_us_per_token": 1e6 * kernel / max(tokens, 1),
        "itl_p50_ms": milliseconds(gaps, 0.5),
        "itl_p99_ms": milliseconds(gaps, 0.99),
        "ttft_p50_ms": milliseconds(first, 0.5),
        "ttft_p99_ms": milliseconds(first, 0.99),
        "busiest_client": max(r["cpu_seconds"] for r in results) / seconds,
        "all_running_after_s": max(r["all_running"] for r in results) - began,
        "ramp_s": ramp,
        "errors": sum(r["errors"] for r in results),
        "error": next((r["error"] for r in results if r["error"]), None),
    }


def _told(processes: list[subprocess.Popen[str]], line: str) -> list[tuple[str, str]]:
    """All are told the same line; what each then says until it ends."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(line)
        process.stdin.flush()
    answers = [process.communicate() for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("a client failed")
    return answers


def told(figures: dict[str, Any]) -> str:
    """The figures of `load` in a line."""
    line = (
        f"{figures['tokens_per_second']:.0f} tok/s, API {figures['api_us_per_token']:.1f} us a token, the kernel's "
        f"{figures['kernel_us_per_token']:.1f} ({figures['api_cores']:.2f} cores), ITL p50 {figures['itl_p50_ms']:.1f} "
        f"p99 {figures['itl_p99_ms']:.1f} ms, TTFT p50 {figures['ttft_p50_ms']:.0f} "
        f"p99 {figures['ttft_p99_ms']:.0f} ms, {figures['tokens_per_event']:.2f} tokens an event, "
        f"busiest client {figures['busiest_client']:.2f} of a core"
    )
    if figures["all_running_after_s"] > figures["ramp_s"]:
        line += f"; ALL RAN ONLY AFTER {figures['all_running_after_s']:.1f} s"
    if figures["errors"]:
        line += f"; {figures['errors']} errors: {figures['error']}"
    return line


def measure_bare(run: Run, variants: dict[str, Kind]) -> Iterator[list[str]]:
    """The engine alone under the same load, where the section `engine` has not measured it."""
    results = run.report.setdefault("engine", {})
    for kind in variants.values():
        left = [n for n in closed_loop_sizes(run) if f"{named(kind)}, {n} streams" not in results]
        if not left:
            continue
        run.need(10)
        free(run)
        state_dtype, d_k = kind
        checkpoint = large_checkpoint(run, FAMILIES[0], d_k)
        dtype = "float32" if run.small else "bfloat16"
        engine, ready = make_engine(run, checkpoint, dtype, state_dtype=state_dtype, requests=max(left))
        for streams in left:
            yield closed_loop(run, engine, kind, ready.vocab_size, streams)
        del engine
    free(run)


def check_server(run: Run) -> Iterator[list[str]]:
    """Variants on one card in turns: closed loops of 256 and 512 streams over HTTP, beside the bare engine."""
    free(run)
    sizes = closed_loop_sizes(run)
    variants = served(run)
    checkpoint = large_checkpoint(run, FAMILIES[0], 128)
    vocab = checkpoint.spec.vocab_size
    results = run.report.setdefault("server", {})
    yield from measure_bare(run, variants)
    server = serve(run, variants, sizes[-1])
    try:
        began = time.monotonic()
        server.wait_ready(*variants)
        yield ["server ready", "", f"after {time.monotonic() - began:.1f} s"]
        text = {
            "text": str(Path(__file__).parents[1] / TEXT),
            "tokenizer": str(checkpoint.path / "tokenizer.json"),
        }
        # Twice in turns what the comparison stands on; once what is to show no special case.
        kinds: list[tuple[str, int, int, dict[str, Any]]] = [(f"{n} streams", n, 2, {}) for n in sizes[::-1]]
        kinds.append((f"{sizes[0]} streams, logprobs 5", sizes[0], 1, {"fields": {"logprobs": 5}}))
        kinds.append((f"{sizes[0]} streams, text", sizes[0], 1, text | {"prompt": 8 if run.small else 64}))
        for label, streams, rounds, changes in kinds:
            for name in [*variants] * rounds:
                run.need(sum(window(run, streams)) + 4)
                figures = load(run, server, name, vocab, streams, **changes)
                figures["state_dtype"] = variants[name][0]
                results.setdefault(f"{name}, {label}", []).append(figures)
                details = told(figures)
                base = run.report["engine"].get(f"{named(variants[name])}, {streams} streams")
                if base and not changes:
                    figures["over_engine"] = figures["tokens_per_second"] / base["tokens_per_second"]
                    details += f", {figures['over_engine']:.2f} of the bare engine"
                good = run.check(figures["errors"] == 0, f"server {name}, {label}")
                yield [f"server {name}, {label}", good, details]
            yield from compare(run, [*variants], label)
    finally:
        results["log"] = server.log.read_text()[-4000:]
        server.stop(15)


def compare(run: Run, names: list[str], label: str) -> Iterator[list[str]]:
    """The other variants over the first one, means of the rounds."""
    results = run.report["server"]
    means = {
        name: float(np.mean([f["tokens_per_second"] for f in results[f"{name}, {label}"]])) for name in names
    }
    first, *others = names
    for name in others:
        ratio = results[f"{name} over {first}, {label}"] = means[name] / means[first]
        yield [f"{name} over {first}, {label}", "", f"{means[name]:.0f} / {means[first]:.0f} = {ratio:.2f}"]
