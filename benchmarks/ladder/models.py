"""The models of the ladder: their configs, in fla's and Qwen's format, and the weights that they begin with."""

import math
from typing import Any

import torch
from torch import nn

from modeling.model import Model

VOCABULARY = 16_384
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def _fla(hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, Any]:
    """What fla's families have in common."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_heads": heads,
        "intermediate_size": intermediate,
        "hidden_act": "swish",
        "use_short_conv": True,
        "conv_size": 4,
        "norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "attn": None,
        "dtype": "bfloat16",
        **_SPECIAL,
    }


def gated_deltanet(
    hidden: int, layers: int, heads: int, intermediate: int, d_k: int = 128, d_v: int | None = None
) -> dict[str, Any]:
    """A Gated DeltaNet in fla's format; d_v is d_k unless it is given."""
    return {
        "architectures": ["GatedDeltaNetForCausalLM"],
        "model_type": "gated_deltanet",
        **_fla(hidden, layers, heads, intermediate),
        "num_v_heads": None,
        "head_dim": d_k,
        "expand_v": (d_v or d_k) / d_k,
        "use_gate": True,
    }


def delta_net(
    hidden: int, layers: int, heads: int, intermediate: int, d_k: int = 128, d_v: int = 128
) -> dict[str, Any]:
    """A DeltaNet in fla's format."""
    return {
        "architectures": ["DeltaNetForCausalLM"],
        "model_type": "delta_net",
        **_fla(hidden, layers, heads, intermediate),
        "expand_k": heads * d_k / hidden,
        "expand_v": heads * d_v / hidden,
        "use_gate": False,
        "use_beta": True,
        "use_output_norm": True,
        "qk_activation": "silu",
        "qk_norm": "l2",
    }


def qwen3_5(hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, Any]:
    """A hybrid in Qwen3.5's text format: three layers of Gated DeltaNet, then one of softmax attention."""
    assert layers % 4 == 0
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "full_attention_interval": 4,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4),
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "attn_output_gate": True,
        "attention_bias": False,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "mamba_ssm_dtype": "float32",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        **_SPECIAL,
    }


MODELS = {
    "gdn-toy": {**gated_deltanet(64, 2, 1, 128, d_k=64), "vocab_size": 1024},
    "gdn-45m": gated_deltanet(512, 10, 4, 1408),
    "gdn-130m": gated_deltanet(768, 16, 6, 2048),
    "deltanet-130m": delta_net(768, 16, 6, 2304),
    "hybrid-130m": qwen3_5(768, 16, 6, 2048),
}
"""Models by name, smallest first."""


def initialise(model: Model, *, embeddings: float = 0.02) -> None:
    """GPT-2's scheme (residual projections scaled by depth); A_log and dt_bias as fla draws them.

    Args:
        embeddings: standard deviation of the embeddings.
    """
    depth = math.sqrt(2 * len(model.layers))
    for name, p in model.named_parameters():
        if name == "embeddings.weight":
            nn.init.normal_(p, std=embeddings)
        elif name.endswith(("o_proj.weight", "out_proj.weight")):
            nn.init.normal_(p, std=0.02 / depth)
        elif name.endswith("conv.weight"):
            nn.init.uniform_(p, -0.5, 0.5)
        elif p.ndim == 2:
            nn.init.normal_(p, std=0.02)
        elif name.endswith("A_log"):
            nn.init.uniform_(p, 1, 16)
            p.data.log_()
        elif name.endswith("dt_bias"):
            dt = torch.exp(torch.rand_like(p) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
            p.data.copy_(dt + torch.log(-torch.expm1(-dt)))
