"""A hybrid of a real shape in transformers with fla's kernels, with the same weights as ours."""

import inspect
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from gpu_bandwidth import copy_rate
from gpu_common import Run, error, recorder, synchronise
from gpu_hybrid_speed import (
    NEW_TOKENS,
    compile_kernels,
    decode_figures,
    dtype_of,
    filled_pool,
    first_tokens_s,
    main_shape,
    prompts,
    spread,
    time_prompts,
    width,
)
from gpu_hybrids import RULES, hide_fla
from gpu_models import free
from torch import Tensor

from benchmarks.hybrid_models import config_of, random_model
from modeling.checkpoint import export_tensors
from modeling.families import family_of
from modeling.model import Model
from modeling.runtime import Runtime
from modeling.runtime.gpu.graphs import DecodeGraphs
from modeling.spec import StateTypes
from modeling.state import StatePool

STEPS, WARM_UP = 12, 3
"""Decode steps that are timed, and those before them."""
LOGITS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest relative difference of logits. In bfloat16 each side rounds in places of its own, and 32 layers carry that
on."""


def stock_of(run: Run, config: dict[str, Any], model: Model) -> Any:
    """The transformers model with the same weights, in the memory of ours where the layout allows it."""
    hide_fla(run)
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(**config)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(settings, dtype=dtype_of(run)).eval()
    dtypes = {name: p.dtype for name, p in stock.named_parameters()}
    state = {name: t.to(dtypes.get(name, t.dtype)) for name, t in export_tensors(model, family_of(config))}
    if model.spec.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    stock.load_state_dict(state, assign=True)
    stock.tie_weights()
    # Its angles are computed when it is made, and on the meta device they are not.
    stock.model.rotary_emb = type(stock.model.rotary_emb)(settings).to(run.device)
    return stock


def takes_kernels(stock: Any) -> bool:
    """Whether transformers computes the rule by fla's kernels, and not by its own torch operations."""
    module = sys.modules[type(stock).__module__]
    found = [inspect.getclosurevars(getattr(module, rule)).nonlocals for rule in RULES]
    return all(f.get("is_new_implementation", False) for f in found)


@torch.inference_mode()
def time_stock(run: Run, stock: Any, batch: int, length: int) -> dict[str, Any]:
    """Prompts, then greedy steps with its own cache."""
    from transformers import DynamicCache

    ids = torch.randint(0, stock.config.vocab_size, (batch, length), device=run.device)

    def first() -> tuple[Any, Tensor]:
        cache = DynamicCache(config=stock.config)
        logits = stock(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        synchronise(run)
        return cache, logits

    first()
    began = time.perf_counter()
    cache, logits = first()
    ttft = time.perf_counter() - began
    taken: list[float] = []
    token = logits.argmax(-1)
    for i in range(WARM_UP + 2 if run.small else STEPS + WARM_UP):
        began = time.perf_counter()
        output = stock(token[:, None], past_key_values=cache, use_cache=True)
        token = output.logits[:, -1].argmax(-1)
        synchronise(run)
        if i >= WARM_UP:
            taken.append(time.perf_counter() - began)
    step = spread(taken)
    return {"ttft_s": ttft, "step_s": step, "tokens_per_second": batch / step["median"]}


@torch.inference_mode()
def compare_logits(run: Run, runtime: Runtime, stock: Any, length: int) -> float:
    """How far our logits of a prompt are from transformers', relative in norm."""
    model = runtime.model
    ids = torch.randint(0, model.spec.vocab_size, (length,), device=run.device)
    types = StateTypes(inputs=dtype_of(run))
    pool = StatePool.with_room(model.spec, 1, length, device=run.device, types=types)
    hidden = runtime.prefill(ids, [0, length], pool, torch.zeros(1, dtype=torch.long, device=run.device))
    return error(runtime.logits(hidden), stock(ids[None], use_cache=False).logits[0])


def check_hybrid_peer(run: Run) -> Iterator[list[str]]:
    """The main shape, dense, by transformers with fla's kernels, beside ours with the same weights."""
    results = run.report.setdefault("hybrid_peer", {})
    shape, length = main_shape(run), prompts(run)[0]
    new = 2 if run.small else NEW_TOKENS
    free(run)
    run.need(15)
    rate = run.report.get("copy_bytes_per_second") or copy_rate(run)
    config = config_of(shape, width(run, 128))
    model = random_model(config, dtype_of(run), run.device)
    runtime, stock = run.runtime(model), stock_of(run, config, model)
    distance = results["logits_difference"] = compare_logits(run, runtime, stock, length)
    good = run.check(distance < LOGITS_TOLERANCE[dtype_of(run)], "hybrid peer: logits")
    results["fla"] = takes_kernels(stock)
    told = f"{distance:.1e}; its rule is {'fla' if results['fla'] else 'transformers'}'s"
    yield [f"{shape}: our logits from transformers'", good, told]
    wanted = (1, 2) if run.small else (1, 8, 32)
    pool = filled_pool(run, model, max(wanted), length + new)
    compile_kernels(run, runtime, pool, wanted)
    first = time_prompts(run, runtime, pool, length)
    graphs = DecodeGraphs(runtime, pool, wanted, recorder(run))
    for batch in wanted:
        run.need(4)
        theirs = time_stock(run, stock, batch, length)
        ours = decode_figures(run, runtime, graphs, pool, batch, length, new, rate)
        ours["ttft_s"] = first_tokens_s(first, batch)
        ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
        results[f"{shape} B {batch}"] = {"theirs": theirs, "ours": ours, "ratio": ratio}
        told = "; ".join(
            f"{name} {side['tokens_per_second']:.0f} tok/s, step {side['step_s']['median'] * 1e3:.2f} ms, first tokens "
            f"{side['ttft_s'] * 1e3:.0f} ms"
            for name, side in (("transformers", theirs), ("ours", ours))
        )
        yield [f"transformers {shape} B {batch}", "", f"{told}; ours {ratio:.1f} x"]
    del graphs, pool, stock, runtime, model
    free(run)
