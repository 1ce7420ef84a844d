"""Random checkpoints of hybrid models in the layouts that are on the hub, small enough for any test.

Names, shapes and configs are written down here from the public checkpoints, and no code of `modeling` or transformers
is used: a layout that `modeling` has misread can't be misread here in the same way.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from checkpoints import byte_tokenizer
from safetensors.torch import save_file
from torch import Tensor

LINEAR, FULL = "linear_attention", "full_attention"
PATTERN = (LINEAR, LINEAR, LINEAR, FULL) * 2
"""The pattern of all public models, twice."""
IRREGULAR = (FULL, LINEAR, LINEAR, FULL, LINEAR)
"""A pattern that no interval gives."""

BYTES = 257
"""Tokens of the byte tokenizer: the end of text, and 256 bytes."""
IMAGE, VIDEO, VISION_START, VISION_END, CHAT_END = range(BYTES, BYTES + 5)
"""Special tokens of the vision-language layouts, behind those of the byte tokenizer."""
VOCABULARY = 272
"""Rows of the embeddings, of which the last are never used, as in the public checkpoints."""

CONV_KERNEL = 4
HEADS, HEAD_DIM = 4, 16
"""Query heads of a full-attention layer, and their width."""
MOE_SIZE, SHARED_SIZE = 24, 16
EXPERTS, TOP_EXPERTS = 6, 2


@dataclass(frozen=True)
class Case:
    """A layout, and the shapes of one checkpoint in it."""

    model_type: Literal[
        "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid"
    ]
    k_heads: int
    v_heads: int
    d_k: int
    d_v: int
    tied: bool = False
    fused: bool = False
    """The experts of a layer are two tensors, and not three for each expert."""
    layer_types: tuple[str, ...] = PATTERN
    hidden: int = 48
    intermediate: int = 64
    kv_heads: int = 2
    rope_theta: float | None = 10000.0
    partial_rotary: float = 0.25
    mlp_only_layers: tuple[int, ...] = ()
    """Layers without experts, of Qwen3-Next."""
    sparse_step: int = 1
    """Of Qwen3-Next: 2 for experts in every second layer only."""
    norm_topk: bool = True
    """Of Qwen3-Next: the weights of a token's experts add up to 1."""
    neg_eigval: bool = True
    """Of OLMo: beta goes up to 2."""
    old_norm_names: bool = False
    """Of OLMo: the norms of linear layers are named as transformers writes them."""
    dtype: torch.dtype = torch.float32

    @property
    def vision(self) -> bool:
        """Whether it is a vision-language model, with its text model's config and tensors inside."""
        return self.model_type in ("qwen3_5", "qwen3_5_moe")

    @property
    def moe(self) -> bool:
        return "moe" in self.model_type or self.model_type == "qwen3_next"

    @property
    def prefix(self) -> str:
        """What precedes the names of the text model's tensors."""
        return "model.language_model." if self.vision else "model."

    @property
    def linear_layers(self) -> list[int]:
        return [i for i, kind in enumerate(self.layer_types) if kind == LINEAR]

    def has_experts(self, layer: int) -> bool:
        return self.moe and layer not in self.mlp_only_layers and (layer + 1) % self.sparse_step == 0


CASES: dict[str, Case] = {
    "vl-dense-tied": Case("qwen3_5", 2, 2, 16, 16, tied=True),
    "vl-dense-three-value-heads": Case("qwen3_5", 2, 6, 8, 16, partial_rotary=0.5),
    "vl-dense-odd-irregular": Case("qwen3_5", 3, 6, 7, 12, layer_types=IRREGULAR, tied=True),
    "vl-dense-bf16": Case("qwen3_5", 2, 4, 8, 16, dtype=torch.bfloat16),
    "text-dense-tied": Case("qwen3_5_text", 2, 4, 8, 16, tied=True),
    "text-dense-odd-irregular": Case("qwen3_5_text", 2, 2, 9, 16, layer_types=IRREGULAR),
    "vl-moe-fused": Case("qwen3_5_moe", 2, 4, 16, 16, fused=True),
    "vl-moe-fused-tied-odd": Case("qwen3_5_moe", 2, 6, 11, 16, fused=True, tied=True),
    "vl-moe-each": Case("qwen3_5_moe", 2, 2, 12, 24),
    "text-moe-fused": Case("qwen3_5_moe_text", 2, 2, 8, 16, fused=True),
    "text-moe-each-tied": Case("qwen3_5_moe_text", 2, 6, 16, 16, tied=True),
    "next": Case("qwen3_next", 2, 4, 16, 16),
    "next-some-dense": Case("qwen3_next", 2, 6, 8, 16, mlp_only_layers=(0, 3), sparse_step=2),
    "next-odd-tied": Case("qwen3_next", 3, 3, 7, 16, tied=True, norm_topk=False, layer_types=IRREGULAR),
    "olmo": Case("olmo_hybrid", 4, 4, 12, 24, hidden=64, kv_heads=4, rope_theta=None),
    "olmo-old-names-rope": Case(
        "olmo_hybrid", 4, 4, 16, 16, hidden=64, kv_heads=2, old_norm_names=True, neg_eigval=False
    ),
    "olmo-odd-irregular": Case(
        "olmo_hybrid", 2, 6, 9, 16, hidden=64, kv_heads=1, rope_theta=None, tied=True, layer_types=IRREGULAR
    ),
}


