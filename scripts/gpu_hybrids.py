"""Whole hybrid models, small ones of every family, against stock transformers."""

import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_common import Run, error, recorder, untuned, write_checkpoint
from gpu_models import free, parity_row, same_text
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.hybrid_models import COMMON, DENSE, EXPERTS, random_model
from modeling.checkpoint import Checkpoint
from modeling.runtime import Runtime
from modeling.runtime.gpu.graphs import DecodeGraphs
from modeling.spec import TOKEN_BLOCK, StateTypes
from modeling.state import StatePool

Config = dict[str, Any]
LAYER_TYPES = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
NEW_TOKENS = 24
RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
"""What transformers calls the gated delta rule, by whatever library it is computed."""


def small_config(run: Run, family: str, d_k: int) -> Config:
    """config.json of a model with heads as the public models of the family have, and few layers. `d_k` is that of the
    real size."""
    tiny = run.small
    layers = LAYER_TYPES[1:] if tiny else LAYER_TYPES
    shape: Config = {
        "hidden_size": 64 if tiny else 512,
        "layer_types": layers,
        "num_hidden_layers": len(layers),
        "linear_key_head_dim": d_k // 8 if tiny else d_k,
        "linear_num_key_heads": 2 if tiny else 4,
        "linear_num_value_heads": 4 if tiny else 8,
        "linear_value_head_dim": 16 if tiny else 128,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4 if tiny else 8,
        "num_key_value_heads": 2,
        "vocab_size": 257 if tiny else 2000,
        "tie_word_embeddings": family == "qwen3_5_text",
    }
    experts: Config = {
        "moe_intermediate_size": 16 if tiny else 128,
        "num_experts": 4 if tiny else 32,
        "num_experts_per_tok": 2 if tiny else 8,
        "shared_expert_intermediate_size": 16 if tiny else 128,
    }
    if family == "olmo_hybrid":
        return {
            **{key: value for key, value in COMMON.items() if not key.startswith(("attn", "full", "mamba"))},
            **shape,
            "architectures": ["OlmoHybridForCausalLM"],
            "intermediate_size": 96 if tiny else 1024,
            "linear_allow_neg_eigval": True,
            "linear_num_value_heads": shape["linear_num_key_heads"],
            "linear_value_head_dim": 16 if tiny else 192,
            "model_type": family,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "pad_token_id": 0,
            "rope_parameters": {"rope_theta": None},
        }
    shape["head_dim"] = 32 if tiny else 256
    rope = COMMON["rope_parameters"] | ({"mrope_section": [2, 1, 1]} if tiny else {})
    if family == "qwen3_next":
        return {
            **COMMON,
            **shape,
            **experts,
            "architectures": ["Qwen3NextForCausalLM"],
            "decoder_sparse_step": 1,
            "intermediate_size": 96,
            "mlp_only_layers": [],
            "model_type": family,
            "norm_topk_prob": True,
            "partial_rotary_factor": rope["partial_rotary_factor"],
            "rope_parameters": None,
            "rope_theta": rope["rope_theta"],
        }
    if family == "qwen3_5_moe_text":
        return {**COMMON, **EXPERTS, **shape, **experts, "rope_parameters": rope}
    return {**COMMON, **DENSE, **shape, "intermediate_size": 96 if tiny else 1024, "rope_parameters": rope}


def parity_cases(run: Run) -> Iterator[tuple[str, int]]:
    """Families and d_k."""
    if run.small:
        yield from (("qwen3_5_moe_text", 64), ("olmo_hybrid", 96))
        return
    for family in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"):
        yield from ((family, d_k) for d_k in (128, 64))
    yield from (("olmo_hybrid", d_k) for d_k in (96, 48))


def small_checkpoint(run: Run, family: str, d_k: int) -> Checkpoint:
    """A checkpoint in the layout that its publishers use; written once."""
    path = run.folder / f"{family}-{d_k}"
    if not path.exists():
        config = small_config(run, family, d_k)
        write_checkpoint(path, config, random_model(config))
    return Checkpoint(path)


@contextmanager
def exact_rules(module: Any) -> Iterator[None]:
    """Within, the modelling code of transformers computes the rule by its own torch operations: fla's chunk kernels
    multiply float32 in tf32."""
    rules = {name: inspect.unwrap(getattr(module, name)) for name in RULES}
    with patch.multiple(module, **rules):
        yield


def hide_fla(run: Run) -> None:
    """On a CPU transformers would launch fla's kernels all the same."""
    if not run.cuda:
        for name in ("fla", "causal_conv1d"):
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]


