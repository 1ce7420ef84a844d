"""Whole models: the same text as stock fla, tokens per second beside it, and how many requests fit."""

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from gpu_bandwidth import copy_rate
from gpu_common import (
    FAMILIES,
    Run,
    SkippedError,
    config,
    error,
    generate,
    large_config,
    make_checkpoint,
    prefill,
    random_model,
    recorder,
    seconds,
    tuned_by_fla,
    untuned,
)
from torch import Tensor

from modeling.checkpoint import Checkpoint
from modeling.families import family_of
from modeling.model import Model
from modeling.runtime import Runtime, TorchRuntime
from modeling.runtime.gpu.graphs import DecodeGraphs
from modeling.spec import StateDType, StateTypes
from modeling.state import StatePool

FP32_TOLERANCE = 1e-3
"""Largest relative difference of logits: both sides are float32, their sums in another order."""
BF16_FACTOR = 1.5
"""Our bfloat16 logits may be this much further from float32 than stock fla's own bfloat16 logits are."""
TIE = 1e-3
"""Greedy tokens may differ where the best two logits are closer than this share of the largest logit."""
CAPACITY_GOALS: dict[tuple[StateDType, int], int] = {("int8", 128): 9000, ("int8", 64): 16000}
"""Requests that shall fit on a card with 80 GB, by dtype of the state and d_k."""


def free(run: Run) -> None:
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Stock:
    """The stock fla model of a checkpoint; our plain torch runtime where fla can't run or can't load it."""

    def __init__(self, run: Run, checkpoint: Checkpoint, dtype: torch.dtype, *, ours: bool) -> None:
        self.run, self.dtype = run, dtype
        self.ours: Model | None = None
        if ours:
            self.name = "torch runtime"
            self.ours = checkpoint.load(dtype=dtype, device=run.device)
            return
        import fla.models  # noqa: F401 (registers its models with transformers)
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = AutoConfig.from_pretrained(checkpoint.path)
        # fla's chunk kernel for DeltaNet refuses float32, and the one for Gated DeltaNet multiplies in tf32.
        settings.attn_mode = "fused_recurrent" if dtype == torch.float32 else "chunk"
        self.name = f"stock fla, {settings.attn_mode}"
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint.path, config=settings, dtype=dtype)
        self.model.to(run.device).eval()

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """`[B, tokens]` -> `[B, tokens, vocab]`, without a cache."""
        if self.ours is None:
            return self.model(ids, use_cache=False).logits.float()
        hidden, _ = self.ours(ids.flatten(), list(range(0, ids.numel() + 1, ids.shape[1])))
        return self.ours.logits(hidden).view(*ids.shape, -1).float()

    @torch.inference_mode()
    def generate(self, prompts: Tensor, new_tokens: int) -> Tensor:
        if self.ours is not None:
            return generate(self.run, TorchRuntime(self.ours), prompts, new_tokens, self.dtype)[0]
        return stock_generate(self.model, prompts, new_tokens)