def write_hybrid(path: Path, case: Case, seed: int = 0) -> Path:
    """A checkpoint directory: config.json, generation_config.json, weights and a byte-level tokenizer."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config_of(case), indent=2))
    # Chat models end a turn by a token that config.json does not name.
    generation = {"eos_token_id": [CHAT_END, 0] if case.vision else [0], "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(generation))
    save_file(_Tensors(case, seed).all, path / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return path


def config_of(case: Case) -> dict[str, Any]:
    """The content of config.json."""
    if case.model_type == "olmo_hybrid":
        return _olmo_config(case)
    if case.model_type == "qwen3_next":
        return _next_config(case)
    text = _qwen_config(case)
    if not case.vision:
        return {"architectures": [f"{_class_name(case)}ForCausalLM"], **text}
    return {
        "architectures": [f"{_class_name(case)}ForConditionalGeneration"],
        "image_token_id": IMAGE,
        "model_type": case.model_type,
        "text_config": text,
        "tie_word_embeddings": case.tied,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": VIDEO,
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": 1,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 16,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 24,
            "model_type": case.model_type,
            "num_heads": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": case.hidden,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": VISION_END,
        "vision_start_token_id": VISION_START,
    }


def _class_name(case: Case) -> str:
    return "Qwen3_5Moe" if case.moe else "Qwen3_5"


def _common(case: Case) -> dict[str, Any]:
    """What all families call by the same keys."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": str(case.dtype).removeprefix("torch."),
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": case.hidden,
        "initializer_range": 0.02,
        "layer_types": list(case.layer_types),
        "linear_conv_kernel_dim": CONV_KERNEL,
        "linear_key_head_dim": case.d_k,
        "linear_num_key_heads": case.k_heads,
        "linear_num_value_heads": case.v_heads,
        "linear_value_head_dim": case.d_v,
        "max_position_embeddings": 4096,
        "num_attention_heads": HEADS,
        "num_hidden_layers": len(case.layer_types),
        "num_key_value_heads": case.kv_heads,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": case.tied,
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }


def _experts_config(case: Case) -> dict[str, Any]:
    return {
        "moe_intermediate_size": MOE_SIZE,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_EXPERTS,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": SHARED_SIZE,
    }


def _interval(case: Case) -> dict[str, Any]:
    return {"full_attention_interval": 4} if case.layer_types == PATTERN else {}


def _qwen_config(case: Case) -> dict[str, Any]:
    """Of Qwen3.5's text model."""
    rotary_pairs = int(HEAD_DIM * case.partial_rotary) // 2
    sections = [(rotary_pairs + 2 - i) // 3 for i in range(3)]
    return {
        **_common(case),
        **_interval(case),
        **(_experts_config(case) if case.moe else {"intermediate_size": case.intermediate}),
        "attn_output_gate": True,
        "head_dim": HEAD_DIM,
        "mamba_ssm_dtype": "float32",
        "mlp_only_layers": [],
        "model_type": f"{case.model_type.removesuffix('_text')}_text",
        "mtp_num_hidden_layers": 1 if case.vision else 0,
        "mtp_use_dedicated_embeddings": False,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": sections,
            "partial_rotary_factor": case.partial_rotary,
            "rope_theta": case.rope_theta,
            "rope_type": "default",
        },
    }


def _next_config(case: Case) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        **_common(case),
        **_interval(case),
        **_experts_config(case),
        "bos_token_id": 0,
        "decoder_sparse_step": case.sparse_step,
        "head_dim": HEAD_DIM,
        "intermediate_size": case.intermediate,
        "mlp_only_layers": list(case.mlp_only_layers),
        "model_type": case.model_type,
        "norm_topk_prob": case.norm_topk,
        "partial_rotary_factor": case.partial_rotary,
        "rope_scaling": None,
        "rope_theta": case.rope_theta,
        "use_sliding_window": False,
    }


