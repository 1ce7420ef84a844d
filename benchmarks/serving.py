"""End to end over HTTP against the bare engine: tokens/s, TTFT and ITL in a closed loop of streams.

    python benchmarks/serving.py --streams 32 --requests 128 --json serving.json

The same requests run over HTTP through a real `lowkey-serve`, and in this process through an Engine, in turns. One
thread per engine; on two cores the server's engine has one, the API process and the clients share the other.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from _serving import MODEL, Server, table, variants, workload

from loadtest.client import Completion, closed_loop, summarise
from modeling.checkpoint import open_checkpoint
from server.engine.engine import Engine
from server.engine.messages import EngineConfig, Generate, Sampling
from server.engine.process import build

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0)


def config(path: Path, streams: int, prefill_tokens: int) -> EngineConfig:
    return EngineConfig(
        variant="bare",
        source=str(path),
        device="cpu",
        dtype="float32",
        max_requests=streams,
        state_memory=None,
        prefill_tokens=prefill_tokens,
        threads=1,
        prefix_cache=False,
        input_address="",
        output_address="",
    )


def bare(engine: Engine, completions: list[Completion], streams: int) -> float:
    """Tokens/s of the engine alone, `streams` requests at a time."""
    queue = [
        Generate(
            request_id=str(i), token_ids=c.prompt, max_tokens=c.max_tokens, sampling=GREEDY, stop_token_ids=[]
        )
        for i, c in enumerate(completions)
    ]
    queue.reverse()
    tokens = 0
    began = time.perf_counter()
    for _ in range(min(streams, len(queue))):
        engine.handle(queue.pop())
    while not engine.idle:
        output = engine.step()
        for token in output.tokens if output else ():
            tokens += 1
            if token.finish_reason and queue:
                engine.handle(queue.pop())
    return tokens / (time.perf_counter() - began)


def measure(name: str, path: Path, server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """One variant: HTTP and the bare engine in turns."""
    vocab = open_checkpoint(str(path)).spec.vocab_size
    engine, ready = build(config(path, options.streams, options.prefill_tokens))
    rounds = []
    for i in range(options.rounds):
        completions = workload(options.requests, vocab, (128, 512), (64, 128), seed=i)
        alone = bare(engine, completions, options.streams)
        before = server.cpu_seconds(), time.process_time()
        results, seconds = asyncio.run(
            closed_loop(server.url, name, completions, options.streams, temperature=0)
        )
        api, client = server.cpu_seconds() - before[0], time.process_time() - before[1]
        errors = [r.error for r in results if r.error]
        if errors:
            raise SystemExit(f"{len(errors)} requests failed: {errors[0]}")
        summary = summarise(results, seconds)
        rounds.append(
            {
                "bare_tokens_per_second": alone,
                "api_us_per_token": 1e6 * api / summary.tokens,
                "client_us_per_token": 1e6 * client / summary.tokens,
                **asdict(summary),
            }
        )
    middle = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    shares = [r["tokens_per_second"] / r["bare_tokens_per_second"] for r in rounds]
    return {
        "variant": name,
        "backend": ready.backend,
        "state_bytes": ready.state_bytes_per_request,
        "share": statistics.median(shares),
        "shares": shares,
        "itl_p99_over_median": middle["itl_p99_s"] / middle["itl_median_s"],
        **middle,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128, help="per round and variant")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill-tokens", type=int, default=128, help="the server's cap per step")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = variants(Path(directory), options.model)
        server = Server(
            checkpoints,
            *("--max-requests", str(options.streams)),
            *("--prefill-tokens", str(options.prefill_tokens)),
            *("--device", "cpu", "--dtype", "float32", "--no-prefix-cache"),
        )
        try:
            for name, path in checkpoints.items():
                print(f"{name} ...", flush=True)
                rows.append(measure(name, path, server, options))
        finally:
            server.stop()
    print(
        f"\n{options.streams} streams, prompts of 128 to 512 tokens, 64 to 128 new, "
        f"at most {options.prefill_tokens} prompt tokens a step; medians of {options.rounds} rounds of "
        f"{options.requests}\n"
    )
    header = (
        "variant", "backend", "tok/s", "bare", "share", "spread", "TTFT ms", "p99", "ITL ms", "p99", "p99/median",
        "API us", "client us"
    )  # fmt: skip
    print(
        table(
            header,
            [
                (
                    r["variant"],
                    r["backend"],
                    f"{r['tokens_per_second']:.0f}",
                    f"{r['bare_tokens_per_second']:.0f}",
                    f"{r['share']:.0%}",
                    f"{min(r['shares']):.0%}-{max(r['shares']):.0%}",
                    f"{1e3 * r['ttft_median_s']:.0f}",
                    f"{1e3 * r['ttft_p99_s']:.0f}",
                    f"{1e3 * r['itl_median_s']:.1f}",
                    f"{1e3 * r['itl_p99_s']:.1f}",
                    f"{r['itl_p99_over_median']:.2f}",
                    f"{r['api_us_per_token']:.0f}",
                    f"{r['client_us_per_token']:.0f}",
                )
                for r in rows
            ],
        )
    )
    if options.json:
        said = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": said, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
