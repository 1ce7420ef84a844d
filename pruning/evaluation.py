"""Held-out perplexity over fixed windows."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.layers import Tap
from modeling.model import Model
from pruning.calibration import WINDOW, Encoder, Text
from pruning.errors import PruningError
from pruning.progress import Advance, no_progress

DEFAULT_TOKENS = 48 * WINDOW


@dataclass(frozen=True)
class Perplexity:
    """Next-token loss over windows that each start from an empty state."""

    loss: float
    """Mean cross entropy in nats."""
    perplexity: float
    tokens: int
    """Predicted tokens."""
    window: int

    def as_json(self) -> dict[str, float | int]:
        return asdict(self)


def evaluation_windows(encoder: Encoder, text: Text, *, tokens: int = 0, window: int = WINDOW) -> Tensor:
    """Consecutive windows from the front of the text.

    Args:
        tokens: predict this many, rounded down to whole windows; 0 for as many as the text has.

    Returns:
        int64 `[windows, window + 1]`: the last column is target only, and is the first input of the next window.

    Raises:
        PruningError: `tokens` is below one window, or the text has fewer tokens than that.
    """
    if tokens < 0 or 0 < tokens < window:
        raise PruningError(
            f"tokens={tokens} must be at least one window of {window}, or 0 for the whole text"
        )
    stream: list[int] = []
    for document in text.documents:
        if tokens and len(stream) > tokens:
            break
        stream += encoder(document)
    count = (len(stream) - 1) // window
    wanted = tokens // window or count
    if count < max(wanted, 1):
        raise PruningError(
            f"tokens={tokens or window} are more than {text.name} gives, which is {max(len(stream) - 1, 0)}; "
            "ask for fewer, or add text"
        )
    starts = torch.arange(wanted)[:, None] * window
    return torch.tensor(stream)[starts + torch.arange(window + 1)]


@torch.no_grad()
def perplexity(
    model: Model,
    windows: Tensor,
    *,
    batch: int = 4,
    tap: Tap | None = None,
    advance: Advance = no_progress,
) -> Perplexity:
    """Perplexity of the model, changed by `tap`, on `windows` int64 `[count, window + 1]`, `batch` at a time.

    Raises:
        PruningError: the loss is not finite.
    """
    device = model.embeddings.weight.device
    window = windows.shape[1] - 1
    total = 0.0
    for rows in windows.to(device).split(batch):
        inputs, targets = rows[:, :-1].flatten(), rows[:, 1:].flatten()
        hidden, _ = model(inputs, range(0, len(inputs) + 1, window), tap=tap)
        # One window of logits at a time: those of a whole batch are the largest tensor by far.
        for h, t in zip(hidden.split(window), targets.split(window), strict=True):
            total += float(F.cross_entropy(model.logits(h).float(), t, reduction="sum"))
        advance(len(inputs))
    count = windows.shape[0] * window
    loss = total / count
    if not math.isfinite(loss):
        raise PruningError(f"the loss is {loss}: the model gives NaN or Inf on this text")
    return Perplexity(loss, math.exp(loss), count, window)


def evaluation_json(text: Text, results: Sequence[tuple[str, Perplexity]]) -> dict[str, object]:
    """What `state_reduction.json` says about measured perplexities."""
    return {
        "text": text.name,
        "text_sha256": text.sha256,
        **{name: result.as_json() for name, result in results},
    }