def _olmo_config(case: Case) -> dict[str, Any]:
    rope = {"rope_theta": case.rope_theta} | ({} if case.rope_theta is None else {"rope_type": "default"})
    return {
        "architectures": ["OlmoHybridForCausalLM"],
        **_common(case),
        "bos_token_id": None,
        "intermediate_size": case.intermediate,
        "linear_allow_neg_eigval": case.neg_eigval,
        "model_type": case.model_type,
        "pad_token_id": 0,
        "rope_parameters": rope,
    }


class _Tensors:
    """Makes every tensor of a checkpoint, drawn in a fixed order.

    Matrices are scaled by the square root of their inputs, so that activations neither vanish nor explode. All norm
    weights are drawn: one that is read as another kind of norm, or not at all, changes the result.
    """

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.all: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._language_model()
        if case.model_type in ("qwen3_5", "qwen3_5_moe", "qwen3_next"):
            self._next_token_head()
        if case.vision:
            self._vision_tower()

    def _add(self, name: str, *shape: int, mean: float = 0.0, std: float, wide: bool = False) -> None:
        drawn = torch.randn(shape, generator=self._generator) * std + mean
        self.all[name] = drawn if wide else drawn.to(self.case.dtype)

    def _matrix(self, name: str, rows: int, columns: int) -> None:
        self._add(f"{name}.weight", rows, columns, std=columns**-0.5)

    def _norm(self, name: str, size: int, *, centred: bool) -> None:
        """`centred`: what is stored is the weight less one."""
        self._add(f"{name}.weight", size, mean=0.0 if centred else 1.0, std=0.3)

    def _filters(self, name: str, channels: int) -> None:
        self._add(f"{name}.weight", channels, 1, CONV_KERNEL, std=0.5)

    def _decay(self, p: str) -> None:
        """States are remembered for a few to a few tens of tokens."""
        self._add(f"{p}A_log", self.case.v_heads, mean=-1.5, std=0.7, wide=True)
        self._add(f"{p}dt_bias", self.case.v_heads, std=0.7, wide=True)

    def _language_model(self) -> None:
        case = self.case
        self._matrix(f"{case.prefix}embed_tokens", VOCABULARY, case.hidden)
        for i, kind in enumerate(case.layer_types):
            p = f"{case.prefix}layers.{i}."
            if case.model_type == "olmo_hybrid":
                self._olmo_layer(p, kind)
            else:
                self._qwen_layer(p, kind, experts=case.has_experts(i))
        self._norm(f"{case.prefix}norm", case.hidden, centred=case.model_type != "olmo_hybrid")
        if not case.tied:
            self._matrix("lm_head", VOCABULARY, case.hidden)

    def _qwen_layer(self, p: str, kind: str, *, experts: bool) -> None:
        case = self.case
        self._norm(f"{p}input_layernorm", case.hidden, centred=True)
        self._norm(f"{p}post_attention_layernorm", case.hidden, centred=True)
        if kind == LINEAR:
            self._qwen_linear(f"{p}linear_attn.")
        else:
            a = f"{p}self_attn."
            self._matrix(f"{a}q_proj", 2 * HEADS * HEAD_DIM, case.hidden)
            self._matrix(f"{a}k_proj", case.kv_heads * HEAD_DIM, case.hidden)
            self._matrix(f"{a}v_proj", case.kv_heads * HEAD_DIM, case.hidden)
            self._matrix(f"{a}o_proj", case.hidden, HEADS * HEAD_DIM)
            self._norm(f"{a}q_norm", HEAD_DIM, centred=True)
            self._norm(f"{a}k_norm", HEAD_DIM, centred=True)
        if experts:
            self._experts(f"{p}mlp.")
        else:
            self._mlp(f"{p}mlp.", case.intermediate)

    def _qwen_linear(self, p: str) -> None:
        case = self.case
        keys, values = case.k_heads * case.d_k, case.v_heads * case.d_v
        if case.model_type == "qwen3_next":
            # Both by key head: [q | k | v | z] of the first, then of the second; the same for [b | a].
            self._matrix(f"{p}in_proj_qkvz", 2 * keys + 2 * values, case.hidden)
            self._matrix(f"{p}in_proj_ba", 2 * case.v_heads, case.hidden)
        else:
            self._matrix(f"{p}in_proj_qkv", 2 * keys + values, case.hidden)
            self._matrix(f"{p}in_proj_z", values, case.hidden)
            self._matrix(f"{p}in_proj_b", case.v_heads, case.hidden)
            self._matrix(f"{p}in_proj_a", case.v_heads, case.hidden)
        self._filters(f"{p}conv1d", 2 * keys + values)
        self._decay(p)
        self._norm(f"{p}norm", case.d_v, centred=False)
        self._matrix(f"{p}out_proj", case.hidden, values)

    def _mlp(self, p: str, size: int) -> None:
        self._matrix(f"{p}gate_proj", size, self.case.hidden)
        self._matrix(f"{p}up_proj", size, self.case.hidden)
        self._matrix(f"{p}down_proj", self.case.hidden, size)

    def _experts(self, p: str) -> None:
        hidden = self.case.hidden
        # Larger than other matrices, so that the router is sure of its choice.
        self._add(f"{p}gate.weight", EXPERTS, hidden, std=2 * hidden**-0.5)
        if self.case.fused:
            self._add(f"{p}experts.gate_up_proj", EXPERTS, 2 * MOE_SIZE, hidden, std=hidden**-0.5)
            self._add(f"{p}experts.down_proj", EXPERTS, hidden, MOE_SIZE, std=MOE_SIZE**-0.5)
        else:
            for expert in range(EXPERTS):
                self._mlp(f"{p}experts.{expert}.", MOE_SIZE)
        self._mlp(f"{p}shared_expert.", SHARED_SIZE)
        self._matrix(f"{p}shared_expert_gate", 1, hidden)

    def _olmo_layer(self, p: str, kind: str) -> None:
        """Linear layers have their norms before the mixer and the feed-forward, full-attention layers behind them."""
        case = self.case
        if kind == LINEAR:
            a = f"{p}linear_attn."
            keys, values = case.k_heads * case.d_k, case.v_heads * case.d_v
            for name, rows in (("q", keys), ("k", keys), ("v", values)):
                self._matrix(f"{a}{name}_proj", rows, case.hidden)
                self._filters(f"{a}{name}_conv1d", rows)
            self._matrix(f"{a}g_proj", values, case.hidden)
            self._matrix(f"{a}a_proj", case.v_heads, case.hidden)
            self._matrix(f"{a}b_proj", case.v_heads, case.hidden)
            self._decay(a)
            self._norm(f"{a}o_norm", case.d_v, centred=False)
            self._matrix(f"{a}o_proj", case.hidden, values)
            norms = ("input_layernorm", "post_attention_layernorm")
            if case.old_norm_names:
                norms = ("attention_layer_norm", "feedforward_layer_norm")
        else:
            a = f"{p}self_attn."
            queries = case.hidden
            keys = case.kv_heads * case.hidden // HEADS
            self._matrix(f"{a}q_proj", queries, case.hidden)
            self._matrix(f"{a}k_proj", keys, case.hidden)
            self._matrix(f"{a}v_proj", keys, case.hidden)
            self._matrix(f"{a}o_proj", case.hidden, queries)
            self._norm(f"{a}q_norm", queries, centred=False)
            self._norm(f"{a}k_norm", keys, centred=False)
            norms = ("post_attention_layernorm", "post_feedforward_layernorm")
        for norm in norms:
            self._norm(f"{p}{norm}", case.hidden, centred=False)
        self._mlp(f"{p}mlp.", case.intermediate)

    def _next_token_head(self) -> None:
        """The multi-token prediction head: one full-attention layer that only speculative decoding uses."""
        hidden = self.case.hidden
        self._matrix("mtp.fc", hidden, 2 * hidden)
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            self._norm(f"mtp.{name}", hidden, centred=True)
        self._qwen_layer("mtp.layers.0.", FULL, experts=self.case.moe)

    def _vision_tower(self) -> None:
        """Of the shapes in `vision_config`."""
        p, b = "model.visual.", "model.visual.blocks.0."
        self._add(f"{p}patch_embed.proj.weight", 16, 3, 2, 4, 4, std=0.1)
        self._add(f"{p}patch_embed.proj.bias", 16, std=0.1)
        self._add(f"{p}pos_embed.weight", 16, 16, std=0.1)
        for name, rows, columns in (
            (f"{b}attn.qkv", 48, 16),
            (f"{b}attn.proj", 16, 16),
            (f"{b}mlp.linear_fc1", 24, 16),
            (f"{b}mlp.linear_fc2", 16, 24),
            (f"{p}merger.linear_fc1", 64, 64),
            (f"{p}merger.linear_fc2", self.case.hidden, 64),
        ):
            self._matrix(name, rows, columns)
            self._add(f"{name}.bias", rows, std=0.1)
        for name in (f"{b}norm1", f"{b}norm2", f"{p}merger.norm"):
            self._norm(name, 16, centred=False)
            self._add(f"{name}.bias", 16, std=0.1)
