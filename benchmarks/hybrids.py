"""Decode and prefill speed of hybrid models on a CPU against stock transformers, dense and reduced.

    python benchmarks/hybrids.py 0.8B --d-k 128 --d-k 64 --json hybrids.json
    python benchmarks/hybrids.py 0.8B --dtype float32 --threads 8
    python benchmarks/hybrids.py 35B-A3B-4-layers

The weights are random (hybrid_models.py); both sides load the same checkpoint. Transformers runs its torch path, fla
hidden (peer.py), with its own cache. In each case both sides decode greedily, some tokens a round in turns, after a
prompt of `--context` tokens of which each request has states, keys and values of its own. Prefill is one forward from
empty states to the last tokens' logits. Both sides' logits are compared on the same tokens in the same run.

The byte bound is the time to read the weights (of experts, those that are hit), read and write the states, and read
keys and values, at the memory bandwidth read in the same rounds. "Products" are the model's matrix products alone, by
torch and by our kernel. Times are the CPU's on one thread, the wall's on several.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from measure import (
    MAXIMUM_ROUNDS,
    difference,
    interleave,
    machine,
    products,
    quiet,
    ratios,
    read_memory,
    spread,
    summary,
)
from outputs import FiguresFile, write_figures
from peer import stock

# isort: split

import torch
import torch.nn.functional as F
import typer
from hybrid_models import SHAPES, Kept, kept_in, random_checkpoint, weight_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from modeling.checkpoint import open_checkpoint
from modeling.model import Model
from modeling.runtime import Runtime, compile_model
from modeling.runtime.cpu import CpuRuntime
from modeling.spec import AttentionSpec, StateTypes
from modeling.state import DeltaState, SequenceState, StatePool

STEPS, COMPARED = 3, 2
"""Steps of a side's turn, and steps that are compared before."""
ROOM = COMPARED + STEPS * (MAXIMUM_ROUNDS + 1)
"""Tokens that a request may come to have behind its prompt."""
MANY = 32
"""From this batch on a turn is one step, which is long enough."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest difference of logits, relative in norm. In bfloat16 transformers rounds all activations, we those of products
only, and 24 layers carry that on."""


class Ours:
    """Requests that go on from copies of one state of `length` tokens, at slots in random order."""

    def __init__(self, runtime: Runtime, states: list[SequenceState], length: int, ids: Tensor) -> None:
        self.runtime, self.ids = runtime, ids
        self.pool = pool_of(runtime.model, len(ids), length + ROOM)
        self.slots = torch.randperm(len(ids))
        for slot in self.slots.split(1):
            self.pool.scatter(slot, states)
            self.pool.advance(slot, (0, length))

    def __call__(self) -> Tensor:
        logits = self.runtime.logits(self.runtime.decode(self.ids, self.pool, self.slots))
        self.ids = logits.argmax(-1)
        return logits


class Theirs:
    """The same as `Ours`, computed by transformers."""

    def __init__(self, peer: Any, cache: DynamicCache, ids: Tensor) -> None:
        self.peer, self.ids = peer, ids
        self.cache = copy.deepcopy(cache)
        self.cache.reorder_cache(torch.zeros(len(ids), dtype=torch.long))

    def __call__(self) -> Tensor:
        output = self.peer(self.ids[:, None], past_key_values=self.cache, use_cache=True)
        logits: Tensor = output.logits[:, -1]
        self.ids = logits.argmax(-1)
        return logits


def pool_of(model: Model, requests: int, tokens: int) -> StatePool:
    """A pool in which each request has memory of its own for `tokens` tokens."""
    types = StateTypes(inputs=model.embeddings.weight.dtype)
    return StatePool.with_room(model.spec, requests, tokens, types=types)


def prefill_ours(runtime: Runtime, prompts: Tensor) -> tuple[Tensor, StatePool]:
    """The logits of the last tokens of prompts `[batch, length]`, and the states behind them."""
    batch, length = prompts.shape
    pool = pool_of(runtime.model, batch, length)
    offsets = [i * length for i in range(batch + 1)]
    hidden = runtime.prefill(prompts.flatten(), offsets, pool, torch.arange(batch))
    return runtime.logits(hidden[length - 1 :: length]), pool


