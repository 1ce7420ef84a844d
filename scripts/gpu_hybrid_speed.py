"""Hybrids of real shapes with random weights: decode steps and prompts beside the bytes that they move."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from gpu_bandwidth import copy_rate
from gpu_common import Run, recorder, seconds, synchronise
from gpu_models import free
from torch import Tensor

from benchmarks.hybrid_models import config_of, random_model, weight_bytes
from modeling.families import family_of
from modeling.layers import MoE
from modeling.model import Model
from modeling.runtime import Runtime
from modeling.runtime.gpu import runtime as gpu_runtime
from modeling.runtime.gpu.graphs import DecodeGraphs
from modeling.spec import StateTypes
from modeling.state import DeltaState, PagedKV, StatePool

NEW_TOKENS = 128
PLACES = 8
"""How many of the new tokens are timed, spread over all."""
STEPS = 4
"""Decode steps at each of them."""
STEP_TOKENS = 4096
"""Prompt tokens of a step, as the server has them on a GPU."""


def shapes(run: Run) -> tuple[str, ...]:
    """What is measured alone, as `benchmarks.hybrid_models` names it."""
    return ("tiny",) if run.small else run.shapes


def main_shape(run: Run) -> str:
    """What the other sections measure."""
    return "tiny" if run.small else run.main_shape or run.shapes[0]


def width(run: Run, d_k: int) -> int:
    return d_k // 8 if run.small else d_k


def batches(run: Run) -> tuple[int, ...]:
    return (1, 3) if run.small else (1, 32, 128, 256, 512)


def prompts(run: Run) -> tuple[int, ...]:
    return (5,) if run.small else (128, 2048)


def dtype_of(run: Run) -> torch.dtype:
    return torch.float32 if run.small else torch.bfloat16


def step_bytes(
    model: Model, pool: StatePool, batch: int, tokens: int, experts: float = 0.0
) -> dict[str, int]:
    """What a decode step moves at the least: weights once, each request's states in and out, and the keys and values
    of its `tokens` tokens in."""
    kv = model.spec.kv_bytes_per_token(pool.types)
    return {
        "weights": round(weight_bytes(model, experts)),
        "states": 2 * batch * pool.bytes_per_slot,
        "kv": batch * tokens * kv,
    }


def filled_pool(
    run: Run, model: Model, requests: int, tokens: int, dtype: torch.dtype | None = None
) -> StatePool:
    """A pool whose slots have room for so many tokens, states and caches drawn."""
    types = StateTypes(inputs=dtype or dtype_of(run))
    room = tokens + STEPS + 1  # the steps at the last place go on behind it
    pool = StatePool.with_room(model.spec, requests, room, device=run.device, types=types)
    for layer in pool.layers:
        if isinstance(layer, DeltaState):
            layer.recurrent.normal_(std=0.1)
            layer.conv.normal_()
        elif isinstance(layer, PagedKV):
            layer.keys.normal_()
            layer.values.normal_()
    return pool


def set_lengths(pool: StatePool, tokens: int) -> None:
    """All slots have seen so many tokens."""
    pool.pages.lengths.fill_(tokens)
    pool.pages.lengths[-1] = 0


def fitting(run: Run, model: Model, tokens: int, wanted: tuple[int, ...]) -> list[int]:
    """The batches for which there is memory."""
    if not run.cuda:
        return list(wanted)
    each = model.spec.state_bytes(tokens + 64, StateTypes(inputs=dtype_of(run)))
    reserve = 6 * 2**30  # prompts, logits, graphs
    return [n for n in wanted if n * each < torch.cuda.mem_get_info()[0] - reserve]


@torch.inference_mode()
def launch_all(runtime: Runtime, pool: StatePool, wanted: Sequence[int]) -> None:
    """Every kernel of prompts, and of decode steps of these batches, once."""
    device = runtime.model.device
    ids = torch.randint(0, runtime.model.spec.vocab_size, (max(64, *wanted),), device=device)
    slots = torch.arange(pool.num_slots, device=device)
    set_lengths(pool, 0)
    runtime.prefill(ids[:64], [0, 64], pool, slots[:1])
    for n in wanted:
        runtime.logits(runtime.decode(ids[:n], pool, slots[:n]))


def compile_kernels(run: Run, runtime: Runtime, pool: StatePool, wanted: Sequence[int]) -> float:
    """Seconds of having all these kernels compiled, beside each other."""
    began = time.monotonic()
    if run.cuda:
        runtime.compile_ahead(lambda: launch_all(runtime, pool, wanted))
    return time.monotonic() - began


def spread(samples: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(samples) < 2:
        return {"median": samples[0], "q1": samples[0], "q3": samples[0], "n": 1}
    low, middle, high = statistics.quantiles(samples, n=4)
    return {"median": middle, "q1": low, "q3": high, "n": len(samples)}


def time_decode(run: Run, step: Callable[[], object], pool: StatePool, prompt: int, new: int) -> list[float]:
    """Seconds of steps at places spread over the new tokens, one before each place's being left out."""
    taken: list[float] = []
    for place in range(0, new, max(new // PLACES, 1)):
        set_lengths(pool, prompt + place)
        step()
        if not run.cuda:
            taken.append(seconds(run, step))
            continue
        events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        synchronise(run)
        taken += [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
    return taken


@torch.inference_mode()
def time_prompts(run: Run, runtime: Runtime, pool: StatePool, length: int) -> dict[str, float]:
    """Seconds until the first token: of one prompt alone, and of a full step of prompts."""
    vocab = runtime.model.spec.vocab_size
    many = min(max((2 * length if run.small else STEP_TOKENS) // length, 1), pool.num_slots)
    ids = torch.randint(0, vocab, (many * length,), device=run.device)
    slots = torch.arange(many, device=run.device)

    def first_tokens(n: int) -> None:
        offsets = list(range(0, n * length + 1, length))
        set_lengths(pool, 0)
        hidden = runtime.prefill(ids[: n * length], offsets, pool, slots[:n])
        ends = torch.tensor(offsets[1:], device=run.device) - 1
        runtime.logits(hidden[ends]).argmax(-1).tolist()

    found: dict[str, float] = {"prompts_of_a_step": many}
    for name, n in (("one", 1), ("step", many)):
        # One prompt takes the time of the host's launches, which varies.
        repeats = 1 if run.small else 9 if n == 1 else 3
        first_tokens(n)
        found[name] = statistics.median(seconds(run, lambda n=n: first_tokens(n)) for _ in range(repeats))
    return found


def first_tokens_s(first: dict[str, float], batch: int) -> float:
    """Seconds until the first tokens of a whole batch, by the figures of `time_prompts`."""
    return first["one"] if batch == 1 else -(-batch // int(first["prompts_of_a_step"])) * first["step"]


def told_prompts(first: dict[str, float], length: int) -> str:
    """The figures of `time_prompts` in words."""
    many, step = first["prompts_of_a_step"], first["step"]
    return (
        f"first token of one {first['one'] * 1e3:.1f} ms, a step of {many} in {step * 1e3:.1f} ms "
        f"({many * length / step:.0f} tok/s)"
    )


def measure_shape(run: Run, shape: str, d_k: int, model: Model, rate: float) -> Iterator[list[str]]:
    """Rows of one model."""
    results = run.report.setdefault("hybrid_speed", {})
    runtime = run.runtime(model)
    new = 2 if run.small else NEW_TOKENS
    for length in prompts(run):
        run.need(6)
        wanted = fitting(run, model, length + new, batches(run))
        pool = filled_pool(run, model, wanted[-1], length + new)
        compiled = compile_kernels(run, runtime, pool, wanted)
        first = time_prompts(run, runtime, pool, length)
        results[f"{shape} d_k {d_k} prompt {length}"] = first
        yield [
            f"{shape} d_k {d_k} prompt {length}",
            "",
            f"{told_prompts(first, length)}; compiled in {compiled:.1f} s",
        ]
        graphs = DecodeGraphs(runtime, pool, wanted, recorder(run))
        for batch in wanted:
            run.need(2)
            figures = decode_figures(run, runtime, graphs, pool, batch, length, new, rate)
            figures["ttft_s"] = first_tokens_s(first, batch)
            yield speed_row(run, results, shape, d_k, batch, length, figures)
        del graphs, pool
        free(run)
    del runtime


@torch.inference_mode()
def decode_figures(
    run: Run,
    runtime: Runtime,
    graphs: DecodeGraphs,
    pool: StatePool,
    batch: int,
    length: int,
    new: int,
    rate: float,
    experts: float = 0.0,
) -> dict[str, Any]:
    """Steps with greedy sampling on the device."""
    slots = torch.randperm(pool.num_slots, device=run.device)[:batch]
    ids = torch.randint(0, runtime.model.spec.vocab_size, (batch,), device=run.device)

    def step() -> None:
        nonlocal ids
        ids = runtime.logits(graphs(ids, slots)).argmax(-1)

    set_lengths(pool, length)
    step()
    taken = time_decode(run, step, pool, length, new)
    parts = step_bytes(runtime.model, pool, batch, length + new // 2, experts)
    step_s = spread(taken)
    return {
        "step_s": step_s,
        "tokens_per_second": batch / step_s["median"],
        "bytes": parts,
        "share_of_bound": sum(parts.values()) / rate / step_s["median"],
    }


def speed_row(
    run: Run, results: dict[str, Any], shape: str, d_k: int, batch: int, length: int, figures: dict[str, Any]
) -> list[str]:
    name = f"{shape} d_k {d_k} B {batch} prompt {length}"
    results[name] = figures
    step = figures["step_s"]
    told = (
        f"{figures['tokens_per_second']:.0f} tok/s, step {step['median'] * 1e3:.2f} ms ({step['q1'] * 1e3:.2f} to "
        f"{step['q3'] * 1e3:.2f}), {figures['share_of_bound']:.0%} of the bound"
    )
    if "ttft_s" in figures:
        told += f", first tokens of all {figures['ttft_s'] * 1e3:.0f} ms"
    dense = results.get(f"{shape} d_k {width(run, 128)} B {batch} prompt {length}")
    if dense and dense is not figures:
        figures["over_dense"] = figures["tokens_per_second"] / dense["tokens_per_second"]
        told += f", {figures['over_dense']:.2f} x dense"
    return [name, "", told]


def check_hybrid_speed(run: Run) -> Iterator[list[str]]:
    """Dense and reduced. The first tokens of a whole batch are as many steps of prompts as it takes, of which one is
    measured."""
    rate = copy_rate(run)
    run.report["copy_bytes_per_second"] = rate
    yield ["copy on the device", "", f"{rate / 1e9:.0f} GB/s"]
    for shape in shapes(run):
        for d_k in run.widths:
            run.need(12)
            free(run)
            model = random_model(config_of(shape, width(run, d_k)), dtype_of(run), run.device)
            yield from measure_shape(run, shape, width(run, d_k), model, rate)
            del model
    free(run)


@torch.inference_mode()
def experts_hit(runtime: Runtime, ids: Tensor, pool: StatePool, slots: Tensor) -> float:
    """Experts that the routers of a layer choose in a decode step, in the mean over some steps: what a model says is
    more alike than the random tokens that it begins with."""
    hits: list[int] = []
    added = gpu_runtime.FEED_FORWARDS[MoE]

    def counting(moe: MoE, x: Tensor, norm: Any, residual: Tensor | None) -> Tensor:
        chosen = moe.router(x if norm is None else norm(x)).topk(moe.spec.top_k, dim=-1).indices
        hits.append(chosen.unique().numel())
        return added(moe, x, norm, residual)

    with patch.dict(gpu_runtime.FEED_FORWARDS, {MoE: counting}):
        for _ in range(STEPS):
            ids = runtime.logits(runtime.decode(ids, pool, slots)).argmax(-1)
    return sum(hits) / len(hits)


def experts_config(run: Run) -> tuple[str, dict[str, Any]]:
    """The 35B-A3B, with as many of its layers as fit beside a pool."""
    if run.small:
        return "tiny-experts", config_of("tiny-experts", 16)
    config = config_of("35B-A3B")
    spec = family_of(config).spec(config)
    with torch.device("meta"):
        total = 2 * sum(p.numel() for p in Model(spec).parameters())
    free_bytes = torch.cuda.mem_get_info()[0] - 30 * 2**30
    layers = config["num_hidden_layers"]
    if total > free_bytes:
        layers = int(layers * free_bytes / total) // 4 * 4
        config |= {"num_hidden_layers": layers, "layer_types": config["layer_types"][:layers]}
    return f"35B-A3B, {layers} of 40 layers", config


def check_hybrid_experts(run: Run) -> Iterator[list[str]]:
    """Decode steps of the 35B-A3B; the experts that a step hits are counted."""
    results = run.report.setdefault("hybrid_experts", {})
    rate = run.report.get("copy_bytes_per_second") or copy_rate(run)
    free(run)
    run.need(20)
    shape, config = experts_config(run)
    model = random_model(config, dtype_of(run), run.device)
    runtime = run.runtime(model)
    length, new = prompts(run)[0], 2 if run.small else NEW_TOKENS
    wanted = [1, 3] if run.small else [1, 8, 32, 128]
    pool = filled_pool(run, model, wanted[-1], length + new)
    compiled = compile_kernels(run, runtime, pool, wanted)
    first = time_prompts(run, runtime, pool, length)
    results["prompts"] = first
    yield [shape, "", f"{told_prompts(first, length)}; compiled in {compiled:.1f} s"]
    graphs = DecodeGraphs(runtime, pool, wanted, recorder(run))
    for batch in wanted:
        run.need(2)
        set_lengths(pool, length)
        ids = torch.randint(0, model.spec.vocab_size, (batch,), device=run.device)
        hit = experts_hit(runtime, ids, pool, torch.arange(batch, device=run.device))
        figures = decode_figures(run, runtime, graphs, pool, batch, length, new, rate, hit)
        figures["experts_hit"] = hit
        row = speed_row(run, results, shape, config["linear_key_head_dim"], batch, length, figures)
        yield [*row[:2], f"{row[2]}, {hit:.0f} experts a layer"]
    del graphs, pool, runtime, model
    free(run)
