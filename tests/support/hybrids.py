"""Random checkpoints of hybrid models in the layouts that are on the hub, small enough for any test.

Names, shapes and configs are written down from the public checkpoints, and no code of `modeling` or transformers is
used: a layout that `modeling` has misread can't be misread here in the same way.
"""

import json
from pathlib import Path
from typing import Any

from checkpoints import byte_tokenizer
from hybrid_cases import CASES as CASES
from hybrid_cases import (
    CHAT_END,
    CONV_KERNEL,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    IMAGE,
    MOE_SIZE,
    PATTERN,
    SHARED_SIZE,
    TOP_EXPERTS,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
    Case,
)
from hybrid_tensors import hybrid_tensors
from safetensors.torch import save_file


def write_hybrid(path: Path, case: Case, seed: int = 0) -> Path:
    """A checkpoint directory: config.json, generation_config.json, weights and a byte-level tokenizer."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config_of(case), indent=2))
    # Chat models end a turn by a token that config.json does not name.
    generation = {"eos_token_id": [CHAT_END, 0] if case.vision else [0], "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(generation))
    save_file(hybrid_tensors(case, seed), path / "model.safetensors", metadata={"format": "pt"})
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
    """The config of Qwen3.5's text model."""
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
        "norm_topk_prob": True,
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
