"""What the calls of the compiled library share."""

from collections.abc import Sequence

import torch
from torch import Tensor

_ERRORS: dict[int, tuple[type[Exception], str]] = {
    1: (IndexError, "a token id is outside the vocabulary"),
    2: (IndexError, "a slot is outside the pool"),
    3: (MemoryError, "no memory for the step's activations"),
    4: (IndexError, "more tokens than fit the pages of a slot of the pool"),
    5: (IndexError, "a slot's table names a page that is outside the pool"),
}


def check(code: int) -> None:
    """Raise what the library's return code says."""
    if code:
        kind, message = _ERRORS[code]
        raise kind(message)


def offsets_of(cu_seqlens: Sequence[int], tokens: int) -> Tensor:
    """The offsets of packed sequences as int64. Raises ValueError if they are not those of `tokens` tokens."""
    offsets = torch.tensor(cu_seqlens, dtype=torch.long)
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != tokens or bool((offsets.diff() < 1).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens, no sequence empty")
    return offsets
