"""Who holds which state slot, and which pages of keys and values: running requests, and prefixes of prompts. The
scheduler sees allocations only, never tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from lowkey.memory import host_memory
from modeling.spec import TOKEN_BLOCK
from modeling.state import StatePool
from server.engine.prefix_cache import TOKEN_BYTES, CachedPrefix, Prefix, PrefixIndex
from server.engine.state_file import host_tensors, load_state, save_state


@dataclass(frozen=True)
class Allocation:
    """The state of one request, its own while it runs: a slot, which never grows, and the slot's pages, which do."""

    slot: int
    cached: int = 0
    """Tokens of its prompt that are in the state already."""


@dataclass(frozen=True)
class SwappedState:
    """The state of a preempted request, in the host's memory once the device has done what it had been given."""

    slot: int
    """Where it was."""
    tensors: dict[str, Tensor]
    tokens: int
    """How many the state has seen."""
    pages: int
    """How many it had."""


class StateCache:
    """Allocations out of one StatePool; slots that nobody runs in hold states of prompts, and with them the pages of
    these prompts. Pages that are full are shared by all whose state has seen the same tokens.

    Copies are queued on the device in the order of the calls, behind all launched steps. So a state may be copied, and
    its slot and pages given away, as soon as the step that writes it has been launched.

    Args:
        prefix_cache: keep states of prompts.
        aligned: keep them at whole blocks only, so that prompts are cut where they would be without the cache.
    """

    def __init__(self, pool: StatePool, *, prefix_cache: bool = False, aligned: bool = False) -> None:
        self._pool = pool
        self._pages = pool.pages
        self._enabled = prefix_cache
        self._aligned = aligned
        self._index = PrefixIndex()

    @property
    def used(self) -> int:
        """How many slots running requests have."""
        return self._pool.used_slots - len(self._index)

    @property
    def cached(self) -> int:
        """How many slots hold prefixes of prompts."""
        return len(self._index)

    @property
    def available(self) -> int:
        """How many slots requests could get now."""
        return self._pool.free_slots + len(self._index)

    @property
    def used_pages(self) -> int:
        """How many pages running requests have."""
        return self._pages.used

    @property
    def cached_pages(self) -> int:
        """How many pages only prefixes have."""
        return self._pages.cached

    @property
    def available_pages(self) -> int:
        """How many pages requests could get now."""
        return self._pages.free + self._pages.cached

    def pages_for(self, tokens: int) -> int:
        """How many pages a state of that many tokens has."""
        return self._pages.needed(tokens)

    def pages_of(self, allocation: Allocation) -> int:
        """How many pages it has."""
        return len(self._pages.of(allocation.slot))

    @property
    def longest(self) -> int | None:
        """The most tokens that a request which has everything to itself could hold; None for any number."""
        return self._pages.longest if self._pages.count else None

    def prefix(self, token_bytes: bytes, limit: int, salt: bytes) -> Prefix | None:
        """A prompt of which up to `limit` tokens may be taken from what the cache has of its salt; None for one that it
        has no use for."""
        long_enough = len(token_bytes) >= TOKEN_BLOCK * TOKEN_BYTES
        return Prefix(token_bytes, limit, salt) if self._enabled and long_enough else None

    def remember(self, prefix: Prefix) -> int:
        """Remember a prompt. Where it parts from those that were remembered earlier (`PrefixIndex.remember`)."""
        return self._index.remember(prefix)

    def allocate(self, prefix: Prefix | None = None, tokens: int = 0) -> Allocation | None:
        """A state that has seen as much of the prompt as is cached, else a zeroed one.

        Args:
            tokens: how many it has pages for from the beginning.

        Returns:
            None when there is no slot, or there are not enough pages, that no request has.
        """
        entry = None if prefix is None else self._index.find(prefix)
        length = 0 if entry is None else entry.length
        shared = self._pages.full(length)
        needed = self._pages.needed(tokens) - shared
        taken_along = 0 if entry is None else self._pages.only_kept(entry.slot, shared)
        if not self.available or needed > self.available_pages - taken_along:
            return None
        self._evict(1, needed, but=entry)
        if entry is None:
            slot = self._slot(zero=True)
        elif self._pool.free_slots and self._pages.free >= needed:
            slot = self._slot(zero=False)
            self._pages.share(entry.slot, slot, length)
            self._pool.copy(entry.slot, slot)
        else:  # nothing else makes room: the request takes over the very state that it goes on from
            self._index.remove(entry)
            self._pages.run(entry.slot)
            slot = entry.slot
        self._grow(slot, tokens)
        return Allocation(slot, length)

    def fork(
        self, source: Allocation, seen: int, cached: int, tokens: int, spare: int = 0
    ) -> Allocation | None:
        """A slot that the runner will copy the state of `source` into.

        Args:
            seen: how many tokens that state has then seen.
            cached: how many of them are of the prompt.
            tokens: how many it has pages for from the beginning.
            spare: how many pages are to be left for others.
        """
        needed = self._pages.needed(tokens) - self._pages.full(seen)
        if not self.available or needed > self.available_pages - spare:
            return None
        self._evict(1, needed)
        slot = self._slot(zero=False)
        self._pages.share(source.slot, slot, seen)
        self._grow(slot, tokens)
        return Allocation(slot, cached)

    def grow(self, allocation: Allocation, tokens: int) -> bool:
        """Have pages for that many tokens. False when there are not enough that no request has."""
        needed = self._pages.needed(tokens) - self.pages_of(allocation)
        if needed > self.available_pages:
            return False
        self._evict(0, needed)
        return self._pool.grow(allocation.slot, tokens)

    def free(self, allocation: Allocation) -> None:
        self._pool.free(allocation.slot)

    def swap_out(self, allocation: Allocation, tokens: int) -> SwappedState:
        """Free a state of `tokens` tokens and keep it in the host's memory. Raises MemoryError, and it stays."""
        slot = allocation.slot
        needed = self._pool.spec.state_bytes(tokens, self._pool.types)
        if self._pool.device.type == "cuda":
            needed *= 2  # of pinned memory torch takes powers of two
        free = host_memory()
        if needed > free:  # the system would end this process, and all requests with it
            raise MemoryError(f"{needed:,} bytes are needed, and {free:,} are free")
        state = SwappedState(slot, self._pool.to_host(slot, tokens), tokens, self.pages_of(allocation))
        self._pool.free(slot)
        return state

    def swap_in(self, state: SwappedState, cached: int, tokens: int) -> Allocation | None:
        """A state that was swapped out, with pages for `tokens` tokens. None when there is no room. Raises MemoryError,
        and nothing is allocated."""
        allocation = self.allocate(tokens=tokens)
        if allocation is None:
            return None
        try:
            self._pool.load(allocation.slot, state.tensors, state.tokens)
        except MemoryError:
            self._pool.free(allocation.slot)
            raise
        return Allocation(allocation.slot, cached)

    def load(self, allocation: Allocation, path: Path, tokens: int) -> Callable[[], None]:
        """The function that reads a state of `tokens` tokens from a file. It may be called in any thread, for as long
        as nothing else is done with the allocation, and raises StateLoadError and MemoryError."""
        return partial(load_state, self._pool, allocation.slot, path, tokens)

    def save(
        self, allocation: Allocation, tokens: int, path: Path, metadata: dict[str, str]
    ) -> Callable[[], None]:
        """The function that writes the state, of `tokens` tokens, to a file. It may be called in any thread, for as
        long as nothing else is done with the allocation, and raises OSError. Raises MemoryError."""
        return partial(save_state, host_tensors(self._pool, allocation.slot, tokens), path, metadata)

    def snapshot(self, prefix: Prefix, length: int, allocation: Allocation) -> CachedPrefix | None:
        """Keep the state of `allocation`, which has seen the first `length` tokens. None when it is kept already, or
        there is no room or no use for it."""
        if (
            length < TOKEN_BLOCK
            or (self._aligned and length % TOKEN_BLOCK)
            or self._index.exact(prefix, length)
        ):
            return None
        partial_page = self._pages.needed(length) - self._pages.full(length)
        if not self.available or partial_page > self.available_pages:
            return None
        self._evict(1, partial_page)
        slot = self._slot(zero=False)
        self._pages.share(allocation.slot, slot, length, keep=True)
        self._pool.copy(allocation.slot, slot)
        return self._index.add(prefix, length, slot)

    def drop(self, entry: CachedPrefix) -> None:
        """Forget a snapshot, if it is still there."""
        if entry in self._index:
            self._index.remove(entry)
            self._pool.free(entry.slot)

    def _evict(self, slots: int, pages: int, but: CachedPrefix | None = None) -> None:
        """Forget the prefixes whose last use is longest ago, until so many slots and pages are free or none but one is
        left."""
        while self._pool.free_slots < slots or self._pages.free < pages:
            entry = self._index.oldest(but)
            if entry is None:
                return
            self.drop(entry)

    def _slot(self, *, zero: bool) -> int:
        slot = self._pool.allocate(zero=zero)
        if slot is None:
            raise RuntimeError("no slot is free where there was one")
        return slot

    def _grow(self, slot: int, tokens: int) -> None:
        if not self._pool.grow(slot, tokens):
            raise RuntimeError(f"no pages for {tokens} tokens where there were enough")
