"""How many requests of some length fit in a budget of memory, dense and reduced, for hybrids whose requests grow.

    python benchmarks/capacity_hybrids.py --budget 4GiB --json capacity.json
    python benchmarks/capacity_hybrids.py --budget 4GiB --shape 0.8B --run

Counted by the engine's own memory plan: a slot and the pages of so many tokens for each request. With --run an engine
gets that many requests and one more, over a model with the same states, keys and values and hardly any weights. All
that fit must come to hold their last token at the same time, none preempted, while the one more waits; then all must
end.
"""

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from _serving import GREEDY, table
from hybrid_models import SHAPES, config_of, random_checkpoint
from outputs import figures_file, write_figures
from pydantic import ByteSize, TypeAdapter

from modeling.families import family_of
from modeling.spec import StateTypes
from modeling.state import page_bytes
from server.engine.memory import Room
from server.engine.process import build
from server.wire.messages import EngineConfig, Generate, Pause, Resume

DECODED = 4
"""Tokens of a request that are decoded; all others are its prompt."""


def room_of(shape: str, d_k: int, tokens: int) -> Room:
    """What requests of a model take, as the engine plans it: keys and values in bfloat16, states in float32."""
    config = config_of(shape, d_k)
    spec = family_of(config).spec(config)
    types = StateTypes(inputs=torch.bfloat16)
    return Room(spec.state_bytes(0, types), page_bytes(spec, types), tokens)


def run(shape: str, d_k: int, tokens: int, expected: int, budget: int, threads: int) -> dict[str, Any]:
    """Have requests of `tokens` tokens run in an engine, one more than fit.

    Raises:
        SystemExit: not as many as `expected` ran at the same time.
    """
    with tempfile.TemporaryDirectory() as directory:
        engine, ready = build(
            EngineConfig(
                variant=shape,
                source=str(random_checkpoint(Path(directory), f"{shape}-narrow", d_k)),
                device="cpu",
                dtype="bfloat16",
                max_requests=None,
                state_memory=budget,
                context_tokens=tokens,
                prefill_tokens=2048,
                threads=threads,
                prefix_cache=False,
            )
        )
    draw = random.Random(0)
    began = time.monotonic()
    names = [str(i) for i in range(expected + 1)]
    for name in names:
        # The last token that is generated is never fed.
        engine.handle(
            Generate(
                request_id=name,
                token_ids=[draw.randrange(1, ready.vocab_size) for _ in range(tokens - DECODED)],
                max_tokens=DECODED + 1,
                sampling=GREEDY,
                stop_token_ids=[],
            )
        )
    # Held before their second token, so that those that came first do not end before the last has begun.
    for name in names[:expected]:
        engine.handle(Pause(request_id=name))
    first = 0
    while first < expected:
        output = engine.step()
        first += len(output.tokens) if output else 0
    held = engine.occupancy
    for name in names[:expected]:
        engine.handle(Resume(request_id=name))
    largest, preempted, ended = 0, 0, 0
    while ended < len(names):
        output = engine.step()
        largest = max(largest, engine.occupancy.used_pages)
        preempted = max(preempted, engine.occupancy.preempted)
        ended += sum(t.finish_reason is not None for t in output.tokens) if output else 0
    if (held.running, held.waiting, preempted) != (expected, 1, 0):
        raise SystemExit(
            f"{shape}, d_k {d_k}: of {expected} requests that fit {held.running} ran and {held.waiting - 1} waited, "
            f"and {preempted} were preempted"
        )
    return {
        "running": held.running,
        "pages": ready.pages,
        "largest_used_pages": largest,
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=TypeAdapter(ByteSize).validate_python, default="4GiB")
    parser.add_argument("--shape", choices=[s for s in SHAPES if f"{s}-narrow" in SHAPES], action="append")
    parser.add_argument(
        "--tokens", type=int, action="append", help="of a request; may be given several times"
    )
    parser.add_argument("--d-k", type=int, default=64, help="key channels of the reduced model")
    parser.add_argument("--run", action="store_true", help="also run them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=figures_file)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    budget = int(options.budget)
    results: list[dict[str, Any]] = []
    for shape in options.shape or ["0.8B", "4B"]:
        for tokens in options.tokens or [512, 1024, 4096]:
            for d_k in (128, options.d_k):
                room = room_of(shape, d_k, tokens)
                slots, pages = room.split(budget)
                fit = slots if pages >= room.pages else 0
                results.append(
                    {
                        "shape": shape,
                        "tokens": tokens,
                        "d_k": d_k,
                        "bytes_per_request": room.request,
                        "slots": slots,
                        "pages": pages,
                        "requests": fit,
                    }
                )
                if options.run:
                    results[-1]["run"] = run(shape, d_k, tokens, fit, budget, options.threads)
                    print(f"{shape}, {tokens} tokens, d_k {d_k}: {fit} requests ran together", flush=True)
                write_figures(options.json, {"budget": budget, "results": results})
    print(
        f"\nRequests in {options.budget.human_readable()}, keys and values in bfloat16, states in float32\n"
    )
    pairs = zip(results[::2], results[1::2], strict=True)
    print(
        table(
            ("model", "tokens", "MB a request", "requests", f"d_k {options.d_k}: MB", "requests", "ratio"),
            [
                (
                    dense["shape"],
                    str(dense["tokens"]),
                    f"{dense['bytes_per_request'] / 1e6:.1f}",
                    str(dense["requests"]),
                    f"{reduced['bytes_per_request'] / 1e6:.1f}",
                    str(reduced["requests"]),
                    f"{reduced['requests'] / dense['requests']:.2f}",
                )
                for dense, reduced in pairs
            ],
        )
    )


if __name__ == "__main__":
    main()
