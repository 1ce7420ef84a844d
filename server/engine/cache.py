"""Who holds which state slot: running requests, and prefixes of prompts. The scheduler sees allocations only, never
tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from modeling.spec import TOKEN_BLOCK
from modeling.state import StatePool
from server.engine.prefix_cache import TOKEN_BYTES, CachedPrefix, Prefix, PrefixIndex
from server.engine.state_file import host_tensors, load_state, save_state


@dataclass(frozen=True)
class Allocation:
    """The state of one request, its own for its whole life: it never grows, so it is never preempted."""

    slot: int
    cached: int = 0
    """Tokens of its prompt that are in the state already."""


class StateCache:
    """Allocations out of one StatePool; slots that nobody runs in hold states of prompts.

    Copies are queued on the device in the order of the calls, behind all launched steps. So a state may be copied, and
    its slot given away, as soon as the step that writes it has been launched.

    Args:
        prefix_cache: keep states of prompts.
        aligned: keep them at whole blocks only, so that prompts are cut where they would be without the cache.
    """

    def __init__(self, pool: StatePool, *, prefix_cache: bool = False, aligned: bool = False) -> None:
        self._pool = pool
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

    def prefix(self, token_bytes: bytes, limit: int, salt: bytes) -> Prefix | None:
        """A prompt of which up to `limit` tokens may be taken from what the cache has of its salt; None for one that it
        has no use for."""
        long_enough = len(token_bytes) >= TOKEN_BLOCK * TOKEN_BYTES
        return Prefix(token_bytes, limit, salt) if self._enabled and long_enough else None

    def remember(self, prefix: Prefix) -> int:
        """Remember a prompt. Where it parts from those that were remembered earlier (`PrefixIndex.remember`)."""
        return self._index.remember(prefix)

    def allocate(self, prefix: Prefix | None = None) -> Allocation | None:
        """A state that has seen as much of the prompt as is cached, else a zeroed one. None when all slots are in
        use by requests."""
        entry = None if prefix is None else self._index.find(prefix)
        slot = self._take(zero=entry is None)
        if slot is None:
            return None
        if entry is None:
            return Allocation(slot)
        # Even if it was this entry that made room: its state is still there.
        self._pool.copy(entry.slot, slot)
        return Allocation(slot, entry.length)

    def fork(self, tokens: int) -> Allocation | None:
        """A slot that the runner will copy a state of `tokens` tokens into."""
        slot = self._take(zero=False)
        return None if slot is None else Allocation(slot, tokens)

    def free(self, allocation: Allocation) -> None:
        self._pool.free(allocation.slot)

    def load(self, allocation: Allocation, path: Path) -> Callable[[], None]:
        """The function that reads the state from a file. It may be called in any thread, for as long as nothing else is
        done with the allocation, and raises StateLoadError and MemoryError."""
        return partial(load_state, self._pool, allocation.slot, path)

    def save(self, allocation: Allocation, path: Path, metadata: dict[str, str]) -> Callable[[], None]:
        """The function that writes the state to a file. It may be called in any thread, for as long as nothing else is
        done with the allocation, and raises OSError."""
        return partial(save_state, host_tensors(self._pool, allocation.slot), path, metadata)

    def snapshot(self, prefix: Prefix, length: int, allocation: Allocation) -> CachedPrefix | None:
        """Keep the state of `allocation`, which has seen the first `length` tokens. None when it is kept already, or
        there is no room or no use for it."""
        if (
            length < TOKEN_BLOCK
            or (self._aligned and length % TOKEN_BLOCK)
            or self._index.exact(prefix, length)
        ):
            return None
        slot = self._take(zero=False)
        if slot is None:
            return None
        self._pool.copy(allocation.slot, slot)
        return self._index.add(prefix, length, slot)

    def drop(self, entry: CachedPrefix) -> None:
        """Forget a snapshot, if it is still there."""
        if entry in self._index:
            self._index.remove(entry)
            self._pool.free(entry.slot)

    def _take(self, *, zero: bool) -> int | None:
        if not self._pool.free_slots and (oldest := self._index.oldest()) is not None:
            self.drop(oldest)
        return self._pool.allocate(zero=zero)
