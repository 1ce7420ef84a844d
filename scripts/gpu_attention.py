"""Softmax attention over pages: how close decode steps are to their bytes, how fast prompts are, and which way of
launching the kernels is the fastest."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from gpu_bandwidth import copy_rate
from gpu_common import Run, graph_seconds, median_seconds
from torch import Tensor
from triton.runtime.errors import OutOfResources

from modeling.layers import AttentionMixer
from modeling.runtime.gpu import attention
from modeling.runtime.gpu.attention import attention_prompts, attention_step
from modeling.runtime.gpu.compiling import compile_ahead
from modeling.spec import AttentionSpec, RopeSpec, StateTypes
from modeling.state import PAGE_TOKENS, PagedKV, Pages

CACHE_BYTES = 200_000_000
"""More than a GPU's cache holds: so much is read between two uses of the same keys."""
STEP_VARIANTS: list[dict[str, Any]] = [
    {},
    *({"STEP_BYTES": n} for n in (8192, 32768)),
    *({"STEP_STAGES": n} for n in (3, 4)),
    *({"SPLIT_STAGES": n} for n in (2, 4)),
    *({"STEP_WARPS": n} for n in (2, 8)),
    *({"PROGRAMS": n} for n in (132, 528)),
]
"""Constants of `modeling.runtime.gpu.attention` for decode steps, beside those that are in use."""
PROMPT_VARIANTS: list[dict[str, Any]] = [
    {},
    *({"tile": tile} for tile in ((64, 2, 16384), (64, 1, 16384), (64, 1, 32768), (32, 4, 32768))),
    {"PACKED_STAGES": 3},
]
"""Ways of launching prompts; `tile` is that of elements of 2 bytes in `PACKED_TILES`."""


def specs(run: Run) -> dict[str, AttentionSpec]:
    if run.small:
        return {"tiny": AttentionSpec(4, 2, 32, RopeSpec(8, 1e4), "head", True, 1e-6)}
    rope = RopeSpec(64, 1e7)
    return {
        "Qwen3.5-4B": AttentionSpec(16, 4, 256, rope, "head", True, 1e-6),
        "35B-A3B": AttentionSpec(16, 2, 256, rope, "head", True, 1e-6),
        "OLMo": AttentionSpec(30, 30, 128, None, "whole", False, 1e-6),
    }


@contextmanager
def launched_as(variant: dict[str, Any]) -> Iterator[None]:
    """Within, the kernels are launched that way."""
    constants = {name: value for name, value in variant.items() if name != "tile"}
    if "tile" in variant:
        constants["PACKED_TILES"] = attention.PACKED_TILES | {2: variant["tile"], 4: variant["tile"]}
    with patch.multiple(attention, **constants) if constants else patch.dict({}):
        yield


