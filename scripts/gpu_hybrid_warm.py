"""What launches the kernels that the sections of hybrids need, to have them compiled beside each other."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_common import Run
from gpu_hybrid_kernels import check_attention, check_experts, check_products
from gpu_hybrid_peer import stock_of, time_stock
from gpu_hybrid_speed import batches, dtype_of, filled_pool, launch_all, main_shape, shapes, width
from gpu_hybrids import parity_cases, small_config

from benchmarks.hybrid_models import config_of, random_model

LAYERS = 4
"""How many layers of a large model are launched: among them is one of each kind."""


def few_layers(shape: str, d_k: int) -> dict[str, Any]:
    config = config_of(shape, d_k)
    return config | {"num_hidden_layers": LAYERS, "layer_types": config["layer_types"][:LAYERS]}


def hybrid(run: Run, config: dict[str, Any], dtype: torch.dtype, wanted: tuple[int, ...]) -> None:
    """A prompt, and decode steps of these batches."""
    model = random_model(config, dtype, run.device)
    launch_all(run.runtime(model), filled_pool(run, model, max(wanted), 130, dtype), wanted)


def peer(run: Run, config: dict[str, Any]) -> None:
    time_stock(run, stock_of(run, config, random_model(config, dtype_of(run), run.device)), 2, 130)


def drained(check: Callable[[Run], Iterator[list[str]]], run: Run) -> None:
    """A section whose results do not count."""
    list(check(replace(run, report={}, failures=[])))


def hybrid_jobs(run: Run, section: str) -> Iterator[Callable[[], object]]:
    """What launches the kernels of a section."""
    if section == "hybrids":
        yield from (partial(drained, c, run) for c in (check_attention, check_experts, check_products))
        for (family, d_k), dtype in itertools.product(parity_cases(run), (torch.bfloat16, torch.float32)):
            yield partial(hybrid, run, small_config(run, family, d_k), dtype, (1, 2, 4, 6, 8))
    elif section in ("hybrid_speed", "hybrid_engine"):
        of_section = shapes(run) if section == "hybrid_speed" else (main_shape(run),)
        for shape, d_k in itertools.product(of_section, run.widths):
            yield partial(hybrid, run, few_layers(shape, width(run, d_k)), dtype_of(run), batches(run))
    elif section == "hybrid_experts" and run.cuda:
        yield partial(hybrid, run, few_layers("35B-A3B", 128), dtype_of(run), (1, 8, 32, 128))
    elif section == "hybrid_peer" and run.cuda:
        yield partial(peer, run, few_layers(main_shape(run), 128))
