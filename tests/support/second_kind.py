"""A kind of mixer that is not ours, to see that nothing takes every layer for linear attention: an exponential moving
average of a projection. `registered` makes it known as a new kind would be."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modeling.layers import Mixer
from modeling.layers.block import MIXERS
from modeling.state.pool import MAKERS

DECAY = 0.75


@dataclass(frozen=True)
class AverageSpec:
    width: int

    def state_bytes(self, tokens, types):
        return self.width * types.recurrent.itemsize


class AverageMixer(Mixer):
    def __init__(self, spec, hidden_size, layer):
        super().__init__()
        self.in_proj = nn.Linear(hidden_size, spec.width, bias=False)
        self.o_proj = nn.Linear(spec.width, hidden_size, bias=False)

    def forward(self, x, cu_seqlens, state=None, *, rule=None, tap=None):
        projected = self.in_proj(x)
        before = (
            projected.new_zeros(len(cu_seqlens) - 1, projected.shape[1]) if state is None else state.average
        )
        out, after = [], []
        for i, average in enumerate(before.to(projected.dtype)):
            for row in projected[cu_seqlens[i] : cu_seqlens[i + 1]]:
                average = DECAY * average + (1 - DECAY) * row
                out.append(average)
            after.append(average)
        return self.o_proj(torch.stack(out)), AverageState(torch.stack(after))

    def decode(self, x, state, slots):
        after = DECAY * state.average[slots].to(x.dtype) + (1 - DECAY) * self.in_proj(x)
        state.average[slots] = after.to(state.average.dtype)
        return self.o_proj(after)


@dataclass
class AverageState:
    average: Tensor
    """`[rows, width]`."""

    @classmethod
    def zeros(cls, spec, pages, types, device):
        return cls(torch.zeros(pages.rows, spec.width, dtype=types.recurrent, device=device))

    @property
    def bytes_per_row(self):
        return self.average[0].nbytes

    def zero(self, row):
        self.average[row].zero_()

    def copy(self, source, target):
        self.average[target].copy_(self.average[source])

    def gather(self, rows):
        return AverageState(self.average[rows])

    def scatter(self, rows, state):
        self.average[rows] = state.average.to(self.average.dtype)

    def tensors(self, row, tokens):
        return {"average": self.average[row]}

    def to_host(self, row, tokens):
        return {"average": self.average[row].clone()}

    def load(self, row, tensors):
        self.average[row].copy_(tensors["average"])


@contextmanager
def registered():
    """The kind is known inside the block."""
    MIXERS[AverageSpec], MAKERS[AverageSpec] = AverageMixer, AverageState.zeros
    try:
        yield
    finally:
        del MIXERS[AverageSpec], MAKERS[AverageSpec]