def prefill_theirs(peer: Any, prompts: Tensor) -> tuple[Tensor, DynamicCache]:
    cache = DynamicCache(config=peer.config)
    output = peer(prompts, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1], cache


@contextmanager
def counting_experts(peer: Any) -> Iterator[list[int]]:
    """Experts that each layer's router hits, in each forward, in a list that grows meanwhile."""
    hits: list[int] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: hits.append(output[-1].unique().numel()))
        for module in peer.modules()
        if type(module).__name__.endswith("TopKRouter")
    ]
    try:
        yield hits
    finally:
        for hook in hooks:
            hook.remove()


def measure_decode(
    runtime: Runtime, peer: Any, batch: int, prompt: tuple[list[SequenceState], DynamicCache, int], **how: Any
) -> dict[str, Any]:
    model = runtime.model
    states, cache, length = prompt
    tolerance = TOLERANCE[model.embeddings.weight.dtype]
    ids = torch.randint(1, model.spec.vocab_size, (batch,))
    ours, theirs = Ours(runtime, states, length, ids), Theirs(peer, cache, ids)
    worst = 0.0
    with counting_experts(peer) as hits:
        for _ in range(COMPARED):
            theirs.ids = ours.ids
            worst = max(worst, difference(ours(), theirs(), tolerance))
    times = interleave(
        {
            "transformers": theirs,
            "ours": ours,
            "products_torch": products(model, batch, F.linear),
            "products_ours": products(
                model, batch, runtime.linear if isinstance(runtime, CpuRuntime) else F.linear
            ),
            "read": read_memory(),
        },
        calls=STEPS if batch < MANY else 1,
        **how,
    )
    experts = sum(hits) / len(hits) if hits else 0.0
    weights = weight_bytes(model, experts)
    recurrent = batch * sum(s.bytes_per_row for s in ours.pool.layers if isinstance(s, DeltaState))
    kv = batch * sum(
        layer.mixer.state_bytes(length, ours.pool.types)
        for layer in model.spec.layers
        if isinstance(layer.mixer, AttentionSpec)
    )
    step_bytes = weights + 2 * recurrent + kv
    read = [(1 << 28) / t for t in times["read"]]
    return {
        "phase": "decode",
        "batch": batch,
        "tokens": length,
        "logits_difference": worst,
        "experts_hit": experts,
        "weights_bytes": weights,
        "recurrent_bytes": recurrent,
        "kv_bytes": kv,
        **speeds(times, batch),
        "share_of_our_products": ratios(times["products_ours"], times["ours"]),
        "bytes_per_second": summary([step_bytes / t for t in times["ours"]]),
        "read_bytes_per_second": summary(read),
        "share_of_byte_bound": summary(
            [step_bytes / t / r for t, r in zip(times["ours"], read, strict=True)]
        ),
    }


def measure_prefill(runtime: Runtime, peer: Any, batch: int, length: int, **how: Any) -> dict[str, Any]:
    model = runtime.model
    prompts = torch.randint(1, model.spec.vocab_size, (batch, length))
    tolerance = TOLERANCE[model.embeddings.weight.dtype]
    distance = difference(prefill_ours(runtime, prompts)[0], prefill_theirs(peer, prompts)[0], tolerance)
    sides: dict[str, Callable[[], object]] = {
        "transformers": lambda: prefill_theirs(peer, prompts),
        "ours": lambda: prefill_ours(runtime, prompts),
        "products_torch": products(model.layers, batch * length, F.linear),
    }
    times = interleave(sides, rounds=2, **how)
    return {
        "phase": "prefill",
        "batch": batch,
        "tokens": length,
        "logits_difference": distance,
        **speeds(times, batch * length),
    }


