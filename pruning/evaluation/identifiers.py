"""Recall on real text: how well a model predicts identifiers that stood in its window before.

A variable's name in source code can hardly be guessed, but it can be remembered. So the second time it is read, its
probability says what the model's state still holds of the first time, by how many tokens ago that was.
"""

import bisect
import keyword
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.calibration import Encoder, Text
from pruning.evaluation.likelihood import TokenScores
from pruning.evaluation.samples import Estimate, estimate_of_clusters

RANGES = ((64, 256), (256, 1024), (1024, 4096))
"""Distances that are told apart, in tokens; the second of each is no more in it. Their geometric middles are 128, 512
and 2,048."""
SHORTEST = 4
"""Characters of the shortest identifier that counts."""
_WORD = re.compile(r"\b[^\W\d]\w*")


@dataclass(frozen=True)
class Occurrence:
    """One place of a document where an identifier stands that counts."""

    name: str
    first: int
    """Index of the first of its tokens."""
    last: int
    """Index of the last of its tokens."""
    begin: int
    """Index of the character that its first token begins with: the identifier's own first one, or that before it."""
    end: int
    """Index of the character behind it."""
    previous: int | None
    """Index of the first token of the same identifier's previous occurrence in the document."""


@dataclass(frozen=True)
class Identifiers:
    """Identifiers that occurred before in the same document and window, and that are predicted whole."""

    window: int
    """Tokens of a window: distances are smaller."""
    rows: Tensor
    """Index of each one's window, int64 `[n]`."""
    columns: Tensor
    """Index of each one's first token among the scored targets of its window, int64 `[n]`."""
    tokens: Tensor
    """How many tokens each one has, int64 `[n]`."""
    distances: Tensor
    """How many tokens before its own first token that of its previous occurrence is, int64 `[n]`."""


@dataclass(frozen=True)
class WordFigures:
    """Means over occurrences; the standard errors count windows as independent, occurrences of one window not."""

    log_prob: Estimate
    """Log-probability of the whole identifier, given all before it: the sum over its tokens, in nats."""
    exact: Estimate
    """Share of identifiers whose every token is the most likely one, given all before it."""
    first_token: Estimate
    """Share of identifiers whose first token is the most likely one."""


@dataclass(frozen=True)
class IdentifierRecall:
    """How well identifiers are predicted that last began `begin` to `end - 1` tokens ago."""

    begin: int
    end: int
    occurrences: int
    windows: int
    """How many windows hold them."""
    figures: WordFigures
    drop: WordFigures | None
    """The baseline's figures minus these, with the standard error of the difference; None for the baseline itself."""


def ranges(window: int) -> list[tuple[int, int]]:
    """Those of `RANGES` that windows of so many tokens have room for, cut off where they have no more."""
    return [(begin, min(end, window)) for begin, end in RANGES if begin < window]


def occurrences(document: str, offsets: Sequence[tuple[int, int]]) -> Iterator[Occurrence]:
    """The identifiers of a document that count, in its order.

    They match `[A-Za-z_][A-Za-z0-9_]*` and are no part of a longer word, no keywords of Python, and of at least
    `SHORTEST` characters and two tokens. The first token begins with the identifier, or one character before it:
    tokenizers make one token of the start of a word and the blank, dot or bracket before it. The last token ends with
    the identifier; where it goes on, as in `__(`, it would say more than how the identifier goes on.

    Args:
        offsets: where the characters of each token begin and end (`Encoder.with_offsets`).
    """
    begins, ends = [begin for begin, _ in offsets], [end for _, end in offsets]
    previous: dict[str, int] = {}
    for match in _WORD.finditer(document):
        name, (begin, end) = match[0], match.span()
        if len(name) < SHORTEST or not name.isascii() or keyword.iskeyword(name):
            continue
        first, last = bisect.bisect_right(ends, begin), bisect.bisect_left(begins, end) - 1
        if last > first and ends[last] == end and begins[first] >= begin - 1:
            yield Occurrence(name, first, last, begins[first], end, previous.get(name))
        previous[name] = first


def find_identifiers(
    encoder: Encoder, text: Text, windows: Tensor, *, stride: int | None = None
) -> Identifiers:
    """The identifiers that are scored in `windows` int64 `[count, window + 1]` of the text.

    Args:
        text, stride: what `evaluation_windows` made the windows of.
    """
    count, window = windows.shape[0], windows.shape[1] - 1
    stride = window if stride is None else stride
    context = window - stride
    read = (count - 1) * stride + window + 1  # tokens that the windows are cut from
    distances = range(RANGES[0][0], RANGES[-1][1])
    found: list[tuple[int, int, int, int]] = []
    start = 0  # of the document, among all tokens
    for document in text.documents:
        if start >= read:
            break
        ids, offsets = encoder.with_offsets(document)
        for o in occurrences(document, offsets):
            # The one window that scores its first token; it begins `row * stride` tokens from the start of the text.
            row, column = divmod(start + o.first - context - 1, stride)
            in_window = 0 <= row < count and column + o.last - o.first < stride
            if not in_window or o.previous is None or o.first - o.previous not in distances:
                continue
            if start + o.previous >= row * stride:
                found.append((row, column, o.last - o.first + 1, o.first - o.previous))
        start += len(ids)
    return Identifiers(window, *torch.tensor(found, dtype=torch.int64).reshape(-1, 4).T)


def identifier_recall(
    found: Identifiers, scores: TokenScores, baseline: TokenScores | None = None
) -> list[IdentifierRecall]:
    """How well a model recalls the identifiers, for each range of distances that has any.

    Args:
        scores: the model's, of the windows and the stride that the identifiers were found in.
        baseline: the same of the model to compare with; None for that model itself.
    """
    own = _words(found, scores)
    drop = None if baseline is None else _words(found, baseline) - own
    result = []
    for begin, end in ranges(found.window):
        chosen = (found.distances >= begin) & (found.distances < end)
        rows = found.rows[chosen]
        if len(rows) > 0:
            figures = _figures(own[:, chosen], rows)
            dropped = None if drop is None else _figures(drop[:, chosen], rows)
            result.append(IdentifierRecall(begin, end, len(rows), len(rows.unique()), figures, dropped))
    return result


def _words(found: Identifiers, scores: TokenScores) -> Tensor:
    """Log-probability of each identifier, whether all its tokens are the most likely ones, and whether its first one
    is: float64 `[3, n]`."""
    count = len(found.rows)
    first = found.rows * scores.log_prob.shape[1] + found.columns
    owner = torch.arange(count).repeat_interleave(found.tokens)
    # How far each token is from the first one of its identifier.
    at = torch.arange(len(owner)) - (found.tokens.cumsum(0) - found.tokens)[owner]
    tokens = first[owner] + at
    log_prob = torch.zeros(count, dtype=torch.float64)
    log_prob.index_add_(0, owner, scores.log_prob.flatten()[tokens].double())
    misses = torch.zeros(count, dtype=torch.int64)
    misses.index_add_(0, owner, (~scores.top1.flatten()[tokens]).long())
    return torch.stack([log_prob, (misses == 0).double(), scores.top1.flatten()[first].double()])


def _figures(words: Tensor, rows: Tensor) -> WordFigures:
    """Means of `_words` `[3, n]` of the windows `rows` int64 `[n]`."""
    log_prob, exact, first_token = (estimate_of_clusters(values, rows) for values in words)
    return WordFigures(log_prob, exact, first_token)
