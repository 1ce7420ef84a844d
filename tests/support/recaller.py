"""A DeltaNet of one layer whose weights are set by hand so that it recalls: every word is a channel of its own.

q and v are the current token, k is the one before it (the convolution looks one back), beta is 1: after a pair the
state holds its value under its key, and at a query the output is the value, far larger than the residual.
"""

from pathlib import Path

import torch
from checkpoints import byte_tokenizer, write_checkpoint

CONFIG = {
    "architectures": ["DeltaNetForCausalLM"],
    "model_type": "delta_net",
    "vocab_size": 257,
    "hidden_size": 257,
    "num_hidden_layers": 1,
    "num_heads": 1,
    "expand_k": 64 / 257,
    "expand_v": 1.0,
    "intermediate_size": 8,
    "norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def write_recaller(path: Path) -> Path:
    """Words are the letters of the byte-level tokenizer; key channel c is that of the c-th of 64 tokens."""
    tokenizer = byte_tokenizer()
    letters = [tokenizer.token_to_id(chr(base + i)) for base in (65, 97) for i in range(26)]
    tokens = letters + [i for i in range(257) if i not in letters][:12]
    one_hot = torch.eye(257)
    channels = one_hot[tokens]
    now, before = torch.tensor([0.0, 0, 0, 1]), torch.tensor([0.0, 0, 1, 0])
    layer = "model.layers.0."
    tensors = {
        "model.embeddings.weight": one_hot,
        "model.norm.weight": torch.ones(257),
        "lm_head.weight": one_hot,
        f"{layer}attn_norm.weight": torch.ones(257),
        f"{layer}mlp_norm.weight": torch.ones(257),
        f"{layer}mlp.gate_proj.weight": torch.zeros(8, 257),
        f"{layer}mlp.up_proj.weight": torch.zeros(8, 257),
        f"{layer}mlp.down_proj.weight": torch.zeros(257, 8),
        f"{layer}attn.q_proj.weight": channels,
        f"{layer}attn.k_proj.weight": channels,
        f"{layer}attn.v_proj.weight": one_hot,
        f"{layer}attn.b_proj.weight": torch.full((1, 257), 1.0),  # the norm makes it 16: beta is 1
        f"{layer}attn.q_conv1d.weight": now.expand(64, 1, 4),
        f"{layer}attn.k_conv1d.weight": before.expand(64, 1, 4),
        f"{layer}attn.v_conv1d.weight": now.expand(257, 1, 4),
        f"{layer}attn.o_norm.weight": torch.ones(257),
        f"{layer}attn.o_proj.weight": one_hot,
    }
    return write_checkpoint(path, CONFIG, {name: t.clone().contiguous() for name, t in tensors.items()})
