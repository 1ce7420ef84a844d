"""Text -> the windows that a model is evaluated on."""

import torch
from torch import Tensor

from lowkey.words import counted
from pruning.calibration import WINDOW, Encoder, Text
from pruning.errors import PruningError

DEFAULT_TOKENS = 48 * WINDOW


def evaluation_windows(
    encoder: Encoder, text: Text, *, tokens: int = 0, window: int = WINDOW, stride: int | None = None
) -> Tensor:
    """Windows from the front of the text, each `stride` tokens after the one before.

    Of each window the last `stride` targets are to be scored: no target is scored twice, none is left out between two
    windows, and each is predicted with at least `window - stride` tokens of context. What stands in front of the
    first window's scored targets is context only.

    Args:
        tokens: score this many, rounded down to whole strides; 0 for as many as the text has.
        stride: Tokens from one window to the next, from 1 to `window`; None for `window`: windows then follow one
            another, each from an empty state.

    Returns:
        int64 `[windows, window + 1]`: the last column is target only.

    Raises:
        PruningError: window or stride is out of range, `tokens` is below one stride, or the text has fewer.
    """
    if window < 1:
        raise PruningError(f"window={window} must be at least 1")
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise PruningError(f"stride={stride} must be between 1 and window={window}")
    if tokens < 0 or 0 < tokens < stride:
        raise PruningError(
            f"tokens={tokens} must be at least {stride}, which one window scores, or 0 for the whole text"
        )
    context = window - stride
    stream = _stream(encoder, text, context + tokens if tokens else None)
    available = max(len(stream) - 1 - context, 0)
    asked, advice = f"tokens={tokens}", "ask for fewer"
    if not tokens:
        asked, advice = f"{stride} tokens, which one window scores,", "ask for shorter windows"
    count = available // stride
    wanted = tokens // stride or count
    if count < max(wanted, 1):
        raise PruningError(
            f"{asked} are more than {text.name} gives, which is {available}; {advice}, or add text"
        )
    return _cut(stream, wanted, window, stride)


def long_windows(encoder: Encoder, text: Text, *, tokens: int = 0, longest: int, block: int) -> Tensor:
    """Windows that follow one another from the front of the text, as long as it has, up to `longest` tokens.

    Args:
        tokens: take about this many, or as many as the text has if that is less; 0 for the whole text.
        longest: the largest length of a window.
        block: a length above this is rounded down to a multiple of it.

    Returns:
        int64 `[windows, length + 1]`: the last column is target only.

    Raises:
        PruningError: the text has fewer than two tokens.
    """
    stream = _stream(encoder, text, tokens or None)
    available = len(stream) - 1
    if available < 1:
        raise PruningError(f"{text.name} gives {counted(len(stream), 'token')}; at least 2 are needed")
    wanted = min(tokens or available, available)
    length = min(longest, wanted)
    length -= length % block if length > block else 0
    return _cut(stream, wanted // length, length, length)


def _stream(encoder: Encoder, text: Text, needed: int | None) -> list[int]:
    """Token ids of the text from its front, whole documents: more than `needed`, or all of them."""
    stream: list[int] = []
    for document in text.documents:
        if needed is not None and len(stream) > needed:
            break
        stream += encoder(document)
    return stream


def _cut(stream: list[int], count: int, window: int, stride: int) -> Tensor:
    starts = torch.arange(count)[:, None] * stride
    return torch.tensor(stream)[starts + torch.arange(window + 1)]
