"""Calibration of models that are larger than memory: all tokens through one layer, then through the next.

Memory holds one layer, and the hidden states of all tokens on their way from layer to layer, in float32: as the tokens
run in the same batches through the same numbers, the statistics are those of the whole model to the last bit. In bf16
the states would take half, and the statistics would be of another model than the one that is pruned.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from modeling.checkpoint import Checkpoint
from modeling.spec import ModelSpec
from pruning.calibration import BATCH, Origin, cu_seqlens
from pruning.collection import SAVE_EVERY, Collector, resumed, zeros
from pruning.interrupts import saving
from pruning.progress import Advance, no_progress
from pruning.statistics import FORWARD, Statistics, load_hidden, save_statistics, shapes


def layers_to_run(spec: ModelSpec) -> int:
    """How many layers tokens go through: nothing is read behind the last one with linear attention."""
    return spec.linear_layers[-1] + 1


def collect_streaming(
    checkpoint: Checkpoint,
    windows: Tensor,
    origin: Origin,
    *,
    device: torch.device | str = "cpu",
    batch: int = BATCH,
    advance: Advance = no_progress,
    partial: Path | None = None,
    save_every: float = SAVE_EVERY,
) -> Statistics:
    """`pruning.collection.collect` of the `FORWARD` statistics with one layer in memory at a time.

    Args:
        windows: int64 `[count, length]`.
        device: where each layer is loaded to; hidden states stay on the CPU.
        advance: told of `windows.numel()` tokens for each of `layers_to_run`.
        partial: as for `collect`; hidden states are saved, too.

    Raises:
        CheckpointError: a tensor is missing or of another shape than the config says.
        PruningError, KeyboardInterrupt, OutputError: as `collect`.
    """
    spec = checkpoint.spec
    done = {"layer": 0, "forward": 0, "batch": batch}
    if partial is not None and partial.exists():
        expected = shapes(spec, FORWARD)
        running, done = resumed(partial, checkpoint.sha256, origin, expected, batch, streamed=True)
        hidden = load_hidden(partial, (windows.numel(), spec.hidden_size))
        advance(done["layer"] * windows.numel() + done["forward"] * windows.shape[1])
    else:
        running = Statistics(checkpoint.sha256, (origin,), zeros(spec, FORWARD))
        # Of a mapped file only the rows that are needed are read.
        embeddings = checkpoint.tensor(checkpoint.name_of("embeddings.weight"))
        hidden = embeddings[windows.flatten()].float()
        del embeddings

    def save(path: Path) -> None:
        save_statistics(running, path, unfinished=done, hidden=hidden)

    with saving(partial, save, save_every) as step_done, torch.no_grad():
        while done["layer"] < layers_to_run(spec):
            for tokens in _run_layer(checkpoint, windows, running, hidden, done, device):
                advance(tokens)
                step_done()
    return running


def _run_layer(
    checkpoint: Checkpoint,
    windows: Tensor,
    running: Statistics,
    hidden: Tensor,
    done: dict[str, int],
    device: torch.device | str,
) -> Iterator[int]:
    """Run the windows that are left through the layer at which `done` is, `hidden` and `done` moving on in place.
    Yields the tokens of each batch once it is done."""
    count, length = windows.shape
    layer = done["layer"]
    sums = {i: of_layer for i, of_layer in running.layers.items() if i == layer}
    collector = Collector(sums, done["forward"] * length)
    block = checkpoint.block(layer, device=device)
    for at in range(done["forward"], count, done["batch"]):
        rows = windows[at : at + done["batch"]]
        x = hidden[at * length : at * length + rows.numel()]
        y, _ = block(x.to(device), cu_seqlens(rows, checkpoint.spec.eos_token_ids), tap=collector.tap)
        x.copy_(y)
        done["forward"] += len(rows)
        collector.check_tokens(done["forward"] * length)
        yield rows.numel()
    done["layer"] += 1
    done["forward"] = 0
