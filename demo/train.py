"""Train the demo model from the text that ships with CPython.

    python demo/train.py tokenizer OUT            # byte-level BPE from the training side of the split
    python demo/train.py model OUT           # needs OUT/tokenizer.json; writes the checkpoint
    python demo/train.py model OUT --layout qwen3_5    # a hybrid in Qwen3.5's layout instead of fla's

One process, on the CPU (an hour and a half on two cores) or on a GPU. The recipe and the curve of the shipped
checkpoint are in demo/README.md.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from lowkey.files import Found, OutputError, check_new_file, found_at, write_or_keep
from lowkey.publishing import new_file, new_json, remove_working_directories, write_all
from lowkey.signals import ending_on_signals
from modeling.checkpoint import export_tensors, save_shard
from modeling.families import family_of
from modeling.model import Model
from modeling.tokenizer import TokenizerFile
from pruning.corpus import corpus, sha256

EOS = "<|endoftext|>"
WINDOW = 512
FLA = {
    "architectures": ["GatedDeltaNetForCausalLM"],
    "model_type": "gated_deltanet",
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_heads": 2,
    "num_v_heads": None,
    "head_dim": 128,
    "expand_v": 1.0,
    "intermediate_size": 704,
    "hidden_act": "swish",
    "use_gate": True,
    "use_short_conv": True,
    "conv_size": 4,
    "norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "attn": None,
    "dtype": "bfloat16",
}
HYBRID = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_5_text",
        "dtype": "bfloat16",
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "full_attention_interval": 4,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attn_output_gate": True,
        "attention_bias": False,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "mamba_ssm_dtype": "float32",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
}
LAYOUTS = {"gated_deltanet": FLA, "qwen3_5": HYBRID}

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
@ending_on_signals(remove_working_directories)
def tokenizer(out: Path) -> None:
    """Train the tokenizer and write it to OUT."""
    found = _found(out, "tokenizer.json", "tokenizer_config.json")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=FLA["vocab_size"],
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tok.train_from_iterator(corpus("train"), trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": FLA["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }

    def merges() -> None:
        with new_file(out / "tokenizer.json", replaces=found["tokenizer.json"]) as temporary:
            tok.save(str(temporary))

    try:
        write_all(
            merges,
            lambda: new_json(out / "tokenizer_config.json", config, replaces=found["tokenizer_config.json"]),
        )
    except OutputError as e:
        print(f"error: {e}", file=sys.stderr)
        raise typer.Exit(2) from e


def encode(tok: Tokenizer, texts: list[str]) -> Tensor:
    """All texts as one stream, each behind an end-of-text token."""
    return torch.tensor([i for e in tok.encode_batch(texts) for i in (0, *e.ids)], dtype=torch.int32)


def initialise(model: Model) -> None:
    """GPT-2's scheme (residual projections scaled by depth); A_log and dt_bias as fla draws them."""
    depth = math.sqrt(2 * len(model.layers))
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "out_proj.weight")):
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


