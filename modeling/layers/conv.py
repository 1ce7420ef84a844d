"""The short convolution before a linear-attention mixer's heads."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.ops import wide


class ShortConv(nn.Module):
    """Causal depthwise convolution over packed sequences, then SiLU. Weight `[channels, kernel]`."""

    def __init__(self, channels: int, kernel: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor, cu_seqlens: Sequence[int], state: Tensor | None) -> tuple[Tensor, Tensor]:
        """x `[tokens, channels]`, state `[sequences, channels, kernel - 1]` (the inputs before x; None for zeros).

        Returns y like x and the new state.
        """
        channels, kernel = self.weight.shape
        history = kernel - 1
        sequences = len(cu_seqlens) - 1
        before = (
            x.new_zeros(sequences, history, channels) if state is None else state.transpose(1, 2).to(x.dtype)
        )
        # Each sequence with its history in front, one after the other; the rows at the seams are then left out.
        # split, not slices: the backward of a slice writes a zero tensor of the whole size.
        lengths = [b - a for a, b in itertools.pairwise(cu_seqlens)]
        pieces = zip(before.unbind(), x.split(lengths), strict=True)
        buffer = torch.cat([piece for pair in pieces for piece in pair])
        inputs, weight = wide(buffer), wide(self.weight)
        length = buffer.shape[0] - history
        y = inputs[:length] * weight[:, 0]
        for j in range(1, kernel):
            y = torch.addcmul(y, inputs[j : j + length], weight[:, j])
        if sequences > 1:
            seams = [n for length in lengths for n in (length, history)][:-1]
            y = torch.cat(y.split(seams)[::2])
        if self.bias is not None:
            y = y + self.bias
        ends = [cu_seqlens[i + 1] + (i + 1) * history for i in range(sequences)]
        last = torch.stack([buffer[end - history : end] for end in ends])
        return F.silu(y).to(x.dtype), last.transpose(1, 2)

    def decode(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """One token of each of B requests: x `[B, channels]`, past `[B, channels, kernel - 1]`, the inputs before it.

        Returns y like x and the new past.
        """
        window = torch.cat([past.to(x.dtype), x[..., None]], dim=-1)
        y = (wide(window) * wide(self.weight)).sum(-1)
        if self.bias is not None:
            y = y + self.bias
        return F.silu(y).to(x.dtype), window[..., 1:]
