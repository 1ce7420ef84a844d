"""Random checkpoints of hybrid models, in the layout of Qwen's on the hub, for figures that weights don't change.

    python benchmarks/hybrid_models.py 0.8B models
    python benchmarks/hybrid_models.py 0.8B models --d-k 64

What they hold loads in transformers, in Lowkey, and, where d_k is d_v, in llama.cpp's converter.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor

from lowkey.publishing import replacing
from modeling.checkpoint import write_safetensors
from modeling.families import TensorMap, family_of
from modeling.layers import MoE
from modeling.model import Model

LINEAR, FULL = "linear_attention", "full_attention"

COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attn_output_gate": True,
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": 0,
    "full_attention_interval": 4,
    "hidden_act": "silu",
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10_000_000,
        "rope_type": "default",
    },
}
DENSE: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "head_dim": 256,
    "model_type": "qwen3_5_text",
    "tie_word_embeddings": True,
    "vocab_size": 248320,
}
EXPERTS: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "head_dim": 256,
    "hidden_size": 2048,
    "linear_num_value_heads": 32,
    "mlp_only_layers": [],
    "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 2,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
}
TINY: dict[str, Any] = {
    "head_dim": 64,
    "hidden_size": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {**COMMON["rope_parameters"], "mrope_section": [3, 3, 2]},
    "vocab_size": 512,
}
SHAPES: dict[str, dict[str, Any]] = {
    "0.8B": {
        **DENSE,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "linear_num_value_heads": 16,
        "num_attention_heads": 8,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
    },
    "2B": {
        **DENSE,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "linear_num_value_heads": 16,
        "num_attention_heads": 8,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
    },
    "4B": {
        **DENSE,
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "linear_num_value_heads": 32,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
    },
    "9B": {
        **DENSE,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "linear_num_value_heads": 32,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "27B": {
        **DENSE,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "linear_num_value_heads": 48,
        "num_attention_heads": 24,
        "num_hidden_layers": 64,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "35B-A3B": {**EXPERTS, "num_hidden_layers": 40, "vocab_size": 248320},
    "35B-A3B-4-layers": {**EXPERTS, "num_hidden_layers": 4, "vocab_size": 4096},
    "tiny": {**DENSE, **TINY, "intermediate_size": 96},
    "tiny-experts": {
        **EXPERTS,
        **TINY,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 32,
    },
}
NARROW: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 512}
SHAPES |= {f"{name}-narrow": SHAPES[name] | NARROW for name in ("0.8B", "4B")}
"""What config.json of the public models says, by a readable name. The 35B-A3B of 4 layers has a small vocabulary, for
that of the public model would be most of the work. A "narrow" model has the states of the one that it is named after,
and hardly any weights."""


def config_of(shape: str, d_k: int = 128) -> dict[str, Any]:
    """The content of config.json. `linear_key_head_dim` is all that tells a reduced model from its original."""
    config = {**COMMON, **SHAPES[shape], "linear_key_head_dim": d_k}
    layers = range(config["num_hidden_layers"])
    return config | {"layer_types": [LINEAR if (i + 1) % 4 else FULL for i in layers]}


Kept = Annotated[Path | None, typer.Option(help="Keep the checkpoints in this folder for the next run.")]
"""The option of a benchmark that makes checkpoints; `kept_in` gives the folder."""


@contextmanager
def kept_in(folder: Path | None) -> Iterator[Path]:
    """The folder, made if it is not there; for None one that is removed in the end."""
    if folder is None:
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def random_checkpoint(folder: Path, shape: str, d_k: int = 128) -> Path:
    """A checkpoint directory in bfloat16 with a byte-level tokenizer: written to the folder unless it is there already,
    always with the same weights."""
    path = folder / f"{shape}-{d_k}"
    if not path.exists():
        with replacing(path) as new:
            _write(new, shape, d_k)
    return path


def _write(path: Path, shape: str, d_k: int) -> None:
    path.mkdir()
    config = config_of(shape, d_k)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    write_safetensors(path, _tensors(config))
    _tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )


def random_model(
    config: dict[str, Any], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Model:
    """A model in eval mode with weights as those of `random_checkpoint`, drawn where it is to be, in the dtypes that
    `Checkpoint.load` gives."""
    spec = family_of(config).spec(config)
    with torch.device("meta"):
        model = Model(spec)
    wide = torch.promote_types(dtype, torch.float32)
    state = {
        m.ours: tensor
        for m, tensor in _drawn(config, lambda m: wide if m.role in ("norm", "decay") else dtype, device)
    }
    if spec.tie_embeddings:
        state["lm_head.weight"] = state["embeddings.weight"]
    model.load_state_dict(state, assign=True)
    if spec.tie_embeddings:
        model.lm_head.weight = model.embeddings.weight  # `assign` has made two parameters of one tensor
    return model.eval().requires_grad_(False)


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, one of our parameters at a time."""
    for m, drawn in _drawn(config, lambda m: torch.float32, "cpu"):
        for name, tensor in zip(m.theirs, m.split(drawn), strict=True):
            yield name, tensor.to(torch.bfloat16)


