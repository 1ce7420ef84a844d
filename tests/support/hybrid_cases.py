"""Which hybrid checkpoints the tests make: a set that covers the layouts and shapes, by readable names."""

from dataclasses import dataclass
from typing import Literal

import torch

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
    resaved: bool = False
    """The language model of a vision-language checkpoint as `save_pretrained` of transformers writes it: by itself, but
    with the names that its tensors had inside."""
    layer_types: tuple[str, ...] = PATTERN
    hidden: int = 48
    intermediate: int = 64
    kv_heads: int = 2
    rope_theta: float | None = 10000.0
    partial_rotary: float = 0.25
    mlp_only_layers: tuple[int, ...] = ()
    """Layers without experts, of Qwen3-Next."""
    sparse_step: int = 1
    """For Qwen3-Next: 2 for experts in every second layer only."""
    neg_eigval: bool = True
    """For OLMo: beta goes up to 2."""
    old_norm_names: bool = False
    """For OLMo: the norms of linear layers are named as transformers writes them."""
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
        return "model.language_model." if self.vision or self.resaved else "model."

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
    "resaved-moe-each": Case("qwen3_5_moe_text", 2, 4, 8, 16, resaved=True),
    "next": Case("qwen3_next", 2, 4, 16, 16),
    "next-some-dense": Case("qwen3_next", 2, 6, 8, 16, mlp_only_layers=(0, 3), sparse_step=2),
    "next-odd-tied": Case("qwen3_next", 3, 3, 7, 16, tied=True, layer_types=IRREGULAR),
    "olmo": Case("olmo_hybrid", 4, 4, 12, 24, hidden=64, kv_heads=4, rope_theta=None),
    "olmo-old-names-rope": Case(
        "olmo_hybrid", 4, 4, 16, 16, hidden=64, kv_heads=2, old_norm_names=True, neg_eigval=False
    ),
    "olmo-odd-irregular": Case(
        "olmo_hybrid", 2, 6, 9, 16, hidden=64, kv_heads=1, rope_theta=None, tied=True, layer_types=IRREGULAR
    ),
}
