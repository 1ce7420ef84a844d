"""Keys and values of softmax attention, which grow with every token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.huge_pages import zeros
from modeling.spec import AttentionSpec, StateTypes
from modeling.state.pages import PAGE_TOKENS, Pages, pages_for
from modeling.state.transfer import empty, put

STAGED = 64
"""Pages that are gathered at a time on their way to the host, and back."""


@dataclass(frozen=True)
class KVState:
    """The keys and values of packed sequences: for each `[tokens, num_kv_heads, head_dim]`, in tensors of their own,
    which are never written to.

    It is what a softmax attention mixer's forward takes and gives, and differentiable; a pool keeps them in pages.
    """

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def zeros(
        cls, spec: AttentionSpec, rows: int, types: StateTypes, device: torch.device | str
    ) -> "KVState":
        """States before the first token."""
        empty = torch.empty(0, spec.num_kv_heads, spec.head_dim, dtype=types.inputs, device=device)
        return cls([empty] * rows, [empty] * rows)

    def extended(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> "KVState":
        """The state after more tokens: for each row `[new tokens, num_kv_heads, head_dim]` keys and values, in whose
        dtype all of it then is."""
        return KVState(
            [torch.cat([old.to(new.dtype), new]) for old, new in zip(self.keys, keys, strict=True)],
            [torch.cat([old.to(new.dtype), new]) for old, new in zip(self.values, values, strict=True)],
        )


@dataclass(frozen=True)
class PagedKV:
    """`modeling.state.LayerState` of a softmax attention mixer in a pool: its keys and values in pages.

    `keys` and `values` are `[pages, num_kv_heads, PAGE_TOKENS, head_dim]`, the last page being the null page. The key
    of a slot's token p is in row `p % PAGE_TOKENS` of its page number `p // PAGE_TOKENS`.
    """

    keys: Tensor
    values: Tensor
    pages: Pages

    @classmethod
    def zeros(
        cls, spec: AttentionSpec, pages: Pages, types: StateTypes, device: torch.device | str
    ) -> "PagedKV":
        """All pages of one layer."""
        shape = [pages.count + 1, spec.num_kv_heads, PAGE_TOKENS, spec.head_dim]
        return cls(zeros(shape, types.inputs, device), zeros(shape, types.inputs, device), pages)

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a row before its first token: none."""
        return 0

    def zero(self, row: int) -> None:
        """Nothing: of a row without tokens nothing is read."""

    def copy(self, source: int, target: int) -> None:
        """Copy what is in pages that the rows do not share."""
        for old, new in self.pages.differing(source, target):
            self.keys[new].copy_(self.keys[old])
            self.values[new].copy_(self.values[old])

    def gather(self, rows: Tensor) -> KVState:
        lengths = self.pages.lengths[rows].tolist()
        chosen = list(zip(rows.tolist(), lengths, strict=True))
        return KVState(*([self._tokens(t, *row) for row in chosen] for t in (self.keys, self.values)))

    def scatter(self, rows: Tensor, state: KVState) -> None:
        """Write what packed sequences have more tokens than the rows.

        Raises:
            IndexError: more than a row may have.
        """
        lengths = self.pages.lengths[rows].tolist()
        for i, (row, past) in enumerate(zip(rows.tolist(), lengths, strict=True)):
            total = len(state.keys[i])
            if total > self.pages.longest:
                raise IndexError(f"{total} tokens in slot {row}; at most {self.pages.longest} fit one")
            at = torch.arange(past, total, device=self.keys.device)
            page, place = self.pages.blocks[row, at // PAGE_TOKENS].long(), at % PAGE_TOKENS
            for ours, theirs in ((self.keys, state.keys[i]), (self.values, state.values[i])):
                ours[page, :, place] = theirs[past:].to(ours.dtype)

    def tensors(self, row: int, tokens: int) -> dict[str, Tensor]:
        """Copies of a row's keys and values, `[tokens, num_kv_heads, head_dim]` each."""
        return {name: self._tokens(t, row, tokens) for name, t in self._all.items()}

    def to_host(self, row: int, tokens: int) -> dict[str, Tensor]:
        return {name: self._tokens_to_host(t, row, tokens) for name, t in self._all.items()}

    def load(self, row: int, tensors: Mapping[str, Tensor]) -> None:
        load = self._load_staged if self.keys.is_cuda else self._load
        for name, t in self._all.items():
            load(tensors[name], t, row)

    @property
    def _all(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "values": self.values}

    def _tokens(self, t: Tensor, row: int, tokens: int) -> Tensor:
        pages = self.pages.blocks[row, : pages_for(tokens)].long()
        # Of a single page the rest is a view, and files take no tensor with gaps.
        return t[pages].transpose(1, 2).flatten(0, 1)[:tokens].contiguous()

    def _tokens_to_host(self, t: Tensor, row: int, tokens: int) -> Tensor:
        """`_tokens` on the host, gathered a few pages at a time: there may be no memory on a GPU for all of a long
        one."""
        _, heads, _, channels = t.shape
        host = empty((tokens, heads, channels), t.dtype, pin_memory=t.is_cuda)
        pages = self.pages.blocks[row, : pages_for(tokens)].long().split(STAGED)
        for part, chosen in zip(host.split(STAGED * PAGE_TOKENS), pages, strict=True):
            part.copy_(t[chosen].transpose(1, 2).flatten(0, 1)[: len(part)], non_blocking=True)
        return host

    def _load(self, host: Tensor, t: Tensor, row: int) -> None:
        for page, part in zip(self.pages.of(row), host.split(PAGE_TOKENS), strict=False):
            put(part.transpose(0, 1), t[page, :, : len(part)])

    def _load_staged(self, host: Tensor, t: Tensor, row: int) -> None:
        """`_load` through copies on the device, where a page at a time would be a thousand small transfers."""
        pages = self.pages.blocks[row].split(STAGED)
        for part, chosen in zip(host.split(STAGED * PAGE_TOKENS), pages, strict=False):
            count = pages_for(len(part))
            # What is behind the last token means nothing.
            staged = t.new_empty(count * PAGE_TOKENS, *part.shape[1:])
            put(part, staged[: len(part)])
            t[chosen[:count].long()] = staged.unflatten(0, (count, PAGE_TOKENS)).transpose(1, 2)
