"""The peer of the speed figures: transformers' Qwen3.5 with linear-attention layers only, given one of our models'
weights, so that both compute the same function and each run can check it.

Set-up: one process, transformers' torch path (an importable fla without a GPU would break it, so it is hidden from
it), and a cache that counts tokens itself, which stock caches leave to the attention layers that are not there.
"""

import sys
from pathlib import Path
from typing import Any

sys.modules["fla"] = None  # type: ignore[assignment]

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from modeling.layers import Block
from modeling.model import Model
from modeling.spec import DeltaSpec, MLPSpec


class LinearOnlyCache(DynamicCache):
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        self._seen = 0
        self._incoming = 1

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Called in forwards of several tokens only."""
        if layer_idx == 0:
            self._incoming = conv_states.shape[-1]
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Called in every forward."""
        if layer_idx == 0:
            self._seen += self._incoming
            self._incoming = 1
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._seen + query_length, 0


def stock(path: Path, dtype: torch.dtype) -> Any:
    """A checkpoint's language model as transformers itself loads it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def peer_of(model: Model) -> Any:
    """transformers' model that computes what `model` does, a Gated DeltaNet with a SiLU gate and one shape for all
    layers. Raises ValueError for any other."""
    spec = model.spec
    m, ffn = spec.layers[0].mixer, spec.layers[0].ffn
    if len(set(spec.layers)) > 1 or not isinstance(m, DeltaSpec) or not isinstance(ffn, MLPSpec):
        raise ValueError(
            f"the peer's layers are alike: linear attention and a dense feed-forward, not {m} and {ffn}"
        )
    if not m.has_decay or m.gate != "silu" or m.beta_scale != 1.0 or m.conv_bias:
        raise ValueError(f"Qwen3.5 can't express {m}")
    config = Qwen3_5TextConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=ffn.intermediate_size,
        num_hidden_layers=len(spec.layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_key_head_dim=m.d_k,
        linear_value_head_dim=m.d_v,
        linear_num_key_heads=m.num_k_heads,
        linear_num_value_heads=m.num_v_heads,
        linear_conv_kernel_dim=m.conv_kernel,
        layer_types=["linear_attention"] * len(spec.layers),
        rms_norm_eps=spec.norm.eps,
        tie_word_embeddings=spec.tie_embeddings,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(config, dtype=model.embeddings.weight.dtype)
    # Their norms keep the weight's distance from 1.
    tensors = {
        "model.embed_tokens.weight": model.embeddings.weight,
        "model.norm.weight": model.norm.weight - 1,
        "lm_head.weight": model.lm_head.weight,
    }
    for i, block in enumerate(model.layers):
        assert isinstance(block, Block)
        mixer = block.mixer
        at, mlp = f"model.layers.{i}.linear_attn.", f"model.layers.{i}.mlp."
        qkv, z, b, a = mixer.in_proj.weight.split(m.in_proj_sizes)
        gate, up = block.ffn.in_proj.weight.chunk(2)
        tensors |= {
            f"model.layers.{i}.input_layernorm.weight": block.mixer_norm.weight - 1,
            f"model.layers.{i}.post_attention_layernorm.weight": block.ffn_norm.weight - 1,
            at + "in_proj_qkv.weight": qkv,
            at + "in_proj_z.weight": z,
            at + "in_proj_b.weight": b,
            at + "in_proj_a.weight": a,
            at + "conv1d.weight": mixer.conv.weight[:, None],
            at + "A_log": mixer.A_log,
            at + "dt_bias": mixer.dt_bias,
            at + "norm.weight": mixer.o_norm.weight,
            at + "out_proj.weight": mixer.o_proj.weight,
            mlp + "gate_proj.weight": gate,
            mlp + "up_proj.weight": up,
            mlp + "down_proj.weight": block.ffn.out_proj.weight,
        }
    dtype = model.embeddings.weight.dtype
    tensors = {name: t.detach().to(dtype, copy=True) for name, t in tensors.items()}
    peer.load_state_dict(tensors, strict=True, assign=True)
    for name, buffer in list(peer.named_buffers()):
        if buffer.is_meta:  # of rotary embeddings, which only attention layers read
            owner, _, leaf = name.rpartition(".")
            peer.get_submodule(owner).register_buffer(leaf, torch.zeros(buffer.shape), persistent=False)
    return peer.eval()