def stock_generate(model: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    return ids[:, prompts.shape[1] :]


def same_text(tokens: Tensor, logits: Tensor, expected: Tensor, tie: float = TIE) -> str:
    """Equal, or different only from a tie of our two best logits on. Tokens `[B, n]`, logits `[B, n, vocab]`."""
    ties = 0
    for row, scores, theirs in zip(tokens, logits, expected, strict=True):
        different = (row != theirs).nonzero()
        if not len(different):
            continue
        at = int(different[0])
        best = scores[at].topk(2).values
        if float(best[0] - best[1]) > tie * float(scores[at].abs().max()):
            return f"DIFFERENT at token {at}"
        ties += 1
    return "equal" if not ties else f"equal up to {ties} ties"


def parity_size(run: Run) -> dict[str, int]:
    """Size of the models whose text is compared."""
    if run.small:
        return {"hidden": 64, "layers": 2, "heads": 2, "d_v": 16, "vocab": 257}
    return {"hidden": 512, "layers": 4, "heads": 4, "d_v": 128, "vocab": 2000}


def parity_widths(run: Run) -> list[tuple[str, int | list[int]]]:
    """What is compared: names and d_k, of all layers or of each."""
    if run.small:
        return [("dense", 16), ("reduced", 8), ("per layer", [12, 8])]
    return [("dense", 128), ("reduced", 64), ("per layer", [128, 48, 64, 96])]


def check_parity(run: Run) -> Iterator[list[str]]:
    """float32: greedy text and logits. bfloat16: logits, no further from float32 than 1.5 times stock's own."""
    size = parity_size(run)
    for family in FAMILIES:
        for name, d_k in parity_widths(run):
            run.need(8)
            label = f"{family} {name}"
            checkpoint = make_checkpoint(
                run.folder / label.replace(" ", "-"), config(family, d_k=d_k, **size)
            )
            with untuned():
                result = parity(run, checkpoint, ours=not run.cuda or isinstance(d_k, list))
            run.report.setdefault("parity", {})[label] = result
            name, good, details = parity_row(run, label, result)
            yield [name, good, f"{details}; against {result['against']}"]


def parity_row(run: Run, label: str, result: dict[str, Any]) -> list[str]:
    """What a comparison with a stock model found, and whether it is good enough."""
    good = (
        result["fp32_text"].startswith("equal")
        and result["fp32_logits"] < FP32_TOLERANCE
        and result["bf16_logits"] < BF16_FACTOR * result["bf16_logits_stock"]
    )
    details = (
        f"fp32 text {result['fp32_text']}, logits {result['fp32_logits']:.1e}; bf16 logits "
        f"{result['bf16_logits']:.1e} (theirs {result['bf16_logits_stock']:.1e})"
    )
    return [label, run.check(good, f"parity {label}"), details]


@torch.inference_mode()
def parity(run: Run, checkpoint: Checkpoint, *, ours: bool) -> dict[str, Any]:
    torch.manual_seed(1)
    batch, length, new = (2, 9, 4) if run.small else (4, 150, 32)
    prompts = torch.randint(0, checkpoint.spec.vocab_size, (batch, length), device=run.device)
    result: dict[str, Any] = {}
    exact = Stock(run, checkpoint, torch.float32, ours=ours)
    result["against"] = exact.name
    runtime = run.runtime(checkpoint.load(device=run.device))
    tokens, logits = generate(run, runtime, prompts, new, torch.float32)
    result["fp32_text"] = same_text(tokens, logits, exact.generate(prompts, new))
    text = torch.cat([prompts, tokens[:, :-1]], 1)
    expected = exact.logits(text)[:, length - 1 :]
    result["fp32_logits"] = error(logits, expected)

    stock = Stock(run, checkpoint, torch.bfloat16, ours=ours)
    result["bf16_logits_stock"] = error(stock.logits(text)[:, length - 1 :], expected)
    runtime = run.runtime(checkpoint.load(dtype=torch.bfloat16, device=run.device))
    # Prefill of the prompt by chunks, then the same tokens as above by decode steps.
    pool = StatePool(checkpoint.spec, batch, device=run.device, types=StateTypes(inputs=torch.bfloat16))
    slots = torch.arange(batch, device=run.device)
    steps = [prefill(runtime, prompts, pool, slots)]
    steps += [runtime.logits(runtime.decode(tokens[:, i].contiguous(), pool, slots)) for i in range(new - 1)]
    result["bf16_logits"] = error(torch.stack(steps, 1).float(), expected)
    return result


@torch.inference_mode()
def time_model(run: Run, model: Model, batch: int, prompt: int, new_tokens: int) -> dict[str, float]:
    """TTFT of a batch that arrives at once, then its decode steps with greedy sampling on the device."""
    runtime = run.runtime(model)
    pool = StatePool(model.spec, batch, device=run.device, types=StateTypes(inputs=torch.bfloat16))
    slots = torch.randperm(batch, device=run.device)
    prompts = torch.randint(0, model.spec.vocab_size, (batch, prompt), device=run.device)
    graphs = DecodeGraphs(runtime, pool, [batch], recorder(run))
    prefill(runtime, prompts[:1], pool, slots[:1])
    first: list[Tensor] = []
    ttft = seconds(run, lambda: first.append(prefill(runtime, prompts, pool, slots).argmax(-1)))

    def decode() -> None:
        ids = first[0]
        for _ in range(new_tokens - 1):
            ids = runtime.logits(graphs(ids, slots)).argmax(-1)

    decode()
    taken = min(seconds(run, decode) for _ in range(2)) / (new_tokens - 1)
    weights = sum(p.nbytes for p in model.parameters()) - model.embeddings.weight.nbytes
    moved = weights + 2 * batch * pool.bytes_per_slot
    return {
        "ttft_s": ttft,
        "step_ms": taken * 1e3,
        "tokens_per_second": batch / taken,
        "bytes_per_second": moved / taken,
        "state_bytes": pool.bytes_per_slot,
        "weight_bytes": weights,
        "peak_bytes": float(torch.cuda.max_memory_allocated()) if run.cuda else 0.0,
    }


def lengths(run: Run) -> tuple[int, int]:
    """Prompt and new tokens."""
    return (9, 3) if run.small else (512, 128)


def batches(run: Run) -> tuple[int, ...]:
    return (2,) if run.small else (1, 32, 128, 512)


def check_decode(run: Run) -> Iterator[list[str]]:
    results = run.report.setdefault("decode", {})
    rate = copy_rate(run)
    for family in FAMILIES:
        for d_k in (128, 64):
            free(run)
            run.need(12)
            settings = large_config(run, family, d_k)
            model = random_model(family_of(settings).spec(settings), run, torch.bfloat16)
            for batch in batches(run):
                run.need(6)
                figures = time_model(run, model, batch, *lengths(run))
                free(run)
                figures["over_bound"] = rate / figures["bytes_per_second"]
                results[f"{family} d_k {d_k} B {batch}"] = figures
                details = [
                    f"{figures['tokens_per_second']:.0f} tok/s",
                    f"step {figures['step_ms']:.2f} ms ({figures['over_bound']:.2f} x bound)",
                    f"TTFT {figures['ttft_s'] * 1e3:.0f} ms",
                    f"state {figures['state_bytes'] / 1e6:.1f} MB",
                    f"peak {figures['peak_bytes'] / 1e9:.1f} GB",
                ]
                dense = results.get(f"{family} d_k 128 B {batch}")
                if d_k == 64 and dense:
                    figures["over_dense"] = figures["tokens_per_second"] / dense["tokens_per_second"]
                    details.append(f"{figures['over_dense']:.2f} x dense")
                yield [f"{family} d_k {d_k} B {batch}", "", ", ".join(details)]
            del model


@torch.inference_mode()
def time_peer(run: Run, model: Any, batch: int, prompt: int, new_tokens: int) -> dict[str, float]:
    """The time of one token is taken off that of all of them, so that prefill does not count."""
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=run.device)
    stock_generate(model, ids, 4)
    one = min(seconds(run, lambda: stock_generate(model, ids, 1)) for _ in range(2))
    taken = (seconds(run, lambda: stock_generate(model, ids, new_tokens)) - one) / (new_tokens - 1)
    return {
        "ttft_s": one,
        "step_ms": taken * 1e3,
        "tokens_per_second": batch / taken,
        "peak_bytes": float(torch.cuda.max_memory_allocated()),
    }


