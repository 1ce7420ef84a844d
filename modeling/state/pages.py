"""Pages of keys and values: which of them each slot has, on the host, and the tables that kernels read.

A page holds the keys and values of `PAGE_TOKENS` consecutive tokens, in all softmax attention layers of a model. Slots
may share the pages that are full, which are never written to again: those of a prompt are kept once, however many
states go on from it. A page is free again once no slot has it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.device import upload
from modeling.spec import TOKEN_BLOCK, ModelSpec, StateTypes

PAGE_TOKENS = TOKEN_BLOCK
"""Tokens of a page: prefixes are kept at its multiples, so that they share all their pages."""


LEAST_WIDTH = 4096
"""Columns of the table that there are even with less pages, where the context is so long. What a decode step launches
depends on the columns, and must be the same for the few pages with which an engine compiles its kernels and measures
their memory as for those it then has."""


def pages_for(tokens: int) -> int:
    """How many pages that many tokens take."""
    return -(-tokens // PAGE_TOKENS)


def page_bytes(spec: ModelSpec, types: StateTypes) -> int:
    """Bytes of a page in all softmax attention layers of a model; 0 if it has none."""
    return PAGE_TOKENS * spec.kv_bytes_per_token(types)


class Pages:
    """The pages of a pool. For a model without softmax attention there are none, none are ever needed, and no lengths
    are kept.

    Args:
        rows: slots of the pool, the null slot among them, which is the last one and has no pages.
        count: how many pages there are.
        longest: the most tokens that a slot's state may have; more than the pages hold are as many as they hold.
        device: where the tables are.
    """

    def __init__(self, rows: int, count: int, longest: int, device: torch.device | str) -> None:
        self.rows = rows
        self.count = count
        self.null_page = count
        """One page more than there are: what no slot has a page for is written to it, and means nothing."""
        self.longest = min(longest, count * PAGE_TOKENS)
        """Most tokens of one slot."""
        width = min(pages_for(longest), max(count, LEAST_WIDTH)) if count else 0
        self.blocks = torch.full((rows, width), self.null_page, dtype=torch.int32, device=device)
        """Number of the page of each `PAGE_TOKENS` tokens of each slot, int32 `[rows, width]`."""
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        """Tokens in each slot's state, int32 `[rows]`."""
        self._of: list[list[int]] = [[] for _ in range(rows)]
        self._kept: set[int] = set()
        """Slots that hold prefixes: what only they have can be taken from them."""
        self._references = [0] * count
        self._running = [0] * count
        """For each page, how many of the slots that have it are not `_kept`."""
        self._free = list(range(count - 1, -1, -1))
        self.used = 0
        """How many pages slots have that are not kept."""

    @property
    def free(self) -> int:
        """How many pages nobody has."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """How many pages only kept slots have."""
        return self.count - self.free - self.used

    def needed(self, tokens: int) -> int:
        """How many pages a state of that many tokens has."""
        return pages_for(tokens) if self.count else 0

    def full(self, tokens: int) -> int:
        """How many of these pages are full."""
        return tokens // PAGE_TOKENS if self.count else 0

    def of(self, slot: int) -> Sequence[int]:
        """Numbers of a slot's pages, those of its first tokens first."""
        return self._of[slot]

    def only_kept(self, slot: int, full: int) -> int:
        """How many of the first `full` pages of a slot only kept slots have."""
        return sum(not self._running[page] for page in self._of[slot][:full])

    def grow(self, slot: int, tokens: int) -> bool:
        """Give a slot the pages that a state of `tokens` tokens needs. False, and nothing is changed, if there are not
        enough. Raises ValueError for more tokens than a slot may have."""
        own = self._of[slot]
        missing = self.needed(tokens) - len(own)
        if missing <= 0:
            return True
        if tokens > self.longest:
            raise ValueError(f"a state of {tokens} tokens; at most {self.longest} fit a slot of this pool")
        if missing > self.free:
            return False
        self._append(slot, [self._free.pop() for _ in range(missing)])
        return True

    def share(self, source: int, target: int, tokens: int, *, keep: bool = False) -> None:
        """Give `target`, which has none, the pages of the first `tokens` tokens of `source`: those that are full, and
        one of its own for the rest, which the state's copy fills.

        Args:
            keep: the target holds a prefix, and runs nothing.

        Raises:
            RuntimeError: no page is free for the rest.
        """
        full = self.full(tokens)
        rest = self.needed(tokens) - full
        if rest > self.free:
            raise RuntimeError(f"no page is free for the last {tokens % PAGE_TOKENS} of {tokens} tokens")
        if keep:
            self._kept.add(target)
        self._append(target, self._of[source][:full] + ([self._free.pop()] if rest else []))

    def run(self, slot: int) -> None:
        """The slot, which held a prefix, is a request's from now on, with all its pages."""
        self._kept.remove(slot)
        for page in self._of[slot]:
            self._begin(page)

    def release(self, slot: int) -> None:
        """Take all pages from a slot."""
        own = self._of[slot]
        for page in own:
            self._references[page] -= 1
            if slot not in self._kept:
                self._running[page] -= 1
                self.used -= not self._running[page]
            if not self._references[page]:
                self._free.append(page)
        if own:
            self.blocks[slot, : len(own)] = self.null_page
        self._kept.discard(slot)
        self._of[slot] = []

    def differing(self, source: int, target: int) -> list[tuple[int, int]]:
        """The pages, of the source and of the target, of the tokens that both have pages for and do not share."""
        return [(a, b) for a, b in zip(self._of[source], self._of[target], strict=False) if a != b]

    def set_length(self, slot: int, tokens: int) -> None:
        """Say how many tokens a slot's state has."""
        if self.count:
            # Assigned to one place of a tensor, a number would be copied from the host, which waits for the device.
            self.lengths[slot : slot + 1].fill_(tokens)

    def copy_length(self, source: int, target: int) -> None:
        """The target's state has as many tokens as the source's, once all launched steps are done."""
        if self.count:
            self.lengths[target] = self.lengths[source]

    def advance(self, slots: Tensor, cu_seqlens: Sequence[int] | None = None) -> None:
        """The states of `slots` int64 `[n]` have the tokens of packed sequences more, whose offsets are `cu_seqlens`;
        None for one token each. The null slot's never has any."""
        if not self.count:
            return
        if cu_seqlens is None:
            self.lengths[slots] += 1
        else:
            offsets = upload(torch.tensor(cu_seqlens, dtype=torch.int32), self.lengths.device)
            self.lengths[slots] += offsets.diff()
        self.lengths[-1:].zero_()

    def _append(self, slot: int, pages: list[int]) -> None:
        own = self._of[slot]
        at = len(own)
        own += pages
        for page in pages:
            self._references[page] += 1
            if slot not in self._kept:
                self._begin(page)
        if pages:
            row = upload(torch.tensor(pages, dtype=torch.int32), self.blocks.device)
            self.blocks[slot, at : len(own)] = row

    def _begin(self, page: int) -> None:
        self._running[page] += 1
        self.used += self._running[page] == 1
