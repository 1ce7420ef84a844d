"""Collects calibration statistics: one streaming pass, and a second one, forward and backward, for gradients.

A pass can be interrupted at any moment, even killed, and goes on from what was last saved. Sums are only ever saved
between batches and added to in the same order, so the result is the same to the last bit.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from modeling.layers import l2_normalise
from modeling.model import Model
from modeling.spec import ModelSpec
from pruning.calibration import BATCH, Origin, cu_seqlens
from pruning.errors import PruningError
from pruning.gradients import add_gradients, need_gradients
from pruning.interrupts import saving
from pruning.progress import Advance, no_progress
from pruning.statistics import (
    GRAMS,
    SUMS,
    Shapes,
    StatisticName,
    Statistics,
    load_unfinished,
    names_for,
    save_statistics,
    shapes,
)

SAVE_EVERY = 120.0
"""Seconds between two saves of an unfinished calibration."""


def zeros(spec: ModelSpec, names: Collection[StatisticName]) -> dict[int, dict[StatisticName, Tensor]]:
    """Sums over no tokens: zeros of all shapes, by the index of each linear-attention layer."""
    return {
        i: {name: torch.zeros(shape, dtype=torch.float64) for name, shape in layer.items()}
        for i, layer in shapes(spec, names).items()
    }


class Collector:
    """Adds the `FORWARD` statistics to `layers` through the model's tap. Use `collect`, unless you drive the model.

    Args:
        layers: The sums of each linear-attention layer, by its index.
        tokens: How many are in them already.
    """

    def __init__(self, layers: Mapping[int, Mapping[StatisticName, Tensor]], tokens: int = 0) -> None:
        self.layers = layers
        self.tokens = dict.fromkeys(layers, tokens)
        """How many tokens are in the sums of each layer."""

    def tap(self, layer: int, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """A `modeling.layers.Tap`: adds x `[tokens, hidden]`, q and k `[tokens, num_k_heads, d_k]` of one layer, and
        changes nothing.

        Raises:
            PruningError: x, q or k is not finite.
        """
        raw_q, raw_k = q.detach().double(), k.detach().double()
        self._add(layer, "x", "x_squares", x.detach().double().square().sum(0))
        rows = (raw_q, raw_k, l2_normalise(raw_q), l2_normalise(raw_k))
        for gram, total, r in zip(GRAMS, SUMS, rows, strict=True):
            heads = r.transpose(0, 1)
            self._add(layer, gram, gram, heads.mT @ heads)
            self._add(layer, gram, total, r.sum(0))
        self.tokens[layer] += q.shape[0]
        return q, k

    def _add(self, layer: int, what: str, name: StatisticName, value: Tensor) -> None:
        # A NaN or an Inf in any row is one on the diagonal of its Gram: no need to look at all rows.
        if not bool(value.isfinite().all()):
            raise PruningError(
                f"layer {layer}: {what} holds NaN or Inf after {self.tokens[layer]} tokens; "
                "the checkpoint or its dtype is broken, and no selection from this would mean anything"
            )
        self.layers[layer][name].add_(value.cpu())

    def check_tokens(self, fed: int) -> None:
        """Raises PruningError unless every layer saw exactly the tokens that were fed to the model."""
        for layer, seen in self.tokens.items():
            if seen != fed:
                raise PruningError(
                    f"layer {layer}: the tap saw {seen} of {fed} tokens; its statistics would be wrong"
                )


def tokens_to_run(windows: Tensor, needed: Collection[StatisticName]) -> int:
    """What `collect` tells `advance` of in all: gradients take every token a second time."""
    return windows.numel() * (2 if need_gradients(needed) else 1)


def collect(
    model: Model,
    windows: Tensor,
    origin: Origin,
    source_sha256: str,
    *,
    needed: Collection[StatisticName] = (),
    batch: int = BATCH,
    advance: Advance = no_progress,
    partial: Path | None = None,
    save_every: float = SAVE_EVERY,
) -> Statistics:
    """Run `windows` int64 `[count, length]` through the model, `batch` at a time, and keep the `FORWARD` statistics.

    Every document in a window starts from an empty state (`cu_seqlens`).

    Args:
        needed: what criteria read. Gradient statistics in it take a second pass, which goes forward and backward.
        partial: file to save to every `save_every` seconds and when Ctrl-C is pressed, and to go on from if it is
            there. It stays, for the caller to remove once the result is safe.

    Raises:
        PruningError: an activation or a gradient is not finite, a layer's tap missed tokens, or `partial` is of another
            calibration.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP, once what is done is saved.
        OutputError: it could not be saved then.
    """
    names = names_for(needed)
    running = Statistics(source_sha256, (origin,), zeros(model.spec, names))
    done = {"forward": 0, "backward": 0, "batch": batch}
    if partial is not None and partial.exists():
        running, done = resumed(partial, source_sha256, origin, shapes(model.spec, names), batch)
        advance((done["forward"] + done["backward"]) * windows.shape[1])

    def save(path: Path) -> None:
        save_statistics(running, path, unfinished=done)

    device = model.embeddings.weight.device
    collector = Collector(running.layers, done["forward"] * windows.shape[1])
    with saving(partial, save, save_every) as step_done:
        with torch.no_grad():
            for at in range(done["forward"], len(windows), batch):
                rows = windows[at : at + batch]
                offsets = cu_seqlens(rows, model.spec.eos_token_ids)
                model(rows.flatten().to(device), offsets, tap=collector.tap)
                done["forward"] += len(rows)
                collector.check_tokens(done["forward"] * windows.shape[1])
                advance(rows.numel())
                step_done()
        if need_gradients(names):
            for tokens in add_gradients(model, windows[done["backward"] :], running.layers):
                done["backward"] += 1
                advance(tokens)
                step_done()
    return running


def resumed(
    partial: Path,
    source_sha256: str,
    origin: Origin,
    expected: Shapes,
    batch: int = BATCH,
    *,
    streamed: bool = False,
) -> tuple[Statistics, dict[str, int]]:
    """What an interrupted calibration left in the file `partial`, and how many windows it had done, once
    `check_goes_on` has passed it."""
    found, done = load_unfinished(partial)
    check_goes_on(partial, found, done, source_sha256, origin, expected, batch, streamed=streamed)
    return found, done


def check_goes_on(
    partial: Path,
    found: Statistics,
    done: Mapping[str, int],
    source_sha256: str,
    origin: Origin,
    expected: Shapes,
    batch: int = BATCH,
    *,
    streamed: bool,
) -> None:
    """Check that a calibration can go on from what `load_unfinished` has found in the file `partial`.

    Args:
        expected: Shapes of what is going to be collected.
        streamed: whether it is going to be collected one layer at a time (`pruning.streaming`).

    Raises:
        PruningError: the file is of another checkpoint, text or set of statistics, or of the other way to collect it.
    """
    differs = [
        what
        for what, a, b in (
            ("the checkpoint", found.source_sha256, source_sha256),
            ("the text or how it is drawn", found.origins, (origin,)),
            ("what is collected", found.shapes, expected),
            ("the batch", done["batch"], batch),
            ("whether one layer is in memory at a time", "layer" in done, streamed),
        )
        if a != b
    ]
    if differs:
        raise PruningError(
            f"{partial} is of an interrupted calibration that differs in {' and '.join(differs)}; repeat its "
            "options to go on with it, or start anew with --overwrite"
        )
