"""Train a model of the ladder.

    python benchmarks/ladder/train.py gdn-130m TEXT OUT --device cuda --seconds 420

TEXT is a folder that corpus.py made. Training takes the seconds that it is given: the learning rate falls to zero as
they run out. OUT is a checkpoint with train.json beside it: curve, speed, share of the card's arithmetic.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import math
import shutil
import sys
import time
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import fused
from models import MODELS, initialise
from optimizers import optimizers

from lowkey import how_to_install
from lowkey.publishing import write_json
from modeling.checkpoint import export_tensors, open_checkpoint, save_shard
from modeling.families import family_of
from modeling.model import Model
from pruning.calibration import Encoder
from pruning.errors import PruningError
from pruning.evaluation import evaluation_windows, perplexity
from pruning.evaluation.record import environment
from pruning.fused import training_rule
from pruning.options import device_named
from pruning.sources import read_text
from pruning.versions import versions

WINDOW = 2048
PEAK = 989e12
"""Dense bfloat16 operations per second of a Hopper card by its datasheet."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
TOKENS, HELD_OUT = "train.tokens", "heldout.jsonl.gz"
REPORT_EVERY = 10.0
"""Seconds between two points of the curve."""


class Windows:
    """Windows of a stream of tokens in random order, cut at another offset in every epoch.

    Args:
        stream: the tokens, on the device that trains.

    Raises:
        ValueError: the stream is too short for a batch.
    """

    def __init__(self, stream: Tensor, window: int, batch: int, seed: int) -> None:
        # The offset takes up to a window, and the last window's targets one token more.
        needed = (batch + 1) * window + 1
        if len(stream) < needed:
            raise ValueError(
                f"the text has {len(stream):,} tokens; batch={batch} windows of window={window} need {needed:,}"
            )
        self._stream, self._window, self._batch = stream, window, batch
        self._generator = torch.Generator().manual_seed(seed)
        self._left = torch.empty(0, dtype=torch.long)
        self._offsets = torch.arange(window + 1, device=stream.device)
        self.epochs = 0.0

    def __next__(self) -> Tensor:
        """int64 `[batch, window + 1]`."""
        if len(self._left) < self._batch:
            # Windows that are left over are fewer than a batch, and another epoch may draw them.
            offset = int(torch.randint(self._window, (1,), generator=self._generator))
            starts = torch.arange(offset, len(self._stream) - self._window - 1, self._window)
            self._left = starts[torch.randperm(len(starts), generator=self._generator)]
        starts, self._left = self._left.split([self._batch, len(self._left) - self._batch])
        self.epochs += self._batch * self._window / len(self._stream)
        return self._stream[starts.to(self._stream.device)[:, None] + self._offsets].long()


def hidden_states(model: Model, ids: Tensor) -> Tensor:
    """`[batch, window, hidden]` of int64 `[batch, window]`: fused on a card, in plain torch elsewhere."""
    if ids.is_cuda:
        return fused.hidden_states(model, ids)
    batch, window = ids.shape
    hidden, _ = model(ids.flatten(), range(0, batch * window + 1, window))
    return hidden.view(batch, window, -1)


def backward(model: Model, rows: Tensor) -> Tensor:
    """Add the gradient of the mean cross entropy of `[batch, window + 1]`, and return that."""
    device = rows.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits = model.logits(hidden_states(model, rows[:, :-1]))
    loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def operations_per_token(model: Model) -> float:
    """Arithmetic of a token's forward and backward: 6 for each weight of a matrix, and 6 d_k d_v heads x 2 for the
    state's update and read. What chunks cost on top is not counted, nor what softmax attention reads."""
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    states = sum(m.num_v_heads * m.d_k * m.d_v for m in model.spec.deltas.values())
    return 6.0 * weights + 12.0 * states


def check_text(text: Path, vocab_size: int) -> None:
    """Raises BadParameter if a file is missing in the folder `text`, or its tokenizer has too many tokens."""
    for name in (TOKENS, HELD_OUT, *TOKENIZER):
        if not (text / name).exists():
            raise typer.BadParameter(f"text={str(text)!r} has no {name}; corpus.py makes it")
    found = Tokenizer.from_file(str(text / TOKENIZER[0])).get_vocab_size()
    if found > vocab_size:
        raise typer.BadParameter(
            f"text={str(text)!r} has a tokenizer of {found:,} tokens, but the model's vocab_size is {vocab_size:,}"
        )