class StockHybrid:
    """The stock transformers model of a checkpoint; in float32 by torch operations, else as transformers chooses."""

    def __init__(self, run: Run, path: Path, dtype: torch.dtype) -> None:
        hide_fla(run)
        from transformers import AutoModelForCausalLM

        self.exact = dtype == torch.float32
        how = {"attn_implementation": "eager"} if self.exact else {}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **how)
        if "num_experts" in json.loads((path / "config.json").read_text()):
            model.set_experts_implementation("eager")
        self.model = model.to(run.device).eval()
        self.module = sys.modules[type(model).__module__]

    @torch.inference_mode()
    def logits(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """Logits `[tokens, vocab]` of each text. What pads the shorter ones comes behind them, where causal models do
        not look."""
        ids = pad_sequence(list(texts), batch_first=True)
        if not self.exact:
            rows = self.model(ids, use_cache=False).logits
        else:
            with exact_rules(self.module):
                rows = self.model(ids, use_cache=False).logits
        return [row[: len(text)].float() for row, text in zip(rows, texts, strict=True)]


@torch.inference_mode()
def feed(runtime: Runtime, prompts: Sequence[Tensor], pool: StatePool, slots: Tensor, cut: int) -> Tensor:
    """Ragged prompts into the pool, `cut` tokens of each at most in one step, so that the later steps go on from what
    the earlier ones left; the last tokens' logits `[B, vocab]`."""
    logits: dict[int, Tensor] = {}
    for start in range(0, max(map(len, prompts)), cut):
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) > start]
        pieces = [prompts[i][start : start + cut] for i in rows]
        offsets = [sum(map(len, pieces[:n])) for n in range(len(pieces) + 1)]
        hidden = runtime.prefill(torch.cat(pieces), offsets, pool, slots[rows])
        last = runtime.logits(hidden[torch.tensor(offsets[1:], device=hidden.device) - 1])
        logits |= dict(zip(rows, last, strict=True))
    return torch.stack([logits[i] for i in range(len(prompts))])


@torch.inference_mode()
def generate_ragged(
    run: Run,
    runtime: Runtime,
    prompts: Sequence[Tensor],
    new_tokens: int,
    dtype: torch.dtype,
    forced: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy tokens `[B, new_tokens]`, or the `forced` ones, and the logits that they came from, decoding by graphs
    padded to one row more."""
    batch, most = len(prompts), max(map(len, prompts)) + new_tokens
    types = StateTypes(inputs=dtype)
    pool = StatePool.with_room(runtime.model.spec, batch, most, device=run.device, types=types)
    slots = torch.arange(batch, device=run.device).flip(0)
    graphs = DecodeGraphs(runtime, pool, [batch + 1], recorder(run))
    logits = [feed(runtime, prompts, pool, slots, 4 if run.small else TOKEN_BLOCK)]
    tokens: list[Tensor] = []
    for i in range(new_tokens):
        tokens.append(logits[-1].argmax(-1) if forced is None else forced[:, i].contiguous())
        if i < new_tokens - 1:
            logits.append(runtime.logits(graphs(tokens[-1], slots)))
    return torch.stack(tokens, 1), torch.stack(logits, 1).float()


def ragged_prompts(run: Run, vocab: int) -> list[Tensor]:
    """Several pieces long, exactly one, a token longer, and shorter."""
    torch.manual_seed(1)
    lengths = (7, 2) if run.small else (150, 64, 300, 7, 65)
    return [torch.randint(0, vocab, (n,), device=run.device) for n in lengths]


@torch.inference_mode()
def compare_hybrid(run: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    """Greedy text is stock's if each of its tokens is what stock finds best behind the tokens before it."""
    prompts = ragged_prompts(run, checkpoint.spec.vocab_size)
    new = 3 if run.small else NEW_TOKENS
    runtime = run.runtime(checkpoint.load(device=run.device))
    tokens, logits = generate_ragged(run, runtime, prompts, new, torch.float32)
    texts = [torch.cat([p, t[:-1]]) for p, t in zip(prompts, tokens, strict=True)]

    def behind(rows: list[Tensor]) -> Tensor:
        """The logits of each text's new tokens."""
        return torch.stack([row[len(p) - 1 :] for row, p in zip(rows, prompts, strict=True)])

    expected = behind(StockHybrid(run, checkpoint.path, torch.float32).logits(texts))
    stock = behind(StockHybrid(run, checkpoint.path, torch.bfloat16).logits(texts))
    runtime = run.runtime(checkpoint.load(dtype=torch.bfloat16, device=run.device))
    _, narrow = generate_ragged(run, runtime, prompts, new, torch.bfloat16, tokens)
    return {
        "fp32_text": same_text(tokens, logits, expected.argmax(-1)),
        "fp32_logits": error(logits, expected),
        "bf16_logits": error(narrow, expected),
        "bf16_logits_stock": error(stock, expected),
    }


def check_hybrids(run: Run) -> Iterator[list[str]]:
    """float32: greedy text and logits. bfloat16: logits, no further from float32 than 1.5 times stock's own."""
    for family, d_k in parity_cases(run):
        run.need(8)
        label = f"hybrid {family} d_k {d_k}"
        with untuned():
            result = compare_hybrid(run, small_checkpoint(run, family, d_k))
        free(run)
        run.report.setdefault("hybrids", {})[label] = result
        yield parity_row(run, label, result)
