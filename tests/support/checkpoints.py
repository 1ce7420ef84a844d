"""Random checkpoints in fla's format, small enough for any test."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from modeling.families import family_of

GATED: dict[str, Any] = {
    "architectures": ["GatedDeltaNetForCausalLM"],
    "model_type": "gated_deltanet",
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_heads": 2,
    "num_v_heads": 4,
    "head_dim": 32,
    "expand_v": 0.75,
    "intermediate_size": 96,
    "norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
DELTA: dict[str, Any] = {
    "architectures": ["DeltaNetForCausalLM"],
    "model_type": "delta_net",
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_heads": 4,
    "expand_k": 1.0,
    "expand_v": 1.5,
    "intermediate_size": 96,
    "norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
UNEVEN: dict[str, Any] = {
    **GATED,
    "conv_bias": True,
    "head_dim": [32, 16, 8],
    "expand_v": [0.75, 1.5, 3.0],
}
"""GATED with widths by layer, and a bias on its convolutions."""

CHATML = (
    "{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def random_tensors(
    config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Every tensor that the config calls for, random but well scaled: activations neither vanish nor explode."""
    return dict(random_stream(config, seed, dtype))


def random_stream(
    config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """`random_tensors`, one at a time."""
    generator = torch.Generator().manual_seed(seed)
    family = family_of(config)
    spec = family.spec(config)
    hidden = spec.hidden_size
    for m in family.tensors(spec):
        for name, rows in zip(m.theirs, m.rows, strict=True):
            if name.endswith("conv1d.weight"):
                shape, scale = (rows, 1, spec.layers[0].mixer.conv_kernel), 0.5
            elif name.endswith(("norm.weight", "A_log", "dt_bias", "bias")):
                shape, scale = (rows,), 0.2
            else:
                columns = hidden
                if name.endswith("o_proj.weight"):
                    columns = spec.layers[0].mixer.value_dim
                elif name.endswith("down_proj.weight"):
                    columns = spec.layers[0].ffn.intermediate_size
                shape, scale = (rows, columns), columns**-0.5
            t = torch.randn(*shape, generator=generator) * scale
            if name.endswith("norm.weight"):
                t = t + 1
            yield name, t.to(dtype)


def byte_tokenizer(special: Sequence[str] = ()) -> Tokenizer:
    """256 byte tokens behind an end-of-text token 0.

    Args:
        special: more special tokens, in the place of a few bytes, which texts then must do without.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: 256 - len(special)]
    vocab = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<|endoftext|>", *special])
    return tok


def write_checkpoint(
    path: Path, config: dict[str, Any], tensors: dict[str, Tensor] | None = None, *, seed: int = 0
) -> Path:
    """A checkpoint directory with a byte-level tokenizer."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(config, seed) if tensors is None else tensors, path / "model.safetensors")
    byte_tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return path