def save(model: Model, config: dict[str, Any], text: Path, out: Path) -> None:
    """Write the checkpoint in its family's names, weights in bfloat16, with the tokenizer."""
    tensors = {
        name: t.detach().to("cpu", torch.bfloat16).contiguous()
        for name, t in export_tensors(model, family_of(config))
    }
    save_shard(out / "model.safetensors", tensors)
    write_json(out / "config.json", config)
    for name in TOKENIZER:
        shutil.copy(text / name, out / name)


def main(
    name: Annotated[str, typer.Argument(help=f"{', '.join(MODELS)}.")],
    text: Annotated[Path, typer.Argument(help="Folder that corpus.py made.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint to write.")],
    seconds: Annotated[
        float, typer.Option(help="How long to train, without loading and compiling.", min=0.1)
    ] = 420.0,
    batch: Annotated[int, typer.Option(help="Windows per step.", min=1)] = 32,
    window: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = WINDOW,
    lr: Annotated[float, typer.Option(help="Peak learning rate, for Muon and AdamW alike.")] = 3e-3,
    heldout_tokens: Annotated[int, typer.Option(help="Held-out tokens to measure on at the end.")] = 262_144,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: int = 0,
) -> None:
    """Train a model of the ladder for so many seconds."""
    if name not in MODELS:
        raise typer.BadParameter(f"name={name!r} must be one of {', '.join(MODELS)}")
    began = time.monotonic()
    config = MODELS[name]
    # What is wrong with the folders and the device is found out before the training.
    check_text(text, config["vocab_size"])
    try:
        place = device_named(device)
    except PruningError as e:
        raise typer.BadParameter(str(e)) from e
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    if place.type == "cuda" and training_rule(place) is None:
        raise typer.BadParameter(f"device={device!r} trains by fla's kernels: {how_to_install('gpu')}")
    stream = torch.from_numpy(np.fromfile(text / TOKENS, "<u2").astype(np.int32)).to(device)
    try:
        windows = Windows(stream, window, batch, seed)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e
    model = Model(family_of(config).spec(config))
    initialise(model)
    model.to(device)
    distances = None
    if device != "cpu":
        distances = fused.check(model)
        fused.compile_parts()
    chosen = optimizers(model, lr)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters:,} parameters, {len(stream):,} tokens; distances {distances}", flush=True)

    backward(model, next(windows))  # compiles what is to be timed
    for optimizer in chosen:
        optimizer.zero_grad()
    ready = time.monotonic()
    curve: list[dict[str, float]] = []
    recent: list[Tensor] = []
    for step in count(1):
        elapsed = time.monotonic() - ready
        done = min(elapsed / seconds, 1.0)
        # Linear warm-up, constant, then linear to zero over the last 60 %.
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, step / 100, (1 - done) / 0.6)
        recent.append(backward(model, next(windows)))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        if done == 1.0 or elapsed > REPORT_EVERY * (len(curve) + 1):
            loss = float(torch.stack(recent).mean())
            recent.clear()
            tokens = step * batch * window
            elapsed = time.monotonic() - ready
            curve.append({"seconds": elapsed, "tokens": tokens, "loss": loss})
            share = tokens / elapsed * operations_per_token(model) / PEAK
            of_card = "" if device == "cpu" else f", {share:.1%} of the card"
            speed = f"{tokens / elapsed:,.0f} tokens/s{of_card}"
            print(f"{elapsed:.0f} s, step {step}: loss {loss:.4f}, {speed}", flush=True)
            if not math.isfinite(loss):
                raise SystemExit("training diverged; a smaller --lr may help")
        if done == 1.0:
            break
    trained, operations = time.monotonic() - ready, operations_per_token(model)
    save(model, config, text, out)
    del model, chosen
    checkpoint = open_checkpoint(out)
    held_out = evaluation_windows(
        Encoder(checkpoint),
        read_text([text / HELD_OUT], None),
        tokens=heldout_tokens,
        window=window,
    )
    found = perplexity(checkpoint.load(device=device), held_out)
    print(f"held-out perplexity {found.perplexity:.3f} on {found.tokens:,} tokens", flush=True)
    write_json(
        out / "train.json",
        {
            "model": name,
            "parameters": parameters,
            "tokens": tokens,
            "epochs": round(windows.epochs, 3),
            "corpus_tokens": len(stream),
            "seconds": trained,
            "seconds_before": ready - began,
            "tokens_per_second": tokens / trained,
            "operations_per_token": operations,
            "share_of_peak": tokens / trained * operations / PEAK if device != "cpu" else None,
            "distances": distances,
            "settings": {"batch": batch, "window": window, "lr": lr, "seed": seed},
            "heldout": found.as_json(),
            "environment": environment(place),
            "versions": versions(),
            "curve": curve,
        },
    )


if __name__ == "__main__":
    typer.run(main)
