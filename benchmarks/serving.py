"""End to end over HTTP against the bare engine: tokens/s, TTFT and ITL in a closed loop of streams.

    python benchmarks/serving.py --json serving.json
    python benchmarks/serving.py --prefill-tokens 128 --prefill-tokens 512

In each round every variant's requests run over HTTP through a real `lowkey-serve`, and in this process through an
Engine, one after the other, with each cap on prompt tokens a step. One thread per engine; on two cores the server's
engine has one, the API process and the clients share the other.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from _serving import GREEDY, MODEL, Server, table, variants, workload
from outputs import figures_file, write_figures

from loadtest.client import Completion, closed_loop, summarise
from modeling.checkpoint import open_checkpoint
from modeling.state_dtype import STATE_DTYPES, StateDType
from server.engine.engine import Engine
from server.engine.process import build
from server.wire.messages import EngineConfig, Generate

PROMPTS, NEW = (128, 512), (64, 128)


def config(path: Path, streams: int, prefill_tokens: int | None, state_dtype: StateDType) -> EngineConfig:
    return EngineConfig(
        variant="bare",
        source=str(path),
        device="cpu",
        dtype="float32",
        max_requests=streams,
        state_memory=None,
        state_dtype=state_dtype,
        prefill_tokens=prefill_tokens,
        threads=1,
        prefix_cache=False,
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


@dataclass
class Setup:
    """One variant with one cap: a server, the same engine in this process, what they did in each round."""

    variant: str
    prefill_tokens: int | None
    server: Server
    engine: Engine
    backend: str
    state_bytes: int
    vocab: int
    rounds: list[dict[str, float]] = field(default_factory=list)

    def run(self, requests: int, streams: int, seed: int) -> dict[str, float]:
        """Give the same requests to the engine alone and to the server; what each round took, by name."""
        completions = workload(requests, self.vocab, PROMPTS, NEW, seed)
        alone = bare(self.engine, completions, streams)
        before = self.server.cpu_seconds(), time.process_time()
        results, seconds = asyncio.run(
            closed_loop(self.server.url, self.variant, completions, streams, temperature=0)
        )
        api, client = self.server.cpu_seconds() - before[0], time.process_time() - before[1]
        errors = [r.error for r in results if r.error]
        if errors:
            raise SystemExit(f"{len(errors)} requests failed: {errors[0]}")
        summary = summarise(results, seconds)
        return {
            **asdict(summary),
            "bare_tokens_per_second": alone,
            "share": summary.tokens_per_second / alone,
            "itl_p99_over_median": summary.itl_p99_s / summary.itl_median_s,
            "api_us_per_token": 1e6 * api / summary.tokens,
            "client_us_per_token": 1e6 * client / summary.tokens,
        }

    def median(self, figure: str) -> float:
        return statistics.median(r[figure] for r in self.rounds)

    def spread(self, figure: str, form: str) -> str:
        """Median (least to most) of the rounds."""
        values = [r[figure] for r in self.rounds]
        return f"{self.median(figure):{form}} ({min(values):{form}} to {max(values):{form}})"

    def row(self) -> tuple[str, ...]:
        def ms(figure: str) -> str:
            return f"{1e3 * self.median(figure):.0f}"

        return (
            self.variant,
            str(self.prefill_tokens or "default"),
            f"{self.median('bare_tokens_per_second'):.0f}",
            f"{self.median('tokens_per_second'):.0f}",
            self.spread("share", ".0%"),
            f"{1e3 * self.median('itl_median_s'):.1f}",
            f"{1e3 * self.median('itl_p99_s'):.1f}",
            self.spread("itl_p99_over_median", ".2f"),
            ms("ttft_median_s"),
            ms("ttft_p99_s"),
            f"{self.median('api_us_per_token'):.0f}",
            f"{self.median('client_us_per_token'):.0f}",
        )

    def result(self) -> dict[str, Any]:
        own = ("variant", "prefill_tokens", "backend", "state_bytes", "rounds")
        return {
            **{name: getattr(self, name) for name in own},
            **{figure: self.median(figure) for figure in self.rounds[0]},
        }


HEADER = (
    "variant", "cap", "bare tok/s", "HTTP", "share", "ITL ms", "p99", "p99/median", "TTFT ms", "p99",
    "API us", "client us",
)  # fmt: skip


def set_up(
    checkpoints: dict[str, Path], cap: int | None, streams: int, state_dtype: StateDType
) -> list[Setup]:
    """A server of all variants, and an engine of each."""
    limit = () if cap is None else ("--prefill-tokens", str(cap))
    server = Server(
        checkpoints,
        *("--max-requests", str(streams), *limit),
        *("--device", "cpu", "--dtype", "float32", "--state-dtype", state_dtype, "--no-prefix-cache"),
    )
    setups = []
    for name, path in checkpoints.items():
        engine, ready = build(config(path, streams, cap, state_dtype))
        vocab = open_checkpoint(str(path)).spec.vocab_size
        setups.append(Setup(name, cap, server, engine, ready.backend, ready.state_bytes_per_request, vocab))
    return setups


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128, help="per round, variant and cap")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--prefill-tokens", type=int, action="append", help="cap per step; by default the server's own"
    )
    parser.add_argument("--state-dtype", choices=STATE_DTYPES, default="float32")
    parser.add_argument("--json", type=figures_file)
    options = parser.parse_args()
    torch.set_num_threads(1)
    setups: list[Setup] = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = variants(Path(directory), options.model)
        try:
            for cap in options.prefill_tokens or [None]:
                setups += set_up(checkpoints, cap, options.streams, options.state_dtype)
            for i in range(-1, options.rounds):
                for setup in setups:
                    if i < 0:  # warms up
                        setup.run(options.streams, options.streams, seed=options.rounds)
                        continue
                    setup.rounds.append(setup.run(options.requests, options.streams, seed=i))
                    print(f"round {i + 1} of {options.rounds}: {' '.join(setup.row())}", flush=True)
        finally:
            for server in {setup.server for setup in setups}:
                server.stop()
    print(
        f"\n{options.streams} streams in a closed loop, prompts of {PROMPTS[0]} to {PROMPTS[1]} tokens, {NEW[0]} to "
        f"{NEW[1]} new; medians of {options.rounds} rounds of {options.requests} requests (least to most)\n"
    )
    print(table(HEADER, [setup.row() for setup in setups]))
    said = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    write_figures(options.json, {"options": said, "results": [setup.result() for setup in setups]})


if __name__ == "__main__":
    main()
