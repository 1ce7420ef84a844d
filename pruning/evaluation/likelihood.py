"""Held-out perplexity, and how far a model's predictions are from another's, over fixed windows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.layers import Tap
from modeling.model import Model
from modeling.ops import wide
from pruning.calibration import Text
from pruning.errors import PruningError
from pruning.progress import Advance, no_progress

CPU_BATCH, GPU_BATCH = 4, 32
"""Windows in one forward."""
LOGITS = 2**24
"""Logits that are held at once: those of a window are gigabytes where the vocabulary is large."""


@dataclass(frozen=True)
class Perplexity:
    """Next-token loss over windows that each start from an empty state."""

    loss: float
    """Mean cross entropy in nats."""
    perplexity: float
    tokens: int
    """How many tokens were scored."""
    window: int
    stride: int
    """How many targets of each window were scored: its last ones."""

    def as_json(self) -> dict[str, float | int]:
        return asdict(self)


@dataclass(frozen=True)
class Divergence:
    """How a model's predictions differ from the baseline's, over the full vocabulary."""

    kl: float
    """Mean KL(baseline || model), in nats per token."""
    top1_agreement: float
    """Share of tokens where both find the same token most likely."""
    tokens: int

    def as_json(self) -> dict[str, float | int]:
        return asdict(self)


@dataclass(frozen=True)
class TokenScores:
    """What a model makes of every scored target of some windows; on the CPU."""

    log_prob: Tensor
    """Log-probability of the target in nats, float `[windows, scored]`."""
    top1: Tensor
    """Whether the target is the most likely token, bool `[windows, scored]`."""


@torch.no_grad()
def perplexity(
    model: Model,
    windows: Tensor,
    *,
    stride: int | None = None,
    batch: int | None = None,
    tap: Tap | None = None,
    advance: Advance = no_progress,
) -> Perplexity:
    """Perplexity of the model, changed by `tap`, on `windows` int64 `[count, window + 1]` (`evaluation_windows`).

    Args:
        stride: the last so many targets of each window are scored; None for all.
        batch: windows in one forward; None for what suits the device.

    Raises:
        PruningError: the loss is not finite.
    """
    losses: list[Tensor] = []
    for rows in windows.split(batch or _batch(model)):
        for logits, targets in _predictions(model, rows, stride, tap):
            losses.append(F.cross_entropy(logits, targets, reduction="sum"))
        advance(rows[:, 1:].numel())
    return mean_perplexity(losses, windows, stride)


@torch.no_grad()
def compare(
    model: Model,
    baseline: Model,
    windows: Tensor,
    *,
    stride: int | None = None,
    batch: int | None = None,
    advance: Advance = no_progress,
) -> tuple[Perplexity, Divergence]:
    """The model's `perplexity`, and its divergence from `baseline` on the same tokens.

    Raises:
        PruningError: the vocabularies differ, or a loss is not finite.
    """
    check_vocabularies(model, baseline)
    losses: list[Tensor] = []
    divergences: list[Tensor] = []
    agreements: list[Tensor] = []
    for rows in windows.split(batch or _batch(model)):
        pairs = zip(_predictions(model, rows, stride), _predictions(baseline, rows, stride), strict=True)
        for (logits, targets), (reference, _) in pairs:
            losses.append(F.cross_entropy(logits, targets, reduction="sum"))
            p = reference.log_softmax(-1)
            divergences.append((p.exp() * (p - logits.log_softmax(-1))).sum(dtype=torch.float64))
            agreements.append((logits.argmax(-1) == reference.argmax(-1)).sum())
        advance(2 * rows[:, 1:].numel())
    result = mean_perplexity(losses, windows, stride)
    kl = float(torch.stack(divergences).sum()) / result.tokens
    if not math.isfinite(kl):
        raise PruningError(f"KL(baseline || model) is {kl}: a model gives NaN or Inf on this text")
    agreement = int(torch.stack(agreements).sum()) / result.tokens
    return result, Divergence(kl, agreement, result.tokens)


@torch.no_grad()
def token_scores(
    model: Model,
    windows: Tensor,
    *,
    stride: int | None = None,
    batch: int | None = None,
    advance: Advance = no_progress,
) -> TokenScores:
    """Score each target of `windows` int64 `[count, window + 1]` by itself; the arguments are those of `perplexity`.

    Raises:
        PruningError: a log-probability is not finite.
    """
    log_prob: list[Tensor] = []
    top1: list[Tensor] = []
    for rows in windows.split(batch or _batch(model)):
        for logits, targets in _predictions(model, rows, stride):
            log_prob.append(-F.cross_entropy(logits, targets, reduction="none").cpu())
            top1.append((logits.argmax(-1) == targets).cpu())
        advance(rows[:, 1:].numel())
    count = len(windows)
    scores = TokenScores(torch.cat(log_prob).view(count, -1), torch.cat(top1).view(count, -1))
    if not bool(scores.log_prob.isfinite().all()):
        raise PruningError("a log-probability is NaN or Inf: the model gives them on this text")
    return scores


def check_vocabularies(model: Model, baseline: Model) -> None:
    """Raises PruningError unless both predict the same vocabulary."""
    if model.spec.vocab_size != baseline.spec.vocab_size:
        raise PruningError(
            f"vocab_size={model.spec.vocab_size} is not the baseline's {baseline.spec.vocab_size}; "
            "only models of one vocabulary can be compared token by token"
        )


def _batch(model: Model) -> int:
    """Windows in one forward: on a GPU small batches cost launches, on a CPU large ones cost cache."""
    return GPU_BATCH if model.embeddings.weight.is_cuda else CPU_BATCH


def _predictions(
    model: Model, rows: Tensor, stride: int | None, tap: Tap | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Float32 logits `[n, vocab]` and targets `[n]` for the last `stride` targets of each of `rows`.

    They come in parts, each of one window and of at most `predicted_together` tokens: the logits of a whole batch are
    the largest tensor by far.

    Args:
        rows: int64 `[batch, window + 1]`.
    """
    window = rows.shape[1] - 1
    scored = window if stride is None else stride
    rows = rows.to(model.embeddings.weight.device)
    inputs = rows[:, :-1].flatten()
    hidden, _ = model(inputs, range(0, len(inputs) + 1, window), tap=tap)
    part = predicted_together(model.spec.vocab_size)
    for h, row in zip(hidden.split(window), rows, strict=True):
        for some, targets in zip(h[-scored:].split(part), row[-scored:].split(part), strict=True):
            yield wide(model.logits(some)), targets


def predicted_together(vocab_size: int) -> int:
    """Tokens whose logits are held at once."""
    return max(1, LOGITS // vocab_size)


def mean_perplexity(losses: Sequence[Tensor], windows: Tensor, stride: int | None) -> Perplexity:
    """The figures of `windows` `[count, window + 1]` from sums of the cross entropies of all scored targets.

    Raises:
        PruningError: the loss is not finite.
    """
    count, window = windows.shape[0], windows.shape[1] - 1
    stride = window if stride is None else stride
    loss = float(torch.stack(list(losses)).double().sum()) / (count * stride)
    if not math.isfinite(loss):
        raise PruningError(f"the loss is {loss}: the model gives NaN or Inf on this text")
    return Perplexity(loss, math.exp(loss), count * stride, window, stride)


def evaluation_json(
    text: Text, dense: Perplexity, reduced: Perplexity, divergence: Divergence
) -> dict[str, object]:
    """What `state_reduction.json` says about a reduced model beside the dense one."""
    return {
        "text": text.name,
        "text_sha256": text.sha256,
        "dense": dense.as_json(),
        "reduced": reduced.as_json(),
        "divergence": divergence.as_json(),
    }