def _drawn(
    config: dict[str, Any], dtype_of: Callable[[TensorMap], torch.dtype], device: torch.device | str
) -> Iterator[tuple[TensorMap, Tensor]]:
    """Each of our parameters, with what it is made of in a checkpoint."""
    family = family_of(config)
    spec = family.spec(config)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Model(spec).state_dict().items()}
    generator = torch.Generator(device).manual_seed(0)
    for m in family.tensors(spec):
        mean, std = _distribution(m, shapes[m.ours], tied=spec.tie_embeddings)
        tensor = torch.empty(shapes[m.ours], dtype=dtype_of(m), device=device)
        yield m, tensor.normal_(mean, std, generator=generator)


def _distribution(m: TensorMap, shape: torch.Size, *, tied: bool) -> tuple[float, float]:
    """Mean and standard deviation of one of our parameters.

    Matrices are scaled by the square root of their inputs, so that activations neither vanish nor explode, and what a
    layer adds is small beside the embeddings: else all layers together would amplify rounding, and both sides could not
    be compared. States remember a few tens of tokens.
    """
    scale = shape[-1] ** -0.5
    match m.role:
        case "embeddings":
            return 0.0, 1.0
        case "norm" if m.layer is None and tied:
            return 0.0, 1.0  # around 1, each token would be followed by itself
        case "norm":
            return 1.0, 0.1
        case "filters":
            return 0.0, 0.5
        case "decay":
            return (-1.5 if m.ours.endswith("A_log") else 0.0), 0.7
        case "router":
            return 0.0, 2 * scale  # sure of its choice
        case _:
            return 0.0, (0.3 if "out_proj" in m.ours or "o_proj" in m.ours else 1.0) * scale


def weight_bytes(model: Model, experts: float = 0.0) -> float:
    """Bytes of the weights that a decode step reads, `experts` of each layer of experts in the mean."""
    total: float = sum(p.nbytes for p in model.parameters())
    if not model.spec.tie_embeddings:
        total -= model.embeddings.weight.nbytes  # of which a step reads a row for each request
    for m in model.modules():
        if isinstance(m, MoE):
            total -= (m.in_proj.nbytes + m.out_proj.nbytes) * (1 - experts / m.spec.num_experts)
    return total


def _tokenizer() -> Tokenizer:
    """256 byte tokens and one merge of two of them, behind an end-of-text token 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(alphabet)} | {"th": 257}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def main(
    shape: Annotated[str, typer.Argument(help=f"One of {', '.join(SHAPES)}.")],
    folder: Annotated[Path, typer.Argument(help="Where its directory comes.")],
    d_k: Annotated[int, typer.Option(help="Key channels of each head of linear attention.")] = 128,
) -> None:
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is none of {', '.join(SHAPES)}")
    print(random_checkpoint(folder, shape, d_k))


if __name__ == "__main__":
    typer.run(main)
