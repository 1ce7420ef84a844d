"""How many requests fit in a budget of state memory, dense and reduced, and tokens/s with all of them running.

    python benchmarks/capacity.py --budget 1GiB --steps 8 --json capacity.json
    python benchmarks/capacity.py --state-dtype float32 --state-dtype int8

Decodes only, every slot in use; variants, one for each state dtype, take turns.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from _serving import GREEDY, MODEL, table, variants
from outputs import figures_file, write_figures
from pydantic import ByteSize, TypeAdapter

from modeling.state_dtype import STATE_DTYPES, StateDType
from server.engine.engine import Engine
from server.engine.process import build
from server.wire.messages import EngineConfig, Generate, Ready


def load(path: Path, state_dtype: StateDType, options: argparse.Namespace) -> tuple[Engine, Ready]:
    return build(
        EngineConfig(
            variant=path.name,
            source=str(path),
            device=options.device,
            dtype="auto",
            max_requests=None,
            state_memory=int(options.budget),
            state_dtype=state_dtype,
            prefill_tokens=512,
            threads=options.threads,
            prefix_cache=False,
        )
    )


def fill(engine: Engine, requests: int) -> None:
    """Have `requests` requests decoding, each with a prompt of one token."""
    for i in range(requests):
        engine.handle(
            Generate(
                request_id=str(i),
                token_ids=[1 + i % 200],
                max_tokens=10**6,
                sampling=GREEDY,
                stop_token_ids=[],
            )
        )
    while engine.occupancy.waiting:
        engine.step()


def decode(engine: Engine, steps: int) -> tuple[float, int]:
    """Tokens/s of some steps, and the batch."""
    tokens = 0
    batch = 0
    began = time.perf_counter()
    for _ in range(steps):
        output = engine.step()
        tokens += len(output.tokens) if output else 0
        batch = output.batch_size if output else batch
    return tokens / (time.perf_counter() - began), batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--budget", type=TypeAdapter(ByteSize).validate_python, default="1GiB")
    parser.add_argument("--steps", type=int, default=8, help="decode steps per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--state-dtype", choices=STATE_DTYPES, action="append", help="may be given several times"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=figures_file)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        engines = {
            f"{name} {state_dtype}": load(path, state_dtype, options)
            for name, path in variants(Path(directory), options.model).items()
            for state_dtype in options.state_dtype or ["float32"]
        }
    for name, (engine, ready) in engines.items():
        print(f"{name}: {ready.slots} requests ...", flush=True)
        fill(engine, ready.slots)
        decode(engine, 2)
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(options.rounds):
        for name, (engine, ready) in engines.items():
            speed, batch = decode(engine, options.steps)
            if batch != ready.slots:
                raise SystemExit(f"{name}: {batch} requests ran in a step, not {ready.slots}")
            speeds[name].append(speed)
    results: list[dict[str, Any]] = [
        {
            "variant": name,
            "d_k": ready.d_k,
            "state_dtype": ready.state_dtype,
            "state_bytes": ready.state_bytes_per_request,
            "requests": ready.slots,
            "tokens_per_second": statistics.median(speeds[name]),
            "rounds": speeds[name],
            "backend": ready.backend,
            "device": ready.device,
        }
        for name, (_, ready) in engines.items()
    ]
    base = results[0]
    print(f"\n{options.budget.human_readable()} of states, {base['device']}, {base['backend']}\n")
    print(
        table(
            ("variant", "state/request", "requests", "ratio", "tok/s", "ratio"),
            [
                (
                    r["variant"],
                    f"{r['state_bytes'] / 1e3:.0f} kB",
                    str(r["requests"]),
                    f"{r['requests'] / base['requests']:.2f}",
                    f"{r['tokens_per_second']:.0f}",
                    f"{r['tokens_per_second'] / base['tokens_per_second']:.2f}",
                )
                for r in results
            ],
        )
    )
    write_figures(options.json, {"budget": int(options.budget), "results": results})


if __name__ == "__main__":
    main()
