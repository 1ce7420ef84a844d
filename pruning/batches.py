"""Text -> batches for training: what a step reads depends on the text, the seed and the step alone."""

import hashlib
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from pruning.calibration import Encoder, Text
from pruning.errors import PruningError


def token_stream(encoder: Encoder, text: Text, *, tokens: int, seed: int) -> Tensor:
    """Whole documents in random order, one behind the other, until there are `tokens` or no more; int32 `[n]`."""
    stream: list[int] = []
    for i in np.random.default_rng(seed).permutation(len(text.documents)):
        if len(stream) >= tokens:
            break
        stream += encoder(text.documents[i])
    return torch.tensor(stream, dtype=torch.int32)


class Batches:
    """Windows of a token stream in random order, epoch after epoch.

    Every epoch cuts the stream at another random offset, so that a window starts elsewhere the next time.

    Args:
        stream: `[tokens]`, any integer dtype.
        window: tokens to predict per window.
        batch: windows per batch.

    Raises:
        PruningError: the stream is shorter than two windows, or `window` or `batch` is below 1.
    """

    def __init__(self, stream: Tensor, *, window: int, batch: int, seed: int) -> None:
        for name, value in (("window_length", window), ("batch", batch)):
            if value < 1:
                raise PruningError(f"{name}={value} must be at least 1")
        # One window of slack for the offset.
        self.per_epoch = (len(stream) - 1) // window - 1
        if self.per_epoch < 1:
            raise PruningError(
                f"the text gives {len(stream)} tokens, which are not two windows of {window}; "
                "add text, or ask for shorter windows"
            )
        self._stream = stream
        self._window, self._batch, self._seed = window, batch, seed
        self._epoch = lru_cache(maxsize=2)(self._draw)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the token stream, as int32: it says whether two runs read the same text."""
        return hashlib.sha256(self._stream.to(torch.int32).numpy().tobytes()).hexdigest()

    def epochs(self, batches: int) -> float:
        """How often the text is read in the first `batches` batches."""
        return batches * self._batch / self.per_epoch

    def __getitem__(self, index: int) -> Tensor:
        """Batch `index`, int64 `[batch, window + 1]`: the last column is target only."""
        first = index * self._batch
        starts = [
            int(self._epoch(n // self.per_epoch)[n % self.per_epoch])
            for n in range(first, first + self._batch)
        ]
        return self._stream[torch.tensor(starts)[:, None] + torch.arange(self._window + 1)].long()

    def _draw(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch start, in the order in which they are read."""
        generator = np.random.default_rng((self._seed, epoch))
        offset = generator.integers(self._window)
        starts: np.ndarray = offset + self._window * generator.permutation(self.per_epoch)
        return starts
