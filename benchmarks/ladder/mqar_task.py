"""Multi-query associative recall (MQAR) as in Zoology (arXiv 2312.04927, section 3.2 and appendix A), without text.

A sequence is N pairs of a key and its value, then places of two tokens. In N of these places stands one of the keys
again, and the model has to say its value there; every other token behind the pairs is drawn at random:

    k1 v1 k2 v2 ... kN vN | k2 . . . k1 . . . . .

The lower half of the vocabulary is keys, the upper half values; token 0 is never drawn. How far behind the pairs a key
is asked for follows a power law, p(place) ~ place^(POWER - 1), so most questions come soon and some late.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

POWER = 0.01
"""Zoology's exponent of the power law."""
SHORTEST = 64
"""Tokens of a sequence, at least."""


@dataclass(frozen=True)
class Questions:
    """Sequences with the same number of pairs."""

    ids: Tensor
    """int64 `[sequences, length]`."""
    at: Tensor
    """Positions of the keys that are asked for, int64 `[sequences, pairs]`."""
    values: Tensor
    """The right answer at each of these, int64 `[sequences, pairs]`."""

    @property
    def pairs(self) -> int:
        return self.at.shape[1]


def length_for(pairs: int) -> int:
    """Tokens of a sequence with so many pairs: as in Zoology's tests, room for pairs and questions, and 64 or more."""
    return max(SHORTEST, 4 * pairs)


def draw(
    generator: torch.Generator, count: int, pairs: int, vocab: int, *, length: int | None = None
) -> Questions:
    """`count` sequences on the generator's device.

    Args:
        vocab: size of the vocabulary.
        length: tokens of a sequence, even; None for `length_for(pairs)`.

    Raises:
        ValueError: the vocabulary has too few keys, or the sequence too few places, for so many pairs.
    """
    length = length or length_for(pairs)
    half = vocab // 2
    places = length // 2 - pairs
    if half - 1 < pairs or places < pairs:
        raise ValueError(
            f"pairs={pairs} need a vocabulary of {2 * pairs + 2} or more and {4 * pairs} tokens; "
            f"there are {vocab} and {length}"
        )
    device = generator.device

    def uniform(n: int) -> Tensor:
        return torch.rand(count, n, generator=generator, device=device)

    keys = 1 + uniform(half - 1).topk(pairs).indices
    values = half + uniform(vocab - half).topk(pairs).indices
    # The largest of log p + Gumbel noise are a draw without replacement, one after the other, with probabilities p.
    log_p = (POWER - 1) * torch.arange(1, places + 1, device=device).log()
    place = (log_p - (-uniform(places).clamp(min=1e-30).log()).log()).topk(pairs).indices
    ids = torch.randint(1, vocab, (count, length), generator=generator, device=device)
    ids[:, : 2 * pairs] = torch.stack([keys, values], dim=-1).flatten(1)
    at = 2 * pairs + 2 * place
    ids.scatter_(1, at, keys)
    return Questions(ids, at, values)