class Layers:
    """Caches of several layers in which each of `batch` requests has `tokens` tokens, and one mixer for all."""

    def __init__(self, run: Run, spec: AttentionSpec, batch: int, tokens: int, more: int = 1) -> None:
        self.dtype = torch.float32 if run.small else torch.bfloat16
        with torch.device(run.device):
            self.mixer = AttentionMixer(spec, 64, 0).to(self.dtype).requires_grad_(False)
        self.slots = torch.randperm(batch, device=run.device)
        count = batch * -(-(tokens + more) // PAGE_TOKENS)
        pages = Pages(batch + 1, count, tokens + more, run.device)
        for slot in range(batch):
            pages.grow(slot, tokens + more)
        pages.lengths[:-1] = tokens
        self.bytes = batch * tokens * 2 * spec.kv_dim * self.dtype.itemsize
        many = 2 if run.small else max(2, min(CACHE_BYTES // max(self.bytes, 1) + 1, 24))
        types = StateTypes(inputs=self.dtype)
        self.states = [PagedKV.zeros(spec, pages, types, run.device) for _ in range(many)]
        for state in self.states:
            state.keys.normal_()
            state.values.normal_()

    def projected(self, rows: int) -> Tensor:
        width = sum(self.mixer.spec.in_proj_sizes)
        return torch.randn(rows, width, device=self.slots.device, dtype=self.dtype)


@torch.inference_mode()
def time_step(run: Run, layers: Layers) -> float:
    """Seconds of one layer's step, recorded."""
    projected = layers.projected(len(layers.slots))

    def all_layers() -> None:
        for state in layers.states:
            attention_step(layers.mixer, projected, state, layers.slots)

    return graph_seconds(run, all_layers) / len(layers.states)


@torch.inference_mode()
def time_prompts(run: Run, layers: Layers, length: int) -> float:
    """Seconds of one layer's prompts of `length` tokens behind what is there."""
    batch = len(layers.slots)
    offsets = list(range(0, batch * length + 1, length))
    projected = layers.projected(offsets[-1])

    def prompts() -> None:
        attention_prompts(layers.mixer, projected, offsets, layers.states[0], layers.slots)

    prompts()
    return median_seconds(run, prompts, 1 if run.small else 8)


def timed(variants: list[dict[str, Any]], work: Callable[[], float]) -> dict[str, float]:
    """Seconds of `work` launched in each way, by its name; a way that needs more than the device has is left out,
    unless it is the one in use."""
    taken: dict[str, float] = {}
    for variant in variants:
        with launched_as(variant), suppress(OutOfResources) if variant else nullcontext():
            taken[named(variant)] = work()
    return taken


def named(variant: dict[str, Any]) -> str:
    return " ".join(f"{name.lower()} {value}" for name, value in variant.items()) or "as it is"


@torch.inference_mode()
def compile_all(run: Run) -> None:
    """All variants of all shapes, beside each other."""
    for spec in specs(run).values():
        for batch in (1, 2, 32, 256):
            layers = Layers(run, spec, batch, 70, 2)
            for variant in STEP_VARIANTS:
                with launched_as(variant):
                    attention_step(layers.mixer, layers.projected(batch), layers.states[0], layers.slots)
        packed, offsets = layers.projected(2 * batch), list(range(0, 2 * batch + 1, 2))
        for variant in PROMPT_VARIANTS:
            with launched_as(variant):
                attention_prompts(layers.mixer, packed, offsets, layers.states[0], layers.slots)


def check_attention_speed(run: Run) -> Iterator[list[str]]:
    """Decode steps beside their bytes, then prompts beside their multiplications."""
    results = run.report.setdefault("attention", {})
    rate = run.report.get("copy_bytes_per_second") or copy_rate(run)
    began = time.monotonic()
    if run.cuda:
        compile_ahead(lambda: compile_all(run))
        yield ["attention, compiled", "", f"{time.monotonic() - began:.1f} s"]
    sizes = (
        [(2, 5)]
        if run.small
        else [
            *((n, 128) for n in (1, 32, 128, 256)),
            *((n, 2048) for n in (1, 8, 32, 128, 256)),
            (1, 32768),
        ]
    )
    for name, spec in specs(run).items():
        for batch, tokens in sizes:
            run.need(2)
            layers = Layers(run, spec, batch, tokens)
            taken = timed(STEP_VARIANTS[: 2 if run.small else None], partial(time_step, run, layers))
            bound = layers.bytes / rate
            results[f"{name} step B {batch} x {tokens}"] = {"seconds": taken, "bound_s": bound}
            yield [
                f"{name} step B {batch} x {tokens}",
                "",
                told(taken, lambda s, b=bound: f"{b / s:.0%} of the bytes"),
            ]
            del layers
        for batch, past, length in (
            [(2, 5, 9)] if run.small else [(1, 0, 2048), (1, 0, 8192), (1, 32768, 512), (32, 0, 128)]
        ):
            run.need(2)
            layers = Layers(run, spec, batch, past, length)
            prompts = partial(time_prompts, run, layers, length)
            taken = timed(PROMPT_VARIANTS[: 1 if run.small else None], prompts)
            work = 4 * batch * spec.q_dim * length * (past + length / 2)
            label = f"{name} prompts {batch} x {length} behind {past}"
            results[label] = {"seconds": taken, "multiplications": work}
            yield [label, "", told(taken, lambda s, w=work: f"{w / s / 1e12:.0f} TFLOP/s")]
            del layers


def told(taken: dict[str, float], meaning: Any) -> str:
    """What is in use, and the three fastest others."""
    first, *others = sorted(taken.items(), key=lambda item: (item[0] != "as it is", item[1]))
    words = [f"{s * 1e6:.0f} us ({meaning(s)}) {name}" for name, s in [first, *others[:3]]]
    return "; ".join(words)