def speeds(times: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """What both phases tell of rounds in which each side did `tokens` tokens."""
    return {
        "seconds": {name: summary(t) for name, t in times.items()},
        "tokens_per_second": {
            name: summary([tokens / t for t in times[name]]) for name in ("ours", "transformers")
        },
        "speedup": ratios(times["transformers"], times["ours"]),
        "share_of_torch_products": ratios(times["products_torch"], times["ours"]),
    }


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(
        *("phase", "d_k", "batch", "tokens", "transformers\ntokens/s", "ours\ntokens/s", "speed-up\n(quartiles)"),
        *("share of products\ntorch's / ours", "GB/s", "memory reads\nGB/s", "share of\nbyte bound", "difference"),
        title=title,
    )  # fmt: skip
    for r in rows:
        decode = r["phase"] == "decode"
        table.add_row(
            *(r["phase"], str(r["d_k"]), str(r["batch"]), str(r["tokens"])),
            *(f"{r['tokens_per_second'][side]['median']:.4g}" for side in ("transformers", "ours")),
            spread(r["speedup"]),
            f"{r['share_of_torch_products']['median']:.0%}"
            + (f" / {r['share_of_our_products']['median']:.0%}" if decode else ""),
            f"{r['bytes_per_second']['median'] / 1e9:.1f}" if decode else "",
            f"{r['read_bytes_per_second']['median'] / 1e9:.1f}" if decode else "",
            f"{r['share_of_byte_bound']['median']:.0%}" if decode else "",
            f"{r['logits_difference']:.1g}",
        )
    return table


@torch.inference_mode()
def main(
    shape: Annotated[str, typer.Argument(help=f"One of {', '.join(SHAPES)}.")],
    d_k: Annotated[list[int], typer.Option(help="Key channels; may be given several times.")] = [128],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="May be given several times.")] = [1, 8, 32],  # noqa: B006
    context: Annotated[list[int], typer.Option(help="Tokens before the first decoded.")] = [128, 2048],  # noqa: B006
    prefill: Annotated[list[str], typer.Option(help="Prompts, as in 8x128.")] = ["1x128", "8x128", "1x2048"],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32, of both sides' weights.")] = "bfloat16",
    threads: Annotated[int, typer.Option(min=1, help="Threads of each side.")] = 1,
    seconds: Annotated[float, typer.Option(help="Seconds of a case, about; five rounds at least.")] = 15,
    models: Kept = None,
    json: FiguresFile = None,
) -> None:
    quiet(threads)
    how = {"seconds": seconds, "clock": time.process_time if threads == 1 else time.perf_counter}
    console = Console(width=150)
    rows: list[dict[str, Any]] = []
    for width in d_k:
        with kept_in(models) as folder:
            path = random_checkpoint(folder, shape, width)
            model = open_checkpoint(str(path)).load(dtype=getattr(torch, dtype)).requires_grad_(False)
            peer = stock(path, getattr(torch, dtype))
        runtime = compile_model(model)
        about = {"shape": shape, "d_k": width, "dtype": dtype, "threads": threads, "backend": runtime.name}

        def done(figures: dict[str, Any], about: dict[str, Any] = about) -> None:
            rows.append({**about, **figures})
            spoken = f"{figures['phase']}, d_k {about['d_k']}, {figures['batch']} x {figures['tokens']}"
            console.print(f"{spoken}: {spread(figures['speedup'])}", highlight=False)
            write_figures(json, {"machine": machine(), "cases": rows})

        for prompts in prefill:
            size, length = map(int, prompts.split("x"))
            done(measure_prefill(runtime, peer, size, length, **how))
        for length in context:
            prompt = torch.randint(1, model.spec.vocab_size, (1, length))
            states = prefill_ours(runtime, prompt)[1].gather(torch.arange(1))
            cache = prefill_theirs(peer, prompt)[1]
            for size in batch:
                done(measure_decode(runtime, peer, size, (states, cache, length), **how))
    console.print(
        table_of(
            rows, f"{shape}, {dtype}, {threads} threads" if threads > 1 else f"{shape}, {dtype}, one thread"
        )
    )


if __name__ == "__main__":
    typer.run(main)
