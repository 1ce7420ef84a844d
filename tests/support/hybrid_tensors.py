"""The tensors of hybrid checkpoints, by the names and shapes that they have on the hub."""

import torch
from hybrid_cases import (
    CONV_KERNEL,
    EXPERTS,
    FULL,
    HEAD_DIM,
    HEADS,
    LINEAR,
    MOE_SIZE,
    SHARED_SIZE,
    VOCABULARY,
    Case,
)
from torch import Tensor


def hybrid_tensors(case: Case, seed: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by name."""
    return _Tensors(case, seed).all


class _Tensors:
    """Makes every tensor of a checkpoint, drawn in a fixed order.

    Matrices are scaled by the square root of their inputs, so that activations neither vanish nor explode; what a layer
    adds is small beside the embeddings, or else the layers together would amplify float32's rounding a hundredfold. All
    norm weights are drawn: one that is read as another kind of norm, or not at all, changes the result.
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

    def _matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        self._add(f"{name}.weight", rows, columns, std=gain * columns**-0.5)

    def _out(self, name: str, columns: int) -> None:
        """The last matrix of a mixer or a feed-forward."""
        self._matrix(name, self.case.hidden, columns, gain=0.3)

    def _norm(self, name: str, size: int, *, centred: bool, around: float = 1.0, std: float = 0.3) -> None:
        """`centred`: what is stored is the weight less one."""
        self._add(f"{name}.weight", size, mean=around - centred, std=std)

    def _filters(self, name: str, channels: int) -> None:
        self._add(f"{name}.weight", channels, 1, CONV_KERNEL, std=0.5)

    def _decay(self, p: str) -> None:
        """States are remembered for a few to a few tens of tokens."""
        self._add(f"{p}A_log", self.case.v_heads, mean=-1.5, std=0.7, wide=True)
        self._add(f"{p}dt_bias", self.case.v_heads, std=0.7, wide=True)

    def _language_model(self) -> None:
        case = self.case
        self._add(f"{case.prefix}embed_tokens.weight", VOCABULARY, case.hidden, std=1.0)
        for i, kind in enumerate(case.layer_types):
            p = f"{case.prefix}layers.{i}."
            if case.model_type == "olmo_hybrid":
                self._olmo_layer(p, kind)
            else:
                self._qwen_layer(p, kind, experts=case.has_experts(i))
        # Around 0 where the head is tied to the embeddings, or each token would be followed by itself.
        around, std = (0.0, 1.0) if case.tied else (1.0, 0.3)
        centred = case.model_type != "olmo_hybrid"
        self._norm(f"{case.prefix}norm", case.hidden, centred=centred, around=around, std=std)
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
            self._out(f"{a}o_proj", HEADS * HEAD_DIM)
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
        self._out(f"{p}out_proj", values)

    def _mlp(self, p: str, size: int) -> None:
        self._matrix(f"{p}gate_proj", size, self.case.hidden)
        self._matrix(f"{p}up_proj", size, self.case.hidden)
        self._out(f"{p}down_proj", size)

    def _experts(self, p: str) -> None:
        hidden = self.case.hidden
        # Larger than other matrices, so that the router is sure of its choice.
        self._add(f"{p}gate.weight", EXPERTS, hidden, std=2 * hidden**-0.5)
        if self.case.fused:
            self._add(f"{p}experts.gate_up_proj", EXPERTS, 2 * MOE_SIZE, hidden, std=hidden**-0.5)
            self._add(f"{p}experts.down_proj", EXPERTS, hidden, MOE_SIZE, std=0.3 * MOE_SIZE**-0.5)
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
            self._out(f"{a}o_proj", values)
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
            self._out(f"{a}o_proj", queries)
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
        """Tensors of the shapes in `vision_config`."""
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