def windows(stream: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """One epoch of `[batch, WINDOW + 1]` windows in random order, cut at a random offset."""
    offset = int(torch.randint(WINDOW, (1,), generator=generator))
    starts = torch.arange(offset, len(stream) - WINDOW - 1, WINDOW)
    starts = starts[torch.randperm(len(starts), generator=generator)]
    starts = starts[: len(starts) // batch * batch].view(-1, batch, 1)
    return starts + torch.arange(WINDOW + 1)


def loss_of(model: Model, batch: Tensor) -> Tensor:
    """Mean next-token cross entropy of `[n, WINDOW + 1]` token ids."""
    inputs, targets = batch[:, :-1].flatten(), batch[:, 1:].flatten()
    cu_seqlens = range(0, len(inputs) + 1, batch.shape[1] - 1)
    with torch.autocast(batch.device.type, torch.bfloat16):
        hidden, _ = model(inputs, cu_seqlens)
        logits = model.logits(hidden)
    return F.cross_entropy(logits.float(), targets)


@torch.no_grad()
def heldout_loss(model: Model, stream: Tensor, batches: int | None = None) -> float:
    """Mean loss over consecutive windows (all of them, or the first batches of 8)."""
    starts = torch.arange(0, len(stream) - WINDOW, WINDOW, device=stream.device)
    total, count = 0.0, 0
    offsets = torch.arange(WINDOW + 1, device=stream.device)
    for rows in starts.split(8)[:batches]:
        total += loss_of(model, stream[rows[:, None] + offsets].long()).item() * len(rows)
        count += len(rows)
    return total / count


def save(net: Model, config: dict[str, Any], out: Path, found: dict[str, Found | None]) -> None:
    """Write the checkpoint in its layout's names, weights in bf16, in place of what was `found`. Raises OutputError."""

    def weights() -> None:
        tensors = {name: t.to("cpu", torch.bfloat16) for name, t in export_tensors(net, family_of(config))}
        with new_file(out / "model.safetensors", replaces=found["model.safetensors"]) as temporary:
            save_shard(temporary, {name: t.contiguous() for name, t in tensors.items()})

    write_all(weights, lambda: new_json(out / "config.json", config, replaces=found["config.json"]))


@app.command()
@ending_on_signals(remove_working_directories)
def model(
    out: Path,
    tokens: Annotated[int, typer.Option(help="Training tokens, rounded down to whole steps.")] = 7_088_128,
    batch: Annotated[int, typer.Option(help="Windows of 512 tokens per step.")] = 4,
    lr: Annotated[float, typer.Option(help="Peak learning rate, for Muon and AdamW alike.")] = 3e-3,
    seed: int = 0,
    threads: int = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    layout: Annotated[
        str, typer.Option(help=f"The checkpoint's family: {' or '.join(LAYOUTS)}.")
    ] = "gated_deltanet",
) -> None:
    """Train the model and write the checkpoint to OUT (bf16 weights, curve.json beside them)."""
    if layout not in LAYOUTS:
        raise typer.BadParameter(f"layout={layout!r} must be {' or '.join(LAYOUTS)}")
    config = LAYOUTS[layout]
    found = _found(out, "config.json", "model.safetensors", "curve.json")
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # decays of a whole chunk underflow, and denormals are slow
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tok, _ = TokenizerFile(out).open()
    train_texts, heldout_texts = corpus("train"), corpus("heldout")
    train, heldout = encode(tok, train_texts), encode(tok, heldout_texts)
    bytes_per_token = sum(len(t.encode()) for t in heldout_texts) / len(heldout)
    train, heldout = train.to(device), heldout.to(device)
    net = Model(family_of(config).spec(config))
    initialise(net)
    net.to(device)
    matrices = [p for n, p in net.layers.named_parameters() if n.endswith("proj.weight")]
    chosen = {id(p) for p in matrices}
    others = [p for p in net.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [p for p in others if p.ndim >= 2], "weight_decay": 0.1},
                {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=lr,
            betas=(0.9, 0.95),
        ),
    ]
    print(
        f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(train):,} training tokens", flush=True
    )
    curve: list[dict[str, float]] = []
    steps, epochs = tokens // (batch * WINDOW), 0
    queue: list[Tensor] = []
    began = time.monotonic()
    for step in range(1, steps + 1):
        if not queue:
            queue = list(windows(train, batch, generator).to(device).unbind(0))
            epochs += 1
        # Linear warm-up, constant, then linear to zero over the last 60 %.
        factor = min(1.0, step / 100, (1 - (step - 1) / steps) / 0.6)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        loss = loss_of(net, train[queue.pop()].long())
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen = step * batch * WINDOW
        if step % 50 == 0:
            speed = seen / (time.monotonic() - began)
            print(f"step {step} of {steps} loss {loss.item():.3f} {speed:.0f} tokens/s", flush=True)
        if step % 500 == 0:
            value = heldout_loss(net, heldout, batches=6)
            minutes = (time.monotonic() - began) / 60
            curve.append({"minutes": minutes, "tokens": seen, "heldout_loss_24k": value})
            print(f"held-out (24 k tokens): loss {value:.4f} perplexity {math.exp(value):.2f}", flush=True)
            try:
                if any(found_at(out / name) != before for name, before in found.items()):
                    raise OutputError(f"{out} has changed since it was last looked at")
                save(net, config, out, found)
                found = {name: found_at(out / name) for name in found}
            except OutputError as e:  # the end is what counts, and there may be room again by then
                print(f"going on unsaved: {e}", flush=True)
    net.to(torch.bfloat16).float()  # what is reported is what is saved
    final = heldout_loss(net, heldout)
    summary = {
        "minutes": (time.monotonic() - began) / 60,
        "steps": steps,
        "tokens": steps * batch * WINDOW,
        "epochs": epochs,
        "seed": seed,
        "batch": batch,
        "lr": lr,
        "torch": torch.__version__,
        "heldout_tokens": len(heldout),
        "heldout_perplexity": math.exp(final),
        "heldout_bits_per_byte": final / math.log(2) / bytes_per_token,
        "train_text_sha256": sha256(train_texts),
        "heldout_text_sha256": sha256(heldout_texts),
        "curve": curve,
    }
    print(json.dumps({k: v for k, v in summary.items() if k != "curve"}, indent=2), flush=True)

    def finish(folder: Path) -> None:
        write_all(
            lambda: save(net, config, folder, found),
            lambda: new_json(folder / "curve.json", summary, replaces=found["curve.json"]),
        )

    try:
        write_or_keep(out, finish)
    except OutputError as e:
        print(f"error: {e}", file=sys.stderr)
        raise typer.Exit(2) from e


def _found(out: Path, *names: str) -> dict[str, Found | None]:
    """What there is of the files, to be replaced. Refuses a folder that takes no file, before an hour of training."""
    try:
        return {name: check_new_file(out / name, name, overwrite=True) for name in names}
    except OutputError as e:
        raise typer.BadParameter(str(e)) from e


if __name__ == "__main__":
    app()