def check_peer(run: Run) -> Iterator[list[str]]:
    """fla and transformers' generate, dense."""
    if not run.cuda:
        raise SkippedError("skipped: fla's kernels need a GPU")
    results = run.report.setdefault("peer", {})
    with tuned_by_fla(run):
        yield from time_peers(run, results)
    free(run)


def time_peers(run: Run, results: dict[str, Any]) -> Iterator[list[str]]:
    import fla.models  # noqa: F401 (registers its models with transformers)
    from transformers import AutoConfig, AutoModelForCausalLM

    for family in FAMILIES:
        free(run)
        run.need(20)
        settings = AutoConfig.for_model(**large_config(run, family, 128))
        with torch.device(run.device):
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval()
        for batch in batches(run):
            run.need(15)
            try:
                figures = time_peer(run, model, batch, *lengths(run))
            except torch.OutOfMemoryError:
                yield [f"peer {family} B {batch}", "", "out of memory"]
                continue
            finally:
                free(run)
            results[f"{family} B {batch}"] = figures
            details = [
                f"{figures['tokens_per_second']:.0f} tok/s",
                f"step {figures['step_ms']:.2f} ms",
                f"TTFT {figures['ttft_s'] * 1e3:.0f} ms",
                f"peak {figures['peak_bytes'] / 1e9:.1f} GB",
            ]
            ours = run.report.get("decode", {}).get(f"{family} d_k 128 B {batch}")
            if ours:
                figures["ours_over_peer"] = ours["tokens_per_second"] / figures["tokens_per_second"]
                details.append(f"ours {figures['ours_over_peer']:.1f} x")
            yield [f"peer {family} B {batch}", "", ", ".join(details)]
        del model


def check_capacity(run: Run) -> Iterator[list[str]]:
    """The most requests that fit beside the weights and a graph; the last slots are really decoded."""
    if not run.cuda:
        raise SkippedError("skipped: a CPU's memory is not the question")
    for family, d_k in itertools.product(FAMILIES, (128, 64)):
        run.need(8)
        free(run)
        spec = family_of(large_config(run, family, d_k)).spec(large_config(run, family, d_k))
        runtime = run.runtime(random_model(spec, run, torch.bfloat16))
        for state_dtype in run.state_dtypes:
            run.need(3)
            free(run)
            name = f"capacity {family} d_k {d_k} state {state_dtype}"
            figures, finite = fill(run, runtime, StateTypes.named(state_dtype, torch.bfloat16))
            run.report.setdefault("capacity", {})[name] = figures | {"state_dtype": state_dtype}
            told = f"{figures['requests']} requests of {figures['state_bytes'] / 1e6:.2f} MB"
            goal = CAPACITY_GOALS.get((state_dtype, d_k))
            if goal:
                told += f", goal {goal}{'' if figures['requests'] > goal else ' MISSED'}"
            yield [name, run.check(finite, name), told]
        del runtime
    free(run)


@torch.inference_mode()
def fill(run: Run, runtime: Runtime, types: StateTypes) -> tuple[dict[str, int], bool]:
    """As many states as there is memory for, and whether the last of them decode to something finite."""
    reserve = 2 * 2**30
    batch = batches(run)[-1]
    spec = runtime.model.spec
    available = torch.cuda.mem_get_info()[0] - reserve
    slots = available // spec.state_bytes(0, types)
    pool = StatePool(spec, slots, device=run.device, types=types)
    graphs = DecodeGraphs(runtime, pool, [batch], recorder(run))
    at = torch.arange(slots - batch, slots, device=run.device)
    ids = torch.randint(0, spec.vocab_size, (batch,), device=run.device)
    for _ in range(2):
        logits = runtime.logits(graphs(ids, at))
    figures = {"requests": slots, "state_bytes": pool.bytes_per_slot, "available_bytes": available}
    return figures, bool(torch.isfinite(logits).all())
