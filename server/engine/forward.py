"""How a batch goes through the model."""

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.device import upload
from modeling.runtime import Runtime
from modeling.runtime.gpu.graphs import DecodeGraphs
from modeling.spec import TOKEN_BLOCK
from modeling.state import StatePool

ROWS = 16
"""Rows of every product of a decode step in `InvariantForward`, where rows are independent."""


class Forward:
    """A batch goes through the model as a whole, which is the fastest way. A request's logits differ by rounding with
    what shares its batch.

    Args:
        graphs: recorded decode steps on this model and pool.
    """

    def __init__(self, runtime: Runtime, pool: StatePool, graphs: DecodeGraphs | None = None) -> None:
        self.runtime = runtime
        self.pool = pool
        self.device = runtime.model.device
        self._graphs = graphs

    def decode(self, ids: Tensor, slots: Tensor) -> Tensor:
        """One token of each of n requests, in place: ids and slots int64 `[n]` -> hidden states `[n, hidden]`,
        valid until the next step."""
        if self._graphs is not None and len(ids) <= self._graphs.batch_sizes[-1]:
            return self._graphs(ids, slots)
        return self.runtime.decode(ids, self.pool, slots)

    def prefill(self, pieces: list[list[int]], slots: list[int]) -> list[Tensor]:
        """Feed token ids to the states in `slots`; the hidden states of each piece, `[tokens, hidden]`."""
        cu_seqlens = [0]
        for piece in pieces:
            cu_seqlens.append(cu_seqlens[-1] + len(piece))
        ids = upload(torch.tensor([i for piece in pieces for i in piece]), self.device)
        at = upload(torch.tensor(slots), self.device)
        hidden = self.runtime.prefill(ids, cu_seqlens, self.pool, at)
        return list(hidden.split([len(piece) for piece in pieces]))

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, hidden]` -> `[n, vocab]`, in the parameters' dtype or float32."""
        return self.runtime.logits(hidden)


class InvariantForward(Forward):
    """Products of fixed sizes only: a request's logits are the same bits whatever else runs, and however its prompt
    was cut. A row's result does not depend on the other rows of a product, but on how many there are. Where it does
    depend on them (`Runtime.independent_rows`), each request goes alone."""

    def __init__(self, runtime: Runtime, pool: StatePool, graphs: DecodeGraphs | None = None) -> None:
        super().__init__(runtime, pool, graphs)
        self._rows = ROWS if runtime.independent_rows else 1

    def decode(self, ids: Tensor, slots: Tensor) -> Tensor:
        return torch.cat(
            [
                super(InvariantForward, self).decode(
                    F.pad(i, (0, self._rows - len(i))),
                    F.pad(s, (0, self._rows - len(s)), value=self.pool.null_slot),
                )[: len(i)]
                for i, s in zip(ids.split(self._rows), slots.split(self._rows), strict=True)
            ]
        )

    def prefill(self, pieces: list[list[int]], slots: list[int]) -> list[Tensor]:
        # Pieces begin at multiples of TOKEN_BLOCK of their prompts (the scheduler and the cache see to that).
        return [
            torch.cat(
                [
                    super(InvariantForward, self).prefill([piece[start : start + TOKEN_BLOCK]], [slot])[0]
                    for start in range(0, len(piece), TOKEN_BLOCK)
                ]
            )
            for piece, slot in zip(pieces, slots, strict=True)
        ]

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.cat(
            [
                super(InvariantForward, self).logits(F.pad(h, (0, 0, 0, ROWS - len(h))))[: len(h)]
                for h in hidden.split(ROWS)
            ]
        )
